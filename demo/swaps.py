"""An alignment suite of the embedded scenes: captions of which one thing is changed, so that they are false.

Every row has an image of the test split, a true text and a false one that differs from it in one word, or in
the order of its words:

    object      another kind of thing, which the scene does not show
    attribute   small for large, or large for small
    number      "two dogs" for "a single dog", or the other way round, each as often
    relation    left of for right of, above for below
    order       the two things of a relation change places: the same words

Both texts are made by the same rules from the scene's record, and kinds and places are drawn evenly, so that
neither text sounds the better one. What a blind reader gets beyond chance is said beside the scores.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from simla.demo.scenes import BACKGROUNDS, KINDS, noun_phrase, related_kinds
from simla.evaluation.alignment.rows import Row
from simla.utils import UserError

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIZES = {"small": "large", "large": "small"}


def scene_rows(folder: Path, split: str = "test", seed: int = 0) -> list[Row]:
    """Return the suite's rows: of each scene at most one of every kind. UserError where the demo's data are
    not there.
    """
    file = folder / f"scenes_{split}.json"
    try:
        scenes = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): make the scenes with `python -m simla.demo.data "
            f"--out {folder}`, or name their folder with --root"
        ) from error
    rows = []
    for scene in scenes:
        rng = random.Random(f"{seed}/{scene['id']}")
        for kind, true, false in swaps(scene, rng):
            rows.append(Row((str(folder / scene["image"]),), (true, false), (0,), kind))
    singles = [row for row in rows if row.kind == "number" and row.texts[0].startswith("a single ")]
    pairs = sum(row.kind == "number" for row in rows) - len(singles)
    too_many = {row.images for row in singles[pairs:]}
    return [row for row in rows if row.kind != "number" or row.images not in too_many]


def swaps(scene: dict, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yield kind, true text and false text of what can be asked of a scene."""
    counts = Counter(thing["kind"] for thing in scene["objects"])
    kinds, place = sorted(counts), rng.choice(BACKGROUNDS[scene["background"]].places)
    things = {kind: (counts[kind], size_of(kind, scene)) for kind in kinds}

    def text(said: dict[str, tuple[int, str | None]]) -> str:
        names = [noun_phrase(kind, *values) for kind, values in said.items()]
        return f"{' and '.join(names)} {place}"

    kind = rng.choice(kinds)
    alone = {kind: (counts[kind], None)}
    other = rng.choice([name for name in sorted(KINDS) if name not in counts])
    yield "object", text(alone), text({other: (counts[kind], None)})
    sized = [kind for kind in kinds if things[kind][1] in SIZES]
    if sized:
        kind = rng.choice(sized)
        number, size = things[kind]
        yield "attribute", text({kind: (number, size)}), text({kind: (number, SIZES[size])})
    kind = rng.choice([kind for kind in kinds if counts[kind] == max(counts.values())])
    if counts[kind] < 3:
        texts = f"a single {kind} {place}", f"{noun_phrase(kind, 2, None)} {place}"
        yield "number", *(texts if counts[kind] == 1 else reversed(texts))
    related = [(a, r, b) for (a, b), names in sorted(related_kinds(scene).items()) for r in names]
    if related:
        a, relation, b = rng.choice(related)
        first, second = noun_phrase(a, counts[a], None), noun_phrase(b, counts[b], None)
        yield "relation", f"{first} {relation} {second}", f"{first} {OPPOSITE[relation]} {second}"
        yield "order", f"{first} {relation} {second}", f"{second} {relation} {first}"


def size_of(kind: str, scene: dict) -> str | None:
    """Return the size that all things of a kind have, None where they differ."""
    sizes = {thing["size"] for thing in scene["objects"] if thing["kind"] == kind}
    return sizes.pop() if len(sizes) == 1 else None
