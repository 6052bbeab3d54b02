"""Modules are called, so that hooks and adapters work in training as they do in evaluation."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from models_for_tests import (
    TINY_BERT,
    TINY_VIT,
    check_gradients,
    losses_of,
    shake,
    tiny_batch,
    tiny_pretrain_model,
    tiny_texts,
)
from test_ve_nlvr_models import batch_of
from test_ve_nlvr_models import tiny_model as tiny_classifier
from test_vqa_model import tiny_batch as tiny_questions
from test_vqa_model import tiny_model as tiny_vqa_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from simla.engine.data_parallel import set_checkpointing
from simla.models.bert import AddNorm, Attention, BertModel, Intermediate, Layer, PredictionTransform
from simla.models.momentum import MomentumModel
from simla.models.retrieval import SIMLARetrieval
from simla.models.vit import VisionTransformer
from simla.models.vqa import VQABatch
from simla.utils import UserError

TASKS = ("Pretrain", "Retrieval", "VQA", "VE", "NLVR", "Pretrain_NLVR")
NOT_COMPUTED = {  # by any loss of the task
    "Retrieval": r"text_encoder_m\..*crossattention",  # its momentum targets are those of the contrast
    "Pretrain_NLVR": r"text_proj$",  # only images are compared, to find negatives
}
WITHOUT_GRADIENT = {"Pretrain_NLVR": ("text_proj", "vision_proj")}
CALLED = (AddNorm, Attention, BertModel, Block, Intermediate, Layer, PredictionTransform, VisionTransformer)
ADAPTED = nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d


class Adapter(nn.Module):
    """What a layer gives, its weights frozen, each value a trained multiple of its own.

    Not all the same one: features of unit length would undo it, and its gradient be 0.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), nn.Parameter(torch.tensor(0.5))

    def forward(self, *inputs: Tensor) -> Tensor:
        states = self.layer(*inputs)
        return states * (1 + self.scale * torch.linspace(0, 1, states.shape[-1]))


def adapt(model: nn.Module, end: str = "") -> dict[str, Adapter]:
    """Wraps every layer with weights, or those whose names end so."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ADAPTED)]
    adapters = {name: Adapter(module) for name, module in layers if name.endswith(end)}
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
    return adapters


def model_and_step(task: str) -> tuple[MomentumModel, Callable[[], dict[str, Tensor]]]:
    """In training mode, and what computes the losses of a step."""
    if task == "Pretrain":
        model = shake(tiny_pretrain_model())
        step = partial(losses_of, model, tiny_batch(4))
    elif task == "Retrieval":
        model = shake(SIMLARetrieval({**TINY_VIT, "mask_token": True}, TINY_BERT, embed_dim=8, queue_size=12))
        pairs = {name: tiny_batch(4)[name] for name in ("image", "text_ids", "text_mask", "alpha")}
        step = partial(losses_of, model, {**pairs, "idx": torch.arange(4)})
    elif task == "VQA":
        model = tiny_vqa_model({**TINY_VIT, "mask_token": True})
        step = partial(model, VQABatch(**tiny_questions()), 0.4)
    else:
        model, batch = tiny_classifier(task), batch_of(task)
        if task != "Pretrain_NLVR":
            batch |= {"label": torch.arange(4) % model.num_classes, "alpha": 0.4}
        step = partial(model, **batch)
    return model.train(), step


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("task", TASKS)
def test_a_hook_on_every_layer_fires_in_a_training_step(task, again):
    model, step = model_and_step(task)
    set_checkpointing(model, again)
    expected, fired = set(), set()
    for name, module in model.named_modules():
        has_weights = any(True for _ in module.parameters(recurse=False))
        if name and (has_weights or isinstance(module, CALLED)):
            expected.add(name)
            module.register_forward_hook(lambda *_, name=name: fired.add(name))
    sum(step().values()).backward()
    check_gradients(model)
    never = NOT_COMPUTED.get(task, "$^")
    assert {name for name in expected - fired if not re.search(never, name)} == set()
    assert len(fired) > 40


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_round_any_layer_gets_a_gradient(task, again):
    model, step = model_and_step(task)
    adapters = adapt(model)
    set_checkpointing(model, again)
    sum(step().values()).backward()
    assert len(adapters) > 40
    for name, adapter in adapters.items():
        if "_m." in name or name.endswith("_m") or name.startswith(WITHOUT_GRADIENT.get(task, " ")):
            assert adapter.scale.grad is None, name
        else:
            assert adapter.scale.grad.isfinite() and adapter.scale.grad != 0, name


def test_encoders_give_the_same_with_and_without_gradient():
    image = torch.randn(2, 3, 24, 24)
    texts = tiny_texts([5, 3], 6, torch.Generator().manual_seed(3))
    for adapted in (False, True):
        vit, bert = shake(VisionTransformer(**TINY_VIT)), shake(BertModel(TINY_BERT))
        if adapted:
            adapt(vit)
            adapt(bert)

        def compute(vit=vit, bert=bert) -> list[Tensor]:
            states = vit(image)
            cross = bert.project(states)
            return [states, bert(*texts), bert(*texts, cross), bert(*texts, cross, first_only=True)]

        with_gradient = compute()
        with torch.no_grad():
            without = compute()
        for one, other in zip(with_gradient, without, strict=True):
            assert one.requires_grad and torch.equal(one, other)


def test_what_is_put_into_a_module_alone_and_not_into_its_twin_is_named():
    model, step = model_and_step("VE")
    adapt(model.visual_encoder, "blocks.0.mlp.fc2")
    expected = "online VisionTransformer is, but only one of the two has blocks.0.mlp.fc2.bias"
    with pytest.raises(UserError, match=expected):
        step()
