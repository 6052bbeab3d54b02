import argparse
import bz2
import gzip
import io
import lzma
import os
import pickle
import sys
import tarfile
import tempfile
import types
import typing
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from simla.checkpoint.safe_load import Inert, safe_load, to_plain
from simla.utils import UserError

FORMATS = pytest.mark.parametrize("is_zip", [True, False])
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
DTYPES += (torch.int8, torch.uint8, torch.bool, torch.complex64)


def save(value, path, is_zip=True):
    with warnings.catch_warnings():  # saving whole modules in the old format warns
        warnings.simplefilter("ignore")
        torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


def assert_equal(ours, theirs):
    assert type(ours) is type(theirs) or isinstance(theirs, nn.Parameter | defaultdict | Counter | np.ndarray)
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride() and torch.equal(ours, theirs)
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == theirs


@FORMATS
def test_all_plain_values_come_back(tmp_path, is_zip):
    base = torch.arange(24.0).reshape(4, 6)
    value = {
        "model": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(),
        "views": [base, base.T, base[1:3, ::2], torch.zeros(0, 3), torch.tensor(5)],
        "dtypes": {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES} | {"itself": torch.bfloat16},
        "parameter": nn.Parameter(torch.ones(2)),
        "numpy": [np.float64(1.5), np.int64(3), np.arange(6.0).reshape(2, 3), np.array(["ab", "c"])],
        "plain": [None, True, 3, 2**70, 0.1, "ü", b"\x00\xff", {1, 2}, frozenset("a"), (1, (2,)), slice(2)],
        "others": [OrderedDict(a=1), defaultdict(list, b=[2]), Counter("aab"), torch.Size([2, 3])],
        "device": torch.device("cpu"),
    }
    loaded = safe_load(save(value, tmp_path / "file.pth", is_zip))
    assert_equal(loaded, value)
    first, transposed = loaded["views"][:2]
    assert first.untyped_storage().data_ptr() == transposed.untyped_storage().data_ptr()


shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=40)
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=4), st.booleans())
def test_any_tensors_come_back(specs, is_zip):
    value = [(torch.randn(shape) * 3).to(dtype) for shape, dtype in specs]
    with tempfile.TemporaryDirectory() as folder:
        assert_equal(safe_load(save(value, Path(folder) / "file.pth", is_zip)), value)


def test_mapped_tensors_can_be_written_without_changing_the_file(tmp_path):
    path = save({"a": torch.zeros(1000)}, tmp_path / "file.pth")
    before = path.read_bytes()
    loaded = safe_load(path)["a"]
    assert_equal(safe_load(path)["a"], torch.zeros(1000))
    loaded.fill_(1)
    assert path.read_bytes() == before


def test_a_compressed_archive_is_read_too(tmp_path):
    path = save({"a": torch.arange(5.0)}, tmp_path / "file.pth")
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert_equal(safe_load(tmp_path / "small.pth"), {"a": torch.arange(5.0)})


def test_safetensors(tmp_path):
    for metadata in ({}, {"kind": "ve"}):
        safetensors.torch.save_file({"a": torch.arange(3)}, tmp_path / "file.safetensors", metadata)
        expected = {"model": {"a": torch.arange(3)}, "metadata": metadata}
        assert_equal(safe_load(tmp_path / "file.safetensors"), expected)


@pytest.fixture
def foreign(monkeypatch):
    """The classes of a package, and `forget` to make it as if the package were not installed."""
    names = ("DictConfig", "ListConfig", "AnyNode", "ContainerMetadata")
    classes = {name: type(name, (), {"__module__": "omegaconf"}) for name in names}
    module = types.ModuleType("omegaconf")
    vars(module).update(classes)
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    return types.SimpleNamespace(forget=lambda: monkeypatch.delitem(sys.modules, "omegaconf"), **classes)


def omega(foreign, value, parent=None):
    """An object tree of the shape OmegaConf's classes have, parents and type references included."""
    kind = {dict: foreign.DictConfig, list: foreign.ListConfig}.get(type(value), foreign.AnyNode)
    node = kind()
    metadata = foreign.ContainerMetadata()
    vars(metadata).update(ref_type=dict, object_type=type(None), flags={"readonly": True})
    vars(metadata).update(cache=defaultdict(dict), element_type=typing.Any, types=typing.Dict[str, int])  # noqa: UP006
    metadata.bases = (object, range, OSError)
    node.__dict__.update(_metadata=metadata, _parent=parent)
    if isinstance(value, dict):
        node._content = {key: omega(foreign, item, node) for key, item in value.items()}
    elif isinstance(value, list):
        node._content = [omega(foreign, item, node) for item in value]
    else:
        node._val = value
    return node


