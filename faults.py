"""What ends a run early, and how: signals, a process that dies, losses that are not finite."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saving import Saver
from utils import UserError, rank, world_size

RESUMABLE = 75  # exit code of a run that was told to stop and can go on: EX_TEMPFAIL of sysexits.h
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # the scheduler's, Ctrl-C, SLURM's --signal=USR1@120

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal to get when the parent ends


class Stopped(Exception):
    """The run ends as it was told to, and can be resumed."""


class StopSignals:
    """While open, a stop signal is noted in `received`, for the end of the step. One while `at_once` is set,
    or a second Ctrl-C, raises Stopped where the main thread is.
    """

    REPEATED_AFTER = 1.0  # seconds: sooner it is the same one, passed on by a launcher

    def __init__(self):
        self.received = ""
        self.at_once = False

    def __enter__(self) -> "StopSignals":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for name in STOP_SIGNALS:
                number = getattr(signal, name, None)
                if number is not None:
                    self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """For work that may be cut short, such as an evaluation after everything is saved."""
        self.at_once = True
        if self.received:
            self._stop()
        yield
        self.at_once = False

    def _handle(self, number: int, _frame) -> None:
        if not self.received:
            self.received, self.since = signal.Signals(number).name, time.monotonic()
        again = number == signal.SIGINT and time.monotonic() - self.since > self.REPEATED_AFTER
        if self.at_once or again:
            self._stop()

    def _stop(self) -> None:
        leave()
        raise Stopped(f"stopped by {self.received}")


def start_helper_process() -> None:
    """For a loader's worker: Ctrl-C and schedulers signal every process, but the main one decides what
    follows; and it must not outlive a killed one, whose connections to other ranks it holds open too.
    """
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ---- several processes ----

_leaving = threading.Event()
_groups: dict[str, dist.ProcessGroup] = {}
WATCH = "watch"


def watch_peers() -> None:
    """From here on the death of any process ends all others within seconds.

    Collectives would wait half an hour for it. In a thread rank r waits for a message of rank r + 1 that
    never comes; what comes is the end of the connection. Raises UserError where the processes cannot connect.
    """
    if world_size() == 1:
        return
    _leaving.clear()
    try:
        _groups["control"] = dist.new_group(backend="gloo")
        _groups["watch"] = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        dist.barrier(_groups["watch"])  # connects
    except RuntimeError as error:
        raise UserError(
            f"the processes cannot connect over gloo ({error}); set GLOO_SOCKET_IFNAME to the network "
            "interface between the machines"
        ) from error
    threading.Thread(target=_watch, args=(_groups["watch"],), name=WATCH, daemon=True).start()


def _watch(group: dist.ProcessGroup) -> None:
    neighbour = (rank() + 1) % world_size()
    with suppress(RuntimeError):
        dist.recv(torch.zeros(1), src=neighbour, group=group)
    if _leaving.is_set():
        return
    print(
        f"error (rank {rank()}): lost rank {neighbour}; where it ended by itself, its own message says why",
        file=sys.stderr,
        flush=True,
    )
    Saver.wait()
    os._exit(1)


def leave() -> None:
    """From here on this process does not mind the end of others."""
    _leaving.set()


def leave_together() -> None:
    """As `leave`, when all processes have come here; ends the watching."""
    leave()
    if world_size() > 1 and _groups:
        dist.barrier(_groups["control"])
        dist.send(torch.zeros(1), dst=(rank() - 1) % world_size(), group=_groups["watch"])
        for thread in threading.enumerate():
            if thread.name == WATCH:
                thread.join()
        _groups.clear()


def add_up(counts: list[int]) -> list[int]:
    """Each count, summed over all ranks. On the CPU, over a group of its own."""
    if world_size() == 1:
        return counts
    sums = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(sums, dist.ReduceOp.SUM, _groups["control"])
    return sums.tolist()


def agree(flags: list[bool]) -> list[bool]:
    """Each flag, true where it is true on any rank."""
    return [count > 0 for count in add_up(flags)]


# ---- losses that are not finite ----


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients, a scalar on the model's device."""
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


class FiniteCheck:
    """Whether named scalars are finite on all ranks: at once on the device, for the host later.

    bad: float scalar on the device, 1 where any value of any rank is not.
    """

    def __init__(self, values: dict[str, Tensor]):
        self.names = list(values)
        wrong = ~torch.stack([value.detach().float() for value in values.values()]).isfinite()  # (K,)
        self.bad = wrong.any().float()
        if world_size() > 1:
            dist.all_reduce(self.bad, dist.ReduceOp.MAX)
        flags = torch.cat([self.bad[None].bool(), wrong])
        self.on_host, self.arrived = flags, None
        if flags.is_cuda:
            self.on_host = torch.empty_like(flags, device="cpu", pin_memory=True)
            self.on_host.copy_(flags, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> tuple[bool, list[str]]:
        """Waits for the device; whether any is not finite, and the names of this rank's."""
        if self.arrived:
            self.arrived.synchronize()
        bad, *wrong = self.on_host.tolist()
        return bad, [name for name, is_wrong in zip(self.names, wrong, strict=True) if is_wrong]
