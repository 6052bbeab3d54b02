"""Every key of a config, with its range and default; the reader, from YAML and overrides to a checked dict.

`python config.py` prints the keys for the README.
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
from operator import ge, gt, le, lt
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from models.bert import BertConfig
from utils import UserError, fill_in, is_url

# ======== the keys ========

REQUIRED = object()
EMPTY = ("", [], {})
NUMBER = (float, int)
PATHS = (str, list)
DATA, OTHER = "data", "other"  # paths relative to data_root, or to the folder the script is started in
BERT_CONFIG = "configs/config_bert.json"
TYPES = {int: "an int", float: "a number", str: "text", bool: "true or false"}
TYPES |= {list: "a list", dict: "a mapping"}
BOUNDS = {"least": ("at least", ge), "above": ("above", gt), "most": ("at most", le), "below": ("below", lt)}


def is_finite(value: float) -> bool:
    """Return whether it is finite as a float: an int may be larger than any, where math.isfinite fails."""
    return abs(value) <= sys.float_info.max


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

    @property
    def types(self) -> tuple:
        return self.type if isinstance(self.type, tuple) else (self.type,)

    def allows(self, value: float) -> bool:
        """Return whether the number is finite and in the range."""
        return is_finite(value) and all(
            getattr(self, name) is None or holds(value, getattr(self, name))
            for name, (_, holds) in BOUNDS.items()
        )

    @property
    def range(self) -> str:
        """Return the range in words, "" for any number."""
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        bounds = ((words, getattr(self, name)) for name, (words, _) in BOUNDS.items())
        return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)

    @property
    def expected(self) -> str:
        """Return in words what a value has to be."""
        if self.choices:
            return ", ".join(self.choices)
        words = "a number" if self.types == NUMBER else " or ".join(TYPES[kind] for kind in self.types)
        words += " of numbers" if self.items == NUMBER else ""
        return ", ".join(filter(None, [words, self.range]))


Table = dict[str, Key]


def released(**switches: str) -> Key:
    """Return the section of the task's switches, off by default, each with its help."""
    switches["flip_captions"] = "flip images under texts that say left or right"
    table = {name: Key(bool, False, text) for name, text in switches.items()}
    return Key(table, {}, "true = as the published code does, false = as the paper says")


