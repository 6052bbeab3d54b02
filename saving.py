"""Checkpoint files: written whole in the background, told apart when damaged, the newest and the best kept.

A file is torch.save's zip archive; the CRC-32 that it holds of every tensor tells a damaged one. Names order
a run's files: checkpoint_04.pth is the end of epoch 4, checkpoint_04_000250.pth step 250 within it.
"""

import os
import re
import shutil
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from safe_load import safe_load
from utils import UserError, first_line, is_main, json_text, log

NAME = re.compile(r"checkpoint_(\d+)(?:_(\d+))?\.pth")
BEST = "checkpoint_best.pth"


# ---- one file ----


@contextmanager
def atomic_write(path: str | Path, text: bool = False) -> Iterator[IO]:
    """A new file that takes the place of `path` in one step, once it is complete and on the disk; it takes
    bytes, or with `text` text, which becomes UTF-8.

    On failure the file that was there stays. Raises UserError when writing fails (disk full, no permission).
    """
    path = Path(path)
    temporary = _temporary(path)
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


def result_path(output_dir: str | Path, name: str) -> Path:
    """Return where a result goes, result/<name>; makes that folder. UserError where it cannot be made."""
    path = Path(output_dir) / "result" / name
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}); choose another folder") from error
    return path


def save_result(output_dir: str | Path, name: str, content: dict | list) -> None:
    """Writes result/<name>.json, on the main rank only. UserError for a value that is not finite, and where
    the file cannot be written.
    """
    if is_main():
        path = result_path(output_dir, f"{name}.json")
        text = json_text(content, str(path), indent=1)
        with atomic_write(path, text=True) as file:
            file.write(text)


