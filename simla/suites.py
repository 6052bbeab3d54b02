"""Scores the rows of an alignment suite: every image is encoded once, every text once, each pair read once.

I images and T texts of a row; model: a `Simla`, whose module imports this one.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simla.dataset.images import BadImage
from simla.dataset.text import MAX_TEXT_TOKENS
from simla.evaluation.alignment.blind import pseudo_likelihood
from simla.evaluation.alignment.rows import Row
from simla.evaluation.alignment.scores import ALL
from simla.evaluation.rerank import SIZES, make_groups, score_group
from simla.inputs import OneImage, Picture, read_image, read_pictures
from simla.utils import UserError, log, with_progress

UNREADABLE = "rows with an image that cannot be read"
LOG_STEPS = 10


class Scored(NamedTuple):
    """rows: without those of `left_out`, cause -> number; scores: name -> a matrix (I, T) for each row."""

    rows: list[Row]
    scores: dict[str, list[np.ndarray]]
    left_out: dict[str, int]


def score_rows(model: Any, rows: list[Row]) -> Scored:
    """Return the cosine, the log-odds of a match and their weighted sum of each row's images and texts."""
    if not rows:
        raise UserError("no rows given: the list is empty")
    for number, row in enumerate(rows):
        _check(row, rows[0], f"row {number}")
    texts = {text: number for number, text in enumerate(dict.fromkeys(t for row in rows for t in row.texts))}
    ids, mask = model._captions(list(texts), MAX_TEXT_TOKENS)
    text_feats = model._encode_captions(ids, mask)
    read = {text: tuple(ids[number].tolist()) for text, number in texts.items()}
    if alike := sum(len({read[text] for text in row.texts}) < len(row.texts) for row in rows):
        log.warning(f"{alike} of {len(rows)} rows have texts that are read alike, so that none can be right")
    users = defaultdict(list)  # image and box -> the rows, and which of their images it is
    for row_number, row in enumerate(rows):
        for place, image in enumerate(row.images):
            users[_key(image, row.box)].append((row_number, place))
    scores = {
        name: [np.zeros((len(r.images), len(r.texts)), np.float32) for r in rows] for name in ("itc", "itm")
    }
    broken: dict[int, str] = {}
    for keys, pictures in _batches(model, rows, users):
        good = []
        for key, picture in zip(keys, pictures, strict=True):
            if isinstance(picture, BadImage):
                broken |= {row_number: str(picture) for row_number, _ in users[key]}
            else:
                good.append((key, picture))
        if not good:
            continue
        wanted = [{texts[text] for row, _ in users[key] for text in rows[row].texts} for key, _ in good]
        columns = torch.tensor(sorted(set().union(*wanted)))
        mark = torch.zeros(len(good), len(columns), dtype=torch.bool)
        for number, numbers in enumerate(wanted):
            mark[number] = torch.isin(columns, torch.tensor(sorted(numbers)))
        itc, itm = _score(
            model, [picture for _, picture in good], mark, ids[columns], mask[columns], text_feats[columns]
        )
        column_of = {text: column for column, text in enumerate(columns.tolist())}
        for number, (key, _) in enumerate(good):
            for row, place in users[key]:
                here = [column_of[texts[text]] for text in rows[row].texts]
                scores["itc"][row][place], scores["itm"][row][place] = itc[number, here], itm[number, here]
    left_out = {UNREADABLE: len(broken)} if broken else {}
    if broken:
        first = next(iter(broken.values()))
        log.warning(f"{len(broken)} of {len(rows)} {UNREADABLE} are left out; the first: {first}")
    kept = [number for number in range(len(rows)) if number not in broken]
    scores = {name: [matrices[number] for number in kept] for name, matrices in scores.items()}
    weight = model.config["score_itc_weight"]
    pairs = zip(scores["itm"], scores["itc"], strict=True)
    scores["itm+itc"] = [itm + np.float32(weight) * itc for itm, itc in pairs]
    return Scored([rows[number] for number in kept], scores, left_out)


