"""WebDataset shards that are not on this machine: fetched whole, from a URL or a program, and counted."""

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import blake2b
from shutil import copyfileobj
from threading import Thread
from typing import BinaryIO

import fsspec.core

from simla.dataset.readers.json_list import cache_folder
from simla.dataset.readers.shard_index import NUM_THREADS, Shard, passed_over_lines, scan
from simla.dataset.transforms import BadImage
from simla.utils import (
    UserError,
    all_gather_objects,
    atomic_write,
    first_line,
    is_main,
    log,
    rank,
    with_progress,
    world_size,
)

RETRY_SECONDS = (1, 5, 15)
_named: set[str] = set()  # causes for which this process has passed over members of a shard


class Fetch(Thread):
    """Fetches a shard in the background."""

    def __init__(self, name: str):
        super().__init__(daemon=True)
        self.shard: Shard | BadImage | None = None
        self.url = name

    def run(self) -> None:
        try:
            self.shard = fetch(self.url)
        except BadImage as error:
            self.shard = error

    def result(self) -> Shard:
        """Waits for it. Raises `BadImage`."""
        self.join()
        if isinstance(self.shard, BadImage):
            raise BadImage(self.shard.path, self.shard.cause)
        return self.shard


def fetch(name: str) -> Shard:
    """The shard, in a file without a name on this machine's disk ($TMPDIR). Raises `BadImage` when it cannot
    be had after several tries.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            file = _download(name)
            index, *found = scan(file, name)
            break
        except Exception as error:  # each kind of URL has its own types
            if seconds is None:
                raise BadImage(name, f"cannot be fetched: {first_line(error)}") from error
            time.sleep(seconds)
    shard = Shard(name, index, *found, file=file)
    for cause, line in zip(shard.passed_over, passed_over_lines([shard]), strict=True):
        if cause not in _named:
            _named.add(cause)
            log.warning(f"{line}; in other streamed shards they are not named")
    return shard


def _download(name: str) -> BinaryIO:
    # Without a name from the beginning: a process that is killed meanwhile leaves nothing behind.
    file = tempfile.TemporaryFile()  # noqa: SIM115 (open for as long as the shard is)
    try:
        if name.startswith("pipe:"):
            with _piped(name.removeprefix("pipe:")) as output:
                copyfileobj(output, file, 1 << 20)
        else:
            system, path = fsspec.core.url_to_fs(name)
            system.get_file(path, f"/dev/fd/{file.fileno()}")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def _piped(command: str) -> Iterator[BinaryIO]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        yield process.stdout
    if process.returncode:
        raise OSError(f"exit code {process.returncode}")


def count_samples(names: list[str]) -> list[int]:
    """How many samples each shard has that is not local: as img2dataset and dataset.prepare say in the
    NAME_stats.json beside it, or else by fetching it once. Kept in the user's cache folder, by the names.
    """
    digest, kept = blake2b("\n".join(names).encode(), digest_size=16).hexdigest(), None
    with suppress(OSError, ValueError, RuntimeError):  # where there is no home nothing is kept
        kept = json.loads((cache_folder() / f"shards-{digest}.json").read_bytes())
    if (known := all_gather_objects(kept)[0]) is not None:
        return known
    own = names[rank() :: world_size()]
    log.info(f"{len(names)} shards are being counted, once; see docs/shards.md")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        counts = list(with_progress(pool.map(_count, own), len(own), "Shards", 100))
    gathered, sizes = all_gather_objects(counts), [0] * len(names)
    for number, part in enumerate(gathered):
        sizes[number :: world_size()] = part
    if not any(sizes):
        raise UserError(f"no samples in {names[0]} and {len(names) - 1} more shards")
    if is_main():
        with suppress(OSError, UserError, RuntimeError):
            place = cache_folder() / f"shards-{digest}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(place) as file:
                file.write(json.dumps(sizes).encode())
    return sizes


def _count(name: str) -> int:
    statistics = f"{name.removesuffix('.tar')}_stats.json"
    if not name.startswith("pipe:"):
        with (
            suppress(Exception),
            fsspec.open(statistics, "rb") as file,
        ):  # where not there the shard will tell
            return int(json.load(file)["successes"])
    try:
        return len(fetch(name))
    except BadImage as error:
        raise UserError(f"{error}; mend it or leave it out of train_file") from error
