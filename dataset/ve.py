"""An image and a sentence that it entails, contradicts or leaves open (SNLI-VE)."""

from simla.dataset.readers.annotations import TEXT, Mapped, item_of, read_annotations
from simla.utils import UserError

CLASSES = ("contradiction", "neutral", "entailment")  # in the published order: the label's number


def read_ve(files: str | list[str], image_root: str) -> Mapped:
    """Return entries {"image": path without .jpg, "sentence", "label": one of CLASSES} as items with a label
    0 to 2.

    Raises UserError, naming file and entry, for another label.
    """
    fields = {"image": TEXT, "sentence": TEXT, "label": TEXT}
    return Mapped(read_annotations(files, fields, image_root, ".jpg", _check), _item)


def _check(entry: dict, where: str) -> None:
    if entry["label"] not in CLASSES:
        raise UserError(
            f"{where}: unknown label {entry['label']!r}, expected {', '.join(CLASSES)}; correct or remove "
            "the entry"
        )


def _item(entry: dict) -> dict:
    return {**item_of(entry, "sentence"), "label": CLASSES.index(entry["label"])}
