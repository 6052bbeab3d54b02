"""Every loss and every draw against the slow obvious way: loops over Python numbers."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from simla.models import losses

CLOSE = {"rel": 1e-4, "abs": 1e-5}
quickly = settings(deadline=None, max_examples=40)
seeds, alphas = st.integers(0, 2**16), st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(value - top) for value in row))
    return [value - total for value in row]


def cross_entropy(logits: list[float], target: list[float]) -> float:
    return -sum(t * value for t, value in zip(target, log_softmax(logits), strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def one_hot(index: int, size: int) -> list[float]:
    return [float(i == index) for i in range(size)]


def mixed(alpha: float, hard: float, soft: float) -> float:
    return (1 - alpha) * hard + alpha * soft


# ---- contrast ----


@given(seeds, st.integers(1, 5), st.integers(0, 7), alphas)
@quickly
def test_contrast_equals_loops(seed, batch, queue, alpha):
    rng = generator(seed)
    sims = [torch.randn(batch, batch + queue, generator=rng) * 5 for _ in range(4)]
    identity = torch.randint(0, 3, (batch + queue,), generator=rng)
    same = (identity[:batch, None] == identity[None]).float()
    positives = same / same.sum(1, keepdim=True)
    targets = [losses.contrast_targets(sim, positives, alpha) for sim in sims[2:]]
    slow_directions = []
    for sim, sim_m, target in zip(sims[:2], sims[2:], targets, strict=True):
        rows = []
        for i in range(batch):
            momentum = softmax(sim_m[i].tolist())
            slow_target = [
                mixed(alpha, hard, soft) for hard, soft in zip(positives[i].tolist(), momentum, strict=True)
            ]
            assert target[i].tolist() == pytest.approx(slow_target, **CLOSE)
            assert sum(slow_target) == pytest.approx(1, abs=1e-5)
            rows.append(cross_entropy(sim[i].tolist(), slow_target))
        slow_directions.append(mean(rows))
    assert losses.ita_loss(*sims[:2], *targets).item() == pytest.approx(mean(slow_directions), **CLOSE)


def test_contrast_without_momentum_targets_is_cross_entropy_with_the_diagonal():
    sim_i2t, sim_t2i = torch.randn(4, 9), torch.randn(4, 9)
    targets = losses.contrast_targets(torch.randn(4, 9), torch.eye(4, 9), alpha=0.0)
    expected = (F.cross_entropy(sim_i2t, torch.arange(4)) + F.cross_entropy(sim_t2i, torch.arange(4))) / 2
    torch.testing.assert_close(losses.ita_loss(sim_i2t, sim_t2i, targets, targets), expected)


# ---- matching ----


@given(seeds, st.integers(1, 6), st.sampled_from([1.0, 0.07, 0.001]), st.integers(1, 6))
@quickly
def test_negatives_are_drawn_from_the_softmax_without_equal_identities(seed, batch, temp, identities):
    rng = generator(seed)
    similarity = (torch.rand(batch, batch, generator=rng) * 2 - 1) / temp
    identity = torch.randint(0, identities, (batch,), generator=rng)
    excluded = identity[:, None] == identity[None]
    weights, has_negative = losses.negative_weights(similarity, excluded)
    assert weights.isfinite().all() and (weights >= 0).all()
    for i in range(batch):
        allowed = (~excluded[i]).tolist()
        assert has_negative[i].item() == any(allowed)
        if any(allowed):
            slow = [p * a for p, a in zip(softmax(similarity[i].tolist()), allowed, strict=True)]
            if sum(slow) > 1e-30:
                assert weights[i].tolist() == pytest.approx(slow, rel=1e-3, abs=1e-7)
    torch.manual_seed(seed)
    for _ in range(5):
        drawn = losses.draw_negatives(weights)
        assert not excluded[torch.arange(batch), drawn][has_negative].any()
        assert ((drawn >= 0) & (drawn < batch)).all()


def test_the_diagonal_is_never_drawn_even_where_it_is_all_the_softmax():
    """At the lowest temperature a good model's softmax is 1 on the diagonal and underflows elsewhere."""
    similarity = (torch.eye(5) * 2 - 1) / 0.001
    weights, has_negative = losses.negative_weights(similarity, torch.eye(5, dtype=torch.bool))
    assert has_negative.all()
    torch.testing.assert_close(weights, 1 - torch.eye(5))
    drawn = Counter(losses.draw_negatives(weights.repeat(2000, 1))[::5].tolist())  # of the first row
    assert 0 not in drawn
    assert all(abs(drawn[i] / 2000 - 0.25) < 0.05 for i in range(1, 5))


