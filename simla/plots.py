"""Pictures of results: retrieved images, heat maps, answers."""

import math
import textwrap
from pathlib import Path
from statistics import mean, stdev
from typing import BinaryIO

from PIL import Image
from torch import Tensor

from simla.dataset.images import load_image
from simla.evaluation.grounding import Box, resize_heat
from simla.utils import import_pyplot, save_figure

GREEN, RED, GREY, BLUE = "#1a9641", "#b2182b", "#cccccc", "#0b5fa5"
LEVEL_STYLES = (  # of lines that scores are compared with
    {"color": "#666666", "linestyle": ":"},
    {"color": "#d95f02", "linestyle": "--", "linewidth": 1},
    {"color": "#7570b3", "linestyle": "-.", "linewidth": 1},
)
BOXES = (  # the wider one is seen beneath an equal one
    {"fill": False, "label": "true box", "edgecolor": "#00c853", "linewidth": 5},
    {"fill": False, "label": "chosen box", "edgecolor": "#ff9100", "linewidth": 2},
)
SUITE_COLOURS = {  # score -> name, colour
    "itc": ("contrast", "#1f77b4"),
    "itm": ("matching", "#d62728"),
    "itm+itc": ("both", "#9467bd"),
    "blind": ("blind", "#dddddd"),
}
DPI = 110


