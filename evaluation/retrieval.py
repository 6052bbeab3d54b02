"""Scores of retrieval as pure functions: ranks, recalls, and what a random order would get."""

import numpy as np

from simla.utils import UserError


def pessimistic_ranks(scores: np.ndarray, relevant: list[list[int]]) -> np.ndarray:
    """Return the rank of each query's best-scored relevant candidate, 0 = first: scores (queries, candidates)
    -> (queries,)

    Ties and NaN count against the query: every irrelevant candidate with an equal score stands before it, so
    a model that gives everything the same score gets no credit and the result does not depend on a sort.
    """
    ranks = np.empty(len(scores), dtype=np.int64)
    for query, right in enumerate(relevant):
        better = ~(scores[query] < scores[query, right].max())  # not >=, which is False for NaN
        better[right] = False
        ranks[query] = better.sum()
    return ranks


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Return the percentage of queries with a rank below k."""
    return 100.0 * float((ranks < k).mean())


def retrieval_recall(
    scores_i2t: np.ndarray, scores_t2i: np.ndarray, img2txt: list[list[int]], txt2img: list[int]
) -> dict[str, float]:
    """Return recall@1/5/10 in percent, both ways.

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
    """Return the expected recall of a random order, in percent: the same keys as `retrieval_recall`."""
    num_texts, num_images = len(txt2img), len(img2txt)
    result = {}
    for k in (1, 5, 10):
        missed = [_all_missed(num_texts, len(texts), k) for texts in img2txt]
        result[f"txt_r{k}"] = 100.0 * (1 - sum(missed) / len(missed))
        result[f"img_r{k}"] = 100.0 * min(k, num_images) / num_images
    for name in ("txt", "img"):
        result[f"{name}_r_mean"] = sum(result[f"{name}_r{k}"] for k in (1, 5, 10)) / 3
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    return result


def _all_missed(num_candidates: int, num_relevant: int, k: int) -> float:
    """Return the probability that k candidates drawn without replacement hold none of the relevant ones."""
    probability = 1.0
    for i in range(min(k, num_candidates)):
        probability *= max(0, num_candidates - num_relevant - i) / (num_candidates - i)
    return probability
