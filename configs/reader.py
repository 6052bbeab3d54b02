"""Reads a YAML file and overrides into a checked dict; the keys are in schema.py."""

import argparse
import copy
import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from simla.configs.schema import (
    BERT_CONFIG,
    DATA,
    EMPTY,
    NUMBER,
    REQUIRED,
    TABLES,
    TYPES,
    Key,
    Table,
    flat,
    is_finite,
    scripts_of,
)
from simla.models.bert_config import BertConfig
from simla.utils import UserError, fill_in, is_url

PUBLISHED = {  # keys of published configs: what they are called here; none: no script of the task reads them
    "batch_size": ("batch_size_train", "batch_size_test"),
    "image_tokenizer_path": ("image_tokenizer",),
    **dict.fromkeys(("mlm_probability", "eval_ema", "save_sims"), ()),
}
OF_CONFIG = {"NLVR_Pretrain": "Pretrain_NLVR"}  # a published config that is not called as its script
YES, NO = ("yes", "on", "true"), ("no", "off", "false")


# ---- the command line ----


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add --overrides, which may be given several times."""
    text = "config values, a.b=c, also after several --overrides; the last one of a key counts"
    parser.add_argument("--overrides", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help=text)


def task_name(text: str) -> str:
    """Return the task that a command line means by the name of its script, with or without .py, or config."""
    name = text.removesuffix(".py")
    return OF_CONFIG.get(name, name)


def task_of(config_file: str) -> str | None:
    """Return the task that the file is named after, as those of configs/ are: Retrieval_coco.yaml."""
    stem = f"{Path(config_file).stem.lower()}_"
    fitting = [name for name in (*TABLES, *OF_CONFIG) if stem.startswith(f"{name.lower()}_")]
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
    own_root = values.get("data_root")
    overrides = [re.sub(r"^scheduler(?=[.=])", "schedular", override) for override in overrides or []]
    for override in overrides:
        _override(values, override)
    given = {name for override in overrides for name in _names(override)}
    config = check_values(values, table, path, hint=hint, files=files | dict.fromkeys(given, path))
    _check_fit(config, path)
    for name, key in flat(table).items():
        if key.unused and name in given:
            raise UserError(f"--overrides {name} has no effect: {key.help}")
    notes += _notes_on_rates(config, files | dict.fromkeys(given, "--overrides"))
    if config["data_root"]:  # absolute, so that the copy beside the results can be read again
        config["data_root"] = str(Path(fill_in(config["data_root"])).absolute())
    unmoved = _resolve(config, Key(table), "")
    config = _resolve(config, Key(table), config["data_root"])
    is_moved = "data_root" in given and values["data_root"] not in ("", own_root)
    if is_moved and config["image_root"] and config == unmoved:
        raise UserError(
            f"--overrides data_root has no effect: all paths of data in {path} are absolute, such as "
            f"image_root {config['image_root']}"
        )
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
            is_emptied = name == "wandb" and not value  # of keys that are not ours
            values[name] = dict(before) if isinstance(before, dict) and not is_emptied else {}
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
    if not own or (named and TABLES[named] is table):
        return ""
    fitting = {
        scripts_of(other): None
        for other in TABLES.values()
        if not _missing(values, other) and not set(values) - set(other) - set(PUBLISHED)
    }
    if named and scripts_of(TABLES[named]) in fitting:
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
    try:
        value = YAML(typ="safe", pure=True).load(value)
    except YAMLError as error:
        raise UserError(f"--overrides {text}: {value!r} is not valid YAML") from error
    known = [*BertConfig.__dataclass_fields__, "hidden_act"]
    for size in (key.removeprefix("bert_config.") for key in _names(text) if key.startswith("bert_config.")):
        if size not in known:  # one in the file is passed over
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
    _lay_over(values, {leaf: value}, "--overrides", {})  # of a section the keys named alone


def _names(override: str) -> Iterator[str]:
    """Yield the names that an override sets: of a section also those in it."""
    name, _, text = override.partition("=")
    yield name
    value = YAML(typ="safe", pure=True).load(text)
    if isinstance(value, dict):
        yield from (f"{name}.{inner}" for inner in value)


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
    if isinstance(value, dict) and key.root == DATA:
        return {name: _resolve(part, key, data_root) for name, part in value.items()}
    if not key.root or not isinstance(value, str) or not value or is_url(value):
        return value
    return str(Path(data_root) / fill_in(value)) if key.root == DATA else fill_in(value)


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
            "loss_weights" in config and not any(config["loss_weights"].values()),
            "loss_weights are all 0, which trains nothing; leave one above 0",
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
            from simla.optim import check_settings

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
