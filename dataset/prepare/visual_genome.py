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
from pathlib import Path

from simla.dataset.prepare.captions import captions_in
from simla.dataset.prepare.common import (
    Images,
    Report,
    add_relative,
    add_without_images,
    find,
    find_all,
    prefix,
    read_source,
)
from simla.dataset.prepare.karpathy import PAGE, flickr_id, read_images
from simla.dataset.readers.json_list import JsonList
from simla.dataset.readers.tables import by_id, checked, value_of
from simla.utils import UserError

SITE = "visualgenome.org (region descriptions and image meta data 1.2, images part 1 and 2)"
NUM_IMAGES = 108_077
EVALUATED = {  # split file -> where it may lie, key of the image in image_data.json
    "dataset_coco.json": (["coco/dataset_coco.json", "dataset_coco.json"], "coco_id"),
    "dataset_flickr30k.json": (["flickr30k/dataset_flickr30k.json", "dataset_flickr30k.json"], "flickr_id"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--regions", type=int, default=8, help="of an image, 0 = all; default: %(default)s")
    parser.add_argument(
        "--allow-leaks", action="store_true", help="go on where a split of images to be left out is missing"
    )
    add_relative(parser)
    add_without_images(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    if options.regions < 0:
        raise UserError(f"--regions {options.regions}: 0 takes all, a number above 0 so many of each image")
    wanted = {
        file: [f"visual_genome/{file}", file] for file in ("region_descriptions.json", "image_data.json")
    }
    places = ("visual_genome/images/", "visual_genome/", "images/")
    folders = {"images": [f"{place}VG_100K*" for place in places]}
    regions, about_file, folder = find_all(root, SITE, wanted, folders, report).values()
    images = Images(folder.parent, report, "regions whose image is")
    about = by_id(read_source(about_file), "image_id", about_file)
    held_out = {name: _held_out(root, name, options.allow_leaks, report) for name in EVALUATED}
    report.count("images described", len(about), NUM_IMAGES)
    report.source = "visualgenome.org"
    groups = JsonList(regions, _check, f"{__name__}._check")  # some 700 MB, read image by image
    phrases = _phrases(groups, about, held_out, images, options.regions)
    start = prefix(images.folder, root, options)
    entries = ({"image": start + name, "caption": phrase} for name, phrase in phrases)
    report.count("pairs", report.write(out / "vg.json", entries))


def _held_out(root: Path, name: str, allow_leaks: bool, report: Report) -> set[int]:
    """Return the ids (of COCO or Flickr) of the images of val and test."""
    places, key = EVALUATED[name]
    path = find(root, places)
    if path is None and not allow_leaks:
        raise UserError(
            f"missing in --root {root}: {name} (looked for {' and '.join(places)}), by which images that are "
            f"evaluated on are left out. To be had from {PAGE}; --allow-leaks goes on without"
        )
    if path is None:
        report.notes.append(f"vg.json may hold images of {name}'s val and test splits")
        return set()
    id_of = flickr_id if key == "flickr_id" else lambda image, where: checked(image, "cocoid", int, where)
    return {id_of(image, where) for where, split, image in read_images(path) if split != "train"}


def _phrases(
    groups: JsonList, about: dict[int, dict], held_out: dict[str, set[int]], images: Images, num_regions: int
) -> Iterator[tuple[str, str]]:
    """Yield image name and phrase of the regions to write, at most `num_regions` of an image where not 0."""
    report = images.report
    for group in groups:
        image_id, regions = number_of_image(group, str(groups.path)), group["regions"]
        if image_id not in about:
            report.leave_out("regions of images that image_data.json lacks", str(image_id), len(regions))
            continue
        where = f"image_data.json: image_id {image_id}"
        name = image_name(about[image_id], where)
        ids = {file: id_elsewhere(about[image_id], key, where) for file, (_, key) in EVALUATED.items()}
        if leaks := [file for file, id in ids.items() if id in held_out[file]]:
            report.leave_out(f"regions of images of val and test in {leaks[0]}", name, len(regions))
            continue
        if not images.has(name, number=len(regions)):
            continue
        texts = [text for region in regions for text in captions_in(region["phrase"], name, report)]
        different: dict[str, str] = {}
        for text in texts:
            different.setdefault(" ".join(text.lower().split()), text)
        phrases = list(different.values())
        if len(phrases) < len(texts):
            report.leave_out("repeated phrases", name, len(texts) - len(phrases))
        if num_regions and len(phrases) > num_regions:
            report.leave_out("regions beyond --regions", name, len(phrases) - num_regions)
            drawn = random.Random(image_id).sample(range(len(phrases)), num_regions)
            phrases = [phrases[index] for index in sorted(drawn)]
        report.count("images with regions", bool(phrases))
        yield from ((name, phrase) for phrase in phrases)


def image_name(about: dict, where: str) -> str:
    """Return VG_100K/1.jpg or VG_100K_2/1.jpg, as at the end of the URL in image_data.json."""
    return "/".join(checked(about, "url", str, where).split("/")[-2:])


def id_elsewhere(about: dict, key: str, where: str) -> int | None:
    """Return the image's id in COCO (key coco_id) or Flickr, None where it has none."""
    value = about.get(key)
    try:
        return None if value is None or value != value else int(value)  # a table's null is not a number
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {key!r} must be a whole number or null, found {value!r}"[:500]) from error


def number_of_image(entry: object, where: str) -> int:
    """Return the image that regions or questions are of: `id` in release 1.2, `image_id` in others."""
    key = "image_id" if isinstance(entry, dict) and "id" not in entry and "image_id" in entry else "id"
    return checked(entry, key, int, where)


def _check(entry: object, where: str) -> None:
    number_of_image(entry, where)
    for region in checked(entry, "regions", list, where):
        value_of(region, "phrase", f"{where}, regions")
