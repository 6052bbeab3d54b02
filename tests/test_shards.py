"""Pre-training from WebDataset shards: order, sharing and resuming for any numbers of shards and readers;
mixing; broken shards; and making them.
"""

import gzip
import io
import json
import logging
import os
import pickle
import re
import resource
import signal
import tarfile
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import make_tiny

from simla.configs.reader import weighted
from simla.dataset.images import BadImage
from simla.dataset.items import MAX_TRIES
from simla.dataset.loaders import EpochSampler, train_loader
from simla.dataset.masking import BlockMask
from simla.dataset.mixture import Mixture, shares
from simla.dataset.prepare.__main__ import main
from simla.dataset.prepare.shards import Job, fill_of, write_shard
from simla.dataset.pretrain import PretrainData, code_views, read_pairs, read_sets
from simla.dataset.readers import kept_index, shard_index, shard_stream
from simla.dataset.readers.shards import KEPT_OPEN, Shards, expand_names
from simla.dataset.transforms import PretrainTransform
from simla.engine.bad_images import BadImages
from simla.utils import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_stream, "RETRY_SECONDS", (0,))
    monkeypatch.setattr(shard_stream, "_named", set())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """24 scenes as an annotation file (`file`) and as 5 shards of them (`folder`; `names`, a pattern)."""
    folder = tmp_path_factory.mktemp("made")
    file = make_tiny(folder)["data"] / "pretrain_train.json"
    make(file, folder / "shards")
    return SimpleNamespace(
        file=str(file), folder=folder / "shards", names=f"{folder}/shards/{{00000..00004}}.tar"
    )


def make(file: Path, out: Path, *flags: str) -> None:
    flags = flags or ("--samples_per_shard", "5")
    main(["shards", "--annotations", str(file), "--out", str(out), "--workers", "1", *flags])


def picture(shade: int = 90, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 60, 30)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(number: int, first: int = 0) -> dict[str, bytes]:
    members = {}
    for key in range(first, first + number):
        members |= {f"{key:04}.jpg": picture(key), f"{key:04}.txt": f"picture {key}".encode()}
    return members


