"""Which rows show the same image: in training by path and image_id, in val and test by path."""

import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import demo_config

from simla.configs.reader import read_config
from simla.configs.schema import GROUNDING, RETRIEVAL
from simla.dataset.check.__main__ import main as check
from simla.dataset.grounding import grounding_loader
from simla.dataset.identity import by_path, by_path_and_id, resolved
from simla.dataset.readers.annotations import read_annotations
from simla.dataset.retrieval import (
    RetrievalEvalData,
    WithIdentities,
    read_captioned_images,
    read_train_pairs,
    retrieval_loader,
)
from simla.dataset.text import build_tokenizer
from simla.demo.data import make_demo
from simla.evaluation.retrieval import retrieval_recall
from simla.utils import UserError

EVALUATION = {"image_root": "", "image_res": 32, "skip_unreadable": False}
NAN = float("nan")


def write(path: Path, entries: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries), encoding="utf-8")
    return str(path)


def pair(image: str, image_id: object, caption: str = "a duck") -> dict:
    return {"image": image, "caption": caption, "image_id": image_id}


def identities(*files: str, image_root: str = "") -> tuple[list[int], list[str], list[str]]:
    """Numbers as they go into batches, problems, notes."""
    entries = read_train_pairs(list(files), image_root)
    found = by_path_and_id(entries)
    return WithIdentities(entries, found.first).idx.tolist(), found.problems, found.notes


def published_identities(files: list[str]) -> list[int]:
    """A number for each image_id, in order of appearance over all files together."""
    numbers = {}
    ids = [entry["image_id"] for file in files for entry in json.loads(Path(file).read_bytes())]
    return [numbers.setdefault(image_id, len(numbers)) for image_id in ids]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity") / "data"
    make_demo(folder, num_train=6, num_val=3, num_test=3, size=48, seed=3)
    return folder


# ---- official files ----

# Rows in the layout of the published files: their fields, paths and ids. Some of the captions are invented.
COCO = [
    (
        "val2014/COCO_val2014_000000522418.jpg",
        "coco_522418",
        "A woman wearing a net on her head cutting a cake. ",
    ),
    ("val2014/COCO_val2014_000000522418.jpg", "coco_522418", "A woman cutting a large white sheet cake."),
    ("train2014/COCO_train2014_000000318219.jpg", "coco_318219", "A boy wearing headphones at a computer."),
    ("val2014/COCO_val2014_000000522418.jpg", "coco_522418", "there is a woman that is cutting a white cake"),
    (
        "train2014/COCO_train2014_000000318219.jpg",
        "coco_318219",
        "A kid with headphones on using a computer.",
    ),
]


def test_coco_s_train_and_restval_files_keep_the_published_identities(tmp_path):
    """Whole, or cut in two whose images overlap, with the ids of one download."""
    rows = [pair(*row) for row in COCO]
    whole = write(tmp_path / "whole.json", rows)
    parts = [write(tmp_path / "train.json", rows[:3]), write(tmp_path / "restval.json", rows[3:])]
    for files in ([whole], parts):
        assert identities(*files) == (published_identities(files), [], []) == ([0, 0, 1, 0, 1], [], [])


def test_grouped_test_files_are_read_as_published(tmp_path):
    """Texts, and whose they are, in the order of the file; a caption that is there twice stays twice."""
    flickr = "flickr30k-images/1007129816.jpg"
    glasses = "A man with gauges and glasses is wearing a Blitz hat."
    entries = [
        {"image": flickr, "caption": ["The man with pierced ears is wearing glasses.", glasses]},
        {"image": "flickr30k-images/1009434119.jpg", "caption": [glasses, "A dog.", "A dog."]},
    ]
    data = RetrievalEvalData(write(tmp_path / "test.json", entries), EVALUATION)
    texts, img2txt, txt2img = [], [], []
    for number, entry in enumerate(entries):
        img2txt.append([])
        for caption in entry["caption"]:
            img2txt[number].append(len(texts))
            texts.append(caption.lower().replace(".", ""))
            txt2img.append(number)
    assert (data.texts, data.img2txt, data.txt2img, len(data)) == (texts, img2txt, txt2img, 2)
    assert data.left_out == 0 and data.entries[1]["images"] == [str(tmp_path / entries[1]["image"])]


