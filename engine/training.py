"""A training run: the steps of its epochs, what makes them repeatable, and the state that is saved of it."""

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from simla.checkpoint.safe_load import safe_load
from simla.checkpoint.save import BEST, Saver, epoch_name, find_best, keep_under_own_name, step_name
from simla.checkpoint.tokenizer import tokenizer_text
from simla.dataset.loaders import data_account, data_difference, stop_at_unreadable
from simla.engine.bad_images import BadImages
from simla.engine.chance import ChanceCheck
from simla.engine.finite import FiniteCheck
from simla.engine.launch import Run
from simla.engine.metric_log import MetricLog, in_words
from simla.engine.peers import add_up, agree, leave_together
from simla.engine.random_state import random_state, set_random_state
from simla.engine.results import protocol_difference
from simla.engine.resume import config_changes, forget_later_lines, resume, set_aside, sums_of_ranks
from simla.engine.run_log import RunLog
from simla.engine.signals import Stopped, StopSignals
from simla.engine.step import Losses, Step, momentum_weight
from simla.models.momentum import MomentumModel
from simla.scheduler import WarmupCosine
from simla.utils import (
    LOG,
    STEPS_LOG,
    UserError,
    all_gather_objects,
    append_line,
    is_main,
    log,
    rank,
    with_progress,
    world_size,
)

Scores = dict[str, float | list]  # lists: confusion matrices


