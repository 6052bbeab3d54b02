"""Writes weights alone as safetensors; says what a checkpoint file holds.

python -m simla.checkpoint export | inspect
"""

if __name__ == "__main__":
    from simla.engine.before_imports import prepare

    prepare()

import argparse
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from ruamel.yaml import YAML
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simla.checkpoint.key_maps import QUEUES, TWIN
from simla.checkpoint.load import kind_of, map_state, metadata_in, row_of, shapes_of, tokenizer_in, weights_in
from simla.checkpoint.safe_load import safe_load, to_plain
from simla.checkpoint.save import check_undamaged
from simla.checkpoint.tasks import TASKS
from simla.checkpoint.tokenizer import tokenizer_from_text
from simla.configs.reader import add_overrides, read_config, task_name
from simla.engine.launch import run_script
from simla.utils import UserError, atomic_write, check_weight, code_revision

FORMAT = "1"
MEBIBYTE = 2**20
# What of a training checkpoint tells where its weights come from.
PROVENANCE = ("epoch", "step", "best", "run", "seed")


# ---- export ----


def export(source: str, target: str, task: str | None = None, inference: bool = False) -> list[str]:
    """Writes the weights of `source` alone into the .safetensors file `target`; returns the names left out.

    task: leaves out what that script has no place for; inference: also what only training uses, momentum
    twins and queues. The metadata have the config, the tokenizer and where the weights come from. Raises
    UserError for a file that is no checkpoint or has weights that are not finite, one that the task cannot
    start from, or a target that cannot be written.
    """
    if Path(target).suffix != ".safetensors":
        raise UserError(f"{target}: the exported file's name must end in .safetensors")
    content = safe_load(source)
    state = weights_in(content, source)
    metadata = metadata_in(content)  # of a file that was exported before
    kind = kind_of(state, source, metadata)
    unused = row_of(task, kind, source).unused if task else ()
    left_out = [name for name in state if name.startswith(unused)]
    if inference:
        left_out += [name for name in state if TWIN.match(name) or name.startswith(QUEUES)]
    kept = {name: value for name, value in state.items() if name not in set(left_out)}
    for name, value in kept.items():
        check_weight(value, name, source)
    metadata |= {
        "format": "pt",  # what other readers of safetensors look for
        "simla_format": FORMAT,
        "kind": kind,
        "source": Path(source).name,
        "code_revision": code_revision(),
    }
    told = {key: content[key] for key in (*PROVENANCE, "config") if key in content}
    metadata |= {key: json.dumps(to_plain(value)) for key, value in told.items()}
    if tokenizer := tokenizer_in(content):
        metadata["tokenizer"] = tokenizer
    with atomic_write(target) as file:
        try:
            save_file(_untied(kept), file.name, metadata)
            mode = os.fstat(file.fileno()).st_mode
            Path(file.name).chmod(mode)  # the writer puts a file of its own there, for its owner alone
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return sorted(set(left_out))


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights as copies of their own: the format knows no sharing, and readers expect every name."""
    seen, untied = set(), {}
    for name, value in state.items():
        untied[name] = value.clone() if value.data_ptr() in seen else value.contiguous()
        seen.add(value.data_ptr())
    return untied


# ---- inspect ----


def read_shapes(path: str) -> tuple[dict[str, Tensor], dict, int]:
    """Without reading any weight: the file's entries as tensors without memory ("meta"), what else it holds
    (config, epoch, ...), and the bytes of its optimiser. Raises UserError for what is no checkpoint.
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
    """Yields the tensors in nested dicts and lists; nothing of other objects."""
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
    """Bytes of each of the model's outermost parts; twins and queues are parts of their own."""
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
    """What the task's model of that config would take from the file, or why it would refuse it."""
    table, build = TASKS[task]
    with torch.device("meta"):
        model = build(read_config(config, table, overrides))
    try:
        _, report = map_state(state, shapes_of(model), task, source, metadata)
    except UserError as error:
        return f"{task} with {config} would refuse it: {error}"
    lists = {label: getattr(report, label) for label in ("interpolated", "fresh", "unused")}
    lines = [
        f"{task} with {config} would take {len(report.loaded)} tensors; {label}: {_grouped(names)}"
        for label, names in lists.items()
        if names
    ]
    return "\n".join(
        lines or [f"{task} with {config} would take {len(report.loaded)} tensors, all of the file"]
    )


def _grouped(names: list[str]) -> str:
    """The names; those of a part of the model that has many as one, with their number."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[0], []).append(name)
    few = 6
    groups = (own if len(own) <= few else [f"{part}.* ({len(own)} tensors)"] for part, own in parts.items())
    return ", ".join(name for group in groups for name in group)


def inspect(path: str, task: str | None = None, config: str = "", overrides: list[str] | None = None) -> str:
    """The report on a file; see `read_shapes` for what it raises."""
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


# ---- command line ----


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simla.checkpoint", description="Export or inspect a checkpoint file."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="weights alone, as safetensors")
    out.add_argument("source", help=".pth file, of this code or published")
    out.add_argument("target", help=".safetensors file; every script takes it as --checkpoint")
    out.add_argument(
        "--task", type=task_name, choices=TASKS, help="leave out what this script has no place for"
    )
    out.add_argument("--inference", action="store_true", help="leave out momentum twins and queues")
    show = commands.add_parser("inspect", help="what a file holds, without reading its weights")
    show.add_argument("file")
    show.add_argument(
        "--task", type=task_name, choices=TASKS, help="with --config: would this script take it?"
    )
    show.add_argument("--config", default="", help="YAML file of the task")
    add_overrides(show)
    show.add_argument(
        "--check", action="store_true", help="read the whole file: checksums, weights that are not finite"
    )
    args = parser.parse_args()
    if args.command == "export":
        left_out = export(args.source, args.target, args.task, args.inference)
        parts = Counter(name.split(".")[0] for name in left_out)
        described = ", ".join(f"{part} ({number})" for part, number in parts.items()) or "nothing"
        print(f"{args.target}: {Path(args.target).stat().st_size / MEBIBYTE:.1f} MiB; left out: {described}")
        return
    if bool(args.task) != bool(args.config):
        parser.error("--task and --config go together")
    print(inspect(args.file, args.task, args.config, args.overrides))
    if args.check:
        check_undamaged(args.file)
        content = safe_load(args.file)
        for name, value in weights_in(content, args.file).items():
            check_weight(value, name, args.file)
        print("all checksums match, all weights are finite")


if __name__ == "__main__":
    run_script(main)
