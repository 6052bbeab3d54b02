"""An index of images for search: features and token states of every image, in memory or memory-mapped files.

A saved index is a folder of index.json (the files, what they were when they were encoded, and what computed
them) and two arrays, features-ID.npy and states-ID.npy. index.json names the ID and is written last, in one
step; arrays of another ID are left over from a process that was killed, or of the index before an update.
I images, E shared embedding, N image tokens, D width.
"""

import hashlib
import json
import math
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from simla.dataset.images import BadImage
from simla.folders import HIDDEN, Listing, describe, list_images
from simla.inputs import read_pictures
from simla.utils import PRECISIONS, UserError, atomic_write, dtype_of, log, num_cores, with_progress

FORMAT = 4
MADE_BY = {  # what of `Simla.image_side` may differ, and how that is called
    "architecture": "an image encoder of another build",
    "preprocessing": "a model that reads images otherwise",
    "precision": "another precision",
    "weights": "another image encoder",
}
CONTENTS, LOCK, FEATURES, STATES = "index.json", "index.lock", "features", "states"
LOG_STEPS = 50
LOOK_AT_A_TIME = 10_000  # files, between two lines of progress
UNIT_TOLERANCE = 1e-3  # of a feature's length
COPY_AT_A_TIME = 256  # rows
UPDATE = "update it (`index` with update=True)"


class Seen(NamedTuple):
    """A file as it was at a time. stamp: size in bytes, times of the last change of the content and of the
    file in nanoseconds, inode; digest: of the content, None where it cannot be read.
    """

    stamp: tuple[int, ...]
    digest: str | None

    def has_content_of(self, other: "Seen") -> bool:
        return self.stamp == other.stamp or (self.digest is not None and self.digest == other.digest)


GONE = Seen((-1,), None)


@dataclass(frozen=True, eq=False, repr=False)
class Index:
    """Images that `Simla.search` looks through.

    files (I): absolute paths; features (I, E) float32, unit length; states (I, N, D), of the precision that
    they were computed in; made_by: see `Simla.image_side`; folder: the absolute path of the folder that was
    indexed, None where it was a list; unreadable: files that were left out -> why; passed_over: what else the
    folder holds, cause -> number; everything: whether hidden folders, thumbnails and waste were searched;
    seen: every file, unreadable ones too, as it was when it was encoded.
    """

    files: list[str]
    features: Tensor
    states: Tensor
    made_by: dict
    folder: str | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    everything: bool = False
    seen: dict[str, Seen] = field(default_factory=dict)

    def __repr__(self) -> str:
        source = self.folder or "a list"
        return f"Index({len(self)} images of {source}, {len(self.unreadable)} unreadable)"

    def __len__(self) -> int:
        return len(self.files)

    def check(self, files: Iterable[str]) -> None:
        """Raise UserError where one of the files is not as it was when it was encoded."""
        for file in files:
            now = _see(file, self.seen[file])
            if not now.has_content_of(self.seen[file]):
                problem = BadImage(file, "is gone" if now == GONE else "has changed since it was indexed")
                raise UserError(f"{problem}; update the index, or index the images again") from problem


class Hit(NamedTuple):
    """An image that `Simla.search` found.

    score: what ranks the hits of one query, mostly the matching head's logit of "match"; it has no bounds and
    is no probability, which `Simla.match` gives. similarity: the cosine of the features, -1 to 1, which chose
    the candidates.
    """

    file: str
    score: float
    similarity: float


def image_files(images: str | Path | Sequence[str | Path], everything: bool = False) -> Listing:
    """Return the absolute paths of the images of a folder and its subfolders, sorted, or of a list."""
    if not isinstance(images, str | Path):
        files = list(images)
        wrong = [file for file in files if not isinstance(file, str | Path)]
        if wrong or not files:
            found = f"a {type(wrong[0]).__name__}" if wrong else "an empty list"
            raise UserError(f"an index is made of a folder or a list of image files, found {found}")
        return Listing([str(Path(file).absolute()) for file in files], {})
    folder = Path(images).absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; search looks through a folder or a list of image files")
    listing = list_images(folder, everything=everything)
    if not listing.files:
        more = [describe(listing.passed_over)] if listing.passed_over else []
        if any(cause == HIDDEN or " named " in cause for cause in listing.passed_over):
            more.append("everything=True searches hidden folders and waste, too")
        raise UserError("; ".join([f"{folder} holds no image", *more]))
    return listing


