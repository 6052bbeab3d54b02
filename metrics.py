"""Scores as pure functions: no files, no processes."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import UserError

# Left, top, width, height in pixels; what follows, such as a detector's score, is unused.
Box = Sequence[float]

RIGHT_IOU = 0.5  # grounding: a box with at least this overlap is right
MAX_PIXEL, MIN_SIDE = 1e9, 1e-9  # of a box: within them its area is neither infinite nor 0
HEAT_THRESHOLD = 0.2  # of a heat map's maximum: the object is what is above, as in CAM (Zhou et al. 2016)


def pessimistic_ranks(scores: np.ndarray, relevant: list[list[int]]) -> np.ndarray:
    """Rank of each query's best-scored relevant candidate, 0 = first: scores (queries, candidates) ->
    (queries,)

    Ties and NaN count against the query: every irrelevant candidate with an equal score stands before it, so
    a model that gives everything the same score gets no credit and the result does not depend on a sort.
    """
    ranks = np.empty(len(scores), dtype=np.int64)
    for query, own in enumerate(relevant):
        better = ~(scores[query] < scores[query, own].max())  # not >=, which is False for NaN
        better[own] = False
        ranks[query] = better.sum()
    return ranks


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Percentage of queries with a rank below k."""
    return 100.0 * float((ranks < k).mean())


def retrieval_recall(
    scores_i2t: np.ndarray, scores_t2i: np.ndarray, img2txt: list[list[int]], txt2img: list[int]
) -> dict[str, float]:
    """Recall@1/5/10 in percent, both ways.

    scores_i2t (images, texts), scores_t2i (texts, images); img2txt: the captions of each image, any of which
    is right; txt2img: the image of each caption -> txt_r1 ... (image -> text), img_r1 ... (text -> image),
    r_mean. Raises UserError for an image without captions, for which no text would be right.
    """
    without = [image for image, texts in enumerate(img2txt) if not len(texts)]
    if without:
        raise UserError(
            f"{len(without)} of {len(img2txt)} images have no caption, the first is image {without[0]}: no "
            "text is right for them, so leave them out of the scores"
        )
    text_ranks = pessimistic_ranks(scores_i2t, img2txt)
    image_ranks = pessimistic_ranks(scores_t2i, [[image] for image in txt2img])
    result = {}
    for name, ranks in (("txt", text_ranks), ("img", image_ranks)):
        recalls = [recall_at(ranks, k) for k in (1, 5, 10)]
        result |= dict(zip((f"{name}_r1", f"{name}_r5", f"{name}_r10"), recalls, strict=True))
        result[f"{name}_r_mean"] = sum(recalls) / 3
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    return result


def retrieval_chance(img2txt: list[list[int]], txt2img: list[int]) -> dict[str, float]:
    """Expected recall of a random order, in percent: the same keys as `retrieval_recall`."""
    num_texts, num_images = len(txt2img), len(img2txt)
    result = {}
    for k in (1, 5, 10):
        missed = [_all_missed(num_texts, len(own), k) for own in img2txt]
        result[f"txt_r{k}"] = 100.0 * (1 - sum(missed) / len(missed))
        result[f"img_r{k}"] = 100.0 * min(k, num_images) / num_images
    for name in ("txt", "img"):
        result[f"{name}_r_mean"] = sum(result[f"{name}_r{k}"] for k in (1, 5, 10)) / 3
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    return result


def _all_missed(num_candidates: int, num_relevant: int, k: int) -> float:
    """Probability that k candidates drawn without replacement hold none of the relevant ones."""
    probability = 1.0
    for i in range(min(k, num_candidates)):
        probability *= max(0, num_candidates - num_relevant - i) / (num_candidates - i)
    return probability


def confusion_counts(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """labels, predicted (n,) -> counts (C, C), rows the true class, columns the predicted one"""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)


def accuracy(counts: Tensor) -> float:
    """Percentage on the diagonal of a confusion matrix (C, C)."""
    return 100.0 * counts.trace().item() / max(counts.sum().item(), 1)


def majority_accuracy(counts: Tensor) -> float:
    """What always answering the most frequent class would get: confusion matrix (C, C) -> percentage"""
    return 100.0 * counts.sum(1).max().item() / max(counts.sum().item(), 1)


