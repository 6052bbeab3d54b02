"""Loads published and own weights into any task's model.

A checkpoint is a plain dict {model, optimizer, lr_scheduler, config, epoch}; `model` has the published names.
Which name of the file fills which name of the model is data: `starts_from` in tasks.py, a row for each kind
of checkpoint that a task reads. Loading is strict with an account: what a row does not expect to be missing
or left over stops the run.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla.checkpoint.key_maps import KINDS, POSITIONS, QUEUES, TOKEN_TYPES, TWIN, Row
from simla.checkpoint.safe_load import Inert, safe_load, to_plain
from simla.checkpoint.tasks import TASKS
from simla.configs.schema import BERT_CONFIG, VIT
from simla.models.bert_config import BertConfig
from simla.utils import UserError, check_weight, log

POS_EMBEDS = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")
POSITION_IDS = "embeddings.position_ids"  # constants, which some versions of transformers store
# Of how the encoders are built, what changes their output; the shapes of the weights show little of it.
UNSEEN_OF_VIT = ("num_heads", "norm_eps", "patch_size", "qkv_bias")
UNSEEN_OF_BERT = ("num_attention_heads", "layer_norm_eps", "pad_token_id")


@dataclass
class LoadReport:
    """An account of a loading: which names of the model were filled, and which of the file were not used."""

    source: str
    kind: str
    loaded: dict[str, str] = field(default_factory=dict)  # model name -> name in the file
    interpolated: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors from {self.source} ({self.kind} checkpoint)"]
        for label in ("interpolated", "fresh", "unused"):
            if names := getattr(self, label):
                parts.append(f"{label}: {_some(names, 3)}")
        return "; ".join(parts)


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def interpolate_pos_embed(pos_embed: Tensor, num_patches: int) -> Tensor:
    """Return (1, 1 + n, D) resized to (1, 1 + num_patches, D): bicubic over the square of patches, [CLS] as
    it is. Raises UserError where either number is no square.
    """
    cls_token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    old, new = math.isqrt(patches.shape[1]), math.isqrt(num_patches)
    if old**2 != patches.shape[1] or new**2 != num_patches:
        raise UserError(f"positions of {patches.shape[1]} patches do not resize to {num_patches}: no square")
    square = patches.transpose(1, 2).unflatten(2, (old, old)).float()  # (1, D, old, old)
    resized = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls_token, resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def _layers(names: Iterable[str], part: str = "") -> set[int]:
    """Return the numbers of the text encoder's layers that have `part`."""
    layer = re.compile(rf"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.{part}")
    return {int(match[1]) for match in map(layer.match, names) if match}


def text_layers_alone(names: Iterable[str]) -> int:
    """Return how many layers of the text encoder, from the first on, have no cross-attention."""
    return min(_layers(names, "crossattention"), default=0)


def fold_token_types(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Mapping[str, Tensor]:
    """Return the state with token type 0, which every token has, added to the positions, where the file has
    token types (ALBEF's) and the model none.
    """
    typed = [name.removesuffix(TOKEN_TYPES) for name in state if name.endswith(TOKEN_TYPES)]
    if not typed or any(name.endswith(TOKEN_TYPES) for name in shapes):
        return state
    state = dict(state)
    for prefix in typed:
        state[f"{prefix}{POSITIONS}"] = state[f"{prefix}{POSITIONS}"] + state.pop(f"{prefix}{TOKEN_TYPES}")[0]
    return state


def match_row(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], row: Row, source: str, kind: str
) -> tuple[dict[str, Tensor], LoadReport]:
    """Return what `map_state` does, with a given row."""
    state, num_layers = fold_token_types(state, shapes), len(_layers(state))
    report = LoadReport(source, kind)
    no_twins = row.may_lack_twins and not any(map(TWIN.match, state))
    no_queues = row.may_lack_twins and not any(name.startswith(QUEUES) for name in state)
    tensors, missing, misshapen = {}, [], []
    for name, shape in shapes.items():
        name_in_file = row.name_in_file(name, num_layers)
        value = state.get(name_in_file)
        if value is None:
            fresh = name.startswith(row.fresh) or name.endswith(POSITION_IDS)
            fresh = fresh or (no_twins and TWIN.match(name)) or (no_queues and name.startswith(QUEUES))
            (report.fresh if fresh else missing).append(name)
            continue
        report.loaded[name] = name_in_file
        is_resizable = name in POS_EMBEDS and value.ndim == 3 and value.shape[::2] == tuple(shape)[::2]
        if row.interpolate and is_resizable and value.shape[1] != shape[1]:
            value = interpolate_pos_embed(value, shape[1] - 1)
            report.interpolated.append(name)
        if value.shape != tuple(shape):
            misshapen.append(f"{name} ({tuple(value.shape)} in the file, {tuple(shape)} in the model)")
        tensors[name] = value
    used = set(report.loaded.values())
    report.unused = [name for name in state if name not in used]
    unexpected = [n for n in report.unused if not (n.startswith(row.unused) or n.endswith(POSITION_IDS))]
    problems = (("missing", missing), ("of another shape", misshapen), ("not in the model", unexpected))
    account = "; ".join(f"{label}: {_some(names)}" for label, names in problems if names)
    if account:
        raise UserError(
            f"{source}, a {kind} checkpoint, does not fit the model; {account}. Use the config it was made "
            "with (image resolution, queue size, vocabularies), or another checkpoint"
        )
    return tensors, report


