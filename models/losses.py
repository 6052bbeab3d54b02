"""The five losses of SIMLA and VQA's as pure functions of tensors, and the random draws they need.

B batch, Q queue, E shared embedding, T text tokens, H heads, V vocabulary, C classes, M masked words or
patches, K keywords, A answers, L answer tokens. `_m`: of the momentum model, whose softmax are the soft
targets; every distilled loss is (1 - alpha) * hard + alpha * soft (ALBEF section 3.2, SIMLA section 3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, target: Tensor, dim: int = -1) -> Tensor:
    """Return -sum target * log softmax(logits), the softmax over `dim`: (..., C) and (..., C) -> (...)."""
    return -(F.log_softmax(logits, dim=dim) * target).sum(-1)


def mean_over(values: Tensor, count: Tensor) -> Tensor:
    """Return sum(values) / count, and 0 (with its gradient path) where nothing is counted."""
    return values.sum() / count.clamp(min=1)


def distilled_rows(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """Return the distilled cross-entropy of each row: logits, logits_m (M, C), labels (M,) -> (M,)."""
    hard = F.cross_entropy(logits, labels, reduction="none")
    return (1 - alpha) * hard + alpha * soft_cross_entropy(logits, logits_m.softmax(-1))


def distilled_cross_entropy(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """Return its mean over the rows, and 0 (with its gradient path) where there is none."""
    return distilled_rows(logits, labels, logits_m, alpha).sum() / max(len(labels), 1)


def rows_over_sequence(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """Return the distilled cross-entropy of each token as published: the student's soft log-probabilities are
    taken over the positions of the sequence (`released_code.mlm_distill_over_sequence`).

    logits, logits_m (B, T, V), labels (B, T) with -100 = not predicted -> (B, T), 0 there
    """
    hard = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    soft = soft_cross_entropy(logits, logits_m.softmax(-1), dim=1)
    return ((1 - alpha) * hard + alpha * soft) * (labels != -100)


# ---- ITA: image-text alignment by contrast (paper eq. 1) ----


def identity_positives(idx: Tensor, idx_queue: Tensor) -> Tensor:
    """Return hard targets (B, B+Q), even over all entries of the row's image: idx (B,) of the batch,
    idx_queue (1, Q).
    """
    same = (idx[:, None] == torch.cat([idx, idx_queue[0]])[None]).float()
    return same / same.sum(-1, keepdim=True)


def contrast_targets(similarity_m: Tensor, positives: Tensor, alpha: float) -> Tensor:
    """Return soft targets mixed with hard ones (B, B+Q): similarity_m (B, B+Q) momentum similarities / temp;
    positives (B, B+Q) rows that sum to 1.
    """
    return alpha * similarity_m.softmax(-1) + (1 - alpha) * positives


def ita_loss(sim_i2t: Tensor, sim_t2i: Tensor, target_i2t: Tensor, target_t2i: Tensor) -> Tensor:
    """Return the mean of both directions' cross-entropy, each (B, B+Q)."""
    i2t = soft_cross_entropy(sim_i2t, target_i2t).mean()
    t2i = soft_cross_entropy(sim_t2i, target_t2i).mean()
    return (i2t + t2i) / 2


# ---- ITM: image-text matching on hard negatives (paper eq. 2) ----


