"""Flickr8k's files become annotation files; the names and captions here are invented.

The layouts are those of the official files: Flickr8k.token.txt and Flickr_8k.*Images.txt of Flickr8k_text.zip
(its readme.txt: "image address # caption number", a tab, the caption), captions.txt of the usual copies (a
CSV under `image,caption`), train.txt, val.txt and test.txt of github.com/BryanPlummer/flickr30k_entities (a
number a line), and results.csv of the usual copy of Flickr30k (`image_name| comment_number| comment`).
"""

import re
import shutil
from pathlib import Path

import pytest
from test_prepare import RETRIEVAL, karpathy_image, load, numbers, prepare, put

from simla.dataset.prepare.common import split_by_shares
from simla.dataset.pretrain import read_pairs
from simla.dataset.readers.annotations import read_annotations
from simla.utils import UserError

NAMES = [f"{number}_{number:010x}.jpg" for number in (501, 502, 503, 504, 505)]
SPLIT = {"train": NAMES[1::-1], "dev": NAMES[2:3], "test": ["900_0000000384.jpg", NAMES[3]]}
GONE = "777_0000000309.jpg.1"


@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    """Return a folder with all official files: the test list has a junk line, GONE no photo, the last photo
    no split, and a sixth one no caption.
    """
    lines = [
        f'{name}#{number}\tA "{name[:3]}", seen {number} times .\n'
        for name in [*NAMES, GONE]
        for number in (0, 1)
    ]
    put(tmp_path / "flickr8k/Flickr8k.token.txt", "".join(lines))
    for split, names in SPLIT.items():
        put(tmp_path / f"flickr8k/Flickr_8k.{split}Images.txt", "\n".join([*names, ""]))
    for name in [*NAMES, "506_00000001fa.jpg"]:
        put(tmp_path / "flickr8k/Flicker8k_Dataset" / name)
    return tmp_path


def captions(name: str) -> list[str]:
    return [f'A "{name[:3]}", seen {number} times .' for number in (0, 1)]


def test_the_authors_split(flickr8k, capsys):
    prepare("flickr8k", flickr8k)
    folder = flickr8k / "flickr8k/Flicker8k_Dataset"
    assert load(flickr8k / "flickr8k_pretrain.json") == [
        {"image": str(folder / name), "caption": captions(name)} for name in SPLIT["train"]
    ]
    assert load(flickr8k / "flickr8k_train.json") == [
        {"image": name, "caption": caption, "image_id": number}
        for number, name in enumerate(SPLIT["train"])
        for caption in captions(name)
    ]
    for split, name in (("val", NAMES[2]), ("test", NAMES[3])):
        assert load(flickr8k / f"flickr8k_{split}.json") == [{"image": name, "caption": captions(name)}]
    assert [pair["text"] for pair in read_pairs([str(flickr8k / "flickr8k_pretrain.json")])]
    for split, fields in RETRIEVAL.items():
        assert list(read_annotations(str(flickr8k / f"flickr8k_{split}.json"), fields, str(folder)))
    printed = capsys.readouterr().out
    found = numbers(printed)
    assert found["photos"] == found["photos with captions"] == 6 and found["captions"] == 12
    assert found["train captions"] == 4 and found["test images"] == 1
    assert found["photos with captions that the split does not name"] == 1 and NAMES[4] in printed
    assert found["names in the split that have no caption"] == 1 and SPLIT["test"][0] in printed
    assert found[f"photos that are not in {folder}"] == 1 and f"first: {GONE}" in printed
    assert found["photos without a caption"] == 1 and "first: 506_00000001fa.jpg" in printed
    assert re.search(r"photos with captions +6 +8,092 ", printed) and re.search(
        r"captions +12 +40,460", printed
    )
    assert re.search(r"train images +2 +6,000 ", printed) and f"image_root: {folder}" in printed


def test_a_photo_of_the_split_that_is_missing_is_counted_and_named(flickr8k, capsys):
    (flickr8k / "flickr8k/Flicker8k_Dataset" / SPLIT["train"][0]).unlink()
    prepare("flickr8k", flickr8k)
    kept = {entry["image"] for entry in load(flickr8k / "flickr8k_train.json")}
    assert kept == {SPLIT["train"][1]} and len(load(flickr8k / "flickr8k_pretrain.json")) == 1
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if "photos that are not in" in line)
    assert line.split()[0] == "2" and SPLIT["train"][0] in line and GONE in line


