"""Steps whose loss or gradient is not finite: named, left out, the end of a run when they come in a row."""

import json
import math
import sys
from functools import partial
from unittest import mock

import pytest
import torch
from tiny import make_tiny

import Pretrain
from simla.engine import curves
from simla.engine import step as engine_step
from simla.engine.finite import FiniteCheck, gradient_norm
from simla.engine.launch import script_arguments
from simla.engine.metric_log import MetricLog
from simla.models.momentum import enqueue
from simla.utils import UserError

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def pretrain(tiny, out, spoil, *overrides):
    """Six steps an epoch; spoil(step, named losses, batch) may change what the losses are."""
    steps = iter(range(100))

    def losses(model, batch, alpha, image_tokenizer, original=Pretrain.losses):
        named = original(model, batch, alpha, image_tokenizer)
        return spoil(next(steps), named, batch) or named

    flags = ["--device", "cpu", "--config", str(tiny["Pretrain"]), "--output_dir", str(out), "--overrides"]
    argv = ["Pretrain.py", *flags, "schedular.epochs=1", "log_steps=1", *overrides]
    with mock.patch.object(Pretrain, "losses", losses), mock.patch.object(sys, "argv", argv):
        Pretrain.parse_and_run()
    return torch.load(out / "checkpoint_00.pth", weights_only=True)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(tiny, tmp_path, capsys, value):
    files = {}

    def spoil(step, named, batch):
        files[step] = [file for item in batch["files"] for file in item]
        if step == 2:
            return {**named, "loss_mim": named["loss_mim"] * value}
        return None

    checkpoint = pretrain(tiny, tmp_path, spoil)
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "not finite" in line]
    assert "loss_mim" in line and "epoch 0, step 2 on rank 0" in line and "loss_ita" not in line
    assert len(files[2]) == 4 and all(file in line for file in files[2])
    assert not any(file in line for file in set(files[3]) - set(files[2]))
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["model"].values())
    assert {int(moment["step"]) for moment in checkpoint["optimizer"]["state"].values()} == {
        5
    }  # one left out
    record = json.loads((tmp_path / "log.txt").read_text())
    assert all(isinstance(number, float | int) and number == number for number in record.values())


def lines_of(path):
    def refuse(word):
        raise AssertionError(f"{path.name} holds {word}, which is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("steps", [{2}, {0}, set(range(6))], ids=["one", "first", "all"])
def test_where_no_step_was_finite_there_is_no_loss_but_a_learning_rate(tiny, tmp_path, capsys, steps):
    """null in JSON, a dash on the screen, a gap in TensorBoard and curves; of a whole epoch, too."""

    def spoil(step, named, batch):
        return {name: loss * NAN for name, loss in named.items()} if step in steps else None

    settings = "max_nonfinite_steps=99", "save_every_steps=4", "optimizer.lr=1e-3", "schedular.warmup_lr=1e-3"
    pretrain(tiny, tmp_path, spoil, *settings)
    logged, (epoch,) = lines_of(tmp_path / "train_steps.jsonl"), lines_of(tmp_path / "log.txt")
    assert [record["step"] for record in logged] == list(range(1, 7))
    for record in [*logged, {name.removeprefix("train_"): value for name, value in epoch.items()}]:
        is_finite = steps != set(range(6)) if "step" not in record else record["step"] - 1 not in steps
        for name in ("loss_ita", "loss_itm", "loss_mlm", "loss_mim", "loss_psl"):
            assert (record[name] is not None) == is_finite and record[name] != 0, (record, name)
        assert record["lr"] == pytest.approx(1e-3)
    said = capsys.readouterr().out
    assert "loss_mlm 0.0000" not in said and said.count("loss_mlm -") == len(steps)
    for record, line in zip(logged, said.split("Epoch 0  [")[1:], strict=True):
        assert f"lr {record['lr']:.2e}" in line
    drawn = []
    axis = mock.MagicMock(plot=lambda *values, **style: drawn.append(values))
    curves.draw_logged(axis, "loss_mlm", [curves.read_run(tmp_path)], by_step=True)
    assert [math.isfinite(value) for value in drawn[0][1]] == [step not in steps for step in range(6)]


def test_the_means_of_older_checkpoints_are_read():
    """They had one number for all names."""
    log = MetricLog()
    log.load_state_dict({"sums": {"loss": 6.0, "lr": 3.0}, "count": 3})
    log.merge({"sums": {"loss": 2.0, "lr": 1.0}, "count": 1})
    assert log.means() == log.global_means() == {"loss": 2.0, "lr": 1.0}
    log.add({"loss": torch.tensor(NAN)}, torch.tensor(False))
    assert log.means() == {"loss": 2.0, "lr": 1.0}
    fresh = MetricLog()
    fresh.add({"loss": torch.tensor(NAN)}, torch.tensor(False))
    fresh.add({"lr": 0.5})
    assert fresh.means() == {"loss": None, "lr": 0.5}


def test_a_gradient_that_is_not_finite_counts_too(tiny, tmp_path, capsys):
    """A finite loss can have one: sqrt at 0."""

    def spoil(step, named, batch):
        if step == 1:
            return {**named, "loss_psl": named["loss_psl"] + (named["loss_psl"] * 0).sqrt()}
        return None

    checkpoint = pretrain(tiny, tmp_path, spoil)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert line.startswith("gradient not finite in epoch 0, step 1")
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["model"].values())


