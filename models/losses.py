"""The five losses of SIMLA as pure functions of tensors, and the random draws they need, each apart.

B batch, Q queue, E shared embedding, T text tokens, V vocabulary, M masked places. Every distilled loss is
(1 - alpha) * hard + alpha * soft, the soft targets being the momentum model's (ALBEF section 3.2, SIMLA
section 3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, target: Tensor, dim: int = -1) -> Tensor:
    """-sum target * log softmax(logits) over `dim`: (..., C) and (..., C) -> (...)"""
    return -(F.log_softmax(logits, dim=dim) * target).sum(-1)


def mean_over(values: Tensor, count: Tensor) -> Tensor:
    """sum(values) / count, and 0 (with its gradient path) where nothing is counted."""
    return values.sum() / count.clamp(min=1)


def distilled_cross_entropy(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) cross-entropy with the labels + alpha cross-entropy with the momentum model's softmax.

    logits, logits_m (M, C), labels (M,) -> mean over the rows; 0 (with its gradient path) where M = 0
    """
    hard = F.cross_entropy(logits, labels, reduction="none")
    soft = soft_cross_entropy(logits, logits_m.softmax(-1))
    return ((1 - alpha) * hard + alpha * soft).sum() / max(len(labels), 1)


# ---- ITA: image-text alignment by contrast (paper eq. 1) ----


def identity_positives(idx: Tensor, idx_queue: Tensor) -> Tensor:
    """Hard targets where several entries show the same image: idx (B,) of the batch, idx_queue (1, Q) ->
    (B, B+Q), even over all entries of the row's image.
    """
    same = (idx[:, None] == torch.cat([idx, idx_queue[0]])[None]).float()
    return same / same.sum(-1, keepdim=True)


def contrast_targets(similarity_m: Tensor, positives: Tensor, alpha: float) -> Tensor:
    """Momentum soft targets mixed with hard ones.

    similarity_m (B, B+Q) momentum similarities / temp; positives (B, B+Q) rows that sum to 1 -> (B, B+Q)
    """
    return alpha * similarity_m.softmax(-1) + (1 - alpha) * positives


def ita_loss(sim_i2t: Tensor, sim_t2i: Tensor, target_i2t: Tensor, target_t2i: Tensor) -> Tensor:
    """Cross-entropy of both directions, each (B, B+Q), averaged."""
    i2t = soft_cross_entropy(sim_i2t, target_i2t).mean()
    t2i = soft_cross_entropy(sim_t2i, target_t2i).mean()
    return (i2t + t2i) / 2


# ---- ITM: image-text matching on hard negatives (paper eq. 2) ----


