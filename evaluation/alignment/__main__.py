"""Scores a checkpoint on an alignment suite: a table, suite.json and a picture in the output folder.

    python -m simla.evaluation.alignment --checkpoint output/Pretrain/checkpoint_29.pth \\
        --suite sugar_crepe --root sugar-crepe/data --image_root coco/val2017

`--suite scenes` reads the data of the demo, which `python -m simla.demo.data` makes.
"""

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path

from simla.dataset.readers.suites import SUITES, files_of, locate, read_suite
from simla.engine.command import run_command
from simla.evaluation.alignment.report import table
from simla.utils import UserError, atomic_write, check_picture_name, json_text, make_output_folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m simla.evaluation.alignment",
        description="Does a model tell a text that describes an image from one that nearly does?",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="of Pretrain.py, Retrieval.py or Grounding.py")
    add("--suite", required=True, choices=(*SUITES, "scenes"), help="docs/alignment_suite.md tells them")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--file", nargs="+", type=Path, help="the suite's official files")
    files.add_argument("--root", type=Path, help="folder in which they lie, or of the demo's data")
    add("--image_root", nargs="+", type=Path, help="folders of its images (default: --root)")
    add(
        "--blind_checkpoint",
        help="whose word head reads the texts alone (default: --checkpoint, if it has one)",
    )
    add("--out", type=Path, help="output folder (default: output/alignment/SUITE)")
    add("--config", help="the task's YAML file, where the checkpoint holds no config")
    add("--score_itc_weight", type=float, help="of the cosine beside matching (default: the config's)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--dtype", default="fp32", help="fp32, tf32, bf16 or fp16 (default: %(default)s)")
    return parser.parse_args()


def read(args: argparse.Namespace, left_out: Counter) -> list:
    if args.suite == "scenes":
        from simla.demo.swaps import scene_rows

        return scene_rows(args.root or Path("data/demo"))
    if not (args.file or args.root):
        raise UserError(f"--suite {args.suite} needs --file or --root: its official files")
    files = args.file or files_of(args.suite, args.root)
    roots = args.image_root or ([args.root] if args.root else sorted({file.parent for file in files}))
    return locate(read_suite(args.suite, files, left_out), roots, left_out)


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    check_picture_name("suite.png")
    left_out: Counter = Counter()
    rows = read(args, left_out)
    if not rows:
        raise UserError(f"no row of {args.suite} has its images below --image_root: {dict(left_out)}")
    out = make_output_folder(args.out or Path("output/alignment") / args.suite, "--out")
    from simla.loading import load
    from simla.plots import plot_suite

    model = load(args.checkpoint, args.device, args.dtype, args.config)
    if args.score_itc_weight is not None:
        model.config["score_itc_weight"] = args.score_itc_weight
    blind = load(args.blind_checkpoint, args.device, args.dtype) if args.blind_checkpoint else None
    if blind is not None and blind.word_head is None:
        raise UserError(
            f"--blind_checkpoint {args.blind_checkpoint} has no head for masked words that reads text alone"
        )
    result = model.score_suite(rows, blind)
    result["left_out"] = {**left_out, **result["left_out"]}
    print(table(args.suite, result))
    content = {
        "suite": args.suite,
        "checkpoint": args.checkpoint,
        "blind_checkpoint": args.blind_checkpoint or args.checkpoint,
        "score_itc_weight": model.config["score_itc_weight"],
        "summary": result["summary"],
        "left_out": result["left_out"],
        "rows": [row._asdict() for row in result["rows"]],
        "scores": {name: [m.tolist() for m in matrices] for name, matrices in result["scores"].items()},
    }
    with atomic_write(out / "suite.json", text=True) as file:
        file.write(json_text(content, "suite.json"))
    plot_suite(args.suite, result["summary"], out / "suite.png")
    print(f"{out / 'suite.json'}\n{out / 'suite.png'}")


if __name__ == "__main__":
    run_command(main)
