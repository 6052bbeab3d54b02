"""Official downloads, built small and as they are laid out on the disk, become annotation files.

The layouts: COCO's caption files as pycocotools reads them (excerpts of real ones: tests/excerpts), those of
Karpathy, dataset_*.json, as imagernn/data_provider.py of github.com/karpathy/neuraltalk does.
"""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from simla.dataset.prepare import CONVERTERS, common
from simla.dataset.prepare.__main__ import main
from simla.dataset.pretrain import read_pairs
from simla.dataset.readers.annotations import ANY, TEXT, read_annotations
from simla.utils import UserError

RETRIEVAL = {
    "train": {"image": TEXT, "caption": TEXT, "image_id": ANY},
    "val": {"image": TEXT, "caption": (list,)},
    "test": {"image": TEXT, "caption": (list,)},
}


def put(path: Path, content: object = "an image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def prepare(name: str, root: Path, *flags: str, out: Path | None = None) -> None:
    main([name, "--root", str(root), "--out", str(out or root), *flags])


def numbers(printed: str) -> dict[str, int]:
    """What the report counts, leaves out and writes: text after a number, or before one -> the number."""
    before = re.findall(r"^  (\S.*?) +([\d,]+) +(?:[\d,]+|-)(?:  differs .*)?$", printed, re.MULTILINE)
    after = re.findall(r"^ +([\d,]+)  (.*?)(?:; first: .*)?$", printed, re.MULTILINE)
    found = dict(before) | {what: number for number, what in after}
    return {what: int(number.replace(",", "")) for what, number in found.items()}


def load(path: Path) -> list:
    return json.loads(path.read_text(encoding="utf-8"))


# ---- Karpathy's splits ----


def karpathy_image(number: int, split: str, captions: list[str], **more: object) -> dict:
    sentences = [
        {"tokens": c.split(), "raw": c, "imgid": number, "sentid": number * 5 + place}
        for place, c in enumerate(captions)
    ]
    return {"sentids": [], "imgid": number, "sentences": sentences, "split": split, **more}


def coco_image(number: int, split: str, folder: str, captions: list[str]) -> dict:
    name = f"COCO_{folder}_{number:012}.jpg"
    return karpathy_image(number, split, captions, filepath=folder, filename=name, cocoid=number)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    images = [
        coco_image(1, "train", "train2014", ["A dog.", " A dog runs.\n"]),
        coco_image(2, "restval", "val2014", ["A cat.", "  "]),
        coco_image(3, "val", "val2014", ["A cow.", "One cow."]),
        coco_image(4, "test", "val2014", ["A hen.", "One hen.", "A bird."]),
        coco_image(5, "train", "train2014", ["A fox."]),
        coco_image(6, "train", "train2014", ["An owl."]),
    ]
    put(tmp_path / "coco/dataset_coco.json", {"dataset": "coco", "images": images})
    for image in images[:4]:
        put(tmp_path / "coco/images" / image["filepath"] / image["filename"])
    put(tmp_path / "coco/images/train2014/COCO_train2014_000000000006.jpg", "")
    return tmp_path


def test_coco_by_karpathy_s_split(coco, capsys):
    prepare("coco", coco)
    assert load(coco / "coco_train.json") == [
        {"image": "train2014/COCO_train2014_000000000001.jpg", "caption": "A dog.", "image_id": 1},
        {"image": "train2014/COCO_train2014_000000000001.jpg", "caption": "A dog runs.", "image_id": 1},
        {"image": "val2014/COCO_val2014_000000000002.jpg", "caption": "A cat.", "image_id": 2},
    ]
    assert load(coco / "coco_val.json") == [
        {"image": "val2014/COCO_val2014_000000000003.jpg", "caption": ["A cow.", "One cow."]}
    ]
    ids = {"image_id": 4, "caption_ids": [20, 21, 22]}  # COCO's, for scores that go by them
    name = "val2014/COCO_val2014_000000000004.jpg"
    assert load(coco / "coco_test.json") == [
        {"image": name, "caption": ["A hen.", "One hen.", "A bird."], **ids}
    ]
    first = load(coco / "coco.json")[0]
    assert first == {
        "image": str(coco / "coco/images/train2014/COCO_train2014_000000000001.jpg"),
        "caption": "A dog.",
    }
    printed = capsys.readouterr().out
    found = numbers(printed)
    assert found["train images"] == 2 and found["train captions"] == 3 and found["test captions"] == 3
    assert found["pairs without a caption"] == 1
    assert found[f"images that are not in {coco}/coco/images"] == 1
    assert found["images that are an empty file"] == 1
    assert "first: train2014/COCO_train2014_000000000005.jpg" in printed
    assert re.search(r"train images +2 +113,287  differs by -113,285", printed)
    assert "Karpathy, Fei-Fei, CVPR 2015" in printed
    assert f"configs/Retrieval_coco.yaml: image_root: {coco}/coco/images" in printed


def test_karpathy_s_test_images_need_no_training_images(coco, tmp_path):
    prepare("coco", coco, out=tmp_path / "all")
    shutil.rmtree(coco / "coco/images/train2014")
    prepare("coco", coco, "--only", "val", "test", out=tmp_path / "some")
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["coco_test.json", "coco_val.json"]
    for path in (tmp_path / "some").iterdir():
        assert path.read_bytes() == (tmp_path / "all" / path.name).read_bytes()


def test_files_that_are_replaced_by_others_are_named(coco, capsys):
    for _ in range(2):
        prepare("coco", coco)
    assert "replaced, with" not in capsys.readouterr().out
    put(coco / "coco_test.json", "[]")
    prepare("coco", coco)
    assert "replaced, with other entries than before: coco_test.json; a model" in capsys.readouterr().out


def test_the_numbers_of_captions_stay_with_them(tmp_path):
    """A blank caption takes its number with it; a file without numbers has none written."""
    images = [coco_image(n, "test", "val2014", ["A dog.", " ", "A cat."]) for n in (1, 2)]
    for image in images:
        put(tmp_path / "coco/images/val2014" / image["filename"])
    del images[1]["sentences"][0]["sentid"]
    put(tmp_path / "coco/dataset_coco.json", {"images": images})
    prepare("coco", tmp_path, "--only", "test")
    first, second = load(tmp_path / "coco_test.json")
    assert (first["caption"], first["caption_ids"]) == (["A dog.", "A cat."], [5, 7])
    assert set(second) == {"image", "caption"}


@pytest.mark.parametrize("split", ["karpathy", "2014"])
def test_captions_of_coco_s_formats_that_are_no_text_are_counted(tmp_path, capsys, split):
    """As in files that people write of their own photos."""
    captions = ["A dog.", None, 3, ["One dog.", "..."], {"en": "x"}]
    for year in ("train2014", "val2014"):
        put(tmp_path / f"coco/images/{year}/1.jpg")
    if split == "karpathy":
        for part in ("train", "val", "test"):
            row = karpathy_image(1, part, [], filepath="train2014", filename="1.jpg", cocoid=1)
            row["sentences"] = [{"raw": caption} for caption in captions]
            found = load(tmp_path / "coco/dataset_coco.json")["images"] if part != "train" else []
            put(tmp_path / "coco/dataset_coco.json", {"images": [*found, row]})
    else:
        annotations = [{"image_id": 1, "caption": caption} for caption in captions]
        content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": annotations}
        for part in ("train", "val"):
            put(tmp_path / f"coco/annotations/captions_{part}2014.json", content)
    prepare("coco", tmp_path, "--split", split)
    stem = "coco" if split == "karpathy" else "coco2014"
    assert [entry["caption"] for entry in load(tmp_path / f"{stem}.json")] == ["A dog.", "One dog."]
    assert [entry["caption"] for entry in load(tmp_path / f"{stem}_val.json")] == [["A dog.", "One dog."]]
    counted = numbers(capsys.readouterr().out)
    num_splits = 3 if split == "karpathy" else 2
    assert counted["pairs without a caption"] == num_splits * 2
    assert counted["captions that are no text but numbers"] == num_splits
    assert counted["captions that are no text but objects"] == num_splits


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("<!DOCTYPE html>", "a web page"),
        ("version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("", "empty, as after a copy"),
        ('{"images": [', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_download_that_is_something_else_is_called_that(coco, content, what):
    put(coco / "coco/dataset_coco.json", content)
    with pytest.raises(UserError, match=f"dataset_coco.json (is )?{what}"):
        prepare("coco", coco)


def test_coco_files_are_what_the_tasks_read(coco):
    prepare("coco", coco)
    for split, fields in RETRIEVAL.items():
        for entry in read_annotations(str(coco / f"coco_{split}.json"), fields, str(coco / "coco/images")):
            assert Path(entry["images"][0]).is_file()
    pairs = read_pairs([str(coco / "coco.json")])
    assert [pair["text"] for pair in pairs] == ["A dog.", "A dog runs.", "A cat."]
    assert all(Path(pair["images"][0]).is_file() for pair in pairs)


def test_coco_relative_paths_start_at_the_root(coco, tmp_path):
    prepare("coco", coco, "--relative", out=tmp_path / "elsewhere")
    paths = [entry["image"] for entry in load(tmp_path / "elsewhere/coco.json")]
    assert paths[0] == "coco/images/train2014/COCO_train2014_000000000001.jpg"
    assert all((coco / path).is_file() for path in paths)


def test_karpathy_s_split_with_the_images_of_2017(coco):
    images = coco / "coco/images"
    for folder in ("train2014", "val2014"):
        for path in (images / folder).iterdir():
            path.unlink()
        (images / folder).rmdir()
    for number in (1, 2, 4):
        put(images / f"train2017/{number:012}.jpg")
    put(images / "val2017/000000000003.jpg")
    prepare("coco", coco)
    assert [entry["image"] for entry in load(coco / "coco_train.json")] == [
        "train2017/000000000001.jpg",
        "train2017/000000000001.jpg",
        "train2017/000000000002.jpg",
    ]
    assert load(coco / "coco_val.json")[0]["image"] == "val2017/000000000003.jpg"


@pytest.mark.parametrize("split", ["karpathy", "2014"])
def test_images_in_two_places_are_an_error_before_anything_is_written(coco, split):
    for name in ("train", "val"):
        content = {"images": [], "annotations": []}
        put(coco / f"coco/annotations/captions_{name}2014.json", content)
    (coco / "coco/images/val2014").rename(coco / "val2014")
    places = f"{coco}/coco/images/train2014 and {coco}/val2014 must be in one folder, the config's image_root"
    with pytest.raises(UserError, match=re.escape(places)):
        prepare("coco", coco, "--split", split)
    assert not list(coco.glob("*.json"))


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_by_the_official_split(tmp_path, capsys, year):
    for split, numbers_ in (("train", (7, 8)), ("val", (9,))):
        files = {number: f"COCO_{split}_{number:012}.jpg" for number in numbers_}
        images = [{"id": number, "file_name": file, "height": 4} for number, file in files.items()]
        annotations = [
            {"image_id": number, "id": 10 * number + k, "caption": f"{number} {k} "}
            for k in range(2)
            for number in numbers_
        ]
        content = {"info": {}, "images": images, "annotations": annotations}
        put(tmp_path / f"coco/annotations/captions_{split}{year}.json", content)
        for file in files.values():
            put(tmp_path / f"coco/{split}{year}/{file}")
    prepare("coco", tmp_path, "--split", year)
    name = f"train{year}/COCO_train_000000000007.jpg"
    assert load(tmp_path / f"coco{year}_train.json")[:2] == [
        {"image": name, "caption": "7 0", "image_id": 7},
        {"image": name, "caption": "7 1", "image_id": 7},
    ]
    assert load(tmp_path / f"coco{year}_val.json") == [
        {"image": f"val{year}/COCO_val_000000000009.jpg", "caption": ["9 0", "9 1"]}
    ]
    assert len(load(tmp_path / f"coco{year}.json")) == 4
    assert numbers(capsys.readouterr().out)["train captions"] == 4


def test_a_caption_of_an_unknown_image_is_an_error(tmp_path):
    for split in ("train", "val"):
        content = {
            "images": [{"id": 1, "file_name": "1.jpg"}],
            "annotations": [{"image_id": 2, "caption": "c"}],
        }
        put(tmp_path / f"annotations/captions_{split}2017.json", content)
        put(tmp_path / f"{split}2017/1.jpg")
    with pytest.raises(UserError, match=r"captions_train2017.json annotation 0: image_id 2 is not in"):
        prepare("coco", tmp_path, "--split", "2017")


def test_flickr30k(tmp_path, capsys):
    images = [
        karpathy_image(0, "train", ["Two men.", "Men."], filename="1000092795.jpg"),
        karpathy_image(1, "val", ["A tree."], filename="2.jpg"),
        karpathy_image(2, "test", ["A sea.", "The sea."], filename="3.jpg"),
    ]
    put(tmp_path / "flickr30k/dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    for image in images:
        put(tmp_path / "flickr30k-images" / image["filename"])
    prepare("flickr30k", tmp_path)
    assert load(tmp_path / "flickr30k_train.json") == [
        {"image": "1000092795.jpg", "caption": "Two men.", "image_id": 0},
        {"image": "1000092795.jpg", "caption": "Men.", "image_id": 0},
    ]
    assert load(tmp_path / "flickr30k_val.json") == [{"image": "2.jpg", "caption": ["A tree."]}]
    for split, fields in RETRIEVAL.items():
        file = str(tmp_path / f"flickr30k_{split}.json")
        for entry in read_annotations(file, fields, str(tmp_path / "flickr30k-images")):
            assert Path(entry["images"][0]).is_file()
    printed = capsys.readouterr().out
    assert numbers(printed)["test captions"] == 2
    assert "left out: nothing" in printed
    before = (tmp_path / "flickr30k_train.json").read_bytes()
    shutil.rmtree(tmp_path / "flickr30k-images")
    prepare("flickr30k", tmp_path, "--without_images")
    assert (tmp_path / "flickr30k_train.json").read_bytes() == before
    missing = f"images that are not in {tmp_path}/flickr30k-images, kept by --without_images"
    assert numbers(capsys.readouterr().out)[missing] == 3
    for image in ("1000092795.jpg", "2.jpg", "3.jpg"):
        put(tmp_path / "flickr30k_images/flickr30k_images" / image)  # as kaggle.com/hsankesara has them
    prepare("flickr30k", tmp_path)
    assert (tmp_path / "flickr30k_train.json").read_bytes() == before
    assert f"image_root: {tmp_path}/flickr30k_images/flickr30k_images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "image 0: 'split' must be one of train, restval, val, test, found 'dev'"),
        ({"filename": 3}, "image 0: 'filename' must be text, found 3"),
        (
            {"sentences": [{"tokens": []}]},
            "image 0, sentences must be an object with 'raw', found an object of tokens",
        ),
        ({"sentences": "a"}, "image 0: 'sentences' must be a list"),
    ],
)
def test_a_split_of_another_kind_is_an_error(tmp_path, change, message):
    image = {**karpathy_image(0, "train", ["Two men."], filename="1.jpg"), **change}
    put(tmp_path / "dataset_flickr30k.json", {"images": [image]})
    put(tmp_path / "flickr30k-images/1.jpg")
    with pytest.raises(UserError, match=re.escape(message)):
        prepare("flickr30k", tmp_path)


# ---- the frame ----


def test_without_a_name_all_are_listed(capsys):
    main([])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and about in printed for name, (_, about) in CONVERTERS.items())


@pytest.mark.parametrize(
    "module",
    ["coco", "flickr30k", "flickr8k", "visual_genome", "url_lists", "img2dataset", "huggingface", "table"],
)
def test_each_name_shows_what_it_needs(capsys, module):
    names = [name for name, (known, _) in CONVERTERS.items() if known == module]
    assert names
    for name in names:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert import_module(f"simla.dataset.prepare.{module}").__doc__.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "coco",
            [
                "dataset_coco.json (looked for coco/dataset_coco.json and ",
                "training images",
                "cocodataset.org",
            ],
        ),
        ("flickr30k", ["dataset_flickr30k.json", "flickr30k-images", "DenotationGraph", "karpathy"]),
        (
            "flickr8k",
            ["Flickr8k.token.txt or captions.txt or dataset_flickr8k.json", "flickr8k_images", "jbrownlee"],
        ),
        ("visual_genome", ["region_descriptions.json", "image_data.json", "visualgenome.org"]),
        (
            "cc3m",
            ["cc3m/train", "cc3m/[Tt]rain*.tsv", "cc3m/val", "ConceptualCaptions/download", "img2dataset"],
        ),
        ("cc12m", ["cc12m/cc12m.tsv", "cc12m/images", "conceptual-12m"]),
        ("sbu", ["sbu-captions-all.json", "sbucaptions"]),
        ("img2dataset", ["00000_stats.json", "--output_format files", "--folder"]),
    ],
)
def test_missing_downloads_are_named_with_their_page(tmp_path, capsys, name, words):
    with pytest.raises(UserError) as error:
        prepare(name, tmp_path)
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)
    assert "written" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_running_twice_gives_the_same_bytes(coco):
    prepare("coco", coco)
    first = {path.name: path.read_bytes() for path in coco.glob("*.json")}
    prepare("coco", coco)
    assert len(first) == 4
    assert {path.name: path.read_bytes() for path in coco.glob("*.json")} == first


