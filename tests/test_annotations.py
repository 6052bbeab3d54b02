"""Annotation files read entry by entry: as json.loads reads them, by an index that is never stale."""

import bz2
import gzip
import io
import json
import lzma
import multiprocessing
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from simla.dataset.items import Collate, TrainItems
from simla.dataset.loaders import EpochSampler, stop_at_unreadable, train_loader
from simla.dataset.readers import json_list, kept_index
from simla.dataset.readers.annotations import ANY, TEXT, TEXTS, Annotations, Mapped, item_of, read_annotations
from simla.dataset.readers.json_list import HEADER_BYTES, RECORD, JsonList
from simla.dataset.retrieval import WithIdentities
from simla.utils import UserError

FIELDS = {"image": TEXT, "caption": TEXTS}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def kept(monkeypatch):
    """Every index is kept, however small the file."""
    monkeypatch.setattr(json_list, "KEPT_FROM_BYTES", 0)


def accept(_: object, where: str) -> None:
    pass


def write(path: Path, entries: object) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def pairs(num: int, caption: str = "a duck") -> list[dict]:
    return [{"image": f"{i}.jpg", "caption": f"{caption} {i}"} for i in range(num)]


def read(path: Path, **fields: tuple) -> Annotations:
    return read_annotations(str(path), {**FIELDS, **fields})


def captions(path: Path) -> list[str]:
    return [entry["caption"] for entry in read(path)]


def index_of(path: Path) -> Path:
    return next(kept_index.index_files(path))


# ---- what is in the file ----

characters = st.characters() | st.sampled_from('é€😀\ud83d\udfff"\\[]{},: \n\u2028')
texts = st.text(characters, max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "list.json"


@given(
    st.lists(st.dictionaries(texts, values, max_size=3), max_size=5),
    st.booleans(),
    st.sampled_from([None, 0, 1, "\r\n\t"]),
    st.integers(1, 60),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.sampled_from(["", " \n\t "]),
)
@settings(max_examples=100)
def test_any_list_is_what_json_loads_says(scratch, entries, ascii_only, indent, block_bytes, mark, space):
    """Borders of blocks fall within characters, escapes, numbers and words."""
    text = space + json.dumps(entries, ensure_ascii=ascii_only, indent=indent) + space
    content = mark + text.encode("utf-8", "surrogatepass")
    scratch.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "BLOCK_BYTES", block_bytes)
        found = JsonList(scratch, accept, "")
        assert repr(list(found)) == repr(json.loads(content))  # as text, since NaN differs from itself
        assert len(found) == len(entries)


