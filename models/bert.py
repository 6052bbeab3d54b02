"""The single-stream encoder: one BERT whose layers serve every mode by arguments.

    text          cross=None: cross-attention is skipped in every layer
    multimodal    cross=bert.project(image_embeds): used in every layer
    image input   inputs_embeds=image_embeds, cross=bert.project(text embeddings)
    two images    BertModel(config, two_images=True), cross=bert.project(image_embeds), first images first
    decoder       causal=True, cross=bert.project(question states, question mask)

With `text_layers_alone` = n in the config the first n layers have no cross-attention, and the text mode ends
after them; every other mode runs through all layers (ALBEF: 6 of 12).

Every layer is self-attention -> cross-attention -> feed-forward, post-norm as in BERT. Parameter names are
the published ones.

B rows, T tokens, S tokens of the other stream, D width, H heads, d = D / H, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simla.models.bert_config import BertConfig
from simla.utils import UserError

PADDING_SCORE = -10000.0  # finite, so that a row of nothing but padding stays finite


class KeysValues(NamedTuple):
    """The keys and values that the B rows of an attention's query read: B' rows, either those that `index`
    says, or each one the same for B / B' consecutive rows.
    """

    keys: Tensor  # (B', H, S, d)
    values: Tensor  # (B', H, S, d)
    mask: Tensor | None = None  # additive, (B', 1, 1 or T, S)
    index: Tensor | None = None  # (B,) numbers below B'


class CrossStates(list[KeysValues | None]):
    """The other stream's keys and values for each layer, None where that has no cross-attention: projected
    once, read by any number of passes.
    """

    def rows(self, index: Tensor) -> "CrossStates":
        """Return the same for queries of len(index) rows, of which row i reads row index[i]."""
        return CrossStates(layer and layer._replace(index=index) for layer in self)


def padding_mask(
    attention_mask: Tensor, score: float = PADDING_SCORE, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return additive scores (B, 1, 1, S) of a mask (B, S) with 1 = token, 0 = padding, or (B, 1, T, S) of a
    mask (B, T, S), which token sees which.
    """
    seen = attention_mask[:, None, None] if attention_mask.dim() == 2 else attention_mask[:, None]
    return (1.0 - seen.to(dtype)) * score


def causal_mask(attention_mask: Tensor) -> Tensor:
    """Return additive scores (B, 1, T, T) of a mask (B, T): no token sees padding or a later token."""
    length = attention_mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.float32, device=attention_mask.device).tril()
    return (1.0 - earlier * attention_mask[:, None, None, :]) * PADDING_SCORE


