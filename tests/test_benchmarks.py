"""The benchmarks run, and both ways agree; how fast they are no test says."""

import argparse
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT, run_forked
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmarks"))

import reduced_jpegs
import run as bench
import train_step

KEYS = {"ratio", "seconds", "mfu", "peak_memory_bytes", "max_abs_difference", "device", "versions"}


@pytest.mark.parametrize("name", ["rerank", "vqa_rank"])
def test_the_last_line_has_the_figures(name):
    done = run_forked(f"benchmarks/{name}.py", "--scale", "tiny", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= KEYS and found["benchmark"] == name
    unit = {"rerank": "pair", "vqa_rank": "question"}[name]
    assert (
        found["max_abs_difference"] <= 1e-5
        and 0 < found[f"flops_per_{unit}"] < found[f"plain_flops_per_{unit}"]
    )


@pytest.mark.parametrize(("task", "num_losses"), [("pretrain", 5), ("retrieval", 2)])
def test_the_plain_training_step_has_the_same_losses_and_the_arithmetic_is_counted_right(task, num_losses):
    options = {"task": task, "scale": "tiny", "device": "cpu", "precision": "fp32", "batch": 4, "steps": 1}
    off = {"compile": False, "checkpoint_activations": False, "profile": task == "pretrain"}
    args = argparse.Namespace(**options, **off)
    losses = {}
    for args.measure in ("plain", "ours"):
        # the attention that is two matrix products, as torch counts no other on CPUs
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            found = train_step.measure(args)
        losses[args.measure] = found["losses"]
    assert len(losses["plain"]) == num_losses
    assert losses["ours"] == pytest.approx(losses["plain"], rel=5e-6)
    if task == "pretrain":
        assert sum(one["share"] for one in found["profile"]) <= 1 and len(found["profile"]) == 15
    num_samples = args.batch * (3 if task == "pretrain" else 2)  # the profiled step is one more
    expected = num_samples * train_step.flops_of_sample(args)
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.05)


def test_crops_that_are_decoded_smaller_are_counted_and_compared(tmp_path, monkeypatch, capsys):
    """Whole pictures at 64 pixels: of 64 x 90 decoded in full, of 128 x 140 at a half."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(64, 90), (128, 140)]):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(tmp_path / f"{number}.jpg")
    arguments = [
        "reduced_jpegs.py",
        str(tmp_path),
        "--image_res",
        "64",
        "--min_crop_scale",
        "1",
        "--draws",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    reduced_jpegs.main()
    first, *scales, difference = capsys.readouterr().out.splitlines()
    assert first == "2 files, 4 crops of 64 x 64"
    assert scales == ["decoded at 1/1: 2 (50.0%)", "decoded at 1/2: 2 (50.0%)"]
    mean = float(re.search(r"^of these 2: mean difference ([\d.]+) levels", difference)[1])
    assert 0 < mean < 10


def test_results_of_one_benchmark_leave_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    about = {"command": "c", "run_seconds": 1.0, "device": "d", "versions": {"torch": "2"}, "date": "today"}
    one = {**about, "code_revision": "r", "ratio": 2.0, "output": "a table\nof two lines"}
    bench.write({"data": one, "rerank": {**one, "ratio": 6.5}})
    assert bench.earlier() == {"data": one, "rerank": {**one, "ratio": 6.5}}
    assert json.loads((tmp_path / "results.json").read_text())["rerank"]["ratio"] == 6.5
    assert "## data" in (tmp_path / "RESULTS.md").read_text()
