"""Reads files made by torch.save without running anything that their pickle asks for, memory-mapped.

A pickle is a program: it names functions and calls them. Here it calls only the few in `FUNCTIONS`; a file
that calls any other is refused, whatever module that claims to be from. A class that is merely named, or
whose object is described without a call, becomes inert data (`Inert`). torch's own `weights_only` mode
refuses foreign classes altogether, but published files have them: the `config` of a checkpoint is a pickled
OmegaConf object, OpenAI's image tokenizer a whole pickled module.
"""

import codecs
import mmap
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from utils import CONTENT_BYTES, UserError, other_content

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class _CodeAskedFor(Exception):
    """A pickle calls the named function, which is not in `FUNCTIONS`."""


class _InertType(type):
    """The type of what stands for foreign classes: a pickle may describe their objects, but not call them."""

    def __call__(cls, *args, **kwargs):
        raise _CodeAskedFor(cls.__qualname__)


class Inert(metaclass=_InertType):
    """Stands for an object of a foreign class: holds what the pickle gave it and does nothing."""

    __slots__ = ("args", "items", "state")

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args, self.state, self.items = args, kwargs, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<inert {type(self).__qualname__}>"


class Storage(NamedTuple):
    untyped: torch.UntypedStorage
    dtype: torch.dtype


class _Call:
    """A function the pickle may call but not change (pickles can set attributes of what they name)."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the pickle tries to change a function")


def _as_text(name: str | bytes) -> str:
    """Return the name that Python 2 wrote in the type that is Python 3's `bytes`."""
    return name.decode("latin-1") if isinstance(name, bytes) else name


class _NumpyType:
    """numpy.dtype, whose own __setstate__ could describe memory that is not there."""

    def __init__(self, name: str | bytes, *_) -> None:
        self.dtype = np.dtype(_as_text(name))
        if self.dtype.hasobject or self.dtype.kind == "V":
            raise pickle.UnpicklingError(f"numpy type {name} is not plain data")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(_as_text(state[1]))


class _NumpyArray(np.ndarray):
    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        if min(shape, default=0) < 0:
            raise pickle.UnpicklingError("a numpy array with a negative size")
        super().__setstate__((version, shape, dtype.dtype, is_fortran, bytes(data)))


def _tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * storage.dtype.itemsize > storage.untyped.nbytes():
        # set_ would enlarge the storage
        raise ValueError(f"a tensor of size {tuple(size)} reaches beyond its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped, offset, tuple(size), tuple(stride))


def _tensor_of_dtype(storage: Storage, offset: int, size: tuple, stride: tuple, *rest) -> Tensor:
    return _tensor(Storage(storage.untyped, rest[2]), offset, size, stride)


def _bytearray(data: str | bytes = b"", *_encoding) -> bytearray:
    return bytearray(data, "latin-1") if isinstance(data, str) else bytearray(data)


@cache
def _inert_class(name: str) -> type[Inert]:
    return type(Inert)(name.rsplit(".", 1)[-1], (Inert,), {"__slots__": (), "__qualname__": name})


def _path(*parts: str) -> str:
    return "/".join(parts).replace("//", "/")


PLAIN = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, slice, range)
FUNCTIONS: dict[str, Callable] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": dict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, _type, args, _state: function(*args),
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": lambda dtype, data: np.ndarray((), dtype.dtype, data)[()],
    "numpy.core.multiarray._reconstruct": lambda *_: np.ndarray.__new__(_NumpyArray, (0,)),
    "_codecs.encode": lambda text, _encoding: text.encode("latin-1"),  # how protocol 2 writes bytes
    "builtins.type": lambda _: None,  # protocol 2 writes the class of None as type(None)
    **{f"builtins.{kind.__name__}": kind for kind in PLAIN},
    "builtins.bytearray": _bytearray,
    **{f"pathlib{part}.{kind}": _path for part in ("", "._local") for kind in ("PosixPath", "PurePosixPath")},
}
# Their results are data to whoever wrote them: of types such as dict[str, int], old pickles, other settings.
INERT_CALLS = {"_operator.getitem", "copyreg._reconstructor", "functools.partial"}


def todays_name(module: str, name: str) -> tuple[str, str]:
    """Return module and name as Python 3 and older numpy have them; protocol 2 writes Python 2's."""
    module = module.replace("numpy._core", "numpy.core")
    if module == "__builtin__":
        return "builtins", {"unicode": "str", "xrange": "range", "long": "int"}.get(name, name)
    return {"copy_reg": "copyreg"}.get(module, module), name


def allowed_function(module: str, name: str) -> _Call | None:
    """Return what a pickle may call by this name; None for every name that `FUNCTIONS` lacks."""
    function = FUNCTIONS.get(".".join(todays_name(module, name)))
    return None if function is None else _Call(function)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storage: Callable[..., torch.UntypedStorage]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        module, name = todays_name(module, name)
        if (function := allowed_function(module, name)) is not None:
            return function
        if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        inert = _inert_class(f"{module}.{name}")
        return _Call(partial(Inert.__new__, inert)) if f"{module}.{name}" in INERT_CALLS else inert

    def persistent_load(self, saved_id: tuple) -> Any:
        kind, *rest = saved_id
        if kind == "module":  # legacy files store a module's class with its source text
            return rest[0]
        dtype, key, _location, num_elements, *view = rest
        storage = self.storage(key, num_elements, dtype)
        if view and view[0] is not None:
            _, offset, size = view[0]
            storage = storage[offset * dtype.itemsize : (offset + size) * dtype.itemsize]
        return Storage(storage, dtype)