def consistency(identifiers: Sequence[str], right: Sequence[bool]) -> float:
    """Return NLVR2's second metric: of its sentences, the percentage judged right on all pairs of images.

    identifiers: split-set-pair-sentence of each entry, as NLVR2 has them; right: whether it is judged right.
    """
    sentences: dict[tuple[str, str, str], bool] = {}
    for identifier, is_right in zip(identifiers, right, strict=True):
        split, image_set, _pair, number = identifier.split("-")
        sentence = split, image_set, number
        sentences[sentence] = sentences.get(sentence, True) and is_right
    return 100.0 * sum(sentences.values()) / len(sentences)


def confusion_table(counts: Tensor, classes: Sequence[str]) -> str:
    """A confusion matrix (C, C) as lines of text: a row for each true class, a column for each predicted."""
    corner = "true \\ predicted"
    rows = [[corner, *classes]]
    rows += [[name, *map(str, row)] for name, row in zip(classes, counts.tolist(), strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def resize_heat(heat: Tensor, height: int, width: int) -> Tensor:
    """A heat map (h, w) at the size of the image, bicubic -> (height, width)"""
    resized = F.interpolate(heat[None, None], (height, width), mode="bicubic", align_corners=False)
    return resized[0, 0]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union as the published evaluation has it: boxes end at the pixels x + w - 1 and y + h
    - 1, and an overlap of a single row or column of pixels, or less, counts as none.
    """
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right = min(a[0] + a[2], b[0] + b[2]) - 1
    bottom = min(a[1] + a[3], b[1] + b[3]) - 1
    overlap = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def has_area(box: Box) -> bool:
    """Whether the numbers are [x, y, width, height, ...] in pixels with width and height above 0."""
    return len(box) >= 4 and all(abs(side) <= MAX_PIXEL for side in box[:4]) and min(box[2:4]) >= MIN_SIDE


def box_score(heat: Tensor, box: Box) -> float:
    """Heat inside the box / sqrt(area): heat (H, W), rows int(y) to int(y + h), columns int(x) to int(x + w),
    ends excluded, what lies outside the image left out.
    """
    left, top, width, height = box[:4]
    rows = slice(max(int(top), 0), max(int(top + height), 0))
    columns = slice(max(int(left), 0), max(int(left + width), 0))
    return heat[rows, columns].sum(dtype=torch.float64).item() / (width * height) ** 0.5


def choose_box(heat: Tensor, boxes: Iterable[Box]) -> list[float] | None:
    """The first of the boxes with the largest score above 0, [x, y, w, h]; None where none scores above 0 (an
    empty or undefined heat map, or no boxes at all).
    """
    chosen, largest = None, 0.0
    for box in boxes:
        score = box_score(heat, box)
        if score > largest:
            chosen, largest = list(box[:4]), score
    return chosen


def heat_box(heat: Tensor) -> list[float] | None:
    """A box without a detector: round the largest connected region (diagonals connect, most pixels, the first
    of equals) of those pixels of heat (H, W) that have at least HEAT_THRESHOLD of its maximum.

    None where the maximum is not above 0.
    """
    maximum = heat.max()
    if not maximum > 0:
        return None
    hot = (heat >= HEAT_THRESHOLD * maximum).numpy().astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(hot, connectivity=8)
    regions = stats[1:]  # the first is everything else
    return regions[regions[:, cv2.CC_STAT_AREA].argmax(), :4].astype(float).tolist()


def grounding_accuracy(splits: list[str], ious: list[float]) -> dict[str, float]:
    """Percentage of expressions whose chosen box has an IoU of at least RIGHT_IOU, for each split there is.

    splits, ious (n): of each expression, IoU 0 where no box was chosen.
    """
    right = {split: [] for split in splits}
    for split, iou in zip(splits, ious, strict=True):
        right[split].append(iou >= RIGHT_IOU)
    return {split: 100.0 * sum(own) / len(own) for split, own in right.items()}


def grounding_chance(true_box: Box, boxes: Sequence[Box]) -> float:
    """The probability that an even choice among the boxes is right; 0 where there are none."""
    return sum(box_iou(true_box, box) >= RIGHT_IOU for box in boxes) / max(len(boxes), 1)
