"""Heat maps: the pixels that a model looks at for a text and each of its words, and the boxes that follow.

B pairs of image and text, T text tokens, (h, w) the image encoder's grid of patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from simla.dataset.readers.tables import MAX_MISPLACED, has_area, is_placed
from simla.dataset.text import tokenize
from simla.evaluation.grounding import box_score, heat_box, resize_heat
from simla.models.gradcam import grad_cam, itm_token_maps
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError

EVERYWHERE = 0.9  # of the image: a box that large says of no place that the model looks there


@dataclass(frozen=True, eq=False)
class Grounding:
    """text: as far as the model reads it; heat (h, w): its map, not negative; words: (word, its map), in
    order; height, width: of the image in pixels; box: [x, y, width, height] in pixels, round the largest
    region that is hot, None where nothing is, or nearly everything (EVERYWHERE); ranked: (box, score) of the
    proposals, best first.
    """

    text: str
    heat: Tensor
    words: list[tuple[str, Tensor]]
    height: int
    width: int
    box: list[float] | None
    ranked: list[tuple[list[float], float]]

    def at_image_size(self, heat: Tensor | None = None) -> Tensor:
        """Return a map (h, w), by default the whole text's, over the image's pixels, (height, width)."""
        return resize_heat(self.heat if heat is None else heat, self.height, self.width)


def text_words(tokenizer, text: str, num_tokens: int) -> tuple[str, list[tuple[str, list[int]]]]:
    """Return the text as far as its first `num_tokens` tokens go, and its words there with the positions of
    their tokens, [CLS] being 0.
    """
    encoded = tokenizer(text)
    numbers = encoded.word_ids(0)
    end = len(text) if len(numbers) == num_tokens else encoded.token_to_chars(num_tokens - 1).end
    words: dict[int, list[int]] = {}
    for position, number in enumerate(numbers[:num_tokens]):
        if number is not None:
            words.setdefault(number, []).append(position)
    spans = [encoded.word_to_chars(number) for number in words]
    pieces = [text[span.start : min(span.end, end)] for span in spans]
    return text[:end], list(zip(pieces, words.values(), strict=True))


def heat_maps(
    model: SIMLARetrieval,
    tokenizer,
    mode: str,
    block: int,
    image: Tensor,
    texts: Sequence[str],
    max_tokens: int,
) -> list[tuple[str, Tensor, list[tuple[str, Tensor]]]]:
    """Return every text as far as `max_tokens` go, its map and those of its words, each (h, w) on the CPU.

    image (B, 3, R, R), B texts. itm: a word's map is what its tokens add to that of the text. itc, which has
    one map for a whole text: the word's map is that of the word alone.
    """
    limit = model.text_encoder.config.max_position_embeddings
    inputs = tokenize(tokenizer, texts, max_tokens, position_limit=limit)
    text_ids, text_mask = (side.to(image.device) for side in inputs)
    lengths = text_mask.sum(1).tolist()
    read = [text_words(tokenizer, text, length) for text, length in zip(texts, lengths, strict=True)]
    if mode == "itm":
        grid = model.visual_encoder.patch_embed.grid_size
        maps = itm_token_maps(model, block, image, text_ids, text_mask).unflatten(2, grid).float().cpu()
        return [
            (text, row[:length].mean(0), [(word, row[tokens].sum(0) / length) for word, tokens in words])
            for row, length, (text, words) in zip(maps, lengths, read, strict=True)
        ]
    wholes = grad_cam(model, mode, block, image, text_ids, text_mask).float().cpu()
    results = []
    for pixels, whole, (text, words) in zip(image, wholes, read, strict=True):
        words = [word for word, _ in words]
        inputs = tokenize(tokenizer, words, position_limit=limit)
        ids, mask = (side.to(image.device) for side in inputs)
        maps = grad_cam(model, mode, block, pixels.expand(len(words), -1, -1, -1), ids, mask).float().cpu()
        results.append((text, whole, list(zip(words, maps, strict=True))))
    return results


def check_boxes(boxes: object, name: str) -> list[list[float]]:
    """Return the proposals as [x, y, width, height] each. Raises UserError for what is none."""
    try:
        rows = [[float(value) for value in list(box)[:4]] for box in boxes]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{name} must be a list of [x, y, width, height] in pixels, found {boxes!r}"[:500]
        ) from error
    for row in rows:
        if not has_area(row):
            raise UserError(f"{name}: {row} is no [x, y, width, height] with width and height above 0")
    return rows


def grounding(
    text: str,
    heat: Tensor,
    words: list[tuple[str, Tensor]],
    height: int,
    width: int,
    boxes: list[list[float]],
) -> Grounding:
    """Return the maps with what they say of boxes, by the rules of Grounding.py. Raises UserError where more
    than a quarter of the boxes are not in the image.
    """
    full = resize_heat(heat, height, width)
    box = heat_box(full)
    if box is not None and box[2] * box[3] >= EVERYWHERE * height * width:
        box = None
    wrong = [each for each in boxes if not is_placed(each, width, height)]
    if len(wrong) > MAX_MISPLACED * len(boxes):
        raise UserError(
            f"{len(wrong)} of {len(boxes)} boxes for {text!r} are not inside the image, {width} x {height}, "
            f"such as {wrong[0]}; they must be [x, y, width, height] in pixels, no corners or shares"
        )
    ranked = sorted(((box, box_score(full, box)) for box in boxes), key=lambda pair: -pair[1])
    return Grounding(text, heat, words, height, width, box, ranked)
