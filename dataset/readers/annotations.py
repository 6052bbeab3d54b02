"""Annotation files, JSON lists or lines of entries: checked field by field, image paths made absolute."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from simla.dataset.readers.json_list import JsonList
from simla.utils import UserError, fill_in, log

TEXT = (str,)
TEXTS = (str, list)
LIST = (list,)
NUMBER_OR_TEXT = (int, str)
ANY = (object,)
WANTED = {
    TEXT: "text",
    TEXTS: "text or a non-empty list of texts",
    LIST: "a non-empty list of texts",
    (int,): "a whole number",
    NUMBER_OR_TEXT: "a whole number or text",
}

_checks_late: ContextVar[bool] = ContextVar("_checks_late", default=False)


@contextmanager
def checked_late() -> Iterator[None]:
    """Let files that are opened in here hold wrong entries: one raises its UserError when it is asked for."""
    token = _checks_late.set(True)
    try:
        yield
    finally:
        _checks_late.reset(token)


@dataclass(eq=False)
class Annotations(Sequence):
    """The entries of several files, as `read_annotations` says; each is made when it is asked for, and only
    then checked where `late_check` is given.
    """

    lists: list[JsonList]
    roots: list[Path]
    has_images: bool
    suffix: str
    late_check: Callable[[object, str], None] | None = None

    def __post_init__(self) -> None:
        self.ends = list(accumulate(map(len, self.lists)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        file = bisect_right(self.ends, index)
        entries, root = self.lists[file], self.roots[file]
        number = index - self.ends[file] + len(entries)
        entry, where = entries[number], f"{entries.path}: entry {number}"
        if self.late_check is not None:
            self.late_check(entry, where)
        images = entry["images"] if self.has_images else [entry["image"]]
        return {**entry, "images": [str(root / (image + self.suffix)) for image in images], "where": where}


@dataclass(eq=False)
class Mapped(Sequence):
    """function(entry) of all entries, called when one is asked for; picklable where the function is."""

    entries: Sequence
    function: Callable[[dict], dict]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict:
        return self.function(self.entries[index])


def item_of(entry: dict, text: str) -> dict:
    """Return what every task takes of an entry; its text is the field of that name."""
    return {"images": entry["images"], "text": entry[text], "where": entry["where"]}


def read_annotations(
    files: str | list[str],
    fields: dict[str, tuple],
    image_root: str = "",
    suffix: str = "",
    check: Callable[[dict, str], None] | None = None,
) -> Annotations:
    """Return the entries of all files; `images` lists the absolute paths of the field `image` (or `images`),
    `suffix` added, and `where` says which entry of which file it is.

    fields: name -> accepted types, all required; check(entry, where), a function of a module, may refuse an
    entry for other reasons. An image path may be absolute, relative to `image_root`, or, where that is empty,
    relative to the annotation file. Raises UserError, naming file and entry, for a missing, truncated or
    empty file and for an entry that lacks a field or has one of another type.
    """
    check_entry, is_late = partial(_check_entry, fields=fields, check=check), _checks_late.get()
    name = ", ".join(f"{field}: {'|'.join(kind.__name__ for kind in fields[field])}" for field in fields)
    name += f", {check.__module__}.{check.__qualname__}" if check else ""
    check_now = (lambda *_: None, "") if is_late else (check_entry, name)
    paths = [Path(fill_in(file)) for file in ([files] if isinstance(files, str) else files)]
    lists = [JsonList(path, *check_now) for path in paths]
    if not any(map(len, lists)):
        raise UserError(
            f"no entries in {files}; an annotation file is a JSON list (or lines) of {_example(fields)}"
        )
    for path, entries in zip(paths, lists, strict=True):
        if not len(entries):
            log.warning(f"{path} has no entries")
    roots = [(Path(fill_in(image_root)) if image_root else path.parent).absolute() for path in paths]
    return Annotations(lists, roots, "images" in fields, suffix, check_entry if is_late else None)


def _check_entry(
    entry: object, where: str, fields: dict[str, tuple], check: Callable[[dict, str], None] | None
) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object {_example(fields)}, found {entry!r}"[:500])
    for field, types in fields.items():
        if field not in entry:
            raise UserError(
                f"{where} has no {field!r}; found {', '.join(entry) or 'nothing'}, not {_example(fields)}"
            )
        value = entry[field]
        is_list = isinstance(value, list) and types != ANY
        is_wrong = is_list and not (value and all(isinstance(text, str) for text in value))
        if is_wrong or not isinstance(value, types):
            raise UserError(f"{where}: {field!r} must be {WANTED[types]}, found {value!r}"[:500])
    if check is not None:
        check(entry, where)


def _example(fields: dict[str, tuple]) -> str:
    return "{" + ", ".join(f'"{field}": ...' for field in fields) + "}"
