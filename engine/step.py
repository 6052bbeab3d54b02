"""One optimiser step: forward and backward of its batches, and the update where all of it is finite."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from simla.dataset.loaders import to_device
from simla.engine.data_parallel import compile_layers, distribute, set_checkpointing
from simla.engine.finite import FiniteCheck, gradient_norm
from simla.models.momentum import MomentumModel
from simla.optim import step_unless
from simla.utils import autocast, world_size

Losses = Callable[[nn.Module, dict, float], dict[str, Tensor]]  # (model, batch, alpha) -> named losses


class Step:
    """A model on its device and ranks, with its optimiser and loss scaler; each call is one step."""

    def __init__(
        self,
        model: MomentumModel,
        optimizer: Optimizer,
        losses: Losses,
        config: dict,
        device: torch.device,
    ):
        set_checkpointing(model, config["checkpoint_activations"])
        if config["compile"]:
            compile_layers(model)
        self.model, self.ddp_model = model, distribute(model, device)
        self.optimizer, self.losses, self.config, self.device = optimizer, losses, config, device
        self.scaler = GradScaler(device.type, enabled=config["precision"] == "fp16")

    def __call__(self, batches: list[dict], alpha: float) -> tuple[dict[str, Tensor], FiniteCheck]:
        """Return the mean of each loss over the batches, and whether they and the gradient are finite.

        The gradient is the mean over the batches. A step of which any loss or the gradient is not finite, on
        any rank, changes no weights. The host only launches work here and never waits for the device.
        """
        self.optimizer.zero_grad()
        means = {}
        for number, batch in enumerate(batches):
            self.model.holds_twins = number > 0
            is_last = number == len(batches) - 1
            with contextlib.nullcontext() if is_last or world_size() == 1 else self.ddp_model.no_sync():
                with autocast(self.device, self.config["precision"]):
                    named = self.losses(self.ddp_model, to_device(batch, self.device), alpha)
                self.scaler.scale(weighted_sum(named, self.config) / len(batches)).backward()
            for name, loss in named.items():
                means[name] = means.get(name, 0.0) + loss.detach() / len(batches)
        return means, self._update(means)

    def _update(self, means: dict[str, Tensor]) -> FiniteCheck:
        """Clip the gradient and move the weights, if all is finite."""
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model)
        if self.config["clip_grad_norm"]:
            clip_grads_with_norm_(self.model.parameters(), self.config["clip_grad_norm"], norm)
        if self.scaler.is_enabled():  # it sees to the gradients itself: with fp16 some overflow
            scale = self.scaler.scale(torch.ones_like(norm))  # below 1 it is not what makes them overflow
            check = FiniteCheck({**means, "gradient": torch.where(scale < 1, norm, 0.0)})
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            check = FiniteCheck({**means, "gradient": norm})
            step_unless(check.bad, self.optimizer)
        return check


def weighted_sum(named: dict[str, Tensor], config: dict) -> Tensor:
    """Return the sum of the losses by config `loss_weights`, in which loss_NAME is NAME; others weigh 1."""
    weights = config.get("loss_weights", {})
    return sum(weights.get(name.removeprefix("loss_"), 1) * loss for name, loss in named.items())


def target_weight(config: dict) -> float:
    """Return alpha, the weight of the momentum targets once it has grown; 0 without distillation."""
    return config["alpha"] if config.get("distill", True) else 0.0


def momentum_weight(config: dict, epoch: int, step: int, num_steps: int) -> float:
    """Return the weight of the momentum targets at a step of an epoch of `num_steps`: through epoch 0 it
    grows from 0 in equal rises, in fine-tuning only with config `warm_up`.
    """
    grows = epoch == 0 and config.get("warm_up", True)
    return target_weight(config) * (min(1.0, step / num_steps) if grows else 1.0)
