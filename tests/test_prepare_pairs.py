"""Pre-training files of Visual Genome, URL lists, img2dataset folders and own tables.

The layouts: Visual Genome's files as visual_genome/local.py of its authors' visual_genome_python_driver reads
them, SBU's as torchvision.datasets.SBU does, CC12M's lines as its page says, google-research-datasets/
conceptual-12m; folders as writer.py of github.com/rom1504/img2dataset writes them, tables as Hugging Face's
`datasets`.
"""

import csv
import io
import json
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable
from hashlib import md5
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from test_prepare import RETRIEVAL, karpathy_image, load, numbers, prepare, put

from simla.dataset.images import load_image
from simla.dataset.prepare.captions import captions_in
from simla.dataset.prepare.common import Report
from simla.dataset.pretrain import read_pairs, read_sets
from simla.dataset.readers.annotations import read_annotations
from simla.utils import UserError

EXCERPTS = Path(__file__).parent / "excerpts"


def pairs(path: Path, root: Path) -> list[tuple[str, str]]:
    """Image relative to `root`, and caption, of each entry as pre-training reads it; all images are there."""
    found = read_pairs([str(path)])
    assert all(Path(pair["images"][0]).stat().st_size for pair in found)
    return [(str(Path(pair["images"][0]).relative_to(root)), pair["text"]) for pair in found]


# ---- Visual Genome ----


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    """1: phrases that repeat; 2: in COCO's test; 3: in Flickr30k's val; 4: in its training; 5: no image."""
    ids = {1: (None, None), 2: (102, 7), 3: (None, 303), 4: (104, None), 5: (None, None)}
    phrases = {number: [f"thing {number}"] for number in ids}
    phrases[1] = ["A tall tree", "a car ", "a  Tall tree", "the sky", ""]
    regions = [
        {
            "id": number,
            "regions": [
                {
                    "region_id": k,
                    "image_id": number,
                    "x": 0,
                    "y": 0,
                    "width": 9,
                    "height": 9,
                    "phrase": phrase,
                }
                for k, phrase in enumerate(phrases[number])
            ],
        }
        for number in ids
    ]
    data = []
    for number, (coco_id, flickr_id) in ids.items():
        folder = "VG_100K_2" if number == 1 else "VG_100K"
        url = f"https://cs.stanford.edu/people/rak248/{folder}/{number}.jpg"
        data.append({"image_id": number, "url": url, "coco_id": coco_id, "flickr_id": flickr_id})
        if number != 5:
            put(tmp_path / f"visual_genome/images/{folder}/{number}.jpg")
    put(tmp_path / "visual_genome/region_descriptions.json", regions)
    put(tmp_path / "visual_genome/image_data.json", data)
    coco = [
        karpathy_image(0, "test", ["x"], cocoid=102),
        karpathy_image(1, "restval", ["x"], cocoid=104),
    ]
    put(tmp_path / "coco/dataset_coco.json", {"images": coco})
    flickr = [karpathy_image(0, "val", ["x"], filename="303.jpg")]
    put(tmp_path / "flickr30k/dataset_flickr30k.json", {"images": flickr})
    return tmp_path


def test_visual_genome(genome, capsys):
    prepare("visual_genome", genome)
    first = "visual_genome/images/VG_100K_2/1.jpg"
    assert pairs(genome / "vg.json", genome) == [
        (first, "A tall tree"),
        (first, "a car"),
        (first, "the sky"),
        ("visual_genome/images/VG_100K/4.jpg", "thing 4"),
    ]
    found = numbers(capsys.readouterr().out)
    assert found["images described"] == 5 and found["images with regions"] == 2 and found["pairs"] == 4
    assert found["repeated phrases"] == 1 and found["pairs without a caption"] == 1
    assert found["regions of images of val and test in dataset_coco.json"] == 1
    assert found["regions of images of val and test in dataset_flickr30k.json"] == 1
    assert found[f"regions whose image is not in {genome}/visual_genome/images"] == 1


def test_regions_are_drawn_the_same_each_time(genome, capsys):
    entries = [{"id": 1, "regions": [{"phrase": f"thing {k}"} for k in range(50)]}]
    put(genome / "visual_genome/region_descriptions.json", entries)
    prepare("visual_genome", genome)
    drawn = [text for _, text in pairs(genome / "vg.json", genome)]
    assert len(drawn) == 8 and len(set(drawn)) == 8
    assert numbers(capsys.readouterr().out)["regions beyond --regions"] == 42
    order = [int(text.split()[1]) for text in drawn]
    assert order == sorted(order) and order != list(range(8))
    prepare("visual_genome", genome)
    assert [text for _, text in pairs(genome / "vg.json", genome)] == drawn
    prepare("visual_genome", genome, "--regions", "0")
    assert len(load(genome / "vg.json")) == 50
    with pytest.raises(UserError, match="--regions -1: 0 takes all, a number above 0 so many"):
        prepare("visual_genome", genome, "--regions", "-1")


def test_blank_phrases_take_no_place_among_those_drawn(genome, capsys):
    phrases = ["", " \n", "a", "\u00a0", "b", "A ", "c"]
    entries = [{"id": 1, "regions": [{"phrase": phrase} for phrase in phrases]}]
    blank = {"id": 4, "regions": [{"phrase": ""}, {"phrase": " "}]}
    put(genome / "visual_genome/region_descriptions.json", [*entries, blank])
    prepare("visual_genome", genome, "--regions", "3")
    assert [text for _, text in pairs(genome / "vg.json", genome)] == ["a", "b", "c"]
    found = numbers(capsys.readouterr().out)
    assert found["pairs without a caption"] == 5 and found["repeated phrases"] == 1
    assert found["images with regions"] == 1 and "regions beyond --regions" not in found


def test_phrases_that_are_no_text_or_say_nothing_take_no_place_either(genome, capsys):
    phrases = [None, 3, "...", "\u200b", "a", ["b", "(!)"], "c"]
    entries = [{"id": 1, "regions": [{"phrase": phrase} for phrase in phrases]}]
    put(genome / "visual_genome/region_descriptions.json", entries)
    prepare("visual_genome", genome, "--regions", "3")
    assert [text for _, text in pairs(genome / "vg.json", genome)] == ["a", "b", "c"]
    found = numbers(capsys.readouterr().out)
    assert found["pairs without a caption"] == 4 and found["captions that are no text but numbers"] == 1


def test_without_the_splits_leaks_must_be_allowed(genome, capsys):
    (genome / "flickr30k/dataset_flickr30k.json").unlink()
    with pytest.raises(
        UserError, match=r"dataset_flickr30k.json .*images that are evaluated on are left out"
    ):
        prepare("visual_genome", genome)
    assert not (genome / "vg.json").exists()
    prepare("visual_genome", genome, "--allow-leaks")
    assert "thing 3" in [text for _, text in pairs(genome / "vg.json", genome)]
    assert "thing 2" not in [text for _, text in pairs(genome / "vg.json", genome)]
    assert "may hold images of dataset_flickr30k.json's val and test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("coco/dataset_coco.json", {"split": None}, "dataset_coco.json: image 0: 'split' must be text"),
        ("coco/dataset_coco.json", {"cocoid": "102"}, "image 0: 'cocoid' must be a whole number"),
        (
            "flickr30k/dataset_flickr30k.json",
            {"filename": "a.jpg"},
            "0: 'filename' must be Flickr's number",
        ),
    ],
)
def test_splits_of_another_kind_name_their_entry(genome, file, change, message):
    first, *others = load(genome / file)["images"]
    put(genome / file, {"images": [{**first, **change}, *others]})
    with pytest.raises(UserError, match=message):
        prepare("visual_genome", genome)


