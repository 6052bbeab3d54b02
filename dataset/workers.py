"""Functions of (shared, job), run in this process or in several that each got `shared` once."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import cv2

from simla.utils import UserError

_shared: Any = None


class Workers:
    """Context in which processes start with the first list of several jobs; they end with it."""

    def __init__(self, shared: Any, num_processes: int):
        self.shared, self.num_processes, self.pool = shared, num_processes, None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any, Any], Any], jobs: Sequence) -> Iterator:
        """Yield the results in the order of the jobs; raise UserError where a process is killed."""
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
                "one of the worker processes was killed (out of memory?); the same command goes on where it "
                "was, with fewer --workers it needs less"
            ) from error


def _start(shared: Any) -> None:
    global _shared
    import torch  # here, because commands that only show their --help import this file, too

    _shared = shared
    cv2.setNumThreads(0)  # the processes are the parallelism
    torch.set_num_threads(1)


def _run(function: Callable[[Any, Any], Any], job: Any) -> Any:
    return function(_shared, job)
