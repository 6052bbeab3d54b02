"""The index of images: in memory or memory-mapped the same results; what is out of date is refused."""

import argparse
import errno
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from api_data import make_checkpoints
from PIL import Image, ImageFile

import simla
from inference import folders
from inference.folders import list_images
from inference.index import build_index
from utils import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def model(tiny):
    return simla.load(tiny.checkpoints["retrieval"], "cpu")


@pytest.fixture
def photos(tiny, tmp_path):
    """A folder of seven images, one in a subfolder, beside a file that is none."""
    folder = tmp_path / "photos"
    shutil.copytree(tiny.data / "images" / "test", folder)
    (folder / "more").mkdir()
    (folder / "00003.jpg").rename(folder / "more" / "x.JPG")
    (folder / "notes.txt").write_text("no image")
    (folder / "album.jpg").mkdir()  # no image either, whatever it is called
    return folder


QUERIES = ["two dogs on a beach", "a cup"]


@pytest.mark.parametrize(
    ("dtype", "stored"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_memory_and_disk_find_the_same(tiny, photos, tmp_path, dtype, stored):
    model = simla.load(tiny.checkpoints["retrieval"], "cpu", dtype)
    in_memory = model.search(photos, QUERIES, top=7)
    written = model.index(photos, tmp_path / "photos.index")
    opened = model.open_index(tmp_path / "photos.index")
    assert opened.states.dtype == written.states.dtype == stored
    assert len(opened) == 7 and opened.files == written.files
    assert str(photos / "more" / "x.JPG") in opened.files
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "photos.index"}  # no temporary folder
    assert in_memory == model.search(written, QUERIES, top=7) == model.search(opened, QUERIES, top=7)
    assert isinstance(np.load(tmp_path / "photos.index" / "states.npy", mmap_mode="r"), np.memmap)
    reopened = simla.load(tiny.checkpoints["retrieval"], "cpu", dtype).open_index(tmp_path / "photos.index")
    assert torch.equal(reopened.states, opened.states)


def test_files_that_cannot_be_read_are_left_out_and_named(model, photos, tmp_path, caplog):
    (photos / "00000.jpg").write_bytes(b"no jpeg")
    (photos / "00005.jpg").write_bytes(b"")
    for folder in (None, tmp_path / "photos.index"):
        index = model.index(photos, folder)
        found = {file.removeprefix(f"{photos}/"): cause for file, cause in index.unreadable.items()}
        assert found == {"00000.jpg": "not an image", "00005.jpg": "empty file"}
        assert len(index) == len(index.features) == len(index.states) == 5
    assert str(photos / "00000.jpg") in caplog.text
    opened = model.open_index(tmp_path / "photos.index")
    assert opened.unreadable == index.unreadable and opened.folder == index.folder == str(photos)
    # rows and names go together
    torch.testing.assert_close(opened.features, model.encode_image(opened.files))
    with pytest.raises(UserError, match=r"none of 2 images can be read, the first: .*\(not an image\)"):
        model.index([photos / "00000.jpg", photos / "00005.jpg"])


def test_what_can_be_read_is_searched_whatever_it_is_called(model, photos, tmp_path):
    image = Image.open(photos / "00001.jpg")
    for name in ("a.JFIF", "b.avif", "c", "d.txt", ".e", "f.jp2", "g.tga", "h.ico"):
        kind = {"b.avif": "AVIF", "f.jp2": "JPEG2000", "g.tga": "TGA", "h.ico": "ICO"}.get(name, "JPEG")
        image.save(photos / name, kind)
    image.save(photos / "i", "PNG", icc_profile=bytes(2_000_000))
    before = {str(path) for path in photos.rglob("*") if path.is_file()}
    (photos / "text.jpg").write_text("no image", encoding="utf-8")
    (photos / "film.mpg").write_bytes(b"\0\0\1\xb3" + bytes(range(256)) * 8)  # PIL takes it for an image
    (photos / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(300))
    (photos / "empty").touch()
    (photos / "more" / "table.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    index = model.index(photos, tmp_path / "index")
    assert set(index.files) == before - {str(photos / "notes.txt")}
    assert index.unreadable == {str(photos / "text.jpg"): "not an image"}
    endings = (".txt", ".mpg", ".mp4", "other endings", ".csv")
    assert index.passed_over == {f"files that are no images ({ending})": 1 for ending in endings}
    opened = model.open_index(tmp_path / "index")
    assert opened.files == index.files and opened.passed_over == index.passed_over
    assert model.search(photos, "a cup", top=99) == model.search(opened, "a cup", top=99)
    image.save(photos / "new", "JPEG")
    with pytest.raises(UserError, match=r"photos/new is new"):
        model.open_index(tmp_path / "index")


def test_links_are_followed_and_each_file_is_taken_once(photos, tmp_path):
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    shutil.copy(photos / "00001.jpg", outside / "o.jpg")
    shutil.copy(photos / "00001.jpg", outside / "deep" / "p")
    before = list_images(photos).files
    for name, target in {
        "a_loop": photos,
        "more/up": photos.parent,  # a folder that the link itself lies in
        "again": photos / "more",
        "0.jpg": photos / "00001.jpg",  # before its file in the order
        "other": outside,
        "other_deep": outside / "deep",
        "other.png": outside / "o.jpg",
        "nowhere.jpg": tmp_path / "gone.jpg",
        "itself": photos / "itself",
        "zero": "/dev/zero",
    }.items():
        (photos / name).symlink_to(target)
    (outside / "back").symlink_to(photos)
    files, passed_over = list_images(photos)
    assert sorted({*before, f"{photos}/other/o.jpg", f"{photos}/other/deep/p"}) == files
    assert passed_over.pop("files that are no images (.txt)") == 1
    assert passed_over == {
        "links to what is there already": 7,
        "links to nothing": 2,
        "pipes, sockets or devices": 1,
    }


def test_pipes_and_sockets_are_not_opened_and_what_is_shut_is_counted(photos, monkeypatch):
    os.mkfifo(photos / "pipe.jpg")
    os.mkfifo(photos / "more" / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(photos)  # such a name must be short
        listener.bind("socket.png")
    for name in ("shut", "more/shut"):
        (photos / name).write_text("x", encoding="utf-8")
    (photos / "closed").mkdir()
    scandir, open_file = os.scandir, Path.open

    def denied(function, names):  # chmod does not bind whoever runs the tests as root
        def call(path, *rest):
            if Path(path).name in names:
                raise PermissionError(errno.EACCES, "Permission denied")
            return function(path, *rest)

        return call

    monkeypatch.setattr(os, "scandir", denied(scandir, {"closed"}))
    monkeypatch.setattr(Path, "open", denied(open_file, {"shut"}))
    files, passed_over = list_images(photos)
    assert len(files) == 7 and passed_over == {
        "pipes, sockets or devices": 3,
        "files that cannot be opened (Permission denied)": 2,
        "folders that cannot be entered (Permission denied)": 1,
        "files that are no images (.txt)": 1,
    }


def test_a_large_folder_shows_progress_and_decodes_nothing(photos, monkeypatch, caplog):
    monkeypatch.setattr(folders, "LOG_FILES", 3)
    monkeypatch.setattr(ImageFile.ImageFile, "load", pytest.fail)
    shutil.copy(photos / "00001.jpg", photos / "noext")
    with caplog.at_level("INFO"):
        assert len(list_images(photos).files) == 8
    assert f"{photos}: 6 files looked at, " in caplog.text


def change(photos):
    Image.new("RGB", (40, 40), "red").save(photos / "00001.jpg")


def touch(photos):
    os.utime(photos / "00001.jpg", ns=(1, 1))


def remove(photos):
    (photos / "00001.jpg").unlink()
    (photos / "00002.jpg").unlink()


def add(photos):
    shutil.copy(photos / "00001.jpg", photos / "more" / "new.png")


def repair(photos):
    shutil.copy(photos / "00001.jpg", photos / "broken.jpg")


def clear(photos):
    shutil.rmtree(photos)
    photos.mkdir()


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (change, r"out of date: .*00001\.jpg has changed; delete it and index again"),
        (touch, r"00001\.jpg has changed"),
        (remove, r"00001\.jpg and 1 more is gone"),
        (add, r"new\.png is new"),
        (repair, r"broken\.jpg has changed"),
        (clear, r"photos.*\.jpg and 7 more is gone"),
    ],
)
def test_an_index_of_other_images_is_refused(model, photos, tmp_path, alter, message):
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    model.index(photos, tmp_path / "index")
    assert len(model.open_index(tmp_path / "index")) == 7
    alter(photos)
    with pytest.raises(UserError, match=message):
        model.open_index(tmp_path / "index")


def test_an_index_of_a_list_is_of_these_files_alone(model, photos, tmp_path):
    model.index([photos / "00001.jpg", photos / "00002.jpg"], tmp_path / "index")
    add(photos)
    remaining = model.open_index(tmp_path / "index")
    assert remaining.folder is None and repr(remaining) == "Index(2 images of a list, 0 unreadable)"
    assert [file.rsplit("/", 1)[1] for file in remaining.files] == ["00001.jpg", "00002.jpg"]


def test_an_index_of_another_model_is_refused(tiny, model, photos, tmp_path):
    index = model.index(photos, tmp_path / "index")
    other = simla.load(tiny.checkpoints["pretrain"], "cpu")
    for use in (lambda: other.open_index(tmp_path / "index"), lambda: other.search(index, "a cup")):
        with pytest.raises(UserError, match="made by another image encoder"):
            use()
    half = simla.load(tiny.checkpoints["retrieval"], "cpu", "bf16")
    with pytest.raises(UserError, match="another precision"):
        half.open_index(tmp_path / "index")


def cut(folder):
    content = (folder / "states.npy").read_bytes()
    (folder / "states.npy").write_bytes(content[: len(content) // 2])


def shorten(folder):
    np.save(folder / "features.npy", np.load(folder / "features.npy")[:3])


def garble(folder):
    (folder / "index.json").write_text("{")


def forget(folder):
    contents = json.loads((folder / "index.json").read_text())
    del contents["made_by"]
    (folder / "index.json").write_text(json.dumps(contents))


def outdate(folder):
    contents = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**contents, "format": 0}))


