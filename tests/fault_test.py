"""Kills a real training run at random moments and resumes it until it ends: nothing of it may be lost.

Command  make fault-test, or python tests/fault_test.py --kills 30 --output_dir output/fault-test --seed 0
Expected "identical": true in summary.json, after some 10 seconds a kill on 2 cores

Pretrain.py runs on two ranks under torch's launcher and saves after every step. SIGKILL takes all processes
at once, as a power cut does, or one rank, whose peer must then end by itself: the launcher, which would end
it, is halted. More than half of the kills aim at a save, the others come in steps and at start-up. Weights,
optimiser, random states, log.txt and train_steps.jsonl must be those of a run that nobody killed, bit for
bit. Needs Linux, for /proc.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tests/fault_test.py`

from tiny import ROOT, make_tiny

from simla.checkpoint.save import load_checkpoint, run_checkpoints
from simla.engine.training import STEPS_LOG
from simla.utils import LOG, free_port

NUM_RANKS = 2
STEPS = 12  # an epoch: 48 samples, 2 a rank
# The queues make a checkpoint of 35 MB, so that a save can be hit, and cost a step little.
OVERRIDES = ("batch_size=2", "queue_size=65536", "embed_dim=64", "save_every_steps=1", "keep_last=2")
TIMEOUT = 300  # seconds, for what takes a few
PEER_LIMIT = 10  # seconds that the peer of a killed rank may live on


class Failed(Exception):
    """What the test found wrong."""


class Job:
    """One launch of the training. Its processes are those whose environment has its mark: the launcher puts
    every rank into a session of its own, and no process outlives the `with` block.
    """

    def __init__(self, out: Path, config: Path, overrides: list[str], resume: bool):
        self.out, self.mark = out, f"SIMLA_FAULT_TEST={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        command = [sys.executable, "-m", "torch.distributed.launch", f"--nproc_per_node={NUM_RANKS}"]
        command += [f"--master_port={free_port()}", "--use_env", "Pretrain.py", "--device", "cpu"]
        command += ["--config", str(config), "--output_dir", str(out), *["--resume"] * resume]
        with (out / "output.txt").open("a") as output:
            self.launcher = subprocess.Popen(
                [*command, "--overrides", *overrides],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", name: value},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        self.launcher.wait()

    def processes(self, rank: int | None = None) -> list[int]:
        """Process ids, of one rank or of all and the launcher."""
        wanted = {self.mark} if rank is None else {self.mark, f"RANK={rank}"}
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):  # one that has just ended, or another user's
                if folder.name.isdecimal():
                    environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                    found += [int(folder.name)] * (wanted <= set(environment))
        return found

    def kill(self, rank: int | None = None) -> None:
        """Returns when they are dead."""
        while found := self.processes(rank):
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.005)

    def wait_for(self, happened: Callable[[], object]) -> bool:
        """False where the run ends first. Raises Failed when that was an error."""
        deadline = time.monotonic() + TIMEOUT
        while not happened():
            if self.launcher.poll() is not None:
                if self.launcher.returncode:
                    tail = (self.out / "output.txt").read_text()[-3000:]
                    raise Failed(f"a launch that was not killed failed:\n{tail}")
                return False
            if time.monotonic() > deadline:
                raise Failed(f"nothing happened for {TIMEOUT} s, see {self.out / 'output.txt'}")
            time.sleep(0.002)
        return True

    # ---- what can be seen from outside ----

    def newest(self) -> str:
        return next((path.name for path in run_checkpoints(self.out)), "")

    def half_written(self) -> set[tuple]:
        """Which file is being written or was, when its process was killed."""
        found = set()
        for path in self.out.glob(".checkpoint_*.tmp"):
            with suppress(OSError):  # just completed
                found.add((path.name, path.stat().st_ino, path.stat().st_mtime_ns))
        return found


# ---- the kills ----


@dataclass(frozen=True)
class Kill:
    """aim: "start", "step" or "save"; after: checkpoints that the launch writes first; delay: then a share,
    0 to 1, of the time that the start, a step or a save takes; victim: a rank, None = all processes.
    """

    aim: str
    after: int
    delay: float
    victim: int | None


def plan(num_kills: int, rng: random.Random) -> list[Kill]:
    """The first comes during the first save of all, when there is nothing to resume yet."""
    num_saves = math.ceil(0.6 * num_kills)  # some of them will miss
    aims = ["save"] * num_saves + ["step", "start", "step"] * num_kills
    aims = aims[1:num_kills]
    rng.shuffle(aims)
    kills = [Kill("save", 0, 0.0, None)]
    for aim in aims:
        victims = [None, None, 0] if aim == "save" else [None, 0, 1]  # only rank 0 writes
        kills.append(Kill(aim, rng.randrange(4), rng.random(), rng.choice(victims)))
    return kills[:num_kills]


@dataclass
class Timing:
    """Seconds, as the run without kills took them."""

    start: float
    step: float
    save: float


def strike(job: Job, kill: Kill, timing: Timing) -> dict | None:
    """Waits for the moment and kills; returns what was hit. None: the run ended before."""
    before = job.half_written()  # of an earlier kill, until the run has started
    if kill.aim == "start":
        moment = time.monotonic() + kill.delay * timing.start
        come = job.wait_for(lambda: time.monotonic() >= moment and job.processes(kill.victim))
    else:
        seen, wanted = {job.newest()}, kill.after + 1

        def saved_enough() -> bool:
            seen.add(job.newest())
            return len(seen) > wanted - (kill.aim == "save")

        come = job.wait_for(saved_enough)
        if kill.aim == "save":
            come = come and job.wait_for(lambda: job.half_written() - before)
        time.sleep(kill.delay * (0.7 * timing.save if kill.aim == "save" else timing.step))
    if not come or job.launcher.poll() is not None:
        return None
    place = job.newest()
    if kill.victim is not None and kill.aim != "start":  # before they have met, only the launcher can end it
        job.launcher.send_signal(signal.SIGSTOP)
    job.kill(kill.victim)
    begin = time.monotonic()
    while kill.victim is not None and job.processes(1 - kill.victim):
        if time.monotonic() - begin > PEER_LIMIT:
            raise Failed(f"rank {1 - kill.victim} ran on for {PEER_LIMIT} s after the other one was killed")
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    job.kill()
    hit = {"aim": kill.aim, "newest": place, "during_save": bool(job.half_written() - before)}
    return hit | ({} if kill.victim is None else {"rank": kill.victim, "peer_seconds": round(seconds, 2)})


# ---- the runs ----


def run_whole(start: Callable[[], Job]) -> Timing:
    """The run that nobody kills."""
    begin, first, writing, last = time.monotonic(), None, 0.0, time.monotonic()
    with start() as job:

        def look() -> bool:
            nonlocal first, writing, last
            now = time.monotonic()
            if job.half_written():
                first = first or now
                writing += now - last
            last = now
            return False

        job.wait_for(look)
    if first is None:
        raise Failed("the run without kills saved nothing")
    num_steps = len(json_lines(job.out / LOG)) * STEPS
    return Timing(first - begin, (last - first) / num_steps, writing / num_steps)


def run_killed(start: Callable[[], Job], kills: list[Kill], timing: Timing) -> Iterator[dict]:
    """What each kill hit; then the run is left to end."""
    for kill in kills:
        with start() as job:
            hit = strike(job, kill, timing)
        if hit is None:  # it has ended; never with steps enough
            return
        yield hit
    with start() as job:
        job.wait_for(lambda: False)


def fault_test(
    output_dir: Path,
    num_kills: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> dict:
    """Runs it all and writes summary.json; returns that. The runs stay where they differ."""
    begin = time.monotonic()
    for name in ("data", "whole", "killed"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
        (output_dir / name).mkdir(parents=True)
    paths = make_tiny(output_dir / "data")
    train_file = paths["data"] / "pretrain_train.json"  # 24 samples
    num_epochs = max(2, math.ceil(num_kills * 5 / STEPS))  # a kill comes after 2 or 3 steps, at most 5
    overrides = [*OVERRIDES, f"train_file=[{train_file},{train_file}]", f"schedular.epochs={num_epochs}"]
    summary = {"kills": 0, "kills_during_save": 0, "identical": False, "seconds": 0.0}
    hits, whole, killed = [], output_dir / "whole", output_dir / "killed"

    def start(out: Path) -> Job:
        return Job(out, paths["Pretrain"], overrides, resume=bool(run_checkpoints(out)))

    try:
        say(f"a run of {num_epochs * STEPS} steps without kills")
        timing = run_whole(lambda: start(whole))
        say(
            f"took {time.monotonic() - begin:.0f} s; the first save came after {timing.start:.1f} s, a step "
            f"takes {timing.step:.3f} s, of which {timing.save:.3f} s a checkpoint is being written"
        )
        kills, begin_kills = plan(num_kills, random.Random(seed)), time.monotonic()
        for hit in run_killed(lambda: start(killed), kills, timing):
            hits.append(hit)
            left = (time.monotonic() - begin_kills) / len(hits) * (num_kills - len(hits) + 1)
            say(
                f"[{len(hits)}/{num_kills}] {describe(hit)}; "
                f"eta {timedelta(seconds=int(left + timing.step * num_epochs * STEPS / 3))}"
            )
        if len(hits) < num_kills:
            raise Failed(f"the run ended after {len(hits)} of {num_kills} kills")
        differing = different(whole, killed)
        if differing:
            raise Failed(
                f"not identical with the run that was not killed: {', '.join(differing[:20])}; compare "
                f"{whole} and {killed}"
            )
        summary["identical"] = True
        for path in [*whole.glob("*.pth"), *killed.glob("*.pth")]:  # some hundred megabytes
            path.unlink()
    except Failed as failure:
        summary["failure"] = str(failure)
    of_one_rank = [hit["peer_seconds"] for hit in hits if "rank" in hit]
    summary |= {
        "kills": len(hits),
        "kills_during_save": sum(hit["during_save"] for hit in hits),
        "kills_before_the_first_checkpoint": sum(not hit["newest"] for hit in hits),
        "kills_of_one_rank": len(of_one_rank),
        "longest_seconds_until_its_peer_ended": max(of_one_rank, default=0.0),
        "seconds": round(time.monotonic() - begin, 1),
        "steps": num_epochs * STEPS,
        "seed": seed,
        "each": hits,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def describe(hit: dict) -> str:
    victim = (
        f"rank {hit['rank']} killed, the other ended in {hit['peer_seconds']} s"
        if "rank" in hit
        else "all killed"
    )
    moment = "during a save" if hit["during_save"] else "not in a save"
    return f"{victim}, {moment}, after {hit['newest'] or 'nothing was saved'}"


# ---- comparison ----


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def different(whole: Path, killed: Path) -> list[str]:
    """What differs between the folders of two runs that should be the same, by name."""
    names = [sorted(path.name for path in out.iterdir()) for out in (whole, killed)]
    found = sorted(set(names[0]) ^ set(names[1]))
    found += [
        name for name in (LOG, STEPS_LOG) if (whole / name).read_bytes() != (killed / name).read_bytes()
    ]
    for name in [name for name in names[0] if name.endswith(".pth") and name in names[1]]:
        states = [load_checkpoint(out / name) for out in (whole, killed)]
        for state in states:
            del state["run"]  # its id
        found += differing_values(*states, name)
    return found


def differing_values(one: object, other: object, name: str) -> list[str]:
    """Names of the parts that are not equal, bit for bit."""
    if type(one) is not type(other):
        return [name]
    if isinstance(one, dict) and one.keys() == other.keys():
        return [found for key in one for found in differing_values(one[key], other[key], f"{name}: {key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, pair in pairs for found in differing_values(*pair, f"{name}[{i}]")]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and one.numpy().tobytes() == other.numpy().tobytes()
    else:
        same = repr(one) == repr(other)
    return [] if same else [name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "fault-test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the job is cleared away
    begin = time.monotonic()
    summary = fault_test(
        args.output_dir.resolve(),
        args.kills,
        args.seed,
        lambda line: print(f"{time.monotonic() - begin:6.1f} s  {line}", flush=True),
    )
    print(json.dumps({key: value for key, value in summary.items() if key != "each"}, indent=1))
    if not summary["identical"]:
        sys.exit(f"FAILED: {summary['failure']}")
    print(
        f"identical, bit for bit, after {summary['kills']} kills, {summary['kills_during_save']} of them "
        f"during a save: {args.output_dir / 'summary.json'}"
    )


if __name__ == "__main__":
    main()