# ---- val and test ----


def test_rows_of_an_image_are_one_image_with_all_captions(tmp_path, caplog):
    """Next to one another or not, whatever the path's spelling, the caption a text or a list."""
    caplog.set_level("INFO")
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "folder").symlink_to(".")
    rows = [
        ("b.jpg", ["b zero", "b one"]),
        ("a.jpg", "a zero"),
        (str(tmp_path / "a.jpg"), ["a one"]),
        ("c.jpg", "c zero"),
        ("./a.jpg", "a two"),
        ("folder/folder/a.jpg", "a three"),
        ("link.jpg", ["a four", "a zero"]),
        ("folder/b.jpg", "b two"),
    ]
    rows = [{"image": image, "caption": caption} for image, caption in rows]
    grouped = [
        {"image": "b.jpg", "caption": ["b zero", "b one", "b two"]},
        {"image": "a.jpg", "caption": ["a zero", "a one", "a two", "a three", "a four", "a zero"]},
        {"image": "c.jpg", "caption": ["c zero"]},
    ]
    expected = RetrievalEvalData(write(tmp_path / "grouped.json", grouped), EVALUATION)
    assert not caplog.records
    data = RetrievalEvalData(write(tmp_path / "rows.json", rows), EVALUATION)
    assert len(data) == 3 and data.left_out == 0
    for name in ("texts", "img2txt", "txt2img"):
        assert getattr(data, name) == getattr(expected, name)
    assert [item["images"] for item in data.entries] == [item["images"] for item in expected.entries]
    (record,) = caplog.records
    assert "8 rows show 3 images" in record.message
    assert f"{tmp_path}/rows.json: entry 0 and {tmp_path}/rows.json: entry 7 both b.jpg" in record.message
    scores = np.eye(3)[:, data.txt2img]
    assert retrieval_recall(scores, scores.T, data.img2txt, data.txt2img)["r_mean"] == 100


