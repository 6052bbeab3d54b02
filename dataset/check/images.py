"""Image files: what is wrong with each, its size, its content hash and, on demand, a hash of what it shows.

The records are kept in a file, appended as they come in, so that a check that was stopped goes on.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from simla.dataset.check.causes import NO_PIXELS, Cause
from simla.dataset.check.texts import Shared, Texts, path_key
from simla.dataset.files import file_status
from simla.dataset.images import BadImage, load_image, open_content, open_image
from simla.dataset.readers.shard_index import Picture
from simla.dataset.transforms import View, crops
from simla.dataset.workers import Workers
from simla.utils import UserError, with_progress

CACHE = "checked_images.1.bin"  # another number whenever RECORD or what it means changes
IMAGES_PER_JOB = 256
MIN_SIDE = 32  # pixels; a shorter side has nothing to learn from
RECORD = np.dtype(
    [
        ("path", "<u8"),  # its key
        ("size", "<u8"),  # bytes
        ("changed", "<i8"),  # ns
        ("content", "<u8"),  # hash of all bytes, 0: none
        ("look", "<u8"),  # hash of what it shows, 0: none
        ("width", "<u4"),
        ("height", "<u4"),
        ("flags", "<u2"),  # `Cause` bits
        ("full", "u1"),  # whether it was decoded
    ]
)
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
LOOK_SIDE, LOOK_FREQUENCIES = 32, 8
FLAT = 2.0  # standard deviation of the grey levels below which a picture shows one colour


class Images(NamedTuple):
    """The U different image files that the entries name, in the order in which they do so first."""

    records: np.ndarray  # (U,) RECORD
    sources: np.ndarray  # (U,) uint16, of an entry that names the file
    named: np.ndarray  # (U,) NAMED, by that entry
    numbers: list[np.ndarray]  # of each source (M,) the file of each image that its entries name

    def image(self, number: int, shared: Shared) -> str | Picture:
        return _image(shared, self.sources[number], self.named[number])


def _image(shared: Shared, source: int, named: np.void) -> str | Picture:
    return shared.sources[source].entries[int(named["entry"])]["images"][named["position"]]


def read_images(workers: Workers, texts: list[Texts], folder: Path, full: bool) -> Images:
    """Return the images, each looked at once, or known from the folder's cache."""
    named = np.concatenate([text.images for text in texts])
    paths, first, numbers = np.unique(named["key"], return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # that of the annotation files, often that on the disk, too
    paths, first, numbers = paths[order], first[order], np.argsort(order)[numbers.ravel()]
    ends = np.cumsum([len(text.images) for text in texts])
    sources = np.searchsorted(ends, first, side="right").astype(np.uint16)
    named = named[first]
    records = np.zeros(len(paths), RECORD)
    records["path"] = paths
    known = _known_records(folder, paths)
    chunks = [slice(start, start + IMAGES_PER_JOB) for start in range(0, len(records), IMAGES_PER_JOB)]
    jobs = [(full, sources[chunk], named[chunk], known[chunk]) for chunk in chunks]
    results = workers.map(check_images, jobs)
    results = with_progress(results, len(jobs), f"Images, {IMAGES_PER_JOB} at a time", 25)
    with _append_to_cache(folder) as cache:
        for chunk, checked in zip(chunks, results, strict=True):
            records[chunk] = checked
            cache.write(checked[checked != known[chunk]].tobytes())
            cache.flush()
    return Images(records, sources, named, np.split(numbers, ends[:-1]))


# ---- the cache ----


def _known_records(folder: Path, paths: np.ndarray) -> np.ndarray:
    """Return the latest whole record of each path, (U,) RECORD, zeros where there is none."""
    content = b""
    with suppress(FileNotFoundError):
        content = (folder / CACHE).read_bytes()
    cache = np.frombuffer(content, RECORD, len(content) // RECORD.itemsize)[::-1]
    records = np.zeros(len(paths), RECORD)
    _, ours, theirs = np.intersect1d(paths, cache["path"], return_indices=True)  # the first of equal ones
    records[ours] = cache[theirs]
    return records


@contextmanager
def _append_to_cache(folder: Path) -> Iterator[io.BufferedWriter]:
    """Open the cache; UserError where that fails, and where what is inside cannot write on."""
    path = folder / CACHE
    try:
        with suppress(FileNotFoundError):  # a record that was cut by the end of a process goes
            os.truncate(path, path.stat().st_size // RECORD.itemsize * RECORD.itemsize)
        with path.open("ab") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another --output_dir") from error


# ---- one file ----


def check_images(shared: Shared, job: tuple) -> np.ndarray:
    """Return (n,) RECORD; job: whether to decode; source, NAMED and known record of n images."""
    full, *columns = job
    records = [
        check_image(_image(shared, source, named), full, known)
        for source, named, known in zip(*columns, strict=True)
    ]
    return np.array(records, RECORD)


def check_image(image: str | Picture, full: bool, known: np.void | None = None) -> np.void:
    """Return a RECORD; the known one where it holds and has what is asked for.

    A file's holds while its size and its last change are the same, that of an image in a shard while its
    content is.
    """
    record, in_shard = np.zeros((), RECORD)[()], isinstance(image, Picture)
    record["path"] = path_key(image)
    try:
        if in_shard:
            content = image.getvalue()
            record["size"], record["content"] = len(content), _hash(content)
        else:
            status = file_status(image)
            record["size"], record["changed"] = status.st_size, status.st_mtime_ns
        same = ("path", "size", "content" if in_shard else "changed")
        is_same = known is not None and all(known[key] == record[key] for key in same)
        if is_same and known["full"] >= full and not known["flags"] & NO_PIXELS:
            return known  # what could not be read may be readable now, by another version of a library
        content = content if in_shard else Path(image).read_bytes()
    except FileNotFoundError:
        record["flags"] = Cause.NO_SUCH_IMAGE
    except OSError:
        record["flags"] = Cause.IMAGE_CANNOT_BE_READ
    else:
        record["full"], record["content"] = full, _hash(content)
        _look_at(image.name if in_shard else image, content, full, record)
    return record


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _look_at(path: str, content: bytes, full: bool, record: np.void) -> None:
    """Set flags, size in pixels and, of a file that is decoded, look."""
    try:
        with open_content(content) as image:
            record["width"], record["height"] = image.size
            is_whole, is_jpeg = ends_whole(content, image.format), image.format == "JPEG"
        if full:
            image = (open_image if is_jpeg else load_image)(content, path)
            (pixels,) = crops(image, [View(None, False, LOOK_SIDE)])
            record["look"] = look_hash(pixels)
            record["flags"] |= 0 if record["look"] else Cause.IMAGE_OF_ONE_COLOUR
        elif not is_whole:
            load_image(content, path)  # the end may be missing, or hidden by something that was appended
        if min(record["width"], record["height"]) < MIN_SIDE:
            record["flags"] |= Cause.TINY_IMAGE
    except UnidentifiedImageError:
        record["flags"] = Cause.NOT_AN_IMAGE if content else Cause.EMPTY_IMAGE_FILE
    except BadImage as error:
        is_cut = "truncated" in error.cause.lower()
        record["flags"] = Cause.TRUNCATED_IMAGE if is_cut else Cause.DAMAGED_IMAGE
    except Exception:  # each format fails in its own way
        record["flags"] = Cause.DAMAGED_IMAGE


def show(image: str | Picture) -> Image.Image:
    """Return what the image shows; a `Picture` stays as it was. Raises `BadImage`."""
    return load_image(image.getvalue(), image.name) if isinstance(image, Picture) else load_image(image)


def ends_whole(content: bytes, format: str) -> bool:
    """Return whether the file ends as one of its format does; False where the end does not tell."""
    if format == "WEBP":
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    return format in ENDS and content.rstrip(b"\0\r\n").endswith(ENDS[format])


def look_hash(pixels: np.ndarray) -> int:
    """Return 64 bits of a picture (32, 32, 3) uint8, which of its lowest frequencies are above their median:
    scaling and compressing again mostly leave them as they are. 0: the picture shows one colour.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    if grey.std() < FLAT:
        return 0
    low = cv2.dct(grey)[:LOOK_FREQUENCIES, :LOOK_FREQUENCIES].ravel()
    low[0] = 0  # the brightness
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "little")


def explain(image: str | Picture, record: np.void) -> str:
    """Return in words what is wrong with the file."""
    if record["flags"] & NO_PIXELS:
        try:
            show(image)
        except BadImage as error:
            return error.cause
    return f"{record['width']}x{record['height']} pixels, {record['size']} bytes"
