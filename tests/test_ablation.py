"""`make ablation`: what is trained and scored, that it goes on, statistics, tables, picture, and the page."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_demo_all import tiny_configs
from tiny import ROOT, launch_here, make_tiny

from simla import plots
from simla.configs.reader import read_config
from simla.configs.schema import TABLES
from simla.demo import ablation, all_tasks
from simla.demo import pretrain as demo
from simla.utils import UserError

ALIGNMENT = {"matching": {"metric": "m", "value": 60.0, "chance": 50.0, "n": 9, "blind": 51.0}}
NUM_RUNS = 6 * 2 + 3  # with two seeds


def words_after(flag: str, command: list[str]) -> list[str]:
    """Return the words of a command after every place of this flag, up to the next flag."""
    words, is_wanted = [], False
    for word in command:
        is_wanted = word == flag if word.startswith("--") else is_wanted
        words += [word] if is_wanted and not word.startswith("--") else []
    return words


def recorded_launch(started: list[list[str]], stop_in: str = ""):
    """Return what takes the place of the demo's `launch`: it reads the config that the script would read, and
    writes made-up scores; `stop_in`: the output folder of the training that fails.
    """

    def launch(script, *arguments):
        started.append([script, *arguments])
        [folder], [config] = words_after("--output_dir", arguments), words_after("--config", arguments)
        config = read_config(
            config, TABLES[script.removesuffix(".py")], words_after("--overrides", arguments)
        )
        assert config["bert_config"]["num_hidden_layers"] == 4
        if script == "Pretrain.py":
            assert config["schedular"]["epochs"] == 2
            if Path(folder).name == stop_in:
                raise UserError("stopped")
            return
        run = Path(folder).parent.name
        value = 10.0 * len(run.split("-")[0]) + int(run.split("-")[1]) % 10
        split = {"accuracy": value, "heat_accuracy": value, "heat_chance": 1.0, "chance": 2.0, "n": 5}
        result = {"r_mean": value, "chance": {"r_mean": 1.0}, "n": 7}
        result["splits"] = {"testA_d": split, "testB_d": split}
        name = "grounding" if script == "Grounding.py" else "retrieval"
        Path(folder, "result").mkdir(parents=True, exist_ok=True)
        Path(folder, "result", f"{name}.json").write_text(json.dumps(result), "utf-8")

    return launch


def alignment(checkpoint: str) -> dict[str, dict]:
    """Return made-up scores, without a blind reader where the word head is not trained, or reads images."""
    [score] = ALIGNMENT.values()
    is_blind = "ita_itm" not in checkpoint and "albef" not in checkpoint
    return ALIGNMENT if is_blind else {"matching": {k: v for k, v in score.items() if k != "blind"}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command with two epochs; return what was started."""

    def run(*flags: str, stop_in: str = "") -> list[list[str]]:
        started = []
        monkeypatch.setattr(demo, "launch", recorded_launch(started, stop_in))
        flags = ["--output_dir", str(tmp_path), "--epochs", "2", *flags]
        monkeypatch.setattr(sys, "argv", ["simla.demo.ablation", *flags])
        ablation.main()
        return started

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ablation, "make_data", lambda: None)
    monkeypatch.setattr(ablation, "evaluate_alignment", alignment)
    monkeypatch.setattr(all_tasks, "blind_guess", lambda *names: 40.0)
    monkeypatch.setattr(demo, "best_checkpoint", lambda folder: folder / "checkpoint_01.pth")
    return run