def test_without_images_the_files_are_those_of_all_photos(flickr8k, capsys):
    prepare("flickr8k", flickr8k)
    before = {path.name: path.read_bytes() for path in flickr8k.glob("flickr8k_t*.json")}
    shutil.rmtree(flickr8k / "flickr8k/Flicker8k_Dataset")
    capsys.readouterr()
    prepare("flickr8k", flickr8k, "--without_images")
    assert {path.name: path.read_bytes() for path in flickr8k.glob("flickr8k_t*.json")} == before
    found = numbers(capsys.readouterr().out)
    assert found[f"photos that are not in {flickr8k}/flickr8k_images, kept by --without_images"] == 4
    assert found["photos with captions that the split does not name"] == 2


def test_without_images_those_that_are_there_are_found_in_their_folder(flickr8k, capsys):
    folder = flickr8k / "flickr8k/Flicker8k_Dataset"
    (folder / NAMES[0]).unlink()
    prepare("flickr8k", flickr8k, "--without_images")
    entries = load(flickr8k / "flickr8k_pretrain.json")
    assert [entry["image"] for entry in entries] == [str(folder / name) for name in SPLIT["train"]]
    printed = capsys.readouterr().out
    assert numbers(printed)[f"photos that are not in {folder}, kept by --without_images"] == 1
    assert f"image_root: {folder}" in printed


def test_captions_txt_of_the_usual_copies_gives_the_same(flickr8k):
    prepare("flickr8k", flickr8k, "--relative")
    before = {path.name: path.read_bytes() for path in flickr8k.glob("*.json")}
    (flickr8k / "flickr8k/Flickr8k.token.txt").unlink()
    rows = [
        f'{name},"{caption.replace(chr(34), chr(34) * 2)}"' for name in NAMES for caption in captions(name)
    ]
    put(flickr8k / "captions.txt", "\n".join(["image,caption", *rows]))
    prepare("flickr8k", flickr8k, "--relative")
    assert len(before) == 4
    assert {path.name: path.read_bytes() for path in flickr8k.glob("*.json")} == before


def test_captions_txt_alone_has_no_split_but_shares(flickr8k, capsys):
    for path in (flickr8k / "flickr8k").glob("*Images.txt"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"missing .*trainImages.txt .*by shares of your own: --split 80/10/10"
    ):
        prepare("flickr8k", flickr8k)
    prepare("flickr8k", flickr8k, "--split", "34/33/33", "--seed", "1")
    drawn = {name: split_by_shares("34/33/33", 1)(name) for name in NAMES}
    for split in ("train", "val", "test"):
        names = {entry["image"] for entry in load(flickr8k / f"flickr8k_{split}.json")}
        assert names == {name for name in NAMES if drawn[name] == split} != set()
    assert "split: 34/33/33 by --seed 1, not the authors' one" in capsys.readouterr().out


def test_karpathy_s_file_gives_captions_and_split(flickr8k, capsys):
    for path in (flickr8k / "flickr8k").glob("*.txt"):
        path.unlink()
    splits = ["train", "train", "val", "test"]
    images = [
        karpathy_image(number, split, captions(name), filename=name)
        for number, (name, split) in enumerate(zip(NAMES, splits, strict=False))
    ]
    file = put(flickr8k / "dataset_flickr8k.json", {"images": images})
    prepare("flickr8k", flickr8k)
    assert [entry["image"] for entry in load(flickr8k / "flickr8k_train.json")] == [
        *[NAMES[0]] * 2,
        *[NAMES[1]] * 2,
    ]
    assert load(flickr8k / "flickr8k_test.json") == [{"image": NAMES[3], "caption": captions(NAMES[3])}]
    assert f"split: {file}" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["flickr30k", "entities"])
def test_splits_of_flickr30k_name_photos_by_their_number(flickr8k, capsys, split):
    wanted = {"train": NAMES[2], "val": NAMES[0], "test": NAMES[1]}  # the other two are in none
    numbers_ = {name: file.partition("_")[0] for name, file in wanted.items()}
    if split == "entities":
        for name, number in numbers_.items():
            put(flickr8k / f"flickr30k_entities/{name}.txt", f"{number}\n90{number}\n")
    else:
        images = [karpathy_image(0, name, [], filename=f"{number}.jpg") for name, number in numbers_.items()]
        put(flickr8k / "flickr30k/dataset_flickr30k.json", {"images": images})
    prepare("flickr8k", flickr8k, "--split", split)
    for name, file in wanted.items():
        entries = load(flickr8k / f"flickr8k_{split}_{name}.json")
        assert {entry["image"] for entry in entries} == {file}
    assert [entry["caption"] for entry in load(flickr8k / f"flickr8k_{split}_pretrain.json")] == [
        captions(NAMES[2])
    ]
    assert numbers(capsys.readouterr().out)["photos with captions that the split does not name"] == 2
    assert not (flickr8k / "flickr8k_train.json").exists()


