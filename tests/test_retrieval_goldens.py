"""Re-ranked retrieval against numbers recorded from the published code."""

import hashlib

import numpy as np
import pytest
import torch
from goldens_io import fill_model, golden, golden_image
from models_for_tests import vit_sizes

from metrics import retrieval_recall
from models.bert import BertConfig
from models.rerank import NOT_SCORED, candidate_pairs, rerank
from models.retrieval import SIMLARetrieval


def golden_retrieval_model() -> SIMLARetrieval:
    config = golden("retrieval_structure")["config"]
    model = SIMLARetrieval(
        vit_sizes(config),
        BertConfig.read(config["bert"]),
        embed_dim=config["embed_dim"],
        queue_size=config["queue_size"],
        temp=config["temp"],
    )
    return model.eval()


def test_state_dict_is_the_published_one():
    structure = golden("retrieval_structure")
    model = golden_retrieval_model()
    recorded = [(name, tuple(shape), dtype) for name, shape, dtype in structure["state_dict"]]
    actual = [(k, tuple(v.shape), str(v.dtype).split(".")[1]) for k, v in model.state_dict().items()]
    assert actual == recorded
    assert [[n, p.requires_grad] for n, p in model.named_parameters()] == structure["named_parameters"]
    fill_model(model, structure["aliases"])
    bytes_hash = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name not in ("image_queue", "text_queue"):
            bytes_hash.update(tensor.contiguous().numpy().tobytes())
    assert bytes_hash.hexdigest() == structure["filled_weights"]["sha256"]


@pytest.fixture(scope="module")
def recorded_evaluation():
    recorded = golden("retrieval_eval")
    model = golden_retrieval_model()
    fill_model(model, {})
    text_ids = torch.tensor(recorded["text"]["input_ids"])
    text_mask = torch.tensor(recorded["text"]["attention_mask"])
    with torch.no_grad():
        image = golden_image(recorded["image_seed"], recorded["image_shape"])
        image_embeds, image_feat = model.encode_image(image)
        similarity = image_feat @ model.encode_text(text_ids, text_mask).T
    return recorded, model, image_embeds, text_ids, text_mask, similarity


def test_candidates(recorded_evaluation):
    recorded, *_, similarity = recorded_evaluation
    for_images, for_texts = candidate_pairs(similarity, recorded["k_test"])
    for image, candidates in enumerate(recorded["candidates_i2t"]):
        assert set(for_images[image].nonzero().flatten().tolist()) == set(candidates)
    for text, candidates in enumerate(recorded["candidates_t2i"]):
        assert set(for_texts[:, text].nonzero().flatten().tolist()) == set(candidates)


def test_score_matrices(recorded_evaluation):
    recorded, model, image_embeds, text_ids, text_mask, similarity = recorded_evaluation
    held = dict(enumerate(image_embeds.split(1)))
    scores = rerank(similarity, recorded["k_test"], held, text_ids, text_mask, model.match, chunk_size=5)
    for actual, name in zip(scores, ("score_matrix_i2t", "score_matrix_t2i"), strict=True):
        expected = torch.tensor(recorded[name])
        assert torch.equal(actual == NOT_SCORED, expected == NOT_SCORED)
        torch.testing.assert_close(actual, expected, rtol=5e-6, atol=1e-6)


def test_rerank_is_the_slow_way_made_fast(recorded_evaluation):
    """One query at a time, padded to the full length, as the published code does it."""
    _, model, image_embeds, text_ids, text_mask, similarity = recorded_evaluation
    held = dict(enumerate(image_embeds.split(1)))
    for k in (1, 3, 7, 1000):
        scores_i2t, scores_t2i = rerank(similarity, k, held, text_ids, text_mask, model.match, chunk_size=4)
        slow_i2t, slow_t2i = torch.full_like(scores_i2t, -100.0), torch.full_like(scores_t2i, -100.0)
        with torch.no_grad():
            for i, row in enumerate(similarity):
                for t in row.topk(min(k, len(row))).indices.tolist():
                    slow_i2t[i, t] = model.match(
                        image_embeds[i : i + 1], text_ids[t : t + 1], text_mask[t : t + 1]
                    )
            for t, row in enumerate(similarity.T):
                for i in row.topk(min(k, len(row))).indices.tolist():
                    slow_t2i[t, i] = model.match(
                        image_embeds[i : i + 1], text_ids[t : t + 1], text_mask[t : t + 1]
                    )
        torch.testing.assert_close(scores_i2t, slow_i2t, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores_t2i, slow_t2i, rtol=1e-5, atol=1e-5)


def test_recall_of_the_recorded_matrices():
    """Ties are ranked against the model: the low end of what any order of the ties gives."""
    recorded = golden("retrieval_eval")
    i2t, t2i = np.array(recorded["score_matrix_i2t"]), np.array(recorded["score_matrix_t2i"])
    metrics = retrieval_recall(i2t, t2i, recorded["img2txt"], recorded["txt2img"])
    for name, (low, high) in recorded["metrics_range_over_ties"].items():
        assert metrics[name] == pytest.approx(low, abs=1e-9), name
        if low == high:
            assert metrics[name] == pytest.approx(recorded["metrics"][name], abs=1e-9), name


def test_recall_of_the_recorded_random_matrix():
    recorded = golden("retrieval_eval")["itm_eval_random"]
    rs = np.random.RandomState(recorded["seed"])
    i2t = rs.standard_normal((20, 60)).astype(np.float32)
    t2i = rs.standard_normal((60, 20)).astype(np.float32)
    for i in range(20):
        i2t[i, 3 * i + i % 3] += np.float32(0.2 * (i % 10))
    for t in range(60):
        t2i[t, t // 3] += np.float32(0.1 * (t % 20))
    metrics = retrieval_recall(
        i2t, t2i, [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(20)], [t // 3 for t in range(60)]
    )
    assert metrics == pytest.approx(recorded["metrics"], abs=1e-9)
