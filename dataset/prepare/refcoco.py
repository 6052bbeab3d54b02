"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that each mean one object in an image of COCO.

Needs below --root, in the folder refcoco, refcoco+ or refcocog, and with images in coco/images/train2014:
    refs(unc).p           the references; of RefCOCOg refs(umd).p or, where that is missing, refs(google).p,
                          or the one that --division names
    instances.json        the objects and their boxes
    detections.json       if it is there: a detector's boxes as COCO's results format has them,
                          [{"image_id": 1, "bbox": [x, y, w, h], "score": 0.9}, ...]
Writes:
    NAME_train.json       {"image", "text"} of every expression
    NAME_val.json         {"image", "text", "ref_id"} of split val, and except for RefCOCO+ "dataset"
    NAME_test.json        the same of all splits of evaluation, which Grounding.py tells apart by ref_id
    NAME/                 the references and instances.json as they were; cocos.json with the boxes of all
                          objects in the images of evaluation; dets.json with those that the detector found
                          there, [x, y, w, h, score]
With --division google NAME is refcocog_google; the references still go to refcocog/.
"""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from simla.dataset.prepare.captions import is_readable
from simla.dataset.prepare.common import Images, Report, add_without_images, find_all, read_source
from simla.dataset.readers.plain_pickle import read_plain_pickle
from simla.dataset.readers.tables import by_id, checked, is_box, look_up
from simla.utils import UserError, atomic_write, make_output_folder

SOURCE = "github.com/lichengunc/refer (expressions) and cocodataset.org (2014 Train images)"
PAPERS = "Yu et al. 2016 (RefCOCO, RefCOCO+), Mao et al. 2016 (RefCOCOg), Nagaraja et al. 2016 (umd)"
IMAGE_FOLDER = "train2014"  # all images of the three data sets are from it
Boxes = dict[str, list[list[float]]]  # image -> [x, y, w, h] of each object, a detector's with its score


class Edition(NamedTuple):
    """The official numbers of a division of a data set; expressions by split."""

    images: int
    references: int
    expressions: dict[str, int]


UNC = {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095}
UNC_PLUS = {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889}
EDITIONS = {  # name -> file of references -> edition, the preferred one first
    "refcoco": {"refs(unc).p": Edition(19_994, 50_000, UNC)},
    "refcoco+": {"refs(unc).p": Edition(19_992, 49_856, UNC_PLUS)},
    "refcocog": {
        "refs(umd).p": Edition(25_799, 49_822, {"train": 80_512, "val": 4_896, "test": 9_602}),
        "refs(google).p": Edition(25_799, 49_822, {"train": 85_474, "val": 9_536}),
    },
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_without_images(parser)
    parser.add_argument("--division", choices=("umd", "google"), help="of RefCOCOg; see above")


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    from simla.dataset.grounding import PUBLISHED, RELEASES  # here, because torch comes with it

    name, files = options.name, list(EDITIONS[options.name])
    if options.division:
        files = [f"refs({options.division}).p"]
        if files[0] not in EDITIONS[name]:
            raise UserError(f"--division is for refcocog alone; {name} has one division, unc")
    wanted = {
        "references": [f"{name}/{refs}" for refs in files],
        "objects": [f"{name}/instances.json"],
    }
    folders = {"images": [f"coco/images/{IMAGE_FOLDER}"]}
    refs_file, objects_file, image_folder = find_all(root, SOURCE, wanted, folders, report).values()
    edition, stem = EDITIONS[name][refs_file.name], name
    if options.division == "google":
        stem = "refcocog_google"
    data_set = next(key for key, release in RELEASES.items() if release.refs == f"{name}/{refs_file.name}")
    refs = by_id(read_plain_pickle(refs_file), "ref_id", refs_file)
    instances = Instances(objects_file)
    _count(edition, refs, report)

    splits: dict[str, list[dict]] = {split: [] for split in edition.expressions}
    images = Images(image_folder, report)
    for split, entry in expressions(refs, refs_file, instances):
        if data_set != PUBLISHED:
            entry["dataset"] = data_set
        if split not in splits:
            report.leave_out(f"expressions of a split {split!r}", f"ref_id {entry['ref_id']}")
        elif not is_readable(entry["text"]):
            report.leave_out("expressions without a word", f"ref_id {entry['ref_id']}")
        elif images.has(Path(entry["image"]).name):
            splits[split].append(entry)
    train = [{"image": entry["image"], "text": entry["text"]} for entry in splits.pop("train")]
    test = list(chain(*splits.values()))
    for split, entries in {"train": train, "val": splits["val"], "test": test}.items():
        report.write(out / f"{stem}_{split}.json", entries)

    references = make_output_folder(out / name, "--out")
    for file in (refs_file, objects_file):
        copy(file, references / file.name)
    folder = make_output_folder(out / stem, "--out")
    image_ids = sorted({refs[entry["ref_id"]]["image_id"] for entry in test})
    _write_boxes(folder / "cocos.json", instances.boxes_of(image_ids), report)
    detections = root / name / "detections.json"
    if detections.is_file():
        _write_boxes(folder / "dets.json", detected_boxes(detections, image_ids, report), report)
    else:
        report.notes.append(
            f"{folder / 'dets.json'} is not written, as there is no {detections}: get a detector's boxes, or "
            "set det_file: '' to take the box from the heat map"
        )


def _count(edition: Edition, refs: dict[int, dict], report: Report) -> None:
    """Count sentences and references as they come, before anything is left out."""
    num_sentences: Counter[str] = Counter()
    for ref in refs.values():
        num_sentences[ref.get("split")] += len(checked(ref, "sentences", list, f"ref_id {ref['ref_id']}"))
    for split, official in edition.expressions.items():
        report.count(f"expressions, {split}", num_sentences[split], official)
    report.count("references (objects)", len(refs), edition.references)
    report.count("images", len({ref.get("image_id") for ref in refs.values()}), edition.images)
    report.source = PAPERS


# ---- references and objects ----


class Instances:
    """The images and the objects (annotations) of instances.json by id."""

    def __init__(self, file: Path):
        content, self.file = read_source(file), file
        self.images, self.annotations = (
            by_id(checked(content, key, list, str(file)), "id", file, f" {key}")
            for key in ("images", "annotations")
        )

    def boxes_of(self, image_ids: list[int]) -> Boxes:
        """Return the boxes of all objects in these images."""
        boxes = {str(image_id): [] for image_id in image_ids}
        for number, annotation in self.annotations.items():
            where = f"{self.file}: annotation {number}"
            image_id = str(checked(annotation, "image_id", int, where))
            if image_id in boxes:
                boxes[image_id].append(checked(annotation, "bbox", list, where))
        return boxes


def expressions(refs: dict[int, dict], refs_file: Path, instances: Instances) -> Iterator[tuple[str, dict]]:
    """Yield split and {"image", "text", "ref_id"} of every sentence.

    A reference's `file_name` is no file's, as it has the object's number in it: the name is that of its image
    in instances.json.
    """
    for ref_id, ref in refs.items():
        where = f"{refs_file}: ref_id {ref_id}"
        split, image_id = checked(ref, "split", str, where), checked(ref, "image_id", int, where)
        image = look_up(instances.images, image_id, f"{where}: image_id", instances.file)
        look_up(instances.annotations, checked(ref, "ann_id", int, where), f"{where}: ann_id", instances.file)
        name = checked(image, "file_name", str, f"{instances.file}: image {image_id}")
        for sentence in ref["sentences"]:
            text = checked(sentence, "sent", str, f"{where}: sentence")
            yield split, {"image": f"{IMAGE_FOLDER}/{name}", "text": text, "ref_id": ref_id}


# ---- a detector's boxes ----


def detected_boxes(file: Path, image_ids: list[int], report: Report) -> Boxes:
    """Return the boxes in the order of the file; every image of `image_ids` has its list.

    Raises UserError where no detection is in any of them.
    """
    boxes: Boxes = {str(image_id): [] for image_id in image_ids}
    for number, detection in enumerate(read_source(file)):
        where = f"{file}: entry {number}"
        image_id = str(checked(detection, "image_id", int, where))
        box, score = checked(detection, "bbox", list, where), detection.get("score")
        if not isinstance(score, int | float):
            raise UserError(f"{where}: 'score' must be a number, found {score!r}"[:500])
        if image_id not in boxes:
            report.leave_out("detections in images that are not evaluated", f"image {image_id}")
        elif not is_box(box):
            report.leave_out("detections without an area", where)
        else:
            boxes[image_id].append([*box, score])
    num_empty = sum(not of_image for of_image in boxes.values())
    if num_empty == len(boxes):
        raise UserError(f"{file} has no box in any of the {len(boxes)} images; is it of another data set?")
    report.count("detections", sum(map(len, boxes.values())))
    report.count("images without a detection", num_empty)
    return boxes


# ---- files ----


def _write_boxes(path: Path, boxes: Boxes, report: Report) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(boxes).encode())
    report.written.append((path, len(boxes)))


def copy(source: Path, target: Path) -> None:
    """Copy a file, unless the target is the file itself."""
    if target.exists() and target.samefile(source):
        return
    with source.open("rb") as old, atomic_write(target) as new:
        shutil.copyfileobj(old, new)
