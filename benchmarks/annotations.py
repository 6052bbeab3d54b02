"""Millions of image-text pairs against json.load into a list of dicts: seconds, and memory of each process.

python benchmarks/annotations.py [--entries 14000000] [--out output/benchmark-annotations]

Writes a file of synthetic pairs, some 200 bytes each, and deletes it. Every measurement is a process of its
own, with files in the page cache but where it says "from the disk". Private is the memory that a process has
for itself, Private_Clean and Private_Dirty of /proc/PID/smaps_rollup (Linux); what a loader process has more
than one of a file of two batches is due to the annotations. The plain list has the first 2 million pairs at
most: the seconds and the memory of loading it are scaled to all of them, those of its workers are not. The
last line is JSON, its sizes in bytes.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from measure import last_line
from torch.utils.data import Dataset

from simla.dataset.loaders import train_loader
from simla.dataset.pretrain import read_pairs
from simla.dataset.readers.kept_index import index_files

MAX_PLAIN = 2_000_000
NUM_READ, BATCH, NUM_WORKERS = 200_000, 5_000, 2
WORDS = (
    "a the of in on with and two dog street woman red light field table young water stands near caf\\u00e9"
)


class Texts(Dataset):
    """The texts alone: what images take is another matter."""

    def __init__(self, entries: Sequence[dict]):
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> str:
        return self.entries[key[1]]["text"]


def plain_pairs(name: str) -> list[dict]:
    """Return what every process has without an index."""
    path = Path(name)
    with path.open("rb") as file:
        entries = json.load(file)
    return [
        {"images": [str(path.parent / e["image"])], "text": e["caption"], "where": f"{path}: entry {number}"}
        for number, e in enumerate(entries)
    ]


# ---- one process each ----


def memory(_: list[str] | None = None) -> dict[str, int]:
    """Return the memory of this process."""
    fields = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").split()
    clean, dirty, pss = (
        1024 * int(fields[fields.index(f"{name}:") + 1]) for name in ("Private_Clean", "Private_Dirty", "Pss")
    )
    return {"process": os.getpid(), "private": clean + dirty, "pss": pss}


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(name: str, is_plain: bool) -> dict:
    """Loads a file as a training run does, then reads NUM_READ entries from all over it."""
    before, begin = peak_bytes(), time.perf_counter()
    entries = plain_pairs(name) if is_plain else read_pairs(name)
    seconds, peak = time.perf_counter() - begin, peak_bytes() - before
    config = {"num_workers": NUM_WORKERS, "grad_accumulation_steps": 1, "batch_timeout_minutes": 1}
    epoch = iter(train_loader(Texts(entries), BATCH, 0, config, memory))
    begin = time.perf_counter()
    workers = {found["process"]: found for found in islice(epoch, NUM_READ // BATCH)}
    return {
        "entries": len(entries),
        "seconds": seconds,
        "peak": peak,
        "read_seconds": time.perf_counter() - begin,
        "workers": list(workers.values()),
        "main": memory(),
    }


# ---- the whole ----


def write_pairs(path: Path, num: int) -> None:
    draw, words = random.Random(0), WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(num):
            image = f"/data/pairs/{number // 10_000:05d}/{number:09d}.jpg"
            caption = " ".join(draw.choices(words, k=24))
            file.write(f'{", " if number else "["}{{"image": "{image}", "caption": "{caption}"}}')
        file.write("]")


def in_a_process(path: Path, *flags: str) -> dict:
    command = [sys.executable, __file__, "--measure", str(path), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"a measurement failed, see above: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def forget(path: Path) -> None:
    """Drops the file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", default=2_000_000, type=int, help="at least 100,000")
    parser.add_argument("--out", default=Path("output/benchmark-annotations"), type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.plain)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path, small, plain = (args.out / f"{name}.json" for name in ("pairs", "small", "plain"))
    index = next(index_files(path))
    index.unlink(missing_ok=True)
    try:
        for file, num in ((path, args.entries), (small, NUM_WORKERS * BATCH)):
            write_pairs(file, num)
        found = {"small": in_a_process(small), "first": in_a_process(path), "again": in_a_process(path)}
        sizes = {"json": path.stat().st_size, "index": index.stat().st_size}
        forget(path)
        forget(index)
        found["from_the_disk"] = in_a_process(path)
        index.unlink()
        path.unlink()
        write_pairs(plain, min(args.entries, MAX_PLAIN))
        found["plain"] = in_a_process(plain, "--plain")
    finally:
        for file in (path, small, plain, index):
            file.unlink(missing_ok=True)
    report(args.entries, sizes, found)


def report(num: int, sizes: dict[str, int], found: dict) -> None:
    first, again, plain = found["first"], found["again"], found["plain"]
    scale = num / plain["entries"]

    def added(one: dict, what: str = "private") -> float:
        """Return what the worker that has most has added."""
        most, usual = (max(worker[what] for worker in run["workers"]) for run in (one, found["small"]))
        return most - usual

    rows = {
        "first_load_seconds": (plain["seconds"] * scale, first["seconds"]),
        "load_again_seconds": (plain["seconds"] * scale, again["seconds"]),
        "load_again_from_the_disk_seconds": (plain["seconds"] * scale, found["from_the_disk"]["seconds"]),
        "peak_of_first_load": (plain["peak"] * scale, first["peak"]),
        "peak_of_load_again": (plain["peak"] * scale, again["peak"]),
        "worker_private": tuple(max(w["private"] for w in run["workers"]) for run in (plain, again)),
        "worker_private_due_to_annotations": (added(plain), added(again)),
        "worker_pss_due_to_annotations": (added(plain, "pss"), added(again, "pss")),
        "main_private_in_an_epoch": (plain["main"]["private"], again["main"]["private"]),
        f"read_{NUM_READ}_seconds": (plain["read_seconds"], again["read_seconds"]),
    }
    print(f"{num:,} entries: JSON {sizes['json'] / 1e6:,.0f} MB, index {sizes['index'] / 1e6:,.0f} MB")
    print(f"{'':40}{'plain':>12}{'ours':>12}{'ratio':>10}")
    for name, (theirs, ours) in rows.items():
        unit, divisor = ("s", 1) if name.endswith("seconds") else ("MB", 1e6)
        label = f"{name.removesuffix('_seconds').replace('_', ' ')}, {unit}"
        print(f"{label:40}{theirs / divisor:12,.2f}{ours / divisor:12,.2f}{ours / theirs:10.4f}")
    figures = {
        "entries": num,
        "plain_entries": plain["entries"],
        "workers": NUM_WORKERS,
        "json_bytes": sizes["json"],
        "index_bytes": sizes["index"],
        "plain": {name: theirs for name, (theirs, _) in rows.items()},
        "ours": {name: ours for name, (_, ours) in rows.items()},
        "ratio": rows["load_again_from_the_disk_seconds"][0] / rows["load_again_from_the_disk_seconds"][1],
    }
    last_line(figures, torch.device("cpu"))


if __name__ == "__main__":
    main()
