"""WebDataset shards that are not on this machine: fetched whole, from a URL or a program, and counted."""

import json
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from shutil import copyfileobj
from threading import Thread
from typing import BinaryIO

import fsspec.core

from simla.dataset.images import BadImage
from simla.dataset.readers.kept_index import Index, cache_folder
from simla.dataset.readers.shard_index import NUM_THREADS, Shard, passed_over_lines, scan
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
        """Wait for the shard and return it. Raises `BadImage`."""
        self.join()
        if isinstance(self.shard, BadImage):
            raise BadImage(self.shard.path, self.shard.cause)
        return self.shard


def fetch(name: str) -> Shard:
    """Return the shard, in a file without a name on this machine's disk ($TMPDIR). Raises `BadImage` when it
    cannot be had after several tries.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            file = _download(name)
            shard = Shard(name, Index(*scan(file, name), None), file)
            break
        except Exception as error:  # each kind of URL has its names_of_rank types
            if seconds is None:
                raise BadImage(name, f"cannot be fetched: {first_line(error)}") from error
            time.sleep(seconds)
    for cause, line in zip(shard.passed_over, passed_over_lines([shard]), strict=True):
        if cause not in _named:
            _named.add(cause)
            log.warning(f"{line}; in other streamed shards they are not named")
    return shard


def _download(name: str) -> BinaryIO:
    # Without a name from the beginning: a process that is killed meanwhile leaves nothing behind.
    file = tempfile.TemporaryFile()  # noqa: SIM115 (open for as long as the shard is)
    if name.startswith("pipe:"):
        command = name.removeprefix("pipe:")
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
            copyfileobj(process.stdout, file, 1 << 20)
        if process.returncode:
            raise OSError(f"exit code {process.returncode}")
    else:
        system, path = fsspec.core.url_to_fs(name)
        system.get_file(path, f"/dev/fd/{file.fileno()}")
    file.seek(0)
    return file


def count_samples(names: list[str]) -> list[int]:
    """Return how many samples each shard has that is not local: as img2dataset and dataset.prepare say in the
    NAME_stats.json beside it, or else by fetching it once. Kept in the user's cache folder, by the names, and
    where there are commands by the folder in which they run.
    """
    where = [str(Path.cwd())] if any(name.startswith("pipe:") for name in names) else []
    digest, counts_file, kept = (
        blake2b("\n".join(names + where).encode(), digest_size=16).hexdigest(),
        None,
        None,
    )
    with suppress(OSError, ValueError, RuntimeError):  # where there is no home nothing is kept
        counts_file = cache_folder() / f"shards-{digest}.json"
        kept = json.loads(counts_file.read_bytes())
    if (known := all_gather_objects(kept)[0]) is not None:
        log.info(
            f"{len(names)} shards have {sum(known)} samples, says {counts_file}; delete it if they changed"
        )
        return known
    names_of_rank = names[rank() :: world_size()]
    log.info(f"{len(names)} shards are being counted, once; see docs/shards.md")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        counts = list(with_progress(pool.map(_count, names_of_rank), len(names_of_rank), "Shards", 100))
    sizes = [0] * len(names)
    for number, counts_of_rank in enumerate(all_gather_objects(counts)):
        sizes[number :: world_size()] = counts_of_rank
    if not any(sizes):
        raise UserError(f"no samples in {names[0]} and {len(names) - 1} more shards")
    if is_main() and counts_file:
        with suppress(OSError, UserError):
            counts_file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(counts_file, text=True) as file:
                json.dump(sizes, file)
    return sizes


def _count(name: str) -> int:
    if not name.startswith("pipe:"):
        statistics = f"{name.removesuffix('.tar')}_stats.json"
        with (
            suppress(Exception),
            fsspec.open(statistics, "rb") as file,
        ):  # where not there the shard will tell
            return int(json.load(file)["successes"])
    try:
        return len(fetch(name))
    except BadImage as error:
        raise UserError(f"{error}; mend it or leave it out of train_file") from error
