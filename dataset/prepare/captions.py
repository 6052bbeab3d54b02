"""Cells of somebody's table: one caption, several, or no text at all."""

from collections.abc import Iterable, Iterator
from unicodedata import category

from simla.dataset.prepare.common import Report
from simla.dataset.text import CLEANED, listed_texts

# What pandas, R and MySQL write into a table of text in place of a missing value.
NULLS = {"NA", "N/A", "#N/A", "<NA>", "n/a", "nan", "NaN", "null", "NULL", "None", r"\N"}
KINDS = {
    bool: "truth values",
    int: "numbers",
    float: "numbers",
    dict: "objects",
    bytes: "bytes that are not UTF-8",
}


def values_of(cell: object) -> tuple[list[object], bool]:
    """Return the values of a list, of lists in it too, or the cell alone; and whether it was written as text.

    Bytes that are UTF-8 become text. An empty list has one value, None.
    """
    if isinstance(cell, bytes):
        try:
            cell = cell.decode("utf-8-sig")
        except UnicodeDecodeError:
            return [cell], False
    values = listed_texts(cell) if isinstance(cell, str) else cell
    if not isinstance(values, list):
        return [cell], False
    inner = [values_of(value) for value in values]
    was_text = isinstance(cell, str) or any(inner_was_text for _, inner_was_text in inner)
    return [value for inner_values, _ in inner for value in inner_values] or [None], was_text


def is_missing(value: object) -> bool:
    """Return whether it is null, not a number (a table's null), a text that stands for null, or one without a
    readable letter.
    """
    if isinstance(value, str):
        return value.strip() in NULLS or not is_readable(value)
    return value is None or value != value


def is_readable(text: str) -> bool:
    """Return whether anything visible is left of a caption after `clean_caption`."""
    return any(category(letter)[0] not in "CZ" for letter in text.translate(CLEANED))


def values_in(cell: object, where: str, report: Report) -> list[object]:
    """Return the values of a list, or the cell alone; a list that is written as text is noticed."""
    values, was_text = values_of(cell)
    if was_text:
        report.notice("lists written as text, read as several captions", where)
    return values


def captions_in(cell: object, where: str, report: Report) -> Iterator[str]:
    """Yield the captions that the cell holds; values that are none are reported as left out."""
    for value in values_in(cell, where, report):
        if is_missing(value):
            report.leave_out("pairs without a caption", where)
        elif not isinstance(value, str):
            kind = KINDS.get(type(value), f"of type {type(value).__name__}")
            report.leave_out(f"captions that are no text but {kind}", where)
        else:
            text = value.strip()
            if text.startswith("[") and text.endswith("]"):
                report.notice("captions in square brackets that are no list of strings, read as text", where)
            yield text


def pairs(rows: Iterable[tuple[str, object]], start: str, report: Report) -> Iterator[dict]:
    """Yield pre-training entries of (image name, cell with captions); `start` precedes the names."""
    for name, cell in rows:
        yield from ({"image": start + name, "caption": text} for text in captions_in(cell, name, report))
