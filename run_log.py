"""The figures of a run for TensorBoard and, where the config asks for it, Weights & Biases.

Both are views of what train_steps.jsonl and log.txt hold; neither ever ends a run. Main rank only.
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from utils import UserError, first_line, is_main, log

FOLDER = "tensorboard"


class TensorBoard:
    """Writes scalars to an event file of its own, each call straight to the disk, as runs end abruptly.

    Events are put together here: the writer of torch takes seconds to import and ends with a thread.
    """

    def __init__(self, output_dir: str, first_step: int):
        """What an earlier process wrote at `first_step` and later no longer counts."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder = Path(output_dir) / FOLDER
        folder.mkdir(exist_ok=True)
        # Read in the order of their names: a number keeps that of the runs, whatever the hosts' clocks say.
        self.path = folder / f"events.out.tfevents.{len(list(folder.iterdir())):06d}"
        self.append(
            [
                Event(wall_time=time.time(), file_version="brain.Event:2"),
                Event(
                    wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)
                ),
            ]
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.append([Event(wall_time=time.time(), step=step, summary=Summary(value=values))])

    def append(self, events: list) -> None:
        """Whole records or nothing: readers give up a file at the first broken one."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                for event in events:
                    RecordWriter(file).write(event.SerializeToString())
        except OSError:
            with self.path.open("r+b") as file:
                file.truncate(size)
            raise


class RunLog:
    """Where the scalars of a run go. A target that fails is named once."""

    def __init__(self, output_dir: str, run: str, config: dict):
        self.output_dir, self.first_step = output_dir, 0
        self.tensorboard: TensorBoard | None = None
        self.wandb = start_wandb(output_dir, run, config) if config["wandb"] and is_main() else None
        self.named: set[str] = set()
        self.begin(0)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self.wandb:
            self._attempt("wandb", lambda: self.wandb.finish(exit_code=int(kind is not None)))

    def begin(self, num_samples: int) -> None:
        """Samples a second count from here; num_samples: those of the epoch done before."""
        self.samples, self.since = num_samples, time.monotonic()

    def steps(self, step: int, means: dict[str, float | None], num_samples: int) -> None:
        """The means since the last call, None left out; num_samples: those of the epoch in progress that are
        done.
        """
        num_new, seconds = num_samples - self.samples, time.monotonic() - self.since
        self.begin(num_samples)
        # None where the steps were another process's, which a signal stopped before it could log them.
        speed = {"samples_per_second": num_new / seconds} if num_new else {}
        known = {name: mean for name, mean in means.items() if mean is not None}
        self.write(step, "train", {**known, **speed})

    def epoch(self, step: int, stats: dict, scores: dict) -> None:
        """Bad images and scores: the numbers; lists, such as confusion matrices, are left to log.txt."""
        bad = {name: value for name, value in stats.items() if name.startswith("bad_image")}
        for group, found in (("train", bad), ("evaluation", scores)):
            self.write(step, group, {k: v for k, v in found.items() if isinstance(v, int | float)})

    def write(self, step: int, group: str, scalars: dict[str, float]) -> None:
        if not is_main() or not scalars:
            return
        tagged = {f"{group}/{name}": value for name, value in scalars.items()}
        self._attempt(FOLDER, lambda: self._to_tensorboard(step, tagged))
        if self.wandb:  # of a step that a resumed run repeats it keeps what came first, which is the same
            self._attempt("wandb", lambda: self.wandb.log(tagged, step=step))

    def _to_tensorboard(self, step: int, tagged: dict[str, float]) -> None:
        if self.tensorboard is None:
            self.tensorboard = TensorBoard(self.output_dir, self.first_step)
        self.tensorboard.write(step, tagged)

    def _attempt(self, target: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # of any kind: the view is not worth the run
            if target not in self.named:
                self.named.add(target)
                log.error(f"{target}: scalars could not be written ({first_line(error)}); the run goes on")


def check_wandb(config: dict) -> None:
    """UserError where the config asks for Weights & Biases and it is not installed."""
    found = importlib.util.find_spec("wandb") if config["wandb"] else None
    if config["wandb"] and (found is None or found.origin is None):  # None: a mere folder of that name
        raise UserError("config `wandb` needs Weights & Biases: pip install wandb, or leave `wandb` out")


def start_wandb(output_dir: str, run: str, config: dict):
    """The run of Weights & Biases: all keys of config `wandb` go to wandb.init. Its id is the run's own,
    which checkpoints and run.json keep, so that a resumed run goes on in it.

    Raises UserError for keys that wandb does not take and where no run can be started.
    """
    import wandb

    settings = {"id": run, "resume": "allow", "dir": output_dir, "config": config, **config["wandb"]}
    try:
        return wandb.init(**settings)
    except Exception as error:
        raise UserError(
            f"config wandb: no run could be started ({first_line(error)}); log in with `wandb login`, set "
            "WANDB_MODE=offline, or leave `wandb` out"
        ) from error
