"""Pickles of plain values, read without running anything that they ask for."""

import pickle
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from simla.dataset.files import other_file
from simla.utils import UserError


class _NumpyType:
    """The type of a number or text; numpy.dtype's __setstate__ could describe memory that is not there."""

    def __init__(self, name: str | bytes, *_) -> None:
        self.dtype = np.dtype(_plain(name))
        if self.dtype.hasobject or self.dtype.kind == "V":
            raise pickle.UnpicklingError(f"numpy type {self.dtype} is not plain data")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(_plain(state[1]))


def _bytes(data: str | bytes = b"", *_) -> bytes:
    """Return the bytes that older protocols write as text."""
    return data.encode("latin-1") if isinstance(data, str) else bytes(data)


PLAIN = (bool, int, float, complex, str, list, tuple, dict, set, frozenset)
ALLOWED = {  # by the names of Python 3 and of older numpy
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": lambda kind, data: np.ndarray((), kind.dtype, data)[()],
    **dict.fromkeys(("_codecs.encode", "builtins.bytes", "builtins.bytearray"), _bytes),
    **{f"builtins.{kind.__name__}": kind for kind in PLAIN},
}


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every name that a pickle asks for but sets, dicts, bytes and numpy's numbers."""

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file, encoding="bytes")  # Python 2's str, of which `_plain` makes text
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module).replace("numpy._core", "numpy.core")
        if f"{module}.{name}" not in ALLOWED:
            raise UserError(
                f"{self.path}: its pickle asks for {module}.{name}, but a list of references is made of "
                "plain values; nothing of the file was run. Get the file from a source you trust"
            )
        return ALLOWED[f"{module}.{name}"]


def read_plain_pickle(path: Path) -> Any:
    """Return the numbers, texts, lists, sets and dicts of a pickle of Python 2 or 3; it runs nothing of it.

    Bytes are text here, as in Python 2, and numpy's numbers are plain ones. Raises UserError when the
    file is missing, damaged or holds anything else.
    """
    try:
        with path.open("rb") as file:
            return _plain(_PlainUnpickler(file, path).load())
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check refcoco_data") from error
    except Exception as error:  # a damaged pickle can fail in any way
        what = other_file(path)
        if what and "pickle" not in what:
            raise UserError(f"{path} is {what}") from error
        raise UserError(
            f"{path} is not a complete pickle ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes | bytearray):  # protocol 5 has an opcode for the latter
        return _decoded(bytes(value))
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(_plain, value))
    return value


@cache  # keys and splits come again and again: one copy of each is kept in memory
def _decoded(text: bytes) -> str:
    """Return the text; it is UTF-8 unless it cannot be, then Latin-1, which has a letter for every byte."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")