class Embeddings(nn.Module):
    """Word + position -> LayerNorm -> dropout; `token_types` adds BERT's type 0 to every token (NLVR)."""

    def __init__(self, config: BertConfig, token_types: bool = False):
        super().__init__()
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size) if token_types else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return states (B, T, D) of input_ids (B, T) or inputs_embeds (B, T, D); position_ids (B, T), None =
        0 to T-1.
        """
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        length, limit = inputs_embeds.shape[1], self.position_ids.shape[1]
        if position_ids is None and length > limit:
            raise UserError(
                f"a sequence of {length} tokens is longer than the {limit} positions of the text encoder; "
                "truncate the text, lower image_res, or raise max_position_embeddings in bert_config"
            )
        if position_ids is None:
            position_ids = self.position_ids[:, :length]
        positions = self.position_embeddings(position_ids)
        if self.token_type_embeddings is not None:
            positions = positions + self.token_type_embeddings(torch.zeros_like(position_ids))
        return self.dropout(self.LayerNorm(inputs_embeds + positions))


class Projections(nn.Module):
    def __init__(self, config: BertConfig, kv_width: int):
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(kv_width, config.hidden_size)
        self.value = nn.Linear(kv_width, config.hidden_size)


class AddNorm(nn.Module):
    """LayerNorm(residual + dropout(dense(x))), the end of every BERT sub-layer."""

    def __init__(self, in_width: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(in_width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """Multi-head attention over keys and values that were projected beforehand."""

    def __init__(self, config: BertConfig, kv_width: int):
        super().__init__()
        self.self = Projections(config, kv_width)
        self.output = AddNorm(config.hidden_size, config)
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, H, T, d)

    def project(self, states: Tensor, mask: Tensor | None = None) -> KeysValues:
        """Return the keys and values of states (B, S, kv_width)."""
        return KeysValues(self._heads(self.self.key(states)), self._heads(self.self.value(states)), mask)

    def attention_map(self, hidden: Tensor, other: KeysValues) -> Tensor:
        """Return the attention probabilities (B, H, T, S) of states (B, T, D), before dropout."""
        query = self._heads(self.self.query(hidden))
        scores = query @ other.keys.transpose(-1, -2) / query.shape[-1] ** 0.5
        return (scores if other.mask is None else scores + other.mask).softmax(-1)

    def forward(self, hidden: Tensor, other: KeysValues) -> Tensor:
        """Return the states (B, T, D) after they have read the others."""
        keys, values, mask, index = other
        if index is not None:
            keys, values = keys.index_select(0, index), values.index_select(0, index)
            mask = None if mask is None else mask.index_select(0, index)
        if mask is not None:  # the lowest float32 would be -inf in half precision
            mask = mask.to(keys.dtype).clamp(min=torch.finfo(keys.dtype).min)
        # Rows that read the same are one long query to it, so that keys and values are never repeated.
        query = self.self.query(hidden).view(len(keys), -1, hidden.shape[-1])  # (B', B / B' * T, D)
        dropout = self.dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(self._heads(query), keys, values, mask, dropout)
        return self.output(context.transpose(1, 2).reshape(hidden.shape), hidden)


class Intermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.gelu(self.dense(hidden))  # (..., D) -> (..., intermediate_size)


class Layer(nn.Module):
    def __init__(self, config: BertConfig, reads_other: bool = True):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, config.encoder_width) if reads_other else None
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config.intermediate_size, config)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        cross: KeysValues | None,
        first_only: bool = False,
    ) -> Tensor:
        """Return the next states of (B, T, D); first_only: of every row's first token alone, (B, 1, D)."""
        queried = hidden[:, :1] if first_only else hidden
        hidden = self.attention(queried, self.attention.project(hidden, mask))
        if cross is not None:
            hidden = self.crossattention(hidden, cross)
        return self.feed_forward(hidden)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return self.output(self.intermediate(hidden), hidden)


class Encoder(nn.Module):
    """`two_images`: each layer of the upper half comes twice in a row (12 layers become 18), and the two
    share the keys and values of their cross-attention.
    """

    def __init__(self, config: BertConfig, two_images: bool = False):
        super().__init__()
        alone, half = config.text_layers_alone, config.num_hidden_layers // 2
        if two_images and alone > half:
            raise UserError(
                f"bert_config text_layers_alone is {alone}; with two images it is at most {half}, the lower "
                "half"
            )
        upper = range(half, config.num_hidden_layers) if two_images else range(0)
        num_layers = config.num_hidden_layers + len(upper)
        self.layer = nn.ModuleList(Layer(config, reads_other=i >= alone) for i in range(num_layers))
        for first in range(upper.start, len(self.layer), 2) if upper else ():
            one, other = (self.layer[i].crossattention.self for i in (first, first + 1))
            other.key, other.value = one.key, one.value


