"""RandAugment: recorded outputs bit by bit, PIL's where both agree, slow twins of the two published slips."""

import hashlib

import cv2
import numpy as np
import pytest
from goldens_io import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from simla.dataset.randaugment import FULL_STRENGTH, OPERATIONS, op_argument, rand_augment

OURS = dict(OPERATIONS)


class FixedDraw:
    """A generator whose next number is known."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random_sample(self) -> float:
        return self.value


def picture(name: str) -> np.ndarray:
    recorded = golden("randaugment")["images"][name]
    height, width, _ = recorded["shape"]
    if recorded["seed"] is None:
        return np.full(recorded["shape"], 77, np.uint8)
    image = np.random.RandomState(recorded["seed"]).randint(0, 256, recorded["shape"])
    for _ in range(3):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        image = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3)) // 9
    image = (image - 128) * 4 + 128 + (np.arange(width) * 60 // (width - 1))[None, :, None]
    image -= (np.arange(height) * 40 // (height - 1))[:, None, None]
    return np.clip(image, *recorded["clip"]).astype(np.uint8)


def sha256(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def exact_sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Pixel by pixel, not yet rounded towards zero nor brought into 0..255; float32."""
    out = image.astype(np.float32)
    for y in range(1, image.shape[0] - 1):
        for x in range(1, image.shape[1] - 1):
            block = image[y - 1 : y + 2, x - 1 : x + 2].astype(np.float32)
            smooth = np.rint((block.sum((0, 1)) + 4 * block[1, 1]) / 13)
            out[y, x] = smooth + np.float32(factor) * (block[1, 1] - smooth)
    return out


def published(name: str, image: np.ndarray, argument: float) -> np.ndarray:
    """The operation with the published slips put back."""
    if name == "Sharpness":
        return exact_sharpness(image, argument).astype(int).astype(np.uint8)  # wraps round
    if name == "AutoContrast":
        low, high = image.min((0, 1)).astype(int), image.max((0, 1)).astype(int)
        scale = 255 / np.maximum(high - low, 1)
        stretched = np.clip(image * scale + (-low % 256) * scale, 0, 255).astype(np.uint8)
        return np.where(high > low, stretched, image)
    return OURS[name](image, argument)


@pytest.mark.parametrize(
    "case", golden("randaugment")["ops"], ids=lambda case: f"{case['image']}-{case['op']}"
)
def test_recorded_operation(case):
    image, name = picture(case["image"]), case["op"]
    assert sha256(image) == golden("randaugment")["images"][case["image"]]["sha256"]
    argument = op_argument(name, case["level"], FixedDraw(case["uniform_draw"]))
    assert [argument] == case["args"][:1] or not case["args"]

    out = OPERATIONS[name](image, argument)
    assert out.dtype == np.uint8
    assert sha256(image) == golden("randaugment")["images"][case["image"]]["sha256"], "wrote to its input"
    assert sha256(published(name, image, argument)) == case["sha256"]
    if (case["image"], name) not in {("A", "AutoContrast"), ("B", "Sharpness")}:  # the two slips
        assert sha256(out) == case["sha256"]


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_sharpness_clips_where_the_published_code_wraps(name):
    image = picture(name)
    exact = exact_sharpness(image, 1.36)
    assert np.array_equal(OPERATIONS["Sharpness"](image, 1.36), exact.clip(0, 255).astype(np.uint8))
    case = next(c for c in golden("randaugment")["ops"] if (c["image"], c["op"]) == (name, "Sharpness"))
    assert ((exact < 0) | (exact > 255)).sum() == case["values_out_of_range"]


@pytest.mark.parametrize("case", golden("randaugment")["whole_object"], ids=lambda case: str(case["np_seed"]))
def test_recorded_draws_of_the_whole_object(case, monkeypatch):
    applied = []
    for name in OPERATIONS:

        def apply(image, argument, name=name):
            applied.append([name, argument])
            return published(name, image, argument)

        monkeypatch.setitem(OPERATIONS, name, apply)
    out = rand_augment(picture(case["image"]), np.random.RandomState(case["np_seed"]))
    assert sha256(out) == case["sha256"]
    assert len(applied) == len(case["applied"])
    for (name, argument), (recorded_name, recorded) in zip(applied, case["applied"], strict=True):
        assert name == recorded_name
        assert not recorded or argument == recorded[0]


images = st.tuples(st.integers(2, 20), st.integers(2, 20), st.integers(0, 999), st.integers(0, 255))


def noise(height: int, width: int, seed: int, low: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(low, 256, (height, width, 3)).astype(np.uint8)


@given(images)
@settings(max_examples=100)
def test_histogram_operations_are_those_of_pil(shape):
    image = noise(*shape)
    assert np.array_equal(OPERATIONS["AutoContrast"](image, 0), ImageOps.autocontrast(Image.fromarray(image)))
    assert np.array_equal(OPERATIONS["Equalize"](image, 0), ImageOps.equalize(Image.fromarray(image)))


@given(images, st.sampled_from(sorted(FULL_STRENGTH)), st.floats(0, 10), st.sampled_from([0.1, 0.9]))
@settings(max_examples=100)
def test_affine_operations_agree_with_floating_point_interpolation(shape, name, level, sign):
    """The grid of 1/32 pixel costs at most 1/64 of the range per axis, and rounding."""
    image = noise(*shape)
    argument = op_argument(name, level, FixedDraw(sign))
    matrix = {
        "ShearX": [[1, argument, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [argument, 1, 0]],
        "TranslateX": [[1, 0, -argument], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, -argument]],
        "Rotate": cv2.getRotationMatrix2D((image.shape[1] / 2, image.shape[0] / 2), argument, 1),
    }[name]
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    back = cv2.invertAffineTransform(np.array(matrix, np.float64))
    source_x, source_y = np.einsum("ij,jhw->ihw", back, np.stack([x, y, np.ones_like(x)]))
    padded = np.pad(image, ((30, 30), (30, 30), (0, 0)), constant_values=128).astype(float)
    left, top = np.floor(source_x).astype(int), np.floor(source_y).astype(int)
    fx, fy = (source_x - left)[..., None], (source_y - top)[..., None]
    exact = sum(
        padded[top + 30 + dy, left + 30 + dx] * (fx if dx else 1 - fx) * (fy if dy else 1 - fy)
        for dy in (0, 1)
        for dx in (0, 1)
    )
    assert np.abs(OPERATIONS[name](image, argument) - exact).max() <= 2 * 255 / 64 + 0.5 + 0.1


@given(st.integers(0, 10_000))
@settings(max_examples=50)
def test_any_draw_keeps_shape_and_input_and_global_state(seed):
    image = noise(24, 16, seed % 1000, 0)
    before, state = image.copy(), np.random.get_state()[1].copy()
    out = rand_augment(image, np.random.RandomState(seed), 3, 9)
    assert out.shape == image.shape
    assert out.dtype == np.uint8
    assert np.array_equal(image, before)
    assert np.array_equal(np.random.get_state()[1], state)
