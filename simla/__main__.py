"""The command `simla`: every method of `Simla` on files, for people or, with --json, for other programs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simla.configs.schema import SCORES
from simla.dataset.text import MAX_TEXT_TOKENS
from simla.engine.command import run_command, whole_number
from simla.folders import describe as describe_passed_over
from simla.utils import UserError, atomic_write, check_picture_name

if TYPE_CHECKING:  # torch takes seconds: what needs it is imported once the command line is read
    from simla.index import Index
    from simla.model import Simla

VARIABLE = "SIMLA_CHECKPOINT"
EPILOG = f"""examples:
  export {VARIABLE}=output/Pretrain/checkpoint_29.pth
  simla match photo.jpg "a dog on a sofa" "a cat on a sofa"
  simla search photos/ "two dogs in the snow" -o gallery.png --index photos.index
  simla ground photo.jpg "the dog on the left" -o map.png
  simla answer photo.jpg "what is the dog doing?" --answers answer_list.json --checkpoint vqa.pth

Without the package installed: python -m simla ..."""


# ---- one function for each command: what --json prints ----


def match(model: Simla, args: argparse.Namespace) -> dict:
    values = getattr(model, args.command)(args.image, args.text, args.max_tokens).tolist()
    name = {"match": "probability", "similarity": "cosine"}[args.command]
    return {"image": args.image, "results": _rows(("text", name), zip(args.text, values, strict=True))}


def encode(model: Simla, args: argparse.Namespace) -> dict:
    features = (
        model.encode_text(args.inputs, args.max_tokens) if args.texts else model.encode_image(args.inputs)
    )
    with atomic_write(args.out) as file:
        np.save(file, features.numpy())
    return {"inputs": args.inputs, "file": args.out, "shape": list(features.shape)}


def ground(model: Simla, args: argparse.Namespace) -> dict:
    proposals = _read_boxes(args.boxes) if args.boxes else None
    grounding = model.ground(args.image, args.text, proposals, args.mode, args.block, args.max_tokens)
    result = {"image": args.image, "text": grounding.text}
    result |= {"width": grounding.width, "height": grounding.height, "box": grounding.box}
    result |= {"boxes": _rows(("box", "score"), grounding.ranked), "heat": grounding.heat.tolist()}
    result["words"] = [{"word": word, "heat": heat.tolist()} for word, heat in grounding.words]
    if args.out:
        from simla.evaluation.grounding import choose_box
        from simla.inputs import read_image
        from simla.plots import plot_word_maps

        best = choose_box(grounding.at_image_size(), [box for box, _ in grounding.ranked])
        boxes = [("heat alone", grounding.box), ("best proposal", best)]
        boxes = [(label, box) for label, box in boxes if box is not None]
        image = read_image(args.image)
        plot_word_maps(image, grounding.text, grounding.heat, grounding.words, boxes, args.out)
        result["file"] = args.out
    return result


def index(model: Simla, args: argparse.Namespace) -> dict:
    index = model.index(args.folder, args.index, args.update, args.everything)
    return {"folder": args.folder, **_contents(index), "file": args.index}


def _contents(index: Index) -> dict:
    return {"num_images": len(index), "unreadable": index.unreadable, "passed_over": index.passed_over}


def search(model: Simla, args: argparse.Namespace) -> dict:
    from simla.model import kept_index

    if args.index:
        index = kept_index(model, args.folder, args.index, args.everything)
    else:
        index = model.index(args.folder, everything=args.everything)
    hits_of_each = model.search(index, args.query, args.top, args.candidates, args.max_tokens, args.score)
    results = [
        {"query": query, "hits": [hit._asdict() for hit in hits]}
        for query, hits in zip(args.query, hits_of_each, strict=True)
    ]
    result = {"folder": args.folder, **_contents(index), "results": results}
    if args.out:
        from simla.plots import plot_gallery

        files = [[hit.file for hit in hits] for hits in hits_of_each]
        notes = [[f"{_name(hit.file)}\n{hit.score:.2f}" for hit in hits] for hits in hits_of_each]
        title = f"Top {args.top} of {len(index)} images in {_name(args.folder)}"
        plot_gallery(args.query, files, None, args.out, title, notes)
        result["file"] = args.out
    return result


def answer(model: Simla, args: argparse.Namespace) -> dict:
    answers = args.answers
    if answers is not None and not os.path.isfile(answers):  # noqa: PTH113  is False for a name too long
        answers = [answer.strip() for answer in answers.split(",")]
    results = _rows(("answer", "probability"), model.answer(args.image, args.question, answers, args.top))
    return {"image": args.image, "question": args.question, "results": results}


def keywords(model: Simla, args: argparse.Namespace) -> dict:
    results = _rows(("word", "probability"), model.keywords(args.image, args.top, args.words))
    return {"image": args.image, "results": results}


def entails(model: Simla, args: argparse.Namespace) -> dict:
    ranked = sorted(model.entails(args.image, args.sentence).items(), key=lambda pair: -pair[1])
    results = _rows(("class", "probability"), ranked)
    return {"image": args.image, "sentence": args.sentence, "results": results}


def compare(model: Simla, args: argparse.Namespace) -> dict:
    probability = model.compare(args.first, args.second, args.statement)
    images = {"first": args.first, "second": args.second, "statement": args.statement}
    return {**images, "results": _rows(("statement", "probability"), [(args.statement, probability)])}


def _rows(names: tuple[str, str], pairs: Iterable[tuple]) -> list[dict]:
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


def _name(path: str) -> str:
    """Return a file's or folder's name, for a picture; bytes in it that are no text, escaped."""
    return Path(path).absolute().name.encode(errors="backslashreplace").decode()


def _read_boxes(text: str) -> list:
    """Return a JSON list, or that in a file."""
    try:
        is_file = os.path.isfile(text)  # noqa: PTH113  is False for a name too long
        return json.loads(Path(text).read_bytes() if is_file else text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--boxes {text[:200]}: expected a JSON list [[x, y, width, height], ...] or its file"
        ) from error


# ---- what people see ----


def describe(result: dict) -> str:
    """Return the result in lines, numbers first."""
    lines = []
    if "heat" in result:
        box = result["box"] or "none, as nothing is hot, or nearly everything"
        lines.append(f"box from the heat alone [x, y, width, height]: {box}")
        lines += [f"{row['score']:10.4g}  {row['box']}" for row in result["boxes"]]
    for row in result.get("results", []):
        if "hits" in row:
            lines.append(row["query"])
            lines += [f"{hit['score']:10.4f}{hit['similarity']:10.4f}  {hit['file']}" for hit in row["hits"]]
        else:
            name, value = row.values()
            lines.append(f"{value:10.4f}  {name}")
    if "num_images" in result and "results" not in result:
        lines.append(f"{result['num_images']} images")
    if unreadable := result.get("unreadable"):
        (file, cause), number = next(iter(unreadable.items())), len(unreadable)
        lines.append(f"{number} image{'s' * (number > 1)} cannot be read, the first: {file} ({cause})")
    if note := describe_passed_over(result.get("passed_over", {})):
        lines.append(note)
    if "shape" in result:
        lines.append(f"{result['shape'][0]} rows of {result['shape'][1]}")
    if "file" in result:
        lines.append(f"written: {result['file']}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    shared, tokens, everything = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    options = shared.add_argument_group("model")
    default = os.environ.get(VARIABLE)
    options.add_argument("--checkpoint", default=default, help=f"file; else the variable {VARIABLE} names it")
    options.add_argument("--config", help="the task's YAML file, where the checkpoint holds no config")
    options.add_argument("--text_encoder", help="tokenizer: hub name or folder; replaces the config's")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options.add_argument("--dtype", default="fp32", help="fp32, tf32, bf16 or fp16 (default: %(default)s)")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    text = "tokens of a text that are read, and at most 30 words (default: %(default)s)"
    tokens.add_argument("--max_tokens", type=whole_number(1), default=MAX_TEXT_TOKENS, help=text)
    text = "hidden folders, thumbnails and waste, too"
    everything.add_argument("--everything", action="store_true", help=text)

    parser = argparse.ArgumentParser(
        "simla",
        description="Ask a trained SIMLA checkpoint about images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable, help: str, positionals: str, *parents) -> Callable:
        """Add a command and return its `add_argument`; of a positional NAME... there are one or more."""
        description = help[0].upper() + help[1:]
        added = commands.add_parser(name, parents=[shared, *parents], help=help, description=description)
        added.set_defaults(function=function)
        for positional in positionals.split():
            added.add_argument(positional.rstrip("."), nargs="+" if positional.endswith("...") else None)
        return added.add_argument

    text = "probability that a text describes an image, read jointly"
    command("match", match, text, "image text...", tokens)
    command("similarity", match, "cosine of the features of image and text", "image text...", tokens)
    text = "where an image shows a text and each of its words"
    add = command("ground", ground, text, "image text", tokens)
    add("-o", "--out", help="picture of the heat maps")
    add("--boxes", help="proposals to rank: JSON list of [x, y, width, height], or its file")
    add("--mode", default="itm", choices=("itm", "itc"), help="which score is explained (default: itm)")
    add("--block", type=int, help="layer whose attention is used, from 0 (default: two thirds up)")
    text = "the images of a folder that match a text best"
    add = command("search", search, text, "folder query...", tokens, everything)
    add("-o", "--out", help="picture of the images found")
    add("--index", help="folder that keeps what was computed of the images; made when missing")
    add("--top", type=whole_number(1), default=5, help="images for each query (default: %(default)s)")
    text = "images that are read jointly, on which the first hits depend (default: k_test, or --top if more)"
    add("--candidates", type=whole_number(1), help=text)
    text = "what ranks: matching (itm), the features alone (itc), or both (default: the config's)"
    add("--score", choices=SCORES, help=text)
    text = "keep what `search --index` needs of a folder of images"
    add = command("index", index, text, "folder index", everything)
    text = "of an index that is there, encode new and changed images alone, and drop those that are gone"
    add("--update", action="store_true", help=text)
    add = command("answer", answer, "answers to a question about an image", "image question")
    add("--answers", help="answers to rank: JSON file, or a list with commas; else they are written")
    add("--top", type=whole_number(1), default=5, help="answers (default: %(default)s)")
    text = "the words that an image calls up (pre-training checkpoints)"
    add = command("keywords", keywords, text, "image")
    add("--top", type=whole_number(1), default=5, help="words (default: %(default)s)")
    add("--words", nargs="+", action="extend", help="words to choose from (default: all but function words)")
    text = "does the image entail, contradict or leave open a sentence?"
    command("entails", entails, text, "image sentence")
    command(
        "compare", compare, "probability that a statement is true of two images", "first second statement"
    )
    text = "unit-length features of images, or of texts, as .npy"
    add = command("encode", encode, text, "inputs...", tokens)
    add("-o", "--out", required=True, help="file to write, (N, E) float32")
    add("--texts", action="store_true", help="the inputs are texts, not image files")
    return parser


def _check_out(out: str, is_picture: bool) -> None:
    """Raise UserError, before anything is computed, where the result could not be written."""
    if not Path(out).absolute().parent.is_dir():
        raise UserError(f"-o {out}: there is no folder {Path(out).parent}; create it, or name another")
    if is_picture:
        check_picture_name(out)


def main() -> None:
    args = build_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    if not args.checkpoint:
        raise UserError(f"no checkpoint: give --checkpoint FILE, or set {VARIABLE}")
    if out := getattr(args, "out", None):
        _check_out(out, is_picture=args.command != "encode")
    from simla.loading import load

    model = load(args.checkpoint, args.device, args.dtype, args.config, args.text_encoder)
    result = args.function(model, args)
    print(json.dumps(result, allow_nan=False) if args.json else describe(result))


def run() -> None:
    """Run the command `simla` as it is installed."""
    run_command(main)


if __name__ == "__main__":
    run()
