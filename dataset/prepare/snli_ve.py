"""SNLI-VE: sentences that an image of Flickr30k entails, contradicts or leaves open.

Needs below --root:
    snli_ve/snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl
    flickr30k-images/...                        the images, or those of Flickr8k, which are some of them:
                                                --images flickr8k_images
Writes ve_train.json, ve_dev.json and ve_test.json with {"image": file's name without .jpg, "sentence",
"label": "entailment", "neutral" or "contradiction"}; image_root is flickr30k-images. Lines without a label
("-") are left out.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from simla.dataset.prepare.common import (
    OR_ONLY,
    Images,
    Report,
    add_only,
    add_without_images,
    find_all,
    sets_to_make,
)
from simla.dataset.prepare.flickr30k import IMAGE_FOLDERS, image_folder
from simla.dataset.readers.tables import checked, read_json_lines
from simla.dataset.ve import CLASSES
from simla.utils import UserError

SOURCE = "github.com/necla-ml/SNLI-VE (sentences) and Flickr30k's authors (images)"
SPLITS = {  # official numbers of contradictions, neutral sentences and entailments
    "train": (176_550, 176_045, 176_932),
    "dev": (5_939, 5_960, 5_959),
    "test": (5_964, 5_964, 5_973),
}
# 1000268201_693b08cb0e.jpg of Flickr8k is 1000268201.jpg of Flickr30k.
PHOTO = re.compile(r"(\d+)(?:_[0-9a-f]{10})?\.jpg")
IMAGE_FIELDS = ("Flickr30K_ID", "Flikr30kID")  # the two releases call it differently


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", help="folder of the images below --root; default: flickr30k-images")
    add_only(parser)
    add_without_images(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    wanted = {split: [f"snli_ve/snli_ve_{split}.jsonl"] for split in sets_to_make(options, SPLITS, report)}
    folders = {} if options.images else {"images": IMAGE_FOLDERS}
    files = find_all(root, SOURCE + OR_ONLY, wanted, folders, report)
    folder = root / options.images if options.images else image_folder(files["images"])
    images = Images(folder, report)
    stem_of = {}
    for name in sorted(images.files, reverse=True):  # so that the name of Flickr30k comes last
        if match := PHOTO.fullmatch(name):
            stem_of[match[1]] = name.removesuffix(".jpg")
    report.source = "Xie et al. 2019 and the SNLI-VE repository"
    for split in wanted:
        official = SPLITS[split]
        entries = list(sentences(files[split], report))
        entries = [{**entry, "image": stem_of.get(entry["image"], entry["image"])} for entry in entries]
        labels = Counter(entry["label"] for entry in entries)
        report.count(split, len(entries), sum(official))
        for label, number in zip(CLASSES, official, strict=True):
            report.count(f"{split}, {label}", labels[label], number)
        kept = (entry for entry in entries if images.has(f"{entry['image']}.jpg"))
        report.write(out / f"ve_{split}.json", kept)
    report.notes.append(f"configs/VE.yaml: image_root: {images.folder}")


def sentences(path: Path, report: Report) -> Iterator[dict]:
    """Yield an entry of each line that has a label; raise UserError that names a wrong line."""
    for where, line in read_json_lines(path):
        label, sentence = checked(line, "gold_label", str, where), checked(line, "sentence2", str, where)
        field = next((name for name in IMAGE_FIELDS if name in line), IMAGE_FIELDS[0])
        image = checked(line, field, str, where).removesuffix(".jpg")
        if label == "-":
            report.leave_out("sentences without a label", where)
        elif label not in CLASSES:
            raise UserError(f"{where}: 'gold_label' must be one of {', '.join(CLASSES)}, found {label!r}")
        else:
            yield {"image": image, "sentence": sentence, "label": label}
