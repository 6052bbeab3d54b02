"""Tells which entries show the same image: by the file that a path leads to, and by the ids that files give.

N entries, of one image each. Paths and ids are compared by 64-bit hashes of theirs, so that millions of
entries take 8 bytes each. A division of the entries into images is an array (N,) that has for each entry the
number of the first one that shows the same image.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from simla.dataset.readers.annotations import Annotations

NO_ID = 0
NO_IDS = (
    "{} entries have no image_id (null or blank), the first is {}: for them the image's path says which it is"
)
SHARED_IDS = (
    "{} image_ids stand for several image files, such as {} for {}: these count as one image, of which no "
    "caption is wrong for another's; unless that is meant, give each image an id of its own"
)
SEVERAL_IDS = (
    "{} images have several image_ids, such as {}: {}: entries of one file count as one image; image_id "
    "numbers images, not captions"
)
ACROSS_FILES = (
    "{} image_ids stand for different images in different files, such as {} for {}: an id counts within its "
    "file, so these are different images"
)


def hash_of(text: str) -> int:
    """Return 64 bits that stand for the text."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def resolved(path: str) -> str:
    """Return the path of the file that this one leads to: absolute, without `..`, links followed."""
    folder, name = os.path.split(path)
    real, links = _folder(folder)
    if name in links or name == os.pardir:
        with suppress(OSError, ValueError):
            return os.path.realpath(path)
    return f"{real.rstrip(os.sep)}{os.sep}{name}"


@lru_cache(1 << 16)
def _folder(path: str) -> tuple[str, frozenset[str]]:
    """Return where it leads to, and which names in it are links: listing a folder once is much faster than
    asking for each of its files.
    """
    with suppress(OSError, ValueError):  # no folder; no name that one can have
        path = os.path.realpath(path)
        with os.scandir(path) as entries:
            return path, frozenset(entry.name for entry in entries if entry.is_symlink())
    return path, frozenset()


def first_equal(values: np.ndarray) -> np.ndarray:
    """Return (N,), of each value the number of the first equal one."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def by_path(entries: Sequence[dict]) -> np.ndarray:
    """Return the division (N,) by the files that the entries' paths lead to."""
    hashes = (hash_of(resolved(entry["images"][0])) for entry in entries)
    return first_equal(np.fromiter(hashes, np.uint64, len(entries)))


class Identities(NamedTuple):
    """A division `first` (N,); `problems` and `notes`: a sentence for each oddity of the ids."""

    first: np.ndarray
    problems: list[str]
    notes: list[str]


def by_path_and_id(entries: Annotations) -> Identities:
    """Return the division by path that also joins what has the same `image_id` in the same file.

    An id that is null, NaN or blank is none. 1.0 is 1, "1" is not.
    """
    paths, ids = (np.empty(len(entries), np.uint64) for _ in range(2))
    for number, entry in enumerate(entries):
        paths[number], ids[number] = hash_of(resolved(entry["images"][0])), _hash_of_id(entry["image_id"])
    has_id, path, id_in_all = ids != NO_ID, first_equal(paths), first_equal(ids)
    path_in_file, id_in_file = np.empty_like(path), np.empty_like(path)
    for start, end in zip([0, *entries.ends], entries.ends, strict=False):
        path_in_file[start:end] = start + first_equal(paths[start:end])
        id_in_file[start:end] = start + first_equal(ids[start:end])
    id_in_file = np.where(has_id, id_in_file, path_in_file)
    is_shared = path[id_in_file] != path
    first = _joined(path, id_in_file) if is_shared.any() else path

    def odd(is_odd: np.ndarray, partner: np.ndarray, field: str, other_field: str, text: str) -> list[str]:
        """Return the text, filled in with how many different partners the odd entries have, what the first of
        these says in the field, and what its partner and itself say in the other one.
        """
        if not is_odd.any():
            return []
        number = int(np.argmax(is_odd))
        pair = entries[int(partner[number])], entries[number]
        both = " and ".join(f"{entry[other_field]!r} ({entry['where']})" for entry in pair)
        return [text.format(f"{len(np.unique(partner[is_odd])):,}", repr(pair[1][field]), both)]

    problems = []
    if not has_id.all():
        where = entries[int(np.argmin(has_id))]["where"]
        problems.append(NO_IDS.format(f"{np.count_nonzero(~has_id):,} of {len(ids):,}", where))
    is_other = has_id & has_id[path_in_file] & (ids[path_in_file] != ids)
    problems += odd(is_shared, id_in_file, "image_id", "image", SHARED_IDS)
    problems += odd(is_other, path_in_file, "image", "image_id", SEVERAL_IDS)
    is_across = has_id & (first[id_in_all] != first)
    return Identities(first, problems, odd(is_across, id_in_all, "image_id", "image", ACROSS_FILES))


def _hash_of_id(value: object) -> int:
    """Return the hash of an id, NO_ID for none."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return NO_ID  # NaN differs from itself
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return hash_of(repr(value))


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the finest division (N,) that joins what either of two does."""
    joined = one
    while True:
        before = joined
        for groups in (other, one):
            least = np.full(len(groups), len(groups))
            np.minimum.at(least, groups, joined)
            joined = least[groups]
        joined = joined[joined]  # two steps at once, then four, ...
        if np.array_equal(joined, before):
            return joined
