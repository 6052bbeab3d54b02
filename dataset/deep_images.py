"""Pictures with more than 8 bits a channel, whose values the file or their kind puts between black and white.

PIL clips or cuts them to 8 bits, so that a picture of 12 bits, of 32 or of floats comes out black or white.
"""

from typing import Any

import cv2
import numpy as np
from PIL import Image

from simla.dataset.png_texts import SIGNATURE, chunks
from simla.utils import log

# TIFF's tags and their values.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT, S_MIN_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 258, 262, 339, 340, 341
WHITE_IS_ZERO, SIGNED = 0, 2
DARK = 16  # shades of 256, that a picture with 4 bits less than its range uses at most
REMEDY = "save it with 8 bits, or with its range in the file (PNG: sBIT, TIFF: SMaxSampleValue)"

_named_dark: set[str] = set()  # modes of which a dark picture was named: the first is enough


class WrongRange(ValueError):
    """A picture's values do not lie as its file or its kind says."""


def value_range(image: Image.Image, content: bytes = b"") -> tuple[float, float] | None:
    """Return the values that mean black and white; None for a picture of 8 bits or less.

    The file says them: TIFF's SMinSampleValue and SMaxSampleValue, BitsPerSample and SampleFormat, and
    PhotometricInterpretation 0, which puts white first; PNG's sBIT. Else the kind does: whole numbers from 0
    up to the largest, floats from 0 to 1. content: the file. Call it before the image is turned.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        bits = 16 if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") else 31
        if BITS_PER_SAMPLE in tags:
            bits = _first(tags[BITS_PER_SAMPLE]) - (_first(tags.get(SAMPLE_FORMAT, 1)) == SIGNED)
    elif _first(tags.get(BITS_PER_SAMPLE, 8)) == 16 or _png_depth(content) == 16:
        bits = 16
    else:
        return None
    if image.format == "PNG" and (significant := _significant_bits(content)):
        # The standard has the encoder shift values up to all 16 bits, which as many do not.
        if image.mode.startswith("I"):
            most = image.getextrema()[1]
        else:
            most = max(high for _, high in image.convert("RGB").getextrema()) << 8 | 0xFF
        bits = significant if most < 1 << significant else bits
    black = _first(tags.get(S_MIN_SAMPLE_VALUE, 0))
    white = _first(tags.get(S_MAX_SAMPLE_VALUE, 1.0 if image.mode == "F" else (1 << bits) - 1))
    is_negative = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and image.mode.startswith(("I", "F"))
    return (white, black) if is_negative else (black, white)


def eight_bits(image: Image.Image, black: float, white: float, content: bytes, name: str) -> Image.Image:
    """Return the loaded image with 8 bits a channel. content: its file; name: for messages.

    Raises WrongRange, naming mode and ranges, for values that are not between black and white, and where
    values that differ all become one shade: they were written in another range than the file says.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        deep, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(_scaled(deep, black, white, image.mode, name))
        if transparent is not None:
            image.putalpha(Image.fromarray(deep != transparent).convert("L"))
        return image
    if (black, white) != (0, 0xFFFF):  # PIL has kept the upper 8 of 16 bits
        deep = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if deep is not None and deep.ndim == 3 and deep.dtype == np.uint16:
            pixels = _scaled(deep[..., :3], black, white, f"16-bit {image.mode}", name)
            colours = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))  # from blue, green, red
            if deep.shape[2] == 4:
                whole = white if deep[..., 3].max() <= white else 0xFFFF
                colours.putalpha(Image.fromarray((deep[..., 3] * (255 / whole)).astype(np.uint8)))
            return colours
    shades = np.asarray(image.convert("RGB"))
    if shades.max() < DARK:
        _say_dark(f"16-bit {image.mode}", name, int(shades.max()) << 8 | 0xFF, white)
    return image


def _scaled(deep: np.ndarray, black: float, white: float, mode: str, name: str) -> np.ndarray:
    """Return uint8 of the same shape."""
    low, high, least, most = min(black, white), max(black, white), deep.min(), deep.max()
    ranges = f"mode {mode}, values {least:g} to {most:g}, black {black:g}, white {white:g}"
    if not (low <= least and most <= high and low < high):  # true of NaN
        raise WrongRange(f"values out of range: {ranges}; {REMEDY}")
    if deep.dtype.kind in "iu":
        shades = (deep.astype(np.float64) - low) * 256 // (high - low + 1)
    else:
        shades = np.rint((deep.astype(np.float64) - low) * 255 / (high - low))
    if least != most and shades.min() == shades.max():
        raise WrongRange(f"one shade: {ranges}; {REMEDY}")
    if least != most and shades.max() < DARK:
        _say_dark(mode, name, most, white)
    return (255 - shades if black > white else shades).astype(np.uint8)


def _say_dark(mode: str, name: str, most: float, white: float) -> None:
    if mode not in _named_dark:
        _named_dark.add(mode)
        log.warning(
            f"{name}: mode {mode}, values up to {most:g} of {white:g}, is read as a dark picture; if it has "
            f"fewer bits, {REMEDY}. Others of this mode are not named"
        )


def _first(value: Any) -> float:
    """Return a tag's value for the first channel."""
    return value[0] if isinstance(value, tuple | list) else value


def _png_depth(content: bytes) -> int:
    """Return the bits a channel of a PNG file, 0 of any other."""
    return content[24] if content.startswith(SIGNATURE) and len(content) > 24 else 0


def _significant_bits(content: bytes) -> int:
    """Return the largest number in a PNG file's chunk sBIT, which stands before the palette and the pixels; 0
    where it has none.
    """
    for kind, begin, end in chunks(content):
        if kind == b"sBIT":
            return max(content[begin + 8 : end - 4], default=0)
        if kind in (b"PLTE", b"IDAT"):
            break
    return 0
