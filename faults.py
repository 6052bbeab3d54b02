"""What ends a run early, and how: signals, a process that dies, no batches, losses that are not finite.

A stop signal reaches some ranks or all. In training all agree on it at the end of a step. In an evaluation
nobody waits for anybody, so a rank that hears it tells its neighbour in the ring of `watch_peers`, and so on.
"""

import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from run_record import RunRecord
from saving import Saver
from utils import UserError, rank, world_size

RESUMABLE = 75  # exit code of a run that was told to stop and can go on: EX_TEMPFAIL of sysexits.h
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # the scheduler's, Ctrl-C, SLURM's --signal=USR1@120

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal to get when the parent ends


class Stopped(Exception):
    """The run ends as it was told to, by the signal of that name; the message says how it goes on."""

    def __init__(self, message: str, signal_name: str = ""):
        super().__init__(message)
        self.signal_name = signal_name


class StopSignals:
    """While open, a stop signal is noted in `received`, for the end of the step. One while `at_once` is set
    raises Stopped where the main thread is, and ends all other ranks.

    The main thread may never come to that, as in a collective or a read that does not end. So another thread
    ends all ranks, what is being written first, when a second signal comes, or when this process still runs
    `grace_seconds` after the first one and nothing has set `is_answered`.
    """

    REPEATED_AFTER = 1.0  # seconds: sooner it is the same one, passed on by a launcher

    def __init__(
        self,
        grace_seconds: float,
        names: tuple[str, ...] = STOP_SIGNALS,
        at_once: bool = False,
        remedy: str = "; --resume goes on from here",
    ):
        self.grace_seconds, self.names, self.at_once, self.remedy = grace_seconds, names, at_once, remedy
        self.received, self.is_answered, self.is_stopping = "", False, False

    def __enter__(self) -> "StopSignals":
        self.previous, self.process, self.watcher = {}, os.getpid(), None
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in _numbers(self.names):
                self.previous[number] = signal.signal(number, self._handle)
            _leave_out_children()
            self.arrivals, self.wakeup = socket.socketpair()
            self.wakeup.setblocking(False)
            self.previous_wakeup = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
            self.watcher = threading.Thread(target=self._watch, name="stop signals", daemon=True)
            self.watcher.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.watcher:
            signal.set_wakeup_fd(self.previous_wakeup)
            self.wakeup.send(b"\0")  # the number of no signal
            self.watcher.join()
            self.arrivals.close()
            self.wakeup.close()

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """For work that may be cut short, such as an evaluation after everything is saved."""
        self.at_once = True
        if self.received:
            self._stop()
        yield
        self.at_once = False

    def _handle(self, number: int, _frame) -> None:
        if os.getpid() != self.process:  # a process forked from this one, such as a pool's
            if self.at_once:
                os._exit(128 + number)
            return
        self.received = self.received or signal.Signals(number).name
        if self.at_once and not self.is_stopping:
            self._stop()

    def _stop(self) -> None:
        self.is_stopping = True
        stop_others()
        raise Stopped(f"stopped by {self.received}{self.remedy}", self.received)

    def _watch(self) -> None:
        """Python writes the number of every signal into `wakeup`, whatever the main thread is in."""
        first, since = "", 0.0
        while True:
            left = None
            if first and not self.is_answered:
                left = max(0.01, since + self.grace_seconds - time.monotonic())
            self.arrivals.settimeout(left)
            try:
                numbers = self.arrivals.recv(4096)
            except TimeoutError:
                if self.is_answered:
                    continue
                why = f"what was going on did not end within stop_grace_seconds ({self.grace_seconds})"
                break
            if 0 in numbers:
                return
            names = [signal.Signals(number).name for number in numbers if number in _numbers(STOP_SIGNALS)]
            if names and not first:
                first, since = names[0], time.monotonic()
            elif names and time.monotonic() - since > self.REPEATED_AFTER:
                why = f"{names[-1]} came after it"
                break
        stop_others()
        remedy = "; --resume goes on from the newest checkpoint" if self.remedy else ""
        end_stopped(first, f"stopped by {first} without another save: {why}{remedy}")


