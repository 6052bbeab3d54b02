"""The check of annotation files and images: every defect is found by number and cause, copies are clean, and
a check that was stopped goes on."""

import io
import json
import resource
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny import demo_config

from simla.configs.reader import read_config, task_of
from simla.configs.schema import TABLES
from simla.dataset.check import images, texts
from simla.dataset.check.__main__ import main
from simla.dataset.check.images import CACHE, RECORD, check_image, ends_whole, look_hash
from simla.dataset.check.similar import MAX_DISTANCE, near_pairs
from simla.dataset.check.tasks import SPLITS, open_sources
from simla.dataset.check.texts import Shared, WordPieces, path_key, read_texts
from simla.dataset.readers.annotations import TEXT, checked_late, read_annotations
from simla.dataset.retrieval import read_train_pairs
from simla.dataset.text import build_tokenizer, clean_caption
from simla.dataset.workers import Workers
from simla.demo.data import make_demo
from simla.utils import UserError

DEMO_CONFIGS = sorted(set(Path("configs/demo").glob("*.yaml")) - {Path("configs/demo/common.yaml")})


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo(folder, num_train=24, num_val=6, num_test=7, size=48, seed=3)
    return folder


@pytest.fixture
def copy_of_demo(demo, tmp_path):
    return shutil.copytree(demo, tmp_path / "data")


@pytest.fixture(scope="module")
def tokenizer(demo):
    return build_tokenizer(str(demo / "bert"))


def check(config, out, *arguments):
    """(exit code, report.json)"""
    code = main(["--config", str(config), "--output_dir", str(out), "--workers", "1", *map(str, arguments)])
    return code, json.loads((out / "report.json").read_text())


def causes(report, split="train"):
    return {(row["entry"], row["cause"]) for row in report["found"] if row["split"] == split}


def picture(number, side=96):
    """Soft blobs, different for each number."""
    coarse = np.random.RandomState(number).randint(0, 255, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC))


def write_list(path, entries):
    path.write_text(json.dumps(entries))


def spoil(path, at, byte=0xAA):
    content = bytearray(path.read_bytes())
    content[at] ^= byte
    path.write_bytes(content)


# ---- the shipped configs ----


@pytest.mark.parametrize("path", DEMO_CONFIGS, ids=lambda path: path.stem)
def test_the_demo_s_data_is_clean(path, demo, tmp_path, capsys):
    config = demo_config(path.stem, demo, tmp_path)
    code, report = check(config, tmp_path / "out", "--full")
    assert code == 0 and not report["has_problems"] and report["files"] == []
    assert set(report["splits"]) == set(SPLITS[report["task"]])
    values = read_config(str(config), TABLES[report["task"]])
    for split, found in report["splits"].items():
        entries = json.loads(Path(values[f"{split}_file"]).read_bytes())
        assert found["entries"] == len(entries) and sum(found["lengths"]) >= len(entries)
        names = {name for entry in entries for name in entry.get("images", [entry.get("image")])}
        assert found["images"] == len(names)
    assert report["reading"]["entries_per_second_of_a_process"] > 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64") >= 12 and "Samples: train" in page
    assert f"task {report['task']}" in capsys.readouterr().out


def test_every_shipped_config_is_named_after_its_task():
    for path in Path("configs").rglob("*.yaml"):
        if path.name == "common.yaml":
            continue
        read_config(str(path), TABLES[task_of(str(path))])
    assert task_of("output/VQA/config.yaml") is None


# ---- one of each defect ----

LONG = "a cat and a dog " * 8


