"""Draws docs/images/architecture.png: python docs/images/draw_architecture.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INPUT, ONLINE, STATES, TWIN, LOSS = "#f3f0e6", "#d7e8f7", "#ffffff", "#ececec", "#fbe0d2"
KEYS = "#0b5fa5"
Point = tuple[float, float]


def box(
    axis: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 8.5
):
    """Draw a rounded box round the centre (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.12",
        facecolor=colour,
        edgecolor="#444444",
        linewidth=1,
        linestyle="--" if colour == TWIN else "-",
    )
    axis.add_patch(shape)
    axis.text(x, y, text, ha="center", va="center", fontsize=size, linespacing=1.35)


def arrow(axis: Axes, start: Point, end: Point, style: str = "-", colour: str = "#444444"):
    shape = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=11,
        linewidth=1.1,
        linestyle=style,
        color=colour,
        shrinkA=0,
        shrinkB=0,
    )
    axis.add_patch(shape)


def label(axis: Axes, x: float, y: float, text: str, ground: str, size: float, colour: str = "#222222"):
    """Write a text that covers the arrows beneath it."""
    patch = {"facecolor": ground, "edgecolor": "none", "pad": 1.5}
    axis.text(x, y, text, fontsize=size, color=colour, ha="center", va="center", bbox=patch, zorder=3)


def draw(axis: Axes) -> None:
    # inputs
    box(axis, 1.7, 0.6, 1.7, 0.7, "image", INPUT)
    box(axis, 3.9, 0.6, 1.9, 0.7, "image with\nhidden patches", INPUT)
    box(axis, 7.0, 0.6, 1.7, 0.7, "caption", INPUT)
    box(axis, 9.3, 0.6, 1.9, 0.7, "caption with\nmasked words", INPUT)

    # encoders
    box(axis, 2.8, 1.95, 4.2, 0.8, "image encoder: ViT-B/16, 12 layers", ONLINE, 9)
    box(axis, 8.15, 1.95, 4.2, 0.8, "text encoder: word and position embeddings", ONLINE, 9)
    for x in (1.7, 3.9, 7.0, 9.3):
        arrow(axis, (x, 0.95), (x, 1.55))

    # the single stream and how it reads
    box(axis, 6.45, 4.18, 7.7, 2.06, "", ONLINE)
    box(axis, 3.9, 3.98, 1.9, 1.15, "image tokens run,\ncross-attend to\nword embeddings", STATES)
    box(axis, 6.15, 3.98, 1.9, 1.15, "words run alone,\nno cross-attention", STATES)
    box(axis, 8.72, 3.98, 2.7, 1.15, "words run,\ncross-attend to image tokens", STATES)
    for x in (3.9, 6.5, 8.2, 9.5):
        arrow(axis, (x, 2.35), (x, 3.4))
    for x in (3.9, 6.15, 8.2, 9.5):
        arrow(axis, (x, 4.56), (x, 5.75))
    arrow(axis, (6.2, 2.35), (4.6, 3.4), "--", KEYS)
    arrow(axis, (4.6, 2.35), (7.7, 3.4), "--", KEYS)
    label(axis, 5.4, 2.66, "keys and values", "#ffffff", 7.5, KEYS)
    label(axis, 6.45, 4.9, "one stream: the same 12 layers of BERT in every reading", ONLINE, 9.5)
    arrow(axis, (1.7, 2.35), (1.7, 5.75))
    arrow(axis, (1.7, 5.42), (5.5, 5.75))
    label(axis, 1.7, 4.1, "feature of the\nwhole image\n([CLS], 256)", "#ffffff", 8)

    # losses
    losses = (
        (1.75, 2.1, "PSL\nkeywords from the\nimage feature", "whole vocabulary"),
        (4.0, 1.8, "MIM\nhidden patches", "8,192 visual tokens"),
        (6.15, 1.8, "ITA\nimage–text contrast", "batch and queues"),
        (8.05, 1.5, "ITM\npair or not", "hard negatives"),
        (9.7, 1.5, "MLM\nmasked words", "whole vocabulary"),
    )
    for x, width, text, among in losses:
        box(axis, x, 6.3, width, 1.1, text, LOSS)
        label(axis, x, 7.05, among, "#ffffff", 7.5)

    # twins and queues
    box(
        axis,
        12.4,
        2.9,
        2.9,
        2.7,
        "momentum twins\n(no gradient)\n\nimage encoder, text encoder,\nprojections, MIM head,\n"
        "concept head\n\nm ← 0.995 m + 0.005 online",
        TWIN,
        8,
    )
    box(axis, 12.4, 5.05, 2.9, 0.75, "queues: 65,536 image and\n65,536 text features", TWIN, 8)
    arrow(axis, (12.4, 4.25), (12.4, 4.67))
    arrow(axis, (11.0, 5.25), (7.05, 6.0), "--", "#888888")
    arrow(axis, (10.27, 1.95), (10.95, 2.2), "--", "#888888")
    box(
        axis,
        12.4,
        6.55,
        2.9,
        1.15,
        "targets of ITA, MLM, MIM, PSL:\n(1 − α) hard + α soft, α = 0.4,\n"
        "soft ones from the twins, and\nPSL's keywords by their attention",
        TWIN,
        8,
    )


def main() -> None:
    figure, axis = plt.subplots(figsize=(13, 6.9))
    axis.set_xlim(0.3, 14.1)
    axis.set_ylim(0.05, 7.35)
    axis.axis("off")
    draw(axis)
    figure.savefig(Path(__file__).with_name("architecture.png"), dpi=110, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
