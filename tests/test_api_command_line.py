"""The command `simla`: what it prints is what the Python interface says; the package lists every module."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from api_data import make_checkpoints
from matplotlib.figure import Figure
from PIL import Image
from tiny import ROOT

import simla
from simla.__main__ import VARIABLE, main
from simla.plots import plot_gallery, plot_word_maps
from simla.utils import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def images(tiny):
    return [str(tiny.data / entry["image"]) for entry in tiny.entries("retrieval_test")]


@pytest.fixture
def ask(tiny, monkeypatch, capsys):
    """Runs the command in this process -> what it prints: an object with --json, else text."""

    def ask(kind: str, *arguments: object) -> dict | str:
        command = ["simla", *map(str, arguments), "--device", "cpu"]
        monkeypatch.setenv(VARIABLE, str(tiny.checkpoints[kind]))
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        main()
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in command else printed

    return ask


def load(tiny, kind: str) -> simla.Simla:
    return simla.load(tiny.checkpoints[kind], "cpu")


def test_match_and_similarity(tiny, images, ask):
    model, texts = load(tiny, "retrieval"), ["a cup", "two dogs"]
    result = ask("retrieval", "match", images[0], *texts, "--json")
    expected = model.match(images[0], texts).tolist()
    assert [row["probability"] for row in result["results"]] == expected
    assert [row["text"] for row in result["results"]] == texts
    cosines = ask("retrieval", "similarity", images[0], *texts, "--json")["results"]
    assert [row["cosine"] for row in cosines] == model.similarity(images[0], texts).tolist()
    lines = ask("retrieval", "match", images[0], *texts).splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == texts
    assert float(lines[0].split()[0]) == pytest.approx(expected[0], abs=1e-4)
    few = ask("retrieval", "match", images[0], *texts, "--max_tokens", 2, "--json")["results"]
    assert [row["probability"] for row in few] == model.match(images[0], texts, max_tokens=2).tolist()


def test_encode(tiny, images, ask, tmp_path):
    model, out = load(tiny, "retrieval"), tmp_path / "f.npy"
    assert ask("retrieval", "encode", *images[:3], "-o", out, "--json")["shape"] == [3, 16]
    assert np.array_equal(np.load(out), model.encode_image(images[:3]).numpy())
    assert "2 rows of 16" in ask("retrieval", "encode", "a cup", "a dog", "--texts", "-o", out)
    assert np.array_equal(np.load(out), model.encode_text(["a cup", "a dog"]).numpy())


def test_ground(tiny, images, ask, tmp_path):
    boxes = [[0, 0, 20, 20], [10, 10, 30, 30]]
    expected = load(tiny, "retrieval").ground(images[0], "a red cup", boxes, block=0)
    command = ("ground", images[0], "a red cup", "--block", 0, "--boxes", json.dumps(boxes))
    result = ask("retrieval", *command, "--json", "-o", tmp_path / "map.png")
    assert result["box"] == expected.box and result["heat"] == expected.heat.tolist()
    assert [(row["box"], row["score"]) for row in result["boxes"]] == expected.ranked
    assert [row["word"] for row in result["words"]] == ["a", "red", "cup"]
    assert result["words"][2]["heat"] == expected.words[2][1].tolist()
    picture = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))
    assert picture.shape[1] > 800 and picture.std() > 10
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    text = ask("retrieval", *command[:-1], tmp_path / "boxes.json")
    assert str(expected.ranked[0][0]) in text.splitlines()[1]
    for wrong in (
        "none",
        "[" * 100_000,
        f"[[{10**400}, 0, 1, 1]]",
        "[[0, 0, 1e308, 1e308]]",
        "[[0, 0, 1e-200, 1]]",
    ):
        with pytest.raises(UserError, match=r"--boxes .*: expected a JSON list|^boxes of pair 0"):
            ask("retrieval", *command[:-1], wrong)
    many = json.dumps(boxes * 300)  # longer than the name of a file can be
    assert len(ask("retrieval", *command[:-1], many, "--json")["boxes"]) == 600


def test_search(tiny, images, ask, tmp_path):
    model, folder = load(tiny, "retrieval"), str(Path(images[0]).parent)
    expected = [[hit._asdict() for hit in hits] for hits in model.search(folder, ["a cup", "two dogs"], 2)]
    command = ("search", folder, "a cup", "two dogs", "--top", 2, "--index", tmp_path / "index")
    for _ in range(2):  # writes the index, then opens it
        result = ask("retrieval", *command, "--json", "-o", tmp_path / "gallery.png")
        assert [row["hits"] for row in result["results"]] == expected and result["num_images"] == 7
        assert [row["query"] for row in result["results"]] == ["a cup", "two dogs"]
    assert np.asarray(Image.open(tmp_path / "gallery.png").convert("RGB")).std() > 10
    around = str(Path(folder) / ".." / Path(folder).name)  # the same folder
    assert ask("retrieval", "search", around, *command[2:], "--json")["num_images"] == 7
    with pytest.raises(UserError, match=f"index is of {folder}, not of {tmp_path}; name another one"):
        ask("retrieval", "search", tmp_path, *command[2:])
    text = ask("retrieval", "search", folder, "a cup", "--candidates", 7)
    assert model.search(folder, "a cup", candidates=7)[0].file in text.splitlines()[1]


def test_index_and_its_update(images, ask, tmp_path):
    folder, index = tmp_path / "photos", tmp_path / "photos.index"
    shutil.copytree(Path(images[0]).parent, folder)
    result = ask("retrieval", "index", folder, index, "--json")
    assert result["num_images"] == 7 and result["file"] == str(index) and result["unreadable"] == {}
    (folder / ".thumbnails").mkdir()
    shutil.copy(images[0], folder / ".thumbnails" / "a.jpg")
    shutil.copy(images[0], folder / "new.jpg")
    with pytest.raises(UserError, match=r"new\.jpg is new; update it \(`index` with update=True\)"):
        ask("retrieval", "search", folder, "a cup", "--index", index)
    with pytest.raises(UserError, match="is there already; update it"):
        ask("retrieval", "index", folder, index)
    text = ask("retrieval", "index", folder, index, "--update")
    assert text.splitlines() == ["8 images", "passed over: 1 hidden folders", f"written: {index}"]
    assert ask("retrieval", "search", folder, "a cup", "--index", index, "--json")["num_images"] == 8
    command = "search", folder, "a cup", "--index", index, "--everything"
    with pytest.raises(UserError, match="index is without hidden folders and waste; update it"):
        ask("retrieval", *command)
    assert "9 images" in ask("retrieval", "index", folder, index, "--update", "--everything")
    assert ask("retrieval", *command, "--json")["num_images"] == 9
    (folder / "broken.jpg").write_bytes(b"no photo")
    text = ask("retrieval", "index", folder, index, "--update", "--everything").splitlines()
    assert text[1] == f"1 image cannot be read, the first: {folder / 'broken.jpg'} (not an image)"
    (folder / "broken.jpg").unlink()
    ask("retrieval", "index", folder, index, "--update")
    moved = folder.rename(tmp_path / "moved")
    hits = ask("retrieval", "search", moved, "a cup", "--index", index, "--json")["results"][0]["hits"]
    assert all(hit["file"].startswith(str(moved)) for hit in hits)


def test_search_says_what_it_passed_over(images, ask, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(images[0], folder / "noext")
    (folder / "film.mp4").write_bytes(bytes(40))
    (folder / "gone.jpg").symlink_to("nowhere")
    command = ("search", folder, "a cup", "--index", tmp_path / "index")
    for _ in range(2):  # writes the index, then opens it
        text = ask("retrieval", *command)
        assert "passed over: 1 files that are no images (.mp4), 1 links to nothing" in text
    result = ask("retrieval", *command, "--json")
    assert result["passed_over"] == {"files that are no images (.mp4)": 1, "links to nothing": 1}
    assert [hit["file"] for hit in result["results"][0]["hits"]] == [str(folder / "noext")]


def test_names_and_queries_may_have_dollars_and_bytes_that_are_no_text(images, ask, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(images[0], os.fsencode(folder) + b"/$x_$ \xff.jpg")
    (hit,) = ask("retrieval", "search", folder, "a $x_$ cup", "--json")["results"][0]["hits"]
    assert os.fsencode(hit["file"]) == os.fsencode(folder) + b"/$x_$ \xff.jpg"
    capture = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as strict as a terminal
    with contextlib.redirect_stdout(capture):
        ask("retrieval", "search", folder, "a $x_$ cup", "-o", tmp_path / "gallery.png")
    capture.flush()
    assert rb"/$x_$ \udcff.jpg" in capture.buffer.getvalue()
    assert np.asarray(Image.open(tmp_path / "gallery.png").convert("RGB")).std() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", ".", "a", "-o", "none/g.png"), "-o none/g.png: there is no folder none"),
        (("encode", "x.jpg", "-o", "none/f.npy"), "-o none/f.npy: there is no folder none"),
        (("search", ".", "a", "-o", "gallery"), r"gallery: the name of a picture ends in one of .*\.png"),
        (("ground", "x.jpg", "a", "-o", "map.xyz"), r"map\.xyz: the name of a picture ends in one of"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_loaded(ask, monkeypatch, arguments, message):
    monkeypatch.setattr("simla.loading.load", pytest.fail)
    with pytest.raises(UserError, match=message):
        ask("retrieval", *arguments)


def test_answer_entails_compare_and_keywords(tiny, images, ask, tmp_path):
    vqa = load(tiny, "vqa")
    (tmp_path / "answers.json").write_text('["two", "a beach", "yes"]')
    for given in ("two, a beach,yes", tmp_path / "answers.json"):
        result = ask("vqa", "answer", images[0], "what is it?", "--answers", given, "--top", 2, "--json")
        pairs = [(row["answer"], row["probability"]) for row in result["results"]]
        assert pairs == vqa.answer(images[0], "what is it?", ["two", "a beach", "yes"], top=2)
    for wrong in (tmp_path / "anwsers.json", "anwsers.txt", "some/answers", "my,answers.json"):
        with pytest.raises(UserError, match=r"one of the answers is .*, and there is no such file"):
            ask("vqa", "answer", images[0], "what is it?", "--answers", wrong)
    many = ", ".join(f"{number} dogs" for number in range(600))
    assert ask("vqa", "answer", images[0], "how many?", "--answers", many, "--json")["results"]
    result = ask("vqa", "answer", images[0], "what is it?", "--json")["results"]
    assert [tuple(row.values()) for row in result] == vqa.answer(images[0], "what is it?")

    result = ask("ve", "entails", images[0], "a dog", "--json")["results"]
    found = {row["class"]: row["probability"] for row in result}
    assert found == load(tiny, "ve").entails(images[0], "a dog")
    assert result[0]["probability"] == max(found.values())

    result = ask("nlvr", "compare", images[0], images[1], "both are red", "--json")["results"]
    probability = load(tiny, "nlvr").compare(images[0], images[1], "both are red")
    assert result == [{"statement": "both are red", "probability": probability}]
    assert f"{probability:.4f}  both are red" in ask("nlvr", "compare", images[0], images[1], "both are red")

    result = ask("pretrain", "keywords", images[0], "--top", 3, "--json")["results"]
    assert [tuple(row.values()) for row in result] == load(tiny, "pretrain").keywords(images[0], top=3)
    result = ask("pretrain", "keywords", images[0], "--words", "beach", "dog", "--json")["results"]
    found = load(tiny, "pretrain").keywords(images[0], words=["beach", "dog"])
    assert [tuple(row.values()) for row in result] == found


def test_neither_text_nor_json_ever_holds_nan(tiny, images, ask, tmp_path):
    content = torch.load(tiny.checkpoints["retrieval"], weights_only=True)
    content["model"]["itm_head.weight"].fill_(3e38)  # finite, and what it multiplies is not
    torch.save(content, tmp_path / "huge.pth")
    command = ("match", images[0], "a cup", "--checkpoint", tmp_path / "huge.pth")
    for flags in ([], ["--json"]):
        with pytest.raises(UserError, match="matching scores are NaN or infinite"):
            ask("retrieval", *command, *flags)


def test_the_checkpoint_may_be_named_on_the_command_line(tiny, images, ask, monkeypatch):
    result = ask("ve", "match", images[0], "a cup", "--checkpoint", tiny.checkpoints["retrieval"], "--json")
    assert len(result["results"]) == 1
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(sys, "argv", ["simla", "match", images[0], "a cup"])
    with pytest.raises(UserError, match=f"give --checkpoint FILE, or set {VARIABLE}"):
        main()


def test_wrong_arguments_and_help(ask, images, capsys):
    for arguments in (("search", "x", "a", "--top", 0), ("match", images[0]), ("paint", "x")):
        with pytest.raises(SystemExit) as stop:
            ask("retrieval", *arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        ask("retrieval", "--help")
    text = capsys.readouterr().out
    names = (
        "match",
        "similarity",
        "ground",
        "search",
        "index",
        "answer",
        "keywords",
        "entails",
        "compare",
        "encode",
    )
    for name in names:
        assert f"    {name}" in text
    assert VARIABLE in text


# ---- pictures ----


def test_word_maps_are_hot_where_the_map_is(tmp_path):
    heat = torch.zeros(4, 4)
    heat[0, 3] = 1.0  # at the top right
    maps = [("one", heat), ("two", torch.zeros(4, 4))]
    plot_word_maps(
        Image.new("RGB", (60, 60), "white"),
        "one two",
        heat,
        maps,
        [("box", [2, 40, 16, 16])],
        tmp_path / "m.png",
    )
    picture = np.asarray(Image.open(tmp_path / "m.png").convert("RGB")).astype(int)
    third = picture[:, : int(picture.shape[1] * 0.29)]  # the text's map
    red = (third[..., 0] - third[..., 2] > 100) & (third[..., 1] < 120)
    rows, columns = red.nonzero()
    assert len(rows) > 50 and columns.mean() > third.shape[1] / 2 and rows.mean() < third.shape[0] / 2


def test_every_box_of_a_word_map_is_seen_and_named_wherever_it_lies(tmp_path, monkeypatch):
    """Two boxes of the same corner at the upper edge, on a picture of their own colour."""
    legends = []
    legend = Figure.legend

    def keep(*arguments, **options):
        legends.append(legend(*arguments, **options))
        return legends[-1]

    monkeypatch.setattr(Figure, "legend", keep)
    blue, orange = (31, 119, 180), (255, 127, 14)  # of the first and the second box
    boxes = [("heat alone", [20, 0, 40, 30]), ("best proposal", [20, 0, 20, 20])]
    image, heat = Image.new("RGB", (60, 60), blue), torch.zeros(4, 4)
    plot_word_maps(image, "one", heat, [("one", heat)], boxes, tmp_path / "m.png")
    (drawn,) = legends
    assert [text.get_text() for text in drawn.get_texts()] == ["heat alone", "best proposal"]
    picture = np.asarray(Image.open(tmp_path / "m.png").convert("RGB")).astype(int)
    of_blue = (np.abs(picture - blue).sum(-1) < 10).nonzero()
    left, right, top, bottom = of_blue[1].min(), of_blue[1].max(), of_blue[0].min(), of_blue[0].max()
    assert (np.abs(picture - orange).sum(-1) < 30).any()
    middle = picture[top:bottom, left : left + (right - left) // 2]  # the map of the text
    scale = middle.shape[0] / 60
    row = middle[int(25 * scale), :]  # crosses the sides of the first box alone
    assert (np.abs(row - 255).sum(-1) < 60).sum() >= 2


def test_a_gallery_of_unequal_rows_without_truth(tmp_path):
    file = str(tmp_path / "a.png")
    Image.new("RGB", (16, 16), "blue").save(file)
    notes = [["best\n1.0", "next\n0.5"], ["best\n2.0"]]
    plot_gallery(["a", "b"], [[file, file], [file]], None, tmp_path / "g.png", "two", notes)
    picture = np.asarray(Image.open(tmp_path / "g.png").convert("RGB")).astype(int)
    blue = (picture - [0, 0, 255] == 0).all(-1)
    half = picture.shape[0] // 2
    assert blue[:half].sum() == pytest.approx(2 * blue[half:].sum(), rel=0.1) and blue.sum() > 1000
    assert not (np.abs(picture - [0x1A, 0x96, 0x41]).sum(-1) < 30).any()  # nothing counts as right


# ---- the package ----


def test_the_package_says_where_the_command_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"simla": "simla.__main__:run"}
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": "requirements.txt"}
