"""WebDataset shards of pre-training annotation files and their images, for `train_file` to name instead.

Needs    an annotation file, or several, of {"image": path, "caption": text or list of texts}
Writes   00000.tar, 00001.tar, ...: 000000000.jpg (png, webp) with 000000000.txt, or .json for several
         captions, numbered as the entries; 00000_stats.json, ...: what is in them; shards.json: of what
Rules    Image files are taken as they are. Those of formats that shards do not have and, with --image_res,
         those whose shorter side is longer become JPEGs. Entries whose image cannot be read are left out. The
         same files give the same bytes. A run that was stopped goes on where it was.
"""

import argparse
import io
import json
import multiprocessing
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from PIL import Image

from simla.dataset.prepare.common import Report
from simla.dataset.pretrain import read_pairs
from simla.dataset.transforms import BadImage, load_image, open_content
from simla.utils import UserError, atomic_write, fill_in, num_cores, with_progress

ROOT = "folder that relative image paths are relative to; by default the annotation file's"
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
QUALITY = 95  # of the JPEGs made here
NUM_PROBED = 100  # entries whose size tells how many fill a shard
SETTINGS = "shards.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--annotations", nargs="+", action="extend", required=True, metavar="FILE", help="annotation files"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard_mb", type=float, default=500, help="size of a shard, about (500)")
    size.add_argument("--samples_per_shard", type=int, default=0, help="instead of --shard_mb")
    parser.add_argument(
        "--image_res",
        type=int,
        default=0,
        help="shrink images to this shorter side, in pixels: rather twice image_res of the training, which "
        "crops; 0 = as they are",
    )
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes")


def prepare(_: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    if min(options.shard_mb, options.workers) <= 0 or min(options.samples_per_shard, options.image_res) < 0:
        raise UserError("--shard_mb, --samples_per_shard, --image_res and --workers count upwards from 0")
    entries = read_pairs(options.annotations, options.root)
    res = options.image_res
    per_shard = options.samples_per_shard or fill_of(entries, options.shard_mb * 1e6, res)
    files = [Path(fill_in(file)).absolute() for file in options.annotations]
    _same_settings(
        out / SETTINGS,
        {
            "annotations": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "root": options.root,
            "samples_per_shard": per_shard,
            "image_res": res,
        },
    )
    numbers = range(-(-len(entries) // per_shard))
    make = partial(write_shard, entries=entries, out=out, per_shard=per_shard, res=res)
    workers = min(options.workers, len(numbers))
    if workers > 1:
        # spawn: forking a process that has started threads (torch) may hang
        try:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                found = list(_with_progress(pool.map(make, numbers), numbers))
        except BrokenProcessPool as error:
            raise UserError(
                "one of the worker processes was killed (out of memory?); the same command goes on where it "
                "was, with fewer --workers it needs less"
            ) from error
    else:
        found = list(_with_progress(map(make, numbers), numbers))
    _report(found, out, len(entries), report)


def _with_progress(shards: Iterable[dict], numbers: range) -> Iterable[dict]:
    return with_progress(shards, len(numbers), "Shards", max(1, len(numbers) // 100))


def _report(found: list[dict], out: Path, num_entries: int, report: Report) -> None:
    report.count("entries", num_entries)
    for shard in found:
        for cause, (number, example) in shard["left_out"].items():
            report.leave_out(cause, example, number)
    num_written = sum(shard["successes"] for shard in found)
    if not num_written:
        raise UserError("no image could be read; check the image paths, or --root")
    names = f"{out}/{{{0:05}..{len(found) - 1:05}}}.tar"
    report.written.append((Path(names), num_written))
    report.note(f"train_file: '{names}'")


def _same_settings(path: Path, settings: dict) -> None:
    """Notes in the folder what it is made of; UserError where it has shards of something else."""
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError):
        before = settings
    if before != settings:
        changed = [name for name in settings if before.get(name) != settings[name]]
        raise UserError(
            f"{path.parent} has shards with other {', '.join(changed)}, see {path.name}; choose a new --out "
            "or delete it"
        )
    with atomic_write(path) as file:
        file.write(json.dumps(settings, indent=1).encode())


def fill_of(entries: Sequence[dict], num_bytes: float, res: int) -> int:
    """How many entries make a shard of so many bytes, judged by some. UserError where none can be read."""
    sizes = []
    for number in range(0, len(entries), -(-len(entries) // NUM_PROBED)):
        try:
            sizes.append(sum(map(_size_in_tar, sample_files(entries[number], res).values())))
        except BadImage as error:
            problem = error
    if not sizes:
        raise UserError(f"none of the images that were tried could be read, the last: {problem}")
    return max(1, int(num_bytes * len(sizes) / sum(sizes)))


def _size_in_tar(content: bytes) -> int:
    block = tarfile.BLOCKSIZE
    return block + -(-len(content) // block) * block


def write_shard(number: int, entries: Sequence[dict], out: Path, per_shard: int, res: int) -> dict:
    """Makes a shard, unless it is there; returns its statistics."""
    path, statistics = out / f"{number:05}.tar", out / f"{number:05}_stats.json"
    if path.is_file() and statistics.is_file():
        return json.loads(statistics.read_bytes())
    share = range(len(entries))[number * per_shard : (number + 1) * per_shard]
    left_out: dict[str, tuple[int, str]] = {}  # cause -> how many, the first

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for place in share:
            try:
                yield f"{place:09}", sample_files(entries[place], res)
            except BadImage as error:
                cause = error.cause.partition(":")[0]
                count, first = left_out.get(cause, (0, error.path))
                left_out[cause] = count + 1, first

    write_tar(path, samples())
    successes = len(share) - sum(count for count, _ in left_out.values())
    found = {"count": len(share), "successes": successes, "left_out": left_out}
    write_statistics(statistics, found)
    return found


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Writes a shard of keys and, by their endings, the members of each."""
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for kind, content in members.items():
                member = tarfile.TarInfo(f"{key}.{kind}")  # with no time and no owner
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_statistics(path: Path, found: dict) -> None:
    """found: what the shard of this name has, `count` and `successes` as img2dataset writes them."""
    with atomic_write(path) as file:
        file.write(json.dumps(found, indent=1).encode())


def caption_file(texts: list[str]) -> dict[str, bytes]:
    """The member of a sample that holds its captions, by its ending."""
    if len(texts) == 1:
        return {"txt": texts[0].encode("utf-8", "replace")}
    return {"json": json.dumps({"caption": texts}).encode()}


def sample_files(entry: dict, res: int) -> dict[str, bytes]:
    """Image and caption as members of a shard, by their endings. Raises `BadImage`."""
    (path,) = entry["images"]
    texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise BadImage(path, "no caption")
    kind, content = _image_file(path, res)
    return {kind: content, **caption_file(texts)}


def _image_file(path: str, res: int) -> tuple[str, bytes]:
    image = load_image(path)  # decoded in any case, to see whether it can be
    content = Path(path).read_bytes()
    with open_content(content) as source:
        kind = KINDS.get(source.format)
    side = min(image.size)
    if kind and not 0 < res < side:
        return kind, content
    if 0 < res < side:
        width, height = (max(1, round(length * res / side)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return "jpg", file.getvalue()