def test_underflow_draws_evenly_among_what_is_allowed():
    """Row 0 underflows and shares its identity with 2; the other rows keep their softmax."""
    similarity = torch.tensor([[1.0, -1.0, 0.9, -1.0], *[[0.0] * 4] * 3]) / 0.001
    excluded = torch.eye(4, dtype=torch.bool)
    excluded[0, 2] = excluded[2, 0] = True
    weights, _ = losses.negative_weights(similarity, excluded)
    assert weights[0].tolist() == [0, 1, 0, 1]
    assert weights[1].tolist() == pytest.approx([0.25, 0, 0.25, 0.25])
    assert weights[2].tolist() == pytest.approx([0, 0.25, 0, 0.25])


def test_a_weight_too_small_to_be_drawn_counts_as_underflow():
    """The smallest positive float loses against exact zeros in torch.multinomial."""
    similarity = torch.tensor([[103.0, 0.0, -99.0]] * 3)
    excluded = torch.eye(3, dtype=torch.bool)
    assert 0 < similarity.softmax(-1)[0, 1] < torch.finfo(torch.float32).tiny
    weights, _ = losses.negative_weights(similarity, excluded)
    drawn = losses.draw_negatives(weights[:1].repeat(2000, 1))
    assert set(drawn.tolist()) == {1, 2}


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_without_a_negative_are_left_out(batch):
    """A batch of one, or one whose images are all the same."""
    everything = torch.ones(batch, batch, dtype=torch.bool)
    weights, has_negative = losses.negative_weights(torch.randn(batch, batch), everything)
    assert not has_negative.any()
    drawn = losses.draw_negatives(weights)
    assert ((drawn >= 0) & (drawn < batch)).all()
    logits = torch.randn(3 * batch, 2, requires_grad=True)
    labels = torch.tensor([1] * batch + [0] * 2 * batch)
    loss = losses.itm_loss(logits, labels, has_negative.repeat(3))
    assert loss == 0
    loss.backward()
    assert not logits.grad.any()


def test_draws_follow_the_weights():
    weights = torch.tensor([[0.0, 1.0, 3.0, 6.0], [0.5, 0.5, 0.0, 0.0]])
    rows = weights.repeat(5000, 1)
    drawn = losses.draw_negatives(rows).view(5000, 2)
    for column, expected in enumerate(([0, 0.1, 0.3, 0.6], [0.5, 0.5, 0, 0])):
        seen = torch.bincount(drawn[:, column], minlength=4) / 5000
        assert seen.tolist() == pytest.approx(expected, abs=0.03)
        assert seen[torch.tensor(expected) == 0].sum() == 0


@given(seeds, st.integers(1, 8))
@quickly
def test_matching_loss_equals_a_loop_over_the_counted_rows(seed, rows):
    rng = generator(seed)
    logits = torch.randn(rows, 2, generator=rng, requires_grad=True)
    labels = torch.randint(0, 2, (rows,), generator=rng)
    counted = torch.rand(rows, generator=rng) < 0.6
    kept = [cross_entropy(logits[r].tolist(), one_hot(labels[r], 2)) for r in range(rows) if counted[r]]
    loss = losses.itm_loss(logits, labels, counted)
    assert loss.item() == pytest.approx(mean(kept) if kept else 0.0, **CLOSE)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[~counted].any()


# ---- masked words and patches ----