class BertModel(nn.Module):
    def __init__(self, config: BertConfig, two_images: bool = False):
        super().__init__()
        self.config, self.two_images = config, two_images
        self.checkpoint_activations = False
        self.embeddings = Embeddings(config, token_types=two_images)
        self.encoder = Encoder(config, two_images)
        self.apply(self._init_weights)
        if two_images:  # what was pre-trained without token types computes as before
            nn.init.zeros_(self.embeddings.token_type_embeddings.weight)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def project(self, states: Tensor, attention_mask: Tensor | None = None) -> CrossStates:
        """Return the other stream as cross-attention reads it: states (B, S, encoder_width), attention_mask
        (B, S) with 1 = token, 0 = padding. With two_images (2B, S, encoder_width), first images first: layer
        i reads image i mod 2.
        """
        lowest = torch.finfo(states.dtype).min
        mask = None if attention_mask is None else padding_mask(attention_mask, lowest, states.dtype)
        streams = states.chunk(2) if self.two_images else [states]
        attentions = [layer.crossattention for layer in self.encoder.layer]
        return CrossStates(a and a.project(streams[i % len(streams)], mask) for i, a in enumerate(attentions))

    def num_layers(self, cross: CrossStates | None) -> int:
        """Return how many layers a pass runs through: all of them, or those that read text alone."""
        return (cross is None and self.config.text_layers_alone) or len(self.encoder.layer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross: CrossStates | None = None,
        inputs_embeds: Tensor | None = None,
        causal: bool = False,
        position_ids: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """Return the last hidden states (B, T, D) of tokens (B, T) or of another encoder's states (B, T, D).

        attention_mask (B, T), None = no padding, or (B, T, T): which token sees which; causal: no token sees
        a later one (attention_mask (B, T) must be given); position_ids (B, T), None = 0 to T-1; first_only:
        the last layer computes every row's first state alone -> (B, 1, D). Raises UserError when T exceeds
        the position table.
        """
        hidden, mask = self.before_last(input_ids, attention_mask, cross, inputs_embeds, causal, position_ids)
        return self.run_layer(self.num_layers(cross) - 1, hidden, mask, cross, first_only)

    def before_last(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cross: CrossStates | None,
        inputs_embeds: Tensor | None = None,
        causal: bool = False,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the states that the last layer reads (B, T, D), and the additive mask."""
        hidden = self.embeddings(input_ids, inputs_embeds, position_ids)
        mask = None if attention_mask is None else (causal_mask if causal else padding_mask)(attention_mask)
        for i in range(self.num_layers(cross) - 1):
            hidden = self.run_layer(i, hidden, mask, cross)
        return hidden, mask

    def run_layer(
        self,
        i: int,
        hidden: Tensor,
        mask: Tensor | None,
        cross: CrossStates | None,
        first_only: bool = False,
    ) -> Tensor:
        """Return what layer i makes of the states (B, T, D); with `checkpoint_activations` the backward pass
        computes it again instead of keeping what it needs.
        """
        inputs = hidden, mask, None if cross is None else cross[i], first_only
        if self.checkpoint_activations:
            return checkpoint(self.encoder.layer[i], *inputs, use_reentrant=False)
        return self.encoder.layer[i](*inputs)

    def last_self_attention(
        self, input_ids: Tensor, attention_mask: Tensor, cross: CrossStates | None = None
    ) -> Tensor:
        """Return the last layer's self-attention map (B, H, T, T) of tokens (B, T)."""
        hidden, mask = self.before_last(input_ids, attention_mask, cross)
        attention = self.encoder.layer[self.num_layers(cross) - 1].attention
        return attention.attention_map(hidden, attention.project(hidden, mask))


class PredictionTransform(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(hidden)))  # (..., D) -> (..., D)


class PredictionHead(nn.Module):
    """Dense, GELU, LayerNorm, then the word-embedding matrix as decoder with a bias of its own."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = PredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight = word_embeddings.weight  # tied; both names are saved
        self.decoder.bias = self.bias
        nn.init.normal_(self.transform.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.transform.dense.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of states (..., D)."""
        return self.decoder(self.transform(hidden))


class BertForMaskedLM(nn.Module):
    """BertModel as `bert` and the masked-LM head as `cls.predictions`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.bert = BertModel(config)
        self.cls = nn.ModuleDict(
            {"predictions": PredictionHead(config, self.bert.embeddings.word_embeddings)}
        )

    def project(self, states: Tensor, attention_mask: Tensor | None = None) -> CrossStates:
        return self.bert.project(states, attention_mask)

    def forward(self, *inputs, **more) -> Tensor:
        """Return the last hidden states, as `BertModel` does; `predict` reads words from them."""
        return self.bert(*inputs, **more)

    def predict(self, hidden: Tensor) -> Tensor:
        """Return vocabulary logits (..., V) of states (..., D)."""
        return self.cls["predictions"](hidden)