@given(
    st.lists(st.dictionaries(texts, values, max_size=2), min_size=1, max_size=3),
    st.data(),
    st.integers(1, 60),
)
@settings(max_examples=100)
def test_whatever_json_loads_refuses_is_refused(scratch, entries, data, block_bytes):
    """Cut anywhere, or with some bytes replaced; and what it takes is taken for the same."""
    content = json.dumps(entries, ensure_ascii=False).encode("utf-8", "surrogatepass")
    place = data.draw(st.integers(1, len(content) - 1))
    content = content[:place] + data.draw(
        st.just(b"") | st.binary(max_size=3).map(lambda found: found + content[place + 1 :])
    )
    scratch.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "BLOCK_BYTES", block_bytes)
        try:
            expected = json.loads(content)
        except ValueError:
            with pytest.raises(UserError, match="is not valid JSON"):
                JsonList(scratch, accept, "")
        else:
            assert repr(list(JsonList(scratch, accept, ""))) == repr(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"a": 1},\n {"a": 2},\n {"a" 3}]', "Expecting ':' delimiter, line 3, byte 28, entry 2"),
        ('[{"é": 1},\n {"a": "2}]'.encode(), "Unterminated string starting at, line 2, byte 19, entry 1"),
        (b'[{"a": 1} {"a": 2}]', "Expecting ',' delimiter, line 1, byte 10, entry 0"),
        (b'[{"a": 1}, ]', "Expecting value, line 1, byte 11, entry 1"),
        (b'[{"a": 1}', "Expecting ',' delimiter, line 1, byte 9, entry 0"),
        (b'[{"a": 1}]\n[', "Extra data after the list, line 2, byte 11, entry 1"),
        (b"[", "Expecting value, line 1, byte 1, entry 0"),
        (b'{"a": 1}\n{"a": 2}\n{"a" 3}', "Expecting ':' delimiter, line 3, byte 23, entry 2"),
        (b'{"a": 1} {"a": 2}', "Expecting the end of the line, line 1, byte 9, entry 0"),
        (b'{"a": 1},\n{"a": 2}', "Expecting the end of the line, line 1, byte 8, entry 0"),
        (b'{"a": 1}\n{"a": 2', "Expecting ',' delimiter, line 2, byte 16, entry 1"),
        (
            b"image,caption\na.jpg,a duck",
            "a table (CSV, TSV) is converted by `python -m simla.dataset.prepare",
        ),
        (b'[{"a": "\xff"}]', "byte 8 is not UTF-8"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_wrong_json_is_named_with_line_byte_and_entry(monkeypatch, tmp_path, content, expected, block_bytes):
    monkeypatch.setattr(json_list, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        JsonList(path, accept, "")
    assert str(error.value).startswith(f"annotation file {path} is not valid JSON (truncated?): ")
    assert expected in str(error.value)


def tar_of(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def zip_of(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "[]")
    return file.getvalue()


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


LFS = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (LFS, "it is a pointer of Git LFS, .*git lfs pull"),
        (b"<!DOCTYPE html><title>404", "it is a web page .*download the file again"),
        (gzip.compress(b"[]", mtime=0), "it is compressed by gzip; .*gunzip"),
        (bz2.compress(b"[]"), "it is compressed by bzip2"),
        (lzma.compress(b"[]"), "it is compressed by xz"),
        (b"\x28\xb5\x2f\xfd\x04\x00\x11\x00\x00[]", "it is compressed by zstd"),
        (zip_of("train.json"), "it is a zip archive"),
        (
            tar_of("000.jpg"),
            r"it is a tar file; shards are named \.tar and belong into train_file of Pretrain",
        ),
        *((pickle.dumps([], protocol), "it is a pickle") for protocol in (2, 3, 4, 5)),
        *(
            ('[{"a": 1}]'.encode(f"utf-{kind}"), "it is text in UTF-16")
            for kind in ("16", "16-le", "16-be", "32")
        ),
        (saved(lambda file: Image.new("L", (8, 8)).save(file, "PNG")), "it is a picture"),
        (saved(lambda file: Image.new("L", (8, 8)).save(file, "JPEG")), "it is a picture"),
        (saved(lambda file: Image.new("L", (8, 8)).save(file, "PDF")), "it is a PDF"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",  # some contents hold the time of day
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, content, expected):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"annotation file {path} is not valid JSON: {expected}"):
        read(path)


def test_a_table_of_parquet_or_arrow_is_called_what_it_is(tmp_path):
    arrow, path = pytest.importorskip("pyarrow"), tmp_path / "train.json"
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"image": ["a.jpg"]})
    parquet.write_table(table, path)
    with pytest.raises(
        UserError, match=r"it is a Parquet table; convert it with `python -m simla.dataset.prepare"
    ):
        read(path)
    for make in (arrow.ipc.new_file, arrow.ipc.new_stream):
        with path.open("wb") as file, make(file, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(UserError, match="it is an Arrow table"):
            read(path)


# ---- JSON lines ----


@given(
    st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n\t"]),
    st.integers(1, 60),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.booleans(),
)
@settings(max_examples=40)
def test_json_lines_are_what_json_loads_says_of_each(
    scratch, entries, ascii_only, line_end, block_bytes, mark, is_ended
):
    text = line_end.join(json.dumps(entry, ensure_ascii=ascii_only) for entry in entries)
    content = mark + (text + line_end * is_ended).encode("utf-8", "surrogatepass")
    scratch.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "BLOCK_BYTES", block_bytes)
        found = JsonList(scratch, accept, "")
        assert repr(list(found)) == repr([json.loads(json.dumps(entry)) for entry in entries])
        assert len(found) == len(entries)


