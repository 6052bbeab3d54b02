"""Shared by all converters: finding the downloads, listing images, writing entries, the closing report."""

import argparse
import filecmp
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

from simla.dataset.files import other_file
from simla.utils import UserError, atomic_write, log, with_progress

SPLITS = ("train", "val", "test")
NUM_EXAMPLES = 3  # shown of all that is left out for one cause
NUM_CAUSES = 30  # shown one by one, the most frequent ones
NUM_THREADS = 16  # that list folders; they wait for the disk, not for the processor
LOG_FOLDERS = 1000  # between two lines of progress
LOG_ENTRIES = 1_000_000  # likewise
OR_ONLY = "; --only makes some of the sets, without the files of the others"


@dataclass
class Report:
    """Account of a conversion; `str` makes the table that ends it.

    source: paper or page of the official numbers; written: (path, number of entries) of each file; replaced:
    those of them that had other entries before; notes: lines at the end, such as what to set in a config;
    without_images: entries are kept whose image is missing.
    """

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    official: dict[str, int] = field(default_factory=dict)
    source: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    written: list[tuple[Path, int]] = field(default_factory=list)
    replaced: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    without_images: bool = False

    def count(self, what: str, number: int = 1, official: int | None = None) -> None:
        """Add to a line of the table; `official` where the data set's authors give a number."""
        self.counts[what] += number
        if official is not None:
            self.official[what] = official

    def leave_out(self, cause: str, example: str, number: int = 1) -> None:
        """Count what is not written; `cause` says in the plural of what there are `number`."""
        self.left_out[cause] += number
        self._show(cause, [example])

    def notice(self, what: str, example: str, number: int = 1) -> None:
        """Count what is read otherwise than it is written; `what` says in the plural of what `number` are."""
        self.noticed[what] += number
        self._show(what, [example])

    def include(self, other: "Report", prefix: str = "") -> None:
        """Add numbers and causes of the report on a share of the work; `prefix` precedes what it counts."""
        self.counts.update({prefix + what: number for what, number in other.counts.items()})
        self.left_out.update(other.left_out)
        self.noticed.update(other.noticed)
        for what, examples in other.examples.items():
            self._show(what, examples)

    def write(self, path: Path, entries: Iterable) -> int:
        """Write a JSON list, one entry a line, as the entries come, and return their number.

        The file takes its name when it is complete: an earlier one stays until then. Raises UserError where
        there is no entry, or where writing fails.
        """
        number = 0
        with atomic_write(path) as file:
            for number, entry in enumerate(entries, 1):
                file.write((",\n" if number > 1 else "[\n").encode() + json.dumps(entry).encode())
                if number % LOG_ENTRIES == 0:
                    log.info(f"{path}: {number:,} entries")
            if not number:
                causes = "everything was left out, for the causes above" if self.left_out else "there is none"
                raise UserError(
                    f"no entry to write to {path}: {causes}; an earlier file of that name is unchanged"
                )
            file.write(b"\n]\n")
            file.flush()
            if path.exists() and not filecmp.cmp(file.name, path, shallow=False):
                self.replaced.append(path)
        self.written.append((path, number))
        return number

    def _show(self, what: str, examples: list[str]) -> None:
        if len(self.examples[what]) < NUM_EXAMPLES:
            self.examples[what] = list(dict.fromkeys(self.examples[what] + examples))[:NUM_EXAMPLES]

    def __bool__(self) -> bool:
        """Return whether there is anything to tell."""
        return bool(self.counts or self.left_out or self.written)

    def __str__(self) -> str:
        lines = [f"== {self.name}"]
        width = max(map(len, self.counts), default=0)
        if self.counts:
            lines.append(f"  {'':{width}}  {'found':>12}  {'official':>12}")
        for what, number in self.counts.items():
            official = self.official.get(what)
            known = "-" if official is None else f"{official:,}"
            differs = "" if official in (None, number) else f"  differs by {number - official:+,}"
            lines.append(f"  {what:{width}}  {number:>12,}  {known:>12}{differs}")
        lines += [f"  official numbers: {self.source}"] if self.source else []
        lines += ["noticed:", *self._table(self.noticed)] if self.noticed else []
        lines += ["left out:" + ("" if self.left_out else " nothing"), *self._table(self.left_out)]
        lines.append("written:" + ("" if self.written else " nothing"))
        lines += [f"  {number:>12,}  entries in {path}" for path, number in self.written]
        if self.replaced:
            names = ", ".join(path.name for path in self.replaced)
            is_scored = any(path.stem.endswith(("_val", "_test")) for path in self.replaced)
            leak = "; a model that was trained by the old files may have seen images of the new val and test"
            lines.append(f"replaced, with other entries than before: {names}" + leak * is_scored)
        return "\n".join([*lines, *self.notes])

    def _table(self, counter: Counter[str]) -> Iterator[str]:
        causes = counter.most_common()
        for cause, number in causes[:NUM_CAUSES]:
            yield f"  {number:>12,}  {cause}; first: {', '.join(self.examples[cause])}"
        if rest := causes[NUM_CAUSES:]:
            yield f"  {sum(number for _, number in rest):>12,}  for {len(rest)} rarer causes"


