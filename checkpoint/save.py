"""Checkpoint files: written whole in the background, told apart when damaged, the newest and the best kept.

A file is torch.save's zip archive; the CRC-32 that it holds of every tensor tells a damaged one. A name
orders a run's files: checkpoint_04.pth is the end of epoch 4, checkpoint_04_000250.pth step 250 within it.
A process may be killed at any moment and a disk be full; this is how a save goes, and why what is found
afterwards can be relied on:

1. `Saver.save` waits for the save before and copies the state to host memory; then training goes on, and the
   rest happens in a thread.
2. The state goes to the disk under a temporary name, with the names of the run's files as they will be
   (`saved`) and of the one that it makes needless (`replaces`). What a killed process leaves of that is
   deleted by the next one.
3. The complete file of a best epoch first gets the second name checkpoint_best.pth.
4. The file takes its own name, in one step: whoever finds it finds the best one, too.
5. The file that it replaces goes, and those of the run's others that are too old. Where a process is killed
   before that, the names are in the file, and resuming from it deletes them (`Saver.take_up`).
6. A failure at any point is logged, and training goes on. The next good save makes up for it, but not for
   that of a best epoch, which only a better one does. What nothing has made up for fails the run at its end.

A run resumes from the furthest undamaged file that names its id (`newest_good`). Where it goes on from an
earlier one, the later ones would be taken for its future: they move to abandoned/ (`set_aside_later`).
"""

import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from simla.checkpoint.safe_load import safe_load
from simla.utils import UserError, atomic_write, first_line, is_main, log

NAME = re.compile(r"checkpoint_(\d+)(?:_(\d+))?\.pth")
BEST = "checkpoint_best.pth"


# ---- one file ----


def _same_file(source: Path, path: Path) -> None:
    """Make `path` another name of `source`, or a copy where the disk knows no second names."""
    with atomic_write(path) as file:
        name = Path(file.name)
        name.unlink()  # what has this name at the end takes the place of `path`
        try:
            name.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, name)


def _plain(value: Any, name: str, tensor: Callable[[Tensor], Tensor]) -> Any:
    """Return the value in built-in types; a config's own numbers would not load without its package."""
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


def load_checkpoint(path: str | Path) -> dict:
    """Return what a checkpoint holds, memory-mapped on the CPU. Raises UserError if that is no dict."""
    checkpoint = safe_load(path)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a training checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def check_undamaged(path: str | Path) -> None:
    """Read the whole file against its checksums. Raises UserError, naming what is damaged."""
    try:
        if not zipfile.is_zipfile(path):  # published files may be older ones of torch, without checksums
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
    """Return the name of a checkpoint after `step` steps of the epoch in progress."""
    return f"checkpoint_{epoch:02d}_{step:06d}.pth"


def epoch_name(epoch: int) -> str:
    """Return the name of a checkpoint at the end of an epoch."""
    return f"checkpoint_{epoch:02d}.pth"


def progress(path: Path) -> tuple[int, int]:
    """Return (epochs finished, steps of the next one), from the name."""
    epoch, step = NAME.fullmatch(path.name).groups()
    return (int(epoch) + 1, 0) if step is None else (int(epoch), int(step))


def run_checkpoints(folder: str | Path) -> list[Path]:
    """Return the files that a run in the folder can go on from, the furthest first."""
    paths = [path for path in Path(folder).glob("checkpoint_*.pth") if NAME.fullmatch(path.name)]
    return sorted(paths, key=progress, reverse=True)


def _run_of(path: Path) -> str | None:
    """Return the id of the run that wrote the checkpoint, "" where it says none, None for a damaged one."""
    try:
        return load_checkpoint(path).get("run", "")
    except UserError:
        return None


def newest_good(folder: str | Path, run: str | None = None) -> Path | None:
    """Return the furthest undamaged checkpoint of the run (its id) in the folder; None where there is none.

    run None: of the run that wrote last. Damaged files are skipped with a message.
    """
    runs = {path: _run_of(path) for path in run_checkpoints(folder)}
    known = [path for path in runs if runs[path] is not None]
    if run is None and known:
        run = runs[max(known, key=lambda path: path.stat().st_mtime)]
    for path in runs:
        if runs[path] in (run, None):
            try:
                load_checkpoint(path)
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
    """Make checkpoint_best.pth in the folder that of the run's best epoch and return ""; return why not where
    neither `path` is it nor a file beside it.
    """
    for name in (BEST, epoch_name(best.get("epoch", 0)), path.name):
        file = path.with_name(name)
        if not best_problem(file, run, best):
            if file.resolve() != (folder / BEST).resolve():
                _same_file(file, folder / BEST)
            return ""
    return best_problem(path.with_name(BEST), run, best)


def keep_under_own_name(path: Path, epoch: int, step: int) -> None:
    """Give a resumed file, after `step` steps of `epoch`, the name that says so, by which it is found again:
    a run may go on from checkpoint_best.pth and be stopped before it saves anything.
    """
    named = path.with_name(step_name(epoch, step) if step else epoch_name(epoch - 1))
    if not named.exists():
        _same_file(path, named)


def set_aside_later(folder: Path, run: str, at: tuple[int, int]) -> Path | None:
    """Move the checkpoints of the run in the folder that are later than `at`, (epochs finished, steps of the
    next one), the best one too if it is, to abandoned/DATE_N/ in it, and say so. Damaged ones go, too.

    Returns that folder; None where there are no later ones.
    """
    later = [path for path in run_checkpoints(folder) if progress(path) > at and _run_of(path) in (run, None)]
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
    """A writer of a run's checkpoints, one at a time in the background, that deletes what is too old.

    Kept: the newest `keep_last`, every epoch's with `keep_epochs`, and the best. Only files of this run are
    deleted, whose names are `saved`.
    """

    _writer: ClassVar[threading.Thread | None] = None
    _starting = threading.Lock()  # whoever sees a writer sees it started

    def __init__(self, folder: str | Path, keep_last: int, keep_epochs: bool) -> None:
        self.folder, self.keep_last, self.keep_epochs = Path(folder), keep_last, keep_epochs
        self.saved: list[str] = []
        self.error: UserError | None = None  # of the last write
        self.best_error: UserError | None = None  # of the last write of a best one
        if is_main():
            for left_over in self.folder.glob(".checkpoint_*.tmp"):  # of a process killed while it saved
                left_over.unlink(missing_ok=True)

    def take_up(self, checkpoint: dict) -> None:
        """Go on from a checkpoint of this folder; delete what its writer was killed before deleting."""
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
        """Copy the state, then write it as `name`, with `is_best` as checkpoint_best.pth too, and delete the
        file `replaces`. Raises TypeError for values that are not plain.
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
            writer.start()
            Saver._writer = writer

    def _write(self, name: str, snapshot: dict, is_best: bool, names: list[str]) -> None:
        path = self.folder / name
        try:
            with atomic_write(path) as file:
                torch.save(snapshot, file)
                if is_best:
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

    def _delete_old(self) -> None:
        names = sorted(self.saved, key=lambda name: progress(Path(name)))
        for name in names[: -self.keep_last]:
            if not (self.keep_epochs and NAME.fullmatch(name)[2] is None):
                with suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)
                self.saved.remove(name)

    @classmethod
    def wait(cls) -> None:
        """Return when nothing is being written any more."""
        with cls._starting:
            writer = cls._writer
        if writer:
            writer.join()

    def close(self) -> None:
        """Wait; raise UserError when the last checkpoint, or the best one, could not be written."""
        self.wait()
        if error := self.error or self.best_error:
            raise error
