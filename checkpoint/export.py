"""The weights of a checkpoint alone, as safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from simla.checkpoint.inspect import PROVENANCE
from simla.checkpoint.key_maps import QUEUES, TWIN
from simla.checkpoint.load import kind_of, metadata_in, row_of, tokenizer_in, weights_in
from simla.checkpoint.safe_load import safe_load, to_plain
from simla.utils import UserError, atomic_write, check_weight, code_revision

FORMAT = "1"


def export(source: str, target: str, task: str | None = None, inference: bool = False) -> list[str]:
    """Write the weights of `source` alone into the .safetensors file `target`; return the names left out.

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
    """Return tied weights as copies: the format knows no sharing, and readers expect every name."""
    seen, untied = set(), {}
    for name, value in state.items():
        untied[name] = value.clone() if value.data_ptr() in seen else value.contiguous()
        seen.add(value.data_ptr())
    return untied
