"""Official annotation files: lists of objects that name one another by their ids, checked value by value."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simla.dataset.files import other_file
from simla.utils import UserError

MAX_MISPLACED = 0.25  # share of a detector's boxes; right ones may leave the image by their rounding
MAX_PIXEL, MIN_SIDE = 1e9, 1e-9  # of a box: within them its area is neither infinite nor 0
WANTED = {int: "a whole number", str: "text", list: "a list"}


def by_id(entries: object, key: str, file: Path, part: str = "") -> dict[int, dict]:
    """Return key's value -> entry; UserError for what is no list of objects or has two entries of one id."""
    if not isinstance(entries, list):
        raise UserError(
            f"{file}{part} must be a list of objects with {key!r}, found {type(entries).__name__}"
        )
    table = {}
    for number, entry in enumerate(entries):
        table[checked(entry, key, int, f"{file}{part} entry {number}")] = entry
        if len(table) == number:
            raise UserError(f"{file}{part} entry {number} has the {key} of an earlier one, {entry[key]}")
    return table


def look_up(table: dict, key: int | str, where: str, file: Path) -> Any:
    """Return the entry of a table read from `file`; `where` it is asked for ends in the key's name."""
    if key not in table:
        raise UserError(f"{where} {key} is not in {file}; the two files must be of the same release")
    return table[key]


def value_of(entry: object, key: str, where: str) -> Any:
    """Return the entry's value, whatever it is; UserError where there is none."""
    if not isinstance(entry, dict) or key not in entry:
        found = f"an object of {', '.join(entry) or 'nothing'}" if isinstance(entry, dict) else repr(entry)
        raise UserError(f"{where} must be an object with {key!r}, found {found}"[:500])
    return entry[key]


def checked(entry: object, key: str, kind: type, where: str, least: int | None = None) -> Any:
    """Return the entry's value; UserError unless it is of this kind and not below `least`, which is 1."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object, found {entry!r}"[:500])
    value = entry.get(key)
    if type(value) is not kind or (least is not None and value < least):
        wanted = WANTED[kind] + ("" if least is None else " above 0")
        raise UserError(f"{where}: {key!r} must be {wanted}, found {value!r}"[:500])
    return value


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and content of each line, without its end and without a byte-order mark;
    UserError where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.removeprefix(BOM_UTF8 if number == 1 else b"").rstrip(b"\r\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Yield place and content of every line that is not blank; UserError naming a damaged one."""
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            if what := other_file(path):
                raise UserError(f"{path} is {what}") from error
            raise UserError(
                f"{where} is not valid JSON (truncated?): {error}; download the file again"
            ) from error
        yield where, content


def is_box(box: object) -> bool:
    """Return whether it is [x, y, width, height, ...] in pixels with an area."""
    return isinstance(box, list) and all(type(side) in (int, float) for side in box[:4]) and has_area(box)


def is_placed(box: list[float], width: int, height: int) -> bool:
    """Return whether [x, y, width, height, ...] can be in pixels of an image of that size: it is inside, up
    to a tenth of the sides, as corners are not, and more than a pixel wide or high, as shares are not.
    """
    x, y, w, h = box[:4]
    is_inside = x >= -0.1 * width and y >= -0.1 * height and x + w <= 1.1 * width and y + h <= 1.1 * height
    return is_inside and max(w, h) > 1


def has_area(box: list[float]) -> bool:
    """Return whether the numbers are [x, y, width, height, ...] in pixels with width and height above 0."""
    return len(box) >= 4 and all(abs(side) <= MAX_PIXEL for side in box[:4]) and min(box[2:4]) >= MIN_SIDE