def test_a_damaged_download_changes_no_file(coco):
    prepare("coco", coco)
    before = {path.name: path.read_bytes() for path in coco.glob("*.json")}
    source = coco / "coco/dataset_coco.json"
    source.write_text(source.read_text()[:-50])
    with pytest.raises(UserError, match=r"dataset_coco.json cannot be read .*; download or unpack it again"):
        prepare("coco", coco)
    assert {path.name: path.read_bytes() for path in coco.glob("*.json")} == before


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device"), UserError("bad")]
)
def test_what_ends_halfway_leaves_the_old_file(tmp_path, error):
    path = put(tmp_path / "a.json", "[1]")

    def entries():
        yield {"image": "a.jpg", "caption": "c"}
        raise error

    with pytest.raises((KeyboardInterrupt, UserError)):
        common.Report("a").write(path, entries())
    assert path.read_text() == "[1]"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_left_is_an_error_and_the_report_says_why(coco, capsys):
    prepare("coco", coco)
    before = (coco / "coco_train.json").read_bytes()
    for path in (coco / "coco/images").rglob("*.jpg"):
        path.unlink()
    capsys.readouterr()
    with pytest.raises(UserError, match=r"no entry to write to .*coco_train.json: everything was left out"):
        prepare("coco", coco)
    assert numbers(capsys.readouterr().out)[f"images that are not in {coco}/coco/images"] == 6
    assert (coco / "coco_train.json").read_bytes() == before


