"""NLVR2: sentences that are true of two images or not.

Reads, below --root:
    nlvr2/data/train.json, dev.json, test1.json     one JSON object a line, of github.com/lil-lab/nlvr
    nlvr2/images/train/<directory>/...              the images, as the authors' archives unpack
    nlvr2/dev/..., nlvr2/test1/...

Writes, below --out, nlvr_train.json, nlvr_dev.json and nlvr_test.json (the public test, test-P) with
{"images": [left, right], "sentence", "label": "True" or "False", "identifier"}; image_root is nlvr2.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from dataset.prepare.common import Images, Report, find_all, write_annotations
from dataset.tables import checked, read_json_lines
from utils import UserError

SOURCE = "github.com/lil-lab/nlvr (nlvr2/data; the images on request from its authors)"
SPLITS = {"train": ("train", 86_373), "dev": ("dev", 6_982), "test": ("test1", 6_967)}  # file, official


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    wanted = {f"sentences of {file}": [f"nlvr2/data/{file}.json"] for file, _ in SPLITS.values()}
    files = find_all(root, SOURCE, wanted)
    images = Images(root / "nlvr2", report)
    for split, (file, official) in SPLITS.items():
        entries = list(sentences(files[f"sentences of {file}"]))
        report.count(f"sentences, {split}", len(entries), official)
        kept = (entry for entry in entries if all(images.has(image) for image in entry["images"]))
        write_annotations(out / f"nlvr_{split}.json", kept, report)
    report.source("Suhr et al. 2019, table 1; test is test-P")


def sentences(path: Path) -> Iterator[dict]:
    """An image's name is its pair's with -img0 (left) or -img1; the pair's is the identifier without its last
    number, which counts the sentences on the pair.
    """
    for where, line in read_json_lines(path):
        identifier = checked(line, "identifier", str, where)
        split, pair = identifier.split("-")[0], identifier.rsplit("-", 1)[0]
        if identifier.count("-") != 3:
            raise UserError(f"{where}: 'identifier' must be like dev-850-0-0, found {identifier!r}")
        folder = split if split != "train" else f"images/train/{checked(line, 'directory', int, where)}"
        label = checked(line, "label", str, where)
        if label not in ("True", "False"):
            raise UserError(f"{where}: 'label' must be True or False, found {label!r}")
        yield {
            "images": [f"{folder}/{pair}-img{side}.png" for side in (0, 1)],
            "sentence": checked(line, "sentence", str, where),
            "label": label,
            "identifier": identifier,
        }
