"""Exact two-stage retrieval: contrast picks candidates, the multimodal encoder scores them (paper section 4).

For each image the k most similar texts and for each text the k most similar images are scored by the matching
head; every other entry of the two score matrices is -100. The score of a pair does not depend on the
direction, so each pair is scored once; each image is projected to keys and values once for all its texts,
which ride on them as one long query. A rank scores the images it holds.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from utils import all_gather_objects

NOT_SCORED = -100.0


def candidate_pairs(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which pairs each direction wants scored.

    similarity (images, texts); k may exceed the number of candidates -> two bool masks (images, texts): for
    image queries and for text queries
    """
    for_images = torch.zeros_like(similarity, dtype=torch.bool)
    for_texts = torch.zeros_like(for_images)
    for_images.scatter_(1, similarity.topk(min(k, similarity.shape[1]), dim=1).indices, True)
    for_texts.scatter_(0, similarity.topk(min(k, similarity.shape[0]), dim=0).indices, True)
    return for_images, for_texts


@torch.no_grad()
def rerank(
    similarity: Tensor,
    k: int,
    image_embeds: dict[int, Tensor],
    text_ids: Tensor,
    text_mask: Tensor,
    match: Callable[[Tensor, Tensor, Tensor], Tensor],
    chunk_size: int = 256,
    progress: Callable[[list[int]], Iterable[int]] = iter,
) -> tuple[Tensor, Tensor]:
    """Score matrices of both directions, equal on all ranks.

    similarity (images, texts) on every rank; image_embeds: image -> (1, N, D), this rank's images; text_ids,
    text_mask (texts, T); match(image_embeds, text_ids, text_mask) -> logits -> scores_i2t (images, texts),
    scores_t2i (texts, images), both on the CPU
    """
    for_images, for_texts = candidate_pairs(similarity, k)
    wanted = for_images | for_texts
    lengths = text_mask.sum(1)
    own = sorted(image_embeds)
    scores = torch.zeros(similarity.shape)
    for image in progress(own):
        texts = wanted[image].nonzero().squeeze(1)
        texts = texts[
            lengths[texts].argsort()
        ]  # of similar length together, so that little is spent on padding
        for rows in texts.split(chunk_size):
            longest = int(lengths[rows[-1]])
            logits = match(image_embeds[image], text_ids[rows, :longest], text_mask[rows, :longest])
            scores[image, rows.cpu()] = logits.float().cpu()
    for images, part in all_gather_objects((own, scores[own])):
        scores[images] = part
    scores_i2t = scores.masked_fill(~for_images.cpu(), NOT_SCORED)
    scores_t2i = scores.masked_fill(~for_texts.cpu(), NOT_SCORED).T.contiguous()
    return scores_i2t, scores_t2i
