"""Two images and a sentence that is true of them or not (NLVR2)."""

from dataset.annotations import ANY, TEXT, read_annotations
from utils import UserError

CLASSES = ("False", "True")  # the label's number


def read_nlvr(files: str | list[str], image_root: str) -> list[dict]:
    """Entries {"images": [path, path], "sentence", "label": "True" or "False" in any case, or a JSON boolean}
    as items with a label 0 or 1.

    Raises UserError, naming file and entry, for another label or number of images.
    """
    fields = {"images": (list,), "sentence": TEXT, "label": ANY}
    items = []
    for entry in read_annotations(files, fields, image_root):
        label = str(entry["label"]).capitalize()
        if not isinstance(entry["label"], str | bool) or label not in CLASSES:
            raise UserError(
                f"{entry['where']}: 'label' must be True or False, found {entry['label']!r}"[:500]
            )
        if len(entry["images"]) != 2:
            raise UserError(f"{entry['where']}: 'images' must be two paths, found {len(entry['images'])}")
        item = {"images": entry["images"], "text": entry["sentence"], "where": entry["where"]}
        items.append({**item, "label": CLASSES.index(label)})
    return items
