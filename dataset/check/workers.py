"""Functions of (shared, job), run in this process or in several that each got `shared` once."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from typing import Any

import cv2
import torch

from simla.utils import UserError

_shared: Any = None


class Workers:
    """A context: the processes start with the first list of several jobs and end with it."""

    def __init__(self, shared: Any, num_processes: int):
        self.shared, self.num_processes, self.pool = shared, num_processes, None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any, Any], Any], jobs: Sequence) -> Iterator:
        """The results in the order of the jobs."""
        if min(self.num_processes, len(jobs)) < 2:
            yield from (function(self.shared, job) for job in jobs)
            return
        if self.pool is None:
            # spawn: forking a process that has started threads (torch) may hang; other systems cannot fork
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.num_processes, spawn, _start, (self.shared,))
        try:
            yield from self.pool.map(partial(_run, function), jobs)
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the check was ended, maybe for want of memory; the same command goes on from "
                "here, with --workers 1 in one process"
            ) from error


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    cv2.setNumThreads(0)  # the processes are the parallelism
    with suppress(RuntimeError):
        torch.set_num_threads(1)


def _run(function: Callable[[Any, Any], Any], job: Any) -> Any:
    return function(_shared, job)
