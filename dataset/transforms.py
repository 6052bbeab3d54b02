"""From an image file to the tensors of the model: loading, crops, flips, RandAugment, normalisation.

Items and batches hold bytes, which become floats on the device (`unit_range`, `normalise`): a quarter of the
memory and of the traffic between processes. Nothing here reads global random state. Every draw comes from the
item's `ItemRandom`, so a sample is the same whichever worker or rank reads it. R is the side of the square
output, in pixels.
"""

import errno
import hashlib
import io
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from simla.dataset.deep_images import WrongRange, eight_bits, value_range
from simla.dataset.png_texts import without_long_texts
from simla.dataset.randaugment import rand_augment
from simla.utils import CONTENT_BYTES, PICTURE, file_status, first_line, other_content

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# What evaluation makes of an image, for those who keep what came of it; another filter gets another name.
EVALUATION_VIEW = {"resize": "PIL bicubic", "mean": [*MEAN], "std": [*STD]}
REDUCED = {  # scale -> the decoder's flag for a picture of 1/scale, which it makes in less time
    8: cv2.IMREAD_REDUCED_COLOR_8,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    1: cv2.IMREAD_COLOR,
}

# What a file on a network or a failing disk may recover from; a path that is wrong stays wrong.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ENOTCONN}
TRANSIENT |= {errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
TRANSIENT |= {getattr(errno, "EREMOTEIO", errno.EIO)}  # Linux's
RETRY_SECONDS = (0.1, 0.5, 2.0)
UPRIGHT, SIDEWAYS = 1, (5, 6, 7, 8)  # EXIF orientations; under the latter width and height change places
MAX_CAUSE = 120  # letters
Image.init()
FORMATS = [name for name in Image.ID if name != "EPS"]  # a program, which Ghostscript would run

Source = str | Path | bytes | BinaryIO
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class BadImage(Exception):
    """An image that cannot be read. `cause`: what is wrong, and after a colon the details, if any."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(name, cause)  # both, so that it survives the pickling between worker and loader
        self.path, self.cause = name, cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}"


def load_image(source: Source, name: str = "") -> Image.Image:
    """Return the image as RGB, upright by its EXIF tag, transparency over white, of several pictures the
    first. Raises `BadImage`.

    source: a path, the content of a file, or one opened; name: what to call it where that is no path.
    """
    with _opened(source, name) as (image, content, name):
        return upright_rgb(image, content, name)


def open_image(source: Source, name: str = "") -> "Image.Image | JpegFile":
    """Return what `load_image` does; of a JPEG in RGB or grey that is upright only the header is read. Raises
    `BadImage`.
    """
    with _opened(source, name) as (image, content, name):
        # Of other formats it would decode the picture, and hide that it is damaged.
        if image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) == UPRIGHT:
            return JpegFile(name, content, image.size)
        return upright_rgb(image, content, name)


def image_size(path: str | Path) -> tuple[int, int]:
    """Return width and height of what `load_image` does; a JPEG is not decoded for it. Raises `BadImage`."""
    with _opened(path) as (image, content, name):
        if image.format != "JPEG":  # PIL may turn others only as it decodes them
            return upright_rgb(image, content, name).size
        return image.size[::-1] if _orientation(image) in SIDEWAYS else image.size


def open_content(content: bytes, formats: list[str] | None = FORMATS) -> Image.Image:
    """Return the image of a file's content, of which the header alone is read; formats None: all that PIL
    knows. Raises what PIL raises, of what is no image `UnidentifiedImageError` with what it is, or "".
    """
    try:
        return Image.open(io.BytesIO(without_long_texts(content)), formats=formats)
    except UnidentifiedImageError as error:
        what = other_content(content[:CONTENT_BYTES])
        raise UnidentifiedImageError("" if what == PICTURE else what) from error


def upright_rgb(image: Image.Image, content: bytes = b"", name: str = "an image") -> Image.Image:
    """Return the image as RGB, upright by its EXIF tag, transparency over white, more than 8 bits scaled.

    The image itself may be turned. content: its file, if there is one; name: for messages.
    """
    image.load()
    ends = value_range(image, content)
    with suppress(Exception):  # broken EXIF does not spoil the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if ends is not None:
        image = eight_bits(image, *ends, content, name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class JpegFile(NamedTuple):
    """A JPEG that waits to be decoded until the size to decode it at is known."""

    name: str
    content: bytes
    size: tuple[int, int]  # width, height

    def decode(self, scale: int) -> np.ndarray:
        """Return (H, W, 3) uint8 in the order blue, green, red, at 1/scale of the size. Raises `BadImage`."""
        with _bad_image(self.name):
            flags = REDUCED[scale] | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(self.content, np.uint8), flags)
        if pixels is None:  # PIL reads it, or says what is wrong
            image = load_image(self.content, self.name).reduce(scale)
            pixels = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)
        return pixels


@contextmanager
def _opened(source: Source, name: str = "") -> Iterator[tuple[Image.Image, bytes, str]]:
    """Give the image, of which the header alone is read, the file's content and name. Raises `BadImage`."""
    is_path = isinstance(source, str | Path)
    name = name or str(source if is_path else getattr(source, "name", "an image"))
    with _bad_image(name):
        content = _read(Path(source)) if is_path else source if isinstance(source, bytes) else source.read()
        if not content:
            raise BadImage(name, "empty file")
        with open_content(content) as image:
            yield image, content, name


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # broken EXIF
        return image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    return UPRIGHT


def _read(path: Path) -> bytes:
    """Return all of the file. Where the network or a disk fails it is tried again, RETRY_SECONDS later."""
    for seconds in RETRY_SECONDS:
        try:
            file_status(path)
            return path.read_bytes()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            time.sleep(seconds)
    return path.read_bytes()


@contextmanager
def _bad_image(name: str) -> Iterator[None]:
    """Make a `BadImage` of whatever is raised."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # each decoder has its own types
        raise BadImage(name, _cause(error)) from error


def _cause(error: Exception) -> str:
    text = first_line(error)
    if isinstance(error, WrongRange):
        return text
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if isinstance(error, UnidentifiedImageError):
        text = f"not an image: {error}".removesuffix(": ")
    elif isinstance(error, OSError) and error.errno is not None:
        text = f"cannot be read: {error.strerror}"
    elif "truncated" in text.lower():
        text = f"truncated: {text}"
    else:
        text = f"damaged: {type(error).__name__}: {text}"
    return text[:MAX_CAUSE]


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
    """What to show: a box of the image (None: all of it), whether mirrored, at (res, res) pixels."""

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
