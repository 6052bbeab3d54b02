"""The pre-training model against numbers recorded from the published code."""

import hashlib

import pytest
import torch
from goldens_io import digest, fill_model, golden
from models_for_tests import golden_pretrain_model, losses_of, pretrain_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

from simla.models.align import Draws
from simla.optim import create_optimizer

LOSS_KEYS = {"ita": "loss_ita", "itm": "loss_itm", "mlm": "loss_mlm", "mim": "loss_mim", "pseudo": "loss_psl"}


@pytest.fixture
def structure():
    return golden("pretrain_structure")


@pytest.fixture
def model(structure):
    model = golden_pretrain_model()
    fill_model(model, structure["aliases"])
    return model


def forward(model, inputs, draws, alpha):
    negatives = Draws(torch.tensor(draws["image_neg"]), torch.tensor(draws["text_neg"]))
    return losses_of(model, {**pretrain_inputs(inputs, draws["mlm"]), "alpha": alpha}, negatives)


def check_losses(losses, recorded, tolerance):
    for name, key in LOSS_KEYS.items():
        assert losses[key].item() == pytest.approx(recorded[name], rel=tolerance), name
    assert sum(losses.values()).item() == pytest.approx(recorded["total"], rel=tolerance)


def check_digest(name, tensor, recorded, key_bias_noise=0.0):
    """key_bias_noise: where the recorded gradient of a key bias is itself rounding noise above the tolerance
    (softmax ignores a shift, so its true value is 0), the size of noise that ours may have.
    """
    norm, *values = recorded
    actual = digest(tensor)
    assert actual[0] == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    if key_bias_noise and name.endswith("key.bias"):
        assert max(map(abs, actual + values)) < key_bias_noise, name
        return
    scale = norm / tensor.numel() ** 0.5 + 1e-6
    assert actual[1:] == pytest.approx(values, abs=1e-3 * scale), name


def check_grads(model, recorded, key_bias_noise=0.0):
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    total = torch.stack([g.double().norm() for g in grads.values() if g is not None]).norm().item()
    assert total == pytest.approx(recorded["grad_norm"], rel=1e-4)
    for name, value in recorded["grads"].items():
        if value is None:
            assert grads[name] is None, name
        else:
            check_digest(name, grads[name], value, key_bias_noise)


def check_params_after(model, recorded):
    """After three AdamW steps; key biases have gradient 0 in theory, so Adam steps on rounding noise."""
    state = model.state_dict()
    for name, (norm, *values) in recorded.items():
        key_bias = name.endswith(("key.bias", "qkv.bias"))
        actual = digest(state[name])
        assert actual[1:] == pytest.approx(values, abs=3.1e-4 if key_bias else 2e-6), name
        assert actual[0] == pytest.approx(norm, rel=1e-2 if key_bias else 1e-5, abs=1e-6), name


def check_queues(state, recorded):
    for name in ("image_queue", "text_queue"):
        queue = state[name]
        assert queue[:, 0].tolist() == pytest.approx(recorded[name]["column0"], abs=1e-6)
        assert queue.sum().item() == pytest.approx(recorded[name]["sum"], abs=1e-4)
        assert queue.double().norm().item() == pytest.approx(recorded[name]["norm"], rel=1e-6)
        assert queue.flatten()[:8].tolist() == pytest.approx(recorded[name]["first8"], abs=1e-6)
    assert state["queue_ptr"].tolist() == recorded["queue_ptr"]


def test_state_dict_is_the_published_one(structure):
    model = golden_pretrain_model()
    state = model.state_dict()
    recorded = [(name, tuple(shape), dtype) for name, shape, dtype in structure["state_dict"]]
    assert [(k, tuple(v.shape), str(v.dtype).split(".")[1]) for k, v in state.items()] == recorded
    assert [[n, p.requires_grad] for n, p in model.named_parameters()] == structure["named_parameters"]
    assert [n for n, _ in model.named_buffers()] == structure["named_buffers"]
    for later, deciding in structure["aliases"].items():
        assert state[later].data_ptr() == state[deciding].data_ptr()
    assert model.queue_ptr.tolist() == [0]


def test_filled_weights_match_the_recorded_hash(model, structure):
    bytes_hash = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name not in ("image_queue", "text_queue"):
            bytes_hash.update(tensor.contiguous().numpy().tobytes())
    assert bytes_hash.hexdigest() == structure["filled_weights"]["sha256"]


@pytest.mark.parametrize("alpha", ["0.0", "0.4"])
@sdpa_kernel(SDPBackend.MATH)  # the recorded arithmetic, down to the noise that is a key bias' gradient
def test_one_step(model, alpha):
    step = golden("pretrain_step")
    recorded = step["alphas"][alpha]
    losses = forward(model, step["inputs"], recorded["draws"], float(alpha))
    check_losses(losses, recorded["losses"], 5e-6)
    check_queues(model.state_dict(), recorded["queues_after_forward"])
    sum(losses.values()).backward()
    check_grads(model, recorded)


def test_momentum_twins_move_once_before_use(model):
    step = golden("pretrain_step")
    forward(model, step["inputs"], step["alphas"]["0.4"]["draws"], 0.4)
    state = model.state_dict()
    for name, value in step["momentum_after_forward"].items():
        assert digest(state[name]) == pytest.approx(value, rel=1e-6, abs=1e-7), name


def test_recorded_negative_weights_and_keywords(model, monkeypatch):
    """The weights handed to the draw and the keywords chosen are the recorded ones, not only the losses."""
    from simla.models import losses as loss_functions

    step = golden("pretrain_step")
    recorded = step["alphas"]["0.4"]["draws"]
    seen = {"weights": [], "votes": [], "positions": []}

    def spy(name, key, pick):
        original = getattr(loss_functions, name)

        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs)
            seen[key].append(pick(result))
            return result

        monkeypatch.setattr(loss_functions, name, wrapper)

    spy("negative_weights", "weights", lambda r: r[0])
    spy("keyword_votes", "votes", lambda r: r)
    spy("choose_keywords", "positions", lambda r: r[0])
    forward(model, step["inputs"], recorded, 0.4)
    torch.testing.assert_close(
        seen["weights"][0], torch.tensor(recorded["weights_t2i"]), rtol=5e-5, atol=1e-6
    )
    torch.testing.assert_close(
        seen["weights"][1], torch.tensor(recorded["weights_i2t"]), rtol=5e-5, atol=1e-6
    )
    assert seen["votes"][0].tolist() == recorded["concept"]["votes_per_position"]
    assert seen["positions"][0].tolist() == recorded["concept"]["chosen_positions"]


def test_three_steps(model, structure):
    recorded = golden("pretrain_train3")
    optimizer = create_optimizer(model, {**structure["config"]["optimizer"]})
    for step in recorded["steps"]:
        losses = forward(model, step["inputs"], step["draws"], recorded["alpha"])
        check_losses(losses, step["losses"], 2e-5)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    check_queues(model.state_dict(), recorded["queues_after"])
    check_params_after(model, recorded["params_after"])