def test_an_interrupted_call_goes_on_and_a_finished_one_shows_its_results(run, tmp_path, capsys):
    seeds = "--seeds", "42", "43"
    with pytest.raises(UserError, match="stopped"):
        run(*seeds, stop_in="mim-42")
    assert not (tmp_path / "summary.json").exists()
    started = run(*seeds)
    told = capsys.readouterr().out
    folders = [words_after("--output_dir", command)[0] for command in started if command[0] == "Pretrain.py"]
    assert [Path(folder).name for folder in folders][:2] == ["mim-42", "simla-42"]
    assert len(folders) == NUM_RUNS - 2 and len(started) == 3 * len(folders)
    for command in started:
        if command[0] != "Pretrain.py":
            folder = Path(words_after("--output_dir", command)[0]).parent
            assert words_after("--checkpoint", command) == [str(folder / "checkpoint_01.pth")]
    assert f"run {NUM_RUNS} of {NUM_RUNS}: SIMLA without momentum targets, seed 43; eta 0:00:0" in told

    summary = json.loads((tmp_path / "summary.json").read_bytes())
    assert list(summary["variants"]) == [variant.name for variant in ablation.VARIANTS]
    mim = summary["variants"]["mim"]["scores"]
    assert mim["retrieval"]["values"] == {"42": 32.0, "43": 33.0}
    assert mim["retrieval"]["mean"] == 32.5 and mim["retrieval"]["std"] == pytest.approx(0.5**0.5)
    assert summary["variants"]["psl_padding"]["scores"]["retrieval"]["std"] is None
    assert summary["scores"]["grounding"]["chance"] == 40 and summary["scores"]["matching"]["blind"] == 51
    assert ablation.tables(summary) in told
    assert np.asarray(Image.open(tmp_path / "ablation.png").convert("L")).std() > 5
    assert run(*seeds) == [] and ablation.tables(summary) in capsys.readouterr().out


def test_other_seeds_or_steps_in_the_same_folder_are_refused(run, tmp_path):
    assert run("--quick")
    with pytest.raises(UserError, match=r"with seeds \[42\], epochs 2.* not with seeds \[42\], epochs 3"):
        run("--quick", "--epochs", "3")
    with pytest.raises(UserError, match=r"not with seeds \[1, 2\].*: give another --output_dir"):
        run("--seeds", "1", "2")
    assert run("--quick") == []


def test_what_the_variants_train(run, tmp_path):
    """Each with its losses; every switch of the published code that pre-training has, but the flips."""
    computed = {}
    for command in run("--quick"):
        if command[0] == "Pretrain.py":
            config = read_config(
                str(demo.CONFIGS / "Pretrain.yaml"), TABLES["Pretrain"], words_after("--overrides", command)
            )
            name = Path(words_after("--output_dir", command)[0]).name.removesuffix("-42")
            computed[name] = config
    losses = {name: [loss for loss, w in c["loss_weights"].items() if w] for name, c in computed.items()}
    everything = ["ita", "itm", "mlm", "mim", "psl"]
    for name, number in {"ita_itm": 2, "mlm": 3, "albef": 3, "mim": 4, "simla": 5, "no_targets": 5}.items():
        assert losses[name] == everything[:number], name
    alone = {name: config["bert_config"].get("text_layers_alone", 0) for name, config in computed.items()}
    assert alone.pop("albef") == 2 and not any(alone.values())
    alphas = {name: config["alpha"] for name, config in computed.items()}
    assert alphas.pop("no_targets") == 0 and set(alphas.values()) == {0.2}
    switches = {name: [key for key, on in c["released_code"].items() if on] for name, c in computed.items()}
    in_schema = set(computed["simla"]["released_code"]) - {"flip_captions"}
    assert {name for name, on in switches.items() if on} == in_schema
    assert all(switches[name] == [name] for name in in_schema)


