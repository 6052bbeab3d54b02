"""Makes a model that answers from a checkpoint file: its kind, its config, its tokenizer."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from simla.checkpoint.initial import warn_of_another_vocabulary
from simla.checkpoint.load import (
    config_in,
    kind_of,
    load_weights,
    metadata_in,
    text_layers_alone,
    tokenizer_in,
    untrained_by,
    weights_in,
)
from simla.checkpoint.safe_load import safe_load
from simla.checkpoint.tasks import TASKS
from simla.checkpoint.tokenizer import tokenizer_from_text
from simla.configs.reader import check_values, read_yaml
from simla.configs.schema import CONTRAST, ENCODERS, TABLES, Key
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.model import Simla
from simla.models.bert import PredictionHead
from simla.models.bert_config import BertConfig
from simla.utils import PRECISIONS, UserError, check_weight, log, own_surroundings, pick_device, shipped

CHOICES = ("k_test", "score", "score_itc_weight", "batch_size_test", "eos", "num_beams", "max_answer_tokens")
MAY_CHANGE = ("image_res", *CHOICES, "text_encoder", "sentence_only")
USED_KEYS = {*ENCODERS, *CONTRAST, *CHOICES, "vit_mask_token", "decoder_layers", "sentence_only"}


def load(
    checkpoint: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "fp32",
    config: str | Path | Mapping | None = None,
    text_encoder: str | None = None,
) -> Simla:
    """Return the model of a checkpoint of any task, ours or published, .pth or .safetensors, to be asked.

    device: auto (a GPU where there is one), cpu, cuda or cuda:N; dtype: what the encoders compute in, fp32,
    tf32, bf16 or fp16, or the torch dtype; config: a task's YAML file or mapping, for a file that holds none,
    or to change how images are read or how many candidates there are, which is logged; text_encoder: hub name
    or folder of the tokenizer, instead of the one in the file or, where there is none, the config's. Raises
    UserError for a file that is damaged, no SIMLA checkpoint, of pretrain_nlvr, has weights that are not
    finite, or does not fit its config, and where a given config builds the encoders otherwise than the
    file's.

    On a GPU every call also decides whether torch multiplies float32 in tf32, for the whole process.
    """
    precision = _precision(dtype)
    chosen = pick_device(str(device))
    with own_surroundings(chosen):
        return _load(checkpoint, chosen, precision, config, text_encoder)


def _load(
    checkpoint: str | Path,
    device: torch.device,
    precision: str,
    config: str | Path | Mapping | None,
    text_encoder: str | None,
) -> Simla:
    source = str(checkpoint)
    content = safe_load(checkpoint)
    state = weights_in(content, source)
    kind = kind_of(state, source, metadata_in(content))
    task = next((name for name, task in TASKS.items() if kind in task.loads), None)
    if task is None:
        raise UserError(
            f"{source} is a {kind} checkpoint, half-way to NLVR2, which answers nothing itself; load what "
            "NLVR.py made of it"
        )
    table = TABLES[task]
    if config is None:
        values, where = _stored_config(content, source)
        values = fill_in_what_is_missing(values, table, state, kind, source)
    else:
        is_mapping = isinstance(config, Mapping)
        values, where = (dict(config), "given") if is_mapping else (read_yaml(config), str(config))
    settings = model_config(values, table, where)
    settings["text_encoder"] = text_encoder or settings["text_encoder"]
    settings["vit_mask_token"] = kind != "pretrain" and "visual_encoder.mask_token" in state
    if (stored := tokenizer_in(content)) and not text_encoder:
        tokenizer = tokenizer_from_text(stored, source)
        stored_name = config_in(content, source).get("text_encoder", settings["text_encoder"])
        settings["text_encoder"] = shipped(stored_name)
    else:
        tokenizer = build_tokenizer(settings["text_encoder"])
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        model = TASKS[task].build(settings).float()  # torch's default dtype may be another
        untrained = untrained_by(config_in(content, source)) if kind == "pretrain" else frozenset()
        has_words, has_concepts = (kind == "pretrain" and loss not in untrained for loss in ("mlm", "psl"))
        concepts = _concept_head(state, source) if has_concepts else None
        words = _word_head(state, model, source) if has_words else None
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    load_weights(model, checkpoint, task, None if config is None else settings)
    if text_encoder:
        warn_of_another_vocabulary(tokenizer, source, text_encoder)
    if settings.get("sentence_only"):
        log.warning(f"sentence_only: what {source} says does not depend on the image")
    if config is not None:
        _say_changes(settings, content, table, source)
    for name in model.twin_names:  # only training asks them
        delattr(model, f"{name}_m")
    return Simla(model, tokenizer, settings, kind, source, device, precision, concepts, words, untrained)


def _say_changes(settings: dict, content: dict, table: dict[str, Key], source: str) -> None:
    """Log what a given config changes that a user may mean to: how much is read, shown and chosen."""
    stored = config_in(content, source)
    theirs = {name: shipped(stored.get(name, table[name].default)) for name in MAY_CHANGE if name in table}
    changed = {name: value for name, value in theirs.items() if stored and settings[name] != value}
    if changed:
        listed = ", ".join(f"{name} {settings[name]} instead of {value}" for name, value in changed.items())
        log.warning(f"{source}: the config given changes {listed}")


def _precision(dtype: str | torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    name = names.get(dtype, dtype)
    if name not in PRECISIONS:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(PRECISIONS)}, or the torch dtype")
    return name


def _stored_config(content: dict, source: str) -> tuple[dict, str]:
    """Return the config in the checkpoint, and how to call it in messages."""
    if stored := config_in(content, source):
        return stored, f"in {source}"
    what = f"{source} holds no config, which says how large the model is and how images are read"
    raise UserError(f"{what}; give that of its training, config='configs/...yaml'")


def fill_in_what_is_missing(
    values: dict, table: dict[str, Key], state: Mapping[str, Tensor], kind: str, source: str
) -> dict:
    """Return the stored config; what it names of another machine, and this one lacks, is taken from the
    shapes of the weights and the published sizes, and logged.
    """
    values, default = {**values}, {name: table[name].default for name in ("bert_config", "text_encoder")}
    path, name = (values.get(key, default[key]) for key in default)
    if isinstance(path, str) and not Path(shipped(path)).exists():
        values["bert_config"] = sizes = text_encoder_sizes(state, kind, source, path)
        log.warning(
            f"{source}: bert_config {path} is not here; the text encoder has the sizes of its weights, "
            f"{sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}, with the published "
            f"{sizes['num_attention_heads']} heads"
        )
    elif isinstance(path, str) and (alone := text_layers_alone(state)):  # which ALBEF's file calls otherwise
        values["bert_config"] = asdict(replace(BertConfig.read(path), text_layers_alone=alone))
    words = _text_encoder_shapes(state).get("embeddings.word_embeddings.weight", (0,))
    is_gone = isinstance(name, str) and Path(name).is_absolute() and not Path(name).exists()
    if is_gone and words[0] == BertConfig.vocab_size:
        values["text_encoder"] = default["text_encoder"]
        log.warning(f"{source}: text_encoder {name} is not here; {default['text_encoder']} is used")
    return values


def _text_encoder_shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of the text encoder's entries, by their names inside it."""
    of_text = (name for name in state if name.startswith("text_encoder."))
    return {name.removeprefix("text_encoder.").removeprefix("bert."): state[name].shape for name in of_text}


