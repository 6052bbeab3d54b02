"""What a checkpoint file holds, and what a task would take of it."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from ruamel.yaml import YAML
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simla.checkpoint.load import kind_of, map_state, shapes_of, tokenizer_in, weights_in
from simla.checkpoint.safe_load import safe_load, to_plain
from simla.checkpoint.save import check_undamaged
from simla.checkpoint.tasks import TASKS
from simla.checkpoint.tokenizer import tokenizer_from_text
from simla.configs.reader import read_config
from simla.configs.schema import TABLES
from simla.utils import UserError, check_weight

MEBIBYTE = 2**20
PROVENANCE = ("epoch", "step", "best", "run", "seed")  # what tells where a training's weights come from


def read_shapes(path: str) -> tuple[dict[str, Tensor], dict, int]:
    """Return the file's entries as tensors without memory ("meta"), what else it holds (config, epoch, ...)
    and the bytes of its optimiser; no weight is read. Raises UserError for what is no checkpoint.
    """
    if Path(path).suffix == ".safetensors":
        return *_read_header(path), 0
    content = safe_load(path)
    state = weights_in(content, path)
    rest = {key: content[key] for key in (*PROVENANCE, "config") if key in content}
    if tokenizer := tokenizer_in(content):
        rest["tokenizer"] = tokenizer
    if isinstance(content.get("ranks"), list):
        rest["ranks"] = len(content["ranks"])
    optimizer = sum(value.nbytes for value in tensors_in(content.get("optimizer")))
    return {name: torch.empty_like(value, device="meta") for name, value in state.items()}, rest, optimizer


def tensors_in(content: object) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts and lists; nothing of other objects."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(part)


def _read_header(path: str) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            shapes = {name: (piece.get_shape(), piece.get_dtype()) for name, piece in pieces.items()}
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable .safetensors file ({error})") from error
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    state = {
        name: torch.empty(shape, dtype=dtypes.get(dtype, torch.float32), device="meta")
        for name, (shape, dtype) in shapes.items()
    }
    texts = {key: value for key, value in metadata.items() if key == "tokenizer"}
    return state, {key: _from_json(value) for key, value in metadata.items()} | texts


def _from_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the bytes of each outermost module; twins and queues are modules of their own."""
    found = Counter()
    for name, value in state.items():
        found[name.split(".")[0]] += value.nbytes
    return dict(found)


def verdict(
    state: Mapping[str, Tensor],
    task: str,
    config: str,
    overrides: list[str],
    source: str,
    metadata: dict | None = None,
) -> str:
    """Return what the task's model of that config would take from the file, or why it would refuse it."""
    with torch.device("meta"):
        model = TASKS[task].build(read_config(config, TABLES[task], overrides))
    try:
        _, report = map_state(state, shapes_of(model), task, source, metadata)
    except UserError as error:
        return f"{task} with {config} would refuse it: {error}"
    lists = {label: getattr(report, label) for label in ("interpolated", "fresh", "unused")}
    taken = f"{task} with {config} would take {len(report.loaded)} tensors"
    lines = [f"{taken}; {label}: {_grouped(names)}" for label, names in lists.items() if names]
    return "\n".join(lines or [f"{taken}, all of the file"])


def _grouped(names: list[str]) -> str:
    """Return the names; those of an outermost module that has many as one, with their number."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[0], []).append(name)
    few = 6
    groups = ([f"{part}.* ({len(p)} tensors)"] if len(p) > few else p for part, p in parts.items())
    return ", ".join(name for group in groups for name in group)


def inspect(path: str, task: str | None = None, config: str = "", overrides: list[str] | None = None) -> str:
    """Return the report on a file; see `read_shapes` for what it raises."""
    state, rest, optimizer = read_shapes(path)
    kind = kind_of(state, path, rest)
    lines = [f"{path}: {kind} checkpoint, {Path(path).stat().st_size / MEBIBYTE:.1f} MiB"]
    plain = to_plain(rest.get("config", {}))
    rest_lines = {key: to_plain(value) for key, value in rest.items() if key not in ("config", "tokenizer")}
    lines += [f"{key}: {value}" for key, value in rest_lines.items()]
    if "tokenizer" in rest:
        lines.append(f"tokenizer: {len(tokenizer_from_text(rest['tokenizer'], path))} words")
    num_values = sum(value.numel() for value in state.values())
    lines.append(f"{len(state)} tensors, {num_values:,} values")
    lines += [f"{size / MEBIBYTE:10.1f} MiB  {name}" for name, size in sizes(state).items()]
    if optimizer:
        lines.append(f"{optimizer / MEBIBYTE:10.1f} MiB  (optimizer)")
    text, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(plain, text)
    lines.append(f"config:\n{text.getvalue().rstrip()}")
    if task:
        lines.append(verdict(state, task, config, overrides or [], path, rest))
    return "\n".join(lines)


def check_whole(path: str) -> None:
    """Read all of a file. Raises UserError for a wrong checksum and for weights that are not finite."""
    check_undamaged(path)
    for name, value in weights_in(safe_load(path), path).items():
        check_weight(value, name, path)
