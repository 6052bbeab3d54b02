"""What a config may say: types, ranges, spellings, other people's configs, and what has no effect."""

import argparse
import json
import logging
import re
import shutil
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from tiny import ROOT, make_tiny

import Pretrain
from simla import utils
from simla.checkpoint import __main__ as checkpoint_tools
from simla.checkpoint.image_tokenizers import load_flava
from simla.checkpoint.initial import load_bert, load_vit
from simla.configs.reader import add_overrides, check_values, parse, read_config, task_name, task_of
from simla.configs.schema import EMPTY, NUMBER, TABLES, Key
from simla.dataset.check.__main__ import CHECKED
from simla.dataset.check.__main__ import main as check_main
from simla.dataset.check.tasks import SPLITS
from simla.dataset.text import build_tokenizer
from simla.engine.launch import script_arguments
from simla.models.bert_config import BertConfig
from simla.scheduler import WarmupCosine
from simla.utils import UserError

SHIPPED = {task: next((ROOT / "configs" / "demo").glob(f"{task}.yaml"), None) for task in TABLES}
SHIPPED["Pretrain_NLVR"] = ROOT / "configs" / "demo" / "NLVR_Pretrain.yaml"
SHIPPED["zero_shot_retrieval"] = SHIPPED["Retrieval"]
PRETRAIN = str(ROOT / "configs" / "Pretrain.yaml")


def read(overrides: list[str], path: str = PRETRAIN, task: str = "Pretrain") -> dict:
    return read_config(path, TABLES[task], overrides)


def refusal(override: str, path: str = PRETRAIN, task: str = "Pretrain") -> str:
    with pytest.raises(UserError) as error:
        read([override], path, task)
    assert "\n" not in str(error.value)
    return str(error.value)


def numeric_keys(table: dict[str, Key], section: str = "") -> dict[str, Key]:
    found = {}
    for name, key in table.items():
        if isinstance(key.type, dict):
            found |= numeric_keys(key.type, f"{section}{name}.")
        elif key.type in (int, NUMBER):
            found[section + name] = key
    return found


# ---- ranges and choices ----


