"""Images with several captions each, in splits: read from Karpathy's files, written as retrieval files."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from simla.dataset.prepare.common import Images, Report, captions_in, read_source, write_annotations
from simla.dataset.readers.tables import checked, value_of
from simla.utils import UserError

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # Karpathy's -> ours
SOURCE = 'the split of "Deep Visual-Semantic Alignments ..." (Karpathy, Fei-Fei, CVPR 2015)'
PAGE = (
    "cs.stanford.edu/people/karpathy/deepimagesent: caption_datasets.zip, of "
    '"Deep Visual-Semantic Alignments for Generating Image Descriptions"'
)


class Picture(NamedTuple):
    name: str  # relative to the images' folder
    id: int
    captions: list  # as they are in the file; texts when `present` has looked at them


Splits = dict[str, list[Picture]]


def read_karpathy(path: Path, name_of: Callable[[dict, str], str], id_key: str) -> Splits:
    """The images of train (with restval), val and test; name_of(image, where): its file below the folder.

    UserError for a file that is damaged or of another kind.
    """
    splits: Splits = defaultdict(list)
    for number, image in enumerate(checked(read_source(path), "images", list, str(path))):
        where = f"{path}: image {number}"
        split = checked(image, "split", str, where)
        if split not in SPLITS:
            raise UserError(f"{where}: 'split' must be one of {', '.join(SPLITS)}, found {split!r}")
        sentences = checked(image, "sentences", list, where)
        captions = [value_of(sentence, "raw", f"{where}, sentences") for sentence in sentences]
        number = checked(image, id_key, int, where)
        splits[SPLITS[split]].append(Picture(name_of(image, where), number, captions))
    return splits


def present(splits: Splits, images: Images, report: Report) -> Splits:
    """Without images that are not there and captions that are empty or no text."""
    return {split: list(_present(pictures, images, report)) for split, pictures in splits.items()}


def _present(pictures: Iterable[Picture], images: Images, report: Report) -> Iterable[Picture]:
    for picture in pictures:
        if not images.has(picture.name):
            continue
        captions = [text for cell in picture.captions for text in captions_in(cell, picture.name, report)]
        if captions:
            yield picture._replace(captions=captions)
        else:
            report.leave_out("images without a caption", picture.name)


def count_splits(splits: Splits, official: dict[str, tuple[int, int]], report: Report) -> None:
    """official: split -> its images and captions."""
    for split, (num_images, num_captions) in official.items():
        pictures = splits.get(split, [])
        report.count(f"{split} images", len(pictures), num_images)
        report.count(f"{split} captions", sum(len(p.captions) for p in pictures), num_captions)


def write_retrieval(out: Path, stem: str, splits: Splits, report: Report) -> None:
    """{stem}_train.json, one caption an entry; {stem}_val.json and {stem}_test.json, one image an entry."""
    for split, pictures in splits.items():
        if split == "train":
            entries = (
                {"image": picture.name, "caption": caption, "image_id": picture.id}
                for picture in pictures
                for caption in picture.captions
            )
        else:
            entries = ({"image": picture.name, "caption": picture.captions} for picture in pictures)
        write_annotations(out / f"{stem}_{split}.json", entries, report)
