"""Lists of image URLs with captions (Conceptual Captions 3M and 12M, SBU Captions): pre-training files.

Needs below --root the list, and the images that you have downloaded by it:
    cc3m/Train_GCC-training.tsv, with images in cc3m/train/
    cc3m/Validation_GCC-1.1.0-Validation.tsv, with images in cc3m/val/
    cc12m/cc12m.tsv, with images in cc12m/images/
    sbu/sbu-captions-all.json, or SBU_captioned_photo_dataset_urls.txt and _captions.txt, with sbu/images/
or, without the list, what img2dataset made of it in layout "files" or "parquet": cc3m/train/00000/ and so on.
Writes cc3m_train.json and cc3m_val.json (of which one may be missing), cc12m.json, sbu.json, as
configs/Pretrain.yaml names them.

Which image belongs to a line is told by its name: by default whichever of {row}_{crc32}, {crc32} and {md5},
with or without .jpg, fits the first lines best ({file}, too, for SBU, whose Flickr names are unique).
--image-names gives another one: {row} is the number of the line from 0 (a header is not counted), {row1} from
1, {crc32} and {md5} are those of the URL, {file} is the last part of its path; {row:09}.jpg is a number of
nine digits. A name made of the number alone is never guessed: counted from the wrong end, each image would
get its neighbour's caption. With --without_images and no image at hand they are named {row}_{crc32}.
"""

import argparse
import re
import zlib
from collections.abc import Callable, Iterator
from hashlib import md5
from itertools import chain, islice
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from simla.dataset.prepare.captions import pairs
from simla.dataset.prepare.common import (
    Images,
    Report,
    add_relative,
    add_without_images,
    find,
    prefix,
    read_source,
)
from simla.dataset.prepare.img2dataset import AlreadyShards, is_output, write_output
from simla.dataset.readers.tables import checked, read_lines
from simla.utils import UserError

NAMINGS = ["{row}_{crc32}", "{crc32}", "{md5}"]  # each with .jpg, too


def _utf_8(url: str) -> bytes:
    return url.encode("utf-8", "replace")  # JSON may hold half of a surrogate pair


FIELDS: dict[str, Callable[[int, str], int | str]] = {  # of the number of a line and its URL
    "row": lambda row, _: row,
    "row1": lambda row, _: row + 1,
    "crc32": lambda _, url: zlib.crc32(_utf_8(url)),
    "md5": lambda _, url: md5(_utf_8(url), usedforsecurity=False).hexdigest(),
    "file": lambda _, url: re.split("[?#]", url, maxsplit=1)[0].rpartition("/")[2],
}
NUM_TRIED = 10_000  # lines, to find out how images are named


class UrlList(NamedTuple):
    """A list, and where the images are that were downloaded by it; patterns relative to --root."""

    stem: str  # of the file written
    lists: list[str]
    images: list[str]
    num_lines: int  # official
    namings: list[str] = NAMINGS


class Source(NamedTuple):
    page: str
    counted_by: str
    url_lists: list[UrlList]