@pytest.mark.parametrize("ids", [("102", float("nan")), (102.0, None)])
def test_ids_of_images_that_went_through_a_table_are_known(genome, capsys, ids):
    data = load(genome / "visual_genome/image_data.json")
    data[1] |= dict(zip(("coco_id", "flickr_id"), ids, strict=True))
    put(genome / "visual_genome/image_data.json", data)
    prepare("visual_genome", genome)
    counted = numbers(capsys.readouterr().out)
    assert counted["regions of images of val and test in dataset_coco.json"] == 1
    put(genome / "visual_genome/image_data.json", [*data[1:], {**data[0], "coco_id": "one"}])
    with pytest.raises(UserError, match="image_id 1: 'coco_id' must be a whole number or null, found 'one'"):
        prepare("visual_genome", genome)


def test_without_images_all_regions_are_kept(genome, capsys):
    shutil.rmtree(genome / "visual_genome/images")
    prepare("visual_genome", genome, "--without_images", "--relative")
    entries = load(genome / "vg.json")
    assert [entry["caption"] for entry in entries] == [
        "A tall tree",
        "a car",
        "the sky",
        "thing 4",
        "thing 5",
    ]
    assert entries[0]["image"] == "visual_genome/images/VG_100K_2/1.jpg"
    missing = f"regions whose image is not in {genome}/visual_genome/images, kept by --without_images"
    assert numbers(capsys.readouterr().out)[missing] == 7
    put(genome / "images/VG_100K/4.jpg")
    prepare("visual_genome", genome, "--without_images", "--relative")
    assert {entry["image"].partition("VG")[0] for entry in load(genome / "vg.json")} == {"images/"}


def test_damaged_region_descriptions_name_their_entry(genome):
    put(genome / "visual_genome/region_descriptions.json", [{"id": 1, "regions": [{"id": 3}]}])
    with pytest.raises(
        UserError, match=r"json: entry 0, regions must be an object with 'phrase', found .* id"
    ):
        prepare("visual_genome", genome)


# ---- lists of URLs ----


URLS = [f"http://host/{number}/picture.jpg?x={number}" for number in range(5)]


def crc32(url: str) -> int:
    return zlib.crc32(url.encode())


NAMES: dict[str, Callable[[int, str], str]] = {
    "{row}_{crc32}": lambda row, url: f"{row}_{crc32(url)}",
    "{crc32}.jpg": lambda _, url: f"{crc32(url)}.jpg",
    "{md5}.jpg": lambda _, url: md5(url.encode()).hexdigest() + ".jpg",
}


@pytest.mark.parametrize("naming", NAMES)
def test_cc3m(tmp_path, capsys, naming):
    lines = [f'a "thing {number}\t{url}\n' for number, url in enumerate(URLS)]
    put(tmp_path / "cc3m/Train_GCC-training.tsv", "".join([*lines, "no URL\n"]))
    put(tmp_path / "cc3m/Validation_GCC-1.1.0-Validation.tsv", lines[0])
    for row, url in list(enumerate(URLS))[:3]:
        put(tmp_path / "cc3m/train" / NAMES[naming](row, url), "" if row == 2 else "x")
    put(tmp_path / "cc3m/val" / NAMES[naming](0, URLS[0]))
    prepare("cc3m", tmp_path)
    assert pairs(tmp_path / "cc3m_train.json", tmp_path) == [
        (f"cc3m/train/{NAMES[naming](row, URLS[row])}", f'a "thing {row}') for row in range(2)
    ]
    assert len(load(tmp_path / "cc3m_val.json")) == 1
    printed = capsys.readouterr().out
    found = numbers(printed)
    assert found["cc3m_train: lines"] == 5 and found["cc3m_train: pairs with an image"] == 2
    assert found[f"pairs whose image is not in {tmp_path}/cc3m/train"] == 2
    assert found["pairs whose image is an empty file"] == 1
    assert found["lines that are not a URL and a caption"] == 1
    assert f"images are named {naming}\n" in printed and "3,318,333" in printed and "15,840" in printed


def test_cc3m_without_one_of_its_parts(tmp_path, capsys):
    put(tmp_path / "cc3m/val.tsv", f"a thing\t{URLS[0]}\n")
    put(tmp_path / f"cc3m/validation/{crc32(URLS[0])}")
    prepare("cc3m", tmp_path)
    assert not (tmp_path / "cc3m_train.json").exists() and (tmp_path / "cc3m_val.json").exists()
    assert f"cc3m_train.json: not made, no images in {tmp_path}" in capsys.readouterr().out


def test_without_images_those_that_img2dataset_has_written_stand_under_their_names(tmp_path, capsys):
    download(tmp_path / "cc3m/val", with_tables=False)
    put(tmp_path / "cc3m/val.tsv", f"a thing\t{URLS[0]}\n")
    prepare("cc3m", tmp_path)
    before = (tmp_path / "cc3m_val.json").read_bytes()
    prepare("cc3m", tmp_path, "--without_images")
    assert (tmp_path / "cc3m_val.json").read_bytes() == before
    assert "of the images that img2dataset has written to" in capsys.readouterr().out


def test_without_images_the_folder_that_is_there_is_taken(tmp_path):
    put(tmp_path / "cc3m/val.tsv", "".join(f"a thing\t{url}\n" for url in URLS[:2]))
    put(tmp_path / f"cc3m/validation/{crc32(URLS[0])}")
    prepare("cc3m", tmp_path, "--without_images")
    assert [Path(entry["image"]).name for entry in load(tmp_path / "cc3m_val.json")] == [
        str(crc32(url)) for url in URLS[:2]
    ]


def test_without_images_the_folder_of_the_list_is_not_that_of_images(tmp_path):
    put(tmp_path / "cc12m/cc12m.tsv", f"{URLS[0]}\tthing\n")
    prepare("cc12m", tmp_path, "--without_images")
    (entry,) = load(tmp_path / "cc12m.json")
    assert entry["image"] == str(tmp_path / f"cc12m/images/0_{crc32(URLS[0])}")


def test_cc12m_has_the_url_first_and_may_have_a_header(tmp_path):
    lines = ["url\tcaption\n", *(f"{url}\tthing {number}\n" for number, url in enumerate(URLS))]
    put(tmp_path / "cc12m.tsv", "".join(lines))
    for row in (0, 3):
        put(tmp_path / f"cc12m/images/{row}_{crc32(URLS[row])}.jpg")
    prepare("cc12m", tmp_path)
    assert [text for _, text in pairs(tmp_path / "cc12m.json", tmp_path)] == ["thing 0", "thing 3"]


def test_a_mark_of_utf_8_and_ends_of_lines_of_windows_are_no_part_of_a_list(tmp_path):
    lines = "".join(f"{url}\tthing {number}\r\n" for number, url in enumerate(URLS))
    put(tmp_path / "cc12m.tsv", f"\ufeff{lines}")
    for row in (0, 1):
        put(tmp_path / f"cc12m/images/{row}_{crc32(URLS[row])}.jpg")
    prepare("cc12m", tmp_path)
    assert [text for _, text in pairs(tmp_path / "cc12m.json", tmp_path)] == ["thing 0", "thing 1"]