@FORMATS
@pytest.mark.parametrize("installed", [True, False])
def test_an_omegaconf_config_is_read_without_omegaconf(tmp_path, foreign, is_zip, installed):
    config = {"image_res": 256, "files": ["a", "b"], "optimizer": {"lr": 1e-4, "opt": "adamW"}, "x": None}
    args = argparse.Namespace(config="c.yaml", seed=42)
    path = save({"config": omega(foreign, config), "args": args, "epoch": 3}, tmp_path / "file.pth", is_zip)
    if installed:
        foreign.DictConfig.__setstate__ = lambda *_: pytest.fail("code of the foreign class was run")
    else:
        foreign.forget()
    loaded = safe_load(path)
    assert isinstance(loaded["config"], Inert) and loaded["epoch"] == 3
    assert to_plain(loaded["config"]) == config
    assert to_plain(loaded["args"]) == vars(args)


@FORMATS
def test_a_whole_module_becomes_inert(tmp_path, is_zip):
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    loaded = safe_load(save(module, tmp_path / "file.pkl", is_zip))
    assert repr(loaded) == "<inert torch.nn.modules.container.Sequential>"
    assert_equal(loaded.state["_modules"]["0"].state["_parameters"]["weight"], module[0].weight)


class Calls:
    """Pickled, this asks to call `function` with `args`."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


def write_pickle(value, path, is_zip):
    """value: an object, or the bytes of its pickle."""
    pickled = value if isinstance(value, bytes) else pickle.dumps(value, protocol=2)
    if is_zip:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
    else:
        parts = [pickle.dumps(part, protocol=2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {}, [])]
        path.write_bytes(b"".join([*parts[:3], pickled, parts[3]]))
    return path


DANGEROUS = [
    os.system,
    eval,
    exec,
    getattr,
    __import__,
    open,
    os.execv,
    pickle.loads,
    torch.save,
    torch.hub.load,
]


@FORMATS
@pytest.mark.parametrize("function", DANGEROUS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_code_is_refused_and_named(tmp_path, function, is_zip):
    trace = tmp_path / "trace"
    path = write_pickle({"a": Calls(function, f"touch {trace}")}, tmp_path / "file.pth", is_zip)
    with pytest.raises(UserError, match=rf"file.pth: its pickle asks for [\w.]+\.{function.__name__}"):
        safe_load(path)
    assert not trace.exists()


CLAIMED = [
    "_io.open",
    "io.open",
    "nt.system",
    "posix.system",
    "_pickle.loads",
    "operator.attrgetter",
    "site.main",
    "numpy.f2py.compile",
    "_posixsubprocess.fork_exec",
    "zipimport.zipimporter",
    "anybody.at_all",
    "a.B.c",
]


@pytest.mark.parametrize("name", CLAIMED)
@pytest.mark.parametrize("call", [b"cNAME\nX\x01\x00\x00\x00x\x85R", b"(cNAME\nX\x01\x00\x00\x00xo"])
def test_no_call_outside_the_list_whatever_module_it_claims(tmp_path, name, call):
    """The opcodes that call: REDUCE, and OBJ of the first protocols."""
    pickled = b"\x80\x02" + call.replace(b"NAME", "\n".join(name.rsplit(".", 1)).encode()) + b"."
    with pytest.raises(UserError, match=rf"its pickle asks for {name}, which runs code"):
        safe_load(write_pickle(pickled, tmp_path / "file.pth", is_zip=True))


@FORMATS
def test_functions_that_are_only_named_do_nothing(tmp_path, is_zip):
    loaded = safe_load(write_pickle([torch.save, Path("a/b")], tmp_path / "f.pth", is_zip))
    assert loaded[0].__qualname__ == "torch.serialization.save" and issubclass(loaded[0], Inert)
    assert loaded[1] == "a/b"
    loaded = safe_load(write_pickle(partial(print, 1), tmp_path / "f.pth", is_zip))
    assert repr(loaded) == "<inert functools.partial>" and issubclass(loaded.args[0], Inert)


@FORMATS
def test_a_pickle_cannot_change_what_it_names(tmp_path, is_zip):
    for name in (
        b"torch._utils\n_rebuild_tensor_v2",
        b"collections\nOrderedDict",
        b"torch\nfloat32",
        b"a\nb",
    ):
        bad = b"\x80\x02c" + name + b"\nN}X\x07\x00\x00\x00__doc__K\x01s\x86b."  # sets {"__doc__": 1}
        with pytest.raises(UserError, match=r"not a complete .* \((TypeError|AttributeError): "):
            safe_load(write_pickle(bad, tmp_path / "f.pth", is_zip))


@FORMATS
def test_a_cut_file_is_a_clear_error(tmp_path, is_zip):
    whole = save({"a": torch.arange(3000.0), "b": ["x"] * 50}, tmp_path / "whole.pth", is_zip).read_bytes()
    path = tmp_path / "cut.pth"
    for length in {0, 1, 3, 10, 60, 500, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"cut\.pth: not a complete PyTorch checkpoint .* download it again"
        ):
            safe_load(path)


@settings(max_examples=60)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"\x80\x02" + tail))
def test_any_bytes_give_a_clear_error(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pth"
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"file\.pth"):
            safe_load(path)


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


def tarred(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("checkpoint.pth")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca2"
    b"4d17e2393\nsize 12345\n"
)
PAGES = [b"<!DOCTYPE html><html lang=en>", b"\n<HTML><body>", "<!doctype html>kr\xe4ver".encode("latin-1")]
PAGES.append(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>")
NO_CHECKPOINTS = [
    (LFS, "a pointer of Git LFS"),
    *[(page, r"a web page \(HTML or XML\)") for page in PAGES],
    (
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
        "a text, which begins with '{\"weight_map",
    ),
    ("ä".encode() * 600, "a text, which begins with 'ää"),  # the last letter that is looked at is cut
    ("{}".encode("utf-16"), "text in UTF-16"),
    (b"", "empty, .* download it again"),
    (zipped("word/document.xml"), "a zip archive of 1 other files, such as word/document.xml; unpack it"),
    (zipped(), "a zip archive of 0 other files; unpack it"),
    (zipped("out/checkpoint.pth", "out/README"), "a zip archive of 2 other files"),
    (zipped("a.npy", "b.npy"), "a NumPy archive"),
    (zipped("m/data.pkl", "m/constants.pkl", "m/code/x.py"), "a TorchScript archive"),
    (safetensors.torch.save({"a": torch.ones(2)}), "a safetensors file; rename it to end in .safetensors"),
    (gzip.compress(b"x"), "compressed by gzip; unpack it"),
    (bz2.compress(b"x"), "compressed by bzip2"),
    (lzma.compress(b"x"), "compressed by xz"),
    (tarred(b"x"), "a tar archive; unpack it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
]


@pytest.mark.parametrize(("content", "what"), NO_CHECKPOINTS, ids=[what for _, what in NO_CHECKPOINTS])
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, content, what):
    for name in ("a.pth", "a.safetensors"):
        if name.endswith("safetensors") and "safetensors file" in what:
            continue
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: not a complete PyTorch checkpoint but {what}"):
            safe_load(tmp_path / name)


def test_what_torch_would_run_or_unpack_never_reaches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("a program was run"))
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *_, **__: pytest.fail("an archive was unpacked"))
    with zipfile.ZipFile(tmp_path / "script.pth", "w") as archive:
        for name in ("version", "data.pkl", "constants.pkl"):
            archive.writestr(f"m/{name}", "3")
    info = tarfile.TarInfo("storages")
    (tmp_path / "tar.pth").write_bytes(info.tobuf(tarfile.GNU_FORMAT, "latin-1") + bytes(1024))
    for name, what in (("script", "a TorchScript archive"), ("tar", "a tar archive")):
        with pytest.raises(UserError, match=what):
            safe_load(tmp_path / f"{name}.pth")


def test_a_file_of_torch_under_the_other_name(tmp_path):
    save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"but a file of torch\.save; rename it to end in \.pth"):
        safe_load(tmp_path / "a.safetensors")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    path = save({"a": torch.arange(4.0)}, tmp_path / "file.pth", False)
    data = path.read_bytes()
    assert data.count(b"K\x04\x85") == 1  # the size (4,)
    path.write_bytes(data.replace(b"K\x04\x85", b"K\x05\x85"))
    with pytest.raises(UserError, match="beyond its storage"):
        safe_load(path)


def test_a_variable_that_keeps_torch_from_reading_is_named(tmp_path, monkeypatch):
    path = save({"a": torch.ones(2)}, tmp_path / "file.pth")
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "file.safetensors")
    for value in ("1", "True", "yes"):
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", value)
        with pytest.raises(UserError, match=r"file\.pth: .* TORCH_FORCE_WEIGHTS_ONLY_LOAD is set.*Unset it"):
            safe_load(path)
        assert_equal(safe_load(tmp_path / "file.safetensors")["model"], {"a": torch.ones(2)})
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    assert_equal(safe_load(path), {"a": torch.ones(2)})


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="check the path"):
            safe_load(path)
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a complete"):
        safe_load(tmp_path / "bad.safetensors")
    pickle.dump({"a": 1}, (tmp_path / "plain.pkl").open("wb"))
    with pytest.raises(UserError, match=r"not one of torch\.save"):
        safe_load(tmp_path / "plain.pkl")


def test_bytes_of_a_file_written_elsewhere(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)  # another folder name inside the archive
    (tmp_path / "file").write_bytes(buffer.getvalue())
    assert_equal(safe_load(str(tmp_path / "file")), {"a": torch.ones(2)})
