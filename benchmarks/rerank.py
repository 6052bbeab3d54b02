"""Re-ranking against one query at a time as the method is written down: seconds, arithmetic, equal scores.

python benchmarks/rerank.py [--scale tiny] [--device cpu] [--precision fp32]

The model of configs/Retrieval_flickr.yaml (384 x 384) with random weights. On a CPU the shape of Flickr30k's
test set, 1,000 images and 5,000 texts, k = 64; on a GPU that of COCO, 5,000 images and 25,010 texts, k = 256.
Image states are random, texts random words of as many tokens as such captions have; the similarities decide
only which pairs are wanted.

The plain way takes one query after the other: for an image its k texts with the image's states repeated k
times, for a text the states of its k images; every row projects its states in every layer, every text is
padded to 30 tokens, every layer computes every token, and a pair that both directions want is scored twice.
It is measured on a few queries of both directions, ours on a CPU on a few images with all the texts that are
wanted of them, on a GPU on everything; both are scaled to the whole by their number of pairs.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from measure import TINY, arguments, count_flops, last_line, row, utilization
from torch import Tensor

from simla.configs.reader import read_config
from simla.configs.schema import RETRIEVAL
from simla.engine.measure import clock, peak_bytes, reset_peak
from simla.evaluation.rerank import SIZES, candidate_pairs, make_groups, rerank, score_group
from simla.models.bert import BertModel, padding_mask
from simla.models.retrieval import SIMLARetrieval
from simla.utils import autocast, dtype_of

# images, texts, k, mean tokens of a text with [CLS], images of ours and queries of each direction measured
SHAPES = {
    "cpu": (1000, 5000, 64, 14.0, 6, 2),
    "cuda": (5000, 25010, 256, 11.5, None, 4),
    "tiny": (9, 45, 4, 11.5, 5, 5),
}
MAX_TOKENS = 30


def build(scale: str, device: torch.device) -> SIMLARetrieval:
    torch.manual_seed(0)
    overrides = ["test_file=none", *(TINY if scale == "tiny" else [])]
    config = read_config(str(ROOT / "configs/Retrieval_flickr.yaml"), RETRIEVAL, overrides)
    return SIMLARetrieval.from_config(config, twins=False).to(device).eval()


def similarities(num_images: int, num_texts: int, device: torch.device) -> Tensor:
    """Return features of images, each with as many texts, that are near it."""
    images = torch.randn(num_images, 64, device=device)
    texts = images[torch.arange(num_texts, device=device) % num_images]
    return F.normalize(images) @ F.normalize(texts + torch.randn_like(texts)).T


def random_texts(num: int, mean: float, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return ids, mask (num, MAX_TOKENS); lengths as of captions: few short ones, a tail of long ones."""
    lengths = (5 + torch.distributions.Gamma(3.0, 3.0 / (mean - 5.5)).sample((num,))).round()
    mask = (torch.arange(MAX_TOKENS) < lengths.clamp(max=MAX_TOKENS)[:, None]).long()
    return torch.randint(1000, vocab_size, mask.shape) * mask, mask


def random_states(num: int, model: SIMLARetrieval, precision: str, device: torch.device) -> Tensor:
    """Return states as the image encoder's last norm leaves them, where `rerank` expects them."""
    size, pinned = model.visual_encoder.pos_embed.shape[1:], device.type == "cuda"
    states = torch.empty(num, *size, dtype=dtype_of(precision), pin_memory=pinned)
    for part in states.split(100):
        part.copy_(torch.randn(part.shape, device=device))
    return states


# ---- the plain way ----


