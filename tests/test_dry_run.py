"""--dry_run of every script needs no files and leaves none; its estimate is near what a step takes."""

import importlib
import io
import json
import re
import sys
import tarfile
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from tiny import MODEL, ROOT, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import VE
from simla.configs.reader import read_config
from simla.configs.schema import TABLES
from simla.engine.data_parallel import set_checkpointing
from simla.engine.dry_run import (
    CLS,
    estimate_retrieval,
    estimate_training,
    most_pairs,
    random_batch,
    report_length,
    retrieval_work,
    samples_of_an_epoch,
)
from simla.engine.memory import estimate
from simla.evaluation.rerank import candidate_pairs
from simla.models.pretrain import SIMLA
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError, world_size

SCRIPTS = ("Pretrain", "Retrieval", "Grounding", "VQA", "Pretrain_NLVR", "NLVR", "VE")
FILES = {"train_file": "not_there.json", "test_file": "not_there.json", "val_file": "not_there.json"}
PRESETS = sorted((ROOT / "configs" / "single_gpu").glob("*.yaml"))


def tiny_config(script: str, folder: Path, **changes) -> Path:
    """With files, weights and a tokenizer that are not there."""
    given = {
        **MODEL,
        **FILES,
        "refcoco_data": "not_there",
        "init": "pretrained",
        "text_encoder": "not/there",
        "batch_size": 4,
        "batch_size_train": 4,
        "batch_size_test": 4,
        "k_test": 3,
        "num_masking_patches": 5,
        "image_tokenizer": {"kind": "kmeans", "path": "not_there.safetensors", "vocab_size": 16},
        "optimizer": {"lr": 1e-3},
        "schedular": {"epochs": 3},
        **changes,
    }
    path = folder / f"{script}.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump({k: v for k, v in given.items() if k in TABLES[script]}, file)
    return path


def go(monkeypatch, capsys, script: str, config: Path, *flags: str) -> str:
    """What `python SCRIPT.py --dry_run` prints."""
    command = [f"{script}.py", "--device", "cpu", "--config", str(config), "--output_dir", "out", *flags]
    monkeypatch.setattr(sys, "argv", command)
    importlib.import_module(script).parse_and_run()
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_steps_of_every_script_without_any_file(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(script, tmp_path, grad_accumulation_steps=2)
    out = go(monkeypatch, capsys, script, config, "--dry-run")
    trained, every = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) trained, ([\d,]+)", out).groups())
    assert 0 < trained <= every
    assert float(re.search(r"([\d.,]+) GFLOP a sample", out)[1]) > 0
    assert "memory, measured" in out and "for a step of 8 samples on 1 rank(s)" in out
    assert "whole run         annotation file" in out and "not_there.json" in out
    assert list(tmp_path.iterdir()) == [config]


def test_the_length_of_the_run_is_told_where_the_files_are(tmp_path, monkeypatch, capsys):
    entries = [{"image": f"{i}.jpg", "sentence": "a duck", "label": "neutral"} for i in range(13)]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    config = tiny_config("VE", tmp_path, train_file=str(tmp_path / "train.json"))
    out = go(monkeypatch, capsys, "VE", config, "--dry_run", "--overrides", "checkpoint_activations=true")
    assert re.search(r"13 samples, 3 epochs, 9 steps, 0:00:\d\d without reading images", out)
    out = go(monkeypatch, capsys, "VE", config, "--dry_run", "--overrides", "batch_size_train=14")
    assert "13 training samples are fewer than a step of 14 (batch_size_train 14 x 1 rank(s)); lower" in out


