"""Reads a task's YAML: every key is known, typed and checked; the resolved copy goes beside the results.

The tables below are the reference of all keys (`python config.py` prints them for the README).
"""

if __name__ == "__main__":
    import before_imports  # noqa: F401

import argparse
import difflib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from models.bert import BertConfig
from run_record import code_revision
from utils import UserError, fill_in, is_url

REQUIRED = object()
BERT_CONFIG = "configs/config_bert.json"


@dataclass(frozen=True)
class Key:
    """type: a type, a tuple of types or a nested table; default: REQUIRED or a value; help: one line; least:
    the smallest value allowed; choices: the only values allowed; place: a path, "data" where it is relative
    to data_root, "" where it is no path.
    """

    type: type | tuple | dict
    default: object = REQUIRED
    help: str = ""
    least: int | None = None
    choices: tuple = ()
    place: str = ""


NUMBER = (float, int)
PATHS = (str, list)
DATA, OTHER = "data", "other"  # paths relative to data_root, or to the folder the script is started in

OPTIMIZER = {
    "opt": Key(str, "adamW", "any optimiser timm knows"),
    "lr": Key(NUMBER, help="learning rate"),
    "weight_decay": Key(NUMBER, 0.02, "not for biases and one-dimensional parameters"),
    "eps": Key(NUMBER, 1e-8),
    "betas": Key(list, [0.9, 0.999]),
}
SCHEDULE = {
    "sched": Key(str, "cosine"),
    "lr": Key(NUMBER, 0, "kept for published configs; optimizer.lr counts"),
    "epochs": Key(int, help="length of the run", least=1),
    "min_lr": Key(NUMBER, 1e-5, "learning rate of the last epoch"),
    "decay_rate": Key(NUMBER, 1, "kept for published configs; cosine does not use it"),
    "warmup_lr": Key(NUMBER, 1e-5, "learning rate of the first step"),
    "warmup_epochs": Key(int, 0, "warm-up steps inside epoch 0"),
    "warmup_step_size": Key(int, 100, "iterations per warm-up step", least=1),
    "cooldown_epochs": Key(int, 0, "kept for published configs; cosine does not use it"),
}
VIT = {
    "depth": Key(int, 12, "transformer blocks", least=1),
    "num_heads": Key(int, 12, least=1),
    "patch_size": Key(int, 16, "pixels", least=1),
    "mlp_ratio": Key(NUMBER, 4),
    "qkv_bias": Key(bool, True),
    "norm_eps": Key(NUMBER, 1e-6),
}
ENCODERS = {
    "image_res": Key(int, help="side of the square input in pixels", least=1),
    "vision_width": Key(int, 768, "width of the image encoder", least=1),
    "vit": Key(VIT, {}, "sizes of the image encoder"),
    "bert_config": Key((str, dict), BERT_CONFIG, "JSON file, or the same as a mapping", place=OTHER),
    "momentum": Key(NUMBER, 0.995, "of the momentum twins"),
    "alpha": Key(NUMBER, 0.4, "weight of the momentum targets"),
    "init": Key(str, "pretrained", "'pretrained' (image_encoder, text_encoder below) or 'scratch'"),
    "image_encoder": Key(
        str, "deit_base_patch16_224", "initial ViT weights: timm name or local file", place=OTHER
    ),
    "text_encoder": Key(
        str, "bert-base-uncased", "tokenizer and initial BERT weights: hub name or folder", place=OTHER
    ),
}
CONTRAST = {
    "embed_dim": Key(int, 256, "shared embedding of the contrast", least=1),
    "temp": Key(NUMBER, 0.07, "temperature at the start"),
    "queue_size": Key(int, 65536, "momentum features kept for the contrast", least=1),
}
RELEASED_CODE_HELP = "true = as the published code does, false = as the paper says"
SHARED = {
    "optimizer": Key(OPTIMIZER),
    "schedular": Key(SCHEDULE, help="learning-rate schedule; `scheduler` is accepted too"),
    "data_root": Key(
        str, "", "folder that relative paths of data in this config start from; empty = the working folder"
    ),
    "image_root": Key(
        str,
        "",
        "folder that relative image paths start from; empty = data_root, or if that is empty too the "
        "annotation file's",
        place=DATA,
    ),
    "num_workers": Key(int, 4, "data-loading processes per rank", least=0),
    "log_steps": Key(int, 50, "steps between two log lines", least=1),
    "precision": Key(
        str,
        "fp32",
        "fp32, tf32, bf16 or fp16 (with loss scaling); of all scores but heat maps, too",
        choices=("fp32", "tf32", "bf16", "fp16"),
    ),
    "compile": Key(bool, False, "torch.compile the encoders' layers"),
    "checkpoint_activations": Key(
        bool, False, "layers are computed again in the backward pass: less memory, more time"
    ),
    "grad_accumulation_steps": Key(int, 1, "batches whose mean gradient makes one step", least=1),
    "clip_grad_norm": Key(
        NUMBER, 0, "longest gradient of a step, longer ones are shortened; 0 = any", least=0
    ),
    "save_every_steps": Key(int, 0, "checkpoints within an epoch; 0 = none", least=0),
    "save_every_minutes": Key(NUMBER, 0, "as save_every_steps, by the clock", least=0),
    "keep_last": Key(int, 2, "newest checkpoints kept, beside the best, or those of every epoch", least=1),
    "wandb": Key(dict, {}, "all keys go to wandb.init, `{project: ...}`; empty = no Weights & Biases"),
    "max_nonfinite_steps": Key(
        int, 5, "a run stops after so many steps in a row with a loss that is not finite", least=1
    ),
}
MAX_BAD = Key(NUMBER, 0.05, "a run stops when a larger share of an epoch's images cannot be read", least=0)
RANDAUGMENT = {"num_ops": Key(int, 2), "magnitude": Key(int, 7, "0 to 10")}
IMAGE_TOKENIZER = {
    "kind": Key(str, "dalle", "dalle, flava or kmeans"),
    "path": Key(
        str,
        "",
        "dalle: encoder.pkl; flava: hub name or folder; kmeans: codebook file, made when missing",
        place=OTHER,
    ),
    "vocab_size": Key(int, 8192, "visual tokens", least=1),
}
FLIP_CAPTIONS = Key(bool, False, "flip images under texts that say left or right")
MLM_DISTILL = Key(bool, False, "soft word targets over the sequence, not the vocabulary")
PRETRAIN = {
    **ENCODERS,
    **CONTRAST,
    **SHARED,
    "train_file": Key(
        PATHS, help="annotation files and shards, or `[{path: ..., weight: ...}, ...]`", place=DATA
    ),
    "samples_per_epoch": Key(int, 0, "of all ranks together; 0 = all there are", least=0),
    "batch_size": Key(int, 64, "per rank", least=1),
    "mlm_probability": Key(NUMBER, 0.15, "share of words masked"),
    "max_tokens": Key(int, 25, "captions are cut to this many tokens", least=1),
    "num_masking_patches": Key(int, 75, "patches hidden from MIM, of (image_res / patch_size)²", least=1),
    "min_num_patches": Key(int, 16, "smallest block of hidden patches"),
    "min_crop_scale": Key(NUMBER, 0.2, "smallest share of the image that a random crop keeps"),
    "randaugment": Key(RANDAUGMENT, {}),
    "image_tokenizer": Key(IMAGE_TOKENIZER, {}, "gives the MIM targets"),
    "max_bad_fraction": MAX_BAD,
    "released_code": Key(
        {
            "mlm_distill_over_sequence": MLM_DISTILL,
            "mim_independent_views": Key(bool, False, "the image tokenizer sees a crop of its own"),
            "psl_padding": Key(bool, False, "[PAD] can become a keyword"),
            "flip_captions": FLIP_CAPTIONS,
        },
        {},
        RELEASED_CODE_HELP,
    ),
}
TRAIN_FILE = Key(PATHS, help="annotation files", place=DATA)
FINETUNE = {
    **ENCODERS,
    **SHARED,
    "batch_size_train": Key(int, 32, "per rank", least=1),
    "batch_size_test": Key(int, 64, "per rank", least=1),
    "warm_up": Key(bool, False, "alpha ramps from 0 in epoch 0"),
    "distill": Key(bool, True, "false = no momentum targets, as alpha 0"),
    "vit_mask_token": Key(bool, False, "the image encoder has the mask token of pre-training"),
    "min_crop_scale": Key(NUMBER, 0.5, "smallest share of the image that a random crop keeps"),
    "randaugment": Key(RANDAUGMENT, {}),
    "max_bad_fraction": MAX_BAD,
    "skip_unreadable": Key(
        bool, False, "evaluation leaves out entries with an image that cannot be read; false = it stops"
    ),
}
RETRIEVAL = {
    **FINETUNE,
    **CONTRAST,
    "train_file": Key(PATHS, [], "annotation files of fine-tuning", place=DATA),
    "val_file": Key(str, "", "annotation file; chooses the best checkpoint", place=DATA),
    "test_file": Key(str, help="annotation file", place=DATA),
    "k_test": Key(int, 256, "candidates re-ranked for each query", least=1),
    "save_scores": Key(bool, False, "write both score matrices to result/retrieval_scores.pt"),
    "optimizer": Key(OPTIMIZER, {"lr": 1e-5}),
    "schedular": Key(
        SCHEDULE, {"lr": 1e-5, "epochs": 5}, "learning-rate schedule; `scheduler` is accepted too"
    ),
    "released_code": Key(
        {
            "frozen_idx_queue": Key(bool, False, "captions of one image are negatives once in the queue"),
            "select_on_test": Key(bool, False, "the best checkpoint is chosen by test recall"),
            "flip_captions": FLIP_CAPTIONS,
        },
        {},
        RELEASED_CODE_HELP,
    ),
}
GROUNDING = {
    **FINETUNE,
    **CONTRAST,
    "train_file": TRAIN_FILE,
    "test_file": Key(PATHS, help="annotation files of all three evaluation splits", place=DATA),
    "refcoco_data": Key(
        str,
        "",
        "folder with refcoco+/refs(unc).p and refcoco+/instances.json; empty = every test entry has a box",
        place=DATA,
    ),
    "det_file": Key(str, "", "detector boxes; empty = boxes from the heat map alone", place=DATA),
    "coco_file": Key(str, "", "kept for published configs; no score uses it", place=DATA),
    "released_code": Key(
        {
            "frozen_idx_queue": Key(bool, False, "captions of one image are negatives once in the queue"),
            "flip_captions": FLIP_CAPTIONS,
        },
        {},
        RELEASED_CODE_HELP,
    ),
}
VQA = {
    **FINETUNE,
    "train_file": TRAIN_FILE,
    "val_file": Key(str, "", "annotation file with answers; scored after every epoch", place=DATA),
    "test_file": Key(
        PATHS, help="annotation files; with answers the official accuracy is reported", place=DATA
    ),
    "vqa_root": Key(str, "", "as image_root, for entries of data set vqa", place=DATA),
    "vg_root": Key(str, "", "as image_root, for entries of data set vg", place=DATA),
    "answer_list": Key(
        str, "", "JSON list of the answers to rank; --inference generate needs none", place=DATA
    ),
    "k_test": Key(int, 128, "answers that the whole sequence re-scores", least=1),
    "eos": Key(str, "[SEP]", "written after every answer"),
    "decoder_layers": Key(int, 0, "of the answer decoder; 0 = the upper half of the text encoder's", least=0),
    "num_beams": Key(int, 3, "of --inference generate", least=1),
    "max_answer_tokens": Key(int, 10, "of --inference generate", least=1),
    "num_top_answers": Key(int, 5, "answers with probabilities in the result file", least=1),
    "max_tokens": Key(int, 25, "training questions are cut to this many tokens", least=1),
    "released_code": Key(
        {
            "vqa_no_distill": Key(bool, False, "the answer decoder is trained without momentum targets"),
            "mlm_distill_over_sequence": MLM_DISTILL,
            "flip_captions": FLIP_CAPTIONS,
        },
        {},
        RELEASED_CODE_HELP,
    ),
}
CLASSIFY = {
    **FINETUNE,
    "train_file": TRAIN_FILE,
    "val_file": Key(PATHS, help="annotation files; choose the best checkpoint", place=DATA),
    "test_file": Key(PATHS, help="annotation files", place=DATA),
}
VE = {**CLASSIFY, "released_code": Key({"flip_captions": FLIP_CAPTIONS}, {}, RELEASED_CODE_HELP)}
NLVR = {
    **CLASSIFY,
    "released_code": Key(
        {
            "nlvr_teacher_unloaded": Key(bool, False, "the momentum twins start without the checkpoint"),
            "flip_captions": FLIP_CAPTIONS,
        },
        {},
        RELEASED_CODE_HELP,
    ),
}
PRETRAIN_NLVR = {
    **FINETUNE,
    **CONTRAST,
    "train_file": TRAIN_FILE,
    "max_tokens": Key(int, 25, "captions are cut to this many tokens", least=1),
    "min_crop_scale": Key(NUMBER, 0.2, "smallest share of the image that a random crop keeps"),
    "released_code": Key({"flip_captions": FLIP_CAPTIONS}, {}, RELEASED_CODE_HELP),
}
TABLES = {
    "Pretrain.py": PRETRAIN,
    "Retrieval.py, zero_shot_retrieval.py": RETRIEVAL,
    "Grounding.py": GROUNDING,
    "VQA.py": VQA,
    "Pretrain_NLVR.py": PRETRAIN_NLVR,
    "NLVR.py": NLVR,
    "VE.py": VE,
}


