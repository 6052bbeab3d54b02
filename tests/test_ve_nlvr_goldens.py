"""Visual entailment, NLVR and its pre-training against numbers recorded from the published code."""

import hashlib

import pytest
import torch
from goldens_io import digest, fill_model, filled_state, golden, golden_image
from models_for_tests import vit_sizes
from test_pretrain_goldens import check_grads
from torch.nn.attention import SDPBackend, sdpa_kernel

from simla.checkpoint.load import load_weights
from simla.models import losses
from simla.models.bert import BertConfig
from simla.models.nlvr import SIMLANLVR
from simla.models.pretrain_nlvr import PairDraws, SIMLAPretrainNLVR, make_pairs
from simla.models.ve import SIMLAVE
from simla.optim import param_groups

MODELS = {"ve": SIMLAVE, "nlvr": SIMLANLVR, "pretrain_nlvr": SIMLAPretrainNLVR}
CLASSIFIERS = ("ve", "nlvr")
LOADINGS = ("VE_from_pretrain", "Pretrain_NLVR_from_pretrain", "NLVR_from_pretrain_nlvr")


def golden_model(task: str, image_res: int | None = None) -> torch.nn.Module:
    """Filled, in eval mode (no dropout)."""
    structure = golden(f"{task}_structure")
    config = structure["config"]
    vit = vit_sizes(config) | ({"img_size": image_res} if image_res else {})
    sizes = {"embed_dim": config["embed_dim"]} if task == "pretrain_nlvr" else {}
    model = MODELS[task](vit, BertConfig.read(config["bert"]), **sizes)
    fill_model(model, structure["aliases"])
    return model.eval()


def recorded_inputs(task: str) -> dict[str, torch.Tensor]:
    inputs = golden(task)["inputs"]
    return {
        "image": golden_image(inputs["image_seed"], inputs["image_shape"]),
        "text_ids": torch.tensor(inputs["text"]["input_ids"]),
        "text_mask": torch.tensor(inputs["text"]["attention_mask"]),
    }


# ---- names and shapes ----


@pytest.mark.parametrize("task", MODELS)
def test_state_dict_and_parameters_are_the_published_ones(task):
    structure, model = golden(f"{task}_structure"), golden_model(task)
    state = model.state_dict()
    recorded = [(name, tuple(shape), dtype) for name, shape, dtype in structure["state_dict"]]
    assert [(k, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in state.items()] == recorded
    assert [[n, p.requires_grad] for n, p in model.named_parameters()] == structure["named_parameters"]
    assert [n for n, _ in model.named_buffers()] == structure["named_buffers"]
    for later, deciding in structure["aliases"].items():
        assert state[later].data_ptr() == state[deciding].data_ptr()
    assert len({v.data_ptr() for v in state.values()}) == len(state) - len(structure["aliases"])
    floats = [value.contiguous().numpy().tobytes() for value in state.values() if value.is_floating_point()]
    assert hashlib.sha256(b"".join(floats)).hexdigest() == structure["filled_weights"]["sha256"]


@pytest.mark.parametrize("task", MODELS)
def test_optimiser_groups_are_the_published_ones(task):
    model = golden_model(task)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model.named_parameters(), 0.02)
    for group, recorded in zip(groups, golden(f"{task}_structure")["optimizer_groups"], strict=True):
        assert [name_of[id(parameter)] for parameter in group["params"]] == recorded["params"]


# ---- visual entailment and NLVR ----