def test_images_named_by_the_line_alone_are_never_guessed(tmp_path):
    put(tmp_path / "cc12m.tsv", "".join(f"{url}\tthing {number}\n" for number, url in enumerate(URLS)))
    for row in range(5):
        put(tmp_path / f"cc12m/images/{row:05}.jpg")
    with pytest.raises(UserError, match=r"for example: 00000.jpg. Say how they are named by --image-names"):
        prepare("cc12m", tmp_path)
    prepare("cc12m", tmp_path, "--image-names", "{row:05}.jpg")
    assert pairs(tmp_path / "cc12m.json", tmp_path)[4] == ("cc12m/images/00004.jpg", "thing 4")
    prepare("cc12m", tmp_path, "--image-names", "{row1:05}.jpg")
    assert pairs(tmp_path / "cc12m.json", tmp_path)[0] == ("cc12m/images/00001.jpg", "thing 0")
    with pytest.raises(UserError, match=r"--image-names {line}.jpg: 'line'; fields are row, row1, crc32"):
        prepare("cc12m", tmp_path, "--image-names", "{line}.jpg")


def test_sbu_by_its_json_and_by_its_two_texts(tmp_path):
    urls = [f"http://static.flickr.com/1/{number}_ab.jpg" for number in range(3)]
    captions = ["A pier.\u2028Sunset", "A boat.", "A gull."]
    source = put(
        tmp_path / "sbu/sbu-captions-all.json",
        {"image_urls": urls, "user_ids": ["u"] * 3, "captions": captions},
    )
    for number in (0, 2):
        put(tmp_path / f"sbu/images/{number}_ab.jpg")
    prepare("sbu", tmp_path)
    expected = [("sbu/images/0_ab.jpg", captions[0]), ("sbu/images/2_ab.jpg", captions[2])]
    assert pairs(tmp_path / "sbu.json", tmp_path) == expected
    source.unlink()
    put(tmp_path / "sbu/dataset/SBU_captioned_photo_dataset_urls.txt", "\n".join(urls))
    texts = put(tmp_path / "sbu/dataset/SBU_captioned_photo_dataset_captions.txt", "\n".join(captions))
    prepare("sbu", tmp_path)
    assert pairs(tmp_path / "sbu.json", tmp_path) == expected
    shutil.rmtree(tmp_path / "sbu/images")
    prepare("sbu", tmp_path, "--without_images")  # in the folder of --help, not in that of the list
    entries = json.loads((tmp_path / "sbu.json").read_bytes())
    assert {str(Path(entry["image"]).parent) for entry in entries} == {str(tmp_path / "sbu/images")}
    assert [entry["caption"] for entry in entries] == captions
    texts.write_text("\n".join(captions[:2]))
    with pytest.raises(UserError, match="3 URLs but 2 captions; download the files again"):
        prepare("sbu", tmp_path)


def test_captions_and_urls_of_sbu_that_are_no_text_are_counted(tmp_path, capsys):
    urls = [
        "http://f/1.jpg",
        "http://f/2.jpg",
        "http://f/3.jpg",
        "http://f/4.jpg",
        None,
        "http://f/\ud83d.jpg",
    ]
    captions = ["a", None, ["c", "d"], 4, "e", "f"]
    put(tmp_path / "sbu/sbu-captions-all.json", {"image_urls": urls, "captions": captions})
    for number in range(1, 5):
        put(tmp_path / f"sbu/images/{number}.jpg")
    prepare("sbu", tmp_path)
    assert [text for _, text in pairs(tmp_path / "sbu.json", tmp_path)] == ["a", "c", "d"]
    found = numbers(capsys.readouterr().out)
    assert found["pairs without a caption"] == found["URLs that are no text"] == 1
    assert found["captions that are no text but numbers"] == 1
    assert found[f"pairs whose image is not in {tmp_path}/sbu/images"] == 1


def test_a_line_that_is_not_utf_8_is_counted_and_keeps_its_number(tmp_path, capsys):
    lines = [f"thing {number}\t{url}\n".encode() for number, url in enumerate(URLS)]
    lines[1] = lines[1].replace(b"thing", b"th\xefng")
    put(tmp_path / "cc12m.tsv").write_bytes(b"".join(lines))
    for row in range(5):
        put(tmp_path / f"cc12m/images/{row}_{crc32(URLS[row])}.jpg")
    prepare("cc12m", tmp_path)
    assert [text[-1] for _, text in pairs(tmp_path / "cc12m.json", tmp_path)] == ["0", "2", "3", "4"]
    printed = capsys.readouterr().out
    assert numbers(printed)["lines that are not UTF-8"] == 1 and "first: cc12m.tsv line 2" in printed


def test_urls_that_are_none_are_named_by_their_end(tmp_path):
    put(tmp_path / "cc12m.tsv", "http://[2001/a.jpg?x#y\tthing 0\nhttp://host/b.jpg\tthing 1\n")
    put(tmp_path / "cc12m/images/a.jpg")
    prepare("cc12m", tmp_path, "--image-names", "{file}")
    assert pairs(tmp_path / "cc12m.json", tmp_path) == [("cc12m/images/a.jpg", "thing 0")]


# ---- img2dataset ----


def download(folder: Path, with_tables: bool) -> None:
    """Two shards of five URLs: one good image, one empty, one with an empty caption, two failures."""
    for shard in ("00000", "00001"):
        rows = []
        for number in (3, 0, 1, 2, 4):
            key = f"{shard}{number:04}"
            failed = {1: "HTTP Error 404: Not Found", 4: "timed out\nlater"}.get(number)
            caption = "" if number == 2 else f"thing {key}"
            status = "failed_to_download" if failed else "success"
            row = {
                "url": URLS[number],
                "caption": caption,
                "key": key,
                "status": status,
                "error_message": failed,
            }
            rows.append(row)
            if not failed:
                put(folder / f"{shard}/{key}.jpg", "" if number == 3 else "x")
                put(folder / f"{shard}/{key}.txt", caption)
                put(folder / f"{shard}/{key}.json", row)
        causes = {"success": 3, "HTTP Error 404: Not Found": 1, "timed out": 1}
        put(folder / f"{shard}_stats.json", {"count": 5, "successes": 3, "status_dict": causes})
        if with_tables:
            parquet.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet")


@pytest.mark.parametrize("with_tables", [True, False])
def test_img2dataset_s_folder(tmp_path, capsys, with_tables):
    download(tmp_path / "got", with_tables)
    prepare("img2dataset", tmp_path, "--folder", "got", "--name", "web")
    assert pairs(tmp_path / "web.json", tmp_path) == [
        ("got/00000/000000000.jpg", "thing 000000000"),
        ("got/00001/000010000.jpg", "thing 000010000"),
    ]
    found = numbers(capsys.readouterr().out)
    assert found["web: URLs"] == 10 and found["web: pairs with an image"] == 2
    assert found["URLs not downloaded: HTTP Error 404: Not Found"] == 2
    assert found["URLs not downloaded: timed out"] == 2
    assert found["downloads that are empty files"] == 2
    assert found["pairs without a caption"] == 2


def test_a_download_that_has_gone_is_told(tmp_path, capsys):
    download(tmp_path, with_tables=True)
    (tmp_path / "00001/000010000.jpg").unlink()
    prepare("img2dataset", tmp_path, "--relative")
    assert load(tmp_path / "pairs.json") == [{"image": "00000/000000000.jpg", "caption": "thing 000000000"}]
    printed = capsys.readouterr().out
    assert numbers(printed)["downloads that are missing"] == 1 and "first: 00001/000010000" in printed


