"""From an image file to the tensors of the model: loading, crops, flips, RandAugment, normalisation.

Items and batches hold bytes, which are floats only on the device (`unit_range`, `normalise`): a quarter of
the memory and of the traffic between processes. Nothing here reads global random state. Every draw comes
from the item's own `ItemRandom`, so a sample is the same whichever worker or rank reads it. R is the side of
the square output, in pixels.
"""

import errno
import hashlib
import io
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
from simla.dataset.randaugment import RandAugment
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
EMPTY = "empty file"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations under which width and height change places
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
    """The image as RGB, upright by its EXIF tag, transparency over white, of several pictures the first.

    source: a path, the content of a file, or one opened; name: what to call it where that is no path. Raises
    `BadImage`.
    """
    with _bad_image(source, name) as name:
        content = _content(source)
        with open_content(content) as image:
            return upright_rgb(image, content, name)


def open_content(content: bytes, formats: list[str] | None = FORMATS) -> Image.Image:
    """Return the image of a file's content, of which the header alone is read; formats None: all that PIL
    knows. Raises what PIL raises, of what is no image `UnidentifiedImageError` with what it is, or "".
    """
    try:
        return Image.open(io.BytesIO(without_long_texts(content)), formats=formats)
    except UnidentifiedImageError as error:
        what = other_content(content[:CONTENT_BYTES])
        raise UnidentifiedImageError("" if what == PICTURE else what) from error


def open_image(source: Source, name: str = "") -> "Image.Image | JpegFile":
    """As `load_image`, but of a JPEG in RGB or grey that is upright only the header is read. Raises
    `BadImage`."""
    with _bad_image(source, name) as name:
        content = _content(source)
        with open_content(content) as image:
            # Of other formats it would decode the picture, and hide that it is damaged.
            if image.format == "JPEG" and image.mode in ("RGB", "L") and not _is_turned(image):
                return JpegFile(name, content, image.size)
            return upright_rgb(image, content, name)


def _is_turned(image: Image.Image) -> bool:
    with suppress(Exception):  # broken EXIF
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of what `load_image` returns; a JPEG is not decoded for it. Raises `BadImage`."""
    with _bad_image(path, ""), open_content(_content(path)) as image:
        size, is_jpeg = image.size, image.format == "JPEG"
        with suppress(Exception):  # broken EXIF
            if image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS:
                size = size[::-1]
    return size if is_jpeg else load_image(path).size  # others PIL may turn only as it decodes them


class JpegFile:
    """A JPEG that waits to be decoded until the size to decode it at is known."""

    def __init__(self, name: str, content: bytes, size: tuple[int, int]) -> None:
        """`size`: width, height."""
        self.name, self.content, self.size = name, content, size

    def decode(self, scale: int) -> np.ndarray:
        """(H, W, 3) uint8 in the order blue, green, red, at 1/scale of the size. Raises `BadImage`."""
        with _bad_image(self.content, self.name):
            flags = REDUCED[scale] | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(self.content, np.uint8), flags)
        if pixels is None:  # PIL reads it, or says what is wrong
            image = load_image(self.content, self.name).reduce(scale)
            pixels = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)
        return pixels


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


def _content(source: Source) -> bytes:
    if isinstance(source, str | Path):
        content = _read(Path(source))
    else:
        content = source if isinstance(source, bytes) else source.read()
    if not content:
        raise ValueError(EMPTY)
    return content


def _read(path: Path) -> bytes:
    """All of the file. Where the network or a disk fails it is tried again, RETRY_SECONDS later."""
    for seconds in (*RETRY_SECONDS, None):
        try:
            file_status(path)
            content = path.read_bytes()
            break
        except OSError as error:
            if seconds is None or error.errno not in TRANSIENT:
                raise
            time.sleep(seconds)
    return content


@contextmanager
def _bad_image(source: Source, name: str) -> Iterator[str]:
    """Whatever is raised becomes a `BadImage`; gives its name: `name`, or else the path."""
    name = name or str(source if isinstance(source, str | Path) else getattr(source, "name", "an image"))
    try:
        yield name
    except Exception as error:  # each decoder has its own types
        raise BadImage(name, _cause(error)) from error


def _cause(error: Exception) -> str:
    text = first_line(error)
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if text == EMPTY:
        return EMPTY
    if isinstance(error, UnidentifiedImageError):
        return ": ".join(filter(None, ["not an image", str(error)]))[:MAX_CAUSE]
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if isinstance(error, WrongRange):
        return text
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if "truncated" in text.lower():
        return f"truncated: {text}"[:MAX_CAUSE]
    return f"damaged: {type(error).__name__}: {text}"[:MAX_CAUSE]


class ItemRandom:
    """The random draws of one item, a function of (seed, epoch, index) alone."""

    def __init__(self, seed: int, epoch: int, index: int) -> None:
        self._key = hashlib.blake2b(f"{seed},{epoch},{index}".encode(), digest_size=16).digest()

    @cached_property
    def python(self) -> random.Random:
        return random.Random(int.from_bytes(self._key[:8], "little"))

    @cached_property
    def numpy(self) -> np.random.RandomState:
        generator = np.random.RandomState(np.random.MT19937(_NoEntropy()))
        # The other half of the key: both are Mersenne twisters, and equal seeds would make equal draws.
        generator.seed(np.frombuffer(self._key[8:], "<u4"))
        return generator


class _NoEntropy(np.random.bit_generator.ISeedSequence):
    """The first state of a generator that is seeded at once; the system's entropy would take 0.1 ms."""

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return np.zeros(n_words, dtype)