def negative_weights(similarity: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """How likely each batch entry is drawn as a row's hard negative, and which rows have one at all.

    similarity (B, B) / temp; excluded (B, B) bool, True for entries of the same identity ->
    weights (B, B), unnormalised, 0 where excluded; has_negative (B,) bool. A row whose allowed weights all
    underflow to 0 draws evenly among them; one that allows none gets dummy weights, to be left out of the
    loss.
    """
    weights = similarity.float().softmax(-1).masked_fill(excluded, 0.0)
    has_negative = (~excluded).any(-1)
    even = (~excluded).float() + (~has_negative).float().unsqueeze(-1)
    # A denormal weight may round to 0 inside the draw, where excluded entries are then as good as any.
    drawable = weights.sum(-1, keepdim=True) > torch.finfo(weights.dtype).tiny
    return torch.where(drawable, weights, even), has_negative


def draw_negatives(weights: Tensor) -> Tensor:
    """One column index for each row: weights (B, B) -> (B,)"""
    return torch.multinomial(weights, 1).squeeze(-1)


def itm_loss(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Two-way cross-entropy: logits (R, 2), labels (R,), counted (R,) bool -> mean over the counted rows."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return mean_over(losses * counted, counted.sum())


# ---- MLM: masked language modelling (paper eq. 3) ----


def mlm_loss(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """logits, logits_m (M, V) at the masked words, labels (M,) -> scalar; 0 where M = 0"""
    return distilled_cross_entropy(logits, labels, logits_m, alpha)


def mlm_loss_over_sequence(logits: Tensor, labels: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """As published: the student's soft log-probabilities are taken over the positions of the sequence.

    logits, logits_m (B, T, V), labels (B, T) with -100 = not predicted -> scalar
    (`released_code.mlm_distill_over_sequence`)
    """
    predicted = labels != -100
    hard = F.cross_entropy(logits[predicted], labels[predicted], reduction="none")
    soft = soft_cross_entropy(logits, logits_m.softmax(-1), dim=1)[predicted]
    return mean_over((1 - alpha) * hard + alpha * soft, predicted.sum())


# ---- MIM: masked image modelling conditioned on the text (paper eq. 4) ----


def mim_loss(logits: Tensor, codes: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """logits, logits_m (M, visual vocabulary) at the masked patches, codes (M,) -> scalar; 0 where M = 0"""
    return distilled_cross_entropy(logits, codes, logits_m, alpha)


# ---- PSL: pseudo-labelled keywords (paper eq. 5) ----


def keyword_votes(cls_attention: Tensor, attention_mask: Tensor | None, per_head: int = 4) -> Tensor:
    """How many heads have a position among the `per_head` that [CLS] attends to most.

    cls_attention (B, H, T): the [CLS] row of a self-attention map; attention_mask (B, T): padding gets -1
    votes, None = padding is a position like any other -> (B, T) int64
    """
    top = cls_attention.topk(min(per_head, cls_attention.shape[-1]), dim=-1).indices  # (B, H, per_head)
    votes = torch.zeros_like(cls_attention[:, 0], dtype=torch.long)  # (B, T)
    votes.scatter_add_(1, top.flatten(1), torch.ones_like(top.flatten(1)))
    return votes if attention_mask is None else votes.masked_fill(attention_mask == 0, -1)


def choose_keywords(votes: Tensor, num_keywords: int = 5) -> tuple[Tensor, Tensor]:
    """votes (B, T) -> chosen positions (B, K) and which of them count (B, K) bool, K = min(5, T)"""
    top = votes.topk(min(num_keywords, votes.shape[-1]), dim=-1)
    return top.indices, top.values >= 0


def keyword_targets(
    input_ids: Tensor, positions: Tensor, counted: Tensor, vocab_size: int, cls_id: int
) -> Tensor:
    """Multi-hot over the vocabulary, [CLS] cleared: ids (B, T), positions and counted (B, K) -> (B, V)"""
    target = torch.zeros(len(input_ids), vocab_size, device=input_ids.device)
    target.scatter_reduce_(1, input_ids.gather(1, positions), counted.to(target.dtype), reduce="amax")
    target[:, cls_id] = 0
    return target


def psl_loss(logits: Tensor, target: Tensor, logits_m: Tensor, alpha: float) -> Tensor:
    """BCE of the concept head, mean over batch and vocabulary: logits, target, logits_m (B, V) -> scalar"""
    hard = F.binary_cross_entropy_with_logits(logits, target)
    soft = F.binary_cross_entropy_with_logits(logits, logits_m.sigmoid())
    return (1 - alpha) * hard + alpha * soft


# ---- VQA: the words of the answers, one after the other ----


def answer_loss(
    logits: Tensor, labels: Tensor, logits_m: Tensor | None, weights: Tensor, alpha: float
) -> Tensor:
    """The sum over all answer tokens of the cross-entropy times the weight.

    logits, logits_m (M, V) where a token comes next, labels (M,) that token, weights (M,): of its answer / B;
    logits_m None: no momentum targets, whatever alpha -> scalar
    """
    rows = F.cross_entropy(logits, labels, reduction="none")
    if logits_m is not None:
        rows = (1 - alpha) * rows + alpha * soft_cross_entropy(logits, logits_m.softmax(-1))
    return (rows * weights).sum()


def answer_loss_over_sequence(
    logits: Tensor, labels: Tensor, logits_m: Tensor, weights: Tensor, alpha: float
) -> Tensor:
    """As published: the student's soft log-probabilities are taken over the positions of the sequence.

    logits, logits_m (A, L, V), labels (A, L) with -100 = padding, weights (A,) of the answers / B -> scalar
    (`released_code.mlm_distill_over_sequence`)
    """
    hard = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (A, L), 0 at padding
    soft = soft_cross_entropy(logits, logits_m.softmax(-1), dim=1)
    rows = ((1 - alpha) * hard + alpha * soft) * (labels != -100)
    return (rows.sum(1) * weights).sum()