def test_json_lines_have_the_index_of_lists(monkeypatch, kept, tmp_path):
    path, entries = tmp_path / "train.jsonl", pairs(10)
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    first = read(path)
    assert [entry["caption"] for entry in first] == [entry["caption"] for entry in entries]
    assert first[3]["images"] == [str(tmp_path / "3.jpg")] and first[3]["where"] == f"{path}: entry 3"
    assert index_of(path).stat().st_size == HEADER_BYTES + 11 * RECORD.size
    monkeypatch.setattr(json_list, "_scan", no_scan)
    assert list(read(path)) == list(pickle.loads(pickle.dumps(first))) == list(first)
    path.write_text(f"{json.dumps(entries[0])}\n" + '{"image": "b.jpg"}\n')
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"train.jsonl: entry 1 has no 'caption'"):
        read(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_is_no_annotation_file(tmp_path, indent):
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps({"info": {}, "images": [], "annotations": []}, indent=indent))
    with pytest.raises(
        UserError,
        match=r"must hold a JSON list, found dict with the keys info, images, annotations; official files "
        r"are converted by `python -m simla\.dataset\.prepare`",
    ):
        read(path)


def test_a_long_file_that_is_wrong_is_not_read_to_its_end(monkeypatch, tmp_path):
    monkeypatch.setattr(json_list, "BLOCK_BYTES", 64)
    path = tmp_path / "list.json"
    path.write_text('[{"a": nul}' + " " * 100_000)
    with path.open("rb", buffering=0) as file:
        with pytest.raises(UserError, match="entry 0"):
            json_list._scan(path, file, 0, accept)
        assert file.tell() < 1000


def test_several_files_are_one_sequence(tmp_path, caplog):
    first, second = write(tmp_path / "a.json", pairs(3)), write(tmp_path / "b.json", pairs(2, "a cup"))
    empty = write(tmp_path / "c.json", [])
    entries = read_annotations([str(empty), str(first), str(second), str(empty)], FIELDS)
    assert len(entries) == 5
    assert caplog.messages == [f"{empty} has no entries"] * 2
    assert [entry["where"] for entry in entries] == [f"{first}: entry {i}" for i in range(3)] + [
        f"{second}: entry {i}" for i in range(2)
    ]
    assert (
        entries[3]
        == entries[-2]
        == {
            "image": "0.jpg",
            "caption": "a cup 0",
            "images": [str(tmp_path / "0.jpg")],
            "where": f"{second}: entry 0",
        }
    )
    with pytest.raises(IndexError):
        entries[5]


def test_identities_are_numbered_as_they_appear():
    entries = [{"name": name} for name in ("b", "a", "b", 1, "1", [2], [2])]
    found = WithIdentities(entries, (entry["name"] for entry in entries))
    assert [entry["idx"] for entry in found] == [0, 1, 0, 2, 3, 4, 4]
    assert found[0] == {"name": "b", "idx": 0} and type(found[0]["idx"]) is int


# ---- the index ----


def no_scan(*_) -> bytearray:
    raise AssertionError("looked through again")


def test_small_files_leave_nothing_on_the_disk(tmp_path):
    captions(write(tmp_path / "a.json", pairs(10)))
    assert [path.name for path in tmp_path.rglob("*")] == ["a.json"]


def test_a_kept_index_is_12_bytes_an_entry_and_used_again(monkeypatch, kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(10))
    first = list(read(path))
    assert sorted(tmp_path.iterdir()) == [index_of(path), path]
    assert index_of(path).stat().st_size == HEADER_BYTES + 11 * RECORD.size and RECORD.size == 12
    monkeypatch.setattr(json_list, "_scan", no_scan)
    assert list(read(path)) == first


def test_a_changed_file_is_looked_through_again(kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(10))
    captions(path)
    write(path, pairs(12))
    assert len(captions(path)) == 12
    status = path.stat()
    write(path, pairs(12, "a cup!"[:6]))  # of the same size, and then of the same time
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert captions(path)[0] == "a cup! 0"


