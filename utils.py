"""Helpers of every script: errors for people, ranks and gathers, device and precision, paths, progress.

Every helper works without a process group, as one process of one. Those that need torch import it themselves:
it takes seconds, and commands such as `python -m simla.dataset.prepare` do without.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger("simla")
LOG, STEPS_LOG = "log.txt", "train_steps.jsonl"  # a line for each epoch, for each step
ROOT = Path(__file__).resolve().parent  # of this code
PRECISIONS = {"fp32": "float32", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # config -> torch


class UserError(Exception):
    """Something the user can mend: one clear sentence that names the file or key and the remedy."""


# ---- processes ----


_alone = False


@contextmanager
def as_one_process() -> Iterator[None]:
    """Let this process count as the only one inside: for work that the others do not share."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def _rank_and_size() -> tuple[int, int]:
    dist = sys.modules.get("torch.distributed")  # a process that has not imported it has joined no others
    if _alone or dist is None or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def world_size() -> int:
    """Return the number of processes that compute together."""
    return _rank_and_size()[1]


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return _rank_and_size()[0]


def is_main() -> bool:
    """Return whether this process is the one that writes and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes have come here."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def all_gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (n, ...) of all ranks in rank order, (n * ranks, ...), without gradient; the same n
    everywhere.
    """
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return rows
    of_ranks = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(of_ranks, rows.detach().contiguous())
    return torch.cat(of_ranks)