def lose(folder):
    (folder / "features.npy").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "is damaged"),
        (shorten, "is damaged.*fewer rows than files"),
        (garble, "is damaged"),
        (forget, "is damaged.*made_by"),
        (outdate, "another version"),
        (lose, "no readable index"),
    ],
)
def test_a_damaged_index_is_refused(model, photos, tmp_path, spoil, message):
    model.index(photos, tmp_path / "index")
    spoil(tmp_path / "index")
    with pytest.raises(UserError, match=message):
        model.open_index(tmp_path / "index")


def test_a_folder_that_is_no_index_is_not_to_be_deleted(model, photos):
    for folder in (photos, photos / "none"):
        with pytest.raises(UserError, match=r"holds no index \(index\.json\)") as stop:
            model.open_index(folder)
        assert "delete" not in str(stop.value)


def test_where_no_index_can_be_made(model, photos, tmp_path):
    with pytest.raises(UserError, match="photos is there already"):
        model.index(photos, photos)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"empty holds no image; passed over: 1 files that are no images \(\.txt\)"
    ):
        model.index(tmp_path / "empty")
    with pytest.raises(UserError, match="found an empty list"):
        model.index([])
    with pytest.raises(UserError, match="found a Image"):
        model.index([Image.new("RGB", (8, 8))])
    with pytest.raises(UserError, match="could not be written"):
        model.index(photos, photos / "notes.txt" / "index")
    assert not list(photos.glob(".*"))


def test_an_index_that_has_no_room(model, photos, tmp_path, monkeypatch):
    files, sizes = [photos / "00001.jpg"], (10**6, 10**6, 10**6)  # 4e12 bytes of states for an image
    arguments = {"sizes": sizes, "image_res": 32, "batch_size": 1, "made_by": model.image_side}
    with pytest.raises(UserError, match=r"of 10000 images takes 4e\+07 GB, more than there is of mem"):
        build_index(files * 10_000, None, pytest.fail, **arguments)
    monkeypatch.setattr("shutil.disk_usage", lambda _: argparse.Namespace(free=10**9))
    with pytest.raises(UserError, match=r"takes 4e\+03 GB, 1 GB are free at .*big; choose another disk"):
        build_index(files, tmp_path / "big", pytest.fail, **arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}
