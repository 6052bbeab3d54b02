"""Referring expressions: image and expression for training, and RefCOCO+'s boxes for evaluation."""

import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataset.annotations import NUMBER, TEXT, Annotations, Mapped, item_of, read_annotations
from dataset.identity import by_path
from dataset.items import EvalItems, finetune_loader, leave_out_unreadable
from dataset.json_list import read_json
from dataset.retrieval import WithIdentities
from dataset.tables import by_id, checked, look_up
from safe_load import allowed_function, todays_name
from utils import UserError

SPLITS = ("val", "testA", "testB")  # of evaluation
REFS_FILE, INSTANCES_FILE = "refcoco+/refs(unc).p", "refcoco+/instances.json"


def read_expressions(files: str | list[str], config: dict, **fields: tuple) -> Annotations:
    """The entries of grounding files, which have `fields` beside image and text."""
    return read_annotations(files, {"image": TEXT, "text": TEXT, **fields}, config["image_root"])


def grounding_loader(config: dict, tokenizer, position_limit: int, seed: int, pin: bool):
    """Training batches as `retrieval_loader`'s; identity is the image file. The whole image is shown, since a
    crop could lose the object.
    """
    entries = read_expressions(config["train_file"], config)
    identified = WithIdentities(_items(entries), by_path(entries))
    return finetune_loader(identified, config, tokenizer, position_limit, seed, pin, crop=False)


def _items(entries: Sequence[dict]) -> Mapped:
    return Mapped(entries, partial(item_of, text="text"))


@dataclass(frozen=True)
class Target:
    """What an expression means. Boxes are [x, y, w, h, ...] in pixels of the image of height x width."""

    ref_id: int
    split: str
    height: int
    width: int
    box: list[float]
    candidates: list[list[float]] | None  # the detector's; None: there is no detector

    @property
    def score_name(self) -> str:
        """val_d, testA_d, testB_d, or with _h where boxes come from the heat map alone."""
        return f"{self.split}_{'h' if self.candidates is None else 'd'}"

    @property
    def guesses(self) -> list[list[float]]:
        """What to choose from without a heat map: the detector's boxes, or else the whole image."""
        return [[0, 0, self.width, self.height]] if self.candidates is None else self.candidates


class GroundingEvalData(EvalItems):
    """Entries {"image", "text", "ref_id"}; targets: the object of each, in order."""

    def __init__(self, config: dict):
        """Raises UserError, naming file and entry, where the files of the config do not fit together."""
        found = read_expressions(config["test_file"], config, ref_id=NUMBER)
        entries = leave_out_unreadable(found, config)
        super().__init__(_items(entries), config["image_res"])
        self.left_out = len(found) - len(entries)
        det_file = Path(config["det_file"]) if config["det_file"] else None
        self.targets = read_targets(entries, Path(config["refcoco_data"]), det_file)


# ---- RefCOCO+ ----


def read_targets(entries: Iterable[dict], refcoco: Path, det_file: Path | None) -> list[Target]:
    """ref_id -> reference -> annotation, image size, split and detector boxes, every step checked."""
    refs_file, instances_file = refcoco / REFS_FILE, refcoco / INSTANCES_FILE
    refs = by_id(read_plain_pickle(refs_file), "ref_id", refs_file)
    instances = read_json(instances_file, dict)
    images = by_id(instances.get("images"), "id", instances_file, " images")
    annotations = by_id(instances.get("annotations"), "id", instances_file, " annotations")
    detections = None if det_file is None else read_json(det_file, dict)
    targets = []
    for entry in entries:
        ref_id = entry["ref_id"]
        ref = look_up(refs, ref_id, f"{entry['where']}: ref_id", refs_file)
        where = f"{refs_file}: ref_id {ref_id}"
        split, image_id = checked(ref, "split", str, where), checked(ref, "image_id", int, where)
        if split not in SPLITS:
            raise UserError(
                f"{entry['where']}: ref_id {ref_id} belongs to split {split!r}, expected "
                f"{' or '.join(SPLITS)}; is this a file of training, or of another data set?"
            )
        image = look_up(images, image_id, f"{where}: image_id", instances_file)
        ann_id = checked(ref, "ann_id", int, where)
        annotation = look_up(annotations, ann_id, f"{where}: ann_id", instances_file)
        candidates = None
        if detections is not None:
            found = look_up(detections, str(image_id), f"{where}: image_id", det_file)
            candidates = _boxes(found, f"{det_file}: image {image_id}")
        (box,) = _boxes([annotation.get("bbox")], f"{instances_file}: annotation {ann_id}")
        where = f"{instances_file}: image {image_id}"
        height, width = (checked(image, side, int, where, least=1) for side in ("height", "width"))
        targets.append(Target(ref_id, split, height, width, box, candidates))
    return targets


def _boxes(boxes: object, where: str) -> list[list[float]]:
    """The boxes as they are, each found to be [x, y, w, h, ...] with an area."""
    if not isinstance(boxes, list):
        raise UserError(f"{where} must have a list of boxes, found {boxes!r}"[:500])
    for number, box in enumerate(boxes):
        if not is_box(box):
            raise UserError(
                f"{where}, box {number} must be [x, y, width, height, ...] with width and height above 0, "
                f"found {box!r}; correct or remove it"[:500]
            )
    return boxes


def is_box(box: object) -> bool:
    """[x, y, w, h, ...] with an area."""
    is_list = isinstance(box, list) and len(box) >= 4
    return is_list and all(map(_is_number, box[:4])) and box[2] > 0 and box[3] > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- pickles of plain values ----


PLAIN_MODULES = ("builtins", "collections", "_codecs", "numpy", "numpy.core.multiarray")


class _PlainUnpickler(pickle.Unpickler):
    """Sets, ordered dicts, bytes and numpy's numbers are named by a pickle; any other name is refused."""

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file, encoding="bytes")  # Python 2's str, of which `_plain` makes text
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        function = allowed_function(module, name)
        if function is None or todays_name(module, name)[0] not in PLAIN_MODULES:
            raise UserError(
                f"{self.path}: its pickle asks for {module}.{name}, but a list of references is made of "
                "plain values; nothing of the file was run. Get the file from a source you trust"
            )
        return function


def read_plain_pickle(path: Path) -> Any:
    """Return the numbers, texts, lists, sets and dicts of a pickle of Python 2 or 3; it runs nothing of it.

    Bytes are text here, as in Python 2, and numpy's numbers are plain ones. Raises UserError when the
    file is missing, damaged or holds anything else.
    """
    try:
        with path.open("rb") as file:
            return _plain(_PlainUnpickler(file, path).load())
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check refcoco_data") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(
            f"{path} is not a complete pickle ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes | bytearray):
        return _decoded(bytes(value))
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(_plain, value))
    return value


@cache  # keys and splits come again and again: one copy of each is kept in memory
def _decoded(text: bytes) -> str:
    """Return the text; it is UTF-8 unless it cannot be, then Latin-1, which has a letter for every byte."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")
