"""Makes the tensors of the model from an image: crops, flips, RandAugment, normalisation.

Items and batches hold bytes, which become floats on the device (`unit_range`, `normalise`): a quarter of the
memory and of the traffic between processes. Nothing here reads global random state. Every draw comes from the
item's `ItemRandom`, so a sample is the same whichever worker or rank reads it. R is the side of the square
output, in pixels.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from simla.dataset.images import REDUCED, JpegFile
from simla.dataset.randaugment import rand_augment

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# What evaluation makes of an image, for those who keep what came of it; another filter gets another name.
EVALUATION_VIEW = {"resize": "PIL bicubic", "mean": [*MEAN], "std": [*STD]}
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


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


# ---- pixels and tensors


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Return (H, W, 3) as (3, H, W), both uint8."""
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    cv2.split(pixels, list(planes))
    return torch.from_numpy(planes)


@lru_cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest byte, and mean and deviation (3, 1, 1), float32 whatever torch's default is."""
    made = {"dtype": torch.float32, "device": device}
    mean, std = (torch.tensor(values, **made).view(3, 1, 1) for values in (MEAN, STD))
    return torch.tensor(255.0, **made), mean, std


def unit_range(images: Tensor) -> Tensor:
    """Return (..., 3, H, W) uint8 as float32 in [0, 1]."""
    # By a tensor: a GPU multiplies by the reciprocal of a Python number, which rounds another way.
    return images / _constants(images.device)[0]


def normalise(images: Tensor) -> Tensor:
    """Return (..., 3, H, W) uint8 as float32 on the encoder's scale, by CLIP's means and deviations."""
    _, mean, std = _constants(images.device)
    return unit_range(images).sub_(mean).div_(std)


# ---- crops


class View(NamedTuple):
    """A view to show: a box of the image (None: all of it), whether mirrored, at (res, res) pixels."""

    box: Box | None
    mirrored: bool
    res: int


def crops(image: Image.Image | JpegFile, views: Sequence[View]) -> list[np.ndarray]:
    """Return the views of an RGB image, (res, res, 3) uint8 each. Raises `BadImage`.

    A JPEG is decoded once, at the smallest scale that still has a pixel for each pixel of the views. Their
    edges then move to its whole pixels, by at most half a pixel of the view.
    """
    boxes = [view.box or (0, 0, *image.size) for view in views]
    is_jpeg, scale = isinstance(image, JpegFile), 1
    if is_jpeg:
        scale = min(reduction(box, view.res) for box, view in zip(boxes, views, strict=True))
    pixels = image.decode(scale) if is_jpeg else np.array(image)
    shown = []
    for view, box in zip(views, boxes, strict=True):
        left, top, right, bottom = ((edge + scale // 2) // scale for edge in box)
        crop = resize(pixels[top:bottom, left:right], view.res)
        if is_jpeg:
            crop = cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)
        shown.append(cv2.flip(crop, 1) if view.mirrored else crop)
    return shown


def reduction(box: Box, res: int) -> int:
    """Return the smallest scale at which a decoded JPEG's box is no smaller than (res, res) pixels."""
    side = min(box[2] - box[0], box[3] - box[1])
    return next(scale for scale in REDUCED if scale == 1 or side >= scale * res)


def resize(pixels: np.ndarray, res: int) -> np.ndarray:
    """Return (H, W, 3) uint8 as (res, res, 3), by PIL's antialiased bicubic filter, to a level, at several
    times the speed.
    """
    planes = torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=(res, res), mode="bicubic", antialias=True)
    return cv2.merge(list(planes[0].numpy()))


def draw_crop(width: int, height: int, min_scale: float, rng: random.Random) -> Box:
    """Draw as torchvision's RandomResizedCrop: area min_scale..1 of the image, aspect ratio 3/4..4/3."""
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


@dataclass(frozen=True)
class TrainTransform:
    """Fine-tuning: crop (`crop=False`, as in grounding: the whole image), flip, RandAugment."""

    image_res: int
    min_scale: float = 0.5  # least share of the image's area in a crop
    randaugment: tuple[int, float] = (2, 7)  # operations, their level of 10
    crop: bool = True

    def __call__(self, image: Image.Image | JpegFile, rng: ItemRandom, may_flip: bool = True) -> Tensor:
        """Return (3, R, R) uint8. may_flip: False where the text names a side. Raises `BadImage`."""
        (pixels,) = crops(image, [self.draw_view(image.size, rng, may_flip)])
        return to_tensor(rand_augment(pixels, rng.numpy, *self.randaugment))

    def draw_view(self, size: tuple[int, int], rng: ItemRandom, may_flip: bool) -> View:
        """Return the view to show of an image of this width and height."""
        box = draw_crop(*size, self.min_scale, rng.python) if self.crop else None
        heads = rng.python.random() < 0.5  # drawn in any case, so that the text does not shift later draws
        return View(box, heads and may_flip, self.image_res)


@dataclass(frozen=True)
class PretrainTransform(TrainTransform):
    """Pre-training: the encoder's view, and a smaller one of the same crop for the dVAE's visual tokens."""

    min_scale: float = 0.2
    code_res: int = field(kw_only=True)  # side of the dVAE's view
    # Its crop, flip and RandAugment are drawn anew, as in the released code; its tokens then do not match
    # the encoder's patches.
    independent_code_view: bool = False

    def __call__(
        self, image: Image.Image | JpegFile, rng: ItemRandom, may_flip: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return (3, R, R) and (3, code_res, code_res) uint8. Raises `BadImage`."""
        views = [self.draw_view(image.size, rng, may_flip)]
        if self.independent_code_view:
            views.append(self.draw_view(image.size, rng, may_flip)._replace(res=self.code_res))
        elif self.code_res > self.image_res:
            views.append(views[0]._replace(res=self.code_res))
        pixels, *code = crops(image, views)
        # Half of the encoder's pixels, which is what the source would give but for rounding.
        code_pixels = code[0] if code else resize(pixels, self.code_res)
        pixels = rand_augment(pixels, rng.numpy, *self.randaugment)
        if self.independent_code_view:
            code_pixels = rand_augment(code_pixels, rng.numpy, *self.randaugment)
        return to_tensor(pixels), to_tensor(code_pixels)


@dataclass(frozen=True)
class EvalTransform:
    """Evaluation: all of the image, resized by PIL itself, to the level."""

    image_res: int

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an RGB image as (3, R, R) uint8."""
        resized = image.resize((self.image_res, self.image_res), Image.Resampling.BICUBIC)
        return to_tensor(np.asarray(resized))