def test_lists_that_share_a_photo_and_lines_that_are_none(flickr8k, capsys):
    tokens = flickr8k / "flickr8k/Flickr8k.token.txt"
    tokens.write_bytes(tokens.read_bytes() + b"no number\tx\n" + NAMES[0].encode() + b"#2\tcaf\xe9\n\n")
    prepare("flickr8k", flickr8k)
    printed = capsys.readouterr().out
    assert numbers(printed)["lines that are not PHOTO#NUMBER, a tab, CAPTION"] == 1 and "line 13" in printed
    assert numbers(printed)["lines that are not UTF-8"] == 1
    put(flickr8k / "flickr8k/Flickr_8k.devImages.txt", f"{NAMES[2]}\n{NAMES[0]}\n")
    with pytest.raises(UserError, match=rf"devImages.txt, line 2: {NAMES[0]} is in the list of train, too"):
        prepare("flickr8k", flickr8k)
    with pytest.raises(UserError, match=r"missing .*flickr30k_entities/train.txt .*BryanPlummer"):
        prepare("flickr8k", flickr8k, "--split", "entities")
    with pytest.raises(UserError, match=r"--split dev: must be flickr8k, .* or the shares of train, val and"):
        prepare("flickr8k", flickr8k, "--split", "dev")


# ---- tables of these copies, and of one's own ----


def test_the_usual_copy_of_flickr30k_is_a_table(tmp_path, capsys):
    put(tmp_path / "flickr30k_images/1.jpg")
    rows = ['1.jpg| 0| A "dog", in the snow .', "1.jpg| 1| One dog .", "1.jpg| 4   A dog runs ."]
    put(tmp_path / "results.csv", "\n".join(["image_name| comment_number| comment", *rows]))
    prepare("table", tmp_path, "--table", "results.csv", "--images", "flickr30k_images", "--relative")
    texts = ['A "dog", in the snow .', "One dog ."]
    assert load(tmp_path / "pairs.json") == [
        {"image": "flickr30k_images/1.jpg", "caption": text} for text in texts
    ]
    printed = capsys.readouterr().out
    assert numbers(printed)["captions of rows with a cell that is null, missing or one too many"] == 1
    assert "results.csv, line 4" in printed


@pytest.mark.parametrize(
    ("name", "content", "caption"),
    [
        ("t.txt", 'image,caption\na.jpg,"Two dogs; one, ""big"", | runs"\n', 'Two dogs; one, "big", | runs'),
        ("t.txt", 'image\tcaption\na.jpg\t"Two" dogs, one; big\n', '"Two" dogs, one; big'),
        ("t.txt", 'image|caption\n a.jpg | "Two" dogs, one; big \n', '"Two" dogs, one; big'),
        ("t.txt", 'image;caption\na.jpg;"Two dogs; one, big"\n', "Two dogs; one, big"),
        ("t.csv", '\ufeffimage;caption\r\na.jpg;"Two dogs; one, ""big"""\r\n', 'Two dogs; one, "big"'),
        ("t.csv", 'image, caption\na.jpg, "Two dogs, one ""big"""\n', 'Two dogs, one "big"'),
        ("t.csv", "caption, image\nTwo dogs, a.jpg\n", "Two dogs"),
        ("t.csv", "image,a;b,caption\na.jpg,x,Two dogs; one big\n", "Two dogs; one big"),
    ],
)
def test_the_line_of_names_says_what_parts_the_cells(tmp_path, name, content, caption):
    put(tmp_path / "a.jpg")
    put(tmp_path / name, content)
    prepare("table", tmp_path, "--table", name, "--relative")
    assert load(tmp_path / "pairs.json") == [{"image": "a.jpg", "caption": caption}]


