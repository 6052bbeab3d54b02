"""Pictures of more than 8 bits: their range is what the file says, or their kind, never a guess."""

import io
import re
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from simla.dataset.deep_images import _named_dark
from simla.dataset.images import BadImage, load_image, open_image
from simla.inputs import read_image

SHADES = np.arange(48 * 48).reshape(48, 48) % 256  # all 256 of them
BITS_PER_SAMPLE, PHOTOMETRIC, SMALLEST, LARGEST = 258, 262, 340, 341


def png(values: np.ndarray, significant: list[int] | None = None) -> bytes:
    content = cv2.imencode(".png", values)[1].tobytes()
    if significant is None:
        return content
    body = b"sBIT" + bytes(significant)
    chunk = struct.pack(">I", len(significant)) + body + struct.pack(">I", zlib.crc32(body))
    return content[:33] + chunk + content[33:]  # behind the header


def tif(values: np.ndarray, tags: dict | None = None) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", tiffinfo=tags or {})
    return file.getvalue()


def twelve_bit_tif() -> bytes:
    """Two values packed into three bytes, the upper ones first."""
    deep = (SHADES << 4).reshape(-1, 2)
    packed = np.stack([deep[:, 0] >> 4, (deep[:, 0] & 15) << 4 | deep[:, 1] >> 8, deep[:, 1] & 255], 1)
    pixels = packed.astype(np.uint8).tobytes()
    tags = [
        (256, 48),
        (257, 48),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 48),
        (279, len(pixels)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", 9) + entries + bytes(4)


GREY12 = (SHADES << 4).astype(np.uint16)
COLOUR12 = np.stack([GREY12, GREY12[::-1], GREY12.T], -1)
CLEAR12 = np.full((48, 48), 4095, np.uint16)
SAID = {
    "12 of 16 bits": png(GREY12, [12]),
    "12 bits, shifted up": png((SHADES << 8).astype(np.uint16), [12]),
    "16 bits": png((SHADES * 257).astype(np.uint16)),
    "12 bits": twelve_bit_tif(),
    "floats": tif((SHADES / 255).astype(np.float32)),
    "floats to 255": tif(SHADES.astype(np.float32), {LARGEST: 255.0}),
    "floats around 0": tif((SHADES / 127.5 - 1).astype(np.float32), {SMALLEST: -1.0, LARGEST: 1.0}),
    "32 bits to 255": tif(SHADES.astype(np.int32), {LARGEST: 255}),
    "16 bits to 4095": tif(GREY12, {LARGEST: 4095}),
    "white first": tif(((255 - SHADES) * 257).astype(np.uint16), {PHOTOMETRIC: 0}),
}


@pytest.mark.parametrize("name", SAID)
def test_the_range_is_the_file_s_own(name):
    for loaded in (load_image(SAID[name]), open_image(SAID[name])):
        assert np.array_equal(np.asarray(loaded), np.stack([SHADES] * 3, -1))


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_of_twelve_bits(alpha):
    deep = np.dstack([COLOUR12, CLEAR12]) if alpha else COLOUR12
    loaded = np.asarray(load_image(png(deep, [12] * deep.shape[2])))
    assert np.array_equal(loaded, (COLOUR12 >> 4)[..., ::-1])  # OpenCV writes from blue, green, red


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (tif(SHADES.astype(np.int32)), "one shade: mode I, values 0 to 255, black 0, white 2.14748e+09"),
        (png(SHADES.astype(np.uint16)), "one shade: mode I;16, values 0 to 255, black 0, white 65535"),
        (tif(SHADES.astype(np.float32)), "out of range: mode F, values 0 to 255, black 0, white 1"),
        (tif(np.full((4, 4), np.nan, np.float32)), "out of range: mode F, values nan"),
        (tif(SHADES.astype(np.int32) - 9), "out of range: mode I, values -9 to 246"),
        (
            tif(SHADES.astype(np.uint16), {LARGEST: 200}),
            "out of range: mode I;16, values 0 to 255, black 0, white 200",
        ),
    ],
)
def test_values_that_contradict_the_range_are_refused(content, told):
    for read in (load_image, open_image):
        with pytest.raises(BadImage, match=re.escape(told)):
            read(content, "a.tif")


@pytest.mark.parametrize("content", [png(GREY12), png(COLOUR12)])
def test_a_dark_picture_stays_dark_and_is_named_once(content, caplog):
    _named_dark.clear()
    for name in ("night.png", "later.png"):
        assert np.asarray(load_image(content, name)).max() == 15
    (message,) = caplog.messages
    assert message.startswith("night.png: mode") and "of 65535" in message


def test_one_shade_of_one_value_is_a_picture():
    assert (np.asarray(load_image(png(np.full((4, 4), 200, np.uint16)))) == 0).all()


def test_pil_images_handed_in_keep_what_their_file_says():
    for name in ("floats to 255", "32 bits to 255", "white first", "12 bits"):
        with Image.open(io.BytesIO(SAID[name])) as image:
            assert np.array_equal(np.asarray(read_image(image))[..., 0], SHADES), name
    assert np.array_equal(
        np.asarray(read_image(Image.fromarray((SHADES / 255).astype(np.float32))))[..., 0], SHADES
    )
    with pytest.raises(BadImage, match="one shade: mode I, values 0 to 255"):
        read_image(Image.fromarray(SHADES.astype(np.int32)))


def test_the_transparent_value_of_sixteen_bits_is_white():
    file = io.BytesIO()
    Image.fromarray((SHADES * 257).astype(np.uint16)).save(file, "PNG", transparency=10 * 257)
    assert np.array_equal(
        np.asarray(load_image(file.getvalue()))[..., 0], np.where(SHADES == 10, 255, SHADES)
    )
