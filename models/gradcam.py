"""Grad-CAM: where in the image a model looks for a text (grounding without boxes, as in ALBEF section 5.5).

An attention map inside the model is weighed by the gradient of a score with respect to that very map. The
layers below the map run without gradient, those above it with.

B pairs, T text tokens, N image tokens incl. [CLS], D width, H heads, d = D / H, (h, w) the grid of patches.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from simla.models.align import unit_features
from simla.models.bert import padding_mask
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError

MODES = ("itm", "itc")


def default_block(model: SIMLARetrieval, mode: str) -> int:
    """Return the number of the block two thirds up the encoder that `mode` looks into, 8 of 12; never the
    last one of several, where itm explains [CLS] alone, unless it alone reads the image.
    """
    _, layers, first = _layers(model, mode)
    return max(min(len(layers) * 2 // 3, len(layers) - 2), first)


def check_block(model: SIMLARetrieval, mode: str, block: int) -> None:
    """Raise UserError where the encoder that `mode` looks into has no block of that number."""
    name, layers, first = _layers(model, mode)
    if not first <= block < len(layers):
        below = f", of which the first {first} read text alone" * bool(first)
        raise UserError(
            f"block {block}: in mode {mode} it is a layer of the {name}, which has {len(layers)}{below}; "
            f"choose {first} to {len(layers) - 1}"
        )


def _layers(model: SIMLARetrieval, mode: str) -> tuple[str, nn.ModuleList, int]:
    """Return the name of the encoder that `mode` looks into, its blocks, the first that reads the image."""
    if mode == "itm":
        bert = model.text_encoder
        return "text encoder", bert.encoder.layer, bert.config.text_layers_alone
    return "image encoder", model.visual_encoder.blocks, 0


def grad_cam(
    model: SIMLARetrieval, mode: str, block: int, image: Tensor, text_ids: Tensor, text_mask: Tensor
) -> Tensor:
    """Return a heat map (B, h, w), not negative, for every pair of image (B, 3, R, R) and text (B, T); the
    model is in eval mode.

    Only the proportions within one map mean anything: in mode itm its scale falls with the padding that T
    includes, as published. Raises UserError for a block that there is not.
    """
    check_block(model, mode, block)
    patches = {"itm": itm_map, "itc": itc_map}[mode](model, block, image, text_ids, text_mask)  # (B, N-1)
    return patches.unflatten(1, model.visual_encoder.patch_embed.grid_size)


def itm_map(model: SIMLARetrieval, block: int, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """Return the mean of `itm_token_maps` over text positions, (B, N-1)."""
    return itm_token_maps(model, block, image, text_ids, text_mask).mean(1)


def itm_token_maps(
    model: SIMLARetrieval, block: int, image: Tensor, text_ids: Tensor, text_mask: Tensor
) -> Tensor:
    """Return where each token looks (B, T, N-1), 0 of padding: the cross-attention of text layer `block` by
    the "match" logit, mean over heads.
    """
    bert, layers = model.text_encoder, model.text_encoder.encoder.layer
    layer = layers[block]
    with torch.no_grad():
        cross = bert.project(model.visual_encoder(image))
        hidden, mask = bert.embeddings(text_ids), padding_mask(text_mask)
        for i in range(block):
            hidden = layers[i](hidden, mask, cross[i])
        hidden = layer.attention(hidden, layer.attention.project(hidden, mask))
        probabilities = layer.crossattention.attention_map(hidden, cross[block])  # (B, H, T, N)
    with torch.enable_grad():
        probabilities.requires_grad_()
        context = (probabilities @ cross[block].values).transpose(1, 2).flatten(2)  # (B, T, D)
        hidden = layer.feed_forward(layer.crossattention.output(context, hidden))
        for i in range(block + 1, len(layers)):
            hidden = layers[i](hidden, mask, cross[i])
        logits = model.itm_head(hidden[:, 0])[:, 1]  # (B,)
    weighed = _weigh(probabilities, logits)[..., 1:]  # (B, H, T, N-1)
    return (weighed * text_mask[:, None, :, None]).mean(1)


def itc_map(model: SIMLARetrieval, block: int, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """Return the [CLS] row of the self-attention of image block `block`, by the pair's similarity / temp;
    mean over heads, (B, N-1).
    """
    blocks = model.visual_encoder.blocks
    mapped = blocks[block]
    with torch.no_grad():
        text_feat = model.encode_text(text_ids, text_mask)  # (B, E)
        tokens = model.visual_encoder.embed(image)
        for lower in blocks[:block]:
            tokens = lower(tokens)
        probabilities, values = _self_attention_map(mapped, tokens)  # (B, H, N, N), (B, H, N, d)
    with torch.enable_grad():
        probabilities.requires_grad_()
        tokens = tokens + mapped.attn.proj((probabilities @ values).transpose(1, 2).flatten(2))
        tokens = tokens + mapped.mlp(mapped.norm2(tokens))
        for upper in blocks[block + 1 :]:
            tokens = upper(tokens)
        image_feat = unit_features(model.vision_proj, model.visual_encoder.norm(tokens)[:, 0])
        similarity = (image_feat * text_feat).sum(-1) / model.temp  # (B,)
    return _weigh(probabilities, similarity)[:, :, 0, 1:].mean(1)


def _self_attention_map(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map (B, H, N, N) of timm's block and its values (B, H, N, d) for tokens (B, N, D)."""
    projected = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
    query, keys, values = projected.permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
    return (query @ keys.transpose(-1, -2) * block.attn.scale).softmax(-1), values


def _weigh(probabilities: Tensor, scores: Tensor) -> Tensor:
    """Return the map times the positive part of the gradient of the sum of scores (B,)."""
    (gradient,) = torch.autograd.grad(scores, probabilities, torch.ones_like(scores))
    return probabilities.detach() * gradient.clamp(min=0)
