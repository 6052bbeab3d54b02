"""Two images and a sentence that is true of them or not (NLVR2)."""

import re
from collections.abc import Iterable

from simla.dataset.readers.annotations import ANY, LIST, TEXT, Mapped, item_of, read_annotations
from simla.utils import UserError

CLASSES = ("False", "True")  # the label's number
IDENTIFIER = re.compile(r"[^-,\s]+(-[^-,\s]+){3}")  # split, set of images, pair in the set, sentence


def read_nlvr(files: str | list[str], image_root: str) -> Mapped:
    """Return entries {"images": [path, path], "sentence", "label": "True" or "False" in any case, or a JSON
    boolean} as items with a label 0 or 1 and their identifier, "" where it is no text.

    Raises UserError, naming file and entry, for another label or number of images.
    """
    fields = {"images": LIST, "sentence": TEXT, "label": ANY}
    return Mapped(read_annotations(files, fields, image_root, check=_check), _item)


def _check(entry: dict, where: str) -> None:
    if not isinstance(entry["label"], str | bool) or _label(entry) not in CLASSES:
        raise UserError(f"{where}: 'label' must be True or False, found {entry['label']!r}"[:500])
    if len(entry["images"]) != 2:
        raise UserError(f"{where}: 'images' must be two paths, found {len(entry['images'])}")


def _item(entry: dict) -> dict:
    identifier = entry.get("identifier")
    return {
        **item_of(entry, "sentence"),
        "label": CLASSES.index(_label(entry)),
        "identifier": identifier if isinstance(identifier, str) else "",
    }


def official_identifiers(items: Iterable[dict]) -> list[str] | None:
    """Return the identifiers of all items, or None where one is not as NLVR2 has them or stands twice."""
    identifiers = [item["identifier"] for item in items]
    are_official = all(map(IDENTIFIER.fullmatch, identifiers)) and len(set(identifiers)) == len(identifiers)
    return identifiers if are_official else None


def _label(entry: dict) -> str:
    return str(entry["label"]).capitalize()
