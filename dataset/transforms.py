"""From an image file to the tensors of the model: loading, crops, flips, RandAugment, normalisation.

Nothing here reads global random state. Every draw comes from the item's own `ItemRandom`, so a sample is the
same whichever worker or rank reads it. R is the side of the square output, in pixels.
"""

import hashlib
import math
import random
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dataset.randaugment import RandAugment

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class BadImage(Exception):
    def __init__(self, path: str | Path, cause: str) -> None:
        super().__init__(path, cause)  # both, so that it survives the pickling between worker and loader
        self.path, self.cause = str(path), cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}"


def load_image(path: str | Path) -> Image.Image:
    """The image as RGB, upright by its EXIF tag, transparency over white. Raises `BadImage`."""
    try:
        with Image.open(path) as image:
            image.load()
            with suppress(Exception):  # broken EXIF does not spoil the pixels
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which PIL would clip to 8 instead of scaling
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            if not image.has_transparency_data:
                return image.convert("RGB")
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except Exception as error:  # each decoder has its own types
        raise BadImage(path, _cause(Path(path), error)) from error


def _cause(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image" if path.stat().st_size else "empty file"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    return f"{type(error).__name__}: {error}"


class ItemRandom:
    """The random draws of one item, a function of (seed, epoch, index) alone."""

    def __init__(self, seed: int, epoch: int, index: int) -> None:
        self._key = hashlib.blake2b(f"{seed},{epoch},{index}".encode(), digest_size=16).digest()

    @cached_property
    def python(self) -> random.Random:
        return random.Random(int.from_bytes(self._key[:8], "little"))

    @cached_property
    def numpy(self) -> np.random.RandomState:
        # The other half of the key: both are Mersenne twisters, and equal seeds would make equal draws.
        return np.random.RandomState(np.frombuffer(self._key[8:], "<u4"))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)


def normalise(image: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] -> the encoder's scale, by the channel means and deviations of CLIP."""
    return image.sub(_MEAN).div_(_STD)


def resized_crop(image: Image.Image, box: Box | None, res: int, mirrored: bool = False) -> np.ndarray:
    """The box of the image (None: all of it) at (res, res, 3) uint8, bicubic with antialiasing."""
    if box is not None:
        image = image.crop(box)
    pixels = np.array(image.resize((res, res), Image.Resampling.BICUBIC))
    return cv2.flip(pixels, 1) if mirrored else pixels


def draw_crop(width: int, height: int, min_scale: float, rng: random.Random) -> Box:
    """The draw of torchvision's RandomResizedCrop: area min_scale..1 of the image, aspect ratio 3/4..4/3."""
    log_ratio = math.log(4 / 3)
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1)
        aspect = math.exp(rng.uniform(-log_ratio, log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    # Too long or too tall an image: its middle, at the nearest aspect ratio that is allowed.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class TrainTransform:
    """Fine-tuning: crop (`crop=False`, as in grounding: the whole image), flip, RandAugment, normalise."""

    def __init__(
        self,
        image_res: int,
        min_scale: float = 0.5,
        randaugment: tuple[int, float] = (2, 7),
        crop: bool = True,
        flip: bool = True,
    ) -> None:
        """`min_scale`: least share of the image's area in a crop. `randaugment`: operations, level of 10."""
        self.image_res, self.min_scale, self.crop, self.flip = image_res, min_scale, crop, flip
        self.augment = RandAugment(*randaugment)

    def __call__(self, image: Image.Image, rng: ItemRandom, may_flip: bool = True) -> Tensor:
        """RGB -> (3, R, R) float32. `may_flip`: False where the text names a side."""
        box, mirrored = self.draw_view(image, rng, may_flip)
        pixels = self.augment(resized_crop(image, box, self.image_res, mirrored), rng.numpy)
        return normalise(to_tensor(pixels))

    def draw_view(self, image: Image.Image, rng: ItemRandom, may_flip: bool) -> tuple[Box | None, bool]:
        """The part of the image to show, and whether mirrored."""
        box = draw_crop(*image.size, self.min_scale, rng.python) if self.crop else None
        heads = rng.python.random() < 0.5  # drawn in any case, so that the text does not shift later draws
        return box, heads and self.flip and may_flip


class PretrainTransform:
    """Pre-training: the encoder's view, and a smaller one of the same crop for the dVAE's visual tokens."""

    def __init__(
        self,
        image_res: int,
        min_scale: float = 0.2,
        randaugment: tuple[int, float] = (2, 7),
        code_res: int | None = None,
        independent_code_view: bool = False,
        flip: bool = True,
    ) -> None:
        """`code_res`: side of the dVAE's view; None: no such view. `independent_code_view`: its own crop,
        flip and RandAugment, as in the released code; its tokens then do not match the encoder's patches."""
        self.encoder_view = TrainTransform(image_res, min_scale, randaugment, flip=flip)
        self.code_res, self.independent_code_view = code_res, independent_code_view

    def __call__(
        self, image: Image.Image, rng: ItemRandom, may_flip: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """RGB -> (3, R, R) float32 normalised, and (3, code_res, code_res) float32 in [0, 1] or None."""
        view = self.encoder_view
        box, mirrored = view.draw_view(image, rng, may_flip)
        encoder_pixels = view.augment(resized_crop(image, box, view.image_res, mirrored), rng.numpy)
        code_image = None
        if self.code_res is not None:
            if self.independent_code_view:
                box, mirrored = view.draw_view(image, rng, may_flip)
            code_pixels = resized_crop(image, box, self.code_res, mirrored)
            if self.independent_code_view:
                code_pixels = view.augment(code_pixels, rng.numpy)
            code_image = to_tensor(code_pixels)
        return normalise(to_tensor(encoder_pixels)), code_image


class EvalTransform:
    def __init__(self, image_res: int) -> None:
        self.image_res = image_res

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB -> (3, R, R) float32."""
        return normalise(to_tensor(resized_crop(image, None, self.image_res)))