class Numbers(Sequence):
    """Stands for shards of these sizes; without files."""

    def __init__(self, sizes: list[int], is_stream: bool = True):
        self.sizes, self.is_stream, self.ends = sizes, is_stream, list(accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        return {"index": index}


def epoch_of(
    mixture: Mixture,
    num_ranks: int,
    workers: int,
    batch: int,
    accumulation: int,
    epoch: int = 0,
    first: int = 0,
) -> list[list[tuple[int, ...]]]:
    """What the loader of each rank would ask for, as `train_loader` sets it up."""
    config = {"num_workers": workers, "grad_accumulation_steps": accumulation, "batch_timeout_minutes": 1}
    found = []
    for rank in range(num_ranks):
        with mock.patch.multiple(
            "simla.dataset.loaders", rank=lambda rank=rank: rank, world_size=lambda: num_ranks
        ):
            sampler = train_loader(mixture, batch, 5, config, list, mixture).sampler
            sampler.set_epoch(epoch, first)
            found.append(list(sampler))
            assert len(sampler) == len(found[-1])
    return found


# ---- who reads what ----

READERS = (st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(1, 2))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), *READERS, st.integers(0, 3))
@settings(max_examples=150)
def test_readers_share_the_shards_of_a_stream(sizes, num_ranks, workers, batch, accumulation, epoch):
    """Whatever there are of both: no sample twice, equally many steps, each process reads few shards, and
    what is resumed goes on as if it had not stopped.
    """
    mixture, step = Mixture([Numbers([*sizes, 60])]), num_ranks * batch * accumulation
    own = epoch_of(mixture, num_ranks, workers, batch, accumulation, epoch)
    indices = [index for keys in own for _, index, _ in keys]
    assert len(set(indices)) == len(indices) == len(mixture) // step * step
    assert {len(keys) for keys in own} == {len(indices) // num_ranks}
    assert {key[0] for keys in own for key in keys} == {epoch}
    for first in (step, len(indices)):
        resumed = epoch_of(mixture, num_ranks, workers, batch, accumulation, epoch, first)
        assert resumed == [keys[first // num_ranks :] for keys in own]
    workers = max(workers, 1)
    visits = 0  # of shards by processes
    for keys in own:
        batches = [keys[begin : begin + batch] for begin in range(0, len(keys), batch)]
        for worker in range(workers):
            read = [key[1] for keys in batches[worker::workers] for key in keys]
            assert {key[2] for keys in batches[worker::workers] for key in keys} <= set(read)
            ends = mixture.sets[0].ends
            places = [bisect_right(ends, index % len(mixture)) for index in read]
            changes = [b for a, b in zip([None, *places], places) if a != b]  # noqa: B905 (one is longer)
            assert len(set(changes)) == len(changes)  # comes back to none
            visits += len(changes)
    assert visits <= len(sizes) + 1 + num_ranks * workers - 1


def test_with_other_ranks_a_stream_goes_on_at_the_next_whole_step():
    mixture = Mixture([Numbers([30, 30])])
    for keys in epoch_of(mixture, 2, 1, 4, 1, first=20):  # 20 samples are two and a half steps of 8
        assert len(keys) == 60 // 8 * 4 - 12


def test_with_other_ranks_nothing_may_be_left_of_a_stream():
    mixture = Mixture([Numbers([30, 30])])
    for first in (54, 58):  # the next whole step of 8 would end at 64
        assert epoch_of(mixture, 2, 1, 4, 1, first=first) == [[], []]


def test_order_of_an_annotation_file_or_local_shards_is_any_order_and_does_not_depend_on_readers():
    mixture = Mixture([Numbers([7, 30, 13], is_stream=False)])
    alone = [key for (key,) in zip(epoch_of(mixture, 1, 0, 2, 1)[0], strict=True)]
    shared = epoch_of(mixture, 2, 3, 2, 1)
    assert sorted(shared[0] + shared[1]) == sorted(alone[:48])
    plain = EpochSampler(50, 2, 5)
    for epoch in range(3):
        plain.set_epoch(epoch)
        assert list(plain) == epoch_of(mixture, 1, 0, 2, 1, epoch)[0]  # as of a data set that is no mixture


def test_a_thousand_shards_are_shuffled_and_shared_without_reading_them():
    mixture = Mixture([Numbers([160 + number % 13 for number in range(1200)])])
    own = epoch_of(mixture, 8, 4, 16, 1)
    indices = torch.tensor([key[1] for keys in own for key in keys])
    assert len(indices) == len(mixture) // 128 * 128 and len(indices.unique()) == len(indices)
    assert (indices[1:] - indices[:-1]).eq(1).float().mean() < 0.05  # shuffled within the shards
    later = epoch_of(mixture, 8, 4, 16, 1, epoch=1)
    assert own[0][:16] != later[0][:16]
    places = torch.bucketize(indices, torch.tensor(mixture.sets[0].ends), right=True)
    assert places[:160].unique().tolist() != list(range(len(places[:160].unique())))  # shards are, too


# ---- mixing ----


def test_shares_are_in_proportion_and_add_up():
    assert shares(10, [1, 1, 2]) == [2, 3, 5]
    assert shares(0, [1, 2]) == [0, 0]
    assert sum(shares(1_000_003, [0.1, 0.7, 0.3])) == 1_000_003


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.05, 20), st.integers(1, 90), st.booleans())
@settings(max_examples=100)
def test_an_epoch_has_the_share_of_each_set(size, other, weight, total, is_stream):
    sets = [Numbers([size], is_stream), Numbers([other], is_stream=False)]
    mixture = Mixture(sets, [weight, 1.0], total)
    seen, expected = Counter(), total * weight / (weight + 1)
    for epoch in range(4):
        order = mixture.order(3, epoch).tolist()
        assert order == mixture.order(3, epoch).tolist()
        assert len(set(order)) == len(order) == total  # what is met again has another index, so other draws
        assert abs(sum(index % len(mixture) < size for index in order) - expected) <= 0.5
        seen.update(index % len(mixture) for index in order)
    for members in (range(size), range(size, size + other)):
        counts = [seen[index] for index in members]
        assert max(counts) - min(counts) <= 1  # all of a set equally often


def test_a_small_set_repeats_and_a_large_one_is_not_used_up():
    mixture = Mixture([[{"n": n} for n in range(3)], [{"n": n} for n in range(100)]], [1.0, 1.0], 24)
    entries = [mixture[index]["n"] + 1000 * (index % 103 >= 3) for index in mixture.order(0, 0).tolist()]
    counts = Counter(entries)
    assert [counts[n] for n in range(3)] == [4, 4, 4] and len(counts) == 3 + 12


def test_a_set_without_weights_is_all_that_is_listed(made):
    assert weighted(["a.json", "b.tar"]) == ([["a.json", "b.tar"]], [1.0])
    mixture = read_sets([made.file, made.names, f"pipe:cat {made.names}"])
    assert mixture.shares == [24, 24, 24] and sorted(mixture.order(0, 0).tolist()) == list(range(72))


@pytest.mark.parametrize(
    ("train_file", "problem"),
    [
        ([{"path": "a.json", "weight": 1}, "b.json"], r"entry 1 must be .*'b.json'"),
        ([{"path": "a.json"}], "entry 0 must be"),
        (
            [{"path": "a.json", "weight": 0}],
            "weight of entry 0 must be above 0, at most 1e12, found 0",
        ),
        ([{"path": "a.json", "weight": True}], "weight of entry 0"),
        ([{"path": [], "weight": 1}], "path of entry 0"),
        ([], "train_file is empty"),
        ("nosuch/{0..1}.tar", r"shard nosuch/0.tar cannot be read: No such file"),
        ("x/{7..1}.tar", "counts down"),
        ("nosuch://x.tar", r"nosuch://x.tar cannot be opened: .*nosuch"),
    ],
)
def test_a_train_file_that_is_no_use_is_refused(train_file, problem):
    with pytest.raises(UserError, match=problem):
        read_sets(train_file)


def test_a_set_of_which_an_epoch_would_have_nothing_is_named(made):
    sets = [{"path": made.file, "weight": 1}, {"path": made.names, "weight": 3000}]
    with pytest.raises(UserError, match=rf"of 1000 samples an epoch none would be of {made.file}, by its"):
        read_sets(sets, 1000)
    assert read_sets(sets, 10_000).shares == [3, 9997]


def test_patterns():
    assert expand_names(["a/{08..11}.tar"]) == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_names(["{a,b}/{0..1}.tar"]) == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand_names(["pipe:cat {0..1}.tar", "file:///x.tar"]) == [
        "pipe:cat 0.tar",
        "pipe:cat 1.tar",
        "/x.tar",
    ]


# ---- what is read ----


def data_of(mixture: Mixture) -> PretrainData:
    return PretrainData(mixture, PretrainTransform(32, code_res=16), BlockMask(4, 5, 2), 3, False)


@pytest.mark.parametrize("how", ["{}", "file://{}", "pipe:cat {}", "memory://{}"])
def test_samples_of_shards_are_those_of_the_annotation_file(made, how, tmp_path):
    """The same pixels, captions and masks, wherever the shards lie."""
    if how.startswith("memory"):
        for path in made.folder.glob("*.tar"):
            fsspec.filesystem("memory").pipe_file(str(path), path.read_bytes())
    ours, theirs = data_of(read_sets(how.format(made.names))), data_of(read_sets(made.file))
    assert len(ours) == len(theirs) == 24
    for index in range(24):
        item, expected = ours[0, index], theirs[0, index]
        for name in ("images", "code_view", "patch_mask"):
            assert torch.equal(item[name], expected[name])
        assert [item[name] for name in ("text", "mask_seed", "bad")] == [
            expected[name] for name in ("text", "mask_seed", "bad")
        ]
        place = how.removeprefix("file://").format(f"{made.folder}/{index // 5:05}.tar: {index:09}.jpg")
        assert item["where"] == place and item["files"] == [place]
    views = list(code_views(ours.entries, 16, num_images=99))
    assert len(views) == 24 and torch.equal(views[7], list(code_views(theirs.entries, 16, 8))[7])


def test_names_and_kinds_of_members(tmp_path):
    long = "folder/" * 30 + "000.jpg"
    members = {
        long: picture(),
        long.replace(".jpg", ".json"): json.dumps({"caption": ["one", "two"], "url": "x"}).encode(),
        "b.PNG": picture(kind="PNG"),
        "b.json": b'{"caption": "not this"}',
        "b.txt": "caf\u00e9".encode(),
        "c.webp": picture(kind="WEBP"),
        "c.txt": b"third",
        "index.csv": b"nothing",
    }
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        entries = Shards([str(write_tar(tmp_path / f"{number}.tar", members, format=form))])
        assert [entry["text"] for entry in entries] == [["one", "two"], "caf\u00e9", "third"]
        assert entries[1]["where"] == f"{tmp_path}/{number}.tar: b.PNG"
        assert entries[0]["images"][0].read() == members[long]


def found_in(members: list[tuple[str, bytes]], folder: Path) -> tuple[Shards, dict[str, object]]:
    """The shard, and of each of its samples name and text, or what is wrong with it."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    shards, found = Shards([str(folder / "0.tar")]), []
    for number in range(len(shards)):
        try:
            found.append((shards[number]["where"].split(": ")[1], shards[number]["text"]))
        except BadImage as error:
            found.append((error.path.split(": ")[1], error.cause))
    return shards, found


@pytest.mark.parametrize(
    "name", ["{}.jpg {}.txt", "./{}.jpg {}.txt", "{}.txt {}.JPG", "{}.json {}.gif {}.txt"]
)
@pytest.mark.parametrize(
    "keys", [["cat 2.0", "1", "cat 2.2"], ["a", "a.b", "a.b.c"], ["x.y/1", "x.z/1", "x.y/2"]]
)
@pytest.mark.parametrize("by_kind", [False, True])
def test_keys_may_have_dots_and_members_any_order(name, keys, by_kind, tmp_path, caplog):
    parts = [(kind.format(key), key) for key in keys for kind in name.split()]
    if by_kind:
        parts = [part for number in range(len(name.split())) for part in parts[number :: len(name.split())]]
    members = [(part, key.encode() if part.endswith(".txt") else picture()) for part, key in parts]
    shards, found = found_in(members, tmp_path)
    assert sorted(text for _, text in found) == sorted(keys)
    assert not shards.passed_over() and "passed over" not in caplog.text


def test_further_images_of_a_key_are_no_samples_of_their_own(tmp_path, caplog):
    """As in WebDataset, where `mask.png` is a part of sample `a`; and they are counted, and named once."""
    members = []
    for key in ("a", "b"):
        members += [(f"{key}.png", b"mask"), (f"{key}.mask.png", b"mask"), (f"{key}.jpg", picture())]
        members += [(f"{key}.txt", key.encode()), (f"{key}.raw.json", b"{}"), (f"{key}.cls", b"7")]
    shards, found = found_in(members, tmp_path)
    assert found == [("a.jpg", "a"), ("b.jpg", "b")]
    expected = {
        "further images and captions of a key": 6,
        "members that are neither an image nor a caption": 2,
    }
    assert shards.passed_over() == expected
    assert shards[0]["images"][0].read() == picture()
    for _ in range(2):  # looked through, then by the index
        for line in ("6 further images and captions of a key; the first: ", "2 members that are neither"):
            assert caplog.text.count(f"passed over {line}") == 1
        caplog.clear()
        data = data_of(read_sets(f"{tmp_path}/0.tar"))
        assert data.passed_over() == expected


def test_what_streamed_shards_hold_beside_samples_reaches_the_account_of_each_epoch_once(tmp_path):
    """Also with a loader process that lives on, ranks that share a shard, and after a stop."""
    for number in range(3):
        beside = {"._x.jpg": b"", "note.md": b""} if number < 2 else {}
        write_tar(tmp_path / f"{number}.tar", samples(4, 10 * number) | beside)
    data = data_of(read_sets(f"pipe:cat {tmp_path}/{{0..2}}.tar"))
    ranks = BadImages(), BadImages()
    for epoch in range(2):
        account = BadImages()
        for index in range(12):
            item = pickle.loads(pickle.dumps(data[epoch, index]))  # as a loader process sends it
            account.add(item["bad"], 1, item["passed_over"])
            ranks[index % 2].add(item["bad"], 1, item["passed_over"])
        found = account.report({"links": 3})["passed_over"]
        assert sorted(found.values()) == [2, 2, 3] and found["links"] == 3
    total = BadImages()
    for own in ranks:
        total.merge(json.loads(json.dumps(own.state_dict())))
    assert sorted(total.report()["passed_over"].values()) == [2, 2]
    assert "passed_over" not in BadImages().report()


def test_a_shard_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"0.tar cannot be read: not a file, but a pipe, socket or device"):
        Shards([f"{tmp_path}/0.tar"])


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    pairs = [(("s.jpg", picture(number)), ("s.txt", f"{number}".encode())) for number in range(6)]
    shards, found = found_in([member for pair in pairs for member in pair], tmp_path)
    assert found == [("s.jpg", f"{number}") for number in range(6)]
    assert [entry["images"][0].read() for entry in shards] == [picture(number) for number in range(6)]
    _, found = found_in([*pairs[0], ("t.jpg", picture()), ("t.txt", b"t"), *reversed(pairs[1])], tmp_path)
    assert found == [("s.jpg", "0"), ("s.jpg", "1"), ("t.jpg", "t")]


@pytest.mark.parametrize("members", ["jpg jpg txt txt", "jpg txt jpg", "txt jpg txt"])
def test_what_cannot_be_told_to_belong_together_is_no_pair(members, tmp_path):
    rows = [(f"s.{kind}", picture() if kind == "jpg" else b"s") for kind in members.split()]
    _, found = found_in([*rows, ("t.jpg", picture()), ("t.txt", b"t")], tmp_path)
    problem = "a key that comes again with other members: which belong together?"
    assert found[-1] == ("t.jpg", "t") and {cause for _, cause in found[:-1]} == {problem}


def test_what_is_in_no_sample_is_counted_by_cause(tmp_path, caplog):
    path = write_tar(tmp_path / "0.tar", samples(2))
    with tarfile.open(path, "a") as tar:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("l.txt", tarfile.LNKTYPE), ("f", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0000.jpg"
            tar.addfile(member)
        hidden = ("._0000.jpg", "f/.x.txt", "PaxHeaders.7/0000.jpg", "__MACOSX/0000.jpg", "__meta__/a.json")
        for name in (*hidden, "README", "dataset.csv", "2.heic"):
            tar.addfile(tarfile.TarInfo(name))
    for name in (str(path), f"pipe:cat {path}"):
        shards = Shards([name])
        assert len(shards) == 3 and [shards[number]["text"] for number in (0, 1)] == [
            "picture 0",
            "picture 1",
        ]
        with pytest.raises(BadImage, match=r"0.tar: sample 2: a link, sparse or"):
            shards[2]
        assert shards.passed_over().total() == (10 if name == str(path) else 0)  # of a stream not known
        for line in (
            r"5 hidden files .*/0.tar: \._0000.jpg",
            "3 members that are neither .* README",
            "2 links, .* l.jpg",
        ):
            assert len(re.findall(f"passed over {line}", caplog.text)) == 1
        Shards([name])[0]
        caplog.clear()


def test_a_json_without_a_caption_says_what_it_has(tmp_path):
    texts = {
        "a": b'{"text": "a dog", "url": ""}',
        "b": b'["a dog"]',
        "c": b"\xef\xbb\xbf" + b'{"caption": "a cat"}',
    }
    members = [
        pair for key, text in texts.items() for pair in ((f"{key}.jpg", picture()), (f"{key}.json", text))
    ]
    assert found_in(members, tmp_path)[1] == [
        ("a.json", "no caption: no field 'caption', found text, url"),
        ("b.json", "no caption: no field 'caption', found list"),
        ("c.jpg", "a cat"),
    ]


def test_a_key_over_two_shards_is_two_halves(tmp_path):
    for number, members in enumerate(({"a.jpg": picture(), **samples(1)}, {"a.txt": b"a", **samples(1)})):
        write_tar(tmp_path / f"{number}.tar", members)
    shards = Shards([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")])
    for index, cause in ((0, "0.tar: a.jpg: no caption"), (2, "1.tar: a.txt: a caption without an image")):
        with pytest.raises(BadImage, match=cause):
            shards[index]


def test_a_loader_goes_on_in_the_middle_of_an_epoch(made):
    """With processes of its own, of a stream and a file: the samples of an epoch that did not stop."""
    paths = [{"path": f"pipe:cat {made.names}", "weight": 2}, {"path": made.file, "weight": 1}]
    data = data_of(read_sets(paths, 40))
    config = {"num_workers": 2, "grad_accumulation_steps": 2, "batch_timeout_minutes": 1}
    loader = train_loader(data, 3, 7, config, list, data.entries)

    def epoch(number: int, first: int = 0) -> list[tuple]:
        loader.sampler.set_epoch(number, first)
        return [(item["where"], item["mask_seed"]) for batch in loader for item in batch]

    whole = [epoch(0), epoch(1)]
    assert len(whole[0]) == 36 and whole[0] != whole[1] and len(set(whole[0])) == 36
    assert [epoch(0, 12), epoch(1, 30)] == [whole[0][12:], whole[1][30:]]
    assert 23 <= sum(where.startswith("pipe:") for where, _ in whole[0]) <= 27  # 27 and 13 of 40


def test_of_a_stream_in_epochs_of_a_given_length_one_shard_is_counted(made):
    """All are taken to have as many: of one that has fewer some come again, one that has more gives its
    others in the next pass.
    """
    with mock.patch.object(shard_stream, "fetch", wraps=shard_stream.fetch) as fetch:
        mixture = read_sets(f"pipe:cat {made.names}", 20)
        assert fetch.call_count == 1 and len(mixture) == 25
    numbers = [int(mixture[index]["where"][-6:-4]) for index in range(18, 25)]
    assert numbers == [18, 19, 20, 21, 22, 23, 20]
    mixture = Mixture([Shards([f"pipe:cat {made.folder}/00001.tar"], [3])], samples_per_epoch=3)
    orders = [mixture.order(0, epoch).tolist() for epoch in range(3)]
    passes = [sorted(int(mixture[index]["where"][-6:-4]) for index in order) for order in orders]
    assert passes == [[5, 6, 7], [5, 8, 9], [6, 7, 8]]


def test_few_fetched_shards_are_kept_and_the_next_one_is_fetched_ahead(made):
    entries = Shards([f"pipe:cat {made.folder}/{number:05}.tar" for number in range(5)], [5] * 5)
    with mock.patch.object(shard_stream, "fetch", wraps=shard_stream.fetch) as fetch:
        for index in range(25):
            entries.expect(min(index + 2, 24))
            assert entries[index]["text"]
            assert len(entries.fetched) <= KEPT_OPEN
        assert fetch.call_count == 5  # each once
    assert not pickle.loads(pickle.dumps(entries)).fetched


# ---- the index ----


def test_an_index_is_kept_and_holds_until_the_shard_changes(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(3))
    with mock.patch.object(shard_index, "scan", wraps=shard_index.scan) as scan:
        assert len(Shards([str(path)])) == 3 and scan.call_count == 1
        again = pickle.loads(pickle.dumps(Shards([str(path)])))
        assert again[2]["text"] == "picture 2" and scan.call_count == 1
        write_tar(path, samples(4))
        assert len(Shards([str(path)])) == 4 and scan.call_count == 2
        with pytest.raises(BadImage, match=r"0.tar: changed since its index was made"):
            write_tar(path, {"other": b"x" * 700, **samples(3)})
            again[1]
    (tmp_path / ".0.tar.simla").write_bytes(b"rubbish")
    assert len(Shards([str(path)])) == 3


def test_more_local_shards_than_a_process_may_have_files_open(tmp_path):
    for number in range(60):
        write_tar(tmp_path / f"{number}.tar", samples(1, number))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open(encoding="utf-8") as free:  # the lowest number that is not in use
        resource.setrlimit(resource.RLIMIT_NOFILE, (free.fileno() + 40, limits[1]))
    try:
        for _ in range(2):  # looked through, then by their indexes
            entries = Shards(expand_names([f"{tmp_path}/{{0..59}}.tar"]))
            assert [entry["text"] for entry in entries] == [f"picture {number}" for number in range(60)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_a_place_for_the_index_the_shard_is_looked_through_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_index, "index_files", lambda _: [])
    path = write_tar(tmp_path / "0.tar", samples(3))
    for _ in range(2):
        entries = pickle.loads(pickle.dumps(Shards([str(path)])))
        assert [entry["text"] for entry in entries] == ["picture 0", "picture 1", "picture 2"]


def test_streams_are_counted_once(made, tmp_path):
    names = [f"pipe:cat {path}" for path in sorted(made.folder.glob("*.tar"))]
    with mock.patch.object(shard_stream, "fetch", wraps=shard_stream.fetch) as fetch:
        assert Shards(names).sizes == Shards(names).sizes == [5, 5, 5, 5, 4]
        assert fetch.call_count == 5
        memory = fsspec.filesystem("memory")
        memory.pipe_file("/counted/0_stats.json", b'{"successes": 17}')
        assert Shards(["memory://counted/0.tar"]).sizes == [17]  # as who made it says
        assert fetch.call_count == 5
    with pytest.raises(UserError, match=r"pipe:false: cannot be fetched: exit code 1; mend it or leave"):
        Shards(["pipe:false"])


def test_streams_are_counted_each_time_where_there_is_no_home(made, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("no home")))
    assert Shards([f"pipe:cat {made.folder}/00004.tar"]).sizes == [4]


# ---- broken ones ----


def test_broken_samples_are_replaced_and_named(tmp_path):
    members = {
        **samples(3),
        "noise.jpg": b"no image at all",
        "noise.txt": b"noise",
        "silent.jpg": picture(),
        "empty.jpg": picture(),
        "empty.txt": b" ",
        "odd.jpg": picture(),
        "odd.json": b'{"caption": 7}',
        "cut.jpg": picture(),
        "cut.json": b'{"caption": ',
        "alone.txt": b"no image",
    }
    path = write_tar(tmp_path / "0.tar", members)
    for name in (str(path), f"pipe:cat {path}"):
        data, causes = data_of(read_sets(name)), {}
        for index in range(9):
            item = data[0, index]
            assert item["text"].startswith("picture")
            causes |= {where.removeprefix(f"{name}: "): cause for where, cause in item["bad"]}
        expected = {
            "noise.jpg": "not an image",
            "silent.jpg": "no caption",
            "empty.txt": "no caption: found ' '",
            "odd.json": "no caption: found 7",
            "cut.json": "no caption: Expecting value: line 1 column 13 (char 12)",
            "alone.txt": "a caption without an image",
        }
        assert causes == expected


def test_a_shard_that_is_cut_short_names_itself_and_keeps_the_rest(tmp_path, caplog):
    path = write_tar(tmp_path / "0.tar", samples(6))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        fourth = tar.getmember("0004.jpg")
    path.write_bytes(content[: fourth.offset_data + 300])
    with caplog.at_level(logging.WARNING):
        data = data_of(read_sets(str(path)))
        assert re.search(r"0\.tar is damaged or cut short .*: 5 samples of it can be used", caplog.text)
        caplog.clear()
        read_sets(str(path))
        assert "0.tar is damaged or cut short" in caplog.text  # at each start
    assert len(data) == 5
    item = data[0, 4]
    assert item["bad"][0] == (f"{path}: 0004.jpg", "cut short: the shard ends before it")
    assert item["text"].startswith("picture")
    path.write_bytes(content[: fourth.offset_data - 512] + b"rubbish" * 400)
    with caplog.at_level(logging.WARNING):
        assert len(read_sets(str(path))) == 4


@pytest.mark.parametrize("rest", ["another tar", "rubbish", "far away"])
def test_what_follows_the_end_of_a_shard_is_said(tmp_path, caplog, rest):
    """`cat` joins tar files so that readers stop at the end of the first."""
    content = write_tar(tmp_path / "0.tar", samples(2)).read_bytes()
    more = {"another tar": content, "rubbish": b"x", "far away": bytes(3 << 20) + b"x"}[rest]
    (tmp_path / "1.tar").write_bytes(content + more)
    shards = Shards([f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"])
    assert len(shards) == 4
    (problem,), _ = shards.notes()
    assert re.match(rf"{tmp_path}/1.tar goes on after its end at byte \d+, .* joined by `cat`", problem)
    (tmp_path / "2.tar").write_bytes(content + bytes(3 << 20))  # as with a large blocking factor
    caplog.clear()
    assert len(Shards([f"{tmp_path}/2.tar"])) == 2 and "goes on" not in caplog.text


def test_a_list_in_a_txt_is_several_captions_and_said_once(tmp_path, caplog):
    """As img2dataset writes a caption that was a list."""
    members = {
        f"{n}.{kind}": picture() if kind == "jpg" else b"" for n in range(4) for kind in ("jpg", "txt")
    }
    texts = [b"['a dog', 'one dog']", b'["a cat"]', b"[a cow]", b"['a', None]"]
    members |= {f"{n}.txt": text for n, text in enumerate(texts)}
    shards = Shards([str(write_tar(tmp_path / "0.tar", members))])
    found = [entry["text"] for entry in shards]
    assert found == [["a dog", "one dog"], ["a cat"], "[a cow]", "['a', None]"]
    assert caplog.text.count(f"shards in {tmp_path}: lists written as text are read as several captions") == 1


def test_a_list_written_as_text_in_a_json_is_several_captions(tmp_path, caplog):
    fields = json.dumps({"caption": "['a dog', 'one dog']"}).encode()
    shards = Shards([str(write_tar(tmp_path / "0.tar", {"0.jpg": picture(), "0.json": fields}))])
    assert [entry["text"] for entry in shards] == [["a dog", "one dog"]]
    assert f"shards in {tmp_path}: lists written as text are read as several captions" in caplog.text


def test_a_txt_of_several_lines_is_one_caption_which_is_said(tmp_path, caplog):
    """Texts of web pages have ends of lines in them."""
    members = {"0.jpg": picture(), "0.txt": b"a dog\nin the snow\n", "1.jpg": picture(), "1.txt": b"a cat\n"}
    shards = Shards([str(write_tar(tmp_path / "0.tar", members))])
    assert [entry["text"] for entry in shards] == ["a dog\nin the snow\n", "a cat\n"]
    assert (
        caplog.text.count(f"shards in {tmp_path}: texts of several lines are read as one caption each") == 1
    )


def test_shards_that_are_no_tar_files(tmp_path, caplog):
    (tmp_path / "0.tar").write_text("<html>404 not found</html>" * 100)
    (tmp_path / "1.tar").touch()
    with pytest.raises(UserError, match=r"no samples in .*0.tar and 1 more shards"):
        read_sets(f"{tmp_path}/{{0..1}}.tar")
    write_tar(tmp_path / "2.tar", samples(2))
    assert len(read_sets(f"{tmp_path}/{{0..2}}.tar")) == 2
    assert "0.tar is a web page" in caplog.text and "1.tar is empty" in caplog.text


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "0.tgz"])
def test_a_compressed_shard_is_called_what_it_is(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(write_tar(tmp_path / "plain.tar", samples(2)).read_bytes()))
    with pytest.raises(UserError, match=rf"no samples in {path} .*{name} is compressed by gzip; unpack it"):
        read_sets(str(path))


def test_a_shard_that_vanishes_is_replaced(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", samples(4, 10 * number))
    data = data_of(read_sets(f"{tmp_path}/{{0..1}}.tar"))
    (tmp_path / "0.tar").unlink()
    items = [data[0, index] for index in range(8)]
    assert {item["where"].split(": ")[0] for item in items} == {f"{tmp_path}/1.tar"}
    bad = [pair for item in items for pair in item["bad"]]
    assert len(bad) >= 4 and set(bad) == {(f"{tmp_path}/0.tar", "No such file or directory")}


def test_commands_are_counted_by_the_folder_they_run_in(tmp_path, monkeypatch):
    """`cat 0.tar` is another shard elsewhere, and its number of samples is not that of the first folder."""
    for folder, number in (("a", 3), ("b", 5), ("a", 3)):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_tar(tmp_path / folder / "0.tar", samples(number, 0))
        monkeypatch.chdir(tmp_path / folder)
        assert shard_stream.count_samples(["pipe:cat 0.tar"]) == [number]
    assert len(list((tmp_path / "cache").rglob("shards-*.json"))) == 2


def test_a_url_is_tried_again_and_then_replaced(tmp_path, made):
    """By samples of the shards after it, of which few are fetched."""
    tar, tried = made.folder / "00000.tar", tmp_path / "tried"
    command = f"pipe:[ -e {tried} ] && cat {tar}; code=$?; touch {tried}; exit $code"
    assert shard_stream.fetch(command).entry(0)["text"]
    names = [f"pipe:cat {made.folder}/{number:05}.tar" for number in range(5)]
    names[1] = "pipe:exit 7"
    data = data_of(Mixture([Shards(names, [5] * 5)]))
    with mock.patch.object(shard_stream, "fetch", wraps=shard_stream.fetch) as fetch:
        for index in range(5, 10):
            item = data[0, index]
            assert item["bad"] == [("pipe:exit 7", "cannot be fetched: exit code 7")]  # a sample counts once
            assert item["where"].startswith(names[2])
        assert fetch.call_count == 2
    data = data_of(Mixture([Shards(["pipe:exit 7"], [5])]))
    assert data[0, 0] == {
        "bad": [("pipe:exit 7", "cannot be fetched: exit code 7")] * MAX_TRIES,
        "passed_over": {},
    }


def test_a_replacement_is_not_looked_for_in_a_shard_without_samples(made):
    names = ["pipe:exit 7", "pipe:exit 8", f"pipe:cat {made.folder}/00001.tar"]
    item = data_of(Mixture([Shards(names, [5, 0, 5])]))[0, 0]
    assert item["where"].startswith(names[2]) and {name for name, _ in item["bad"]} == {names[0]}


def test_a_process_that_is_killed_while_it_fetches_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    tar = write_tar(tmp_path / "0.tar", samples(2))
    shard = shard_stream.fetch(f"pipe:cat {tar}; ls {tmp_path}/scratch > {tmp_path}/seen")
    assert len(shard) == 2 and (tmp_path / "seen").read_text() == ""
    memory, seen = fsspec.filesystem("memory"), []
    memory.pipe_file("/killed/0.tar", tar.read_bytes())
    read = type(memory.open("/killed/0.tar")).read
    with mock.patch.object(
        type(memory.open("/killed/0.tar")),
        "read",
        lambda *args: seen.append(list((tmp_path / "scratch").iterdir())) or read(*args),
    ):
        assert len(shard_stream.fetch("memory://killed/0.tar")) == 2
    assert seen and not any(seen)


@pytest.mark.parametrize("size", ["5000000000", "9" * 19, "9" * 30])
def test_a_header_with_a_senseless_number_ends_its_shard_alone(tmp_path, size, caplog):
    path, broken = tmp_path / "0.tar", tarfile.TarInfo("0009.jpg")
    broken.pax_headers = {"size": size}
    with tarfile.open(write_tar(path, samples(2)), "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(broken)
        for name in ("0010.jpg", "0010.txt"):
            tar.addfile(tarfile.TarInfo(name))
    for name in (str(path), f"pipe:cat {path}"):
        assert [Shards([name])[index]["text"] for index in (0, 1)] == ["picture 0", "picture 1"]
    assert "0.tar is damaged or cut short" in caplog.text


# ---- making them ----


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_made_shards_are_the_same_each_time_and_a_run_goes_on(made, tmp_path):
    make(made.file, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(made.folder) and len(bytes_of(tmp_path)) == 5
    (tmp_path / "00003.tar").unlink()
    (tmp_path / "00004_stats.json").unlink()  # as if killed between the two
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("0000[012]*")}
    make(made.file, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(made.folder)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    with pytest.raises(UserError, match=r"has shards with other samples_per_shard, see shards\.json"):
        make(made.file, tmp_path, "--samples_per_shard", "6")


class Deadly(Sequence):
    """Entries of which the last kills the process that asks for it."""

    def __init__(self, entries: Sequence[dict]):
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> dict:
        if number == len(self) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.entries[number]


def test_a_worker_that_is_killed_ends_the_run_which_can_go_on(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("simla.dataset.pretrain.read_pairs", lambda *args: Deadly(read_pairs(*args)))
        with pytest.raises(UserError, match="one of the worker processes was killed"):
            make(made.file, tmp_path, "--samples_per_shard", "5", "--workers", "2")
    make(made.file, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(made.folder)


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path, capsys):
    files = {"a.jpg": picture(), "b.gif": picture(kind="GIF"), "c.jpg": picture()[:400], "d.txt": b"no image"}
    files |= {"e.png": picture(kind="PNG", size=(90, 60)), "f.webp": picture(kind="WEBP")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    entries = [{"image": name, "caption": f"of {name}"} for name in [*files, "gone.jpg"]]
    entries += [{"image": "a.jpg", "caption": ["one", "", "two"]}, {"image": "a.jpg", "caption": ""}]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    make(tmp_path / "train.json", tmp_path / "out", "--samples_per_shard", "4", "--image_res", "30")
    report = capsys.readouterr().out
    for cause in ("not an image; first: .*d.txt", "no such file; first: .*gone.jpg", "no caption; first"):
        assert re.search(rf" 1  {cause}", report), report
    assert re.search(r" 5  entries in .*/out/\{00000..00002\}.tar", report)
    entries = read_sets(f"{tmp_path}/out/{{00000..00002}}.tar")
    found = {entry["where"].split(": ")[1]: entry for entry in map(entries.__getitem__, range(len(entries)))}
    assert list(found) == [f"00000000{n}" for n in ("0.jpg", "1.jpg", "4.jpg", "5.webp", "7.jpg")]
    assert found["000000000.jpg"]["images"][0].read() == files["a.jpg"]
    assert found["000000007.jpg"]["text"] == ["one", "two"]
    with Image.open(found["000000004.jpg"]["images"][0]) as shrunk:
        assert shrunk.size == (45, 30)
    counted = [json.loads((tmp_path / f"out/0000{n}_stats.json").read_text())["successes"] for n in range(3)]
    assert counted == [2, 3, 0]


def test_the_size_of_shards(made):
    entries = read_pairs(made.file)
    ends = []
    for path in made.folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            ends.append(max(-(-(m.offset_data + m.size) // 512) * 512 for m in tar))
    assert [fill_of(entries, share * sum(ends), 0) for share in (1, 0.5, 0.001)] == [24, 12, 1]
    job = pickle.loads(pickle.dumps(Job(entries, made.folder, 5, 0)))  # as another process gets it
    assert write_shard(job, 2)["successes"] == 5


def test_nothing_to_make_shards_of(tmp_path):
    (tmp_path / "train.json").write_text('[{"image": "gone.jpg", "caption": "x"}]')
    with pytest.raises(UserError, match="no image could be read"):
        make(tmp_path / "train.json", tmp_path / "out")
    with pytest.raises(UserError, match=r"none of the images that were tried .* the last: .*gone.jpg"):
        make(tmp_path / "train.json", tmp_path / "out", "--shard_mb", "1")
