"""The samples of several data sets in an epoch, and their order: a function of seed and epoch."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

LOOK_AHEAD = 1000  # samples


def near(entries: Sequence, index: int, num_tries: int) -> range:
    """Return among which entries to draw one instead of a bad one, the `num_tries`th in a row."""
    return entries.near(index, num_tries) if hasattr(entries, "near") else range(len(entries))


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
        entries, number = self._find(index)
        return entries[number + index // len(self) * len(entries)] if _is_stream(entries) else entries[number]

    def _find(self, index: int) -> tuple[Sequence, int]:
        """Return the set, and the index in it."""
        index %= len(self)
        number = bisect_right(self.ends, index)
        return self.sets[number], index - self.ends[number] + len(self.sets[number])

    def near(self, index: int, num_tries: int) -> range:
        """Return among which samples to draw one instead of a bad one: of the same set, so shares stay."""
        entries, number = self._find(index)
        others, first = near(entries, number, num_tries), index % len(self) - number
        return range(first + others.start, first + others.stop)

    def expect(self, index: int) -> None:
        """Prepare for the sample, which will be asked for some time later."""
        entries, number = self._find(index)
        if _is_stream(entries):
            entries.expect(number)

    def passed_over(self) -> Counter[str]:
        """Return what local shards hold that is in no sample, by cause."""
        return sum((each.passed_over() for each in self.sets if hasattr(each, "passed_over")), Counter())

    def passed_over_beside(self, index: int) -> dict[str, dict[str, int]]:
        """Return the same of the fetched shard that the sample is in, if it is in one: shard -> cause ->
        number.
        """
        entries, number = self._find(index)
        return entries.passed_over_beside(number) if _is_stream(entries) else {}

    def _look_ahead(self) -> int:
        """Return how many samples before a shard of a stream is needed it is to be fetched; 0: there are no
        streams. At most half a shard, or those between would be fetched and forgotten again.
        """
        halves = [
            len(each) / len(each.sizes) / 2 * self.samples_per_epoch / max(share, 1)
            for each, share in zip(self.sets, self.shares, strict=True)
            if _is_stream(each)
        ]
        return int(min(*halves, LOOK_AHEAD)) + 1 if halves else 0

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the indices of an epoch (samples_per_epoch,)."""
        orders = [self._order_of(number, seed, epoch) for number in range(len(self.sets))]
        if len(orders) == 1:
            return orders[0]
        turns = torch.repeat_interleave(torch.arange(len(orders)), torch.tensor(self.shares))
        turns = turns[torch.randperm(len(turns), generator=_generator(seed, epoch, len(orders)))]
        order = torch.empty_like(turns)
        for number, indices in enumerate(orders):
            order[turns == number] = indices
        return order

    def _order_of(self, number: int, seed: int, epoch: int) -> Tensor:
        """Return the indices of a set's share of an epoch."""
        share, entries = self.shares[number], self.sets[number]
        if not share:
            return torch.empty(0, dtype=torch.int64)
        begin, size = epoch * share, len(entries)
        first, last = begin // size, (begin + share - 1) // size
        counted_from = 0 if _is_stream(entries) else first
        passes = [
            _shuffled(entries, _generator(seed, each, number)) + (each - counted_from) * len(self)
            for each in range(first, last + 1)
        ]
        begin -= first * size
        return torch.cat(passes)[begin : begin + share] + self.ends[number] - size


def _shuffled(entries: Sequence, generator: torch.Generator) -> Tensor:
    """Return the indices of one pass: of a stream shard by shard."""
    if not _is_stream(entries):
        return torch.randperm(len(entries), generator=generator)
    shards = torch.randperm(len(entries.sizes), generator=generator).tolist()
    sizes, ends = entries.sizes, entries.ends
    return torch.cat([torch.randperm(sizes[k], generator=generator) + ends[k] - sizes[k] for k in shards])


def _is_stream(entries: Sequence) -> bool:
    return getattr(entries, "is_stream", False)


def _generator(seed: int, number: int, set_number: int) -> torch.Generator:
    # set 0 draws as a data set alone does
    return torch.Generator().manual_seed((seed + set_number * 7_368_787) * 1_000_003 + number)


def shares(total: int, weights: list[float]) -> list[int]:
    """Return whole numbers, in proportion to the weights as near as can be, that add up to `total`."""
    ends = [round(total * end / sum(weights)) for end in accumulate(weights)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
