"""Re-ranking in groups against one pair at a time, and what it may hold at once."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import TINY_BERT, TINY_VIT, shake, tiny_texts
from tiny import make_tiny

import zero_shot_retrieval
from simla.configs.reader import read_config
from simla.configs.schema import RETRIEVAL
from simla.dataset.retrieval import RetrievalEvalData
from simla.dataset.text import build_tokenizer
from simla.dataset.transforms import normalise
from simla.evaluation.rerank import NOT_SCORED, make_groups, rerank
from simla.models.retrieval import SIMLARetrieval
from simla.utils import autocast

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small():
    """A model, its view of 7 images and of 19 texts of 1 to 9 tokens, and the logits of all pairs."""
    rng = torch.Generator().manual_seed(1)
    model = shake(SIMLARetrieval(TINY_VIT, TINY_BERT, embed_dim=8, twins=False))
    texts = tiny_texts([1 + 5 * i % 9 for i in range(19)], 12, rng)
    with torch.no_grad():
        embeds, feats = model.encode_image(torch.randn(7, 3, 24, 24, generator=rng))
        similarity = feats @ model.encode_text(*texts).T
        similarity[2] += 1  # wanted by all texts, image 4 by none
        similarity[4] -= 1
    return model, similarity, embeds, texts, slow_logits(model, embeds, *texts)


@torch.no_grad()
def slow_logits(model: SIMLARetrieval, embeds, ids, mask) -> torch.Tensor:
    """One pair at a time, every token through every layer, texts padded to the full length."""
    encoder = model.text_encoder

    def logit(image: torch.Tensor, text: int) -> torch.Tensor:
        hidden = encoder(ids[text : text + 1], mask[text : text + 1], encoder.project(image[None]))
        return model.itm_head(hidden[0, 0])[1]

    return torch.stack([torch.stack([logit(image, text) for text in range(len(ids))]) for image in embeds])


def slow_scores(similarity: torch.Tensor, k: int, logits: torch.Tensor) -> torch.Tensor:
    """Row by row: the logits of the k most similar, all else -100."""
    scores = torch.full_like(logits, NOT_SCORED)
    for query, row in enumerate(similarity):
        chosen = sorted(range(len(row)), key=lambda column, row=row: -row[column])[:k]
        scores[query, chosen] = logits[query, chosen]
    return scores


@pytest.mark.parametrize("sizes", [None, (1, 1), (1, 30), (2, 60), (3, 25), (50, 10_000)])
@pytest.mark.parametrize("k", [1, 3, 8, 1000])
def test_rerank_is_the_slow_way_made_fast(small, k, sizes):
    model, similarity, embeds, texts, logits = small
    scores_i2t, scores_t2i = rerank(model, similarity, k, embeds, *texts, sizes)
    assert scores_i2t.dtype == scores_t2i.dtype == torch.float32
    expected = slow_scores(similarity, k, logits), slow_scores(similarity.T, k, logits.T)
    torch.testing.assert_close(scores_i2t, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores_t2i, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_scores_have_more_digits_than_half_precision(small, precision):
    """So that two pairs hardly ever have the same score."""
    model, similarity, embeds, texts, logits = small
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with autocast(CPU, precision):
        scores = rerank(model, similarity, 7, embeds, *texts)[1].flatten()
    scores = scores[scores != NOT_SCORED]
    assert (scores != scores.to(half).float()).float().mean() > 0.9
    assert len(scores.unique()) == len(logits.unique())  # some texts are the same


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(small, precision):
    """Logits of about 5: bf16 keeps 8 bits of every step, fp16 11. The scores are single precision."""
    model, similarity, embeds, texts, logits = small
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with autocast(CPU, precision):
        found, _ = rerank(model, similarity, 1000, embeds, *texts)
        rounded, _ = rerank(model, similarity, 1000, embeds.to(dtype), *texts)
    assert torch.equal(found, rounded)  # so states may be kept so
    assert found.dtype == torch.float32 and not torch.equal(found, logits)
    torch.testing.assert_close(found, logits, rtol=0, atol={"bf16": 0.3, "fp16": 0.04}[precision])


@settings(max_examples=100)
@given(st.data(), st.integers(0, 6), st.integers(1, 8), st.integers(1, 4), st.integers(1, 40))
def test_every_pair_has_its_place_once(data, num_images, num_texts, most_images, most_tokens):
    rows = st.lists(st.booleans(), min_size=num_texts, max_size=num_texts)
    wanted = [data.draw(rows.filter(any)) for _ in range(num_images)]
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=num_texts, max_size=num_texts))
    pairs = [(i, t) for i in range(num_images) for t in range(num_texts) if wanted[i][t]]
    found = {}
    wanted = torch.tensor(wanted, dtype=torch.bool).view(num_images, num_texts)
    for group in make_groups(wanted, torch.tensor(lengths), most_images, most_tokens):
        assert len(group.images) <= most_images
        assert [first for first, *_ in group.calls] == [0] + [end for _, end, _ in group.calls[:-1]]
        assert group.calls[-1][1] == group.texts.shape[1]
        for first, end, longest in group.calls:
            texts = group.texts[:, first:end]
            assert max(lengths[text] for text in texts.flatten()) == longest
            assert end == first + 1 or texts.numel() * longest <= most_tokens
        for image, texts, places in zip(
            group.images, group.texts.tolist(), group.indices.tolist(), strict=True
        ):
            for text, place in zip(texts, places, strict=True):
                assert place == len(pairs) or found.setdefault(place, (image, text)) == (image, text)
    assert [found[place] for place in range(len(pairs))] == pairs
    assert len(found) == len(pairs)


def test_images_are_projected_once_and_few_at_a_time(small, monkeypatch):
    """However many there are: what the device holds of them is one group."""
    model, similarity, embeds, texts, _ = small
    seen, calls, project, match = [], [], model.text_encoder.project, model.match

    def spied_project(states):
        seen.append(len(states))
        return project(states)

    def spied_match(cross, ids, mask):
        calls.append((ids.numel(), ids.shape[1] == mask.sum(1).max()))
        return match(cross, ids, mask)

    monkeypatch.setattr(model.text_encoder, "project", spied_project)
    monkeypatch.setattr(model, "match", spied_match)
    rerank(model, similarity.repeat(5, 1), 6, embeds.repeat(5, 1, 1), *texts, sizes=(3, 60))
    assert sum(seen) == 35 and max(seen) == 3
    assert max(tokens for tokens, _ in calls) <= 60 and all(tight for _, tight in calls)


def test_the_first_state_alone_is_that_of_the_whole(small):
    model, _, embeds, (ids, mask), _ = small
    cross = model.text_encoder.project(embeds).rows(torch.arange(19) % 7)
    with torch.no_grad():
        whole = model.text_encoder(ids, mask, cross)[:, 0]
        torch.testing.assert_close(model.text_encoder(ids, mask, cross, first_only=True)[:, 0], whole)


# ---- the script's evaluation ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_evaluation_has_the_precision_of_the_config(precision, tmp_path, monkeypatch):
    paths = make_tiny(tmp_path)
    config = read_config(str(paths["Retrieval"]), RETRIEVAL, [f"precision={precision}"])
    model = shake(SIMLARetrieval.from_config(config, twins=False), std=0.05)
    data = RetrievalEvalData(config["test_file"], config)
    seen = []

    def spied_rerank(model, similarity, k, image_embeds, *texts, **rest):
        seen.append((similarity, image_embeds, torch.is_autocast_enabled("cpu")))
        return rerank(model, similarity, k, image_embeds, *texts, **rest)

    monkeypatch.setattr(zero_shot_retrieval, "rerank", spied_rerank)
    recall = zero_shot_retrieval.evaluate(model, data, build_tokenizer(config["text_encoder"]), config, CPU)
    assert 0 <= recall["r_mean"] <= 100
    [(similarity, image_embeds, in_half)] = seen
    assert similarity.dtype == torch.float32 and similarity.shape == (7, len(data.texts))
    assert image_embeds.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert in_half == (precision == "bf16")
    with torch.no_grad():  # the states of the images in their order
        for row, item in zip(image_embeds, (data[i] for i in range(7)), strict=True):
            expected = model.encode_image(normalise(item["images"]))[0][0]
            torch.testing.assert_close(row.float(), expected, rtol=0, atol=1e-5 if not in_half else 0.1)


def test_the_score_rule_chooses_what_ranks(tmp_path, monkeypatch):
    paths = make_tiny(tmp_path)
    config = read_config(str(paths["Retrieval"]), RETRIEVAL, ["k_test=3", "score_itc_weight=2.5"])
    model = shake(SIMLARetrieval.from_config(config, twins=False), std=0.05)
    data, tokenizer = RetrievalEvalData(config["test_file"], config), build_tokenizer(config["text_encoder"])

    def scores(rule: str) -> tuple[torch.Tensor, torch.Tensor]:
        return zero_shot_retrieval.score(model, data, tokenizer, {**config, "score": rule}, CPU)

    by_matching, both = scores("itm"), scores("itm+itc")
    zero_shot_retrieval.report(data, {}, "w", {**config, "score": "itm+itc"}, str(tmp_path))
    result = json.loads((tmp_path / "result" / "retrieval.json").read_bytes())
    assert result["score"] == "itm+itc" and result["score_itc_weight"] == 2.5
    monkeypatch.setattr(model, "match", None)  # contrast alone does not call it
    by_contrast = scores("itc")
    torch.testing.assert_close(by_contrast[0], by_contrast[1].T)
    assert by_contrast[0].abs().max() <= 1 + 1e-5
    for matching, contrast, summed in zip(by_matching, by_contrast, both, strict=True):
        for query, row in enumerate(summed):
            for candidate, value in enumerate(row):
                given = matching[query, candidate]
                expected = given if given == NOT_SCORED else given + 2.5 * contrast[query, candidate]
                assert value == pytest.approx(float(expected), abs=1e-5)
        assert (summed != NOT_SCORED).sum(1).tolist() == [3] * len(summed)


def test_the_largest_weight_leaves_every_candidate_before_what_is_not_scored(small):
    model, similarity, embeds, texts, _ = small
    weight, opposite = RETRIEVAL["score_itc_weight"].most, torch.full_like(similarity, -1.0)
    for scores in rerank(model, opposite, 3, embeds, *texts, score="itm+itc", itc_weight=weight):
        assert ((scores > NOT_SCORED).sum(1) == 3).all()
