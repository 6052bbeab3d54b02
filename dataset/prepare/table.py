"""Your own images with texts, from a table: files for pre-training or retrieval.

    python -m simla.dataset.prepare table --root photos --out data --table captions.csv --name mine

Needs below --root the table or tables (.csv, .tsv, .txt, .jsonl or .parquet, with column names; the last
needs `pip install pyarrow`) and the images, whose paths in the table are absolute or relative to --images.
Columns are named by --image and --caption; without, the usual names are tried (image, file_name, path, ...;
caption, text, title, ...). Text is UTF-8, and a row is a line. Its cells are parted by what the line of names
has: in .tsv tabs, in .csv commas or else semicolons or bars (|), in .txt any of them, looked for in the order
tab, comma, semicolon, bar. A cell may stand in quotation marks, those within it doubled; between tabs or bars
other quotation marks are letters like all. Blanks after a comma or semicolon, and round a bar, are no part of
a cell. A cell may hold a list of captions, in text files as JSON or Python writes it: ["A dog", "One dog"].
Writes {--name}.json for --task pretrain (one entry a caption), {--name}_train.json for retrieval_train (the
same), {--name}_val.json for retrieval_val or {--name}_test.json for retrieval_test: one entry an image, with
all of its captions. --split 80/10/10 writes all four of one table: 80% of its images are for training, 10%
each for val and test, drawn by their paths below --images, so that an image stays where it is when rows are
added or come in another order; --seed draws others.
"""

import argparse
import csv
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path

from simla.dataset.files import other_file
from simla.dataset.prepare.captions import is_missing, pairs, values_in
from simla.dataset.prepare.common import (
    SPLITS,
    Report,
    add_name,
    add_relative,
    add_seed,
    add_without_images,
    in_parallel,
    split_by_shares,
)
from simla.dataset.prepare.img2dataset import read_table
from simla.dataset.readers.tables import read_json_lines, read_lines
from simla.utils import UserError, log

