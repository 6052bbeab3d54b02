"""The training loop: it sums, steps, logs and counts; what the losses mean it never learns."""

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dataset import stop_at_unreadable
from scheduler import WarmupCosine
from utils import MetricLog, UserError, all_gather_objects, is_main, log, rank, with_progress, world_size

Losses = Callable[[nn.Module, dict, float], dict[str, Tensor]]  # (model, batch, alpha) -> named losses


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device, wrapped for data-parallel training where there are several ranks.

    Buffers are made equal once and not broadcast every step: the queues take the same gathered features
    everywhere.
    """
    model = model.to(device)
    if world_size() == 1:
        return model
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    known = inspect.signature(DistributedDataParallel).parameters
    no_sync = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # its older name
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, **{no_sync: False})


def momentum_weight(alpha: float, epoch: int, step: int, num_steps: int, ramp: bool) -> float:
    """Weight of the momentum targets; with `ramp` it grows linearly from 0 through epoch 0."""
    return alpha * min(1.0, step / num_steps) if ramp and epoch == 0 else alpha


def to_device(batch: dict, device: torch.device) -> dict:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    losses: Losses,
    optimizer: Optimizer,
    schedule: WarmupCosine,
    epoch: int,
    device: torch.device,
    output_dir: str,
    seed: int,
    alpha: float,
    ramp_alpha: bool,
    log_steps: int = 50,
    max_bad_fraction: float = 0.05,
) -> dict[str, float]:
    """One epoch; returns the means of every loss and the learning rate over all ranks, and counts of bad
    images.

    A step is: forward, zero the gradients, backward, update. Raises UserError for a loss that is not finite
    and for an epoch in which more than `max_bad_fraction` of the images could not be read.
    """
    model.train()
    torch.manual_seed(
        (seed * 1_000_003 + epoch) * world_size() + rank()
    )  # a resumed epoch draws as an unbroken run
    loader.sampler.set_epoch(epoch)
    schedule.start_epoch(epoch)
    whole, window, bad_images = MetricLog(), MetricLog(), BadImages()
    batches = with_progress(
        stop_at_unreadable(loader),
        len(loader),
        f"Epoch {epoch}",
        log_steps,
        lambda: window_text(window, epoch),
    )
    for step, batch in enumerate(batches):
        if step % log_steps == 0 and step:
            window = record_window(window, output_dir, epoch, step, len(loader))
        bad_images.add(batch.pop("bad", []), loader.batch_size, max_bad_fraction)
        batch = to_device(batch, device)
        named = losses(model, batch, momentum_weight(alpha, epoch, step, len(loader), ramp_alpha))
        optimizer.zero_grad()
        sum(named.values()).backward()
        optimizer.step()
        values = {**named, "lr": optimizer.param_groups[-1]["lr"]}
        whole.add(values)
        window.add(values)
        schedule.after_step(epoch, step)
    record_window(window, output_dir, epoch, len(loader), len(loader))
    schedule.end_epoch(epoch)
    num_bad = bad_images.report()
    return {**whole.global_means(), "bad_images": num_bad}


def window_text(window: MetricLog, epoch: int) -> str:
    means = window.means()
    not_finite = [name for name, value in means.items() if not math.isfinite(value)]
    if not_finite:
        raise UserError(
            f"{', '.join(not_finite)} is not finite in epoch {epoch}, within the last {window.count} steps "
            f"of rank {rank()}; lower the learning rate, or look for broken data"
        )
    return "  ".join(
        f"{name} {value:.2e}" if name == "lr" else f"{name} {value:.4f}" for name, value in means.items()
    )


def record_window(window: MetricLog, output_dir: str, epoch: int, step: int, num_steps: int) -> MetricLog:
    """Appends the means since the last call to train_steps.jsonl, for curves; returns a fresh window."""
    if is_main():
        record = {"step": epoch * num_steps + step, "epoch": epoch, **window.means()}
        with (Path(output_dir) / "train_steps.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    return MetricLog()


class BadImages:
    """Counts the images that were replaced, and names each file once."""

    CHECK_AFTER = 200  # images, before a share is worth a verdict

    def __init__(self):
        self.num_bad, self.num_seen, self.named = 0, 0, set()

    def add(self, bad: list[tuple[str, str]], num_images: int, max_fraction: float = 1.0) -> None:
        """bad: (file, cause) of every failed read while `num_images` images were made.

        Raises UserError when more than `max_fraction` of the reads on this rank failed.
        """
        self.num_bad += len(bad)
        self.num_seen += num_images + len(bad)
        for path, cause in bad:
            if path not in self.named:
                self.named.add(path)
                print(f"replaced an image that cannot be read: {path} ({cause})", flush=True)
        if self.num_seen >= self.CHECK_AFTER and self.num_bad > max_fraction * self.num_seen:
            raise UserError(
                f"{self.num_bad} of {self.num_seen} images could not be read, more than max_bad_fraction "
                f"{max_fraction}; the last one: {bad[-1][0] if bad else 'see above'}"
            )

    def report(self) -> int:
        """The number of replaced images over all ranks."""
        num_bad, num_seen = map(sum, zip(*all_gather_objects((self.num_bad, self.num_seen)), strict=True))
        if num_bad:
            log.info(f"{num_bad} of {num_seen} images could not be read and were replaced")
        return num_bad
