"""What each loss is worth to a model that has learned nothing, and a word on losses that stay there."""

import math

from simla.models.bert_config import BertConfig
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


def chance_levels(config: dict) -> dict[str, float]:
    """Of every loss of the run that the resolved config is of, in nats; none for VQA, whose loss sums over
    answers of any length.

    ITA: an even guess among the rank's batch and the queue, whatever the targets; MLM, MIM: among the
    vocabulary; ITM: a head that knows only that two rows of three do not match; PSL: every word at one half;
    a loss over classes: an even guess among them.
    """
    if "eos" in config:  # VQA
        return {}
    if "mlm_probability" in config:
        return {
            **alignment_levels(config["batch_size"], config["queue_size"]),
            "loss_mlm": math.log(BertConfig.read(config["bert_config"]).vocab_size),
            "loss_mim": math.log(config["image_tokenizer"]["vocab_size"]),
            "loss_psl": math.log(2),
        }
    if "queue_size" in config and "test_file" in config:  # retrieval and grounding
        return alignment_levels(config["batch_size_train"], config["queue_size"])
    is_nlvr = "nlvr_teacher_unloaded" in config["released_code"]
    return {"loss": math.log(2 if is_nlvr else 3)}  # three: entailment, and which of two images or neither


def alignment_levels(batch_size: int, queue_size: int) -> dict[str, float]:
    return {
        "loss_ita": math.log(batch_size + queue_size),
        "loss_itm": -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3),
    }


class ChanceCheck:
    """Points out, once in a run, the losses that are still at their chance levels when they should not be."""

    def __init__(self, config: dict):
        self.levels = chance_levels(config)
        if self.levels:
            listed = ", ".join(f"{name} {level:.3f}" for name, level in self.levels.items())
            log.info(f"a model that has learned nothing has: {listed}")

    def look(self, means: dict[str, float | None], begin: int, end: int, num_steps: int) -> None:
        """means: of the losses over the steps `begin` to `end`; num_steps: of the whole run. Looks at the
        means whose steps the run's patience ends in, so that a resumed run does not say it again.
        """
        if not begin < patience(num_steps) <= end:
            return
        known = {name: mean for name in self.levels if (mean := means.get(name)) is not None}
        stuck = [name for name, mean in known.items() if mean > (1 - TOLERANCE) * self.levels[name]]
        if stuck:
            found = ", ".join(f"{name} {means[name]:.3f} (chance {self.levels[name]:.3f})" for name in stuck)
            log.warning(f"nothing learned after {end} steps: {found}. {USUAL_CAUSES}")


def patience(num_steps: int) -> float:
    """The steps after which a run of `num_steps` should have learned something."""
    return max(LEAST_STEPS, min(PATIENCE_STEPS, num_steps / 2))
