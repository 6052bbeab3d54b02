"""Data sets yield dicts; loaders batch them. Every draw is a function of (seed, epoch, index), so a sample
does not depend on the worker or rank that reads it.
"""

from collections.abc import Callable, Iterable, Iterator

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from faults import start_helper_process
from utils import UserError, rank, world_size


class EpochSampler(Sampler):
    """This rank's share of a shuffled epoch, as (epoch, index); whole global batches only.

    The epoch travels with the index, so that workers that live on between epochs know it. `batch_size` is
    what one rank takes for one step of the optimiser. An epoch in progress holds 8 bytes for each item of its
    share, and while it begins 8 for each of all.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int):
        self.global_batch = batch_size * world_size()
        if num_items < self.global_batch:
            raise UserError(
                f"{num_items} training samples are fewer than one batch of {batch_size} on {world_size()} "
                "rank(s); lower batch_size"
            )
        self.num_items, self.seed, self.epoch, self.first = num_items, seed, 0, 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """`first`: samples at the head of the epoch's order that all ranks together have had already."""
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_items, generator=generator)
        own = order[self.first : self.first + len(self) * world_size()][rank() :: world_size()]
        own, epoch = own.numpy().copy(), self.epoch  # a copy, so that the whole order can go
        return ((epoch, int(index)) for index in own)

    def __len__(self) -> int:
        return (self.num_items - self.first) // self.global_batch * (self.global_batch // world_size())


def train_loader(dataset: Dataset, batch_size: int, seed: int, config: dict, collate: Callable, pin: bool):
    """Batches of a training set; `grad_accumulation_steps` of them make a step, and only whole ones come."""
    num_workers = config["num_workers"]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), batch_size * config["grad_accumulation_steps"], seed),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_worker,
        collate_fn=collate,
        pin_memory=pin,
        drop_last=True,
        generator=torch.Generator(),
    )


def test_loader(
    dataset: Dataset, batch_size: int, num_workers: int, collate: Callable, pin: bool
) -> DataLoader:
    """This rank's share of the items (every world_size-th), in order, none left out and none twice."""
    share = range(rank(), len(dataset), world_size())
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=share,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        collate_fn=collate,
        pin_memory=pin,
        generator=torch.Generator(),  # so that an evaluation does not move the training's
    )


def _start_worker(_: int) -> None:
    start_helper_process()
    cv2.setNumThreads(0)  # the loader's processes are the parallelism


def stop_at_unreadable(batches: Iterable[dict]) -> Iterator[dict]:
    """Passes batches through; UserError naming the files of one that could not be made."""
    for batch in batches:
        if "unreadable" in batch:
            raise UserError(batch["unreadable"])
        yield batch
