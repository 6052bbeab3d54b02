"""The learning rate: timm's cosine over epochs after a warm-up inside epoch 0, and when to step it."""

from timm.scheduler import CosineLRScheduler
from torch.optim import Optimizer

from simla.utils import UserError


class WarmupCosine:
    """Holds the calling rule, so that a training loop only says where it is.

    Warm-up: in epoch 0, after the optimiser step of every `warmup_step_size`-th iteration (100 as
    published), one of `warmup_epochs` equal rises from `warmup_lr` to the optimiser's rate. Then a cosine
    over `epochs`, which would reach `min_lr` at epoch number `epochs`, one after the last. `epoch_step`
    "start" moves it before each epoch but the first, "end" after each epoch: the rate in force during any
    epoch is the same; they differ in the rate after the last one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        epochs: int,
        min_lr: float,
        warmup_lr: float,
        warmup_epochs: int,
        warmup_step_size: int = 100,
        epoch_step: str = "start",
    ) -> None:
        if epoch_step not in ("start", "end"):
            raise ValueError(f"epoch_step is 'start' or 'end', not {epoch_step!r}")
        self.cosine = CosineLRScheduler(
            optimizer,
            t_initial=epochs,
            lr_min=min_lr,
            warmup_t=warmup_epochs,
            warmup_lr_init=warmup_lr,
            warmup_prefix=True,
        )
        self.warmup_step_size = warmup_step_size
        self.epoch_step = epoch_step

    @property
    def warmup_steps(self) -> int:
        """Return how many steps of epoch 0 come before the optimiser's rate is reached."""
        return self.cosine.warmup_t * self.warmup_step_size

    def start_epoch(self, epoch: int) -> None:
        """Call before the first iteration of every epoch."""
        if self.epoch_step == "start" and epoch > 0:
            self.resume_at(epoch)

    def after_step(self, epoch: int, iteration: int) -> None:
        """Call after every optimiser step; both counts start at 0."""
        step, rest = divmod(iteration, self.warmup_step_size)
        if epoch == 0 and rest == 0 and step <= self.cosine.warmup_t:
            self.cosine.step(step)

    def end_epoch(self, epoch: int) -> None:
        """Call after the last iteration of every epoch."""
        if self.epoch_step == "end":
            self.resume_at(epoch + 1)

    def resume_at(self, epoch: int, steps_done: int = 0) -> None:
        """Set the rate of the next step of an epoch of which so many optimiser steps are done, as in an
        unbroken run of this schedule.
        """
        rises = max(steps_done - 1, 0) // self.warmup_step_size
        self.cosine.step(epoch + self.cosine.warmup_t if epoch else min(rises, self.cosine.warmup_t))

    def state_dict(self) -> dict:
        """Return timm's, as published checkpoints have it under `lr_scheduler`; no resume needs it."""
        return self.cosine.state_dict()


def create_scheduler(optimizer: Optimizer, config: dict, epoch_step: str) -> WarmupCosine:
    """Return the schedule of the config section {sched: cosine, epochs, min_lr, warmup_lr, ...}.

    The peak rate is the optimiser's. `decay_rate` and `cooldown_epochs`, which published configs carry, do
    nothing to a single cosine. Raises UserError for another `sched`.
    """
    if config.get("sched", "cosine") != "cosine":
        raise UserError(f"schedular.sched: only cosine is implemented, not {config['sched']!r}")
    keys = ("epochs", "min_lr", "warmup_lr", "warmup_epochs", "warmup_step_size")
    given = {key: config[key] for key in keys if key in config}
    return WarmupCosine(optimizer, epoch_step=epoch_step, **given)
