"""What all converters share: finding the downloads, which images are there, writing, the closing report."""

import argparse
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

from simla.dataset.prepare.captions import is_missing, kind_of, values_of
from simla.utils import UserError, atomic_write, log, other_file

NUM_EXAMPLES = 3  # shown of all that is left out for one cause
NUM_CAUSES = 30  # shown one by one, the most frequent ones
NUM_THREADS = 16  # that list folders; they wait for the disk, not for the processor
LOG_ENTRIES = 1_000_000  # between two lines of progress


class Report:
    """What a conversion found, left out and wrote; `str` is the table that ends it."""

    def __init__(self, name: str):
        self.name = name
        self.counts: list[tuple[str, int, int | None]] = []
        self.sources: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.noticed: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.written: list[tuple[Path, int]] = []
        self.notes: list[str] = []

    def count(self, what: str, found: int, official: int | None = None) -> None:
        """A line of the table; `official` where the data set's authors give a number."""
        self.counts.append((what, found, official))

    def source(self, text: str) -> None:
        """Where official numbers come from: paper or page."""
        self.sources.append(text)

    def leave_out(self, cause: str, example: str, number: int = 1) -> None:
        """To be called for everything that is not written; the cause says of what there are `number`."""
        self.left_out[cause] += number
        self._show(cause, example)

    def notice(self, what: str, example: str) -> None:
        """To be called for everything that is read otherwise than it is written; `what`, in the plural."""
        self.noticed[what] += 1
        self._show(what, example)

    def _show(self, what: str, example: str) -> None:
        if len(self.examples[what]) < NUM_EXAMPLES and example not in self.examples[what]:
            self.examples[what].append(example)

    def include(self, other: "Report") -> None:
        """Adds what another one, of a part of the work, has noticed and left out."""
        self.left_out.update(other.left_out)
        self.noticed.update(other.noticed)
        for what, examples in other.examples.items():
            for example in examples:
                self._show(what, example)

    def note(self, text: str) -> None:
        """A line at the end: what to set in a config, for example."""
        self.notes.append(text)

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.counts or self.left_out or self.written)

    def __str__(self) -> str:
        lines = [f"== {self.name}"]
        width = max((len(what) for what, _, _ in self.counts), default=0)
        if self.counts:
            lines.append(f"  {'':{width}}  {'found':>12}  {'official':>12}")
        for what, found, official in self.counts:
            known = "-" if official is None else f"{official:,}"
            differs = "" if official in (None, found) else f"  differs by {found - official:+,}"
            lines.append(f"  {what:{width}}  {found:>12,}  {known:>12}{differs}")
        lines += [f"  official numbers: {source}" for source in self.sources]
        lines += ["noticed:", *self._table(self.noticed)] if self.noticed else []
        lines += ["left out:" + ("" if self.left_out else " nothing"), *self._table(self.left_out)]
        lines.append("written:" + ("" if self.written else " nothing"))
        lines += [f"  {number:>12,}  entries in {path}" for path, number in self.written]
        return "\n".join([*lines, *self.notes])

    def _table(self, counter: Counter[str]) -> Iterator[str]:
        causes = counter.most_common()
        for cause, number in causes[:NUM_CAUSES]:
            yield f"  {number:>12,}  {cause}; first: {', '.join(self.examples[cause])}"
        if rest := causes[NUM_CAUSES:]:
            yield f"  {sum(number for _, number in rest):>12,}  for {len(rest)} rarer causes"


# ---- the downloads ----


def find_all(root: Path, source: str, wanted: dict[str, list[str]]) -> dict[str, Path]:
    """The first that exists of each entry's patterns (relative to `root`, as of Path.glob).

    wanted: what it is -> where it may lie, the usual place first; source: where to get it. UserError that
    names all that is missing, where it was looked for, and where to get it.
    """
    found = {what: find(root, patterns) for what, patterns in wanted.items()}
    missing = [what for what, path in found.items() if path is None]
    if missing:
        places = "; ".join(f"{what} (looked for {' and '.join(wanted[what])})" for what in missing)
        raise UserError(f"missing in --root {root}: {places}. To be had from {source}")
    return found


def find(root: Path, patterns: list[str]) -> Path | None:
    """The first that exists; None where none does."""
    return next((path for pattern in patterns for path in sorted(root.glob(pattern))), None)


def read_source(path: Path) -> list | dict:
    """A downloaded JSON file; UserError where it is damaged, for example cut short."""
    try:
        with path.open("rb") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        if what := other_file(path):
            raise UserError(f"{path} is {what}") from error
        raise UserError(f"{path} cannot be read ({error}); download or unpack it again") from error


