"""`python -m simla.checkpoint export` and `inspect`, on files of every task."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fault_test import differing_values
from ruamel.yaml import YAML
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import MODEL, ROOT, make_tiny, run_forked

import Pretrain
import simla
import zero_shot_retrieval
from simla.checkpoint import __main__ as command_line
from simla.checkpoint import export as exporting
from simla.checkpoint.export import export
from simla.checkpoint.initial import starting_weights, warn_of_another_training, warn_of_another_vocabulary
from simla.checkpoint.inspect import inspect, verdict
from simla.checkpoint.key_maps import QUEUES, TWIN
from simla.checkpoint.load import load_weights
from simla.checkpoint.save import load_checkpoint
from simla.checkpoint.tasks import TASKS
from simla.checkpoint.tokenizer import tokenizer_text
from simla.configs.reader import read_config
from simla.configs.schema import TABLES
from simla.dataset.text import build_tokenizer
from simla.models.bert import BertConfig
from simla.utils import UserError

REQUIRED = {
    "optimizer": {"lr": 1e-4},
    "schedular": {"epochs": 3},
    "train_file": "train.json",
    "val_file": "val.json",
    "test_file": "test.json",
    "refcoco_data": "data",
    "image_tokenizer": {"kind": "kmeans", "path": "codebook.safetensors", "vocab_size": 16},
    "num_masking_patches": 5,
}
BUILDERS = {task.writes: name for name, task in TASKS.items() if task.writes}  # kind -> task


def config_of(task: str, folder: Path) -> Path:
    """A tiny config of the task, as a file."""
    path = folder / f"{task}.yaml"
    content = {key: value for key, value in {**MODEL, **REQUIRED}.items() if key in TABLES[task]}
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def model_of(task: str, folder: Path, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = TASKS[task].build(read_config(str(config_of(task, folder)), TABLES[task], []))
    for parameter in model.parameters():  # twins, too, and nothing stays at zero
        parameter.data.normal_()
    return model


def checkpoint_of(kind: str, folder: Path) -> Path:
    """A training checkpoint, without the optimiser's state."""
    path = folder / f"{kind}.pth"
    content = {
        "model": model_of(BUILDERS[kind], folder, seed=0).state_dict(),
        "config": {"image_res": 32},
        "epoch": 4,
        "step": 0,
        "best": {"r_mean": 71.5},
        "run": "a1b2",
        "seed": 42,
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("task", "kind"), [(t, kind) for t in TASKS for kind in TASKS[t].starts_from])
def test_every_script_takes_the_exported_weights_as_it_takes_the_checkpoint(task, kind, tmp_path):
    source = checkpoint_of(kind, tmp_path)
    target = tmp_path / "out.safetensors"
    export(str(source), str(target), task)
    models = [model_of(task, tmp_path, seed=1) for _ in range(2)]
    reports = [load_weights(model, path, task) for model, path in zip(models, (source, target), strict=True)]
    assert reports[0].loaded == reports[1].loaded and reports[0].loaded
    assert differing_values(*[dict(model.state_dict()) for model in models], "model") == []


@pytest.mark.parametrize("kind", BUILDERS)
def test_for_inference_twins_and_queues_are_left_out_and_stay_as_built(kind, tmp_path):
    source, target = checkpoint_of(kind, tmp_path), tmp_path / "out.safetensors"
    left_out = export(str(source), str(target), inference=True)
    weights, all_weights = load_file(target), load_checkpoint(source)["model"]
    assert left_out == sorted(set(all_weights) - set(weights))
    assert all(TWIN.match(name) or name.startswith(QUEUES) for name in left_out)
    assert not any(TWIN.match(name) or name.startswith(QUEUES) for name in weights)
    assert differing_values({name: all_weights[name] for name in weights}, weights, "model") == []
    task = BUILDERS[kind]
    model = model_of(task, tmp_path, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, target, task)
    assert sorted(report.fresh) == left_out
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in left_out)


