"""Curves of training runs: losses beside their chance levels, learning rate, scores after every epoch.

python -m simla.engine.curves output/A output/B -o curves.png    overlays runs of one task
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simla.engine.command import run_command
from simla.utils import LOG, STEPS_LOG, UserError, import_pyplot, log, save_figure

COLOURS = ("#0b5fa5", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#444444")
LINE_STYLES = {"val": "-", "test": "--", "testA": "--", "testB": ":"}  # of the split that a score is of
GREY = "#8a8a8a"
MAX_COLUMNS = 6


class Run(NamedTuple):
    steps: list[dict]  # records of train_steps.jsonl
    epochs: list[dict]  # of log.txt, oldest first
    levels: dict[str, float]  # loss -> chance level


def read_records(path: Path, order: str) -> list[dict]:
    """Return the JSON objects of a log, values as numbers where they are ("0.1" in published logs), null as
    None; [] without such a file. A record at an `order` reached before replaces what came after: so does an
    output folder used again.

    Raises UserError for a line that is not a JSON object; the last one may be cut short, as by a kill.
    """
    records, lines = [], path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = {name: _number(value) for name, value in json.loads(line).items()}
        except (ValueError, AttributeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: expected a JSON object, found {line[:60]!r}") from error
        if order in record:  # an evaluation without training has no epoch
            while records and records[-1][order] >= record[order]:
                records.pop()
            records.append(record)
    return records


def _number(value: object) -> object:
    try:
        return float(value)
    except (TypeError, ValueError):  # lists: confusion matrices
        return value


def read_run(folder: str | Path) -> Run:
    """Return what a run left in its output folder. Raises UserError without a log or with a broken one."""
    folder = Path(folder)
    steps, epochs = read_records(folder / STEPS_LOG, "step"), read_records(folder / LOG, "epoch")
    if not steps and not epochs:
        raise UserError(f"{folder} holds no steps yet: expected {STEPS_LOG} or {LOG} of a training run there")
    return Run(steps, epochs, read_levels(folder / "run.json"))


def read_levels(record: Path) -> dict[str, float]:
    """Return the chance levels that a run.json names, none where it cannot be read."""
    try:
        return json.loads(record.read_bytes())["chance"]
    except (OSError, ValueError, KeyError, TypeError):
        log.info(f"{record} names no chance levels")
        return {}


def panels(runs: list[Run]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of the losses and of whatever else was logged in training, in order; and scores, title
    -> names: those that differ by their split alone share a panel.
    """
    logged, scores = {}, {}
    for run in runs:
        for record in run.steps[:1]:
            logged |= dict.fromkeys(name for name in record if name not in ("step", "epoch"))
        for record in run.epochs:
            for name, value in record.items():
                if not isinstance(value, float | None) or name == "epoch":
                    continue
                if not name.startswith("train_"):
                    scores.setdefault(split_and_metric(name)[1], {})[name] = None
                elif not name.startswith("train_bad_") or value:  # a panel for bad images where there are any
                    logged[name.removeprefix("train_")] = None
    return list(logged), {title: list(names) for title, names in scores.items()}


def split_and_metric(score: str) -> tuple[str, str]:
    """Return ("val", "acc") for val_acc, ("val", "refcocog_d") for refcocog_val_d, ("", "x") for x."""
    words = score.split("_")
    split = next((word for word in words if word in LINE_STYLES), "")
    return split, "_".join(word for word in words if word != split)


