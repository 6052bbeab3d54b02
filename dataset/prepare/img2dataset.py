"""What img2dataset has downloaded: a pre-training file, or shards.

Needs below --root, in the folder --folder (img2dataset's --output_folder, run with --caption_col), of layout
files (its --output_format):
    00000/000000012.jpg, .txt, .json    an image, its caption, and both with what is known of them
    00000.parquet                       all URLs of the folder, with key, caption, status and error message
    00000_stats.json                    how many of them failed, by cause
or of its layout parquet: 00000.parquet with the images themselves in a column jpg, png or webp.
Writes {--name}.json of layout files: the table is read where there is one (which needs `pip install
pyarrow`), the small files and the statistics elsewhere. Of layout parquet it writes shards for `train_file`
to name, {--name}_shards/00000.tar and so on. Layout webdataset is such shards already: their names are shown.
URLs that were not downloaded are counted by cause.
"""

import argparse
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from simla.dataset.prepare.common import (
    Report,
    add_relative,
    captions_in,
    in_parallel,
    list_folder,
    pairs,
    prefix,
    write_annotations,
)
from simla.dataset.prepare.shards import caption_file, write_statistics, write_tar
from simla.utils import UserError, first_line, make_output_folder, with_progress

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SHARD = re.compile(r"(\d{5,})(|\.parquet|_stats\.json|\.tar|\.tfrecord)")
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp"}
IMAGE_COLUMNS = ["jpg", "png", "webp"]  # of layout parquet: img2dataset's --encode_format
COLUMNS = ["key", "caption", "status", "error_message"]
NUM_AHEAD = 32  # shards, of some 10,000 rows each
LOG_SHARDS = 50
BATCH_ROWS = 4096  # read at a time
BATCH_IMAGES = 64  # likewise, of a table that has the images in it
RERUN = "img2dataset keeps captions where its --caption_col names their column: download again with it"


class AlreadyShards(UserError):
    """There is nothing to convert: the folder holds WebDataset shards, which training reads as they are."""