def test_a_change_in_the_middle_under_the_same_time_is_noticed(monkeypatch, kept, tmp_path):
    """At the latest when the entry is read; the index is gone then, so that the next start is right."""
    monkeypatch.setattr(json_list, "BLOCK_BYTES", 64)
    path = write(tmp_path / "a.json", pairs(100))
    captions(path)
    status, content = path.stat(), path.read_text()
    path.write_text(content.replace("duck 50", "cups 50"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    entries = read(path)
    assert entries[49]["caption"] == "a duck 49"
    with pytest.raises(UserError, match=rf"{path}: entry 50 has changed .* start again"):
        entries[50]
    assert captions(path)[50] == "a cups 50"


def test_a_file_cut_short_in_use_is_an_error_and_no_crash(kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(1000))
    entries = read(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="entry 999 has changed"):
        entries[999]


def test_a_file_replaced_in_use_stays_readable(kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(10))
    entries = read(path)
    write(tmp_path / "b.json", pairs(3, "a cup")).replace(path)
    assert entries[9]["caption"] == "a duck 9" and captions(path)[2] == "a cup 2"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content[:HEADER_BYTES],
        lambda content: content + b"\0",
        lambda content: content[: HEADER_BYTES + 20] + b"\xff" + content[HEADER_BYTES + 21 :],
        lambda content: b"[]" + b" " * (HEADER_BYTES - 2) + content[HEADER_BYTES:],
        lambda content: content.replace(b'"crc"', b'"cry"'),
        lambda content: os.urandom(1000),
    ],
)
def test_a_damaged_index_is_made_anew(caplog, kept, tmp_path, damage):
    path = write(tmp_path / "a.json", pairs(10))
    expected, whole = captions(path), index_of(path).read_bytes()
    index_of(path).write_bytes(damage(whole))
    assert captions(path) == expected
    assert f"{index_of(path)} is damaged and will be made anew" in caplog.text
    assert index_of(path).read_bytes() == whole


def test_other_fields_are_checked_too_and_remembered(monkeypatch, kept, tmp_path):
    path = write(tmp_path / "a.json", [*pairs(3), {"image": "x.jpg", "caption": "c", "id": 1}])
    captions(path)
    with pytest.raises(UserError, match=r"a.json: entry 0 has no 'id'"):
        read(path, id=ANY)
    write(path, [{**pair, "id": 1} for pair in pairs(3)])
    captions(path)
    read(path, id=ANY)
    monkeypatch.setattr(json_list, "_scan", no_scan)
    captions(path)
    read(path, id=ANY)
    with pytest.raises(AssertionError):  # a third kind is not
        read(path, id=TEXT)


def refuse_ducks(entry: dict, where: str) -> None:
    if "duck" in entry["caption"]:
        raise UserError(f"{where}: no ducks")


def test_a_task_may_refuse_entries_for_its_own_reasons(kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(3))
    captions(path)
    with pytest.raises(UserError, match=r"a.json: entry 0: no ducks"):
        read_annotations(str(path), FIELDS, check=refuse_ducks)


def test_a_file_with_an_entry_that_is_refused_gets_no_index(kept, tmp_path):
    path = write(tmp_path / "a.json", [*pairs(3), {"image": 3}])
    for _ in range(2):
        with pytest.raises(UserError, match="entry 3: 'image' must be text, found 3"):
            captions(path)
    assert not index_of(path).exists()


def test_where_the_folder_cannot_be_written_the_users_cache_has_the_index(monkeypatch, kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(10))
    index_of(path).mkdir()  # stands in the way, for root too
    expected = captions(path)
    (cached,) = (tmp_path / "cache" / "simla").iterdir()
    assert list(kept_index.index_files(path)) == [index_of(path), cached]
    assert [found.name for found in tmp_path.iterdir() if found.is_file()] == ["a.json"]
    monkeypatch.setattr(json_list, "_scan", no_scan)
    assert captions(path) == expected


