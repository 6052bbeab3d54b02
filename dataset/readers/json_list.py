"""A JSON list, or JSON lines, on disk, however long, as a sequence: an entry is read when it is asked for.

An index says where each entry begins and what its bytes must add up to, 12 bytes an entry. It is made in one
pass over the file, which checks every entry, too; that of a large file is kept (`kept_index`). The text is
read, not mapped: a mapped file that someone cuts short kills its readers.
"""

import codecs
import json
import os
import re
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from simla.dataset.files import file_status
from simla.dataset.readers.kept_index import (
    HEADER_BYTES,
    Index,
    checksum,
    find_index,
    index_files,
    make_index,
    read_index,
)
from simla.utils import CONTENT_BYTES, UserError, is_main, log, other_content, with_progress

FORMAT = 2  # raise it whenever an index is laid out differently or a check of entries becomes stricter
BLOCK_BYTES = 1 << 20  # read and parsed at a time
LOG_BLOCKS = 256  # between two lines of progress
KEPT_FROM_BYTES = 8 << 20  # a smaller file is looked through each time, in a fraction of a second
MAX_CHECKS = 16  # that an index can tell have been made

RECORD = struct.Struct("<QI")  # byte at which an entry begins, CRC-32 of those from there to the next entry
RECORD_AND_NEXT = struct.Struct("<QIQ")  # after the records of all entries comes one of their end

DECODE = json.JSONDecoder().raw_decode
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
        self.index, _, self.kept_as = _index(path, self.file, self.stamp, check, check_name)
        self.num_entries = (len(self.index) - HEADER_BYTES) // RECORD.size - 1

    def __len__(self) -> int:
        return self.num_entries

    def __getitem__(self, number: int) -> object:
        if not 0 <= number < self.num_entries:
            raise IndexError(number)
        if self.file is None:  # in a process that got this object pickled
            self.file = _open(self.path)
        if self.index is None:
            index = read_index(self.kept_as, self.stamp)
            if index is None:
                raise UserError(f"{self.path} or its index {self.kept_as} has changed; start again")
            self.index = index.content
        begin, crc, end = RECORD_AND_NEXT.unpack_from(self.index, HEADER_BYTES + number * RECORD.size)
        try:
            text = os.pread(self.file.fileno(), end - begin, begin)
        except OSError as error:
            raise _cannot_be_read(self.path, error) from error
        if zlib.crc32(text) != crc:
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
        return [str(self.path), len(self), f"{checksum(self.index):08x}"]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "file": None, "index": None if self.kept_as else bytes(self.index)}


def read_json(path: Path, kind: type[list] | type[dict]) -> list | dict:
    """Return what the file holds; UserError where it is missing, truncated or holds no list (or object)."""
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


def _stamp(file: BinaryIO) -> list:
    """Return size, time of the last change, and a digest of head and tail: what an index belongs to."""
    status = os.fstat(file.fileno())
    digest = blake2b(os.pread(file.fileno(), BLOCK_BYTES, 0), digest_size=16)
    digest.update(os.pread(file.fileno(), BLOCK_BYTES, max(status.st_size - BLOCK_BYTES, 0)))
    return [status.st_size, status.st_mtime_ns, digest.hexdigest(), FORMAT]


def _index(path: Path, file: BinaryIO, stamp: list, check: Check, check_name: str) -> Index:
    """Return an index of which this check is known to have been made, or make one."""
    if stamp[0] < KEPT_FROM_BYTES:
        return Index(_scan(path, file, stamp[0], check), [], None)
    index = find_index(path, stamp, check_name)
    if index is not None and check_name in index.notes:
        return index
    log.info(f"{path}: its entries are being looked through, once until it changes")
    if not is_main():
        time.sleep(1)  # the main rank, whose progress is shown, comes first

    def make(checks: list) -> tuple[bytearray, list]:
        return _scan(path, file, stamp[0], check), [*checks, check_name][-MAX_CHECKS:]

    index = make_index(path, file, stamp, make, check_name)
    if index.kept_as is None:
        files = " nor as ".join(map(str, index_files(path)))
        log.warning(
            f"{path}: its index cannot be kept, neither as {files}; each start looks through it again"
        )
    return index


# ---- one pass over a file ----


