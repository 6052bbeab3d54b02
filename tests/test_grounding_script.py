"""Grounding.py for real: its files, training, resuming, ranks, bad input. As a program: evaluates as N forked
ranks, since the imports take longer than the work.
"""

import argparse
import json
import os
import pickle
import re
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import ExifTags, Image
from ruamel.yaml import YAML
from tiny import MODEL, ROOT, make_tiny, run, run_forked

import Grounding
from simla.configs.reader import read_config
from simla.configs.schema import GROUNDING
from simla.dataset.check.__main__ import main as check
from simla.dataset.grounding import GroundingEvalData, grounding_loader
from simla.dataset.images import BadImage, image_size, load_image
from simla.dataset.loaders import to_device
from simla.dataset.readers.plain_pickle import read_plain_pickle
from simla.dataset.text import build_tokenizer
from simla.dataset.transforms import View, crops, to_tensor
from simla.engine.peers import leave_together
from simla.evaluation.grounding import box_iou, grounding_chance
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError

ENTRY = {"image": "images/val/00000.jpg", "text": "a cup", "ref_id": 1}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, 2) if path.suffix == ".p" else json.dumps(content).encode())


def scenes(data: Path, split: str) -> list[dict]:
    return json.loads((data / f"scenes_{split}.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A data folder in which every object of a scene has an expression, and a config: {"data", "config"}."""
    folder = tmp_path_factory.mktemp("tiny")
    data = make_tiny(folder)["data"]
    train = [
        {"image": scene["image"], "text": f"the {thing['size']} {thing['kind']}"}
        for scene in scenes(data, "train")
        for thing in scene["objects"]
    ]
    write(data / "grounding_train.json", train)
    images, annotations, refs, dets, test = [], [], [], {}, []
    for image_id, scene in enumerate(scenes(data, "val") + scenes(data, "test"), 100):
        split = "val" if scene["image"].startswith("images/val") else f"test{'AB'[image_id % 2]}"
        images.append({"id": image_id, "height": 48, "width": 48, "file_name": scene["image"]})
        dets[image_id] = [[1.5, 2, 20, 21.5, 0.3]]
        for thing in scene["objects"]:
            ref_id = len(refs) + 1
            annotations.append({"id": 10 * ref_id, "image_id": image_id, "bbox": thing["box"]})
            refs.append({"ref_id": ref_id, "ann_id": 10 * ref_id, "image_id": image_id, "split": split})
            dets[image_id].append([*thing["box"], 0.9])
            test.append({"image": scene["image"], "text": f"the {thing['kind']}", "ref_id": ref_id})
    write(data / "grounding_test.json", test)
    write(data / "refcoco+" / "refs(unc).p", refs)
    write(data / "refcoco+" / "instances.json", {"images": images, "annotations": annotations})
    write(data / "refcoco+" / "dets.json", dets)
    config = {
        **MODEL,
        "train_file": str(data / "grounding_train.json"),
        "test_file": str(data / "grounding_test.json"),
        "refcoco_data": str(data),
        "det_file": str(data / "refcoco+" / "dets.json"),
        "text_encoder": str(data / "bert"),
        "batch_size_train": 4,
        "batch_size_test": 3,
        "randaugment": {"num_ops": 0},
        "optimizer": {"lr": 1e-3},
        "schedular": {"epochs": 2, "warmup_epochs": 1, "warmup_step_size": 2},
    }
    with (folder / "Grounding.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(config, file)
    return {"data": data, "config": folder / "Grounding.yaml"}


def grounding(monkeypatch, tiny: dict, out: Path, *flags: object) -> dict:
    """Grounding.py in this process -> result/grounding.json."""
    common = ["--device", "cpu", "--config", tiny["config"], "--output_dir", out, "--block_num", 1]
    monkeypatch.setattr(sys, "argv", ["Grounding.py", *map(str, common), *map(str, flags)])
    Grounding.parse_and_run()
    return json.loads((out / "result" / "grounding.json").read_text())


def config_of(tiny: dict, *overrides: str) -> dict:
    return read_config(str(tiny["config"]), GROUNDING, list(overrides))


# ---- data ----


def test_training_shows_whole_images_and_knows_them_by_their_file(tiny):
    config = config_of(tiny)
    tokenizer = build_tokenizer(config["text_encoder"])
    loader = grounding_loader(config, tokenizer, seed=1)
    entries = json.loads((tiny["data"] / "grounding_train.json").read_text())
    files = list(dict.fromkeys(entry["image"] for entry in entries))
    assert len(files) < len(entries)
    batch, keys = next(iter(loader)), list(loader.sampler)
    assert batch["idx"].tolist() == [files.index(entries[i]["image"]) for _, i in keys[:4]]
    for (_, index), image in zip(keys, batch["image"], strict=False):
        whole = load_image(tiny["data"] / entries[index]["image"])
        views = map(to_tensor, crops(whole, [View(None, mirrored, 32) for mirrored in (False, True)]))
        assert any(torch.equal(image, view) for view in views)


def test_one_image_under_two_paths_is_one_identity(tiny, tmp_path):
    """An expression of the same picture is no negative, however the entry names its file."""
    names = ["images/train/00000.jpg", "images/train/00001.jpg", "images/../images/train/00000.jpg"]
    entries = [{"image": str(tiny["data"] / name), "text": "a cup"} for name in names]
    write(tmp_path / "train.json", entries)
    config = config_of(tiny, f"train_file={tmp_path}/train.json", "batch_size_train=3")
    loader = grounding_loader(config, build_tokenizer(config["text_encoder"]), seed=0)
    order = [index for _, index in loader.sampler]
    assert next(iter(loader))["idx"].tolist() == [[0, 1, 0][index] for index in order]


def test_every_parameter_gets_a_gradient(tiny):
    config = config_of(tiny, "vit_mask_token=true")
    tokenizer = build_tokenizer(config["text_encoder"])
    batch = next(iter(grounding_loader(config, tokenizer, seed=0)))
    model = SIMLARetrieval.from_config(config)
    sum(Grounding.losses(model, to_device(batch, torch.device("cpu")), 0.4).values()).backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in named.items() if p.grad is None} == {"visual_encoder.mask_token"}
    assert all(p.grad.abs().sum() > 0 for n, p in named.items() if p.grad is not None and "key.bias" not in n)


def test_targets_are_joined_by_their_ids(tiny):
    data = GroundingEvalData(config_of(tiny))
    things = [(s, t) for split in ("val", "test") for s in scenes(tiny["data"], split) for t in s["objects"]]
    assert len(data) == len(data.targets) == len(things)
    for number, (target, (scene, thing)) in enumerate(zip(data.targets, things, strict=True)):
        assert (target.box, target.height, target.width) == (thing["box"], 48, 48)
        assert [box[:4] for box in target.candidates[1:]] == [o["box"] for o in scene["objects"]]
        assert target.split == "val" if "val" in scene["image"] else target.split in ("testA", "testB")
        assert target.score_name == target.split + "_d"
        assert data[number]["text"] == f"the {thing['kind']}" and data[number]["index"] == number
    without = GroundingEvalData(config_of(tiny, 'det_file=""')).targets[0]
    assert (without.candidates, without.score_name) == (None, "val_h")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_plain_values(tmp_path, protocol):
    content = [{"ref_id": 7, "split": "testA", "sent": ["café", "x"], "x": (1.5, None, True, 2**70)}]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(content, protocol))
    assert read_plain_pickle(tmp_path / "refs.p") == content


def test_a_pickle_of_python_2(tmp_path):
    """Its str may hold any byte; ints may be long."""
    text = b"(lp0\n(dp1\nS'ref_id'\np2\nL7L\nsS'raw'\np3\nS'caf\\xe9'\np4\nsS'uni'\nVcaf\\u00e9\nsa."
    (tmp_path / "refs.p").write_bytes(text)
    assert read_plain_pickle(tmp_path / "refs.p") == [{"ref_id": 7, "raw": "café", "uni": "café"}]
    (tmp_path / "refs.p").write_bytes(b"\x80\x02]q\x00}q\x01U\x06ref_idq\x02K\x07sa.")
    assert read_plain_pickle(tmp_path / "refs.p") == [{"ref_id": 7}]


# Written by cPickle of CPython 2.7.18 with numpy 1.16.6, protocols 0 and 2.
PYTHON_2_REFS = (
    b"(lp1\nccollections\nOrderedDict\np2\n((lp3\n(lp4\nS'ref_id'\np5\nacnumpy"
    b".core.multiarray\nscalar\np6\n(cnumpy\ndtype\np7\n(S'i8'\nI0\nI1\ntRp8\n(I"
    b"3\nS'<'\nNNNI-1\nI-1\nI0\ntbS'\\x07\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntRp9\n"
    b"aa(lp10\nS'split'\np11\naS'val'\np12\naa(lp13\nS'sent_ids'\np14\nac__bui"
    b"ltin__\nset\np15\n((lp16\nI1\naI2\natRp17\naa(lp18\nS'seen'\np19\nac__buil"
    b"tin__\nfrozenset\np20\n((lp21\nL3L\natRp22\naa(lp23\nS'sent'\np24\naS'caf"
    b"\\xc3\\xa9'\np25\naa(lp26\nS'raw'\np27\naS'caf\\xe9'\np28\naa(lp29\nS'text'"
    b"\np30\naVcaf\xe9\np31\naa(lp32\nS'area'\np33\nag6\n(g7\n(S'f4'\nI0\nI1\ntRp34\n("
    b"I3\nS'<'\nNNNI-1\nI-1\nI0\ntbS'\\x00\\x00\\x00?'\ntRp35\naa(lp36\nS'iscrowd"
    b"'\np37\nag6\n(g7\n(S'b1'\nI0\nI1\ntRp38\n(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbS'\\x00"
    b"'\ntRp39\naa(lp40\nS'name'\np41\nag6\n(g7\n(S'S3'\nI0\nI1\ntRp42\n(I3\nS'|'\n"
    b"NNNI3\nI1\nI0\ntbS'dog'\ntRp43\naa(lp44\nS'data'\np45\nac__builtin__\nbyt"
    b"earray\np46\n(Vdog\nS'latin-1'\ntRp47\naatRp48\na.",
    b"\x80\x02]q\x01ccollections\nOrderedDict\nq\x02]q\x03(]q\x04(U\x06ref_idq\x05cnumpy.core.mu"
    b"ltiarray\nscalar\nq\x06cnumpy\ndtype\nq\x07U\x02i8K\x00K\x01\x87Rq\x08(K\x03U\x01<NNNJ\xff"
    b"\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x08\x07\x00\x00\x00\x00\x00\x00\x00\x86Rq\te]q\n(U\x05s"
    b"plitq\x0bU\x03valq\x0ce]q\r(U\x08sent_idsq\x0ec__builtin__\nset\nq\x0f]q\x10(K\x01K\x02e\x85R"
    b"q\x11e]q\x12(U\x04seenq\x13c__builtin__\nfrozenset\nq\x14]q\x15\x8a\x01\x03a\x85Rq\x16e]q\x17"
    b"(U\x04sentq\x18U\x05caf\xc3\xa9q\x19e]q\x1a(U\x03rawq\x1bU\x04caf\xe9q\x1ce]q\x1d(U\x04textq"
    b'\x1eX\x05\x00\x00\x00caf\xc3\xa9q\x1fe]q (U\x04areaq!h\x06h\x07U\x02f4K\x00K\x01\x87Rq"(K\x03'
    b"U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x04\x00\x00\x00?\x86Rq#e]q$(U\x07iscrowdq"
    b"%h\x06h\x07U\x02b1K\x00K\x01\x87Rq&(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU"
    b"\x01\x00\x86Rq'e]q((U\x04nameq)h\x06h\x07U\x02S3K\x00K\x01\x87Rq*(K\x03U\x01|NNNK\x03K\x01K"
    b"\x00tbU\x03dog\x86Rq+e]q,(U\x04dataq-c__builtin__\nbytearray\nq.X\x03\x00\x00\x00dogU\x07lati"
    b"n-1\x86Rq/ee\x85Rq0a.",
)
REFS_OF_ALL_KINDS = [
    {
        "ref_id": 7,
        "split": "val",
        "sent_ids": {1, 2},
        "seen": {3},
        "sent": "café",  # UTF-8
        "raw": "café",  # Latin-1
        "text": "café",  # unicode
        "area": 0.5,
        "iscrowd": False,
        "name": "dog",
        "data": "dog",
    }
]


@pytest.mark.parametrize("content", PYTHON_2_REFS)
def test_python_2_pickles_of_sets_ordered_dicts_bytes_and_numpy_scalars(tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    refs = read_plain_pickle(tmp_path / "refs.p")
    assert refs == REFS_OF_ALL_KINDS
    assert type(refs[0]) is dict and type(refs[0]["ref_id"]) is int and type(refs[0]["area"]) is float


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_python_3_pickles_of_sets_ordered_dicts_bytes_and_numpy_scalars(tmp_path, protocol):
    """Among them what a pickle of Python 2 becomes that was read as bytes and written again."""
    values = {
        b"ref_id": np.int64(7),
        "split": np.str_("val"),
        "sent_ids": {1, 2},
        "seen": frozenset([3]),
        b"sent": "café".encode(),
        "raw": "café".encode("latin-1"),
        "text": "café",
        "area": np.float32(0.5),
        "iscrowd": np.bool_(False),
        "name": np.bytes_(b"dog"),
        "data": bytearray(b"dog"),
    }
    (tmp_path / "refs.p").write_bytes(pickle.dumps([OrderedDict(values)], protocol))
    refs = read_plain_pickle(tmp_path / "refs.p")
    assert refs == REFS_OF_ALL_KINDS and type(refs[0]["ref_id"]) is int
    empty = [b"", bytearray(), np.str_(""), set(), defaultdict(list, a=[1])]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(empty, protocol))
    assert read_plain_pickle(tmp_path / "refs.p") == ["", "", "", set(), {"a": [1]}]


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_that_wants_to_run_code_is_refused_by_name(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "refs.p"
    cases = [
        (Evil(os.system, f"touch {victim}"), rf"{os.name}.system"),
        (Evil(eval, f"open({str(victim)!r}, 'w')"), "builtins.eval|__builtin__.eval"),
        (Evil(Path.touch, victim), "pathlib|builtins.getattr|__builtin__.getattr"),
        (np.arange(3), "numpy"),  # its numbers are read, arrays have no place in a reference
        (argparse.Namespace(ref_id=1), "argparse.Namespace|copy_reg._reconstructor"),
    ]
    for value, name in cases:
        for protocol in (0, 2, 4):
            path.write_bytes(pickle.dumps([{"ref_id": 1}, value], protocol))
            with pytest.raises(UserError, match=name) as error:
                read_plain_pickle(path)
            assert str(path) in str(error.value) and "\n" not in str(error.value)
    raw = {
        b"cos\nsystem\n(S'touch %s'\ntR." % bytes(victim): "os.system",  # as protocol 0 writes a call
        b"(S'touch %s'\nios\nsystem\n." % bytes(victim): "os.system",  # as Python 2 writes an instance
        b"Psome id\n.": "not a complete pickle",  # an object that lies elsewhere
        b"\x80\x02]q\x00}q\x01U\x06ref": "not a complete pickle",
        b"": "refs.p is empty",
        b"<html>": "refs.p is a web page",
        b"version https://git-lfs.github.com/spec/v1\n": "refs.p is a pointer of Git LFS",
        b"\x1f\x8b\x08": "refs.p is compressed by gzip",
        b"[1, 2]": "not a complete pickle",
    }
    for content, message in raw.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_plain_pickle(path)
    assert not victim.exists()
    with pytest.raises(UserError, match=r"nowhere.p cannot be read: No such file"):
        read_plain_pickle(tmp_path / "nowhere.p")


REF = {"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "val"}
INSTANCES = {
    "images": [{"id": 9, "height": 48, "width": 64}],
    "annotations": [{"id": 5, "image_id": 9, "bbox": [1, 2, 3, 4.5]}],
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"test": [{**ENTRY, "ref_id": 2}]}, ["test.json: entry 0", "ref_id 2 is not in", "refs(unc).p"]),
        ({"test": [{"image": "a.jpg", "text": "a cup"}]}, ["test.json: entry 0 has no 'ref_id'"]),
        ({"test": [{"image": "a.jpg", "caption": ["a"]}]}, ["test.json: entry 0 has no 'text'", "caption"]),
        ({"test": [{**ENTRY, "ref_id": "1"}]}, ["'ref_id' must be a whole number, found '1'"]),
        ({"test": []}, ["no entries", "test.json"]),
        ({"test": {"a": {}}}, ["test.json must hold a JSON list"]),
        ({"refs": [{**REF, "image_id": 8}]}, ["ref_id 1: image_id 8 is not in", "instances.json"]),
        ({"refs": [{**REF, "ann_id": 6}]}, ["ref_id 1: ann_id 6 is not in", "instances.json"]),
        ({"refs": [{**REF, "split": "train"}]}, ["ref_id 1 belongs to split 'train'", "testA"]),
        ({"refs": [{"ref_id": 1}]}, ["refs(unc).p: ref_id 1: 'split' must be text, found None"]),
        ({"refs": [REF, {"id": 3}]}, ["refs(unc).p entry 1: 'ref_id' must be a whole number"]),
        ({"refs": {"1": REF}}, ["refs(unc).p must be a list of objects with 'ref_id', found dict"]),
        ({"refs": [7]}, ["refs(unc).p entry 0 must be an object, found 7"]),
        ({"instances": [1]}, ["instances.json must hold a JSON object, found list"]),
        ({"instances": {"info": 1}}, ["instances.json images must be a list", "NoneType"]),
        (
            {"instances": {**INSTANCES, "images": [{"id": 9, "height": 48}]}},
            ["instances.json: image 9: 'width' must be a whole number", "None"],
        ),
        (
            {"instances": {**INSTANCES, "images": [{"id": 9, "height": 0, "width": 3}]}},
            ["image 9: 'height' must be a whole number above 0, found 0"],
        ),
        (
            {"instances": {**INSTANCES, "annotations": [{"id": 5, "bbox": [1, 2, 3]}]}},
            ["instances.json: annotation 5", "[1, 2, 3]"],
        ),
        ({"dets": {"8": [[1, 2, 3, 4]]}}, ["ref_id 1: image_id 9 is not in", "dets.json"]),
        (
            {"dets": {"9": [[1, 2, 3, 4], [1, 2, 0, 4]]}},
            ["dets.json: image 9, box 1", "above 0", "[1, 2, 0, 4]"],
        ),
        ({"dets": {"9": [[1, 2, 3, -4]]}}, ["dets.json: image 9, box 0", "[1, 2, 3, -4]"]),
        ({"dets": {"9": [[1, 2, 3]]}}, ["dets.json: image 9, box 0", "[1, 2, 3]", "remove"]),
        ({"dets": {"9": [[1, 2, 3, "4"]]}}, ["image 9, box 0", "'4'"]),
        ({"dets": {"9": [[1, 2, 3, float("nan")]]}}, ["image 9, box 0", "nan"]),
        ({"dets": {"9": 3}}, ["image 9 must have a list of boxes, found 3"]),
        ({"dets": [[1, 2, 3, 4]]}, ["dets.json must hold a JSON object"]),
        ({"dets": None}, ["dets.json must hold a JSON object, found NoneType"]),
    ],
)
def test_files_that_do_not_fit_together(tiny, tmp_path, changes, expected):
    files = {"test": [ENTRY], "refs": [REF], "instances": INSTANCES, "dets": {"9": [[0, 0, 5, 5]]}, **changes}
    write(tmp_path / "test.json", files["test"])
    for name, key in (("refs(unc).p", "refs"), ("instances.json", "instances"), ("dets.json", "dets")):
        write(tmp_path / "refcoco+" / name, files[key])
    paths = {"test_file": "test.json", "refcoco_data": "", "det_file": "refcoco+/dets.json"}
    config = config_of(tiny, *(f"{key}={tmp_path / name}" for key, name in paths.items()))
    with pytest.raises(UserError) as error:
        GroundingEvalData(config)
    assert all(part in str(error.value) for part in expected), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tiny):
    for override, name in (
        ("det_file=/nowhere/dets.json", "/nowhere/dets.json"),
        ("refcoco_data=/nowhere", r"/nowhere/refcoco\+/refs\(unc\).p"),
        ("test_file=/nowhere/test.json", "/nowhere/test.json"),
    ):
        with pytest.raises(UserError, match=f"{name} cannot be read: No such file"):
            GroundingEvalData(config_of(tiny, override))