# ---- the downloads ----


def find_all(
    root: Path, source: str, wanted: dict[str, list[str]], images: dict[str, list[str]], report: Report
) -> dict[str, Path]:
    """Return the first path that exists of each entry's patterns (relative to `root`, see Path.glob).

    wanted: what it is -> where it may lie; images: likewise of the folders of images, for which the first
    pattern stands where none exists and the report says that images may be missing; source: where to get it.
    Raises UserError that names all that is missing, where it was looked for, and where to get it.
    """
    patterns = wanted | images
    paths = {what: find(root, patterns[what]) for what in patterns}
    if report.without_images:
        paths |= {what: paths[what] or root / images[what][0] for what in images}
    if missing := [what for what, path in paths.items() if path is None]:
        places = "; ".join(f"{what} (looked for {' and '.join(patterns[what])})" for what in missing)
        hint = "; --without_images goes on without images" if set(missing) & set(images) else ""
        raise UserError(f"missing in --root {root}: {places}. To be had from {source}{hint}")
    return paths


def find(root: Path, patterns: list[str]) -> Path | None:
    """Return the first path that exists, None where there is none."""
    return next((path for pattern in patterns for path in sorted(root.glob(pattern))), None)


def read_source(path: Path) -> list | dict:
    """Return the content of a downloaded JSON file; raise UserError where it is damaged."""
    try:
        with path.open("rb") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        if what := other_file(path):
            raise UserError(f"{path} is {what}") from error
        raise UserError(f"{path} cannot be read ({error}); download or unpack it again") from error


class Images:
    """The images below a folder, which is listed once; those that are missing or empty are reported.

    Raises UserError where the folder cannot be listed; without images it need not be there.
    """

    def __init__(self, folder: Path, report: Report, what: str = "entries whose image is"):
        self.folder, self.report, self.what = folder, report, what
        is_listed = folder.is_dir() or not report.without_images
        self.files, self.empty = list_files(folder) if is_listed else (set(), set())

    def has(self, *names: str, number: int = 1) -> bool:
        """Return whether an entry with these images, relative to the folder, is to be written.

        Where one is missing, `number` of `what` are reported: as left out, or without images as kept.
        """
        missing = next((name for name in names if name not in self.files), None)
        if missing is None:
            return True
        cause = f"{self.what} {'an empty file' if missing in self.empty else f'not in {self.folder}'}"
        if self.report.without_images:
            self.report.notice(f"{cause}, kept by --without_images", missing, number)
        else:
            self.report.leave_out(cause, missing, number)
        return self.report.without_images


def list_files(folder: Path) -> tuple[set[str], set[str]]:
    """Return the paths, relative to the folder, of all files that hold something, and of all empty ones.

    Links are followed. Raises UserError where a folder cannot be listed.
    """
    files, empty, level = set(), set(), [""]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while level:
            listed = pool.map(partial(list_folder, folder), level)
            listed = with_progress(listed, len(level), f"Listing {folder}", LOG_FOLDERS)
            level = []
            for some_files, some_empty, subfolders in listed:
                files.update(some_files)
                empty.update(some_empty)
                level += subfolders
    log.info(f"{folder}: {len(files):,} files")
    return files, empty


