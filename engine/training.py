"""A training run: its steps, what they need to be repeatable, and the state that is saved of it."""

import argparse
import contextlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grads_with_norm_
from torch.utils.data import DataLoader

from simla.checkpoint.safe_load import to_plain
from simla.checkpoint.save import Saver, epoch_name, keep_under_own_name, set_aside_later, step_name
from simla.checkpoint.tokenizer import tokenizer_text
from simla.dataset.loaders import data_account, data_difference, stop_at_unreadable, to_device
from simla.engine.bad_images import BadImages
from simla.engine.chance import ChanceCheck
from simla.engine.data_parallel import compile_layers, distribute, set_checkpointing
from simla.engine.finite import FiniteCheck, gradient_norm
from simla.engine.metric_log import MetricLog
from simla.engine.peers import add_up, agree, leave_together
from simla.engine.random_state import random_state, set_random_state
from simla.engine.resume import resume
from simla.engine.run_log import RunLog
from simla.engine.run_record import STEPS_LOG
from simla.engine.signals import Stopped, StopSignals
from simla.models.momentum import MomentumModel
from simla.optim import create_optimizer, step_unless
from simla.scheduler import create_scheduler
from simla.utils import (
    LOG,
    UserError,
    all_gather_objects,
    append_line,
    atomic_write,
    autocast,
    is_main,
    log,
    rank,
    with_progress,
    world_size,
)

Losses = Callable[[nn.Module, dict, float], dict[str, Tensor]]  # (model, batch, alpha) -> named losses
Scores = dict[str, float | list]  # lists: confusion matrices


