"""Accuracy of alignment suites, their intervals and chance levels, as pure functions.

A row's scores are a matrix (I, T), image by text; equal scores count against the model, as in retrieval.
"""

import math
from collections.abc import Sequence

import numpy as np

from simla.evaluation.alignment.kendall import kendall
from simla.evaluation.alignment.rows import Row

ALL = "all"  # the group of all rows
Z_95 = 1.959963984540054  # the normal distribution has 95% within so many standard deviations
Matrices = Sequence[np.ndarray]  # one for each row


def wilson(num_right: int, total: int) -> tuple[float, float]:
    """Return Wilson's interval of a binomial share at 95%, from 0 to 1."""
    share, spread = num_right / total, Z_95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low = 0.0 if num_right == 0 else centre - half  # exact where rounding is not
    return low, 1.0 if num_right == total else centre + half


def answers(row: Row, scores: np.ndarray, threshold: float) -> dict[str, bool]:
    """Return which of a row's questions the scores (I, T) answer rightly.

    One text: "" is whether the score lies above the threshold as it should. One image, many texts: "" is
    whether the right one has the highest score. Several images: "text", every image has its text above the
    other texts; "image", every text has its image above the other images; "group", both.
    """
    if len(row.images) == len(row.texts) == 1:
        return {"": bool(scores[0, 0] > threshold) == (row.right[0] == 0)}
    of_images = all(_is_best(scores[i], text) for i, text in enumerate(row.right))
    if len(row.images) == 1:
        return {"": of_images}
    of_texts = all(_is_best(scores[:, text], i) for i, text in enumerate(row.right))
    return {"text": of_images, "image": of_texts, "group": of_images and of_texts}


def _is_best(scores: np.ndarray, number: int) -> bool:
    return bool((scores[number] > np.delete(scores, number)).all())


def chance(rows: Sequence[Row]) -> dict[str, float]:
    """Return what share of the rows' questions a guess gets, by the names of `answers`; rows of one shape: of
    statements the more frequent answer, else any order of scores, all being equally likely.
    """
    first = rows[0]
    if len(first.images) == len(first.texts) == 1:
        share = sum(row.right[0] == 0 for row in rows) / len(rows)
        return {"": max(share, 1 - share)}
    if len(first.images) == 1:
        return {"": sum(1 / len(row.texts) for row in rows) / len(rows)}
    # Two images and two texts: of the 24 orders of 4 scores 4 have both diagonal ones on top, in which each
    # image prefers its text and each text its image.
    return {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


def threshold(rows: Sequence[Row], scores: Matrices, name: str) -> float:
    """Return the score above which a statement counts as true: 0 of matching, the log-odds of a match; of
    all else, which has no such point, the one that calls as many true as are.
    """
    values = np.sort([matrix[0, 0] for matrix in scores])[::-1]
    num_true = sum(row.right[0] == 0 for row in rows)
    if name == "itm" or not len(values):
        return 0.0
    return float(values[num_true]) if num_true < len(values) else -math.inf


def summarise(rows: Sequence[Row], scores: dict[str, Matrices]) -> dict[str, dict]:
    """Return what each score gets, for all rows and for each kind: {group: {"n": rows, score: values}}.

    scores: for "itc", "itm", ... a matrix (I, T) for each row. Of rows with ratings, values are tau_b and
    tau_c, every rating being a judgement of its own; else the group also has "chance", and values are the
    accuracy and its interval at 95%, low and high, all in percent. Of rows with several images the groups are
    "KIND, text", "KIND, image" and "KIND, group".
    """
    by_kind: dict[str, list[int]] = {ALL: list(range(len(rows)))}
    for number, row in enumerate(rows):
        by_kind.setdefault(row.kind, []).append(number)
    if len(by_kind) == 2:
        del by_kind[rows[0].kind]
    if rows and rows[0].ratings:
        return {kind: _correlations(rows, scores, numbers) for kind, numbers in by_kind.items()}
    given = {}
    for name, matrices in scores.items():
        cut = threshold(rows, matrices, name) if rows and len(rows[0].texts) == 1 else 0.0
        given[name] = [answers(row, matrix, cut) for row, matrix in zip(rows, matrices, strict=True)]
    result = {}
    for kind, numbers in by_kind.items():
        guesses = chance([rows[number] for number in numbers])
        for question, guess in guesses.items():
            group = {"n": len(numbers), "chance": 100 * guess}
            for name, of_rows in given.items():
                num_right = sum(of_rows[number][question] for number in numbers)
                low, high = wilson(num_right, len(numbers))
                accuracy = num_right / len(numbers)
                group[name] = {"accuracy": 100 * accuracy, "low": 100 * low, "high": 100 * high}
            result[f"{kind}, {question}" if question else kind] = group
    return result


def _correlations(rows: Sequence[Row], scores: dict[str, Matrices], numbers: list[int]) -> dict:
    ratings = np.array([rating for number in numbers for rating in rows[number].ratings])
    times = [len(rows[number].ratings) for number in numbers]
    group = {"n": len(numbers), "num_ratings": len(ratings)}
    for name, matrices in scores.items():
        group[name] = kendall(np.repeat([matrices[number][0, 0] for number in numbers], times), ratings)
    return group