IMAGE_NAMES = [
    *("image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "file", "img"),
    "image_name",
]
CAPTION_NAMES = ["caption", "captions", "text", "texts", "title", "sentence", "description", "comment"]
NUM_AHEAD = 4096  # images looked for at a time
NO_CELL = "captions of rows with a cell that is null, missing or one too many"
NO_LINE_END = "no cell may hold the end of a line"
MAX_ROW_LINES = 5  # a mark left open longer is a mistake, which would make one caption of many rows
QUOTED = re.compile('"(?:[^"]|"")*"')
csv.field_size_limit(1 << 30)  # the default refuses a long text


def add_options(parser: argparse.ArgumentParser) -> None:
    table_help = "files, relative to --root; patterns such as part-*.parquet, too"
    images_help = "what image paths are relative to; default: --root itself"
    parser.add_argument("--table", nargs="+", action="extend", required=True, help=table_help)
    parser.add_argument("--image", help="column of image paths")
    parser.add_argument("--caption", nargs="+", action="extend", help="column, or columns, of captions")
    parser.add_argument("--images", default=".", help=images_help)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--task", choices=TASKS, default="pretrain", help="default: %(default)s")
    which.add_argument("--split", help="shares of the images for train, val and test, such as 80/10/10")
    add_seed(parser)
    add_name(parser)
    add_relative(parser)
    add_without_images(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    folder = root / options.images
    tables = find_tables(root, options.table)
    rows = _present(read_rows(tables, report, options.image, options.caption), folder, report)
    if options.relative:
        rows = ((os.path.relpath(image, root), caption) for image, caption in rows)
    entries = pairs(rows, "", report)
    if options.split is None:
        files = {options.task: entries}
    else:
        splits = _divided(entries, root, folder, options, report)
        files = {task: splits[split] for task, split in SPLIT_TASKS.items()}
    for task, chosen in files.items():
        suffix, arrange = TASKS[task]
        report.write(out / f"{options.stem}{suffix}.json", arrange(chosen))


def _divided(
    entries: Iterable[dict], root: Path, folder: Path, options: argparse.Namespace, report: Report
) -> dict[str, list[dict]]:
    """Return the entries of each split, those of one image together; UserError where a split gets none."""
    split_of, folder = split_by_shares(options.split, options.seed), os.path.realpath(folder)
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    known: dict[str, str] = {}  # image -> split
    for entry in entries:
        image = entry["image"]
        if image not in known:
            # Links are followed, as by the readers: one photo under two names is in one split.
            known[image] = split_of(os.path.relpath(os.path.realpath(root / image), folder))
        splits[known[image]].append(entry)
    num_images = Counter(known.values())
    for split, some in splits.items():
        report.count(f"{split} images", num_images[split])
        report.count(f"{split} captions", len(some))
        if known and not some:
            raise UserError(
                f"--split {options.split}: none of the {len(known)} images falls into {split}; give it a "
                "larger share, or draw others by --seed"
            )
    return splits


def find_tables(root: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files of paths or patterns below `root`, each once; UserError where one names none."""
    tables: dict[Path, None] = {}
    for pattern in patterns:
        path = root / pattern  # an absolute one stays
        globbed = [] if Path(pattern).is_absolute() else sorted(root.glob(pattern))
        paths = [path] if path.is_file() else globbed
        if not paths:
            raise UserError(f"--table {pattern}: no such file in --root {root}")
        tables |= dict.fromkeys(paths)
    return list(tables)


# ---- rows ----


def read_rows(
    tables: list[Path], report: Report, image: str | None = None, captions: list[str] | None = None
) -> Iterator[tuple[str, object]]:
    """Yield image path as it stands in the table, and caption, or what stands in its place.

    image, captions: their columns; the usual ones where None.
    """
    for path in tables:
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(
                f"--table {path}: must end in {', '.join(READERS)}; unpack a packed table, and name one of "
                "text .txt, where the line of names has what parts the cells"
            )
        if reader is not _read_parquet_rows and (what := other_file(path)):
            raise UserError(f"--table {path} is {what}")
        columns = None
        for where, row in reader(path):
            if columns is None:
                columns = [
                    column_of(row, image, IMAGE_NAMES, "--image", path),
                    *(
                        column_of(row, caption, CAPTION_NAMES, "--caption", path)
                        for caption in captions or [None]
                    ),
                ]
                if split := split_column(row):
                    report.notice(f"tables with a column {split}, which is not looked at", str(path))
            name, *cells = (row.get(column) for column in columns)
            texts = []
            for cell in cells:
                values = values_in(cell, where, report)
                report.count("captions in the table", len(values))
                if None in (*row, cell) or is_missing(name):  # None is the key of cells beyond the last name
                    report.leave_out(NO_CELL, where, len(values))
                else:
                    texts += values
            if not texts:
                continue
            if not isinstance(name, str):
                hint = "; python -m simla.dataset.prepare huggingface reads tables that hold the images"
                raise UserError(
                    f"{where}: column {columns[0]!r} must hold the path of an image, found {name!r}"[:500]
                    + (hint if isinstance(name, bytes | dict) else "")
                )
            yield from ((name, text) for text in texts)


def column_of(row: dict, wanted: str | None, usual: list[str], flag: str, path: Path) -> str:
    """Return the row's key: the one wanted, or the first of the usual ones, in upper or lower case."""
    if wanted is not None and wanted in row:
        return wanted
    names = [name for name in row if name is not None]
    by_lower_case = {str(name).strip().lower(): name for name in reversed(names)}
    if wanted is None and (known := [by_lower_case[name] for name in usual if name in by_lower_case]):
        return known[0]
    told = f"no column {wanted!r}" if wanted else f"no column named {', '.join(usual)}"
    is_odd = len(names) == 1 or any(set(name) & set('"\t;|') for name in map(str, names))
    hint = (
        "; in .csv commas part the cells (or else semicolons, or bars), in .tsv tabs do, in .txt any of them "
        "does: a name that holds one must stand in quotation marks"
    )
    raise UserError(
        f"{path} has {told}; it has {', '.join(map(repr, names))}. Name the right one by {flag} "
        "of python -m simla.dataset.prepare, or rename it" + (hint if is_odd else "")
    )


def split_column(names: Iterable[str | None]) -> str | None:
    """Return the name among them of a column of splits, in upper or lower case; None where there is none."""
    return next((name for name in names if str(name).strip().lower() == "split"), None)


def _read_text(separators: str, path: Path) -> Iterator[tuple[str, dict]]:
    """Yield each row of a text file, by the names in its first one, and where it stands.

    The first of the separators that the names have parts the cells. Cells that are missing are None, those
    beyond the last name stand under None; blank lines are passed over.
    """
    header: list[str] = []
    separator = open_cell = ""
    lines, over_lines = read_lines(path), []
    for number, line in lines:
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        if not header and b"\r" in line:
            raise UserError(f"{where} holds carriage returns, not line ends: save the table with those")
        try:
            text = line.decode()
            if not separator:
                outside = re.sub('"[^"]*"', "", text)  # of quotation marks
                separator = next((each for each in separators if each in outside), separators[0])
            cells = _cells(text, separator)
        except UnicodeDecodeError as error:
            raise UserError(f"{where} cannot be read as UTF-8 ({error}); save the table as UTF-8") from error
        except csv.Error as error:
            cells = _cells_over_lines(text, separator, lines, len(header))
            if not cells:
                raise UserError(
                    f"{where} cannot be read as a row of csv ({error}): a cell with quotation marks in it "
                    "must double them and stand in quotation marks itself, and end within a few lines"
                ) from error
            over_lines.append(where)
        begins = separator in "\t|" and cells[-1].startswith('"') and cells[-1].count('"') % 2 == 1
        if len(cells) < len(header) and (begins or open_cell):
            raise UserError(
                f"{open_cell or where}: a cell begins with a quotation mark that does not end in this line, "
                f"and cells are missing: {NO_LINE_END}"
            )
        open_cell = where if begins else ""
        if not header:
            header = cells
            if twice := [name for name, times in Counter(filter(None, cells)).items() if times > 1]:
                raise UserError(f"{where}: two columns are named {twice[0]!r}; rename or drop one of them")
            continue
        if "\t" in "".join(cells) and "\t" not in "".join(header):
            raise UserError(
                f"{where}: a cell holds a tab, and no column's name does; are these rows of a .tsv?"
            )
        yield where, dict(zip_longest(header, cells))
    if over_lines:
        log.info(f"rows that go over several lines: {len(over_lines)}; the first: {over_lines[0]}")


def _cells(line: str, separator: str) -> list[str]:
    if separator == "\t":
        return [_unquoted(cell) for cell in line.split(separator)]
    if separator == "|":  # as in the usual copy of Flickr30k: "1.jpg| 0| A dog ."
        return [_unquoted(cell.strip()) for cell in line.split(separator)]
    # Each line alone: with a mark left open, the rows up to the next one would become one cell.
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True), [])


def _cells_over_lines(
    text: str, separator: str, lines: Iterator[tuple[int, bytes]], num_cells: int
) -> list[str]:
    """Return the cells of a row of csv whose last mark is left open in `text`, with blanks for the ends of
    lines; [] where MAX_ROW_LINES lines of UTF-8 do not close it, or the row has not `num_cells` cells then.
    """
    for _, line in islice(lines, MAX_ROW_LINES - 1):
        try:
            text += f" {line.decode()}"
        except UnicodeDecodeError:
            return []
        with suppress(csv.Error):
            cells = _cells(text, separator)
            return [cell.strip() for cell in cells] if len(cells) == num_cells else []
    return []


def _unquoted(cell: str) -> str:
    """Return what pandas or R quoted, without its marks; other cells as they are, with whatever marks."""
    return cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell


def _read_json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    for where, row in read_json_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{where} must be an object, found {row!r}"[:500])
        yield where, row


def _read_parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    return ((f"{path}, row {number}", row) for number, row in enumerate(read_table(path)))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict]]]] = {
    ".csv": partial(_read_text, ",;|"),
    ".tsv": partial(_read_text, "\t"),
    ".jsonl": _read_json_rows,
    ".parquet": _read_parquet_rows,
    ".txt": partial(_read_text, "\t,;|"),
}


