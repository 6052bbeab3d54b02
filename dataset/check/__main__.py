"""Looks through the annotation files and images of a task's config before a run.

python -m simla.dataset.check --config configs/Pretrain.yaml --output_dir output/check
python -m simla.dataset.check --config configs/VQA.yaml --full --fix data/fixed

Finds wrong entries, empty and cut texts, images that are missing, truncated, damaged, tiny or the same as
others, and training images that an evaluation split shows; measures how long reading an epoch takes.
--output_dir gets report.json, report.html with samples and pictures of what was found, and a record of every
image that was looked at: a check that was stopped goes on where it was.

Every image file is read and its header and end are checked (some 2,000 a second and core, of 640x480); --full
decodes it, too (some 500), and compares what pictures show. Exit code: 0 no problems (there may be notes), 1
problems found, 2 the check could not be made (flags, config, tokenizer, output folder).
"""

import argparse
import logging
import os
import sys

from simla.configs.reader import add_overrides, read_config, task_name, task_of
from simla.configs.schema import TABLES
from simla.engine.command import GOES_ON, run_command
from simla.models.bert_config import BertConfig
from simla.utils import UserError, log, make_output_folder, num_cores, printable

CHECKED = [task for task in TABLES if task != "zero_shot_retrieval"]  # which reads Retrieval's configs


def check(args: argparse.Namespace) -> bool:
    """Return whether there are problems. Raises UserError where the check cannot be made."""
    name = args.task or task_of(args.config)
    if name not in CHECKED:
        raise UserError(
            f"{args.config} is not named after a task; say which one with --task: {', '.join(CHECKED)}"
        )
    notes = []
    config = read_config(args.config, TABLES[name], args.overrides, notes)
    for note in notes:
        log.info(note)
    folder = make_output_folder(args.output_dir)
    position_limit = BertConfig.read(config["bert_config"]).max_position_embeddings

    # Here, because torch takes seconds.
    from simla.dataset.check.findings import Findings, measure_reading
    from simla.dataset.check.fix import write_fixed
    from simla.dataset.check.images import read_images
    from simla.dataset.check.report import Report
    from simla.dataset.check.tasks import SPLITS, open_sources
    from simla.dataset.check.texts import Shared, read_texts
    from simla.dataset.text import build_tokenizer
    from simla.dataset.workers import Workers

    splits = SPLITS[name]
    sources = open_sources(splits, config, position_limit)
    try:
        tokenizer = build_tokenizer(args.text_encoder or config["text_encoder"])
    except UserError:
        for source in sources:
            if source.problem:
                log.info(f"problem: {source.problem}")
        raise

    shared = Shared(sources, tokenizer.backend_tokenizer)
    with Workers(shared, args.workers) as workers:
        texts = read_texts(workers, sources)
        images = read_images(workers, texts, folder, args.full)

    findings = Findings(shared, texts, images)
    for split, spec in splits.items():
        # The script's own reading would stop at a wrong entry.
        if spec.whole is not None and findings.all_entries_are_right(split):
            try:
                problems, notes = spec.whole(config, tokenizer, position_limit)
            except UserError as error:
                problems, notes = [str(error)], []
            findings.whole += problems
            findings.notes += notes

    reading = measure_reading(findings, config)
    fixed = write_fixed(findings, args.fix) if args.fix else None
    report = Report(findings, {"config": args.config, "task": name, "full": args.full}, reading, fixed)
    report.write(folder)
    print(printable(report.text()))
    print(f"\n{folder / 'report.html'}: samples and pictures of what was found; report.json: all of it")
    return findings.has_problems()


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m simla.dataset.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file of a task script")
    parser.add_argument(
        "--task", type=task_name, choices=CHECKED, help="its task (default: what its file name begins with)"
    )
    parser.add_argument("--output_dir", default="output/check", help="default: %(default)s")
    parser.add_argument(
        "--fix", default="", metavar="DIR", help="write annotation files without problems there"
    )
    parser.add_argument("--full", action="store_true", help="decode every image and compare what they show")
    parser.add_argument("--workers", default=num_cores(), type=int, help="processes (default: %(default)s)")
    parser.add_argument("--text_encoder", default="", help="BERT name or folder; replaces the config's")
    add_overrides(parser)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    try:
        return int(check(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_command(main, GOES_ON)