def kind_of(state: Mapping[str, Tensor], source: str = "the checkpoint", metadata: dict | None = None) -> str:
    """Return which task's training wrote the checkpoint. Raises UserError for any other's.

    metadata: those of an exported file, which say it; what the markers name may have been left out.
    """
    stated = (metadata or {}).get("kind")
    for kind, marker in KINDS:
        if kind == stated or (stated is None and any(name.startswith(marker) for name in state)):
            return kind
    raise UserError(f"{source} is not a SIMLA checkpoint: it holds {_some(list(state), 4) or 'nothing'}")


def row_of(task: str, kind: str, source: str = "the checkpoint") -> Row:
    """Return how the task reads that kind. Raises UserError where it cannot start from it."""
    rows = TASKS[task].starts_from
    if kind not in rows:
        raise UserError(
            f"{source} is a {kind} checkpoint; {task} starts from a {' or '.join(rows)} checkpoint"
        )
    return rows[kind]


def map_state(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    task: str,
    source: str = "the checkpoint",
    metadata: dict | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Return the tensor of `state` for every name of `shapes` (the model's entries), and the account.

    A file with no momentum twins at all, or no queues, leaves those of the model as built. Raises UserError
    when the checkpoint is of a kind the task cannot start from, or does not fit its row.
    """
    kind, theirs, ours = kind_of(state, source, metadata), *map(text_layers_alone, (state, shapes))
    if theirs != ours:
        raise UserError(
            f"{source}: the first {theirs} layers of its text encoder have no cross-attention, the model's "
            f"first {ours}; set bert_config.text_layers_alone={theirs} (SIMLA: 0, ALBEF: 6)"
        )
    return match_row(state, shapes, row_of(task, kind, source), source, kind)


STATES = ("model", "state_dict", "model_state_dict", "module")  # where files keep weights, if not at the top
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # no part of ours
OUTER = re.compile(r"((?:[^.]+\.)*?)visual_encoder(?:_m)?\.")


def weights_in(content: Any, source: str) -> dict[str, Tensor]:
    """Return the model's entries of what a file holds, under the model's own names. Raises UserError for what
    has none.

    What wrappers put into names is taken off: anywhere `module.` of data-parallel training and `_orig_mod.`
    of torch.compile, in front what an outer module calls the model, as Lightning's `model.`.
    """
    state = content
    while isinstance(state, dict) and (inner := [name for name in STATES if name in state]):
        state = state[inner[0]]
    entries = state.items() if isinstance(state, dict) else [("", None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries):
        what = f"expected a dict of tensors, alone or under {' or '.join(map(repr, STATES))}"
        if isinstance(state, Inert):
            what += ", found a whole module; save its state_dict()"
        raise UserError(f"{source} holds no weights: {what}")
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state}
    outer = {match[1] for name in names.values() if (match := OUTER.match(name))}
    if len(outer) > 1:
        listed = ", ".join(f"{prefix}visual_encoder" for prefix in sorted(outer))
        raise UserError(f"{source} holds several models: {listed}; save the entries of one of them alone")
    names = {name: plain.removeprefix("".join(outer)) for name, plain in names.items()}
    weights = {names[name]: value for name, value in state.items()}
    if len(weights) < len(state):
        twice = next(plain for plain, number in Counter(names.values()).items() if number > 1)
        raise UserError(f"{source} holds {twice} more than once, under several wrappers; save one of them")
    return weights


@torch.no_grad()
def copy_into(model: nn.Module, tensors: Mapping[str, Tensor], report: LoadReport) -> None:
    """Fill the model piece by piece. Raises UserError at the first tensor that is not finite, be it in the
    model's dtype alone, or is no weights.
    """
    targets = model.state_dict()
    for name, value in tensors.items():
        target = targets[name]
        if value.is_floating_point() != target.is_floating_point():
            raise UserError(
                f"{report.source}: {report.loaded[name]} is of {value.dtype}, in the model of "
                f"{target.dtype}: perhaps quantised; get the weights as they were trained"
            )
        check_weight(target.copy_(value), report.loaded[name], report.source)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the model's entries by name."""
    return {name: value.shape for name, value in model.state_dict().items()}


def metadata_in(content: Mapping) -> dict[str, str]:
    """Return the metadata of an exported file, {} of any other, which may call something else so."""
    metadata = content.get("metadata")
    return metadata if isinstance(metadata, dict) and "simla_format" in metadata else {}


def tokenizer_in(content: Mapping) -> str | None:
    """Return the text of the tokenizer that a file holds, None where it holds none or another's object."""
    text = content.get("tokenizer") or metadata_in(content).get("tokenizer")
    return text if isinstance(text, str) else None


def config_in(content: Mapping, source: str) -> dict:
    """Return the config that a file holds, {} where it holds none. Raises UserError where it is damaged."""
    stored = to_plain(content.get("config"))
    if text := metadata_in(content).get("config"):
        try:
            stored = json.loads(text)
        except ValueError as error:
            raise UserError(f"{source}: the config in its metadata is not JSON ({error})") from error
    return stored if isinstance(stored, dict) else {}


def untrained_by(config: Mapping) -> frozenset[str]:
    """Return the losses that a training with this config left out: their heads are as they were built."""
    weights = config.get("loss_weights")
    return (
        frozenset(loss for loss, w in weights.items() if not w) if isinstance(weights, dict) else frozenset()
    )


def _unseen(config: Mapping) -> dict[str, object]:
    """Return what no weight shows of the encoders of a config, by key; without bert_config's where its file
    is not on this machine. What the config leaves out, it means by default.
    """
    vit, sizes = config.get("vit"), config.get("bert_config")
    vit = vit if isinstance(vit, dict) else {}
    unseen = {f"vit.{name}": vit.get(name, VIT[name].default) for name in UNSEEN_OF_VIT}
    sizes = sizes if isinstance(sizes, str | dict) else BERT_CONFIG
    if isinstance(sizes, str) and not Path(sizes).exists():
        sizes = str(Path(__file__).resolve().parents[1] / sizes)  # as of our configs
    if isinstance(sizes, dict) or Path(sizes).exists():
        bert = BertConfig.read(sizes)
        unseen |= {f"bert_config.{name}": getattr(bert, name) for name in UNSEEN_OF_BERT}
    return unseen


def check_same_build(config: Mapping, stored: Mapping, source: str) -> None:
    """Raise UserError, naming the keys, where the config in a file says otherwise than `config` of what no
    weight shows.

    With another number of heads all shapes fit, and every score is another. A bert_config of the file's that
    is not on this machine is not compared, and that is logged.
    """
    if not stored:
        return
    ours, theirs = _unseen(config), _unseen(stored)
    if len(theirs) == len(UNSEEN_OF_VIT):
        file = stored.get("bert_config")
        log.warning(f"{source} was made with bert_config {file}, which is not here: heads are not compared")
    wrong = [f"{name} {ours[name]}, not {value}" for name, value in theirs.items() if ours[name] != value]
    if wrong:
        raise UserError(
            f"{source} was made with another model than the config given has: {'; '.join(wrong)}. Its "
            "weights would fit, and all scores be wrong: correct the config, or use the file's own"
        )


def load_weights(model: nn.Module, path: str | Path, task: str, config: Mapping | None = None) -> LoadReport:
    """Copy the weights of the file into the model, in place, and return the account. Raises UserError, the
    model then unchanged, or filled in part where a tensor turns out not to be finite.

    config: that of the model, if it is to agree with the file's; see `check_same_build`.
    """
    content, source = safe_load(path), str(path)
    state = weights_in(content, source)
    if config is not None:
        check_same_build(config, config_in(content, source), source)
    tensors, report = map_state(state, shapes_of(model), task, source, metadata_in(content))
    copy_into(model, tensors, report)
    return report
