"""Referring expressions: images for training, and for evaluation boxes, the RefCOCO family's or your own."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import DataLoader

from simla.dataset.identity import by_path
from simla.dataset.images import BadImage, image_size
from simla.dataset.items import EvalItems, finetune_loader, leave_out_unreadable
from simla.dataset.readers.annotations import TEXT, Annotations, Mapped, item_of, read_annotations
from simla.dataset.readers.json_list import read_json
from simla.dataset.readers.plain_pickle import read_plain_pickle
from simla.dataset.readers.tables import MAX_MISPLACED, by_id, checked, is_box, is_placed, look_up
from simla.dataset.retrieval import WithIdentities
from simla.utils import UserError, log

FIELDS = {"image": TEXT, "text": TEXT}
SPLITS = ("val", "testA", "testB", "test")  # of evaluation
OWN_SPLIT = "val"  # of an entry with a box that names none


class Release(NamedTuple):
    """A division of a data set of the RefCOCO family: its references, below refcoco_data, and its splits."""

    refs: str
    splits: tuple[str, ...]


RELEASES = {  # by the "dataset" of an entry
    "refcoco+": Release("refcoco+/refs(unc).p", ("val", "testA", "testB")),
    "refcoco": Release("refcoco/refs(unc).p", ("val", "testA", "testB")),
    "refcocog": Release("refcocog/refs(umd).p", ("val", "test")),
    "refcocog_google": Release("refcocog/refs(google).p", ("val",)),
}
COCO_NUMBER = re.compile(r"(\d{12})\.\w+$")  # of an image, in the name of its file
OWN = "own"  # what boxes in entries are called beside RefCOCO+'s
PUBLISHED = "refcoco+"  # of an entry that names none; the names of its scores have no prefix


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
        if entry.get("dataset") not in (None, *RELEASES):
            raise UserError(
                f"{where}: 'dataset' must be {', '.join(RELEASES)}, or missing, which means {PUBLISHED}; "
                f"found {entry['dataset']!r}"[:500]
            )
        return
    if not is_box(entry["box"]):
        raise UserError(
            f"{where}: 'box' must be [x, y, width, height] in pixels with width and height above 0, found "
            f"{entry['box']!r}"[:500]
        )
    if entry.get("split") not in (None, *SPLITS):
        names = f"{', '.join(SPLITS[:-1])} or {SPLITS[-1]}"
        raise UserError(
            f"{where}: 'split' must be {names}, or missing, which means {OWN_SPLIT}; found {entry['split']!r}"
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
    data_set: str = ""  # of the RefCOCO family; "" for a box in the entry

    @property
    def split_name(self) -> str:
        """Return the split, after the name of the data set except for RefCOCO+ and boxes in entries."""
        return split_name(self.data_set, self.split)

    @property
    def score_name(self) -> str:
        """Return val_d, refcocog_test_d, ..., or with _h where boxes come from the heat map alone."""
        return f"{self.split_name}_{'h' if self.candidates is None else 'd'}"


def split_name(data_set: str, split: str) -> str:
    return split if data_set in ("", PUBLISHED) else f"{data_set}_{split}"


class GroundingEvalData(EvalItems):
    """Entries {"image", "text", "ref_id"} and maybe "dataset", the box being that data set's, or {"image",
    "text", "box"} and maybe "split". targets: the object of each, in order; splits: the names of those there
    are, of each data set of the RefCOCO family that occurs all.
    """

    def __init__(self, config: dict):
        """Raises UserError, naming file and entry, where the files of the config do not fit together."""
        in_files = read_located_expressions(config["test_file"], config)
        entries = leave_out_unreadable(in_files, config)
        super().__init__(_items(entries), config["image_res"])
        self.left_out = len(in_files) - len(entries)
        paths = (Path(config[key]) if config[key] else None for key in ("refcoco_data", "det_file"))
        self.targets = own_ones_apart(read_targets(entries, *paths))
        check_candidates(self.targets, config["det_file"])
        check_frames(entries, self.targets)
        names: dict[str, None] = {}
        for data_set in dict.fromkeys(target.data_set for target in self.targets):
            present = {target.split for target in self.targets if target.data_set == data_set}
            is_release = data_set in RELEASES
            splits = RELEASES[data_set].splits if is_release else filter(present.__contains__, SPLITS)
            names |= dict.fromkeys(split_name(data_set, split) for split in splits)
        self.splits = list(names)


def read_targets(entries: Iterable[dict], refcoco: Path | None, det_file: Path | None) -> list[Target]:
    """Return what each expression means; `refcoco`, the folder of the RefCOCO family, is read where one has
    no box.
    """
    detections = Detections(det_file) if det_file else None
    references: dict[str, References] = {}
    size_of, targets = cache(_size_of), []
    for entry in entries:
        if entry.get("box") is not None:
            targets.append(_own_target(entry, size_of, detections))
            continue
        name = entry.get("dataset") or PUBLISHED
        if name not in references:
            if refcoco is None:
                raise UserError(
                    f"{entry['where']} has no 'box': name RefCOCO+'s folder as refcoco_data in the config, "
                    "or give every entry its box"
                )
            references[name] = References(refcoco, name)
        targets.append(references[name].target(entry, detections))
    return targets


def own_ones_apart(targets: list[Target]) -> list[Target]:
    """Return the targets, those with a box in the entry as of the data set OWN where RefCOCO+'s, whose scores
    have no prefix either, stand beside them.
    """
    if not {"", PUBLISHED} <= {target.data_set for target in targets}:
        return targets
    return [replace(target, data_set=target.data_set or OWN) for target in targets]


def check_candidates(targets: list[Target], det_file: str) -> None:
    """Raise UserError where too many of a detector's boxes leave their image, as corners do that are read as
    [x, y, width, height], or are no larger than a pixel, as shares of the image are.
    """
    boxes = [(target, box[:4]) for target in targets for box in target.candidates or ()]
    wrong = [(target, box) for target, box in boxes if not is_placed(box, target.width, target.height)]
    if len(wrong) > MAX_MISPLACED * len(boxes):
        target, box = wrong[0]
        raise UserError(
            f"det_file {det_file}: {len(wrong)} of {len(boxes)} boxes are not inside their image, such as "
            f"{box} in one of {target.width} x {target.height} ({target.where}); boxes must be [x, y, width, "
            "height] in pixels, not corners or shares of the image"
        )


def check_frames(entries: Iterable[dict], targets: Iterable[Target]) -> None:
    """Raise UserError for a photo that lies on its side beside the one in which the RefCOCO family measured
    its box, and warn of those of another shape. Photos that cannot be read are passed over.
    """
    of_release = {
        entry["images"][0]: target
        for entry, target in zip(entries, targets, strict=True)
        if target.data_set in RELEASES
    }
    others = []
    for file, target in of_release.items():
        try:
            width, height = image_size(file)
        except BadImage:
            continue
        if _has_shape(width, height, target.width, target.height):
            continue
        if _has_shape(width, height, target.height, target.width):
            raise UserError(
                f"{target.where}: {file} is {width} x {height} as it is shown, and its box was measured in "
                f"one of {target.width} x {target.height}: it was turned; take COCO's own file"
            )
        others.append(f"{file} ({width} x {height}, not {target.width} x {target.height})")
    if others:
        log.warning(
            f"{len(others)} of {len(of_release)} photos have another shape than those in which their boxes "
            f"were measured; if parts were cut off, their scores are wrong; the first: {others[0]}"
        )


def _has_shape(width: int, height: int, other_width: int, other_height: int) -> bool:
    """Return whether a picture may be one of the other size made larger or smaller, but for rounding."""
    sides = width, height, other_width, other_height
    return abs(width * other_height - height * other_width) <= max(sides)


class Detections:
    """A detector's boxes: {COCO's image_id, or else the image as the entry names it: [box, ...]}."""

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
    """The files of one of the RefCOCO family: ref_id -> reference -> annotation, image size and split, every
    step checked.
    """

    def __init__(self, folder: Path, data_set: str):
        self.data_set, (refs, self.splits) = data_set, RELEASES[data_set]
        self.refs_file = folder / refs
        self.instances_file = self.refs_file.with_name("instances.json")
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
        if split not in self.splits:
            raise UserError(
                f"{entry['where']}: ref_id {ref_id} belongs to split {split!r}, expected "
                f"{' or '.join(self.splits)}; is this a file of training, or of another data set?"
            )
        number = COCO_NUMBER.search(entry["image"])
        if number and int(number[1]) != image_id:
            raise UserError(
                f"{entry['where']}: ref_id {ref_id} of {self.data_set} is in image {image_id}, not in "
                f"{entry['image']}; entries of another data set name it ('dataset'), as those of python -m "
                "simla.dataset.prepare do"
            )
        image = look_up(self.images, image_id, f"{where}: image_id", self.instances_file)
        ann_id = checked(ref, "ann_id", int, where)
        annotation = look_up(self.annotations, ann_id, f"{where}: ann_id", self.instances_file)
        candidates = detections.of(str(image_id), f"{where}: image_id") if detections else None
        (box,) = _checked_boxes([annotation.get("bbox")], f"{self.instances_file}: annotation {ann_id}")
        where = f"{self.instances_file}: image {image_id}"
        height, width = (checked(image, side, int, where, least=1) for side in ("height", "width"))
        return Target(ref_id, split, height, width, box, candidates, entry["where"], self.data_set)


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