def test_an_image_left_out_takes_its_rows_with_it(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": f"{name}.png", "caption": name} for name in "abab"]
    config = {**EVALUATION, "skip_unreadable": True, "batch_size_test": 2, "num_workers": 0, "log_steps": 9}
    data = RetrievalEvalData(write(tmp_path / "test.json", rows), config)
    assert (data.texts, data.img2txt, len(data), data.left_out) == (["a", "a"], [[0, 1]], 1, 1)
    assert data[0]["images"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("caption", [None, 3, [], {}, ["a", None]])
def test_a_caption_that_is_no_text_is_refused(tmp_path, caption):
    file = write(tmp_path / "test.json", [{"image": "a.jpg", "caption": caption}])
    with pytest.raises(UserError, match="entry 0: 'caption' must be text or a non-empty list of texts"):
        read_captioned_images(file, "")


# ---- training ----


def test_ids_count_within_their_file(tmp_path):
    """Both number from 0; their first images differ, the last one is the same."""
    first = [pair("a.jpg", 0), pair("a.jpg", 0), pair("b.jpg", 1), pair("both.jpg", 2)]
    second = [pair("c.jpg", 0), pair("d.jpg", 1), pair("c.jpg", 0), pair("./both.jpg", 2)]
    files = [write(tmp_path / f"{name}.json", rows) for name, rows in (("one", first), ("two", second))]
    numbers, problems, notes = identities(*files)
    assert numbers == [0, 0, 1, 2, 3, 4, 3, 2] and not problems
    (note,) = notes
    assert note.startswith("2 image_ids stand for different images in different files, such as 0 for 'a.jpg'")
    assert "one.json: entry 0" in note and "c.jpg" in note and "two.json: entry 0" in note


@pytest.mark.parametrize("missing", [None, NAN, "", "  "])
def test_without_an_id_the_path_says_which_image_it_is(tmp_path, missing):
    rows = [pair("a.jpg", missing), pair("b.jpg", missing), pair("a.jpg", missing), pair("b.jpg", 7)]
    numbers, problems, _ = identities(write(tmp_path / "train.json", rows))
    assert numbers == [0, 1, 0, 1]
    (problem,) = problems
    assert "3 of 4 entries have no image_id" in problem and "train.json: entry 0" in problem


def test_an_id_of_several_image_files_joins_them_as_published_and_is_said(tmp_path):
    rows = [pair("a.jpg", 5), pair("b.jpg", 5), pair("c.jpg", 6), pair("c.jpg", 6), pair("b.jpg", 5)]
    file = write(tmp_path / "train.json", rows)
    numbers, problems, _ = identities(file)
    assert numbers == published_identities([file]) == [0, 0, 1, 1, 0]
    (problem,) = problems
    assert problem.startswith("1 image_ids stand for several image files, such as 5 for 'a.jpg'")
    assert "entry 0" in problem and "b.jpg" in problem and "entry 1" in problem


def test_ids_of_captions_do_not_part_an_image(tmp_path):
    rows = [pair("a.jpg", 0), pair("a.jpg", 1), pair("b.jpg", 2), pair("b.jpg", "3"), pair("c.jpg", 4)]
    numbers, problems, _ = identities(write(tmp_path / "train.json", rows))
    assert numbers == [0, 0, 1, 1, 2]
    (problem,) = problems
    assert problem.startswith("2 images have several image_ids, such as 'a.jpg': 0") and "entry 1" in problem


def test_what_is_the_same_id(tmp_path):
    """1.0, as tables write 1; not "1". Any JSON value may be one."""
    ids = [1, 1.0, "1", [1], [2], [1], {"a": 1}, "x", True]
    rows = [pair(f"{number}.jpg", image_id) for number, image_id in enumerate(ids)]
    numbers, problems, _ = identities(write(tmp_path / "train.json", rows))
    assert numbers == [0, 0, 1, 2, 3, 2, 4, 5, 6]
    assert len(problems) == 1 and problems[0].startswith("2 image_ids stand for several image files")


def slow_identities(rows: list[tuple[int, str, object]]) -> list[int]:
    """file, path, id: joined as long as anything joins two."""
    numbers = list(range(len(rows)))
    for _ in rows:
        for i, j in combinations(range(len(rows)), 2):
            (file, path, own), (other_file, other_path, other) = rows[i], rows[j]
            if path == other_path or (own is not None and (file, own) == (other_file, other)):
                numbers[i] = numbers[j] = min(numbers[i], numbers[j])
    return [sorted(set(numbers)).index(number) for number in numbers]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefg"), st.sampled_from([None, 0, 1, 2, 3])), min_size=2, max_size=9
    )
)
@settings(max_examples=60)
def test_identities_are_those_of_joining_pair_by_pair(tmp_path_factory, rows):
    folder, half = tmp_path_factory.getbasetemp(), len(rows) // 2
    files = [
        write(folder / f"{name}.json", [pair(f"{path}.jpg", own) for path, own in part])
        for name, part in (("one", rows[:half]), ("two", rows[half:]))
    ]
    numbers, _, _ = identities(*files)
    assert numbers == slow_identities([(i >= half, path, own) for i, (path, own) in enumerate(rows)])


# ---- paths ----


