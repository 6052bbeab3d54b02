"""The figures of a run for TensorBoard and, where the config asks for it, Weights & Biases.

Both are views of what train_steps.jsonl and log.txt hold; neither ever ends a run. Main rank only.
"""

import importlib.util
import time
from collections.abc import Callable

from simla.utils import UserError, first_line, is_main, log

FOLDER = "tensorboard"


class RunLog:
    """The targets that get the scalars of a run. One that fails is named once."""

    def __init__(self, output_dir: str, run: str, config: dict):
        self.output_dir, self.first_step = output_dir, 0
        self.tensorboard = None  # its writer, made when first there is something to write
        self.wandb = start_wandb(output_dir, run, config) if config["wandb"] and is_main() else None
        self.named: set[str] = set()
        self.begin(0)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self.tensorboard:
            self._attempt(FOLDER, self.tensorboard.close)
        if self.wandb:
            self._attempt("wandb", lambda: self.wandb.finish(exit_code=int(kind is not None)))

    def begin(self, num_samples: int) -> None:
        """Count samples a second from here; num_samples: those of the epoch done before."""
        self.samples, self.since = num_samples, time.monotonic()

    def steps(self, step: int, means: dict[str, float | None], num_samples: int) -> None:
        """Write the means since the last call, None left out; num_samples: those of the epoch so far."""
        num_new, seconds = num_samples - self.samples, time.monotonic() - self.since
        self.begin(num_samples)
        # None where the steps were another process's, which a signal stopped before it could log them.
        speed = {"samples_per_second": num_new / seconds} if num_new else {}
        known = {name: mean for name, mean in means.items() if mean is not None}
        self.write(step, "train", {**known, **speed})

    def epoch(self, step: int, stats: dict, scores: dict) -> None:
        """Write the numbers of bad images and scores; lists, such as confusion matrices, stay in log.txt."""
        bad = {name: value for name, value in stats.items() if name.startswith("bad_image")}
        for group, values in (("train", bad), ("evaluation", scores)):
            self.write(step, group, {k: v for k, v in values.items() if isinstance(v, int | float)})

    def write(self, step: int, group: str, scalars: dict[str, float]) -> None:
        if not is_main() or not scalars:
            return
        tagged = {f"{group}/{name}": value for name, value in scalars.items()}
        self._attempt(FOLDER, lambda: self._to_tensorboard(step, tagged))
        if self.wandb:  # of a step that a resumed run repeats it keeps what came first, which is the same
            self._attempt("wandb", lambda: self.wandb.log(tagged, step=step))

    def _to_tensorboard(self, step: int, tagged: dict[str, float]) -> None:
        """Writes to an event file of this process; what an earlier one wrote at `first_step` and later no
        longer counts.
        """
        try:
            if self.tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(f"{self.output_dir}/{FOLDER}", purge_step=self.first_step)
            for name, value in tagged.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()  # at once, as runs end abruptly
        except Exception:  # readers leave a file at a broken record: what follows goes into another one
            self.tensorboard, self.first_step = None, step + 1
            raise

    def _attempt(self, target: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # of any kind: the view is not worth the run
            if target not in self.named:
                self.named.add(target)
                log.error(f"{target}: scalars could not be written ({first_line(error)}); the run goes on")


def check_wandb(config: dict) -> None:
    """Raise UserError where the config asks for Weights & Biases and it is not installed."""
    spec = importlib.util.find_spec("wandb") if config["wandb"] else None
    if config["wandb"] and (spec is None or spec.origin is None):  # None: a mere folder of that name
        raise UserError("config `wandb` needs Weights & Biases: pip install wandb, or leave `wandb` out")


def start_wandb(output_dir: str, run: str, config: dict):
    """Return a run of Weights & Biases: all keys of config `wandb` go to wandb.init. Its id is the run's own,
    which checkpoints and run.json keep, so that a resumed run goes on in it.

    Raises UserError for keys that wandb does not take and where no run can be started.
    """
    import wandb  # pyright: ignore[reportMissingImports]  which is not in the requirements

    settings = {"id": run, "resume": "allow", "dir": output_dir, "config": config, **config["wandb"]}
    try:
        return wandb.init(**settings)
    except Exception as error:
        raise UserError(
            f"config wandb: no run could be started ({first_line(error)}); log in with `wandb login`, set "
            "WANDB_MODE=offline, or leave `wandb` out"
        ) from error
