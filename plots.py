"""Pictures of results: loss curves beside their chance levels, galleries of retrieved images.

python plots.py losses output/demo/train_steps.jsonl -o losses.png --config output/demo/config.yaml
"""

import argparse
import json
import math
from pathlib import Path

from ruamel.yaml import YAML

from utils import UserError, run_script


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

    return plt


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
    queries: list[str], results: list[list[str]], right: list[list[bool]], out: str | Path, title: str
) -> None:
    """A row for each text query with its top pictures, best first; the right ones framed in green.

    queries (Q) texts; results (Q, K) image files; right (Q, K)
    """
    import textwrap

    from dataset.transforms import load_image

    plt = import_pyplot()
    rows, columns = len(results), max(map(len, results))
    figure, axes = plt.subplots(
        rows,
        columns + 1,
        figsize=(1.45 * columns + 3.2, 1.5 * rows + 0.5),
        width_ratios=[2.2] + [1] * columns,
        squeeze=False,
    )
    figure.suptitle(title, fontsize=11)
    for row, query in enumerate(queries):
        axes[row, 0].axis("off")
        axes[row, 0].text(1, 0.5, "\n".join(textwrap.wrap(query, 30)), ha="right", va="center", fontsize=9)
        for column, (file, is_right) in enumerate(zip(results[row], right[row], strict=True), 1):
            axis = axes[row, column]
            axis.imshow(load_image(file))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set(color="#1a9641" if is_right else "#cccccc", linewidth=4 if is_right else 1)
            if row == 0:
                axis.set_title(f"{column}", fontsize=9)
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