def test_paths_relative_to_a_root_that_is_a_link(tmp_path):
    download(tmp_path / "far/away/disk/got", with_tables=False)
    root = tmp_path / "data"
    root.symlink_to(tmp_path / "far/away/disk")
    prepare("img2dataset", root, "--folder", "got", "--relative")
    paths = [entry["image"] for entry in load(root / "pairs.json")]
    assert paths == ["got/00000/000000000.jpg", "got/00001/000010000.jpg"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    download(tmp_path, with_tables=False)

    def scandir(path):
        if path.name == "00001":
            raise PermissionError(13, "Permission denied", str(path))
        return os_scandir(path)

    os_scandir = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"images' folder .* cannot be listed: .*Permission denied: .*00001"):
        prepare("img2dataset", tmp_path)


def test_img2dataset_without_texts_has_captions_in_its_json(tmp_path):
    put(tmp_path / "00000/000000000.png")
    put(tmp_path / "00000/000000000.json", {"caption": "a thing", "key": "000000000"})
    prepare("img2dataset", tmp_path)
    assert pairs(tmp_path / "pairs.json", tmp_path) == [("00000/000000000.png", "a thing")]


def test_tar_files_of_other_names_are_for_train_file(tmp_path):
    put(tmp_path / "cc3m-train-0000.tar")
    with pytest.raises(UserError, match=r"00000.tar or 00000_stats.json in it; its .tar files, if they are"):
        prepare("img2dataset", tmp_path)


def number_captions(folder: Path, with_tables: bool) -> None:
    """A shard whose captions came from columns of numbers and lists; with the list as text in its .txt."""
    captions = [["A dog", "One dog"], None, "['A cat', \"the cat's\"]", 7, "A hen"]
    if with_tables:
        captions = captions[:1]  # a column of a table has one type
    for number, caption in enumerate(captions):
        row = {"caption": caption, "url": "u", "key": f"{number:09}", "status": "success"}
        put(folder / f"00000/{number:09}.jpg")
        put(folder / f"00000/{number:09}.json", row)
        put(folder / f"00000/{number:09}.txt", str(caption or ""))
        if with_tables:
            table = pa.Table.from_pylist([{**row, "error_message": None}])
            parquet.write_table(table, folder / "00000.parquet")


def test_captions_that_are_lists_or_numbers_before_img2dataset_made_them_text(tmp_path, capsys):
    number_captions(tmp_path / "a", with_tables=False)
    prepare("img2dataset", tmp_path, "--folder", "a", "--name", "a")
    texts = [text for _, text in pairs(tmp_path / "a.json", tmp_path)]
    assert texts == ["A dog", "One dog", "A cat", "the cat's", "A hen"]
    found = numbers(capsys.readouterr().out)
    assert found["a: URLs"] == 5 and found["a: pairs with an image"] == 5
    assert found["captions that are no text but numbers"] == found["pairs without a caption"] == 1
    assert found["lists written as text, read as several captions"] == 1
    number_captions(tmp_path / "b", with_tables=True)
    prepare("img2dataset", tmp_path, "--folder", "b", "--name", "b")
    assert [text for _, text in pairs(tmp_path / "b.json", tmp_path)] == ["A dog", "One dog"]


def test_a_table_of_numbers_has_no_caption(tmp_path, capsys):
    row = {"key": "000000000", "caption": 3, "status": "success", "error_message": None}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "00000.parquet")
    put(tmp_path / "00000/000000000.jpg")
    with pytest.raises(UserError, match="everything was left out, for the causes above"):
        prepare("img2dataset", tmp_path)
    assert numbers(capsys.readouterr().out)["captions that are no text but numbers"] == 1


def test_small_files_that_are_damaged_or_of_another_shape_do_not_end_a_conversion(tmp_path, capsys):
    shapes = {
        0: {"caption": "A dog"},
        1: ["A cat"],
        2: '{"cap',
        3: {"url": "u"},
        4: {},
        5: {"caption": {"en": 1}},
    }
    for number, content in shapes.items():
        put(tmp_path / f"00000/{number}.jpg")
        put(tmp_path / f"00000/{number}.json", content)
    put(tmp_path / "00000/3.txt", "A hen")
    (tmp_path / "00000/4.txt").write_bytes("Ein Bär".encode("latin-1"))
    prepare("img2dataset", tmp_path)
    assert [text for _, text in pairs(tmp_path / "pairs.json", tmp_path)] == ["A dog", "A hen"]
    found = numbers(capsys.readouterr().out)
    assert found["downloads whose .json is damaged or holds no object"] == 2
    assert found["captions that are no text but bytes that are not UTF-8"] == 1
    assert found["captions that are no text but objects"] == 1


@pytest.mark.parametrize(
    ("statistics", "number", "what"),
    [
        ({"count": 3}, 2, "URLs not downloaded, no cause recorded"),
        ({"count": 3, "status_dict": [1]}, 2, "URLs not downloaded, no cause recorded"),
        ({"count": 3, "status_dict": {"success": 1, "timed out\n": 2}}, 2, "URLs not downloaded: timed out"),
        (
            ["count"],
            1,
            "files of statistics that are none of img2dataset's, so that failed URLs are not counted",
        ),
        ("{", 1, "files of statistics that are none of img2dataset's, so that failed URLs are not counted"),
    ],
)
def test_statistics_of_other_versions(tmp_path, capsys, statistics, number, what):
    put(tmp_path / "00000/0.jpg")
    put(tmp_path / "00000/0.txt", "A dog")
    put(tmp_path / "00000_stats.json", statistics)
    prepare("img2dataset", tmp_path)
    assert len(load(tmp_path / "pairs.json")) == 1
    assert numbers(capsys.readouterr().out)[what] == number


def test_downloads_without_captions_name_img2dataset_s_flag(tmp_path, capsys):
    put(tmp_path / "00000/0.jpg")
    put(tmp_path / "00000/0.json", {"url": "u", "key": "0"})
    with pytest.raises(UserError, match="everything was left out"):
        prepare("img2dataset", tmp_path)
    assert "--caption_col names their column: download again with it" in capsys.readouterr().out


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_layout_webdataset_is_named_for_train_file(tmp_path):
    folder = tmp_path / "cc3m/train"
    for number in (0, 1, 3):
        members = {"000000.jpg": b"x", "000000.json": b"{}", "000000.txt": b"A dog"} if number else {}
        write_tar(folder / f"{number:05}.tar", members)
        put(folder / f"{number:05}_stats.json", {"count": 1, "successes": 1, "status_dict": {"success": 1}})
    named = f"train_file: ['{folder}/{{00000..00001}}.tar', '{folder}/00003.tar']"
    with pytest.raises(UserError, match=re.escape(f"nothing to convert. In the config: {named}")):
        prepare("img2dataset", tmp_path, "--folder", "cc3m/train")
    put(tmp_path / "cc3m/val/00000/0.jpg")
    put(tmp_path / "cc3m/val/00000/0.txt", "A cat")
    with pytest.raises(UserError, match=re.escape(named)):
        prepare("cc3m", tmp_path)
    assert len(load(tmp_path / "cc3m_val.json")) == 1 and not (tmp_path / "cc3m_train.json").exists()
    write_tar(folder / "00001.tar", {"000000.jpg": b"x", "000000.json": b"{}"})
    with pytest.raises(UserError, match=r"\(layout webdataset\) without captions. .*--caption_col"):
        prepare("img2dataset", tmp_path, "--folder", "cc3m/train")
    write_tar(folder / "00001.tar", {"000000.jpg": b"x", "000000.json": b'{"caption": "A dog"}'})
    with pytest.raises(UserError, match="nothing to convert"):
        prepare("img2dataset", tmp_path, "--folder", "cc3m/train")
    put(tmp_path / "tf/00000.tfrecord")
    with pytest.raises(UserError, match="layout tfrecord is not read"):
        prepare("img2dataset", tmp_path, "--folder", "tf")