def _temporary(path: Path) -> Path:
    """A name of its own: other processes, of other hosts too, may be writing the same file."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _same_file(source: Path, path: Path) -> None:
    """`path` becomes another name of `source`, or a copy where the disk knows no second names."""
    temporary = _temporary(path)
    try:
        temporary.hardlink_to(source)
    except OSError:
        try:
            shutil.copyfile(source, temporary)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise UserError(f"{path} could not be written ({error}); an earlier one is unchanged") from error
    temporary.replace(path)


def _plain(value: Any, name: str, tensor: Callable[[Tensor], Tensor]) -> Any:
    """The value in built-in types; a config's own kinds of numbers would not load without its package."""
    if isinstance(value, Tensor):
        return tensor(value)
    if value is None or isinstance(value, np.ndarray):
        return value
    if isinstance(value, dict):
        return {
            _plain(key, name, tensor): _plain(item, f"{name}.{key}", tensor) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_plain(item, f"{name}[{i}]", tensor) for i, item in enumerate(value))
    if isinstance(value, np.generic):
        return value.item()
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint takes tensors and plain values")


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Writes tensors and plain values, atomically. Raises UserError (disk full), TypeError (other values)."""
    state = _plain(state, "state", lambda tensor: tensor)
    with atomic_write(path) as file:
        torch.save(state, file)


def load_checkpoint(path: str | Path) -> dict:
    """The dict of `save_checkpoint`, memory-mapped on the CPU. Raises UserError if it is none."""
    checkpoint = safe_load(path)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a training checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def check_undamaged(path: str | Path) -> None:
    """Reads the whole file against its checksums; UserError naming what is damaged. Needs no memory."""
    try:
        if not zipfile.is_zipfile(
            path
        ):  # published files may be of torch.save's older kind, without checksums
            safe_load(path)
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except UserError:
        raise
    except Exception as error:  # damage can show as any error
        raise UserError(f"{path} is damaged ({type(error).__name__}: {first_line(error)})") from error
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of its part {damaged} does not match")


# ---- a run's files ----


def step_name(epoch: int, step: int) -> str:
    """Of a checkpoint after `step` steps of the epoch in progress."""
    return f"checkpoint_{epoch:02d}_{step:06d}.pth"


def epoch_name(epoch: int) -> str:
    """Of a checkpoint at the end of an epoch."""
    return f"checkpoint_{epoch:02d}.pth"


def progress(path: Path) -> tuple[int, int]:
    """(epochs finished, steps of the next one), from the name."""
    epoch, step = NAME.fullmatch(path.name).groups()
    return (int(epoch) + 1, 0) if step is None else (int(epoch), int(step))


def run_checkpoints(folder: str | Path) -> list[Path]:
    """The files that a run in the folder can go on from, the furthest first."""
    found = [path for path in Path(folder).glob("checkpoint_*.pth") if NAME.fullmatch(path.name)]
    return sorted(found, key=progress, reverse=True)


def newest_good(folder: str | Path, run: str | None = None) -> Path | None:
    """The furthest undamaged checkpoint of the run (its id) in the folder; None where there is none.

    run None: of the run that wrote last. Damaged files are skipped with a message.
    """
    runs: dict[str, list[Path]] = {}
    wanted = run
    for path in sorted(run_checkpoints(folder), key=lambda path: path.stat().st_mtime):
        try:
            owner = load_checkpoint(path).get("run", "")
        except UserError as error:
            log.warning(f"skipped: {error}")
            continue
        runs.setdefault(owner, []).append(path)
        wanted = owner if run is None else run
    for path in sorted(runs.get(wanted, []), key=progress, reverse=True):
        try:
            check_undamaged(path)
            return path
        except UserError as error:
            log.warning(f"skipped: {error}")
    return None


def best_problem(path: Path, run: str, best: dict) -> str:
    """Return why the file is not that of a run's best epoch, whose scores and number are `best`, or "".

    It was written at that epoch's end, so it holds these scores, too.
    """
    if not path.is_file():
        return f"{path} is missing"
    try:
        content = load_checkpoint(path)
        check_undamaged(path)
    except UserError as error:
        return str(error)
    if content.get("run") != run:
        return f"{path} is of another run"
    epoch = content.get("epoch")
    if content.get("step") or content.get("best") != best or best.get("epoch", epoch) != epoch:
        return f"{path} is not of the best epoch that the checkpoint names"
    return ""


def find_best(path: Path, folder: Path, run: str, best: dict) -> str:
    """Makes checkpoint_best.pth in the folder that of the run's best epoch, if there is one beside the file
    `path`, or that is it; else returns why not.
    """
    beside = [path.with_name(name) for name in (BEST, epoch_name(best.get("epoch", 0)))]
    found = next((file for file in (*beside, path) if not best_problem(file, run, best)), None)
    if found is None:
        return best_problem(beside[0], run, best)
    if found.resolve() != (folder / BEST).resolve():
        _same_file(found, folder / BEST)
    return ""


def _run_of(path: Path, unknown: str) -> str:
    """The id of the run that wrote the checkpoint, "" where it says none; `unknown` for a damaged one."""
    try:
        return load_checkpoint(path).get("run", "")
    except UserError:
        return unknown


def keep_under_own_name(path: Path, epoch: int, step: int) -> None:
    """A resumed file, after `step` steps of `epoch`, is found again by the name that says so, as where a run
    goes on from checkpoint_best.pth and is stopped before it saves anything.
    """
    own = path.with_name(step_name(epoch, step) if step else epoch_name(epoch - 1))
    if not own.exists():
        _same_file(path, own)


def set_aside_later(folder: Path, run: str, at: tuple[int, int]) -> Path | None:
    """Moves the checkpoints of the run in the folder that are later than `at`, (epochs finished, steps of the
    next one), the best one too if it is, to abandoned/DATE_N/ in it, and says so; returns that folder.

    None where there are none. Damaged ones with later names go, too.
    """
    later = [path for path in run_checkpoints(folder) if progress(path) > at and _run_of(path, run) == run]
    with suppress(UserError):
        best = load_checkpoint(folder / BEST)
        if best.get("run") == run and (best["epoch"] + 1, best["step"]) > at:
            later.append(folder / BEST)
    if not later:
        return None
    day = f"{datetime.now():%Y-%m-%d}"
    names = (folder / "abandoned" / f"{day}_{number}" for number in count(1))
    target = next(name for name in names if not name.exists())
    target.mkdir(parents=True)
    for path in later:
        path.rename(target / path.name)
    log.warning(
        f"the run goes on from an earlier state: {', '.join(path.name for path in later)} are in {target} now"
    )
    return target


class Saver:
    """Writes a run's checkpoints behind the training's back, one at a time, and deletes what is too old.

    `save` returns once the state is copied to host memory; a failed write is reported when it fails and
    training goes on. Kept: the newest `keep_last`, every epoch's with `keep_epochs`, and the best. Only files
    of this run are deleted: `saved` are the names of those from before a resume.
    """

    _writers: ClassVar[set[threading.Thread]] = set()
    _starting = threading.Lock()  # a thread that is listed has started

    def __init__(self, folder: str | Path, keep_last: int, keep_epochs: bool, saved: list[str] | None = None):
        self.folder, self.keep_last, self.keep_epochs = Path(folder), keep_last, keep_epochs
        self.saved = list(saved or [])
        self.error: UserError | None = None  # of the last write
        self.best_error: UserError | None = None  # of the last write of a best one
        if is_main():
            for left_over in self.folder.glob(".checkpoint_*.tmp"):  # of a process killed while it saved
                left_over.unlink(missing_ok=True)

    def take_up(self, checkpoint: dict) -> None:
        """Goes on from a checkpoint of this folder; deletes what its writer was killed before deleting."""
        self.saved = list(checkpoint.get("saved", []))
        if is_main():
            if replaced := checkpoint.get("replaces"):
                (self.folder / replaced).unlink(missing_ok=True)
            self._delete_old()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None:
            self.close()
        else:
            self.wait()

    def save(self, name: str, state: dict, is_best: bool = False, replaces: str = "") -> None:
        """Copies the state, then writes it as `name`, with `is_best` as checkpoint_best.pth too, and deletes
        the file `replaces`.

        Waits for the write before, if that is not done. Raises TypeError for values that are not plain.
        """
        self.wait()
        copies: dict[tuple, Tensor] = {}  # tied weights stay one

        def to_host(tensor: Tensor) -> Tensor:
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if key not in copies or not tensor.numel():
                copies[key] = tensor.detach().to("cpu", copy=True)
            return copies[key]

        names = [known for known in self.saved if known not in (name, replaces)] + [name]
        snapshot = _plain({**state, "saved": names, "replaces": replaces}, "state", to_host)
        writer = threading.Thread(target=self._write, args=(name, snapshot, is_best, names), name="saver")
        with self._starting:
            self._writers.add(writer)
            writer.start()

    def _write(self, name: str, snapshot: dict, is_best: bool, names: list[str]) -> None:
        path = self.folder / name
        try:
            with atomic_write(path) as file:
                torch.save(snapshot, file)
                if is_best:  # first, and complete: whoever finds `name` relies on the best one's being there
                    file.flush()
                    os.fsync(file.fileno())
                    _same_file(Path(file.name), self.folder / BEST)
            for old in set(self.saved) - set(names):
                (self.folder / old).unlink(missing_ok=True)
            self.saved = names
            self._delete_old()
            self.error = None
            self.best_error = None if is_best else self.best_error
        except Exception as error:  # a thread's own end would go unnoticed
            problem = f"{path} could not be written ({type(error).__name__}: {first_line(error)})"
            self.error = error if isinstance(error, UserError) else UserError(problem)
            self.best_error = self.error if is_best else self.best_error
            log.error(f"checkpoint not saved, training goes on: {self.error}")
        finally:
            self._writers.discard(threading.current_thread())

    def _delete_old(self) -> None:
        names = sorted(self.saved, key=lambda name: progress(Path(name)))
        for name in names[: -self.keep_last]:
            if not (self.keep_epochs and NAME.fullmatch(name)[2] is None):
                with suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)
                self.saved.remove(name)

    @classmethod
    def wait(cls) -> None:
        """Returns when nothing is being written any more."""
        with cls._starting:
            writers = list(cls._writers)
        for writer in writers:
            writer.join()

    def close(self) -> None:
        """Waits; raises UserError when the last checkpoint, or the best one, could not be written."""
        self.wait()
        if error := self.error or self.best_error:
            raise error
