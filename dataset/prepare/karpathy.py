"""Images with several captions each, in splits: read from Karpathy's files, written as retrieval files."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from simla.dataset.prepare.captions import captions_in
from simla.dataset.prepare.common import Images, read_source
from simla.dataset.readers.tables import checked, value_of
from simla.utils import UserError

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # Karpathy's -> ours
SOURCE = 'the split of "Deep Visual-Semantic Alignments ..." (Karpathy, Fei-Fei, CVPR 2015)'
PAGE = (
    "cs.stanford.edu/people/karpathy/deepimagesent: caption_datasets.zip, of "
    '"Deep Visual-Semantic Alignments for Generating Image Descriptions"'
)


class Picture(NamedTuple):
    """An image with its captions: cells as they are in the file, or texts when they have been checked."""

    name: str  # relative to the images' folder
    id: int
    captions: list
    caption_ids: Sequence[int] = ()  # of the captions of a test image of COCO


Splits = dict[str, list[Picture]]


def read_images(path: Path) -> Iterator[tuple[str, str, dict]]:
    """Yield of each image in Karpathy's file where it stands, its split (train, val, test) and its object.

    Raises UserError for a file that is damaged or of another kind.
    """
    for number, image in enumerate(checked(read_source(path), "images", list, str(path))):
        where = f"{path}: image {number}"
        split = checked(image, "split", str, where)
        if split not in SPLITS:
            raise UserError(f"{where}: 'split' must be one of {', '.join(SPLITS)}, found {split!r}")
        yield where, SPLITS[split], image


def flickr_id(image: dict, where: str) -> int:
    """Return Flickr's number of an image in dataset_flickr30k.json; UserError where it has none."""
    name = checked(image, "filename", str, where)
    number = PurePosixPath(name).stem
    if not number.isdecimal():
        raise UserError(f"{where}: 'filename' must be Flickr's number and .jpg, found {name!r}"[:500])
    return int(number)


def read_karpathy(
    path: Path, name_of: Callable[[dict, str], str], id_key: str, caption_key: str = ""
) -> Splits:
    """Return the images by split; name_of(image, where) is the file of one below the images' folder. Numbers
    of captions, under caption_key, are kept of test images that have one for each caption.
    """
    splits: Splits = defaultdict(list)
    for where, split, image in read_images(path):
        sentences = checked(image, "sentences", list, where)
        captions = [value_of(sentence, "raw", f"{where}, sentences") for sentence in sentences]
        picture = Picture(name_of(image, where), checked(image, id_key, int, where), captions)
        if caption_key and split == "test":
            numbers = [sentence.get(caption_key) for sentence in sentences]
            if all(type(number) is int for number in numbers):
                picture = picture._replace(caption_ids=numbers)
        splits[split].append(picture)
    return splits


def write_retrieval(
    out: Path,
    stem: str,
    splits: Splits,
    images: Images,
    official: dict[str, tuple[int | None, int | None]],
) -> Splits:
    """Write {stem}_train.json, a caption an entry, {stem}_val.json and {stem}_test.json, an image an entry.

    Returns the splits without images that are missing and captions that are none. official: split -> number
    of its images and captions, where known.
    """
    splits = {split: list(_present(pictures, images)) for split, pictures in splits.items()}
    for split, (num_images, num_captions) in official.items():
        pictures = splits.get(split, [])
        images.report.count(f"{split} images", len(pictures), num_images)
        images.report.count(f"{split} captions", sum(len(p.captions) for p in pictures), num_captions)
    for split, pictures in splits.items():
        if split == "train":
            entries = (
                {"image": picture.name, "caption": caption, "image_id": picture.id}
                for picture in pictures
                for caption in picture.captions
            )
        else:
            entries = map(_captioned, pictures)
        images.report.write(out / f"{stem}_{split}.json", entries)
    return splits


def _captioned(picture: Picture) -> dict:
    entry = {"image": picture.name, "caption": picture.captions}
    ids = {"image_id": picture.id, "caption_ids": picture.caption_ids}
    return {**entry, **ids} if picture.caption_ids else entry


def _present(pictures: list[Picture], images: Images) -> Iterator[Picture]:
    for picture in filter(lambda picture: images.has(picture.name), pictures):
        cells = [list(captions_in(cell, picture.name, images.report)) for cell in picture.captions]
        if captions := list(chain.from_iterable(cells)):
            of_cells = zip(picture.caption_ids, cells, strict=False)  # none, or one a cell
            caption_ids = [number for number, texts in of_cells for _ in texts]
            yield picture._replace(captions=captions, caption_ids=caption_ids)
        else:
            images.report.leave_out("images without a caption", picture.name)