def test_every_number_has_a_range_and_is_finite():
    for task, table in TABLES.items():
        for name, key in numeric_keys(table).items():
            low = key.least if key.least is not None else key.above
            assert low is not None, f"{task}: {name} has no smallest value"
            wrong = [float("nan"), "nan", float("inf"), "-inf", -1e300, [1], {"a": 1}, True, "many"]
            wrong.append(low if key.above is not None else low - 1)
            high = key.most if key.most is not None else key.below
            wrong += [] if high is None else [high + 1]
            for value in wrong:
                with pytest.raises(UserError, match=f"{name} must be "):
                    check_values({name: value}, {name: key}, "c.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("momentum=995", "momentum must be from 0 to 1, found 995"),
        ("alpha=4", "alpha must be from 0 to 1"),
        ("mlm_probability=-1", "mlm_probability must be from 0 to 1"),
        ("min_crop_scale=3", "min_crop_scale must be above 0 and at most 1"),
        ("min_crop_scale=0", "min_crop_scale must be above 0 and at most 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be two numbers"),
        ("optimizer.betas=[0.9, 0.99, 0.9]", "optimizer.betas must be two numbers"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas must be at least 0 and below 1, found 1"),
        ("optimizer.betas=[0.9, b]", "optimizer.betas: item 1 must be a number, found 'b'"),
        (
            "init=scrach",
            "init must be one of pretrained, image, text, scratch, found 'scrach'; did you mean scratch?",
        ),
        ("image_tokenizer.kind=dale", "one of dalle, flava, kmeans, found 'dale'; did you mean dalle?"),
        ("optimizer.opt=adamm", "there is no optimiser 'adamm'; did you mean adam?"),
        ("optimizer.opt=adan", "adan does not take these settings"),  # wants three betas
        ("optimizer.opt=adahessian", "adahessian cannot take a step"),
        ("num_masking_patches=257", "num_masking_patches 257 exceeds the 16 x 16 patches"),
        ("vit.patch_size=15", "image_res 256 is not a multiple of vit.patch_size 15"),
        ("vit.num_heads=7", "vision_width 768 is not a multiple of vit.num_heads 7"),
        ("optimizer.lr=1e4", "optimizer.lr must be above 0 and at most 10"),
        ("optimizer.lr=0", "optimizer.lr must be above 0"),
        ("temp=7", "temp must be from 0.001 to 0.5"),
        ("image_tokenizer.kind=kmeans", "image_tokenizer.path of kmeans must name a .safetensors file"),
        ("precision=fp17", "precision must be one of fp32, tf32, bf16, fp16"),
        ("schedular.sched=step", "schedular.sched must be one of cosine"),
        ("max_tokens=1", "max_tokens must be at least 2"),
        (f"queue_size=-1{'0' * 400}", "queue_size must be at least 1"),
        (f"clip_grad_norm=1{'0' * 400}", "clip_grad_norm must be at least 0 and finite, found 1000"),
        (
            "vit.mlp_ratio=1e-3",
            "vit.mlp_ratio 0.001 of vision_width 768 leaves the feed-forward layers empty",
        ),
        ("vit.depth=1000000000000", "vit.depth must be from 1 to 1000"),
        ("samples_per_epoch=1000000000000", "samples_per_epoch must be from 0 to 1000000000"),
        ("num_workers=1000000", "num_workers must be from 0 to 1000"),
        ("loss_weights.mim=-1", "loss_weights.mim must be at least 0"),
        ("loss_weights={ita: 0, itm: 0, mlm: 0, mim: 0, psl: 0}", "loss_weights are all 0"),
        ("train_file=[{path: a.json}]", "train_file: entry 0 must be {path: ..., weight: ...}"),
        ("train_file=[{path: a.json, weight: 1e308}]", "weight of entry 0 must be above 0, at most"),
        (
            "bert_config.hiden_dropout_prob=0.2",
            "has no effect; did you mean bert_config.hidden_dropout_prob?",
        ),
        ("bert_config={1: 2}", "has no effect; sizes that count: vocab_size"),
        ("bert_config.classifier=2", "has no effect; sizes that count: vocab_size"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_range(override, expected):
    assert expected in refusal(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("num_attention_heads=5", "hidden_size 128 is not a multiple of num_attention_heads 5"),
        ("hidden_dropout_prob=5", "hidden_dropout_prob is 5; expected float, at least 0 and below 1"),
        ("layer_norm_eps=.nan", "layer_norm_eps is nan"),
        ("pad_token_id=40000", "pad_token_id 40000 must be below vocab_size"),
        ("max_position_embeddings=1", "max_position_embeddings is 1; expected int, at least 2"),
        ("num_hidden_layers=1000000000000", "expected int, at least 1 and below 1001"),
        ("num_hidden_layers=true", "num_hidden_layers is True; expected int, at least 1"),
        ("encoder_width=64", "encoder_width 64 of bert_config must be vision_width 128"),
        ("={num_hidden_layer: 3}", "has no effect; did you mean bert_config.num_hidden_layers?"),
    ],
)
def test_sizes_of_the_text_encoder(override, expected, monkeypatch, tmp_path):
    override = f"bert_config{'.' * (override[0] != '=')}{override}"
    flags = ["--config", SHIPPED["VE"], "--output_dir", tmp_path, "--overrides", override]
    monkeypatch.setattr(sys, "argv", ["VE.py", *map(str, flags)])
    with pytest.raises(UserError, match=expected):
        parse(script_arguments("x", "", ""), TABLES["VE"])


def test_a_file_of_sizes_with_a_misspelt_one_is_refused(tmp_path):
    """Other keys, which BERT's own files have, are passed over."""
    sizes = json.loads((ROOT / "configs" / "config_bert.json").read_bytes())
    (tmp_path / "sizes.json").write_text(json.dumps({**sizes, "num_hidden_layer": 3}))
    with pytest.raises(UserError, match=r"bert_config has num_hidden_layer, .*; is num_hidden_layers meant"):
        BertConfig.read(str(tmp_path / "sizes.json"))
    (tmp_path / "sizes.json").write_text(json.dumps({**sizes, "classifier": 3}))
    assert BertConfig.read(str(tmp_path / "sizes.json")).hidden_size == 768


def test_shipped_files_are_found_from_any_working_folder(monkeypatch, tmp_path):
    """A script's own config, and the sizes that it names; a file of the same name here comes first."""
    monkeypatch.setattr(sys, "argv", ["VE.py"])
    monkeypatch.chdir(tmp_path)
    args, config = parse(script_arguments("x", "configs/VE.yaml", ""), TABLES["VE"])
    assert args.config == str(ROOT / "configs" / "VE.yaml") and config["bert_config"]["hidden_size"] == 768
    (tmp_path / "configs").mkdir()
    shutil.copy2(ROOT / "configs" / "VE.yaml", "configs")
    assert parse(script_arguments("x", "configs/VE.yaml", ""), TABLES["VE"])[0].config == "configs/VE.yaml"


def test_a_codebook_is_not_fitted_for_a_config_that_cannot_be_trained(tmp_path, monkeypatch):
    tiny = make_tiny(tmp_path)
    fitted = []
    monkeypatch.setattr(Pretrain, "fit_kmeans_codebook", lambda *_: fitted.append(1))
    for flag, value in (("--overrides", "num_masking_patches=17"), ("--text_encoder", str(tmp_path))):
        flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path, "--device", "cpu", flag, value]
        monkeypatch.setattr(sys, "argv", ["Pretrain.py", *map(str, flags)])
        with pytest.raises(UserError, match=r"num_masking_patches 17|No BERT vocabulary"):
            Pretrain.parse_and_run()
    assert not fitted


# ---- spellings ----


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("optimizer.lr='1e-4'", "optimizer.lr", 1e-4),
        ("optimizer.lr='2.5E-5'", "optimizer.lr", 2.5e-5),
        ("optimizer.betas=['0.9', '98e-2']", "optimizer.betas", [0.9, 0.98]),
        ("batch_size='32'", "batch_size", 32),
        ("samples_per_epoch=1e6", "samples_per_epoch", 1_000_000),
        ("batch_size=64.0", "batch_size", 64),
        ("compile=yes", "compile", True),
        ("compile=Off", "compile", False),
        ("compile=1", "compile", True),
        ("image_root=", "image_root", ""),
        ("image_root=null", "image_root", ""),
        ("wandb=", "wandb", {}),
        ("vit=", "vit.depth", 12),
        ("randaugment=~", "randaugment.num_ops", 2),
    ],
)
def test_what_is_meant_is_read(override, name, value):
    found = read([override])
    for part in name.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("task", "name"),
    [("VQA", "val_file"), ("VQA", "answer_list"), ("Retrieval", "val_file"), ("Retrieval", "train_file")],
)
def test_an_empty_value_means_none_on_the_command_line_and_in_yaml(task, name, tmp_path):
    assert TABLES[task][name].default in EMPTY
    empty = TABLES[task][name].default
    assert read([f"{name}="], str(SHIPPED[task]), task)[name] == empty
    path = tmp_path / f"{task}.yaml"
    path.write_text(f"base: {SHIPPED[task]}\n{name}:")
    assert read([], str(path), task)[name] == empty


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train_file=", "train_file is empty; expected text or a list"),
        ("train_file=[]", "train_file is empty"),
        ("train_file=[1, 2]", "train_file: item 0 must be text or a mapping, found 1"),
        ("train_file=[a.json, '']", "train_file: item 1 must be text or a mapping, found ''"),
        ("batch_size=", "batch_size is empty; expected an int, at least 1"),
        ("text_encoder=", "text_encoder is empty"),
        ("optimizer=", "missing key optimizer.lr"),
        ("optimizer=[1]", "optimizer must be a section of keys, found [1]"),
        (
            "data_root=2024",
            "data_root must be text, found 2024; a name that looks like something else goes in",
        ),
        ("compile=maybe", "compile must be true or false, found 'maybe'"),
        ("batch_size=64.5", "batch_size must be an int, at least 1, found 64.5"),
        ("optimizer.lr=0,02", "optimizer.lr must be a number, above 0 and at most 10, found '0,02'"),
        ("a..b=1", "expected key=value"),
    ],
)
def test_what_is_no_value_is_named(override, expected):
    assert expected in refusal(override)


