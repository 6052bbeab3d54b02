"""Which files of a folder are images: by their content, whatever they are called, through links too."""

import os
from collections import Counter, deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from dataset.transforms import FORMATS
from utils import log

# Files of these endings are listed without a look: what is none of them that can be read has to be named.
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# What PIL recognises and cannot read: films, and formats that other programs would have to read for it.
PICTURES = [name for name in FORMATS if name not in ("MPEG", "WMF", "BUFR", "GRIB", "HDF5")]
LOG_FILES = 10_000  # between two lines of progress
MAX_ENDING = 6  # characters, the dot included; longer ones say nothing

AGAIN = "links to what is there already"
NOWHERE = "links to nothing"
SPECIAL = "pipes, sockets or devices"


class Listing(NamedTuple):
    """files: absolute paths, sorted; passed_over: cause -> number of files and folders."""

    files: list[str]
    passed_over: dict[str, int]


def list_images(folder: Path, known: Collection[str] = ()) -> Listing:
    """Returns the images of a folder and its subfolders, each file once; `known` ones without a look at them.

    What is no image to PIL by its first bytes, and has no ending of one, is passed over. No pipe or device is
    opened. Links to files and folders are followed, but not to a folder that they lie in.
    """
    files, seen, passed_over = [], set(), Counter()
    for number, (path, real, is_link) in enumerate(_files(folder, passed_over), 1):
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
    """Returns what was passed over in words, "" for nothing."""
    causes = ", ".join(f"{number} {cause}" for cause, number in passed_over.items())
    return f"passed over: {causes}" if causes else ""


def is_picture(path: str) -> bool:
    """Whether PIL takes the file for an image, of which no more than the header is read. Raises OSError."""
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


def _files(folder: Path, passed_over: Counter[str]) -> Iterator[tuple[str, str, bool]]:
    """Yields the files below the folder: their path, the same without links, whether the file is a link.

    Links come when all that lies in the folder itself is done.
    """
    folders, links = deque([(str(folder), os.path.realpath(folder))]), deque()
    entered = set()
    while folders or links:
        if not folders:
            path, place = links.popleft()
            real = os.path.realpath(path)
            if Path(real).is_dir():
                if real in entered or f"{place}/".startswith(f"{real.rstrip('/')}/"):
                    passed_over[AGAIN] += 1
                else:
                    folders.append((path, real))
            elif Path(real).is_file():
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
                folders.append((entry.path, f"{real}/{entry.name}"))
            elif entry.is_file():
                yield entry.path, f"{real}/{entry.name}", False
            else:
                passed_over[SPECIAL] += 1