def plot_gallery(
    queries: list[str],
    results: list[list[str]],
    right: list[list[bool]] | None,
    out: str | Path,
    title: str,
    notes: list[list[str]] | None = None,
) -> None:
    """Draw a row for each text query with its top pictures, best first; the right ones framed in green.

    queries (Q) texts; results (Q, K) image files; right (Q, K), None where nobody knows; notes (Q, K): what
    stands below each picture.
    """
    plt = import_pyplot()
    num_rows, num_columns = len(results), max(map(len, results))
    size = 1.45 * num_columns + 3.2, (1.5 if notes is None else 1.7) * num_rows + 0.5
    ratios = [2.2] + [1] * num_columns
    figure, axes = plt.subplots(num_rows, 1 + num_columns, figsize=size, width_ratios=ratios, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for row, query in enumerate(queries):
        for axis in (axes[row, 0], *axes[row, 1 + len(results[row]) :]):
            axis.axis("off")
        axes[row, 0].text(1, 0.5, textwrap.fill(query, 30), ha="right", va="center", fontsize=9)
        for column, file in enumerate(results[row]):
            axis, is_right = axes[row, 1 + column], right is not None and right[row][column]
            axis.imshow(load_image(file))
            axis.set(xticks=[], yticks=[])
            if notes is not None:
                axis.set_xlabel(notes[row][column], fontsize=7)
            axis.spines[:].set(color=GREEN if is_right else GREY, linewidth=4 if is_right else 1)
            if row == 0:
                axis.set_title(f"{column + 1}", fontsize=9)
    figure.tight_layout()
    save_figure(figure, out, DPI)


def plot_heat_maps(
    files: list[str],
    texts: list[str],
    heats: list[Tensor],
    true_boxes: list[Box],
    chosen_boxes: list[Box | None],
    right: list[bool],
    out: str | Path,
    num_columns: int = 4,
) -> None:
    """Draw a picture for each expression: its heat map over the image, the true box green, the chosen orange.

    All lists (n): image files, expressions, heat maps (h, w) of any scale, boxes [x, y, w, h] in pixels of
    the image (chosen: None = no box), and whether the choice is right, which colours the title.
    """
    plt = import_pyplot()
    figure, axes = _grid(len(files), num_columns, 3.0)
    for number, (axis, file) in enumerate(zip(axes, files, strict=False)):
        axis.axis("off")
        show_heat(axis, load_image(file), heats[number])
        for box, style in zip((true_boxes[number], chosen_boxes[number]), BOXES, strict=True):
            if box is not None:
                axis.add_patch(plt.Rectangle((box[0] - 0.5, box[1] - 0.5), box[2], box[3], **style))
        mark, colour = ("right", GREEN) if right[number] else ("wrong", RED)
        axis.set_title(textwrap.fill(f"{texts[number]} ({mark})", 32), fontsize=8, color=colour)
    frames = [plt.Rectangle((0, 0), 1, 1, **style) for style in BOXES]
    figure.legend(handles=frames, loc="lower center", ncols=2, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    save_figure(figure, out, DPI)


def _grid(num: int, num_columns: int, row_inches: float) -> tuple:
    """Return a figure and its axes, in rows; those after the first `num` are blank."""
    num_columns = min(num_columns, num)
    num_rows = math.ceil(num / num_columns)
    size = 2.6 * num_columns, row_inches * num_rows
    figure, axes = import_pyplot().subplots(num_rows, num_columns, figsize=size, squeeze=False)
    for axis in axes.flat[num:]:
        axis.axis("off")
    return figure, axes.flat


def show_heat(axis, image: Image.Image, heat: Tensor):
    """Draw over an image a heat map (h, w) of any scale, as a share of its maximum; return the drawn map."""
    heat = resize_heat(heat.float().cpu(), image.height, image.width).clamp(min=0)
    heat = heat / heat.max().clamp(min=1e-30)  # an empty map stays empty
    axis.imshow(image)
    return axis.imshow(heat, cmap="jet", alpha=0.7 * heat, vmin=0, vmax=1)  # cold is transparent


def plot_word_maps(
    image: Image.Image,
    text: str,
    heat: Tensor,
    words: list[tuple[str, Tensor]],
    boxes: list[tuple[str, Box]],
    out: str | Path | BinaryIO,
    num_columns: int = 6,
) -> None:
    """Draw where a model looks in an image for a text and for each of its words, as shares of each map's
    maximum, with a colour bar.

    heat, and that of every word: (h, w), of any scale; boxes: (label, [x, y, w, h] in pixels), on the text's;
    a legend says which is which.
    """
    plt = import_pyplot()
    from matplotlib.patheffects import withStroke

    maps = [(text, heat), *words]
    num_rows = math.ceil(len(maps) / num_columns)
    num_columns = math.ceil(len(maps) / num_rows)
    height = (2.2 * image.height / image.width + 0.35) * num_rows + (0.5 if boxes else 0.2)
    size = 2.2 * num_columns + 0.9, height
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, values) in zip(axes.flat, maps, strict=False):
        drawn = show_heat(axis, image, values)
        weight = "bold" if values is heat else "normal"
        axis.set_title(textwrap.fill(title, 28), fontsize=9, fontweight=weight)
    frames = []
    around = [withStroke(linewidth=4, foreground="white")]  # a frame may lie on its own colour
    for number, (label, (x, y, *size)) in enumerate(boxes):
        style = {"edgecolor": plt.get_cmap("tab10")(number % 10), "linewidth": 2, "path_effects": around}
        frames.append(plt.Rectangle((x - 0.5, y - 0.5), *size, fill=False, label=label, **style))
        axes[0, 0].add_patch(frames[-1])
    if frames:  # below the maps: at the boxes the names would cover each other, or lie outside
        where = {"loc": "outside lower center", "ncols": len(frames)}
        figure.legend(handles=frames, frameon=False, fontsize=9, **where)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, alpha=1)
    bar.set_label("share of the\nmap's maximum", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, out, DPI, bbox_inches="tight")  # of flat pictures the titles and labels stand out