CC3M_TRAIN = (["cc3m/[Tt]rain*.tsv", "Train*GCC*.tsv"], ["cc3m/train", "cc3m/training"], 3_318_333)
CC3M_VAL = (["cc3m/[Vv]al*.tsv", "Validation*GCC*.tsv"], ["cc3m/val", "cc3m/validation"], 15_840)
CC12M = (["cc12m/cc12m.tsv", "cc12m.tsv"], ["cc12m/images", "cc12m"], 12_423_374)
SBU_LISTS = ["sbu/sbu-captions-all.json", "sbu/SBU*urls.txt", "sbu/dataset/SBU*urls.txt"]
SBU = (SBU_LISTS, ["sbu/images", "sbu"], 1_000_000, [*NAMINGS, "{file}"])
SOURCES = {
    "cc3m": Source(
        "ai.google.com/research/ConceptualCaptions/download",
        '"Conceptual Captions" (Sharma et al., ACL 2018), release 1.1.0',
        [UrlList("cc3m_train", *CC3M_TRAIN), UrlList("cc3m_val", *CC3M_VAL)],
    ),
    "cc12m": Source(
        "github.com/google-research-datasets/conceptual-12m",
        'lines of cc12m.tsv, of "Conceptual 12M" (Changpinyo et al., CVPR 2021)',
        [UrlList("cc12m", *CC12M)],
    ),
    "sbu": Source(
        "cs.rice.edu/~vo9/sbucaptions",
        '"Im2Text: Describing Images Using 1 Million Captioned Photographs" (Ordonez et al., NIPS 2011)',
        [UrlList("sbu", *SBU)],
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-names", help="how images are named, for example {row:09}.jpg; see above")
    add_relative(parser)
    add_without_images(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    source = SOURCES[options.name]
    report.source = source.counted_by
    written, shards = [], []
    for url_list in source.url_lists:
        try:
            written.append(_write(url_list, root, out, options, report))
        except AlreadyShards as error:
            shards.append(str(error))
    if shards:
        raise UserError("; ".join(shards))
    if not any(written):
        wanted = (f"images in {' or '.join(u.images)} with {' or '.join(u.lists)}" for u in source.url_lists)
        raise UserError(
            f"missing in --root {root}: {'; or '.join(wanted)}. The list is to be had from {source.page}, "
            "the images by img2dataset (output_format files or parquet; the list is not needed then) or "
            "another tool; --without_images makes the file of the list alone"
        )


def _write(url_list: UrlList, root: Path, out: Path, options: argparse.Namespace, report: Report) -> bool:
    """Write the pre-training file of a list; return whether its images and the list are there."""
    stem, path = url_list.stem, out / f"{url_list.stem}.json"
    folder, listed = find(root, url_list.images), find(root, url_list.lists)
    if folder is not None and is_output(folder):
        write_output(folder, path, prefix(folder, root, options), report, url_list.num_lines)
        if report.without_images:
            report.notes.append(f"{path.name}: of the images that img2dataset has written to {folder} alone")
        return True
    if report.without_images and (folder is None or (listed and folder in listed.parents)):
        folder = root / url_list.images[0]
    if folder is None or listed is None:
        report.notes.append(f"{path.name}: not made, {'no list' if folder else 'no images'} in {root}")
        return False
    images, lines = Images(folder, report, "pairs whose image is"), _read_list(listed, report)
    first = [] if options.image_names else list(islice(lines, NUM_TRIED))
    name_of = _Naming(options.image_names or _guess(first, listed, url_list.namings, images))

    def rows() -> Iterator[tuple[str, object]]:
        for row, url, caption in chain(first, lines):
            report.count(f"{stem}: lines", 1, url_list.num_lines)
            if images.has(name := name_of(row, url)):
                yield name, caption

    number = report.write(path, pairs(rows(), prefix(folder, root, options), report))
    report.count(f"{stem}: pairs{'' if report.without_images else ' with an image'}", number)
    report.notes.append(f"{path.name}: images are named {name_of.pattern}")
    return True


class _Naming:
    """Image names by a pattern such as {row:09}_{crc32}.jpg; UserError for one with other fields."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        try:
            fields = [field for _, field, _, _ in Formatter().parse(pattern) if field is not None]
            self.values = {field: FIELDS[field] for field in fields}
            self(0, "http://host/file")
        except (KeyError, ValueError) as error:
            raise UserError(f"--image-names {pattern}: {error}; fields are {', '.join(FIELDS)}") from error

    def __call__(self, row: int, url: str) -> str:
        return self.pattern.format(**{field: value(row, url) for field, value in self.values.items()})


def _guess(first: list[tuple[int, str, object]], listed: Path, namings: list[str], images: Images) -> str:
    """Return the naming by which most of the first lines have an image.

    Where none has one, raises UserError; without images it is the first naming.
    """
    tried = [*namings, *(f"{naming}.jpg" for naming in namings if naming != "{file}")]
    fits = {}
    for naming in tried:
        name_of = _Naming(naming)
        fits[naming] = sum(name_of(row, url) in images.files for row, url, _ in first)
    best = max(fits, key=fits.get)
    if not fits[best] and not images.report.without_images:
        example = min(images.files, default="nothing")
        raise UserError(
            f"no image of the first {len(first)} lines of {listed} is in {images.folder}, by the names "
            f"{', '.join(tried)}; found there, for example: {example}. Say how they are named by "
            "--image-names"
        )
    return best


def _read_list(path: Path, report: Report) -> Iterator[tuple[int, str, object]]:
    """Yield number, URL and caption, or what stands in its place, of each line."""
    if path.suffix == ".tsv":
        yield from _read_tsv(path, report)
        return
    if path.suffix == ".json":
        content = read_source(path)
        urls, captions = (checked(content, key, list, str(path)) for key in ("image_urls", "captions"))
    else:
        urls = [line.decode("utf-8", "replace") for _, line in read_lines(path)]
        captions = [line for _, line in read_lines(path.with_name(path.name.replace("urls", "captions")))]
    if len(urls) != len(captions):
        raise UserError(f"{path}: {len(urls)} URLs but {len(captions)} captions; download the files again")
    for row, (url, caption) in enumerate(zip(urls, captions, strict=True)):
        if isinstance(url, str):
            yield row, url, caption
        else:
            report.leave_out("URLs that are no text", f"{path.name} entry {row}")


def _read_tsv(path: Path, report: Report) -> Iterator[tuple[int, str, str]]:
    """Yield those of caption and URL, or URL and caption; quotation marks mean nothing."""
    num_headers = 0
    for number, line in read_lines(path):
        where = f"{path.name} line {number}"
        try:
            fields = line.decode().split("\t")
        except UnicodeDecodeError:
            report.leave_out("lines that are not UTF-8", where)
            continue
        is_url = [field.startswith(("http://", "https://")) for field in fields]
        if len(fields) == 2 and any(is_url):
            url, caption = fields if is_url[0] else fields[::-1]
            yield number - 1 - num_headers, url, caption
        elif number == 1:
            num_headers = 1
        else:
            report.leave_out("lines that are not a URL and a caption", where)