def parse(parser: argparse.ArgumentParser, table: dict[str, Key]) -> tuple[argparse.Namespace, dict]:
    """The flags and the config of a task script, which has all sizes in it and names no file that holds some:
    what is saved of it, in checkpoints and config.yaml, means the same for ever.
    """
    args = parser.parse_args()
    config = read_config(args.config, table, args.overrides)
    config["bert_config"] = asdict(BertConfig.read(config["bert_config"]))
    config["text_encoder"] = args.text_encoder or config["text_encoder"]
    return args, config


def read_config(path: str, table: dict[str, Key], overrides: list[str] | None = None) -> dict:
    """The checked config with defaults filled in.

    overrides: "a.b=c" with c parsed as YAML. Paths are resolved here and nowhere else: data files and roots
    are relative to `data_root`, and image paths to `image_root`, or else to `data_root`, or else, where both
    are empty, to the annotation file. Raises UserError for a missing or broken file, an unknown key (with the
    nearest valid name), a missing key, or a value of the wrong type.
    """
    try:
        values = YAML(typ="safe").load(Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            f"config {path} cannot be read: {error.strerror}; name a YAML file with --config"
        ) from error
    except YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path} must hold `key: value` lines, found {type(values).__name__}")
    if "scheduler" in values and "schedular" in table:
        if "schedular" in values:
            raise UserError(f"config {path}: has both schedular and scheduler; keep one")
        values["schedular"] = values.pop("scheduler")
    for override in overrides or []:
        _override(values, re.sub(r"^scheduler(?=[.=])", "schedular", override))
    config = check_values(values, table, path)
    if config["data_root"]:  # absolute, so that the copy beside the results can be read again
        config["data_root"] = str(Path(fill_in(config["data_root"])).absolute())
    config = _resolve(config, table, config["data_root"])
    config["image_root"] = config["image_root"] or config["data_root"]
    return config