def build_index(
    images: str | Path | Sequence[str | Path],
    folder: str | Path | None,
    encode: Callable[[list[Tensor]], tuple[Tensor, Tensor]],
    sizes: tuple[int, int, int],
    image_res: int,
    batch_size: int,
    made_by: dict,
    update: bool = False,
    everything: bool = False,
) -> Index:
    """Encode the images batch by batch, into a new `folder`, or in memory where there is none.

    encode: pixels, each (3, R, R) uint8 -> states (B, N, D), features (B, E); sizes: N, D, E; update: where
    `folder` holds an index, only images of a new content are encoded; everything: see `list_images`. Files
    that cannot be read are left out, named in the log and in `unreadable`. Raises UserError where none can be
    read, the index does not fit into memory or on the disk, or the folder is there already, is being written
    by another process or cannot be written.
    """
    files, passed_over = image_files(images, everything)
    if passed_over:
        log.info(f"{images}: {len(files)} images; {describe(passed_over)}")
    num_tokens, width, embed_dim = sizes
    shapes = {FEATURES: (len(files), embed_dim), STATES: (len(files), num_tokens, width)}
    dtypes, fill = _stored_dtypes(made_by), partial(_fill, encode=encode, sizes=(image_res, batch_size))
    source = str(Path(images).absolute()) if isinstance(images, str | Path) else None
    about = {"made_by": made_by, "folder": source, "passed_over": passed_over, "everything": everything}
    if folder is None:
        if update:
            raise UserError("update=True is for an index that was written to a folder: name the folder")
        arrays, seen = _new_arrays(shapes, dtypes), {}
        kept, unreadable = fill(arrays, 0, files, seen)
        return Index(kept, *_tensors(arrays, len(kept), made_by), unreadable=unreadable, seen=seen, **about)
    folder = Path(folder)
    with _writing(folder, update):
        old, contents, seen, rows, unreadable = None, {}, {}, {}, {}
        if (folder / CONTENTS).exists():
            old, contents = _load(folder, made_by, source)
            seen, rows, unreadable = _known(old, files, f"the index {folder}")
        kept = sorted((file for file in files if file in rows), key=rows.__getitem__)
        new = [file for file in files if file not in rows and file not in unreadable]
        if old is not None and not new and [rows[file] for file in kept] == list(range(len(kept))):
            tensors = old.features[: len(kept)], old.states[: len(kept)]
        else:
            contents = {"id": uuid.uuid4().hex, "shapes": shapes}
            arrays = _new_arrays(shapes, dtypes, folder, contents["id"])
            for start in range(0, len(kept), COPY_AT_A_TIME):
                copied = [rows[file] for file in kept[start : start + COPY_AT_A_TIME]]
                _put(arrays, start, old.features[copied], old.states[copied])
            encoded, broken = fill(arrays, len(kept), new, seen)
            kept, unreadable = kept + encoded, unreadable | broken
            for array in arrays.values():
                array.flush()
            tensors = _tensors(arrays, len(kept), made_by)
        contents |= {
            **about,
            "format": FORMAT,
            "files": [[_in_folder(file, source), *seen[file]] for file in kept],
            "unreadable": [[_in_folder(file, source), *seen[file], unreadable[file]] for file in unreadable],
        }
        with atomic_write(folder / CONTENTS) as file:
            file.write(json.dumps(contents).encode())
    return Index(kept, *tensors, unreadable=unreadable, seen=seen, **about)