# ---- the script ----


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Two epochs on two ranks, as a user starts them."""
    out = tmp_path_factory.mktemp("trained")
    flags = ["--config", tiny["config"], "--output_dir", out, "--block_num", 1]
    done = run("Grounding.py", *flags, num_processes=2)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_training_writes_its_outputs(trained):
    out, stdout = trained
    records = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    names = ("train_loss_ita", "train_loss_itm", "train_lr", "val_d", "testA_d", "testB_d")
    assert all(isinstance(record[name], float) for record in records for name in names)
    best = max(records, key=lambda record: record["val_d"])  # the first of equals
    checkpoint = torch.load(out / "checkpoint_best.pth", weights_only=True)
    assert checkpoint["epoch"] == best["epoch"] and checkpoint["best"]["val_d"] == best["val_d"]
    result = json.loads((out / "result" / "grounding.json").read_text())
    assert {name: part["accuracy"] for name, part in result["splits"].items()} == {
        name: best[name] for name in ("val_d", "testA_d", "testB_d")
    }
    assert result["weights"] == str(out / "checkpoint_best.pth")
    assert (result["gradcam_mode"], result["block_num"]) == ("itm", 1)
    assert "gradcam_mode itm, block_num 1" in stdout and "an even choice among the boxes" in stdout


def test_the_result_file_accounts_for_every_expression(trained, tiny):
    out, _ = trained
    result = json.loads((out / "result" / "grounding.json").read_text())
    entries = json.loads((tiny["data"] / "grounding_test.json").read_text())
    assert [found["ref_id"] for found in result["choices"]] == [entry["ref_id"] for entry in entries]
    assert sum(part["n"] for part in result["splits"].values()) == len(entries)
    for name, part in result["splits"].items():
        own = [found for found in result["choices"] if found["score"] == name]
        assert part["accuracy"] == 100 * sum(found["iou"] >= 0.5 for found in own) / part["n"]
        assert part["heat_accuracy"] == 100 * sum(found["heat_iou"] >= 0.5 for found in own) / part["n"]
        assert part["without_box"] == sum(found["box"] is None for found in own)
        assert 0 < part["chance"] < 100


def test_every_rank_count_makes_the_same_choices(trained, tiny, tmp_path):
    out, _ = trained
    kept = json.loads((out / "result" / "grounding.json").read_text())
    checkpoint = out / "checkpoint_best.pth"
    done = run_forked(__file__, tiny["config"], checkpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    for mode in ("itm", "itc"):
        results = []
        for ranks in (1, 2, 3):
            folder = tmp_path / f"{mode}{ranks}"
            results.append(json.loads((folder / "result" / "grounding.json").read_text()))
            logged = json.loads((folder / "log.txt").read_text())
            assert logged == {name: part["accuracy"] for name, part in results[-1]["splits"].items()}
        assert results[0] == results[1] == results[2]
        if mode == "itm":  # what the run itself reported of these weights
            assert (results[0]["choices"], results[0]["splits"]) == (kept["choices"], kept["splits"])


def test_an_interrupted_run_resumes_as_if_unbroken(tiny, tmp_path, monkeypatch):
    whole = grounding(monkeypatch, tiny, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def choose(*args, original=Grounding.choose, calls=[]):  # noqa: B006
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args)

        patch.setattr(Grounding, "choose", choose)
        grounding(patch, tiny, tmp_path / "broken")
    resumed = grounding(monkeypatch, tiny, tmp_path / "broken", "--resume")
    states = [
        torch.load(tmp_path / run / "checkpoint_01.pth", weights_only=True) for run in ("whole", "broken")
    ]
    assert [state["epoch"] for state in states] == [1, 1]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    logs = [(tmp_path / run / "log.txt").read_text() for run in ("whole", "broken")]
    assert [json.loads(line)["epoch"] for line in logs[1].splitlines()] == [0, 1]
    assert logs[0] == logs[1]
    assert states[0]["best"] == states[1]["best"]
    assert resumed["choices"] == whole["choices"]


def test_without_detector_boxes_come_from_the_heat_map(tiny, tmp_path, monkeypatch, caplog):
    overrides = ["--overrides", 'det_file=""', "schedular.epochs=1"]
    result = grounding(monkeypatch, tiny, tmp_path, *overrides)
    record = json.loads((tmp_path / "log.txt").read_text())
    assert {"val_h", "testA_h", "testB_h"} < set(record) and "val_d" not in record
    best = torch.load(tmp_path / "checkpoint_best.pth", weights_only=True)
    assert best["best"]["val_h"] == record["val_h"]
    assert set(result["splits"]) == {"val_h", "testA_h", "testB_h"}
    assert result["boxes"] == "from the heat map alone" and result["chance"] == "the whole image as box"
    boxes = [found["box"] for found in result["choices"]]
    assert any(boxes)  # None where all of the map is 0, as of some weights that nothing has trained
    for x, y, w, h in filter(None, boxes):
        assert 0 <= x < x + w <= 48 and 0 <= y < y + h <= 48


def test_undefined_cases_are_counted_and_said(tiny, tmp_path, monkeypatch, capsys):
    """No testB, an image without boxes, and boxes outside the image, which no heat reaches."""
    dets = json.loads((tiny["data"] / "refcoco+" / "dets.json").read_text())
    first, second, *_ = dets
    dets[first], dets[second] = [], [[100, 100, 5, 5]]
    write(tmp_path / "dets.json", dets)
    targets = GroundingEvalData(config_of(tiny)).targets
    entries = json.loads((tiny["data"] / "grounding_test.json").read_text())
    entries = [e for e, target in zip(entries, targets, strict=True) if target.split != "testB"]
    entries = [{**entry, "image": str(tiny["data"] / entry["image"])} for entry in entries]
    write(tmp_path / "test.json", entries)
    flags = ["--overrides", f"det_file={tmp_path}/dets.json", f"test_file={tmp_path}/test.json"]
    result = grounding(monkeypatch, tiny, tmp_path / "out", "--evaluate", *flags)
    shown = capsys.readouterr().out
    splits = result["splits"]
    assert splits["testB_d"] == {"n": 0, "accuracy": None, "without_box": 0}
    assert "testB_d   no expressions in test_file, no accuracy" in shown
    scene_objects = [len(scene["objects"]) for scene in scenes(tiny["data"], "val")[:2]]
    assert splits["val_d"]["without_box"] == sum(scene_objects)
    assert f"val_d     {sum(scene_objects)} counted as wrong" in shown
    assert all(
        found["box"] is None and found["iou"] == 0 for found in result["choices"][: sum(scene_objects)]
    )
    assert set(json.loads((tmp_path / "out" / "log.txt").read_text())) == {"val_d", "testA_d"}


def test_what_stops_a_run_before_it_starts(tiny, tmp_path, monkeypatch):
    for mode, name in (("itm", "text"), ("itc", "image")):
        with pytest.raises(UserError, match=f"^block 8: .*{mode} it is a layer of the {name} encoder"):
            grounding(monkeypatch, tiny, tmp_path, "--gradcam_mode", mode, "--block_num", 8)
    targets = GroundingEvalData(config_of(tiny)).targets
    entries = json.loads((tiny["data"] / "grounding_test.json").read_text())
    entries = [e for e, target in zip(entries, targets, strict=True) if target.split != "val"]
    write(tmp_path / "test.json", entries)
    with pytest.raises(UserError, match=r"test.json: split val, .*best epoch, is empty"):
        grounding(monkeypatch, tiny, tmp_path, "--overrides", f"test_file={tmp_path}/test.json")
    write(tmp_path / "train.json", [{"image": "a.jpg", "caption": "a cup", "image_id": 1}])
    with pytest.raises(UserError, match=r"train.json: entry 0 has no 'text'; found image, caption, image_id"):
        grounding(monkeypatch, tiny, tmp_path, "--overrides", f"train_file={tmp_path}/train.json")
    assert not list(tmp_path.glob("*.pth"))


# ---- RefCOCO and RefCOCOg ----


FAMILY = {  # data set -> its references, the split of an expression of RefCOCO+'s testA or testB
    "refcoco": ("refcoco/refs(unc).p", {}),
    "refcocog": ("refcocog/refs(umd).p", {"testA": "test", "testB": "test"}),
    "refcocog_google": ("refcocog/refs(google).p", {"testA": "val", "testB": "val"}),
}


def write_family(tiny: dict, folder: Path) -> list[str]:
    """The tiny references once more as RefCOCO's and RefCOCOg's, under other ids -> a test file of each."""
    refs = read_plain_pickle(tiny["data"] / "refcoco+" / "refs(unc).p")
    entries = json.loads((tiny["data"] / "grounding_test.json").read_text())
    entries = [{**entry, "image": str(tiny["data"] / entry["image"])} for entry in entries]
    instances = json.loads((tiny["data"] / "refcoco+" / "instances.json").read_text())
    files = []
    for shift, (name, (file, splits)) in enumerate(FAMILY.items(), 1):
        write(
            folder / file,
            [{**r, "ref_id": r["ref_id"] + shift, "split": splits.get(r["split"], r["split"])} for r in refs],
        )
        write((folder / file).with_name("instances.json"), instances)
        moved = [{**entry, "ref_id": entry["ref_id"] + shift, "dataset": name} for entry in entries]
        write(folder / f"{name}_test.json", moved)
        files.append(str(folder / f"{name}_test.json"))
    for file in ("refs(unc).p", "instances.json"):
        (folder / "refcoco+").mkdir(exist_ok=True)
        (folder / "refcoco+" / file).symlink_to(tiny["data"] / "refcoco+" / file)
    return files


def test_the_whole_family_is_scored_each_under_its_name(tiny, tmp_path, monkeypatch, capsys):
    """The same objects in each of them: so scores that are those of RefCOCO+."""
    files = write_family(tiny, tmp_path)
    files.append(str(tiny["data"] / "grounding_test.json"))
    flags = [f"test_file=[{', '.join(files)}]", f"refcoco_data={tmp_path}"]
    result = grounding(monkeypatch, tiny, tmp_path / "out", "--evaluate", "--overrides", *flags)
    shown, splits = capsys.readouterr().out, result["splits"]
    three = ["val_d", "testA_d", "testB_d"]
    own = {"refcocog_val_d": ["val_d"], "refcocog_test_d": three[1:], "refcocog_google_val_d": three}
    own |= {f"refcoco_{name}": [name] for name in three}
    assert list(splits) == [*(f"refcoco_{name}" for name in three), *list(own)[:3], *three]
    for name, parts in own.items():
        same = [splits[part] for part in parts]
        assert splits[name]["n"] == sum(part["n"] for part in same)
        for score in ("accuracy", "chance", "heat_accuracy", "heat_chance"):
            total = sum(part[score] * part["n"] for part in same)
            assert splits[name][score] == pytest.approx(total / splits[name]["n"]), (name, score)
        assert re.search(rf"^{name} +{splits[name]['accuracy']:.2f} +chance", shown, re.M)
    num = len(json.loads(Path(files[-1]).read_bytes()))
    assert result["expressions"] == dict.fromkeys([*FAMILY, "refcoco+"], num)
    logged = json.loads((tmp_path / "out" / "log.txt").read_text())
    assert logged == {name: part["accuracy"] for name, part in splits.items()}
    for chosen, target in zip(
        result["choices"], GroundingEvalData(config_of(tiny, *flags)).targets, strict=True
    ):
        assert chosen["heat_iou"] == (box_iou(target.box, chosen["heat_box"]) if chosen["heat_box"] else 0)
        assert chosen["heat_chance"] == grounding_chance(target.box, [[0, 0, 48, 48]])
        assert chosen["chance"] == grounding_chance(target.box, target.candidates)
        assert target.where.startswith(str(files[[*FAMILY, "refcoco+"].index(target.data_set)]))


def test_training_on_refcocog_chooses_the_best_epoch_by_its_val(tiny, tmp_path, monkeypatch, capsys):
    """A split without expressions has no score; of several data sets the first val counts."""
    file = write_family(tiny, tmp_path)[1]
    targets = GroundingEvalData(config_of(tiny)).targets
    entries = json.loads(Path(file).read_bytes())
    write(tmp_path / "val.json", [e for e, t in zip(entries, targets, strict=True) if t.split == "val"])
    flags = [
        f"test_file={tmp_path}/val.json",
        f"refcoco_data={tmp_path}",
        'det_file=""',
        "schedular.epochs=1",
    ]
    result = grounding(monkeypatch, tiny, tmp_path / "out", "--overrides", *flags)
    assert list(result["splits"]) == ["refcocog_val_h", "refcocog_test_h"]
    assert "refcocog_test_h no expressions in test_file, no accuracy" in capsys.readouterr().out
    best = torch.load(tmp_path / "out" / "checkpoint_best.pth", weights_only=True)["best"]
    assert best["refcocog_val_h"] == result["splits"]["refcocog_val_h"]["accuracy"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"dataset": "refcoco"}, r"refcoco/refs\(unc\).p cannot be read"),
        ({"dataset": "flickr"}, "'dataset' must be refcoco., refcoco, .* means refcoco.; found 'flickr'"),
        (
            {"image": "train2014/COCO_train2014_000000000008.jpg"},
            "ref_id 1 of refcoco. is in image 9, not in .*08.jpg",
        ),
    ],
)
def test_entries_of_another_data_set_are_not_taken_for_refcoco_s(tiny, tmp_path, entry, expected):
    write(tmp_path / "test.json", [{**ENTRY, **entry}])
    write(tmp_path / "refcoco+" / "refs(unc).p", [REF])
    write(tmp_path / "refcoco+" / "instances.json", INSTANCES)
    flags = [f"test_file={tmp_path}/test.json", f"refcoco_data={tmp_path}", 'det_file=""']
    with pytest.raises(UserError, match=expected):
        GroundingEvalData(config_of(tiny, *flags))
    write(
        tmp_path / "test.json", [{**ENTRY, "image": "val2017/000000000009.jpg"}]
    )  # 2017's name of the image
    assert GroundingEvalData(config_of(tiny, *flags)).targets[0].width == 64


@pytest.mark.parametrize(
    ("size", "orientation", "said"),
    [
        ((64, 48), 1, ""),
        ((32, 24), 1, ""),  # made smaller
        ((48, 64), 1, "turned"),
        ((64, 48), 6, "turned"),  # by its EXIF tag, as it is shown
        ((48, 48), 1, "1 of 1 photos have another shape than those in which their boxes were measured"),
    ],
)
def test_photos_that_were_turned_or_cut_do_not_fit_refcoco_s_boxes(
    tiny, tmp_path, caplog, size, orientation, said
):
    write(tmp_path / "test.json", [{**ENTRY, "image": "photo.jpg"}])
    write(tmp_path / "refcoco+" / "refs(unc).p", [REF])
    write(tmp_path / "refcoco+" / "instances.json", INSTANCES)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", size).save(tmp_path / "photo.jpg", exif=exif)
    config = config_of(tiny, f"test_file={tmp_path}/test.json", f"refcoco_data={tmp_path}", 'det_file=""')
    if said == "turned":
        with pytest.raises(UserError, match=r"photo.jpg is 48 x 64 as it is shown, .* in one of 64 x 48"):
            GroundingEvalData(config)
        return
    GroundingEvalData(config)
    assert said in caplog.text and bool(said) == bool(caplog.text)


# ---- boxes in the entries ----


def own_entries(data: Path) -> list[dict]:
    """Those of the tiny test set with the boxes that RefCOCO+'s files have for them; no ref_id."""
    return [
        {
            "image": str(data / scene["image"]),
            "text": f"the {thing['kind']}",
            "box": thing["box"],
            "split": split,
        }
        for part, split in (("val", "val"), ("test", "test"))
        for scene in scenes(data, part)
        for thing in scene["objects"]
    ]