class _Window:
    """The part of a text file that is being parsed: `text`, of which all before `begin` is done with, and all
    before `at` is parsed.
    """

    def __init__(self, file: BinaryIO, path: Path, num_bytes: int):
        self.file, self.blocks = file, iter(partial(file.read, BLOCK_BYTES), b"")
        if num_bytes >= KEPT_FROM_BYTES:
            num_blocks = -(-num_bytes // BLOCK_BYTES)
            self.blocks = with_progress(self.blocks, num_blocks, f"Looking through {path}, MiB", LOG_BLOCKS)
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        self.text, self.begin, self.at, self.line = "", 0, 0, 1  # line at which `text` begins
        has_mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        self.offset = file.seek(len(codecs.BOM_UTF8) if has_mark else 0)  # byte of the file of `begin`
        self.pass_space()

    def read_on(self) -> bool:
        """Drop what is done with, read a block or as much again as is left; return False at the end of the
        file. Raises ValueError for bytes that are no UTF-8.
        """
        missing, texts = max(len(self.text) - self.begin, 1), []
        while missing > 0 and (block := next(self.blocks, b"")):
            texts.append(self._decode(block))
            missing -= len(texts[-1])
        if not texts:
            self._decode(b"")
            return False
        self.line += self.text.count("\n", 0, self.begin)
        self.text = self.text[self.begin :] + "".join(texts)
        self.begin, self.at = 0, self.at - self.begin
        return True

    def _decode(self, block: bytes) -> str:
        begin = self.file.tell() - len(block) - len(self.decoder.getstate()[0])
        try:
            return self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {begin + error.start} is not UTF-8") from error

    def pass_space(self) -> bool:
        """Move to the next letter, or to the end of the file; return whether a line ends before it."""
        length = self.at - self.begin
        self.at = SPACE.match(self.text, self.at).end()
        while self.at == len(self.text) and self.read_on():
            self.at = SPACE.match(self.text, self.at).end()
        return "\n" in self.text[self.begin + length : self.at]

    def pass_letter(self, letter: str) -> bool:
        """Move past this letter and the space after it; return False where another stands."""
        is_there = self.text.startswith(letter, self.at)
        if is_there:
            self.at += 1
            self.pass_space()
        return is_there

    def pass_value(self) -> object:
        """Move past a value and return it."""
        while True:
            try:
                value, end = DECODE(self.text, self.at)
            except json.JSONDecodeError as error:
                # An open string is said to be wrong at its beginning, all else where the text ends.
                is_cut = error.pos + LONGEST_TOKEN > len(self.text) or error.msg.startswith("Unterminated")
                if not (is_cut and self.read_on()):
                    raise
            else:
                if end + LONGEST_TOKEN <= len(self.text) or not self.read_on():
                    self.at = end
                    return value

    def take(self) -> bytes:
        """Return the bytes from `begin` to `at`, which are done with."""
        content = self.text[self.begin : self.at].encode("utf-8", "surrogatepass")
        self.begin, self.offset = self.at, self.offset + len(content)
        return content

    def error(self, problem: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(problem, self.text, self.at)


def _scan(path: Path, file: BinaryIO, num_bytes: int, check: Check) -> bytearray:
    """Return an index without its header, each entry checked. UserError where the text is neither a JSON list
    nor JSON lines.
    """
    index, number = bytearray(HEADER_BYTES), 0
    try:
        window = _Window(file, path, num_bytes)
        in_list = window.pass_letter("[")
        if not in_list and not window.text.startswith("{", window.at):
            read_json(path, list)  # says what it is instead
            raise _not_json(path, "it is not UTF-8")
        is_last = in_list and window.pass_letter("]")
        window.take()
        while not is_last:
            begin, entry = window.offset, window.pass_value()
            num_lines = 1 + window.text.count("\n", window.begin, window.at)
            has_ended = window.pass_space()
            is_last = window.pass_letter("]") if in_list else window.at == len(window.text)
            if not is_last and not (window.pass_letter(",") if in_list else has_ended):
                raise window.error("Expecting ',' delimiter" if in_list else "Expecting the end of the line")
            try:
                check(entry, f"{path}: entry {number}")
            except UserError:
                is_alone = not in_list and is_last and number == 0
                if is_alone and (num_lines > 1 or _is_other_format(entry)):
                    _check_kind(path, entry, list)  # no line of an annotation file, but one object
                raise
            index += RECORD.pack(begin, zlib.crc32(window.take()))
            number += 1
        if window.at < len(window.text):
            raise window.error("Extra data after the list")
    except json.JSONDecodeError as error:
        line = window.line + window.text.count("\n", 0, error.pos)
        byte = window.offset + len(window.text[window.begin : error.pos].encode("utf-8", "surrogatepass"))
        raise _not_json(path, f"{error.msg}, line {line}, byte {byte}, entry {number}") from error
    except ValueError as error:
        raise _not_json(path, error) from error
    return index + RECORD.pack(window.offset, 0)


def _is_other_format(content: dict) -> bool:
    """Return whether the only object of a file is no entry, which has texts, numbers and lists of them, but
    lists entries itself, as COCO's and VQA's files do, or has something nested under every key, as boxes by
    image.
    """
    lists = [value for value in content.values() if isinstance(value, list)]
    plain = [value for value in lists if value and not isinstance(value[0], list | dict)]
    num_nested = sum(isinstance(value, dict) for value in content.values()) + len(lists) - len(plain)
    return num_nested == len(content) or any(value and isinstance(value[0], dict) for value in lists)