@contextmanager
def _writing(folder: Path, update: bool) -> Iterator[None]:
    """Keep other processes from writing the index `folder` inside. Arrays that no index.json names are
    deleted, and a folder that has come to hold none. Raises UserError where another process writes there, or
    something is there already.
    """
    try:
        is_other = folder.exists() and not (folder / CONTENTS).exists()
        if is_other and not (folder.is_dir() and all(map(_is_left_over, folder.iterdir()))):
            raise UserError(f"{folder} is there already, and is no index; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            if (folder / CONTENTS).exists() and not update:
                raise UserError(f"{folder} is there already; {UPDATE}, delete it, or name another folder")
            _delete_left_over(folder)
            try:
                yield
            finally:
                _delete_left_over(folder)
                if not (folder / CONTENTS).exists():
                    with suppress(OSError):
                        (folder / LOCK).unlink()
                        folder.rmdir()
    except Timeout as error:
        raise UserError(f"another process is writing the index {folder}; wait for its end") from error
    except OSError as error:
        raise UserError(f"the index {folder} could not be written ({error.strerror or error})") from error


def _new_arrays(
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, np.dtype],
    folder: Path | None = None,
    identity: str = "",
) -> dict[str, np.ndarray]:
    """Return empty arrays, in files of the folder if one is given. Raises UserError where they do not fit."""
    num_bytes = sum(math.prod(shapes[name]) * dtypes[name].itemsize for name in shapes)
    needed = f"an index of {shapes[FEATURES][0]} images takes {num_bytes / 1e9:.3g} GB"
    if folder is None:
        try:
            return {name: np.empty(shapes[name], dtypes[name]) for name in shapes}
        except MemoryError as error:
            remedy = "write it to a folder, or index fewer images"
            raise UserError(f"{needed}, more than there is of memory; {remedy}") from error
    free = shutil.disk_usage(folder).free
    if num_bytes > free:  # writing to a map of a file that the disk has no place for ends the process
        raise UserError(f"{needed}, {free / 1e9:.3g} GB are free at {folder}; choose another disk")
    files = {name: _array_file(folder, name, identity) for name in shapes}
    return {name: np.lib.format.open_memmap(files[name], "w+", dtypes[name], shapes[name]) for name in shapes}


def _is_left_over(path: Path) -> bool:
    """Return whether a file may be of a process that was killed while it wrote an index."""
    return path.name == LOCK or path.name.startswith((f"{FEATURES}-", f"{STATES}-", f".{CONTENTS}."))


def _delete_left_over(folder: Path) -> None:
    contents = (folder / CONTENTS).read_bytes() if (folder / CONTENTS).exists() else b""
    for path in filter(_is_left_over, list(folder.iterdir())):
        if path.name != LOCK and path.stem.rpartition("-")[2].encode() not in contents:
            path.unlink(missing_ok=True)


def _known(old: Index, files: list[str], name: str) -> tuple[dict[str, Seen], dict[str, int], dict[str, str]]:
    """Return how the files are now, the rows of those whose content `old` has, and the causes of those that
    are still unreadable. Raises UserError, which calls the index `name`, where not one is known.
    """
    seen, rows, unreadable = _look(files, old.seen), {}, {}
    by_file = {file: row for row, file in enumerate(old.files)}
    by_digest = {old.seen[file].digest: row for file, row in by_file.items()}
    for file in files:
        digest = seen[file].digest
        is_same = file in old.seen and seen[file].has_content_of(old.seen[file])
        if is_same and file in by_file:
            rows[file] = by_file[file]
        elif is_same and digest is not None:
            unreadable[file] = old.unreadable[file]
        elif digest is not None and digest in by_digest:  # renamed, moved or copied
            rows[file] = by_digest[digest]
    num_gone = len(old) - len(set(rows.values()))
    if not rows:
        raise UserError(f"{name} has none of these {len(files)} images; name another one, or delete it")
    num_new = len(set(files)) - len(rows) - len(unreadable)
    log.info(f"{name}: {len(rows)} images are known, {num_new} are new or changed, {num_gone} are gone")
    return seen, rows, unreadable


