"""`make demo-all` from end to end on a tiny data set: table, pictures, and that a second call goes on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from tiny import MODEL, demo_config, launch_here, make_tiny

from simla import plots
from simla.configs.reader import read_yaml
from simla.demo import all_tasks as demo_all
from simla.demo import pretrain as demo
from simla.utils import UserError

TASKS = ["zero_shot_retrieval", "retrieval", "grounding", "vqa", "nlvr", "ve"]
ROWS = [*TASKS[:3], "grounding_heat_box", *TASKS[3:5], "nlvr_consistency", *TASKS[5:], "alignment_suite"]
COLUMNS = {"metric", "chance", "before", "after", "n", "seconds"}


def tiny_configs(folder, data) -> None:
    """The demo's configs with the tiny model, one epoch, and the tiny data."""
    yaml = YAML(typ="safe", pure=True)
    for name in ("Pretrain", "Retrieval", "Grounding", "VQA", "NLVR_Pretrain", "NLVR", "VE"):
        path = demo_config(name, data, folder)
        config = read_yaml(path)
        config |= {key: value for key, value in MODEL.items() if key in config}
        config["vit"] = {
            **MODEL["vit"],
            "depth": 4,
        }  # grounding looks at block 3
        config["schedular"]["epochs"] = 1
        if path.stem == "Pretrain":
            config |= {"num_masking_patches": 5, "min_num_patches": 2}
            config["image_tokenizer"]["vocab_size"] = 16
        with path.open("w") as file:
            yaml.dump(config, file)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Calls the chain over the tiny data set, its task scripts in this process -> (out, run)."""
    folder = tmp_path_factory.mktemp("chain")
    data = make_tiny(folder)["data"]
    (folder / "configs").mkdir()
    tiny_configs(folder / "configs", data)

    def run(stop_in: str = "", flags: tuple = ()) -> list[list[str]]:
        """The commands that were started; `stop_in`: the script that fails when it trains."""
        started = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [])
            patch.setattr(demo_all, "DATA", data)
            patch.setattr(demo_all, "make_data", lambda: None)
            for name, value in {
                "DATA": data,
                "CONFIGS": folder / "configs",
                "launch": launch_here(started, stop_in),
                "num_processes": lambda: 8,  # batches of 32 / 8
            }.items():
                patch.setattr(demo, name, value)
            patch.setattr(sys, "argv", ["simla.demo.all_tasks", "--output_dir", str(folder / "out"), *flags])
            demo_all.main()
        return started

    return folder / "out", run


def test_a_failing_stage_stops_the_chain_and_the_next_call_resumes_it(chain):
    out, run = chain
    with pytest.raises(UserError):
        run(stop_in="VQA.py")
    assert not (out / "summary.json").exists()
    records = {name: json.loads((out / name / "stage.json").read_bytes()) for name in ("grounding", "vqa")}
    assert "after" in records["grounding"] and "checkpoint" not in records["vqa"]
    started = run()
    assert [command[0] for command in started][:3] == ["VQA.py", "VQA.py", "Pretrain_NLVR.py"]
    resumed = started[0]
    assert "--resume" in resumed and "--checkpoint" not in resumed and "--evaluate" in started[1]


def test_a_stage_of_another_start_or_config_is_not_taken_for_done(chain, monkeypatch):
    out, _ = chain
    monkeypatch.setattr(demo, "CONFIGS", out.parent / "configs")
    monkeypatch.setattr(demo, "launch", None)
    stage = next(stage for stage in demo_all.STAGES if stage.name == "vqa")
    start = json.loads((out / "pretrain" / "stage.json").read_bytes())["checkpoint"]
    assert "after" in demo.run_stage(stage, out / "vqa", "42", start)
    other = json.loads((out / "retrieval" / "stage.json").read_bytes())["checkpoint"]
    with pytest.raises(
        UserError, match="vqa was made with another starting checkpoint than there is now; delete"
    ):
        demo.run_stage(stage, out / "vqa", "42", other)
    with pytest.raises(UserError, match="vqa was made with another config than there is now"):
        demo.run_stage(stage._replace(flags=("--overrides", "k_test=1")), out / "vqa", "42", start)
    gone = str(Path(start).with_name("checkpoint_99.pth"))  # the run is known though its file was deleted
    record = json.loads((out / "vqa" / "stage.json").read_bytes())
    made_of = record.pop("made_of")
    (out / "vqa" / "stage.json").write_text(json.dumps(record))  # as an earlier version wrote it
    demo.run_stage(stage, out / "vqa", "42", gone)
    assert json.loads((out / "vqa" / "stage.json").read_bytes())["made_of"] == made_of


def test_the_summary(chain, capsys):
    out, run = chain
    assert run() == []  # all stages are done
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ROWS
    for name, row in summary.items():
        assert set(row) == COLUMNS and row["n"] > 0, name
        for column in ("chance", "before", "after"):
            assert 0 <= row[column] <= 100, (name, column)
    nlvr = json.loads((out / "nlvr" / "after" / "result" / "nlvr.json").read_text())["test"]
    assert summary["nlvr"]["after"] == nlvr["acc"] and summary["nlvr"]["n"] == nlvr["n"]
    assert summary["nlvr_consistency"]["after"] == nlvr["consistency"]
    splits = json.loads((out / "grounding" / "after" / "result" / "grounding.json").read_text())["splits"]
    parts = [splits["testA_d"], splits["testB_d"]]
    for row, score in (("grounding", "accuracy"), ("grounding_heat_box", "heat_accuracy")):
        right = sum(round(part[score] * part["n"] / 100) for part in parts)
        assert summary[row]["after"] == pytest.approx(100 * right / sum(part["n"] for part in parts))
    table = capsys.readouterr().out
    assert all(name in table for name in ROWS) and "before   after" in table


def test_the_stages_of_another_seed_are_not_taken_for_this_one_s(chain):
    _, run = chain
    with pytest.raises(UserError, match="is of seed 42; give seed 43 another --output_dir"):
        run(flags=("--seed", "43"))


def test_the_pictures(chain):
    out, _ = chain
    for name in (
        "pretrain/losses.png",
        "retrieval/gallery.png",
        "grounding/heat_maps.png",
        "vqa/answers.png",
    ):
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5, name


def test_a_picture_is_green_only_where_the_answer_has_the_full_score(tmp_path, monkeypatch):
    """Not where one annotator of ten gave it, too."""
    questions = [{"image": "x.jpg", "question": "is there a cat", "answer": ["no"] * 8 + ["yes", "?"]}] * 3
    given = [{"answers": [answer]} for answer in ("no", "yes", "cat")]
    result = tmp_path / "after" / "result"
    result.mkdir(parents=True)
    (tmp_path / "vqa_test.json").write_text(json.dumps(questions))
    (result / "vqa_top_answers.json").write_text(json.dumps(given))
    drawn = []
    monkeypatch.setattr(demo_all, "DATA", tmp_path)
    monkeypatch.setattr(plots, "plot_answers", lambda *given: drawn.extend(given))
    demo_all.draw_answers(tmp_path)
    _, _, answers, right, expected, _ = drawn
    assert answers == ["no", "yes", "cat"] and right == [True, False, False] and expected == ["no"] * 3


def test_every_stage_starts_from_an_earlier_one_and_scores_where_it_should():
    seen = {""}
    for stage in demo_all.STAGES:
        assert stage.start in seen, stage.name
        seen.add(stage.name)
    scored = [stage.key or stage.name for stage in demo_all.STAGES if stage.result]
    assert scored == TASKS
