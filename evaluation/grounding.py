"""Scores of grounding as pure functions: boxes from heat maps, and the share that is right."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Left, top, width, height in pixels; what follows, such as a detector's score, is unused.
Box = Sequence[float]


RIGHT_IOU = 0.5  # grounding: a box with at least this overlap is right


HEAT_THRESHOLD = 0.2  # of a heat map's maximum: the object is what is above, as in CAM (Zhou et al. 2016)


def resize_heat(heat: Tensor, height: int, width: int) -> Tensor:
    """Return a heat map (h, w) at the size of the image, (height, width), bicubic."""
    resized = F.interpolate(heat[None, None], (height, width), mode="bicubic", align_corners=False)
    return resized[0, 0]


def box_iou(a: Box, b: Box) -> float:
    """Return the intersection over union as the published evaluation has it: boxes end at the pixels x + w -
    1 and y + h - 1, and an overlap of a single row or column of pixels, or less, counts as none.
    """
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right = min(a[0] + a[2], b[0] + b[2]) - 1
    bottom = min(a[1] + a[3], b[1] + b[3]) - 1
    overlap = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def box_score(heat: Tensor, box: Box) -> float:
    """Return the heat inside the box / sqrt(area): heat (H, W), rows int(y) to int(y + h), columns int(x) to
    int(x + w), ends excluded, what lies outside the image left out.
    """
    left, top, width, height = box[:4]
    rows = slice(max(int(top), 0), max(int(top + height), 0))
    columns = slice(max(int(left), 0), max(int(left + width), 0))
    return heat[rows, columns].sum(dtype=torch.float64).item() / (width * height) ** 0.5


def choose_box(heat: Tensor, boxes: Iterable[Box]) -> list[float] | None:
    """Return the first of the boxes with the largest score above 0, [x, y, w, h]; None where none scores
    above 0 (an empty or undefined heat map, or no boxes at all).
    """
    chosen, largest = None, 0.0
    for box in boxes:
        score = box_score(heat, box)
        if score > largest:
            chosen, largest = list(box[:4]), score
    return chosen


def heat_box(heat: Tensor) -> list[float] | None:
    """Return a box without a detector: round the largest connected region (diagonals connect, most pixels,
    the first of equals) of those pixels of heat (H, W) that have at least HEAT_THRESHOLD of its maximum.

    None where the maximum is not above 0.
    """
    maximum = heat.max()
    if not maximum > 0:
        return None
    hot = (heat >= HEAT_THRESHOLD * maximum).numpy().astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(hot, connectivity=8)
    regions = stats[1:]  # the first is everything else
    return regions[regions[:, cv2.CC_STAT_AREA].argmax(), :4].astype(float).tolist()


def point_at(heat: Tensor, truth: Box, candidates: Sequence[Box] | None) -> dict:
    """Return the `box` that a heat map (H, W) at the size of the image points at, its `iou` with the true box
    (without a box None and 0), and `chance`, the probability that a guess without heat is right: an even
    choice among the candidates. With candidates the same of the box round the heat alone, `heat_box` and so
    on, where the guess is the whole image; without them that is all there is.
    """
    height, width = heat.shape
    box = heat_box(heat)
    alone = {"box": box, "iou": _iou(truth, box), "chance": grounding_chance(truth, [[0, 0, width, height]])}
    if candidates is None:
        return alone
    box = choose_box(heat, candidates)
    chosen = {"box": box, "iou": _iou(truth, box), "chance": grounding_chance(truth, candidates)}
    return chosen | {f"heat_{name}": value for name, value in alone.items()}


def _iou(truth: Box, box: Box | None) -> float:
    return 0.0 if box is None else box_iou(truth, box)


def summary(choices: Sequence[dict]) -> dict[str, float | None]:
    """Return number, accuracy and chance in percent of what `point_at` returned for the expressions of a
    split, and how many are without a box.
    """
    result = {"n": len(choices), "accuracy": None, "without_box": sum(c["box"] is None for c in choices)}
    for kind in ("", "heat_") if choices and "heat_box" in choices[0] else ("",) * bool(choices):
        right = sum(choice[f"{kind}iou"] >= RIGHT_IOU for choice in choices)
        result[f"{kind}accuracy"] = 100.0 * right / len(choices)
        result[f"{kind}chance"] = 100.0 * sum(choice[f"{kind}chance"] for choice in choices) / len(choices)
    return result


def grounding_accuracy(splits: list[str], ious: list[float]) -> dict[str, float]:
    """Return the percentage of expressions whose chosen box has an IoU of at least RIGHT_IOU, for each split
    there is.

    splits, ious (n): of each expression, IoU 0 where no box was chosen.
    """
    right = {split: [] for split in splits}
    for split, iou in zip(splits, ious, strict=True):
        right[split].append(iou >= RIGHT_IOU)
    return {split: 100.0 * sum(hits) / len(hits) for split, hits in right.items()}


def grounding_chance(true_box: Box, boxes: Sequence[Box]) -> float:
    """Return the probability that an even choice among the boxes is right; 0 where there are none."""
    return sum(box_iou(true_box, box) >= RIGHT_IOU for box in boxes) / max(len(boxes), 1)