@pytest.mark.parametrize("boxes", ["heat", "detector"])
def test_own_photos_are_scored_as_refcoco_s(tiny, tmp_path, monkeypatch, boxes):
    """Without its files: the same boxes, and the same accuracy, from the same model."""
    entries = own_entries(tiny["data"])
    write(tmp_path / "test.json", entries)
    detections = json.loads((tiny["data"] / "refcoco+" / "dets.json").read_text())
    images = dict.fromkeys(entry["image"] for entry in entries)
    write(tmp_path / "dets.json", dict(zip(images, detections.values(), strict=True)))
    theirs = ["--evaluate", "--overrides"] + (['det_file=""'] if boxes == "heat" else [])
    ours = ["--evaluate", "--overrides", f"test_file={tmp_path}/test.json", 'refcoco_data=""', 'det_file=""']
    if boxes == "detector":
        theirs, ours[-1] = theirs[:1], f"det_file={tmp_path}/dets.json"
    expected = grounding(monkeypatch, tiny, tmp_path / "refcoco", *theirs)
    result = grounding(monkeypatch, tiny, tmp_path / "own", *ours)
    kind = boxes[0]
    assert list(result["splits"]) == [f"val_{kind}", f"test_{kind}"]
    assert result["splits"][f"val_{kind}"] == expected["splits"][f"val_{kind}"]
    places = [f"{tmp_path}/test.json: entry {number}" for number in range(len(entries))]
    assert [found["entry"] for found in result["choices"]] == places
    for found, choice in zip(result["choices"], expected["choices"], strict=True):
        assert (found["box"], found["iou"]) == (choice["box"], choice["iou"])


