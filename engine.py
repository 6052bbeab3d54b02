"""The training loop: it sums, steps, logs, counts and saves; what the losses mean it never learns."""

import argparse
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

from checkpoint import resume, save_checkpoint
from config import save_config
from dataset import stop_at_unreadable
from metrics import confusion_counts
from models.momentum import MomentumModel
from optim import create_optimizer
from scheduler import WarmupCosine, create_scheduler
from utils import (
    MetricLog,
    UserError,
    all_gather_objects,
    append_log,
    barrier,
    is_main,
    log,
    rank,
    with_progress,
    world_size,
)

Losses = Callable[[nn.Module, dict, float], dict[str, Tensor]]  # (model, batch, alpha) -> named losses
Scores = dict[str, float | list]  # lists: confusion matrices


def fit(
    model: MomentumModel,
    loader: DataLoader,
    losses: Losses,
    config: dict,
    args: argparse.Namespace,
    device: torch.device,
    epoch_step: str,
    evaluate: Callable[[int], Scores] = lambda epoch: {},
    best: str | None = None,
) -> tuple[str, Scores]:
    """The epochs of a run: train, evaluate, log, save; returns the checkpoint to go on with and its scores.

    epoch_step: when the schedule moves (see `scheduler`); evaluate(epoch) -> scores for log.txt, called with
    the model in any mode; best: the score whose largest value makes checkpoint_best.pth, beside
    checkpoint_last.pth; None: every epoch is kept as checkpoint_NN.pth. With --resume the run that wrote
    --checkpoint goes on; its best epoch stays the one to return until a better one comes.
    """
    out, epochs = Path(args.output_dir), config["schedular"]["epochs"]
    if is_main():
        save_config(config, args.output_dir)
    ddp_model = distribute(model, device)
    log.info(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable parameters")
    optimizer = create_optimizer(model, config["optimizer"])
    schedule = create_scheduler(optimizer, config["schedular"], epoch_step)
    first_epoch, kept, kept_scores = 0, args.checkpoint, {}
    if args.resume:
        first_epoch, kept_scores = resume(model, optimizer, schedule, args.checkpoint)
        if best and kept_scores:
            kept = str(Path(args.checkpoint).with_name("checkpoint_best.pth"))
    for epoch in range(first_epoch, epochs):
        stats = train_one_epoch(
            ddp_model, loader, losses, optimizer, schedule, epoch, device, config, args.output_dir, args.seed
        )
        scores = evaluate(epoch)
        record = {f"train_{name}": value for name, value in stats.items()}
        append_log(args.output_dir, {**record, **scores, "epoch": epoch})
        names = [f"checkpoint_{epoch:02d}.pth"] if best is None else ["checkpoint_last.pth"]
        if best and scores[best] > kept_scores.get(best, -math.inf):
            # Before the last one: whoever finds it in a resumed run relies on the best one's being there.
            names.insert(0, "checkpoint_best.pth")
        if best is None or len(names) > 1:
            kept, kept_scores = str(out / names[0]), scores
        if is_main():
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": schedule.state_dict(),
                "config": config,
                "epoch": epoch,
                "best": kept_scores,
            }
            for name in names:
                save_checkpoint(out / name, state)
        barrier()
    if first_epoch >= epochs:
        log.info(f"{args.checkpoint} is the end of the run already: schedular.epochs is {epochs}")
    if best and not kept_scores:  # a published checkpoint, at its end
        kept_scores = evaluate(epochs - 1)
    log.info(f"done: {kept}" + (f", {best} {kept_scores[best]:.2f}" if best else ""))
    return kept, kept_scores


def record_evaluation(scores: Scores, config: dict, output_dir: str) -> None:
    """What an evaluation without training leaves beside its results: config.yaml and a line in log.txt."""
    if is_main():
        save_config(config, output_dir)
    if scores:  # none where the test set has no answers
        append_log(output_dir, scores)


@torch.no_grad()
def evaluate_classes(
    model: nn.Module, loader: DataLoader, num_classes: int, config: dict, device: torch.device, header: str
) -> Tensor:
    """Counts of (true class, predicted class) over all ranks, (C, C) on the CPU; VE and NLVR share it."""
    model.eval()
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for batch in with_progress(stop_at_unreadable(loader), len(loader), header, config["log_steps"]):
        batch = to_device(batch, device)
        predicted = model.predict(batch["image"], batch["text_ids"], batch["text_mask"]).argmax(-1)
        counts += confusion_counts(batch["label"].cpu(), predicted.cpu(), num_classes)
    return sum(all_gather_objects(counts))


def distribute(model: MomentumModel, device: torch.device) -> nn.Module:
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
    # Parameters that no loss reaches would keep the wrapper waiting for their gradient.
    ignored = [name for name, _ in model.named_parameters() if name.startswith(model.without_gradient)]
    ignored += [f".{name}" for name in ignored]  # what the wrapper calls those of the outermost module
    model._ddp_params_and_buffers_to_ignore = ignored
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
    config: dict,
    output_dir: str,
    seed: int,
) -> dict[str, float]:
    """One epoch; returns the means of every loss and the learning rate over all ranks, and counts of bad
    images.

    A step is: forward, zero the gradients, backward, update. The weight of the momentum targets ramps in
    epoch 0 of pre-training, and elsewhere where config `warm_up` says so. Raises UserError for a loss that is
    not finite and for an epoch in which more than `max_bad_fraction` of the images could not be read.
    """
    alpha = config["alpha"] if config.get("distill", True) else 0.0
    ramp_alpha, log_steps = config.get("warm_up", True), config["log_steps"]
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
        bad_images.add(batch.pop("bad", []), loader.batch_size, config["max_bad_fraction"])
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