def plot_curves(folders: list[str | Path], out: str | Path) -> None:
    """Draw a panel for each loss, the learning rate and each kind of score; the runs of the output folders in
    colours of their own, chance levels dashed (grey where all runs share them).

    The x axis has steps, or epochs where a run left only log.txt; scores are over epochs. Raises UserError
    for a folder without a log or with a broken one.
    """
    runs = [read_run(folder) for folder in folders]
    plt = import_pyplot()
    logged, scores = panels(runs)
    num_panels = len(logged) + len(scores)
    rows = math.ceil(num_panels / MAX_COLUMNS)
    columns = math.ceil(num_panels / rows)
    size = (3.2 * columns, 2.9 * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    by_step = all(run.steps for run in runs)
    for axis, name in zip(axes.flat, logged, strict=False):
        draw_logged(axis, name, runs, by_step)
    for axis, (title, names) in zip(axes.flat[len(logged) :], scores.items(), strict=False):
        draw_scores(axis, title, names, runs)
    for axis in axes.flat[num_panels:]:
        axis.axis("off")
    if len(runs) > 1:
        lines = [plt.Line2D([], [], color=colour(number)) for number in range(len(runs))]
        names = [str(folder) for folder in folders]
        letters = max(map(len, names)) + 6  # with the line before them; 12 take an inch
        num_columns = min(len(runs), max(1, int(12 * size[0] / letters)))
        figure.legend(lines, names, loc="outside lower center", ncols=num_columns, frameon=False)
    save_figure(figure, out, 130, bbox_inches="tight")  # a name may be wider than the panels


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def draw_logged(axis, name: str, runs: list[Run], by_step: bool) -> None:
    """Draw the means of a loss or the learning rate: of train_steps.jsonl, else of epochs from log.txt."""
    in_steps = by_step and any(name in record for run in runs for record in run.steps)
    for number, run in enumerate(runs):
        key, order = (name, "step") if in_steps else (f"train_{name}", "epoch")
        _draw(axis, run.steps if in_steps else run.epochs, order, key, color=colour(number))
    levels = [run.levels.get(name) for run in runs]
    for level in dict.fromkeys(level for level in levels if level is not None):
        is_shared = levels.count(level) == len(levels)
        draw_level(axis, level, GREY if is_shared else colour(levels.index(level)))
    axis.set_title(name.removeprefix("loss_").upper() if name.startswith("loss_") else name)
    axis.set_xlabel("step" if in_steps else "epoch")
    if name.startswith("loss"):
        axis.set_ylabel("nats")
    if name == "lr":
        axis.ticklabel_format(axis="y", scilimits=(0, 0))


def draw_level(axis, level: float, colour: str) -> None:
    axis.axhline(level, color=colour, linestyle="--", linewidth=1)
    anchor = {"xycoords": ("axes fraction", "data"), "xytext": (-3, 3), "textcoords": "offset points"}
    axis.annotate(f"chance {level:.2f}", (1, level), **anchor, ha="right", color=colour, fontsize=8)


def draw_scores(axis, title: str, names: list[str], runs: list[Run]) -> None:
    styles = {name: LINE_STYLES.get(split_and_metric(name)[0], "-") for name in names}
    for name, style in styles.items():
        for number, run in enumerate(runs):
            _draw(axis, run.epochs, "epoch", name, color=colour(number), linestyle=style, marker=".")
    if len(names) > 1:  # colours say which run it is: with several, splits have none
        shared = {"color": colour(0) if len(runs) == 1 else "black"}
        lines = [axis.plot([], [], style, **shared)[0] for style in styles.values()]
        axis.legend(lines, [split_and_metric(name)[0] for name in names], frameon=False, fontsize=8)
    axis.set_title(title)
    axis.set_xlabel("epoch")


def _draw(axis, records: list[dict], order: str, name: str, **style) -> None:
    """Draw a line through the values, broken where there is none: a loss is null where no step was finite."""
    records = [record for record in records if name in record]
    positions = [record[order] for record in records]
    values = [math.nan if record[name] is None else record[name] for record in records]
    axis.plot(positions, values, **style)
    known = np.isfinite([math.nan, *values, math.nan])
    alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])
    if len(alone) and "marker" not in style:  # a line of one point is none
        axis.plot([positions[i] for i in alone], [values[i] for i in alone], ".", **style)
    axis.margins(y=0.15)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser("python -m simla.engine.curves", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="output folders of training runs of one task")
    parser.add_argument("-o", "--out", default="curves.png")
    args = parser.parse_args()
    plot_curves(args.folders, args.out)


if __name__ == "__main__":
    run_command(main)