def test_lists_of_other_tasks_hold_paths_alone():
    weighted = "train_file=[{path: a.json, weight: 1}]"
    assert "item 0 must be text" in refusal(weighted, str(SHIPPED["VQA"]), "VQA")
    assert "goes in quotes" in refusal("eos=[SEP]", str(SHIPPED["VQA"]), "VQA")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("batch_size: 16\n", "batch_size: 16\nbatch_size: 32\n"),
            r"line \d+: there already is a key .*batch",
        ),
        (("{opt: adamW,", "{opt: adamW, opt: sgd,"), r"line \d+: there already is a key .*opt"),
        (("batch_size: 16", "batch_size:\t16"), "not valid YAML.*with spaces, not tabs"),
        (("vit: {patch_size: 8,", "vit:\n\tpatch_size: 8\n#"), "not valid YAML.*with spaces, not tabs"),
        (("batch_size: 16", "batch_size: @16"), "not valid YAML"),
        (("batch_size: 16", "batch_size: \x00"), "not valid YAML"),
    ],
)
def test_broken_yaml_is_one_sentence_with_the_line(change, expected, tmp_path):
    path, text = (
        tmp_path / "c.yaml",
        "batch_size: 16\nvit: {patch_size: 8, depth: 4}\noptimizer: {opt: adamW, lr: 1e-4}\n",
    )
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(UserError, match=expected) as error:
        read([], str(path))
    assert "\n" not in str(error.value) and "yaml.dev" not in str(error.value)


