"""A pre-training file, or shards, of the images that img2dataset has downloaded.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simla.dataset.prepare.captions import captions_in, pairs
from simla.dataset.prepare.common import Report, add_name, add_relative, in_parallel, list_folder, prefix
from simla.dataset.prepare.shards import (
    SETTINGS,
    caption_file,
    check_settings,
    identities,
    write_json,
    write_tar,
)
from simla.utils import UserError, first_line, make_output_folder, with_progress

if TYPE_CHECKING:
    from pyarrow import RecordBatch, RecordBatchReader, Schema

Rows = Iterable[tuple[str, object]]  # image relative to the output folder, cell with captions
Samples = Iterator[tuple[str, dict[str, bytes]]]  # key, members of the sample by their endings
SHARD = re.compile(r"(\d{5,})(|\.parquet|_stats\.json|\.tar|\.tfrecord)")
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp"}
IMAGE_COLUMNS = ["jpg", "png", "webp"]  # of layout parquet: img2dataset's --encode_format
COLUMNS = ["key", "caption", "status", "error_message"]
NUM_AHEAD = 32  # shards, of some 10,000 rows each
LOG_SHARDS = 50
BATCH_ROWS = 4096  # read at a time
BATCH_IMAGES = 64  # likewise, of a table that has the images in it
URLS = "URLs"
RERUN = "img2dataset keeps captions where its --caption_col names their column: download again with it"


class AlreadyShards(UserError):
    """There is nothing to convert: the folder holds WebDataset shards, which training reads as they are."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=".", help="below --root; default: --root itself")
    add_name(parser)
    add_relative(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    folder = root / options.folder
    if not is_output(folder):
        tars = "; its .tar files, if they are WebDataset shards, are for train_file to name as they are"
        raise UserError(
            f"{folder} is no folder of img2dataset's, with 00000/, 00000.parquet, 00000.tar or "
            f"00000_stats.json in it{tars if any(folder.glob('*.tar')) else ''}; download with "
            "--output_format files --caption_col ..., and name the folder by --folder"
        )
    write_output(folder, out / f"{options.stem}.json", prefix(folder, root, options), report)


def is_output(folder: Path) -> bool:
    """Return whether img2dataset has written here."""
    return folder.is_dir() and bool(_shards(folder))


def _shards(folder: Path) -> dict[str, set[str]]:
    """Return the endings of each shard in order of their names, "" for a folder of images."""
    shards: dict[str, set[str]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            match = SHARD.fullmatch(entry.name)
            # A folder of images without .jpg may have files named by numbers, too.
            if match and entry.is_dir() == (match[2] == ""):
                shards.setdefault(match[1], set()).add(match[2])
    return dict(sorted(shards.items()))


def write_output(folder: Path, path: Path, start: str, report: Report, official: int | None = None) -> None:
    """Write the pre-training file of an output folder, or shards beside it of tables that hold the images.

    start: precedes the images' names; official: how many URLs were to be downloaded. Raises AlreadyShards for
    layout webdataset.
    """
    shards = _shards(folder)
    packed = {name: endings for name, endings in shards.items() if "" not in endings}
    _refuse_packed(folder, packed)
    columns = {
        name: column
        for name, endings in packed.items()
        if ".parquet" in endings and (column := _image_column(folder / f"{name}.parquet"))
    }
    stem, number = f"{path.stem}: ", 0
    report.count(f"{stem}{URLS}", 0, official)
    if columns:
        samples = {name: partial(_samples, folder, name, column) for name, column in columns.items()}
        settings = {"tables": identities(folder / f"{name}.parquet" for name in columns)}
        number += write_tars(
            path.with_name(f"{path.stem}_shards"), samples, settings, f"Unpacking {folder}", stem, report
        )
    if not columns or len(packed) < len(shards):
        names = [name for name in shards if name not in columns]
        rows = _each_shard(partial(_read_shard, folder), names, f"Reading {folder}", stem, report)
        number += report.write(path, pairs(chain.from_iterable(rows), start, report))
    report.count(f"{stem}pairs with an image", number)


def _each_shard(
    function: Callable[[str], tuple[Any, Report]], names: list[str], header: str, stem: str, report: Report
) -> Iterator:
    """Yield what the function, called in threads, makes of each shard; its reports are included in ours."""
    results = in_parallel(function, names, NUM_AHEAD)
    for result, of_shard in with_progress(results, len(names), header, LOG_SHARDS):
        report.include(of_shard, stem)
        yield result


# ---- layout files ----


def _read_shard(folder: Path, shard: str) -> tuple[Rows, Report]:
    report = Report(shard)
    files, empty, _ = list_folder(folder, shard) if (folder / shard).is_dir() else ([], [], [])
    images, damaged = (
        {Path(name).stem: name for name in names if Path(name).suffix.lower() in IMAGE_TYPES}
        for names in (files, empty)
    )
    for name in damaged.values():
        report.leave_out("downloads that are empty files", name)
    table = folder / f"{shard}.parquet"
    if table.is_file():
        rows = sorted(_of_table(table, images, damaged, report), key=itemgetter(0))
    else:
        rows = sorted(_of_small_files(folder, shard, images, {*files, *empty}, report), key=itemgetter(0))
        _count_failed(folder / f"{shard}_stats.json", len(images) + len(damaged), report)
        report.count(URLS, len(rows) + report.left_out.total())
    return rows, report


def _of_table(path: Path, images: dict[str, str], damaged: dict[str, str], report: Report) -> Rows:
    for key, row in _downloaded(path, [], report):
        if key in images:
            yield images[key], row["caption"]
        elif key not in damaged:
            report.leave_out("downloads that are missing", f"{path.stem}/{key}")


def _downloaded(path: Path, more: list[str], report: Report) -> Iterator[tuple[str, dict]]:
    """Yield key and row of each success; the others are reported. more: columns beside the usual ones."""
    for row in read_table(path, [*COLUMNS, *more], BATCH_IMAGES if more else BATCH_ROWS):
        key = str(row["key"])
        report.count(URLS)
        if row["status"] == "success":
            yield key, row
        else:
            report.leave_out(_failure(row["error_message"] or row["status"]), f"{path.stem}/{key}")


def _failure(cause: object) -> str:
    return f"URLs not downloaded: {first_line(ValueError(cause))[:100]}"


def _of_small_files(
    folder: Path, shard: str, images: dict[str, str], files: set[str], report: Report
) -> Rows:
    """Yield rows whose caption is from .json, as it was, or else from .txt, which has a list as text, too, in
    whatever encoding the downloading machine had.
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
    """Report failed URLs by cause, where the statistics say it: older ones do not."""
    if not statistics.is_file():
        return
    parsed, shard = _parsed(statistics), statistics.name.removesuffix("_stats.json")
    known = parsed if isinstance(parsed, dict) else {}
    causes, count = known.get("status_dict"), known.get("count")
    if isinstance(causes, dict) and all(type(number) is int for number in causes.values()):
        for cause, number in causes.items():
            if cause != "success":
                report.leave_out(_failure(cause), shard, number)
    elif type(count) is not int:
        what = "files of statistics that are none of img2dataset's, so that failed URLs are not counted"
        report.notice(what, statistics.name)
    elif count > num_downloaded:
        report.leave_out("URLs not downloaded, no cause recorded", shard, count - num_downloaded)


def _parsed(path: Path) -> object:
    """Return what a small file holds as JSON; None where it is damaged."""
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


def _refuse_packed(folder: Path, packed: dict[str, set[str]]) -> None:
    tars, records = ([name for name in packed if kind in packed[name]] for kind in (".tar", ".tfrecord"))
    if tars and _has_captions(folder, tars):
        raise AlreadyShards(
            f"{folder} holds WebDataset shards (img2dataset's layout webdataset), which pre-training reads "
            f"as they are; there is nothing to convert. In the config: {train_file(folder, tars)}"
        )
    if tars:
        raise UserError(
            f"{folder} holds shards of img2dataset's (layout webdataset) without captions. {RERUN}"
        )
    if records:
        raise UserError(
            f"{folder}/{records[0]}.tfrecord: img2dataset's layout tfrecord is not read; download with "
            "--output_format files, webdataset or parquet"
        )


def _has_captions(folder: Path, names: list[str]) -> bool:
    """Return whether the first shard that is whole and not empty has .txt, or .json with captions; True where
    there is none.
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


def train_file(folder: Path, names: list[str]) -> str:
    """Return the line of a config that names the shards: `train_file: '/data/{00000..00012}.tar'`."""
    files = []
    for _, run in groupby(enumerate(names), key=lambda item: int(item[1]) - item[0]):  # equal in a run
        first, *others = [name for _, name in run]
        pattern = f"{{{first}..{others[-1]}}}" if others else first
        files.append(f"'{folder}/{pattern}.tar'")
    return f"train_file: {files[0] if len(files) == 1 else '[' + ', '.join(files) + ']'}"


def _image_column(table: Path) -> str | None:
    """Return the column of layout parquet that holds the images; None in other layouts."""
    with opened_table(table) as (schema, _):
        return next((column for column in IMAGE_COLUMNS if column in schema.names), None)


def write_tars(
    out: Path,
    samples: dict[str, Callable[[Report], Samples]],
    settings: dict,
    header: str,
    stem: str,
    report: Report,
) -> int:
    """Write shards, name -> what it holds (of a table, whose report is included), and return their samples'
    number; raise UserError where it is 0, or where the folder has shards of other settings.
    """
    make_output_folder(out, "--out")
    check_settings(out / SETTINGS, settings, "--name")

    def write(name: str) -> tuple[int, Report]:
        of_table = Report(name)
        number = write_tar(out / f"{name}.tar", samples[name](of_table))
        write_json(out / f"{name}_stats.json", {"count": number, "successes": number})
        return number, of_table

    number = sum(_each_shard(write, list(samples), header, stem, report))
    if not number:
        for name in samples:  # shards without samples; a second try may be of other settings
            (out / f"{name}.tar").unlink()
            (out / f"{name}_stats.json").unlink()
        (out / SETTINGS).unlink()
        raise UserError("no image with a caption in the tables, for the causes above")
    report.written.append((out, number))
    report.notes.append(f"in the config: {train_file(out, list(samples))}")
    return number


def _samples(folder: Path, shard: str, column: str, report: Report) -> Samples:
    for key, row in _downloaded(folder / f"{shard}.parquet", [column], report):
        where = f"{shard}/{key}"
        if not row[column]:
            report.leave_out("downloads that are empty files", where)
        elif texts := list(captions_in(row["caption"], where, report)):
            yield key, {column: row[column], **caption_file(texts)}


# ---- tables ----


def read_table(path: Path, columns: list[str] | None = None, batch_rows: int = BATCH_ROWS) -> Iterator[dict]:
    """Yield the rows; raise UserError where pyarrow or a column is missing, or the file is damaged."""
    with opened_table(path) as (schema, batches):
        if missing := [column for column in columns or [] if column not in schema.names]:
            hint = f". {RERUN}" if "caption" in missing else ""
            raise UserError(f"{path} has no column {missing[0]!r}; it has {', '.join(schema.names)}{hint}")
        for batch in batches(batch_rows, columns):
            yield from batch.to_pylist()


@contextmanager
def opened_table(path: Path) -> Iterator[tuple["Schema", Callable[..., Iterable["RecordBatch"]]]]:
    """Yield the schema of a parquet file, or of an .arrow stream, and what makes batches of its rows.

    Raises UserError where pyarrow is missing or the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        if path.suffix == ".arrow":
            with pyarrow.memory_map(str(path)) as source, ipc.open_stream(source) as stream:
                yield stream.schema, partial(_stream_batches, stream)
        else:
            with parquet.ParquetFile(path) as file:
                yield file.schema_arrow, lambda num, columns: file.iter_batches(num, columns=columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); download or unpack it again; an .arrow file must "
            "be a stream, as save_to_disk writes it"
        ) from error


def _stream_batches(
    stream: "RecordBatchReader", num_rows: int, columns: list[str] | None
) -> Iterator["RecordBatch"]:
    for batch in stream:
        for start in range(0, batch.num_rows, num_rows):
            yield batch.select(columns or batch.schema.names).slice(start, num_rows)
