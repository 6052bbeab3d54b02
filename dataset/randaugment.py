"""RandAugment as ALBEF and SIMLA use it: per image, two of ten operations, each applied with probability 0.5.

Images are (H, W, 3) uint8 RGB arrays. Every operation is a lookup table, a 3x3 filter or a resampling, so it
costs a fraction of the same through PIL. Where the published code wraps round (AutoContrast's unsigned bytes,
Sharpness beyond 0..255) this one clips.
"""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

# The loader's workers are the parallelism; OpenCV's own threads would fight them, and can hang after a fork.
cv2.setNumThreads(0)

GREY = (128, 128, 128)  # fills what an affine operation uncovers
BYTES = np.arange(256)


def auto_contrast(image: np.ndarray, _: float = 0) -> np.ndarray:
    """Stretch each channel to 0..255, as `PIL.ImageOps.autocontrast` without cut-off."""
    tables = np.tile(BYTES, (3, 1))
    for table, channel in zip(tables, cv2.split(image), strict=True):
        low, high = int(channel.min()), int(channel.max())
        if high > low:
            scale = 255 / (high - low)
            table[:] = np.clip(BYTES * scale - low * scale, 0, 255)
    return _look_up(image, tables)


def equalize(image: np.ndarray, _: float = 0) -> np.ndarray:
    """Flatten each channel's histogram, as `PIL.ImageOps.equalize`."""
    tables = np.tile(BYTES, (3, 1))
    for index, table in enumerate(tables):
        histogram = cv2.calcHist([image], [index], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (histogram.sum() - histogram[histogram > 0][-1]) // 255
        if step > 0:
            below = np.cumsum(histogram) - histogram  # pixels darker than each level
            table[:] = np.minimum((step // 2 + below) // step, 255)
    return _look_up(image, tables)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.LUT(image, (BYTES.astype(np.float32) * np.float32(factor)).clip(0, 255).astype(np.uint8))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Move the image away from (factor > 1) or towards its smoothed self; the outermost pixels stay."""
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(image, -1, kernel / 13)
    sharp = cv2.subtract(image, smooth, dtype=cv2.CV_32F)
    sharp *= np.float32(factor)
    sharp += smooth
    out = np.clip(sharp, 0, 255, out=sharp).astype(np.uint8)
    out[[0, -1]], out[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return out


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    height, width = image.shape[:2]
    return _warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1))


def _look_up(image: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Send every byte of channel c through `tables[c]`; tables: (3, 256)."""
    return cv2.LUT(image, tables.T.astype(np.uint8)[None])


def _warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the image moved by a (2, 3) matrix, bilinear, the same size."""
    grid = _sampling_grid(*image.shape[:2], *matrix.ravel().tolist())
    return cv2.remap(image, *grid, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=GREY)


@lru_cache(maxsize=32)  # one image size at one level needs ten
def _sampling_grid(height: int, width: int, *matrix: float) -> tuple[np.ndarray, np.ndarray]:
    """Return where pixels come from: whole pixels (H, W, 2) int16, and fractions, in 1/32, (H, W) uint16.

    This is the fixed-point arithmetic of `cv2.warpAffine` up to OpenCV 4.11. OpenCV 5 interpolates there in
    floating point, which moves a fifth of the values by up to 2 levels; `cv2.remap` with a grid is unchanged.
    """
    inverse = cv2.invertAffineTransform(np.array(matrix).reshape(2, 3))
    columns = np.rint(inverse[:, 0, None] * np.arange(width) * 1024).astype(np.int64)  # (2, W)
    rows = np.rint((inverse[:, 1, None] * np.arange(height) + inverse[:, 2, None]) * 1024).astype(np.int64)
    x, y = (rows[:, :, None] + 16 + columns[:, None, :]) >> 5  # (H, W) each, in 1/32 pixel
    return np.stack([x >> 5, y >> 5], axis=-1).astype(np.int16), ((y & 31) * 32 + (x & 31)).astype(np.uint16)


OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "Identity": lambda image, _: image,
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": lambda image, slope: _warp(image, np.float32([[1, slope, 0], [0, 1, 0]])),
    "ShearY": lambda image, slope: _warp(image, np.float32([[1, 0, 0], [slope, 1, 0]])),
    "TranslateX": lambda image, pixels: _warp(image, np.float32([[1, 0, -pixels], [0, 1, 0]])),
    "TranslateY": lambda image, pixels: _warp(image, np.float32([[1, 0, 0], [0, 1, -pixels]])),
    "Rotate": rotate,
}
# What level 10 means: a slope, pixels, degrees. The others take a factor from 0.1 to 1.9, or ignore theirs.
FULL_STRENGTH = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 10.0, "TranslateY": 10.0, "Rotate": 30.0}


def op_argument(name: str, level: float, rng: np.random.RandomState) -> float:
    """Return the argument of an operation at `level` of 10; draw a sign for those that have a direction."""
    if name not in FULL_STRENGTH:
        return level / 10 * 1.8 + 0.1
    strength = level / 10 * FULL_STRENGTH[name]
    draw = rng.random_sample()
    negative = draw < 0.5 if name == "Rotate" else draw > 0.5
    return -strength if negative else strength


def rand_augment(
    image: np.ndarray, rng: np.random.RandomState, num_ops: int = 2, magnitude: float = 7
) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB as the same after `num_ops` operations at level `magnitude` of 10, each with
    probability 0.5; never writes to `image`. Draws in the published order.
    """
    for index in rng.randint(0, len(OPERATIONS), num_ops):
        if rng.random_sample() <= 0.5:
            name = list(OPERATIONS)[index]
            image = OPERATIONS[name](image, op_argument(name, magnitude, rng))
    return image