def plot_points(
    rows: list[str],
    panels: dict[str, list[list[float]]],
    levels: dict[str, dict[str, float]],
    out: str | Path,
    num_columns: int = 5,
) -> None:
    """Draw a panel for each score, in it a row for each model: its runs as small points, above them their
    mean, with the standard deviation as error bar.

    rows (R): names of the models; panels: title -> the values of each model's runs, (R) lists; levels: title
    -> name -> value of the lines across all rows, at most as many as LEVEL_STYLES.
    """
    plt = import_pyplot()
    num_columns = min(num_columns, len(panels))
    num_lines = math.ceil(len(panels) / num_columns)
    size = 2.5 * num_columns + 2.4, (0.3 * len(rows) + 0.8) * num_lines + 0.4
    grid = {"figsize": size, "squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(num_lines, num_columns, **grid)
    names = list(dict.fromkeys(name for lines in levels.values() for name in lines))
    styles, drawn = dict(zip(names, LEVEL_STYLES, strict=False)), {}
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=False):
        for row, runs in enumerate(values):
            axis.plot(runs, [row + 0.25] * len(runs), ".", color="#6ea6d7", markersize=5)
            error = stdev(runs) if len(runs) > 1 else None
            axis.errorbar(mean(runs), row, xerr=error, fmt="o", color=BLUE, markersize=5, capsize=3)
        for name, level in levels[title].items():
            drawn[name] = axis.axvline(level, zorder=0, **styles[name])
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_yticks(range(len(rows)), rows)
    axes[0, 0].invert_yaxis()  # the first row on top; the panels share this axis
    where = {"loc": "outside lower center", "ncols": len(names)}
    figure.legend(drawn.values(), drawn.keys(), frameon=False, fontsize=8, **where)
    save_figure(figure, out, DPI)


def plot_answers(
    files: list[str],
    questions: list[str],
    given: list[str],
    right: list[bool],
    expected: list[str],
    out: str | Path,
    num_columns: int = 4,
) -> None:
    """Draw a picture for each question: below it the answer given, green where right; where wrong red, with
    the annotators' most common one.

    All lists (n): image files, questions, answers, whether they are right, answers of the annotators.
    """
    figure, axes = _grid(len(files), num_columns, 3.1)
    shown = zip(axes, files, questions, given, right, expected, strict=False)
    for axis, file, question, answer, is_right, wanted in shown:
        axis.imshow(load_image(file))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_title(textwrap.fill(question, 34), fontsize=8)
        text, colour = (answer, GREEN) if is_right else (f"{answer} (people: {wanted})", RED)
        axis.set_xlabel(textwrap.fill(text, 34), fontsize=9, color=colour, fontweight="bold")
    figure.tight_layout()
    save_figure(figure, out, DPI)


def plot_suite(title: str, summary: dict[str, dict], out: str | Path | BinaryIO) -> None:
    """Draw a suite's accuracy by kind: contrast, matching and both as points with their intervals at 95%, the
    blind baseline as a grey bar, chance dashed; of people's ratings Kendall's tau-c.

    summary: as `evaluation.alignment.scores.summarise` returns it
    """
    plt = import_pyplot()
    kinds, first = list(summary), next(iter(summary.values()))
    names, is_accuracy = [name for name in SUITE_COLOURS if name in first], "chance" in first
    figure, axis = plt.subplots(figsize=(7.5, 0.42 * len(kinds) + 1.6), layout="constrained")
    for row, kind in enumerate(kinds):
        group = summary[kind]
        chance = group["chance"] if is_accuracy else 0.0
        axis.plot([chance] * 2, [row - 0.4, row + 0.4], "--", color="black", linewidth=1, label="chance")
        for number, name in enumerate(names):
            values = group[name]
            value = values["accuracy"] if is_accuracy else 100 * (values["tau_c"] or 0.0)
            label, colour = SUITE_COLOURS[name]
            if name == "blind":
                axis.barh(row, value, 0.7, color=colour, label=label, zorder=0)
                continue
            ends = [[value - values["low"]], [values["high"] - value]] if is_accuracy else None
            style = {"xerr": ends, "fmt": "o", "markersize": 4, "linewidth": 1.5}
            axis.errorbar(value, row + 0.2 * (number - 1), color=colour, label=label, **style)
    axis.set_yticks(range(len(kinds)), [f"{kind} ({summary[kind]['n']:,})" for kind in kinds])
    axis.invert_yaxis()
    axis.set_xlabel("accuracy (%), with 95% interval" if is_accuracy else "Kendall's tau-c x 100")
    if is_accuracy:
        axis.set_xlim(0, 100)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title)
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once, loc="outside lower center", ncols=len(once), frameon=False, fontsize=9)
    save_figure(figure, out, DPI)
