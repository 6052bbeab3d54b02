"""Curves of the logs of every task, and the chance levels beside them."""

import json
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import Grounding
import NLVR
import Pretrain
import Pretrain_NLVR
import Retrieval
import VE
from simla.configs.reader import read_config
from simla.configs.schema import TABLES
from simla.engine import chance, curves
from simla.engine.chance import ChanceCheck
from simla.engine.curves import panels, plot_curves, read_records, read_run
from simla.utils import UserError

SCRIPTS = {  # of a demo config, those with chance levels
    "Pretrain": Pretrain,
    "Retrieval": Retrieval,
    "Grounding": Grounding,
    "NLVR_Pretrain": Pretrain_NLVR,
    "NLVR": NLVR,
    "VE": VE,
}


def demo_config(name: str) -> dict:
    script = {"NLVR_Pretrain": "Pretrain_NLVR"}.get(name, name)
    return read_config(f"configs/demo/{name}.yaml", TABLES[script])


def chance_levels(name: str) -> dict[str, float]:
    return SCRIPTS[name].chance(demo_config(name)) if name in SCRIPTS else {}


def even_guess(num_classes: int) -> float:
    return F.cross_entropy(torch.zeros(1, num_classes), torch.tensor([0])).item()


def test_chance_levels_are_the_losses_of_even_guesses():
    config = demo_config("Pretrain")
    levels = Pretrain.chance(config)
    vocab, candidates = config["bert_config"]["vocab_size"], config["batch_size"] + config["queue_size"]
    codes = config["image_tokenizer"]["vocab_size"]
    for name, size in (("loss_mlm", vocab), ("loss_ita", candidates), ("loss_mim", codes)):
        assert levels[name] == pytest.approx(even_guess(size))
    base_rate = torch.tensor([[2 / 3, 1 / 3]]).log()  # one row of three matches
    labels = torch.tensor([0, 0, 1])
    assert levels["loss_itm"] == pytest.approx(F.cross_entropy(base_rate.expand(3, 2), labels).item())
    assert levels["loss_itm"] == pytest.approx(0.6365, abs=1e-4)
    assert levels["loss_psl"] == pytest.approx(math.log(2))


def test_chance_levels_of_every_task():
    for name in ("Retrieval", "Grounding"):
        config = demo_config(name)
        levels = chance_levels(name)
        assert list(levels) == ["loss_ita", "loss_itm"]
        assert levels["loss_ita"] == pytest.approx(
            even_guess(config["batch_size_train"] + config["queue_size"])
        )
    for name, classes in (("VE", 3), ("NLVR", 2), ("NLVR_Pretrain", 3)):
        assert chance_levels(name) == {"loss": pytest.approx(even_guess(classes))}


@pytest.mark.parametrize(("num_steps", "patience"), [(12, 200), (935, 467.5), (234_000, 5000)])
def test_a_loss_at_chance_is_pointed_out_once(num_steps, patience, caplog):
    """Over all windows of a run, and over those of one that is resumed anywhere."""
    assert chance.patience(num_steps) == patience
    caplog.set_level("INFO", "simla")
    check = ChanceCheck(chance_levels("Pretrain"))
    assert "loss_itm 0.637" in caplog.text and caplog.text.count("\n") == 1
    learned = {name: 0.5 * level for name, level in check.levels.items()}
    for means, stuck in ((learned, []), (learned | {"loss_itm": 0.63, "loss_psl": 9.0}, ["itm", "psl"])):
        caplog.clear()
        for end in range(25, num_steps + 1, 25):
            ChanceCheck(chance_levels("Pretrain")) if end == 100 else None
            check.look(means, end - 25, end, num_steps)
        said = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(said) == (1 if stuck and num_steps > patience else 0)
        for message in said:
            named = [name for name in check.levels if f"{name} {means[name]:.3f} (chance" in message]
            assert named == [f"loss_{name}" for name in stuck] and "learning rate" in message