def make_defects(folder):
    """A retrieval data set; returns its train entries' expected causes, those that need --full apart."""
    (folder / "images").mkdir(parents=True)
    at = (folder / "images").__truediv__
    for name, number in (
        ("good.jpg", 0),
        ("test.jpg", 1),
        ("test2.jpg", 2),
        ("half.jpg", 3),
        ("other.jpg", 4),
    ):
        picture(number).save(at(name), quality=92)
    at("half.jpg").write_bytes(at("half.jpg").read_bytes()[:-200])
    shutil.copy(at("good.jpg"), at("same.jpg"))
    shutil.copy(at("test2.jpg"), at("test2_copy.jpg"))
    picture(0, 192).save(at("again.jpg"), quality=70)
    picture(1, 128).save(at("test_again.png"))
    for name, number in (("half.png", 5), ("damaged.png", 6)):
        picture(number).save(at(name))
    at("half.png").write_bytes(at("half.png").read_bytes()[:-300])
    spoil(at("damaged.png"), at("damaged.png").read_bytes().index(b"IDAT") + 4)  # decompression stops there
    picture(7, 8).save(at("tiny.jpg"))
    at("empty.jpg").touch()
    at("words.jpg").write_text("404 not found")
    at("folder.jpg").mkdir()
    at("program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n")
    Image.new("RGB", (64, 64), "navy").save(at("navy.jpg"))

    def entry(image, caption="a cat"):
        return {"image": f"images/{image}", "caption": caption, "image_id": image}

    train = [
        (entry("good.jpg"), ""),
        (entry("nowhere.jpg"), "no such image"),
        (entry("empty.jpg"), "empty image file"),
        (entry("words.jpg"), "not an image"),
        (entry("program.eps"), "not an image"),
        (entry("half.jpg"), "truncated image"),
        (entry("half.png"), "truncated image"),
        (entry("tiny.jpg"), "tiny image"),
        (entry("folder.jpg"), "image cannot be read"),
        ({"image": "images/good.jpg", "image_id": 1}, "wrong entry"),
        (entry("good.jpg", 7), "wrong entry"),
        ("images/good.jpg", "wrong entry"),
        (entry("good.jpg", " ?! "), "empty text"),
        (entry("good.jpg", LONG), "text is cut"),
        (entry("same.jpg"), "same content as another file"),
        (entry("test.jpg"), "image of an evaluation split"),
        (entry("test2_copy.jpg"), "image of an evaluation split"),
        (entry("other.jpg"), ""),
    ]
    only_full = [
        (entry("damaged.png"), "damaged image"),
        (entry("again.jpg"), "looks like another image"),
        (entry("test_again.png"), "looks like an evaluation image"),
        (entry("navy.jpg"), "image of one colour"),
    ]
    write_list(folder / "train.json", [row for row, _ in train + only_full])
    test = [
        {"image": f"images/{name}", "caption": ["a dog", "a red cat"]} for name in ("test.jpg", "test2.jpg")
    ]
    write_list(folder / "test.json", test)
    expected = {(number, cause) for number, (_, cause) in enumerate(train) if cause}
    expected_full = {(number, cause) for number, (_, cause) in enumerate(only_full, len(train))}
    return expected, expected_full


@pytest.fixture
def defects(tmp_path, demo):
    """(config, folder, expected causes, those of --full)"""
    folder = tmp_path / "defects"
    expected, expected_full = make_defects(folder)
    config = demo_config("Retrieval", demo, tmp_path)
    values = json.loads(config.read_text())
    values |= {f"{split}_file": str(folder / f"{split}.json") for split in ("train", "test")}
    config.write_text(json.dumps({**values, "val_file": ""}))
    return config, folder, expected, expected_full


def test_every_defect_is_found_with_number_and_cause(defects, tmp_path, capsys):
    config, folder, expected, expected_full = defects
    code, report = check(config, tmp_path / "out")
    assert code == 1 and causes(report) == expected
    assert causes(report, "test") == {(1, "same content as another file")}  # as that of a training entry
    by_number = {row["entry"]: row for row in report["found"] if row["split"] == "train"}
    assert by_number[1]["detail"] == "no such file"
    assert "no 'caption'" in by_number[9]["detail"] and "must be text" in by_number[10]["detail"]
    assert "40 words of 30" in by_number[13]["detail"]
    assert by_number[15]["twin"] == by_number[15]["image"] == str(folder / "images" / "test.jpg")
    assert by_number[16]["twin"] == str(folder / "images" / "test2.jpg")
    assert f"{folder / 'train.json'}: entry 9: wrong entry" in capsys.readouterr().out

    code, report = check(config, tmp_path / "out", "--full")
    again, test_again = sorted(number for number, _ in expected_full)[1:3]
    assert code == 1
    # the evaluation image that it looks like is named by a training entry, too
    assert causes(report) == expected | expected_full | {(test_again, "looks like another image")}
    rows = [row for row in report["found"] if row["split"] == "train" and row["twin"]]
    twins = {(row["entry"], row["cause"]): Path(row["twin"]).name for row in rows}
    assert twins[again, "looks like another image"] == "good.jpg"
    assert twins[test_again, "looks like an evaluation image"] == "test.jpg"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "looks like an evaluation image: 1" in page and "truncated" in page
    counts = report["splits"]["train"]["counts"]
    assert counts["wrong entry"] == 3 and counts["truncated image"] == 2