def test_rare_causes_are_summed_up():
    report = common.Report("a")
    for number in range(common.NUM_CAUSES + 5):
        report.leave_out(f"cause {number}", f"example {number}", 100 - number)
    found = numbers(str(report))
    assert found["cause 0"] == 100 and f"cause {common.NUM_CAUSES}" not in found
    rest = sum(100 - number for number in range(common.NUM_CAUSES, common.NUM_CAUSES + 5))
    assert found["for 5 rarer causes"] == rest


def test_only_the_first_examples_are_shown_each_once():
    report = common.Report("a")
    for name in ("x", "x", "y", "z", "w"):
        report.leave_out("gone", name)
    assert "5  gone; first: x, y, z\n" in str(report)


def test_folders_are_listed_to_the_bottom(tmp_path):
    for number in range(40):
        put(tmp_path / f"images/{number}/deep/{number}.jpg", "" if number % 10 == 0 else "x")
    put(tmp_path / "other/a.jpg")
    (tmp_path / "images/link").symlink_to(tmp_path / "other")
    files, empty = common.list_files(tmp_path / "images")
    assert files == {f"{n}/deep/{n}.jpg" for n in range(40) if n % 10} | {"link/a.jpg"}
    assert empty == {f"{n}/deep/{n}.jpg" for n in range(0, 40, 10)}
    with pytest.raises(UserError, match=r"the images' folder .*nowhere cannot be listed"):
        common.list_files(tmp_path / "nowhere")


def test_in_parallel_keeps_the_order_and_does_not_run_ahead():
    taken = []

    def items():
        for number in range(10):
            taken.append(number)
            yield number

    results = common.in_parallel(lambda number: -number, items(), 3)
    assert next(results) == 0
    assert taken == [0, 1, 2]
    assert list(results) == [-number for number in range(1, 10)]


def test_an_out_that_cannot_be_written_is_said_at_once(coco):
    file = put(coco / "file")
    with pytest.raises(UserError, match=r"--out .*file/data cannot be written: Not a directory"):
        prepare("coco", coco, out=file / "data")


def test_out_need_not_exist_and_root_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in/a.jpg")
    put(tmp_path / "in/t.csv", "image,caption\na.jpg,A dog\n")
    prepare("table", Path("in"), "--table", "t.csv", out=Path("new/folder"))
    assert load(tmp_path / "new/folder/pairs.json") == [
        {"image": str(tmp_path / "in/a.jpg"), "caption": "A dog"}
    ]
