"""Every key of every config: its type, its range or choices, its default, and a line of help."""

import sys
from dataclasses import dataclass, replace
from operator import ge, gt, le, lt

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
    items: types of what a list holds; root: of a path, "data" where it is relative to data_root or "other",
    "" where it is no path; unused: kept for published configs, without effect.

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
    root: str = ""
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


INIT_HELP = "the encoders whose weights below start training without --checkpoint: both, one, or none"


BERT_HELP = "JSON file, or the same as a mapping; text_layers_alone: 6 in it is ALBEF's layout, see method.md"


ENCODERS = {
    "image_res": Key(int, help="side of the square input in pixels", least=1),
    "vision_width": Key(int, 768, "width of the image encoder", least=1),
    "vit": Key(VIT, {}, "sizes of the image encoder"),
    "bert_config": Key((str, dict), BERT_CONFIG, BERT_HELP, root=OTHER),
    "momentum": Key(NUMBER, 0.995, "of the momentum twins", least=0, most=1),
    "alpha": Key(NUMBER, 0.4, "weight of the momentum targets", least=0, most=1),
    "init": Key(str, "pretrained", INIT_HELP, choices=("pretrained", "image", "text", "scratch")),
    "image_encoder": Key(str, "deit_base_patch16_224", "initial weights: timm name or file", root=OTHER),
    "text_encoder": Key(str, "bert-base-uncased", "tokenizer, weights: hub name or folder", root=OTHER),
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


SIDE_HELP = "images are not mirrored under texts with one of these; empty = English left and right"


PRECISION_HELP = "of training (fp16: with loss scaling) and of all scores but heat maps"


SHARED = {
    "optimizer": Key(OPTIMIZER),
    "schedular": Key(SCHEDULE),
    "data_root": Key(str, "", "folder of relative paths of data in this config; empty = the working folder"),
    "image_root": Key(str, "", IMAGE_ROOT_HELP, root=DATA),
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
    "side_words": Key(list, [], SIDE_HELP),
}


CROP = {"help": "smallest share of the image that a random crop keeps", "above": 0, "most": 1}


CODES_HELP = "dalle: encoder.pkl; flava: hub name or folder; kmeans: codebook file, made when missing"


IMAGE_TOKENIZER = {
    "kind": Key(str, "dalle", "the network it is", choices=("dalle", "flava", "kmeans")),
    "path": Key(str, "", CODES_HELP, root=OTHER),
    "vocab_size": Key(int, 8192, "visual tokens", least=2),
}


DISTILL = "soft word targets over the sequence, not the vocabulary"


FROZEN = "captions of one image are negatives once in the queue"


LOSS_WEIGHTS = {
    name: Key(NUMBER, 1, f"of {what}; 0 = not computed", least=0)
    for name, what in (
        ("ita", "the contrast"),
        ("itm", "matching"),
        ("mlm", "masked words"),
        ("mim", "masked patches"),
        ("psl", "keywords"),
    )
}


MIXTURE_HELP = "annotation files and shards, or `[{path: ..., weight: ...}, ...]`"


PRETRAIN = {
    **ENCODERS,
    **CONTRAST,
    **SHARED,
    "train_file": Key(PATHS, help=MIXTURE_HELP, items=(str, dict), root=DATA),
    "samples_per_epoch": Key(int, 0, "of all ranks together; 0 = all there are", least=0, most=10**9),
    "batch_size": Key(int, 64, "per rank", least=1),
    "loss_weights": Key(LOSS_WEIGHTS, {}, "in the sum that is trained; the log has the losses as they are"),
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


SCORES = ("itm", "itc", "itm+itc")


RETRIEVAL = {
    **FINETUNE,
    **CONTRAST,
    "train_file": Key(PATHS, [], "annotation files of fine-tuning", root=DATA),
    "val_file": Key(str, "", "annotation file; chooses the best checkpoint", root=DATA),
    "test_file": Key(str, help="annotation file", root=DATA),
    "k_test": Key(int, 256, "candidates re-ranked for each query", least=1),
    "score": Key(str, "itm", "what ranks: matching (candidates alone), contrast, or both", choices=SCORES),
    "score_itc_weight": Key(NUMBER, 1, "of the cosine beside the match logit in itm+itc", least=0, most=50),
    "save_scores": Key(bool, False, "with --evaluate: both score matrices go to result/retrieval_scores.pt"),
    # A config that only evaluates needs neither.
    "optimizer": Key({**OPTIMIZER, "lr": replace(OPTIMIZER["lr"], default=1e-5)}, {}),
    "schedular": Key({**SCHEDULE, "epochs": replace(SCHEDULE["epochs"], default=5)}, {}),
    "released_code": released(
        frozen_idx_queue=FROZEN, select_on_test="the best checkpoint is chosen by test recall"
    ),
}


TRAIN_FILE = Key(PATHS, help="annotation files", root=DATA)


BOXES_HELP = "folder with refcoco+/refs(unc).p, refcoco+/instances.json, ...; empty = entries have boxes"


GROUNDING = {
    **FINETUNE,
    **CONTRAST,
    "train_file": TRAIN_FILE,
    "test_file": Key(PATHS, help="annotation files of all evaluation splits", root=DATA),
    "refcoco_data": Key(str, "", BOXES_HELP, root=DATA),
    "det_file": Key(str, "", "detector boxes; empty = boxes from the heat map alone", root=DATA),
    "coco_file": Key(str, "", "kept for published configs; no score uses it", root=DATA, unused=True),
    "released_code": released(frozen_idx_queue=FROZEN),
}


VQA = {
    **FINETUNE,
    "train_file": TRAIN_FILE,
    "val_file": Key(str, "", "annotation file with answers; scored after every epoch", root=DATA),
    "test_file": Key(PATHS, help="annotation files; with answers the accuracy is reported", root=DATA),
    "vqa_root": Key(str, "", "as image_root, for entries of data set vqa", root=DATA),
    "vg_root": Key(str, "", "as image_root, for entries of data set vg", root=DATA),
    "answer_list": Key(str, "", "JSON list of answers to rank; --inference generate needs none", root=DATA),
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
    "val_file": Key(PATHS, help="annotation files; choose the best checkpoint", root=DATA),
    "test_file": Key(PATHS, help="annotation files", root=DATA),
    "sentence_only": Key(bool, False, "a baseline: all images are the mean colour, in training and scores"),
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


TABLES = {  # of the script without .py
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
    return ", ".join(f"{task}.py" for task, known in TABLES.items() if known is table)


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
    for table in TABLES.values():
        sections[scripts_of(table)] = {name: key for name, key in table.items() if id(key) not in shared}
    head = ["", "| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    return "\n\n".join("\n".join([f"## {title}", *head, *describe(sections[title])]) for title in sections)