def _check(row: Row, first: Row, where: str) -> None:
    """Raise UserError where a row is none, or of another shape than the first, which would be scored
    otherwise.
    """
    num_images, num_texts = len(row.images), len(row.texts)
    if not num_texts or not (num_images == 1 or num_images == num_texts == 2):
        what = f"{num_images} images and {num_texts} texts"
        raise UserError(f"{where} has {what}; expected one image with its texts, or two of both")
    numbers = (None, *range(num_texts))
    if not len(row.right) == len(set(row.right)) == num_images or any(t not in numbers for t in row.right):
        raise UserError(f"{where}: right is {row.right}; expected for each image the number of another text")
    if row.kind == ALL:
        raise UserError(f"{where} is of kind {ALL!r}, as the group of all rows is called; name it otherwise")
    if num_texts > 1 and None in row.right:
        raise UserError(f"{where} has several texts, and none that is right for an image")
    shapes = [(len(r.images), len(r.texts) > 1, bool(r.ratings)) for r in (row, first)]
    if shapes[0] != shapes[1] or (row.ratings and num_texts > 1):
        raise UserError(f"{where} is not of the shape of row 0; score rows of one shape at a time")


def _key(image: OneImage, box: tuple | None) -> tuple:
    return (image if isinstance(image, str) else id(image)), box and tuple(box)


def _batches(model: Any, rows: list[Row], users: dict) -> Iterator[tuple[list, list[Picture | BadImage]]]:
    """Yield keys of `users` and their images read, batch by batch."""
    size, keys = model.config["batch_size_test"], list(users)
    parts = [keys[start : start + size] for start in range(0, len(keys), size)]
    for part in with_progress(parts, len(parts), "Suite, batches of images", LOG_STEPS):
        shown = []
        for key in part:
            row, place = users[key][0]
            shown.append(_cut(rows[row].images[place], rows[row].box))
        good = iter(
            read_pictures(
                [image for image in shown if not isinstance(image, BadImage)], model.config["image_res"]
            )
        )
        yield part, [image if isinstance(image, BadImage) else next(good) for image in shown]


def _cut(image: OneImage, box: tuple | None) -> Any:
    """Return the image, or the part of it in the box [x, y, width, height]; BadImage if it cannot be read."""
    if box is None:
        return image
    try:
        x, y, width, height = box
        return read_image(image).crop((x, y, x + width, y + height))
    except BadImage as error:
        return error


def _score(
    model: Any, pictures: list[Picture], wanted: Tensor, ids: Tensor, mask: Tensor, text_feats: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and log-odds of a match, both (I, T), the latter 0 where not wanted (I, T)."""
    with model._scoring():
        states, feats = model.model.encode_image(model._normalised([picture.pixels for picture in pictures]))
        flat = torch.empty(int(wanted.sum()) + 1, 2, device=model.device)
        sizes = SIZES.get(model.device.type, SIZES["cuda"])
        for group in make_groups(wanted, mask.sum(1).cpu(), *sizes):
            score_group(model.model, group, states, ids, mask, flat)
    cosines = model._finite(feats.float().cpu() @ text_feats.T, "similarities")
    logits = model._finite(flat[:-1].cpu(), "matching scores")
    odds = torch.zeros(wanted.shape)
    odds[wanted] = logits[:, 1] - logits[:, 0]
    return cosines.numpy(), odds.numpy()


def blind_scores(model: Any, rows: list[Row]) -> list[np.ndarray]:
    """Return of each row the pseudo-likelihood of its texts, the same for each of its images, (I, T)."""
    texts = list(dict.fromkeys(text for row in rows for text in row.texts))
    ids, mask = model._captions(texts, MAX_TEXT_TOKENS)

    def predict(masked: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        hidden = model.model.text_encoder(masked, mask)  # (B, T, D)
        return model.word_head(hidden[torch.arange(len(hidden)), positions])

    def progress(parts: tuple[Tensor, ...]) -> Iterator[Tensor]:
        return with_progress(parts, len(parts), "Blind baseline, batches of masked texts", LOG_STEPS)

    with model._scoring():
        values = pseudo_likelihood(predict, ids, mask, model.tokenizer.mask_token_id, progress)
    likelihood = dict(zip(texts, model._finite(values, "likelihoods of texts").tolist(), strict=True))
    return [np.array([[likelihood[text] for text in row.texts]] * len(row.images)) for row in rows]