def shard(path: Path, num_samples: int) -> str:
    with tarfile.open(path, "w") as tar:
        for number in range(num_samples):
            for end, content in (("jpg", b"not decoded"), ("txt", b"a duck")):
                info = tarfile.TarInfo(f"{number:03}.{end}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_the_length_of_a_run_on_mixtures_and_shards(tmp_path, monkeypatch, capsys):
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"image": f"{i}.jpg", "caption": "a duck"} for i in range(13)]))
    paths = [str(pairs), shard(tmp_path / "0.tar", 6)]
    weighted = [{"path": path, "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)]
    config = tiny_config("Pretrain", tmp_path, train_file=weighted, samples_per_epoch=40)
    out = go(monkeypatch, capsys, "Pretrain", config, "--dry_run", "estimate")
    assert "40 samples of 19 to an epoch, 3 epochs, 30 steps" in out
    for train_file, per_epoch, samples, origin in (
        (paths[1], 0, 6, ""),
        (paths, 0, 19, ""),
        (weighted, 0, 19, ""),
        (paths, 8, 8, " of 19 to an epoch"),
    ):
        files = {"train_file": train_file, "samples_per_epoch": per_epoch, "image_root": ""}
        assert samples_of_an_epoch(files) == (samples, origin)
    report_length({**files, "train_file": [*paths, str(tmp_path / "1.tar")]}, 4, None)
    assert "whole run         shard" in capsys.readouterr().out


def test_the_parts_of_an_evaluation(tmp_path, monkeypatch, capsys):
    entries = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": ["three"]}]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    config = tiny_config("Retrieval", tmp_path, test_file=str(tmp_path / "test.json"))
    before = sorted(tmp_path.iterdir())
    out = go(monkeypatch, capsys, "zero_shot_retrieval", config, "--dry_run")
    assert "pairs a second" in out and "memory, measured" in out
    assert re.search(r"2 images, 3 texts, at most 6 pairs: 0:00:\d\d without reading images", out)
    assert sorted(tmp_path.iterdir()) == before
    out = go(monkeypatch, capsys, "zero_shot_retrieval", config, "--dry_run", "estimate")
    assert "on cuda" in out and "GFLOP an image" in out and "6 pairs: 1.037e-05 TFLOP" in out
    assert "measured" not in out and "a second" not in out
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match="--dry_run tries a training"):
        go(monkeypatch, capsys, "Retrieval", config, "--dry_run", "--evaluate")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=100)
def test_a_pair_that_both_directions_want_is_counted_once(num_images, num_texts, k_test, seed):
    similarity = torch.rand(num_images, num_texts, generator=torch.Generator().manual_seed(seed))
    for_images, for_texts = candidate_pairs(similarity, k_test)
    most = most_pairs(num_images, num_texts, k_test)
    assert (for_images | for_texts).sum() <= most <= num_images * num_texts
    assert most in (for_images.sum() + for_texts.sum(), num_images * num_texts)


def test_the_arithmetic_of_an_evaluation_is_what_it_computes(tmp_path):
    config = read_config(str(tiny_config("Retrieval", tmp_path)), TABLES["zero_shot_retrieval"])
    make_model = partial(SIMLARetrieval.from_config, config, twins=False)
    model = make_model().eval()
    for name, (_, work) in retrieval_work(config, 7, torch.device("cpu"), "cuda").items():
        found = estimate(lambda: [make_model()], work, "fp32", is_training=False)
        assert found.weights == sum(value.nbytes for value in model.state_dict().values()) < found.peak
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work(model)
        assert found.flops == counter.get_total_flops() > 0, name
    fullest, flops = estimate_retrieval(make_model, config, 7)
    assert fullest.trainable == fullest.optimizer == 0 and flops.keys() == {"images", "texts", "pairs"}


