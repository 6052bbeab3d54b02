"""run.json: what was run, with what, how long, and how it ended; written at the start and at the end."""

import hashlib
import itertools
import json
import os
import platform
import shlex
import socket
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from simla.checkpoint.save import run_checkpoints
from simla.engine.measure import peak_bytes
from simla.utils import (
    LOG,
    STEPS_LOG,
    UserError,
    all_gather_objects,
    atomic_write,
    code_revision,
    is_main,
    log,
    world_size,
)

LOGS = (LOG, STEPS_LOG, "tensorboard")
LOCK, PREDECESSOR_SECONDS = "training.lock", 10.0
RUN_FILES = (*LOGS, "run.json", "config.yaml", "result")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "Pillow", "safetensors", "ruamel.yaml")

_lock: FileLock | None = None  # of the output folder in which this process trains


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def save_config(config: dict, output_dir: str) -> None:
    """Write config.yaml with the git revision of the code as a comment."""
    with atomic_write(Path(output_dir) / "config.yaml", text=True) as file:
        file.write(f"# code revision: {code_revision()}\n")
        YAML(typ="safe", pure=True).dump(config, file)


def config_hash(config: dict) -> str:
    """Equal for equal resolved configs, sha256."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def previous_run(output_dir: str) -> str:
    """The id of the run that was last started in the folder, "" where none can be read."""
    try:
        return json.loads((Path(output_dir) / "run.json").read_bytes())["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def holds_training(output_dir: str) -> bool:
    """Whether a training has written into the folder: its run.json, checkpoints or steps."""
    folder = Path(output_dir)
    try:
        is_training = json.loads((folder / "run.json").read_bytes())["is_training"]
    except (OSError, ValueError, KeyError, TypeError):
        is_training = False
    return bool(is_training or run_checkpoints(folder) or (folder / STEPS_LOG).exists())


def hold_folder(output_dir: str) -> None:
    """Keeps other trainings out of the folder until `release_folder` or the end of this process, however it
    ends: the lock is the system's.

    Waits some seconds for it, as for a predecessor that is just ending. UserError, naming who has it, where
    another training goes on holding it.
    """
    global _lock
    release_folder()
    lock = FileLock(Path(output_dir) / LOCK)
    holder = Path(output_dir) / f"{LOCK}.json"
    try:
        lock.acquire(timeout=PREDECESSOR_SECONDS)
    except Timeout as error:
        try:
            who = "host {host}, process {pid}, started {start}".format(**json.loads(holder.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            who = "a process that has not said which it is"
        raise UserError(
            f"{output_dir} is in use by another training ({who}); wait for its end, stop it, or choose "
            f"another --output_dir. If that process is dead, as on a machine that failed, delete {LOCK}"
        ) from error
    except (OSError, NotImplementedError) as error:
        log.warning(f"{output_dir} cannot be locked ({error}): nothing keeps a second training out of it")
        return
    _lock = lock
    with atomic_write(holder) as file:
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": _now()}).encode())


def release_folder() -> None:
    """Lets other trainings into the folder that `hold_folder` took, if any."""
    global _lock
    if _lock is not None:
        _lock.release()
        _lock = None


def set_aside_logs(output_dir: str, run: str) -> None:
    """Moves what another run than `run` has written into the folder, checkpoints apart, to earlier_1/ in it,
    or earlier_2/, ...: its logs neither mix with those to come nor are they lost.
    """
    folder = Path(output_dir)
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if previous_run(output_dir) == run or not any(name in found for name in LOGS):
        return
    number = next(n for n in itertools.count(1) if not (folder / f"earlier_{n}").exists())
    target = folder / f"earlier_{number}"
    target.mkdir()
    for name in found:
        (folder / name).rename(target / name)
    log.info(f"{output_dir} was used before: {', '.join(found)} of the earlier run are in {target} now")


class RunRecord:
    """The run.json of this process's run; the main rank writes it."""

    current: "RunRecord | None" = None  # of the script that runs

    def __init__(
        self,
        output_dir: str,
        run: str,
        config: dict,
        device: torch.device,
        resumed_from: str,
        is_training: bool = True,
    ):
        self.path, self.begin, self.is_training = Path(output_dir) / "run.json", time.monotonic(), is_training
        self.content = {
            "run": run,
            "is_training": is_training,
            "status": "running",
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "resumed_from": resumed_from,
            "code_revision": code_revision() if is_main() else "",
            "versions": versions() if is_main() else {},
            "num_hosts": len(set(all_gather_objects(socket.gethostname()))),
            "num_ranks": world_size(),
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else platform.processor() or "cpu",
            "config_sha256": config_hash(config),
            "start": _now(),
        }
        self._write()
        RunRecord.current = self

    def finish(self, status: str, message: str = "") -> None:
        """status: done, stopped (and resumable) or failed; peak memory is the main rank's."""
        self.content |= {
            "status": status,
            "message": message,
            "end": _now(),
            "seconds": round(time.monotonic() - self.begin, 1),
            "peak_memory_mib": peak_bytes(torch.device("cpu")) >> 20,
        }
        if torch.cuda.is_available():
            self.content["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
        self._write()

    def _write(self) -> None:
        if not is_main():
            return
        try:
            with atomic_write(self.path) as file:
                file.write(json.dumps(self.content, indent=1).encode())
        except UserError as error:  # the record is not worth the run
            log.error(error)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
