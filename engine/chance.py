"""Losses that stay at their chance levels, those of a model that knows nothing, are pointed out."""

from simla.utils import log

# Published warm-ups take 2,000 steps, and on hard negatives ITM leaves its chance level some hundred steps
# later than the others. In a short run (the demo has 935 steps) it does so before half of them are done; what
# is shorter than that shows nothing.
PATIENCE_STEPS, LEAST_STEPS = 5000, 200
TOLERANCE = 0.03  # of the chance level: means over log_steps of what learns nothing scatter by 1% or 2%
USUAL_CAUSES = (
    "Usual causes: a learning rate too high or too low (see lr in the log); captions, answers or labels that "
    "belong to other images; a tokenizer or vocabulary other than the text encoder's; frozen encoders, or "
    "weights that were not loaded (see what was said at the start); for loss_itm batches of near-equal "
    "images; for loss_mim another codebook"
)


class ChanceCheck:
    """Points out, once in a run, the losses that are still at their chance levels when they should not be."""

    def __init__(self, levels: dict[str, float]):
        """levels: by the name of the loss, in nats, of those that have one."""
        self.levels = levels
        if levels:
            listed = ", ".join(f"{name} {level:.3f}" for name, level in levels.items())
            log.info(f"a model that has learned nothing has: {listed}")

    def look(self, means: dict[str, float | None], begin: int, end: int, num_steps: int) -> None:
        """Look at the means of the losses over the steps `begin` to `end` of a run of `num_steps`, if its
        patience ends in them, so that a resumed run does not say it again.
        """
        if not begin < patience(num_steps) <= end:
            return
        known = {name: mean for name in self.levels if (mean := means.get(name)) is not None}
        stuck = [name for name, mean in known.items() if mean > (1 - TOLERANCE) * self.levels[name]]
        if stuck:
            listed = ", ".join(f"{name} {means[name]:.3f} (chance {self.levels[name]:.3f})" for name in stuck)
            log.warning(f"nothing learned after {end} steps: {listed}. {USUAL_CAUSES}")


def patience(num_steps: int) -> float:
    """Return the steps after which a run of `num_steps` should have learned something."""
    return max(LEAST_STEPS, min(PATIENCE_STEPS, num_steps / 2))
