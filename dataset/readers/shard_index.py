"""One WebDataset shard and its index, which says where in the tar file each sample lies.

An index is made in one pass over the tar file's headers; that of a local shard is kept (`kept_index`).
"""

import io
import json
import re
import struct
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from os import pread
from pathlib import Path
from typing import BinaryIO

from simla.dataset.files import file_status
from simla.dataset.images import BadImage
from simla.dataset.readers.kept_index import HEADER_BYTES, Index, find_index, make_index, read_index
from simla.dataset.text import listed_texts
from simla.utils import (
    CONTENT_BYTES,
    UserError,
    first_line,
    log,
    other_content,
    printable,
    rank,
    with_progress,
    world_size,
)

# Of a sample the first of these that is there is the image, or the caption: a mask is a PNG beside a photo.
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "webp", "avif", "png", "gif", "bmp", "tif", "tiff", "jp2")
TEXTS = ("txt", "json")
FORMAT = "shard 4"  # raise it whenever an index is laid out differently or other members make a sample
# Of a sample: first byte and length of the image, of the text, and what that is. First byte 0: none.
RECORD = struct.Struct("<QIQIB")
TXT, JSON, UNCLEAR = range(3)
MAX_BYTES = 2**32 - 1  # of a member that a record has room for
BLOCK = tarfile.BLOCKSIZE
READ_BYTES = 1 << 20  # of what follows the end of a tar file, at a time
# What holds no data: macOS's ._NAME, extended headers that were unpacked as files, WebDataset's __NAME__.
HIDDEN = re.compile(r"(?:^|/)(?:\.(?!\.?/)|PaxHeaders|__MACOSX/|__[^/]*__(?:/|$))")
# Why a member is passed over.
SYSTEM = "hidden files and those of an operating system"
LINKS = "links, which have no content here: pack with tar --dereference --hard-dereference"
NOT_PLAIN = "members that are sparse or have more than 4 GB"
NEITHER = "members that are neither an image nor a caption"
FURTHER = "further images and captions of a key"
NUM_LETTERS = 50  # of an example; a header has room for one of each cause
NUM_THREADS = 8  # that look through shards; they wait for the disk, too

PassedOver = dict[str, tuple[int, str]]  # cause -> number of members, the name of one


class Picture(io.BytesIO):
    """The content of an image; `name` says in which shard it is what, `sample` is there but once."""

    def __init__(self, name: str, content: bytes, sample: str):
        super().__init__(content)
        self.name, self.sample = name, sample

    def __str__(self) -> str:
        return self.name


class Shard:
    """One shard. `file`: what was fetched of it; None for a local one, which is opened for each sample.

    problem: what is wrong with the tar file, "" where nothing is; passed_over: members that are in no sample.
    """

    def __init__(self, name: str, index: Index, file: BinaryIO | None = None):
        self.name, self.file = name, file
        self.index, (self.problem, self.passed_over), self.kept_as = index
        self.num_samples = _num_samples(self.index)

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict:
        return {**self.__dict__, "index": None if self.kept_as else bytes(self.index)}

    def counts(self) -> dict[str, int]:
        """Return the number of members that are passed over, by cause."""
        return {cause: number for cause, (number, _) in self.passed_over.items()}

    def entry(self, number: int) -> dict:
        """Return the sample as an entry for training; its image is a `Picture`. Raises `BadImage`."""
        if self.index is None:  # in a process that got this object pickled
            index = read_index(self.kept_as, _stamp(self.name))
            if index is None:
                raise UserError(f"{self.name} or its index {self.kept_as} has changed; start again")
            self.index = index.content
        sample = f"{self.name}: sample {number}"
        record = RECORD.unpack_from(self.index, HEADER_BYTES + number * RECORD.size)
        image_at, image_size, text_at, text_size, kind = record
        if not image_at and not text_at:
            raise BadImage(sample, "a link, sparse or of more than 4 GB")
        with self._descriptor() as descriptor:
            image_name, image = self._member(descriptor, image_at, image_size)
            text_name, text = self._member(descriptor, text_at, text_size)
        if kind == UNCLEAR:
            cause = "a key that comes again with other members: which belong together?"
            raise BadImage(image_name or text_name, cause)
        if not image_at:
            raise BadImage(text_name, "a caption without an image")
        if not text_at:
            raise BadImage(image_name, "no caption")
        caption = _caption(text_name, text, kind)
        return {"images": [Picture(image_name, image, sample)], "text": caption, "where": image_name}

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        try:
            with nullcontext(self.file) if self.file else Path(self.name).open("rb", buffering=0) as file:
                yield file.fileno()
        except OSError as error:
            raise BadImage(self.name, f"{error.strerror}") from error

    def _member(self, descriptor: int, at: int, size: int) -> tuple[str, bytes]:
        """Return name, with the shard's, and content of the member whose content begins at byte `at`; nothing
        where that is 0.
        """
        if not at:
            return "", b""
        content = pread(descriptor, BLOCK + size, at - BLOCK)
        header, content = content[:BLOCK], content[BLOCK:]
        try:
            is_it = int(header[124:136].strip(b" \0"), 8) == size
        except ValueError:
            is_it = False
        if not is_it:
            raise BadImage(self.name, f"changed since its index was made: at byte {at}")
        member, _, _ = header[:100].partition(b"\0")
        name = f"{self.name}: {member.decode('utf-8', 'replace')}"
        if len(content) < size:
            raise BadImage(name, "cut short: the shard ends before it")
        return name, content