def test_bytes_that_are_no_utf8_are_one_sentence(tmp_path):
    (tmp_path / "c.yaml").write_bytes("data_root: \u00fcber\n".encode("latin-1"))
    with pytest.raises(UserError, match="not valid YAML"):
        read([], str(tmp_path / "c.yaml"))


def test_an_empty_section_is_filled_by_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"base: {SHIPPED['Pretrain']}\noptimizer:")
    assert read(["optimizer.lr=1e-3"], str(path))["optimizer"]["lr"] == 1e-3


def test_an_override_of_one_default_of_a_section_keeps_the_others(tmp_path):
    (tmp_path / "c.yaml").write_text("image_res: 384\ntest_file: a.json\n")
    config = read(["optimizer.opt=sgd", "schedular.min_lr=0"], str(tmp_path / "c.yaml"), "Retrieval")
    assert (config["optimizer"]["opt"], config["optimizer"]["lr"]) == ("sgd", 1e-5)
    assert (config["schedular"]["min_lr"], config["schedular"]["epochs"]) == (0, 5)


def test_an_overridden_section_keeps_the_keys_that_are_not_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        f"base: {SHIPPED['Pretrain']}\nloss_weights: {{mim: 0}}\noptimizer: {{weight_decay: 0.1}}\n"
    )
    config = read(
        ["loss_weights={mlm: 0}", "optimizer={lr: 2e-4}", "bert_config={num_hidden_layers: 3}"], str(path)
    )
    assert (config["loss_weights"]["mim"], config["loss_weights"]["mlm"]) == (0, 0)
    assert (config["optimizer"]["weight_decay"], config["optimizer"]["lr"]) == (0.1, 2e-4)
    assert config["bert_config"]["num_hidden_layers"] == 3
    assert "--overrides schedular.lr has no effect" in refusal("schedular={epochs: 3, lr: 1e-3}")


def test_another_data_root_moves_paths_or_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("image_res: 384\ntest_file: a.json\ndata_root: /one\n")
    config = read(["data_root=/two"], str(path), "Retrieval")
    assert (config["test_file"], config["image_root"]) == ("/two/a.json", "/two")
    path.write_text("image_res: 384\ntest_file: /one/a.json\nimage_root: /one\ndata_root: /one\n")
    with pytest.raises(UserError, match=r"--overrides data_root has no effect: all paths of data in .* /one"):
        read(["data_root=/two"], str(path), "Retrieval")
    assert read(["data_root=/one"], str(path), "Retrieval")["image_root"] == "/one"  # as it was
    path.write_text("image_res: 384\ntest_file: a.json\nimage_root: images\ndata_root: /one\n")
    config = read(["data_root=''"], str(path), "Retrieval")  # back to the folder of the command
    assert (config["test_file"], config["image_root"]) == ("a.json", "images")


