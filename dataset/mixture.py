"""Which samples of several data sets an epoch has, and in which order: a function of seed and epoch."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

LOOK_AHEAD = 1000  # samples


class Mixture(Sequence):
    """The entries of all sets, one after the other, and the order in which epochs take them.

    A set's samples come in passes: each has all of them in an order of its own, and begins where the one
    before ends, within an epoch or across two. So a set that is too small for its share repeats, one that is
    too large goes on in the next epoch, and all its samples are seen equally often. Index + n * len is the
    sample of the n-th pass after the first one of the epoch (of a stream: of the run): random draws differ.
    """

    def __init__(self, sets: list[Sequence], weights: list[float] | None = None, samples_per_epoch: int = 0):
        """weights: of the sets' shares of an epoch, by default their sizes; samples_per_epoch 0: all."""
        self.sets, self.ends = sets, list(accumulate(map(len, sets)))
        self.samples_per_epoch = samples_per_epoch or self.ends[-1]
        self.shares = shares(self.samples_per_epoch, weights or list(map(len, sets)))
        self.look_ahead = self._look_ahead()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        place, own = self._find(index)
        some = self.sets[place]
        return some[own + index // len(self) * len(some)] if _is_stream(some) else some[own]

    def _find(self, index: int) -> tuple[int, int]:
        """Number of the set, and index in it."""
        index %= len(self)
        place = bisect_right(self.ends, index)
        return place, index - self.ends[place] + len(self.sets[place])

    def near(self, index: int, num_tries: int) -> range:
        """Among which samples to draw one instead of a bad one: of the same set, so that shares stay."""
        place, own = self._find(index)
        some = self.sets[place]
        found = some.near(own, num_tries) if hasattr(some, "near") else range(len(some))
        first = self.ends[place] - len(some)
        return range(first + found.start, first + found.stop)

    def expect(self, index: int) -> None:
        """The sample will be asked for some time later."""
        place, own = self._find(index)
        if hasattr(self.sets[place], "expect"):
            self.sets[place].expect(own)

    def passed_over(self) -> Counter[str]:
        """Returns what local shards hold that is in no sample, by cause."""
        return sum((some.passed_over() for some in self.sets if hasattr(some, "passed_over")), Counter())

    def passed_over_beside(self, index: int) -> dict[str, dict[str, int]]:
        """Returns the same of the fetched shard that the sample is in, if it is in one: shard -> cause ->
        number."""
        place, own = self._find(index)
        return self.sets[place].passed_over_beside(own) if _is_stream(self.sets[place]) else {}

    def _look_ahead(self) -> int:
        """How many samples before a shard of a stream is needed it is to be fetched; 0: there are no streams.

        At most half a shard, or those between would be fetched and forgotten again.
        """
        halves = [
            len(some) / len(some.sizes) / 2 * self.samples_per_epoch / max(share, 1)
            for some, share in zip(self.sets, self.shares, strict=True)
            if _is_stream(some)
        ]
        return int(min(*halves, LOOK_AHEAD)) + 1 if halves else 0

    # ---- the order ----

    def order(self, seed: int, epoch: int) -> Tensor:
        """(samples_per_epoch,) indices."""
        own = [self._order_of(place, seed, epoch) for place in range(len(self.sets))]
        if len(own) == 1:
            return own[0]
        turns = torch.repeat_interleave(torch.arange(len(own)), torch.tensor(self.shares))
        turns = turns[torch.randperm(len(turns), generator=_generator(seed, epoch, len(own)))]
        order = torch.empty_like(turns)
        for place, indices in enumerate(own):
            order[turns == place] = indices
        return order

    def _order_of(self, place: int, seed: int, epoch: int) -> Tensor:
        """The indices of a set's share of an epoch."""
        share, size = self.shares[place], len(self.sets[place])
        if not share:
            return torch.empty(0, dtype=torch.int64)
        begin = epoch * share
        first, last = begin // size, (begin + share - 1) // size
        counted_from = 0 if _is_stream(self.sets[place]) else first
        passes = [
            self._shuffled(place, _generator(seed, number, place)) + (number - counted_from) * len(self)
            for number in range(first, last + 1)
        ]
        begin -= first * size
        return torch.cat(passes)[begin : begin + share] + self.ends[place] - size

    def _shuffled(self, place: int, generator: torch.Generator) -> Tensor:
        """One pass: of a stream shard by shard."""
        some = self.sets[place]
        if not _is_stream(some):
            return torch.randperm(len(some), generator=generator)
        blocks = torch.randperm(len(some.sizes), generator=generator).tolist()
        return torch.cat(
            [
                torch.randperm(some.sizes[block], generator=generator) + some.ends[block] - some.sizes[block]
                for block in blocks
            ]
        )


def _is_stream(some: Sequence) -> bool:
    return getattr(some, "is_stream", False)


def _generator(seed: int, number: int, place: int) -> torch.Generator:
    # place 0 draws as a data set alone does
    return torch.Generator().manual_seed((seed + place * 7_368_787) * 1_000_003 + number)


def shares(total: int, weights: list[float]) -> list[int]:
    """Whole numbers, in proportion to the weights as near as can be, that add up to `total`."""
    ends = [round(total * end / sum(weights)) for end in accumulate(weights)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
