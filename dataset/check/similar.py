"""Which image files are the same as another, or show the same, within the training data and across splits."""

import numpy as np

from simla.dataset.check.causes import Cause
from simla.dataset.check.images import Images

MAX_DISTANCE = 3  # bits of 64 in which the hashes of pictures that look alike may differ
BAND_BITS = 16  # of four bands of the hash one is equal wherever at most MAX_DISTANCE bits differ
MAX_NEIGHBOURS = 512  # a hash is compared with so many of those that share a band with it, at most
NONE = -1
ONES = np.array([number.bit_count() for number in range(1 << BAND_BITS)], np.uint8)


class Similar:
    """Of the U files: flags (U,) for entries of any split, train_flags (U,) for training entries only, and
    `twins`, cause -> (U,) the file that each is like, or -1.
    """

    def __init__(self, images: Images, is_training: np.ndarray, is_evaluation: np.ndarray):
        """is_training, is_evaluation: (U,) whether a training entry (one of another split) names the file."""
        num = len(images.records)
        self.flags, self.train_flags = np.zeros(num, np.uint16), np.zeros(num, np.uint16)
        self.twins: dict[Cause, np.ndarray] = {}
        content, look = images.records["content"], images.records["look"]
        eval_only = np.where(is_evaluation, np.arange(num), NONE)

        groups = _groups(content)
        twin = _first_other(groups, content != 0)
        self._add(Cause.SAME_CONTENT_AS_ANOTHER_FILE, twin, self.flags)
        twin = np.where(is_evaluation, eval_only, _first_of(groups, is_evaluation & (content != 0)))
        self._add(Cause.IMAGE_OF_AN_EVALUATION_SPLIT, np.where(is_training, twin, NONE), self.train_flags)

        looks, of_look = np.unique(look, return_inverse=True)
        pairs = near_pairs(looks[looks != 0]) + int((looks == 0).any())
        alike = _with_neighbours(_first_other(of_look, look != 0, groups), of_look, pairs, look != 0)
        self._add(
            Cause.LOOKS_LIKE_ANOTHER_IMAGE,
            np.where(self.flags & Cause.SAME_CONTENT_AS_ANOTHER_FILE, NONE, alike),
            self.flags,
        )
        first_evaluation = _first_of(of_look, is_evaluation & (look != 0))
        alike = _with_neighbours(first_evaluation, of_look, pairs, is_evaluation & (look != 0))
        is_other = is_training & (self.twins[Cause.IMAGE_OF_AN_EVALUATION_SPLIT] == NONE)
        self._add(Cause.LOOKS_LIKE_AN_EVALUATION_IMAGE, np.where(is_other, alike, NONE), self.train_flags)

    def _add(self, cause: Cause, twin: np.ndarray, flags: np.ndarray) -> None:
        self.twins[cause] = twin
        flags[twin != NONE] |= np.uint16(cause)


def _groups(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def _first_of(groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(U,) the first file of each one's group that counts, or -1."""
    first = np.full(groups.max(initial=0) + 1, len(groups))
    np.minimum.at(first, groups[counts], np.flatnonzero(counts))
    found = first[groups]
    return np.where(found == len(groups), NONE, found)


def _first_other(groups: np.ndarray, counts: np.ndarray, unlike: np.ndarray | None = None) -> np.ndarray:
    """(U,) of files that count the first other one in the group (that is not in its group `unlike`), or -1.

    The first itself has none: one of every group is no repetition.
    """
    found = np.where(counts, _first_of(groups, counts), NONE)
    own = np.arange(len(groups))
    is_same = found == own if unlike is None else (found == own) | (unlike[found] == unlike)
    return np.where(is_same, NONE, found)


def _with_neighbours(
    found: np.ndarray, groups: np.ndarray, pairs: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """`found`, and where that is -1, a file that counts, of a group paired with the file's own."""
    if not len(pairs):
        return found
    num_groups = groups.max() + 1
    first = np.full(num_groups, len(groups))
    np.minimum.at(first, groups[counts], np.flatnonzero(counts))
    near = np.full(num_groups, len(groups))
    for one, other in (pairs.T, pairs.T[::-1]):
        np.minimum.at(near, one, first[other])
    near = np.where(near == len(groups), NONE, near)[groups]
    return np.where(found == NONE, near, found)


def near_pairs(hashes: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of the places of sorted, different 64-bit hashes that differ in at most MAX_DISTANCE bits.

    Compared are hashes that share one of four bands of 16 bits, as all such pairs do, with at most
    MAX_NEIGHBOURS others each: where more share a band, pairs that are far apart in their order are missed.
    """
    found = [np.zeros((0, 2), np.int64)]
    for shift in range(0, 64, BAND_BITS):
        bands = (hashes >> np.uint64(shift)).astype(np.uint16)
        order = np.argsort(bands, kind="stable")
        bands, ordered = bands[order], hashes[order]
        for step in range(1, min(MAX_NEIGHBOURS, len(hashes) - 1) + 1):
            shares = np.flatnonzero(bands[step:] == bands[:-step])
            if not len(shares):
                break
            differing = ordered[shares + step] ^ ordered[shares]
            distance = ONES[differing.view(np.uint16).reshape(-1, 4)].sum(1)
            close = shares[distance <= MAX_DISTANCE]
            found.append(np.sort(np.stack([order[close], order[close + step]], 1), axis=1))
    return np.unique(np.concatenate(found), axis=0)
