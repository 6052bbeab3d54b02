"""`make demo` from end to end on a tiny data set: what it starts, and what it leaves behind."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from tiny import make_tiny

import demo
import Pretrain
import zero_shot_retrieval
from utils import UserError


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo over the tiny data set, its task scripts called in this process."""
    paths = make_tiny(tmp_path)
    monkeypatch.setattr(demo, "CONFIGS", tmp_path)
    monkeypatch.setattr(demo, "DATA", paths["data"])
    monkeypatch.setattr(demo, "make_demo", lambda data, workers: None)
    started = []

    def launch(script, *arguments):
        started.append((script, arguments))
        monkeypatch.setattr(sys, "argv", [script, "--device", "cpu", *arguments])
        {"Pretrain.py": Pretrain, "zero_shot_retrieval.py": zero_shot_retrieval}[script].parse_and_run()

    monkeypatch.setattr(demo, "launch", launch)
    monkeypatch.setattr(demo, "num_processes", lambda: 8)  # batches of 32 / 8
    return paths, started


def test_demo(tiny_demo, tmp_path, monkeypatch, capsys):
    _, started = tiny_demo
    out = tmp_path / "out"
    out.mkdir()
    (out / "train_steps.jsonl").write_text("left over from an earlier run\n")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(out)])
    monkeypatch.setattr(demo, "gallery", lambda out, gallery=demo.gallery: gallery(out, 3, 2))
    demo.main()
    assert [script for script, _ in started] == [
        "zero_shot_retrieval.py",
        "Pretrain.py",
        "zero_shot_retrieval.py",
    ]

    summary = json.loads((out / "summary.json").read_text())
    scores = summary["zero_shot_retrieval"]
    assert set(summary) == {"zero_shot_retrieval", "seconds"}
    assert set(scores) == {"n", *demo.METRICS, "before", "chance"}
    assert scores["n"] == 7 and set(scores["before"]) == set(scores["chance"]) == set(demo.METRICS)
    assert scores["chance"]["img_r1"] == pytest.approx(100 / 7)
    after = json.loads((out / "after" / "result" / "retrieval.json").read_text())
    assert all(scores[name] == after[name] for name in demo.METRICS)
    for picture in ("gallery.png", "losses.png"):
        assert np.asarray(Image.open(out / picture).convert("L")).std() > 5
    table = capsys.readouterr().out
    assert "chance  before   after" in table and "r_mean" in table


def test_the_gallery_asks_each_scene_s_own_caption(tiny_demo, tmp_path, monkeypatch):
    """With perfect scores the first picture is the right one for every query."""
    import torch

    paths, _ = tiny_demo
    entries = json.loads((paths["data"] / "retrieval_test.json").read_text())
    owner = [image for image, entry in enumerate(entries) for _ in entry["caption"]]
    folder = tmp_path / "out" / "after" / "result"
    folder.mkdir(parents=True)
    perfect = torch.nn.functional.one_hot(torch.tensor(owner), len(entries)).float()
    torch.save({"scores_i2t": perfect.T, "scores_t2i": perfect}, folder / "retrieval_scores.pt")
    drawn = {}
    names = ("queries", "results", "right", "out", "title")
    monkeypatch.setattr(demo, "plot_gallery", lambda *given: drawn.update(zip(names, given, strict=True)))
    demo.gallery(tmp_path / "out", num_queries=3, num_results=2)
    assert drawn["queries"] == [entries[image]["caption"][0] for image in (0, 2, 4)]
    assert drawn["right"] == [[True, False]] * 3
    for image, files in zip((0, 2, 4), drawn["results"], strict=True):
        assert files[0].endswith(entries[image]["image"])


def test_a_script_that_fails_ends_the_demo(monkeypatch):
    monkeypatch.setattr(demo, "num_processes", lambda: 1)
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: demo.subprocess.CompletedProcess([], 1))
    with pytest.raises(UserError, match=r"Pretrain.py failed"):
        demo.launch("Pretrain.py")


def test_demo_configs_have_the_same_sizes():
    """The retrieval model loads what pre-training saved."""
    pretrain, retrieval = (
        YAML(typ="safe").load(Path(f"configs/demo/{name}.yaml")) for name in ("Pretrain", "Retrieval")
    )
    for key in ("image_res", "vision_width", "vit", "bert_config", "embed_dim", "queue_size", "text_encoder"):
        assert pretrain[key] == retrieval[key], key
