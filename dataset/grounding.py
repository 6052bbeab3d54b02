"""Referring expressions: images for training, and for evaluation boxes, those of RefCOCO+ or your own."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from torch.utils.data import DataLoader

from simla.dataset.identity import by_path
from simla.dataset.images import BadImage, image_size
from simla.dataset.items import EvalItems, finetune_loader, leave_out_unreadable
from simla.dataset.readers.annotations import TEXT, Annotations, Mapped, item_of, read_annotations
from simla.dataset.readers.json_list import read_json
from simla.dataset.readers.plain_pickle import read_plain_pickle
from simla.dataset.readers.tables import by_id, checked, is_box, look_up
from simla.dataset.retrieval import WithIdentities
from simla.utils import UserError

FIELDS = {"image": TEXT, "text": TEXT}
SPLITS = ("val", "testA", "testB")  # of evaluation, RefCOCO+'s
OWN_SPLIT = "val"  # of an entry with a box that names none
REFS_FILE, INSTANCES_FILE = "refcoco+/refs(unc).p", "refcoco+/instances.json"


def read_expressions(files: str | list[str], config: dict) -> Annotations:
    """Return the entries of training files."""
    return read_annotations(files, FIELDS, config["image_root"])


def read_located_expressions(files: str | list[str], config: dict) -> Annotations:
    """Return the entries of test files, each with a box or with the ref_id of one."""
    return read_annotations(files, FIELDS, config["image_root"], check=_check_located)


def _check_located(entry: dict, where: str) -> None:
    if entry.get("box") is None:
        if "ref_id" not in entry:
            raise UserError(
                f"{where} has no 'ref_id', as RefCOCO+ has it, and no 'box': [x, y, width, height] in "
                f"pixels, as your own photos need it; found {', '.join(entry)}"
            )
        checked(entry, "ref_id", int, where)
        return
    if not is_box(entry["box"]):
        raise UserError(
            f"{where}: 'box' must be [x, y, width, height] in pixels with width and height above 0, found "
            f"{entry['box']!r}"[:500]
        )
    if entry.get("split") not in (None, *SPLITS, "test"):
        raise UserError(
            f"{where}: 'split' must be {', '.join(SPLITS)} or test, or missing, which means {OWN_SPLIT}; "
            f"found {entry['split']!r}"
        )


def grounding_loader(config: dict, tokenizer, seed: int) -> DataLoader:
    """Return training batches as `retrieval_loader` does; identity is the image file. The whole image is
    shown, since a crop could lose the object.
    """
    entries = read_expressions(config["train_file"], config)
    identified = WithIdentities(_items(entries), by_path(entries))
    return finetune_loader(identified, config, tokenizer, seed, crop=False)


def _items(entries: Sequence[dict]) -> Mapped:
    return Mapped(entries, partial(item_of, text="text"))


@dataclass(frozen=True)
class Target:
    """The object that an expression means; boxes are [x, y, w, h, ...] in pixels of the image."""

    ref_id: int | None
    split: str
    height: int
    width: int
    box: list[float]
    candidates: list[list[float]] | None  # the detector's; None: there is no detector
    where: str  # the entry

    @property
    def score_name(self) -> str:
        """Return val_d, testA_d, testB_d, or with _h where boxes come from the heat map alone."""
        return f"{self.split}_{'h' if self.candidates is None else 'd'}"

    @property
    def guesses(self) -> list[list[float]]:
        """Return what to choose from without a heat map: the detector's boxes, or else the whole image."""
        return [[0, 0, self.width, self.height]] if self.candidates is None else self.candidates


class GroundingEvalData(EvalItems):
    """Entries {"image", "text", "ref_id"}, the box being RefCOCO+'s, or {"image", "text", "box"} and maybe
    "split". targets: the object of each, in order; splits: those there are, with refcoco_data all three of
    RefCOCO+.
    """

    def __init__(self, config: dict):
        """Raises UserError, naming file and entry, where the files of the config do not fit together."""
        in_files = read_located_expressions(config["test_file"], config)
        entries = leave_out_unreadable(in_files, config)
        super().__init__(_items(entries), config["image_res"])
        self.left_out = len(in_files) - len(entries)
        paths = (Path(config[key]) if config[key] else None for key in ("refcoco_data", "det_file"))
        self.targets = read_targets(entries, *paths)
        present = {target.split for target in self.targets} | set(SPLITS if config["refcoco_data"] else ())
        self.splits = [split for split in (*SPLITS, "test") if split in present]


