"""run.json: what it says of a run that ends well, fails, or still runs."""

import json
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tiny import make_tiny, run

import zero_shot_retrieval
from config import PRETRAIN, read_config
from run_record import RunRecord, code_revision, config_hash, previous_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_a_run_of_two_ranks(tiny, tmp_path):
    flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path, "--overrides", "schedular.epochs=1"]
    assert run("Pretrain.py", *flags, num_processes=2).returncode == 0
    record = record_of(tmp_path)
    assert record["status"] == "done" and record["message"] == "" and record["resumed_from"] == ""
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # the main rank's
    assert (
        "Pretrain.py --device cpu --config" in record["command"] and "schedular.epochs=1" in record["command"]
    )
    assert record["versions"]["torch"] == version("torch")
    assert (record["num_hosts"], record["num_ranks"], record["device"]) == (1, 2, "cpu")
    start, end = (datetime.fromisoformat(record[key]) for key in ("start", "end"))
    assert 0 <= (end - start).total_seconds() <= record["seconds"] + 2
    assert 50 < record["peak_memory_mib"] < 100_000
    config = read_config(str(tiny["Pretrain"]), PRETRAIN, ["schedular.epochs=1"])
    assert record["config_sha256"] == config_hash(config)
    assert record["config_sha256"] != config_hash({**config, "log_steps": 3})
    assert record["code_revision"] == code_revision() != ""
    checkpoint = torch.load(tmp_path / "checkpoint_00.pth", weights_only=True)
    assert checkpoint["run"] == record["run"] == previous_run(str(tmp_path))


def test_a_run_that_fails_says_why(tiny, tmp_path):
    flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path, "--checkpoint", tmp_path / "none.pth"]
    assert run("Pretrain.py", *flags).returncode == 1
    record = record_of(tmp_path)
    assert record["status"] == "failed" and "none.pth" in record["message"] and "seconds" in record


def test_an_evaluation_writes_one_too_and_a_killed_run_s_says_running(tiny, tmp_path, monkeypatch):

    flags = [
        "--device",
        "cpu",
        "--config",
        str(tiny["Retrieval"]),
        "--output_dir",
        str(tmp_path),
        "--evaluate",
    ]
    monkeypatch.setattr(sys, "argv", ["zero_shot_retrieval.py", *flags])
    zero_shot_retrieval.parse_and_run()  # as if killed before run_script could end it
    assert record_of(tmp_path)["status"] == "running" and "end" not in record_of(tmp_path)


def test_a_folder_without_or_with_a_broken_record(tmp_path):
    assert previous_run(str(tmp_path)) == ""
    for content in ("", "{", "[]", "{}", '{"run": "x"'):
        (tmp_path / "run.json").write_text(content)
        assert previous_run(str(tmp_path)) == ""
    record = RunRecord(str(tmp_path), "abc", {}, torch.device("cpu"), "from.pth")
    assert previous_run(str(tmp_path)) == "abc"
    record.finish("stopped", "by SIGTERM")
    assert record_of(tmp_path)["status"] == "stopped" and record_of(tmp_path)["resumed_from"] == "from.pth"


def test_a_record_that_cannot_be_written_does_not_cost_the_run(tmp_path, caplog):
    RunRecord(str(tmp_path / "nowhere"), "abc", {}, torch.device("cpu"), "")
    assert "run.json could not be written" in caplog.text


def test_outside_a_clone_the_revision_is_unknown(monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert code_revision() == "unknown"