RATE = {"least": 0, "most": 10}  # above it a learning rate lacks its minus: 1e4 for 1e-4
UNUSED = {"least": 0, "unused": True}
OPTIMIZER = {
    "opt": Key(str, "adamW", "any optimiser timm knows"),
    "lr": Key(NUMBER, help="learning rate", above=0, most=RATE["most"]),
    "weight_decay": Key(NUMBER, 0.02, "not for biases and one-dimensional parameters", least=0, most=10),
    "eps": Key(NUMBER, 1e-8, "added to the denominator of the update", above=0, most=1),
    "betas": Key(list, [0.9, 0.999], "of the moments: two, of adan three", items=NUMBER, least=0, below=1),
}
SCHEDULE = {
    "sched": Key(str, "cosine", choices=("cosine",)),
    "lr": Key(NUMBER, 0, "kept for published configs; optimizer.lr counts", **UNUSED),
    "epochs": Key(int, help="length of the run", least=1),
    "min_lr": Key(NUMBER, 1e-5, "rate of epoch number `epochs`, one after the last: no epoch has it", **RATE),
    "decay_rate": Key(NUMBER, 1, "kept for published configs; cosine does not use it", **UNUSED),
    "warmup_lr": Key(NUMBER, 1e-5, "learning rate of the first steps, where warmup_epochs is not 0", **RATE),
    "warmup_epochs": Key(int, 0, "warm-up steps inside epoch 0, which end where it ends", least=0),
    "warmup_step_size": Key(int, 100, "iterations per warm-up step", least=1),
    "cooldown_epochs": Key(int, 0, "kept for published configs; cosine does not use it", **UNUSED),
}
VIT = {
    "depth": Key(int, 12, "transformer blocks", least=1, most=1000),
    "num_heads": Key(int, 12, "a divisor of vision_width", least=1),
    "patch_size": Key(int, 16, "pixels; a divisor of image_res", least=1),
    "mlp_ratio": Key(NUMBER, 4, "width of the feed-forward layers / vision_width", above=0, most=100),
    "qkv_bias": Key(bool, True, "queries, keys and values have a bias"),
    "norm_eps": Key(NUMBER, 1e-6, "of LayerNorm", above=0, below=1),
}
INIT_HELP = "weights without --checkpoint: image_encoder and text_encoder below, or random ones"
ENCODERS = {
    "image_res": Key(int, help="side of the square input in pixels", least=1),
    "vision_width": Key(int, 768, "width of the image encoder", least=1),
    "vit": Key(VIT, {}, "sizes of the image encoder"),
    "bert_config": Key((str, dict), BERT_CONFIG, "JSON file, or the same as a mapping", place=OTHER),
    "momentum": Key(NUMBER, 0.995, "of the momentum twins", least=0, most=1),
    "alpha": Key(NUMBER, 0.4, "weight of the momentum targets", least=0, most=1),
    "init": Key(str, "pretrained", INIT_HELP, choices=("pretrained", "scratch")),
    "image_encoder": Key(str, "deit_base_patch16_224", "initial weights: timm name or file", place=OTHER),
    "text_encoder": Key(str, "bert-base-uncased", "tokenizer, weights: hub name or folder", place=OTHER),
}
CONTRAST = {
    "embed_dim": Key(int, 256, "shared embedding of the contrast", least=1),
    "temp": Key(NUMBER, 0.07, "temperature at the start, then learned in this range", least=0.001, most=0.5),
    "queue_size": Key(int, 65536, "momentum features kept for the contrast", least=1),
}
IMAGE_ROOT_HELP = "folder of relative image paths; empty = data_root, or without one the annotation file's"
RANDAUGMENT = {
    "num_ops": Key(int, 2, "operations drawn for an image, each done with probability 0.5", least=0),
    "magnitude": Key(int, 7, "their strength", least=0, most=10),
}
PRECISION_HELP = "of training (fp16: with loss scaling) and of all scores but heat maps"
SHARED = {
    "optimizer": Key(OPTIMIZER),
    "schedular": Key(SCHEDULE),
    "data_root": Key(str, "", "folder of relative paths of data in this config; empty = the working folder"),
    "image_root": Key(str, "", IMAGE_ROOT_HELP, place=DATA),
    "num_workers": Key(int, 4, "data-loading processes per rank", least=0, most=1000),
    "batch_timeout_minutes": Key(NUMBER, 8, "a run ends when no batch comes for so long; 0 = never", least=0),
    "log_steps": Key(int, 50, "steps between two log lines", least=1),
    "precision": Key(str, "fp32", PRECISION_HELP, choices=("fp32", "tf32", "bf16", "fp16")),
    "compile": Key(bool, False, "torch.compile the encoders' layers"),
    "checkpoint_activations": Key(bool, False, "layers are computed twice: less memory, more time"),
    "grad_accumulation_steps": Key(int, 1, "batches whose mean gradient makes one step", least=1),
    "clip_grad_norm": Key(NUMBER, 0, "longest gradient, longer ones are shortened; 0 = any", least=0),
    "save_every_steps": Key(int, 0, "checkpoints within an epoch; 0 = none", least=0),
    "save_every_minutes": Key(NUMBER, 0, "as save_every_steps, by the clock", least=0),
    "keep_last": Key(int, 2, "newest checkpoints kept, beside the best, or those of every epoch", least=1),
    "stop_grace_seconds": Key(NUMBER, 60, "after a stop signal a step is waited for so long", least=0),
    "wandb": Key(dict, {}, "all keys go to wandb.init, `{project: ...}`; empty = no Weights & Biases"),
    "max_nonfinite_steps": Key(
        int, 5, "a run stops after so many steps in a row with no finite loss", least=1
    ),
    "max_bad_fraction": Key(NUMBER, 0.05, "share of unreadable images that ends a run", least=0, most=1),
    "randaugment": Key(RANDAUGMENT, {}),
}
CROP = {"help": "smallest share of the image that a random crop keeps", "above": 0, "most": 1}
CODES_HELP = "dalle: encoder.pkl; flava: hub name or folder; kmeans: codebook file, made when missing"
IMAGE_TOKENIZER = {
    "kind": Key(str, "dalle", "the network it is", choices=("dalle", "flava", "kmeans")),
    "path": Key(str, "", CODES_HELP, place=OTHER),
    "vocab_size": Key(int, 8192, "visual tokens", least=2),
}
DISTILL = "soft word targets over the sequence, not the vocabulary"
FROZEN = "captions of one image are negatives once in the queue"
MIXTURE_HELP = "annotation files and shards, or `[{path: ..., weight: ...}, ...]`"
PRETRAIN = {
    **ENCODERS,
    **CONTRAST,
    **SHARED,
    "train_file": Key(PATHS, help=MIXTURE_HELP, items=(str, dict), place=DATA),
    "samples_per_epoch": Key(int, 0, "of all ranks together; 0 = all there are", least=0, most=10**9),
    "batch_size": Key(int, 64, "per rank", least=1),
    "mlm_probability": Key(NUMBER, 0.15, "share of words masked", least=0, most=1),
    "max_tokens": Key(int, 25, "captions are cut to this many tokens, [CLS] included", least=2),
    "num_masking_patches": Key(int, 75, "patches hidden from MIM, of (image_res / patch_size)²", least=1),
    "min_num_patches": Key(int, 16, "smallest block of hidden patches", least=1),
    "min_crop_scale": Key(NUMBER, 0.2, **CROP),
    "image_tokenizer": Key(IMAGE_TOKENIZER, {}, "gives the MIM targets"),
    "released_code": released(
        mlm_distill_over_sequence=DISTILL,
        mim_independent_views="the image tokenizer sees a crop of its own",
        psl_padding="[PAD] can become a keyword",
    ),
}
FINETUNE = {
    **ENCODERS,
    **SHARED,
    "batch_size_train": Key(int, 32, "per rank", least=1),
    "batch_size_test": Key(int, 64, "per rank", least=1),
    "warm_up": Key(bool, False, "alpha ramps from 0 in epoch 0"),
    "distill": Key(bool, True, "false = no momentum targets, as alpha 0"),
    "vit_mask_token": Key(bool, False, "the image encoder has the mask token of pre-training"),
    "min_crop_scale": Key(NUMBER, 0.5, **CROP),
    "skip_unreadable": Key(bool, False, "evaluation leaves out unreadable images; false = it stops"),
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
    "released_code": released(
        frozen_idx_queue=FROZEN, select_on_test="the best checkpoint is chosen by test recall"
    ),
}
TRAIN_FILE = Key(PATHS, help="annotation files", place=DATA)
BOXES_HELP = "folder with refcoco+/refs(unc).p and refcoco+/instances.json; empty = entries have boxes"
GROUNDING = {
    **FINETUNE,
    **CONTRAST,
    "train_file": TRAIN_FILE,
    "test_file": Key(PATHS, help="annotation files of all three evaluation splits", place=DATA),
    "refcoco_data": Key(str, "", BOXES_HELP, place=DATA),
    "det_file": Key(str, "", "detector boxes; empty = boxes from the heat map alone", place=DATA),
    "coco_file": Key(str, "", "kept for published configs; no score uses it", place=DATA, unused=True),
    "released_code": released(frozen_idx_queue=FROZEN),
}
VQA = {
    **FINETUNE,
    "train_file": TRAIN_FILE,
    "val_file": Key(str, "", "annotation file with answers; scored after every epoch", place=DATA),
    "test_file": Key(PATHS, help="annotation files; with answers the accuracy is reported", place=DATA),
    "vqa_root": Key(str, "", "as image_root, for entries of data set vqa", place=DATA),
    "vg_root": Key(str, "", "as image_root, for entries of data set vg", place=DATA),
    "answer_list": Key(str, "", "JSON list of answers to rank; --inference generate needs none", place=DATA),
    "k_test": Key(int, 128, "answers that the whole sequence re-scores", least=1),
    "eos": Key(str, "[SEP]", "written after every answer"),
    "decoder_layers": Key(int, 0, "of the answer decoder; 0 = the upper half of the text encoder's", least=0),
    "num_beams": Key(int, 3, "of --inference generate", least=1),
    "max_answer_tokens": Key(int, 10, "of --inference generate", least=1),
    "num_top_answers": Key(int, 5, "answers with probabilities in the result file", least=1),
    "max_tokens": Key(int, 25, "training questions are cut to this many tokens, [CLS] included", least=2),
    "released_code": released(
        vqa_no_distill="the answer decoder is trained without momentum targets",
        mlm_distill_over_sequence=DISTILL,
    ),
}
VE = {
    **FINETUNE,
    "train_file": TRAIN_FILE,
    "val_file": Key(PATHS, help="annotation files; choose the best checkpoint", place=DATA),
    "test_file": Key(PATHS, help="annotation files", place=DATA),
    "released_code": released(),
}
NLVR = {
    **VE,
    "released_code": released(nlvr_teacher_unloaded="the momentum twins start without the checkpoint"),
}
PRETRAIN_NLVR = {
    **FINETUNE,
    **CONTRAST,
    "train_file": TRAIN_FILE,
    "max_tokens": PRETRAIN["max_tokens"],
    "min_crop_scale": PRETRAIN["min_crop_scale"],
    "released_code": released(),
}
TASKS = {  # of the script without .py
    "Pretrain": PRETRAIN,
    "Retrieval": RETRIEVAL,
    "zero_shot_retrieval": RETRIEVAL,
    "Grounding": GROUNDING,
    "VQA": VQA,
    "Pretrain_NLVR": PRETRAIN_NLVR,
    "NLVR": NLVR,
    "VE": VE,
}


