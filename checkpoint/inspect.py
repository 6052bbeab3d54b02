"""A report on a checkpoint file: what it holds, and what a task would take of it."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from ruamel.yaml import YAML
from torch import Tensor

from simla.checkpoint.load import (
    check_same_build,
    config_in,
    kind_of,
    map_state,
    metadata_in,
    shapes_of,
    tokenizer_in,
    weights_in,
)
from simla.checkpoint.safe_load import safe_load, to_plain
from simla.checkpoint.save import check_undamaged
from simla.checkpoint.tasks import TASKS
from simla.checkpoint.tokenizer import tokenizer_from_text
from simla.configs.reader import read_config
from simla.configs.schema import TABLES
from simla.utils import UserError, check_weight

MEBIBYTE = 2**20
PROVENANCE = ("epoch", "step", "best", "run", "seed")  # what tells where a training's weights come from


def tensors_in(content: object) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts and lists; nothing of other objects."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(inner)


def _from_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def verdict(
    state: Mapping[str, Tensor],
    task: str,
    config: str,
    overrides: list[str],
    source: str,
    content: dict,
) -> str:
    """Return what the task's model of that config would take from the file, or why it would refuse it."""
    settings = read_config(config, TABLES[task], overrides)
    with torch.device("meta"):
        model = TASKS[task].build(settings)
    try:
        check_same_build(settings, config_in(content, source), source)
        _, report = map_state(state, shapes_of(model), task, source, metadata_in(content))
    except UserError as error:
        return f"{task} with {config} would refuse it: {error}"
    lists = {label: getattr(report, label) for label in ("interpolated", "fresh", "unused")}
    taken = f"{task} with {config} would take {len(report.loaded)} tensors"
    lines = [f"{taken}; {label}: {_grouped(names)}" for label, names in lists.items() if names]
    return "\n".join(lines or [f"{taken}, all of the file"])


def _grouped(names: list[str], few: int = 6) -> str:
    """Return the names; those of an outermost module that has more than a few as one, with their number."""
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.split(".")[0], []).append(name)
    groups = (n if len(n) <= few else [f"{module}.* ({len(n)} tensors)"] for module, n in modules.items())
    return ", ".join(name for group in groups for name in group)


def inspect(path: str, task: str | None = None, config: str = "", overrides: list[str] | None = None) -> str:
    """Return the report on a file, of which no weight is read. Raises UserError for what is no checkpoint."""
    content = safe_load(path)
    state, metadata = weights_in(content, path), metadata_in(content)
    about = {key: to_plain(content[key]) for key in PROVENANCE if key in content}
    if isinstance(content.get("ranks"), list):
        about["ranks"] = len(content["ranks"])
    about |= {key: _from_json(text) for key, text in metadata.items() if key not in ("config", "tokenizer")}
    if tokenizer := tokenizer_in(content):
        about["tokenizer"] = f"{len(tokenizer_from_text(tokenizer, path))} words"
    sizes = Counter()  # bytes of each outermost module; twins and queues are modules of their own
    for name, value in state.items():
        sizes[name.split(".")[0]] += value.nbytes
    if optimizer := sum(value.nbytes for value in tensors_in(content.get("optimizer"))):
        sizes["(optimizer)"] = optimizer

    kind, size = kind_of(state, path, metadata), Path(path).stat().st_size
    lines = [f"{path}: {kind} checkpoint, {size / MEBIBYTE:.1f} MiB"]
    lines += [f"{key}: {value}" for key, value in about.items()]
    lines.append(f"{len(state)} tensors, {sum(value.numel() for value in state.values()):,} values")
    lines += [f"{size / MEBIBYTE:10.1f} MiB  {name}" for name, size in sizes.items()]
    text, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(config_in(content, path), text)
    lines.append(f"config:\n{text.getvalue().rstrip()}")
    if task:
        lines.append(verdict(state, task, config, overrides or [], path, content))
    return "\n".join(lines)


def check_whole(path: str) -> None:
    """Read all of a file. Raises UserError for a wrong checksum and for weights that are not finite."""
    check_undamaged(path)
    for name, value in weights_in(safe_load(path), path).items():
        check_weight(value, name, path)