def text_encoder_sizes(state: Mapping[str, Tensor], kind: str, source: str, path: str) -> dict:
    """Return the text encoder's sizes that the weights show, and the published ones of those they do not.

    Raises UserError where the width is not the published one: the shapes do not say how many heads share it.
    """
    shapes, layer, alone = _text_encoder_shapes(state), "encoder.layer.0", text_layers_alone(state)
    num_layers = len({name.split(".")[2] for name in shapes if name.startswith("encoder.layer.")})
    try:
        vocab_size, width = shapes["embeddings.word_embeddings.weight"]
        shown = {
            "vocab_size": vocab_size,
            "hidden_size": width,
            # Two images are read by an encoder that has the layers of the upper half twice.
            "num_hidden_layers": num_layers * 2 // 3 if kind == "nlvr" else num_layers,
            "intermediate_size": shapes[f"{layer}.intermediate.dense.weight"][0],
            "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
            "encoder_width": shapes[f"encoder.layer.{alone}.crossattention.self.key.weight"][1],
            "text_layers_alone": alone,
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{source} has no text encoder of SIMLA's: {error} is missing") from error
    if width != BertConfig.hidden_size:
        raise UserError(
            f"{source}: bert_config {path} cannot be read, and the weights, {width} wide, do not say how "
            "many attention heads share that width; put the file there, or give config='...yaml' that has it"
        )
    return {**asdict(BertConfig()), **shown}


def model_config(values: dict, table: dict[str, Key], where: str) -> dict:
    """Return what model and scoring need of a task's config, checked, defaults filled in; training, data, and
    keys that other versions have, are passed over. Raises UserError for what is missing or of a wrong type.
    """
    used = {name: key for name, key in table.items() if name in USED_KEYS}
    known = {name: value for name, value in values.items() if name in used}
    released = {"released_code": table["released_code"]}  # changes no score: the paper's, whatever is stored
    config = check_values(known, used | released, where)
    for name in ("bert_config", "text_encoder"):
        config[name] = shipped(config[name])
    return config


def _concept_head(state: Mapping[str, Tensor], source: str) -> nn.Linear | None:
    """Return the head that names an image's keywords, None where the file lacks it."""
    if "concept_head.weight" not in state:
        return None
    vocab_size, embed_dim = state["concept_head.weight"].shape
    return _filled(nn.Linear(embed_dim, vocab_size, dtype=torch.float32), "concept_head.", state, source)


def _word_head(state: Mapping[str, Tensor], model: nn.Module, source: str) -> PredictionHead | None:
    """Return the head that tells masked words, which shares the model's words; None where the file lacks it,
    and in ALBEF's layout, whose head is above the layers that read text alone.
    """
    prefix = "text_encoder.cls.predictions."
    encoder = model.text_encoder
    if f"{prefix}bias" not in state or encoder.config.text_layers_alone:
        return None
    head = PredictionHead(encoder.config, encoder.embeddings.word_embeddings).float()
    return _filled(head, prefix, state, source)


def _filled(head: nn.Module, prefix: str, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Return the head with the file's weights of that prefix. Raises UserError for one that is not finite."""
    weights = {name: state[prefix + name] for name in head.state_dict()}
    for name, value in weights.items():
        check_weight(value, prefix + name, source)
    head.load_state_dict(weights)
    return head