class Training:
    """A run between two steps: model, optimiser and schedule, and how far it is. `state` has all of it.

    epoch: the one in progress; step: its optimiser steps done; samples: those of its order that all ranks
    together have taken. They, the random state of every rank and the weights decide the next step.
    total_steps: those of all epochs, which number the lines of train_steps.jsonl.
    """

    def __init__(
        self,
        model: MomentumModel,
        loader: DataLoader,
        losses: Losses,
        config: dict,
        args: argparse.Namespace,
        device: torch.device,
        epoch_step: str,
        keep_epochs: bool,
    ):
        set_checkpointing(model, config["checkpoint_activations"])
        if config["compile"]:
            compile_layers(model)
        self.model, self.ddp_model = model, distribute(model, device)
        self.loader, self.losses, self.config, self.device = loader, losses, config, device
        self.output_dir, self.seed, self.run = args.output_dir, args.seed, args.run
        self.optimizer = create_optimizer(model, config["optimizer"])
        self.schedule = create_scheduler(self.optimizer, config["schedular"], epoch_step)
        self.scaler = GradScaler(device.type, enabled=config["precision"] == "fp16")
        self.accumulation = config["grad_accumulation_steps"]
        self.epoch, self.step, self.samples, self.total_steps = 0, 0, 0, 0
        self.own: dict | None = None  # this rank's part of a resumed state
        self.not_finite_in_a_row, self.unread = 0, None
        self.last_save, self.saved_at = time.monotonic(), (0, 0)
        self.saver = Saver(self.output_dir, config["keep_last"], keep_epochs)
        self.run_log, self.chance_check = RunLog(self.output_dir, self.run, config), ChanceCheck(config)
        trainable = sum(param.numel() for param in model.parameters() if param.requires_grad)
        log.info(f"{trainable:,} trainable parameters")

    # ---- save and resume ----

    @cached_property
    def data(self) -> dict:
        """The account of the training data; all ranks come here at first. A dry run has none."""
        return all_gather_objects(data_account(self.loader))[0]

    def state(self, best: Scores) -> dict:
        """Everything that decides what follows, in the published layout; the same on all ranks.

        epoch: the last one finished, as published files count.
        """
        own = {
            "random": random_state(self.device),
            "whole": self.whole.state_dict(),
            "window": self.window.state_dict(),
            "bad_images": self.bad_images.state_dict(),
        }
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": self.config,
            "tokenizer": tokenizer_text(self.loader.collate_fn.tokenizer),  # what the texts were read with
            "data": self.data,
            "epoch": self.epoch - 1,
            "step": self.step,
            "samples": self.samples,
            "total_steps": self.total_steps,
            "best": best,
            "seed": self.seed,
            "run": self.run,
            "ranks": all_gather_objects(own),
        }

    def save(self, best: Scores, name: str = "", is_best: bool = False, replaces: str = "") -> None:
        """All ranks come here; the main one writes, in the background. Not twice at one step."""
        if self.saved_at == (self.epoch, self.step):
            return
        self.saved_at = self.epoch, self.step
        state = self.state(best)
        if is_main():
            self.saver.save(name or step_name(self.epoch, self.step), state, is_best, replaces)
        self.last_save = time.monotonic()

    def finish_epoch(self, best: Scores, is_best: bool) -> None:
        name, before_evaluation = epoch_name(self.epoch), step_name(self.epoch, self.step)
        self.epoch, self.step, self.samples = self.epoch + 1, 0, 0
        self.save(best, name, is_best, replaces=before_evaluation)

    def resume(self, path: str) -> Scores:
        """Takes up the state in the file; returns the scores of the best epoch so far. Rates and settings of
        the optimiser are the config's. What the run wrote after that state moves to abandoned/.

        Raises UserError for a file of another model, without training state, or of a run with another seed or
        kind of optimiser.
        """
        rest = resume(self.model, self.optimizer, self.schedule, path, self.scaler)
        if rest.get("seed", self.seed) != self.seed:
            raise UserError(f"{path} is of a run with --seed {rest['seed']}; resume it with that seed")
        changes = differences(to_plain(rest.get("config", {})), self.config)
        old, new = changes.get("optimizer.opt", ("", ""))
        if old.lower() != new.lower():
            raise UserError(
                f"{path} has the moments of the optimiser {old}, which are no use to {new} (optimizer.opt); "
                "resume with that one, or start from the weights alone: --checkpoint without --resume"
            )
        self.epoch, self.step = rest["epoch"] + 1, rest.get("step", 0)
        self.samples = rest.get("samples", 0)
        self.compare_data(rest.get("data"), path)
        self.total_steps = rest.get(
            "total_steps", self.epoch * self.num_steps() + self.step
        )  # published: none
        is_here = Path(path).parent.resolve() == Path(self.output_dir).resolve()
        if is_main():
            self.set_aside((self.epoch, self.step) if is_here else (-1, 0))
        if is_here:
            if is_main():
                keep_under_own_name(Path(path), self.epoch, self.step)
            self.saver.take_up(rest)
            self.saved_at = self.epoch, self.step
        if self.step:
            ranks = rest["ranks"]
            if len(ranks) == world_size():
                self.own = ranks[rank()]
            else:
                self.own = accounts_of_other_ranks(ranks)
                log.info(
                    f"{path} was saved by {len(ranks)} rank(s), here are {world_size()}: goes on at the same "
                    "sample, weights and schedule, but not bit for bit: batches are composed anew, dropout "
                    "and negatives drawn anew"
                )
        elif "ranks" in rest and len(rest["ranks"]) != world_size():
            log.info(f"{path} was saved by {len(rest['ranks'])} rank(s): not bit for bit with {world_size()}")
        self.run_log.first_step = self.total_steps + (self.step == 0)  # an epoch's last line stays
        log.info(f"resumed {path}: epoch {self.epoch}" + f", step {self.step}" * bool(self.step))
        for name, (old, new) in changes.items():
            log.info(f"config differs from the checkpoint's: {name} was {old!r}, is {new!r}")
        if is_main():
            forget_later_lines(Path(self.output_dir, LOG), lambda line: line.get("epoch", -1) >= self.epoch)
            forget_later_lines(
                Path(self.output_dir, STEPS_LOG),
                lambda line: (line["epoch"], line["step"]) >= (self.epoch, self.total_steps),
            )
        return rest.get("best", {})

    def compare_data(self, old: dict | None, path: str) -> None:
        """Says what of the training data differs from those that the checkpoint `path` was trained on, None:
        unknown; where its epoch is not over, that then starts anew, as the samples it has had are unknown.
        """
        difference = data_difference(old, self.data) if old else ""
        if not difference:
            return
        if hasattr(self.model, "idx_queue"):  # other data number their images anew
            self.model.idx_queue.fill_(-100)
        follows, sampler = "the run goes on with those of now", self.loader.sampler
        if self.step and (old["samples"] - self.samples) // sampler.global_batch:
            follows, self.samples = f"epoch {self.epoch} starts anew, from its first sample", 0
        elif self.step:  # only its evaluation is to come
            self.samples = sampler.num_items
        log.warning(f"the training data differ from those of {path}: {difference}; {follows}")

    def set_aside(self, at: tuple[int, int]) -> None:
        """What the run has written here after `at` is another branch than what comes: its checkpoints and
        results move to abandoned/, with a copy of its logs.
        """
        folder = Path(self.output_dir)
        target = set_aside_later(folder, self.run, at)
        if target is None:
            return
        if (folder / "result").exists():
            (folder / "result").rename(target / "result")
        for name in (LOG, STEPS_LOG):
            if (folder / name).exists():
                shutil.copyfile(folder / name, target / name)

    def num_steps(self) -> int:
        """Of the epoch in progress, those done included."""
        self.loader.sampler.set_epoch(self.epoch, self.samples)
        return self.step + len(self.loader) // self.accumulation

    # ---- train ----

    def count_anew(self) -> None:
        self.whole, self.window, self.bad_images = MetricLog(), MetricLog(), BadImages()

    def train_one_epoch(
        self, signals: StopSignals, best: Scores, save_last: bool
    ) -> dict[str, float | dict | None]:
        """The rest of the epoch in progress; returns the means of every loss (None where no step was finite)
        and of the learning rate over all ranks, and the account of bad images. `save_last`: saves after the
        last step, for work that follows.

        The weight of the momentum targets ramps in epoch 0 of pre-training, and elsewhere where config
        `warm_up` says so. Raises UserError for too many steps in a row that were not finite, and for an epoch
        in which more than `max_bad_fraction` of the images could not be read; Stopped after a stop signal.
        """
        config, log_steps = self.config, self.config["log_steps"]
        alpha = target_weight(config)
        self.model.train()
        num_steps = self.num_steps()
        self.run_steps = num_steps * config["schedular"]["epochs"]
        if self.epoch == self.step == 0 and num_steps <= (warm_up := self.schedule.warmup_steps):
            log.info(
                f"the warm-up of {warm_up} steps (schedular.warmup_epochs * warmup_step_size) is longer than "
                f"epoch 0, which has {num_steps}: optimizer.lr is not reached, the cosine begins with epoch 1"
            )
        self.schedule.start_epoch(self.epoch)
        self.count_anew()
        # Each epoch draws from its own seed, so that one resumed at its start is as an unbroken one.
        torch.manual_seed((self.seed * 1_000_003 + self.epoch) * world_size() + rank() + 7919 * self.samples)
        # The loader draws from a generator of its own: workers that live on draw nothing at later epochs.
        self.loader.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        batches = iter(stop_at_unreadable(self.loader))
        groups = iter(lambda: list(itertools.islice(batches, self.accumulation)), [])
        if self.own:
            self.whole.load_state_dict(self.own["whole"])
            self.window.load_state_dict(self.own["window"])
            self.bad_images.load_state_dict(self.own["bad_images"])
        groups = with_progress(
            groups, num_steps, f"Epoch {self.epoch}", log_steps, lambda: window_text(self.window), self.step
        )
        if self.own:
            if "random" in self.own:
                set_random_state(self.own["random"], self.device)
            self.own = None
        self.run_log.begin(self.samples)
        for group in groups:
            if self.step % log_steps == 0 and self.step:
                self.record_window()
            self.read_check()
            ramp = momentum_weight(alpha, self.epoch, self.step, num_steps, config.get("warm_up", True))
            self.one_step(group, ramp)
            # One exchange, so that all ranks do the same at the same step.
            flags, bad_images = [self.save_is_due(), bool(signals.received)], self.bad_images
            save, stop, num_bad, num_seen = add_up([*flags, bad_images.num_bad, bad_images.num_seen])
            if bad_images.are_too_many(num_bad, num_seen, config["max_bad_fraction"]):
                leave_together()
                bad_images.stop(num_bad, num_seen, config["max_bad_fraction"])
            self.schedule.after_step(self.epoch, self.step)
            self.step += 1
            self.total_steps += 1
            self.samples += self.loader.sampler.global_batch
            save = save and self.step < num_steps  # the end of an epoch saves anyway
            signals.is_answered = bool(stop)
            if (save and self.read_check()) or stop:
                self.save(best)
            if stop:
                self.stop(signals)
        self.read_check()
        self.own = None
        if save_last:
            self.save(best)
            if agree([bool(signals.received)])[0]:
                self.stop(signals)
        self.record_window()
        self.schedule.end_epoch(self.epoch)
        in_files = getattr(self.loader.dataset, "passed_over", dict)()  # in every epoch the same
        return {**self.whole.global_means(), **self.bad_images.report(in_files)}

    def stop(self, signals: StopSignals) -> None:
        """All ranks come here. Raises Stopped when everything is on the disk, UserError when it cannot be."""
        signals.is_answered = True
        self.saver.close()
        leave_together()
        by = signals.received or "a signal to another rank"
        where = f"in epoch {self.epoch} after step {self.step}"
        raise Stopped(f"stopped by {by} {where}; --resume goes on from here", signals.received or "SIGTERM")

    def one_step(self, batches: list[dict], alpha: float) -> None:
        """Zero the gradients, forward and backward of every batch, update.

        Gradients are the mean over the batches. A step of which any loss or the gradient is not finite, on
        any rank, changes no weights. The host only launches work here and never waits for the device.
        """
        self.optimizer.zero_grad()
        means, counts = {}, Counter()
        for number, batch in enumerate(batches):
            self.model.holds_twins = number > 0
            is_last = number == len(batches) - 1
            self.bad_images.add(batch.pop("bad", []), len(batch["image"]), batch.pop("passed_over", {}))
            counts.update(batch.pop("counts", {}))
            with contextlib.nullcontext() if is_last or world_size() == 1 else self.ddp_model.no_sync():
                with autocast(self.device, self.config["precision"]):
                    named = self.losses(self.ddp_model, to_device(batch, self.device), alpha)
                total = sum(named.values()) / len(batches)
                self.scaler.scale(total).backward()
            for name, loss in named.items():
                means[name] = means.get(name, 0.0) + loss.detach() / len(batches)
        check = self.update(means)
        files = [file for batch in batches for files in batch.get("files", []) for file in files]
        self.unread = check, f"epoch {self.epoch}, step {self.step}", files
        for metrics in (self.whole, self.window):
            metrics.add(means, check.bad == 0)
            metrics.add({"lr": self.optimizer.param_groups[-1]["lr"], **counts})

    def update(self, means: dict[str, Tensor]) -> FiniteCheck:
        """Clips the gradient and moves the weights, if all is finite; means: the losses of the step."""
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model)
        if self.config["clip_grad_norm"]:
            clip_grads_with_norm_(self.model.parameters(), self.config["clip_grad_norm"], norm)
        if self.scaler.is_enabled():  # it sees to the gradients itself: with fp16 some overflow
            check = FiniteCheck(means)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            check = FiniteCheck({**means, "gradient": norm})
            step_unless(check.bad, self.optimizer)
        return check

    def read_check(self) -> bool:
        """Whether the last step was finite. Where not, says whose loss was not and in which files; raises
        UserError after `max_nonfinite_steps` in a row.
        """
        if self.unread is None:
            return self.not_finite_in_a_row == 0
        (check, where, files), self.unread = self.unread, None
        bad, names = check.read()
        if not bad:
            self.not_finite_in_a_row = 0
            return True
        if names:
            print(
                f"{', '.join(names)} not finite in {where} on rank {rank()}; the step is left out. Files: "
                f"{', '.join(files)}",
                flush=True,
            )
        self.not_finite_in_a_row += 1
        limit = self.config["max_nonfinite_steps"]
        if self.not_finite_in_a_row >= limit:
            raise UserError(
                f"{limit} step(s) in a row with a loss or gradient that is not finite (max_nonfinite_steps), "
                f"the last in {where}; saved checkpoints are unharmed. Lower the learning rate, or look for "
                "broken data among the files named above"
            )
        return False

    def save_is_due(self) -> bool:
        steps, minutes = self.config["save_every_steps"], self.config["save_every_minutes"]
        by_steps = steps and (self.step + 1) % steps == 0
        return bool(by_steps or (minutes and time.monotonic() - self.last_save >= 60 * minutes))

    def record_window(self) -> None:
        """The means since the last call go to train_steps.jsonl, for curves, and to TensorBoard; that of a
        loss is null where none of the steps was finite.
        """
        if is_main() and self.window.sums:
            place = {"step": self.total_steps, "epoch": self.epoch}
            means = self.window.means()
            append_line(Path(self.output_dir) / STEPS_LOG, json.dumps({**place, **means}))
            self.run_log.steps(self.total_steps, means, self.samples)
            begin = self.total_steps - (self.step - 1) % self.config["log_steps"] - 1
            self.chance_check.look(means, begin, self.total_steps, self.run_steps)
        self.window = MetricLog()