def _resolve(config: dict, table: dict[str, Key], data_root: str) -> dict:
    """With ~ and environment variables filled in in every path, those of data at their place in data_root.

    What the config leaves empty stays empty, absolute paths and what is no path stay as they are.
    """

    def resolve(value: object, key: Key) -> object:
        if isinstance(key.type, dict):
            return _resolve(value, key.type, data_root)
        if isinstance(value, list):
            return [resolve(part, key) for part in value]
        if isinstance(value, dict) and key.place == DATA:
            return {name: resolve(part, key) for name, part in value.items()}
        if not key.place or not isinstance(value, str) or not value or is_url(value):
            return value
        path = fill_in(value)
        return str(Path(data_root) / path) if key.place == DATA else path

    return {name: resolve(config[name], key) for name, key in table.items()}


def _override(values: dict, text: str) -> None:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UserError(f"--overrides {text}: expected key=value, for example schedular.epochs=10")
    if name.startswith("bert_config.") and isinstance(values.get("bert_config", ""), str):
        values["bert_config"] = _read_bert_config(values.get("bert_config", BERT_CONFIG))
    *parents, leaf = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"--overrides {text}: {parent} is a value, not a section")
    try:
        values[leaf] = YAML(typ="safe").load(value)
    except YAMLError as error:
        raise UserError(f"--overrides {text}: {value!r} is not valid YAML") from error


