"""Sizes of the text encoder, read and checked; no torch, so that configs are read without it."""

import json
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from simla.utils import UserError, shipped

# Two positions: [CLS] and a word. Of other sizes 1.
LEAST = {"pad_token_id": 0, "text_layers_alone": 0, "max_position_embeddings": 2}
BELOW = {"num_hidden_layers": 1001}  # a float 1, another size 2**31


@dataclass(frozen=True)
class BertConfig:
    """Sizes of the text encoder; the names are those of BERT's JSON configuration."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    encoder_width: int = 768  # width of the stream that cross-attention reads
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    # The first layers that read text alone, without cross-attention: 0 = SIMLA's single stream, half of the
    # layers = ALBEF's two stages.
    text_layers_alone: int = 0

    @classmethod
    def read(cls, source: str | dict) -> "BertConfig":
        """Return the sizes in a JSON file or a mapping; BERT keys that have no meaning here are passed over.

        Raises UserError for a missing or broken file, for a key that is nearly one that counts, for values
        that are no sizes and for sizes that do not fit together.
        """
        if not isinstance(source, dict):
            path = shipped(source)
            try:
                source = json.loads(Path(path).read_bytes())
            except (OSError, ValueError) as error:  # ValueError: not JSON, or not even text
                raise UserError(f"bert_config {path} cannot be read as JSON: {error}") from error
            if not isinstance(source, dict):
                raise UserError(f"bert_config {path} must hold an object, found {type(source).__name__}")
        if source.get("hidden_act", "gelu") != "gelu":
            raise UserError(f"bert_config hidden_act is {source['hidden_act']!r}; only 'gelu' is supported")
        known = {field.name for field in fields(cls)}
        for key in source.keys() - known:
            if near := get_close_matches(str(key), known, n=1, cutoff=0.9):
                raise UserError(f"bert_config has {key}, which means nothing here; is {near[0]} meant?")
        config = cls(**{key: value for key, value in source.items() if key in known})
        for field in fields(cls):
            value, least = getattr(config, field.name), LEAST.get(field.name, int(field.type is int))
            most = BELOW.get(field.name, 1 if field.type is float else 2**31)
            is_number = isinstance(value, field.type | int) and not isinstance(value, bool)
            if not is_number or not least <= value < most:
                raise UserError(
                    f"bert_config {field.name} is {value!r}; expected {field.type.__name__}, at least {least}"
                    f" and below {most}"
                )
        if config.pad_token_id >= config.vocab_size:
            raise UserError(
                f"bert_config pad_token_id {config.pad_token_id} must be below vocab_size {config.vocab_size}"
            )
        if config.text_layers_alone >= config.num_hidden_layers:
            raise UserError(
                f"bert_config text_layers_alone {config.text_layers_alone} must be below num_hidden_layers "
                f"{config.num_hidden_layers}: some layers have to read the image"
            )
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"bert_config hidden_size {config.hidden_size} is not a multiple of "
                f"num_attention_heads {config.num_attention_heads}"
            )
        return config