def test_albef_s_layout_is_trained_and_scored_for_real(tmp_path, monkeypatch):
    """At a tiny size: all scripts take the same sizes."""
    data, configs, started = make_tiny(tmp_path)["data"], tmp_path / "configs", []
    configs.mkdir()
    tiny_configs(configs, data)
    for module, name, value in (
        (demo, "DATA", data),
        (all_tasks, "DATA", data),
        (ablation, "DATA", data),
        (demo, "CONFIGS", configs),
        (demo, "num_processes", lambda: 4),  # batches of 32 / 4
        (demo, "launch", launch_here(started)),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", [])
    [albef] = [variant for variant in ablation.VARIANTS if variant.name == "albef"]
    scores = ablation.run_variant(albef, tmp_path / "albef-3", "3", 1)["scores"]
    suite = {name: scores.pop(name) for name in list(scores)[2:]}
    assert len(started) == 3 and list(scores) == ["retrieval", "grounding"]
    assert 0 <= scores["retrieval"]["value"] <= 100 and scores["grounding"]["n"] > 0
    assert list(suite)[:2] == ["contrast", "matching"] and {"object", "relation", "order"} < set(suite)
    kinds = [suite[name] for name in list(suite)[2:]]
    # Of all rows: the mean of the kinds, by their numbers of rows.
    mean = np.average([kind["value"] for kind in kinds], weights=[kind["n"] for kind in kinds])
    assert mean == pytest.approx(suite["matching"]["value"]) and suite["matching"]["chance"] == 50
    assert not any("blind" in score for score in suite.values())  # its word head never reads text alone
    scores |= suite
    assert ablation.run_variant(albef, tmp_path / "albef-3", "3", 1)["scores"] == scores
    assert len(started) == 3


def test_contrast_is_the_cosine_and_the_rest_matching(monkeypatch):
    def group(**accuracies: float) -> dict:
        return {"n": 4, "chance": 50.0, **{name: {"accuracy": value} for name, value in accuracies.items()}}

    summary = {"all": group(itc=1, itm=2, blind=3), "order": group(itc=4, itm=5, blind=6)}
    model = SimpleNamespace(score_suite=lambda rows: {"summary": summary})
    monkeypatch.setattr("simla.demo.swaps.scene_rows", lambda folder: [])
    monkeypatch.setattr("simla.loading.load", lambda checkpoint: model)
    scores = ablation.evaluate_alignment("x.pth")
    shown = {name: (score["value"], score["blind"]) for name, score in scores.items()}
    assert shown == {"contrast": (1, 3), "matching": (2, 3), "order": (5, 6)}


def test_differences_are_of_the_seeds_that_both_have():
    one = {"values": {"42": 5.0, "43": 7.0}}
    other = {"values": {"42": 1.0, "43": 1.0, "44": 90.0}}
    assert ablation.difference(one, other) == (5.0, pytest.approx((2 / 2) ** 0.5))
    assert ablation.difference({"values": {"42": 5.0}}, other) == (4.0, None)
    assert ablation.number(5, 1.26, "+") == "+5.0 ± 1.3" and ablation.number(-4, None, "+") == "-4.0"


def test_the_time_left_is_that_of_the_same_variant_or_the_mean():
    first, second, _ = ablation.VARIANTS[:3]
    done = {(first, 42): {"seconds": 3600}, (second, 42): {"seconds": 60}}
    assert ablation.time_left({}, [(first, 42)]) == ""
    assert ablation.time_left(done, [(first, 43), (second, 43)]) == "; eta 1:01:00"
    assert ablation.time_left(done, [(ablation.VARIANTS[2], 42)]) == "; eta 0:30:30"


def test_points_have_their_mean_their_deviation_and_the_levels(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *rest: drawn.append(figure))
    levels = {"first": {"chance": 1.0, "blind": 2.0}, "second": {"chance": 3.0}}
    panels = {"first": [[4.0, 6.0], [9.0]], "second": [[5.0], [5.0]]}
    plots.plot_points(["a", "b"], panels, levels, tmp_path / "p.png")
    [figure] = drawn
    first, second = figure.axes
    bars = [bar.get_segments() for bar in first.collections]
    assert np.allclose(bars[0][0][:, 0], [5 - 2**0.5, 5 + 2**0.5]) and len(bars) == 1  # 9 is a single run
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chance", "blind"]
    assert [line.get_xdata()[0] for line in second.lines if line.get_linestyle() == ":"] == [3]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b"]


def test_the_page_has_the_tables_of_the_run_that_is_kept_beside_it():
    """docs/ablation.json is its summary.json; before there is one, the page says that none was made."""
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    kept = ROOT / "docs" / "ablation.json"
    assert kept.is_file() != ("Not measured yet." in page)
    if kept.is_file():
        assert ablation.tables(json.loads(kept.read_bytes())) in page
        assert (ROOT / "docs" / "images" / "ablation.png").is_file() and "images/ablation.png" in page


@pytest.mark.parametrize("variant", ablation.VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_is_on_the_page_and_in_a_comparison(variant):
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert f"| {variant.title} |" in page or (variant.is_switch and "`released_code`" in page)
    assert any(variant.name in names for names in ablation.COMPARISONS.values())