def test_text_and_names_with_half_a_surrogate_pair(defects, tmp_path, capsys):
    config, folder, *_ = defects
    write_list(
        folder / "train.json",
        [
            {"image": "images/good.jpg", "caption": "cut \ud83d", "image_id": 1},
            {"image": "images/\ud83d.jpg", "caption": "a cat", "image_id": 2},
        ],
    )
    code, report = check(config, tmp_path / "out")
    assert code == 1 and causes(report) == {(1, "image cannot be read")}
    assert sum(report["splits"]["train"]["lengths"]) == 2
    assert "images/?.jpg" in capsys.readouterr().out


def test_copies_are_clean_and_the_originals_as_they_were(defects, tmp_path, capsys):
    config, folder, *_ = defects
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    code, report = check(config, tmp_path / "out", "--full", "--fix", tmp_path / "fixed")
    assert code == 1 and before == {path: path.read_bytes() for path in folder.glob("*.json")}
    (row,) = report["fix"]["files"]
    assert row["left_out"]["wrong entry"] == 3 and row["left_out"]["image of an evaluation split"] == 2
    assert report["fix"]["config"] == {"train_file": [row["copy"]], "test_file": [str(folder / "test.json")]}
    assert f'train_file: ["{row["copy"]}"]' in capsys.readouterr().out
    kept = read_train_pairs(row["copy"], "")
    assert len(kept) == row["kept"] == 7
    originals = json.loads(before[folder / "train.json"])
    assert [entry["caption"] for entry in kept][:2] == ["a cat", LONG]
    assert kept[0]["images"] == [str(folder / originals[0]["image"])] and kept[0]["image_id"] == "good.jpg"

    code, report = check(config, tmp_path / "again", "--full", "--overrides", f"train_file={row['copy']}")
    assert code == 0
    code, _ = check(
        config, tmp_path / "again", "--fix", tmp_path / "none", "--overrides", f"train_file={row['copy']}"
    )
    assert code == 0 and not list((tmp_path / "none").iterdir())


def test_copies_keep_the_weights_of_a_mixture(copy_of_demo, tmp_path, capsys):
    entries = json.loads((copy_of_demo / "pretrain_train.json").read_text(encoding="utf-8"))
    for name, captions in (("a", ["", "x"]), ("b", ["y"]), ("c", [" "]), ("d", ["z", ""]), ("e", ["w"])):
        rows = [{**entry, "caption": text} for entry, text in zip(entries, captions, strict=False)]
        write_list(copy_of_demo / f"{name}.json", rows)
    at = {name: str(copy_of_demo / f"{name}.json") for name in "abcde"}
    fixed = {name: str(tmp_path / "fixed" / f"{name}.json") for name in "ad"}
    mixture = [
        {"path": at["a"], "weight": 2},
        {"path": [at["b"], at["d"]], "weight": 0.5},
        {"path": [at["c"]], "weight": 3},  # of which nothing is left
        {"path": [at["c"], at["e"]], "weight": 4},
    ]
    config = demo_config("Pretrain", copy_of_demo, tmp_path)
    overrides = ["--overrides", f"train_file={json.dumps(mixture)}", "samples_per_epoch=9"]
    code, report = check(config, tmp_path / "out", "--fix", tmp_path / "fixed", *overrides)
    expected = [
        {"path": fixed["a"], "weight": 2},
        {"path": [at["b"], fixed["d"]], "weight": 0.5},
        {"path": at["e"], "weight": 4},
    ]
    assert code == 1 and report["fix"]["config"] == {"train_file": expected}
    printed = capsys.readouterr().out
    assert f"in the config:  train_file: {json.dumps(expected)}" in printed
    assert f"nothing is left of {at['c']}" in printed
    overrides[1] = f"train_file={json.dumps(expected)}"
    assert check(config, tmp_path / "out", *overrides)[0] == 0


