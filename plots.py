"""Pictures of results: loss curves beside their chance levels, retrieved images, heat maps, answers.

python plots.py losses output/demo/train_steps.jsonl -o losses.png --config output/demo/config.yaml
"""

import argparse
import json
import math
from pathlib import Path

from PIL import Image
from ruamel.yaml import YAML
from torch import Tensor

from launch import run_script
from metrics import Box, resize_heat
from utils import UserError


def chance_levels(config: dict) -> dict[str, float]:
    """What each pre-training loss is worth to a model that has learned nothing, in nats.

    ITA: an even guess among batch and queue; MLM, MIM: among the vocabulary; ITM: a head that knows only that
    two rows of three do not match; PSL: every word at one half.
    """
    bert = config["bert_config"]
    vocab_size = (bert if isinstance(bert, dict) else json.loads(Path(bert).read_text()))["vocab_size"]
    return {
        "loss_ita": math.log(config["batch_size"] + config["queue_size"]),
        "loss_itm": -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3),
        "loss_mlm": math.log(vocab_size),
        "loss_mim": math.log(config["image_tokenizer"]["vocab_size"]),
        "loss_psl": math.log(2),
    }


def import_pyplot():
    """matplotlib.pyplot, drawing to files; UserError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # a text or a file's name may have dollars
    return plt


def check_picture_name(out: str | Path) -> None:
    """UserError where matplotlib is not installed or could not write a picture of that name."""
    import_pyplot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    endings = FigureCanvasAgg.get_supported_filetypes()
    if Path(out).suffix[1:].lower() not in endings:
        raise UserError(f"{out}: the name of a picture ends in one of .{', .'.join(endings)}")


def plot_losses(steps_file: str | Path, config: dict, out: str | Path) -> None:
    """One panel for each loss of a train_steps.jsonl, its chance level dashed.

    Raises UserError for a file that is missing, broken or without steps.
    """
    try:
        records = [json.loads(line) for line in Path(steps_file).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{steps_file} cannot be read as one JSON object a line: {error}") from error
    if not records:
        raise UserError(f"{steps_file} holds no steps yet")
    plt = import_pyplot()
    names = [name for name in records[0] if name.startswith("loss_")]
    chance = chance_levels(config)
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.9), layout="constrained")
    steps = [record["step"] for record in records]
    for axis, name in zip(axes if len(names) > 1 else [axes], names, strict=True):
        axis.plot(steps, [record[name] for record in records], color="#0b5fa5")
        axis.axhline(chance[name], color="#8a8a8a", linestyle="--", linewidth=1)
        axis.annotate(
            f"chance {chance[name]:.2f}",
            (1, chance[name]),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            color="#5a5a5a",
            fontsize=8,
        )
        axis.set_title(name.removeprefix("loss_").upper())
        axis.set_xlabel("step")
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (nats)")
    figure.savefig(out, dpi=130)
    plt.close(figure)


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

    from dataset.transforms import load_image

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
    figure.savefig(out, dpi=110)
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

    from dataset.transforms import load_image

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
    figure.savefig(out, dpi=110)
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
    out: str | Path,
    num_columns: int = 6,
) -> None:
    """Where a model looks in an image for a text and for each of its words, each map beside a colour bar as a
    share of its own maximum.

    heat, and that of every word: (h, w), of any scale; boxes: (label, [x, y, w, h] in pixels), on the text's
    """
    import textwrap

    plt = import_pyplot()
    rows = math.ceil((len(words) + 1) / num_columns)
    columns = math.ceil((len(words) + 1) / rows)
    size = 2.2 * columns + 0.9, (2.2 * image.height / image.width + 0.35) * rows + 0.2
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, own) in zip(axes.flat, [(text, heat), *words], strict=False):
        drawn = show_heat(axis, image, own)
        axis.set_title(textwrap.fill(title, 28), fontsize=9, fontweight="bold" if own is heat else "normal")
    for number, (label, box) in enumerate(boxes):
        colour = plt.get_cmap("tab10")(number % 10)
        frame = plt.Rectangle(
            (box[0] - 0.5, box[1] - 0.5), box[2], box[3], fill=False, edgecolor=colour, linewidth=2
        )
        axes[0, 0].add_patch(frame)
        style = {
            "fontsize": 7,
            "color": "white",
            "bbox": {"facecolor": colour, "edgecolor": "none", "pad": 1},
        }
        axes[0, 0].text(box[0], box[1], label, va="bottom", clip_on=True, **style)
    figure.colorbar(drawn, ax=axes, label="share of the map's maximum", fraction=0.03, alpha=1)
    figure.savefig(out, dpi=110)
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

    from dataset.transforms import load_image

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
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    losses = commands.add_parser("losses", help="curves of a training run")
    losses.add_argument("steps_file", help="train_steps.jsonl of an output folder")
    losses.add_argument("--config", required=True, help="config.yaml of the same folder")
    losses.add_argument("-o", "--out", default="losses.png")
    args = parser.parse_args()
    try:
        config = YAML(typ="safe").load(Path(args.config).read_text())
    except OSError as error:
        raise UserError(f"config {args.config} cannot be read: {error.strerror}") from error
    plot_losses(args.steps_file, config, args.out)


if __name__ == "__main__":
    run_script(main)
