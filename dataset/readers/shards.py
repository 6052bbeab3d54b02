"""Image-caption pairs in WebDataset shards, as a sequence: tar files of KEY.jpg (png, webp, ...) with KEY.txt
or KEY.json, as img2dataset writes them.

Local shards are read in place, any sample at any time. Others (URLs, `pipe:`) are fetched as a whole into a
nameless file when the first of their samples is asked for, and given up a few shards later: they want to be
read shard by shard.
"""

import json
import re
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import fsspec

from simla.dataset.images import BadImage
from simla.dataset.readers.shard_index import Shard, open_shards, passed_over_lines
from simla.dataset.readers.shard_stream import Fetch, count_samples
from simla.utils import UserError, fill_in, first_line, is_url

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
TAR = re.compile(r"\.(tar(\.(gz|bz2|xz|zst|lz4|z))?|t[gbx]z)$", re.IGNORECASE)
KEPT_OPEN = 3  # fetched shards of a set, in each process: the one in use, the next, that of replacements


class Shards(Sequence):
    """The samples of shards that are all local, or all not (`is_stream`), as entries for training.

    sizes: samples of each shard. Of a stream they may be given: a shard that turns out to have more gives
    others in the next pass, at index + len; of one that has fewer some are taken again. An entry raises
    `BadImage` for a sample without image or caption, and for a shard that cannot be had. UserError for local
    shards that are not there.
    """

    def __init__(self, names: list[str], sizes: list[int] | None = None):
        self.names, self.is_stream = names, is_url(names[0])
        self.local = None if self.is_stream else open_shards(names)
        self.sizes = list(map(len, self.local)) if self.local else sizes or count_samples(names)
        self.ends = list(accumulate(self.sizes))
        self.fetched: OrderedDict[int, Fetch] = OrderedDict()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        number_of_pass, index = divmod(index, len(self)) if self.is_stream else (0, index)
        number = bisect_right(self.ends, index)
        shard = self.local[number] if self.local else self._fetch(number).result()
        if not len(shard):
            raise BadImage(shard.name, "no samples")
        size = self.sizes[number]
        return shard.entry((index - self.ends[number] + size + number_of_pass * size) % len(shard))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "fetched": OrderedDict()}

    def passed_over(self) -> Counter[str]:
        """Return the number of members of local shards that are in no sample, by cause."""
        return sum((Counter(shard.counts()) for shard in self.local or ()), Counter())

    def passed_over_beside(self, index: int) -> dict[str, dict[str, int]]:
        """Return the same of the fetched shard that the sample is in: shard -> cause -> number."""
        fetched = self.fetched.get(bisect_right(self.ends, index))
        shard = fetched.shard if fetched else None
        return {shard.name: shard.counts()} if isinstance(shard, Shard) and shard.passed_over else {}

    def notes(self) -> tuple[list[str], list[str]]:
        """Return what is wrong with local shards, and what is passed over in them, as sentences."""
        shards = self.local or ()
        return [f"{s.name} {s.problem}" for s in shards if s.problem], passed_over_lines(shards)

    def signature(self) -> list:
        """Return the first shard's name, the number of samples and a digest of all names, numbers of samples
        and, of local shards, bytes. In which folder they lie does not matter.
        """
        names = [name.rpartition("/")[2] for name in self.names]
        num_bytes = [0 if self.is_stream else Path(name).stat().st_size for name in self.names]
        listed = json.dumps([*zip(names, self.sizes, num_bytes, strict=True)])
        return [self.names[0], len(self), blake2b(listed.encode(), digest_size=8).hexdigest()]

    def expect(self, index: int) -> None:
        """Begin to fetch the shard of a sample that will soon be asked for."""
        if self.is_stream:
            self._fetch(bisect_right(self.ends, index))

    def near(self, index: int, num_tries: int) -> range:
        """Return where to look for a replacement of a bad sample: in its shard, unless that cannot be had,
        then in the ones after it, so that few shards are fetched for it; in local shards anywhere.
        """
        if not self.is_stream:
            return range(len(self))
        number = bisect_right(self.ends, index)
        tried = self.fetched.get(number)
        is_lost = tried is not None and isinstance(tried.shard, BadImage)
        number = (number + (1 if is_lost else num_tries // 4)) % len(self.names)
        while not self.sizes[number]:
            number = (number + 1) % len(self.names)
        return range(self.ends[number] - self.sizes[number], self.ends[number])

    def _fetch(self, number: int) -> "Fetch":
        if number not in self.fetched:
            self.fetched[number] = Fetch(self.names[number])
            self.fetched[number].start()
            if len(self.fetched) > KEPT_OPEN:
                self.fetched.popitem(last=False)
        self.fetched.move_to_end(number)
        return self.fetched[number]


# ---- the names of shards ----


def is_shards(path: str) -> bool:
    """Return whether an element of train_file names shards, compressed ones too, not an annotation file."""
    return TAR.search(path) is not None or is_url(path)


def expand_names(patterns: list[str]) -> list[str]:
    """Return the shards of patterns with {000..123} and {a,b}; UserError for URLs that cannot be opened."""
    names = [name.removeprefix("file://") for pattern in patterns for name in _expand_braces(pattern)]
    for name in filter(is_url, names):
        _check_protocol(name)
    return [name if is_url(name) else fill_in(name) for name in names]


def _expand_braces(pattern: str) -> list[str]:
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    if braces[1]:
        numbers = range(int(braces[1]), int(braces[2]) + 1)
        if not numbers:
            raise UserError(
                f"train_file: {braces[0]} in {pattern} counts down; write the smaller number first"
            )
        parts = [f"{number:0{len(braces[1])}}" for number in numbers]
    else:
        parts = braces[3].split(",")
    return [name for part in parts for name in _expand_braces(head + part + tail)]


def _check_protocol(name: str) -> None:
    if name.startswith("pipe:"):
        return
    try:
        fsspec.get_filesystem_class(name.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise UserError(
            f"train_file: {name} cannot be opened: {first_line(error)}; install what is named, or stream it "
            f"with a program: 'pipe:curl -sf {name}'"
        ) from error
