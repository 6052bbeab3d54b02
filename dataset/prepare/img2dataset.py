"""What img2dataset has downloaded, in its layout "files": a pre-training file.

Needs below --root, in the folder --folder (img2dataset's --output_folder, run with --caption_col):
    00000/000000012.jpg, .txt, .json    an image, its caption, and both with what is known of them
    00000.parquet                       all URLs of the folder, with key, caption, status and error message
    00000_stats.json                    how many of them failed, by cause
Writes {--name}.json. The table is read where there is one (which needs `pip install pyarrow`), the small
files and the statistics elsewhere. URLs that were not downloaded are counted by cause.
"""

import argparse
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dataset.prepare.common import (
    Report,
    add_relative,
    in_parallel,
    list_folder,
    pairs,
    prefix,
    read_source,
    write_annotations,
)
from utils import UserError, first_line, with_progress

SHARD = re.compile(r"(\d{5,})(?:|\.parquet|_stats\.json)")
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp"}
NUM_AHEAD = 32  # shards, of some 10,000 rows each
LOG_SHARDS = 50
BATCH_ROWS = 4096  # read at a time: a table may have the images themselves in it, too


class Shard(NamedTuple):
    rows: list[tuple[str, str]]  # image relative to the output folder, caption
    left_out: list[tuple[str, str, int]]  # cause, example, number


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=".", help="below --root; default: --root itself")
    parser.add_argument(
        "--name", dest="stem", default="pairs", help="of the file written; default: %(default)s"
    )
    add_relative(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    folder = root / options.folder
    if not is_output(folder):
        tars = "; its .tar files are of layout webdataset" if any(folder.glob("*.tar")) else ""
        raise UserError(
            f"{folder} is no folder of img2dataset's, with 00000/, 00000.parquet or 00000_stats.json in it"
            f"{tars}; download with --output_format files --caption_col ..., and name the folder by --folder"
        )
    write_output(folder, out / f"{options.stem}.json", prefix(folder, root, options), report)


def is_output(folder: Path) -> bool:
    """Whether img2dataset has written here, in layout "files"."""
    return folder.is_dir() and any(_shards(folder))


def _shards(folder: Path) -> Iterator[str]:
    """Names, some more than once. A folder of images without .jpg may have files named by numbers, too."""
    with os.scandir(folder) as items:
        for item in items:
            match = SHARD.fullmatch(item.name)
            if match and item.is_dir() == (match[0] == match[1]):
                yield match[1]


def write_output(folder: Path, path: Path, start: str, report: Report, official: int | None = None) -> None:
    """The pre-training file of an output folder; official: how many URLs were to be downloaded."""
    num_before = sum(report.left_out.values())
    number = write_annotations(path, pairs(_read_output(folder, report), start, report), report)
    report.count(f"{path.stem}: URLs", number + sum(report.left_out.values()) - num_before, official)
    report.count(f"{path.stem}: pairs with an image", number)


def _read_output(folder: Path, report: Report) -> Iterator[tuple[str, str]]:
    names = sorted(set(_shards(folder)))
    shards = in_parallel(partial(_read_shard, folder), names, NUM_AHEAD)
    for shard in with_progress(shards, len(names), f"Reading {folder}", LOG_SHARDS):
        for cause, example, number in shard.left_out:
            report.leave_out(cause, example, number)
        yield from shard.rows


def _read_shard(folder: Path, shard: str) -> Shard:
    files, empty, _ = list_folder(folder, shard) if (folder / shard).is_dir() else ([], [], [])
    images = {Path(name).stem: name for name in files if Path(name).suffix.lower() in IMAGE_TYPES}
    damaged = [
        ("downloads that are empty files", name, 1)
        for name in empty
        if Path(name).suffix.lower() in IMAGE_TYPES
    ]
    table = folder / f"{shard}.parquet"
    if table.is_file():
        rows, left_out = _of_table(table, images, {Path(name).stem for _, name, _ in damaged})
    else:
        rows, left_out = _of_small_files(folder, shard, images, set(files))
    return Shard(sorted(rows), damaged + left_out)


def _of_table(path: Path, images: dict[str, str], damaged: set[str]) -> tuple[list, list]:
    """Rows, and what is left out."""
    rows, left_out = [], []
    for row in read_parquet(path, ["key", "caption", "status", "error_message"]):
        key = row["key"]
        if row["status"] != "success":
            cause = first_line(ValueError(row["error_message"] or row["status"]))[:100]
            left_out.append((f"URLs not downloaded: {cause}", f"{path.stem}/{key}", 1))
        elif key in images:
            rows.append((images[key], row["caption"] or ""))
        elif key not in damaged:
            left_out.append(("downloads that are missing", f"{path.stem}/{key}", 1))
    return rows, left_out


def _of_small_files(folder: Path, shard: str, images: dict[str, str], files: set[str]) -> tuple[list, list]:
    rows, left_out = [], []
    for key, image in images.items():
        text, about = f"{shard}/{key}.txt", f"{shard}/{key}.json"
        if text in files:
            rows.append((image, _read_text(folder / text)))
        else:
            caption = read_source(folder / about).get("caption") if about in files else None
            rows.append((image, caption or ""))
    statistics = folder / f"{shard}_stats.json"
    if statistics.is_file():
        for cause, number in read_source(statistics)["status_dict"].items():
            if cause != "success":
                left_out.append((f"URLs not downloaded: {cause[:100]}", shard, number))
    return rows, left_out


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); download or unpack it again") from error


def read_parquet(path: Path, columns: list[str] | None = None) -> Iterator[dict]:
    """The rows; UserError where pyarrow or a column is missing, or the file is damaged."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            missing = [column for column in columns or [] if column not in file.schema_arrow.names]
            if missing:
                raise UserError(
                    f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}"
                )
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); download or unpack it again"
        ) from error