def test_json_lines_are_looked_through_and_copied_as_a_list(copy_of_demo, tmp_path):
    entries = json.loads((copy_of_demo / "pretrain_train.json").read_text(encoding="utf-8"))
    entries[1]["caption"] = ""
    path, config = copy_of_demo / "train.jsonl", demo_config("Pretrain", copy_of_demo, tmp_path)
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    code, report = check(
        config, tmp_path / "out", "--fix", tmp_path / "fixed", "--overrides", f"train_file={path}"
    )
    assert code == 1 and causes(report) == {(1, "empty text")}
    assert report["fix"]["config"] == {"train_file": [str(tmp_path / "fixed" / "train.json")]}
    copy = json.loads((tmp_path / "fixed" / "train.json").read_text(encoding="utf-8"))
    assert [entry["caption"] for entry in copy] == [entry["caption"] for entry in entries if entry["caption"]]


# ---- shards ----


def content_of(image, kind="JPEG"):
    file = io.BytesIO()
    image.save(file, kind, quality=92)
    return file.getvalue()


def make_shards(folder):
    """Two shards; returns the expected causes of their entries."""
    whole, other = content_of(picture(0)), content_of(picture(1))
    parts = [
        ("a.jpg", whole, "a.txt", b"a cat", ""),
        ("b.v2.jpg", other, "b.v2.json", b'{"caption": ["one", "two"]}', ""),
        ("c.jpg", whole, "c.txt", b"a cat", "same content as another file"),
        ("d.jpg", content_of(picture(2))[:-300], "d.txt", b"a cat", "truncated image"),
        ("e.jpg", b"no image", "e.txt", b"a cat", "not an image"),
        ("f.jpg", content_of(picture(3, 8)), "f.txt", b"a cat", "tiny image"),
        ("g.jpg", content_of(picture(4)), "g.json", b'{"text": "a cat"}', "wrong entry"),
        ("h.jpg", content_of(picture(5)), "h.txt", LONG.encode(), "text is cut"),
        ("i.jpg", content_of(picture(6)), "i.txt", b" ?! ", "empty text"),
        ("s.jpg", content_of(picture(7)), "s.txt", b"seven", ""),
        ("s.jpg", content_of(picture(8)), "s.txt", b"eight", ""),
        ("t.txt", b"no image", "t.cls", b"7", "wrong entry"),
    ]
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name, content, text_name, text, _ in parts[number * 6 : number * 6 + 6]:
                for member, data in ((name, content), (text_name, text)):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return {(number, cause) for number, (*_, cause) in enumerate(parts) if cause}


@pytest.mark.parametrize("how", ["{}", "pipe:cat {}"])
def test_shards_are_looked_through(how, demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected, names = make_shards(tmp_path), how.format(f"{tmp_path}/{{0..1}}.tar")
    mixture = [{"path": names, "weight": 3}, {"path": str(demo / "pretrain_train.json"), "weight": 1}]
    flags = ["--fix", tmp_path / "fixed", "--overrides", f"train_file={json.dumps(mixture)}"]
    for flag in ([], ["--full"]):
        code, report = check(demo_config("Pretrain", demo, tmp_path), tmp_path / "out", *flag, *flags)
        rows = [row for row in report["found"] if row["file"] == names]
        assert code == 1 and {(row["entry"], row["cause"]) for row in rows} == expected
        details = {row["entry"]: row["detail"] for row in rows}
        assert details[6].endswith("1.tar: g.json: no caption: no field 'caption', found text")
        assert details[11].endswith("1.tar: t.txt: a caption without an image")
        assert details[2].endswith("0.tar: a.jpg") and "truncated" in details[3]
        assert report["fix"]["config"]["train_file"] == mixture and report["fix"]["shards"] == [names]
        printed = capsys.readouterr().out
        assert f"{names}: shards are not written anew" in printed
        if how == "{}":
            assert (
                f"note: passed over 1 members that are neither an image nor a caption; the first: {tmp_path}"
                in printed
            )
            assert len(report["notes"]) == 1 and report["reading"]["entries_per_second_of_a_process"] > 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "0.tar: d.jpg" in page and page.count("data:image/jpeg;base64") >= 12


def test_a_damaged_shard_is_a_problem(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_shards(tmp_path)
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:9000])
    config, names = demo_config("Pretrain", demo, tmp_path), f"{tmp_path}/{{0..1}}.tar"
    code, report = check(config, tmp_path / "out", "--overrides", f"train_file={names}")
    assert code == 1 and [line for line in report["files"] if "1.tar is damaged or cut short" in line]
    code, report = check(config, tmp_path / "out", "--overrides", f"train_file={tmp_path}/9.tar")
    assert code == 1 and "9.tar cannot be read" in report["files"][0]