# ---- variants ----


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_a_variant_overrides_single_keys_of_its_base_and_of_that_one_s(write, tmp_path, monkeypatch):
    (tmp_path / "bert.json").write_text('{"hidden_size": 64, "encoder_width": 768, "num_attention_heads": 4}')
    write("a.yaml", f"base: {PRETRAIN}\nbert_config: {tmp_path}/bert.json\nwandb: {{project: p, name: a}}\n")
    write("sub/b.yaml", "base: ../a.yaml\noptimizer: {weight_decay: 0.1}\ntrain_file: [b.json]\nalpha: 0\n")
    monkeypatch.setenv("SUB", "sub")
    path = write(
        "c.yaml", "base: $SUB/b.yaml\nbert_config: {num_hidden_layers: 3}\nwandb: {name: c}\nalpha: 0.1\n"
    )
    overrides = [
        f"bert_config={tmp_path}/bert.json",
        "bert_config.num_hidden_layers=3",
        "wandb={project: p}",
        "wandb.name=c",
        "optimizer.weight_decay=0.1",
        "train_file=[b.json]",
        "alpha=0.1",
    ]
    found, plain = read([], path), read(overrides)
    assert found == plain and "base" not in found
    assert found["optimizer"]["lr"] == 1e-4 and found["wandb"] == {"project": "p", "name": "c"}
    assert read(["wandb.name=d"], path)["wandb"] == {"project": "p", "name": "d"}
    without = write("d.yaml", f"base: {path}\nwandb: {{}}\n")
    assert read([], without)["wandb"] == {}


@pytest.mark.parametrize(
    ("base", "variant", "named", "expected"),
    [
        ("quue_size: 7", "", "base.yaml", "unknown key quue_size; did you mean queue_size"),
        ("", "quue_size: 7", "variant.yaml", "unknown key quue_size"),
        ("optimizer: {lrr: 7}", "optimizer: {lr: 7}", "base.yaml", "unknown key optimizer.lrr"),
        ("optimizer: {lr: 7}", "optimizer: {lrr: 7}", "variant.yaml", "unknown key optimizer.lrr"),
        ("alpha: 4", "momentum: 1", "base.yaml", "alpha must be from 0 to 1, found 4"),
        ("alpha: 1", "alpha: 4", "variant.yaml", "alpha must be from 0 to 1, found 4"),
        ("vit: 3", "alpha: 1", "base.yaml", "vit must be a section of keys"),
        ("a: [", "alpha: 1", "base.yaml", "is not valid YAML"),
        (
            "scheduler: {epochs: 1}\nschedular: {epochs: 1}",
            "",
            "base.yaml",
            "has both schedular and scheduler",
        ),
    ],
)
def test_what_is_wrong_names_the_file_it_stands_in(base, variant, named, expected, write, tmp_path):
    shipped = f"base: {PRETRAIN}\n"
    write("base.yaml", shipped + base)
    path = write("variant.yaml", f"base: base.yaml\n{variant}")
    with pytest.raises(UserError, match=rf"^config {tmp_path}/{named}.*{expected}"):
        read([], path)