def test_a_path_leads_to_one_file_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").touch()
    (tmp_path / "alias").symlink_to("real")
    (tmp_path / "real" / "b.jpg").symlink_to("a.jpg")
    (tmp_path / "real" / "loop.jpg").symlink_to("loop.jpg")
    file = os.path.realpath(tmp_path / "real" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    for path in (
        "real/a.jpg",
        "./alias/a.jpg",
        "alias/b.jpg",
        "real/../alias/b.jpg",
        f"{tmp_path}/alias//a.jpg",
    ):
        assert resolved(path) == file, path
    missing = os.path.realpath(tmp_path / "none" / "x.jpg")
    assert resolved("none/x.jpg") == resolved("none/../none/x.jpg") == missing
    for odd in ("", "/", "a\0b.jpg", "\ud83d/a.jpg", "real/loop.jpg", "real/a.jpg/x.jpg", "é/\udcff.jpg"):
        resolved(odd)  # whatever it is, that it cannot be read is said elsewhere


def test_grounding_knows_an_image_by_its_path(demo, tmp_path):
    """Not by its bare name, which pictures in different folders share."""
    for name in ("one/1.jpg", "two/1.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    names = ["one/1.jpg", "two/1.jpg", "one/../one/1.jpg"]
    file = write(tmp_path / "train.json", [{"image": name, "text": "a cup"} for name in names])
    config = read_config(
        "configs/demo/Grounding.yaml", GROUNDING, [f"train_file={file}", "batch_size_train=3"]
    )
    loader = grounding_loader(config, build_tokenizer(str(demo / "bert")), seed=0)
    order = [index for _, index in loader.sampler]
    assert next(iter(loader))["idx"].tolist() == [[0, 1, 0][index] for index in order]


def test_refcoco_s_images_have_the_published_identities(tmp_path):
    """Those of their bare names, which in COCO's folders say the same."""
    numbers = [581857, 581857, 580957, 581857, 580957]
    rows = [{"image": f"train2014/COCO_train2014_{n:012}.jpg", "text": "the lady"} for n in numbers]
    entries = read_annotations(write(tmp_path / "train.json", rows), {}, "")
    assert WithIdentities(entries, by_path(entries)).idx.tolist() == [0, 0, 1, 0, 1]


# ---- what is said, and where ----


def check_of(demo: Path, folder: Path, *overrides: str) -> tuple[int, dict]:
    """Exit code and report.json of the check."""
    flags = ["--config", str(demo_config("Retrieval", demo, folder)), "--output_dir", str(folder / "out")]
    code = check([*flags, "--workers", "1", "--overrides", *overrides])
    return code, json.loads((folder / "out" / "report.json").read_bytes())


def test_training_says_what_is_odd_about_the_ids(demo, tmp_path, caplog):
    rows = json.loads((demo / "retrieval_train.json").read_text())
    rows = [{**row, "image": str(demo / row["image"]), "image_id": None} for row in rows]
    file = write(tmp_path / "train.json", rows)
    config = read_config(
        str(demo_config("Retrieval", demo, tmp_path)), RETRIEVAL, [f"train_file={file}", "batch_size_train=2"]
    )
    tokenizer = build_tokenizer(str(demo / "bert"))
    loader = retrieval_loader(config, tokenizer, seed=0)
    assert any("have no image_id" in record.message for record in caplog.records)
    assert {int(number) for batch in loader for number in batch["idx"]} <= set(range(6))


@pytest.mark.parametrize(
    ("image_ids", "expected"),
    [
        (lambda number, image: None, "entries have no image_id"),
        (lambda number, image: 0, "image_ids stand for several image files"),
        (lambda number, image: number, "images have several image_ids"),
        (lambda number, image: image, None),
    ],
)
def test_the_check_finds_wrong_ids_and_notes_rows_of_one_image(demo, tmp_path, capsys, image_ids, expected):
    rows = json.loads((demo / "retrieval_train.json").read_text())
    rows = [
        {**row, "image": str(demo / row["image"]), "image_id": image_ids(number, row["image"])}
        for number, row in enumerate(rows)
    ]
    train = write(tmp_path / "train.json", rows)
    grouped = json.loads((demo / "retrieval_test.json").read_text())
    flat = [
        {"image": str(demo / row["image"]), "caption": text} for row in grouped for text in row["caption"]
    ]
    test = write(tmp_path / "test.json", flat)
    code, report = check_of(demo, tmp_path, f"train_file={train}", f"test_file={test}")
    printed = capsys.readouterr().out
    assert code == (expected is not None) == len(report["files"])
    if expected:
        assert expected in report["files"][0] and f"problem: {report['files'][0]}" in printed
    (note,) = report["notes"]
    assert f"{len(flat)} rows show 3 images" in note and f"note: {note}" in printed


def test_the_check_notes_one_image_under_two_names(demo, tmp_path):
    grouped = json.loads((demo / "retrieval_test.json").read_text())
    rows = [{**row, "image": str(demo / row["image"])} for row in grouped]
    (tmp_path / "again.png").write_bytes(Path(rows[0]["image"]).read_bytes())
    test = write(tmp_path / "test.json", [*rows, {"image": "again.png", "caption": "a duck"}])
    code, report = check_of(demo, tmp_path, f"test_file={test}")
    assert code == 0
    assert [(row["entry"], row["cause"], row["split"]) for row in report["found"]] == [
        (3, "same content as another file", "test")
    ]
