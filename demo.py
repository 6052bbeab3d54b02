"""The demo: embedded scenes, pre-training, zero-shot retrieval on held-out scenes; a table and two pictures.

make demo            (or: python demo.py [--output_dir output/demo])
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from config import PRETRAIN, read_config
from curves import plot_curves
from dataset.annotations import TEXT, read_annotations
from dataset.demo import make_demo
from launch import run_script
from plots import import_pyplot, plot_gallery
from utils import UserError, free_port, num_cores

CONFIGS = Path("configs/demo")
DATA = Path("data/demo")
METRICS = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")


def num_processes() -> int:
    """Two, but one where there is one GPU or one core."""
    return min(2, torch.cuda.device_count() or num_cores())


def launch(script: str, *arguments: str) -> None:
    """Runs a task script on all processes; UserError when it fails."""
    command = [sys.executable, "-m", "torch.distributed.launch", f"--nproc_per_node={num_processes()}"]
    command += [f"--master_port={free_port()}", "--use_env", script, *arguments]
    print("\n$ python " + " ".join(command[1:]), flush=True)
    threads = str(max(1, num_cores() // num_processes()))
    environment = {"OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore::FutureWarning", **os.environ}
    if subprocess.run(command, env=environment).returncode:
        raise UserError(f"{script} failed; see its message above")


def make_data() -> None:
    """The embedded data set in DATA, unless it is there already."""
    try:
        make_demo(DATA, workers=num_cores())
    except (ImportError, OSError, ValueError) as error:
        raise UserError(str(error)) from error


def retrieval(output_dir: Path, *arguments: str) -> dict:
    """Zero-shot retrieval on the test scenes -> the scores of result/retrieval.json."""
    common = ["--config", str(CONFIGS / "Retrieval.yaml"), "--output_dir", str(output_dir)]
    launch("zero_shot_retrieval.py", "--evaluate", *common, *arguments)
    return json.loads((output_dir / "result" / "retrieval.json").read_bytes())


def spread(items: Sequence[int], number: int) -> list[int]:
    """At most `number` of the items, evenly spread, whatever they show."""
    return list(items[:: max(1, len(items) // number)][:number])


def gallery(output_dir: Path, num_queries: int = 8, num_results: int = 5) -> None:
    """The top pictures for the first caption of every so-manieth test scene, whatever the outcome."""
    saved = output_dir / "after" / "result" / "retrieval_scores.pt"
    scores = torch.load(saved, weights_only=True)["scores_t2i"]
    entries = read_annotations(str(DATA / "retrieval_test.json"), {"image": TEXT, "caption": (list,)})
    first_text = [0]
    for entry in entries:
        first_text.append(first_text[-1] + len(entry["caption"]))
    chosen = spread(range(len(entries)), num_queries)
    top = {image: scores[first_text[image]].topk(num_results).indices.tolist() for image in chosen}
    plot_gallery(
        [entries[image]["caption"][0] for image in chosen],
        [[entries[found]["images"][0] for found in top[image]] for image in chosen],
        [[found == image for found in top[image]] for image in chosen],
        output_dir / "gallery.png",
        f"Text queries, top {num_results} of {len(entries)} held-out scenes (green: the right one)",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="output/demo", type=Path)
    parser.add_argument("--seed", default="42")
    args = parser.parse_args()
    out = args.output_dir
    begin = time.monotonic()

    import_pyplot()  # what the end needs is missing at the start or not at all
    make_data()
    for left_over in ("train_steps.jsonl", "log.txt", "codebook.safetensors"):  # of an earlier run
        (out / left_over).unlink(missing_ok=True)
    before = retrieval(out / "before", "--seed", args.seed)
    overrides = [f"image_tokenizer.path={out}/codebook.safetensors", f"batch_size={32 // num_processes()}"]
    config = read_config(str(CONFIGS / "Pretrain.yaml"), PRETRAIN, overrides)
    pretrain = ["--config", str(CONFIGS / "Pretrain.yaml"), "--output_dir", str(out), "--seed", args.seed]
    launch("Pretrain.py", *pretrain, "--overrides", *overrides)
    last = out / f"checkpoint_{config['schedular']['epochs'] - 1:02d}.pth"
    after = retrieval(out / "after", "--checkpoint", str(last), "--overrides", "save_scores=true")
    seconds = round(time.monotonic() - begin)

    chance = after["chance"]
    print(f"\nzero-shot retrieval, {after['n']} held-out scenes, {after['num_texts']} texts, recall in %\n")
    print(f"{'':10}{'chance':>8}{'before':>8}{'after':>8}")
    for name in METRICS:
        print(f"{name:10}{chance[name]:8.1f}{before[name]:8.1f}{after[name]:8.1f}")
    summary = {
        "n": after["n"],
        **{name: after[name] for name in METRICS},
        "before": {name: before[name] for name in METRICS},
        "chance": {name: chance[name] for name in METRICS},
    }
    text = json.dumps({"zero_shot_retrieval": summary, "seconds": seconds}, indent=1)
    (out / "summary.json").write_text(text, encoding="utf-8")
    plot_curves([out], out / "losses.png")
    gallery(out)
    print(f"\n{seconds} s; {out}/summary.json, {out}/gallery.png, {out}/losses.png")


if __name__ == "__main__":
    run_script(main)