def test_layout_parquet_becomes_shards(tmp_path, capsys):
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "JPEG")
    rows = [
        {"url": "u", "caption": ["A dog", "One dog"], "status": "success", "jpg": image.getvalue()},
        {"url": "u", "caption": ["A cat"], "status": "success", "jpg": image.getvalue()},
        {"url": "u", "caption": ["A hen"], "status": "failed_to_download", "error_message": "timed out"},
        {"url": "u", "caption": ["A cow"], "status": "success", "jpg": b""},
        {"url": "u", "caption": None, "status": "success", "jpg": image.getvalue()},
    ]
    rows = [{"error_message": None, "jpg": None, **row, "key": f"{n:09}"} for n, row in enumerate(rows)]
    (tmp_path / "got").mkdir()
    for number in range(2):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"got/{number:05}.parquet")
    put(tmp_path / "got/00002_stats.json", {"count": 0})  # of a shard that was stopped before its table
    prepare("img2dataset", tmp_path, "--folder", "got", "--name", "web")
    printed = capsys.readouterr().out
    found = numbers(printed)
    assert found["web: URLs"] == 10 and found["web: pairs with an image"] == 4
    assert found["URLs not downloaded: timed out"] == found["downloads that are empty files"] == 2
    assert found["pairs without a caption"] == 2
    named = f"{tmp_path}/web_shards/{{00000..00001}}.tar"
    assert f"in the config: train_file: '{named}'" in printed
    entries = read_sets([named])
    assert [entries[n]["text"] for n in range(4)] == [["A dog", "One dog"], "A cat"] * 2
    assert load_image(entries[3]["images"][0]).size == (8, 8)
    assert load(tmp_path / "web_shards/00001_stats.json")["successes"] == 2


def test_conceptual_captions_from_img2dataset(tmp_path, capsys):
    download(tmp_path / "cc3m/train", with_tables=True)
    prepare("cc3m", tmp_path)
    assert len(load(tmp_path / "cc3m_train.json")) == 2
    found = numbers(capsys.readouterr().out)
    assert found["cc3m_train: URLs"] == 10 and found["downloads that are empty files"] == 2


def test_tables_without_captions_or_pyarrow_are_errors(tmp_path, monkeypatch):
    download(tmp_path, with_tables=True)
    table = parquet.read_table(tmp_path / "00001.parquet").drop_columns("caption")
    parquet.write_table(table, tmp_path / "00001.parquet")
    with pytest.raises(
        UserError, match=r"00001.parquet has no column 'caption'; it has url, key, .*--caption_col names"
    ):
        prepare("img2dataset", tmp_path)
    (tmp_path / "00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"00001.parquet cannot be read .*; download or unpack it again"):
        prepare("img2dataset", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"parquet needs pyarrow: pip install pyarrow"):
        prepare("img2dataset", tmp_path)
    assert not (tmp_path / "pairs.json").exists()


# ---- tables that hold the images ----


def picture(kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 6), "teal").save(content, kind)
    return content.getvalue()


def put_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def test_hugging_face_s_own_tables_become_shards(tmp_path, capsys):
    """The last row of each has no image."""
    (tmp_path / "saved/train").mkdir(parents=True)
    shutil.copy(EXCERPTS / "train-00000-of-00001.parquet", tmp_path)
    shutil.copy(EXCERPTS / "data-00000-of-00001.arrow", tmp_path / "saved/train")
    prepare("huggingface", tmp_path, "--table", "train-*.parquet", "saved/train/*.arrow", "--name", "hf")
    printed = capsys.readouterr().out
    assert numbers(printed)["rows"] == 8 and numbers(printed)["rows without an image"] == 2
    assert "first: train-00000-of-00001.parquet row 3, data-00000-of-00001.arrow row 3" in printed
    named = f"{tmp_path}/hf_shards/{{00000..00001}}.tar"
    assert f"in the config: train_file: '{named}'" in printed
    assert numbers(printed)["tables with a column split, all of whose rows are taken without --only"] == 2
    entries = read_sets([named])
    texts = [["A red card.", "Red."], "A blue card.", "Dark."]
    assert [entries[n]["text"] for n in range(len(entries))] == texts * 2
    corners = [load_image(entries[n]["images"][0]).getpixel((0, 0)) for n in range(len(entries))]
    assert corners == [(254, 0, 0), (0, 0, 255), (0, 0, 0)] * 2
    with tarfile.open(tmp_path / "hf_shards/00000.tar") as tar:
        kinds = [member.name for member in tar]
        kept = tar.extractfile("000000000.jpg").read()
    row = parquet.read_table(tmp_path / "train-00000-of-00001.parquet").to_pylist()[0]
    assert kept == row["image"]["bytes"]
    assert kinds == [
        f"00000000{number}.{kind}"
        for number, pair in enumerate((("jpg", "json"), ("png", "txt"), ("png", "txt")))
        for kind in pair
    ]


def test_rows_without_a_readable_image_or_caption_are_counted_and_named(tmp_path, capsys):
    """Captions are in several columns, as in some sets of the hub."""
    rows = [
        {"image": {"bytes": picture("GIF"), "path": "0.gif"}, "caption_0": "A sea.", "caption_1": "Sea."},
        {"image": {"bytes": None, "path": "photos/1.jpg"}, "caption_0": "Gone.", "caption_1": None},
        {"image": {"bytes": b"", "path": None}, "caption_0": "Empty.", "caption_1": None},
        {"image": {"bytes": picture()[:-200], "path": "3.jpg"}, "caption_0": "Half.", "caption_1": None},
        {"image": {"bytes": b"<html>", "path": "4.jpg"}, "caption_0": "Page.", "caption_1": None},
        {"image": {"bytes": picture(), "path": "5.jpg"}, "caption_0": None, "caption_1": " "},
        {"image": {"bytes": picture(), "path": "6.jpg"}, "caption_0": None, "caption_1": "A cat."},
        {"image": {"bytes": None, "path": "photos/7.jpg"}, "caption_0": "A hen.", "caption_1": "Hen."},
    ]
    put(tmp_path / "photos/7.jpg", "").write_bytes(picture())
    put_table(tmp_path / "test.parquet", rows)
    columns = ("--caption", "caption_0", "caption_1")
    prepare("huggingface", tmp_path, "--table", "test.parquet", *columns)
    printed = capsys.readouterr().out
    found = numbers(printed)
    assert found["rows"] == 8 and found["rows without an image"] == 1
    assert "rows whose image is bad: no such file; first: test.parquet row 1 (photos/1.jpg)\n" in printed
    assert found["rows whose image is bad: truncated"] == found["rows whose image is bad: not an image"] == 1
    assert found["pairs without a caption"] == 6
    entries = read_sets([f"{tmp_path}/pairs_shards/00000.tar"])
    assert [entries[n]["text"] for n in range(len(entries))] == [
        ["A sea.", "Sea."],
        "A cat.",
        ["A hen.", "Hen."],
    ]
    assert [load_image(entries[n]["images"][0]).size for n in (0, 2)] == [(8, 6)] * 2