# ---- images, entries ----


def _present(rows: Iterable[tuple[str, str]], folder: Path, report: Report) -> Iterator[tuple[str, str]]:
    """Yield absolute image paths, of images that are there or need not be, and captions."""
    placed = ((os.path.normpath(folder / image), caption) for image, caption in rows)
    for path, caption, problem in in_parallel(_look, placed, NUM_AHEAD):
        if problem and report.without_images:
            report.notice(f"captions whose image {problem}, kept by --without_images", path)
        elif problem:
            report.leave_out(f"captions whose image {problem}", path)
            continue
        yield path, caption


def _look(row: tuple[str, str]) -> tuple[str, str, str]:
    """Return path, caption, and what is wrong with the image."""
    try:
        status = os.stat(row[0])  # noqa: PTH116 - the quick one, for millions
    except OSError as error:
        return *row, f"cannot be found ({error.strerror})"
    except ValueError:  # "\0", half of a surrogate pair
        return *row, "has no name that a file can have"
    return *row, "" if stat.S_ISREG(status.st_mode) and status.st_size else "is an empty file or none"


def _with_ids(entries: Iterable[dict]) -> Iterator[dict]:
    return ({**entry, "image_id": entry["image"]} for entry in entries)


def _grouped(entries: Iterable[dict]) -> Iterator[dict]:
    captions: dict[str, list[str]] = {}
    for entry in entries:
        captions.setdefault(entry["image"], []).append(entry["caption"])
    return ({"image": image, "caption": texts} for image, texts in captions.items())


TASKS: dict[str, tuple[str, Callable[[Iterable[dict]], Iterable[dict]]]] = {
    "pretrain": ("", iter),
    "retrieval_train": ("_train", _with_ids),
    "retrieval_val": ("_val", _grouped),
    "retrieval_test": ("_test", _grouped),
}
SPLIT_TASKS = {
    "pretrain": "train",
    "retrieval_train": "train",
    "retrieval_val": "val",
    "retrieval_test": "test",
}
