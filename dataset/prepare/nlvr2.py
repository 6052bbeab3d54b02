"""NLVR2: sentences that are true of two images or not.

Needs below --root:
    nlvr2/data/train.json, dev.json, test1.json     one JSON object a line, of github.com/lil-lab/nlvr
    nlvr2/images/train/<directory>/..., nlvr2/dev/..., nlvr2/test1/...      as the archives unpack
    if they are there: nlvr2/data/test2.json with nlvr2/test2/..., and the authors' subsets
    nlvr2/data/balanced/balanced_dev.json, ..._test1.json, nlvr2/data/unbalanced/unbalanced_dev.json, ...
Writes nlvr_train.json, nlvr_dev.json and nlvr_test.json (the public test, test-P), and of the others
nlvr_test2.json (test-U), nlvr_balanced_dev.json and so on, with {"images": [left, right], "sentence",
"label": "True" or "False", "identifier"}; image_root is nlvr2.
"""

import argparse
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
from simla.dataset.readers.tables import checked, read_json_lines
from simla.utils import UserError

SOURCE = "github.com/lil-lab/nlvr (nlvr2/data; the images on request from its authors)"
SPLITS = {  # split -> file, official number of sentences
    "train": ("train", 86_373),
    "dev": ("dev", 6_982),
    "test": ("test1", 6_967),
    "test2": ("test2", 6_970),
    "balanced_dev": ("balanced/balanced_dev", 2_300),
    "balanced_test1": ("balanced/balanced_test1", 2_316),
    "unbalanced_dev": ("unbalanced/unbalanced_dev", 3_562),
    "unbalanced_test1": ("unbalanced/unbalanced_test1", 3_536),
}
NEEDED = ("train", "dev", "test")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_only(parser)
    add_without_images(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    paths = {split: f"nlvr2/data/{file}.json" for split, (file, _) in SPLITS.items()}
    splits = sets_to_make(options, SPLITS, report)
    needed = splits if options.only else NEEDED
    wanted = {f"sentences of {split}": [paths[split]] for split in needed}
    find_all(root, SOURCE + OR_ONLY, wanted, {}, report)
    images = Images(root / "nlvr2", report)
    report.source = "Suhr et al. 2019, table 1 (test is test-P, test2 test-U), and the files of the subsets"
    for split in splits:
        path = root / paths[split]
        if split not in needed and not path.is_file():
            continue
        entries = list(sentences(path))
        report.count(f"sentences, {split}", len(entries), SPLITS[split][1])
        kept = [entry for entry in entries if images.has(*entry["images"])]
        if kept or split in needed:
            report.write(out / f"nlvr_{split}.json", kept)
        else:
            report.notes.append(f"nlvr_{split}.json is not written: not one of the images of {path} is there")


def sentences(path: Path) -> Iterator[dict]:
    """Yield an entry of each line of an official file.

    An image's name is its pair's with -img0 (left) or -img1; the pair's is the identifier without its last
    number, which counts the sentences on the pair. Raises UserError that names a wrong line.
    """
    for where, line in read_json_lines(path):
        identifier = checked(line, "identifier", str, where)
        if identifier.count("-") != 3:
            raise UserError(f"{where}: 'identifier' must be like dev-850-0-0, found {identifier!r}")
        split, pair = identifier.split("-")[0], identifier.rsplit("-", 1)[0]
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
