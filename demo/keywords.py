"""The words that PSL's momentum encoder attends to in captions, as a picture.

python -m simla.demo.keywords output/demo/checkpoint_04.pth -o keywords.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from simla.configs.reader import read_config, weighted
from simla.configs.schema import PRETRAIN
from simla.dataset.images import load_image
from simla.dataset.text import build_tokenizer
from simla.engine.command import run_command
from simla.utils import import_pyplot, save_figure

if TYPE_CHECKING:
    from torch import Tensor

GREEN, GREY = "#1a9641", "#b8c4cf"


def plot_keywords(
    files: list[str],
    words: list[list[str]],
    attention: Tensor,
    votes: Tensor,
    chosen: Tensor,
    out: str | Path,
) -> None:
    """Draw a row for each image-caption pair: the image, and beside it, for every word piece, how much the
    momentum encoder's [CLS] attends to it (mean and range over the heads) and in how many heads it is among
    the first; the pieces that PSL chose as keywords in green.

    files (B); words (B) lists of their word pieces, [CLS] first; attention (B, H, T) the [CLS] row; votes
    (B, T); chosen (B, T) bool: see `SIMLA.keywords`. [CLS] itself is never a target.
    """
    plt = import_pyplot()
    num_rows, longest = len(files), max(map(len, words))
    size, ratios = (2.8 + 0.55 * longest, 2.3 * num_rows), [2.3, 0.55 * longest]
    figure, axes = plt.subplots(
        num_rows, 2, figsize=size, width_ratios=ratios, squeeze=False, layout="constrained"
    )
    for row, (file, pieces) in enumerate(zip(files, words, strict=True)):
        picture, bars = axes[row]
        picture.imshow(load_image(file))
        picture.axis("off")
        heads = attention[row, :, : len(pieces)].float().cpu().numpy()  # (H, number of pieces)
        means = heads.mean(0)
        ranges = [means - heads.min(0), heads.max(0) - means]
        colours = [GREEN if is_keyword else GREY for is_keyword in chosen[row, : len(pieces)]]
        lines = {"ecolor": "#777777", "error_kw": {"linewidth": 0.8}}
        bars.bar(range(len(pieces)), means, yerr=ranges, color=colours, **lines)
        bars.set_xticks(range(len(pieces)), pieces, rotation=35, ha="right", fontsize=9)
        for i, (label, colour) in enumerate(zip(bars.get_xticklabels(), colours, strict=True)):
            bars.text(i, 1, f"{votes[row, i]}", transform=bars.get_xaxis_transform(), ha="center", fontsize=8)
            if colour == GREEN:
                label.set(color=GREEN, fontweight="bold")
        bars.set_xlim(-0.6, longest - 0.4)
        bars.spines[["top", "right"]].set_visible(False)
    axes[0, 1].set_title(
        f"attention of [CLS], mean and range of {attention.shape[1]} heads; number: votes of the heads; "
        "green: keyword",
        fontsize=9,
        pad=14,
    )
    save_figure(figure, out, 110)


def draw_keywords(checkpoint: str | Path, config: dict, entries: Sequence[dict], out: str | Path) -> None:
    """Draw `plot_keywords` of a pre-training checkpoint. config: resolved, of Pretrain.py; entries: as of
    `read_pairs`; of several captions the first.

    Raises UserError for a checkpoint of another model and an image that cannot be read.
    """
    from simla.checkpoint.load import load_weights  # here, as below: torch takes seconds
    from simla.dataset.items import Collate, EvalItems
    from simla.dataset.loaders import stop_at_unreadable
    from simla.dataset.transforms import normalise
    from simla.models.pretrain import SIMLA

    tokenizer = build_tokenizer(config["text_encoder"])
    model = SIMLA.from_config(config, tokenizer.cls_token_id)
    load_weights(model, checkpoint, "Pretrain", config)
    collate = Collate(tokenizer, model.text_encoder.bert.config.max_position_embeddings, config["max_tokens"])

    texts = [entry["text"] for entry in entries]
    firsts = [text if isinstance(text, str) else text[0] for text in texts]
    entries = [{**entry, "text": text} for entry, text in zip(entries, firsts, strict=True)]
    samples = EvalItems(entries, config["image_res"])
    (batch,) = stop_at_unreadable([collate([samples[i] for i in range(len(entries))])])
    ids, mask = batch["text_ids"], batch["text_mask"]
    keywords = model.eval().keywords(normalise(batch["image"]), ids, mask)
    words = [
        tokenizer.convert_ids_to_tokens(row[:length])
        for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)
    ]
    plot_keywords([entry["images"][0] for entry in entries], words, *keywords, out)


def main() -> None:
    parser = argparse.ArgumentParser("python -m simla.demo.keywords", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="of Pretrain.py")
    parser.add_argument("--config", help="default: config.yaml beside the checkpoint")
    parser.add_argument("--file", help="annotation file; default: the config's train_file")
    parser.add_argument("--num", type=int, default=4, help="pairs, evenly spread (default: %(default)s)")
    parser.add_argument("-o", "--out", default="keywords.png")
    args = parser.parse_args()
    from simla.dataset.pretrain import read_pairs

    config = read_config(args.config or str(Path(args.checkpoint).with_name("config.yaml")), PRETRAIN)
    files = args.file or list(chain(*weighted(config["train_file"])[0]))
    pairs = read_pairs(files, config["image_root"])
    num = min(args.num, len(pairs))
    draw_keywords(args.checkpoint, config, [pairs[i * len(pairs) // num] for i in range(num)], args.out)


if __name__ == "__main__":
    run_command(main)
