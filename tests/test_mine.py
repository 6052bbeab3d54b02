"""`make mine` on drawn photos: its steps, what it refuses, and that a second call goes on."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from tiny import MODEL, ROOT, launch_here

from simla import plots
from simla.configs.reader import read_yaml
from simla.dataset.prepare.common import SPLITS
from simla.dataset.retrieval import RetrievalEvalData
from simla.demo import mine
from simla.demo import pretrain as demo
from simla.utils import UserError

NUM_PHOTOS = 40
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of drawn photos and a table beside it, with what goes wrong: a photo that is damaged, one
    without a caption, one that is missing, and a caption that is empty.
    """
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    rows = []
    for number in range(NUM_PHOTOS):
        pixels = rng.integers(0, 255, (36, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg")
        colour = COLOURS[number % 4]
        rows += [
            (f"{number:03}.jpg", f"a {colour} thing"),
            (f"{number:03}.jpg", f"Picture of {colour} dots."),
        ]
    damaged = (folder / "003.jpg").read_bytes()
    (folder / "003.jpg").write_bytes(damaged[: len(damaged) // 2])
    Image.fromarray(pixels[::-1]).save(folder / "nothing said.jpg")
    rows += [("away.jpg", "a photo that is not there"), ("000.jpg", " ")]
    with (folder.parent / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return folder


@pytest.fixture(scope="module")
def tiny_mine(photos, tmp_path_factory):
    """Calls the command with tiny configs, its task scripts in this process -> (out, run)."""
    folder = tmp_path_factory.mktemp("mine")
    out, configs = folder / "out", folder / "configs"
    configs.mkdir()
    for name in ("Pretrain", "Retrieval"):
        config = read_yaml(ROOT / "configs" / "small" / f"{name}.yaml")
        config |= {key: value for key, value in MODEL.items() if key in config}
        config |= {"num_masking_patches": 5, "min_num_patches": 2} if name == "Pretrain" else {"k_test": 3}
        config.get("image_tokenizer", {})["vocab_size"] = 16
        with (configs / f"{name}.yaml").open("w") as file:
            YAML(typ="safe", pure=True).dump(config, file)

    def run(*flags: str, stop_in: str = "", table: str = "captions.csv") -> list[list[str]]:
        """Return the scripts that were started; `stop_in`: the one that fails after its training."""
        started = []
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "CONFIGS": configs,
                "MIN_PHOTOS": 30,
                "NUM_EPOCHS": 1,
                "make_plan": lambda file: mine.Plan(8, 16, 1, 0),
                "check": lambda words, check=mine.check: check([*words, "--workers", "1"]),
            }.items():
                patch.setattr(mine, name, value)
            patch.setattr(demo, "launch", launch_here(started, stop_in))
            patch.setattr(demo, "num_processes", lambda: 1)
            given = ["--photos", str(photos), "--csv", str(photos.parent / table), "--output_dir", str(out)]
            patch.setattr(sys, "argv", ["simla.demo.mine", *given, *flags])
            mine.main()
        return started

    return out, run


def test_from_a_table_to_scores(tiny_mine, photos, capsys):
    """In two calls, the first of which stops in the training."""
    out, run = tiny_mine
    with pytest.raises(UserError, match=r"Pretrain.py failed"):
        run(stop_in="Pretrain.py")
    told = capsys.readouterr().out
    for sentence in (
        "captions.csv: 1, first",
        "nothing said.jpg",
        "captions whose image cannot be found",
        "away.jpg",
        "pairs without a caption",
        "truncated image",
    ):
        assert sentence in told, sentence
    files = [json.loads((out / "data" / f"retrieval_{split}.json").read_bytes()) for split in SPLITS]
    shown = [{entry["image"] for entry in entries} for entries in files]
    assert sum(map(len, shown)) == len(set.union(*shown)) == NUM_PHOTOS

    started = run()
    assert [command[0] for command in started] == [
        "Pretrain.py",
        "Retrieval.py",
        "Retrieval.py",
        "Retrieval.py",
    ]
    assert "--resume" in started[0]
    told = capsys.readouterr().out
    assert all(f"{step}: done already" in told for step in ("table", "vocabulary", "check", "config"))
    assert "pre-trained   fine-tuned" in told and "python -m simla.web --checkpoint" in told

    summary = json.loads((out / "summary.json").read_bytes())
    after = json.loads((out / "retrieval" / "after" / "result" / "retrieval.json").read_bytes())
    assert summary["n"] == after["n"] in (3, 4)  # the damaged one may be in it
    assert summary["fine-tuned"] == {name: after[name] for name in demo.METRICS}
    assert summary["chance"]["img_r1"] == pytest.approx(100 / after["n"])
    for picture in ("retrieval/gallery.png", "losses.png"):
        assert np.asarray(Image.open(out / picture).convert("L")).std() > 5

    assert run() == []  # all is done


def test_another_table_or_seed_is_refused(tiny_mine, photos):
    _, run = tiny_mine
    with pytest.raises(UserError, match="was made with seed '42', not '7': give another --output_dir"):
        run("--seed", "7")
    other = photos.parent / "other.csv"
    other.write_text("image,caption\n000.jpg,A text.\n")
    with pytest.raises(UserError, match="was made with csv"):
        run(table="other.csv")


def test_photos_that_come_later_are_taken_up_until_the_training_begins(tmp_path, capsys):
    photos, names = tmp_path / "photos", ["a.jpg", "b.jpg"]
    photos.mkdir()
    done = []

    def go_on(is_trained: bool = False) -> str:
        steps = mine.Steps(
            tmp_path / "steps.json", {}, mine.checksum_of(photos, names), is_trained=is_trained
        )
        steps.do("table", "it is split", done.append, len(done))
        return capsys.readouterr().out

    (photos / "a.jpg").write_bytes(b"a")
    assert "done already" not in go_on() and "done already" in go_on()
    (photos / "not in the table.jpg").write_bytes(b"c")
    assert "done already" in go_on()
    (photos / "b.jpg").write_bytes(b"b")
    assert "all steps are done again" in go_on() and len(done) == 2
    os.utime(photos / "a.jpg", (1, 1))  # a copy that does not keep dates
    assert "done already" in go_on()
    (photos / "a.jpg").write_bytes(b"mended")
    for _ in range(2):
        said = go_on(is_trained=True)
        assert "give another --output_dir" in said and "table: done already" in said


def test_a_photo_under_two_names_is_one_in_the_gallery(tmp_path, monkeypatch):
    """As it is in the evaluation: the columns of the scores are photos."""
    files = [{"image": f"{name}.png", "caption": [f"text {name}"]} for name in "abcd"]
    for name in "abd":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "test.json").write_text(json.dumps(files))
    data = RetrievalEvalData(
        str(tmp_path / "test.json"), {"image_root": "", "skip_unreadable": False, "image_res": 4}
    )
    scores = torch.zeros(len(data.texts), len(data))
    scores[range(len(data.texts)), data.txt2img] = 1
    (tmp_path / "after" / "result").mkdir(parents=True)
    torch.save({"scores_t2i": scores}, tmp_path / "after" / "result" / "retrieval_scores.pt")
    drawn = []
    monkeypatch.setattr(plots, "plot_gallery", lambda *given: drawn.append(given))
    demo.gallery(tmp_path, num_results=1, test_file=tmp_path / "test.json")
    ((texts, shown, right, _, title),) = drawn
    assert texts == ["text a", "text b", "text d"] and all(map(all, right)) and "of 3 held-out" in title
    assert [Path(file).name for (file,) in shown] == ["a.png", "b.png", "d.png"]


def test_what_cannot_be_used_is_said_in_a_sentence(photos, tmp_path, monkeypatch):
    few = tmp_path / "few.csv"
    rows = "".join(f"{number:03}.jpg,Dots.\n" for number in range(NUM_PHOTOS))
    few.write_text(f"image,caption\n{rows}photos/1.jpg,Dots.\n")
    odd = tmp_path / "odd.csv"
    odd.write_text("photo,caption\n000.jpg,Dots.\n")
    out = str(tmp_path / "out")
    for arguments, message in (
        (["--photos", str(tmp_path / "none"), "--csv", str(few)], "--photos .*none: there is no such folder"),
        (["--photos", "", "--csv", str(few)], "PHOTOS=folder"),
        (
            ["--photos", str(photos), "--csv", str(tmp_path / "no.csv")],
            r"--csv .*no.csv: there is no such file",
        ),
        (
            ["--photos", str(photos), "--csv", str(few)],
            "few.csv names 40 photos .* 100 at least .* not there: 1, first 'photos/1.jpg'",
        ),
        (["--photos", str(photos), "--csv", str(odd)], "odd.csv has no column named image, .* or rename it"),
    ):
        monkeypatch.setattr(sys, "argv", ["simla.demo.mine", "--output_dir", out, *arguments])
        with pytest.raises(UserError, match=message):
            mine.main()


@pytest.mark.parametrize(
    ("num_photos", "captions", "plan"),
    [
        (80, 1, mine.Plan(32, 240, 15, 2)),
        (191, 5, mine.Plan(32, 573, 3, 6)),
        (2000, 5, mine.Plan(64, 3000, 2, 34)),
        (6400, 5, mine.Plan(64, 6400, 1, 66)),
    ],
)
def test_how_long_is_trained(tmp_path, num_photos, captions, plan):
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"image": f"{i % num_photos}.jpg"} for i in range(num_photos * captions)]))
    assert mine.make_plan(str(file)) == plan


def test_a_score_near_chance_is_called_so():
    chance = {"txt_r5": 20.0, "img_r5": 20.0}
    assert mine.caution(chance, {"n": 100, "txt_r5": 29.0, "img_r5": 29.0}) == ""
    said = mine.caution(chance, {"n": 100, "txt_r5": 29.0, "img_r5": 27.0})
    assert "text to image 27.0 (chance 20.0 +- 8.0)" in said and "image to text" not in said
