"""The demo: embedded scenes, pre-training, zero-shot retrieval on held-out scenes; a table and two pictures.

make demo            (or: python -m simla.demo.pretrain [--output_dir output/demo])

A second call goes on where an interrupted one stopped, and after a finished one shows its results again. This
file imports packages where it needs them: the processes that draw the scenes import it too.
"""

if __name__ == "__main__":
    from simla.engine.before_imports import prepare

    prepare()

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

CONFIGS = Path("configs/demo")
DATA = Path("data/demo")
METRICS = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
GLOBAL_BATCH = 32
SCORED_BY_RETRIEVAL = ("Retrieval.py", "zero_shot_retrieval.py")
GRACE_SECONDS = 15  # that the other processes have to end by themselves when one has failed


def run(main: Callable[[], None]) -> None:
    """As `launch.run_script`; Ctrl-C is one line that says how to go on, and exit code 130."""

    def main_until_interrupted() -> None:
        try:
            main()
        except KeyboardInterrupt:
            end_interrupted()

    from simla.engine.launch import run_script

    run_script(main_until_interrupted)


def end_interrupted() -> NoReturn:
    print("interrupted; the same command goes on from here", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


# ---- the processes of a task script ----


def num_processes() -> int:
    """Two, but one where there is one GPU or one core."""
    import torch

    from simla.utils import num_cores

    return min(2, torch.cuda.device_count() or num_cores())


def launch(script: str, *arguments: str) -> None:
    """Runs a task script on all processes. Raises UserError when it fails.

    Ctrl-C is heard here alone: the processes are told to stop, which they do when they have saved, and what
    they say of it is not shown.
    """
    from simla.demo.data import without_interrupts
    from simla.engine.exit import RESUMABLE
    from simla.utils import UserError, free_port, num_cores

    number = num_processes()
    starter = f"torchrun --nproc_per_node={number}" if number > 1 else "python"
    print(f"\n$ {starter} {shlex.join([script, *arguments])}", flush=True)
    environment = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // number)),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        **os.environ,
        "WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with without_interrupts():
        ranks = [
            Rank([sys.executable, script, *arguments], environment | {"RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(number)
        ]
    try:
        codes = wait_for(ranks)
    except BaseException:
        for rank in ranks:
            rank.stop()
        stopped = (0, RESUMABLE, -signal.SIGTERM, 128 + signal.SIGTERM)
        for rank, code in zip(ranks, wait_for(ranks), strict=True):
            if code not in stopped:  # it could not save, and says why
                sys.stderr.write(rank.unsaid)
        raise
    finally:
        for rank in ranks:
            rank.process.kill()
    if any(codes):
        raise UserError(f"{script} failed; see its message above")


class Rank:
    """A process whose errors are shown here, until it is told to stop."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        self.unsaid, self.is_stopping = "", False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            if self.is_stopping:
                self.unsaid += line
            else:
                sys.stderr.write(line)
                sys.stderr.flush()

    def stop(self) -> None:
        self.is_stopping = True
        self.process.terminate()


def wait_for(ranks: list[Rank]) -> list[int]:
    """The exit codes of the processes; one that has failed leaves the others GRACE_SECONDS."""
    first_failure = None
    while None in (codes := [rank.process.poll() for rank in ranks]):
        if any(codes):
            first_failure = first_failure or time.monotonic()
            if time.monotonic() > first_failure + GRACE_SECONDS:
                for rank in ranks:
                    rank.process.kill()
        time.sleep(0.05)
    for rank in ranks:
        rank.reader.join(GRACE_SECONDS)
    return codes


def make_data() -> None:
    """The embedded data set in DATA, unless it is there already."""
    from simla.demo.data import default_workers, make_demo
    from simla.utils import UserError

    print(f"{DATA}: scenes with texts, drawn unless they are there", flush=True)
    try:
        make_demo(DATA, workers=default_workers())
    except (ImportError, OSError, ValueError) as error:
        raise UserError(str(error)) from error


# ---- a stage ----


class Stage(NamedTuple):
    """A training run, started from the checkpoint of another stage, and the evaluation that scores it."""

    name: str  # its folder; and its key in summary.json, unless `key` says otherwise
    script: str
    config: str
    start: str = ""  # the stage whose checkpoint it starts from
    result: str = ""  # file in result/ that the evaluation writes; empty: nothing to score
    read: Callable[[dict], dict] = dict  # that file -> {"metric", "value", "chance", "n"}
    flags: tuple[str, ...] = ()
    evaluation: tuple[str, str] | None = None  # another script and config that score it
    key: str = ""


def read_retrieval(result: dict) -> dict:
    metric = "recall, mean of R@1, R@5, R@10 both ways (%)"
    return {
        "metric": metric,
        "value": result["r_mean"],
        "chance": result["chance"]["r_mean"],
        "n": result["n"],
    }


PRETRAINING = Stage(
    "pretrain",
    "Pretrain.py",
    "Pretrain.yaml",
    result="retrieval",
    read=read_retrieval,
    evaluation=("zero_shot_retrieval.py", "Retrieval.yaml"),
    key="zero_shot_retrieval",
)


def run_stage(stage: Stage, folder: Path, seed: str, codebook: Path, start: str = "") -> dict:
    """Evaluates, trains and evaluates again, going on where an earlier call stopped; start: a checkpoint.

    Returns what stage.json holds: {"seed", "seconds" (of all calls), "checkpoint"}, and for a stage with a
    score {"metric", "chance", "before", "after", "n"}. Raises UserError for a folder of another seed.
    """
    from simla.utils import UserError

    file = folder / "stage.json"
    record = json.loads(file.read_bytes()) if file.is_file() else {"seed": seed, "seconds": 0}
    if record["seed"] != seed:
        raise UserError(f"{file} is of seed {record['seed']}; give seed {seed} another --output_dir")
    if ("after" if stage.result else "checkpoint") in record:
        print(f"\n{stage.name}: done already; delete {folder} to run it again", flush=True)
        return record
    begin, seconds_before = time.monotonic(), record["seconds"]

    def keep(**found: object) -> None:
        record.update(found, seconds=seconds_before + round(time.monotonic() - begin))
        write_record(file, record)

    try:
        if stage.result and "before" not in record:
            keep(before=evaluate(stage, folder / "before", start, seed, codebook)["value"])
        if "checkpoint" not in record:
            is_resumed = record.get("is_training", False)
            keep(is_training=True)
            train(stage, folder, start, seed, codebook, is_resumed)
            keep(checkpoint=str(best_checkpoint(folder)))
        if stage.result:
            after = evaluate(stage, folder / "after", record["checkpoint"], seed, codebook)
            keep(after=after["value"], **{key: after[key] for key in ("metric", "chance", "n")})
    finally:
        keep()
    return record


def write_record(file: Path, record: dict) -> None:
    from simla.utils import atomic_write

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as written:
        written.write(json.dumps(record, indent=1).encode())


def evaluate(stage: Stage, folder: Path, checkpoint: str, seed: str, codebook: Path) -> dict:
    """The test scores of a checkpoint ("": of random weights)."""
    script, config = stage.evaluation or (stage.script, stage.config)
    flags = ["--config", str(CONFIGS / config), "--output_dir", str(folder), "--seed", seed, *stage.flags]
    flags += ["--checkpoint", checkpoint] if checkpoint else []
    launch(script, "--evaluate", *flags, "--overrides", *overrides(script, codebook))
    return stage.read(json.loads((folder / "result" / f"{stage.result}.json").read_bytes()))


def train(stage: Stage, folder: Path, start: str, seed: str, codebook: Path, is_resumed: bool) -> None:
    from simla.checkpoint.save import run_checkpoints

    flags = ["--config", str(CONFIGS / stage.config), "--output_dir", str(folder), "--seed", seed]
    flags += stage.flags
    if not is_resumed and stage.script == "Pretrain.py":
        codebook.unlink(missing_ok=True)  # of an earlier run
    if is_resumed and run_checkpoints(folder):
        flags += ["--resume"]
    elif start:
        flags += ["--checkpoint", start]
    launch(stage.script, *flags, "--overrides", *overrides(stage.script, codebook))


def overrides(script: str, codebook: Path) -> list[str]:
    """What depends on this machine and folder: the batch of each process, the codebook, kept scores."""
    batch = GLOBAL_BATCH // num_processes()
    if script == "Pretrain.py":
        return [f"batch_size={batch}", f"image_tokenizer.path={codebook}"]
    return [f"batch_size_train={batch}"] + ["save_scores=true"] * (script in SCORED_BY_RETRIEVAL)


def best_checkpoint(folder: Path) -> Path:
    """By the validation score, if there is one, else the last. Raises UserError where the best is lost."""
    from simla.checkpoint.save import BEST, best_problem, load_checkpoint, newest_good
    from simla.utils import UserError

    best, last = folder / BEST, newest_good(folder)
    state = load_checkpoint(last)
    if "epoch" not in state["best"]:
        return last
    if problem := best_problem(best, state["run"], state["best"]):
        raise UserError(f"{problem}; delete {folder} to run this stage again")
    return best


# ---- make demo ----


def spread(items: Sequence[int], number: int) -> list[int]:
    """At most `number` of the items, evenly spread, whatever they show."""
    return list(items[:: max(1, len(items) // number)][:number])


def gallery(output_dir: Path, num_queries: int = 8, num_results: int = 5) -> None:
    """The top pictures for the first caption of every so-manieth test scene, whatever the outcome."""
    import torch

    from simla.dataset.readers.annotations import TEXT, read_annotations
    from simla.plots import plot_gallery

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

    from simla.engine.curves import plot_curves
    from simla.utils import atomic_write, import_pyplot

    import_pyplot()  # what the end needs is missing at the start or not at all
    make_data()
    record = run_stage(PRETRAINING, out, args.seed, out / "codebook.safetensors")
    before, after = (
        json.loads((out / when / "result" / "retrieval.json").read_bytes()) for when in ("before", "after")
    )
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
    text = json.dumps({"zero_shot_retrieval": summary, "seconds": record["seconds"]}, indent=1)
    with atomic_write(out / "summary.json", text=True) as file:
        file.write(text)
    plot_curves([out], out / "losses.png")
    gallery(out)
    print(f"\n{record['seconds']} s; {out}/summary.json, {out}/gallery.png, {out}/losses.png")


if __name__ == "__main__":
    run(main)