@given(seeds, st.integers(0, 6), st.integers(2, 9), alphas)
@quickly
def test_masked_word_loss_equals_a_loop(seed, masked, words, alpha):
    rng = generator(seed)
    logits, logits_m = (torch.randn(masked, words, generator=rng) * 3 for _ in range(2))
    labels = torch.randint(0, words, (masked,), generator=rng)
    rows = [
        mixed(
            alpha,
            cross_entropy(logits[m].tolist(), one_hot(labels[m], words)),
            cross_entropy(logits[m].tolist(), softmax(logits_m[m].tolist())),
        )
        for m in range(masked)
    ]
    loss = losses.mlm_loss(logits, labels, logits_m, alpha)
    assert loss.item() == pytest.approx(mean(rows) if rows else 0.0, **CLOSE)
    assert losses.mim_loss(logits, labels, logits_m, alpha).item() == loss.item()


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), alphas)
@quickly
def test_masked_word_loss_over_the_sequence_equals_loops(seed, batch, length, words, alpha):
    """The student's log-softmax runs over the positions of one caption, each word for itself."""
    rng = generator(seed)
    logits, logits_m = (torch.randn(batch, length, words, generator=rng) * 3 for _ in range(2))
    labels = torch.randint(0, words, (batch, length), generator=rng)
    labels[torch.rand(batch, length, generator=rng) < 0.5] = -100
    rows = []
    for b in range(batch):
        over_positions = [log_softmax(logits[b, :, v].tolist()) for v in range(words)]  # (words, length)
        for t in range(length):
            if labels[b, t] != -100:
                hard = cross_entropy(logits[b, t].tolist(), one_hot(labels[b, t], words))
                teacher = softmax(logits_m[b, t].tolist())
                soft = -sum(teacher[v] * over_positions[v][t] for v in range(words))
                rows.append(mixed(alpha, hard, soft))
    loss = losses.mlm_loss_over_sequence(logits, labels, logits_m, alpha)
    assert loss.item() == pytest.approx(mean(rows) if rows else 0.0, **CLOSE)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_nothing_masked_is_a_loss_of_zero_with_a_gradient_path(alpha):
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    head = torch.nn.Linear(4, 5)
    none = torch.full((2, 3), -100)
    few = losses.mlm_loss(head(hidden[none != -100]), none[none != -100], torch.randn(0, 5), alpha)
    whole = losses.mlm_loss_over_sequence(head(hidden), none, torch.randn(2, 3, 5), alpha)
    for loss in (few, whole):
        assert loss.item() == 0.0
        hidden.grad = head.weight.grad = None
        loss.backward()
        for grad in (hidden.grad, head.weight.grad):
            assert torch.equal(grad, torch.zeros_like(grad))


# ---- keywords ----


@st.composite
def attention_of_captions(draw):
    """[CLS] rows (B, H, T) without ties and their mask: right-padded captions of 1 to T tokens."""
    batch, heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rng = generator(draw(seeds))
    lengths = draw(st.lists(st.integers(1, width), min_size=batch, max_size=batch))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    scores = torch.randn(batch, heads, width, generator=rng)
    return (scores + (1 - mask[:, None]) * -10000.0).softmax(-1), mask


def slow_votes(attention: torch.Tensor, row: int) -> list[int]:
    votes = [0] * attention.shape[-1]
    for head in attention[row].tolist():
        for position in sorted(range(len(head)), key=lambda i: -head[i])[:4]:
            votes[position] += 1
    return votes


@given(attention_of_captions())
@quickly
def test_votes_equal_a_loop_and_padding_is_never_a_keyword(case):
    attention, mask = case
    length = attention.shape[-1]
    votes = losses.keyword_votes(attention, mask)
    positions, counted = losses.choose_keywords(votes)
    assert positions.shape == counted.shape == (len(mask), min(5, length))
    for row in range(len(mask)):
        real = int(mask[row].sum())
        if real >= 4:  # of a shorter caption some votes fall on padding, all of them on equal zeros
            slow = slow_votes(attention, row)[:real] + [-1] * (mask.shape[1] - real)
            assert votes[row].tolist() == slow
        chosen = positions[row][counted[row]].tolist()
        assert len(set(chosen)) == len(chosen) == min(5, real)  # as many as there are, each once
        assert all(position < real for position in chosen)
        left = set(range(real)) - set(chosen)
        most_left = max((int(votes[row, p]) for p in left), default=0)
        assert all(int(votes[row, position]) >= most_left for position in chosen)


