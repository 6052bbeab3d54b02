"""The index of images: in memory or memory-mapped the same results; what is out of date is refused."""

import argparse
import errno
import json
import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from api_data import make_checkpoints
from PIL import Image, ImageFile
from tiny import FORKS

import simla
from simla import folders
from simla.folders import list_images
from simla.index import build_index
from simla.utils import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def model(tiny):
    return simla.load(tiny.checkpoints["retrieval"], "cpu")


@pytest.fixture
def photos(tiny, tmp_path):
    """A folder of seven images, one in a subfolder, two of one size, beside a file that is none."""
    folder = tmp_path / "photos"
    shutil.copytree(tiny.data / "images" / "test", folder)
    for name in ("00001.jpg", "00002.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes().ljust(8000, b"\0"))
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
    assert {path.name.split("-")[0] for path in (tmp_path / "photos.index").iterdir()} == {
        *("index.json", "index.lock", "features", "states")
    }
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


def swap(photos):
    """Each gets the other's content, of the same size, and keeps its time and name."""
    files = [photos / "00001.jpg", photos / "00002.jpg"]
    contents, times = [file.read_bytes() for file in files], [file.stat().st_mtime_ns for file in files]
    for file, content, changed in zip(files, reversed(contents), times, strict=True):
        file.write_bytes(content)
        os.utime(file, ns=(changed, changed))


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
        (change, r"out of date: .*00001\.jpg has changed; update it \(`index` with update=True\)"),
        (swap, r"00001\.jpg and 1 more has changed"),
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


def array(folder, name):
    (file,) = folder.glob(f"{name}-*.npy")
    return file


def cut(folder):
    content = array(folder, "states").read_bytes()
    array(folder, "states").write_bytes(content[: len(content) // 2])


def shorten(folder):
    np.save(array(folder, "features"), np.load(array(folder, "features"))[:3])


def write_features(folder, rows, value):
    np.load(array(folder, "features"), mmap_mode="r+")[rows] = value


def half(folder):
    write_features(folder, slice(3, None), 0)


def spoil(folder):
    write_features(folder, (2, 1), np.nan)


def change_kind(folder):
    np.save(array(folder, "features"), np.load(array(folder, "features")).astype(np.float64))


def forget_rows(folder):
    contents = json.loads((folder / "index.json").read_text())
    contents["files"] += contents["files"]
    (folder / "index.json").write_text(json.dumps(contents))


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
    array(folder, "features").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is damaged"),
        (shorten, "is damaged.*features of another shape or kind"),
        (change_kind, "is damaged.*features of another shape or kind"),
        (half, "is damaged.*features that have not the length 1"),
        (spoil, "is damaged.*features that have not the length 1"),
        (forget_rows, "is damaged.*fewer rows than files"),
        (garble, "is damaged"),
        (forget, "is damaged.*made_by"),
        (outdate, "another version"),
        (lose, "no readable index"),
    ],
)
def test_a_damaged_index_is_refused(model, photos, tmp_path, damage, message):
    model.index(photos, tmp_path / "index")
    damage(tmp_path / "index")
    for use in (
        lambda: model.open_index(tmp_path / "index"),
        lambda: model.index(photos, tmp_path / "index", update=True),
    ):
        with pytest.raises(UserError, match=message):
            use()


def test_states_that_are_not_of_their_features_are_not_ranked(model, photos, tmp_path):
    model.index(photos, tmp_path / "index")
    np.load(array(tmp_path / "index", "states"), mmap_mode="r+")[5:] = 0
    with pytest.raises(UserError, match="is damaged: its states are not of its features"):
        model.search(model.open_index(tmp_path / "index"), "a cup", top=7)


def build_slowly(photos: Path, folder: Path, begun) -> None:
    def encode(pixels):
        begun.set()
        time.sleep(600)

    build_index(photos, folder, encode, (2, 4, 3), 32, 2, {"precision": "fp32"})


def test_one_process_at_a_time_writes_an_index(model, photos, tmp_path):
    begun = FORKS.Event()
    process = FORKS.Process(target=build_slowly, args=(photos, tmp_path / "index", begun))
    process.start()
    try:
        assert begun.wait(120)
        for update in (False, True):
            with pytest.raises(UserError, match=r"another process is writing the index .*index; wait"):
                model.index(photos, tmp_path / "index", update=update)
        with pytest.raises(UserError, match="holds no index"):
            model.open_index(tmp_path / "index")
    finally:
        process.kill()
        process.join()
    index = model.index(photos, tmp_path / "index")  # what is left over of a dead process is no obstacle
    assert len(list((tmp_path / "index").iterdir())) == 4
    assert torch.equal(model.open_index(tmp_path / "index").features, index.features)
    with pytest.raises(UserError, match="index is there already; update it"):
        model.index(photos, tmp_path / "index")


def test_what_was_not_finished_leaves_nothing(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(model.model, "encode_image", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.index(photos, tmp_path / "index")
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


# ---- updates ----


@pytest.fixture
def encoded(model, monkeypatch):
    """The number of images in every batch that is encoded."""
    sizes, encode = [], model.model.encode_image

    def count(pixels):
        sizes.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model.model, "encode_image", count)
    return sizes


def by_file(index):
    return dict(zip(index.files, index.features, strict=True))


def test_an_update_encodes_only_what_is_new(model, photos, tmp_path, encoded, caplog):
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    model.index(photos, tmp_path / "index")
    before = model.open_index(tmp_path / "index")
    kept, search = before.features.clone(), model.search(before, QUERIES, top=7)
    change(photos)
    (photos / "00002.jpg").unlink()
    (photos / "00004.jpg").rename(photos / "renamed.jpg")
    shutil.copy(photos / "more" / "x.JPG", photos / "copy")
    Image.new("RGB", (40, 40), "blue").save(photos / "new.png")
    encoded.clear()
    with caplog.at_level("INFO"):
        updated = model.index(photos, tmp_path / "index", update=True)
    assert encoded == [2]  # the one that has changed, the new one
    assert "6 images are known, 2 are new or changed, 2 are gone" in caplog.text
    opened, fresh = model.open_index(tmp_path / "index"), model.index(photos)
    assert updated.files == opened.files and opened.unreadable == {str(photos / "broken.jpg"): "not an image"}
    assert by_file(opened).keys() == by_file(fresh).keys() == by_file(updated).keys()
    for file, features in by_file(fresh).items():
        torch.testing.assert_close(by_file(opened)[file], features)
    for ours, theirs in zip(
        model.search(opened, QUERIES, top=9), model.search(fresh, QUERIES, top=9), strict=True
    ):
        assert [hit.file for hit in ours] == [hit.file for hit in theirs]
        torch.testing.assert_close([hit.score for hit in ours], [hit.score for hit in theirs])
    assert len(list((tmp_path / "index").iterdir())) == 4
    assert torch.equal(before.features, kept) and search  # whoever has the earlier one open keeps it


def test_an_index_may_be_updated_while_it_is_opened(model, photos, tmp_path, monkeypatch):
    model.index(photos, tmp_path / "index")
    load, files = np.load, []

    def load_late(file, **settings):
        files.append(file)
        if len(files) == 1:  # between index.json and the arrays that it names
            change(photos)
            model.index(photos, tmp_path / "index", update=True)
        return load(file, **settings)

    monkeypatch.setattr(np, "load", load_late)
    opened = model.open_index(tmp_path / "index")
    assert not Path(files[0]).exists()
    torch.testing.assert_close(opened.features, model.encode_image(opened.files))


def test_an_update_of_what_has_not_changed_writes_no_array(model, photos, tmp_path, encoded):
    (photos / "zzz.jpg").write_bytes(b"no jpeg")
    assert len(model.index(photos, tmp_path / "index", update=True)) == 7  # makes it
    arrays = sorted((tmp_path / "index").glob("*.npy"))
    times = [file.stat().st_mtime_ns for file in arrays]
    encoded.clear()
    model.index(photos, tmp_path / "index", update=True)
    (photos / "more" / "x.JPG").unlink()  # the last one
    index = model.index(photos, tmp_path / "index", update=True)
    assert len(index) == len(model.open_index(tmp_path / "index")) == 6 and not encoded
    assert sorted((tmp_path / "index").glob("*.npy")) == arrays
    assert [file.stat().st_mtime_ns for file in arrays] == times


def test_an_index_in_memory_or_of_other_images_is_not_updated(model, photos, tiny, tmp_path):
    with pytest.raises(UserError, match="name the folder"):
        model.index(photos, update=True)
    model.index([photos / "00001.jpg"], tmp_path / "index")
    with pytest.raises(UserError, match=r"index has none of these 2 images; name another one, or delete it"):
        model.index([photos / "00000.jpg", photos / "00005.jpg"], tmp_path / "index", update=True)
    assert len(model.open_index(tmp_path / "index")) == 1
    assert len(model.index(photos, tmp_path / "index", update=True)) == 7
    half = simla.load(tiny.checkpoints["retrieval"], "cpu", "bf16")
    with pytest.raises(UserError, match="another precision"):
        half.index(photos, tmp_path / "index", update=True)


def test_a_folder_that_was_moved_or_copied_is_not_encoded_again(model, photos, tmp_path, encoded, caplog):
    index = model.index(photos, tmp_path / "index")
    encoded.clear()
    os.utime(photos / "00001.jpg", ns=(1, 1))
    with caplog.at_level("INFO"):
        assert model.open_index(tmp_path / "index").files == index.files
    assert "1 of 7 files had to be compared by their contents" in caplog.text
    moved = photos.rename(tmp_path / "moved")
    names = [str(moved / Path(file).relative_to(photos)) for file in index.files]
    with pytest.raises(UserError, match=r"photos is no folder; the index .* is of .*: where that has"):
        model.open_index(tmp_path / "index")
    opened = model.open_index(tmp_path / "index", moved)
    assert opened.files == names and opened.folder == str(moved)
    shutil.copytree(moved, tmp_path / "copied")
    assert len(model.open_index(tmp_path / "index", tmp_path / "copied")) == 7
    caplog.clear()
    with caplog.at_level("INFO"):
        model.index(moved, tmp_path / "index", update=True)
        assert model.open_index(tmp_path / "index").files == names
    assert not encoded and "compared" not in caplog.text
    add(tmp_path / "copied")
    with pytest.raises(
        UserError, match=r"index is of .*moved, not of .*copied; name another one, or update it"
    ):
        model.open_index(tmp_path / "index", tmp_path / "copied")
    with pytest.raises(UserError, match=r"none is no folder; the index .*index is of .*moved: "):
        model.open_index(tmp_path / "index", tmp_path / "none")
    model.index(names[:2], tmp_path / "list")
    with pytest.raises(UserError, match="list is of a list of files, not of"):
        model.open_index(tmp_path / "list", moved)


@pytest.mark.parametrize(
    ("alter", "message"), [(swap, "has changed since it was indexed"), (remove, "is gone")]
)
def test_images_found_are_those_that_were_indexed(model, photos, tmp_path, alter, message):
    for folder in (None, tmp_path / "index"):
        index = model.index(photos, folder)
        os.utime(photos / "00001.jpg", ns=(1, 1))  # changes nothing
        assert len(model.search(index, "a cup", top=7)) == 7
    alter(photos)
    with pytest.raises(UserError, match=rf"0000[12]\.jpg: {message}; update the index"):
        model.search(index, "a cup", top=7)


# ---- thumbnails and waste ----


def test_thumbnails_and_waste_are_searched_only_on_request(model, photos, tmp_path):
    shown = list_images(photos)
    folders = (
        ".Trash-1000/files",
        "more/@eaDir/x.JPG",
        ".thumbnails",
        "more/.cache/deep",
        "__MACOSX",
        "lost+found",
    )
    folders += (".AppleDouble", "$Recycle.Bin", "#recycle", "@Recycle", "System Volume Information")
    for folder in folders:
        (photos / folder).mkdir(parents=True)
        shutil.copy(photos / "00001.jpg", photos / folder / "a.jpg")
    for name in ("._00001.jpg", ".trashed-1790000000-b.jpg", "Thumbs.db"):
        shutil.copy(photos / "00001.jpg", photos / "more" / name)
    elsewhere = tmp_path / ".hidden"
    elsewhere.mkdir()
    shutil.copy(photos / "00001.jpg", elsewhere / "b.jpg")
    (photos / ".link").symlink_to(elsewhere)
    files, passed_over = list_images(photos)
    assert files == shown.files
    assert passed_over == shown.passed_over | {
        "hidden folders": 5,
        **{
            f"folders named {name}": 1
            for name in ("@eaDir", "__MACOSX", "lost+found", "$Recycle.Bin", "#recycle", "@Recycle")
        },
        "folders named System Volume Information": 1,
        "files named ._...": 1,
        "files named .trashed-...": 1,
        "files named Thumbs.db": 1,
    }
    assert len(list_images(photos, everything=True).files) == len(files) + len(folders) + 3 + 1
    (photos / "shown").symlink_to(elsewhere)  # asked for by that name
    assert f"{photos}/shown/b.jpg" in list_images(photos).files
    assert list_images(photos / ".thumbnails").files == [f"{photos}/.thumbnails/a.jpg"]
    index = model.index(photos / "more", tmp_path / "index")
    assert len(index) == 1 and index.passed_over["hidden folders"] == 1
    assert model.open_index(tmp_path / "index").files == index.files  # none of them is new
    assert len(model.index(photos / "more", tmp_path / "index", update=True, everything=True)) == 6
    assert model.open_index(tmp_path / "index").everything
    (photos / "only" / ".hidden").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"only holds no image; passed over: 1 hidden folders; everything=True"
    ):
        model.index(photos / "only")


# ---- which hits ----


def test_the_first_hits_depend_on_the_candidates_alone(model, photos):
    index = model.index(photos)
    with pytest.raises(UserError, match=r"candidates 3 are fewer than top 5: give more candidates"):
        model.search(index, "a cup", candidates=3)
    few = model.search(index, QUERIES, top=2, candidates=7)
    assert few == [hits[:2] for hits in model.search(index, QUERIES, top=7)]
    assert few == [hits[:2] for hits in model.search(index, QUERIES, top=5, candidates=100)]


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