def negative_weights(similarity: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Return how likely each entry is drawn as a row's hard negative, (B, B), unnormalised, 0 where excluded,
    and which rows have one at all, (B,) bool.

    similarity (B, B) / temp; excluded (B, B) bool, True for entries of the same identity. A row whose allowed
    weights all underflow to 0 draws evenly among them; one that allows none gets dummy weights, to be left
    out of the loss.
    """
    weights = similarity.float().softmax(-1).masked_fill(excluded, 0.0)
    has_negative = (~excluded).any(-1)
    even = (~excluded).float() + (~has_negative).float().unsqueeze(-1)
    # A denormal weight may round to 0 inside the draw, where excluded entries are then as good as any.
    drawable = weights.sum(-1, keepdim=True) > torch.finfo(weights.dtype).tiny
    return torch.where(drawable, weights, even), has_negative


def draw_negatives(weights: Tensor) -> Tensor:
    """Draw one column index for each row: weights (B, B) -> (B,)."""
    return torch.multinomial(weights, 1).squeeze(-1)


def itm_loss(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Return the mean cross-entropy of the counted rows: logits (R, 2), labels (R,), counted (R,) bool."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return mean_over(losses * counted, counted.sum())


# ---- MLM: masked language modelling (paper eq. 3) ----


def mlm_loss(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """Return the mean over the masked words: logits, logits_m (M, V), labels (M,)."""
    return distilled_cross_entropy(logits, labels, logits_m, alpha)


def mlm_loss_over_sequence(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """Return the mean over the masked words as published; arguments as of `rows_over_sequence`."""
    return mean_over(rows_over_sequence(logits, labels, logits_m, alpha), (labels != -100).sum())


# ---- MIM: masked image modelling conditioned on the text (paper eq. 4) ----


def mim_loss(logits: Tensor, codes: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """Return the mean over the hidden patches: logits, logits_m (M, visual vocabulary), codes (M,)."""
    return distilled_cross_entropy(logits, codes, logits_m, alpha)


# ---- PSL: pseudo-labelled keywords (paper eq. 5) ----


def keyword_votes(cls_attention: Tensor, attention_mask: Tensor | None, per_head: int = 4) -> Tensor:
    """Return how many heads have a position among the `per_head` that [CLS] attends to most, (B, T) int64.

    cls_attention (B, H, T): the [CLS] row of a self-attention map; attention_mask (B, T): padding gets -1
    votes, None = padding is a position like any other
    """
    top = cls_attention.topk(min(per_head, cls_attention.shape[-1]), dim=-1).indices  # (B, H, per_head)
    votes = torch.zeros_like(cls_attention[:, 0], dtype=torch.long)  # (B, T)
    votes.scatter_add_(1, top.flatten(1), torch.ones_like(top.flatten(1)))
    return votes if attention_mask is None else votes.masked_fill(attention_mask == 0, -1)


def choose_keywords(votes: Tensor, num_keywords: int = 5) -> tuple[Tensor, Tensor]:
    """Return the positions with most votes (B, T) and which of them count, both (B, K), K = min(5, T)."""
    top = votes.topk(min(num_keywords, votes.shape[-1]), dim=-1)
    return top.indices, top.values >= 0


def keyword_targets(
    input_ids: Tensor, positions: Tensor, counted: Tensor, vocab_size: int, cls_id: int
) -> Tensor:
    """Return the keywords as multi-hot rows (B, V), [CLS] cleared: ids (B, T), positions, counted (B, K)."""
    target = torch.zeros(len(input_ids), vocab_size, device=input_ids.device)
    target.scatter_reduce_(1, input_ids.gather(1, positions), counted.to(target.dtype), reduce="amax")
    target[:, cls_id] = 0
    return target


def psl_loss(logits: Tensor, target: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """Return the binary cross-entropy, mean over batch and vocabulary: logits, target, logits_m (B, V)."""
    hard = F.binary_cross_entropy_with_logits(logits, target)
    soft = F.binary_cross_entropy_with_logits(logits, logits_m.sigmoid())
    return (1 - alpha) * hard + alpha * soft


# ---- VQA: the words of the answers, one after the other ----


def answer_loss(logits: Tensor, labels: Tensor, logits_m: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return the weighted sum over all answer tokens: logits, logits_m (M, V) where a token comes next,
    labels (M,) that token, weights (M,) of its answer / B.
    """
    return (distilled_rows(logits, labels, logits_m, alpha) * weights).sum()


def answer_loss_over_sequence(
    logits: Tensor, labels: Tensor, logits_m: Tensor, weights: Tensor, alpha: float
) -> Tensor:
    """Return the weighted sum as published: logits, logits_m (A, L, V), labels (A, L) with -100 = padding,
    weights (A,) of the answers / B.
    """
    return (rows_over_sequence(logits, labels, logits_m, alpha).sum(1) * weights).sum()