def _num_samples(index: bytes) -> int:
    return (len(index) - HEADER_BYTES) // RECORD.size


def _caption(name: str, content: bytes, kind: int) -> str | list[str]:
    try:
        caption = content.decode("utf-8-sig")
        if kind == JSON:
            fields = json.loads(caption)
            if not isinstance(fields, dict) or "caption" not in fields:
                found = ", ".join(fields) if isinstance(fields, dict) else type(fields).__name__
                raise BadImage(name, f"no caption: no field 'caption', found {found}"[:200])
            caption = fields["caption"]
        if isinstance(caption, str) and (listed := listed_texts(caption)):
            _say_once(_folder_of(name), "lists written as text are read as several captions")
            caption = listed
        elif kind != JSON and "\n" in caption.strip():
            _say_once(_folder_of(name), "texts of several lines are read as one caption each")
    except ValueError as error:
        raise BadImage(name, f"no caption: {first_line(error)}") from error
    texts = caption if isinstance(caption, list) and caption else [caption]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadImage(name, f"no caption: found {caption!r}"[:200])
    return caption


def _folder_of(name: str) -> str:
    """Return where the shard of a sample called SHARD: KEY is."""
    return name.partition(": ")[0].rpartition("/")[0] or "."


@cache  # once per process and folder
def _say_once(folder: str, message: str) -> None:
    log.warning(f"shards in {folder}: {message}")


# ---- which members make a sample ----


class _Members:
    """The members of a shard as samples, and what is passed over.

    A key is a name up to its last dot. WebDataset ends it at the first one: beside `a.jpg` and `a.txt` the
    member `a.mask.png` is a part of sample `a`. So it is here, unless key `a.mask` has image and caption.
    """

    def __init__(self):
        # Of each key, its samples: kind -> first byte and length. Of several the key is the same.
        self.samples: dict[str, list[dict[str, tuple[int, int]]]] = {}
        self.passed_over: PassedOver = {}

    def add(self, member: tarfile.TarInfo) -> None:
        """Count a member to its key's samples, or to what is passed over."""
        name = member.name.removeprefix("./")
        key, _, kind = name.rpartition(".")
        kind = kind.lower()
        if member.isdir():
            return
        if HIDDEN.search(name):
            self._pass_over(SYSTEM, name)
        elif not key or key.endswith("/") or kind not in IMAGES + TEXTS:
            self._pass_over(NEITHER, name)
        else:
            samples = self.samples.setdefault(key, [{}])
            if not member.isreg():
                self._pass_over(LINKS, name)
            elif member.issparse() or member.size > MAX_BYTES:
                self._pass_over(NOT_PLAIN, name)
            else:
                if kind in samples[-1]:
                    samples.append({})
                samples[-1][kind] = (member.offset_data, member.size)

    def index(self) -> bytearray:
        """Return an index without its header."""
        index = bytearray(HEADER_BYTES)
        for key, samples in self.samples.items():
            unused = []
            if self._is_of_another(key, samples):
                unused = [kind for sample in samples for kind in sample]
                samples = []
            is_unclear = any(sample.keys() != samples[0].keys() for sample in samples)
            for sample in samples:
                images, texts = ([kind for kind in kinds if kind in sample] for kinds in (IMAGES, TEXTS))
                unused += images[1:]
                kind = UNCLEAR if is_unclear else JSON if texts[:1] == ["json"] else TXT
                members = [sample[kinds[0]] if kinds else (0, 0) for kinds in (images, texts)]
                index += RECORD.pack(*members[0], *members[1], kind)
            for kind in unused:
                self._pass_over(FURTHER, f"{key}.{kind}")
        return index

    def _is_of_another(self, key: str, samples: list[dict]) -> bool:
        """Return whether these are parts of the sample that WebDataset would count them to."""
        folder, slash, base = key.rpartition("/")
        first = folder + slash + base.partition(".")[0]
        kinds = {kind for sample in samples for kind in sample}
        is_whole = not kinds.isdisjoint(IMAGES) and not kinds.isdisjoint(TEXTS)
        return first != key and first in self.samples and not is_whole

    def _pass_over(self, cause: str, name: str) -> None:
        number, example = self.passed_over.get(cause, (0, printable(name)[-NUM_LETTERS:]))
        self.passed_over[cause] = (number + 1, example)