def test_with_fp16_it_counts_once_the_scale_is_not_to_blame(tiny, tmp_path, monkeypatch, capsys):
    """The first overflows only lower the scale of the loss, here from 2."""
    monkeypatch.setattr(engine_step, "GradScaler", partial(engine_step.GradScaler, init_scale=2.0))

    def spoil(step, named, batch):
        return {**named, "loss_psl": named["loss_psl"] + (named["loss_psl"] * 0).sqrt()}

    with pytest.raises(UserError, match=r"^3 step\(s\) in a row .*max_nonfinite_steps.*epoch 0, step 4"):
        pretrain(tiny, tmp_path, spoil, "precision=fp16", "max_nonfinite_steps=3")
    assert "gradient not finite in epoch 0, step 2" in capsys.readouterr().out


def test_too_many_in_a_row_end_the_run_and_nothing_is_saved_over_a_good_checkpoint(tiny, tmp_path):
    def from_step_3_on(step, named, batch):
        return {name: loss * NAN for name, loss in named.items()} if step >= 3 else None

    with pytest.raises(UserError, match=r"^3 step\(s\) in a row .*max_nonfinite_steps.*epoch 0, step 5"):
        pretrain(tiny, tmp_path, from_step_3_on, "max_nonfinite_steps=3", "save_every_steps=1", "keep_last=1")
    (left,) = tmp_path.glob("checkpoint*.pth")
    checkpoint = torch.load(left, weights_only=True)
    assert checkpoint["step"] == 3 and left.name == "checkpoint_00_000003.pth"
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["model"].values())


def test_only_steps_in_a_row_count(tiny, tmp_path):
    def every_second(step, named, batch):
        return {name: loss * NAN for name, loss in named.items()} if step % 2 else None

    pretrain(tiny, tmp_path, every_second, "max_nonfinite_steps=2")


def test_the_queue_takes_in_no_feature_that_is_not_finite():
    queue, entries = torch.zeros(2, 4), torch.tensor([[1.0, 2.0], [NAN, 3.0], [4.0, INF]])
    enqueue(queue, torch.tensor([2]), entries)  # wraps round
    assert queue.tolist() == [[4, 0, 1, 0], [0, 0, 2, 3]]
    identities = torch.full((1, 4), -100)
    enqueue(identities, torch.tensor([0]), torch.tensor([[7], [8]]))
    assert identities.tolist() == [[7, 8, -100, -100]]


def test_names_and_norm():
    values = {"a": torch.tensor(1.0), "b": torch.tensor(NAN, dtype=torch.float64), "c": torch.tensor(-INF)}
    check = FiniteCheck(values)
    assert check.bad == 1 and check.read() == (True, ["b", "c"])
    check = FiniteCheck({"a": values["a"]})
    assert check.bad == 0 and check.read() == (False, [])
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 4.0]])  # the bias has none
    assert gradient_norm(model).item() == pytest.approx(5.0)


def test_the_flag_s_help_says_what_resume_takes():
    text = script_arguments("x", "c", "o").format_help()
    assert "newest of --output_dir" in " ".join(text.split())
