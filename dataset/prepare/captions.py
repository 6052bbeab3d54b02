"""What a cell of somebody's table holds: one caption, several, or no text at all."""

import json
import re
from ast import literal_eval
from unicodedata import category

from simla.dataset.text import CLEANED

STRING = re.compile(r"""[uU]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
# As Python prints a list of strings, or numpy, without commas, an array of them.
LIST_OF_STRINGS = re.compile(rf"\[\s*{STRING.pattern}(?:(?:\s*,\s*|\s+){STRING.pattern})*\s*,?\s*\]")
KINDS = {
    bool: "truth values",
    int: "numbers",
    float: "numbers",
    dict: "objects",
    bytes: "bytes that are not UTF-8",
}


def listed_texts(text: str) -> list[str] | None:
    """The strings of a list that is written as text, in JSON's or Python's way; None for any other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        if not LIST_OF_STRINGS.fullmatch(text):
            return None
        try:
            # One by one: Python would join what stands side by side without a comma.
            return [literal_eval(string) for string in STRING.findall(text)]
        except (ValueError, SyntaxError):
            return None
    return listed if all(isinstance(part, str) for part in listed) else None


def values_of(cell: object) -> tuple[list[object], bool]:
    """The values of a list, of lists in it too, or else the cell itself; and whether it was written as text.

    Bytes that are UTF-8 become text. An empty list has one value, None.
    """
    if isinstance(cell, bytes):
        try:
            cell = cell.decode("utf-8-sig")
        except UnicodeDecodeError:
            return [cell], False
    listed = listed_texts(cell) if isinstance(cell, str) else cell
    if not isinstance(listed, list):
        return [cell], False
    parts = [values_of(part) for part in listed]
    written = isinstance(cell, str) or any(was_text for _, was_text in parts)
    return [value for values, _ in parts for value in values] or [None], written


def is_missing(value: object) -> bool:
    """Whether it is null, not a number (which tables have for null), or a text without a readable letter."""
    return value is None or value != value or (isinstance(value, str) and not is_readable(value))


def is_readable(text: str) -> bool:
    """Whether anything is left of a caption without what `clean_caption` drops and what cannot be seen."""
    return any(category(letter)[0] not in "CZ" for letter in text.translate(CLEANED))


def kind_of(value: object) -> str:
    """What such values are instead of text, in the plural."""
    return KINDS.get(type(value), f"of type {type(value).__name__}")