def read_targets(entries: Iterable[dict], refcoco: Path | None, det_file: Path | None) -> list[Target]:
    """Return what each expression means; `refcoco`, the folder of RefCOCO+, is read where one has no box."""
    detections = Detections(det_file) if det_file else None
    references, size_of, targets = None, cache(_size_of), []
    for entry in entries:
        if entry.get("box") is not None:
            targets.append(_own_target(entry, size_of, detections))
            continue
        if references is None:
            if refcoco is None:
                raise UserError(
                    f"{entry['where']} has no 'box': name RefCOCO+'s folder as refcoco_data in the config, "
                    "or give every entry its box"
                )
            references = References(refcoco)
        targets.append(references.target(entry, detections))
    return targets


class Detections:
    """A detector's boxes: {image_id of RefCOCO+, or else the image as the entry names it: [box, ...]}."""

    def __init__(self, file: Path):
        self.file, self.boxes = file, read_json(file, dict)

    def of(self, image: str, where: str) -> list[list[float]]:
        """Return the boxes of the image; where: what names it."""
        boxes = look_up(self.boxes, image, where, self.file)
        return _checked_boxes(boxes, f"{self.file}: image {image}")


def _own_target(entry: dict, size_of: Callable, detections: Detections | None) -> Target:
    """Return the target of an entry with a box."""
    x, y, w, h = box = entry["box"][:4]
    width, height = size_of(entry["images"][0], entry["where"])
    is_inside = min(x, y) >= -1 and x + w <= width + 1 and y + h <= height + 1
    if not is_inside or min(w, h) <= 1:  # corners; shares of the image
        raise UserError(
            f"{entry['where']}: 'box' must be [x, y, width, height] in pixels, more than one wide and high "
            f"and inside the image of {width} x {height}, found {box}"
        )
    candidates = detections.of(entry["image"], f"{entry['where']}: image") if detections else None
    split = entry.get("split") or OWN_SPLIT
    return Target(entry.get("ref_id"), split, height, width, box, candidates, entry["where"])


def _size_of(file: str, where: str) -> tuple[int, int]:
    """Return width and height; UserError where the image cannot be read."""
    try:
        return image_size(file)
    except BadImage as error:
        raise UserError(f"{error}; {where}: with skip_unreadable: true it is left out") from error


class References:
    """RefCOCO+'s files: ref_id -> reference -> annotation, image size and split, every step checked."""

    def __init__(self, folder: Path):
        self.refs_file, self.instances_file = folder / REFS_FILE, folder / INSTANCES_FILE
        self.refs = by_id(read_plain_pickle(self.refs_file), "ref_id", self.refs_file)
        instances = read_json(self.instances_file, dict)
        self.images, self.annotations = (
            by_id(instances.get(name), "id", self.instances_file, f" {name}")
            for name in ("images", "annotations")
        )

    def target(self, entry: dict, detections: Detections | None) -> Target:
        """Return the target of an entry with a ref_id."""
        ref_id = entry["ref_id"]
        ref = look_up(self.refs, ref_id, f"{entry['where']}: ref_id", self.refs_file)
        where = f"{self.refs_file}: ref_id {ref_id}"
        split, image_id = checked(ref, "split", str, where), checked(ref, "image_id", int, where)
        if split not in SPLITS:
            raise UserError(
                f"{entry['where']}: ref_id {ref_id} belongs to split {split!r}, expected "
                f"{' or '.join(SPLITS)}; is this a file of training, or of another data set?"
            )
        image = look_up(self.images, image_id, f"{where}: image_id", self.instances_file)
        ann_id = checked(ref, "ann_id", int, where)
        annotation = look_up(self.annotations, ann_id, f"{where}: ann_id", self.instances_file)
        candidates = detections.of(str(image_id), f"{where}: image_id") if detections else None
        (box,) = _checked_boxes([annotation.get("bbox")], f"{self.instances_file}: annotation {ann_id}")
        where = f"{self.instances_file}: image {image_id}"
        height, width = (checked(image, side, int, where, least=1) for side in ("height", "width"))
        return Target(ref_id, split, height, width, box, candidates, entry["where"])


def _checked_boxes(boxes: object, where: str) -> list[list[float]]:
    """Return the boxes as they are; UserError for one that is not [x, y, w, h, ...] with an area."""
    if not isinstance(boxes, list):
        raise UserError(f"{where} must have a list of boxes, found {boxes!r}"[:500])
    for number, box in enumerate(boxes):
        if not is_box(box):
            raise UserError(
                f"{where}, box {number} must be [x, y, width, height, ...] with width and height above 0, "
                f"found {box!r}; correct or remove it"[:500]
            )
    return boxes