def test_captions_of_two_and_three_tokens_give_that_many_keywords():
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    attention = (torch.randn(2, 3, 6) + (1 - mask[:, None]) * -10000.0).softmax(-1)
    votes = losses.keyword_votes(attention, mask)
    assert votes.tolist() == [[3, 3, -1, -1, -1, -1], [3, 3, 3, -1, -1, -1]]
    positions, counted = losses.choose_keywords(votes)
    ids = torch.tensor([[1, 7, 0, 0, 0, 0], [1, 4, 9, 0, 0, 0]])
    target = losses.keyword_targets(ids, positions, counted, vocab_size=10, cls_id=1)
    assert [row.nonzero().flatten().tolist() for row in target] == [[7], [4, 9]]


@given(attention_of_captions())
@quickly
def test_as_published_padding_is_a_position_like_any_other(case):
    attention, mask = case
    votes = losses.keyword_votes(attention, None)
    per_head = min(4, attention.shape[-1])
    assert votes.sum(1).tolist() == [attention.shape[1] * per_head] * len(mask)
    for row in range(len(mask)):
        if mask[row].sum() >= per_head:
            assert votes[row].tolist() == slow_votes(attention, row)
    positions, counted = losses.choose_keywords(votes)
    assert counted.all()
    for row in range(len(mask)):
        assert (
            sorted(votes[row, positions[row]].tolist()) == sorted(votes[row].tolist())[-positions.shape[1] :]
        )


def test_as_published_padding_becomes_a_keyword_of_a_short_caption():
    mask = torch.tensor([[1, 1, 0, 0, 0, 0]])
    attention = (torch.randn(1, 3, 6) + (1 - mask[:, None]) * -10000.0).softmax(-1)
    positions, counted = losses.choose_keywords(losses.keyword_votes(attention, None))
    target = losses.keyword_targets(torch.tensor([[1, 7, 0, 0, 0, 0]]), positions, counted, 10, cls_id=1)
    assert target[0].nonzero().flatten().tolist() == [0, 7]


@given(seeds, st.integers(1, 4), st.integers(1, 7), st.integers(2, 6))
@quickly
def test_keyword_targets_equal_a_loop(seed, batch, length, words):
    """Words repeat, some both counted and not; [CLS] stays 0."""
    rng = generator(seed)
    ids = torch.randint(0, words, (batch, length), generator=rng)
    chosen = torch.rand(batch, length, generator=rng).argsort(dim=1)[:, :5]
    counted = torch.rand(chosen.shape, generator=rng) < 0.6
    slow = [[0.0] * words for _ in range(batch)]
    for b in range(batch):
        for position, counts in zip(chosen[b].tolist(), counted[b].tolist(), strict=True):
            if counts and ids[b, position] != 1:
                slow[b][ids[b, position]] = 1.0
    assert losses.keyword_targets(ids, chosen, counted, words, cls_id=1).tolist() == slow


@given(seeds, st.integers(1, 4), st.integers(1, 7), alphas)
@quickly
def test_keyword_loss_equals_a_loop(seed, batch, words, alpha):
    rng = generator(seed)
    logits, logits_m = (torch.randn(batch, words, generator=rng) * 3 for _ in range(2))
    target = (torch.rand(batch, words, generator=rng) < 0.3).float()

    def binary(logit: float, wanted: float) -> float:
        probability = 1 / (1 + math.exp(-logit))
        return -wanted * math.log(probability) - (1 - wanted) * math.log(1 - probability)

    cells = [
        mixed(
            alpha,
            binary(logits[b, v].item(), target[b, v].item()),
            binary(logits[b, v].item(), 1 / (1 + math.exp(-logits_m[b, v].item()))),
        )
        for b in range(batch)
        for v in range(words)
    ]
    assert losses.psl_loss(logits, target, logits_m, alpha).item() == pytest.approx(mean(cells), **CLOSE)
