"""The epochs of every run: train, evaluate, log, keep the best; what the losses mean it never learns."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from simla.checkpoint.save import BEST, epoch_name, find_best
from simla.engine.run_record import save_config
from simla.engine.signals import StopSignals
from simla.engine.training import Losses, Scores, Training
from simla.models.momentum import MomentumModel
from simla.utils import (
    all_gather_objects,
    append_log,
    barrier,
    is_main,
    log,
)


def fit(
    model: MomentumModel,
    loader: DataLoader,
    losses: Losses,
    config: dict,
    args: argparse.Namespace,
    device: torch.device,
    epoch_step: str,
    evaluate: Callable[[int], Scores] | None = None,
    best: str | None = None,
    on_best: Callable[[], None] = lambda: None,
) -> tuple[str, Scores]:
    """The epochs of a run: train, evaluate, log, save; returns the checkpoint to go on with and its scores,
    with `best` also its `epoch`.

    epoch_step: when the schedule moves (see `scheduler`); evaluate(epoch) -> scores for log.txt, called with
    the model in any mode; best: the score whose largest value makes checkpoint_best.pth, on_best() is called
    then; None: every epoch's checkpoint is kept. With --resume the run that wrote --checkpoint goes on, in
    mid-epoch too; its best epoch stays the one to return until a better one comes. Raises Stopped, with
    everything saved, after a stop signal.
    """
    epochs = config["schedular"]["epochs"]
    if is_main():
        save_config(config, args.output_dir)
    training = Training(model, loader, losses, config, args, device, epoch_step, keep_epochs=best is None)
    kept, kept_scores = args.checkpoint, {}
    if args.resume:
        kept_scores = training.resume(args.checkpoint)
        if best and kept_scores:
            kept, problem = str(Path(args.output_dir, BEST)), ""
            if is_main():
                problem = find_best(Path(args.checkpoint), Path(args.output_dir), args.run, kept_scores)
            if problem := all_gather_objects(problem)[0]:
                log.warning(f"{problem}; the best epoch is looked for among those to come")
                kept, kept_scores = args.checkpoint, {}
    with StopSignals(config["stop_grace_seconds"]) as signals, training.run_log, training.saver:
        first_epoch = training.epoch
        for epoch in range(first_epoch, epochs):
            # Saved before a long evaluation, so that a kill during it costs no training.
            stats = training.train_one_epoch(signals, kept_scores, save_last=evaluate is not None)
            scores = {}
            if evaluate:
                with signals.stopping_at_once():
                    scores = evaluate(epoch)
            record = {f"train_{name}": value for name, value in stats.items()}
            append_log(args.output_dir, {**record, **scores, "epoch": epoch})
            training.run_log.epoch(training.total_steps, stats, scores)
            is_best = best is not None and scores[best] > kept_scores.get(best, -math.inf)
            if is_best or best is None:
                kept = str(Path(args.output_dir) / (BEST if is_best else epoch_name(epoch)))
                kept_scores = scores | ({"epoch": epoch} if is_best else {})
            if is_best:
                on_best()
            training.finish_epoch(kept_scores, is_best)
    if first_epoch >= epochs:
        log.info(f"{args.checkpoint} is the end of the run already: schedular.epochs is {epochs}")
    if best and not kept_scores:  # of a run at its end, published or without its best file
        epoch = first_epoch - 1
        kept_scores = {**evaluate(epoch), "epoch": epoch}
        on_best()
    barrier()  # the others may read what the main rank has written
    log.info(f"done: {kept}" + (f", {best} {kept_scores[best]:.2f}" if best else ""))
    return kept, kept_scores
