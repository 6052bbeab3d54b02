"""Stop signals: a run ends early, once what is trained is saved.

A stop signal reaches some ranks or all. In training all agree on it at the end of a step. In an evaluation
nobody waits for anybody, so a rank that hears it tells its neighbour in the ring of `watch_peers`, and so on.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from simla.engine.exit import end_stopped
from simla.engine.peers import stop_others
from simla.utils import STOP_SIGNALS, signal_numbers


class Stopped(Exception):
    """The end of a run by the signal of that name; the message says how it goes on."""

    def __init__(self, message: str, signal_name: str = ""):
        super().__init__(message)
        self.signal_name = signal_name


class StopSignals:
    """Notes a stop signal in `received`, while open, for the end of the step. One while `at_once` is set
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
            for number in signal_numbers(self.names):
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
        """Let a signal cut short what is inside, such as an evaluation after everything is saved."""
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
        """Read the signals' numbers, which Python writes into `wakeup` whatever the main thread is in."""
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
            stop_signals = signal_numbers(STOP_SIGNALS)
            names = [signal.Signals(number).name for number in numbers if number in stop_signals]
            if names and not first:
                first, since = names[0], time.monotonic()
            elif names and time.monotonic() - since > self.REPEATED_AFTER:
                why = f"{names[-1]} came after it"
                break
        stop_others()
        remedy = "; --resume goes on from the newest checkpoint" if self.remedy else ""
        end_stopped(first, f"stopped by {first} without another save: {why}{remedy}")


@cache
def _leave_out_children() -> None:
    """Do not count as a signal to this process what a forked one is told, as a pool's when it ends."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