@pytest.mark.parametrize("alpha", ["0.0", "0.4"])
@pytest.mark.parametrize("task", CLASSIFIERS)
@sdpa_kernel(SDPBackend.MATH)
def test_one_step(task, alpha):
    recorded, model = golden(task), golden_model(task)
    label = torch.tensor(recorded["inputs"]["targets"])
    named = model(**recorded_inputs(task), label=label, alpha=float(alpha))
    assert named["loss"].item() == pytest.approx(recorded["alphas"][alpha]["loss"], rel=5e-6)
    state = model.state_dict()
    for name, value in recorded["momentum_after_forward"].items():
        assert digest(state[name]) == pytest.approx(value, rel=1e-6, abs=1e-7), name
    named["loss"].backward()
    check_grads(model, recorded["alphas"][alpha])


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_predictions(task):
    """Relative to the largest logit; some are differences that all but cancel."""
    expected = torch.tensor(golden(task)["prediction"])
    with torch.no_grad():
        predicted = golden_model(task).predict(**recorded_inputs(task))
    torch.testing.assert_close(predicted, expected, rtol=0, atol=5e-6 * expected.abs().max().item())


# ---- NLVR pre-training ----


def recorded_draws(run: dict) -> PairDraws:
    """Where the recorded code drew one number instead of two, the second does not matter."""
    return PairDraws(
        torch.tensor([(draw["rand"] + [0.0])[:2] for draw in run["draws"]]),
        torch.tensor([[draw["multinomial"][0], draw["multinomial"][-1]] for draw in run["draws"]]),
    )


@pytest.mark.parametrize("number", range(3))
@sdpa_kernel(SDPBackend.MATH)
def test_text_assignment_with_recorded_draws(number, monkeypatch):
    run, model = golden("pretrain_nlvr")["runs"][number], golden_model("pretrain_nlvr")
    seen = []
    original = losses.negative_weights
    monkeypatch.setattr(losses, "negative_weights", lambda *args: seen.append(original(*args)) or seen[-1])
    named = model(**recorded_inputs("pretrain_nlvr"), draws=recorded_draws(run))
    assert named["loss"].item() == pytest.approx(run["loss"], rel=5e-6)
    weights = torch.tensor([draw["weights"] for draw in run["draws"]])
    torch.testing.assert_close(seen[0][0], weights, rtol=5e-6, atol=0)
    if "grads" in run:
        named["loss"].backward()
        check_grads(model, run)


@pytest.mark.parametrize("number", range(3))
def test_recorded_draws_become_the_recorded_labels_and_pairs(number):
    run = golden("pretrain_nlvr")["runs"][number]
    pairs, label = make_pairs(recorded_draws(run))
    assert label.tolist() == run["labels"]
    for own, (draw, pair) in enumerate(zip(run["draws"], pairs.T.tolist(), strict=True)):
        first, *second = draw["multinomial"]
        assert pair == {0: [own, first], 1: [first, own], 2: [first, *second]}[run["labels"][own]]


# ---- checkpoints into the real models ----


@pytest.mark.parametrize("name", LOADINGS)
def test_recorded_loading_into_the_real_model(name, tmp_path):
    recorded = golden(f"loading_{name}")
    source = filled_state(golden(f"{recorded['checkpoint']}_structure"), recorded["checkpoint_salt"])
    integers = golden(f"{recorded['checkpoint']}_structure")["state_dict"]
    source |= {key: torch.zeros(shape, dtype=torch.long) for key, shape, kind in integers if kind == "int64"}
    torch.save({"model": source}, tmp_path / "c.pth")
    model = golden_model(recorded["model_task"], recorded["model_image_res"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, tmp_path / "c.pth", recorded["script"].removesuffix(".py"))
    after = model.state_dict()
    assert set(recorded["loaded"]) | set(recorded["missing_keys"]) == set(after)
    for key, value in after.items():
        origin = recorded["loaded"].get(key)
        if origin is None:
            assert torch.equal(value, before[key]), key
        elif origin.startswith("interpolated"):
            assert digest(value)[0] == pytest.approx(recorded[key]["norm"], rel=1e-6)
            assert value.flatten()[:8].tolist() == pytest.approx(recorded[key]["first"], abs=1e-7)
        else:  # also under the later names of shared layers
            assert torch.equal(value, source[origin]), key
