"""An image and a sentence that it entails, contradicts or leaves open (SNLI-VE)."""

from dataset.annotations import TEXT, read_annotations
from utils import UserError

CLASSES = ("contradiction", "neutral", "entailment")  # in the published order: the label's number


def read_ve(files: str | list[str], image_root: str) -> list[dict]:
    """Entries {"image": path without .jpg, "sentence", "label": one of CLASSES} as items with a label 0 to 2.

    Raises UserError, naming file and entry, for another label.
    """
    fields = {"image": TEXT, "sentence": TEXT, "label": TEXT}
    items = []
    for entry in read_annotations(files, fields, image_root, suffix=".jpg"):
        if entry["label"] not in CLASSES:
            raise UserError(
                f"{entry['where']}: unknown label {entry['label']!r}, expected {', '.join(CLASSES)}; correct "
                "or remove the entry"
            )
        items.append(
            {
                "images": entry["images"],
                "text": entry["sentence"],
                "label": CLASSES.index(entry["label"]),
                "where": entry["where"],
            }
        )
    return items