def _read_bert_config(path: str) -> dict:
    """The JSON file as a mapping, in which single values can be overridden."""
    try:
        return json.loads(Path(fill_in(path)).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"bert_config {path} cannot be read as JSON: {error}") from error


def check_values(values: dict, table: dict[str, Key], path: str, section: str = "") -> dict:
    """The values of a config, or of its section "name.", with defaults filled in; see `read_config` for what
    it raises. `path` says where they come from.
    """
    for name in values:
        if name not in table:
            near = difflib.get_close_matches(str(name), table, n=1)
            hint = f"did you mean {section}{near[0]}?" if near else f"known keys: {', '.join(table)}"
            raise UserError(f"config {path}: unknown key {section}{name}; {hint}")
    missing = [
        section + name for name, key in table.items() if key.default is REQUIRED and name not in values
    ]
    if missing:
        raise UserError(
            f"config {path}: missing {'key' if len(missing) == 1 else 'keys'} {', '.join(missing)}"
        )
    return {
        name: _check_value(values.get(name, key.default), key, path, section + name)
        for name, key in table.items()
    }


def _check_value(value: object, key: Key, path: str, name: str) -> object:
    expected = key.type
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            raise UserError(f"config {path}: {name} must be a section of keys, found {value!r}")
        return check_values(value, expected, path, name + ".")
    allowed = expected if isinstance(expected, tuple) else (expected,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join(kind.__name__ for kind in allowed)
        raise UserError(f"config {path}: {name} must be {wanted}, found {value!r}")
    if key.least is not None and value < key.least:
        raise UserError(f"config {path}: {name} must be at least {key.least}, found {value!r}")
    if key.choices and value not in key.choices:
        raise UserError(f"config {path}: {name} must be one of {', '.join(key.choices)}, found {value!r}")
    return value


def save_config(config: dict, output_dir: str) -> None:
    """Writes config.yaml with the git revision of the code as a comment."""
    with (Path(output_dir) / "config.yaml").open("w", encoding="utf-8") as file:
        file.write(f"# code revision: {code_revision()}\n")
        YAML(typ="safe", pure=True).dump(config, file)


def describe(table: dict[str, Key], section: str = "") -> list[str]:
    """Markdown table rows: key, default, meaning."""
    rows = []
    for name, key in table.items():
        if isinstance(key.type, dict):
            rows += describe(key.type, f"{section}{name}.")
        else:
            default = "required" if key.default is REQUIRED else f"`{key.default!r}`"
            rows.append(f"| `{section}{name}` | {default} | {key.help} |")
    return rows


def reference() -> str:
    """All keys as Markdown: the tables that scripts share once, then what each script adds or changes."""
    shared = {
        "Every script": {**ENCODERS, **SHARED},
        "Pretrain.py, Retrieval.py, zero_shot_retrieval.py, Grounding.py, Pretrain_NLVR.py": CONTRAST,
        "Every script but Pretrain.py": {
            name: key for name, key in FINETUNE.items() if name not in {**ENCODERS, **SHARED}
        },
    }
    known = [key for table in shared.values() for key in table.values()]
    own = {
        title: {name: key for name, key in table.items() if not any(key is other for other in known)}
        for title, table in TABLES.items()
    }
    head = ["", "| key | default | meaning |", "| --- | --- | --- |"]
    sections = {**shared, **own}
    return "\n\n".join("\n".join([f"### {title}", *head, *describe(sections[title])]) for title in sections)


if __name__ == "__main__":
    from launch import run_script

    run_script(lambda: print(reference()))