def test_a_file_with_some_of_the_twins_is_damaged_not_exported(tmp_path):
    source = checkpoint_of("ve", tmp_path)
    content = load_checkpoint(source)
    del content["model"]["cls_head_m.0.weight"]
    torch.save(content, tmp_path / "some.pth")
    with pytest.raises(UserError, match=r"missing: cls_head_m\.0\.weight"):
        load_weights(model_of("VE", tmp_path, seed=1), tmp_path / "some.pth", "VE")


def test_the_metadata_say_where_the_weights_come_from(tmp_path):
    target = tmp_path / "out.safetensors"
    export(str(checkpoint_of("pretrain", tmp_path)), str(target))
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["kind"] == "pretrain"
    assert metadata["source"] == "pretrain.pth" and metadata["code_revision"]
    assert json.loads(metadata["config"]) == {"image_res": 32}
    assert json.loads(metadata["epoch"]) == 4 and json.loads(metadata["best"]) == {"r_mean": 71.5}
    assert metadata["run"] == '"a1b2"' and "optimizer" not in metadata


def test_what_cannot_be_exported(tmp_path):
    source = str(checkpoint_of("pretrain", tmp_path))
    for bad_source, target, task, message in (
        (source, "out.pth", "", r"must end in \.safetensors"),
        (source, "out.safetensors", "NLVR", "NLVR starts from a pretrain_nlvr or nlvr checkpoint"),
        (str(tmp_path / "none.pth"), "out.safetensors", "", "none.pth: cannot be read"),
        (str(ROOT / "README.md"), "out.safetensors", "", "README.md: not a complete PyTorch checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            export(bad_source, str(tmp_path / target), task)
        assert not (tmp_path / target).exists()


def test_a_failed_export_leaves_the_earlier_file(tmp_path, monkeypatch):
    source, target = str(checkpoint_of("ve", tmp_path)), tmp_path / "out.safetensors"
    export(source, str(target))
    before = target.read_bytes()

    def full(*_) -> None:
        raise exporting.SafetensorError("No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(UserError, match=r"out\.safetensors could not be written \(No space left on device\)"):
        export(source, str(target))
    assert target.read_bytes() == before and not list(tmp_path.glob(".out*"))


def test_inspect_tells_both_kinds_of_files_alike(tmp_path):
    source, target = checkpoint_of("pretrain", tmp_path), tmp_path / "out.safetensors"
    export(str(source), str(target))
    for path in (source, target):
        report = inspect(str(path))
        assert f"{path}: pretrain checkpoint, " in report
        assert "epoch: 4" in report and "best: {'r_mean': 71.5}" in report and "run: a1b2" in report
        assert report.endswith("config:\nimage_res: 32")
    model = load_checkpoint(source)["model"]
    num_bytes = sum(value.nbytes for name, value in model.items() if name.startswith("visual_encoder_m."))
    assert f"{num_bytes / 2**20:10.1f} MiB  visual_encoder_m" in report
    assert f"{len(model)} tensors, {sum(value.numel() for value in model.values()):,} values" in report


def test_inspect_and_export_what_a_run_saved(tmp_path, monkeypatch, capsys):
    paths, out = make_tiny(tmp_path), tmp_path / "out"

    def command(main: Callable[[], None], *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    flags = ["--device", "cpu", "--config", paths["Pretrain"], "--output_dir", out]
    command(Pretrain.parse_and_run, *flags, "--overrides", "schedular.epochs=1")
    source, target = out / "checkpoint_00.pth", out / "weights.safetensors"
    report = command(command_line.main, "inspect", source, "--check")
    assert "epoch: 0" in report and "ranks: 1" in report and "MiB  (optimizer)" in report
    assert f"{paths['data']}/pretrain_train.json" in report and "all checksums match" in report

    command(command_line.main, "export", source, target, "--task", "Retrieval.py")
    scores = []
    for number, weights in enumerate((source, target)):
        results = tmp_path / f"scores_{number}"
        flags = ["--device", "cpu", "--evaluate", "--config", paths["Retrieval"], "--output_dir", results]
        command(zero_shot_retrieval.parse_and_run, *flags, "--checkpoint", weights)
        scores.append(json.loads((results / "log.txt").read_text()))
    assert scores[0] == scores[1] and "test_r_mean" in scores[0]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_task_warns_of_a_vocabulary_that_the_checkpoint_was_not_trained_with(tmp_path, caplog, ending):
    folder = tmp_path / "bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "cat", "kite"]
    (folder / "vocab.txt").write_text("\n".join(words))
    trained_with = build_tokenizer(str(folder))
    model, config = torch.nn.Linear(1, 1), {"text_encoder": str(folder), "init": "scratch"}
    source = tmp_path / "source.pth"
    weights = {"itm_head.weight": torch.zeros(2, 1), "visual_encoder.cls_token": torch.zeros(1)}
    torch.save({"model": weights, "tokenizer": tokenizer_text(trained_with)}, source)
    path = source
    if ending == ".safetensors":
        path = tmp_path / "weights.safetensors"
        export(str(source), str(path))
    with caplog.at_level("INFO"):
        starting_weights(model, config, "Retrieval", str(path), resume=True, tokenizer=trained_with)
        assert "vocabulary" not in caplog.text
        (folder / "vocab.txt").write_text("\n".join([*words[:5], "cat", "dog", "kite", "bird"]))
        other = build_tokenizer(str(folder))
        starting_weights(model, config, "Retrieval", str(path), resume=True, tokenizer=other)
    (line,) = caplog.messages
    assert line.startswith(f"{path} was trained with another vocabulary, of 8 words, than text_encoder ")
    assert (
        "has, of 9: 3 words have another number or are in one of them alone, such as cat, dog, bird" in line
    )


@pytest.mark.parametrize(
    ("settings", "was"),
    [
        ({"do_lower_case": False}, "Ä 犬 "),
        ({"do_lower_case": True, "strip_accents": False}, "ä 犬 "),
        ({"do_lower_case": True, "tokenize_chinese_chars": False}, "a犬"),
    ],
)
def test_a_task_warns_of_a_tokenizer_that_reads_texts_otherwise(tmp_path, caplog, settings, was):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    trained_with, path = build_tokenizer(str(tmp_path)), tmp_path / "source.pth"
    torch.save({"model": {}, "tokenizer": tokenizer_text(trained_with)}, path)
    (tmp_path / "tokenizer_config.json").unlink()
    warn_of_another_vocabulary(trained_with, str(path), "bert")
    assert not caplog.messages
    warn_of_another_vocabulary(build_tokenizer(str(tmp_path)), str(path), "bert")
    (line,) = caplog.messages
    assert f"a tokenizer that reads 'Ä犬' as {was!r}; text_encoder 'bert' reads 'a 犬 '" in line


@pytest.mark.parametrize(
    ("trained", "here", "message"),
    [
        ({"sentence_only": True}, {"sentence_only": False}, "sentence_only true, and here it is false: "),
        ({"sentence_only": False}, {"sentence_only": True}, "Add --overrides sentence_only=false"),
        ({"loss_weights": {"itm": 0}}, {}, "loss_weights.itm 0: the matching head is as built"),
        ({"loss_weights": {"itm": 0}}, {"loss_weights": {"itm": 1}}, ""),  # Pretrain.py trains it
        ({"loss_weights": {"mlm": 0}}, {"sentence_only": True}, ""),
    ],
)
def test_a_task_warns_of_weights_whose_training_was_another(tmp_path, caplog, trained, here, message):
    model = torch.nn.ModuleDict({"itm_head": torch.nn.Linear(1, 2)})
    torch.save({"model": model.state_dict(), "config": trained}, tmp_path / "source.pth")
    warn_of_another_training(model, here, str(tmp_path / "source.pth"))
    assert [message in line for line in caplog.messages] == [True] * bool(message)


def test_one_file_is_all_that_has_to_be_passed_on(tmp_path, monkeypatch):
    """The sizes and the tokenizer are in the checkpoint, as they were when it was trained, and in what is
    exported of it."""
    paths, out = make_tiny(tmp_path), tmp_path / "out"
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({**MODEL["bert_config"], "model_type": "bert"}))
    flags = ["--device", "cpu", "--config", str(paths["Pretrain"]), "--output_dir", str(out), "--overrides"]
    monkeypatch.setattr(sys, "argv", ["x.py", *flags, "schedular.epochs=1", f"bert_config={sizes}"])
    Pretrain.parse_and_run()
    source, target = out / "checkpoint_00.pth", out / "weights.safetensors"
    export(str(source), str(target), inference=True)
    export(str(target), str(out / "again.safetensors"))
    saved = YAML(typ="safe").load(out / "config.yaml")["bert_config"]
    assert saved == load_checkpoint(source)["config"]["bert_config"] == asdict(BertConfig.read(str(sizes)))
    tokenizer = build_tokenizer(str(paths["data"] / "bert"))
    for path in (source, target):
        assert f"tokenizer: {len(tokenizer)} words" in inspect(str(path))

    asked = "A red Dog's KITE, two left-hand z\u00e9bras"
    before = simla.load(source, "cpu", text_encoder=str(paths["data"] / "bert")).encode_text(asked)
    sizes.write_text(json.dumps({**MODEL["bert_config"], "num_attention_heads": 4}))
    (paths["data"] / "bert").rename(paths["data"] / "elsewhere")
    images = sorted(str(path) for path in (paths["data"] / "images" / "test").iterdir())[:2]
    for path in (source, target, out / "again.safetensors"):
        model = simla.load(path, "cpu")
        assert torch.equal(model.encode_text(asked), before)
        ids = [side.batch_decode([side(asked)["input_ids"]]) for side in (tokenizer, model.tokenizer)]
        assert ids[0] == ids[1] and len(tokenizer) == len(model.tokenizer)
        assert model.keywords(images, top=3)[0][0][0] in tokenizer.get_vocab()
    sizes.unlink()
    assert torch.equal(simla.load(source, "cpu").encode_text(asked), before)
    content = load_checkpoint(source) | {"tokenizer": "{}"}
    torch.save(content, out / "damaged.pth")
    with pytest.raises(UserError, match=r"damaged\.pth: its tokenizer is damaged .* text_encoder="):
        simla.load(out / "damaged.pth", "cpu")


def test_an_exported_file_is_for_others_too_and_on_the_disk(tmp_path, monkeypatch):
    source, target = checkpoint_of("ve", tmp_path), tmp_path / "out.safetensors"
    on_disk = set()
    monkeypatch.setattr("os.fsync", lambda descriptor: on_disk.add(os.fstat(descriptor).st_ino))
    mask = os.umask(0o027)
    try:
        export(str(source), str(target))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640 and target.stat().st_ino in on_disk


@pytest.mark.parametrize("name", ["big.pth", "big.safetensors"])
def test_inspect_does_not_read_the_weights(name, tmp_path):
    """Resident memory counts pages of mapped files, too."""
    content = checkpoint_of("ve", tmp_path)
    state = {**load_checkpoint(content)["model"], "cls_head.9.weight": torch.zeros(64, 2**20)}  # 256 MiB
    torch.save({"model": state}, tmp_path / "big.pth")
    if name.endswith("safetensors"):
        export(str(tmp_path / "big.pth"), str(tmp_path / name))
    code = f"""
import re, sys
from simla.checkpoint.inspect import inspect
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
inspect({str(content)!r})
before = resident()
assert "256.0 MiB" in inspect({str(tmp_path / name)!r})
sys.exit(str(resident() - before) if resident() - before > 64 * 1024 else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inspect_says_whether_a_task_would_take_the_file(tmp_path):
    source = str(checkpoint_of("pretrain", tmp_path))
    sizes = {key: MODEL[key] for key in ("image_res", "vit", "bert_config")}
    torch.save({**load_checkpoint(source), "config": sizes}, tmp_path / "whole.pth")
    source = str(tmp_path / "whole.pth")
    text = inspect(source, "Retrieval", str(config_of("Retrieval", tmp_path)))
    assert "Retrieval with" in text and "tensors; fresh: idx_queue" in text and "mim_head.weight" in text
    text = inspect(source, "Retrieval", str(config_of("Retrieval", tmp_path)), ["queue_size=8"])
    assert "would refuse it" in text and "image_queue ((16, 24) in the file, (16, 8) in the model)" in text
    text = inspect(source, "NLVR", str(config_of("NLVR", tmp_path)))
    assert "would refuse it" in text and "NLVR starts from a pretrain_nlvr or nlvr checkpoint" in text
    text = inspect(source, "Pretrain", str(config_of("Pretrain", tmp_path)))
    assert text.endswith("all of the file")
    text = inspect(source, "Pretrain", str(config_of("Pretrain", tmp_path)), ["vit.num_heads=1"])
    assert "would refuse it" in text and "vit.num_heads 1, not" in text
    text = inspect(source, "zero_shot_retrieval", str(config_of("zero_shot_retrieval", tmp_path)))
    num_twins = sum(name.startswith("text_encoder_m.") for name in load_checkpoint(source)["model"])
    assert f"text_encoder_m.* ({num_twins} tensors)" in text and max(map(len, text.splitlines())) < 600


@pytest.mark.parametrize("task", TASKS)
def test_a_published_config_is_compared_without_building_the_model(task):
    """At full size it would take gigabytes."""
    names = {"Retrieval": "Retrieval_flickr", "zero_shot_retrieval": "Retrieval_flickr"}
    names["Pretrain_NLVR"] = "NLVR_Pretrain"
    config = ROOT / "configs" / f"{names.get(task, task)}.yaml"
    state = {"conv.weight": torch.empty(3, device="meta")}
    assert "would refuse it" in verdict(state, task, str(config), [], "x.pth", {})


def test_the_commands_end_with_one_sentence(tmp_path, monkeypatch, capsys):
    source = checkpoint_of("ve", tmp_path)

    def command(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["simla.checkpoint", *map(str, arguments)])
        command_line.main()

    command("export", source, tmp_path / "out.safetensors", "--inference")
    printed = capsys.readouterr().out
    assert "left out: " in printed and "text_encoder_m (" in printed
    for path in (tmp_path / "none.pth", tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match=str(path)):
            command("inspect", path)
    with pytest.raises(SystemExit, match="2"):
        command("export", source, tmp_path / "o.safetensors", "--task", "Cooking")

    command("inspect", source, "--check")
    assert "all checksums match, all weights are finite" in capsys.readouterr().out
    state = load_checkpoint(source)
    state["model"]["cls_head.0.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth: 1 of the \d+ values of cls_head\.0\.bias are NaN"):
        command("inspect", tmp_path / "nan.pth", "--check")

    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    source.write_bytes(content)
    done = run_forked("checkpoint/__main__.py", "inspect", source, "--check")
    assert done.returncode == 1 and "ve.pth is damaged" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("other", [None, "x", [], {"state": None}, {"state": {0: {"step": 1}}}])
def test_what_other_programs_keep_beside_the_weights_is_no_obstacle(tmp_path, other):
    source, target = tmp_path / "c.pth", tmp_path / "out.safetensors"
    content = torch.load(checkpoint_of("ve", tmp_path), weights_only=True)
    torch.save({**content, "optimizer": other, "metadata": other, "tokenizer": None, "ranks": 1}, source)
    assert "ve checkpoint" in inspect(str(source)) and "tokenizer" not in inspect(str(source))
    assert export(str(source), str(target)) == []
    with safe_open(target, "pt") as file:
        assert "tokenizer" not in file.metadata()