# ---- pixels and tensors


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W), uint8."""
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    cv2.split(pixels, list(planes))
    return torch.from_numpy(planes)


@lru_cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The largest byte, and mean and deviation (3, 1, 1), float32 whatever torch's default is."""
    made = {"dtype": torch.float32, "device": device}
    mean, std = (torch.tensor(values, **made).view(3, 1, 1) for values in (MEAN, STD))
    return torch.tensor(255.0, **made), mean, std


def unit_range(images: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 -> float32 in [0, 1]."""
    # By a tensor: a GPU multiplies by the reciprocal of a Python number, which rounds another way.
    return images / _constants(images.device)[0]


def normalise(images: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 -> float32 on the encoder's scale, by the channel means and deviations of CLIP."""
    _, mean, std = _constants(images.device)
    return unit_range(images).sub_(mean).div_(std)


# ---- crops


class View(NamedTuple):
    """What to show: a part of the image (None: all of it), whether mirrored, at (res, res) pixels."""

    box: Box | None
    mirrored: bool
    res: int


def crops(image: Image.Image | JpegFile, views: Sequence[View]) -> list[np.ndarray]:
    """The views of an RGB image, (res, res, 3) uint8 each. Raises `BadImage`.

    A JPEG is decoded once, at the smallest scale that still has a pixel for each pixel of the views. Their
    edges then move to its whole pixels, by at most half a pixel of the view.
    """
    boxes = [view.box or (0, 0, *image.size) for view in views]
    if isinstance(image, JpegFile):
        scale = min(reduction(box, view.res) for box, view in zip(boxes, views, strict=True))
        pixels = image.decode(scale)
    else:
        scale, pixels = 1, np.array(image)
    found = []
    for view, box in zip(views, boxes, strict=True):
        left, top, right, bottom = ((edge + scale // 2) // scale for edge in box)
        part = resize(pixels[top:bottom, left:right], view.res)
        if isinstance(image, JpegFile):
            part = cv2.cvtColor(part, cv2.COLOR_BGR2RGB)
        found.append(cv2.flip(part, 1) if view.mirrored else part)
    return found


def reduction(box: Box, res: int) -> int:
    side = min(box[2] - box[0], box[3] - box[1])
    return next(scale for scale in REDUCED if scale == 1 or side >= scale * res)


def resize(pixels: np.ndarray, res: int) -> np.ndarray:
    """(H, W, 3) -> (res, res, 3), uint8. PIL's antialiased bicubic filter, to a level, at several times the
    speed."""
    planes = torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=(res, res), mode="bicubic", antialias=True)
    return cv2.merge(list(planes[0].numpy()))


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
    """Fine-tuning: crop (`crop=False`, as in grounding: the whole image), flip, RandAugment."""

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

    def __call__(self, image: Image.Image | JpegFile, rng: ItemRandom, may_flip: bool = True) -> Tensor:
        """-> (3, R, R) uint8. `may_flip`: False where the text names a side. Raises `BadImage`."""
        (pixels,) = crops(image, [self.draw_view(image.size, rng, may_flip)])
        return to_tensor(self.augment(pixels, rng.numpy))

    def draw_view(self, size: tuple[int, int], rng: ItemRandom, may_flip: bool) -> View:
        box = draw_crop(*size, self.min_scale, rng.python) if self.crop else None
        heads = rng.python.random() < 0.5  # drawn in any case, so that the text does not shift later draws
        return View(box, heads and self.flip and may_flip, self.image_res)


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
        self, image: Image.Image | JpegFile, rng: ItemRandom, may_flip: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """-> (3, R, R) uint8, and (3, code_res, code_res) uint8 or None. Raises `BadImage`."""
        encoder, code_res = self.encoder_view, self.code_res
        views = [encoder.draw_view(image.size, rng, may_flip)]
        if code_res is not None and self.independent_code_view:
            views.append(encoder.draw_view(image.size, rng, may_flip)._replace(res=code_res))
        elif code_res is not None and code_res > encoder.image_res:
            views.append(views[0]._replace(res=code_res))
        pixels, *own = crops(image, views)
        augmented = to_tensor(encoder.augment(pixels, rng.numpy))
        if code_res is None:
            return augmented, None
        # Half of the encoder's pixels, which is what the source would give but for rounding.
        code_pixels = own[0] if own else resize(pixels, code_res)
        if self.independent_code_view:
            code_pixels = encoder.augment(code_pixels, rng.numpy)
        return augmented, to_tensor(code_pixels)


class EvalTransform:
    def __init__(self, image_res: int) -> None:
        self.image_res = image_res

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB -> (3, R, R) uint8: all of the image, by PIL itself, to the level."""
        resized = image.resize((self.image_res, self.image_res), Image.Resampling.BICUBIC)
        return to_tensor(np.asarray(resized))
