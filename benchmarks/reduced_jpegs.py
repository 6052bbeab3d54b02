"""How often training crops of a folder's JPEGs are decoded at a half or less, and what it changes.

python benchmarks/reduced_jpegs.py FOLDER [--image_res 256] [--min_crop_scale 0.2] [--draws 10]

Draws crops as training does and makes each of them twice: as training does, and from the picture decoded in
full. The difference is in levels of 0 to 255, over the pixels of the crops that were decoded smaller, the
half pixel by which their edges move included.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from simla.dataset.images import JpegFile, load_image, open_image
from simla.dataset.transforms import ItemRandom, TrainTransform, crops, reduction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image_res", type=int, default=256)
    parser.add_argument("--min_crop_scale", type=float, default=0.2)
    parser.add_argument("--draws", type=int, default=10, help="crops of each picture; default: %(default)s")
    args = parser.parse_args()
    transform = TrainTransform(args.image_res, args.min_crop_scale)
    scales: Counter[int] = Counter()
    differences = []
    files = sorted(args.folder.rglob("*.jpg"))
    for index, file in enumerate(files):
        jpeg = open_image(file)
        if not isinstance(jpeg, JpegFile):
            continue
        whole = load_image(file)
        for draw in range(args.draws):
            view = transform.draw_view(jpeg.size, ItemRandom(0, draw, index), True)
            scale = reduction(view.box, view.res)
            scales[scale] += 1
            if scale > 1:
                (fast,), (full,) = crops(jpeg, [view]), crops(whole, [view])
                differences.append(np.abs(fast.astype(np.int16) - full))
    total = scales.total()
    print(f"{len(files)} files, {total} crops of {args.image_res} x {args.image_res}")
    for scale, number in sorted(scales.items()):
        print(f"decoded at 1/{scale}: {number} ({number / total:.1%})")
    if differences:
        levels = np.stack(differences)
        print(
            f"of these {len(levels)}: mean difference {levels.mean():.2f} levels, of the worst crop "
            f"{levels.mean((1, 2, 3)).max():.2f}; {(levels <= 2).mean():.1%} of the values within 2 levels, "
            f"{(levels <= 8).mean():.1%} within 8"
        )


if __name__ == "__main__":
    main()
