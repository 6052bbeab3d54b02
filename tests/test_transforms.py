"""Loading of every kind of file, JPEGs at the scale of their crop; crops, flips, views; draws of an item."""

import io
import os
import pickle
import random
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo
from torchvision import transforms as tv

from simla.dataset.check.causes import Cause
from simla.dataset.check.images import check_image
from simla.dataset.images import BadImage, JpegFile, image_size, load_image, open_image
from simla.dataset.loaders import to_device
from simla.dataset.prepare.shards import image_file
from simla.dataset.transforms import (
    MEAN,
    STD,
    EvalTransform,
    ItemRandom,
    PretrainTransform,
    TrainTransform,
    View,
    crops,
    draw_crop,
    normalise,
    resize,
    to_tensor,
    unit_range,
)


def photo(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """Soft blobs of colour, so that resampling is smooth."""
    small = np.random.RandomState(seed).randint(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


# ---- loading


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def test_plain_files_load_unchanged(tmp_path):
    image = photo()
    assert np.array_equal(load_image(save(image, tmp_path / "a.png")), image)
    jpeg = save(image, tmp_path / "a.jpg")
    assert np.array_equal(load_image(str(jpeg)), Image.open(jpeg))


def test_palette_cmyk_and_grey(tmp_path):
    image = photo()
    palette = image.convert("P")
    assert np.array_equal(load_image(save(palette, tmp_path / "p.png")), palette.convert("RGB"))
    assert np.array_equal(load_image(save(palette, tmp_path / "p.gif")).size, image.size)
    cmyk = np.asarray(load_image(save(image.convert("CMYK"), tmp_path / "c.jpg", quality=95))).astype(int)
    assert np.abs(cmyk - np.asarray(image)).mean() < 4
    grey = load_image(save(image.convert("L"), tmp_path / "l.png"))
    assert grey.mode == "RGB"
    assert np.array_equal(grey.getchannel("R"), image.convert("L"))
    assert load_image(save(image.convert("1"), tmp_path / "1.png")).mode == "RGB"


def test_transparency_lies_over_white(tmp_path):
    image = photo()
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 40, 60))
    for mode in ("RGB", "L"):
        layered = image.convert(mode)
        layered.putalpha(alpha)
        loaded = np.asarray(load_image(save(layered, tmp_path / f"{mode}.png")))
        assert (loaded[:, :40] == 255).all()
        assert np.array_equal(loaded[:, 40:], np.asarray(image.convert(mode).convert("RGB"))[:, 40:])
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (np.asarray(load_image(save(palette, tmp_path / "t.png", transparency=1))) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(suffix, tmp_path):
    values = (np.arange(48).reshape(6, 8) * 1300).astype(np.uint16)
    loaded = np.asarray(load_image(save(Image.fromarray(values), tmp_path / f"deep.{suffix}")))
    assert loaded.shape == (6, 8, 3)
    assert np.array_equal(loaded[..., 0], values // 256)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    swaps = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
    ]
    swaps += [Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE]
    swaps += [Image.Transpose.ROTATE_90]
    swap = swaps[orientation - 1]
    upright = image if swap is None else image.transpose(swap)
    assert np.array_equal(load_image(save(image, tmp_path / "a.png", exif=exif)), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_spoil_the_image(tmp_path):
    path = save(photo(), tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*garbage" + b"\xff" * 30)
    assert load_image(path).size == (80, 60)


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    photo(400, 300).save(buffer, "JPEG")
    return buffer.getvalue()


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    photo(400, 300).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "no such file"),
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image: a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "not an image: a pointer of Git LFS",
        ),
        (b"\x89PNG\r\n\x1a\nbroken", "not an image"),
        (jpeg_bytes()[: len(jpeg_bytes()) // 2], "truncated"),
        (png_bytes()[: len(png_bytes()) // 2], "truncated"),
        (png_bytes()[:100] + b"\x00" * 50 + png_bytes()[150:], ""),
        (jpeg_bytes()[:20], ""),
    ],
    ids=["missing", "empty", "html", "lfs", "png", "half a jpeg", "half a png", "damaged png", "jpeg header"],
)
def test_bad_files(content, cause, tmp_path):
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage) as error:
        load_image(path)
    assert error.value.path == str(path)
    assert cause in error.value.cause and "a picture" not in error.value.cause
    assert len(error.value.cause) < 150
    copy = pickle.loads(pickle.dumps(error.value))  # as a worker sends it
    assert (copy.path, copy.cause, str(copy)) == (str(path), error.value.cause, str(error.value))


@pytest.mark.parametrize("read", [load_image, open_image, image_size])
def test_what_is_no_file_is_not_waited_for(read, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
        for path in ("pipe.jpg", "socket.jpg", os.devnull):
            with pytest.raises(BadImage) as error:
                read(path)
            assert error.value.cause == "cannot be read: not a file, but a pipe, socket or device"
            assert check_image(path, full=False)["flags"] == Cause.IMAGE_CANNOT_BE_READ
    for path in ("a\0.jpg", "a\ud800.jpg"):
        with pytest.raises(BadImage, match="cannot be read: no name that a file can have"):
            read(path)


def test_a_folder_and_too_many_pixels(tmp_path, monkeypatch):
    with pytest.raises(BadImage):
        load_image(tmp_path)
    path = save(photo(), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match="too many pixels"):
        load_image(path)


def long_texts(kind: str) -> dict:
    """What a PNG is saved with, of which PIL would unpack more than a megabyte (or two of all together)."""
    info = PngInfo()
    if kind == "profile":
        return {"icc_profile": b"\0" * 3_000_000}
    if kind == "many":
        for number in range(4):
            info.add_text(f"text {number}", "x" * 900_000, zip=True)
    elif kind == "plain":
        info.add_text("Comment", "x" * 3_000_000)
    elif kind == "international":
        info.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    else:
        info.add_text("Comment", "x" * 2_000_000, zip=True)
    return {"pnginfo": info}


@pytest.mark.parametrize("kind", ["text", "international", "profile", "many", "plain"])
@pytest.mark.parametrize("at_end", [False, True])
def test_a_png_with_long_texts_or_a_large_profile_is_a_whole_picture(kind, at_end, tmp_path, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2_000_000)  # of 64 times as many
    image, exif = photo(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    path = save(image, tmp_path / "a.png", exif=exif, **long_texts(kind))
    if at_end:  # behind the pixels
        content = path.read_bytes()
        first, pixels = (content.index(name) - 4 for name in (TEXT_CHUNKS[kind], b"IDAT"))
        path.write_bytes(content[:first] + content[pixels:-12] + content[first:pixels] + content[-12:])
    with pytest.raises(ValueError, match=r"text chunk|MAX_TEXT"), Image.open(path) as plain:
        plain.load()
    assert np.array_equal(load_image(path), image.rotate(180))
    assert np.array_equal(open_image(path.read_bytes()), image.rotate(180))
    assert not check_image(str(path), full=True)["flags"] and image_file(str(path), path.name)[0] == "png"


TEXT_CHUNKS = {
    "text": b"zTXt",
    "international": b"iTXt",
    "profile": b"iCCP",
    "many": b"zTXt",
    "plain": b"tEXt",
}


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize(
    "data", [b"", b"k", b"k\0", b"k\0\1packed", b"k\0\0packed", b"k\0\1\1\0\0x", b"\0" * 9]
)
def test_a_text_of_a_png_that_cannot_be_read_does_not_hide_the_picture(kind, data, tmp_path):
    content = save(photo(), tmp_path / "a.png").read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    at = content.index(b"IDAT") - 4
    for place in (at, len(content) - 12):
        assert np.array_equal(load_image(content[:place] + chunk + content[place:]), photo())


def test_a_png_with_long_texts_may_be_a_bomb_or_damaged(tmp_path, monkeypatch):
    path = save(photo(), tmp_path / "a.png", **long_texts("text"))
    content = path.read_bytes()
    for length in range(8, len(content) - 12, 401):
        with pytest.raises(BadImage):
            load_image(content[:length])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match="too many pixels"):
        load_image(path)


# ---- JPEGs, decoded at the scale of their crop


def textured(width: int, height: int, seed: int = 0) -> Image.Image:
    """Photo-like: soft blobs, detail at finer scales, and a hard edge."""
    rng = np.random.RandomState(seed)
    picture = np.asarray(photo(width, height, seed)).astype(np.float32)
    for cells, strength in ((width // 16, 18), (width // 4, 6), (width, 3)):
        noise = rng.randint(0, 256, (max(1, cells * height // width), max(1, cells), 1)).astype(np.uint8)
        fine = Image.fromarray(noise[..., 0]).resize((width, height), Image.Resampling.BICUBIC)
        picture += strength * (np.asarray(fine, np.float32)[..., None] / 128 - 1)
    picture[:, width // 3 : width // 2] *= 0.6
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def jpeg_file(image: Image.Image, path: Path, **options) -> JpegFile:
    return open_image(save(image, path, quality=90, **options))


def scales_used(monkeypatch) -> list[int]:
    used = []
    decode = JpegFile.decode
    monkeypatch.setattr(JpegFile, "decode", lambda file, scale: used.append(scale) or decode(file, scale))
    return used


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_decoded_as_by_pil(mode, tmp_path):
    for number, options in enumerate([{}, {"progressive": True}, {"subsampling": 0}]):
        path = save(textured(203, 101).convert(mode), tmp_path / f"{number}.jpg", **options)
        file = open_image(path)
        assert isinstance(file, JpegFile)
        assert file.size == (203, 101)
        for scale in (1, 2, 4, 8):
            drafted = Image.open(path)
            drafted.draft(None, (203 // scale, 101 // scale))
            assert np.array_equal(file.decode(scale)[..., ::-1], drafted.convert("RGB"))


def test_the_smallest_scale_is_taken_that_has_a_pixel_for_each_of_the_view(tmp_path, monkeypatch):
    file, used = jpeg_file(textured(640, 480), tmp_path / "a.jpg"), scales_used(monkeypatch)
    sides = {60: 8, 61: 4, 120: 4, 121: 2, 240: 2, 241: 1, 480: 1, 700: 1}
    for res in sides:
        crops(file, [View(None, False, res)])
    crops(file, [View((100, 100, 163, 400), False, 32)])  # 63 pixels: no scaling, as half would be 31
    crops(file, [View((100, 100, 164, 400), False, 32)])
    crops(file, [View(None, False, 60), View(None, False, 121)])  # one decode for both
    assert used == [*sides.values(), 1, 2, 2]


@given(
    st.integers(200, 800), st.integers(200, 800), st.integers(24, 96), st.floats(0.05, 1), st.integers(0, 99)
)
@settings(max_examples=40)
def test_crops_of_scaled_decodes_are_those_of_a_full_decode(width, height, res, min_scale, seed):
    """At worst, where an eighth of a small picture makes a view of 24 pixels: 6 of 255 levels in the mean."""
    at_whole_pixels, as_drawn = differences(width, height, res, min_scale, seed)
    assert at_whole_pixels.mean() < 6
    assert np.percentile(at_whole_pixels, 99) <= 30
    assert as_drawn.mean() < 12  # half a pixel of the view


def test_crops_of_scaled_decodes_are_mostly_within_a_level():
    found = [differences(800, 600, 96, 0.2, seed)[0].mean() for seed in range(30)]
    assert np.median(found) < 0.6
    assert max(found) < 2


def differences(width: int, height: int, res: int, min_scale: float, seed: int) -> list[np.ndarray]:
    """Of a crop from what one from PIL's full decode is: with the edges in whole pixels of the scaled decode,
    and as they were drawn."""
    image, buffer = textured(width, height, seed), io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    decoded = Image.open(buffer).convert("RGB")
    box = draw_crop(width, height, min_scale, random.Random(seed))
    (ours,) = crops(JpegFile("memory", buffer.getvalue(), image.size), [View(box, False, res)])
    side = min(box[2] - box[0], box[3] - box[1])
    scale = next(scale for scale in (8, 4, 2, 1) if scale == 1 or side >= scale * res)
    whole = [(edge + scale // 2) // scale * scale for edge in box]
    assert max(abs(a - b) for a, b in zip(whole, box, strict=True)) <= side / res / 2 or scale == 1
    whole = [min(edge, limit) for edge, limit in zip(whole, image.size * 2, strict=True)]
    theirs = (decoded.crop(edges).resize((res, res), Image.Resampling.BICUBIC) for edges in (whole, box))
    return [np.abs(ours.astype(int) - np.asarray(their)) for their in theirs]


@pytest.mark.parametrize("res", [25, 50, 100, 200])
def test_an_edge_in_the_picture_is_where_it_was(res, tmp_path):
    """Black left of column 300 of 600, white from there on, seen through crops that touch each border."""
    picture = np.zeros((400, 600, 3), np.uint8)
    picture[:, 300:] = 255
    file = jpeg_file(Image.fromarray(picture), tmp_path / "a.jpg")
    for box in ((0, 0, 600, 400), (0, 0, 401, 399), (199, 1, 600, 400), (93, 55, 507, 301)):
        view, mirrored = crops(file, [View(box, False, res), View(box, True, res)])
        place = (300 - box[0]) / (box[2] - box[0]) * res
        for row in view[:, :, 0]:
            assert abs((255 - row.astype(float)).sum() / 255 - place) < 0.6
        assert np.array_equal(mirrored, view[:, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_are_cropped_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(textured(300, 200), tmp_path / "a.jpg", quality=90, exif=exif)
    upright = load_image(path)
    image = open_image(path)
    assert isinstance(image, JpegFile) == (orientation == 1)
    assert image.size == upright.size
    views = [View(None, False, 64), View((20, 30, 120, 180), True, 40)]
    for ours, theirs in zip(crops(image, views), crops(upright, views), strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 2


def test_only_plain_jpegs_wait_to_be_decoded(tmp_path):
    image = photo()
    others = {
        "cmyk.jpg": image.convert("CMYK"),
        "p.png": image.convert("P"),
        "rgba.png": image.convert("RGBA"),
        "l.png": image.convert("L"),
    }
    for name, other in others.items():
        path = save(other, tmp_path / name)
        assert np.array_equal(open_image(path), load_image(path)), name
    path = save(image, tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*garbage" + b"\xff" * 30)
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert isinstance(open_image(path), JpegFile)


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_truncated_jpeg_is_bad_when_it_is_decoded(share, tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(jpeg_bytes()[: int(share * len(jpeg_bytes()))])
    file = open_image(path)
    for res in (32, 300):
        with pytest.raises(BadImage, match="truncated") as error:
            crops(file, [View(None, False, res)])
        assert error.value.path == str(path)


def test_what_opencv_refuses_pil_decodes(tmp_path, monkeypatch):
    file = jpeg_file(textured(200, 150), tmp_path / "a.jpg")
    (expected,) = crops(file, [View(None, False, 60)])
    monkeypatch.setattr("cv2.imdecode", lambda *_: None)
    (found,) = crops(file, [View(None, False, 60)])
    assert np.abs(found.astype(int) - expected).mean() < 1.5


# ---- draws


def test_the_draws_of_an_item_are_its_own():
    def draws(*key):
        rng = ItemRandom(*key)
        return rng.python.random(), rng.python.random(), rng.numpy.random_sample(), rng.numpy.random_sample()

    assert draws(1, 2, 3) == draws(1, 2, 3)
    assert (
        len({draws(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(20)})
        == 500
    )
    first = draws(1, 2, 3)
    assert len(set(first)) == 4, "the two generators must not follow each other"
    uniform = np.array([draws(0, 0, index) for index in range(2000)])
    assert np.abs(uniform.mean(0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(uniform.T) - np.eye(4)).max() < 0.1


def test_the_draws_of_an_item_never_change():
    """A resumed run has to see the pixels of the interrupted one: these numbers are for ever."""
    rng = ItemRandom(42, 3, 1234)
    assert (rng.python.getrandbits(32), int(rng.numpy.randint(2**31))) == (307863619, 897786405)


def test_global_random_state_is_neither_read_nor_moved():
    image, transform = photo(), PretrainTransform(32, code_res=16)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = transform(image, ItemRandom(0, 0, 7))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    for a, b in zip(first, transform(image, ItemRandom(0, 0, 7)), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], transform(image, ItemRandom(0, 1, 7))[0])


def features(left, top, w, h, width, height):
    """What the rule of the crop decides, in 0..1."""
    room_x, room_y = max(width - w, 1), max(height - h, 1)
    return w * h / (width * height), np.log(w / h) / np.log(16 / 9) + 0.5, left / room_x, top / room_y


@pytest.mark.parametrize(("size", "min_scale"), [((320, 240), 0.2), ((240, 320), 0.5), ((200, 100), 0.2)])
def test_crops_are_distributed_as_those_of_torchvision(size, min_scale):
    num_draws, (width, height) = 3000, size
    torch.manual_seed(0)
    blank = torch.zeros(3, height, width)
    theirs, ours = [], []
    rng = random.Random(0)
    for _ in range(num_draws):
        top, left, h, w = tv.RandomResizedCrop.get_params(blank, (min_scale, 1.0), (3 / 4, 4 / 3))
        theirs.append(features(left, top, w, h, width, height))
        left, top, right, bottom = draw_crop(width, height, min_scale, rng)
        ours.append(features(left, top, right - left, bottom - top, width, height))
    for a, b in zip(np.sort(theirs, 0).T, np.sort(ours, 0).T, strict=True):  # Kolmogorov-Smirnov, p = 0.001
        points = np.concatenate([a, b])
        gap = np.searchsorted(a, points, "right") - np.searchsorted(b, points, "right")
        assert np.abs(gap).max() / num_draws < 1.95 * np.sqrt(2 / num_draws)


@given(st.integers(1, 2000), st.integers(1, 2000), st.floats(0.05, 1), st.integers(0, 99))
@settings(max_examples=200)
def test_any_crop_lies_inside_the_image(width, height, min_scale, seed):
    left, top, right, bottom = draw_crop(width, height, min_scale, random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (301, 7), (7, 301), (1, 1000)])
def test_extreme_images_are_cropped_as_by_torchvision(size):
    width, height = size
    top, left, h, w = tv.RandomResizedCrop.get_params(
        torch.zeros(3, height, width), (0.2, 1.0), (3 / 4, 4 / 3)
    )
    assert draw_crop(width, height, 0.2, random.Random(0)) == (left, top, left + w, top + h)


# ---- transforms


@pytest.mark.parametrize("size", [(80, 60), (32, 32), (31, 200)])
def test_evaluation_is_exactly_the_torchvision_pipeline(size):
    image = photo(*size)
    pipeline = tv.Compose(
        [
            tv.Resize((32, 32), interpolation=tv.InterpolationMode.BICUBIC),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )
    out = EvalTransform(32)(image)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    assert torch.equal(normalise(out), pipeline(image))


def test_a_batch_becomes_the_floats_that_torchvision_makes_of_each_image():
    """Every byte, in every channel, to the last bit."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    expected = tv.functional.to_tensor(pixels)
    batch = {"image": to_tensor(pixels)[None], "code_view": to_tensor(pixels)[None], "text": ["a"]}
    out = to_device(batch, torch.device("cpu"))
    assert torch.equal(out["code_view"][0], expected)
    assert torch.equal(out["image"][0], tv.functional.normalize(expected, MEAN, STD))
    assert out["text"] == ["a"]
    assert batch["image"].dtype == torch.uint8


@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 64), st.integers(0, 99))
@settings(max_examples=60)
def test_a_crop_is_that_of_torchvision_to_a_level(width, height, res, seed):
    """torch and PIL keep intermediate sums with different precision."""
    image = photo(width, height, seed)
    box = left, top, right, bottom = draw_crop(width, height, 0.2, random.Random(seed))
    upright, mirrored = crops(image, [View(box, False, res), View(box, True, res)])
    theirs = tv.functional.resized_crop(
        image, top, left, bottom - top, right - left, [res, res], tv.InterpolationMode.BICUBIC
    )
    difference = np.abs(upright.astype(int) - np.asarray(theirs))
    assert difference.max() <= 1
    assert np.array_equal(mirrored, upright[:, ::-1])


def test_both_views_show_the_same_pixels():
    transform = PretrainTransform(64, randaugment=(0, 7), code_res=32)
    image = photo()
    for index in range(20):
        encoder_image, code_image = transform(image, ItemRandom(0, 0, index))
        assert encoder_image.shape == (3, 64, 64)
        assert code_image.shape == (3, 32, 32)
        assert encoder_image.dtype == code_image.dtype == torch.uint8
        halved = torch.nn.functional.avg_pool2d(unit_range(encoder_image), 2)
        assert (halved - unit_range(code_image)).abs().max() < 0.03


def test_the_code_view_is_what_the_source_gives_but_for_rounding():
    image = textured(400, 300)
    for index in range(10):
        box = draw_crop(*image.size, 0.2, ItemRandom(0, 0, index).python)
        transform = PretrainTransform(64, randaugment=(0, 7), code_res=32)
        (direct,) = crops(image, [View(box, False, 32)])
        view = transform(image, ItemRandom(0, 0, index), may_flip=False)[1]
        difference = view.int() - to_tensor(direct).int()
        assert difference.abs().max() <= 4
        assert difference.abs().float().mean() < 0.6


def test_a_code_view_larger_than_the_encoder_s_comes_from_the_source():
    image = textured(400, 300)
    large = PretrainTransform(32, randaugment=(0, 7), code_res=64)
    box = draw_crop(*image.size, 0.2, ItemRandom(0, 0, 0).python)
    (direct,) = crops(image, [View(box, False, 64)])
    assert torch.equal(large(image, ItemRandom(0, 0, 0), may_flip=False)[1], to_tensor(direct))


def test_the_code_view_is_not_augmented_in_colour_or_shape():
    image = photo()
    for index in range(20):
        plain = PretrainTransform(32, randaugment=(0, 7), code_res=16)(image, ItemRandom(0, 0, index))
        augmented = PretrainTransform(32, randaugment=(5, 10), code_res=16)(image, ItemRandom(0, 0, index))
        assert torch.equal(plain[1], augmented[1])


def test_independent_code_views_differ_but_leave_the_encoder_view_alone():
    image = photo()
    shared, independent = (
        PretrainTransform(32, code_res=32, independent_code_view=released) for released in (False, True)
    )
    for index in range(10):
        a, b = shared(image, ItemRandom(0, 0, index)), independent(image, ItemRandom(0, 0, index))
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1], b[1])


def test_flips_are_even_and_stop_where_the_text_names_a_side():
    image = photo()
    transform = TrainTransform(32, randaugment=(0, 7), crop=False)
    plain = to_tensor(resize(np.array(image), 32))
    flips = 0
    for index in range(200):
        out = transform(image, ItemRandom(0, 0, index))
        flips += torch.equal(out, plain.flip(2))
        assert torch.equal(out, plain) or torch.equal(out, plain.flip(2))
        assert torch.equal(transform(image, ItemRandom(0, 0, index), may_flip=False), plain)
    assert 70 < flips < 130  # 4 standard deviations


def test_forbidding_a_flip_changes_nothing_else():
    image = photo()
    transform = PretrainTransform(32, code_res=16)
    changed = 0
    for index in range(20):
        free, upright = (transform(image, ItemRandom(0, 0, index), may_flip=may)[1] for may in (True, False))
        assert torch.equal(free, upright) or torch.equal(free.flip(2), upright)
        changed += not torch.equal(free, upright)
    assert 4 < changed < 16


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3)])
def test_any_size_of_image(size):
    image = photo(*size)
    assert TrainTransform(24)(image, ItemRandom(0, 0, 0)).shape == (3, 24, 24)
    views = PretrainTransform(24, code_res=12)(image, ItemRandom(0, 0, 0))
    assert [view.shape for view in views] == [(3, 24, 24), (3, 12, 12)]
    assert EvalTransform(24)(image).shape == (3, 24, 24)