def _numbers(names: tuple[str, ...]) -> list[int]:
    """Of the signals that this system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@cache
def _leave_out_children() -> None:
    """What a forked process is told, as a pool's when it ends, does not count as a signal to this one."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def end_process(code: int, status: str, message: str = "") -> NoReturn:
    """Ends this process at once, when what is being written is on the disk and run.json says how it ended."""
    if threading.current_thread() is threading.main_thread():
        for number in _numbers(STOP_SIGNALS):  # one that comes now would only cut this short
            signal.signal(number, signal.SIG_IGN)
    Saver.wait()
    if RunRecord.current:
        RunRecord.current.finish(status, message)
    with suppress(OSError):  # nobody is there to be told
        if message:
            print(message, file=sys.stderr, flush=True)
    with suppress(OSError):
        if sys.stdout is not None:
            sys.stdout.flush()
    os._exit(code)


def end_stopped(signal_name: str, message: str) -> NoReturn:
    """`end_process` after a stop signal: with the code of what can be resumed, or the shell's for the signal
    where nothing is trained.
    """
    is_training = RunRecord.current is not None and RunRecord.current.is_training
    end_process(RESUMABLE if is_training else 128 + signal.Signals[signal_name], "stopped", message)


def start_helper_process() -> None:
    """For a loader's worker: Ctrl-C and schedulers signal every process, but the main one decides what
    follows; and it must not outlive a killed one, whose connections to other ranks it holds open too.
    """
    for number in _numbers(STOP_SIGNALS):
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


# ---- several processes ----

_leaving = threading.Event()  # this process does not mind the end of others any more
_stopping = threading.Event()  # a signal has told this process to stop
_groups: dict[str, dist.ProcessGroup] = {}
_watcher: threading.Thread | None = None
LEFT, STOPPED, LOST = 0.0, 1.0, 2.0  # what a rank hears of its neighbour's end
NEWS_SECONDS = 10.0  # by when all ranks have heard of one's end


def watch_peers() -> None:
    """From here on the death of any process ends all others within seconds, as does `stop_others`.

    Collectives would wait half an hour for it. In a thread rank r waits for a message of rank r + 1; what
    comes is the end of the connection, or a word on why rank r + 1 ends. Raises UserError where the processes
    cannot connect.
    """
    global _watcher
    if world_size() == 1:
        return
    _leaving.clear()
    _stopping.clear()
    try:
        _groups["control"] = dist.new_group(backend="gloo")
        _groups["watch"] = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        dist.barrier(_groups["watch"])  # connects
    except RuntimeError as error:
        raise UserError(
            f"the processes cannot connect over gloo ({error}); set GLOO_SOCKET_IFNAME to the network "
            "interface between the machines"
        ) from error
    _watcher = threading.Thread(target=_watch, args=(_groups["watch"],), daemon=True)
    _watcher.start()


def _watch(group: dist.ProcessGroup) -> None:
    neighbour, news = (rank() + 1) % world_size(), torch.tensor([LOST])
    try:
        dist.recv(news, src=neighbour, group=group)
    except RuntimeError:
        news.fill_(LOST)
    if news.item() == STOPPED and not _stopping.is_set():
        _stopping.set()
        with suppress(RuntimeError):
            _tell_neighbour(STOPPED).wait()
        end_stopped("SIGTERM", "stopped by a signal to another rank")
    if news.item() == LOST and not _leaving.is_set():
        lost = f"lost rank {neighbour}; where it ended by itself, its own message says why"
        end_process(1, "failed", f"error (rank {rank()}): {lost}")


def _tell_neighbour(news: float) -> dist.Work:
    return dist.isend(torch.tensor([news]), dst=(rank() - 1) % world_size(), group=_groups["watch"])


def stop_others() -> None:
    """Ends all other ranks as a stop signal ends this one; returns when they have heard of it."""
    leave()
    if world_size() > 1 and _groups and not _stopping.is_set():
        _stopping.set()
        with suppress(RuntimeError):
            told = _tell_neighbour(STOPPED)  # noqa: F841  it is sent as long as this lives
            wait_for_news()  # it has come round


def wait_for_news() -> None:
    """Returns when the neighbour's end is known, and its reason with it, or after NEWS_SECONDS. Where that is
    a reason to end this process, it has ended by then.
    """
    if _watcher is not None:
        _watcher.join(NEWS_SECONDS)


def leave() -> None:
    """From here on this process does not mind the end of others."""
    _leaving.set()


def leave_together() -> None:
    """As `leave`, when all processes have come here; ends the watching."""
    leave()
    if world_size() > 1 and _groups:
        dist.barrier(_groups["control"])
        _tell_neighbour(LEFT).wait()
        _watcher.join()
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