def test_old_names_are_read_in_every_file_of_a_variant(write):
    write("base.yaml", PUBLISHED["NLVR"])
    path, notes = write("NLVR.yaml", "base: base.yaml\nbatch_size_train: 3\nscheduler: {epochs: 2}\n"), []
    config = read_config(path, TABLES["NLVR"], [], notes)
    assert (config["batch_size_train"], config["batch_size_test"], config["schedular"]["epochs"]) == (3, 8, 2)
    assert notes[0].startswith(f"config {path.replace('NLVR.yaml', 'base.yaml')}: batch_size is read as")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("base: c.yaml", "c.yaml: base {0}/c.yaml is itself based on {0}/c.yaml"),
        ("base: sub/circle.yaml", "sub/circle.yaml: base {0}/c.yaml is itself based on {0}/sub/circle.yaml"),
        (
            "base: ../none.yaml",
            "c.yaml: base {1}/none.yaml does not exist; paths start from the folder of",
        ),
        ("base: [a.yaml]", "c.yaml: base must name a YAML file, found ['a.yaml']"),
        ("base:", "c.yaml: base must name a YAML file, found None"),
        ("base: .", "{0} cannot be read: Is a directory"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(line, expected, write, tmp_path):
    write("sub/circle.yaml", "base: ../c.yaml")
    with pytest.raises(UserError, match=re.escape(expected.format(tmp_path, tmp_path.parent))):
        read([], write("c.yaml", line))


def test_a_rate_that_a_variant_changes_needs_no_second_one(write):
    notes = []
    path = write("c.yaml", f"base: {PRETRAIN}\noptimizer: {{lr: 5e-5}}")
    assert read_config(path, TABLES["Pretrain"], [], notes)["optimizer"]["lr"] == 5e-5 and not notes


# ---- overrides and flags ----


def test_a_second_overrides_adds_to_the_first_in_every_parser(monkeypatch):
    flags = ["--overrides", "a=1", "b=2", "--overrides", "c=3"]
    parser = argparse.ArgumentParser()
    add_overrides(parser)
    assert parser.parse_args(flags).overrides == parser.parse_args(flags).overrides == ["a=1", "b=2", "c=3"]
    assert parser.parse_args([]).overrides == []
    assert script_arguments("x", "c", "o").parse_args(flags).overrides == ["a=1", "b=2", "c=3"]
    found = []
    monkeypatch.setattr("simla.checkpoint.inspect.inspect", lambda *arguments: found.append(arguments[-1]))
    monkeypatch.setattr(
        sys, "argv", ["simla.checkpoint", "inspect", "x", "--task", "VE.py", "--config", "c", *flags]
    )
    checkpoint_tools.main()
    monkeypatch.setattr(
        "simla.dataset.check.__main__.check", lambda args: found.append(args.overrides) or False
    )
    check_main(["--config", "c", *flags])
    assert found == [["a=1", "b=2", "c=3"]] * 2


@pytest.mark.parametrize("seed", ["-1", "x", str(2**32)])
def test_a_seed_that_numpy_would_not_take_is_refused(seed, capsys):
    with pytest.raises(SystemExit):
        script_arguments("x", "c", "o").parse_args(["--seed", seed])
    assert "expected an int from 0 to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["schedular.lr", "scheduler.lr", "schedular.decay_rate", "schedular.cooldown_epochs"]
)
def test_an_override_without_effect_says_so(name):
    name_here = name.replace("scheduler", "schedular")
    assert f"--overrides {name_here} has no effect" in refusal(f"{name}=1")
    assert "optimizer.lr counts" in refusal("schedular.lr=1e-3")


def test_rates_that_may_not_be_meant_are_said():
    def said(*overrides: str, path: str = PRETRAIN) -> str:
        notes = []
        read_config(path, TABLES["Pretrain"], list(overrides), notes)
        return " ".join(notes)

    assert said() == said("optimizer.lr=5e-5") == ""
    assert "min_lr 1e-05 is above optimizer.lr 1e-06: the rate will rise" in said("optimizer.lr=1e-6")
    assert "warm-up goes down" in said("schedular.warmup_lr=1e-2")


def test_a_file_with_two_rates_says_which_counts(tmp_path):
    path, notes = tmp_path / "c.yaml", []
    path.write_text(
        (ROOT / "configs" / "Pretrain.yaml").read_text().replace("cosine, lr: 1e-4", "cosine, lr: 1e-3")
    )
    assert read_config(str(path), TABLES["Pretrain"], [], notes)["optimizer"]["lr"] == 1e-4
    assert len(notes) == 1 and "schedular.lr 0.001 has no effect; optimizer.lr 0.0001 counts" in notes[0]