def test_own_photos_train_and_refcoco_s_entries_may_stand_beside_them(tiny, tmp_path, monkeypatch):
    entries = own_entries(tiny["data"])[:4]
    entries = [{key: value for key, value in entry.items() if key != "split"} for entry in entries]
    write(tmp_path / "own.json", entries)
    flags = ['refcoco_data=""', 'det_file=""', "schedular.epochs=1"]
    result = grounding(
        monkeypatch, tiny, tmp_path / "out", "--overrides", f"test_file={tmp_path}/own.json", *flags
    )
    assert list(result["splits"]) == ["val_h"] and result["splits"]["val_h"]["n"] == 4
    both = f"test_file=[{tmp_path}/own.json, {tiny['data']}/grounding_test.json]"
    data = GroundingEvalData(config_of(tiny, both, 'det_file=""'))
    assert [target.ref_id for target in data.targets[:5]] == [None] * 4 + [1]
    assert data.splits == ["own_val", "val", "testA", "testB"]  # each for itself
    assert [target.score_name for target in data.targets[3:5]] == ["own_val_h", "val_h"]


@pytest.mark.parametrize(
    "to_wrong", [lambda x, y, w, h: [x, y, x + w, y + h], lambda *box: [v / 48 for v in box]]
)
def test_a_detector_s_corners_or_shares_are_refused(tiny, tmp_path, to_wrong):
    boxes = json.loads(Path(config_of(tiny)["det_file"]).read_bytes())
    boxes = {
        image: [[*to_wrong(*box[:4]), *box[4:]] for box in of_image] for image, of_image in boxes.items()
    }
    write(tmp_path / "dets.json", boxes)
    with pytest.raises(UserError, match=r"dets.json: \d+ of \d+ boxes are not inside their image, such as"):
        GroundingEvalData(config_of(tiny, f"det_file={tmp_path}/dets.json"))


