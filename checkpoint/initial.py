"""Weights before training: DeiT for the image encoder (timm), BERT for the text encoder (transformers)."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from torch import nn

from simla.checkpoint.key_maps import BERT_DECODER, BERT_TWO_IMAGES, Row
from simla.checkpoint.load import (
    config_in,
    interpolate_pos_embed,
    load_weights,
    tokenizer_in,
    untrained_by,
    weights_in,
)
from simla.checkpoint.safe_load import safe_load, what_it_is
from simla.checkpoint.tokenizer import tokenizer_from_text, tokenizer_text
from simla.models.bert import BertConfig, BertForMaskedLM
from simla.models.vit import VisionTransformer
from simla.utils import UserError, check_weight, first_line, hub_answer, log

if TYPE_CHECKING:
    from transformers import BertConfig as HubConfig

SAMPLE = "Ä犬"  # every setting of BERT's tokenizer (case, accents, Chinese characters) changes how it is read


def starting_weights(
    model: nn.Module,
    config: dict,
    task: str,
    checkpoint: str,
    resume: bool = False,
    tokenizer=None,
    copy_twins: bool = True,
) -> str:
    """Fill the model with what a task starts from, and return what that was: the checkpoint's weights, by the
    task's key map, or, without one, the initial ones. Before a resume nothing is loaded.

    tokenizer: what texts are read with here; a checkpoint that was trained with another vocabulary is warned
    of. copy_twins: momentum twins that the checkpoint lacks start as copies of what was loaded, not as built.
    """
    if checkpoint and tokenizer is not None:
        warn_of_another_vocabulary(tokenizer, checkpoint, config["text_encoder"])
    if resume:
        return f"resuming {checkpoint}"
    if checkpoint:
        report = load_weights(model, checkpoint, task, config)
        warn_of_another_training(model, config, checkpoint)
        if hasattr(model, "idx_queue"):  # another data set numbers its images anew
            model.idx_queue.fill_(-100)
        if copy_twins:
            in_file = {name.split("_m.")[0] for name in report.loaded if "_m." in name}
            model.copy_twins([name for name in model.twin_names if name not in in_file])
        return str(report)
    load_initial_weights(model, config)
    return "no --checkpoint: the weights before any training"


def warn_of_another_training(model: nn.Module, config: dict, checkpoint: str) -> None:
    """Warn where scores would be of a head that no loss has trained, or where either the training of the
    checkpoint or this config, not both, is the baseline of sentences alone (`sentence_only`).
    """
    stored = config_in(safe_load(checkpoint), checkpoint)
    heads = {"ita": ("text_proj", "the projections to features"), "itm": ("itm_head", "the matching head")}
    for loss, (name, head) in heads.items():
        if loss in untrained_by(stored) and hasattr(model, name) and "loss_weights" not in config:
            log.warning(
                f"{checkpoint} was trained with loss_weights.{loss} 0: {head} is as built, and until it is "
                "trained here, its scores mean nothing"
            )
    blind = stored.get("sentence_only")
    if blind is not None and "sentence_only" in config and blind != config["sentence_only"]:
        log.warning(
            f"{checkpoint} was trained with sentence_only {str(blind).lower()}, and here it is "
            f"{str(not blind).lower()}: its scores would not be those of the model that was trained. Add "
            f"--overrides sentence_only={str(blind).lower()}"
        )


def warn_of_another_vocabulary(tokenizer, checkpoint: str, text_encoder: str) -> None:
    """Warn where the tokenizer that the checkpoint keeps numbers words, or reads capital letters, accents or
    Chinese characters, otherwise than `tokenizer` does, which is of `text_encoder`: the weights would read
    other words.
    """
    stored = tokenizer_in(safe_load(checkpoint))
    if stored is None or stored == tokenizer_text(tokenizer):
        return
    trained_with = tokenizer_from_text(stored, checkpoint)
    theirs, ours = trained_with.get_vocab(), tokenizer.get_vocab()
    others = sorted(word for word, number in theirs.items() if ours.get(word) != number)
    others += sorted(ours.keys() - theirs.keys())
    if others:
        log.warning(
            f"{checkpoint} was trained with another vocabulary, of {len(theirs)} words, than text_encoder "
            f"{text_encoder!r} has, of {len(ours)}: {len(others)} words have another number or are in one of "
            f"them alone, such as {', '.join(others[:3])}. The weights take them for other words: name the "
            "text_encoder of that training"
        )
        return
    was, now = (
        normalizer.normalize_str(SAMPLE) if normalizer else SAMPLE
        for normalizer in (each.backend_tokenizer.normalizer for each in (trained_with, tokenizer))
    )
    if was != now:
        log.warning(
            f"{checkpoint} was trained with a tokenizer that reads {SAMPLE!r} as {was!r}; text_encoder "
            f"{text_encoder!r} reads {now!r}: name the text_encoder of that training, with its "
            "tokenizer_config.json"
        )


def load_initial_weights(model: nn.Module, config: dict) -> None:
    """Fill both encoders, and VQA's decoder, as config `init` says and copy them to the momentum twins.

    Raises UserError where the weights cannot be had: only `init` leaves an encoder random.
    """
    init = config["init"]
    if init != "pretrained":
        random = {"scratch": "everything", "text": "the image encoder", "image": "the text encoder"}[init]
        log.info(f"init: {init} - {random} starts from random weights")
    if init in ("pretrained", "image"):
        load_vit(model.visual_encoder, config["image_encoder"])
    if init in ("pretrained", "text"):
        encoder, name = model.text_encoder, config["text_encoder"]
        load_bert(encoder, name, BERT_TWO_IMAGES if getattr(encoder, "two_images", False) else None)
        if hasattr(model, "text_decoder"):
            name = config.get("text_decoder") or name
            load_bert(model.text_decoder, name, BERT_DECODER, encoder.config.num_hidden_layers)
    model.copy_twins()


def load_vit(encoder: VisionTransformer, name: str) -> None:
    """Load timm weights by model name (downloaded) or from a local .pth/.safetensors file of a timm ViT, with
    positions interpolated to this encoder's grid. Raises UserError where there are none that fit.
    """
    what = f"image_encoder {name!r}"
    if Path(name).is_file():
        content = safe_load(name)
        if isinstance(content, dict):  # of timm's own training, which averages weights
            content = content.get("state_dict_ema") or content.get("model_ema") or content
        state = weights_in(content, name)
    else:
        where = f" {hub_answer()}"
        try:
            state = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # network, cache and hub errors have a dozen types
            raise _unavailable(
                f"{what}: timm", where, f"{type(error).__name__}: {first_line(error)}"
            ) from error
    if "pos_embed" not in state:
        raise UserError(f"{what} is no Vision Transformer: it has no pos_embed")
    state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], encoder.patch_embed.num_patches)
    _copy(encoder, state, what, missing={"mask_token"}, unexpected=("head.",))


def _unavailable(who: str, where: str, cause: str) -> UserError:
    return UserError(
        f"{who} cannot get these weights{where} ({cause}). Give a local file or folder, start from "
        "--checkpoint, or set `init: scratch` in the config to train from random weights on purpose"
    )


def load_bert(encoder: nn.Module, name: str, row: Row | None = None, num_layers: int = 0) -> None:
    """Load BERT weights by hub name or folder, under other names where `row` says so: of more layers than
    num_layers (0: the encoder's) and of more positions than the encoder's, the first ones. What they lack
    stays as built: cross-attention, and the head for masked words but for the word embeddings that it shares.
    Raises UserError where there are none that fit.
    """
    what = f"{'text_decoder' if row is BERT_DECODER else 'text_encoder'} {name!r}"
    source, state = _hub_bert(name, what)
    sizes = getattr(encoder, "bert", encoder).config
    _check_sizes(source, sizes, what)
    num_layers = min(num_layers or sizes.num_hidden_layers, source.num_hidden_layers)
    num_positions = sizes.max_position_embeddings
    has_head = any(key.startswith("cls.predictions.transform") for key in state)
    state = {
        key: value[:num_positions] if "position_embeddings" in key else value
        for key, value in state.items()
        if not (layer := re.search(r"\.layer\.(\d+)\.", key)) or int(layer[1]) < num_layers
    }
    kinds = ("position", "token_type")
    positions, types = (state.get(f"bert.embeddings.{kind}_embeddings.weight") for kind in kinds)
    if not (has_head or getattr(encoder, "two_images", False) or positions is None or types is None):
        # Published training starts from BERT without its token types, which this encoder lacks. Any other
        # start computes as its file does.
        state["bert.embeddings.position_embeddings.weight"] = positions + types[0]
    if not isinstance(encoder, BertForMaskedLM):
        state = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    if row is not None:
        names = {key: row.name_in_file(key, num_layers) for key in encoder.state_dict()}
        state = {key: state[name] for key, name in names.items() if name in state}
    new = {key for key in encoder.state_dict() if "crossattention" in key or key.endswith("position_ids")}
    new |= {"cls.predictions.decoder.bias"}  # tied to cls.predictions.bias; not every version saves it
    if not has_head:
        new |= {key for key in encoder.state_dict() if key.startswith("cls.predictions")}
    unused = ("embeddings.token_type", "pooler", "cls.seq_relationship")
    _copy(encoder, state, what, new, (*unused, *(f"bert.{name}" for name in unused)))
    for size, most in (("num_hidden_layers", num_layers), ("max_position_embeddings", num_positions)):
        if (theirs := getattr(source, size)) > most:
            log.info(f"{what}: its {size} is {theirs}, of which the first {most} are taken")
    if isinstance(encoder, BertForMaskedLM) and not has_head:
        log.info(
            f"{what} has no head for masked words: it starts from random weights, but for the word "
            "embeddings, which it shares"
        )


def _hub_bert(name: str, what: str) -> tuple["HubConfig", dict[str, torch.Tensor]]:
    """Return the sizes of a BERT and the weights in its file, named as those with a head for masked words."""
    from transformers import BertConfig, BertForMaskedLM, logging

    where = "" if Path(name).exists() else f" {hub_answer()}"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it calls a file without the head corrupted
    try:
        kind = BertConfig.get_config_dict(name)[0].get("model_type", "bert")
        if kind == "bert":
            source, report = BertForMaskedLM.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # as above
        cause = f"{type(error).__name__}: {first_line(error)}"
        for file in (*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")):
            if content := what_it_is(file):  # such as a Git-LFS pointer of a cloned repository
                cause = f"{file} is {content}"
        raise _unavailable(f"{what}: transformers", where, cause) from error
    finally:
        logging.set_verbosity(verbosity)
    if kind != "bert":
        raise UserError(
            f"{what} is of the kind {kind!r} (model_type in its config.json), not 'bert', and computes "
            "otherwise; name a BERT, such as bert-base-uncased"
        )
    absent = set(report["missing_keys"])  # transformers fills these with random numbers
    return source.config, {key: value for key, value in source.state_dict().items() if key not in absent}


def _check_sizes(theirs: "HubConfig", ours: BertConfig, what: str) -> None:
    """Raise UserError where the weights cannot fill an encoder of such sizes, or would compute otherwise."""
    if theirs.hidden_act != "gelu":
        raise UserError(
            f"{what}: its hidden_act is {theirs.hidden_act!r}, this encoder's 'gelu'; name other weights"
        )
    same = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "layer_norm_eps")
    wrong = [size for size in same if getattr(theirs, size) != getattr(ours, size)]
    if theirs.max_position_embeddings < ours.max_position_embeddings:
        wrong.append("max_position_embeddings")
    if wrong:
        both = (
            f"its {size} is {getattr(theirs, size)}, bert_config's {getattr(ours, size)}" for size in wrong
        )
        set_to = (f"bert_config.{size}={getattr(theirs, size)}" for size in wrong)
        raise UserError(
            f"{what} does not fit the sizes in the config: {'; '.join(both)}. Name other weights, or set "
            f"{' '.join(set_to)}"
        )


def _copy(
    encoder: nn.Module, state: dict[str, torch.Tensor], what: str, missing: set, unexpected: tuple
) -> None:
    """Copy the state into the encoder, which may have `missing` names more, the state `unexpected` prefixes.

    Raises UserError for what does not fit or is not finite.
    """
    targets = encoder.state_dict()
    wrong = [key for key in targets if key in state and targets[key].shape != state[key].shape]
    wrong += [key for key in targets if key not in state and key not in missing]
    wrong += [key for key in state if key not in targets and not key.startswith(unexpected)]
    if wrong:
        raise UserError(
            f"{what} does not fit the sizes in the config: {len(wrong)} tensors are missing, unexpected or "
            f"of another shape, such as {', '.join(wrong[:4])}"
        )
    used = {key: value for key, value in state.items() if key in targets}
    for key, value in used.items():
        check_weight(value, key, what)
    encoder.load_state_dict(used, strict=False)