def test_min_lr_is_the_rate_of_the_epoch_after_the_last():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupCosine(optimizer, epochs=4, min_lr=0.1, warmup_lr=0.01, warmup_epochs=0)
    rates = []
    for epoch in range(1, 5):
        schedule.resume_at(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[-1] == pytest.approx(0.1) and rates[-2] == pytest.approx(0.23, abs=0.01)
    assert "one after the last" in TABLES["VE"]["schedular"].type["min_lr"].help


def test_a_warm_up_longer_than_epoch_0_is_said(tmp_path, caplog, monkeypatch):
    tiny = make_tiny(tmp_path)
    monkeypatch.setattr(
        "simla.engine.training.Training.one_step", lambda *_: (_ for _ in ()).throw(UserError("stop here"))
    )
    for warm_up, is_long in ((5, False), (6, True)):  # of 24 samples, 4 a step
        caplog.clear()
        flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path, "--device", "cpu"]
        monkeypatch.setattr(
            sys, "argv", ["x", *map(str, flags), "--overrides", f"schedular.warmup_epochs={warm_up}"]
        )
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(
            logging, "basicConfig", lambda **_: None
        )  # which would take caplog's handler away
        with pytest.raises(UserError, match="stop here"):
            Pretrain.parse_and_run()
        assert ("is longer than epoch 0, which has 6" in caplog.text) == is_long


# ---- other tasks and other people's configs ----


def test_the_config_of_another_task_is_recognised():
    for task, path in SHIPPED.items():
        for other in TABLES:
            if TABLES[other] is TABLES[task]:
                continue
            with pytest.raises(UserError, match=rf"this looks like a config of {task_of(path.name)}\.py"):
                read([], str(path), other)


def test_a_config_without_a_telling_name_is_recognised_by_its_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"base: {SHIPPED['VQA']}")
    read([], str(path), "VQA")
    with pytest.raises(UserError, match=r"unknown key .*; this looks like a config of VQA\.py$"):
        read([], str(path), "VE")
    path.write_text(f"base: {SHIPPED['VE']}")
    read([], str(path), "NLVR")  # the same keys: nothing but the name tells them apart
    assert "did you mean quue_size" not in refusal("quue_size=7", str(path), "VE")


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("Pretrain_NLVR", "Pretrain_NLVR"),
        ("NLVR_Pretrain", "Pretrain_NLVR"),
        ("NLVR_Pretrain.py", "Pretrain_NLVR"),
        ("VE.py", "VE"),
    ],
)
def test_one_spelling_of_each_task(text, task):
    assert task_name(text) == task
    assert set(CHECKED) == set(SPLITS)
    assert task_of("a/NLVR_Pretrain_24gb.yaml") == task_of("Pretrain_NLVR.yaml") == "Pretrain_NLVR"
    assert task_of("NLVR_pretrain.yaml") == "Pretrain_NLVR" and task_of("Pretrain_24gb.yaml") == "Pretrain"
    assert task_of("output/config.yaml") is None


FINE_TUNING = """
optimizer: {opt: adamW, lr: 2e-5, weight_decay: 0.02}
schedular: {sched: cosine, lr: 2e-5, epochs: 8, min_lr: 1e-6, decay_rate: 1, warmup_lr: 1e-5,
            warmup_epochs: 4, cooldown_epochs: 0}
image_res: 384
alpha: 0.4
distill: True
warm_up: True
vit_mask_token: false
bert_config: 'configs/config_bert.json'
train_file: ['a.json']
"""
CONTRAST = "queue_size: 65536\nmomentum: 0.995\nvision_width: 768\nembed_dim: 256\ntemp: 0.07\n"
PUBLISHED = {  # the keys of the configs in github.com/codezakh/SIMLA and github.com/salesforce/ALBEF
    "Pretrain": FINE_TUNING.split("alpha")[0]
    + "alpha: 0.4\nbert_config: 'configs/config_bert.json'\ntrain_file: ['a.json']\nmlm_probability: 0.15\n"
    + f"batch_size: 64\nimage_tokenizer_path: /data/weights\n{CONTRAST}".replace("384", "256"),
    "Retrieval": FINE_TUNING + CONTRAST + "val_file: 'b.json'\ntest_file: 'c.json'\nimage_root: '/x'\n"
    "batch_size_train: 32\nbatch_size_test: 32\nk_test: 256\nmlm_probability: 0.15\nsave_sims: '/y'\n",
    "Grounding": FINE_TUNING + CONTRAST + "test_file: ['b.json', 'c.json']\nrefcoco_data: 'data'\n"
    "det_file: 'd.json'\ncoco_file: 'e.json'\nimage_root: '/x'\nbatch_size: 32\nmlm_probability: 0.15\n",
    "VQA": FINE_TUNING + "test_file: ['c.json']\nanswer_list: 'd.json'\nvqa_root: '/x'\nvg_root: '/y'\n"
    "batch_size_train: 32\nbatch_size_test: 16\nk_test: 128\neos: '[SEP]'\n",
    "NLVR": FINE_TUNING + "val_file: ['b.json']\ntest_file: ['c.json']\nimage_root: '/x'\nbatch_size: 8\n"
    "eval_ema: False\n",
    "VE": FINE_TUNING + "val_file: 'b.json'\ntest_file: 'c.json'\nimage_root: '/x'\nbatch_size_train: 32\n"
    "batch_size_test: 64\n",
    "Pretrain_NLVR": FINE_TUNING.replace("distill: True\nwarm_up: True\n", "")
    + "vision_width: 768\nembed_dim: 256\nbatch_size: 64\n",
}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("Pretrain", ["image_tokenizer_path is read as image_tokenizer"]),
        ("Retrieval", ["mlm_probability has no effect", "save_sims has no effect"]),
        ("Grounding", ["batch_size is read as", "mlm_probability has no effect"]),
        ("VQA", []),
        ("NLVR", ["batch_size is read as batch_size_train and batch_size_test", "eval_ema has no effect"]),
        ("VE", []),
        ("Pretrain_NLVR", ["batch_size is read as"]),
    ],
)
def test_published_configs_are_read(task, said, tmp_path):
    path, notes = tmp_path / f"{task}.yaml", []
    path.write_text(PUBLISHED[task])
    config = read_config(str(path), TABLES[task], [], notes)
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True)), (
        notes
    )
    if task == "NLVR":
        assert config["batch_size_train"] == config["batch_size_test"] == 8
    if task == "Pretrain":
        assert config["image_tokenizer"]["path"] == "/data/weights/encoder.pkl" and config["batch_size"] == 64