def _load_zip(path: Path, mapped: mmap.mmap | None) -> Any:
    """torch.save since 1.6: a zip of data.pkl and one uncompressed record per storage."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        (pickle_name,) = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        folder = pickle_name.split("/")[0]
        if f"{folder}/byteorder" in archive.namelist():
            order = archive.read(f"{folder}/byteorder").decode()
            if order != sys.byteorder:
                raise ValueError(f"written on a {order}-endian machine")
        whole = None
        if mapped is not None:
            whole = torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()
        cached: dict[str, torch.UntypedStorage] = {}

        def storage(key: str, num_elements: int, dtype: torch.dtype) -> torch.UntypedStorage:
            if key not in cached:
                record = archive.getinfo(f"{folder}/data/{key}")
                if record.file_size != num_elements * dtype.itemsize:
                    raise ValueError(f"record {key} has {record.file_size} bytes")
                if whole is not None and record.compress_type == zipfile.ZIP_STORED:
                    file.seek(record.header_offset + 26)  # the local header's own lengths of name and padding
                    lengths = file.read(4)
                    start = record.header_offset + 30 + sum(np.frombuffer(lengths, "<u2").tolist())
                    cached[key] = whole[start : start + record.file_size]
                else:
                    data = bytearray(archive.read(record)) or bytearray(1)
                    cached[key] = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
            return cached[key]

        with archive.open(pickle_name) as data:
            return _Unpickler(data, storage).load()


def _load_legacy(path: Path) -> Any:
    """torch.save before 1.6: five pickles, then the storages one after the other. Not memory-mapped."""
    storages: dict[str, Storage] = {}

    def storage(key: str, num_elements: int, dtype: torch.dtype) -> torch.UntypedStorage:
        if key not in storages:
            storages[key] = Storage(torch.UntypedStorage(num_elements * dtype.itemsize), dtype)
        return storages[key].untyped

    with path.open("rb") as file:

        def next_pickle() -> Any:
            return _Unpickler(file, storage).load()

        if next_pickle() != LEGACY_MAGIC:
            raise ValueError("a pickle, but not one of torch.save")
        next_pickle(), next_pickle()  # protocol version, sizes of C types
        result = next_pickle()
        for key in next_pickle():
            untyped, dtype = storages[key]
            num_elements = int.from_bytes(file.read(8), "little")
            memory = torch.empty(0, dtype=torch.uint8).set_(untyped).numpy()
            if num_elements * dtype.itemsize != len(memory) or file.readinto(memory) != len(memory):
                raise EOFError(f"storage {key} is cut short")
    return result


def safe_load(path: str | Path, mmap: bool = True) -> Any:
    """What torch.save wrote into the file, on the CPU; a .safetensors file gives {"model": tensors,
    "metadata": texts}.

    With `mmap` the tensors are views of the file, read when touched; writing to them does not change it.
    Raises UserError when the file is missing, damaged, not from torch.save, or names code to run.
    """
    return load_mapped(path, mmap)[0]


def load_mapped(path: str | Path, use_mmap: bool = True) -> tuple[Any, Callable[[], None]]:
    """As `safe_load`, and a function that gives back the memory of what was read so far.

    Without it a file that is copied piece by piece would be in memory twice at the end. What was written to
    the tensors is lost with it; they can be read again.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            return {"model": safetensors.torch.load_file(path), "metadata": metadata}, _nothing
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if is_zip and use_mmap else None
        if not is_zip:
            return _load_legacy(path), _nothing
        release = _nothing
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            release = partial(mapped.madvise, mmap.MADV_DONTNEED)
        return _load_zip(path, mapped), release
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
            f"{path}: not a complete PyTorch checkpoint ({type(error).__name__}: {error}); expected a file "
            "of torch.save or .safetensors. Copy or download it again and compare its size with the source"
        ) from error


OTHER_WEIGHTS = {  # how they begin, what they are and what to do
    b"\x89HDF": "an HDF5 file, as TensorFlow writes them; get the PyTorch weights",
    b"GGUF": "a GGUF file; get the PyTorch weights",
    b"\x93NUMPY": "a NumPy array; get the file of torch.save",
}


def what_it_is(path: Path) -> str:
    """What a file is that is no checkpoint, and what to do; "" where that cannot be told."""
    with path.open("rb") as file:
        head = file.read(CONTENT_BYTES)
    if head.startswith(b"PK"):
        return _what_the_zip_is(path)
    if head.startswith(b"\x80"):  # a pickle, as of torch.save before 1.6
        return ""
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it and name the checkpoint inside"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "" if path.suffix == ".safetensors" else "a safetensors file; rename it to end in .safetensors"
    for beginning, what in OTHER_WEIGHTS.items():
        if head.startswith(beginning):
            return what
    if what := other_content(head):
        return what
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return ""
    if all(letter.isprintable() or letter.isspace() for letter in text):
        return f"a text, which begins with {text.strip()[:60]!r}; copy or download it again"
    return ""


def _what_the_zip_is(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):  # cut short
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


def _nothing() -> None:
    pass


def to_plain(value: Any) -> Any:
    """An inert OmegaConf tree as dicts, lists and values; other inert objects become text."""
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