def _fill(
    arrays: Mapping[str, np.ndarray],
    num_rows: int,
    files: list[str],
    seen: dict[str, Seen],
    encode: Callable,
    sizes: tuple[int, int],
) -> tuple[list[str], dict[str, str]]:
    """Write the images that can be read to the rows after the first `num_rows`; return their files, and the
    others with their causes. sizes: image_res, batch_size. How the files are is noted in `seen`, where it is
    not there, before they are read: a later change is noticed.
    """
    kept, unreadable, (image_res, batch_size) = [], {}, sizes
    starts = range(0, len(files), batch_size)
    for start in with_progress(starts, len(starts), "Indexing", LOG_STEPS):
        batch, good = files[start : start + batch_size], []
        seen |= _look([file for file in batch if file not in seen], {})
        for file, picture in zip(batch, read_pictures(batch, image_res, start), strict=True):
            if isinstance(picture, BadImage):
                unreadable[file] = picture.cause
                log.warning(f"left out of the index: {picture}")
            else:
                good.append((file, picture))
        if good:
            states, features = encode([picture.pixels for _, picture in good])
            _put(arrays, num_rows + len(kept), features.cpu(), states.cpu())
            kept += [file for file, _ in good]
    if not kept and not num_rows:
        first = f"{files[0]} ({unreadable[files[0]]})"
        raise UserError(f"none of {len(files)} images can be read, the first: {first}")
    return kept, unreadable


def open_index(folder: str | Path, made_by: dict, images: str | Path | None = None) -> Index:
    """Return a saved index, memory-mapped. images: where the indexed folder is now, if it has been moved or
    copied. Raises UserError where the index is damaged, was made by other weights or in another precision
    than `made_by` says, or its images are not those any more that it was made of.
    """
    index, contents = _load(Path(folder), made_by, images)
    source = contents["folder"]
    is_elsewhere = images is not None and (source is None or Path(source).resolve() != Path(images).resolve())
    if source is None and is_elsewhere:
        raise UserError(f"the index {folder} is of a list of files, not of {images}; name another one")
    if index.folder is not None and not Path(index.folder).is_dir():
        what = f"{index.folder} is no folder; the index {folder} is of {source}"
        raise UserError(f"{what}: where that has been moved, give its new place")
    now = _look(list(index.seen), index.seen)
    for problem, changed in _changes(index, now):
        if is_elsewhere:
            what = f"the index {folder} is of {source}, not of {images}"
            raise UserError(f"{what}; name another one, or {UPDATE}")
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(f"the index {folder} is out of date: {changed[0]}{more} {problem}; {UPDATE}")
    if num_touched := sum(now[file].stamp != seen.stamp for file, seen in index.seen.items()):
        what = f"{num_touched} of {len(now)} files had to be compared by their contents, which are the same"
        log.info(f"{folder}: {what}; after an update (`index` with update=True) they need not be")
    return index


def _load(folder: Path, made_by: dict, images: str | Path | None) -> tuple[Index, dict]:
    """Return the index as it was written, its files below `images` where that is given, and its JSON."""
    remedy, text = "delete it and index again", b""
    if not (folder / CONTENTS).is_file():  # it may be anything: no word of deleting it
        raise UserError(f"{folder} holds no index ({CONTENTS}); name a folder that an index was written to")
    try:
        text = (folder / CONTENTS).read_bytes()
        contents = json.loads(text)
        if contents["format"] != FORMAT:
            raise UserError(f"the index {folder} is of another version of this program; {remedy}")
        check_made_by(contents["made_by"], made_by, f"the index {folder}")
        arrays, dtypes = {}, _stored_dtypes(made_by)
        for name in (FEATURES, STATES):
            arrays[name] = np.load(_array_file(folder, name, contents["id"]), mmap_mode="c")
            kind = [*arrays[name].shape], arrays[name].dtype
            if kind != (contents["shapes"][name], dtypes[name]):
                raise ValueError(f"{name} of another shape or kind")
        source = contents["folder"]
        base = None if source is None else Path(images or source).absolute()
        files, unreadable, seen = [], {}, {}
        for name, stamp, digest, *cause in (*contents["files"], *contents["unreadable"]):
            file = str(name if base is None else base / name)
            seen[file] = Seen(tuple(stamp), digest)
            if cause:
                unreadable[file] = str(cause[0])
            else:
                files.append(file)
        features, states = _tensors(arrays, len(files), made_by)
        if len(features) < len(files):
            raise ValueError("fewer rows than files")
        if not (torch.linalg.vector_norm(features, dim=1) - 1).abs().le(UNIT_TOLERANCE).all():
            raise ValueError("features that have not the length 1")
        home = None if base is None else str(base)
        more = {"passed_over": contents["passed_over"], "everything": contents["everything"], "seen": seen}
        return Index(files, features, states, made_by, home, unreadable, **more), contents
    except OSError as error:
        with suppress(OSError):
            if text and text != (folder / CONTENTS).read_bytes():  # another process has updated it meanwhile
                return _load(folder, made_by, images)
        raise UserError(f"{folder} is no readable index ({error.strerror or error}); {remedy}") from error
    except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"the index {folder} is damaged ({what}); {remedy}") from error


