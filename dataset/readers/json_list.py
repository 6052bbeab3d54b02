"""A JSON list, or JSON lines, on disk, however long, as a sequence: an entry is read when it is asked for.

An index says where each entry begins and what its bytes must add up to, 12 bytes an entry. It is made in one
pass over the file, which checks every entry, too. That of a large file is kept beside it (or else in the
user's cache folder) and memory-mapped, so that all processes of a machine share one copy; it holds until the
file changes. The text itself is read, not mapped: a mapped file that someone cuts short kills its readers.
"""

import codecs
import fcntl
import json
import os
import re
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import torch

from simla.utils import (
    CONTENT_BYTES,
    UserError,
    atomic_write,
    file_status,
    is_main,
    log,
    other_content,
    with_progress,
)

FORMAT = 1  # raise it whenever an index is laid out differently or a check of entries becomes stricter
BLOCK_BYTES = 1 << 20  # read and parsed at a time
LOG_BLOCKS = 256  # between two lines of progress
KEPT_FROM_BYTES = 8 << 20  # a smaller file is looked through each time, in a fraction of a second
MAX_CHECKS = 16  # that an index can tell have been made

HEADER_BYTES = 4096  # of an index: a line of JSON; then the records of all entries and one of their end
RECORD = struct.Struct("<QI")  # byte at which an entry begins, CRC-32 of those from there to the next entry
RECORD_AND_NEXT = struct.Struct("<QIQ")

DECODE = json.JSONDecoder().raw_decode
OPENING = re.compile(r"[ \t\n\r]*(\[?)[ \t\n\r]*")
SEPARATOR = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*(?=[^ \t\n\r])|(\])[ \t\n\r]*)")
SPACE = re.compile(r"[ \t\n\r]*")
TABLE = re.compile(rb"\s*[^\s\[{][^\n]*[,\t]")  # a first line of cells, that begins no list and no object
# So close to the end of a text a token may be wrong or cut: r"\ud83d\ude00", "-Infinity"; and some more.
LONGEST_TOKEN = 16

Check = Callable[[object, str], None]


class JsonList(Sequence):
    """The entries of a file: of a JSON list, or the objects that stand in its lines.

    All have passed `check(entry, where)`, which raises UserError for one that is no use: now, or when the
    index was made, which knows checks by `check_name`.

    Pickles by the file's name and, unless its index lies on the disk, with the index. Raises UserError for a
    file that is missing, truncated or no list; later on for an entry whose text has changed meanwhile.
    """

    def __init__(self, path: Path, check: Check, check_name: str):
        self.path, self.file = path, _open(path)
        self.stamp = _stamp(self.file)
        self.index, self.kept_as = _find_or_make_index(path, self.file, self.stamp, check, check_name)
        self.num_entries = (len(self.index) - HEADER_BYTES) // RECORD.size - 1

    def __len__(self) -> int:
        return self.num_entries

    def __getitem__(self, number: int) -> object:
        if not 0 <= number < self.num_entries:
            raise IndexError(number)
        if self.file is None:
            self._open_again()
        begin, checksum, end = RECORD_AND_NEXT.unpack_from(self.index, HEADER_BYTES + number * RECORD.size)
        try:
            text = os.pread(self.file.fileno(), end - begin, begin)
        except OSError as error:
            raise _cannot_be_read(self.path, error) from error
        if zlib.crc32(text) != checksum:
            if self.kept_as:
                with suppress(OSError):
                    self.kept_as.unlink(missing_ok=True)
            raise UserError(
                f"{self.path}: entry {number} has changed since the file was opened; start again, and leave "
                "the file as it is while it is in use"
            )
        return DECODE(text.decode("utf-8", "surrogatepass"))[0]

    def signature(self) -> list:
        """Return the file's name, its number of entries and a checksum of their bytes and places."""
        return [str(self.path), len(self), f"{_checksum(self.index):08x}"]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "file": None, "index": None if self.kept_as else bytes(self.index)}

    def _open_again(self) -> None:
        """In a process that got this object pickled."""
        if self.index is None:
            found = read_index(self.kept_as, self.stamp)
            if found is None:
                raise UserError(f"{self.path} or its index {self.kept_as} has changed; start again")
            self.index = found[0]
        self.file = _open(self.path)


