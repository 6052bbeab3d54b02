"""Tiny checkpoints of every task on the tiny data set, for the tests of the Python interface."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from tiny import MODEL, make_tiny
from torch import nn

from simla.checkpoint.initial import starting_weights
from simla.checkpoint.tasks import TASKS
from simla.configs.reader import read_config
from simla.configs.schema import TABLES
from simla.dataset.text import build_tokenizer

TASK_OF = {"pretrain": "Pretrain", "retrieval": "Retrieval", "vqa": "VQA", "ve": "VE", "nlvr": "NLVR"}


class Tiny(NamedTuple):
    """data: the data set's folder; checkpoints and configs (YAML files): of each kind and task."""

    data: Path
    checkpoints: dict[str, Path]
    configs: dict[str, Path]

    def config(self, task: str, *overrides: str) -> dict:
        return read_config(str(self.configs[task]), TABLES[task], list(overrides))

    def script_model(self, task: str, kind: str) -> tuple[nn.Module, dict]:
        """Model and config as the task's script has them when it evaluates the checkpoint."""
        config = self.config(task)
        model = TASKS[task].build(config)
        starting_weights(model, config, task, str(self.checkpoints[kind]))
        return model.eval(), config

    def tokenizer(self):
        return build_tokenizer(str(self.data / "bert"))

    def entries(self, name: str) -> list[dict]:
        return json.loads((self.data / f"{name}.json").read_text())


def make_checkpoints(folder: Path) -> Tiny:
    data = make_tiny(folder)["data"]
    files = {
        "train_file": str(data / "pretrain_train.json"),
        "text_encoder": str(data / "bert"),
        "batch_size_test": 3,  # 7 test images: the last batch is smaller
        "k_test": 3,
        "optimizer": {"lr": 1e-3},
        "schedular": {"epochs": 2},
        "image_tokenizer": {"kind": "kmeans", "path": str(folder / "codebook.safetensors"), "vocab_size": 16},
        "num_masking_patches": 5,
        "refcoco_data": str(data),
        "det_file": str(data / "refcoco+" / "dets.json"),
        "answer_list": str(data / "vqa_answer_list.json"),
    }
    own = dict.fromkeys(TASKS, files)
    for task, name in (("VQA", "vqa"), ("VE", "ve"), ("NLVR", "nlvr"), ("Retrieval", "retrieval")):
        splits = {f"{split}_file": str(data / f"{name}_{split}.json") for split in ("val", "test")}
        own[task] = {**files, **splits}
    own["VE"]["image_root"] = str(data / "images")
    own["zero_shot_retrieval"] = own["Retrieval"]
    own["Grounding"] = {**files, "test_file": str(data / "grounding_test.json")}
    configs, checkpoints = {}, {}
    for task, table in TABLES.items():
        configs[task] = folder / f"{task}_api.yaml"
        content = {key: value for key, value in {**MODEL, **own[task]}.items() if key in table}
        configs[task].write_text(json.dumps(content))  # JSON is YAML
    tiny = Tiny(data, checkpoints, configs)
    for seed, (kind, task) in enumerate({**TASK_OF, "pretrain_nlvr": "Pretrain_NLVR"}.items()):
        config = tiny.config(task)
        torch.manual_seed(seed)
        model = TASKS[task].build(config)
        rng = torch.Generator().manual_seed(seed)  # of its own, whatever building a model draws
        for parameter in model.parameters():
            if parameter.dim() > 1:  # attention far from even, answers that depend on picture and words
                parameter.data.normal_(std=0.4, generator=rng)
        checkpoints[kind] = folder / f"{kind}.pth"
        torch.save({"model": model.state_dict(), "config": config, "epoch": 0}, checkpoints[kind])
    return tiny