def test_where_nothing_can_be_written_the_index_stays_in_memory(caplog, kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(10))
    index_of(path).mkdir()
    (tmp_path / "cache").write_text("a file, no folder")
    entries = read(path)
    assert entries[9]["caption"] == "a duck 9"
    assert "its index cannot be kept" in caplog.text and str(index_of(path)) in caplog.text
    assert list(pickle.loads(pickle.dumps(entries))) == list(entries)


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_start_at_once(monkeypatch, kept, tmp_path, locks):
    """One looks through the file and the others wait for it; all do where the disk knows no locks."""
    path, looks, scan = write(tmp_path / "a.json", pairs(3000)), tmp_path / "looks", json_list._scan
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)

    def counting_scan(*args) -> bytearray:
        with looks.open("a") as file:
            file.write("x")
        if not locks:
            together.wait(20)
        return scan(*args)

    def load() -> None:
        together.wait(20)
        assert captions(path)[2999] == "a duck 2999"

    def no_lock(*_) -> None:
        raise OSError("no locks on this disk")

    monkeypatch.setattr(json_list, "_scan", counting_scan)
    if not locks:
        monkeypatch.setattr(kept_index.fcntl, "flock", no_lock)
    processes = [context.Process(target=load) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert looks.read_text() == ("x" if locks else "xxx")
    assert sorted(tmp_path.iterdir()) == [index_of(path), path, looks]
    monkeypatch.setattr(json_list, "_scan", no_scan)
    assert len(captions(path)) == 3000


# ---- loader processes ----


def test_a_pickle_names_the_file(kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(5000))
    entries = Mapped(read(path), partial(item_of, text="caption"))
    pickled = pickle.dumps(entries)
    assert len(pickled) < 2000 and b"a.json" in pickled and b"duck" not in pickled
    assert list(pickle.loads(pickled)) == list(entries)


def test_a_pickle_of_a_file_that_changed_is_an_error(kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(10))
    pickled = pickle.dumps(read(path))
    write(path, pairs(11, "a cup"))
    with pytest.raises(UserError, match=r"a.json: entry 0 has changed"):
        pickle.loads(pickled)[0]
    captions(path)
    with pytest.raises(UserError, match=r"a.json or its index .* has changed; start again"):
        pickle.loads(pickled)[0]


class Plain(TrainItems):
    """Without images, so that only the annotations count."""

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {"text": self.entries[key[1]]["text"], "index": key[1]}


def test_spawned_loader_processes_read_the_same(kept, tmp_path):
    path = write(tmp_path / "a.json", pairs(32))
    entries = Mapped(read(path), partial(item_of, text="caption"))
    items = Plain(WithIdentities(entries, range(32)), None, 0)
    loader = torch.utils.data.DataLoader(
        items, 4, sampler=EpochSampler(32, 4, 0), num_workers=1, multiprocessing_context="spawn"
    )
    found = {
        i: text for batch in loader for i, text in zip(batch["index"].tolist(), batch["text"], strict=True)
    }
    assert found == {i: f"a duck {i}" for i in range(32)}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_changes_under_a_run_ends_it_with_one_sentence(kept, tmp_path, num_workers):
    path = write(tmp_path / "a.json", pairs(8))
    items = TrainItems(Mapped(read(path), partial(item_of, text="caption")), None, 0)
    config = {"num_workers": num_workers, "grad_accumulation_steps": 1, "batch_timeout_minutes": 1}
    loader = train_loader(items, 4, 0, config, Collate(None, 64))
    path.write_text("[]")
    with pytest.raises(UserError, match=r"^[^\n]*a.json: entry \d has changed since [^\n]*$"):
        list(stop_at_unreadable(loader))


def private_kilobytes(_: object) -> int:
    fields = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").split()
    return sum(int(fields[fields.index(f"Private_{kind}:") + 1]) for kind in ("Clean", "Dirty"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_a_worker_has_no_copy_of_the_annotations(tmp_path):
    """200,000 entries, 160 MB as dicts: what it holds more after 50,000 of them, from all over the file."""
    entries = [{"image": f"{i:09}.jpg", "caption": f"a duck {i} " * 4} for i in range(200_000)]
    path = write(tmp_path / "a.json", entries)
    del entries
    items = Plain(Mapped(read(path), partial(item_of, text="caption")), None, 0)
    assert index_of(path).stat().st_size < 3_000_000
    config = {"num_workers": 1, "grad_accumulation_steps": 1, "batch_timeout_minutes": 1}
    first, *_, last = islice(train_loader(items, 5000, 0, config, private_kilobytes), 10)
    assert last - first < 20_000
