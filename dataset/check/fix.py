"""Cleaned copies of annotation files: the entries with a problem are left out, the others as they were."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simla.dataset.check.causes import NAMES, PROBLEMS
from simla.dataset.check.findings import Findings
from simla.dataset.readers.annotations import Annotations, Mapped
from simla.utils import UserError, atomic_write, log, make_output_folder, with_progress


def write_fixed(findings: Findings, folder: str) -> dict:
    """Writes a copy of each annotation file that has entries with problems.

    Returns {"files": what was left out of each, "shards": names of those that have problems and stay as they
    are, "config": the keys as they are to be in the config, with the weights of mixtures}. Raises UserError
    where a copy would take an original's place.
    """
    make_output_folder(folder, "--fix")
    originals = {source.path.resolve() for source in findings.shared.sources if source.shards is None}
    files, shards, keys, used = [], [], {}, set()
    for number, source in enumerate(findings.shared.sources):
        data_sets = keys.setdefault(f"{source.split}_file", {})
        _, named = data_sets.setdefault(source.data_set, (source.weight, []))
        flags = findings.flags[number] & PROBLEMS
        if source.problem or source.shards is not None or not flags.any():
            if source.shards is None or source.name not in named:  # a pattern may be local and other shards
                named.append(source.name)
            if source.shards is not None and flags.any():
                shards.append(source.name)
            continue
        copy = Path(folder).absolute() / f"{source.path.stem}.json"
        while copy in used:  # another folder's file of that name
            copy = copy.with_name(f"{copy.stem}_{number}{copy.suffix}")
        used.add(copy)
        if copy.resolve() in originals:
            raise UserError(f"--fix {folder}: {copy} is a file of the config; name another folder")
        kept = np.flatnonzero(flags == 0)
        left_out = {
            NAMES[cause]: int(np.count_nonzero(flags & cause)) for cause in NAMES if (flags & cause).any()
        }
        files.append({"file": source.name, "copy": "", "kept": len(kept), "left_out": left_out})
        if len(kept):
            _write_copy(source.entries, kept, copy)
            files[-1]["copy"] = str(copy)
            named.append(str(copy))
    return {"files": files, "shards": shards, "config": {key: _value(found) for key, found in keys.items()}}


def _value(data_sets: dict[int, tuple[float | None, list[str]]]) -> list:
    """Returns what config `train_file` is to be: files, or the data sets of a mixture that have some."""
    value = []
    for weight, names in data_sets.values():
        if weight is None:
            value += names
        elif names:
            value.append({"path": names if len(names) > 1 else names[0], "weight": weight})
    return value


def _write_copy(entries: Mapped | Annotations, kept: np.ndarray, path: Path) -> None:
    with atomic_write(path) as file:
        separator = "[\n"
        for text in with_progress(_texts(entries, kept), len(kept), f"Writing {path}", 100_000):
            file.write((separator + text).encode())
            separator = ",\n"
        file.write(b"\n]\n")
    log.info(f"{path}: {len(kept)} entries")


def _texts(entries: Mapped | Annotations, kept: np.ndarray) -> Iterator[str]:
    """The JSON of each entry as it is in its file; but an image path that was relative to that file is made
    absolute, since the copy lies elsewhere."""
    annotations = entries
    while isinstance(annotations, Mapped):
        annotations = annotations.entries
    (raw,), suffix = annotations.lists, annotations.suffix
    folder = raw.path.parent.absolute()
    for index in map(int, kept):
        entry = raw[index]
        field = "images" if annotations.has_images else "image"
        named = entry[field] if annotations.has_images else [entry[field]]
        absolute = [
            found.removesuffix(suffix) if found == str(folder / (name + suffix)) else name
            for name, found in zip(named, entries[index]["images"], strict=True)
        ]
        entry = {**entry, field: absolute if annotations.has_images else absolute[0]}
        yield json.dumps(entry)
