"""Reads a task's YAML: every key is known and has its type and range; the resolved copy goes beside the
results.

The tables below are the reference of all keys (`python config.py` prints them for the README).
"""

if __name__ == "__main__":
    from before_imports import prepare

    prepare()

import argparse
import copy
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from dataset.mixture import weighted
from models.bert import BertConfig
from run_record import code_revision
from saving import atomic_write
from utils import UserError, fill_in, is_url

REQUIRED = object()
BERT_CONFIG = "configs/config_bert.json"


@dataclass(frozen=True)
class Key:
    """type: a type, a tuple of types or a nested table; default: REQUIRED or a value; help: one line; least,
    most, above, below: the range of a number, or of the numbers in a list; choices: the only values allowed;
    items: types of what a list holds; place: a path, "data" where it is relative to data_root, "" where it is
    no path; unused: kept for published configs, without effect.

    A text, list or mapping may be empty where the default is empty.
    """

    type: type | tuple | dict
    default: object = REQUIRED
    help: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple = ()
    items: tuple = (str,)
    place: str = ""
    unused: bool = False


NUMBER = (float, int)
PATHS = (str, list)
DATA, OTHER = "data", "other"  # paths relative to data_root, or to the folder the script is started in
MAX_RATE = 10  # above it a learning rate lacks its minus: 1e4 for 1e-4