def scripts_of(table: Table) -> str:
    """Return the names of the scripts that read the table, "Retrieval.py, zero_shot_retrieval.py"."""
    return ", ".join(f"{task}.py" for task, known in TASKS.items() if known is table)


def flat(table: Table, section: str = "") -> dict[str, Key]:
    """Return all keys of the table by their whole names, section.key."""
    keys = {}
    for name, key in table.items():
        inner = isinstance(key.type, dict)
        keys |= flat(key.type, f"{section}{name}.") if inner else {section + name: key}
    return keys


def describe(table: Table) -> list[str]:
    """Return Markdown table rows: key, default, values, meaning."""
    rows = []
    for name, key in flat(table).items():
        default = "required" if key.default is REQUIRED else f"`{key.default!r}`"
        rows.append(f"| `{name}` | {default} | {key.expected} | {key.help} |")
    return rows


def reference() -> str:
    """Return all keys as Markdown: tables that scripts share once, then what each script adds or changes."""
    common = {**ENCODERS, **SHARED}
    sections = {
        "Every script": common,
        "Pretrain.py, Retrieval.py, zero_shot_retrieval.py, Grounding.py, Pretrain_NLVR.py": CONTRAST,
        "Every script but Pretrain.py": {name: FINETUNE[name] for name in FINETUNE if name not in common},
    }
    shared = {id(key) for table in sections.values() for key in table.values()}
    for table in TASKS.values():
        sections[scripts_of(table)] = {name: key for name, key in table.items() if id(key) not in shared}
    head = ["", "| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    return "\n\n".join("\n".join([f"### {title}", *head, *describe(sections[title])]) for title in sections)


# ======== the reader ========

PUBLISHED = {  # keys of published configs: what they are called here; none: no script of the task reads them
    "batch_size": ("batch_size_train", "batch_size_test"),
    "image_tokenizer_path": ("image_tokenizer",),
    **dict.fromkeys(("mlm_probability", "eval_ema", "save_sims"), ()),
}
YES, NO = ("yes", "on", "true"), ("no", "off", "false")


# ---- the command line ----


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add --overrides, which may be given several times."""
    text = "config values, a.b=c, also after several --overrides; the last one of a key counts"
    parser.add_argument("--overrides", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help=text)


def task_name(text: str) -> str:
    """Return the task that a command line means by the name of its script, with or without .py, or config."""
    name = text.removesuffix(".py")
    return "Pretrain_NLVR" if name == "NLVR_Pretrain" else name


def task_of(config_file: str) -> str | None:
    """Return the task that the file is named after, as those of configs/ are: Retrieval_coco.yaml."""
    stem = f"{Path(config_file).stem.lower()}_"
    fitting = [name for name in (*TASKS, "NLVR_Pretrain") if stem.startswith(f"{name.lower()}_")]
    return task_name(max(fitting, key=len)) if fitting else None


def parse(parser: argparse.ArgumentParser, table: Table) -> tuple[argparse.Namespace, dict]:
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
    """Raise UserError where a rank's batches, of the config at `path`, can hold no negatives for the matching
    loss: `least` images are needed.
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
    path: str, table: Table, overrides: list[str] | None = None, notes: list[str] | None = None
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
    hint = _other_task(read_yaml(path), table, path)
    for file, layer in _read_layers(path):
        _lay_over(values, _from_published(layer, table, file, notes), file, files)
    overrides = [re.sub(r"^scheduler(?=[.=])", "schedular", override) for override in overrides or []]
    for override in overrides:
        _override(values, override)
    given = {override.partition("=")[0] for override in overrides}
    config = check_values(values, table, path, hint=hint, files=files | dict.fromkeys(given, path))
    _check_fit(config, path)
    for name, key in flat(table).items():
        if key.unused and name in given:
            raise UserError(f"--overrides {name} has no effect: {key.help}")
    notes += _notes_on_rates(config, files | dict.fromkeys(given, "--overrides"))
    if config["data_root"]:  # absolute, so that the copy beside the results can be read again
        config["data_root"] = str(Path(fill_in(config["data_root"])).absolute())
    config = _resolve(config, Key(table), config["data_root"])
    config["image_root"] = config["image_root"] or config["data_root"]
    return config


def read_yaml(path: str | Path) -> dict:
    """Return the mapping in a YAML file, laid over that of the file that its `base` names. Raises UserError,
    with the line, for what is none.
    """
    values = {}
    for file, layer in _read_layers(str(path)):
        _lay_over(values, layer, file, {})
    return values


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
    if not Path(base).exists():
        raise UserError(f"config {path}: base {base} does not exist; paths start from the folder of {path}")
    if any(Path(base).samefile(variant) for variant in (*variants, path)):
        raise UserError(f"config {path}: base {base} is itself based on {path}; take one `base` away")
    return [*_read_layers(base, (*variants, path)), (path, values)]


def _read_one(path: str) -> dict:
    try:
        values = YAML(typ="safe", pure=True).load(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from error
    except DuplicateKeyError as error:  # ruamel goes on about how to allow it
        problem = error.problem.replace("found duplicate key", "there already is a key")
        line = error.problem_mark.line + 1
        raise UserError(f"config {path}, line {line}: {problem}; keep one of them") from error
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


def _lay_over(values: dict, layer: dict, file: str, files: dict[str, str], section: str = "") -> None:
    """Put the keys of a file into `values`, in sections one by one, and note in `files` where each stands."""
    for name, value in layer.items():
        files[f"{section}{name}"] = file
        if isinstance(value, dict):
            before = values.get(name)
            if name == "bert_config" and isinstance(before, str):
                before = _read_bert_config(before)
            values[name] = dict(before) if isinstance(before, dict) else {}
            _lay_over(values[name], value, file, files, f"{section}{name}.")
        else:
            values[name] = value


def weighted(train_file: str | list) -> tuple[list[list[str]], list[float]]:
    """Return the paths of each data set of config `train_file`, and its weight; paths without weights are one
    set. Raises UserError where it is neither paths nor a list of {path: ..., weight: ...}.
    """
    listed = train_file if isinstance(train_file, list) else [train_file]
    if not listed:
        raise UserError("train_file is empty; name annotation files or shards")
    if all(isinstance(path, str) for path in listed):
        return [listed], [1.0]
    paths, weights = [], []
    for number, item in enumerate(listed):
        if not isinstance(item, dict) or set(item) != {"path", "weight"}:
            raise UserError(f"train_file: entry {number} must be {{path: ..., weight: ...}}, found {item!r}")
        path, weight = item["path"], item["weight"]
        path, where = path if isinstance(path, list) else [path], f"of entry {number} must be"
        if not path or not all(isinstance(one, str) for one in path):
            raise UserError(f"train_file: path {where} a path or a list of some, found {path!r}")
        if not _is_a(weight, NUMBER) or not 0 < weight <= 1e12:
            raise UserError(f"train_file: weight {where} above 0, at most 1e12, found {weight!r}")
        paths.append(path)
        weights.append(weight)
    return paths, weights


def _from_published(values: dict, table: Table, path: str, notes: list[str]) -> dict:
    """Return what a published config of the task says in the keys of ours; what there is to say on it goes
    into `notes`.
    """
    for old, new in PUBLISHED.items():
        if old not in values or old in table or not table.keys() >= set(new):
            continue
        if both := [name for name in new if name in values]:
            raise UserError(f"config {path}: has both {old} and {both[0]}; keep {both[0]}")
        value = values.pop(old)
        if old == "image_tokenizer_path":  # the folder of OpenAI's file
            value = {"path": f"{str(value).rstrip('/')}/encoder.pkl"}
        values |= dict.fromkeys(new, value)
        meaning = f"is read as {' and '.join(new)}" if new else "has no effect on this task"
        notes.append(f"config {path}: {old} {meaning}")
    return values


def _other_task(values: dict, table: Table, path: str) -> str:
    """Return "this looks like a config of ..." where another task's keys fit and this one's do not, else "".

    Raises UserError where both fit, but the file is named after the other task.
    """
    named, own = task_of(path), scripts_of(table)
    if not own or (named and TASKS[named] is table):
        return ""
    fitting = {
        scripts_of(other): None
        for other in TASKS.values()
        if not _missing(values, other) and not set(values) - set(other) - set(PUBLISHED)
    }
    if named and scripts_of(TASKS[named]) in fitting:
        if own in fitting:
            raise UserError(
                f"config {path}: this looks like a config of {named}.py, not of {own}; rename it if it is not"
            )
        return f"this looks like a config of {named}.py"
    return f"this looks like a config of {' or '.join(fitting)}" if fitting else ""


def _override(values: dict, text: str) -> None:
    """Set the value of a.b=c."""
    name, separator, value = text.partition("=")
    if not separator or not all(name.split(".")):
        raise UserError(f"--overrides {text}: expected key=value, for example schedular.epochs=10")
    if name.startswith("bert_config."):
        known = [*BertConfig.__dataclass_fields__, "hidden_act"]
        if (size := name.removeprefix("bert_config.")) not in known:  # one in the file is passed over
            hint = _nearest(size, known, "bert_config.") or f"sizes that count: {', '.join(known)}"
            raise UserError(f"--overrides {text} has no effect; {hint}")
        if isinstance(sizes := values.get("bert_config", BERT_CONFIG), str):
            values["bert_config"] = _read_bert_config(sizes)
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
    """Return the JSON file as a mapping, in which single values can be overridden."""
    try:
        return json.loads(Path(fill_in(path)).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"bert_config {path} cannot be read as JSON: {error}") from error


def _resolve(value: object, key: Key, data_root: str) -> object:
    """Return the value with ~ and environment variables filled in in every path, those of data at their place
    in data_root. What is empty stays empty, absolute paths and what is no path stay as they are.
    """
    if isinstance(key.type, dict):
        return {name: _resolve(value[name], inner, data_root) for name, inner in key.type.items()}
    if isinstance(value, list):
        return [_resolve(part, key, data_root) for part in value]
    if isinstance(value, dict) and key.place == DATA:
        return {name: _resolve(part, key, data_root) for name, part in value.items()}
    if not key.place or not isinstance(value, str) or not value or is_url(value):
        return value
    return str(Path(data_root) / fill_in(value)) if key.place == DATA else fill_in(value)


# ---- checking ----


def check_values(
    values: dict, table: Table, path: str, section: str = "", hint: str = "", files: dict | None = None
) -> dict:
    """Return the values of a config, or of its section "name.", with defaults filled in; see `read_config`
    for what it raises. `path` says where they come from, but those named in `files` from there; hint: what
    else to say about unknown and missing keys.
    """
    files = files or {}
    for name in values:
        if name not in table:
            about = hint or _nearest(name, table, section) or f"known keys: {', '.join(table)}"
            where = files.get(section + str(name), path)
            raise UserError(f"config {where}: unknown key {section}{name}; {about}")
    if missing := [section + name for name in _missing(values, table)]:
        what = f"missing {'key' if len(missing) == 1 else 'keys'} {', '.join(missing)}"
        raise UserError(f"config {path}: {what}" + f"; {hint}" * bool(hint))
    return {
        name: _check_value(values.get(name, key.default), key, path, section + name, files)
        for name, key in table.items()
    }


def _missing(values: dict, table: Table) -> list[str]:
    return [name for name, key in table.items() if key.default is REQUIRED and name not in values]


def _nearest(word: object, known: Iterable[str], section: str = "") -> str:
    """Return "did you mean ...?" for what may be a slip, else ""."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {section}{near[0]}?" if near else ""


def _check_value(value: object, key: Key, path: str, name: str, files: dict) -> object:
    value, path = _as_meant(value, key), files.get(name, path)
    items = value if isinstance(value, list) else []

    def refuse(problem: str, hint: str = "") -> None:
        raise UserError(f"config {path}: {name}{problem}" + f"; {hint}" * bool(hint))

    if isinstance(key.type, dict):
        if not isinstance(value, dict):
            refuse(f" must be a section of keys, found {value!r}")
        return check_values(value, key.type, path, name + ".", files=files)
    if (value is None or value in ("", [])) and key.default not in EMPTY:
        refuse(f" is empty; expected {key.expected}")
    if not _is_a(value, key.types):
        quotes = "a name that looks like something else goes in quotes" if str in key.types else ""
        refuse(f" must be {key.expected}, found {value!r}", quotes)
    if any("\0" in text for text in _texts(value)):
        refuse(f" holds the character NUL, which no path can: {value!r:.200}")
    for number, item in enumerate(items):
        if not _is_a(item, key.items) or item in EMPTY:
            wanted = " or ".join(dict.fromkeys(TYPES[kind] for kind in key.items if kind is not int))
            refuse(f": item {number} must be {wanted}, found {item!r}")
    for one in items or [value]:
        if _is_a(one, NUMBER) and not key.allows(one):
            wanted = filter(None, [key.range, "finite" * (not is_finite(one))])
            refuse(f" must be {' and '.join(wanted)}, found {one!r:.50}")
    if key.choices and value not in key.choices:
        refuse(f" must be one of {key.expected}, found {value!r}", _nearest(value, key.choices))
    return value


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
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


def _check_fit(config: dict, path: str) -> None:
    """Raise UserError where values that are right by themselves do not fit together."""
    vit, resolution, width = config["vit"], config["image_res"], config["vision_width"]
    patch, heads, ratio = vit["patch_size"], vit["num_heads"], vit["mlp_ratio"]
    grid, masked = resolution // patch, config.get("num_masking_patches", 0)
    optimizer, codes = config["optimizer"], config.get("image_tokenizer", {"kind": ""})
    is_adamw = optimizer["opt"].lower() == "adamw"
    for is_wrong, problem in (
        (resolution % patch, f"image_res {resolution} is not a multiple of vit.patch_size {patch}"),
        (width % heads, f"vision_width {width} is not a multiple of vit.num_heads {heads}"),
        (
            int(width * ratio) < 1,
            f"vit.mlp_ratio {ratio} of vision_width {width} leaves the feed-forward layers empty",
        ),
        (
            masked > grid**2,
            f"num_masking_patches {masked} exceeds the {grid} x {grid} patches; lower it or raise image_res",
        ),
        (
            codes["kind"] == "kmeans" and not codes["path"].endswith(".safetensors"),
            f"image_tokenizer.path of kmeans must name a .safetensors file, found {codes.get('path')!r}",
        ),
        (
            is_adamw and len(optimizer["betas"]) != 2,
            f"optimizer.betas must be two numbers, found {optimizer['betas']!r}",
        ),
    ):
        if is_wrong:
            raise UserError(f"config {path}: {problem}")
    try:
        if "samples_per_epoch" in config:
            weighted(config["train_file"])
        if not is_adamw:
            from optim import check_settings  # here, because it imports timm, which takes seconds

            check_settings(optimizer)
    except UserError as error:
        raise UserError(f"config {path}: {error}") from error


def _notes_on_rates(config: dict, files: dict[str, str]) -> Iterator[str]:
    """Yield what may not be meant; a second rate that stands elsewhere than the first is no slip."""
    rate, schedule = config["optimizer"]["lr"], config["schedular"]
    where = files.get("schedular.lr")
    if schedule["lr"] not in (0, rate) and where == files.get("optimizer.lr"):
        yield f"config {where}: schedular.lr {schedule['lr']} has no effect; optimizer.lr {rate} counts"
    rises = f"is above optimizer.lr {rate}: the"
    if schedule["min_lr"] > rate:
        yield f"schedular.min_lr {schedule['min_lr']} {rises} rate will rise"
    if schedule["warmup_epochs"] and schedule["warmup_lr"] > rate:
        yield f"schedular.warmup_lr {schedule['warmup_lr']} {rises} warm-up goes down"


if __name__ == "__main__":
    from launch import run_script

    run_script(lambda: print(reference()))
