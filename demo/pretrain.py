"""The demo: embedded scenes, pre-training, zero-shot retrieval on held-out scenes; a table and two pictures.

make demo            (or: python -m simla.demo.pretrain [--output_dir output/demo])

A second call goes on where an interrupted one stopped, and after a finished one shows its results again. What
imports torch is imported where it is needed: the processes that draw the scenes import this file too.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from simla.configs.reader import read_yaml
from simla.demo.data import NUM_WORKERS, make_demo, without_interrupts, write_json
from simla.engine.command import GOES_ON, run_command
from simla.utils import UserError, free_port, import_pyplot, num_cores

CONFIGS = Path("configs/demo")
DATA = Path("data/demo")
METRICS = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
GLOBAL_BATCH = 32
CODEBOOK = "codebook.safetensors"
GRACE_SECONDS = 15  # that the other processes have to end by themselves when one has failed


# ---- the processes of a task script ----


def num_processes() -> int:
    """Return two, but one where there is one GPU or one core."""
    import torch

    return min(2, torch.cuda.device_count() or num_cores())


def launch(script: str, *arguments: str) -> None:
    """Run a task script on all processes. Raises UserError when it fails.

    Ctrl-C is heard here alone: the processes are told to stop, which they do when they have saved, and what
    they say of it is not shown.
    """
    from simla.engine.exit import RESUMABLE

    number = num_processes()
    starter = f"torchrun --nproc_per_node={number}" if number > 1 else "python"
    print(f"\n$ {starter} {shlex.join([script, *arguments])}", flush=True)
    environment = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // number)),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # without the hint that no parameter was left out
        **os.environ,
        "WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    is_stopping, unsaid = threading.Event(), []

    def show_errors(process: subprocess.Popen) -> None:
        for line in process.stderr:
            if is_stopping.is_set():
                unsaid.append(line)
            else:
                print(line, end="", file=sys.stderr, flush=True)

    with without_interrupts():
        ranks = [
            subprocess.Popen(
                [sys.executable, script, *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
            )
            for rank in range(number)
        ]
    readers = [threading.Thread(target=show_errors, args=[process], daemon=True) for process in ranks]
    for reader in readers:
        reader.start()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the processes as Ctrl-C does
    try:
        codes = wait_for(ranks, readers)
    except BaseException:
        is_stopping.set()
        for process in ranks:
            process.terminate()
        stopped = {0, RESUMABLE, -signal.SIGTERM, 128 + signal.SIGTERM}
        if not stopped.issuperset(wait_for(ranks, readers)):  # one could not save, and says why
            sys.stderr.writelines(unsaid)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in ranks:
            process.kill()
    if any(codes):
        raise UserError(f"{script} failed; see its message above")


def wait_for(ranks: list[subprocess.Popen], readers: list[threading.Thread]) -> list[int]:
    """Return the exit codes of the processes; one that has failed leaves the others GRACE_SECONDS."""
    first_failure = None
    while None in (codes := [process.poll() for process in ranks]):
        if any(codes):
            first_failure = first_failure or time.monotonic()
            if time.monotonic() > first_failure + GRACE_SECONDS:
                for process in ranks:
                    process.kill()
        time.sleep(0.05)
    for reader in readers:
        reader.join(GRACE_SECONDS)
    return codes


def make_data() -> None:
    """Make the embedded data set in DATA, unless it is there already."""
    print(f"{DATA}: scenes with texts, drawn unless they are there", flush=True)
    make_demo(DATA, workers=NUM_WORKERS)


# ---- a stage ----


class Stage(NamedTuple):
    """A training run, started from the checkpoint of another stage, and the evaluation that scores it."""

    name: str  # its folder; and its key in summary.json, unless `key` says otherwise
    script: str
    config: str  # in CONFIGS, or an absolute path
    start: str = ""  # the stage whose checkpoint it starts from
    result: str = ""  # file in result/ that the evaluation writes; empty: nothing to score
    read: Callable[[dict], dict] = dict  # that file -> {"metric", "value", "chance", "n"}
    flags: tuple[str, ...] = ()
    evaluation: tuple[str, str] | None = None  # another script and config that score it
    key: str = ""
    batch: int = GLOBAL_BATCH  # of all processes together


def read_retrieval(result: dict) -> dict:
    """Return the mean recall; chance is that of pictures in random order."""
    metric = "recall, mean of R@1, R@5, R@10 both ways (%)"
    chance = result["chance"]["r_mean"]
    return {"metric": metric, "value": result["r_mean"], "chance": chance, "n": result["n"]}


PRETRAINING = Stage(
    "pretrain",
    "Pretrain.py",
    "Pretrain.yaml",
    result="retrieval",
    read=read_retrieval,
    evaluation=("zero_shot_retrieval.py", "Retrieval.yaml"),
    key="zero_shot_retrieval",
)


def run_stage(stage: Stage, folder: Path, seed: str, start: str = "") -> dict:
    """Evaluate, train and evaluate again, going on where an earlier call stopped; start: a checkpoint.

    Returns what stage.json holds: {"seed", "seconds" (of all calls), "made_of", "checkpoint"}, and for a
    stage with a score {"metric", "chance", "before", "after", "n"}. Raises UserError for a folder of another
    seed, config or start.
    """
    file, made_of = folder / "stage.json", made_of_what(stage, start)
    record = json.loads(file.read_bytes()) if file.is_file() else {"seed": seed, "seconds": 0}
    if record["seed"] != seed:
        raise UserError(f"{file} is of seed {record['seed']}; give seed {seed} another --output_dir")
    is_noted = "made_of" in record
    before = record.setdefault("made_of", made_of)
    if others := [name for name in made_of if before.get(name) != made_of[name]]:
        raise UserError(
            f"{folder} was made with {' and '.join(f'another {name}' for name in others)} than there is now; "
            "delete it to run this stage again"
        )
    if ("after" if stage.result else "checkpoint") in record:
        print(f"\n{stage.name}: done already; delete {folder} to run it again", flush=True)
        if not is_noted:
            write_json(file, record)
        return record
    folder.mkdir(parents=True, exist_ok=True)
    begin, seconds_before = time.monotonic(), record["seconds"]

    def keep(**values: object) -> None:
        record.update(values, seconds=seconds_before + round(time.monotonic() - begin))
        write_json(file, record)

    try:
        if stage.result and "before" not in record:
            keep(before=evaluate(stage, folder / "before", start, seed)["value"])
        if "checkpoint" not in record:
            is_resumed = record.get("is_training", False)
            keep(is_training=True)
            train(stage, folder, start, seed, is_resumed)
            keep(checkpoint=str(best_checkpoint(folder)))
        if stage.result:
            scores = evaluate(stage, folder / "after", record["checkpoint"], seed)
            keep(after=scores.pop("value"), **scores)
    finally:
        keep()
    return record


def made_of_what(stage: Stage, start: str) -> dict[str, str]:
    """Return what a stage's result depends on beside the seed: the run whose checkpoint it starts from, and a
    checksum of its configs and flags.
    """
    from simla.engine.run_record import previous_run

    files = [stage.config, *(stage.evaluation or ())[1:]]
    config = json.dumps([*(read_yaml(CONFIGS / file) for file in files), stage.flags], sort_keys=True)
    run = previous_run(Path(start).parent) if start else ""  # not of the file, which may be deleted by now
    return {"config": hashlib.sha256(config.encode()).hexdigest(), "starting checkpoint": run}


def evaluate(stage: Stage, folder: Path, checkpoint: str, seed: str) -> dict:
    """Return the test scores of a checkpoint ("": of random weights)."""
    script, config = stage.evaluation or (stage.script, stage.config)
    flags = ["--checkpoint", checkpoint] if checkpoint else []
    launch_stage(stage, script, config, folder, seed, "--evaluate", *flags)
    return stage.read(json.loads((folder / "result" / f"{stage.result}.json").read_bytes()))


def train(stage: Stage, folder: Path, start: str, seed: str, is_resumed: bool) -> None:
    """Train from the checkpoint `start`, or resume what the folder has of this training."""
    from simla.checkpoint.save import run_checkpoints

    flags = ["--checkpoint", start] if start else []
    if not is_resumed:
        (folder / CODEBOOK).unlink(missing_ok=True)  # of an earlier run
    elif run_checkpoints(folder):
        flags = ["--resume"]
    launch_stage(stage, stage.script, stage.config, folder, seed, *flags)


def launch_stage(stage: Stage, script: str, config: str, folder: Path, seed: str, *flags: str) -> None:
    """Run a script with what depends on this machine and folder: the batch of each process, the codebook."""
    batch = stage.batch // num_processes()
    overrides = [f"batch_size_train={batch}"]
    if script == "Pretrain.py":
        overrides = [f"batch_size={batch}", f"image_tokenizer.path={folder / CODEBOOK}"]
    paths = "--config", str(CONFIGS / config), "--output_dir", str(folder)
    launch(script, *paths, "--seed", seed, *stage.flags, *flags, "--overrides", *overrides)


def best_checkpoint(folder: Path) -> Path:
    """Return the best by the validation score, or else the last. Raises UserError where the best is lost."""
    from simla.checkpoint.save import BEST, best_problem, load_checkpoint, newest_good

    last = newest_good(folder)
    state = load_checkpoint(last)
    if "epoch" not in state["best"]:
        return last
    if problem := best_problem(folder / BEST, state["run"], state["best"]):
        raise UserError(f"{problem}; delete {folder} to run this stage again")
    return folder / BEST


# ---- make demo ----


def spread(items: Sequence[int], number: int) -> list[int]:
    """Return at most `number` of the items, evenly spread, whatever they show."""
    return list(items[:: max(1, len(items) // number)][:number])


def gallery(
    output_dir: Path,
    num_queries: int = 8,
    num_results: int = 5,
    test_file: Path | None = None,
    what: str = "scenes",
) -> None:
    """Draw the top pictures for the first captions of test entries, evenly spread, whatever the outcome.

    test_file: by default the demo's; `what` its entries are.
    """
    import torch

    from simla.dataset.retrieval import CaptionedImages, read_captioned_images
    from simla.plots import plot_gallery

    scores = torch.load(output_dir / "after" / "result" / "retrieval_scores.pt", weights_only=True)
    test_file = test_file or DATA / "retrieval_test.json"
    entries = list(CaptionedImages(read_captioned_images(str(test_file), "")))  # as they were scored
    first_texts = [0, *accumulate(len(entry["caption"]) for entry in entries)]
    chosen = spread(range(len(entries)), num_queries)
    num_results = min(num_results, len(entries))
    top = [scores["scores_t2i"][first_texts[i]].topk(num_results).indices.tolist() for i in chosen]
    plot_gallery(
        [entries[i]["caption"][0] for i in chosen],
        [[entries[image]["images"][0] for image in images] for images in top],
        [[image == i for image in images] for i, images in zip(chosen, top, strict=True)],
        output_dir / "gallery.png",
        f"Text queries, top {num_results} of {len(entries)} held-out {what} (green: the right one)",
    )


def recall_table(columns: dict[str, dict[str, float]], width: int = 8) -> str:
    """Return a row of text for each recall: title of a column -> its recalls."""
    rows = [f"{'':10}" + "".join(f"{title:>{width}}" for title in columns)]
    for name in METRICS:
        rows.append(f"{name:10}" + "".join(f"{scores[name]:{width}.1f}" for scores in columns.values()))
    return "\n".join(rows)


def parse_arguments(description: str, output_dir: str) -> argparse.Namespace:
    """Return the flags. Raises UserError where the pictures at the end could not be drawn."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output_dir", default=output_dir, type=Path)
    parser.add_argument("--seed", default="42")
    args = parser.parse_args()
    import_pyplot()
    return args


def main() -> None:
    args = parse_arguments(__doc__, "output/demo")
    out = args.output_dir
    make_data()
    record = run_stage(PRETRAINING, out, args.seed)
    before, after = (
        json.loads((out / when / "result" / "retrieval.json").read_bytes()) for when in ("before", "after")
    )
    columns = {"chance": after["chance"], "before": before, "after": after}
    columns = {title: {name: scores[name] for name in METRICS} for title, scores in columns.items()}
    print(f"\nzero-shot retrieval, {after['n']} held-out scenes, {after['num_texts']} texts, recall in %\n")
    print(recall_table(columns))
    scores = {"n": after["n"], **columns.pop("after"), **columns}
    write_json(out / "summary.json", {"zero_shot_retrieval": scores, "seconds": record["seconds"]})

    from simla.engine.curves import plot_curves

    plot_curves([out], out / "losses.png")
    gallery(out)
    print(f"\n{record['seconds']} s; {out}/summary.json, {out}/gallery.png, {out}/losses.png")


if __name__ == "__main__":
    run_command(main, GOES_ON)
