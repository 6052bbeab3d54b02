"""Reads files of torch.save without running anything that their pickle asks for, memory-mapped.

A pickle is a program: it names functions and calls them. torch.load reads the file, with `InertPickle` in
place of Python's: it calls the few in `FUNCTIONS` alone, and a file that calls any other is refused, whatever
module that claims to be from. A class that is merely named, or whose object is described without a call,
becomes inert data (`Inert`). torch's own `weights_only` mode refuses foreign classes altogether; published
files have them, though: the `config` of a checkpoint is a pickled OmegaConf object, OpenAI's image tokenizer
a whole pickled module.
"""

import codecs
import os
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.storage import TypedStorage

from simla.utils import CONTENT_BYTES, UserError, first_line, other_content


class _CodeAskedFor(Exception):
    """A pickle calls the named function, which is not in `FUNCTIONS`."""


class _InertType(type):
    """The type of stand-ins for foreign classes: a pickle may describe their objects, but not call them."""

    def __call__(cls, *args, **kwargs):
        raise _CodeAskedFor(cls.__qualname__)


class Inert(metaclass=_InertType):
    """A stand-in for an object of a foreign class: it holds what the pickle gave it and does nothing."""

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args, self.state, self.items = args, kwargs, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<inert {type(self).__qualname__}>"


@cache
def _inert_class(name: str) -> type[Inert]:
    return type(Inert)(name.rsplit(".", 1)[-1], (Inert,), {"__qualname__": name})


# ---- what a pickle may call ----


def _tensor(storage: TypedStorage, offset: int, size: tuple, stride: tuple, *rest) -> Tensor:
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.dtype  # of version 3
    memory, nbytes = storage._untyped_storage, storage._untyped_storage.nbytes()
    tensor = torch.empty(0, dtype=dtype).set_(memory, offset, tuple(size), tuple(stride))
    if memory.nbytes() > nbytes:  # set_ enlarged it
        raise ValueError(f"a tensor of size {tuple(size)} reaches beyond its storage")
    return tensor


class _NumpyType:
    """numpy.dtype, whose own __setstate__ could describe memory that is not there."""

    def __init__(self, name: str | bytes, *_) -> None:
        self.dtype = np.dtype(name)  # bytes: a name that Python 2 wrote
        if self.dtype.hasobject or self.dtype.kind == "V":
            raise pickle.UnpicklingError(f"numpy type {name} is not plain data")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray(np.ndarray):
    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        if min(shape, default=0) < 0:
            raise pickle.UnpicklingError("a numpy array with a negative size")
        super().__setstate__((version, shape, dtype.dtype, is_fortran, bytes(data)))


PLAIN = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, slice, range)
PATHS = [f"pathlib{part}.{kind}" for part in ("", "._local") for kind in ("PosixPath", "PurePosixPath")]
# Their results are data to whoever wrote them: of types such as dict[str, int], old pickles, other settings.
INERT_CALLS = ("_operator.getitem", "copyreg._reconstructor", "functools.partial")
FUNCTIONS: dict[str, Callable] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": dict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    **{f"torch._utils._rebuild_tensor{version}": _tensor for version in ("", "_v2", "_v3")},
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, _type, args, _state: function(*args),
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": lambda dtype, data: np.ndarray((), dtype.dtype, data)[()],
    "numpy.core.multiarray._reconstruct": lambda *_: np.ndarray.__new__(_NumpyArray, (0,)),
    "_codecs.encode": lambda text, _encoding: text.encode("latin-1"),  # how protocol 2 writes bytes
    "builtins.type": lambda _: None,  # protocol 2 writes the class of None as type(None)
    **{f"builtins.{kind.__name__}": kind for kind in PLAIN},
    "builtins.bytearray": lambda data=b"", *_: (
        bytearray(data, "latin-1") if isinstance(data, str) else bytearray(data)
    ),
    **dict.fromkeys(PATHS, lambda *parts: str(PurePosixPath(*parts))),
    **{name: partial(Inert.__new__, _inert_class(name)) for name in INERT_CALLS},
}


def todays_name(module: str, name: str) -> str:
    """Return module.name as Python 3 and older numpy have it; protocol 2 writes Python 2's."""
    if module == "__builtin__":
        name = {"unicode": "str", "xrange": "range", "long": "int"}.get(name, name)
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    return f"{module.replace('numpy._core', 'numpy.core')}.{name}"


