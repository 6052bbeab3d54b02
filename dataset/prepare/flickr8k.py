"""Flickr8k: files for pre-training and retrieval.

Needs below --root, in flickr8k/, in Flickr8k_text/ or in --root itself:
    Flickr8k.token.txt          of Flickr8k_text.zip; or captions.txt of the usual copies (image,caption); or
                                dataset_flickr8k.json of caption_datasets.zip
    Flicker8k_Dataset/*.jpg     of Flickr8k_Dataset.zip; or Images/ of the usual copies, or flickr8k_images/
and, for --split
    flickr8k    Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt of
                Flickr8k_text.zip: the authors' split; or, without them, dataset_flickr8k.json
    flickr30k   dataset_flickr30k.json: Karpathy's split of Flickr30k, in which these photos are, too
    entities    flickr30k_entities/train.txt, val.txt, test.txt: the split of Flickr30k Entities, whose test
                photos are those of SNLI-VE's test sentences
    80/10/10    nothing: shares of the photos, drawn by their names and --seed
Writes flickr8k_train.json, flickr8k_val.json, flickr8k_test.json (image paths relative to the images' folder,
the config's image_root) and flickr8k_pretrain.json: of each training photo one entry, whose captions are
drawn from in pre-training. With --split flickr30k or entities the names start with flickr8k_flickr30k or
flickr8k_entities: a model that was trained by one split has seen photos that the others test on.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from simla.dataset.prepare.common import (
    SPLITS,
    Images,
    Report,
    add_relative,
    add_seed,
    add_without_images,
    find,
    find_all,
    prefix,
    split_by_shares,
)
from simla.dataset.prepare.flickr30k import SPLIT_FILES
from simla.dataset.prepare.karpathy import PAGE, Picture, flickr_id, read_images, write_retrieval
from simla.dataset.prepare.table import read_rows
from simla.dataset.readers.tables import checked, read_lines, value_of
from simla.utils import UserError

SOURCE = (
    "github.com/jbrownlee/Datasets, release Flickr8k (Flickr8k_Dataset.zip, Flickr8k_text.zip), or "
    "kaggle.com/datasets/adityajn105/flickr8k (Images/, captions.txt)"
)
ENTITIES = "github.com/BryanPlummer/flickr30k_entities"
PLACES = ["flickr8k/{}", "flickr8k/Flickr8k_text/{}", "Flickr8k_text/{}", "{}"]
FOLDERS = ["Fli*8k_Dataset/Flicker8k_Dataset", "Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images"]
IMAGE_FOLDERS = ["flickr8k_images", *(f"{start}{name}" for start in ("flickr8k/", "") for name in FOLDERS)]
CAPTION_FILES = ["Flickr8k.token.txt", "captions.txt", "dataset_flickr8k.json"]
LISTS = [f"Flickr_8k.{name}Images.txt" for name in ("train", "dev", "test")]
OTHERS = ("flickr30k", "entities")  # that photos of Flickr30k are split by
TOKEN_LINE = re.compile(rb"(.+)#\d+\t(.*)")
OFFICIAL = {"train": (6_000, 30_000), "val": (1_000, 5_000), "test": (1_000, 5_000)}


def add_options(parser: argparse.ArgumentParser) -> None:
    split_help = "flickr8k, flickr30k, entities, or shares such as 80/10/10; default: %(default)s"
    parser.add_argument("--split", default="flickr8k", help=split_help)
    add_seed(parser)
    add_relative(parser)
    add_without_images(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    wanted = {" or ".join(CAPTION_FILES): _places(*CAPTION_FILES)}
    file, folder = find_all(root, SOURCE, wanted, {"images": IMAGE_FOLDERS}, report).values()
    captions = _captions(file, report)
    split_of = _split(root, options, captions, report)
    images = Images(folder, report, "photos that are")
    photos = {name for name in images.files if name.lower().endswith(".jpg")}
    report.source = "Hodosh, Young, Hockenmaier, JAIR 2013, and its files"
    report.count("photos", len(photos), 8_091)
    report.count("photos with captions", len(captions), 8_092)
    report.count("captions", sum(map(len, captions.values())), 40_460)
    for name in sorted(photos - captions.keys()):
        report.leave_out("photos without a caption", name)
    for name in filter(lambda name: name not in captions, split_of):
        report.leave_out("names in the split that have no caption", name)
    for name in filter(lambda name: name not in split_of, captions):
        if report.without_images or images.has(name):
            report.leave_out("photos with captions that the split does not name", name)
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for name, split in split_of.items():
        if name in captions:
            splits[split].append(Picture(name, len(splits[split]), captions[name]))
    stem = f"flickr8k_{options.split}" if options.split in OTHERS else "flickr8k"
    official = OFFICIAL if options.split == "flickr8k" else dict.fromkeys(SPLITS, (None, None))
    splits = write_retrieval(out, stem, splits, images, official)
    start = prefix(folder, root, options)
    entries = ({"image": start + photo.name, "caption": photo.captions} for photo in splits["train"])
    report.write(out / f"{stem}_pretrain.json", entries)
    report.notes.append(f"captions: {file}\nconfigs/small/Retrieval.yaml: image_root: {folder}")


def _places(*names: str) -> list[str]:
    return [place.format(name) for name in names for place in PLACES]


# ---- captions ----


def _captions(file: Path, report: Report) -> dict[str, list]:
    """Return the captions of each photo, as they are in one of the three files."""
    if file.suffix == ".json":
        return {
            checked(image, "filename", str, where): [
                value_of(sentence, "raw", f"{where}, sentences")
                for sentence in checked(image, "sentences", list, where)
            ]
            for where, _, image in read_images(file)
        }
    captions = defaultdict(list)
    rows = _tokens(file, report) if file.name == CAPTION_FILES[0] else read_rows([file], report)
    for name, caption in rows:
        captions[name].append(caption)
    return captions


def _tokens(file: Path, report: Report) -> Iterator[tuple[str, str]]:
    """Yield photo and caption of lines `photo.jpg#0<tab>caption`."""
    for number, line in read_lines(file):
        match = TOKEN_LINE.fullmatch(line)
        try:
            if match:
                yield match[1].decode(), match[2].decode()
            elif line.strip():
                report.leave_out("lines that are not PHOTO#NUMBER, a tab, CAPTION", f"line {number}")
        except UnicodeDecodeError:
            report.leave_out("lines that are not UTF-8", f"line {number}")


# ---- splits ----


def _split(root: Path, options: argparse.Namespace, names: Iterable[str], report: Report) -> dict[str, str]:
    """Return the split of each photo, in the order of the files that say it, or else that of `names`."""
    if options.split == "flickr8k":
        lists, karpathy = (find(root, _places(name)) for name in (LISTS[0], CAPTION_FILES[2]))
        if karpathy and not lists:
            report.notes.append(f"split: {karpathy}")
            return {
                checked(image, "filename", str, where): split for where, split, image in read_images(karpathy)
            }
        source = f"{SOURCE}. Without these lists photos are split by shares of your own: --split 80/10/10"
        first = find_all(root, source, {LISTS[0]: _places(LISTS[0])}, {}, report)[LISTS[0]]
        return _by_lists([first.with_name(name) for name in LISTS])
    if options.split == "flickr30k":
        (file,) = find_all(root, PAGE, {"dataset_flickr30k.json": SPLIT_FILES}, {}, report).values()
        by_number = {str(flickr_id(image, where)): split for where, split, image in read_images(file)}
    elif options.split == "entities":
        wanted = {f"flickr30k_entities/{split}.txt": [f"flickr30k_entities/{split}.txt"] for split in SPLITS}
        by_number = _by_lists(list(find_all(root, ENTITIES, wanted, {}, report).values()))
    else:
        draw = split_by_shares(options.split, options.seed, "flickr8k, flickr30k, entities or ")
        report.notes.append(f"split: {options.split} by --seed {options.seed}, not the authors' one")
        return {name: draw(name) for name in names}
    numbers = {name: name.partition("_")[0] for name in names}  # 1000268201_693b08cb0e.jpg
    return {name: by_number[number] for name, number in numbers.items() if number in by_number}


def _by_lists(files: list[Path]) -> dict[str, str]:
    """Return the split of each name in the lists of train, val and test; UserError where one is in two."""
    split_of: dict[str, str] = {}
    for split, file in zip(SPLITS, files, strict=True):
        for number, line in read_lines(file):
            name = line.decode(errors="replace").strip()
            if name and split_of.setdefault(name, split) != split:
                raise UserError(
                    f"{file}, line {number}: {name} is in the list of {split_of[name]}, too; take it "
                    "out of one of them"
                )
    return split_of
