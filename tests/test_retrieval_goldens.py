"""Re-ranked retrieval against numbers recorded from the published code."""

import hashlib

import numpy as np
import pytest
import torch
from goldens_io import digest, fill_model, golden, golden_image
from models_for_tests import losses_of, vit_sizes
from test_pretrain_goldens import check_grads, check_params_after, check_queues
from torch.nn.attention import SDPBackend, sdpa_kernel

from simla.evaluation.rerank import NOT_SCORED, candidate_pairs, rerank
from simla.evaluation.retrieval import retrieval_recall
from simla.models import losses
from simla.models.align import Draws
from simla.models.bert import BertConfig
from simla.models.retrieval import SIMLARetrieval
from simla.optim import create_optimizer


def golden_retrieval_model(**switches) -> SIMLARetrieval:
    config = golden("retrieval_structure")["config"]
    model = SIMLARetrieval(
        vit_sizes(config),
        BertConfig.read(config["bert"]),
        embed_dim=config["embed_dim"],
        queue_size=config["queue_size"],
        temp=config["temp"],
        **switches,
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


def retrieval_inputs(inputs: dict) -> dict:
    """For `losses_of`, without alpha and draws."""
    return {
        "image": golden_image(inputs["image_seed"], inputs["image_shape"]),
        "text_ids": torch.tensor(inputs["text"]["input_ids"]),
        "text_mask": torch.tensor(inputs["text"]["attention_mask"]),
        "idx": torch.tensor(inputs["idx"]),
    }


def step_of(model: SIMLARetrieval, inputs: dict, draws: dict, alpha: float) -> dict[str, torch.Tensor]:
    negatives = Draws(torch.tensor(draws["image_neg"]), torch.tensor(draws["text_neg"]))
    return losses_of(model, {**retrieval_inputs(inputs), "alpha": alpha}, negatives)


@pytest.fixture
def filled():
    """With the published code's switch: idx_queue stays as it was."""
    model = golden_retrieval_model(frozen_idx_queue=True)
    fill_model(model, {})
    return model


def check_retrieval_losses(losses, recorded, tolerance):
    for name in ("ita", "itm"):
        assert losses[f"loss_{name}"].item() == pytest.approx(recorded[name], rel=tolerance), name
    assert sum(losses.values()).item() == pytest.approx(recorded["total"], rel=tolerance)


@pytest.mark.parametrize("alpha", ["0.0", "0.4"])
@sdpa_kernel(SDPBackend.MATH)
def test_one_step(filled, alpha):
    step = golden("retrieval_step")
    recorded = step["alphas"][alpha]
    losses = step_of(filled, step["inputs"], recorded["draws"], float(alpha))
    check_retrieval_losses(losses, recorded["losses"], 5e-6)
    check_queues(filled.state_dict(), recorded["queues_after_forward"])
    assert filled.idx_queue.tolist() == recorded["queues_after_forward"]["idx_queue"]
    state = filled.state_dict()
    for name, value in step["momentum_after_forward"].items():
        assert digest(state[name]) == pytest.approx(value, rel=1e-6, abs=1e-7), name
    sum(losses.values()).backward()
    check_grads(filled, recorded, key_bias_noise=1e-8)


def test_recorded_negative_weights(filled, monkeypatch):
    step = golden("retrieval_step")
    recorded = step["alphas"]["0.4"]["draws"]
    seen = []

    def spied(similarity, excluded, original=losses.negative_weights):
        seen.append(original(similarity, excluded)[0])
        return original(similarity, excluded)

    monkeypatch.setattr(losses, "negative_weights", spied)
    step_of(filled, step["inputs"], recorded, 0.4)
    for weights, name in zip(seen, ("weights_t2i", "weights_i2t"), strict=True):
        torch.testing.assert_close(weights, torch.tensor(recorded[name]), rtol=5e-5, atol=1e-6)


def test_three_steps(filled):
    recorded = golden("retrieval_train3")
    optimizer = create_optimizer(filled, golden("retrieval_structure")["config"]["optimizer"])
    for step in recorded["steps"]:
        losses = step_of(filled, step["inputs"], step["draws"], recorded["alpha"])
        check_retrieval_losses(losses, step["losses"], 2e-5)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    check_queues(filled.state_dict(), recorded["queues_after"])
    check_params_after(filled, recorded["params_after"])


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
    scores = rerank(model, similarity, recorded["k_test"], image_embeds, text_ids, text_mask)
    for actual, name in zip(scores, ("score_matrix_i2t", "score_matrix_t2i"), strict=True):
        expected = torch.tensor(recorded[name])
        assert torch.equal(actual == NOT_SCORED, expected == NOT_SCORED)
        torch.testing.assert_close(actual, expected, rtol=5e-6, atol=1e-6)


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