def test_two_names_of_one_key_are_refused(tmp_path):
    path = tmp_path / "NLVR.yaml"
    path.write_text(PUBLISHED["NLVR"] + "batch_size_train: 4\n")
    with pytest.raises(UserError, match="has both batch_size and batch_size_train; keep batch_size_train"):
        read([], str(path), "NLVR")


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch):
    """A hub that cannot be reached; counts the requests. Without the check each of them would be repeated for
    half a minute.
    """
    requests = []

    def head(url: str, **_) -> None:
        requests.append(url)
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    utils.hub_problem.cache_clear()
    yield requests
    utils.hub_problem.cache_clear()


def test_without_a_network_what_is_missing_is_said_within_seconds(hub, tmp_path):
    vit, bert = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    begin = time.monotonic()
    for load in (
        lambda: build_tokenizer("bert-base-that-nobody-has"),
        lambda: load_vit(vit, "deit_base_patch16_224"),
        lambda: load_bert(bert, "bert-base-that-nobody-has"),
        lambda: load_flava("facebook/that-nobody-has"),
    ):
        with pytest.raises(UserError, match=r"Name or service not known; HF_HUB_OFFLINE=1 spares the try"):
            load()
    assert time.monotonic() - begin < 20  # of which most is the import of transformers
    assert len(hub) == 1


def test_a_hub_that_never_answers_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(utils, "HUB_SECONDS", 0.1)
    session = SimpleNamespace(head=lambda *_, **__: time.sleep(30))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    begin = time.monotonic()
    assert "gives no answer" in utils.hub_answer() and time.monotonic() - begin < 5
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_offline_is_named_and_the_hub_not_asked(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it to download"):
        build_tokenizer("bert-base-that-nobody-has")
    assert not hub


def test_the_check_looks_at_the_files_before_it_asks_for_a_tokenizer(hub, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "VE.yaml").write_text(f"base: {SHIPPED['VE']}\ntext_encoder: nobody/has")
    flags = ["--config", str(tmp_path / "VE.yaml"), "--output_dir", str(tmp_path / "out"), "--overrides"]
    assert check_main([*flags, f"data_root={tmp_path}"]) == 2
    assert "problem: " in caplog.text and "ve_train.json cannot be read" in caplog.text


def test_folders_and_files_need_no_hub(hub, tmp_path):
    tiny = make_tiny(tmp_path)
    build_tokenizer(str(tiny["data"] / "bert"))
    assert not hub
