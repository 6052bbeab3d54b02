"""Cleaned copies of annotation files: the entries with a problem are left out, the others as they were."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simla.dataset.check.causes import PROBLEMS, Cause
from simla.dataset.check.findings import Findings
from simla.dataset.prepare.common import Report
from simla.dataset.readers.annotations import Annotations, Mapped
from simla.utils import UserError, make_output_folder


def write_fixed(findings: Findings, folder: str) -> dict:
    """Write a copy of each annotation file that has entries with problems.

    Returns {"files": what was left out of each, "shards": names of those that have problems and stay as they
    are, "config": the keys as they are to be in the config, with the weights of mixtures}. Raises UserError
    where a copy would take an original's place.
    """
    make_output_folder(folder, "--fix")
    sources = findings.shared.sources
    originals = {source.path.resolve() for source in sources if source.shards is None}
    files, shards, keys, copies = [], [], {}, set()
    for number, source in enumerate(sources):
        data_sets = keys.setdefault(f"{source.split}_file", {})
        _, names = data_sets.setdefault(source.data_set, (source.weight, []))
        flags = findings.flags[number] & PROBLEMS
        if source.shards is not None:
            names += [source.name] if source.name not in names else []  # a pattern may be several sources
            shards += [source.name] if flags.any() else []
            continue
        if source.problem or not flags.any():
            names.append(source.name)
            continue
        copy = Path(folder).absolute() / f"{source.path.stem}.json"
        while copy in copies:  # of another folder's file of that name
            copy = copy.with_name(f"{copy.stem}_{number}{copy.suffix}")
        copies.add(copy)
        if copy.resolve() in originals:
            raise UserError(f"--fix {folder}: {copy} is a file of the config; name another folder")
        kept = np.flatnonzero(flags == 0)
        counts = {cause.label: int(np.count_nonzero(flags & cause)) for cause in Cause}
        left_out = {label: count for label, count in counts.items() if count}
        files.append({"file": source.name, "copy": "", "kept": len(kept), "left_out": left_out})
        if len(kept):
            Report("--fix").write(copy, _entries(source.entries, kept))
            files[-1]["copy"] = str(copy)
            names.append(str(copy))
    config = {key: _value(data_sets) for key, data_sets in keys.items()}
    return {"files": files, "shards": shards, "config": config}


def _value(data_sets: dict[int, tuple[float | None, list[str]]]) -> list:
    """Return what config `train_file` is to be: files, or the data sets of a mixture that have some."""
    value = []
    for weight, names in data_sets.values():
        if weight is None:
            value += names
        elif names:
            value.append({"path": names if len(names) > 1 else names[0], "weight": weight})
    return value


def _entries(entries: Mapped | Annotations, kept: np.ndarray) -> Iterator[dict]:
    """Yield each entry as it is in its file; but an image path that was relative to that file is made
    absolute, since the copy lies elsewhere.
    """
    annotations = entries
    while isinstance(annotations, Mapped):
        annotations = annotations.entries
    (raw,), suffix = annotations.lists, annotations.suffix
    folder = raw.path.parent.absolute()
    for index in map(int, kept):
        entry = raw[index]
        names = entry["images"] if annotations.has_images else [entry["image"]]
        absolute = [
            path.removesuffix(suffix) if path == str(folder / (name + suffix)) else name
            for name, path in zip(names, entries[index]["images"], strict=True)
        ]
        images = {"images": absolute} if annotations.has_images else {"image": absolute[0]}
        yield {**entry, **images}
