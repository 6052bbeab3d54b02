"""Tells how likely a text is when no image is read: its pseudo-likelihood (Salazar et al. 2020).

T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

MASKED_AT_A_TIME = 256  # copies of texts, each with one word masked


def pseudo_likelihood(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    text_ids: Tensor,
    text_mask: Tensor,
    mask_id: int,
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> Tensor:
    """Return the sum of the log-probabilities of a text's tokens, each masked in turn, (N,) float32 on the
    CPU; [CLS], the first token, and padding are no words.

    predict: ids and mask (B, T), a position in each (B,) -> logits there (B, V); text_ids, text_mask (N, T)
    """
    words = text_mask.clone()
    words[:, 0] = 0
    text, position = words.nonzero().T
    order = text_mask.sum(1)[text].argsort(stable=True)  # alike in length, so that little is padding
    total = torch.zeros(len(text_ids), dtype=torch.float64)
    for part in progress(order.split(MASKED_AT_A_TIME)):
        rows, columns = text[part], position[part]
        longest = int(text_mask[rows].sum(1).max())
        masked, mask = text_ids[rows, :longest], text_mask[rows, :longest]
        masked[torch.arange(len(rows)), columns] = mask_id
        logits = predict(masked, mask, columns).float()
        likelihoods = logits.log_softmax(-1).gather(1, text_ids[rows, columns][:, None])[:, 0]
        total.index_add_(0, rows.cpu(), likelihoods.double().cpu())
    return total.float()
