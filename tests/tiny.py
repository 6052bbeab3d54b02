"""A tiny data set and tiny configs on disk, for running the task scripts for real."""

import importlib
import json
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML

from simla.configs.reader import read_yaml
from simla.demo.data import make_demo
from simla.utils import UserError, free_port

ROOT = Path(__file__).parent.parent
MODEL = {
    "image_res": 32,
    "vision_width": 32,
    "vit": {"patch_size": 8, "depth": 2, "num_heads": 2},
    "bert_config": {
        "vocab_size": 400,
        "hidden_size": 32,
        "encoder_width": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
    "embed_dim": 16,
    "queue_size": 24,
    "init": "scratch",
    "num_workers": 0,
    "log_steps": 2,
}


def make_tiny(folder: Path) -> dict[str, Path]:
    """Scenes and the configs that train and evaluate on them -> {"data", "Pretrain", "Retrieval"}."""
    data = folder / "data"
    make_demo(data, num_train=24, num_val=6, num_test=7, size=48, seed=3, workers=1)
    pretrain = {
        **MODEL,
        "train_file": str(data / "pretrain_train.json"),
        "text_encoder": str(data / "bert"),
        "batch_size": 4,
        "num_masking_patches": 5,
        "min_num_patches": 2,
        "image_tokenizer": {"kind": "kmeans", "path": str(folder / "codebook.safetensors"), "vocab_size": 16},
        "optimizer": {"opt": "adamW", "lr": 1e-3},
        "schedular": {"lr": 1e-3, "epochs": 2, "warmup_epochs": 2, "warmup_step_size": 1},
    }
    retrieval = {
        **MODEL,
        "test_file": str(data / "retrieval_test.json"),
        "text_encoder": str(data / "bert"),
        "batch_size_test": 4,
        "k_test": 3,
    }
    paths = {"data": data}
    for name, config in (("Pretrain", pretrain), ("Retrieval", retrieval)):
        paths[name] = folder / f"{name}.yaml"
        with paths[name].open("w") as file:
            YAML(typ="safe", pure=True).dump(config, file)
    return paths


def demo_config(name: str, data: Path, folder: Path) -> Path:
    """Write configs/demo/NAME.yaml, its base included, into the folder, for the demo's data in `data`."""
    path = folder / f"{name}.yaml"
    values = json.dumps(read_yaml(ROOT / "configs" / "demo" / path.name))  # which is YAML, too
    path.write_text(values.replace("data/demo", str(data)), encoding="utf-8")
    return path


def launch_here(started: list[list[str]], stop_in: str = "") -> Callable[..., None]:
    """Return what takes the place of the demo's `launch`: the script runs in this process, and its command is
    added to `started`; `stop_in`: the script that fails after its training.
    """

    def launch(script, *arguments):
        started.append([script, *arguments])
        sys.argv = [script, "--device", "cpu", *arguments]
        importlib.import_module(script.removesuffix(".py")).parse_and_run()
        if script == stop_in and "--evaluate" not in arguments:
            raise UserError(f"{script} failed")

    return launch


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Inside, as on a full disk: no file of this process grows beyond so many bytes."""
    limits, no_bytecode = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # Python does not notice that it writes but a part of it
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = no_bytecode


FORKS = multiprocessing.get_context("forkserver")  # what it starts has the packages imported already
if sys.platform == "linux":  # elsewhere some of them do not survive a fork, and each process imports them
    FORKS.set_forkserver_preload(
        ["torch.distributed", "torch.utils.tensorboard", "timm", "transformers", "cv2"]
    )


def _be_script(command: list[str], env: dict[str, str], stdout: Path, stderr: Path) -> None:
    os.setsid()
    for number, path in enumerate((stdout, stderr), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def fork_script(command: Iterable[object], stdout: Path, stderr: Path, env: dict | None = None):
    """Return the started process of a script (its file, arguments): as `python` would start it from the
    root, but the packages are there in no time.
    """
    environment = {name: str(value) for name, value in {**os.environ, **(env or {})}.items()}
    process = FORKS.Process(target=_be_script, args=(list(map(str, command)), environment, stdout, stderr))
    process.start()
    return process


def run_forked(*command: object, num_processes: int = 0, env: dict | None = None):
    """Return the finished process of `fork_script`, or of so many ranks as one: their first error code."""
    ranks = [{}]
    if num_processes:
        shared = {"WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(num_processes)]
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "stdout"), Path(folder, "stderr")
        processes = [fork_script(command, *printed, {**(env or {}), **rank}) for rank in ranks]
        for process in processes:
            process.join(600)
            process.kill()
            process.join()
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        return subprocess.CompletedProcess(command, code, *(file.read_text("utf-8") for file in printed))


def run(script: str, *arguments: object, num_processes: int = 0, launcher: str = "", env: dict | None = None):
    """Return the finished process of a task script on the CPU; num_processes 0 = one that is no rank.

    launcher: "python", "launch" or "run" (torch's) start it as a user would; "" forks it, which is faster.
    """
    command = [script, "--device", "cpu", *map(str, arguments)]
    if not launcher:
        return run_forked(*command, num_processes=num_processes, env=env)
    if launcher != "python":
        flags = [f"--nproc_per_node={num_processes}", f"--master_port={free_port()}"]
        flags += ["--use_env"] if launcher == "launch" else []
        command = ["-m", f"torch.distributed.{launcher}", *flags, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