def plain_scores(model: SIMLARetrieval, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """states (k, N, D) of one image for each text; ids, mask (k, MAX_TOKENS) -> (k,)"""
    encoder: BertModel = model.text_encoder
    hidden, scores = encoder.embeddings(ids), padding_mask(mask)
    for layer in encoder.encoder.layer:
        hidden = layer(hidden, scores, layer.crossattention.project(states))
    return model.itm_head(hidden[:, 0])[:, 1]


def plain_queries(
    model: SIMLARetrieval, similarity: Tensor, k: int, states: Tensor, ids: Tensor, mask: Tensor, number: int
) -> dict[tuple[int, int], Tensor]:
    """(image, text) -> score, of image `number` and of text `number` as queries."""
    device = ids.device
    texts = similarity[number].topk(min(k, similarity.shape[1])).indices
    repeated = states[number].to(device).repeat(len(texts), 1, 1)
    scores = plain_scores(model, repeated, ids[texts], mask[texts])
    found = {(number, text): score for text, score in zip(texts.tolist(), scores, strict=True)}
    images = similarity[:, number].topk(min(k, similarity.shape[0])).indices.cpu()
    repeated = [part[number].repeat(len(images), 1) for part in (ids, mask)]
    scores = plain_scores(model, states[images].to(device), *repeated)
    return found | {(image, number): score for image, score in zip(images.tolist(), scores, strict=True)}


# ---- ours ----


def our_scores(
    model: SIMLARetrieval, wanted: Tensor, states: Tensor, ids: Tensor, mask: Tensor
) -> tuple[Tensor, list]:
    """What `rerank` does with the images of a rank: wanted (images, texts) -> all scores in order, groups"""
    groups = make_groups(wanted, mask.sum(1).cpu(), *SIZES[ids.device.type])
    scores = torch.empty(int(wanted.sum()) + 1, 2, device=ids.device)
    for group in groups:
        score_group(model, group, states, ids, mask, scores)
    return scores[:-1, 1], groups


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__).parse_args()
    device = torch.device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    num_images, num_texts, k, mean, num_own, num_queries = SHAPES[
        "tiny" if args.scale == "tiny" else device.type
    ]
    model = build(args.scale, device)
    bert = model.text_encoder.config
    similarity = similarities(num_images, num_texts, device)
    ids, mask = (part.to(device) for part in random_texts(num_texts, mean, bert.vocab_size))
    states = random_states(num_images, model, precision, device)
    both = [direction.cpu() for direction in candidate_pairs(similarity, k)]
    asked, wanted = int(sum(direction.sum() for direction in both)), both[0] | both[1]
    pairs = int(wanted.sum())
    own = wanted[:num_own]

    plain_seconds, plain, seconds, scores, groups = 0.0, {}, 0.0, [], []
    with autocast(device, precision):
        plain_queries(model, similarity, 2, states, ids, mask, 0)  # warm
        our_scores(model, own[:1], states, ids, mask)
        plain_flops = count_flops(lambda: plain_queries(model, similarity, 2, states, ids, mask, 0)) / 4
        few = own[: SIZES[device.type][0]]
        flops = count_flops(lambda: our_scores(model, few, states, ids, mask)) / int(few.sum())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        parts = torch.arange(len(own)).chunk(num_queries)
        for number, images in enumerate(parts):  # in turn, as others may compute beside us
            took, found = clock(
                lambda n=number: plain_queries(model, similarity, k, states, ids, mask, n), device
            )
            plain_seconds, plain = plain_seconds + took, plain | found
            reset_peak(device)
            took, (values, done) = clock(
                lambda i=images: our_scores(model, own[i], states[i[0] :], ids, mask), device
            )
            seconds, scores, groups = seconds + took, [*scores, values], groups + done
        scores, peak = torch.cat(scores), peak_bytes(device)
        whole = {}
        if num_own is None:  # with candidates, masks and matrices
            reset_peak(device)
            whole["rerank_seconds"], _ = clock(
                lambda: rerank(model, similarity, k, states, ids, mask), device
            )
            whole["rerank_peak_bytes"] = peak_bytes(device)

    places = {pair: number for number, pair in enumerate(map(tuple, own.nonzero().tolist()))}
    compared = [pair for pair in plain if pair in places]
    ours = scores[[places[pair] for pair in compared]]
    plain_values = torch.stack([plain[pair] for pair in compared]).float()
    difference = (ours - plain_values).abs().max().item()
    spread = plain_values.std().item()
    num_plain = num_queries * (min(k, num_texts) + min(k, num_images))
    plain_whole, our_whole = plain_seconds / num_plain * asked, seconds / len(scores) * pairs
    ratio = plain_whole / our_whole
    used = utilization(flops * len(scores) / seconds, device, precision)

    print(f"{num_images} images, {num_texts} texts, k = {k}, {precision}")
    print(f"{asked} pairs asked for, {pairs} different; texts of {mask.sum(1).float().mean():.1f} tokens")
    row("", "one by one", "ours", "ratio")
    row("pairs measured", num_plain, len(scores))
    row("seconds for them", plain_seconds, seconds)
    row("seconds per pair", plain_seconds / num_plain, seconds / len(scores), ratio * pairs / asked)
    row("GFLOP per pair", plain_flops / 1e9, flops / 1e9)
    row("GFLOP/s", plain_flops * num_plain / plain_seconds / 1e9, flops * len(scores) / seconds / 1e9)
    row("pairs in all", asked, pairs, asked / pairs)
    row("seconds in all, scaled by pairs", plain_whole, our_whole, ratio)
    row(f"largest difference of {len(compared)} scores", difference)
    row("standard deviation of the scores", spread)
    row("peak memory, GB", peak / 1e9)
    for name, value in whole.items():
        row(name, value)
    found = {
        "benchmark": "rerank",
        "scale": args.scale,
        "precision": precision,
        "ratio": ratio,
        "ratio_without_dedup": ratio * pairs / asked,
        "images": num_images,
        "texts": num_texts,
        "k": k,
        "pairs_asked": asked,
        "pairs": pairs,
        "plain_seconds": plain_seconds,
        "plain_pairs_measured": num_plain,
        "plain_seconds_in_all": plain_whole,
        "seconds": seconds,
        "pairs_measured": len(scores),
        "seconds_in_all": our_whole,
        **whole,
        "scores_compared": len(compared),
        "max_abs_difference": difference,
        "scores_std": spread,
        "flops_per_pair": flops,
        "plain_flops_per_pair": plain_flops,
        "mfu": used,
        "peak_memory_bytes": peak,
    }
    last_line(found, device)
    if precision == "fp32" and not difference <= 1e-4:
        raise SystemExit(f"the scores differ by {difference}")


if __name__ == "__main__":
    main()
