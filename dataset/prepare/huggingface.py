"""Shards of tables that hold the images themselves, as Hugging Face's `datasets` writes and publishes them.

Needs below --root the tables that --table names (and `pip install pyarrow`):
    data/train-00000-of-00012.parquet ...       a data set of the Hugging Face hub, or of to_parquet
    train/data-00000-of-00012.arrow ...         one that save_to_disk has written
or other parquet files with images in them. Images are in a column of {"bytes", "path"}, as `datasets` has
them, or of bytes alone; captions, a text or a list of texts, in one column or several. They are told by the
usual names (image, img, ...; caption, text, ...), or by --image and --caption.
Writes one shard of each table, {--name}_shards/00000.tar and so on, for `train_file` to name. Images keep
their bytes; those of formats that shards do not have become JPEGs.

Name tables of one split, or take some rows alone by a column "split": --only train. Where a row has a path
and no bytes (to_parquet of a folder of photos), the file is read, relative to the table. A row with neither
is left out and counted.
"""

import argparse
import re
from functools import partial
from pathlib import Path

from simla.dataset.images import BadImage
from simla.dataset.prepare.captions import captions_in
from simla.dataset.prepare.common import Report, add_name
from simla.dataset.prepare.img2dataset import (
    BATCH_IMAGES,
    Samples,
    opened_table,
    read_table,
    write_tars,
)
from simla.dataset.prepare.shards import caption_file, identities, image_file
from simla.dataset.prepare.table import CAPTION_NAMES, IMAGE_NAMES, column_of, find_tables, split_column
from simla.utils import UserError

KINDS = {".parquet", ".arrow"}
BYTES = {"binary", "large_binary", "binary_view"}
STRUCT = re.compile(r"struct<(\w+: \w+, )*bytes: (large_)?binary\b")


def add_options(parser: argparse.ArgumentParser) -> None:
    table_help = "files, relative to --root; patterns such as data/train-*.parquet, too"
    parser.add_argument("--table", nargs="+", action="extend", required=True, help=table_help)
    parser.add_argument("--image", help="column of images")
    parser.add_argument("--caption", nargs="+", action="extend", help="column, or columns, of captions")
    parser.add_argument(
        "--only", nargs="+", action="extend", help="rows of these splits, by the column split"
    )
    add_name(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    tables = find_tables(root, options.table)
    samples = {}
    for number, path in enumerate(tables):
        if path.suffix not in KINDS:
            raise UserError(f"--table {path}: must end in {' or '.join(sorted(KINDS))}")
        image, captions, split = _columns(path, options)
        if split and not options.only:
            report.notice(
                f"tables with a column {split}, all of whose rows are taken without --only", path.name
            )
        samples[f"{number:05}"] = partial(_samples, path, image, captions, split, options.only)
    settings = {
        "tables": identities(tables),
        "image": options.image,
        "caption": options.caption,
        "only": options.only,
    }
    write_tars(out / f"{options.stem}_shards", samples, settings, "Unpacking tables", "", report)


def _columns(path: Path, options: argparse.Namespace) -> tuple[str, list[str], str | None]:
    """Return the columns of images and captions, and that of splits where there is one.

    Raises UserError where the table has no images in it, or no splits to choose from.
    """
    with opened_table(path) as (schema, _):
        kinds = {field.name: str(field.type) for field in schema}
        images = [name for name, kind in kinds.items() if kind in BYTES or STRUCT.match(kind)]
    if not images:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise UserError(
            f"{path} has no column of images, that is of bytes or of {{bytes, path}}, but {listed}. A table "
            "that names image files is for python -m simla.dataset.prepare table"
        )
    image = images[0]
    if options.image or len(images) > 1:
        image = column_of(dict.fromkeys(images), options.image, IMAGE_NAMES, "--image", path)
    names, wanted = dict.fromkeys(schema.names), options.caption or [None]
    captions = [column_of(names, name, CAPTION_NAMES, "--caption", path) for name in wanted]
    split = split_column(names)
    if options.only and not split:
        raise UserError(f"--only: {path} has no column 'split'; it has {', '.join(names)}")
    return image, captions, split


def _samples(
    path: Path, image: str, captions: list[str], split: str | None, only: list[str] | None, report: Report
) -> Samples:
    columns = [image, *captions, *([split] if split and only else [])]
    for number, row in enumerate(read_table(path, columns, BATCH_IMAGES)):
        report.count("rows")
        if only and str(row[split]) not in only:
            report.leave_out(f"rows of split {row[split]!r}", f"{path.name} row {number}")
            continue
        cell, where = row[image], f"{path.name} row {number}"
        if isinstance(cell, dict):
            file = cell.get("path")
            where += f" ({file})" if file else ""
            cell = cell["bytes"] or (str(path.parent / file) if file else None)
        if not cell:
            report.leave_out("rows without an image", where)
        elif texts := list(captions_in([row[column] for column in captions], where, report)):
            try:
                kind, content = image_file(cell, where)
            except BadImage as error:
                report.leave_out(f"rows whose image is bad: {error.cause.partition(':')[0]}", where)
            else:
                yield f"{number:09}", {kind: content, **caption_file(texts)}
