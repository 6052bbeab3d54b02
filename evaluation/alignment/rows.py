"""A question of an alignment suite, in the one format that all readers give."""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """images (I) and texts (T), of which every image is scored with every text.

    images: names of files, or whatever `simla` reads as an image; right (I): the number of the text that
    describes each image, None where none does; kind: what the question is about; ratings: what people gave
    the only pair instead of right and wrong; box: [x, y, width, height] in pixels, the part of the images
    that is shown, None = all of it.
    """

    images: tuple[Any, ...]
    texts: tuple[str, ...]
    right: tuple[int | None, ...]
    kind: str
    ratings: tuple[float, ...] = ()
    box: tuple[float, ...] | None = None
