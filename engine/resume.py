"""A checkpoint's state put back into a run: weights and moments, and the folder that it was saved in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from simla.checkpoint.key_maps import RESUME
from simla.checkpoint.load import check_same_build, copy_into, match_row, shapes_of, weights_in
from simla.checkpoint.safe_load import safe_load, to_plain
from simla.checkpoint.save import set_aside_later
from simla.engine.bad_images import BadImages
from simla.engine.metric_log import MetricLog
from simla.scheduler import WarmupCosine
from simla.utils import LOG, STEPS_LOG, UserError, atomic_write, check_weight, is_main

COUNTERS = ("step", "lookahead_step")  # of LAMB, Adan and Lookahead, which keep them among their settings


def _optimizer_state(optimizer: Optimizer, saved: dict, source: str) -> dict:
    """Return the optimiser's settings with the moments and steps of `saved`. Raise UserError when those
    belong to another model or are not finite.
    """
    groups = saved["param_groups"], optimizer.param_groups
    theirs, ours = ([len(group["params"]) for group in of_one] for of_one in groups)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [saved["state"].get(i, {}) for group in saved["param_groups"] for i in group["params"]]
    if theirs != ours or any(
        "exp_avg" in state and state["exp_avg"].shape != param.shape
        for state, param in zip(states, params, strict=True)
    ):
        raise UserError(
            f"{source}: its optimiser belongs to another model (groups without and with decay have {theirs} "
            f"parameters, here {ours}, or their shapes differ). Resume with the config of the run that wrote "
            "it, or load the weights alone: --checkpoint without --resume"
        )
    moments = {}
    for number, (state, param) in enumerate(zip(states, params, strict=True)):
        for key, value in state.items():
            if isinstance(value, Tensor):
                check_weight(value, f"optimizer.state.{number}.{key}", source)
                value = value.to("cpu" if key == "step" else param.device, copy=True)
            moments.setdefault(number, {})[key] = value
    settings = [
        group | {key: old[key] for key in COUNTERS if key in old}
        for group, old in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
    ]
    return {"state": moments, "param_groups": settings}


def resume(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: WarmupCosine,
    path: str | Path,
    scaler: GradScaler | None = None,
) -> dict:
    """Restore a run, our own or a published one at the end of an epoch; return what else the file holds.

    Rates and the optimiser's settings stay those of `optimizer` and `scheduler`, which are the config's.
    Raises UserError, before anything is changed, when the file belongs to another model or has weights only,
    and for a tensor that is not finite.
    """
    checkpoint, source = safe_load(path), str(path)
    if absent := [key for key in ("model", "optimizer", "epoch") if key not in checkpoint]:
        raise UserError(
            f"{path} cannot be resumed from, it has no {' and no '.join(absent)}; to start from its weights "
            "use --checkpoint without --resume"
        )
    tensors, report = match_row(weights_in(checkpoint, source), shapes_of(model), RESUME, source, "training")
    optimizer_state = _optimizer_state(optimizer, checkpoint["optimizer"], source)
    copy_into(model, tensors, report)
    optimizer.load_state_dict(optimizer_state)
    if scaler is not None and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    scheduler.resume_at(checkpoint["epoch"] + 1, checkpoint.get("step", 0))
    return {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}


def config_changes(checkpoint: dict, config: dict, seed: int, path: str) -> dict[str, tuple]:
    """Return name -> (old, new) of the values in which the config differs from the checkpoint's. Raise
    UserError where the run cannot go on: with another seed, kind of optimiser or number of heads.
    """
    if checkpoint.get("seed", seed) != seed:
        raise UserError(f"{path} is of a run with --seed {checkpoint['seed']}; resume it with that seed")
    stored = to_plain(checkpoint.get("config", {}))
    check_same_build(config, stored, path)
    changes = differences(stored, config)
    old, new = changes.get("optimizer.opt", ("", ""))
    if old.lower() != new.lower():
        raise UserError(
            f"{path} has the moments of the optimiser {old}, which are no use to {new} (optimizer.opt); "
            "resume with that one, or start from the weights alone: --checkpoint without --resume"
        )
    return changes


def differences(old: dict, new: dict, section: str = "") -> dict[str, tuple]:
    """Return name -> (old, new) of the values that both configs have and that differ."""
    changed = {}
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            changed |= differences(old[name], new[name], f"{section}{name}.")
        elif old[name] != new[name]:
            changed[section + name] = old[name], new[name]
    return dict(sorted(changed.items()))


def sums_of_ranks(ranks: list[dict]) -> dict[str, dict]:
    """Return what a rank takes over from another number of `ranks`: the main one their sums, for the log."""
    sums = {"whole": MetricLog(), "window": MetricLog(), "bad_images": BadImages()}
    for state in ranks if is_main() else []:
        for name, total in sums.items():
            total.merge(state[name])
    return {name: total.state_dict() for name, total in sums.items()}


def set_aside(folder: Path, run: str, at: tuple[int, int]) -> None:
    """Move what the run has written in the folder after `at` to abandoned/, which is another branch than what
    comes: its checkpoints and results, with a copy of its logs.
    """
    target = set_aside_later(folder, run, at)
    if target is None:
        return
    if (folder / "result").exists():
        (folder / "result").rename(target / "result")
    for name in (LOG, STEPS_LOG):
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)


def forget_later_lines(path: Path, comes_later: Callable[[dict], bool]) -> None:
    """Drop from a log of JSON lines what a resumed run writes again, and a line that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if not comes_later(json.loads(line)):
                kept.append(line)
        except ValueError:
            continue
    with atomic_write(path, text=True) as file:
        file.write("".join(f"{line}\n" for line in kept))
