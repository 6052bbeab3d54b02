"""The encoders against timm's and transformers' on the same weights, and against loops without batching."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from models_for_tests import TINY_BERT, TINY_CLS_ID, TINY_VIT, shake, tiny_texts
from transformers import BertConfig as HubConfig
from transformers import BertForMaskedLM as HubBertForMaskedLM
from transformers import BertModel as HubBertModel

from simla.models.bert import BertConfig, BertForMaskedLM, BertModel
from simla.models.vit import VisionTransformer
from simla.utils import UserError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


# ---- image encoder ----


def as_timm(name: str, model: VisionTransformer, **sizes) -> torch.nn.Module:
    """timm's own model with the weights of ours."""
    theirs = timm.create_model(name, num_classes=0, global_pool="", **sizes)
    state = {key: value for key, value in model.state_dict().items() if key != "mask_token"}
    theirs.load_state_dict(state)
    return theirs.eval()


@torch.no_grad()
def test_image_encoder_is_timms_deit():
    model = shake(VisionTransformer(img_size=224, embed_dim=192, num_heads=3), std=0.05)
    image = torch.randn(1, 3, 224, 224)
    theirs = as_timm("deit_tiny_patch16_224", model)
    torch.testing.assert_close(model(image), theirs.forward_features(image), **CLOSE)


@torch.no_grad()
def test_hidden_patches_are_replaced_before_positions_are_added():
    model = shake(VisionTransformer(**TINY_VIT, mask_token=True))
    theirs = as_timm("vit_tiny_patch16_224", model, **TINY_VIT)
    image = torch.randn(3, 3, 24, 24)
    patch_mask = torch.rand(3, 9) < 0.5
    patch_mask[1], patch_mask[2] = True, False
    weight, bias = model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias
    for row in range(3):
        tokens = [model.cls_token[0, 0]]
        for place, hidden in enumerate(patch_mask[row].tolist()):
            top, left = place // 3 * 8, place % 3 * 8
            patch = image[row, :, top : top + 8, left : left + 8].flatten()
            tokens.append(model.mask_token[0, 0] if hidden else weight @ patch + bias)
        states = theirs.blocks((torch.stack(tokens) + model.pos_embed[0])[None])
        expected = theirs.norm(states)
        torch.testing.assert_close(model(image, patch_mask)[row : row + 1], expected, **CLOSE)
    torch.testing.assert_close(model(image, torch.zeros_like(patch_mask)), model(image))
    assert torch.equal(
        model(image, patch_mask)[1], model(image.flip(0), patch_mask)[1]
    )  # nothing shows through


def test_the_mask_token_is_a_parameter_only_where_asked_for():
    assert "mask_token" in VisionTransformer(**TINY_VIT, mask_token=True).state_dict()
    assert not any("mask_token" in name for name in VisionTransformer(**TINY_VIT).state_dict())


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"img_size": 25}, "25 is not a multiple"), ({"num_heads": 5}, "24 is not a multiple")],
)
def test_image_sizes_that_do_not_fit_are_named(sizes, words):
    with pytest.raises(UserError, match=words):
        VisionTransformer(**TINY_VIT | sizes)


# ---- text and multimodal encoder ----


def hub_config(config: BertConfig, **more) -> HubConfig:
    return HubConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        layer_norm_eps=config.layer_norm_eps,
        attn_implementation="eager",
        **more,
    )


def copy_into_hub(model: torch.nn.Module, theirs: torch.nn.Module, leave: str = "nothing") -> torch.nn.Module:
    """Our weights in their model, and token types of 0, which ours does without."""
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("position_ids") and leave not in name
    }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    (token_types,) = missing
    assert token_types.endswith("token_type_embeddings.weight")
    assert not unexpected
    torch.nn.init.zeros_(theirs.get_parameter(token_types))
    return theirs.eval()


@pytest.fixture
def bert():
    return shake(BertModel(TINY_BERT))