class InertPickle:
    """The `pickle_module` that torch.load reads with."""

    class Unpickler(pickle.Unpickler):
        """Finds `FUNCTIONS`, types of torch that are data, and inert classes for all other names."""

        def find_class(self, module: str, name: str) -> Any:  # of all names but those of typed storages
            full_name = todays_name(module, name)
            if full_name in FUNCTIONS:
                return FUNCTIONS[full_name].__call__  # which a pickle cannot set attributes of
            if name == "UntypedStorage":  # the class itself could be changed
                return SimpleNamespace(dtype=torch.uint8)
            if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
                return vars(torch)[name]
            return _inert_class(full_name)

    @classmethod
    def load(cls, file: BinaryIO, **options: str) -> Any:
        """Return what a pickle holds, as pickle.load does."""
        return cls.Unpickler(file, **options).load()


# ---- files ----


WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def _check_archive(path: Path) -> bool:
    """Return whether the archive can be memory-mapped. Raises an error where it is a program or damaged."""
    if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise ValueError("a TorchScript archive")  # torch.load would run it
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                archive.read(name)  # torch does not look at its checksum
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def safe_load(path: str | Path) -> Any:
    """Return what torch.save wrote into the file, on the CPU; of a .safetensors file {"model": tensors,
    "metadata": texts}.

    The tensors are views of the file, read when touched; writing to them does not change it. Files of torch
    before 1.6 are read whole. Raises UserError when the file is missing, damaged, not from torch.save, or
    names code to run.
    """
    path = Path(path)
    is_safetensors = path.suffix == ".safetensors"
    if not is_safetensors and os.environ.get(WEIGHTS_ONLY, "").lower() in ("1", "y", "yes", "true"):
        raise UserError(
            f"{path}: the environment variable {WEIGHTS_ONLY} is set, with which torch reads files by no "
            "rules but its own; those here run no code of a file either. Unset it"
        )
    try:
        if is_safetensors:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            return {"model": safetensors.torch.load_file(path), "metadata": metadata}
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if not is_zip and tarfile.is_tarfile(path):
            raise ValueError("a tar archive")  # torch.load would unpack it
        use_mmap = is_zip and _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that inert classes have no source text
            return torch.load(path, "cpu", InertPickle, weights_only=False, mmap=use_mmap)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except _CodeAskedFor as error:
        raise UserError(
            f"{path}: its pickle asks for {error}, which runs code and has no place in a checkpoint; nothing "
            "of the file was run. Get it from a source you trust, or its weights alone, as a dict of tensors"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        if what := what_it_is(path):
            raise UserError(f"{path}: not a complete PyTorch checkpoint but {what}") from error
        raise UserError(
            f"{path}: not a complete PyTorch checkpoint ({type(error).__name__}: {first_line(error)}); "
            "expected a file of torch.save or .safetensors. Copy or download it again and compare its size "
            "with the source"
        ) from error


LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # of torch.save before 1.6


def what_it_is(path: Path) -> str:
    """Return what a file is that is no checkpoint, and what to do; "" where that cannot be told."""
    with path.open("rb") as file:
        head = file.read(CONTENT_BYTES)
    if head.startswith(b"PK"):
        return _what_zip_it_is(path)
    if head.startswith(b"\x80"):
        is_torch = LEGACY_MAGIC in head or len(head) < 20
        return "" if is_torch else "a pickle, and not one of torch.save; get the file of torch.save"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it and name the checkpoint inside"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "" if path.suffix == ".safetensors" else "a safetensors file; rename it to end in .safetensors"
    if what := other_content(head):
        return what
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return ""
    if all(letter.isprintable() or letter.isspace() for letter in text):
        return f"a text, which begins with {text.strip()[:60]!r}; copy or download it again"
    return ""


def _what_zip_it_is(path: Path) -> str:
    """Return what a zip archive is and what to do; "" where it is torch.save's or cut short."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return ""
    inside = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in inside:
        return "a TorchScript archive; save the state_dict() of its model with torch.save"
    if "data.pkl" in inside:
        return "a file of torch.save; rename it to end in .pth" if path.suffix == ".safetensors" else ""
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive; get the file of torch.save"
    example = f", such as {names[0]}" if names else ""
    return f"a zip archive of {len(names)} other files{example}; unpack it and name the checkpoint inside"


def to_plain(value: Any) -> Any:
    """Return an inert OmegaConf tree as dicts, lists and values; other inert objects become text."""
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        if type(value).__qualname__ == "argparse.Namespace":
            return to_plain(state)
        return to_plain(state.get("_content", state.get("_val", repr(value))))  # of containers, of leaves
    if isinstance(value, dict):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value
