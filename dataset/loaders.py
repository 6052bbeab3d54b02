"""Data sets yield dicts; loaders batch them. Every draw is a function of (seed, epoch, index), so a sample
does not depend on the worker or rank that reads it.
"""

import ctypes
import math
import multiprocessing.queues
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from simla.dataset.mixture import Mixture
from simla.dataset.transforms import normalise, unit_range
from simla.utils import (
    STOP_SIGNALS,
    UserError,
    rank,
    signal_numbers,
    world_size,
)


class EpochSampler(Sampler):
    """This rank's share of a shuffled epoch, as (epoch, index); whole global batches only.

    The epoch travels with the index, so that workers that live on between epochs know it. `batch_size` is
    what one rank takes for one step of the optimiser. An epoch in progress holds 8 bytes for each item of its
    share, and while it begins 8 for each of all.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        order: Callable[[int, int], Tensor] | None = None,
        readers: tuple[int, int, int] | None = None,
    ):
        """order(seed, epoch): the `num_items` indices of an epoch; by default it is those below, shuffled.

        readers: a rank's loader processes, the batch that each makes at a time, and how many samples it wants
        to look ahead. Each process then reads a stretch of the order, and gets (epoch, index, index to come
        so much later); with another number of ranks or processes an epoch has its samples in another order.
        """
        self.global_batch = batch_size * world_size()
        self.num_items, self.seed, self.epoch, self.first = num_items, seed, 0, 0
        self.order, self.readers = order or self._shuffled, readers

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch, of whose order all ranks together have had the `first` samples already."""
        self.epoch, self.first = epoch, self._first(first)

    def num_steps(self, first: int) -> int:
        """Return how many whole global batches of an epoch's order come after its first samples."""
        return (self.num_items - self._first(first)) // self.global_batch

    def _first(self, first: int) -> int:
        if self.readers:  # who reads what is settled for whole steps
            return min(-(-first // self.global_batch) * self.global_batch, self.num_items)
        return first

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = self.order(self.seed, self.epoch)
        if self.readers:
            of_rank = self._by_reader(order)[self.first // world_size() :]
        else:
            of_rank = order[self.first : self.first + len(self) * world_size()][rank() :: world_size(), None]
        of_rank, epoch = of_rank.numpy().copy(), self.epoch  # a copy, so that the whole order can go
        return ((epoch, *map(int, indices)) for indices in of_rank)

    def __len__(self) -> int:
        return self.num_steps(self.first) * (self.global_batch // world_size())

    def _shuffled(self, seed: int, epoch: int) -> Tensor:
        return torch.randperm(
            self.num_items, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        )

    def _by_reader(self, order: Tensor) -> Tensor:
        """Return this rank's stretch of the order, cut into one for each of its processes, which make its
        batches in turn, and beside each sample a later one of the same stretch: (n, 2).
        """
        num_workers, batch_size, ahead = self.readers
        num_of_rank = len(order) // self.global_batch * self.global_batch // world_size()
        order = order[rank() * num_of_rank : (rank() + 1) * num_of_rank].view(-1, batch_size)
        of_rank, begin = torch.empty(*order.shape, 2, dtype=order.dtype), 0
        for worker in range(num_workers):
            batches = of_rank[worker::num_workers]
            stretch = order[begin : begin + len(batches)]
            later = (torch.arange(len(stretch)) + -(-ahead // batch_size)).clamp(max=len(stretch) - 1)
            batches[..., 0], batches[..., 1] = stretch, stretch[later]
            begin += len(batches)
        return of_rank.view(-1, 2)


def check_enough(num_samples: int, batch_size: int, config: dict) -> None:
    """Raise UserError, naming the keys, where a training set has fewer samples than a step of all ranks."""
    key = "batch_size" if "batch_size" in config else "batch_size_train"
    factors = {key: batch_size, "grad_accumulation_steps": config["grad_accumulation_steps"]}
    per_step = math.prod(factors.values()) * world_size()
    if num_samples >= per_step:
        return
    counted = {name: number for name, number in factors.items() if number > 1}
    product = " x ".join(
        [f"{name} {number}" for name, number in counted.items()] + [f"{world_size()} rank(s)"]
    )
    raise UserError(
        f"{num_samples:,} training samples are fewer than a step of {per_step:,} ({product}); lower "
        f"{' or '.join(counted) or 'the number of processes'}"
    )


def train_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    config: dict,
    collate: Callable,
    mixture: Mixture | None = None,
) -> DataLoader:
    """Return batches of a training set; `grad_accumulation_steps` of them make a step, only whole ones come.

    mixture: whose epochs they are; by default one has all items once.
    """
    num_workers = config["num_workers"]
    num_items, order = (mixture.samples_per_epoch, mixture.order) if mixture else (len(dataset), None)
    check_enough(num_items, batch_size, config)
    readers = None
    if mixture and mixture.look_ahead:
        readers = max(num_workers, 1), batch_size, mixture.look_ahead
    step = batch_size * config["grad_accumulation_steps"]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(num_items, step, seed, order, readers),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_worker,
        collate_fn=collate,
        pin_memory=torch.cuda.is_initialized(),  # where a GPU is used: it is copied to while that computes
        drop_last=True,
        timeout=_timeout_seconds(config),
        generator=torch.Generator(),
    )


def data_account(loader: DataLoader) -> dict:
    """Return what, beside the seed, decides which samples an epoch of a `train_loader` has, and their order:
    the `signatures` of its files, the samples of an epoch, each set's share of them, and who reads streams.
    """
    sampler, mixture = loader.sampler, getattr(loader.dataset, "entries", ())
    return {
        "files": signatures(mixture),
        "samples": sampler.num_items,
        "shares": list(getattr(mixture, "shares", ())),
        "readers": [sampler.global_batch, world_size(), *sampler.readers] if sampler.readers else [],
    }


def signatures(entries: Sequence) -> list[list]:
    """Return (name, number of entries, checksum) of each file behind the entries."""
    if hasattr(entries, "signature"):
        return [entries.signature()]
    parts = getattr(entries, "sets", None) or getattr(entries, "lists", None)
    if parts is not None:
        return [row for part in parts for row in signatures(part)]
    inner = (getattr(entries, name, None) for name in ("entries", "rows", "dataset"))
    return next((signatures(part) for part in inner if part is not None), [])


def data_difference(old: dict, new: dict) -> str:
    """Return what differs between two of `data_account`, "" where nothing does but the names of files."""
    if len(old["files"]) != len(new["files"]):
        return f"there were {len(old['files'])} file(s), there are {len(new['files'])}"
    for (_, num_before, content), (name, num_now, content_now) in zip(
        old["files"], new["files"], strict=True
    ):
        if num_before != num_now:
            return f"{name} had {num_before} entries, has {num_now}"
        if content != content_now:
            return f"the entries of {name} are others"
    if (old["samples"], old["shares"]) != (new["samples"], new["shares"]):
        return (
            f"an epoch had {old['samples']} samples, of the sets {old['shares']}, has {new['samples']}, "
            f"{new['shares']}"
        )
    if old["readers"] != new["readers"]:
        return "what is streamed was read by another number of processes, or in other batches"
    return ""


def test_loader(dataset: Dataset, batch_size: int, config: dict, collate: Callable) -> DataLoader:
    """Return this rank's share of the items (every world_size-th), in order, none left out and none twice."""
    share = range(rank(), len(dataset), world_size())
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=share,
        num_workers=config["num_workers"],
        worker_init_fn=_start_worker,
        collate_fn=collate,
        pin_memory=torch.cuda.is_initialized(),
        timeout=_timeout_seconds(config),
        generator=torch.Generator(),  # so that an evaluation does not move the training's
    )


def _timeout_seconds(config: dict) -> float:
    return 60 * config["batch_timeout_minutes"] if config["num_workers"] else 0  # others cannot be waited for


def _start_worker(_: int) -> None:
    start_helper_process()
    # A batch that cannot be handed over, as when shared memory is full, would be dropped and waited for.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
    cv2.setNumThreads(0)  # the loader's processes are the parallelism


def _end_worker(error: Exception, _batch: object) -> None:
    traceback.print_exception(error)
    os._exit(1)


def stop_at_unreadable(batches: Iterable[dict]) -> Iterator[dict]:
    """Passes batches through; UserError naming the files of one that could not be made."""
    for batch in batches:
        if "unreadable" in batch:
            raise UserError(batch["unreadable"])
        yield batch


def to_device(batch: dict, device: torch.device) -> dict:
    """Return the batch on the device, where the bytes of images become the floats that models take."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    moved["image"] = normalise(moved["image"])
    if "code_view" in moved:
        moved["code_view"] = unit_range(moved["code_view"])
    return moved


PR_SET_PDEATHSIG = 1  # of prctl(2): the signal to get when the parent ends


def start_helper_process() -> None:
    """Set up a loader's worker: Ctrl-C and schedulers signal every process, but the main one decides what
    follows; and it must not outlive a killed one, whose connections to other ranks it holds open too.
    """
    for number in signal_numbers(STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# What torch says where batches do not come, in any process and thread.
NO_BATCH = re.compile(
    r"DataLoader timed out|DataLoader worker \(pid|ancdata|Too many open files|"
    r"shared memory (object|file|\()|</torch_"
)


def loader_problem(error: Exception) -> str:
    """Return a sentence where the error is that a loader's processes ended or gave no batch, else ""."""
    if not isinstance(error, RuntimeError | OSError) or not NO_BATCH.search(str(error)):
        return ""
    what = str(error).strip().splitlines()[-1]
    return (
        f"the data-loading processes give no batches ({what}). Usual causes: shared memory is full (see "
        "`df -h /dev/shm`; a container has little without --shm-size or --ipc=host), too few open files are "
        "allowed (`ulimit -n`), the system ended a process for want of memory, or the disk does not answer. "
        "Fewer num_workers need less of all; batch_timeout_minutes is how long a batch is waited for"
    )
