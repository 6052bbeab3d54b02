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
    """Return those of Python and of the packages that a result depends on."""
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = "not installed"
    return numbers


def save_config(config: dict, output_dir: str) -> None:
    """Write config.yaml with the git revision of the code as a comment."""
    with atomic_write(Path(output_dir, "config.yaml"), text=True) as file:
        file.write(f"# code revision: {code_revision()}\n")
        YAML(typ="safe", pure=True).dump(config, file)


def config_hash(config: dict) -> str:
    """Return the sha256 of a resolved config, equal for equal ones."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> dict:
    """Return the JSON object in a run.json or a lock's file, empty where none can be read."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def previous_run(output_dir: str, job: str = "") -> str:
    """Return the id of the run that was last started in the folder, "" where none can be read, or where that
    was not of the `job`.
    """
    record = read_record(Path(output_dir, "run.json"))
    return "" if job and record.get("job", job) != job else record.get("run", "")


def this_job() -> str:
    """Return what a process has in common with one that SLURM or torchrun starts in its place, and with none
    of another job: SLURM's number of the job, torchrun's folder for this call, or else the parent process.
    """
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"SLURM {job}"
    of_torchrun = os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("/attempt_")[0]
    return f"{socket.gethostname()} {of_torchrun or os.getppid()}"


def holds_training(output_dir: str) -> bool:
    """Return whether a training has written into the folder: its run.json, checkpoints or steps."""
    folder = Path(output_dir)
    is_training = read_record(folder / "run.json").get("is_training")
    return bool(is_training or run_checkpoints(folder) or (folder / STEPS_LOG).exists())


def hold_folder(output_dir: str) -> None:
    """Keep other trainings out of the folder until `release_folder` or the end of this process, however it
    ends: the lock is the system's.

    Waits some seconds for it, as for a predecessor that is just ending. UserError, naming who has it, where
    another training goes on holding it.
    """
    global _lock
    release_folder()
    lock, holder = FileLock(Path(output_dir, LOCK)), Path(output_dir, f"{LOCK}.json")
    try:
        lock.acquire(timeout=PREDECESSOR_SECONDS)
    except Timeout as error:
        who = {"host": "unknown", "pid": "unknown", "start": "unknown", **read_record(holder)}
        raise UserError(
            "{0} is in use by another training (host {host}, process {pid}, started {start}); wait for its "
            "end, stop it, or choose another --output_dir. If that process is dead, as on a machine that "
            "failed, delete {1}".format(output_dir, LOCK, **who)
        ) from error
    except (OSError, NotImplementedError) as error:
        log.warning(f"{output_dir} cannot be locked ({error}): nothing keeps a second training out of it")
        return
    _lock = lock
    with atomic_write(holder, text=True) as file:
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": _now()}))


def release_folder() -> None:
    """Let other trainings into the folder that `hold_folder` took, if any."""
    global _lock
    if _lock is not None:
        _lock.release()
        _lock = None


def set_aside_logs(output_dir: str, run: str) -> None:
    """Move what another run than `run` has written into the folder, checkpoints apart, to earlier_1/ in it,
    or earlier_2/, ...: its logs neither mix with those to come nor are they lost.
    """
    folder = Path(output_dir)
    names = [name for name in RUN_FILES if (folder / name).exists()]
    if previous_run(output_dir) == run or not set(names) & set(LOGS):
        return
    targets = (folder / f"earlier_{number}" for number in itertools.count(1))
    target = next(path for path in targets if not path.exists())
    target.mkdir()
    for name in names:
        (folder / name).rename(target / name)
    log.info(f"{output_dir} was used before: {', '.join(names)} of the earlier run are in {target} now")


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
        chance: dict[str, float] | None = None,
    ):
        self.path, self.begin, self.is_training = Path(output_dir, "run.json"), time.monotonic(), is_training
        is_gpu = device.type == "cuda"
        self.content = {
            "run": run,
            "is_training": is_training,
            "status": "running",
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "resumed_from": resumed_from,
            "job": this_job(),
            "code_revision": code_revision() if is_main() else "",
            "versions": versions() if is_main() else {},
            "num_hosts": len(set(all_gather_objects(socket.gethostname()))),
            "num_ranks": world_size(),
            "device": torch.cuda.get_device_name(device) if is_gpu else platform.processor() or "cpu",
            "config_sha256": config_hash(config),
            "chance": chance or {},
            "start": _now(),
        }
        self._write()
        RunRecord.current = self

    def finish(self, status: str, message: str = "") -> None:
        """Write how it ended; status: done, stopped (and resumable) or failed; memory is the main rank's."""
        seconds, peak = round(time.monotonic() - self.begin, 1), peak_bytes(torch.device("cpu")) >> 20
        self.content |= {"status": status, "message": message, "end": _now(), "seconds": seconds}
        self.content["peak_memory_mib"] = peak
        if torch.cuda.is_available():
            self.content["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
        self._write()

    def _write(self) -> None:
        if not is_main():
            return
        try:
            with atomic_write(self.path, text=True) as file:
                file.write(json.dumps(self.content, indent=1))
        except UserError as error:  # the record is not worth the run
            log.error(error)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
