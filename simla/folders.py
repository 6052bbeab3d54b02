"""Finds the images of a folder: by their content, whatever they are called, through links too.

What programs keep for themselves, such as thumbnails and what was thrown away, goes by its name.
"""

import os
from collections import Counter, deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from simla.dataset.images import FORMATS
from simla.utils import log

# Files of these endings are listed without a look: what is none of them that can be read has to be named.
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# What PIL recognises and cannot read: films, and formats that other programs would have to read for it.
PICTURES = [name for name in FORMATS if name not in ("MPEG", "WMF", "BUFR", "GRIB", "HDF5")]
LOG_FILES = 10_000  # between two lines of progress
MAX_ENDING = 6  # characters, the dot included; longer ones say nothing

# Of file managers, network drives and systems, in lower case; beside folders that begin with a dot.
WASTE_FOLDERS = {"@eadir", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}
WASTE_FOLDERS |= {"$recycle.bin", "recycler", "recycled", "system volume information"}
WASTE_FOLDERS |= {"lost+found", "__macosx", "network trash folder", "temporary items"}
WASTE_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", ".ds_store"}
WASTE_BEGINNINGS = ("._", ".trashed-", ".pending-")  # of files: macOS on foreign disks, Android

HIDDEN = "hidden folders"
AGAIN = "links to what is there already"
NOWHERE = "links to nothing"
SPECIAL = "pipes, sockets or devices"


class Listing(NamedTuple):
    """files: absolute paths, sorted; passed_over: cause -> number of files and folders."""

    files: list[str]
    passed_over: dict[str, int]


def list_images(folder: Path, known: Collection[str] = (), everything: bool = False) -> Listing:
    """Return the images of a folder and its subfolders, each file once; `known` ones without a look at them.

    What is no image to PIL by its first bytes, and has no ending of one, is passed over. No pipe or device is
    opened. Links to files and folders are followed, but not to a folder that they lie in. everything: hidden
    folders, thumbnails and waste, too.
    """
    files, seen, passed_over = [], set(), Counter()
    for number, (path, real, is_link) in enumerate(_files(folder, passed_over, everything), 1):
        if number % LOG_FILES == 0:
            log.info(f"{folder}: {number} files looked at, {len(files)} images")
        if real in seen:
            passed_over[AGAIN] += is_link
            continue
        seen.add(real)
        ending = Path(path).suffix.lower()
        try:
            if path in known or ending in SUFFIXES or is_picture(path):
                files.append(path)
            else:
                is_word = 1 < len(ending) <= MAX_ENDING and not ending[1:].isdigit()
                passed_over[f"files that are no images ({ending if is_word else 'other endings'})"] += 1
        except OSError as error:
            passed_over[f"files that cannot be opened ({error.strerror})"] += 1
    return Listing(sorted(files, key=lambda path: Path(path).parts), dict(passed_over.most_common()))


def describe(passed_over: dict[str, int]) -> str:
    """Return what was passed over in words, "" for nothing."""
    causes = ", ".join(f"{number} {cause}" for cause, number in passed_over.items())
    return f"passed over: {causes}" if causes else ""


def waste(name: str, is_folder: bool) -> str:
    """Return what kind of hidden folder, thumbnails or waste has such a name, "" for anything else."""
    if is_folder:
        is_waste = name.lower() in WASTE_FOLDERS
        return f"folders named {name}" if is_waste else HIDDEN if name.startswith(".") else ""
    for beginning in WASTE_BEGINNINGS:
        if name.startswith(beginning):
            return f"files named {beginning}..."
    return f"files named {name}" if name.lower() in WASTE_FILES else ""


def is_picture(path: str) -> bool:
    """Return whether PIL takes the file for an image, of which no more than the header is read. Raises
    OSError.
    """
    try:
        with Path(path).open("rb") as file, Image.open(file, formats=PICTURES):
            return True
    except UnidentifiedImageError:
        return False
    except OSError as error:
        if error.errno is None:  # of a decoder
            return True
        raise
    except Exception:  # an image with something wrong, which whoever loads it will name
        return True


def _files(folder: Path, passed_over: Counter[str], everything: bool) -> Iterator[tuple[str, str, bool]]:
    """Yield the files below the folder: their path, the same without links, whether the file is a link.

    Links come when all that lies in the folder itself is done. everything: see `list_images`.
    """

    def is_searched(path: str, is_folder: bool) -> bool:
        cause = "" if everything else waste(Path(path).name, is_folder)
        if cause:
            passed_over[cause] += 1
        return not cause

    folders, links = deque([(str(folder), os.path.realpath(folder))]), deque()
    entered = set()
    while folders or links:
        if not folders:
            path, parent = links.popleft()
            real = os.path.realpath(path)
            if Path(real).is_dir():
                if real in entered or f"{parent}/".startswith(f"{real.rstrip('/')}/"):
                    passed_over[AGAIN] += 1
                elif is_searched(path, is_folder=True):
                    folders.append((path, real))
            elif Path(real).is_file():
                if is_searched(path, is_folder=False):
                    yield path, real, True
            else:
                passed_over[SPECIAL if Path(real).exists() else NOWHERE] += 1
            continue
        path, real = folders.popleft()
        if real in entered:
            continue
        entered.add(real)
        try:
            with os.scandir(path) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            passed_over[f"folders that cannot be entered ({error.strerror})"] += 1
            continue
        for entry in entries:
            if entry.is_symlink():
                links.append((entry.path, real))
            elif entry.is_dir():
                if is_searched(entry.path, is_folder=True):
                    folders.append((entry.path, f"{real}/{entry.name}"))
            elif entry.is_file():
                if is_searched(entry.path, is_folder=False):
                    yield entry.path, f"{real}/{entry.name}", False
            else:
                passed_over[SPECIAL] += 1
