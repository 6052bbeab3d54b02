"""Visual Genome's region descriptions: a pre-training file.

Needs below --root (or with the leading visual_genome/ left out):
    visual_genome/region_descriptions.json, image_data.json         of the Visual Genome page, version 1.2
    visual_genome/images/VG_100K/, VG_100K_2/                       its images, both parts
    coco/dataset_coco.json, flickr30k/dataset_flickr30k.json        Karpathy's splits, of caption_datasets.zip
Writes vg.json (configs/Pretrain.yaml): one entry a region, with its phrase as the caption of the whole image.

Left out are images that are evaluated on later: those whose coco_id is in Karpathy's val or test split, and
those whose flickr_id is in Flickr30k's. Without a split's file the conversion stops, unless --allow-leaks
says that it does not matter. A phrase that is blank or no text is left out, and one that its image has
already (but for case and space).
Of the rest, --regions are drawn for each image, the same in every run; 0 takes all, some 50. The published
recipe counts 769 thousand pairs on 100 thousand images, about 8 each, out of 5.4 million regions, and does
not say how they were chosen; the draw is this project's.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from simla.dataset.prepare.common import (
    Images,
    Report,
    add_relative,
    captions_in,
    find,
    find_all,
    prefix,
    read_source,
    write_annotations,
)
from simla.dataset.prepare.karpathy import PAGE, SPLITS
from simla.dataset.readers.json_list import JsonList
from simla.dataset.readers.tables import by_id, checked, value_of
from simla.utils import UserError

SITE = "visualgenome.org (region descriptions and image meta data 1.2, images part 1 and 2)"
NUM_IMAGES = 108_077
EVALUATED = {  # split file -> where it may lie
    "dataset_coco.json": ["coco/dataset_coco.json", "dataset_coco.json"],
    "dataset_flickr30k.json": ["flickr30k/dataset_flickr30k.json", "dataset_flickr30k.json"],
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--regions", type=int, default=8, help="of an image, 0 = all; default: %(default)s")
    parser.add_argument(
        "--allow-leaks", action="store_true", help="go on where a split of images to be left out is missing"
    )
    add_relative(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    if options.regions < 0:
        raise UserError(f"--regions {options.regions}: 0 takes all, a number above 0 so many of each image")
    files = ("region_descriptions.json", "image_data.json")
    found = find_all(root, SITE, {file: [f"visual_genome/{file}", file] for file in files})
    folders = find_all(root, SITE, {"images": ["visual_genome/images", "visual_genome", "images"]})
    images = Images(folders["images"], report, "regions whose image is")
    about = by_id(read_source(found["image_data.json"]), "image_id", found["image_data.json"])
    held_out = {name: _held_out(root, name, options.allow_leaks, report) for name in EVALUATED}
    report.count("images described", len(about), NUM_IMAGES)
    report.source("visualgenome.org")

    regions = _Regions(found["region_descriptions.json"], about, held_out, options.regions, report)
    start = prefix(images.folder, root, options)
    number = write_annotations(out / "vg.json", regions.entries(images, start), report)
    report.count("images with regions", regions.num_images)
    report.count("pairs", number)


def _held_out(root: Path, name: str, allow_leaks: bool, report: Report) -> set[int]:
    """Ids (of COCO or Flickr) of the images of val and test."""
    path = find(root, EVALUATED[name])
    if path is None:
        if not allow_leaks:
            raise UserError(
                f"missing in --root {root}: {name} (looked for {' and '.join(EVALUATED[name])}), by which "
                f"images that are evaluated on are left out. To be had from {PAGE}; --allow-leaks goes on "
                "without"
            )
        report.note(f"vg.json may hold images of {name}'s val and test splits")
        return set()
    key = "cocoid" if name == "dataset_coco.json" else "filename"
    ids = set()
    for number, image in enumerate(checked(read_source(path), "images", list, str(path))):
        where = f"{path}: image {number}"
        if SPLITS.get(checked(image, "split", str, where)) in ("val", "test"):
            value = checked(image, key, int if key == "cocoid" else str, where)
            ids.add(value if key == "cocoid" else _flickr_id(value, where))
    return ids


def _flickr_id(name: str, where: str) -> int:
    number = PurePosixPath(name).stem
    if not number.isdecimal():
        raise UserError(f"{where}: 'filename' must be Flickr's number and .jpg, found {name!r}"[:500])
    return int(number)


def image_name(about: dict, where: str) -> str:
    """VG_100K/1.jpg or VG_100K_2/1.jpg, as at the end of the URL in image_data.json."""
    return "/".join(checked(about, "url", str, where).split("/")[-2:])


class _Regions:
    """The regions of all images; the file, of some 700 MB, is read image by image."""

    def __init__(
        self,
        path: Path,
        about: dict[int, dict],
        held_out: dict[str, set[int]],
        num_regions: int,
        report: Report,
    ):
        self.path, self.about, self.held_out, self.report = path, about, held_out, report
        self.num_regions, self.num_images = num_regions, 0

    def entries(self, images: Images, start: str) -> Iterator[dict]:
        """Pre-training entries; `start` precedes the images' names, as of `prefix`."""
        for entry in JsonList(self.path, _check, f"{__name__}._check"):
            regions = entry["regions"]
            image_id = number_of_image(entry, str(self.path))
            about = self.about.get(image_id)
            if about is None:
                self.report.leave_out(
                    "regions of images that image_data.json lacks", str(image_id), len(regions)
                )
                continue
            name = image_name(about, f"image_data.json: image_id {image_id}")
            if self._is_held_out(about, name, len(regions)) or not images.has(name, len(regions)):
                continue
            phrases = self._chosen([region["phrase"] for region in regions], image_id, name)
            self.num_images += bool(phrases)
            yield from ({"image": start + name, "caption": phrase} for phrase in phrases)

    def _is_held_out(self, about: dict, name: str, number: int) -> bool:
        for file, key in (("dataset_coco.json", "coco_id"), ("dataset_flickr30k.json", "flickr_id")):
            value = about.get(key)
            if value is not None and int(value) in self.held_out[file]:
                self.report.leave_out(f"regions of images of val and test in {file}", name, number)
                return True
        return False

    def _chosen(self, phrases: list[object], image_id: int, name: str) -> list[str]:
        """Return the phrases of this image to write, all text, none twice, at most --regions of them."""
        worded = [text for phrase in phrases for text in captions_in(phrase, name, self.report)]
        first: dict[str, str] = {}
        for phrase in worded:
            first.setdefault(" ".join(phrase.lower().split()), phrase)
        different = list(first.values())
        if len(different) < len(worded):
            self.report.leave_out("repeated phrases", name, len(worded) - len(different))
        if not self.num_regions or len(different) <= self.num_regions:
            return different
        self.report.leave_out("regions beyond --regions", name, len(different) - self.num_regions)
        chosen = random.Random(image_id).sample(range(len(different)), self.num_regions)
        return [different[place] for place in sorted(chosen)]


def number_of_image(entry: object, where: str) -> int:
    """Return the image that regions or questions are of: `id` in release 1.2, `image_id` in others."""
    key = "image_id" if isinstance(entry, dict) and "id" not in entry and "image_id" in entry else "id"
    return checked(entry, key, int, where)


def _check(entry: object, where: str) -> None:
    number_of_image(entry, where)
    for region in checked(entry, "regions", list, where):
        value_of(region, "phrase", f"{where}, regions")
