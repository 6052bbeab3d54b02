"""Exact two-stage retrieval: contrast picks candidates, the multimodal encoder scores them (paper section 4).

For each image the k most similar texts and for each text the k most similar images are scored by the matching
head; every other entry of the two score matrices is -100. The score of a pair does not depend on the
direction, so each pair is scored once. Images with about as many texts form a group; each is projected to
keys and values once for all its texts, which ride on them as one long query; the group's texts go through the
encoder from long to short, in calls of about equally many tokens, padded to the longest of the call.

A rank scores the images that it holds, every world_size-th. How many texts they have differs, their sum
over a hundred images or more hardly: in simulated features the busiest of 8 ranks has 1% more than the mean
of COCO's 5,000 images and 3% more of Flickr30k's 1,000, which pays for no exchange of image states.

Memory beside the model's: on the device the projections of one group, one call's activations, and some 10
bytes for each pair (image, text) of the whole matrix; image states and the result stay on the host.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from simla.models.retrieval import SIMLARetrieval
from simla.utils import all_gather_shares, rank, world_size

NOT_SCORED = -100.0
# Images to a group and tokens to a call. A GPU wants few, large calls; a processor wants little padding, and
# with one image to a group no score depends on which other images a rank holds, down to the last bit.
SIZES = {"cuda": (16, 16384), "cpu": (1, 2048)}


def candidate_pairs(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the pairs that each direction wants scored, two bool masks (images, texts): for image queries
    and for text queries. similarity (images, texts); k may exceed the number of candidates.
    """
    for_images = torch.zeros_like(similarity, dtype=torch.bool)
    for_texts = torch.zeros_like(for_images)
    for_images.scatter_(1, similarity.topk(min(k, similarity.shape[1]), dim=1).indices, True)
    for_texts.scatter_(0, similarity.topk(min(k, similarity.shape[0]), dim=0).indices, True)
    return for_images, for_texts


@dataclass
class Group:
    """Images that are scored together. On the host, so that nothing waits for the device.

    images (g,); texts (g, n): those of each image, from long to short, the last one repeated where an image
    has fewer than the others; indices (g, n): where their scores go, a repeated one's to the last index of
    all; calls: (first, end, longest): columns of `texts`, and the tokens of the longest text there
    """

    images: list[int]
    texts: Tensor
    indices: Tensor
    calls: list[tuple[int, int, int]]


def make_groups(wanted: Tensor, lengths: Tensor, num_images: int, num_tokens: int) -> list[Group]:
    """Return groups with all pairs of `wanted` (images, texts), whose scores are numbered row by row.

    lengths (texts,); num_images: most images to a group; num_tokens: most tokens to a call, unless a single
    text of each image has more
    """
    image, text = wanted.nonzero().T
    order = (image * (lengths.max() + 1) - lengths[text]).argsort(stable=True)  # from long to short
    counts = wanted.sum(1)
    starts = counts.cumsum(0) - counts
    by_count, groups = counts.argsort(descending=True, stable=True), []
    for start in range(0, len(counts), num_images):
        images = by_count[start : start + num_images]
        num_texts, column = counts[images, None], torch.arange(counts[images[0]])  # (g, 1), (n,)
        indices = order[starts[images, None] + torch.minimum(column, num_texts - 1)]  # (g, n)
        texts = text[indices]
        longest = lengths[texts].amax(0).tolist()
        first, calls = 0, []
        while first < len(longest):
            end = min(first + max(1, num_tokens // (len(images) * longest[first])), len(longest))
            calls.append((first, end, longest[first]))
            first = end
        indices = indices.masked_fill(column >= num_texts, len(text))
        groups.append(Group(images.tolist(), texts, indices, calls))
    return sorted(groups, key=lambda group: min(group.images))  # large and small mixed: the ETA is right


@torch.no_grad()
def rerank(
    model: SIMLARetrieval,
    similarity: Tensor,
    k: int,
    image_embeds: Tensor,
    text_ids: Tensor,
    text_mask: Tensor,
    sizes: tuple[int, int] | None = None,
    progress: Callable[[list[Group]], Iterable[Group]] = iter,
    score: str = "itm",
    itc_weight: float = 1.0,
    rank_and_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return score matrices of both directions, equal on all ranks.

    rank_and_size: this process's among those that share the images; (0, 1) where one has them all, also in a
    program of several.

    score: itm, the matching logit; itm+itc, to which the similarity is added `itc_weight` times; itc, the
    similarity of all pairs, for which none is read.

    similarity (images, texts) on every rank; image_embeds (n, N, D): this rank's images, anywhere (pinned
    memory is read ahead); text_ids, text_mask (texts, T); sizes: see SIZES -> scores_i2t (images, texts),
    scores_t2i (texts, images), both on the CPU
    """
    if score == "itc":
        return similarity.cpu(), similarity.T.contiguous().cpu()
    for_images, for_texts = (mask.cpu() for mask in candidate_pairs(similarity, k))
    wanted = for_images | for_texts
    this_rank, num_ranks = rank_and_size or (rank(), world_size())
    of_rank = wanted[this_rank::num_ranks]
    groups = make_groups(
        of_rank, text_mask.sum(1).cpu(), *(sizes or SIZES.get(similarity.device.type, SIZES["cuda"]))
    )
    flat = torch.empty(int(of_rank.sum()) + 1, 2, dtype=torch.float32, device=similarity.device)
    for group in progress(groups):
        score_group(model, group, image_embeds, text_ids, text_mask, flat)
    counts = [int(wanted[r::num_ranks].sum()) for r in range(num_ranks)]
    shares = all_gather_shares(flat[:-1, 1], counts) if num_ranks > 1 else [flat[:-1, 1]]
    scores = torch.zeros(similarity.shape, dtype=torch.float32)
    for r, rank_scores in enumerate(shares):
        scores[r::num_ranks][wanted[r::num_ranks]] = rank_scores.cpu()
    if score == "itm+itc":
        scores += itc_weight * similarity.cpu()
    scores_i2t = scores.masked_fill(~for_images, NOT_SCORED)
    scores_t2i = scores.masked_fill_(~for_texts, NOT_SCORED).T.contiguous()
    return scores_i2t, scores_t2i


def score_group(
    model: SIMLARetrieval,
    group: Group,
    image_embeds: Tensor,
    text_ids: Tensor,
    text_mask: Tensor,
    scores: Tensor,
) -> None:
    """Write the logits of a group's pairs into `scores` (P + 1, 2), each at its number: no match, match."""
    device = scores.device
    states = torch.stack([image_embeds[image].to(device, non_blocking=True) for image in group.images])
    cross = model.text_encoder.project(states)
    texts, indices = group.texts.to(device), group.indices.to(device)
    for first, end, longest in group.calls:
        rows = texts[:, first:end].flatten()
        logits = model.match(cross, text_ids[rows, :longest], text_mask[rows, :longest])
        scores[indices[:, first:end].flatten()] = logits
