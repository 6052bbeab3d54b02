"""Alignment suites: their official files read as rows of one format, their images found.

The layouts are those that the authors' own readers expect:

    sugar_crepe      add_att.json ... swap_obj.json of github.com/RAIVNLab/sugar-crepe, data/; COCO val2017
    valse            the eleven files of github.com/Heidelberg-NLP/VALSE, data/; images of COCO, Visual7W,
                     SWiG and VisDial. Rows whose foil fewer than two of three annotators refused are left
                     out, as its authors recommend
    vsr              test.jsonl of a split of github.com/cambridgeltl/visual-spatial-reasoning; COCO 2017
    vl_checklist     data/**/*.json of github.com/om-ai-lab/VL-CheckList; of several texts the first, as its
                     evaluate.py does; images of Visual Genome, SWiG, HAKE
    winoground       examples.jsonl and images/*.png of huggingface.co/datasets/facebook/winoground
    aro              visual_genome_relation.json, visual_genome_attribution.json and their images, of
                     github.com/mertyg/vision-language-models-are-bows (its dataset_zoo/aro_datasets.py; each
                     image is cut to the row's box)
    flickr8k_expert  ExpertAnnotations.txt, and Flickr8k.token.txt beside it, of Flickr8k_text.zip
    flickr8k_cf      CrowdFlowerAnnotations.txt, and Flickr8k.token.txt beside it

Judgements on Flickr8k have two kinds: a caption of the photo itself, by its words, and one of another photo.
The protocol of SPICE and CLIPScore reports the second kind of flickr8k_expert, and all of flickr8k_cf.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from simla.dataset.readers.json_list import read_json
from simla.dataset.readers.tables import checked, has_area, read_json_lines, read_lines, value_of
from simla.evaluation.alignment.rows import Row
from simla.utils import UserError, log

REFUSED = "foils that fewer than two of three annotators refused"
NO_FILE = "rows with an image that is not there"
UNCLEAR = "rows whose image is a number, in a folder that is not there or in several"
OTHER_PHOTO, SAME_PHOTO = "captions of other photos", "captions of the photo itself"
SUGAR_CREPE = "add_att add_obj replace_att replace_obj replace_rel swap_att swap_obj"
VALSE = (
    "actant-swap action-replacement coreference-hard coreference-standard counting-adversarial counting-hard "
    "counting-small-quant existence foil-it plurals relations"
)
# COCO of 2014 calls a photo COCO_val2014_000000000042.jpg, VisDial VisualDialog_val2018_..., COCO of 2017 its
# number alone.
COCO_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.jpg)")

SHORT_NUMBER = re.compile(r"\d{1,11}\.\w+")

Reader = Callable[[Path, Counter], Iterator[Row]]


class Suite(NamedTuple):
    """files: patterns below --root; read: file, what is left out by cause -> rows."""

    files: tuple[str, ...]
    read: Reader


def read_suite(name: str, files: Iterable[Path], left_out: Counter) -> list[Row]:
    """Return the rows of the files; count in `left_out`, by cause, those that are not asked. UserError where
    a file is not as its authors made it, or there is no row.
    """
    files = list(files)
    rows = [row for file in files for row in SUITES[name].read(file, left_out)]
    if not rows:
        raise UserError(f"{', '.join(map(str, files))}: no row of {name} in there; name its official files")
    return rows


def files_of(name: str, root: Path) -> list[Path]:
    """Return the suite's files in the folder or below it, and warn of those that are not there. UserError
    where there is none, or one twice, whose rows would count double.
    """
    patterns = SUITES[name].files
    found = {
        pattern: [path for path in sorted(root.rglob(pattern)) if path.is_file()] for pattern in patterns
    }
    missing = [pattern for pattern, files in found.items() if not files]
    if len(missing) == len(patterns):
        raise UserError(f"--root {root}: none of the files of {name} there: {', '.join(patterns)}")
    for pattern, files in found.items():
        if len(files) > 1 and "*" not in pattern:
            raise UserError(
                f"--root {root} has {pattern} twice: {files[0]} and {files[1]}; name a folder that has it "
                "once, or all files by --file"
            )
    if missing:
        log.warning(f"{name} without {', '.join(missing)}, not below {root}: its score is that of the rest")
    return [file for files in found.values() for file in files]


# ---- images ----


def locate(rows: Iterable[Row], roots: Iterable[Path], left_out: Counter) -> list[Row]:
    """Return the rows with the paths of their images below the roots, in whichever folder; count in
    `left_out` those with an image that is not there. UserError where a folder is missing.
    """
    paths = defaultdict(list)
    for root in roots:
        if not root.is_dir():
            raise UserError(f"--image_root {root} is not a folder; name the one with the suite's images")
        for path in sorted(root.rglob("*")):
            paths[path.name].append(path)
    located = []
    for row in rows:
        found = [_look_up(name, paths) for name in row.images]
        if causes := [cause for cause in found if isinstance(cause, str)]:
            left_out[causes[0]] += 1
        else:
            located.append(row._replace(images=tuple(map(str, found))))
    return located


def _look_up(name: str, paths: dict[str, list[Path]]) -> Path | str:
    """Return the path that ends as the name does, folders included, or else the first of the file's name; why
    there is none. A mere number, as Visual Genome's names are, may be another data set's photo.
    """
    parts = Path(name).parts
    candidates = paths.get(parts[-1], [])
    if not candidates and (match := COCO_2014.fullmatch(parts[-1])):
        candidates = paths.get(match[1], [])
    if not candidates:
        return NO_FILE
    whole = [path for path in candidates if path.parts[-len(parts) :] == parts]
    if SHORT_NUMBER.fullmatch(parts[-1]) and len({os.path.realpath(path) for path in whole}) != 1:
        return UNCLEAR
    return (whole or candidates)[0]


# ---- readers ----


def _one_of_two(image: str, true: str, false: str, kind: str, box: tuple | None = None) -> Row:
    return Row((image,), (true, false), (0,), kind, box=box)


def _entries(file: Path, kind: type[dict] | type[list]) -> Iterator[tuple[str, object]]:
    """Yield place and value of each entry of a JSON object or list."""
    content = read_json(file, kind)
    for key, entry in content.items() if kind is dict else enumerate(content):
        yield f"{file}, entry {key}", entry


def read_sugar_crepe(file: Path, left_out: Counter) -> Iterator[Row]:
    for where, entry in _entries(file, dict):
        names = ("filename", "caption", "negative_caption")
        yield _one_of_two(*(checked(entry, name, str, where) for name in names), file.stem)


def read_valse(file: Path, left_out: Counter) -> Iterator[Row]:
    for where, entry in _entries(file, dict):
        votes = checked(value_of(entry, "mturk", where), "caption", int, f"{where}, mturk")
        if votes < 2:
            left_out[REFUSED] += 1
            continue
        names = ("image_file", "caption", "foil")
        yield _one_of_two(*(checked(entry, name, str, where) for name in names), file.stem)


def read_vsr(file: Path, left_out: Counter) -> Iterator[Row]:
    for where, entry in read_json_lines(file):
        image, caption, relation = (checked(entry, k, str, where) for k in ("image", "caption", "relation"))
        label = checked(entry, "label", int, where)
        if label not in (0, 1):
            raise UserError(f"{where}: 'label' must be 0 or 1, found {label}")
        yield Row((image,), (caption,), (0 if label else None,), relation)


def read_vl_checklist(file: Path, left_out: Counter) -> Iterator[Row]:
    parts = file.with_suffix("").parts
    top = next(
        (number for number, part in enumerate(parts) if part in ("Object", "Attribute", "Relation")), None
    )
    if top is None:
        raise UserError(f"{file} lies in no folder Object, Attribute or Relation, which says what it asks")
    last = parts[-1].rpartition("_")[2] if parts[top] != "Object" else parts[top + 1].lower()
    for where, entry in _entries(file, list):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise UserError(f"{where} must be [image, {{POS, NEG}}], found {entry!r}"[:500])
        texts = [checked(entry[1], side, list, where) for side in ("POS", "NEG")]
        if not all(some and isinstance(some[0], str) for some in texts):
            raise UserError(f"{where} needs a text in POS and in NEG, found {entry[1]!r}"[:500])
        yield _one_of_two(entry[0], texts[0][0], texts[1][0], f"{parts[top]} {last}")


def read_winoground(file: Path, left_out: Counter) -> Iterator[Row]:
    names = ("image_0", "image_1", "caption_0", "caption_1", "collapsed_tag")
    for where, entry in read_json_lines(file):
        *images, first, second, tag = (checked(entry, name, str, where) for name in names)
        files = tuple(image if image.endswith(".png") else f"{image}.png" for image in images)
        yield Row(files, (first, second), (0, 1), tag)


def read_aro(file: Path, left_out: Counter) -> Iterator[Row]:
    for where, entry in _entries(file, list):
        box = [checked(entry, f"bbox_{side}", int, where) for side in "xywh"]
        if not has_area(box):
            raise UserError(f"{where}: the box {box} has no area")
        names = ("image_path", "true_caption", "false_caption")
        texts = (checked(entry, name, str, where) for name in names)
        yield _one_of_two(*texts, file.stem.removeprefix("visual_genome_"), tuple(box))


def read_flickr8k(file: Path, left_out: Counter, num_ratings: int | None) -> Iterator[Row]:
    """Yield judged pairs of lines IMAGE, CAPTION ID, three marks of experts (num_ratings 3), or the share of
    readers who say yes and their numbers (None: the share counts).
    """
    captions, of_photo = {}, defaultdict(set)
    for number, line in read_lines(file.with_name("Flickr8k.token.txt")):
        name, tab, caption = line.decode(errors="replace").partition("\t")
        if line.strip() and not tab:
            raise UserError(
                f"{file.with_name('Flickr8k.token.txt')}, line {number} has no tab: {name[:80]!r}"
            )
        captions[name] = caption.strip()
        of_photo[name.partition("#")[0]].add(caption.strip())
    for number, line in read_lines(file):
        where, cells = f"{file}, line {number}", line.decode(errors="replace").split("\t")
        if not line.strip():
            continue
        if len(cells) != 5 or cells[1] not in captions:
            raise UserError(f"{where} is not a photo, a caption of Flickr8k.token.txt and three numbers")
        try:
            ratings = tuple(float(cell) for cell in cells[2 : 2 + (num_ratings or 1)])
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        text = captions[cells[1]]
        kind = SAME_PHOTO if text in of_photo[cells[0]] else OTHER_PHOTO
        yield Row((cells[0],), (text,), (None,), kind, ratings)


def read_flickr8k_expert(file: Path, left_out: Counter) -> Iterator[Row]:
    return read_flickr8k(file, left_out, 3)


def read_flickr8k_cf(file: Path, left_out: Counter) -> Iterator[Row]:
    return read_flickr8k(file, left_out, None)


SUITES = {
    "sugar_crepe": Suite(tuple(f"{name}.json" for name in SUGAR_CREPE.split()), read_sugar_crepe),
    "valse": Suite(tuple(f"{name}.json" for name in VALSE.split()), read_valse),
    "vsr": Suite(("test.jsonl",), read_vsr),
    "vl_checklist": Suite(
        tuple(f"{top}/**/*.json" for top in ("Attribute", "Object", "Relation")), read_vl_checklist
    ),
    "winoground": Suite(("examples.jsonl",), read_winoground),
    "aro": Suite(("visual_genome_relation.json", "visual_genome_attribution.json"), read_aro),
    "flickr8k_expert": Suite(("ExpertAnnotations.txt",), read_flickr8k_expert),
    "flickr8k_cf": Suite(("CrowdFlowerAnnotations.txt",), read_flickr8k_cf),
}
