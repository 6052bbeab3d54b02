"""One WebDataset shard and its index, which says where in the tar file each sample lies.

An index is made in one pass over the tar file's headers. That of a local shard is kept beside it or in the
user's cache folder, as those of annotation files are, and shared by all processes of a machine.
"""

import io
import json
import os
import struct
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dataset.json_list import (
    HEADER_BYTES,
    index_places,
    one_at_a_time,
    read_index,
    write_header,
    write_index,
)
from dataset.transforms import BadImage
from utils import UserError, first_line, log, rank, with_progress, world_size

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")  # the first that is there is the caption
FORMAT = "shard 1"  # raise it whenever an index is laid out differently
# Of a sample: first byte and length of the image, of the text, and whether that is JSON. First byte 0: none.
RECORD = struct.Struct("<QIQI?")
MAX_BYTES = 2**32 - 1  # of a member that a record has room for
BLOCK = tarfile.BLOCKSIZE
NUM_THREADS = 8  # that look through shards; they wait for the disk, too


class Picture(io.BytesIO):
    """The content of an image; `name` says in which shard it is what."""

    def __init__(self, name: str, content: bytes):
        super().__init__(content)
        self.name = name


class Shard:
    """One shard. `file`: what was fetched of it; None for a local one, which is opened for each sample."""

    def __init__(self, name: str, index, kept_as: Path | None = None, file: BinaryIO | None = None):
        self.name, self.index, self.kept_as, self.file = name, index, kept_as, file
        self.num_samples = (len(index) - HEADER_BYTES) // RECORD.size

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict:
        return {**self.__dict__, "index": None if self.kept_as else bytes(self.index)}

    def entry(self, number: int) -> dict:
        """The sample as an entry for training; its image is a `Picture`. Raises `BadImage`."""
        if self.index is None:
            self._open_again()
        record = RECORD.unpack_from(self.index, HEADER_BYTES + number * RECORD.size)
        image_at, image_size, text_at, text_size, is_json = record
        with self._descriptor() as descriptor:
            if not image_at:
                raise BadImage(self._member(descriptor, text_at, text_size)[0], "a caption without an image")
            name, image = self._member(descriptor, image_at, image_size)
            if not text_at:
                raise BadImage(name, "no caption")
            text_name, text = self._member(descriptor, text_at, text_size)
        return {"images": [Picture(name, image)], "text": _caption(text_name, text, is_json), "where": name}

    def _open_again(self) -> None:
        """In a process that got this object pickled."""
        found = read_index(self.kept_as, _stamp(self.name))
        if found is None:
            raise UserError(f"{self.name} or its index {self.kept_as} has changed; start again")
        self.index = found[0]

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        if self.file is not None:
            yield self.file.fileno()
            return
        try:
            descriptor = os.open(self.name, os.O_RDONLY)
        except OSError as error:
            raise BadImage(self.name, f"{error.strerror}") from error
        try:
            yield descriptor
        except OSError as error:
            raise BadImage(self.name, f"{error.strerror}") from error
        finally:
            os.close(descriptor)

    def _member(self, descriptor: int, at: int, size: int) -> tuple[str, bytes]:
        """Name, with the shard's, and content of the member whose content begins at byte `at`."""
        content = os.pread(descriptor, BLOCK + size, at - BLOCK)
        header, content = content[:BLOCK], content[BLOCK:]
        member = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
        try:
            is_it = int(header[124:136].strip(b" \0"), 8) == size
        except ValueError:
            is_it = False
        if not is_it:
            raise BadImage(self.name, f"changed since its index was made: at byte {at}")
        name = f"{self.name}: {member}"
        if len(content) < size:
            raise BadImage(name, "cut short: the shard ends before it")
        return name, content


def _caption(name: str, content: bytes, is_json: bool) -> str | list[str]:
    try:
        text = content.decode("utf-8")
        caption = json.loads(text).get("caption") if is_json else text
    except (ValueError, AttributeError) as error:
        raise BadImage(name, f"no caption: {first_line(error)}") from error
    texts = caption if isinstance(caption, list) and caption else [caption]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadImage(name, f"no caption, found {caption!r}"[:200])
    return caption


# ---- indexes ----


def scan(file: BinaryIO, name: str) -> tuple[bytearray, str]:
    """An index without its header, and what is wrong with the tar file, "" where nothing is."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}  # key -> kind -> first byte, length
    problem, end = "", 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # which it would keep
                folder, slash, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                kind = kind.lower()
                if member.isreg() and member.size <= MAX_BYTES and kind in IMAGES + TEXTS:
                    sample = samples.setdefault(folder + slash + key, {})
                    sample.setdefault("image" if kind in IMAGES else kind, (member.offset_data, member.size))
                end = tar.offset
        file.seek(end)
        block = file.read(BLOCK)
        if len(block) < BLOCK or any(block):
            problem = f"is damaged or cut short at byte {end}"
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter of senseless numbers
        problem = f"is damaged or cut short after byte {end} ({first_line(error)})"
    index = bytearray(HEADER_BYTES)
    for sample in samples.values():
        kind = next((kind for kind in TEXTS if kind in sample), "")
        index += RECORD.pack(*sample.get("image", (0, 0)), *sample.get(kind, (0, 0)), kind == "json")
    if problem:
        log.warning(f"{name} {problem}: {len(samples)} samples of it can be used")
    return index, problem


def find_indexes(names: list[str]) -> list[Shard]:
    """Local shards, looked through where that has not been done since they changed. The processes of a
    machine share the work: each begins elsewhere, and finds what others have done.
    """
    found: dict[str, Shard] = {}
    for name in names:
        shard = _known(name)
        if shard is not None:
            found[name] = shard
    missing = [name for name in dict.fromkeys(names) if name not in found]
    if missing:
        log.info(f"{len(missing)} of {len(names)} shards are being looked through, once until they change")
        first = rank() * len(missing) // world_size()
        missing = missing[first:] + missing[:first]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            shards = with_progress(pool.map(_look_through, missing), len(missing), "Shards", 100)
            found |= zip(missing, shards, strict=True)
    if not any(map(len, found.values())):
        raise UserError(
            f"no samples in {names[0]} and {len(names) - 1} more shards; a sample is KEY.jpg, jpeg, png or "
            "webp with KEY.txt or KEY.json"
        )
    return [found[name] for name in names]


def _known(name: str) -> Shard | None:
    """The shard with its index, where that is kept and still its own."""
    stamp = _stamp(name)
    for place in index_places(Path(name)):
        kept = read_index(place, stamp)
        if kept is not None:
            index, problems = kept
            for problem in problems:
                log.warning(f"{name} {problem}")
            return Shard(name, index, place)
    return None


def _look_through(name: str) -> Shard:
    try:
        with Path(name).open("rb") as file, one_at_a_time(file):
            shard = _known(name)
            if shard is not None:
                return shard
            stamp = _stamp(name)
            index, problem = scan(file, name)
    except OSError as error:
        raise _cannot_be_read(name, error) from error
    write_header(index, stamp, [problem] if problem else [])
    kept = write_index(index, list(index_places(Path(name))))
    return Shard(name, *kept) if kept else Shard(name, index)


def _stamp(name: str) -> list:
    """Size and time of the last change: what an index belongs to."""
    try:
        status = Path(name).stat()
    except OSError as error:
        raise _cannot_be_read(name, error) from error
    return [status.st_size, status.st_mtime_ns, FORMAT]


def _cannot_be_read(name: str, error: OSError) -> UserError:
    return UserError(f"shard {name} cannot be read: {error.strerror}; check the config's train_file")
