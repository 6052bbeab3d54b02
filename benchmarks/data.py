"""Pre-training samples per second of one core, ours against a plain formulation with torchvision and PIL.

python benchmarks/data.py [--out output/benchmark-data]

Both make the same sample from a JPEG: crop (a fifth of the area to all of it) at 256 pixels, flip,
RandAugment, the image tokenizer's view of the same crop at 128 pixels, the hidden patches.
The plain formulation has our RandAugment, which is faster than one through PIL, so what is compared is
decoding, cropping, resizing and the making of tensors. One process with one thread takes turns between the
two; then two loader processes each make batches. The pictures are made here and deleted at the end.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import torch
from measure import last_line
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from simla.dataset.loaders import to_device, train_loader
from simla.dataset.masking import BlockMask
from simla.dataset.mixture import Mixture
from simla.dataset.pretrain import PretrainData
from simla.dataset.randaugment import rand_augment
from simla.dataset.text import names_side
from simla.dataset.transforms import MEAN, STD, ItemRandom, PretrainTransform

SIZES = {(640, 480): 24, (2000, 1500): 12}  # width, height -> number of pictures
IMAGE_RES, CODE_RES, GRID, MIN_SCALE = 256, 128, 16, 0.2
QUALITY, REPEATS, BATCH_SIZE, NUM_WORKERS = 90, 11, 12, 2
CAPTION = "A small dog, and three more dogs beside a red bus on the street."


class PlainItems(PretrainData):
    """What one writes with torchvision: PIL decodes all pixels, each view is resized from them, floats."""

    def __init__(self, entries: Mixture, block_mask: BlockMask, seed: int):
        super().__init__(
            entries, PretrainTransform(IMAGE_RES, code_res=CODE_RES), block_mask, seed, flip_captions=False
        )
        self.draws = np.random.RandomState(0)
        self.to_input = tv.Compose([tv.ToTensor(), tv.Normalize(MEAN, STD)])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        entry, rng = self.entries[index], ItemRandom(self.seed, epoch, index)
        image = Image.open(entry["images"][0]).convert("RGB")
        box = tv.RandomResizedCrop.get_params(image, (MIN_SCALE, 1.0), (3 / 4, 4 / 3))
        view, code_view = (
            tvf.resized_crop(image, *box, [res, res], tv.InterpolationMode.BICUBIC)
            for res in (IMAGE_RES, CODE_RES)
        )
        if torch.rand(()) < 0.5 and not names_side(entry["text"]):
            view, code_view = tvf.hflip(view), tvf.hflip(code_view)
        view = self.to_input(rand_augment(np.array(view), self.draws))
        return {
            **entry,
            "files": entry["images"],
            "images": view[None],
            "code_view": tvf.to_tensor(code_view),
            "patch_mask": torch.from_numpy(self.block_mask(rng.python).reshape(-1)),
            "mask_seed": rng.python.getrandbits(63),
            "bad": [],
        }


def collate(items: list[dict]) -> dict[str, Tensor]:
    """Return the tensors alone: words are no part of this."""
    images = torch.cat([item["images"] for item in items])
    return {"image": images, "code_view": torch.stack([item["code_view"] for item in items])}


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Return soft detail at all scales, hard-edged shapes and grain: as a JPEG of quality 90 about 1.8 bits a
    pixel, the density of a photograph.
    """
    rng = np.random.RandomState(seed)
    picture = np.full((height, width, 3), 120, np.float32)
    cells, strength = 4, 70.0
    while cells < width:
        noise = rng.randn(max(2, cells * height // width), cells, 3).astype(np.float32)
        noise = 0.8 * noise.mean(2, keepdims=True) + 0.35 * noise  # most detail is in the brightness
        picture += strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        cells, strength = 2 * cells, 0.55 * strength
    shapes = picture.copy()
    for _ in range(40):
        centre, radius = rng.randint(0, (width, height), 2), rng.randint(width // 40, width // 6)
        angles = np.sort(rng.rand(rng.randint(3, 8), 1) * 2 * np.pi, axis=0)
        corners = centre + radius * np.hstack([np.cos(angles), np.sin(angles)])
        cv2.fillPoly(shapes, [corners.astype(np.int32)], rng.randint(0, 256, 3).tolist(), cv2.LINE_AA)
    picture += 0.65 * (shapes - picture) + 5 * rng.randn(height, width, 1)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def formulations(files: list[str]) -> dict[str, PretrainData]:
    entries = Mixture([[{"images": [file], "text": CAPTION, "where": file} for file in files]])
    block_mask = BlockMask(GRID, 75, 16)
    transform = PretrainTransform(IMAGE_RES, MIN_SCALE, code_res=CODE_RES)
    return {
        "plain": PlainItems(entries, block_mask, seed=0),
        "ours": PretrainData(entries, transform, block_mask, seed=0, flip_captions=False),
    }


def rates(passes: dict[str, Callable[[int], int]], repeats: int) -> dict[str, float]:
    """Return samples per second, the median over `repeats` passes in turn; a pass returns how many it had."""
    seconds = {name: [] for name in passes}
    for epoch in range(repeats + 1):
        for name, make in passes.items():
            start = time.perf_counter()
            num_samples = make(epoch)
            seconds[name].append((time.perf_counter() - start) / num_samples)
    return {name: 1 / median(found[1:]) for name, found in seconds.items()}  # the first one warms up


def one_process(files: list[str]) -> dict[str, float]:
    def make(dataset: PretrainData, epoch: int) -> int:
        return sum(dataset[epoch, index] is not None for index in range(len(dataset)))

    passes = formulations(files).items()
    return rates({n: lambda epoch, d=dataset: make(d, epoch) for n, dataset in passes}, REPEATS)


def two_workers(files: list[str]) -> dict[str, float]:
    """Return the samples per second of batches on the CPU as the model takes them, ours normalised there."""
    config = {"num_workers": NUM_WORKERS, "grad_accumulation_steps": 1, "batch_timeout_minutes": 1}
    loaders = {
        name: train_loader(dataset, BATCH_SIZE, 0, config, collate)
        for name, dataset in formulations(files * (240 // len(files))).items()
    }

    def make(name: str, epoch: int) -> int:
        loaders[name].sampler.set_epoch(epoch)
        if name == "plain":
            return sum(len(batch["image"]) for batch in loaders[name])
        return sum(len(to_device(batch, torch.device("cpu"))["image"]) for batch in loaders[name])

    return rates({name: lambda epoch, name=name: make(name, epoch) for name in loaders}, repeats=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", default=Path("output/benchmark-data"), type=Path, help="where the pictures are while it runs"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    with TemporaryDirectory(dir=args.out) as folder:
        for (width, height), num in SIZES.items():
            files = [f"{folder}/{width}_{number}.jpg" for number in range(num)]
            for number, file in enumerate(files):
                photo(width, height, number).save(file, quality=QUALITY)
            kilobytes = sum(Path(file).stat().st_size for file in files) / num / 1000
            measured = {"one_core": one_process(files), f"{NUM_WORKERS}_workers": two_workers(files)}
            found[f"{width}x{height}"] = {"jpeg_kilobytes": round(kilobytes), **measured}
    report(found)


def report(found: dict[str, dict]) -> None:
    print(f"{'samples per second':34}{'plain':>9}{'ours':>9}{'ratio':>8}")
    ratios = {}
    for size, measured in found.items():
        for name, speeds in list(measured.items())[1:]:
            ratio = ratios[f"{size} {name}"] = speeds["ours"] / speeds["plain"]
            label = f"{size}, {measured['jpeg_kilobytes']} kB, {name.replace('_', ' ')}"
            print(f"{label:34}{speeds['plain']:9.1f}{speeds['ours']:9.1f}{ratio:8.2f}")
    figures = {
        "ratio": min(ratio for name, ratio in ratios.items() if "core" in name),
        "ratios": ratios,
        "samples_per_second": found,
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    last_line(figures, torch.device("cpu"))


if __name__ == "__main__":
    main()
