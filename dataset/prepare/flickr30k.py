"""Flickr30k: Karpathy's split for retrieval.

Needs below --root:
    flickr30k/dataset_flickr30k.json    of caption_datasets.zip
    flickr30k-images/*.jpg              of the Flickr30k page, which asks for a form to be filled in
Writes flickr30k_train.json, flickr30k_val.json and flickr30k_test.json, as configs/Retrieval_flickr.yaml
names them; image paths are relative to the images' folder, the config's image_root.
"""

import argparse
from pathlib import Path

from simla.dataset.prepare.common import Images, Report, add_without_images, find_all
from simla.dataset.prepare.karpathy import PAGE, SOURCE, read_karpathy, write_retrieval
from simla.dataset.readers.tables import checked

SPLIT_FILES = ["flickr30k/dataset_flickr30k.json", "dataset_flickr30k.json"]
FOLDERS = ["flickr30k-images", "flickr30k_images"]
IMAGE_FOLDERS = [*FOLDERS, *(f"flickr30k/{name}" for name in (*FOLDERS, "images", "Images"))]
OFFICIAL = {"train": (29_000, 145_000), "val": (1_014, 5_070), "test": (1_000, 5_000)}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_without_images(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    source = f"{PAGE}; images: shannon.cs.illinois.edu/DenotationGraph, Flickr30k"
    wanted = {"dataset_flickr30k.json": SPLIT_FILES}
    paths = find_all(root, source, wanted, {"images": IMAGE_FOLDERS}, report)
    splits = read_karpathy(
        paths["dataset_flickr30k.json"], lambda image, where: checked(image, "filename", str, where), "imgid"
    )
    report.source = SOURCE
    images = Images(image_folder(paths["images"]), report, "images that are")
    write_retrieval(out, "flickr30k", splits, images, OFFICIAL)
    report.notes.append(f"configs/Retrieval_flickr.yaml: image_root: {images.folder}")


def image_folder(found: Path) -> Path:
    """Return the folder that has the photos in it: in a copy on Kaggle it is within one of the same name."""
    inner = found / found.name
    return inner if inner.is_dir() else found