def test_tasks_that_read_no_shards_say_what_a_tar_file_is(demo, tmp_path):
    make_shards(tmp_path)
    config = demo_config("Retrieval", demo, tmp_path)
    code, report = check(config, tmp_path / "out", "--overrides", f"train_file={tmp_path}/0.tar")
    assert (
        code == 1
        and "is a tar file; shards are named .tar and belong into train_file of Pretrain"
        in report["files"][0]
    )


@pytest.mark.parametrize(
    ("name", "field", "wrong"),
    [
        ("VE", "label", "maybe"),
        ("NLVR", "label", "perhaps"),
        ("VQA", "dataset", "gqa"),
        ("Grounding", "text", 1),
    ],
)
def test_wrong_values_of_the_other_tasks(name, field, wrong, copy_of_demo, tmp_path):
    file = copy_of_demo / f"{name.lower()}_train.json"
    entries = json.loads(file.read_text())
    entries[3][field] = wrong
    missing = entries[5]["images"][1] if name == "NLVR" else entries[5]["image"]
    (copy_of_demo / "images" / "train" / Path(missing).name).with_suffix(".jpg").unlink()
    write_list(file, entries)
    config = demo_config(name, copy_of_demo, tmp_path)
    code, report = check(config, tmp_path / "out", "--fix", tmp_path / "fixed")
    assert code == 1 and {(3, "wrong entry"), (5, "no such image")} <= causes(report)
    copy = report["fix"]["config"]["train_file"]
    code, report = check(config, tmp_path / "out", "--overrides", f"train_file={json.dumps(copy)}")
    assert code == 0 and report["splits"]["train"]["entries"] < len(entries)


def test_files_that_cannot_be_used_or_do_not_fit_together(copy_of_demo, tmp_path):
    questions = json.loads((copy_of_demo / "vqa_test.json").read_text())
    write_list(copy_of_demo / "vqa_test.json", [*questions, questions[0]])
    write_list(copy_of_demo / "vqa_answer_list.json", ["yes", 3])
    (copy_of_demo / "vqa_val.json").write_text('[{"dataset": "vqa", "im')
    code, report = check(demo_config("VQA", copy_of_demo, tmp_path), tmp_path / "out")
    messages = "\n".join(report["files"])
    assert code == 1 and len(report["files"]) == 3
    assert (
        "vqa_val.json is not valid JSON" in messages and "found 3" in messages and "question_id" in messages
    )
    assert report["splits"]["test"]["entries"] == len(questions) + 1

    references = json.loads((copy_of_demo / "grounding_test.json").read_text())
    references[2]["ref_id"] = 10**6
    write_list(copy_of_demo / "grounding_test.json", references)
    code, report = check(demo_config("Grounding", copy_of_demo, tmp_path), tmp_path / "out")
    assert code == 1 and "ref_id 1000000" in report["files"][0]


# ---- going on ----


@pytest.fixture
def looked_at(monkeypatch):
    """The names of the files whose content is looked at; 4 in a job."""
    names = []

    def look(path, *rest):
        names.append(Path(path).name)
        return look_at(path, *rest)

    look_at = images._look_at
    monkeypatch.setattr(images, "_look_at", look)
    monkeypatch.setattr(images, "IMAGES_PER_JOB", 4)
    return names


