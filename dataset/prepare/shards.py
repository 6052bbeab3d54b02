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
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from simla.dataset.images import BadImage, load_image, open_content
from simla.dataset.prepare.common import Report
from simla.dataset.workers import Workers
from simla.utils import UserError, atomic_write, fill_in, num_cores, with_progress

ROOT = "folder that relative image paths are relative to; by default the annotation file's"
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
QUALITY = 95  # of the JPEGs made here
NUM_PROBED = 100  # entries whose size tells how many fill a shard
SETTINGS = "shards.json"


@dataclass(frozen=True)
class Job:
    """All shards to make: of these entries, in this folder."""

    entries: Sequence[dict]
    out: Path
    per_shard: int
    image_res: int  # pixels of the shorter side, 0: as it is


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
    from simla.dataset.pretrain import read_pairs  # here, because torch comes with it

    entries, res = read_pairs(options.annotations, options.root), options.image_res
    per_shard = options.samples_per_shard or fill_of(entries, options.shard_mb * 1e6, res)
    settings = {
        "annotations": identities(Path(fill_in(file)) for file in options.annotations),
        "root": options.root,
        "samples_per_shard": per_shard,
        "image_res": res,
    }
    check_settings(out / SETTINGS, settings, "--out")
    numbers = range(-(-len(entries) // per_shard))
    with Workers(Job(entries, out, per_shard, res), min(options.workers, len(numbers))) as workers:
        shards = workers.map(write_shard, numbers)
        shards = list(with_progress(shards, len(numbers), "Shards", max(1, len(numbers) // 100)))
    report.count("entries", len(entries))
    for shard in shards:
        for cause, (number, example) in shard["left_out"].items():
            report.leave_out(cause, example, number)
    num_written = sum(shard["successes"] for shard in shards)
    if not num_written:
        raise UserError("no image could be read; check the image paths, or --root")
    names = f"{out}/{{{0:05}..{len(shards) - 1:05}}}.tar"
    report.written.append((Path(names), num_written))
    report.notes.append(f"train_file: '{names}'")


def identities(files: Iterable[Path]) -> list[list]:
    """Return absolute path, size and time of change of each file, as JSON has them: was it this one?"""
    return [
        [str(path.absolute()), status.st_size, status.st_mtime_ns]
        for path, status in ((path, path.stat()) for path in files)
    ]


def check_settings(path: Path, settings: dict, flag: str) -> None:
    """Note in the file what the shards beside it are made of; raise UserError, which tells to choose another
    `flag`, where they are made of something else, or of what nobody has noted.
    """
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        before = {} if any(path.parent.glob("*.tar")) else settings
    except (OSError, ValueError):
        before = {}
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        raise UserError(
            f"{path.parent} has shards with other {', '.join(changed)}, see {path.name}; choose a new {flag} "
            "or delete it"
        )
    write_json(path, settings)


def fill_of(entries: Sequence[dict], num_bytes: float, res: int) -> int:
    """Return how many entries make a shard of so many bytes, judged by some that are tried.

    Raises UserError where none of them can be read.
    """
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


def write_shard(job: Job, number: int) -> dict:
    """Make a shard, unless it is there, and return its statistics."""
    path, statistics_file = job.out / f"{number:05}.tar", job.out / f"{number:05}_stats.json"
    if path.is_file() and statistics_file.is_file():
        return json.loads(statistics_file.read_bytes())
    indices = range(len(job.entries))[number * job.per_shard : (number + 1) * job.per_shard]
    left_out: dict[str, tuple[int, str]] = {}  # cause -> how many, the first

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for index in indices:
            try:
                yield f"{index:09}", sample_files(job.entries[index], job.image_res)
            except BadImage as error:
                cause = error.cause.partition(":")[0]
                count, first = left_out.get(cause, (0, error.path))
                left_out[cause] = count + 1, first

    statistics = {"count": len(indices), "successes": write_tar(path, samples()), "left_out": left_out}
    write_json(statistics_file, statistics)
    return statistics


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write a shard of samples, key and members by their endings, and return how many there are."""
    number = 0
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            number += 1
            for kind, content in members.items():
                member = tarfile.TarInfo(f"{key}.{kind}")  # with no time and no owner
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return number


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def caption_file(texts: list[str]) -> dict[str, bytes]:
    """Return the member of a sample that holds its captions, by its ending."""
    if len(texts) == 1:
        return {"txt": texts[0].encode("utf-8", "replace")}
    return {"json": json.dumps({"caption": texts}).encode()}


def sample_files(entry: dict, res: int) -> dict[str, bytes]:
    """Return image and captions as members of a shard, by their endings; raise BadImage."""
    (path,) = entry["images"]
    texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise BadImage(path, "no caption")
    kind, content = image_file(path, path, res)
    return {kind: content, **caption_file(texts)}


def image_file(source: str | bytes, name: str, res: int = 0) -> tuple[str, bytes]:
    """Return ending and content as a member of a shard, the shorter side at most `res` where not 0.

    source: a path, or the content of a file that `name` is to call. Raises BadImage.
    """
    image = load_image(source, name)  # decoded in any case, to see whether it can be
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
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
