"""Time and memory of what a device does."""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def clock(function: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Return the seconds until the device has done it all, and what the function returned."""
    _synchronize(device)
    begin = time.perf_counter()
    result = function()
    _synchronize(device)
    return time.perf_counter() - begin, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from here; of a process only where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_bytes(device: torch.device) -> int:
    """Return the peak of the GPU's memory as torch counts it, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