def test_a_second_check_looks_at_what_has_changed(copy_of_demo, tmp_path, looked_at):
    config = demo_config("Pretrain", copy_of_demo, tmp_path)
    first = check(config, tmp_path / "out")
    assert len(set(looked_at)) == len(looked_at) == 24
    looked_at.clear()
    assert check(config, tmp_path / "out")[1]["splits"] == first[1]["splits"] and not looked_at

    changed = sorted((copy_of_demo / "images" / "train").glob("*.jpg"))[:2]
    picture(1, 8).save(changed[0])
    changed[1].unlink()
    code, report = check(config, tmp_path / "out")
    assert code == 1 and looked_at == [changed[0].name]
    counts = report["splits"]["train"]["counts"]
    assert counts["tiny image"] == counts["no such image"] == 1
    looked_at.clear()
    check(config, tmp_path / "out", "--full")
    assert len(looked_at) == 23
    looked_at.clear()
    check(config, tmp_path / "out")  # what was decoded has been looked at, too
    assert not looked_at


def test_a_second_check_looks_again_at_what_could_not_be_decoded(copy_of_demo, tmp_path, looked_at):
    """Another version of a library may be able to."""
    config = demo_config("Pretrain", copy_of_demo, tmp_path)
    damaged = min((copy_of_demo / "images" / "train").glob("*.jpg"))
    damaged.write_bytes(damaged.read_bytes()[:200])
    for _ in range(2):
        code, _ = check(config, tmp_path / "out")
        assert code == 1 and looked_at.count(damaged.name) == 1
        looked_at.clear()


def test_a_check_that_was_stopped_goes_on(demo, tmp_path, looked_at, monkeypatch):
    config, out = demo_config("Pretrain", demo, tmp_path), tmp_path / "out"
    look = images._look_at

    def stop(path, *rest):
        if len(looked_at) == 10:
            raise KeyboardInterrupt
        return look(path, *rest)

    monkeypatch.setattr(images, "_look_at", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["--config", str(config), "--output_dir", str(out), "--workers", "1"])
    assert (out / CACHE).stat().st_size == 8 * RECORD.itemsize  # two jobs of four
    with (out / CACHE).open("ab") as file:
        file.write(b"cut off")
    monkeypatch.setattr(images, "_look_at", look)
    looked_at.clear()
    code, report = check(config, out)
    assert code == 0 and len(looked_at) == 16 and report["splits"]["train"]["images"] == 24
    assert (out / CACHE).stat().st_size == 24 * RECORD.itemsize


def test_several_processes_find_the_same(defects, tmp_path, monkeypatch):
    config, *_ = defects
    _, alone = check(config, tmp_path / "out", "--full")
    monkeypatch.setattr(images, "IMAGES_PER_JOB", 4)
    monkeypatch.setattr(texts, "ENTRIES_PER_JOB", 8)
    _, together = check(config, tmp_path / "out2", "--full", "--workers", 2)
    for report in (alone, together):
        del report["reading"]
    assert together == alone


# ---- exit codes ----


def test_what_cannot_be_checked_ends_with_2(demo, defects, tmp_path, capsys):
    config, folder, *_ = defects
    out = ["--output_dir", str(tmp_path / "out"), "--workers", "1"]

    def fails(*arguments):
        assert main([*map(str, arguments), *out]) == 2
        return capsys.readouterr().err

    assert "cannot be read" in fails("--config", tmp_path / "VQA.yaml")
    assert "--task" in fails("--config", shutil.copy(config, tmp_path / "mine.yaml"))
    assert "unknown key" in fails("--config", config, "--overrides", "trian_file=a.json")
    assert "vocabulary" in fails("--config", config, "--text_encoder", tmp_path)
    assert "is a file of the config" in fails("--config", config, "--fix", folder)
    assert "--fix" in fails("--config", config, "--fix", folder / "train.json" / "a")
    with pytest.raises(SystemExit) as stop:
        main(["--full"])
    assert stop.value.code == 2
    assert main(["--config", str(tmp_path / "mine.yaml"), "--task", "Retrieval", *out]) == 1


# ---- parts ----


def test_wrong_entries_pass_only_where_they_are_asked_for(tmp_path):
    write_list(tmp_path / "a.json", [{"image": "a.jpg"}, {"image": 3}])
    with checked_late():
        late = read_annotations(str(tmp_path / "a.json"), {"image": TEXT})
    assert late[0]["images"] == [str(tmp_path / "a.jpg")]
    with pytest.raises(UserError, match=r"a.json: entry 1: 'image' must be text"):
        late[1]
    with pytest.raises(UserError, match="entry 1"):
        read_annotations(str(tmp_path / "a.json"), {"image": TEXT})