@pytest.mark.parametrize("column", ["split", "Split"])
def test_a_column_of_splits_is_noticed_and_a_table_named_twice_is_read_once(tmp_path, capsys, column):
    put(tmp_path / "a.jpg")
    put(tmp_path / "t.csv", f"image,caption,{column}\na.jpg,Two dogs,test\n")
    prepare("table", tmp_path, "--table", "t.csv", "*.csv")
    assert len(load(tmp_path / "pairs.json")) == 1
    assert f"1  tables with a column {column}, which is not looked at; first: {tmp_path}/t.csv" in (
        capsys.readouterr().out
    )


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with a table of 60 photos, two captions each, in an order that parts them."""
    for number in range(60):
        put(tmp_path / f"photos/{number}.jpg")
    rows = [f"{'./' * k}{number}.jpg,thing {number} {k}" for k in range(2) for number in range(60)]
    put(tmp_path / "t.csv", "\n".join(["image,caption", *rows]))
    return tmp_path


FLAGS = ("--table", "t.csv", "--images", "photos", "--name", "mine")


def split_images(folder: Path) -> dict[str, set[str]]:
    return {
        split: {Path(entry["image"]).name for entry in load(folder / f"mine_{split}.json")}
        for split in ("train", "val", "test")
    }


def test_split_keeps_a_photo_together_whatever_the_order_of_rows(own, capsys):
    prepare("table", own, *FLAGS, "--split", "60/20/20")
    first = split_images(own)
    assert sum(map(len, first.values())) == len(set.union(*first.values())) == 60
    assert 24 <= len(first["train"]) <= 48 and min(map(len, first.values())) >= 4
    train = load(own / "mine_train.json")
    assert [{**entry, "image_id": entry["image"]} for entry in load(own / "mine.json")] == train
    assert len(train) == 2 * len(first["train"])
    for split, fields in RETRIEVAL.items():
        assert list(read_annotations(str(own / f"mine_{split}.json"), fields))
    assert all(len(entry["caption"]) == 2 for entry in load(own / "mine_val.json"))
    found = numbers(capsys.readouterr().out)
    assert found["val images"] == len(first["val"]) and found["test captions"] == 2 * len(first["test"])

    (own / "photos/new.jpg").write_text("x")
    header, *rows = (own / "t.csv").read_text().splitlines()
    put(own / "t.csv", "\n".join([header, "new.jpg,one more", *rows[::-1]]))
    prepare("table", own, *FLAGS, "--split", "60/20/20", "--relative")
    assert {split: names - {"new.jpg"} for split, names in split_images(own).items()} == first
    prepare("table", own, *FLAGS, "--split", "60/20/20", "--seed", "1")
    assert {split: names - {"new.jpg"} for split, names in split_images(own).items()} != first


def test_split_keeps_a_photo_and_links_to_it_together(own):
    (own / "photos/links").mkdir()
    for number in range(60):
        (own / f"photos/links/{number}.jpg").symlink_to(own / f"photos/{number}.jpg")
    with (own / "t.csv").open("a") as file:
        file.write("".join(f"\nlinks/{number}.jpg,a link {number}" for number in range(60)))
    prepare("table", own, *FLAGS, "--split", "60/20/20")
    assert sum(map(len, split_images(own).values())) == 60


@pytest.mark.parametrize("shares", ["80/10", "80/10/20", "90/10/0", "0.8/0.1/0.1", "a/b/c"])
def test_shares_that_are_none_are_an_error(own, shares):
    with pytest.raises(
        UserError, match=rf"--split {shares}: must be the shares of train, val and test in percent"
    ):
        prepare("table", own, *FLAGS, "--split", shares)


def test_a_split_without_a_photo_is_an_error_and_changes_no_file(own, capsys):
    put(own / "t.csv", "image,caption\n1.jpg,x\n2.jpg,y\n")
    with pytest.raises(
        UserError, match=r"none of the 2 images falls into \w+; give it a larger share, or draw"
    ):
        prepare("table", own, *FLAGS, "--split", "80/10/10")
    assert not list(own.glob("*.json"))
    put(own / "t.csv", "image,caption\ngone.jpg,x\n")
    with pytest.raises(UserError, match="everything was left out, for the causes above"):
        prepare("table", own, *FLAGS, "--split", "80/10/10")
    with pytest.raises(SystemExit, match="2"):
        prepare("table", own, *FLAGS, "--split", "80/10/10", "--task", "retrieval_val")
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_table_of_photos_to_validate_on(own):
    prepare("table", own, *FLAGS, "--task", "retrieval_val", "--relative")
    assert load(own / "mine_val.json")[3] == {"image": "photos/3.jpg", "caption": ["thing 3 0", "thing 3 1"]}
    assert not (own / "mine.json").exists()
