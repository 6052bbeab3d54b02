"""Kendall's rank correlation, exact, with ties."""

import math

import numpy as np


def kendall(scores: np.ndarray, ratings: np.ndarray) -> dict[str, float | None]:
    """Return tau_b and tau_c of two series (n,); None where one of them is constant, or n is below 2.

    tau_b divides by the pairs that are tied in neither; tau_c, for series of which one has few values, by
    what a perfect order of m values could reach, m being the fewer different values of the two.
    """
    few, many = sorted((np.unique(values, return_inverse=True)[1] for values in (scores, ratings)), key=_most)
    total, num_values = len(few), int(few.max(initial=0)) + 1
    if total < 2 or num_values < 2:
        return {"tau_b": None, "tau_c": None}
    difference = _concordant_minus_discordant(many, few)
    pairs = total * (total - 1) // 2
    untied = [pairs - int((counts * (counts - 1) // 2).sum()) for counts in map(np.bincount, (few, many))]
    return {
        "tau_b": difference / math.sqrt(untied[0]) / math.sqrt(untied[1]),
        "tau_c": 2 * difference / (total * total * (num_values - 1) / num_values),
    }


def _most(values: np.ndarray) -> int:
    return int(values.max(initial=0))


def _concordant_minus_discordant(values: np.ndarray, classes: np.ndarray) -> int:
    """Return the pairs that both series (n,) order alike less those that they order the other way."""
    total, lower = 0, np.array([], values.dtype)  # values of all lower classes, sorted
    for number in range(int(classes.max()) + 1):
        here = values[classes == number]
        below, not_above = (np.searchsorted(lower, here, side).sum() for side in ("left", "right"))
        total += int(below) - (len(lower) * len(here) - int(not_above))
        lower = np.sort(np.concatenate([lower, here]))
    return total