def test_two_ranks(tmp_path):
    config = tiny_config("Pretrain", tmp_path)
    done = run(
        "Pretrain.py", "--dry_run", "--config", config, "--output_dir", tmp_path / "out", num_processes=2
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("for a step of 8 samples on 2 rank(s)") == 1
    assert list(tmp_path.iterdir()) == [config]


# ---- the estimate ----


def test_the_estimate_of_a_gpu_needs_none_and_leaves_everything_as_it_was(tmp_path, monkeypatch, capsys):
    attention = F.scaled_dot_product_attention
    config = tiny_config("VE", tmp_path)
    sizes = {}
    for precision in ("fp32", "bf16"):
        flags = "--dry_run", "estimate", "--overrides", f"precision={precision}", "batch_size_train=64"
        out = go(monkeypatch, capsys, "VE", config, *flags)
        assert "on cuda" in out and "measured" not in out and "samples a second" not in out
        sizes[precision] = float(re.search(r"([\d,.]+) MiB gradients", out)[1])
    assert 0.4 < sizes["bf16"] / sizes["fp32"] < 0.9
    assert F.scaled_dot_product_attention is attention and world_size() == 1


def middle_size(folder: Path, **changes) -> Path:
    """Of some hundred MiB."""
    bert = {**MODEL["bert_config"], "hidden_size": 256, "encoder_width": 256, "intermediate_size": 1024}
    sizes = {"image_res": 128, "vision_width": 256, "bert_config": bert, "batch_size_train": 32}
    return tiny_config("VE", folder, **sizes, **changes)


@pytest.mark.parametrize("again", [False, True])
def test_the_estimate_is_what_torch_allocates(again, tmp_path):
    """By the profiler's account of a forward and a backward pass; a CPU's attention keeps no map without
    dropout, as a GPU's.
    """
    config = read_config(str(middle_size(tmp_path, checkpoint_activations=again)), TABLES["VE"])
    config["bert_config"] |= {"attention_probs_dropout_prob": 0.0}
    batch = random_batch(config)
    found = estimate_training(VE.SIMLAVE.from_config, VE.losses, batch, config)
    batch = {**batch, "image": batch["image"].float(), "code_view": batch["code_view"].float()}
    model = VE.SIMLAVE.from_config(config).train()
    set_checkpointing(model, again)
    gradients = 0
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.zeros_like(param)
            gradients += param.nbytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sum(VE.losses(model, batch, 0.4).values()).backward()
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    measured = max(accumulate(changes)) + gradients + sum(value.nbytes for value in batch.values())
    assert measured == pytest.approx(found.step, rel=0.1)


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_the_arithmetic_is_what_is_computed(task, tmp_path):
    script = {"pretrain": "Pretrain", "retrieval": "Retrieval"}[task]
    config = read_config(str(tiny_config(script, tmp_path)), TABLES[script])
    make = partial(SIMLA.from_config, cls_id=CLS) if task == "pretrain" else SIMLARetrieval.from_config
    losses = {"pretrain": pretrain_losses, "retrieval": importlib.import_module("Retrieval").losses}[task]
    batch = random_batch(config)
    found = estimate_training(make, losses, batch, config)
    batch["image"] = batch["image"].float()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(losses(make(config), batch, 0.4).values()).backward()
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.05)  # a map computed twice


def pretrain_losses(model, batch, alpha, tokenizer=None):
    codes = torch.zeros(batch["patch_mask"].shape, dtype=torch.long)
    return importlib.import_module("Pretrain").losses(
        model, {**batch, "code_view": None}, alpha, lambda _: codes
    )


# ---- the presets ----


def script_of(preset: Path) -> str:
    return re.search(
        r"python (\w+)\.py --config configs/single_gpu/" + preset.name, preset.read_text(encoding="utf-8")
    )[1]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_loads_and_keeps_the_published_number_of_samples_in_a_step(preset):
    script, config = script_of(preset), read_config(str(preset), TABLES[script_of(preset)])
    published = read_config(str(preset.parents[1] / f"{preset.stem.rsplit('_', 1)[0]}.yaml"), TABLES[script])
    key = "batch_size" if script == "Pretrain" else "batch_size_train"
    per_step = config[key] * config["grad_accumulation_steps"]
    assert per_step == 8 * published[key]  # of 8 GPUs
    assert f"{per_step} samples make a step" in preset.read_text()
    free = {key, "grad_accumulation_steps", "precision", "checkpoint_activations", "batch_size_test"}
    assert all(config[name] == published[name] for name in config.keys() - free)
    gigabytes = int(re.search(r"_(\d+)gb", preset.stem)[1])
    estimated = float(re.search(r"Peak memory: ([\d.]+) GiB, estimated", preset.read_text())[1])
    assert estimated < 0.85 * gigabytes
    assert f"| `{preset.stem}.yaml` |" in (ROOT / "docs" / "memory.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_model_of_a_preset_is_built(script):
    module = importlib.import_module(script)
    preset = next(path for path in PRESETS if script_of(path) == script)
    config = read_config(str(preset), TABLES[script])
    names = {name for name in vars(module) if name.startswith("SIMLA")}
    (model,) = (getattr(module, name) for name in names)
    make = partial(model.from_config, cls_id=CLS) if script == "Pretrain" else model.from_config
    with torch.device("meta"):
        assert sum(param.numel() for param in make(config).parameters()) > 2e8


@pytest.mark.parametrize("name", ["VE_12gb", "VE_24gb"])
def test_the_figure_of_a_preset_is_what_the_estimate_says_today(name):
    preset = ROOT / "configs" / "single_gpu" / f"{name}.yaml"
    config = read_config(str(preset), TABLES["VE"])
    found = estimate_training(VE.SIMLAVE.from_config, VE.losses, random_batch(config), config)
    stated = float(re.search(r"Peak memory: ([\d.]+) GiB", preset.read_text())[1])
    assert found.peak / 2**30 == pytest.approx(stated, rel=0.05)
