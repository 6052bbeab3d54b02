"""Official annotation files: lists of objects that name one another by their ids, checked value by value."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import UserError

WANTED = {int: "a whole number", str: "text", list: "a list"}


def by_id(entries: object, key: str, file: Path, part: str = "") -> dict[int, dict]:
    """Value of the key -> entry; UserError for what is no list of objects or has two entries of one id."""
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
    """The entry of the table, which was read from `file`; `where` it is asked for ends in the key's name."""
    if key not in table:
        raise UserError(f"{where} {key} is not in {file}; the two files must be of the same release")
    return table[key]


def checked(entry: object, key: str, kind: type, where: str, least: int | None = None) -> Any:
    """The entry's value, found to be of this kind and not below `least`, which is 1; UserError otherwise."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object, found {entry!r}"[:500])
    value = entry.get(key)
    if type(value) is not kind or (least is not None and value < least):
        wanted = WANTED[kind] + ("" if least is None else " above 0")
        raise UserError(f"{where}: {key!r} must be {wanted}, found {value!r}"[:500])
    return value


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Where it stands and what it holds, of every line that is not blank; UserError naming a damaged one."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield where, json.loads(line)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{where} is not valid JSON (truncated?): {error}; download the file again"
        ) from error
