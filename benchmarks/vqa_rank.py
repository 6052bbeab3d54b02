"""Ranking a list of answers against one row per question and answer: seconds, arithmetic, equal results.

python benchmarks/vqa_rank.py [--scale tiny] [--device cpu] [--precision fp32]

The model of configs/VQA.yaml (k_test 128) with random weights and states of questions; 3,128 made-up answers
of one to six word pieces, most of one or two, common words beginning many of them.

The plain way repeats a question's states for each of its answers, projects them for every row, pads every
answer to the longest of the list, and sends every token through the LM head. Both start from the states of
the questions and choose the k answers by the first token; the image and question encoders, the same for
both, are timed beside them.
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
from simla.configs.schema import VQA
from simla.engine.measure import clock, peak_bytes, reset_peak
from simla.models.answer_tree import AnswerTree
from simla.models.vqa import SIMLAVQA
from simla.utils import autocast

CLS, SEP = 101, 102
SHARE_OF_LENGTHS = [0.6, 0.26, 0.08, 0.04, 0.01, 0.01]  # one to six word pieces
# questions measured the plain way and ours, taken in turn in so many parts
SHAPES = {"cpu": (16, 16, 2), "cuda": (16, 256, 1), "tiny": (4, 4, 2)}
QUESTION_TOKENS = 9


def build(scale: str, device: torch.device) -> tuple[SIMLAVQA, dict]:
    torch.manual_seed(0)
    overrides = ["k_test=16", *TINY] if scale == "tiny" else []
    config = read_config(str(ROOT / "configs/VQA.yaml"), VQA, overrides)
    return SIMLAVQA.from_config(config).to(device).eval(), config


def answer_list(num: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """ids, mask (num, L), all different, in random order; a word is the rarer the later in the vocabulary."""
    share = torch.tensor(SHARE_OF_LENGTHS)
    words = 1.0 / torch.arange(1, vocab_size - 1000 + 1)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < num:
        length = int(share.multinomial(1)) + 1
        pieces = words.sqrt().multinomial(length) if length == 1 else words.multinomial(length)
        found.setdefault(tuple((pieces + 1000).tolist()))
    ids = torch.zeros(num, len(SHARE_OF_LENGTHS) + 2, dtype=torch.long)
    for line, pieces in zip(ids, found, strict=True):
        line[: len(pieces) + 2] = torch.tensor([CLS, *pieces, SEP])
    return ids, (ids > 0).long()


def plain_ranking(
    model: SIMLAVQA, states: Tensor, mask: Tensor, ids: Tensor, answer_mask: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """states (B, T, D), mask (B, T); ids, answer_mask (K, L) -> as `rank_answers`"""
    decoder = model.text_decoder
    start = ids[:1, :1].expand(len(states), 1)
    hidden = decoder.bert(start, torch.ones_like(start), decoder.bert.project(states, mask), causal=True)
    first = decoder.predict(hidden[:, 0]).float().log_softmax(-1)[:, ids[:, 1]]
    first, chosen = (part[:, :k] for part in first.sort(descending=True, stable=True))
    scores = []
    for question in range(len(states)):
        rows, rows_mask = ids[chosen[question]], answer_mask[chosen[question]]
        cross = decoder.bert.project(
            states[question].repeat(len(rows), 1, 1), mask[question].repeat(len(rows), 1)
        )
        hidden = decoder.bert(rows[:, :-1], rows_mask[:, :-1], cross, causal=True)
        labels = rows[:, 1:].masked_fill(rows_mask[:, 1:] == 0, -100)
        losses = F.cross_entropy(decoder.predict(hidden).float().mT, labels, reduction="none")
        scores.append(first[question] - losses.double().sum(1))
    scores, order = torch.stack(scores).sort(descending=True, stable=True)
    return chosen.gather(1, order), scores.softmax(-1).float()


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__).parse_args()
    device = torch.device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    num_plain, num_ours, num_parts = SHAPES["tiny" if args.scale == "tiny" else device.type]
    model, config = build(args.scale, device)
    bert, k = model.text_decoder.bert.config, config["k_test"]
    ids, mask = (
        part.to(device) for part in answer_list(300 if args.scale == "tiny" else 3128, bert.vocab_size)
    )
    tree_seconds, answers = clock(lambda: AnswerTree.build(ids, mask).to(device), device)
    states = torch.randn(num_ours, QUESTION_TOKENS, bert.hidden_size, device=device)
    state_mask = torch.ones(states.shape[:2], dtype=torch.long, device=device)

    def plain(questions: Tensor) -> tuple[Tensor, Tensor]:
        return plain_ranking(model, states[questions], state_mask[questions], ids, mask, k)

    def ours(questions: Tensor) -> tuple[Tensor, Tensor]:
        few = questions.split(max(1, 1024 // k))
        ranked = [model.rank_states(states[part], state_mask[part], answers, k, 1024) for part in few]
        return tuple(map(torch.cat, zip(*ranked, strict=True)))

    def encode(image: Tensor, question_ids: Tensor) -> Tensor:
        return model.question_states(image, question_ids, torch.ones_like(question_ids))

    plain_seconds, seconds, by_plain, by_ours = 0.0, 0.0, [], []
    with autocast(device, precision):
        plain(torch.arange(1))  # warm
        ours(torch.arange(num_ours)[:8])
        plain_flops = count_flops(lambda: plain(torch.arange(1)))
        flops = count_flops(lambda: ours(torch.arange(num_ours)[:8])) / min(8, num_ours)
        for part in range(num_parts):  # in turn, as others may compute beside us
            took, found = clock(lambda p=part: plain(torch.arange(num_plain).chunk(num_parts)[p]), device)
            plain_seconds, by_plain = plain_seconds + took, [*by_plain, found]
            reset_peak(device)
            took, found = clock(lambda p=part: ours(torch.arange(num_ours).chunk(num_parts)[p]), device)
            seconds, by_ours = seconds + took, [*by_ours, found]
        peak = peak_bytes(device)
        image = torch.randn(4, 3, config["image_res"], config["image_res"], device=device)
        question_ids = torch.randint(1000, bert.vocab_size, (4, QUESTION_TOKENS), device=device)
        encoder_seconds = clock(lambda: encode(image, question_ids), device)[0] / 4

    (plain_numbers, plain_shares), (numbers, shares) = (
        tuple(map(torch.cat, zip(*found, strict=True))) for found in (by_plain, by_ours)
    )
    same = (plain_numbers == numbers[:num_plain]).float().mean().item()
    in_order = [s.gather(1, n.argsort(1)) for n, s in ((plain_numbers, plain_shares), (numbers, shares))]
    difference = (in_order[0] - in_order[1][:num_plain]).abs().max().item()
    num_tokens = answers.branches(numbers).num.sum().item()
    width = ids.shape[1] - 1
    plain_each, each = plain_seconds / num_plain, seconds / num_ours
    ratio = plain_each / each
    whole = (plain_each + encoder_seconds) / (each + encoder_seconds)

    pieces = (mask.sum(1) - 2).float().mean()
    print(f"{len(ids)} answers, {pieces:.2f} word pieces on average, k = {k}, {precision}")
    row("", "row by row", "ours", "ratio")
    row("questions measured", num_plain, num_ours)
    row("decoder tokens per question", k * width, num_tokens / num_ours, k * width * num_ours / num_tokens)
    row("GFLOP per question", plain_flops / 1e9, flops / 1e9)
    row("GFLOP/s", plain_flops / plain_each / 1e9, flops / each / 1e9)
    row("seconds per question, ranking", plain_each, each, ratio)
    row("  with both encoders", plain_each + encoder_seconds, each + encoder_seconds, whole)
    row("seconds once, to build the tree", "", tree_seconds)
    row("answers at the same rank, share", same)
    row("largest difference of probabilities", difference)
    row("peak memory, GB", peak / 1e9)
    found = {
        "benchmark": "vqa_rank",
        "scale": args.scale,
        "precision": precision,
        "ratio": ratio,
        "ratio_with_encoders": whole,
        "answers": len(ids),
        "k": k,
        "plain_questions": num_plain,
        "plain_seconds": plain_seconds,
        "questions": num_ours,
        "seconds": seconds,
        "encoder_seconds_per_question": encoder_seconds,
        "tree_seconds": tree_seconds,
        "plain_tokens_per_question": k * width,
        "tokens_per_question": num_tokens / num_ours,
        "same_rank": same,
        "max_abs_difference": difference,
        "flops_per_question": flops,
        "plain_flops_per_question": plain_flops,
        "mfu": utilization(flops / each, device, precision),
        "peak_memory_bytes": peak,
    }
    last_line(found, device)
    if precision == "fp32" and not (difference <= 1e-4 and same > 0.99):
        raise SystemExit(f"the rankings differ: {same:.2%} at the same rank, probabilities by {difference}")


if __name__ == "__main__":
    main()