def test_rows_of_some_splits_alone(tmp_path, capsys):
    rows = [{"image": picture(), "text": split, "split": split} for split in ("train", "test", "restval")]
    put_table(tmp_path / "a.parquet", rows)
    prepare("huggingface", tmp_path, "--table", "a.parquet", "--only", "train", "restval")
    entries = read_sets([f"{tmp_path}/pairs_shards/00000.tar"])
    assert [entries[n]["text"] for n in range(len(entries))] == ["train", "restval"]
    printed = capsys.readouterr().out
    assert "1  rows of split 'test'; first: a.parquet row 1" in printed and "noticed" not in printed
    put_table(tmp_path / "b.parquet", [{"image": picture(), "text": "x"}])
    before = (tmp_path / "pairs_shards/00000.tar").read_bytes()
    with pytest.raises(UserError, match=r"--only: .*b.parquet has no column 'split'; it has image, text"):
        prepare("huggingface", tmp_path, "--table", "a.parquet", "b.parquet", "--only", "test")
    assert (tmp_path / "pairs_shards/00000.tar").read_bytes() == before


def test_splits_may_be_numbers(tmp_path):
    put_table(tmp_path / "a.parquet", [{"image": picture(), "text": f"x{n}", "split": n} for n in range(2)])
    prepare("huggingface", tmp_path, "--table", "a.parquet", "--only", "1")
    entries = read_sets([f"{tmp_path}/pairs_shards/00000.tar"])
    assert len(entries) == 1 and entries[0]["text"] == "x1"


def test_shards_of_one_set_are_not_those_of_another(tmp_path):
    rows = [{"image": picture(), "text": split, "Split": split} for split in ("train", "test")]
    put_table(tmp_path / "a.parquet", rows)
    with pytest.raises(UserError, match="no image with a caption"):
        prepare("huggingface", tmp_path, "--table", "a.parquet", "--only", "Train")
    assert not list((tmp_path / "pairs_shards").iterdir())
    for _ in range(2):
        prepare("huggingface", tmp_path, "--table", "a.parquet", "--only", "train")
    before = {path.name: path.read_bytes() for path in (tmp_path / "pairs_shards").iterdir()}
    message = r"pairs_shards has shards with other only, see shards.json; choose a new --name or delete it"
    with pytest.raises(UserError, match=message):
        prepare("huggingface", tmp_path, "--table", "a.parquet", "--only", "Train")
    put_table(tmp_path / "b.parquet", rows[:1])
    with pytest.raises(UserError, match="has shards with other tables, only"):
        prepare("huggingface", tmp_path, "--table", "b.parquet")
    assert {path.name: path.read_bytes() for path in (tmp_path / "pairs_shards").iterdir()} == before
    (tmp_path / "pairs_shards/shards.json").unlink()  # shards of whatever
    with pytest.raises(UserError, match="has shards with other tables, only"):
        prepare("huggingface", tmp_path, "--table", "a.parquet", "--only", "train")


def test_the_only_column_of_bytes_holds_the_images(tmp_path):
    put_table(tmp_path / "a.parquet", [{"content": picture(), "text": "A sea."}])
    prepare("huggingface", tmp_path, "--table", "a.parquet")
    entries = read_sets([f"{tmp_path}/pairs_shards/00000.tar"])
    assert len(entries) == 1 and entries[0]["text"] == "A sea."


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        (
            {"image": "a.jpg", "text": "x"},
            [],
            r"no column of images, .* but image \(string\), text .*prepare t",
        ),
        (
            {"left": b"x", "right": b"x", "text": "x"},
            [],
            r"no column named image, .*'left', 'right'.* --image",
        ),
        ({"image": b"x", "text": "x"}, ["--image", "text"], "no column 'text'; it has 'image'"),
        ({"image": b"x", "answer": ["x"]}, [], r"no column named caption, .*Name the right one by --caption"),
        ({"image": b"x", "text": "x"}, ["--caption", "raw"], "no column 'raw'; it has 'image', 'text'"),
        ({"image": b"x", "text": "x"}, [], "no image with a caption in the tables, for the causes above"),
    ],
)
def test_tables_without_images_or_captions_are_errors(tmp_path, row, flags, message):
    put_table(tmp_path / "a.parquet", [row])
    with pytest.raises(UserError, match=message):
        prepare("huggingface", tmp_path, "--table", "a.parquet", *flags)


def test_tables_of_other_kinds_are_errors(own):
    shutil.copy(EXCERPTS / "train-00000-of-00001.parquet", own / "a.parquet")
    with pytest.raises(UserError, match="prepare huggingface reads tables that hold the images"):
        prepare("table", own, "--table", "a.parquet", "--images", "photos")
    put(own / "t.csv", "image,caption\n")
    with pytest.raises(UserError, match=r"t.csv: must end in .arrow or .parquet"):
        prepare("huggingface", own, "--table", "t.csv")
    put(own / "t.arrow", "ARROW1")
    with pytest.raises(UserError, match=r"t.arrow cannot be read \(.*\); download or unpack it again"):
        prepare("huggingface", own, "--table", "t.arrow")


# ---- own tables ----


ROWS = [
    ("a.jpg", 'A "dog", sitting'),
    ("sub/b.jpg", "A cat"),
    ("a.jpg", "Dog"),
    ("gone.jpg", "x"),
    ("a.jpg", " "),
]
QUOTED = [(image, '"' + caption.replace('"', '""') + '"') for image, caption in ROWS]


def write_parquet(path: Path, image: str = "image", caption: str = "caption") -> None:
    parquet.write_table(pa.Table.from_pylist([{"n": 1, image: i, caption: c} for i, c in ROWS]), path)