class Training:
    """A run between two steps: model, optimiser and schedule, and how far it is.

    epoch: the one in progress; step: its optimiser steps done; samples: those of its order that all ranks
    together have taken. They, the random state of every rank and the weights decide the next step.
    total_steps: those of all epochs, which number the lines of train_steps.jsonl.
    kept, kept_scores: the checkpoint to go on with, so far, and its scores: with `best`, the name of a score,
    of the epoch in which that was largest, and its number, `epoch`; else of the last one.
    """

    def __init__(
        self,
        model: MomentumModel,
        optimizer: Optimizer,
        schedule: WarmupCosine,
        loader: DataLoader,
        losses: Losses,
        config: dict,
        run: Run,
        best: str | None = None,
        protocol: dict | None = None,
        also_saved: dict | None = None,
    ):
        """best: the score that chooses checkpoint_best.pth; None: every epoch's checkpoint is kept. protocol:
        what decides the scores beside the weights, see `engine.results.protocol`. also_saved: what else
        every checkpoint holds.
        """
        self.model, self.optimizer, self.schedule, self.loader = model, optimizer, schedule, loader
        self.config, self.run, self.best, self.also_saved = config, run, best, also_saved or {}
        self.take_step = Step(model, optimizer, losses, config, run.device)
        self.data = all_gather_objects(data_account(loader))[0]
        self.epoch, self.step, self.samples, self.total_steps = 0, 0, 0, 0
        self.num_steps = 0  # of the epoch in progress, those done included
        self.kept: str = run.checkpoint
        self.kept_scores: Scores = {}
        self.protocol = all_gather_objects(protocol)[0]
        # Of checkpoint_best.pth, as it was written: by these scores it is told from another.
        self.best_as_saved = {"best": {}, "protocol": self.protocol}
        self.whole, self.window, self.bad_images = MetricLog(), MetricLog(), BadImages()
        self.resumed_rank: dict | None = None  # this rank's part of a state in mid-epoch, until that goes on
        self.unchecked: tuple[FiniteCheck, str, list[str]] | None = None  # the last step, where, its files
        self.num_not_finite = 0  # in a row
        self.last_save_seconds, self.saved_at = time.monotonic(), (0, 0)
        self.saver = Saver(run.output_dir, config["keep_last"], keep_epochs=best is None)
        self.run_log = RunLog(run.output_dir, run.id, config)
        self.chance_check = ChanceCheck(run.chance)
        trainable = sum(param.numel() for param in model.trained_parameters().values())
        log.info(f"{trainable:,} trainable parameters")

    # ---- train ----

    def train_one_epoch(self, signals: StopSignals, save_last: bool) -> dict[str, float | dict | None]:
        """Take the rest of the epoch's steps; return the means of every loss (None where no step was finite)
        and of the learning rate over all ranks, and the account of bad images.

        save_last: after the last step, for work that follows. Raises UserError for too many steps in a row
        that were not finite, and for an epoch in which more than `max_bad_fraction` of the images could not
        be read; Stopped after a stop signal.
        """
        for batches in self.begin_epoch():
            if self.step % self.config["log_steps"] == 0 and self.step:
                self.record_window()
            self.check_last_step()
            self.one_step(batches, momentum_weight(self.config, self.epoch, self.step, self.num_steps))
            self.count_step(signals)
        return self.end_epoch(signals, save_last)

    def begin_epoch(self) -> Iterator[list[dict]]:
        """Return the batches of each step to come of the epoch in progress, with a line of progress at times.

        Sets its order, its rate and its random state.
        """
        self.loader.sampler.set_epoch(self.epoch, self.samples)
        self.num_steps = self.step + self.loader.sampler.num_steps(self.samples)
        if self.epoch == self.step == 0 and self.num_steps <= (warm_up := self.schedule.warmup_steps):
            log.info(
                f"the warm-up of {warm_up} steps (schedular.warmup_epochs * warmup_step_size) is longer than "
                f"epoch 0, which has {self.num_steps}: optimizer.lr is not reached, the cosine begins with "
                "epoch 1"
            )
        self.schedule.start_epoch(self.epoch)
        self.model.train()
        # Each epoch draws from its own seed, so that one resumed at its start is as an unbroken one.
        seed = (self.run.seed * 1_000_003 + self.epoch) * world_size() + rank() + 7919 * self.samples
        torch.manual_seed(seed)
        # The loader draws from a generator of its own: workers that live on draw nothing at later epochs.
        self.loader.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        self.whole, self.window, self.bad_images = MetricLog(), MetricLog(), BadImages()
        if self.resumed_rank:
            for name in ("whole", "window", "bad_images"):
                getattr(self, name).load_state_dict(self.resumed_rank[name])
            if "random" in self.resumed_rank:
                set_random_state(self.resumed_rank["random"], self.run.device)
            self.resumed_rank = None
        self.run_log.begin(self.samples)
        batches = iter(stop_at_unreadable(self.loader))
        return with_progress(
            iter(lambda: list(itertools.islice(batches, self.config["grad_accumulation_steps"])), []),
            self.num_steps,
            f"Epoch {self.epoch}",
            self.config["log_steps"],
            lambda: in_words(self.window.means()),
            self.step,
        )

    def one_step(self, batches: list[dict], alpha: float) -> None:
        """Take a step and add up what it was made of; whether it was finite is left to `check_last_step`."""
        counts = Counter()
        for batch in batches:
            self.bad_images.add(batch.pop("bad", []), len(batch["image"]), batch.pop("passed_over", {}))
            counts.update(batch.pop("counts", {}))
        means, check = self.take_step(batches, alpha)
        files = [file for batch in batches for files in batch.get("files", []) for file in files]
        self.unchecked = check, f"epoch {self.epoch}, step {self.step}", files
        for metrics in (self.whole, self.window):
            metrics.add(means, check.bad == 0)
            metrics.add({"lr": self.optimizer.param_groups[-1]["lr"], **counts})

    def check_last_step(self) -> None:
        """Say whose loss was not finite and in which files, if the last step was not; raise UserError after
        `max_nonfinite_steps` in a row.
        """
        if self.unchecked is None:
            return
        (check, where, files), self.unchecked = self.unchecked, None
        bad, names = check.read()
        if not bad:
            self.num_not_finite = 0
            return
        if names:
            print(
                f"{', '.join(names)} not finite in {where} on rank {rank()}; the step is left out. Files: "
                f"{', '.join(files)}",
                flush=True,
            )
        self.num_not_finite += 1
        limit = self.config["max_nonfinite_steps"]
        if self.num_not_finite >= limit:
            raise UserError(
                f"{limit} step(s) in a row with a loss or gradient that is not finite (max_nonfinite_steps), "
                f"the last in {where}; saved checkpoints are unharmed. Lower the learning rate, or look for "
                "broken data among the files named above"
            )

    def count_step(self, signals: StopSignals) -> None:
        """Move the schedule on and save or stop where that is due, on all ranks at the same step."""
        bad_images, max_fraction = self.bad_images, self.config["max_bad_fraction"]
        flags = [self.save_is_due(), bool(signals.received)]
        save, stop, num_bad, num_seen = add_up([*flags, bad_images.num_bad, bad_images.num_seen])
        if bad_images.are_too_many(num_bad, num_seen, max_fraction):
            leave_together()
            bad_images.stop(num_bad, num_seen, max_fraction)
        self.schedule.after_step(self.epoch, self.step)
        self.step += 1
        self.total_steps += 1
        self.samples += self.loader.sampler.global_batch
        signals.is_answered = bool(stop)
        if stop:
            self.save()
            self.stop(signals)
        if save and self.step < self.num_steps:  # the end of an epoch saves anyway
            self.check_last_step()
            if self.num_not_finite == 0:
                self.save()

    def end_epoch(self, signals: StopSignals, save_last: bool) -> dict[str, float | dict | None]:
        """Log the last steps and move the schedule on; return what `train_one_epoch` does."""
        self.check_last_step()
        if save_last:
            self.save()
            if agree([bool(signals.received)])[0]:
                self.stop(signals)
        self.record_window()
        self.schedule.end_epoch(self.epoch)
        in_files = getattr(self.loader.dataset, "passed_over", dict)()  # in every epoch the same
        return {**self.whole.global_means(), **self.bad_images.report(in_files)}

    def record_window(self) -> None:
        """Write the means since the last call to train_steps.jsonl, for curves, and to TensorBoard; that of a
        loss is null where none of the steps was finite.
        """
        if is_main() and self.window.sums:
            means = self.window.means()
            record = {"step": self.total_steps, "epoch": self.epoch, **means}
            append_line(Path(self.run.output_dir, STEPS_LOG), json.dumps(record))
            self.run_log.steps(self.total_steps, means, self.samples)
            begin = self.total_steps - (self.step - 1) % self.config["log_steps"] - 1
            run_steps = self.num_steps * self.config["schedular"]["epochs"]
            self.chance_check.look(means, begin, self.total_steps, run_steps)
        self.window = MetricLog()

    def stop(self, signals: StopSignals) -> None:
        """Raise Stopped when everything is on the disk, UserError when it cannot be; all ranks come here."""
        signals.is_answered = True
        self.saver.close()
        leave_together()
        by = signals.received or "a signal to another rank"
        where = f"in epoch {self.epoch} after step {self.step}"
        raise Stopped(f"stopped by {by} {where}; --resume goes on from here", signals.received or "SIGTERM")

    # ---- save ----

    def state(self) -> dict:
        """Return everything that decides what follows, in the published layout; the same on all ranks.

        epoch: the last one finished, as published files count.
        """
        this_rank = {
            "random": random_state(self.run.device),
            "whole": self.whole.state_dict(),
            "window": self.window.state_dict(),
            "bad_images": self.bad_images.state_dict(),
        }
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "scaler": self.take_step.scaler.state_dict(),
            "config": self.config,
            "tokenizer": tokenizer_text(self.loader.collate_fn.tokenizer),  # what the texts were read with
            "data": self.data,
            "epoch": self.epoch - 1,
            "step": self.step,
            "samples": self.samples,
            "total_steps": self.total_steps,
            **self.best_as_saved,
            **self.also_saved,
            "seed": self.run.seed,
            "run": self.run.id,
            "ranks": all_gather_objects(this_rank),
        }

    def save_is_due(self) -> bool:
        steps, minutes = self.config["save_every_steps"], self.config["save_every_minutes"]
        by_steps = steps and (self.step + 1) % steps == 0
        return bool(by_steps or (minutes and time.monotonic() - self.last_save_seconds >= 60 * minutes))

    def save(self, name: str = "", is_best: bool = False, replaces: str = "") -> None:
        """Save the state, not twice at one step; all ranks come here, the main one writes, in a thread."""
        if self.saved_at == (self.epoch, self.step):
            return
        self.saved_at = self.epoch, self.step
        state = self.state()
        if is_main():
            self.saver.save(name or step_name(self.epoch, self.step), state, is_best, replaces)
        self.last_save_seconds = time.monotonic()

    def finish_epoch(self, scores: Scores) -> None:
        """Save the epoch in progress, as the best one if its scores are, and go on to the next."""
        is_best = self.best is not None and scores[self.best] > self.kept_scores.get(self.best, -math.inf)
        if is_best or self.best is None:
            self.kept = str(Path(self.run.output_dir, BEST if is_best else epoch_name(self.epoch)))
            self.kept_scores = {**scores, "epoch": self.epoch} if is_best else scores
            self.best_as_saved = {"best": self.kept_scores, "protocol": self.protocol}
        name, before_evaluation = epoch_name(self.epoch), step_name(self.epoch, self.step)
        self.epoch, self.step, self.samples = self.epoch + 1, 0, 0
        self.save(name, is_best, replaces=before_evaluation)

    # ---- resume ----

    def resume(self, path: str) -> None:
        """Take up the state in the file; rates and settings of the optimiser are the config's. What the run
        wrote after that state moves to abandoned/. The best epoch so far stays the one to keep.

        Raises UserError for a file of another model, without training state, or of a run with another seed or
        kind of optimiser.
        """
        rest = resume(self.model, self.optimizer, self.schedule, path, self.take_step.scaler)
        changes = config_changes(rest, self.config, self.run.seed, path)
        self.epoch, self.step, self.samples = rest["epoch"] + 1, rest.get("step", 0), rest.get("samples", 0)
        self.compare_data(rest.get("data"), path)
        steps_before = self.epoch * self.loader.sampler.num_steps(0) + self.step
        self.total_steps = rest.get("total_steps", steps_before)  # published files have none
        self.take_up_folder(rest, path)
        self.take_up_rank(rest.get("ranks"), path)
        log.info(f"resumed {path}: epoch {self.epoch}" + f", step {self.step}" * bool(self.step))
        for name, (old, new) in changes.items():
            log.info(f"config differs from the checkpoint's: {name} was {old!r}, is {new!r}")
        self.kept_scores = rest.get("best", {})
        self.best_as_saved = {"best": self.kept_scores, "protocol": rest.get("protocol")}
        if self.best and self.kept_scores:
            self.find_best(path)

    def compare_data(self, old: dict | None, path: str) -> None:
        """Say what of the training data differs from those that the checkpoint `path` was trained on, None:
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

    def take_up_folder(self, rest: dict, path: str) -> None:
        """Make the output folder that of a run which is where the file `path` is, whose rest is given."""
        folder, at = Path(self.run.output_dir), (self.epoch, self.step)
        is_here = Path(path).parent.resolve() == folder.resolve()
        if is_main():
            set_aside(folder, self.run.id, at if is_here else (-1, 0))
        if is_here:
            if is_main():
                keep_under_own_name(Path(path), *at)
            self.saver.take_up(rest)
            self.saved_at = at
        self.run_log.first_step = self.total_steps + (self.step == 0)  # an epoch's last line stays
        if is_main():
            forget_later_lines(folder / LOG, lambda line: line.get("epoch", -1) >= self.epoch)
            now = self.epoch, self.total_steps
            forget_later_lines(folder / STEPS_LOG, lambda line: (line["epoch"], line["step"]) >= now)

    def take_up_rank(self, ranks: list[dict] | None, path: str) -> None:
        """Take this rank's part of the state, or of other ranks' the sums for the log."""
        same_number = ranks is not None and len(ranks) == world_size()
        if self.step:
            self.resumed_rank = ranks[rank()] if same_number else sums_of_ranks(ranks)
        if ranks is None or same_number:
            return
        if self.step:
            log.info(
                f"{path} was saved by {len(ranks)} rank(s), here are {world_size()}: goes on at the same "
                "sample, weights and schedule, but not bit for bit: batches are composed anew, dropout "
                "and negatives drawn anew"
            )
        else:
            log.info(f"{path} was saved by {len(ranks)} rank(s): not bit for bit with {world_size()}")

    def find_best(self, path: str) -> None:
        """Keep the best epoch's checkpoint, or, where it is lost, say so and look for a better one anew."""
        folder, problem = Path(self.run.output_dir), ""
        if is_main():
            problem = find_best(Path(path), folder, self.run.id, self.kept_scores)
        if problem := all_gather_objects(problem)[0]:
            log.warning(f"{problem}; the best epoch is looked for among those to come")
            self.kept_scores, self.best_as_saved = {}, {"best": {}, "protocol": self.protocol}
            return
        self.kept = str(folder / BEST)

    def why_best_is_stale(self) -> str:
        """Return why the scores of the best epoch before a resume are none of now, "" where they are."""
        if not (self.best and self.kept_scores):
            return ""
        if self.best not in self.kept_scores:
            return f"it has no {self.best}"
        return protocol_difference(self.best_as_saved["protocol"], self.protocol)

    def score_best_anew(self, evaluate: Callable[[int], Scores], why: str) -> None:
        """Take the scores of the best epoch so far by the protocol of now; the weights stay as they are."""
        log.warning(
            f"the best epoch so far may have been scored otherwise: {why}; {self.kept} is scored anew"
        )
        best, weights = safe_load(self.kept), {k: v.clone() for k, v in self.model.state_dict().items()}
        epoch = best["epoch"]
        self.model.load_state_dict(best["model"])
        self.kept_scores = {**evaluate(epoch), "epoch": epoch}
        self.model.load_state_dict(weights)