def test_a_run_may_have_any_set_of_losses(caplog):
    """One is left out, and one is there that no table knows."""
    check = ChanceCheck(chance_levels("Pretrain"))
    for absent in check.levels:
        means = {name: level for name, level in check.levels.items() if name != absent} | {"loss_own": 1.0}
        caplog.clear()
        check.look(means, 0, 25, 12)
        check.look(means, 450, 475, 935)
        (message,) = [record.message for record in caplog.records]
        assert [name for name in check.levels if f"{name} " in message.partition(". Usual")[0]] == [
            name for name in check.levels if name != absent
        ]


def write_run(folder, levels: dict, steps: list[dict], epochs: list[dict]):
    folder.mkdir()
    for name, records in (("train_steps.jsonl", steps), ("log.txt", epochs)):
        if records:
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "run.json").write_text(json.dumps({"chance": levels}))
    return folder


def records(losses: list[str], scores: dict | None = None) -> tuple[list[dict], list[dict]]:
    means = [{**dict.fromkeys(losses, 3 / i), "lr": 1e-3 / i} for i in range(1, 7)]
    steps = [{"step": 10 * (i + 1), "epoch": i // 3, **mean} for i, mean in enumerate(means)]
    whole = {f"train_{name}": value for name, value in means[2].items()}
    return steps, [{**whole, "train_bad_images": 0, **(scores or {}), "epoch": i} for i in range(2)]


def has_lines(path, colour: str) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return (pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum() > 100


RECALLS = {f"{split}_{name}": 50.0 for split in ("val", "test") for name in ("txt_r1", "img_r1", "r_mean")}
LOGS = {
    "Pretrain": (["loss_ita", "loss_itm", "loss_mlm", "loss_mim", "loss_psl"], {}),
    "Retrieval": (["loss_ita", "loss_itm"], RECALLS),
    "Grounding": (["loss_ita", "loss_itm"], {"val_d": 50.0, "testA_d": 40.0, "testB_d": 60.0}),
    "VQA": (["loss"], {"val_accuracy": 60.0, "val_accuracy_number": 30.0}),
    "NLVR_Pretrain": (["loss"], {}),
    "NLVR": (["loss"], {"val_acc": 60.0, "val_confusion": [[1, 2], [3, 4]], "test_acc": 61.0}),
    "VE": (["loss"], {"val_acc": 60.0, "val_confusion": [[1, 2], [3, 4]], "test_acc": 61.0}),
}


def test_scores_of_several_data_sets_have_a_panel_each(tmp_path):
    scores = dict.fromkeys(("refcoco_val_d", "refcoco_testA_d", "refcocog_test_d", "val_d"), 50.0)
    folder = write_run(tmp_path / "run", {}, *records(["loss_ita"], scores))
    own = {
        "refcoco_d": ["refcoco_val_d", "refcoco_testA_d"],
        "refcocog_d": ["refcocog_test_d"],
        "d": ["val_d"],
    }
    assert panels([read_run(folder)])[1] == own


@pytest.mark.parametrize("name", LOGS)
def test_the_log_of_every_task(name, tmp_path, monkeypatch):
    losses, scores = LOGS[name]
    steps, epochs = records(losses, scores)
    folder = write_run(tmp_path / "run", chance_levels(name), steps, epochs)
    logged, titles = panels([read_run(folder)])
    assert logged == [*losses, "lr"]
    assert {name for names in titles.values() for name in names} == {*scores} - {"val_confusion"}
    if name in ("NLVR", "VE"):
        assert titles == {"acc": ["val_acc", "test_acc"]}
    monkeypatch.setattr(sys, "argv", ["simla.engine.curves", str(folder), "-o", str(tmp_path / "c.png")])
    with mock.patch("simla.engine.curves.draw_level", wraps=curves.draw_level) as levels:
        curves.main()
    assert has_lines(tmp_path / "c.png", curves.COLOURS[0])
    drawn = [(call.args[1], call.args[2]) for call in levels.call_args_list]
    assert drawn == [(level, curves.GREY) for level in chance_levels(name).values()]


def test_runs_are_overlaid_in_colours_of_their_own(tmp_path):
    levels = chance_levels("Pretrain")
    steps, epochs = records(LOGS["Pretrain"][0])
    lower = [{name: v if name in ("step", "epoch") else 0.8 * v for name, v in s.items()} for s in steps]
    one = write_run(tmp_path / "one", levels, steps, epochs)
    two = write_run(tmp_path / "two", {**levels, "loss_ita": 6.5}, lower, [])
    with mock.patch("simla.engine.curves.draw_level", wraps=curves.draw_level) as draw_level:
        plot_curves([one, two], tmp_path / "c.png")
    drawn = [call.args[2] for call in draw_level.call_args_list]  # of ITA alone they have different levels
    assert drawn == [*curves.COLOURS[:2], *[curves.GREY] * 4]
    assert all(has_lines(tmp_path / "c.png", colour) for colour in curves.COLOURS[:2])
    # a log alone, as published: numbers as texts, no steps, no config
    published = tmp_path / "published"
    published.mkdir()
    (published / "log.txt").write_text(
        json.dumps({**{k: str(v) for k, v in epochs[0].items()}, "train_bad_images": 3}) + "\n"
    )
    assert panels([read_run(published)]) == ([*LOGS["Pretrain"][0], "lr", "bad_images"], {})
    plot_curves([published], tmp_path / "p.png")
    assert has_lines(tmp_path / "p.png", curves.COLOURS[0])


def test_a_folder_used_again_shows_its_last_run(tmp_path):
    first, second = ([{"step": step, "loss": loss} for step in (10, 20, 30)] for loss in (9.0, 1.0))
    path = tmp_path / "train_steps.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in first + second[:2]) + '{"step": 30, "lo')
    assert [tuple(record.values()) for record in read_records(path, "step")] == [(10, 1), (20, 1)]


def test_what_cannot_be_drawn_says_why(tmp_path):
    with pytest.raises(UserError, match="holds no steps yet"):
        plot_curves([tmp_path], tmp_path / "none.png")
    for content in ("{\n{}\n", "[1]\n{}\n"):
        (tmp_path / "log.txt").write_text(content)
        with pytest.raises(UserError, match=r"log\.txt, line 1: expected a JSON object"):
            plot_curves([tmp_path], tmp_path / "none.png")
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    assert not (tmp_path / "none.png").exists()


def legends(figure) -> list[list[tuple[str, object]]]:
    """Of every panel that has one, and of the whole: texts with the colours of their lines."""
    found = [axis.get_legend() for axis in figure.axes] + figure.legends
    return [
        [
            (text.get_text(), line.get_color())
            for text, line in zip(own.texts, own.legend_handles, strict=True)
        ]
        for own in found
        if own
    ]


@pytest.mark.parametrize("length", [3, 90])
def test_legends_of_several_runs_say_what_colours_and_lines_mean(tmp_path, length):
    """Splits have no run's colour, and are there where the first run lacks them; names are not cut off."""
    import matplotlib.pyplot as plt

    steps, epochs = records(["loss"], {"val_acc": 60.0})
    _, both = records(["loss"], {"val_acc": 60.0, "test_acc": 50.0})
    runs = [
        write_run(tmp_path / f"{name:_<{length}}", chance_levels("VE"), steps, scores)
        for name, scores in (("one", epochs), ("two", both))
    ]
    with mock.patch.object(plt, "close") as close:
        plot_curves(runs, tmp_path / "c.png")
    figure = close.call_args.args[0]
    splits, names = legends(figure)
    assert splits == [("val", "black"), ("test", "black")]
    assert names == [(str(run), colour) for run, colour in zip(runs, curves.COLOURS, strict=False)]
    plt.close(figure)
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("L"))
    assert (picture[:, [0, -1]] == 255).all()
