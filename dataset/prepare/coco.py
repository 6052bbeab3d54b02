"""COCO captions: retrieval files, and the pre-training file of the training images.

Needs below --root (the leading coco/ may be missing):
    coco/dataset_coco.json      Karpathy's split, of caption_datasets.zip; or for --split 2014 or 2017
    coco/annotations/captions_train2014.json, captions_val2014.json     of cocodataset.org
    coco/images/train2014/, val2014/    images of cocodataset.org. Karpathy's split takes train2017/ and
                                        val2017/, too: the same images by other names
Writes coco_train.json, coco_val.json, coco_test.json (configs/Retrieval_coco.yaml; image paths relative to
coco/images, the config's image_root) and coco.json (configs/Pretrain.yaml). Karpathy's "restval" is training;
his test images have COCO's numbers of image and captions, which scores of ECCV Caption and CxC go by.
--split 2014 writes coco2014_train.json, coco2014_val.json and coco2014.json, --split 2017 likewise. Most
images of Karpathy's val and test are in train2017: who pre-trains on it has seen them. The pre-training file
has one entry a caption, of training images alone.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from simla.dataset.prepare.common import (
    OR_ONLY,
    Images,
    Report,
    add_only,
    add_relative,
    add_without_images,
    find,
    find_all,
    prefix,
    read_source,
    sets_to_make,
)
from simla.dataset.prepare.karpathy import PAGE, SOURCE, Picture, Splits, read_karpathy, write_retrieval
from simla.dataset.readers.tables import by_id, checked, look_up, value_of
from simla.utils import UserError

OFFICIAL = {  # --split -> split -> images, captions
    "karpathy": {"train": (113_287, 566_747), "val": (5_000, 25_010), "test": (5_000, 25_010)},
    "2014": {"train": (82_783, 414_113), "val": (40_504, 202_654)},
    "2017": {"train": (118_287, 591_753), "val": (5_000, 25_014)},
}
DOWNLOADS = "cocodataset.org/#download"
IMAGES = "images that are"
FILE_PLACES = ["coco/annotations/{}", "annotations/{}", "{}", "coco/{}"]
IMAGE_PLACES = ["coco/images/{}", "images/{}", "coco/{}", "{}"]
SPLIT_FILES = ["coco/dataset_coco.json", *(place.format("dataset_coco.json") for place in FILE_PLACES[:3])]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=OFFICIAL, default="karpathy", help="default: %(default)s")
    add_only(parser)
    add_relative(parser)
    add_without_images(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    official = OFFICIAL[options.split]
    sets = sets_to_make(options, official, report)
    if options.split == "karpathy":
        stem, images, splits = "coco", *_karpathy(root, sets, report)
    else:
        stem, images, splits = f"coco{options.split}", *_official(root, options.split, sets, report)
    splits = {split: pictures for split, pictures in splits.items() if split in sets}
    splits = write_retrieval(out, stem, splits, images, {split: official[split] for split in sets})
    start = prefix(images.folder, root, options)
    entries = (
        {"image": start + picture.name, "caption": caption}
        for picture in splits.get("train", [])
        for caption in picture.captions
    )
    if "train" in sets:
        report.write(out / f"{stem}.json", entries)
    report.notes.append(f"configs/Retrieval_coco.yaml: image_root: {images.folder}")


def _karpathy(root: Path, sets: list[str], report: Report) -> tuple[Images, Splits]:
    # His val and test images are in val2014, of the names of 2017 most in train2017.
    names = ["train2014", "train2017"] if "train" in sets else ["val2014", "train2017", "val2017"]
    folders = [place.format(name) for name in names for place in IMAGE_PLACES]
    wanted, source = {"dataset_coco.json": SPLIT_FILES}, f"{PAGE}; images: {DOWNLOADS}{OR_ONLY}"
    what = "folder of training images" if "train" in sets else "folder of val2014's images"
    file, folder = find_all(root, source, wanted, {what: folders}, report).values()
    of_val = [place.format(folder.name.replace("train", "val")) for place in IMAGE_PLACES]
    images = Images(_parent([folder, find(root, of_val) or folder]), report, IMAGES)

    def name_of(image: dict, where: str) -> str:
        """Return its name of 2014 or else, if that file is there, of 2017."""
        folder, file = (checked(image, key, str, where) for key in ("filepath", "filename"))
        of_2017 = f"{checked(image, 'cocoid', int, where):012}.jpg"
        names = [f"{folder}/{file}", f"train2017/{of_2017}", f"val2017/{of_2017}"]
        return next((name for name in names if name in images.files), names[0])

    report.source = SOURCE
    return images, read_karpathy(file, name_of, "cocoid", "sentid")


def _official(root: Path, year: str, sets: list[str], report: Report) -> tuple[Images, Splits]:
    names = {split: f"{split}{year}" for split in sets}
    files = [f"captions_{name}.json" for name in names.values()]
    wanted = {file: [place.format(file) for place in FILE_PLACES] for file in files}
    folders = {name: [place.format(name) for place in IMAGE_PLACES] for name in names.values()}
    paths = find_all(root, DOWNLOADS + OR_ONLY, wanted, folders, report)
    splits = {split: _read_captions(paths[f"captions_{name}.json"], name) for split, name in names.items()}
    report.source = f"the caption files of {DOWNLOADS}"
    return Images(_parent([paths[name] for name in folders]), report, IMAGES), splits


def _parent(folders: list[Path]) -> Path:
    """Return the folder that these are in; UserError where those that exist are in two."""
    there = [folder for folder in folders if folder.is_dir()] or folders[:1]
    if len({folder.parent for folder in there}) > 1:
        raise UserError(
            f"{' and '.join(map(str, there))} must be in one folder, the config's image_root; move one of "
            "them, or link it there"
        )
    return there[0].parent


def _read_captions(path: Path, folder: str) -> list[Picture]:
    content = read_source(path)
    images = by_id(checked(content, "images", list, str(path)), "id", path, " images")
    captions = defaultdict(list)
    for number, annotation in enumerate(checked(content, "annotations", list, str(path))):
        where = f"{path} annotation {number}"
        image_id = checked(annotation, "image_id", int, where)
        look_up(images, image_id, f"{where}: image_id", path)
        captions[image_id].append(value_of(annotation, "caption", where))
    return [
        Picture(f"{folder}/{checked(image, 'file_name', str, f'{path} image {id}')}", id, captions[id])
        for id, image in images.items()
    ]