def test_captions_are_cut_where_retrieval_s_evaluation_cuts_them(demo, tmp_path):
    config = {"train_file": [], "val_file": [], "test_file": str(demo / "x.json"), "max_tokens": 25}
    (source,) = open_sources(SPLITS["Retrieval"], config, 512)
    assert source.max_tokens == 30


def test_tokens_are_counted_as_the_tokenizer_does(tokenizer):
    raw = [
        "A big red dog, left of it: two cats!",
        "naïve café 東京 x-ray",
        "[MASK] tree[SEP]house",
        "",
        "1,000 £5 a_b",
    ]
    count = WordPieces(tokenizer.backend_tokenizer)
    for text in [*raw, *map(clean_caption, raw)]:
        assert count(text) == len(tokenizer(text)["input_ids"]), text


def test_near_pairs_are_those_of_all_pairs():
    rng = np.random.RandomState(0)
    hashes = rng.randint(0, 1 << 62, 300).astype(np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, n % 6, replace=False)) for n in range(300)]
    hashes = np.unique(np.concatenate([hashes, hashes ^ np.array(flips, np.uint64)]))
    distance = [[(int(a) ^ int(b)).bit_count() for b in hashes] for a in hashes]
    expected = np.argwhere(np.triu(np.array(distance) <= MAX_DISTANCE, 1))
    assert len(expected) > 100
    np.testing.assert_array_equal(near_pairs(hashes), expected)
    assert near_pairs(hashes[:1]).shape == near_pairs(hashes[:0]).shape == (0, 2)


def test_look_hashes_survive_scaling_and_compression_and_tell_pictures_apart(tmp_path):
    def look(image, name, **how):
        image.save(tmp_path / name, **how)
        return int(check_image(str(tmp_path / name), full=True)["look"])

    hashes = []
    for number in range(12):
        hashes.append(look(picture(number, 256), "a.png"))
        again = look(picture(number, 256).resize((200, 180)), "b.jpg", quality=60)
        assert (hashes[-1] ^ again).bit_count() <= MAX_DISTANCE
    distances = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 3 * MAX_DISTANCE
    assert look_hash(np.full((32, 32, 3), 77, np.uint8)) == 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_the_end_of_a_file_tells_whether_it_is_whole(format, tmp_path):
    path = tmp_path / f"a.{format.lower()}"
    picture(0).save(path)
    whole = path.read_bytes()
    assert ends_whole(whole, format) and not ends_whole(whole[:-20], format)
    path.write_bytes(whole + b"\0\0appended")
    assert check_image(str(path), full=False)["flags"] == 0
    path.write_bytes(whole[: len(whole) // 2])
    assert check_image(str(path), full=False)["flags"] != 0


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def test_200_000_entries_take_a_few_bytes_each(tmp_path, tokenizer):
    num = 200_000
    with (tmp_path / "train.json").open("w") as file:
        rows = (
            f'{{"image": "some/folder/{n // 5}.jpg", "caption": "a dog {n % 100}"}}' for n in range(num - 2)
        )
        file.write("[" + ",\n".join(rows) + ', {"image": "a.jpg"}, {"image": "a.jpg", "caption": "!"}]')
    config = {"train_file": str(tmp_path / "train.json"), "max_tokens": 25}
    sources = open_sources(SPLITS["Pretrain"], config, 80)
    before = resident()
    with Workers(Shared(sources, tokenizer.backend_tokenizer), 1) as workers:
        (found,) = read_texts(workers, sources)
    assert resident() - before < 64 * num  # one string for each would take more
    assert found.flags.nbytes + found.images.nbytes <= 15 * num
    assert len(found.flags) == num and np.flatnonzero(found.flags).tolist() == [num - 2, num - 1]
    assert len(np.unique(found.images["key"])) == num // 5 + 1 and found.lengths.sum() == num - 1
    assert found.images["key"][-1] == path_key(str(tmp_path / "a.jpg"))