# ---- indexes ----


def scan(file: BinaryIO, name: str) -> tuple[bytearray, list]:
    """Return an index without its header, and its notes: what is wrong with the tar file, "" where nothing
    is, and the members that are passed over.
    """
    members, problem, end = _Members(), "", 0
    has_members = any(file.read(BLOCK))  # where there are none, Python 3.10 looks before the beginning
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while has_members and (member := tar.next()) is not None:
                tar.members.clear()  # which it would keep
                members.add(member)
                end = tar.offset
        file.seek(end)
        block = file.read(BLOCK)
        if len(block) < BLOCK or any(block):
            problem = f"is damaged or cut short at byte {end}"
        elif any(rest.strip(b"\0") for rest in iter(partial(file.read, READ_BYTES), b"")):
            problem = (
                f"goes on after its end at byte {end}, as tar files do that were joined by `cat`: join them "
                "by `tar --concatenate`, or name each in train_file"
            )
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter of senseless numbers
        file.seek(0)
        what = "" if end else other_content(file.read(CONTENT_BYTES))
        problem = f"is {what}" if what else f"is damaged or cut short after byte {end} ({first_line(error)})"
    index = members.index()
    if problem:
        log.warning(f"{name} {problem}: {_num_samples(index)} samples of it can be used")
    return index, [problem, members.passed_over]


def passed_over_lines(shards: Iterable[Shard]) -> list[str]:
    """Return a line for each cause, with the number of members of all shards and where the first is."""
    total: dict[str, tuple[int, str]] = {}
    for shard in shards:
        for cause, (number, example) in shard.passed_over.items():
            before, first = total.get(cause, (0, f"{shard.name}: {example}"))
            total[cause] = (before + number, first)
    return [f"passed over {number} {cause}; the first: {first}" for cause, (number, first) in total.items()]


def open_shards(names: list[str]) -> list[Shard]:
    """Return the local shards, looked through where that has not been done since they changed. The processes
    of a machine share the work: each begins elsewhere, and finds what others have done.
    """
    kept = {name: find_index(Path(name), _stamp(name)) for name in names}
    shards = {name: Shard(name, index) for name, index in kept.items() if index}
    for shard in shards.values():
        if shard.problem:
            log.warning(f"{shard.name} {shard.problem}")
    if missing := [name for name in kept if name not in shards]:
        log.info(f"{len(missing)} of {len(names)} shards are being looked through, once until they change")
        first = rank() * len(missing) // world_size()
        missing = missing[first:] + missing[:first]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            new = with_progress(pool.map(_look_through, missing), len(missing), "Shards", 100)
            shards |= zip(missing, new, strict=True)
    for line in passed_over_lines(shards.values()):
        log.warning(line)
    if not any(map(len, shards.values())):
        problem = shards[names[0]].problem
        raise UserError(
            f"no samples in {names[0]} and {len(names) - 1} more shards"
            + (f"; {names[0]} {problem}" if problem else "")
            + "; a sample is KEY.jpg (png, webp, ...) with KEY.txt or KEY.json"
        )
    return [shards[name] for name in names]


def _look_through(name: str) -> Shard:
    try:
        with Path(name).open("rb") as file:
            return Shard(name, make_index(Path(name), file, _stamp(name), lambda _: scan(file, name)))
    except OSError as error:
        raise _cannot_be_read(name, error) from error


def _stamp(name: str) -> list:
    """Return size and time of the last change: what an index belongs to."""
    try:
        status = file_status(name)
    except OSError as error:
        raise _cannot_be_read(name, error) from error
    return [status.st_size, status.st_mtime_ns, FORMAT]


def _cannot_be_read(name: str, error: OSError) -> UserError:
    return UserError(f"shard {name} cannot be read: {error.strerror}; check the config's train_file")