def read_json(path: Path, kind: type[list] | type[dict]) -> list | dict:
    """What the file holds; UserError where it is missing, truncated or holds no list (or object)."""
    try:
        with _open(path) as file:
            content = json.loads(file.read())
    except ValueError as error:
        raise _not_json(path, error) from error
    _check_kind(path, content, kind)
    return content


def _check_kind(path: Path, content: object, kind: type[list] | type[dict]) -> None:
    if not isinstance(content, kind):
        wanted = {list: "list", dict: "object"}[kind]
        found = type(content).__name__
        if isinstance(content, dict):
            found += f" with the keys {', '.join(content)}"[:200]
        remedy = "; official files are converted by `python -m simla.dataset.prepare`" if kind is list else ""
        raise UserError(f"annotation file {path} must hold a JSON {wanted}, found {found}{remedy}")


def _open(path: Path) -> BinaryIO:
    try:
        file_status(path)
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _cannot_be_read(path, error) from error


def _cannot_be_read(path: Path, error: OSError) -> UserError:
    return UserError(f"annotation file {path} cannot be read: {error.strerror}; check the config's paths")


def _not_json(path: Path, problem: object) -> UserError:
    with _open(path) as file:
        head = file.read(CONTENT_BYTES)
    if what := other_content(head):
        return UserError(f"annotation file {path} is not valid JSON: it is {what}")
    if TABLE.match(head):
        problem = f"{problem}; a table (CSV, TSV) is converted by `python -m simla.dataset.prepare table`"
    return UserError(f"annotation file {path} is not valid JSON (truncated?): {problem}")


# ---- one pass over a file ----