def list_folder(folder: Path, subfolder: str) -> tuple[list[str], list[str], list[str]]:
    """Return the files, empty files and subfolders of one subfolder, as paths relative to `folder`.

    Raises UserError where it cannot be listed.
    """
    files, empty, subfolders = [], [], []
    try:
        with os.scandir(folder / subfolder) as entries:
            for entry in entries:
                name = f"{subfolder}/{entry.name}" if subfolder else entry.name
                if entry.is_dir():
                    subfolders.append(name)
                elif entry.is_file():
                    (files if entry.stat().st_size else empty).append(name)
    except OSError as error:
        raise UserError(f"the images' folder {folder} cannot be listed: {error}") from error
    return files, empty, subfolders


def in_parallel(function: Callable, items: Iterable, num_ahead: int) -> Iterator:
    """Yield function(item) of each in order; threads compute at most `num_ahead` before they are taken."""
    items = iter(items)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while batch := list(islice(items, num_ahead)):
            yield from pool.map(function, batch)


# ---- splits ----


def split_by_shares(shares: str, seed: int, others: str = "") -> Callable[[str], str]:
    """Return the function that draws train, val or test for an image by its name, seed and nothing else.

    shares: of the three in percent, "80/10/10"; raises UserError where they are none, and then names `others`
    that --split takes.
    """
    match = re.fullmatch(r"(\d+)/(\d+)/(\d+)", shares)
    train, val, test = map(int, match.groups()) if match else (0, 0, 0)
    if train + val + test != 100 or not all((train, val, test)):
        raise UserError(
            f"--split {shares}: must be {others}the shares of train, val and test in percent, whole "
            "numbers above 0 that sum to 100, such as 80/10/10"
        )

    def split_of(name: str) -> str:
        digest = sha256(f"{seed} {name}".encode(errors="surrogatepass")).digest()
        percent = int.from_bytes(digest[:8], "big") % 100
        return "train" if percent < train else "val" if percent < train + val else "test"

    return split_of


# ---- flags ----


def add_without_images(parser: argparse.ArgumentParser) -> None:
    """Add the flag of converters that look for images, which the report answers to."""
    parser.add_argument(
        "--without_images",
        action="store_true",
        help="write all entries, whether or not their image is there (yet); it is named where this help says "
        "that images lie, and the account says how many are missing",
    )


def add_only(parser: argparse.ArgumentParser) -> None:
    """Add the flag of converters of several sets, which `sets_to_make` reads."""
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="SET", help="make these alone, such as val (all)"
    )


def sets_to_make(options: argparse.Namespace, sets: Iterable[str], report: Report) -> list[str]:
    """Return those of the sets that --only names, all without it, and note which are not made.

    Raises UserError for a name that is no set's.
    """
    known, only = list(sets), options.only
    if only is None:
        return known
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only {unknown[0]}: there is no such set, but {', '.join(known)}")
    if others := [name for name in known if name not in only]:
        report.notes.append(f"not made, as --only says: {', '.join(others)}")
    return [name for name in known if name in only]


def add_relative(parser: argparse.ArgumentParser) -> None:
    """Add the flag of converters that write pre-training files."""
    parser.add_argument(
        "--relative",
        action="store_true",
        help="write image paths relative to --root, not absolute ones: for a config whose image_root is "
        "--root, or, without one, for --out the same as --root",
    )


def add_name(parser: argparse.ArgumentParser) -> None:
    """Add the flag of converters that name their file by it."""
    parser.add_argument(
        "--name", dest="stem", type=_name, default="pairs", help="of the file; default: %(default)s"
    )


def _name(text: str) -> str:
    if text != Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} must be a name alone; --out names the folder")
    return text


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add the flag of converters that divide images by `split_by_shares`."""
    parser.add_argument("--seed", type=int, default=0, help="of --split by shares; default: %(default)s")


def prefix(folder: Path, root: Path, options: argparse.Namespace) -> str:
    """Return what precedes the names of the folder's images in a pre-training file."""
    if not options.relative:
        return f"{folder}/"
    relative = os.path.relpath(folder, root)
    return "" if relative == "." else f"{relative}/"
