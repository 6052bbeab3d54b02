"""Reads every file of a folder as training and evaluation do, and says what became of each.

python tests/awkward_images.py FOLDER, such as Tests/images of the source of Pillow, which
pip download --no-deps --no-binary :all: pillow
"""

import resource
import sys
import time
import warnings
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from simla.dataset.images import BadImage, JpegFile, load_image, open_content, open_image
from simla.utils import with_progress

SLOW_SECONDS, LARGE_MIB = 2.0, 200


def examine(path: Path) -> tuple[str, str]:
    """What became of a file ("read", or the cause why not) and what about it is strange, if anything."""
    found = []
    for read in (load_image, load_for_training):
        try:
            found.append(read(path))
        except BadImage as error:
            found.append(error.cause.partition(":")[0])
    evaluation, training = found
    if isinstance(evaluation, str) or isinstance(training, str):
        same = isinstance(evaluation, str) and evaluation == training
        strange = "" if same else f"evaluation: {evaluation}, training: {training}"
        with suppress(Exception):  # neither does PIL
            if as_pil_converts(path) is not None:
                strange += " but PIL reads it"
        return evaluation if isinstance(evaluation, str) else "read", strange
    differences = ["evaluation and training part"] if apart(evaluation, training) else []
    plain = as_pil_converts(path)
    if plain is not None and apart(evaluation, plain):
        differences.append("not as PIL converts it")
    return "read", ", ".join(differences)


def load_for_training(path: Path) -> Image.Image:
    image = open_image(path)
    return Image.fromarray(image.decode(1)[..., ::-1]) if isinstance(image, JpegFile) else image


def as_pil_converts(path: Path) -> Image.Image | None:
    """By convert("RGB") alone; None for what is to be read otherwise: turned, transparent, of more bits."""
    with open_content(path.read_bytes(), None) as image:  # PIL itself refuses long texts
        image.load()
        special = image.has_transparency_data or image.mode.startswith(("I", "F"))
        return None if special or turned(image) else image.convert("RGB")


def turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) != 1
    except Exception:
        return False


def apart(one: Image.Image, other: Image.Image) -> bool:
    """Whether they are more than rounding apart, a level in the mean."""
    if one.size != other.size:
        return True
    return np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean() > 1


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    counts, files, remarks, begin = Counter(), defaultdict(list), [], time.monotonic()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in with_progress(paths, len(paths), "Files", 200):
        started, before = time.monotonic(), peak_mib()
        outcome, strange = examine(path)
        seconds, grown = time.monotonic() - started, peak_mib() - before
        counts[outcome] += 1
        files[outcome].append(path.name)
        strange += f" took {seconds:.1f} s" * (seconds > SLOW_SECONDS)
        strange += f" took {grown} MiB more" * (grown > LARGE_MIB)
        if strange:
            remarks.append(f"{path.relative_to(folder)}: {strange.strip()}")
    for outcome, count in counts.most_common():
        examples = "" if outcome == "read" else "  such as " + ", ".join(files[outcome][:3])
        print(f"{count:5}  {outcome}{examples}")
    print(*remarks, sep="\n")
    print(f"{len(paths)} files, {time.monotonic() - begin:.1f} s, at most {peak_mib()} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