class _Window:
    """The part of a text file that is being parsed: `text`, of which all before `at` is done with."""

    def __init__(self, path: Path, file: BinaryIO, num_bytes: int):
        has_mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        self.num_read = file.seek(len(codecs.BOM_UTF8) if has_mark else 0)  # bytes
        self.blocks = iter(partial(file.read, BLOCK_BYTES), b"")
        if num_bytes >= KEPT_FROM_BYTES:
            num_blocks = -(-num_bytes // BLOCK_BYTES)
            self.blocks = with_progress(self.blocks, num_blocks, f"Looking through {path}, MiB", LOG_BLOCKS)
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        self.text, self.at = "", 0
        self.offset = self.num_read  # byte of the file at which `at` is
        self.line = 1  # of the file, at which `text` begins

    def read_on(self) -> bool:
        """Drops what is done with, reads a block or as much again as is left; False at the end of the file.

        Raises ValueError for bytes that are no UTF-8.
        """
        missing, parts = max(len(self.text) - self.at, 1), []
        for block in self.blocks:
            parts.append(self._decode(block))
            missing -= len(parts[-1])
            if missing <= 0:
                break
        if not parts:
            self.decoder.decode(b"", final=True)
            return False
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + "".join(parts), 0
        return True

    def _decode(self, block: bytes) -> str:
        held = len(self.decoder.getstate()[0])
        try:
            text = self.decoder.decode(block)
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {self.num_read - held + error.start} is not UTF-8") from error
        self.num_read += len(block)
        return text

    def pass_to(self, end: int) -> bytes:
        """Moves on; returns the bytes passed, as they are in the file."""
        passed = self.text[self.at : end].encode("utf-8", "surrogatepass")
        self.offset += len(passed)
        self.at = end
        return passed


def _next_entry(text: str, at: int, in_list: bool) -> tuple[object, int, bool | None]:
    """The entry that begins at `at`, where the next one begins, and whether there is none; None where that
    depends on what comes after the text.
    """
    entry, end = DECODE(text, at)
    if not in_list:
        begin = SPACE.match(text, end).end()
        if begin < len(text) and "\n" not in text[end:begin]:
            raise json.JSONDecodeError("Expecting the end of the line", text, end)
        return entry, begin, False if begin < len(text) else None
    separator = SEPARATOR.match(text, end)
    if separator is None:
        end = SPACE.match(text, end).end()
        if text[end : end + 1] == ",":
            raise json.JSONDecodeError("Expecting value", text, len(text))
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return entry, separator.end(), separator[1] is not None


def _scan(path: Path, file: BinaryIO, num_bytes: int, check: Check) -> bytearray:
    """An index without its header, each entry checked. UserError where the text is neither a JSON list nor
    JSON lines.
    """
    window, index, number = _Window(path, file, num_bytes), bytearray(HEADER_BYTES), 0
    try:
        in_list, is_last = _enter(path, window)
        while not is_last:
            try:
                entry, end, is_last = _next_entry(window.text, window.at, in_list)
            except json.JSONDecodeError as error:
                # An open string is said to be wrong at its beginning, all else where the text ends.
                is_cut = error.pos + LONGEST_TOKEN > len(window.text) or error.msg.startswith("Unterminated")
                if is_cut and window.read_on():
                    continue
                raise
            if is_last is None:
                if window.read_on():
                    continue
                is_last = True
            try:
                check(entry, f"{path}: entry {number}")
            except UserError:
                is_alone = not in_list and is_last and number == 0
                if is_alone and ("\n" in window.text[window.at : end].strip() or _is_other_format(entry)):
                    _check_kind(path, entry, list)  # no line of an annotation file, but one object
                raise
            begin = window.offset
            index += RECORD.pack(begin, zlib.crc32(window.pass_to(end)))
            number += 1
        index += RECORD.pack(window.offset, 0)
        while window.at == len(window.text) and window.read_on():
            window.pass_to(SPACE.match(window.text, window.at).end())
        if window.at < len(window.text):
            raise json.JSONDecodeError("Extra data after the list", window.text, window.at)
    except json.JSONDecodeError as error:
        line = window.line + window.text.count("\n", 0, error.pos)
        byte = window.offset + len(window.text[window.at : error.pos].encode("utf-8", "surrogatepass"))
        raise _not_json(path, f"{error.msg}, line {line}, byte {byte}, entry {number}") from error
    except ValueError as error:
        raise _not_json(path, error) from error
    return index


def _is_other_format(content: dict) -> bool:
    """Whether the only object of a file is no entry, which has texts, numbers and lists of them, but lists
    entries itself, as COCO's and VQA's files do, or has something nested under every key, as boxes by image.
    """
    lists = [value for value in content.values() if isinstance(value, list)]
    plain = [value for value in lists if value and not isinstance(value[0], list | dict)]
    num_nested = sum(isinstance(value, dict) for value in content.values()) + len(lists) - len(plain)
    return num_nested == len(content) or any(value and isinstance(value[0], dict) for value in lists)


def _enter(path: Path, window: _Window) -> tuple[bool, bool]:
    """Moves to the first entry; whether it is one of a list, not of lines, and whether there is none."""
    opening = OPENING.match(window.text)
    while opening.end() == len(window.text) and window.read_on():
        opening = OPENING.match(window.text)
    in_list = bool(opening[1])
    if not in_list and not window.text.startswith("{", opening.end()):
        read_json(path, list)  # says what it is instead
        raise _not_json(path, "it is not UTF-8")
    window.pass_to(opening.end())
    is_empty = in_list and window.text.startswith("]", window.at)
    if is_empty:
        window.pass_to(SPACE.match(window.text, window.at + 1).end())
    return in_list, is_empty


# ---- the index on the disk ----


def _find_or_make_index(
    path: Path, file: BinaryIO, stamp: list, check: Check, check_name: str
) -> tuple[bytearray | memoryview, Path | None]:
    """An index, and its file if it has one."""
    num_bytes = stamp[0]
    if num_bytes < KEPT_FROM_BYTES:
        return _scan(path, file, num_bytes, check), None
    places = list(index_places(path))

    def find() -> tuple[memoryview, list[str], Path] | None:
        found = [(*index, place) for place in places if (index := read_index(place, stamp))]
        return max(found, key=lambda index: check_name in index[1], default=None)

    index = find()
    if index is None or check_name not in index[1]:
        log.info(f"{path}: its entries are being looked through, once until it changes")
        if not is_main():
            time.sleep(1)  # the main rank, whose progress is shown, comes first
        with one_at_a_time(file):
            index = find()  # another process may just have made it
            if index is None or check_name not in index[1]:
                known = index[1] if index else []
                content = _scan(path, file, num_bytes, check)
                write_header(content, stamp, [*known, check_name])
                return _keep(path, content, places)
    return index[0], index[2]


def index_places(path: Path) -> Iterator[Path]:
    """The files in which the index of `path` may be, the preferred one first."""
    yield path.with_name(f".{path.name}.simla")
    with suppress(RuntimeError):  # no home
        digest = blake2b(os.fsencode(path.absolute()), digest_size=8).hexdigest()
        yield cache_folder() / f"{path.name}-{digest}.simla"


def cache_folder() -> Path:
    """The user's; RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simla"


def _stamp(file: BinaryIO) -> list:
    """Size, time of the last change, and a digest of the head and the tail: what an index belongs to."""
    status = os.fstat(file.fileno())
    digest = blake2b(os.pread(file.fileno(), BLOCK_BYTES, 0), digest_size=16)
    digest.update(os.pread(file.fileno(), BLOCK_BYTES, max(status.st_size - BLOCK_BYTES, 0)))
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()]


def write_header(index: bytearray, stamp: list, checks: list) -> None:
    header = {"format": FORMAT, "file": stamp, "crc": _checksum(index), "checks": checks[-MAX_CHECKS:]}
    index[:HEADER_BYTES] = json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n"


def _checksum(index: bytearray | memoryview) -> int:
    """Of the records."""
    with memoryview(index) as whole, whole[HEADER_BYTES:] as records:
        return zlib.crc32(records)


def read_index(place: Path, stamp: list) -> tuple[memoryview, list] | None:
    """The index and the names of the checks made, or what else was noted with it; None where there is none
    for a file of this stamp.
    """
    try:
        index = _mapped(place)
        header = json.loads(bytes(index[:HEADER_BYTES]))
        if (header["format"], header["file"]) != (FORMAT, stamp):
            return None
        if _checksum(index) == header["crc"]:
            return index, list(header["checks"])
    except (OSError, RuntimeError):
        return None
    except (ValueError, KeyError, TypeError):
        pass
    log.warning(f"{place} is damaged and will be made anew")
    return None


def _mapped(place: Path) -> memoryview:
    """The file, in memory that processes share. RuntimeError where torch cannot have it.

    Not by Python's mmap: that holds a descriptor, and of indexes of shards there may be thousands.
    """
    size = place.stat().st_size
    content = torch.from_file(str(place), shared=False, size=size, dtype=torch.uint8)
    return memoryview(content.numpy()).toreadonly()


def _keep(path: Path, content: bytearray, places: list[Path]) -> tuple[bytearray | memoryview, Path | None]:
    """Writes an index to the first place that takes it; returns what to read it from, and that place."""
    kept = write_index(content, places)
    if kept is not None:
        log.info(f"{path}: index kept as {kept[1]}")
        return kept
    log.warning(
        f"{path}: its index cannot be kept, neither as {' nor as '.join(map(str, places))}; each start looks "
        "through the file again"
    )
    return content, None


def write_index(content: bytearray, places: list[Path]) -> tuple[memoryview, Path] | None:
    """The index, mapped, and the first place that takes it; None where none does."""
    for place in places:
        # Of its own name: on a disk that several machines share another one may be writing, too.
        scratch = place.with_name(f"{place.name}-{uuid.uuid4().hex}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(scratch) as file:
                file.write(content)
            index = _mapped(scratch)
            scratch.replace(place)
        except (OSError, RuntimeError, UserError):
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            continue
        return index, place
    return None


@contextmanager
def one_at_a_time(file: BinaryIO) -> Iterator[None]:
    """Processes of this machine enter one after the other, where the disk knows locks; else all at once,
    which only costs time.
    """
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
