"""An image file read: what is in it, upright and in RGB, or what is wrong with it. No torch."""

import errno
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from simla.dataset.deep_images import WrongRange, eight_bits, value_range
from simla.dataset.files import file_status
from simla.dataset.png_texts import without_long_texts
from simla.utils import CONTENT_BYTES, PICTURE, first_line, other_content

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
    """Yield the image, of which the header alone is read, the file's content and name. Raises `BadImage`."""
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
