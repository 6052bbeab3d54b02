"""Recall against every order of the ties, chance against every order of the candidates."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simla.evaluation.retrieval import pessimistic_ranks, recall_at, retrieval_chance, retrieval_recall
from simla.utils import UserError

KEYS = ["txt_r1", "txt_r5", "txt_r10", "txt_r_mean", "img_r1", "img_r5", "img_r10", "img_r_mean", "r_mean"]


def worst_rank(scores: list[float], relevant: list[int]) -> int:
    """Over all orders of the candidates that a sort by score may give: the rank of the first relevant one."""
    worst = 0
    for order in permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            worst = max(worst, min(order.index(own) for own in relevant))
    return worst


def rank_by_sorting(scores: list[float], relevant: list[int]) -> int:
    """The same for many candidates: among equal scores the relevant ones come last."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i in relevant))
    return min(order.index(own) for own in relevant)


def slow_recall(rank_of, scores_i2t, scores_t2i, img2txt, txt2img) -> dict[str, float]:
    result = {}
    for name, scores, relevant in (
        ("txt", scores_i2t, img2txt),
        ("img", scores_t2i, [[image] for image in txt2img]),
    ):
        ranks = [rank_of(list(row), own) for row, own in zip(scores, relevant, strict=True)]
        recalls = [100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10)]
        result |= {f"{name}_r{k}": recall for k, recall in zip((1, 5, 10), recalls, strict=True)}
        result[f"{name}_r_mean"] = sum(recalls) / 3
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    return result


@st.composite
def retrieval_cases(draw, max_images: int, max_captions: int, max_texts: int):
    """Scores of few different values, so that ties are the rule; -100 stands for "not scored"."""
    captions = draw(st.lists(st.integers(1, max_captions), min_size=1, max_size=max_images))
    while sum(captions) > max_texts:
        captions.pop()
    txt2img = [image for image, count in enumerate(captions) for _ in range(count)]
    img2txt = [[text for text, own in enumerate(txt2img) if own == image] for image in range(len(captions))]
    rng = np.random.RandomState(draw(st.integers(0, 2**16)))
    values = np.array([-100.0, 0.0, 0.5, 1.0], dtype=np.float32)[: draw(st.integers(1, 4))]
    shape = (len(captions), len(txt2img))
    return rng.choice(values, shape), rng.choice(values, shape[::-1]), img2txt, txt2img


@given(retrieval_cases(max_images=4, max_captions=3, max_texts=5))
@settings(max_examples=30)
def test_recall_is_that_of_the_worst_order_of_the_ties(case):
    assert retrieval_recall(*case) == pytest.approx(slow_recall(worst_rank, *case), abs=1e-9)


@given(retrieval_cases(max_images=12, max_captions=4, max_texts=40))
@settings(max_examples=40)
def test_recall_of_many_candidates_equals_sorting_with_relevant_ones_last(case):
    result = retrieval_recall(*case)
    assert list(result) == KEYS
    assert result == pytest.approx(slow_recall(rank_by_sorting, *case), abs=1e-9)


def test_uneven_captions_of_the_images_keep_their_own():
    """Captions of an image need not be neighbours, nor as many as another's."""
    scores_i2t = np.array([[0.1, 0.9, 0.2, 0.3], [0.8, 0.1, 0.2, 0.1]])
    assert pessimistic_ranks(scores_i2t, [[0, 3], [1, 2]]).tolist() == [1, 1]
    assert pessimistic_ranks(scores_i2t, [[1, 3], [0, 2]]).tolist() == [0, 0]


def test_no_credit_for_equal_scores_or_nan():
    images, captions = 12, 2
    txt2img = [text // captions for text in range(images * captions)]
    img2txt = [[2 * image, 2 * image + 1] for image in range(images)]
    for value in (0.0, -100.0, np.nan):
        scores = np.full((images, images * captions), value)
        assert set(retrieval_recall(scores, scores.T, img2txt, txt2img).values()) == {0.0}, value
    assert pessimistic_ranks(np.array([[np.nan, 1.0, 0.5]]), [[1]]).tolist() == [1]
    assert pessimistic_ranks(np.array([[np.nan, 1.0, 0.5]]), [[0]]).tolist() == [2]


def test_an_image_without_captions_is_named():
    scores = np.zeros((3, 2))
    with pytest.raises(UserError, match="1 of 3 images have no caption, the first is image 1"):
        retrieval_recall(scores, scores.T, [[0], [], [1]], [0, 2])


def test_perfect_scores_are_100():
    scores = np.eye(12)
    perfect = retrieval_recall(scores, scores, [[i] for i in range(12)], list(range(12)))
    assert perfect == dict.fromkeys(KEYS, 100.0)


def test_k_beyond_the_number_of_candidates_finds_everything():
    scores = np.zeros((3, 3))
    result = retrieval_recall(scores, scores, [[0], [1], [2]], [0, 1, 2])
    assert (result["txt_r1"], result["txt_r5"], result["txt_r10"]) == (0.0, 100.0, 100.0)
    chance = retrieval_chance([[0], [1], [2]], [0, 1, 2])
    assert (chance["img_r5"], chance["img_r10"], chance["txt_r10"]) == (100.0, 100.0, 100.0)
    assert chance["txt_r1"] == pytest.approx(100 / 3)


def test_recall_counts_ranks_below_k():
    assert recall_at(np.array([0, 1, 4, 5]), 1) == 25.0
    assert recall_at(np.array([0, 1, 4, 5]), 5) == 75.0


def exact_chance(num_candidates: int, relevant: list[int], k: int) -> float:
    orders = list(permutations(range(num_candidates)))
    return 100 * sum(bool(set(order[:k]) & set(relevant)) for order in orders) / len(orders)


@pytest.mark.parametrize("captions", [[1], [1, 1], [2, 1], [1, 3, 2], [1, 1, 1, 1, 1, 1, 1], [7]])
def test_chance_is_the_mean_over_every_order(captions):
    txt2img = [image for image, count in enumerate(captions) for _ in range(count)]
    img2txt = [[text for text, own in enumerate(txt2img) if own == image] for image in range(len(captions))]
    chance = retrieval_chance(img2txt, txt2img)
    assert set(chance) == set(KEYS)
    for k in (1, 5, 10):
        by_image = [exact_chance(len(txt2img), own, k) for own in img2txt]
        assert chance[f"txt_r{k}"] == pytest.approx(sum(by_image) / len(by_image))
        assert chance[f"img_r{k}"] == pytest.approx(exact_chance(len(captions), [0], k))
    assert chance["txt_r_mean"] == pytest.approx(sum(chance[f"txt_r{k}"] for k in (1, 5, 10)) / 3)
    assert chance["r_mean"] == pytest.approx((chance["txt_r_mean"] + chance["img_r_mean"]) / 2)


def test_chance_is_what_random_scores_get():
    """20 images with 1 to 4 captions; 400 random score matrices; the error of the mean is below 0.5."""
    rng = np.random.RandomState(0)
    captions = [1 + image % 4 for image in range(20)]
    txt2img = [image for image, count in enumerate(captions) for _ in range(count)]
    img2txt = [[text for text, own in enumerate(txt2img) if own == image] for image in range(20)]
    shape = (20, len(txt2img))
    drawn = [
        retrieval_recall(rng.random_sample(shape), rng.random_sample(shape[::-1]), img2txt, txt2img)
        for _ in range(400)
    ]
    chance = retrieval_chance(img2txt, txt2img)
    for key in KEYS:
        assert np.mean([result[key] for result in drawn]) == pytest.approx(chance[key], abs=1.5), key