def test_a_box_is_in_pixels_of_the_upright_photo(tiny, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # on its side
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (60, 40)).save(tmp_path / "plain.png")
    for name, size in (("turned.jpg", (40, 60)), ("plain.png", (60, 40))):
        assert image_size(tmp_path / name) == load_image(tmp_path / name).size == size
    (tmp_path / "half.png").write_bytes((tmp_path / "plain.png").read_bytes()[:60])
    with pytest.raises(BadImage, match=r"half.png: truncated: [^:]*$"):
        image_size(tmp_path / "half.png")
    entries = [{"image": "turned.jpg", "text": "a cup", "box": [10, 20.5, 20, 39]}]
    write(tmp_path / "test.json", entries)
    flags = [f"test_file={tmp_path}/test.json", 'refcoco_data=""', 'det_file=""']
    (target,) = GroundingEvalData(config_of(tiny, *flags)).targets
    assert (target.width, target.height, target.box, target.split) == (40, 60, [10, 20.5, 20, 39], "val")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"box": [1, 2, 3]}, r"'box' must be \[x, y, width, height\] .* found \[1, 2, 3\]"),
        ({"box": [1, 2, 0, 4]}, "'box' must be .* above 0, found"),
        ({"box": "1 2 3 4"}, "'box' must be .* found '1 2 3 4'"),
        ({"box": [20, 20, 45, 40]}, r"inside the image of 48 x 48, found \[20, 20, 45, 40\]"),
        ({"box": [0.1, 0.1, 0.5, 0.5]}, "'box' must be .* more than one wide and high"),
        ({"split": "train"}, "'split' must be val, testA, testB or test, .* found 'train'"),
        ({"box": None}, "has no 'ref_id', .* and no 'box'"),
        ({"box": None, "ref_id": 1}, "has no 'box': name RefCOCO.'s folder as refcoco_data"),
        ({"image": "nowhere.jpg"}, "nowhere.jpg: no such file; .*entry 1"),
    ],
)
def test_wrong_boxes_are_named_by_the_script_and_the_check(tiny, tmp_path, changes, expected):
    first, second, *_ = own_entries(tiny["data"])
    write(tmp_path / "test.json", [first, {**second, **changes}])
    flags = [f"test_file={tmp_path}/test.json", 'refcoco_data=""', 'det_file=""']
    with pytest.raises(UserError, match=expected) as error:
        GroundingEvalData(config_of(tiny, *flags))
    assert f"{tmp_path}/test.json: entry 1" in str(error.value)
    command = ["--config", str(tiny["config"]), "--output_dir", str(tmp_path / "out"), "--workers", "1"]
    assert check([*command, "--overrides", *flags]) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    said = report["files"] + [f"{row['cause']}: {row['detail']}" for row in report["found"]]
    assert any(re.search(expected.removeprefix("has "), line) for line in said), said


