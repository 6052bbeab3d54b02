"""Messages between the processes of a run, beside the gradients: that one has ended, and sums."""

import threading
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from simla.engine.exit import end_process, end_stopped
from simla.utils import UserError, rank, world_size

LEFT, STOPPED, LOST = 0.0, 1.0, 2.0  # what a rank hears of its neighbour's end
NEWS_SECONDS = 10.0  # by when all ranks have heard of one's end

_leaving = threading.Event()  # this process does not mind the end of others any more
_stopping = threading.Event()  # a signal has told this process to stop
_groups: dict[str, dist.ProcessGroup] = {}
_watcher: threading.Thread | None = None


def watch_peers() -> None:
    """Let the death of any process end all others within seconds, as does `stop_others`: collectives would
    wait half an hour for it.

    In a thread rank r waits for a message of rank r + 1; what comes is the end of the connection, or a word
    on why rank r + 1 ends. Raises UserError where the processes cannot connect.
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
    """End all other ranks as a stop signal ends this one; return when they have heard of it."""
    leave()
    if world_size() > 1 and _groups and not _stopping.is_set():
        _stopping.set()
        with suppress(RuntimeError):
            told = _tell_neighbour(STOPPED)  # noqa: F841  it is sent as long as this lives
            wait_for_news()  # it has come round


def wait_for_news() -> None:
    """Return when the neighbour's end is known, or after NEWS_SECONDS; never if that ends this process."""
    if _watcher is not None:
        _watcher.join(NEWS_SECONDS)


def leave() -> None:
    """Do not mind the end of others from here on."""
    _leaving.set()


def leave_together() -> None:
    """Do so when all processes have come here; end the watching."""
    leave()
    if world_size() > 1 and _groups:
        dist.barrier(_groups["control"])
        _tell_neighbour(LEFT).wait()
        _watcher.join()
        _groups.clear()


def add_up(counts: list[int]) -> list[int]:
    """Return each count summed over all ranks, on the CPU."""
    if world_size() == 1:
        return counts
    sums = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(sums, dist.ReduceOp.SUM, _groups["control"])
    return sums.tolist()


def agree(flags: list[bool]) -> list[bool]:
    """Return each flag, true where it is true on any rank."""
    return [count > 0 for count in add_up(flags)]