TABLES: dict[str, Callable[[Path], object]] = {
    "t.csv": lambda path: put(path, "\ufeffimage,caption\r\n" + "".join(f"{i},{c}\r\n" for i, c in QUOTED)),
    "t.tsv": lambda path: put(path, "Text\tfile_name\r\n" + "".join(f"{c}\t{i}\r\n" for i, c in ROWS)),
    "t.jsonl": lambda path: put(
        path, "\n\n".join(json.dumps({"id": 1, "path": i, "caption": [c]}) for i, c in ROWS)
    ),
    "t.parquet": write_parquet,
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for name in ("a.jpg", "sub/b.jpg"):
        put(tmp_path / "photos" / name)
    return tmp_path


@pytest.mark.parametrize("table", TABLES)
def test_own_tables(own, capsys, table):
    TABLES[table](own / table)
    prepare("table", own, "--table", table, "--images", "photos", "--name", "mine")
    assert pairs(own / "mine.json", own) == [(f"photos/{image}", caption) for image, caption in ROWS[:3]]
    printed = capsys.readouterr().out
    found = numbers(printed)
    assert found["captions in the table"] == 5 and found["pairs without a caption"] == 1
    assert found["captions whose image cannot be found (No such file or directory)"] == 1
    assert f"first: {own}/photos/gone.jpg" in printed


def test_without_images_all_rows_of_a_table_are_kept(own, capsys):
    TABLES["t.csv"](own / "t.csv")
    prepare("table", own, "--table", "t.csv", "--images", "photos", "--without_images")
    images = [str(Path(entry["image"]).relative_to(own)) for entry in load(own / "pairs.json")]
    assert images == ["photos/a.jpg", "photos/sub/b.jpg", "photos/a.jpg", "photos/gone.jpg"]
    found = numbers(capsys.readouterr().out)
    missing = "captions whose image cannot be found (No such file or directory), kept by --without_images"
    assert found[missing] == 1


def test_in_tsv_a_row_is_a_line_and_quotation_marks_that_part_nothing_are_letters(own, capsys):
    captions = ['"Big dog', "a cat", 'the sign says "', '"a" and "b"', " spaced "]
    put(
        own / "t.tsv",
        "\ufeffimage\tcaption\n" + "".join(f"a.jpg\t{c}\n" for c in captions) + "\na.jpg\tx\ty\n",
    )
    prepare("table", own, "--table", "t.tsv", "--images", "photos")
    assert [text for _, text in pairs(own / "pairs.json", own)] == [*captions[:4], "spaced"]
    assert numbers(capsys.readouterr().out)["captions in the table"] == 6


@pytest.mark.parametrize(("name", "separator"), [("t.tsv", "\t"), ("t.csv", "|"), ("t.txt", ";")])
def test_cells_that_pandas_or_r_have_quoted(own, capsys, name, separator):
    rows = [
        ('"image"', '"caption, German"'),
        ('"a.jpg"', '"a ""big"" dog"'),
        ("a.jpg", '"[""A dog"", ""it\'s one""]"'),
    ]
    put(own / name, "\n".join(map(separator.join, rows)))
    prepare("table", own, "--table", name, "--images", "photos", "--caption", "caption, German")
    texts = [text for _, text in pairs(own / "pairs.json", own)]
    assert texts == ['a "big" dog', "A dog", "it's one"]
    assert "left out: nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows",
    [
        'image\tcaption\na.jpg\tone\na.jpg\t"A dog\nruns"\n',
        "image\tcaption\na.jpg\tone\na.jpg\t\"['A dog'\n 'runs']\"\n",
        'caption\timage\none\ta.jpg\n"A dog\nruns"\ta.jpg\n',
    ],
)
def test_in_tsv_a_quoted_cell_with_the_end_of_a_line_is_an_error(own, rows):
    put(own / "t.tsv", rows)
    message = r"t.tsv, line 3: a cell begins with a quotation mark that does not end .* no cell may hold"
    with pytest.raises(UserError, match=message):
        prepare("table", own, "--table", "t.tsv", "--images", "photos")
    assert not (own / "pairs.json").exists()


def test_in_csv_a_cell_may_go_over_some_lines(own, caplog):
    """So pandas writes captions of COCO, some of which end with the end of a line."""
    caplog.set_level("INFO")
    captions = ["A dog", "A dog\n", 'A "big" dog,\nwhich runs\r\nfast', "A cat"]
    with (own / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *(("a.jpg", text) for text in captions)])
    prepare("table", own, "--table", "t.csv", "--images", "photos")
    texts = [text for _, text in pairs(own / "pairs.json", own)]
    assert texts == ["A dog", "A dog", 'A "big" dog, which runs fast', "A cat"]
    (line,) = (line for line in caplog.text.splitlines() if "several lines" in line)
    assert "rows that go over several lines: 2; the first: " in line and line.endswith("t.csv, line 3")


@pytest.mark.parametrize(
    "rows",
    ['a.jpg,"A dog\n' + "a.jpg,A cat\n" * 9, 'a.jpg,"A dog\nb,c",d\n', 'a.jpg,"A dog\na.jpg,"A cat"\n'],
)
def test_a_mark_left_open_in_csv_makes_no_caption_of_many_rows(own, rows):
    put(own / "t.csv", f"image,caption\n{rows}")
    with pytest.raises(
        UserError, match=r"t.csv, line 2 cannot be read as a row of csv .* within a few lines"
    ):
        prepare("table", own, "--table", "t.csv", "--images", "photos")
    assert not (own / "pairs.json").exists()


def test_captions_in_several_columns(own, capsys):
    rows = ["image,caption_0,caption_1", "a.jpg,A dog,One dog", "a.jpg,A cat,", "a.jpg,A hen", "b.jpg,x,y,z"]
    put(own / "t.csv", "\n".join(rows))
    columns = "--caption", "caption_0", "caption_1"
    prepare("table", own, "--table", "t.csv", "--images", "photos", *columns)
    texts = [text for _, text in pairs(own / "pairs.json", own)]
    assert texts == ["A dog", "One dog", "A cat", "A hen"]
    found = numbers(capsys.readouterr().out)
    assert found["captions in the table"] == 8 and found["pairs without a caption"] == 1
    assert found["captions of rows with a cell that is null, missing or one too many"] == 3


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("['a dog runs', 'one dog']", ["a dog runs", "one dog"]),
        ('["a dog", "caf\\u00e9 \\ud83d\\ude00"]', ["a dog", "café \U0001f600"]),
        ("""[u'a dog', "the dog's", 'say \\'hi\\'',]""", ["a dog", "the dog's", "say 'hi'"]),
        ("['a dog' 'one dog'\n 'dogs']", ["a dog", "one dog", "dogs"]),  # as numpy prints an array
        (" ['a'] ", ["a"]),
        ("[]", []),
        ("['', 'a']", ["a"]),
        ('["a", 1]', ['["a", 1]']),
        ("[1, 2]", ["[1, 2]"]),
        ("['a', x]", ["['a', x]"]),
        ("['a' + 'b']", ["['a' + 'b']"]),
        ("[not a list", ["[not a list"]),
        ("[a dog]", ["[a dog]"]),
        ("(see left) a dog", ["(see left) a dog"]),
        ("-- ... --", []),
        ("\u200b\ufeff", []),
        *((null, []) for null in ("NA", "nan", "None", "NULL", r"\N", " NaN ")),
        ("None of them", ["None of them"]),
        (b"\xef\xbb\xbfa dog", ["a dog"]),
        ("['\\x']", ["['\\x']"]),
        ("[" * 100_000 + "]", ["[" * 100_000 + "]"]),
        (b"caf\xc3\xa9", ["café"]),
        ([b"a", ["b", None], float("nan"), 3, True, "c"], ["a", "b", "c"]),
        (b"\xe9", []),
        ({"en": "a"}, []),
        (None, []),
    ],
)
def test_captions_in_a_cell(cell, captions):
    assert list(captions_in(cell, "here", Report("a"))) == captions


def test_a_list_written_as_text_is_several_captions_and_said(own, capsys):
    put(
        own / "t.csv",
        """image,caption\na.jpg,"['A dog', 'one dog']"\na.jpg,[sic] a cat\ngone.jpg,"[""x"", ""y""]"\n""",
    )
    prepare("table", own, "--table", "t.csv", "--images", "photos")
    assert [text for _, text in pairs(own / "pairs.json", own)] == ["A dog", "one dog", "[sic] a cat"]
    printed = capsys.readouterr().out
    found = numbers(printed)
    assert found["lists written as text, read as several captions"] == 2 and "t.csv, line 4" in printed
    assert found["captions in the table"] == 5


def test_a_list_that_is_not_of_strings_alone_stays_a_text_and_is_said(own, capsys):
    put(own / "t.csv", """image,caption\na.jpg,"['A dog', nan]"\na.jpg,[sic] a cat\na.jpg,"[""x"", 1]"\n""")
    prepare("table", own, "--table", "t.csv", "--images", "photos")
    assert len(load(own / "pairs.json")) == 3
    what = "captions in square brackets that are no list of strings, read as text"
    assert numbers(capsys.readouterr().out)[what] == 2