def test_the_check_takes_right_boxes(tiny, tmp_path):
    write(tmp_path / "test.json", own_entries(tiny["data"]))
    command = ["--config", str(tiny["config"]), "--output_dir", str(tmp_path / "out"), "--workers", "1"]
    flags = [f"test_file={tmp_path}/test.json", 'refcoco_data=""', 'det_file=""']
    assert check([*command, "--overrides", *flags]) == 0


def test_the_layer_is_two_thirds_up_unless_it_is_named(tiny, tmp_path, monkeypatch):
    """In a model of two layers the lower one; the full-size models' is layer 8."""
    command = ["Grounding.py", "--device", "cpu", "--config", tiny["config"], "--output_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--evaluate"])
    Grounding.parse_and_run()
    assert json.loads((tmp_path / "result" / "grounding.json").read_text())["block_num"] == 0


def test_configs_load_and_the_published_one_is_published(tiny):
    published = read_config("configs/Grounding.yaml", GROUNDING)
    recorded = json.loads((ROOT / "tests" / "goldens" / "schedules.json").read_text())["Grounding.yaml"]
    for section in ("optimizer", "schedular"):
        assert {key: published[section][key] for key in recorded[section]} == recorded[section]
    assert (published["image_res"], published["warm_up"]) == (384, recorded["warm_up_key"])
    demo = read_config("configs/demo/Grounding.yaml", GROUNDING)
    from simla.configs.schema import PRETRAIN

    pretrained = read_config("configs/demo/Pretrain.yaml", PRETRAIN)
    for key in ("image_res", "vision_width", "vit", "bert_config", "embed_dim", "queue_size"):
        assert demo[key] == pretrained[key], key


# ---- N ranks ----


def work(this_rank: int, num_ranks: int, config: str, checkpoint: str, folder: str) -> None:
    os.environ |= {"RANK": str(this_rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(this_rank)}
    for mode in ("itm", "itc"):
        sys.argv = ["Grounding.py", "--evaluate", "--device", "cpu", "--config", config, "--block_num", "1"]
        sys.argv += ["--checkpoint", checkpoint, "--gradcam_mode", mode]
        sys.argv += [
            "--output_dir",
            f"{folder}/{mode}{num_ranks}",
            "--dist_url",
            f"file://{folder}/{num_ranks}",
        ]
        Grounding.parse_and_run()
    if dist.is_initialized():
        leave_together()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for num_ranks in (1, 2, 3):
        arguments = (num_ranks, *sys.argv[1:])
        torch.multiprocessing.start_processes(work, arguments, num_ranks, start_method="fork")
