"""A tiny data set and tiny configs on disk, for running the task scripts for real."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import warm
from ruamel.yaml import YAML

from simla.configs.reader import read_yaml
from simla.demo.data import make_demo
from simla.utils import free_port

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


def run(
    script: str,
    *arguments: object,
    num_processes: int = 0,
    launcher: str = "launch",
    env: dict | None = None,
    cold: bool = False,
):
    """Runs a task script as a user would; num_processes 0 = plain python. Returns the finished process.

    cold: with every import, as subprocess starts it, where that is what is tested; else as `warm` does.
    """
    command = [sys.executable]
    if num_processes:
        module = {"launch": "torch.distributed.launch", "run": "torch.distributed.run"}[launcher]
        command += ["-m", module, f"--nproc_per_node={num_processes}", f"--master_port={free_port()}"]
        command += ["--use_env"] if launcher == "launch" else []
    command += [script, "--device", "cpu", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if cold:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return warm.run(command, cwd=ROOT, env=environment, timeout=300)