def test_captions_of_tables_that_are_no_text_are_counted(own, capsys):
    captions = ["A dog", 3, 2.5, float("nan"), {"en": "x"}, ["One dog", None, 4], True]
    put(own / "t.jsonl", "\n".join(json.dumps({"image": "a.jpg", "caption": c}) for c in captions))
    prepare("table", own, "--table", "t.jsonl", "--images", "photos", "--name", "lines")
    assert [text for _, text in pairs(own / "lines.json", own)] == ["A dog", "One dog"]
    found = numbers(capsys.readouterr().out)
    assert found["captions in the table"] == 9 and found["captions that are no text but numbers"] == 3
    assert (
        found["captions that are no text but objects"]
        == found["captions that are no text but truth values"]
        == 1
    )
    assert found["pairs without a caption"] == 2
    table = pa.table(
        {"image": ["a.jpg"] * 2, "caption": pa.array([[b"A dog", b"\xe9"], []], pa.list_(pa.binary()))}
    )
    parquet.write_table(table, own / "t.parquet")
    prepare("table", own, "--table", "t.parquet", "--images", "photos", "--name", "bytes")
    assert [text for _, text in pairs(own / "bytes.json", own)] == ["A dog"]
    parquet.write_table(pa.table({"image": [b"\xff\xd8"], "caption": ["x"]}), own / "t.parquet")
    with pytest.raises(
        UserError, match=r"row 0: column 'image' must hold the path .* tables that hold the images"
    ):
        prepare("table", own, "--table", "t.parquet", "--images", "photos")


def test_columns_by_flag_and_several_tables(own):
    for name in ("part-0.parquet", "part-1.parquet"):
        write_parquet(own / name, "picture", "says")
    flags = ["--image", "picture", "--caption", "says", "--images", "photos", "--relative"]
    prepare("table", own, "--table", "part-*.parquet", *flags)
    assert [entry["image"] for entry in load(own / "pairs.json")] == [
        "photos/a.jpg",
        "photos/sub/b.jpg",
        "photos/a.jpg",
    ] * 2
    with pytest.raises(
        UserError, match=r"part-0.parquet has no column 'name'; it has 'n', 'picture', 'says'"
    ):
        prepare("table", own, "--table", "part-*.parquet", "--image", "name")
    with pytest.raises(UserError, match=r"no column named image, .*Name the right one by --image"):
        prepare("table", own, "--table", "part-*.parquet")
    with pytest.raises(UserError, match=r"--table x-\*.csv: no such file"):
        prepare("table", own, "--table", "x-*.csv")


def test_own_retrieval_files(own):
    TABLES["t.csv"](own / "t.csv")
    for split, task in (("train", "retrieval_train"), ("test", "retrieval_test")):
        prepare("table", own, "--table", "t.csv", "--images", "photos", "--task", task, "--name", "mine")
        assert list(read_annotations(str(own / f"mine_{split}.json"), RETRIEVAL[split]))
    a, b = (str(own / "photos" / name) for name in ("a.jpg", "sub/b.jpg"))
    assert load(own / "mine_train.json")[2] == {"image": a, "caption": "Dog", "image_id": a}
    assert load(own / "mine_test.json") == [
        {"image": a, "caption": ['A "dog", sitting', "Dog"]},
        {"image": b, "caption": ["A cat"]},
    ]


def test_rows_of_another_length_are_left_out_and_counted(own, capsys):
    put(own / "photos/t.csv", "image,caption\na.jpg,A dog, sitting\na.jpg\na.jpg,Dog\n")
    prepare("table", own / "photos", "--table", "t.csv")
    assert [text for _, text in pairs(own / "photos/pairs.json", own)] == ["Dog"]
    printed = capsys.readouterr().out
    assert numbers(printed)["captions of rows with a cell that is null, missing or one too many"] == 2
    assert "t.csv, line 2" in printed


def test_nulls_empty_lists_and_names_that_no_file_has_are_counted(own, capsys):
    rows = [("a.jpg", None), ("a.jpg", []), ("a\0.jpg", "x"), ("\ud83d.jpg", "y"), ("a.jpg", ["Dog"])]
    put(own / "t.jsonl", "\n".join(json.dumps({"image": i, "caption": c}) for i, c in rows))
    prepare("table", own, "--table", "t.jsonl", "--images", "photos")
    assert pairs(own / "pairs.json", own) == [("photos/a.jpg", "Dog")]
    found = numbers(capsys.readouterr().out)
    assert found["captions in the table"] == 5 and found["pairs without a caption"] == 1
    assert found["captions of rows with a cell that is null, missing or one too many"] == 1
    assert found["captions whose image has no name that a file can have"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"image,caption\na.jpg,caf\xe9\n", r"t.csv, line 2 cannot be read as UTF-8"),
        ("t.csv", b'image,caption\na.jpg,"open\n', r"t.csv, line 2 cannot be read as a row of csv \(unexp"),
        ("t.csv", b'image,caption\na.jpg,"open\nb.jpg,x\nc.jpg,says ""\n', r"t.csv, line 2 cannot be read"),
        ("t.csv", b'image,caption\na.jpg,x\nb.jpg,"two\nlines\n', r"line 3 .*end within a few lines"),
        ("t.csv", b'image,caption\nb.jpg,"two\nl\xe9nes\n"\n', r"line 2 .*end within a few lines"),
        ("t.csv", b"image,caption\na.jpg,x\tb.jpg\n", r"t.csv, line 2: a cell holds a tab, and no column"),
        ("t.csv", b"image:caption\na.jpg:x\n", r"it has 'image:caption'.* in .csv commas part the cells"),
        ("t.csv", b"image,caption,caption\na.jpg,x,y\n", r"line 1: two columns are named 'caption'"),
        ("t.csv", b"a;b (c, d)\na.jpg;x\n", r"it has 'a;b \(c', 'd\)'.* a name that holds one must stand in"),
        ("t.tsv", "image\tcaption\na.jpg\tx\n".encode("utf-16"), r"t.tsv is text in UTF-16 or UTF-32; save"),
        ("t.csv", b"<html><body>404</body></html>", r"t.csv is a web page"),
        ("t.csv", b"version https://git-lfs.github.com/spec/v1\n", r"t.csv is a pointer of Git LFS"),
        ("t.jsonl", b"\x1f\x8b\x08", r"t.jsonl is compressed by gzip"),
        ("t.csv", b"", r"t.csv is empty"),
        ("t.csv", b"image\tcaption\na.jpg\tx, y\n", r"'image\\tcaption'\..* in .tsv tabs do"),
        ("t.tsv", b"image\tcaption\ra.jpg\tx\r", r"t.tsv, line 1 holds carriage returns"),
        ("t.csv", b"image,caption\ra.jpg,x\r", r"t.csv, line 1 holds carriage returns"),
        ("t.tsv.gz", b"", r"t.tsv.gz: must end in .*; unpack a packed table"),
        ("t.jsonl", b'{"image": "a.jpg", "caption": "x"}\n{"image"', r"t.jsonl, line 2 is not valid JSON"),
        ("t.jsonl", b"[1]", r"t.jsonl, line 1 must be an object, found \[1\]"),
        (
            "t.jsonl",
            b'{"image": 3, "caption": "x"}',
            r"line 1: column 'image' must hold the path of an image",
        ),
        ("t.xlsx", b"", r"t.xlsx: must end in .csv, .tsv, .jsonl, .parquet, .txt"),
    ],
)
def test_tables_that_cannot_be_used_are_errors(own, name, content, message):
    (own / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare("table", own, "--table", name, "--images", "photos")
    assert not (own / "pairs.json").exists()
