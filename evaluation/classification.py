"""Scores of classification as pure functions: accuracy, confusion counts, consistency."""

from collections.abc import Sequence

import torch
from torch import Tensor


def confusion_counts(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Return counts (C, C) of labels and predicted, both (n,): rows the true class, columns the predicted
    one.
    """
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)


def accuracy(counts: Tensor) -> float:
    """Return the percentage on the diagonal of a confusion matrix (C, C)."""
    return 100.0 * counts.trace().item() / max(counts.sum().item(), 1)


def majority_accuracy(counts: Tensor) -> float:
    """Return the percentage of the most frequent class as the only answer, of a confusion matrix (C, C)."""
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
    """Return a confusion matrix (C, C) as lines of text: a row for each true class, a column for each
    predicted.
    """
    corner = "true \\ predicted"
    rows = [[corner, *classes]]
    rows += [[name, *map(str, row)] for name, row in zip(classes, counts.tolist(), strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
