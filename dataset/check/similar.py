"""Image files that are the same as another, or show the same, within the training data and across splits."""

import numpy as np

from simla.dataset.check.causes import Cause
from simla.dataset.check.images import Images

MAX_DISTANCE = 3  # bits of 64 in which the hashes of pictures that look alike may differ
BAND_BITS = 16  # of four bands of the hash one is equal wherever at most MAX_DISTANCE bits differ
MAX_NEIGHBOURS = 512  # a hash is compared with so many of those that share a band with it, at most
NONE = np.iinfo(np.int64).max  # for no file; larger than all indices, so that a minimum passes over it
ONES = np.array([number.bit_count() for number in range(1 << BAND_BITS)], np.uint8)


class Similar:
    """Flags of the U files, which show that they are like another.

    flags: (U,) for entries of any split; train_flags: (U,) for training entries only; twins: cause -> (U,)
    the file that each is like, or NONE.
    """

    def __init__(self, images: Images, is_training: np.ndarray, is_evaluation: np.ndarray):
        """is_training, is_evaluation: (U,) whether a training entry (one of another split) names the file."""
        files = np.arange(len(images.records))
        self.flags, self.train_flags = (np.zeros(len(files), np.uint16) for _ in range(2))
        self.twins: dict[Cause, np.ndarray] = {}
        has_content, of_content = images.records["content"] != 0, _groups(images.records["content"])
        same = _first_other(of_content, has_content)
        self._add(Cause.SAME_CONTENT_AS_ANOTHER_FILE, same, self.flags)
        evaluated = _first(of_content, is_evaluation & has_content)[of_content]
        evaluated = np.where(is_training, np.where(is_evaluation, files, evaluated), NONE)
        self._add(Cause.IMAGE_OF_AN_EVALUATION_SPLIT, evaluated, self.train_flags)

        looks, of_look = np.unique(images.records["look"], return_inverse=True)
        has_look = images.records["look"] != 0
        pairs = near_pairs(looks[looks != 0]) + int((looks == 0).any())
        alike = _or_near(_first_other(of_look, has_look, of_content), of_look, pairs, has_look)
        alike = np.where(same == NONE, alike, NONE)
        self._add(Cause.LOOKS_LIKE_ANOTHER_IMAGE, alike, self.flags)
        counts = is_evaluation & has_look
        alike = _or_near(_first(of_look, counts)[of_look], of_look, pairs, counts)
        alike = np.where(is_training & (evaluated == NONE), alike, NONE)
        self._add(Cause.LOOKS_LIKE_AN_EVALUATION_IMAGE, alike, self.train_flags)

    def _add(self, cause: Cause, twin: np.ndarray, flags: np.ndarray) -> None:
        self.twins[cause] = twin
        flags[twin != NONE] |= np.uint16(cause)


def _groups(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def _first(groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the first file of each of the G groups that counts, (G,)."""
    first = np.full(groups.max(initial=0) + 1, NONE)
    np.minimum.at(first, groups[counts], np.flatnonzero(counts))
    return first


def _first_other(groups: np.ndarray, counts: np.ndarray, unlike: np.ndarray | None = None) -> np.ndarray:
    """Return of files that count the first other one in the group (that is not in its group `unlike`), (U,).

    The first itself has none: one of every group is no repetition.
    """
    first, files = np.where(counts, _first(groups, counts)[groups], NONE), np.arange(len(groups))
    other = np.where(first == NONE, files, first)
    is_same = other == files if unlike is None else unlike[other] == unlike
    return np.where(is_same, NONE, first)


def _or_near(files: np.ndarray, groups: np.ndarray, pairs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return `files`, and where one is NONE, a file that counts, of a group paired with its own, (U,)."""
    first = _first(groups, counts)
    near = np.full_like(first, NONE)
    for one, other in (pairs.T, pairs.T[::-1]):
        np.minimum.at(near, one, first[other])
    return np.where(files == NONE, near[groups], files)


def near_pairs(hashes: np.ndarray) -> np.ndarray:
    """Return pairs (P, 2) of indices of sorted, different 64-bit hashes that differ in <= MAX_DISTANCE bits.

    Compared are hashes that share one of four bands of 16 bits, as all such pairs do, with at most
    MAX_NEIGHBOURS others each: where more share a band, pairs that are far apart in their order are missed.
    """
    pairs = [np.zeros((0, 2), np.int64)]
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
            pairs.append(np.sort(np.stack([order[close], order[close + step]], 1), axis=1))
    return np.unique(np.concatenate(pairs), axis=0)