@pytest.fixture
def texts():
    """ids, mask (4, 7) with captions of 7, 5, 2 and 1 tokens."""
    return tiny_texts([7, 5, 2, 1], 7, torch.Generator().manual_seed(1))


@pytest.fixture
def image_states():
    return torch.randn(4, 10, 24)


@torch.no_grad()
def test_text_mode_is_berts(bert, texts):
    theirs = copy_into_hub(
        bert, HubBertModel(hub_config(TINY_BERT), add_pooling_layer=False), "crossattention"
    )
    torch.testing.assert_close(bert(*texts), theirs(*texts).last_hidden_state, **CLOSE)
    torch.testing.assert_close(bert(texts[0]), theirs(texts[0]).last_hidden_state, **CLOSE)


@torch.no_grad()
def test_masked_word_head_is_berts(texts):
    model = shake(BertForMaskedLM(TINY_BERT))
    theirs = copy_into_hub(model, HubBertForMaskedLM(hub_config(TINY_BERT)), "crossattention")
    logits = model.predict(model.bert(*texts))
    torch.testing.assert_close(logits, theirs(*texts).logits, **CLOSE)
    assert model.cls["predictions"].decoder.weight is model.bert.embeddings.word_embeddings.weight


def hub_multimodal(bert: BertModel, own_mask: torch.Tensor, states: torch.Tensor, states_mask, **inputs):
    """transformers' decoder with a self-attention mask of its own, so that it is not causal."""
    config = hub_config(TINY_BERT, is_decoder=True, add_cross_attention=True)
    theirs = copy_into_hub(bert, HubBertModel(config, add_pooling_layer=False))
    additive = (1.0 - own_mask[:, None, None].float()) * -10000.0
    return theirs(
        **inputs,
        attention_mask=additive.expand(-1, -1, own_mask.shape[1], -1),
        encoder_hidden_states=states,
        encoder_attention_mask=states_mask,
        output_attentions=True,
    )


@torch.no_grad()
def test_multimodal_mode_is_berts_decoder_without_causality(bert, texts, image_states):
    ids, mask = texts
    theirs = hub_multimodal(bert, mask, image_states, torch.ones(4, 10), input_ids=ids)
    hidden = bert(ids, mask, bert.project(image_states))
    torch.testing.assert_close(hidden, theirs.last_hidden_state, **CLOSE)
    attention = bert.last_self_attention(ids, mask, bert.project(image_states))
    torch.testing.assert_close(attention, theirs.attentions[-1], **CLOSE)


@torch.no_grad()
def test_image_as_input_reads_the_words_under_their_mask(bert, texts, image_states):
    ids, mask = texts
    words = bert.embeddings(ids)
    theirs = hub_multimodal(bert, torch.ones(4, 10), words, mask, inputs_embeds=image_states)
    hidden = bert(inputs_embeds=image_states, cross=bert.project(words, mask))
    torch.testing.assert_close(hidden, theirs.last_hidden_state, **CLOSE)


def slow_attention(attention, hidden, states, mask):
    """One row of the batch, head by head with explicit softmax: (T, D), (S, D'), (S,) -> (T, D), (H, T, S)"""
    query, keys, values = (
        layer(source).chunk(attention.num_heads, dim=-1)
        for layer, source in zip(attention.self.children(), (hidden, states, states), strict=True)
    )
    context, maps = [], []
    for q, k, v in zip(query, keys, values, strict=True):
        scores = (q @ k.T / q.shape[-1] ** 0.5 + (1 - mask) * -1e30).exp()
        maps.append(scores / scores.sum(-1, keepdim=True))
        context.append(maps[-1] @ v)
    return attention.output(torch.cat(context, dim=-1), hidden), torch.stack(maps)


