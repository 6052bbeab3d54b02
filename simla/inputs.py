"""Makes the models' inputs of people's: one or many paths, PIL images, arrays, tensors or texts.

R is the side of the model's square input, in pixels.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from simla.dataset.deep_images import WrongRange
from simla.dataset.images import BadImage, load_image, upright_rgb
from simla.dataset.text import lowers_case
from simla.dataset.transforms import EvalTransform
from simla.utils import UserError, num_cores

# A path, a PIL image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8.
OneImage: TypeAlias = "str | Path | Image.Image | np.ndarray | Tensor"
Images: TypeAlias = "OneImage | Sequence[OneImage]"  # arrays and tensors with four axes are several images
Texts: TypeAlias = "str | Sequence[str]"

MAX_NAMED = 10  # texts by their numbers in a warning
log_texts = logging.getLogger("simla.texts")


class Picture(NamedTuple):
    """pixels (3, R, R) uint8; height and width that the image had, in pixels."""

    pixels: Tensor
    height: int
    width: int


def listed(inputs: object, what: str) -> tuple[list, bool]:
    """Return one input or several as a list, and whether it was a single one. Raises UserError for none."""
    if isinstance(inputs, np.ndarray | Tensor):
        is_single = inputs.ndim < 4
    else:
        is_single = isinstance(inputs, str | bytes | Path | Image.Image) or not isinstance(inputs, Iterable)
    inputs = [inputs] if is_single else list(inputs)
    if not inputs:
        raise UserError(f"no {what}s given: the list is empty")
    return inputs, is_single


def read_image(image: OneImage, name: str = "image") -> Image.Image:
    """Return the image in RGB, upright, as the task scripts read it. Raises BadImage for a file or PIL image
    that cannot be read, and UserError for what is no image; name: how to call it.
    """
    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise UserError(f"{name} has no pixels: it is {image.width} x {image.height}")
        try:
            return upright_rgb(_copy(image), name=name)
        except Exception as error:  # a lazily opened file is decoded only here
            kind = "" if isinstance(error, WrongRange) else f"{type(error).__name__}: "
            raise BadImage(name, f"{kind}{error}") from error
    if not isinstance(image, np.ndarray | Tensor):
        raise UserError(
            f"{name} is a {type(image).__name__}; expected a path, a PIL image, a numpy array (H, W, 3) or a "
            "tensor (3, H, W)"
        )
    wanted, channels = ("(H, W, 3)", -1) if isinstance(image, np.ndarray) else ("(3, H, W)", 0)
    kind = str(image.dtype).removeprefix("torch.")
    if image.ndim != 3 or image.shape[channels] != 3 or 0 in image.shape or kind != "uint8":
        what = f"{kind} of shape {tuple(image.shape)}"
        raise UserError(f"{name} is {what}; expected uint8 {wanted}, RGB from 0 to 255")
    pixels = image if isinstance(image, np.ndarray) else image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _copy(image: Image.Image) -> Image.Image:
    """Return a copy that still knows its file's format and, of TIFF, its tags."""
    copied = image.copy()
    copied.format = image.format
    if hasattr(image, "tag_v2"):
        copied.tag_v2 = image.tag_v2
    return copied


def read_pictures(images: Sequence[OneImage], image_res: int, first: int = 0) -> list[Picture | BadImage]:
    """Return the images resized as for evaluation, or the error in place of one that cannot be read. One that
    is there several times is read once. first: the number of the first image, for messages.
    """
    transform = EvalTransform(image_res)

    def read(item: tuple[int, OneImage]) -> Picture | BadImage:
        try:
            image = read_image(item[1], f"image {item[0]}")
        except BadImage as error:
            return error
        return Picture(transform(image), image.height, image.width)

    different = {id(image): (number, image) for number, image in enumerate(images, first)}
    with ThreadPoolExecutor(min(num_cores(), len(different))) as threads:
        pictures = dict(zip(different, threads.map(read, different.values()), strict=True))
    return [pictures[id(image)] for image in images]


def good_pictures(images: Sequence[OneImage], image_res: int, first: int = 0) -> list[Picture]:
    """Return what `read_pictures` does. Raises UserError that names the first that cannot be read."""
    pictures = read_pictures(images, image_res, first)
    for picture in pictures:
        if isinstance(picture, BadImage):
            raise UserError(f"{picture}; give another image or leave it out") from picture
    return pictures


def check_count(value: int, name: str, least: int = 1) -> int:
    """Return the value. Raises UserError where it is no whole number from `least` on."""
    if not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name} {value!r}: expected a whole number from {least} on")
    return value


def read_texts(
    texts: Sequence[str], tokenizer, clean: Callable[..., str], max_words: int, max_tokens: int
) -> list[str]:
    """Return the texts cleaned, as the model reads them up to `max_tokens`, [CLS] being one.

    clean: of `dataset.text`. Which texts are cut, and which the vocabulary mostly lacks, is logged by their
    numbers. Raises UserError for what is no text, is no UTF-8, or holds nothing that the tokenizer reads: it
    drops characters without a width, control characters and lone accents.
    """
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {number} is a {type(text).__name__}, expected str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text {number}, {text!r}, is no UTF-8 at character {error.start}; save or type it as UTF-8"
            ) from error
    clean = partial(clean, lower=lowers_case(tokenizer.backend_tokenizer))
    cleaned = [clean(text, max_words=max_words) for text in texts]
    rows = [ids[1:max_tokens] for ids in tokenizer(cleaned)["input_ids"]]
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"text {number}, {texts[number]!r}, has no word")
    whole = tokenizer([clean(text, max_words=sys.maxsize) for text in texts])["input_ids"]
    cut = [number for number, row in enumerate(rows) if len(row) < len(whole[number]) - 1]
    _say(cut, texts, f"read up to {max_words} words and {max_tokens} tokens, and not to the end")
    unknown = [n for n, row in enumerate(rows) if 2 * row.count(tokenizer.unk_token_id) > len(row)]
    what = f"mostly {tokenizer.unk_token}: the vocabulary lacks the words, and results mean little"
    _say(unknown, texts, what)
    return cleaned


def _say(numbers: list[int], texts: Sequence[str], what: str) -> None:
    """Warn once of all the texts of these numbers."""
    if len(numbers) == 1:
        log_texts.warning(f"text {numbers[0]}, {_shortened(texts[numbers[0]])!r}, is {what}")
    elif numbers:
        listed = ", ".join(map(str, numbers[:MAX_NAMED])) + ", ..." * (len(numbers) > MAX_NAMED)
        log_texts.warning(f"{len(numbers)} of {len(texts)} texts ({listed}) are {what}")


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def paired(first: tuple[list, bool], second: tuple[list, bool], names: str) -> tuple[list, list, bool]:
    """Return two results of `listed` as pairs, a single input going with all of the others, and whether both
    were single. Raises UserError where the numbers differ.
    """
    (ours, our_single), (theirs, their_single) = first, second
    total = max(len(ours), len(theirs))
    ours, theirs = ours * (total if our_single else 1), theirs * (total if their_single else 1)
    if len(ours) != len(theirs):
        numbers = f"{len(ours)} and {len(theirs)} {names}"
        raise UserError(f"{numbers}: give as many of both, or a single one of either")
    return ours, theirs, our_single and their_single
