"""A checkpoint's state put back into model, optimiser, schedule and loss scaler."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from simla.checkpoint.key_maps import RESUME
from simla.checkpoint.load import copy_into, match_row, shapes_of, weights_in
from simla.checkpoint.safe_load import safe_load
from simla.scheduler import WarmupCosine
from simla.utils import UserError, check_weight


def _optimizer_state(optimizer: Optimizer, saved: dict, source: str) -> dict:
    """The optimiser's own settings, with the moments and steps of `saved`. Raises UserError when those belong
    to another model or are not finite.
    """
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    moments = [saved["state"].get(i, {}).get("exp_avg") for i in ids]
    if theirs != ours or any(
        moment is not None and moment.shape != param.shape
        for moment, param in zip(moments, params, strict=True)
    ):
        raise UserError(
            f"{source}: its optimiser belongs to another model (groups without and with decay have {theirs} "
            f"parameters, here {ours}, or their shapes differ). Resume with the config of the run that wrote "
            "it, or load the weights alone: --checkpoint without --resume"
        )
    state = {}
    for number, (i, param) in enumerate(zip(ids, params, strict=True)):
        if i in saved["state"]:
            for key, value in saved["state"][i].items():
                if isinstance(value, Tensor):
                    check_weight(value, f"optimizer.state.{i}.{key}", source)
            state[number] = {
                key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved["state"][i].items()
            }
            if "step" in state[number]:  # torch before 1.12 saved plain ints
                state[number]["step"] = torch.tensor(float(state[number]["step"]))
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def resume(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: WarmupCosine,
    path: str | Path,
    scaler: GradScaler | None = None,
) -> dict:
    """Restores a run, our own or a published one at the end of an epoch; returns what else the file holds.

    Rates and the optimiser's settings stay those of `optimizer` and `scheduler`, which are the config's.
    Raises UserError, before anything is changed, when the file belongs to another model or has weights only,
    and for a tensor that is not finite.
    """
    checkpoint = safe_load(path)
    source = str(path)
    absent = [key for key in ("model", "optimizer", "epoch") if key not in checkpoint]
    if absent:
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
