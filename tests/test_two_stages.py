"""ALBEF's layout, in which the first layers read text alone: one step beside a plain formulation, what every
task makes of it, and what is refused.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import (
    TINY_BERT,
    TINY_VIT,
    check_gradients,
    losses_of,
    tiny_batch,
    tiny_pretrain_model,
)
from test_rerank import slow_logits
from test_ve_nlvr_models import MODELS, batch_of, loss_of, strong
from test_vqa_model import tiny_batch as tiny_questions
from torch import Tensor, nn

from simla.evaluation.rerank import rerank
from simla.models.align import Draws
from simla.models.bert import BertConfig, BertForMaskedLM
from simla.models.pretrain import SIMLA
from simla.models.retrieval import SIMLARetrieval
from simla.models.vqa import SIMLAVQA, VQABatch
from simla.utils import UserError

LAYERS, ALONE = 4, 2
TWO_STAGES = replace(TINY_BERT, num_hidden_layers=LAYERS, text_layers_alone=ALONE)
COMPUTED = ("ita", "itm", "mlm")


def two_stage_model() -> SIMLA:
    torch.manual_seed(0)  # the queues start as noise
    return strong(tiny_pretrain_model(bert=TWO_STAGES, computed=COMPUTED))


# ---- a step in plain words: a text, a head at a time, nothing padded, packed or shared ----


class Plain:
    """ALBEF's equations on the weights of a model or, with suffix "_m", of its momentum twins."""

    def __init__(self, model: SIMLA, suffix: str = ""):
        self.model, self.suffix = model, suffix
        self.weights = dict(model.named_parameters())

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, name: str, x: Tensor, other: Tensor) -> Tensor:
        """States (T, D) that have read others (S, D)."""
        parts = [self.linear(f"{name}.self.query", x)]
        parts += [self.linear(f"{name}.self.{part}", other) for part in ("key", "value")]
        heads = zip(*(part.chunk(TWO_STAGES.num_attention_heads, 1) for part in parts), strict=True)
        read = torch.cat([(q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v for q, k, v in heads], 1)
        return self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", read))

    def layer(self, i: int, x: Tensor, image: Tensor | None) -> Tensor:
        name = f"text_encoder{self.suffix}.bert.encoder.layer.{i}"
        x = self.attend(f"{name}.attention", x, x)
        if image is not None:
            x = self.attend(f"{name}.crossattention", x, image)
        inner = F.gelu(self.linear(f"{name}.intermediate.dense", x))
        return self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", inner))

    def text(self, ids: Tensor) -> Tensor:
        """The states (T, D) of a text alone (T,), after the lower layers."""
        name = f"text_encoder{self.suffix}.bert.embeddings"
        x = self.weights[f"text_encoder{self.suffix}.bert.embeddings.word_embeddings.weight"][ids]
        x = self.norm(f"{name}.LayerNorm", x + self.weights[f"{name}.position_embeddings.weight"][: len(ids)])
        for i in range(ALONE):
            x = self.layer(i, x, None)
        return x

    def fused(self, x: Tensor, image: Tensor) -> Tensor:
        """Those states after the upper layers, which read the image (N, D)."""
        for i in range(ALONE, LAYERS):
            x = self.layer(i, x, image)
        return x

    def feature(self, name: str, x: Tensor) -> Tensor:
        projected = self.linear(f"{name}{self.suffix}", x[0])
        return projected / projected.norm()

    def images(self, image: Tensor) -> Tensor:
        return getattr(self.model, f"visual_encoder{self.suffix}")(image)

    def words(self, x: Tensor) -> Tensor:
        name = f"text_encoder{self.suffix}.cls.predictions"
        x = self.norm(f"{name}.transform.LayerNorm", F.gelu(self.linear(f"{name}.transform.dense", x)))
        embeddings = self.weights[f"text_encoder{self.suffix}.bert.embeddings.word_embeddings.weight"]
        return x @ embeddings.T + self.weights[f"{name}.bias"]


def cross_entropy(logits: Tensor, hard: int, soft: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    target = F.one_hot(torch.tensor(hard), len(logits)).float()
    target = target if soft is None else alpha * soft.softmax(0).detach() + (1 - alpha) * target
    return -(target * logits.log_softmax(0)).sum()


def plain_losses(model: SIMLA, batch: dict, draws: Draws, queues: dict[str, Tensor]) -> dict[str, Tensor]:
    """ITA, ITM and MLM of ALBEF (models/model_pretrain.py there), after the twins have moved."""
    online, twin, alpha = Plain(model), Plain(model, "_m"), batch["alpha"]
    lengths = batch["text_mask"].sum(1).tolist()
    texts = [ids[:length] for ids, length in zip(batch["text_ids"], lengths, strict=True)]
    images, images_m = online.images(batch["image"]), twin.images(batch["image"]).detach()
    states = [online.text(ids) for ids in texts]
    size = len(texts)

    def contrast(mine: list[Tensor], mine_m: list[Tensor], others_m: list[Tensor], queue: Tensor) -> Tensor:
        candidates = torch.stack([feature.detach() for feature in [*others_m, *queue.T]])
        rows = [candidates @ feature / model.temp for feature in mine]
        rows_m = [candidates @ feature / model.temp for feature in mine_m]
        return sum(cross_entropy(rows[i], i, rows_m[i], alpha) for i in range(size)) / size

    image_feats = [online.feature("vision_proj", x) for x in images]
    text_feats = [online.feature("text_proj", x) for x in states]
    image_feats_m = [twin.feature("vision_proj", x) for x in images_m]
    text_feats_m = [twin.feature("text_proj", twin.text(ids)) for ids in texts]
    to_text = contrast(image_feats, image_feats_m, text_feats_m, queues["text_queue"])
    to_image = contrast(text_feats, text_feats_m, image_feats_m, queues["image_queue"])

    pairs = [(i, i, 1) for i in range(size)]
    pairs += [(i, draws.image_neg[i], 0) for i in range(size)] + [
        (draws.text_neg[i], i, 0) for i in range(size)
    ]
    matches = [
        cross_entropy(online.linear("itm_head", online.fused(states[text], images[image])[0]), label)
        for text, image, label in pairs
    ]

    words = []
    for i, length in enumerate(lengths):
        ids, labels = batch["mlm_ids"][i, :length], batch["mlm_labels"][i, :length]
        logits = online.words(online.fused(online.text(ids), images[i]))
        logits_m = twin.words(twin.fused(twin.text(ids), images_m[i]))
        masked = (labels != -100).nonzero().flatten().tolist()
        words += [cross_entropy(logits[at], labels[at].item(), logits_m[at], alpha) for at in masked]
    return {
        "loss_ita": (to_text + to_image) / 2,
        "loss_itm": sum(matches) / len(matches),
        "loss_mlm": sum(words) / len(words),
    }


def test_a_step_is_that_of_the_plain_formulation():
    model, batch = two_stage_model(), {**tiny_batch(4), "visual_codes": None}
    following = torch.arange(4).roll(-1)
    draws, queues = Draws(following, following.flip(0).roll(1)), dict(model.named_buffers())
    assert not (draws.text_neg == torch.arange(4)).any()
    queues = {name: value.clone() for name, value in queues.items()}
    named = losses_of(model, batch, draws)
    sum(named.values()).backward()
    check_gradients(model)
    gradients = {name: param.grad for name, param in model.trained_parameters().items()}
    model.zero_grad()
    expected = plain_losses(model, batch, draws, queues)
    for name, loss in expected.items():
        torch.testing.assert_close(named[name], loss, rtol=1e-5, atol=1e-5)
    sum(expected.values()).backward()
    for name, param in model.trained_parameters().items():
        scale = param.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], param.grad, rtol=1e-4, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("computed", [("ita",), ("itm",), ("mlm", "psl"), ("ita", "psl")])
def test_what_the_losses_reach_has_a_gradient_and_nothing_else(computed):
    """The upper layers are no part of a text alone."""
    model = strong(tiny_pretrain_model(bert=TWO_STAGES, computed=computed))
    sum(losses_of(model, {**tiny_batch(4), "visual_codes": None}).values()).backward()
    check_gradients(model)


# ---- what the tasks make of it ----


@torch.no_grad()
def test_retrieval_and_its_scores():
    model = strong(SIMLARetrieval(TINY_VIT, TWO_STAGES, embed_dim=8, queue_size=12))
    batch = tiny_batch(5)
    ids, mask = batch["text_ids"], batch["text_mask"]
    embeds, feats = model.encode_image(batch["image"])
    before = model.encode_text(ids, mask)
    similarity = feats @ before.T
    ours, _ = rerank(model, similarity, 1000, embeds, ids, mask)
    torch.testing.assert_close(ours, slow_logits(model, embeds, ids, mask), rtol=1e-4, atol=1e-4)
    for layer in model.text_encoder.encoder.layer[ALONE:]:
        strong(layer, seed=1)
    assert torch.equal(model.encode_text(ids, mask), before)  # a text ends below them


def test_retrieval_s_parameters_all_have_a_gradient():
    model = strong(SIMLARetrieval(TINY_VIT, TWO_STAGES, embed_dim=8, queue_size=12))
    fields = {name: tiny_batch(4)[name] for name in ("image", "text_ids", "text_mask", "alpha")}
    sum(losses_of(model, {**fields, "idx": torch.arange(4)}).values()).backward()
    check_gradients(model)


def classifier(task: str) -> nn.Module:
    sizes = {"embed_dim": 8} if task == "Pretrain_NLVR" else {}
    return strong(MODELS[task]({**TINY_VIT, "mask_token": True}, TWO_STAGES, **sizes))


@pytest.mark.parametrize("task", MODELS)
def test_one_image_and_two(task):
    model = classifier(task)
    loss_of(model, batch_of(task)).backward()
    check_gradients(model)


def test_answers():
    """All layers of the decoder read the question, as ALBEF's do."""
    model = strong(SIMLAVQA(TINY_VIT, TWO_STAGES))
    assert all(layer.crossattention for layer in model.text_decoder.bert.encoder.layer)
    model(VQABatch(**tiny_questions()), 0.4)["loss"].backward()
    check_gradients(model)


# ---- what is refused ----


def test_mim_has_no_meaning():
    with pytest.raises(UserError, match=r"_alone is 2: .*MIM .* set one of it and loss_weights\.mim"):
        tiny_pretrain_model(bert=TWO_STAGES)


@pytest.mark.parametrize(("alone", "words"), [(4, "4 must be below num_hidden_layers 4"), (-1, "at least 0")])
def test_some_layers_read_the_image(alone, words):
    with pytest.raises(UserError, match=words):
        BertConfig.read({"num_hidden_layers": 4, "text_layers_alone": alone})


def test_two_images_are_read_by_the_whole_upper_half():
    with pytest.raises(UserError, match="text_layers_alone is 3; with two images it is at most 2"):
        MODELS["NLVR"](TINY_VIT, replace(TWO_STAGES, text_layers_alone=3))


def test_names_are_albef_s():
    """Cross-attention in the upper layers alone, as `fusion_layer` has it there."""
    names = BertForMaskedLM(TWO_STAGES).state_dict()
    assert {name.split(".")[3] for name in names if "crossattention" in name} == {"2", "3"}
