"""ECCV Caption and CxC on COCO's test images: captions that are right for images they were not written for.

The package eccv-caption holds both, by COCO's numbers of images and captions, and scores rankings of them:
Chun et al. 2022 (ECCV Caption), Parekh et al. 2021 (CxC). Of COCO's 25,010 captions the package knows 25,000,
the first five of each image.
"""

import io
import json
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from simla.evaluation.rerank import NOT_SCORED
from simla.utils import atomic_write, is_main

CocoIds = Sequence[tuple[int, list[int]]]  # COCO's number of each image and those of its captions
CAPTIONS_PER_IMAGE = 5
TOP = 50  # of a ranking: no query has more than 48 right candidates
METRICS = ("eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_recalls")


def coco_rankings(scores_i2t: Tensor, scores_t2i: Tensor, ids: CocoIds) -> dict[str, dict[int, list[int]]]:
    """Return the best TOP captions of each image, "i2t", and the best images of each caption, "t2i", best
    first, by COCO's numbers, as the package takes them; negative numbers stand for what was not scored.

    scores_i2t (images, texts), scores_t2i (texts, images); the texts are the captions of `ids`, in order.
    """
    kept, caption_ids, num_texts = [], [], 0
    for _, captions in ids:
        first_ones = captions[:CAPTIONS_PER_IMAGE]
        kept += range(num_texts, num_texts + len(first_ones))
        caption_ids += first_ones
        num_texts += len(captions)
    image_ids = [image for image, _ in ids]
    return {
        "i2t": _best(scores_i2t[:, kept], image_ids, caption_ids),
        "t2i": _best(scores_t2i[kept], caption_ids, image_ids),
    }


def _best(scores: Tensor, queries: list[int], candidates: list[int]) -> dict[int, list[int]]:
    best = scores.topk(min(TOP, len(candidates)))
    nothing = -1 - torch.arange(best.indices.shape[1])  # no number twice: the package counts different ones
    numbers = torch.where(best.values > NOT_SCORED, torch.tensor(candidates)[best.indices], nothing)
    return dict(zip(queries, numbers.tolist(), strict=True))


def why_no_coco_scores(ids: CocoIds) -> str:
    """Return what is missing for them, "" where nothing is or where the images are not COCO's (no `ids`)."""
    if not ids:
        return ""
    if not all(captions for _, captions in ids):
        return "its entries have no 'caption_ids'; make the file anew: python -m simla.dataset.prepare coco"
    if (metrics := _package()) is None:
        return "the package is missing: pip install eccv-caption"
    images, captions = metrics.coco_gts["i2t"], metrics.coco_gts["t2i"]
    given = [number for _, numbers in ids for number in numbers[:CAPTIONS_PER_IMAGE]]
    if sorted(image for image, _ in ids) == sorted(images) and sorted(given) == sorted(captions):
        return ""
    num_known = len({image for image, _ in ids} & set(images))
    return (
        f"it must have COCO's {len(images):,} test images with {len(captions):,} captions, by their numbers; "
        f"{num_known:,} of the images are there, and {len(set(given) & set(captions)):,} of the captions"
    )


@cache
def _package():
    """Return the package's metrics, None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a faster reader of JSON is missing
            from eccv_caption import Metrics
    except ImportError:
        return None
    return Metrics()


def coco_scores(
    scores_i2t: Tensor, scores_t2i: Tensor, ids: CocoIds, scores_file: Path | None = None
) -> dict[str, float]:
    """Return in percent txt_eccv_map_at_r, txt_eccv_rprecision, txt_eccv_r1, txt_cxc_r1, _r5 and _r10 (image
    to text) and the same with img_ (text to image); nothing where `why_no_coco_scores` has a reason.

    The main rank writes the rankings to coco_rankings.json beside `scores_file`, whether there is a reason or
    not, unless an image or a caption has no number.
    """
    if not ids or not all(captions for _, captions in ids):
        return {}
    rankings = coco_rankings(scores_i2t, scores_t2i, ids)
    if scores_file is not None and is_main():
        with atomic_write(scores_file.with_name("coco_rankings.json"), text=True) as file:
            json.dump(rankings, file)
    return {} if why_no_coco_scores(ids) else package_scores(rankings)


def package_scores(rankings: dict[str, dict[int, list[int]]]) -> dict[str, float]:
    """Return what the package makes of rankings of COCO's test images."""
    with redirect_stderr(io.StringIO()):  # its progress bar
        scores = _package().compute_all_metrics(rankings["i2t"], rankings["t2i"], METRICS, Ks=(1, 5, 10))
    ways = {"txt": "i2t", "img": "t2i"}
    return {
        f"{way}_{name}": 100.0 * float(values[key])
        for way, key in ways.items()
        for name, values in scores.items()
    }