def slow_bert(bert, ids, mask, states, states_mask):
    """One row of the batch -> hidden states, last self-attention map"""
    words = bert.embeddings.word_embeddings.weight[ids]
    hidden = bert.embeddings.LayerNorm(words + bert.embeddings.position_embeddings.weight[: len(ids)])
    for layer in bert.encoder.layer:
        hidden, attention_map = slow_attention(layer.attention, hidden, hidden, mask)
        hidden, _ = slow_attention(layer.crossattention, hidden, states, states_mask)
        inner = F.gelu(layer.intermediate.dense(hidden))
        hidden = layer.output.LayerNorm(layer.output.dense(inner) + hidden)
    return hidden, attention_map


@torch.no_grad()
def test_states_and_last_attention_map_equal_loops_over_rows_and_heads(texts):
    """In double precision, with a stream of another width that has padding of its own."""
    bert = shake(BertModel(BertConfig(**vars(TINY_BERT) | {"encoder_width": 20}))).double()
    (ids, mask), states = texts, torch.randn(4, 5, 20, dtype=torch.double)
    states_mask = (torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]).double()
    cross = bert.project(states, states_mask)
    hidden, attention = bert(ids, mask, cross), bert.last_self_attention(ids, mask, cross)
    for row in range(4):
        slow = slow_bert(bert, ids[row], mask[row].double(), states[row], states_mask[row])
        torch.testing.assert_close(hidden[row], slow[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(attention[row], slow[1], rtol=1e-10, atol=1e-10)


# ---- shared streams ----


def grads_of(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize("with_mask", [False, True])
def test_rows_of_projected_states_are_those_states_repeated(bert, texts, with_mask):
    (ids, mask), states = texts, torch.randn(3, 6, 24, requires_grad=True)
    states_mask = (torch.arange(6) < torch.tensor([6, 2, 4])[:, None]).long() if with_mask else None
    index = torch.tensor([2, 0, 0, 1])
    picked = bert(ids, mask, bert.project(states, states_mask).rows(index))
    repeated = bert(ids, mask, bert.project(states[index], states_mask[index] if with_mask else None))
    torch.testing.assert_close(picked, repeated, **CLOSE)
    weights = [*bert.encoder.layer[0].crossattention.parameters()]
    for grad, expected in zip(
        grads_of(picked.square().sum(), states, *weights),
        grads_of(repeated.square().sum(), states, *weights),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_streams", [1, 2, 4])
@pytest.mark.parametrize("with_mask", [False, True])
def test_fewer_streams_than_rows_are_shared_by_consecutive_rows(bert, texts, num_streams, with_mask):
    (ids, mask), states = texts, torch.randn(num_streams, 6, 24, requires_grad=True)
    states_mask = (torch.arange(6) < torch.arange(2, 2 + num_streams)[:, None]).long() if with_mask else None
    times = 4 // num_streams
    shared = bert(ids, mask, bert.project(states, states_mask))
    repeated_mask = states_mask.repeat_interleave(times, 0) if with_mask else None
    repeated = bert(ids, mask, bert.project(states.repeat_interleave(times, 0), repeated_mask))
    torch.testing.assert_close(shared, repeated, **CLOSE)
    (grad,), (expected,) = grads_of(shared.square().sum(), states), grads_of(repeated.square().sum(), states)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_checkpointed_activations_give_the_same_gradients_and_dropout(texts, image_states):
    bert, vit = BertModel(TINY_BERT).train(), VisionTransformer(**TINY_VIT).train()
    results = []
    for bert.checkpoint_activations in (False, True):
        vit.checkpoint_activations = bert.checkpoint_activations
        torch.manual_seed(4)
        image_embeds = vit(torch.ones(2, 3, 24, 24))
        hidden = bert(*texts, bert.project(image_embeds).rows(torch.tensor([0, 0, 1, 0])))
        parameters = [*vit.parameters(), *bert.encoder.parameters()]
        results.append([hidden.detach(), *torch.autograd.grad(hidden.square().sum(), parameters)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---- padding ----


@torch.no_grad()
def test_more_padding_changes_nothing(bert, texts, image_states):
    (ids, mask), cross = texts, bert.project(image_states)
    longer, longer_mask = F.pad(ids, (0, 5)), F.pad(mask, (0, 5))
    real = mask.bool()
    for own, shared in ((None, None), (cross, cross)):
        before, after = bert(ids, mask, own), bert(longer, longer_mask, shared)
        torch.testing.assert_close(after[:, :7][real], before[real], **CLOSE)
    noise = torch.where(longer_mask == 1, longer, 5)  # what stands in the padding does not matter either
    torch.testing.assert_close(bert(noise, longer_mask, cross)[:, :7][real], before[real], **CLOSE)
    attention = bert.last_self_attention(longer, longer_mask, cross)
    assert torch.equal(attention[:, :, :, 7:], torch.zeros(4, 3, 12, 5))
    torch.testing.assert_close(
        attention[:, :, 0, :7],
        bert.last_self_attention(ids, mask, cross)[:, :, 0],
        **CLOSE,
    )


@torch.no_grad()
def test_more_padding_of_the_other_stream_changes_nothing(bert, texts, image_states):
    ids, mask = texts
    words, longer = bert.embeddings(ids), bert.embeddings(F.pad(ids, (0, 5)))
    before = bert(inputs_embeds=image_states, cross=bert.project(words, mask))
    after = bert(inputs_embeds=image_states, cross=bert.project(longer, F.pad(mask, (0, 5))))
    torch.testing.assert_close(after, before, **CLOSE)


def test_rows_of_nothing_but_padding_stay_finite(bert, texts, image_states):
    ids, mask = texts
    empty = mask.clone()
    empty[1] = 0
    states = image_states.requires_grad_()
    text = bert(ids, empty)
    multimodal = bert(ids, empty, bert.project(states))
    image = bert(inputs_embeds=states, cross=bert.project(bert.embeddings(ids), empty))
    (text.sum() + multimodal.sum() + image.sum()).backward()
    for tensor in (text, multimodal, image, states.grad, *(p.grad for p in bert.parameters())):
        assert tensor.isfinite().all()
    attention = bert.last_self_attention(ids, empty, bert.project(states))
    torch.testing.assert_close(attention.sum(-1), torch.ones(4, 3, 7))


def test_a_sequence_longer_than_the_position_table_is_refused(bert):
    limit = TINY_BERT.max_position_embeddings
    assert bert(torch.full((1, limit), TINY_CLS_ID)).shape == (1, limit, 24)
    with pytest.raises(UserError, match=f"{limit + 1} tokens .* {limit} positions"):
        bert(torch.full((1, limit + 1), TINY_CLS_ID))
    with pytest.raises(UserError, match=f"{limit + 4} tokens"):
        bert(inputs_embeds=torch.zeros(1, limit + 4, 24))


# ---- configuration ----


def test_config_reads_a_mapping_and_a_file_alike(tmp_path):
    source = {"hidden_size": 24, "num_attention_heads": 3, "hidden_act": "gelu", "type_vocab_size": 2}
    (tmp_path / "bert.json").write_text(json.dumps(source))
    config = BertConfig.read(source)
    assert config == BertConfig.read(str(tmp_path / "bert.json"))
    assert (config.hidden_size, config.num_attention_heads, config.vocab_size) == (24, 3, 30522)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "missing.json cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        (b"\xff\xfe\x80", "cannot be read as JSON"),
        ("[1, 2]", "must hold an object"),
        ('{"hidden_act": "relu"}', "'relu'; only 'gelu'"),
        ('{"hidden_size": 100}', "100 is not a multiple of num_attention_heads 12"),
        ('{"hidden_size": "768"}', "hidden_size is '768'"),
        ('{"num_attention_heads": 0}', "num_attention_heads is 0"),
    ],
)
def test_config_errors_name_the_file_or_key(tmp_path, text, words):
    path = tmp_path / ("bert.json" if text else "missing.json")
    if text:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        BertConfig.read(str(path))
