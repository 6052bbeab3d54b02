"""The epochs of every run: train, evaluate, log, save; what the losses mean it never learns."""

from collections.abc import Callable

from simla.engine.run_record import save_config
from simla.engine.signals import StopSignals
from simla.engine.training import Scores, Training
from simla.utils import append_log, barrier, is_main, log


def fit(training: Training, evaluate: Callable[[int], Scores] | None = None) -> tuple[str, Scores]:
    """Train, evaluate, log and save the epochs that are left; return the checkpoint to go on with and its
    scores: with `training.best` the best epoch's and its number, `epoch`, else the last one's.

    evaluate(epoch) -> scores for log.txt, called with the model in any mode. Raises Stopped, with everything
    saved, after a stop signal.
    """
    epochs, first_epoch, best = training.config["schedular"]["epochs"], training.epoch, training.best
    grace_seconds = training.config["stop_grace_seconds"]
    if is_main():
        save_config(training.config, training.run.output_dir)
    with StopSignals(grace_seconds) as signals, training.run_log, training.saver:
        if why := training.why_best_is_stale():
            with signals.stopping_at_once():
                training.score_best_anew(evaluate, why)
        for epoch in range(first_epoch, epochs):
            # Saved before a long evaluation, so that a kill during it costs no training.
            stats = training.train_one_epoch(signals, save_last=evaluate is not None)
            scores = {}
            if evaluate:
                with signals.stopping_at_once():
                    scores = evaluate(epoch)
            record = {f"train_{name}": value for name, value in stats.items()}
            append_log(training.run.output_dir, {**record, **scores, "epoch": epoch})
            training.run_log.epoch(training.total_steps, stats, scores)
            training.finish_epoch(scores)
    if first_epoch >= epochs:
        log.info(f"{training.run.checkpoint} is the end of the run already: schedular.epochs is {epochs}")
    kept, scores = training.kept, training.kept_scores
    if best and not scores:  # of a run at its end, published or without its best file
        scores = {**evaluate(first_epoch - 1), "epoch": first_epoch - 1}
    barrier()  # the others may read what the main rank has written
    log.info(f"done: {kept}" + (f", {best} {scores[best]:.2f}" if best else ""))
    return kept, scores