class Shard(NamedTuple):
    rows: list[tuple[str, object]]  # image relative to the output folder, caption
    num_urls: int
    report: Report  # what was left out and noticed


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=".", help="below --root; default: --root itself")
    parser.add_argument(
        "--name", dest="stem", default="pairs", help="of the file written; default: %(default)s"
    )
    add_relative(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    folder = root / options.folder
    if not is_output(folder):
        tars = "; its .tar files, if they are WebDataset shards, are for train_file to name as they are"
        tars = tars if any(folder.glob("*.tar")) else ""
        raise UserError(
            f"{folder} is no folder of img2dataset's, with 00000/, 00000.parquet, 00000.tar or "
            f"00000_stats.json in it{tars}; download with --output_format files --caption_col ..., and name "
            "the folder by --folder"
        )
    write_output(folder, out / f"{options.stem}.json", prefix(folder, root, options), report)


def is_output(folder: Path) -> bool:
    """Whether img2dataset has written here."""
    return folder.is_dir() and any(_shards(folder))


def _shards(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and ending of what lies there, "" for a folder of images."""
    with os.scandir(folder) as items:
        for item in items:
            match = SHARD.fullmatch(item.name)
            # A folder of images without .jpg may have files named by numbers, too.
            if match and item.is_dir() == (match[2] == ""):
                yield match[1], match[2]


def write_output(folder: Path, path: Path, start: str, report: Report, official: int | None = None) -> None:
    """The pre-training file of an output folder, or the shards in the folder of its name where that holds
    tables with images; official: how many URLs were to be downloaded.

    Raises AlreadyShards for layout webdataset.
    """
    shards: dict[str, set[str]] = {}
    for name, ending in _shards(folder):
        shards.setdefault(name, set()).add(ending)
    unpacked = {name for name, endings in shards.items() if "" in endings}
    for ending, explain in ((".tar", _point_to_tars), (".tfrecord", _refuse_tfrecords)):
        if packed := sorted(name for name in shards.keys() - unpacked if ending in shards[name]):
            explain(folder, packed)
    columns = {
        name: column
        for name in sorted(shards.keys() - unpacked)
        if ".parquet" in shards[name] and (column := _image_column(folder / f"{name}.parquet"))
    }
    num_urls, number = Counter(), 0
    if columns:
        number += _write_tars(folder, path.with_name(f"{path.stem}_shards"), columns, num_urls, report)
    if unpacked or not columns:
        rows = _read_output(folder, sorted(shards.keys() - columns.keys()), num_urls, report)
        number += write_annotations(path, pairs(rows, start, report), report)
    report.count(f"{path.stem}: URLs", num_urls.total(), official)
    report.count(f"{path.stem}: pairs with an image", number)


# ---- layout files ----


def _read_output(
    folder: Path, names: list[str], num_urls: Counter, report: Report
) -> Iterator[tuple[str, object]]:
    shards = in_parallel(partial(_read_shard, folder), names, NUM_AHEAD)
    for shard in with_progress(shards, len(names), f"Reading {folder}", LOG_SHARDS):
        num_urls["files"] += shard.num_urls
        report.include(shard.report)
        yield from shard.rows


def _read_shard(folder: Path, shard: str) -> Shard:
    files, empty, _ = list_folder(folder, shard) if (folder / shard).is_dir() else ([], [], [])
    images = {Path(name).stem: name for name in files if Path(name).suffix.lower() in IMAGE_TYPES}
    damaged = {Path(name).stem: name for name in empty if Path(name).suffix.lower() in IMAGE_TYPES}
    report = Report(shard)
    for name in damaged.values():
        report.leave_out("downloads that are empty files", name)
    table = folder / f"{shard}.parquet"
    if table.is_file():
        rows = sorted(_of_table(table, images, damaged, report), key=itemgetter(0))
    else:
        rows = sorted(_of_small_files(folder, shard, images, {*files, *empty}, report), key=itemgetter(0))
        _count_failed(folder / f"{shard}_stats.json", len(images) + len(damaged), report)
    return Shard(rows, len(rows) + report.left_out.total(), report)


def _of_table(
    path: Path, images: dict[str, str], damaged: dict[str, str], report: Report
) -> Iterator[tuple[str, object]]:
    for key, row in _downloaded(path, [], report):
        if key in images:
            yield images[key], row["caption"]
        elif key not in damaged:
            report.leave_out("downloads that are missing", f"{path.stem}/{key}")


def _downloaded(path: Path, more: list[str], report: Report) -> Iterator[tuple[str, dict]]:
    """Key and row of each success; the others are reported. more: columns to read beside the usual ones."""
    if "caption" not in (columns := columns_of(path)):
        raise UserError(f"{path} has no column 'caption'; it has {', '.join(columns)}. {RERUN}")
    for row in read_parquet(path, [*COLUMNS, *more], BATCH_IMAGES if more else BATCH_ROWS):
        key = str(row["key"])
        if row["status"] == "success":
            yield key, row
        else:
            report.leave_out(_failure(row["error_message"] or row["status"]), f"{path.stem}/{key}")


def _failure(cause: object) -> str:
    return f"URLs not downloaded: {first_line(ValueError(cause))[:100]}"


def _of_small_files(
    folder: Path, shard: str, images: dict[str, str], files: set[str], report: Report
) -> Iterator[tuple[str, object]]:
    """The caption is read from .json, where it is what it was: .txt has a list, too, as text, in whatever
    encoding the downloading machine had.
    """
    for key, image in images.items():
        text, about = f"{shard}/{key}.txt", f"{shard}/{key}.json"
        parsed = _parsed(folder / about) if about in files else {}
        known = parsed if isinstance(parsed, dict) else {}
        caption = known.get("caption")
        if caption is None and text in files:
            caption = _content(folder / text)
        if caption is not None or "caption" in known:
            yield image, caption
        elif parsed is not known:
            report.leave_out("downloads whose .json is damaged or holds no object", about)
        else:
            report.leave_out(f"downloads with no caption in .txt or .json ({RERUN})", image)


def _count_failed(statistics: Path, num_downloaded: int, report: Report) -> None:
    """By cause, where the statistics say it: older ones do not."""
    if not statistics.is_file():
        return
    found = _parsed(statistics)
    found = found if isinstance(found, dict) else {}
    causes, shard = found.get("status_dict"), statistics.name.removesuffix("_stats.json")
    if isinstance(causes, dict) and all(type(number) is int for number in causes.values()):
        for cause, number in causes.items():
            if cause != "success":
                report.leave_out(_failure(cause), shard, number)
    elif type(count := found.get("count")) is int:
        if count > num_downloaded:
            report.leave_out("URLs not downloaded, no cause recorded", shard, count - num_downloaded)
    else:
        what = "files of statistics that are none of img2dataset's, so that failed URLs are not counted"
        report.notice(what, statistics.name)


def _parsed(path: Path) -> object:
    """What a small file holds as JSON; None where it is damaged."""
    try:
        return json.loads(_content(path))
    except (ValueError, RecursionError):
        return None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); download or unpack it again") from error


# ---- layouts of packed images ----


def _point_to_tars(folder: Path, names: list[str]) -> None:
    if not _has_captions(folder, names):
        raise UserError(
            f"{folder} holds shards of img2dataset's (layout webdataset) without captions. {RERUN}"
        )
    raise AlreadyShards(
        f"{folder} holds WebDataset shards (img2dataset's layout webdataset), which pre-training reads as "
        f"they are; there is nothing to convert. In the config: {train_file(folder, names)}"
    )


def _has_captions(folder: Path, names: list[str]) -> bool:
    """Whether the first shard that is whole and not empty has .txt, or .json with captions; True where none
    is.
    """
    for name in names:
        try:
            with tarfile.open(folder / f"{name}.tar", "r:") as tar:
                kinds = {Path(member.name).suffix: member for member in tar}
                about = json.load(tar.extractfile(kinds[".json"])) if ".json" in kinds else {}
        except (OSError, ValueError, tarfile.TarError):
            continue
        if kinds:
            return ".txt" in kinds or (isinstance(about, dict) and "caption" in about)
    return True


def _refuse_tfrecords(folder: Path, names: list[str]) -> None:
    raise UserError(
        f"{folder}/{names[0]}.tfrecord: img2dataset's layout tfrecord is not read; download with "
        "--output_format files, webdataset or parquet"
    )


def train_file(folder: Path, names: list[str]) -> str:
    """The line of a config that names the shards: `train_file: '/data/{00000..00012}.tar'`."""
    files = []
    for _, run in groupby(enumerate(names), key=lambda item: int(item[1]) - item[0]):  # equal in a run
        first, *others = [name for _, name in run]
        pattern = f"{{{first}..{others[-1]}}}" if others else first
        files.append(f"'{folder}/{pattern}.tar'")
    return f"train_file: {files[0] if len(files) == 1 else '[' + ', '.join(files) + ']'}"


def _image_column(table: Path) -> str | None:
    """The column of layout parquet that holds the images; None in other layouts."""
    columns = columns_of(table)
    return next((column for column in IMAGE_COLUMNS if column in columns), None)


def _write_tars(folder: Path, out: Path, columns: dict[str, str], num_urls: Counter, report: Report) -> int:
    """Writes a shard of each table and returns how many samples they have."""
    make_output_folder(out, "--out")
    shards = in_parallel(lambda item: _write_tar(folder, out, *item), columns.items(), NUM_AHEAD)
    number = 0
    for num_samples, num_rows, of_shard in with_progress(
        shards, len(columns), f"Unpacking {folder}", LOG_SHARDS
    ):
        number += num_samples
        num_urls["tables"] += num_rows
        report.include(of_shard)
    if not number:
        raise UserError(f"no image with a caption in the tables of {folder}, for the causes above")
    report.written.append((out, number))
    report.note(f"in the config: {train_file(out, list(columns))}")
    return number


def _write_tar(folder: Path, out: Path, shard: str, column: str) -> tuple[int, int, Report]:
    """How many samples it has and rows the table, and what was left out."""
    report, failed, num_samples, num_rows = Report(shard), Report(shard), 0, 0

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal num_samples, num_rows
        for key, row in _downloaded(folder / f"{shard}.parquet", [column], failed):
            where, num_rows = f"{shard}/{key}", num_rows + 1
            if not row[column]:
                report.leave_out("downloads that are empty files", where)
            elif texts := list(captions_in(row["caption"], where, report)):
                num_samples += 1
                yield key, {column: row[column], **caption_file(texts)}

    write_tar(out / f"{shard}.tar", samples())
    write_statistics(out / f"{shard}_stats.json", {"count": num_samples, "successes": num_samples})
    report.include(failed)
    return num_samples, num_rows + failed.left_out.total(), report


# ---- tables ----


def columns_of(path: Path) -> list[str]:
    """The names of a table's columns; UserError as of `read_parquet`."""
    with _parquet(path) as file:
        return file.schema_arrow.names


def read_parquet(
    path: Path, columns: list[str] | None = None, batch_rows: int = BATCH_ROWS
) -> Iterator[dict]:
    """The rows; UserError where pyarrow or a column is missing, or the file is damaged."""
    with _parquet(path) as file:
        missing = [column for column in columns or [] if column not in file.schema_arrow.names]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}"
            )
        for batch in file.iter_batches(batch_rows, columns=columns):
            yield from batch.to_pylist()


@contextmanager
def _parquet(path: Path) -> Iterator["ParquetFile"]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); download or unpack it again"
        ) from error