class Images:
    """The images below a folder, which is listed once, its subfolders in parallel.

    What is not there, or an empty file, is reported as left out. Raises UserError where the folder is none.
    """

    def __init__(self, folder: Path, report: Report, what: str = "entries whose image is"):
        self.folder, self.report, self.what = folder, report, what
        self.files, self.empty = list_files(folder)

    def has(self, name: str, number: int = 1) -> bool:
        """name: relative to the folder; number: how many (of `what`) are left out where it is missing."""
        if name in self.files:
            return True
        problem = "an empty file" if name in self.empty else f"not in {self.folder}"
        self.report.leave_out(f"{self.what} {problem}", name, number)
        return False


def list_files(folder: Path) -> tuple[set[str], set[str]]:
    """Paths, relative to the folder, of all files that hold something, and of all that are empty.

    Links are followed. Raises UserError where a folder cannot be listed.
    """
    files: set[str] = set()
    empty: set[str] = set()
    num_folders, num_shown = 0, 0
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        running: set[Future] = {pool.submit(list_folder, folder, "")}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    found, found_empty, subfolders = future.result()
                except UserError:
                    pool.shutdown(cancel_futures=True)
                    raise
                files.update(found)
                empty.update(found_empty)
                running |= {pool.submit(list_folder, folder, subfolder) for subfolder in subfolders}
                num_folders += 1
            if len(files) // LOG_ENTRIES > num_shown or not running:
                num_shown = len(files) // LOG_ENTRIES
                log.info(f"{folder}: {len(files):,} files in {num_folders:,} folders")
    return files, empty


def list_folder(folder: Path, subfolder: str) -> tuple[list[str], list[str], list[str]]:
    """Of one folder alone: files, empty files and subfolders, as paths relative to `folder`.

    Raises UserError where it cannot be listed.
    """
    files, empty, subfolders = [], [], []
    try:
        with os.scandir(folder / subfolder) as items:
            for item in items:
                name = f"{subfolder}/{item.name}" if subfolder else item.name
                if item.is_dir():
                    subfolders.append(name)
                elif item.is_file():
                    (files if item.stat().st_size else empty).append(name)
    except OSError as error:
        raise UserError(f"the images' folder {folder} cannot be listed: {error}") from error
    return files, empty, subfolders


def in_parallel(function: Callable, items: Iterable, num_ahead: int) -> Iterator:
    """function(item) of each, in order, by threads, at most `num_ahead` of them waiting to be taken."""
    items = iter(items)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while batch := list(islice(items, num_ahead)):
            yield from pool.map(function, batch)


# ---- the annotation files ----


def write_annotations(path: Path, entries: Iterable[dict], report: Report) -> int:
    """Writes a JSON list, one entry a line, as the entries come, and returns their number.

    The file takes its name when it is complete: an earlier one stays until then, and whenever anything goes
    wrong. Raises UserError where there is no entry, or where writing fails.
    """
    number = 0
    with atomic_write(path) as file:
        for entry in entries:
            file.write((",\n" if number else "[\n").encode() + json.dumps(entry).encode())
            number += 1
            if number % LOG_ENTRIES == 0:
                log.info(f"{path}: {number:,} entries")
        if not number:
            causes = "everything was left out, for the causes above" if report.left_out else "there is none"
            raise UserError(
                f"no entry to write to {path}: {causes}; an earlier file of that name is unchanged"
            )
        file.write(b"\n]\n")
    report.written.append((path, number))
    return number


def values_in(cell: object, where: str, report: Report) -> list[object]:
    """What the cell holds, of a list each part; a list that is written as text is reported as noticed."""
    values, was_text = values_of(cell)
    if was_text:
        report.notice("lists written as text, read as several captions", where)
    return values


def captions_in(cell: object, where: str, report: Report) -> Iterator[str]:
    """The captions that the cell holds; what is none is reported as left out."""
    for value in values_in(cell, where, report):
        if is_missing(value):
            report.leave_out("pairs without a caption", where)
        elif not isinstance(value, str):
            report.leave_out(f"captions that are no text but {kind_of(value)}", where)
        else:
            text = value.strip()
            if text.startswith("[") and text.endswith("]"):
                report.notice("captions in square brackets that are no list of strings, read as text", where)
            yield text


def pairs(rows: Iterable[tuple[str, object]], start: str, report: Report) -> Iterator[dict]:
    """Pre-training entries of image names and cells that hold their captions; `start` precedes the names, as
    of `prefix`.
    """
    for name, cell in rows:
        yield from ({"image": start + name, "caption": text} for text in captions_in(cell, name, report))


def add_relative(parser: argparse.ArgumentParser) -> None:
    """The flag of converters that write pre-training files."""
    parser.add_argument(
        "--relative",
        action="store_true",
        help="write image paths relative to --root, not absolute ones: for a config whose image_root is "
        "--root, or, without one, for --out the same as --root",
    )


def prefix(folder: Path, root: Path, options: argparse.Namespace) -> str:
    """What precedes an image's name in the folder where it is written in a pre-training file."""
    if not options.relative:
        return f"{folder}/"
    relative = os.path.relpath(folder, root)
    return "" if relative == "." else f"{relative}/"