OPTIMIZER = {
    "opt": Key(str, "adamW", "any optimiser timm knows"),
    "lr": Key(NUMBER, help="learning rate", above=0, most=MAX_RATE),
    "weight_decay": Key(NUMBER, 0.02, "not for biases and one-dimensional parameters", least=0, most=10),
    "eps": Key(NUMBER, 1e-8, "added to the denominator of the update", above=0, most=1),
    "betas": Key(
        list,
        [0.9, 0.999],
        "decay of the gradient's moments: two, of adan three",
        items=NUMBER,
        least=0,
        below=1,
    ),
}
SCHEDULE = {
    "sched": Key(str, "cosine", choices=("cosine",)),
    "lr": Key(NUMBER, 0, "kept for published configs; optimizer.lr counts", least=0, unused=True),
    "epochs": Key(int, help="length of the run", least=1),
    "min_lr": Key(
        NUMBER,
        1e-5,
        "learning rate that the cosine reaches at epoch number `epochs`, one after the last, which counts "
        "from 0: no epoch has it",
        least=0,
        most=MAX_RATE,
    ),
    "decay_rate": Key(NUMBER, 1, "kept for published configs; cosine does not use it", least=0, unused=True),
    "warmup_lr": Key(
        NUMBER,
        1e-5,
        "learning rate of the first steps, where warmup_epochs is not 0",
        least=0,
        most=MAX_RATE,
    ),
    "warmup_epochs": Key(int, 0, "warm-up steps inside epoch 0, which end where it ends", least=0),
    "warmup_step_size": Key(int, 100, "iterations per warm-up step", least=1),
    "cooldown_epochs": Key(
        int, 0, "kept for published configs; cosine does not use it", least=0, unused=True
    ),
}
VIT = {
    "depth": Key(int, 12, "transformer blocks", least=1, most=1000),
    "num_heads": Key(int, 12, "a divisor of vision_width", least=1),
    "patch_size": Key(int, 16, "pixels; a divisor of image_res", least=1),
    "mlp_ratio": Key(NUMBER, 4, "width of the feed-forward layers / vision_width", above=0, most=100),
    "qkv_bias": Key(bool, True, "queries, keys and values have a bias"),
    "norm_eps": Key(NUMBER, 1e-6, "of LayerNorm", above=0, below=1),
}
ENCODERS = {
    "image_res": Key(int, help="side of the square input in pixels", least=1),
    "vision_width": Key(int, 768, "width of the image encoder", least=1),
    "vit": Key(VIT, {}, "sizes of the image encoder"),
    "bert_config": Key((str, dict), BERT_CONFIG, "JSON file, or the same as a mapping", place=OTHER),
    "momentum": Key(NUMBER, 0.995, "of the momentum twins", least=0, most=1),
    "alpha": Key(NUMBER, 0.4, "weight of the momentum targets", least=0, most=1),
    "init": Key(
        str,
        "pretrained",
        "weights without --checkpoint: image_encoder and text_encoder below, or random ones",
        choices=("pretrained", "scratch"),
    ),
    "image_encoder": Key(
        str, "deit_base_patch16_224", "initial ViT weights: timm name or local file", place=OTHER
    ),
    "text_encoder": Key(
        str, "bert-base-uncased", "tokenizer and initial BERT weights: hub name or folder", place=OTHER
    ),
}
CONTRAST = {
    "embed_dim": Key(int, 256, "shared embedding of the contrast", least=1),
    "temp": Key(NUMBER, 0.07, "temperature at the start, then learned in this range", least=0.001, most=0.5),
    "queue_size": Key(int, 65536, "momentum features kept for the contrast", least=1),
}
RELEASED_CODE_HELP = "true = as the published code does, false = as the paper says"
SHARED = {
    "optimizer": Key(OPTIMIZER),
    "schedular": Key(SCHEDULE),
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
    "num_workers": Key(int, 4, "data-loading processes per rank", least=0, most=1000),
    "batch_timeout_minutes": Key(
        NUMBER, 8, "a run ends when its data-loading processes give no batch for so long; 0 = never", least=0
    ),
    "log_steps": Key(int, 50, "steps between two log lines", least=1),
    "precision": Key(
        str,
        "fp32",
        "of training (fp16: with loss scaling) and of all scores but heat maps",
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
    "stop_grace_seconds": Key(
        NUMBER, 60, "a step may take so long to end after a stop signal, else it is not waited for", least=0
    ),
    "wandb": Key(dict, {}, "all keys go to wandb.init, `{project: ...}`; empty = no Weights & Biases"),
    "max_nonfinite_steps": Key(
        int, 5, "a run stops after so many steps in a row with a loss that is not finite", least=1
    ),
}
MAX_BAD = Key(
    NUMBER, 0.05, "a run stops when a larger share of an epoch's images cannot be read", least=0, most=1
)
RANDAUGMENT = {
    "num_ops": Key(int, 2, "operations drawn for an image, each done with probability 0.5", least=0),
    "magnitude": Key(int, 7, "their strength", least=0, most=10),
}
MIN_CROP_SCALE = {"help": "smallest share of the image that a random crop keeps", "above": 0, "most": 1}
IMAGE_TOKENIZER = {
    "kind": Key(str, "dalle", "the network it is", choices=("dalle", "flava", "kmeans")),
    "path": Key(
        str,
        "",
        "dalle: encoder.pkl; flava: hub name or folder; kmeans: codebook file, made when missing",
        place=OTHER,
    ),
    "vocab_size": Key(int, 8192, "visual tokens", least=2),
}
FLIP_CAPTIONS = Key(bool, False, "flip images under texts that say left or right")
MLM_DISTILL = Key(bool, False, "soft word targets over the sequence, not the vocabulary")
PRETRAIN = {
    **ENCODERS,
    **CONTRAST,
    **SHARED,
    "train_file": Key(
        PATHS,
        help="annotation files and shards, or `[{path: ..., weight: ...}, ...]`",
        items=(str, dict),
        place=DATA,
    ),
    "samples_per_epoch": Key(int, 0, "of all ranks together; 0 = all there are", least=0, most=10**9),
    "batch_size": Key(int, 64, "per rank", least=1),
    "mlm_probability": Key(NUMBER, 0.15, "share of words masked", least=0, most=1),
    "max_tokens": Key(int, 25, "captions are cut to this many tokens, [CLS] included", least=2),
    "num_masking_patches": Key(
        int, 75, "patches hidden from MIM, at most (image_res / patch_size)²", least=1
    ),
    "min_num_patches": Key(int, 16, "smallest block of hidden patches", least=1),
    "min_crop_scale": Key(NUMBER, 0.2, **MIN_CROP_SCALE),
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
    "min_crop_scale": Key(NUMBER, 0.5, **MIN_CROP_SCALE),
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
    # A config that only evaluates needs neither.
    "optimizer": Key({**OPTIMIZER, "lr": replace(OPTIMIZER["lr"], default=1e-5)}, {}),
    "schedular": Key({**SCHEDULE, "epochs": replace(SCHEDULE["epochs"], default=5)}, {}),
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
    "coco_file": Key(str, "", "kept for published configs; no score uses it", place=DATA, unused=True),
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
    "max_tokens": Key(int, 25, "training questions are cut to this many tokens, [CLS] included", least=2),
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
    "max_tokens": Key(int, 25, "captions are cut to this many tokens, [CLS] included", least=2),
    "min_crop_scale": Key(NUMBER, 0.2, **MIN_CROP_SCALE),
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


TASKS = {
    script.removesuffix(".py"): table for scripts, table in TABLES.items() for script in scripts.split(", ")
}
OTHER_NAMES = {"NLVR_Pretrain": "Pretrain_NLVR"}  # as its config is called

# Keys of published configs: what they are called here, and those that no published script of the task reads.
PUBLISHED = {
    "batch_size": ("batch_size_train", "batch_size_test"),
    "image_tokenizer_path": ("image_tokenizer",),
}
PUBLISHED_WITHOUT_EFFECT = ("mlm_probability", "eval_ema", "save_sims")

TYPES = {int: "an int", float: "a number", str: "text", bool: "true or false"}
TYPES |= {list: "a list", dict: "a mapping"}
YES, NO = ("yes", "on", "true"), ("no", "off", "false")
EMPTY = ("", [], {})


# ---- the command line ----


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds --overrides, which may be given several times."""
    parser.add_argument(
        "--overrides",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="config values, a.b=c, also after several --overrides; the last one of a key counts",
    )


def task_name(text: str) -> str:
    """Return the task that a command line means by the name of its script, with or without .py, or config."""
    name = text.removesuffix(".py")
    return OTHER_NAMES.get(name, name)


def task_of(config_file: str) -> str | None:
    """Return the task that the file is named after, as those of configs/ are: Retrieval_coco.yaml."""
    stem = Path(config_file).stem.lower()
    for name in sorted([*TASKS, *OTHER_NAMES], key=len, reverse=True):
        if stem == name.lower() or stem.startswith(f"{name.lower()}_"):
            return task_name(name)
    return None


def parse(parser: argparse.ArgumentParser, table: dict[str, Key]) -> tuple[argparse.Namespace, dict]:
    """Return the flags and the config of a task script, which has all sizes in it and names no file that
    holds some: what is saved of it, in checkpoints and config.yaml, means the same for ever.

    args.notes: what `start` has to say about the config.
    """
    args = parser.parse_args()
    args.notes = []
    config = read_config(args.config, table, args.overrides, args.notes)
    bert = BertConfig.read(config["bert_config"])
    if bert.encoder_width != config["vision_width"]:
        raise UserError(
            f"config {args.config}: encoder_width {bert.encoder_width} of bert_config must be vision_width "
            f"{config['vision_width']}: the text encoder reads the image encoder's states"
        )
    config["bert_config"] = asdict(bert)
    config["text_encoder"] = args.text_encoder or config["text_encoder"]
    return args, config


def check_batch(config: dict, path: str, least: int = 2) -> None:
    """UserError where a rank's batches, of the config at `path`, can hold no negatives for the matching loss:
    `least` images are needed.
    """
    name = "batch_size" if "batch_size" in config else "batch_size_train"
    if config[name] < least:
        raise UserError(
            f"config {path}: {name} is {config[name]}, but the matching loss takes its negatives from the "
            f"other images of a rank's batch: make it {least} or larger. grad_accumulation_steps does not "
            "help, checkpoint_activations: true makes room"
        )


# ---- reading ----


def read_config(
    path: str, table: dict[str, Key], overrides: list[str] | None = None, notes: list[str] | None = None
) -> dict:
    """Return the checked config with defaults filled in.

    overrides: "a.b=c" with c parsed as YAML; notes: gets sentences on what is right but may not be meant.
    Paths are resolved here and nowhere else: data files and roots are relative to `data_root`, and image
    paths to `image_root`, or else to `data_root`, or else, where both are empty, to the annotation file.
    Raises UserError for a missing or broken file, an unknown key (with the nearest valid name), a missing
    key, a value of the wrong type or out of range, values that do not fit together, overrides without effect,
    and for the config of another task.
    """
    notes, values, files = [] if notes is None else notes, {}, {}
    layers = _read_layers(path)
    hint = _other_task(_merged(layer for _, layer in layers), table, path)
    for file, layer in layers:
        layer, said = _from_published(layer, table, file)
        values = _merged([values, layer])
        files |= dict.fromkeys(_names(layer), file)
        notes += said
    overrides = [re.sub(r"^scheduler(?=[.=])", "schedular", override) for override in overrides or []]
    for override in overrides:
        _override(values, override)
    config = check_values(values, table, path, hint=hint, files=files)
    _check_fit(config, path)
    names = {override.partition("=")[0] for override in overrides}
    for name in sorted(names & _unused(table)):
        raise UserError(f"--overrides {name} has no effect: {_key_of(name, table).help}")
    same_file = files.get("optimizer.lr") == files.get("schedular.lr") and "optimizer.lr" not in names
    notes += _notes_on_rates(config, files.get("schedular.lr", path), same_file)
    if config["data_root"]:  # absolute, so that the copy beside the results can be read again
        config["data_root"] = str(Path(fill_in(config["data_root"])).absolute())
    config = _resolve(config, table, config["data_root"])
    config["image_root"] = config["image_root"] or config["data_root"]
    return config


def read_yaml(path: str | Path) -> dict:
    """Return the mapping in a YAML file, laid over that of the file that its `base` names. Raises UserError,
    with the line, for what is none.
    """
    return _merged(values for _, values in _read_layers(str(path)))


def _read_layers(path: str, variants: tuple[str, ...] = ()) -> list[tuple[str, dict]]:
    """Return (file, its keys) of the config and, before it, of what it is based on; variants: the files that
    led here by their `base`.
    """
    values = _read_one(path)
    if "base" not in values:
        return [(path, values)]
    base = values.pop("base")
    if not isinstance(base, str) or not base:
        raise UserError(f"config {path}: base must name a YAML file, found {base!r}")
    base = os.path.normpath(Path(path).parent / fill_in(base))
    if any(os.path.realpath(base) == os.path.realpath(variant) for variant in (*variants, path)):
        raise UserError(f"config {path}: base {base} is itself based on {path}; take one `base` away")
    if not Path(base).exists():
        raise UserError(
            f"config {path}: base {base} does not exist; its path starts from the folder of {path}"
        )
    return [*_read_layers(base, (*variants, path)), (path, values)]


def _merged(layers: Iterable[dict]) -> dict:
    """Return the values of all layers; a later one replaces single keys of a section, and all else whole."""
    merged = {}
    for layer in layers:
        for name, value in layer.items():
            before = merged.get(name)
            if name == "bert_config" and isinstance(before, str) and isinstance(value, dict):
                before = _read_bert_config(before)
            both = isinstance(before, dict) and isinstance(value, dict)
            merged[name] = _merged([before, value]) if both else value
    return merged


def _names(values: dict, section: str = "") -> Iterator[str]:
    """Yield the name of every key, section.key for those of sections."""
    for name, value in values.items():
        yield f"{section}{name}"
        if isinstance(value, dict):
            yield from _names(value, f"{section}{name}.")


def _read_one(path: str) -> dict:
    try:
        values = YAML(typ="safe", pure=True).load(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from error
    except DuplicateKeyError as error:
        # ruamel goes on about how to allow it.
        problem = error.problem.replace("found duplicate key", "there already is a key")
        raise UserError(
            f"config {path}, line {error.problem_mark.line + 1}: {problem}; keep one of them"
        ) from error
    except (YAMLError, UnicodeDecodeError) as error:
        tab = "; indent with spaces, not tabs" if r"'\t'" in str(error) else ""
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}{tab}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"config {path} must hold `key: value` lines, found {found}")
    if "scheduler" in values:
        if "schedular" in values:
            raise UserError(f"config {path}: has both schedular and scheduler; keep one")
        values["schedular"] = values.pop("scheduler")
    return values


def _from_published(values: dict, table: dict[str, Key], path: str) -> tuple[dict, list[str]]:
    """Return what a published config of the task says in the keys of ours, and what there is to say on it."""
    values, notes = dict(values), []
    for old, new in PUBLISHED.items():
        if old not in values or old in table or not table.keys() >= set(new):
            continue
        if both := [name for name in new if name in values]:
            raise UserError(f"config {path}: has both {old} and {both[0]}; keep {both[0]}")
        value = values.pop(old)
        if old == "image_tokenizer_path":  # the folder of OpenAI's file
            value = {"path": f"{str(value).rstrip('/')}/encoder.pkl"}
        values |= dict.fromkeys(new, value)
        notes.append(f"config {path}: {old} is read as {' and '.join(new)}")
    for name in PUBLISHED_WITHOUT_EFFECT:
        if name in values and name not in table:
            del values[name]
            notes.append(f"config {path}: {name} has no effect on this task")
    return values, notes


def _other_task(values: dict, table: dict[str, Key], path: str) -> str:
    """Return "this looks like a config of ..." where another task's keys fit and this one's do not, else "".

    Raises UserError where both fit, but the file is named after the other task.
    """

    def misfits(other: dict[str, Key]) -> bool:
        published = {*PUBLISHED, *PUBLISHED_WITHOUT_EFFECT}
        return bool(_missing(values, other) or set(_unknown(values, other)) - published)

    named = task_of(path)
    if all(table is not known for known in TASKS.values()) or (named and TASKS[named] is table):
        return ""
    fitting = [scripts for scripts, other in TABLES.items() if not misfits(other)]
    if named and not misfits(TASKS[named]):
        fitting = [f"{named}.py"]
        if not misfits(table):
            own = next(scripts for scripts, other in TABLES.items() if other is table)
            raise UserError(
                f"config {path}: this looks like a config of {named}.py, not of {own}; rename it if it is not"
            )
    return f"this looks like a config of {' or '.join(fitting)}" if fitting else ""


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
    if not separator or not all(name.split(".")):
        raise UserError(f"--overrides {text}: expected key=value, for example schedular.epochs=10")
    if name.startswith("bert_config."):
        known = [*BertConfig.__dataclass_fields__, "hidden_act"]
        if (size := name.removeprefix("bert_config.")) not in known:  # one in the file is passed over
            near = difflib.get_close_matches(size, known, n=1)
            hint = f"did you mean bert_config.{near[0]}?" if near else f"sizes that count: {', '.join(known)}"
            raise UserError(f"--overrides {text} has no effect; {hint}")
        if isinstance(values.get("bert_config", ""), str):
            values["bert_config"] = _read_bert_config(values.get("bert_config", BERT_CONFIG))
    *parents, leaf = name.split(".")
    for parent in parents:
        values[parent] = {} if values.get(parent) is None else values[parent]
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"--overrides {text}: {parent} is a value, not a section")
    try:
        values[leaf] = YAML(typ="safe", pure=True).load(value)
    except YAMLError as error:
        raise UserError(f"--overrides {text}: {value!r} is not valid YAML") from error


def _read_bert_config(path: str) -> dict:
    """The JSON file as a mapping, in which single values can be overridden."""
    try:
        return json.loads(Path(fill_in(path)).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"bert_config {path} cannot be read as JSON: {error}") from error


# ---- checking ----


def check_values(
    values: dict,
    table: dict[str, Key],
    path: str,
    section: str = "",
    hint: str = "",
    files: dict | None = None,
) -> dict:
    """Return the values of a config, or of its section "name.", with defaults filled in; see `read_config`
    for what it raises. `path` says where they come from, but those named in `files` from there; hint: what
    else to say about unknown and missing keys.
    """
    files = files or {}
    for name in _unknown(values, table):
        path = files.get(f"{section}{name}", path)
        near = difflib.get_close_matches(str(name), table, n=1)
        about = f"did you mean {section}{near[0]}?" if near else f"known keys: {', '.join(table)}"
        raise UserError(f"config {path}: unknown key {section}{name}; {hint or about}")
    if missing := [section + name for name in _missing(values, table)]:
        what = f"missing {'key' if len(missing) == 1 else 'keys'} {', '.join(missing)}"
        raise UserError(f"config {path}: {what}" + f"; {hint}" * bool(hint))
    return {
        name: _check_value(values.get(name, key.default), key, path, section + name, files)
        for name, key in table.items()
    }


def _unknown(values: dict, table: dict[str, Key]) -> list:
    return [name for name in values if name not in table]


def _missing(values: dict, table: dict[str, Key]) -> list[str]:
    return [name for name, key in table.items() if key.default is REQUIRED and name not in values]


def _check_value(value: object, key: Key, path: str, name: str, files: dict) -> object:
    value, path = _as_meant(value, key), files.get(name, path)
    if isinstance(key.type, dict):
        if not isinstance(value, dict):
            raise UserError(f"config {path}: {name} must be a section of keys, found {value!r}")
        return check_values(value, key.type, path, name + ".", files=files)
    allowed = key.type if isinstance(key.type, tuple) else (key.type,)
    if (value is None or value in ("", [])) and key.default not in EMPTY:
        raise UserError(f"config {path}: {name} is empty; expected {expected(key)}")
    if not _is_a(value, allowed):
        quotes = "; a name that looks like something else goes in quotes" if str in allowed else ""
        raise UserError(f"config {path}: {name} must be {expected(key)}, found {value!r}{quotes}")
    if any("\0" in text for text in _texts(value)):
        raise UserError(f"config {path}: {name} holds the character NUL, which no path can: {value!r:.200}")
    for number, item in enumerate(value if isinstance(value, list) else ()):
        if not _is_a(item, key.items) or item in EMPTY:
            wanted = " or ".join(dict.fromkeys(TYPES[kind] for kind in key.items if kind is not int))
            raise UserError(f"config {path}: {name}: item {number} must be {wanted}, found {item!r}")
    for one in value if isinstance(value, list) else [value]:
        if _is_a(one, NUMBER) and not _is_in_range(one, key):
            wanted = filter(None, [_range(key), "finite" * (not _is_finite(one))])
            raise UserError(f"config {path}: {name} must be {' and '.join(wanted)}, found {one!r:.50}")
    if key.choices and value not in key.choices:
        near = difflib.get_close_matches(value, key.choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"config {path}: {name} must be one of {', '.join(key.choices)}, found {value!r}{hint}"
        )
    return value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(part)


def _as_meant(value: object, key: Key) -> object:
    """Return the value as its key wants it: nothing at all as an empty default or section, a number or yes
    and no written as text as such.
    """
    if isinstance(key.type, dict):
        return {} if value is None or value == "" else value
    if (value is None or value in EMPTY) and key.default in EMPTY:
        return copy.copy(key.default)
    if key.type is bool:
        word = value.lower() if isinstance(value, str) else value
        return True if word in YES or word == 1 else False if word in NO or word == 0 else value
    if key.type in (int, NUMBER):
        value = _number(value)
        return int(value) if key.type is int and isinstance(value, float) and value.is_integer() else value
    if isinstance(value, list) and key.items == NUMBER:
        return [_number(item) for item in value]
    return value


def _number(value: object) -> object:
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _is_a(value: object, kinds: tuple) -> bool:
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _is_finite(value: float) -> bool:
    """Whether it is, as a float: an int may be larger than any, where math.isfinite fails."""
    return abs(value) <= sys.float_info.max


def _is_in_range(value: float, key: Key) -> bool:
    return (
        _is_finite(value)
        and (key.least is None or value >= key.least)
        and (key.most is None or value <= key.most)
        and (key.above is None or value > key.above)
        and (key.below is None or value < key.below)
    )


def _range(key: Key) -> str:
    """Return it in words, "" for any."""
    if key.least is not None and key.most is not None:
        return f"from {key.least} to {key.most}"
    bounds = {"at least": key.least, "above": key.above, "at most": key.most, "below": key.below}
    return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)


def expected(key: Key) -> str:
    """Return what a value of the key has to be, in words."""
    if key.choices:
        return ", ".join(key.choices)
    kinds = key.type if isinstance(key.type, tuple) else (key.type,)
    words = TYPES[float] if kinds == NUMBER else " or ".join(TYPES[kind] for kind in kinds)
    words += " of numbers" if key.items == NUMBER else ""
    return ", ".join(filter(None, [words, _range(key)]))


def _check_fit(config: dict, path: str) -> None:
    """UserError where values that are right by themselves do not fit together."""

    def refuse(sentence: str) -> None:
        raise UserError(f"config {path}: {sentence}")

    vit, resolution, width = config["vit"], config["image_res"], config["vision_width"]
    if resolution % vit["patch_size"]:
        refuse(f"image_res {resolution} is not a multiple of vit.patch_size {vit['patch_size']}")
    if width % vit["num_heads"]:
        refuse(f"vision_width {width} is not a multiple of vit.num_heads {vit['num_heads']}")
    if int(width * vit["mlp_ratio"]) < 1:
        refuse(
            f"vit.mlp_ratio {vit['mlp_ratio']} of vision_width {width} leaves the feed-forward layers empty"
        )
    grid = resolution // vit["patch_size"]
    if config.get("num_masking_patches", 0) > grid**2:
        refuse(
            f"num_masking_patches {config['num_masking_patches']} exceeds the {grid} x {grid} patches; "
            "lower it or raise image_res"
        )
    if "samples_per_epoch" in config:
        try:
            weighted(config["train_file"])
        except UserError as error:
            refuse(str(error))
    tokenizer = config.get("image_tokenizer", {})
    if tokenizer.get("kind") == "kmeans" and not tokenizer["path"].endswith(".safetensors"):
        refuse(f"image_tokenizer.path of kmeans must name a .safetensors file, found {tokenizer['path']!r}")
    optimizer = config["optimizer"]
    if optimizer["opt"].lower() != "adamw":
        from optim import check_settings  # here, because it imports timm, which takes seconds

        try:
            check_settings(optimizer)
        except UserError as error:
            refuse(str(error))
    elif len(optimizer["betas"]) != 2:
        refuse(f"optimizer.betas must be two numbers, found {optimizer['betas']!r}")


def _notes_on_rates(config: dict, path: str, same_file: bool) -> list[str]:
    rate, schedule, notes = config["optimizer"]["lr"], config["schedular"], []
    if schedule["lr"] not in (0, rate) and same_file:
        notes.append(
            f"config {path}: schedular.lr {schedule['lr']} has no effect; optimizer.lr {rate} counts"
        )
    if schedule["min_lr"] > rate:
        notes.append(
            f"schedular.min_lr {schedule['min_lr']} is above optimizer.lr {rate}: the rate will rise"
        )
    if schedule["warmup_epochs"] and schedule["warmup_lr"] > rate:
        notes.append(
            f"schedular.warmup_lr {schedule['warmup_lr']} is above optimizer.lr {rate}: the warm-up goes down"
        )
    return notes


def _unused(table: dict[str, Key], section: str = "") -> set[str]:
    """Return the names of the keys without effect."""
    names = {section + name for name, key in table.items() if key.unused}
    inner = ((name, key.type) for name, key in table.items() if isinstance(key.type, dict))
    return names.union(*(_unused(keys, f"{section}{name}.") for name, keys in inner))


def _key_of(name: str, table: dict[str, Key]) -> Key:
    first, _, rest = name.partition(".")
    return _key_of(rest, table[first].type) if rest else table[first]


# ---- writing ----


def save_config(config: dict, output_dir: str) -> None:
    """Writes config.yaml with the git revision of the code as a comment."""
    with atomic_write(Path(output_dir) / "config.yaml", text=True) as file:
        file.write(f"# code revision: {code_revision()}\n")
        YAML(typ="safe", pure=True).dump(config, file)


def describe(table: dict[str, Key], section: str = "") -> list[str]:
    """Return Markdown table rows: key, default, values, meaning."""
    rows = []
    for name, key in table.items():
        if isinstance(key.type, dict):
            rows += describe(key.type, f"{section}{name}.")
        else:
            default = "required" if key.default is REQUIRED else f"`{key.default!r}`"
            rows.append(f"| `{section}{name}` | {default} | {expected(key)} | {key.help} |")
    return rows


def reference() -> str:
    """Return all keys as Markdown: tables that scripts share once, then what each script adds or changes."""
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
    head = ["", "| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    sections = {**shared, **own}
    return "\n\n".join("\n".join([f"### {title}", *head, *describe(sections[title])]) for title in sections)


if __name__ == "__main__":
    from launch import run_script

    run_script(lambda: print(reference()))
