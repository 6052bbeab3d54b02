"""Scalars in TensorBoard, read back by its own reader, and in Weights & Biases; neither ends a run."""

import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tiny import full_disk, make_tiny

import Pretrain
from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN
from simla.engine import chance
from simla.engine.run_log import RunLog, check_wandb
from simla.utils import UserError

FIGURES = ("loss_ita", "loss_itm", "loss_mlm", "loss_mim", "loss_psl", "lr")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def file_numbers_of_one_digit(monkeypatch):
    """Event files of one second and process are read in the order of their numbers' letters: 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def pretrain(tiny, out: Path, monkeypatch, *flags: str, overrides: tuple[str, ...] = ()) -> None:
    argv = ["Pretrain.py", "--device", "cpu", "--config", str(tiny["Pretrain"]), "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, *flags, "--overrides", *overrides])
    Pretrain.parse_and_run()


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value; a step that is there twice is an error."""
    reader = EventAccumulator(str(out / "tensorboard"), {"scalars": 0}).Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        found[tag] = {event.step: event.value for event in events}
        assert len(found[tag]) == len(events), tag
    return found


def assert_as_logged(out: Path, speeds: list[int]) -> None:
    """speeds: the steps at which they are known"""
    lines = [json.loads(line) for line in (out / "train_steps.jsonl").read_text().splitlines()]
    found = scalars(out)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    for name in FIGURES:
        expected = {line["step"]: line[name] for line in lines}
        assert found[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name
    assert list(found["train/samples_per_second"]) == speeds
    assert all(speed > 0 for speed in found["train/samples_per_second"].values())
    assert found["train/bad_images"] == {6: 0, 12: 0}


def test_a_run_and_two_that_go_on_from_it(tiny, tmp_path, monkeypatch, capsys):
    """From within an epoch, and from an epoch's end, whose last line stays. Nothing is there twice. The
    losses of a run that does not move are pointed out once, by the one process that comes there.
    """
    monkeypatch.setattr(chance, "LEAST_STEPS", 7)
    still = ("optimizer.lr=1e-30", "schedular.warmup_lr=0.0", "schedular.min_lr=0.0", "save_every_steps=1")
    settings = (*still, "keep_last=99")
    pretrain(tiny, tmp_path, monkeypatch, overrides=settings)
    assert_as_logged(tmp_path, [2, 4, 6, 8, 10, 12])
    out = capsys.readouterr().out
    assert out.count("a model that has learned nothing has: loss_ita") == 1
    assert out.count("nothing learned after 8 steps: loss_ita") == 1
    # What is logged first after step 4 of epoch 1 are steps of the process before.
    resumed = (("checkpoint_01_000004.pth", [2, 4, 6, 8, 12]), ("checkpoint_00.pth", [2, 4, 6, 8, 10, 12]))
    for number, (checkpoint, speeds) in enumerate(resumed, 2):
        flags = "--resume", "--checkpoint", str(tmp_path / checkpoint)
        pretrain(tiny, tmp_path, monkeypatch, *flags, overrides=settings)
        assert len(list((tmp_path / "tensorboard").iterdir())) == number
        assert_as_logged(tmp_path, speeds)
        assert capsys.readouterr().out.count("nothing learned after") == (checkpoint == "checkpoint_00.pth")


@pytest.mark.parametrize("left_out", ["loss_ita", "loss_itm", "loss_mlm", "loss_mim", "loss_psl"])
def test_a_loss_that_a_script_leaves_out_is_not_looked_for(tiny, tmp_path, monkeypatch, capsys, left_out):
    monkeypatch.setattr(chance, "LEAST_STEPS", 2)
    every = Pretrain.losses

    def losses(*inputs):
        return {name: loss for name, loss in every(*inputs).items() if name != left_out}

    monkeypatch.setattr(Pretrain, "losses", losses)
    still = ("optimizer.lr=1e-30", "schedular.warmup_lr=0.0", "schedular.min_lr=0.0", "schedular.epochs=1")
    pretrain(tiny, tmp_path, monkeypatch, overrides=(*still, "log_steps=1"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "nothing learned after" in line)
    assert f"{left_out} " not in line.split("Usual causes")[0] and line.count("(chance ") >= 1


def config_of(tiny, **changes) -> dict:
    return read_config(str(tiny["Pretrain"]), PRETRAIN) | changes


def test_scores_go_there_too_but_no_lists(tiny, tmp_path):
    run_log = RunLog(str(tmp_path), "run", config_of(tiny))
    scores = {"val_acc": 61.5, "val_confusion": [[1, 2], [3, 4]]}
    run_log.epoch(6, {"loss": 1.0, "bad_images": 2, "bad_image_causes": {"empty": 2}}, scores)
    run_log.epoch(12, {"bad_images": 0}, {})
    assert scalars(tmp_path) == {"train/bad_images": {6: 2, 12: 0}, "evaluation/val_acc": {6: 61.5}}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the writer's thread
def test_a_full_disk_costs_a_record_and_not_what_was_and_will_be_written(tiny, tmp_path, caplog):
    """Ten bytes of the record, and of the next file, come before the error."""
    run_log = RunLog(str(tmp_path), "run", config_of(tiny))
    run_log.write(1, "train", {"loss": 1.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    before = file.read_bytes()
    for step, size in ((1, len(before) + 10), (2, 10), (3, 10)):
        with full_disk(size):
            run_log.write(step, "evaluation", {"val_acc": 2.0})
    assert len(file.read_bytes()) == len(before) + 10
    run_log.write(4, "train", {"loss": 4.0})
    assert scalars(tmp_path) == {"train/loss": {1: 1.0, 4: 4.0}}
    assert caplog.text.count("tensorboard: scalars could not be written") == 1 and "goes on" in caplog.text


@pytest.mark.parametrize("how", ["missing package", "a file is in the way"])
def test_without_an_event_file_the_run_goes_on(tiny, tmp_path, monkeypatch, caplog, how):
    if how == "missing package":
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    else:
        (tmp_path / "tensorboard").write_text("")
    run_log = RunLog(str(tmp_path), "run", config_of(tiny))
    for step in (1, 2):
        run_log.write(step, "train", {"loss": 1.0})
    assert caplog.text.count("tensorboard: scalars could not be written") == 1


class FakeWandb(ModuleType):
    """Takes what the real module takes, and notes it."""

    def __init__(self, broken: str = ""):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="fake")
        self.calls, self.broken = [], broken

    def note(self, kind: str, *args) -> None:
        self.calls.append((kind, *args))
        if self.broken == kind:
            raise RuntimeError(f"no network for {kind}")

    def init(self, **settings):
        self.note("init", settings)
        return self

    def log(self, values: dict, step: int) -> None:
        self.note("log", step, values)

    def finish(self, exit_code: int) -> None:
        self.note("finish", exit_code)


def test_a_run_in_weights_and_biases_goes_on_in_it(tiny, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    overrides = ("schedular.epochs=1", "wandb={project: simla, tags: [tiny], name: first}")
    pretrain(tiny, tmp_path, monkeypatch, overrides=overrides)
    (_, settings), *logged, end = fake.calls
    run = json.loads((tmp_path / "run.json").read_text())["run"]
    assert settings["id"] == run and settings["resume"] == "allow" and settings["dir"] == str(tmp_path)
    assert (settings["project"], settings["tags"], settings["name"]) == ("simla", ["tiny"], "first")
    assert "entity" not in settings and settings["config"]["batch_size"] == 4
    assert [step for _, step, _ in logged] == [2, 4, 6, 6] and end == ("finish", 0)
    assert set(logged[0][2]) == {*(f"train/{name}" for name in FIGURES), "train/samples_per_second"}
    assert logged[-1][2] == {"train/bad_images": 0, "train/bad_image_fraction": 0}
    fake.calls.clear()
    overrides = ("schedular.epochs=2", "wandb.project=simla")
    pretrain(tiny, tmp_path, monkeypatch, "--resume", overrides=overrides)
    assert fake.calls[0][1]["id"] == run and [call[1] for call in fake.calls[1:-1]] == [8, 10, 12, 12]


def test_weights_and_biases_that_break_do_not_end_a_run(tiny, tmp_path, monkeypatch, caplog):
    fake = FakeWandb(broken="log")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_log = RunLog(str(tmp_path), "run", config_of(tiny, wandb={"project": "simla"}))
    with pytest.raises(KeyError), run_log:
        for step in (1, 2):
            run_log.write(step, "train", {"loss": 1.0})
        raise KeyError
    assert caplog.text.count("wandb: scalars could not be written (no network for log)") == 1
    assert [call[0] for call in fake.calls] == ["init", "log", "log", "finish"] and fake.calls[-1][1] == 1
    assert scalars(tmp_path) == {"train/loss": {1: 1.0, 2: 1.0}}


def test_weights_and_biases_that_cannot_be_had_are_said_at_the_start(tiny, tmp_path, monkeypatch):
    asks = ("wandb.project=simla",)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        pretrain(tiny, tmp_path / "none", monkeypatch, overrides=asks)
    assert not (tmp_path / "none" / "train_steps.jsonl").exists()
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken="init"))
    with pytest.raises(UserError, match=r"no network for init.*wandb login"):
        pretrain(tiny, tmp_path / "broken", monkeypatch, overrides=asks)
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()  # what its runs leave in the working folder
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install wandb"):
        check_wandb({"wandb": {"project": "simla"}})
    shutil.rmtree(tmp_path / "wandb")
    check_wandb({"wandb": {}})


def test_a_record_that_a_kill_cut_short_is_passed_over(tiny, tmp_path):
    run_log = RunLog(str(tmp_path), "run", config_of(tiny))
    for step in (1, 2):
        run_log.write(step, "train", {"loss": 1.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    resumed = RunLog(str(tmp_path), "run", config_of(tiny))
    resumed.first_step = 2
    resumed.write(2, "train", {"loss": 3.0})
    assert scalars(tmp_path) == {"train/loss": {1: 1.0, 2: 3.0}}