def all_gather_shares(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """Return each rank's rows (n, ...), in rank order and without gradient, of which it has `counts`."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    shares = all_gather_rows(padded).view(len(counts), *padded.shape)
    return [share[:count] for share, count in zip(shares, counts, strict=True)]


def gather_in_order(rows: Tensor, total: int) -> Tensor:
    """Return the rows of all items (total, ...), of which each rank has every world_size-th."""
    counts = [len(range(r, total, world_size())) for r in range(world_size())]
    gathered = rows.new_empty(total, *rows.shape[1:])
    for r, share in enumerate(all_gather_shares(rows, counts)):
        gathered[r :: world_size()] = share
    return gathered


def all_gather_objects(value: object) -> list:
    """Return the ranks' values, small and picklable, in rank order."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype in which config `precision` multiplies."""
    import torch

    return getattr(torch, PRECISIONS[precision])


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context that computes in config `precision`; fp32 and tf32: see `set_precision`."""
    import torch

    dtype = dtype_of(precision)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def own_surroundings(device: torch.device) -> Iterator[None]:
    """Undo inside what the caller has set for torch: autocast, inference mode, the default device. Not its
    default dtype, which all threads share: what is made inside names its own.
    """
    import torch

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.device("cpu"))
        for kind in {device.type, "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def set_precision(device: torch.device, precision: str) -> None:
    """Multiply float32 on a GPU in full, or with `tf32` in its tensor cores. Raises UserError where the GPU
    has no such arithmetic.
    """
    import torch

    is_new = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8,)
    if precision in ("bf16", "tf32") and not is_new:
        raise UserError(
            f"precision {precision}: {torch.cuda.get_device_name(device)} does not have it, GPUs since the "
            "A100 and RTX 30 do; use precision: fp16 or fp32"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def true_indices(mask: Tensor) -> Tensor:
    """Return the flat indices (M,) of the true entries; the host waits for the device to count."""
    return mask.flatten().nonzero().squeeze(1)


def fill_in(path: str) -> str:
    """Return the path with environment variables and ~ filled in."""
    path = os.path.expandvars(path)
    return str(Path(path).expanduser()) if path.startswith("~") else path


def is_url(path: str) -> bool:
    """Return whether it names no file here: a URL, or `pipe:` and a command that writes the content."""
    return path.startswith("pipe:") or "://" in path


PICTURE = "a picture"
# What a file begins with that should have been something else -> what it is, and what to do.
CONTENTS = {
    rb"\s{0,511}\Z": "empty, as after a copy or download that was cut short; copy or download it again",
    rb"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`",
    rb"\s*<": "a web page (HTML or XML), perhaps that of a failed download; download the file again",
    rb"\x1f\x8b": "compressed by gzip; unpack it with `gunzip` (a .tgz or .tar.gz, too)",
    rb"BZh\d": "compressed by bzip2; unpack it with `bunzip2`",
    rb"\xfd7zXZ": "compressed by xz; unpack it with `unxz`",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it with `unzstd`",
    rb"PK\x03\x04": "a zip archive; unpack it and name the file in it",
    rb"PAR1": "a Parquet table; convert it with `python -m simla.dataset.prepare table`",
    rb"ARROW1|\xff{4}.{2}\0\0": "an Arrow table; write it as Parquet and convert that with `python -m "
    "simla.dataset.prepare table`",
    rb"(?s:.{257})ustar": "a tar file; shards are named .tar and belong into train_file of Pretrain.py",
    rb"\x80[\x02-\x05]": "a pickle of Python; write what it holds in the format that is asked for",
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF(?s:.{4})WEBP": PICTURE,
    rb"%PDF-": "a PDF",
    rb"\x89HDF": "an HDF5 file, as TensorFlow writes them; of weights get those of PyTorch",
    rb"\x93NUMPY": "a NumPy array; write what it holds in the format that is asked for",
    rb"GGUF": "a GGUF file; get the weights of PyTorch",
    rb"\xff\xfe|\xfe\xff|(?s:(?:\0[^\0]){4}|(?:[^\0]\0){4})": "text in UTF-16 or UTF-32; save it as UTF-8 "
    "(`iconv -f UTF-16 -t UTF-8`)",
}
CONTENT_BYTES = 512  # of a file's beginning, that tell


def other_content(head: bytes) -> str:
    """Return what a file is that is not what was asked for, and what to do; "" where that cannot be told.

    head: its first CONTENT_BYTES, all of a shorter one.
    """
    return next((what for begin, what in CONTENTS.items() if re.match(begin, head, re.IGNORECASE)), "")


def printable(text: str) -> str:
    """Return the text; halves of surrogate pairs, as in odd file names and cut JSON, become "?"."""
    return text.encode("utf-8", "replace").decode()


def shipped(path: object) -> object:
    """Return a path as it is, or that of this code's own file where the working folder has none there."""
    if isinstance(path, str) and not Path(path).exists() and (ROOT / path).exists():
        return str(ROOT / path)
    return path


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or else its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---- the Hugging Face hub ----

HUB_SECONDS = 5  # to wait for its first answer


@cache  # once per process
def hub_problem() -> str:
    """Return why the hub cannot be asked, "" where it can.

    Where it cannot, its libraries look into their cache alone from now on and say at once what is not there.
    By themselves they try every file of a model again and again, which takes minutes.
    """
    from huggingface_hub import constants, get_session  # here, because few runs need it

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    problems = [f"{constants.ENDPOINT} gives no answer in {HUB_SECONDS} seconds"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        except Exception as error:  # of many types: proxies, certificates, names, refusals
            problems.append(f"{constants.ENDPOINT} cannot be reached: {first_line(error)}")
        else:
            problems.append("")

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name knows no time limit
    thread.start()
    thread.join(HUB_SECONDS)
    if problems[-1]:
        constants.HF_HUB_OFFLINE = True
    return problems[-1]


def hub_answer() -> str:
    """Return where something was looked for in vain, for messages: on the hub, or in its cache alone and
    why.
    """
    problem = hub_problem()
    if not problem:
        return "on the Hugging Face hub"
    remedy = "unset it to download" if "HF_HUB_OFFLINE" in problem else "HF_HUB_OFFLINE=1 spares the try"
    return f"in the cache of the Hugging Face hub ({problem}; {remedy})"


# ---- this machine ----


def num_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """Return a port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- values that are not finite ----


def num_not_finite(values: Tensor) -> int:
    """Return how many values are NaN or infinite; where none is, in one pass, which needs no memory."""
    if not values.is_floating_point() or not values.numel():
        return 0
    values = values.detach().float() if values.element_size() == 1 else values.detach()
    least, most = values.aminmax()
    return 0 if least.isfinite() & most.isfinite() else int((~values.isfinite()).sum())


def check_weight(values: Tensor, name: str, source: str) -> None:
    """Raise UserError where weights are not finite: every score they give would mean nothing."""
    if num_bad := num_not_finite(values):
        raise UserError(
            f"{source}: {num_bad} of the {values.numel()} values of {name} are NaN or infinite; its training "
            "diverged or the file is damaged. Use an earlier checkpoint, or get the file again"
        )


def check_scores(values: Tensor, what: str, precision: str) -> Tensor:
    """Return the values. Raises UserError where some are not finite, as after overflows in half precision."""
    if num_bad := num_not_finite(values):
        remedy = "the weights give no meaningful scores for these inputs; use another checkpoint"
        if precision in ("fp16", "bf16"):
            remedy = f"numbers have probably grown too large for {precision}; compute in fp32"
        raise UserError(f"{num_bad} of {values.numel()} {what} are NaN or infinite: {remedy}")
    return values


def json_text(content: object, name: str, indent: int | None = None) -> str:
    """Return `content` as JSON for the file `name`; raise UserError where a number is not finite, which JSON
    lacks.
    """
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError as error:
        (key, value), *_ = _not_finite(content)
        raise UserError(f"{name} was not written: its {key or 'value'} would be {value}") from error


def _not_finite(content: object, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield (key, number) for every number that is not finite."""
    if isinstance(content, float) and not math.isfinite(content):
        yield key, content
    pairs = content.items() if isinstance(content, dict) else ()
    pairs = enumerate(content) if isinstance(content, list | tuple) else pairs
    for name, value in pairs:
        yield from _not_finite(value, f"{key}.{name}" if key else str(name))


# ---- log ----


def with_progress(
    items: Iterable,
    total: int,
    header: str,
    log_steps: int,
    describe: Callable[[], str] = lambda: "",
    num_done: int = 0,
) -> Iterator:
    """Yield the items and log a line with the ETA every `log_steps` items and at the last; `num_done` of the
    `total` were there before.
    """
    begin, torch = time.monotonic(), sys.modules.get("torch")  # None: no GPU is used
    for done, item in enumerate(items, num_done + 1):
        yield item
        if done % log_steps == 0 or done == total:
            seconds = (time.monotonic() - begin) / (done - num_done)
            eta = timedelta(seconds=int(seconds * (total - done)))
            memory = ""
            if torch and torch.cuda.is_available():
                memory = f"  max mem {torch.cuda.max_memory_allocated() >> 20} MiB"
            log.info(f"{header}  [{done}/{total}]  eta {eta}  {describe()}  {seconds:.3f} s/it{memory}")


def append_log(output_dir: str, record: dict) -> None:
    """Add a line to log.txt, on the main rank only. Raises UserError for a value that is not finite."""
    if is_main():
        path = Path(output_dir) / LOG
        append_line(path, json_text(record, f"a line of {path}"))


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; a full disk costs the line, not the run."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        log.error(f"{path}: a line could not be written ({error.strerror})")


@contextmanager
def atomic_write(path: str | Path, text: bool = False) -> Iterator[IO]:
    """Open a new file, of bytes or with `text` of UTF-8, that takes the place of `path` in one step, once it
    is complete and on the disk.

    On failure the file that was there stays. Raises UserError when writing fails (disk full, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # other hosts may write it, too
    try:
        with temporary.open("x", encoding="utf-8") if text else temporary.open("xb") as file:
            yield file
        with temporary.open("rb") as file:  # by name: some writers put a file of their own in its place
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):  # torch's writer hides the system's error in its own
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise UserError(
                f"{path} could not be written ({cause}); an earlier file of that name is unchanged. Free "
                "some space or choose another folder"
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def import_pyplot():
    """Return matplotlib.pyplot, drawing to files; raise UserError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # a text or a file's name may have dollars
    return plt


def check_picture_name(out: str | Path) -> None:
    """Raise UserError where matplotlib is not installed or could not write a picture of that name."""
    import_pyplot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    endings = FigureCanvasAgg.get_supported_filetypes()
    if Path(out).suffix[1:].lower() not in endings:
        raise UserError(f"{out}: the name of a picture ends in one of .{', .'.join(endings)}")


def save_figure(figure, out: str | Path | BinaryIO, dpi: int, **settings) -> None:
    """Write a picture of the kind that the name's ending says, or, without a name, PNG; close the figure."""
    if isinstance(out, str | Path):
        check_picture_name(out)
        with atomic_write(out) as file:
            figure.savefig(file, dpi=dpi, format=Path(out).suffix[1:].lower(), **settings)
    else:
        figure.savefig(out, dpi=dpi, **settings)
    import_pyplot().close(figure)


def code_revision() -> str:
    """Return the git revision of this code, "-dirty" where files differ; "unknown" outside a clone."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device named auto, cpu, cuda or cuda:N and make a GPU the current one. Raises UserError for
    one that is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if num_gpus == 1 and "SLURM_LOCALID" in os.environ:  # each task sees its own GPU alone
            local_rank = 0
        index = local_rank if device.index is None else device.index
        if index >= num_gpus:
            raise UserError(
                f"device {name}: GPU {index} asked for, {num_gpus} found; use device cpu or start fewer "
                "processes"
            )
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    return device


def make_output_folder(folder: str | Path, flag: str = "--output_dir") -> Path:
    """Return the folder that `flag` names, made where missing. Raises UserError where no file can be written
    there.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".write_test_"):  # several hosts may come at once
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}") from error
    return path


STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # the scheduler's, Ctrl-C, SLURM's --signal=USR1@120


def signal_numbers(names: tuple[str, ...]) -> list[int]:
    """Return the numbers of those signals that this system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
