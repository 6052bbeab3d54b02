"""Pictures of results: retrieved images, heat maps, answers."""

import math
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from torch import Tensor

from simla.evaluation.grounding import Box, resize_heat
from simla.utils import import_pyplot, save_figure


def plot_gallery(
    queries: list[str],
    results: list[list[str]],
    right: list[list[bool]] | None,
    out: str | Path,
    title: str,
    notes: list[list[str]] | None = None,
) -> None:
    """A row for each text query with its top pictures, best first; the right ones framed in green.

    queries (Q) texts; results (Q, K) image files; right (Q, K), None where nobody knows; notes (Q, K): what
    stands below each picture.
    """
    import textwrap

    from simla.dataset.images import load_image

    plt = import_pyplot()
    rows, columns = len(results), max(map(len, results))
    figure, axes = plt.subplots(
        rows,
        columns + 1,
        figsize=(1.45 * columns + 3.2, (1.5 if notes is None else 1.7) * rows + 0.5),
        width_ratios=[2.2] + [1] * columns,
        squeeze=False,
    )
    figure.suptitle(title, fontsize=11)
    for row, query in enumerate(queries):
        axes[row, 0].axis("off")
        axes[row, 0].text(1, 0.5, "\n".join(textwrap.wrap(query, 30)), ha="right", va="center", fontsize=9)
        for axis in axes[row, 1 + len(results[row]) :]:
            axis.axis("off")
        for column, file in enumerate(results[row], 1):
            axis, is_right = axes[row, column], right is not None and right[row][column - 1]
            axis.imshow(load_image(file))
            axis.set_xticks([])
            axis.set_yticks([])
            if notes is not None:
                axis.set_xlabel(notes[row][column - 1], fontsize=7)
            axis.spines[:].set(color="#1a9641" if is_right else "#cccccc", linewidth=4 if is_right else 1)
            if row == 0:
                axis.set_title(f"{column}", fontsize=9)
    figure.tight_layout()
    save_figure(figure, out, 110)
    plt.close(figure)


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
    """A picture for each expression: its heat map over the image, the true box green, the chosen one orange.

    All lists (n): image files, expressions, heat maps (h, w) of any scale, boxes [x, y, w, h] in pixels of
    the image (chosen: None = no box), and whether the choice is right, which colours the title.
    """
    import textwrap

    from simla.dataset.images import load_image

    plt = import_pyplot()
    # The true box is the wider one, to be seen beneath an equal choice.
    styles = [
        {"fill": False, "edgecolor": colour, "linewidth": width, "label": label}
        for colour, width, label in (("#00c853", 5, "true box"), ("#ff9100", 2, "chosen box"))
    ]
    columns = min(num_columns, len(files))
    rows = math.ceil(len(files) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 3.0 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, (axis, file) in enumerate(zip(axes.flat, files, strict=False)):
        show_heat(axis, load_image(file), heats[number])
        for box, style in zip((true_boxes[number], chosen_boxes[number]), styles, strict=True):
            if box is not None:
                axis.add_patch(plt.Rectangle((box[0] - 0.5, box[1] - 0.5), box[2], box[3], **style))
        mark, colour = ("right", "#1a9641") if right[number] else ("wrong", "#b2182b")
        title = textwrap.fill(f"{texts[number]} ({mark})", 32)
        axis.set_title(title, fontsize=8, color=colour)
    figure.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, **style) for style in styles],
        loc="lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.3 / (3.0 * rows), 1, 1))
    save_figure(figure, out, 110)
    plt.close(figure)


def show_heat(axis, image: Image.Image, heat: Tensor):
    """An image with a heat map (h, w) of any scale over it, as a share of its maximum -> the map as drawn."""
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
    """Where a model looks in an image for a text and for each of its words, each map beside a colour bar as a
    share of its own maximum.

    heat, and that of every word: (h, w), of any scale; boxes: (label, [x, y, w, h] in pixels), on the text's;
    a legend says which is which.
    """
    import textwrap

    plt = import_pyplot()
    from matplotlib.patheffects import withStroke

    rows = math.ceil((len(words) + 1) / num_columns)
    columns = math.ceil((len(words) + 1) / rows)
    size = 2.2 * columns + 0.9, (2.2 * image.height / image.width + 0.35) * rows + (0.5 if boxes else 0.2)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, own) in zip(axes.flat, [(text, heat), *words], strict=False):
        drawn = show_heat(axis, image, own)
        axis.set_title(textwrap.fill(title, 28), fontsize=9, fontweight="bold" if own is heat else "normal")
    frames = []
    for number, (label, box) in enumerate(boxes):
        edge = {"edgecolor": plt.get_cmap("tab10")(number % 10), "linewidth": 2, "label": label}
        # White round it: a frame may lie on its own colour.
        edge["path_effects"] = [withStroke(linewidth=4, foreground="white")]
        frames.append(plt.Rectangle((box[0] - 0.5, box[1] - 0.5), box[2], box[3], fill=False, **edge))
        axes[0, 0].add_patch(frames[-1])
    if frames:  # below the maps: at the boxes the names would cover each other, or lie outside
        figure.legend(
            handles=frames, loc="outside lower center", ncols=len(frames), frameon=False, fontsize=9
        )
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, alpha=1)
    bar.set_label("share of the\nmap's maximum", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, out, 110, bbox_inches="tight")  # of flat pictures the titles and labels stand out
    plt.close(figure)


def plot_answers(
    files: list[str],
    questions: list[str],
    given: list[str],
    right: list[bool],
    expected: list[str],
    out: str | Path,
    num_columns: int = 4,
) -> None:
    """A picture for each question: below it the answer given, green where right; where wrong red, with the
    annotators' most common one.

    All lists (n): image files, questions, answers, whether they are right, answers of the annotators.
    """
    import textwrap

    from simla.dataset.images import load_image

    plt = import_pyplot()
    columns = min(num_columns, len(files))
    size = math.ceil(len(files) / columns), columns
    figure, axes = plt.subplots(*size, figsize=(2.6 * size[1], 3.1 * size[0]), squeeze=False)
    for axis in axes.flat[len(files) :]:
        axis.axis("off")
    shown = zip(axes.flat, files, questions, given, right, expected, strict=False)
    for axis, file, question, answer, is_right, wanted in shown:
        axis.imshow(load_image(file))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_title(textwrap.fill(question, 34), fontsize=8)
        text = answer if is_right else f"{answer} (people: {wanted})"
        colour = "#1a9641" if is_right else "#b2182b"
        axis.set_xlabel(textwrap.fill(text, 34), fontsize=9, color=colour, fontweight="bold")
    figure.tight_layout()
    save_figure(figure, out, 110)
    plt.close(figure)
