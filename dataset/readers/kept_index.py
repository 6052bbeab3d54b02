"""Indexes of large files, kept beside them (or else in the user's cache folder) until the files change.

An index is a header of HEADER_BYTES, a line of JSON, and then the records of whoever reads the file. It is
memory-mapped, so that all processes of a machine share one copy.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

from simla.utils import UserError, atomic_write, log

HEADER_BYTES = 4096


class Index(NamedTuple):
    """Header and records; what its maker noted; and its file, None where it has none."""

    content: bytearray | memoryview
    notes: list
    kept_as: Path | None


def cache_folder() -> Path:
    """Return the user's; RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simla"


def index_files(path: Path) -> Iterator[Path]:
    """Yield the files in which the index of `path` may be, the preferred one first."""
    yield path.with_name(f".{path.name}.simla")
    with suppress(RuntimeError):
        digest = blake2b(os.fsencode(path.absolute()), digest_size=8).hexdigest()
        yield cache_folder() / f"{path.name}-{digest}.simla"


def find_index(path: Path, stamp: list, note: object = None) -> Index | None:
    """Return the kept index of a file that has this stamp, one with the note if there is any."""
    indexes = [index for index_file in index_files(path) if (index := read_index(index_file, stamp))]
    return max(indexes, key=lambda index: note in index.notes, default=None)


def make_index(
    path: Path,
    file: BinaryIO,
    stamp: list,
    make: Callable[[list], tuple[bytearray, list]],
    note: object = None,
) -> Index:
    """Return a new index of the opened file, kept in the first file that takes it, or the one that another
    process of this machine has made meanwhile (if a note is given, with it).

    make: returns header (empty yet) and records, and the notes, of the notes that there are already.
    """
    with _one_at_a_time(file):
        index = find_index(path, stamp, note)
        if index is not None and (note is None or note in index.notes):
            return index
        content, notes = make(index.notes if index else [])
        header = {"file": stamp, "crc": checksum(content), "notes": notes}
        content[:HEADER_BYTES] = json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n"
        for index_file in index_files(path):
            with suppress(OSError, UserError):
                index_file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(index_file) as output:
                    output.write(content)
                if index := read_index(index_file, stamp):
                    return index
        return Index(content, notes, None)


def read_index(index_file: Path, stamp: list) -> Index | None:
    """Return the index in this file; None where there is none for a file of this stamp."""
    try:
        content = _mapped(index_file)
        header = json.loads(bytes(content[:HEADER_BYTES]))
        if header["file"] != stamp:
            return None
        if checksum(content) == header["crc"]:
            return Index(content, list(header["notes"]), index_file)
    except (OSError, RuntimeError):
        return None
    except (ValueError, KeyError, TypeError):
        pass
    log.warning(f"{index_file} is damaged and will be made anew")
    return None


def checksum(content: bytearray | memoryview) -> int:
    """Return the CRC-32 of the records."""
    with memoryview(content) as whole, whole[HEADER_BYTES:] as records:
        return zlib.crc32(records)


def _mapped(index_file: Path) -> memoryview:
    """Return the file, in memory that processes share. Raises RuntimeError where torch cannot have it.

    Python's mmap would hold a descriptor, and of shards there may be thousands.
    """
    size = index_file.stat().st_size
    import torch  # here, because the converters' --help imports this file, too

    return memoryview(torch.from_file(str(index_file), size=size, dtype=torch.uint8).numpy()).toreadonly()


@contextmanager
def _one_at_a_time(file: BinaryIO) -> Iterator[None]:
    """Let the processes of this machine in one after the other, where the disk knows locks; else all at once,
    which only costs time.
    """
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