def accounts_of_other_ranks(ranks: list[dict]) -> dict:
    """What a run with another number of ranks takes over: its main one the sums of all, for the log."""
    whole, window, bad_images = MetricLog(), MetricLog(), BadImages()
    for own in ranks if is_main() else []:
        whole.merge(own["whole"])
        window.merge(own["window"])
        bad_images.merge(own["bad_images"])
    return {
        "whole": whole.state_dict(),
        "window": window.state_dict(),
        "bad_images": bad_images.state_dict(),
    }


def target_weight(config: dict) -> float:
    """Weight of the momentum targets once it has grown, alpha; 0 without distillation."""
    return config["alpha"] if config.get("distill", True) else 0.0


def momentum_weight(alpha: float, epoch: int, step: int, num_steps: int, ramp: bool) -> float:
    """Weight of the momentum targets; with `ramp` it grows linearly from 0 through epoch 0."""
    return alpha * min(1.0, step / num_steps) if ramp and epoch == 0 else alpha


def differences(old: dict, new: dict, section: str = "") -> dict[str, tuple]:
    """name -> (old, new) of the values that both configs have and that differ."""
    found = {}
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            found |= differences(old[name], new[name], f"{section}{name}.")
        elif old[name] != new[name]:
            found[section + name] = old[name], new[name]
    return dict(sorted(found.items()))


def forget_later_lines(path: Path, comes_later: Callable[[dict], bool]) -> None:
    """Drops from a log of JSON lines what a resumed run writes again, and a line that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if not comes_later(json.loads(line)):
                kept.append(line)
        except ValueError:
            continue
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in kept).encode())


def window_text(window: MetricLog) -> str:
    def number(name: str, value: float | int | None) -> str:
        if value is None or isinstance(value, int):
            return "-" if value is None else str(value)
        return f"{value:.2e}" if name == "lr" else f"{value:.4f}"

    return "  ".join(f"{name} {number(name, value)}" for name, value in window.means().items())
