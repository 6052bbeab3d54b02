"""run.json: what it says of a run that ends well, fails, or still runs."""

import json
import sys
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tiny import make_tiny, run

import Pretrain
import zero_shot_retrieval
from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN
from simla.engine.curves import read_run
from simla.engine.launch import run_script
from simla.engine.run_record import RunRecord, config_hash, previous_run
from simla.models.bert import BertConfig
from simla.utils import code_revision


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
    config["bert_config"] = asdict(BertConfig.read(config["bert_config"]))  # all sizes, as it is saved
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


@pytest.mark.parametrize("error", [ValueError("no such loss\nsecond line"), AssertionError(), MemoryError()])
def test_a_crash_is_recorded(tmp_path, monkeypatch, error):
    """And shown: the exception goes on."""
    monkeypatch.setattr(RunRecord, "current", None)

    def main():
        RunRecord(str(tmp_path), "abc", {}, torch.device("cpu"), "")
        raise error

    with pytest.raises(type(error)):
        run_script(main)
    record = record_of(tmp_path)
    assert record["status"] == "failed" and "end" in record
    assert record["message"] == type(error).__name__ + ": no such loss" * bool(error.args)


def test_logs_of_an_earlier_run_are_set_aside_and_those_of_this_one_are_not(tiny, tmp_path, monkeypatch):
    """Not to be mixed and not to be lost: TensorBoard's and results, too."""

    def pretrain(epochs, *flags):
        argv = ["Pretrain.py", "--device", "cpu", "--config", str(tiny["Pretrain"]), "--output_dir"]
        argv += [str(tmp_path), *flags, "--overrides", f"schedular.epochs={epochs}", "log_steps=3"]
        monkeypatch.setattr(sys, "argv", argv)
        Pretrain.parse_and_run()
        return {name: (tmp_path / name).read_text() for name in ("log.txt", "train_steps.jsonl", "run.json")}

    first = pretrain(1)
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "scores.json").write_text("{}")
    second = pretrain(1, "--seed", "7")
    earlier = tmp_path / "earlier_1"
    assert {name: (earlier / name).read_text() for name in first} == first
    assert (earlier / "result" / "scores.json").is_file() and len(
        list((earlier / "tensorboard").iterdir())
    ) == 1
    assert second["log.txt"].count("\n") == 1 and second["train_steps.jsonl"].count("\n") == 2
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1 and (tmp_path / "config.yaml").is_file()
    assert len(read_run(earlier).epochs) == 1  # curves.py draws it

    # an evaluation in between is the run's own
    argv = ["zero_shot_retrieval.py", "--device", "cpu", "--config", str(tiny["Retrieval"]), "--evaluate"]
    argv += ["--output_dir", str(tmp_path), "--checkpoint", str(tmp_path / "checkpoint_00.pth")]
    monkeypatch.setattr(sys, "argv", argv)
    zero_shot_retrieval.parse_and_run()
    resumed = pretrain(2, "--resume", "--seed", "7")
    assert resumed["log.txt"].startswith(second["log.txt"]) and '"epoch": 1}' in resumed["log.txt"]
    assert resumed["train_steps.jsonl"].startswith(second["train_steps.jsonl"])
    assert not (tmp_path / "earlier_2").exists()


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
