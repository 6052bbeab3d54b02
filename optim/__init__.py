"""The optimiser: timm's factory over two groups of parameters, without and with weight decay."""

import difflib
from collections.abc import Iterable

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

from simla.utils import UserError, first_line

FUSED = ("adam", "adamw", "sgd")  # torch has them as one kernel, on GPUs and CPUs


def param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Return the group without decay (biases, vectors), then that with it (all else, 0-dim `temp` too).

    Both keep the order of `named_parameters`: a saved optimiser state knows its parameters by position only.
    An empty group stays, for the same reason.
    """
    no_decay, decay = [], []
    for name, param in named_parameters:
        if param.requires_grad:
            (no_decay if param.ndim == 1 or name.endswith(".bias") else decay).append(param)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def step_unless(bad: Tensor, optimizer: Optimizer) -> None:
    """Take a step, or none where bad, a float scalar on the parameters' device, is 1.

    A fused optimiser reads it there, so that the host need not wait for the device.
    """
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, bad
        optimizer.step()
    elif not bad.item():
        optimizer.step()


def create_optimizer(model: nn.Module, config: dict) -> Optimizer:
    """Return the optimiser of the config section {opt, lr, weight_decay, optional eps and betas}.

    Raises UserError for an optimiser that timm does not know, and for options it does not take.
    """
    groups = param_groups(model.named_parameters(), config["weight_decay"])
    name = config["opt"].lower()
    fused = {"fused": True} if name in FUSED else {}
    try:
        return create_optimizer_v2(
            groups,
            opt=name,
            lr=config["lr"],
            weight_decay=config["weight_decay"],
            eps=config.get("eps", 1e-8),
            betas=tuple(config.get("betas", (0.9, 0.999))),
            **fused,
        )
    except (ValueError, TypeError, IndexError, AssertionError, ImportError) as error:  # what it checks
        known = list_optimizers()
        if name.split("_")[-1] in known:
            settings = "settings (lr, weight_decay, eps, betas)"
            raise UserError(f"optimizer: {name} does not take these {settings}: {error}") from error
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"optimizer.opt: there is no optimiser {config['opt']!r}; {hint}timm knows {', '.join(known)}"
        ) from error


def check_settings(config: dict) -> None:
    """Raises UserError for what `create_optimizer` refuses and for settings with which a step fails, which
    a step of a tiny layer shows. What runs on GPUs alone is left to the run.
    """
    if config["opt"].lower().startswith(("bnb", "fused")):
        return
    layer = nn.Linear(1, 1)
    optimizer = create_optimizer(layer, config)
    layer(torch.ones(1, 1)).sum().backward()
    try:
        optimizer.step()
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"optimizer: {config['opt']} cannot take a step with these settings: {first_line(error)}"
        ) from error