def check_made_by(theirs: dict, ours: dict, name: str) -> None:
    """Raise UserError where an index was not computed as this model would."""
    for key, what in MADE_BY.items():
        if theirs[key] != ours[key]:
            both = f"{theirs[key]}, this model has {ours[key]}"
            raise UserError(f"{name} was made by {what} ({both}); index the images again with this model")


def _changes(index: Index, now: Mapping[str, Seen]) -> Iterator[tuple[str, list[str]]]:
    """Yield (problem, files that have it) for what is not as it was when the index was made."""
    changes = {"is gone": [], "has changed": [], "is new": []}
    for file, then in index.seen.items():
        if not now[file].has_content_of(then):
            changes["is gone" if now[file] == GONE else "has changed"].append(file)
    if index.folder is not None:
        listed = list_images(Path(index.folder), index.seen, index.everything).files
        changes["is new"] = [file for file in listed if file not in index.seen]
    return ((problem, files) for problem, files in changes.items() if files)


def _look(files: Sequence[str], before: Mapping[str, Seen]) -> dict[str, Seen]:
    """Return how the files are now. Only those that have not the stamp that they had are read."""
    seen = {}
    starts = range(0, len(files), LOOK_AT_A_TIME)
    shown = with_progress(starts, len(starts), "Comparing files", 1) if len(starts) > 1 else starts
    with ThreadPoolExecutor(num_cores()) as threads:
        for start in shown:
            some = files[start : start + LOOK_AT_A_TIME]
            seen |= zip(some, threads.map(_see, some, map(before.get, some)), strict=True)
    return seen


def _see(file: str, before: Seen | None) -> Seen:
    try:
        status = Path(file).stat()
    except (OSError, ValueError):  # a name that no file can have
        return GONE
    stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    if before is not None and before.stamp == stamp:
        return before
    digest = None
    if stat.S_ISREG(status.st_mode):  # a pipe would not end
        with suppress(OSError):
            digest = hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
    return Seen(stamp, digest)


def _in_folder(file: str, folder: str | None) -> str:
    return file if folder is None else str(Path(file).relative_to(folder))


def _array_file(folder: Path, name: str, identity: str) -> Path:
    return folder / f"{name}-{identity}.npy"


def _tensors(arrays: Mapping[str, np.ndarray], num_rows: int, made_by: dict) -> tuple[Tensor, Tensor]:
    """Return features and states of the first rows."""
    features, states = (torch.from_numpy(arrays[name][:num_rows]) for name in (FEATURES, STATES))
    return features, states.view(dtype_of(made_by["precision"]))


def _stored_dtypes(made_by: dict) -> dict[str, np.dtype]:
    """Return what numpy calls them; bfloat16, which it lacks, is stored as integers of the same bits."""
    precision = made_by["precision"]
    kind = "int16" if precision == "bf16" else PRECISIONS[precision]
    return {FEATURES: np.dtype(np.float32), STATES: np.dtype(kind)}


def _put(arrays: Mapping[str, np.ndarray], first: int, features: Tensor, states: Tensor) -> None:
    """Write rows from row `first` on."""
    rows = slice(first, first + len(features))
    arrays[FEATURES][rows] = features.numpy()
    arrays[STATES][rows] = (states.view(torch.int16) if states.dtype == torch.bfloat16 else states).numpy()
