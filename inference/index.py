"""An index of images for search: features and token states of every image, in memory or memory-mapped files.

A saved index is a folder of index.json (the files, their sizes and times, and what computed them),
features.npy and states.npy. I images, E shared embedding, N image tokens, D width.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.transforms import BadImage
from inference.folders import Listing, describe, list_images
from inference.inputs import read_pictures
from saving import atomic_write
from utils import PRECISIONS, UserError, log, with_progress

if TYPE_CHECKING:
    from inference.model import Simla

FORMAT = 3
MADE_BY = {  # what of `Simla.image_side` may differ, and how that is called
    "architecture": "an image encoder of another build",
    "preprocessing": "a model that reads images otherwise",
    "precision": "another precision",
    "weights": "another image encoder",
}
CONTENTS, FEATURES, STATES = "index.json", "features.npy", "states.npy"
LOG_STEPS = 50


@dataclass(frozen=True, eq=False, repr=False)
class Index:
    """Images that `Simla.search` looks through.

    files (I): absolute paths; features (I, E) float32, unit length; states (I, N, D), of the precision that
    they were computed in; made_by: see `Simla.image_side`; folder: the absolute path of the folder that was
    indexed, None where it was a list; unreadable: files that were left out -> why; passed_over: what else the
    folder holds, cause -> number.
    """

    files: list[str]
    features: Tensor
    states: Tensor
    made_by: dict
    folder: str | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        source = self.folder or "a list"
        return f"Index({len(self)} images of {source}, {len(self.unreadable)} unreadable)"

    def __len__(self) -> int:
        return len(self.files)


class Hit(NamedTuple):
    """An image that `Simla.search` found.

    score: the matching head's logit of "match", which ranks the hits of one query; it has no bounds and is no
    probability, which `Simla.match` gives. similarity: the cosine of the features, -1 to 1, which chose the
    candidates.
    """

    file: str
    score: float
    similarity: float


def image_files(images: str | Path | Sequence[str | Path]) -> Listing:
    """The absolute paths of the image files of a folder and its subfolders, sorted, or of those of a list."""
    if isinstance(images, str | Path):
        folder = Path(images).absolute()
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; search looks through a folder or a list of image files")
        listing = list_images(folder)
        if not listing.files:
            found = describe(listing.passed_over)
            raise UserError(f"{folder} holds no image" + (f"; {found}" if found else ""))
        return listing
    files = list(images)
    wrong = [file for file in files if not isinstance(file, str | Path)]
    if wrong or not files:
        found = f"a {type(wrong[0]).__name__}" if wrong else "an empty list"
        raise UserError(f"an index is made of a folder or a list of image files, found {found}")
    return Listing([str(Path(file).absolute()) for file in files], {})


def build_index(
    images: str | Path | Sequence[str | Path],
    folder: str | Path | None,
    encode: Callable[[list[Tensor]], tuple[Tensor, Tensor]],
    sizes: tuple[int, int, int],
    image_res: int,
    batch_size: int,
    made_by: dict,
) -> Index:
    """Encodes the images batch by batch, into a new `folder`, or in memory where there is none.

    encode: pixels, each (3, R, R) uint8 -> states (B, N, D), features (B, E); sizes: N, D, E. Files that
    cannot be read are left out, named in the log and in `unreadable`. Raises UserError where none can be
    read, the index does not fit into memory or on the disk, or the folder is there already or cannot be
    written.
    """
    files, passed_over = image_files(images)
    if passed_over:
        log.info(f"{images}: {len(files)} images; {describe(passed_over)}")
    num_tokens, width, embed_dim = sizes
    shapes = {FEATURES: (len(files), embed_dim), STATES: (len(files), num_tokens, width)}
    dtypes = {FEATURES: np.dtype(np.float32), STATES: _stored_dtype(made_by["precision"])}
    num_bytes = sum(math.prod(shapes[name]) * dtypes[name].itemsize for name in shapes)
    needed = f"an index of {len(files)} images takes {num_bytes / 1e9:.3g} GB"
    source = str(Path(images).absolute()) if isinstance(images, str | Path) else None
    if folder is None:
        try:
            arrays = {name: np.empty(shapes[name], dtypes[name]) for name in shapes}
        except MemoryError as error:
            raise UserError(
                f"{needed}, more than there is of memory; write it to a folder, or index fewer images"
            ) from error
        kept, unreadable = _fill(arrays, files, encode, image_res, batch_size)
        return _index([files[i] for i in kept], arrays, made_by, source, unreadable, passed_over)
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} is there already; delete it to index again, or name another folder")
    unfinished = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of an earlier try that was killed
        unfinished.mkdir(parents=True)
        free = shutil.disk_usage(unfinished).free
        if num_bytes > free:  # writing to a map of a file that the disk has no place for ends the process
            raise UserError(f"{needed}, {free / 1e9:.3g} GB are free at {folder}; choose another disk")
        arrays = {
            name: np.lib.format.open_memmap(unfinished / name, "w+", dtypes[name], shapes[name])
            for name in shapes
        }
        stamps = {file: _stamp(file) for file in files}  # before they are read: a later change is noticed
        kept, unreadable = _fill(arrays, files, encode, image_res, batch_size)
        for array in arrays.values():
            array.flush()
        contents = {
            "format": FORMAT,
            "made_by": made_by,
            "folder": source,
            "files": [[files[i], *stamps[files[i]]] for i in kept],
            "unreadable": [[file, cause, *stamps[file]] for file, cause in unreadable.items()],
            "passed_over": passed_over,
        }
        with atomic_write(unfinished / CONTENTS) as file:
            file.write(json.dumps(contents).encode())
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"the index {folder} could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _index([files[i] for i in kept], arrays, made_by, source, unreadable, passed_over)


def _fill(
    arrays: dict[str, np.ndarray], files: list[str], encode: Callable, image_res: int, batch_size: int
) -> tuple[list[int], dict[str, str]]:
    """Writes the rows of the images that can be read, one after the other -> their numbers; the others."""
    kept, unreadable = [], {}
    starts = range(0, len(files), batch_size)
    for start in with_progress(starts, len(starts), "Indexing", LOG_STEPS):
        good = []
        for number, picture in enumerate(read_pictures(files[start : start + batch_size], image_res), start):
            if isinstance(picture, BadImage):
                unreadable[files[number]] = picture.cause
                log.warning(f"left out of the index: {picture}")
            else:
                good.append((number, picture))
        if good:
            rows = slice(len(kept), len(kept) + len(good))
            states, features = encode([picture.pixels for _, picture in good])
            arrays[STATES][rows] = _stored(states.cpu())
            arrays[FEATURES][rows] = features.cpu().numpy()
            kept += [number for number, _ in good]
    if not kept:
        raise UserError(
            f"none of {len(files)} images can be read, the first: {files[0]} ({unreadable[files[0]]})"
        )
    return kept, unreadable


def kept_index(model: "Simla", images: str | Path, folder: str | Path) -> Index:
    """The index of a folder of images that `folder` keeps, made where it is missing. UserError where it is of
    other images, and for what `open_index` and `build_index` refuse.
    """
    if not Path(folder).exists():
        return model.index(images, folder)
    index = model.open_index(folder)
    if index.folder is None or Path(index.folder).resolve() != Path(images).resolve():
        source = index.folder or "a list of files"
        raise UserError(f"the index {folder} is of {source}, not of {images}; name another one")
    return index


def open_index(folder: str | Path, made_by: dict) -> Index:
    """A saved index, memory-mapped. Raises UserError where it is damaged, was made by other weights or in
    another precision than `made_by` says, or where the images are not those any more that it was made of.
    """
    folder, remedy = Path(folder), "delete it and index again"
    if not (folder / CONTENTS).is_file():  # it may be anything: no word of deleting it
        raise UserError(f"{folder} holds no index ({CONTENTS}); name a folder that an index was written to")
    try:
        contents = json.loads((folder / CONTENTS).read_bytes())
        arrays = {name: np.load(folder / name, mmap_mode="c") for name in (FEATURES, STATES)}
        if contents["format"] != FORMAT:
            raise UserError(f"the index {folder} is of another version of this program; {remedy}")
        theirs, source = contents["made_by"], contents["folder"]
        files = [file for file, *_ in contents["files"]]
        unreadable = {file: cause for file, cause, *_ in contents["unreadable"]}
        entries = contents["files"] + contents["unreadable"]
        passed_over = contents.get("passed_over", {})  # of an older version
        stamps = {file: (size, time) for file, *_, size, time in entries}
        if min(map(len, arrays.values())) < len(files):
            raise ValueError("fewer rows than files")
    except OSError as error:
        raise UserError(f"{folder} is no readable index ({error.strerror or error}); {remedy}") from error
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(
            f"the index {folder} is damaged ({type(error).__name__}: {error}); {remedy}"
        ) from error
    check_made_by(theirs, made_by, f"the index {folder}")
    for problem, changed in _changes(stamps, source):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(f"the index {folder} is out of date: {changed[0]}{more} {problem}; {remedy}")
    return _index(files, arrays, theirs, source, unreadable, passed_over)


def check_made_by(theirs: dict, ours: dict, name: str) -> None:
    """UserError where an index was not computed as this model would."""
    for key, what in MADE_BY.items():
        if theirs[key] != ours[key]:
            raise UserError(
                f"{name} was made by {what} ({theirs[key]}, this model has {ours[key]}); index the images "
                "again with this model"
            )


def _changes(stamps: dict[str, tuple[int, int]], folder: str | None) -> Iterator[tuple[str, list[str]]]:
    """What is not as it was when the index was made: the problem and the files that have it."""
    now = {file: _stamp(file) for file in stamps}
    found = {
        "is gone": [file for file, stamp in stamps.items() if now[file] == GONE != stamp],
        "has changed": [file for file, stamp in stamps.items() if now[file] not in (GONE, stamp)],
        "is new": [],
    }
    if folder is not None and Path(folder).is_dir():
        found["is new"] = [file for file in list_images(Path(folder), stamps).files if file not in stamps]
    return ((problem, files) for problem, files in found.items() if files)


GONE = (-1, -1)


def _stamp(file: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    try:
        status = Path(file).stat()
    except OSError:
        return GONE
    return status.st_size, status.st_mtime_ns


def _index(
    files: list[str],
    arrays: dict[str, np.ndarray],
    made_by: dict,
    folder: str | None,
    unreadable: dict[str, str],
    passed_over: dict[str, int],
) -> Index:
    features, states = (torch.from_numpy(arrays[name][: len(files)]) for name in (FEATURES, STATES))
    states = states.view(PRECISIONS[made_by["precision"]])
    return Index(files, features, states, made_by, folder, unreadable, passed_over)


def _stored_dtype(precision: str) -> np.dtype:
    """What numpy calls it; bfloat16, which it does not know, is stored as whole numbers of the same bits."""
    return np.dtype(np.int16 if precision == "bf16" else str(PRECISIONS[precision]).removeprefix("torch."))


def _stored(states: Tensor) -> np.ndarray:
    return (states.view(torch.int16) if states.dtype == torch.bfloat16 else states).numpy()
