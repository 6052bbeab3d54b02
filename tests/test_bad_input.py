"""Bad input ends in one clear sentence, exit code 1, and nothing written over."""

import io
import json
import os
import socket
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import make_tiny, run

import Grounding
import Pretrain
import Pretrain_NLVR
import Retrieval
import zero_shot_retrieval
from simla.checkpoint.image_tokenizers import save_codebook
from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN, TABLES
from simla.dataset.items import TrainItems
from simla.dataset.loaders import train_loader
from simla.dataset.pretrain import pretrain_loader, read_pairs, read_sets
from simla.dataset.readers.annotations import TEXT, TEXTS, read_annotations
from simla.dataset.text import build_tokenizer
from simla.engine.bad_images import BadImages
from simla.engine.launch import script_arguments, start
from simla.models.dvae import KMeansCodebook
from simla.utils import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def fails(monkeypatch, script, *flags) -> str:
    """The sentence that a script's main raises."""
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cpu", *map(str, flags)])
    with pytest.raises(UserError) as error:
        script.parse_and_run()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- config ----


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quue_size=7", ["quue_size", "did you mean queue_size"]),
        ("schedular.epoch=7", ["schedular.epoch", "did you mean schedular.epochs"]),
        ("batch_size=many", ["batch_size", "int", "'many'"]),
        ("batch_size=true", ["batch_size", "int", "True"]),
        ("optimizer=3", ["optimizer", "section"]),
        ("batch_size=0", ["batch_size must be at least 1"]),
        ("log_steps=-1", ["log_steps must be at least 1"]),
        ("no_equals_sign", ["key=value"]),
        ("image_res=[1", ["not valid YAML"]),
        ("image_res.x=1", ["image_res is a value"]),
    ],
)
def test_config_keys(tiny, override, expected):
    with pytest.raises(UserError) as error:
        read_config(str(tiny["Pretrain"]), PRETRAIN, [override])
    assert all(part in str(error.value) for part in expected)


def test_overrides_reach_the_schedule_under_either_name(tiny, tmp_path):
    other = tmp_path / "c.yaml"
    other.write_text(tiny["Pretrain"].read_text().replace("schedular:", "scheduler:"))
    for path in (tiny["Pretrain"], other):
        for name in ("schedular", "scheduler"):
            schedule = read_config(str(path), PRETRAIN, [f"{name}.epochs=9"])["schedular"]
            assert schedule["epochs"] == 9 and schedule["warmup_epochs"] == 2
    other.write_text(tiny["Pretrain"].read_text() + "scheduler: {epochs: 1}\n")
    with pytest.raises(UserError, match="both schedular and scheduler"):
        read_config(str(other), PRETRAIN)


def test_config_file(tmp_path):
    with pytest.raises(UserError, match=r"missing.yaml cannot be read: No such file"):
        read_config(str(tmp_path / "missing.yaml"), PRETRAIN)
    (tmp_path / "c.yaml").write_text("image_res: 256\nbatch_size: [1,\n")
    with pytest.raises(UserError, match=r"c.yaml is not valid YAML: .*line 3"):
        read_config(str(tmp_path / "c.yaml"), PRETRAIN)
    (tmp_path / "c.yaml").write_text("- a list\n")
    with pytest.raises(UserError, match="must hold `key: value` lines"):
        read_config(str(tmp_path / "c.yaml"), PRETRAIN)
    (tmp_path / "c.yaml").write_text("image_res: 256\n")
    with pytest.raises(UserError, match="missing keys optimizer, schedular, train_file"):
        read_config(str(tmp_path / "c.yaml"), PRETRAIN)


def test_scheduler_is_accepted_beside_schedular(tiny, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(tiny["Pretrain"].read_text().replace("schedular:", "scheduler:"))
    assert read_config(str(path), PRETRAIN) == read_config(str(tiny["Pretrain"]), PRETRAIN)


# ---- annotation files ----


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"image": "a.jpg", "caption": "a"}, {"image": "b.j', ["not valid JSON", "truncated"]),
        ('{"image": "a.jpg"}', ["entry 0 has no 'caption'; found image"]),
        ('\n {"image": "a.jpg", "caption": []} \n', ["entry 0: 'caption' must be", "found []"]),
        ('{"caption": ["a", "b"]}', ["entry 0 has no 'image'"]),
        ('{"image": "a.jpg",\n "text": "a"}', ["must hold a JSON list", "dict with the keys image, text"]),
        ('{"images": [], "annotations": []}', ["must hold a JSON list, found dict with the keys images"]),
        ('{"task": "x", "questions": [{"question": "a"}]}', ["must hold a JSON list", "task, questions"]),
        ('{"12": [[1, 2, 3, 4]], "13": []}', ["must hold a JSON list", "12, 13"]),
        ('{"201": {"question": "a"}}', ["must hold a JSON list", "201"]),
        ("[]", ["no entries"]),
        ('[{"image": "a.jpg", "caption": "x"}, {"image": "a.jpg"}]', ["entry 1", "no 'caption'"]),
        ('[{"caption": "x"}]', ["entry 0", "no 'image'"]),
        ('[{"image": "a.jpg", "caption": []}]', ["entry 0", "'caption'", "non-empty list"]),
        ('[{"image": "a.jpg", "caption": [3]}]', ["entry 0", "'caption'", "[3]"]),
        ('[{"image": 7, "caption": "x"}]', ["entry 0", "'image' must be text", "7"]),
        ('["a.jpg"]', ["entry 0", "must be an object"]),
        (b"\xff\xfe\x00", ["not valid JSON"]),
    ],
)
def test_annotation_files(tmp_path, content, expected):
    path = tmp_path / "train.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_annotations(str(path), {"image": TEXT, "caption": TEXTS})
    assert all(part in str(error.value) for part in [*expected, str(path)]), str(error.value)


def test_a_pipe_for_an_annotation_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a.json cannot be read: not a file, but a pipe, socket or device"):
        read_annotations(str(tmp_path / "a.json"), {"image": TEXT})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_file", r"a\0b.json"),
        ("image_root", r"\0"),
        ("train_file", [{"path": "a\0.json", "weight": 1}]),
    ],
)
def test_a_path_with_the_character_nul_is_one_sentence(tiny, key, value):
    value = f'"{value}"' if isinstance(value, str) else json.dumps(value)
    with pytest.raises(UserError, match=f"{key} holds the character NUL, which no path can: .*x00"):
        read_config(str(tiny["Pretrain"]), PRETRAIN, [f"{key}={value}"])


def test_missing_annotation_file_in_both_scripts(monkeypatch, tiny, tmp_path):
    flags = ["--output_dir", tmp_path, "--config"]
    for script, key, config in (
        (Pretrain, "train_file", tiny["Pretrain"]),
        (zero_shot_retrieval, "test_file", tiny["Retrieval"]),
    ):
        message = fails(monkeypatch, script, *flags, config, "--overrides", f"{key}=/nowhere/x.json")
        assert "/nowhere/x.json cannot be read: No such file" in message


def test_image_paths_are_absolute_or_relative_to_the_root_or_the_file(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps([{"image": "x.jpg"}, {"image": "/abs/y.jpg"}]))
    first, second = read_annotations(str(tmp_path / "a.json"), {"image": TEXT})
    assert (first["images"], second["images"]) == ([str(tmp_path / "x.jpg")], ["/abs/y.jpg"])
    monkeypatch.setenv("PICTURES", "/pictures")
    rooted = read_annotations(str(tmp_path / "a.json"), {"image": TEXT}, "$PICTURES/all")
    assert [entry["images"] for entry in rooted] == [["/pictures/all/x.jpg"], ["/abs/y.jpg"]]


# ---- images ----


def test_an_empty_caption_is_no_text_to_train_on(tiny, tmp_path):
    """Of a pair without words the text would be [CLS] alone; shards count it, too."""
    image = str(next((tiny["data"] / "images" / "train").iterdir()))
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps([{"image": image, "caption": text} for text in (" ", "a dog")]))
    items = TrainItems(read_pairs(str(data)), lambda image, rng, may_flip: torch.zeros(3, 8, 8), 0)
    item = items[0, 0]
    assert item["text"] == "a dog" and {*item["bad"]} == {(image, "its text is empty")}


def loader_with_bad_images(tiny, folder, num_good: int, num_bad: int):
    """A training loader over entries whose first `num_bad` images are missing, empty or no images."""
    entries = []
    for i in range(num_bad):
        path = folder / f"bad{i}.jpg"
        if i % 3:
            path.write_bytes(b"" if i % 3 == 1 else b"<html>not found</html>")
        entries.append({"image": str(path), "caption": "a bad picture"})
    for i in range(num_good):
        Image.new("RGB", (40, 40), (i * 20 % 255, 30, 60)).save(folder / f"good{i}.jpg")
        entries.append({"image": str(folder / f"good{i}.jpg"), "caption": "a good picture"})
    (folder / "train.json").write_text(json.dumps(entries))
    config = read_config(str(tiny["Pretrain"]), PRETRAIN, [f"train_file={folder}/train.json", "batch_size=4"])
    entries = read_sets(config["train_file"])
    return pretrain_loader(entries, config, build_tokenizer(config["text_encoder"]), 32, 0)


def test_unreadable_images_are_replaced_and_counted(tiny, tmp_path):
    loader = loader_with_bad_images(tiny, tmp_path, num_good=5, num_bad=3)
    batches = list(loader)
    assert [batch["image"].shape[0] for batch in batches] == [4, 4]
    bad = [pair for batch in batches for pair in batch["bad"]]
    assert {Path(path).name for path, _ in bad} == {"bad0.jpg", "bad1.jpg", "bad2.jpg"}
    page = (
        "not an image: a web page (HTML or XML), perhaps that of a failed download; download the file again"
    )
    assert {cause for _, cause in bad} == {"no such file", "empty file", page}


def test_a_batch_with_none_readable_survives(tiny, tmp_path):
    """Eight entries, two readable: some batch of four has none, and is filled from the others."""
    loader = loader_with_bad_images(tiny, tmp_path, num_good=2, num_bad=6)
    seen_empty = False
    for epoch in range(8):
        loader.sampler.set_epoch(epoch)
        keys = list(loader.sampler)
        for number, batch in enumerate(loader):
            own = [index for _, index in keys[4 * number : 4 * number + 4]]
            seen_empty |= all(index < 6 for index in own)
            assert batch["image"].shape == (4, 3, 32, 32) and batch["image"].dtype == torch.uint8
    assert seen_empty


def test_nothing_readable_at_all_stops_with_a_file_name(monkeypatch, tiny, tmp_path):
    loader_with_bad_images(tiny, tmp_path, num_good=0, num_bad=8)
    codebook = tmp_path / "codebook.safetensors"
    flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path / "out", "--overrides"]
    flags += [f"train_file={tmp_path}/train.json", f"image_tokenizer.path={codebook}"]
    message = fails(monkeypatch, Pretrain, *flags)
    assert "none of the first 2000 training images could be read" in message and "bad7.jpg" in message
    save_codebook(KMeansCodebook(16), codebook)  # with a codebook it is the training loop that notices
    message = fails(monkeypatch, Pretrain, *flags)
    assert "images drawn in a row could not be read" in message and "bad" in message


def test_bad_images_are_counted_by_cause_and_the_first_of_each_is_named(capsys, caplog):
    bad = [("a.jpg", "truncated: 3 bytes"), ("b.jpg", "no such file"), ("c.jpg", "truncated: 4 bytes")]
    counter = BadImages()
    counter.add(bad, 97)
    printed = capsys.readouterr().out
    assert "a.jpg" in printed and "b.jpg" in printed and "c.jpg" not in printed
    resumed, other = BadImages(), BadImages()
    resumed.load_state_dict(json.loads(json.dumps(counter.state_dict())))
    resumed.add([("d.jpg", "no such file")], 0)
    assert "d.jpg" not in capsys.readouterr().out  # its cause was named before the stop
    other.merge(resumed.state_dict())
    with caplog.at_level("INFO"):
        assert other.report() == {
            "bad_images": 4,
            "bad_image_fraction": 4 / 101,
            "bad_image_causes": {"truncated": 2, "no such file": 2},
        }
    assert "4 of 101 images (3.96%) could not be read and were replaced: truncated 2, no" in caplog.text
    assert BadImages().report() == {"bad_images": 0, "bad_image_fraction": 0.0}


def test_accounts_of_versions_that_did_not_record_causes_add_up():
    total = BadImages()
    for num_bad in (2, 0, 3):
        total.merge({"num_bad": num_bad, "num_seen": 50})
    assert (total.num_bad, total.num_seen) == (5, 150)


def test_a_verdict_needs_a_number_of_images():
    counter = BadImages()
    assert not counter.are_too_many(499, 499, 0.01)
    assert not counter.are_too_many(25, 500, 0.05) and counter.are_too_many(26, 500, 0.05)


def test_too_many_bad_images_stop_the_run(monkeypatch, tiny, tmp_path):
    loader_with_bad_images(tiny, tmp_path, num_good=6, num_bad=6)
    codebook = tmp_path / "codebook.safetensors"
    save_codebook(KMeansCodebook(16), codebook)
    flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path / "out", "--overrides"]
    flags += [f"train_file={tmp_path}/train.json", f"image_tokenizer.path={codebook}"]
    monkeypatch.setattr(BadImages, "CHECK_AFTER", 8)
    message = fails(monkeypatch, Pretrain, *flags, "max_bad_fraction=0.1")
    assert "images of this epoch could not be read, more than max_bad_fraction 0.1; the last one: " in message
    assert f"{tmp_path}/bad" in message
    args = script_arguments("x", "", str(tmp_path / "all")).parse_args(["--device", "cpu"])
    values = [*map(str, flags[5:]), "max_bad_fraction=1", "schedular.epochs=1"]
    Pretrain.main(args, read_config(str(tiny["Pretrain"]), PRETRAIN, values))
    (record,) = map(json.loads, (tmp_path / "all" / "log.txt").read_text().splitlines())
    causes = record["train_bad_image_causes"]
    assert set(causes) <= {"no such file", "empty file", "not an image"}
    assert sum(causes.values()) == record["train_bad_images"] > 0
    assert record["train_bad_image_fraction"] == record["train_bad_images"] / (
        12 + record["train_bad_images"]
    )


@pytest.mark.parametrize("how", ["{}", "pipe:cat {}"])
def test_what_shards_hold_beside_samples_is_in_the_account_of_an_epoch(tiny, tmp_path, how):
    content, file = (tiny["data"] / "images" / "train" / "00000.jpg").read_bytes(), tmp_path / "0.tar"
    names = [f"{number}.{kind}" for number in range(8) for kind in ("jpg", "txt", "mask.png")]
    with tarfile.open(file, "w") as tar:
        for name in [*names, "8.jpg"]:
            member = tarfile.TarInfo(name)
            member.size = len(content) if name.endswith("jpg") else 3
            tar.addfile(member, io.BytesIO(content if name.endswith("jpg") else b"dog"))
    save_codebook(KMeansCodebook(16), tmp_path / "codebook.safetensors")
    args = script_arguments("x", "", str(tmp_path / "out")).parse_args(["--device", "cpu"])
    values = [
        f"train_file={how.format(file)}",
        f"image_tokenizer.path={tmp_path}/codebook.safetensors",
        "batch_size=9",
    ]
    config = read_config(
        str(tiny["Pretrain"]), PRETRAIN, [*values, "max_bad_fraction=1", "schedular.epochs=1"]
    )
    Pretrain.main(args, config)
    (record,) = map(json.loads, (tmp_path / "out" / "log.txt").read_text().splitlines())
    assert record["train_passed_over"] == {"further images and captions of a key": 8}
    assert record["train_bad_image_causes"] == {"no caption": record["train_bad_images"]}


def test_evaluation_names_the_image_it_cannot_read(monkeypatch, tiny, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:100])
    entries = [{"image": name, "caption": ["a", "b"]} for name in ("good.jpg", "cut.jpg")]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    flags = ["--config", tiny["Retrieval"], "--output_dir", tmp_path / "out"]
    overrides = ["--overrides", f"test_file={tmp_path}/test.json"]
    for workers in (0, 1):
        message = fails(monkeypatch, zero_shot_retrieval, *flags, *overrides, f"num_workers={workers}")
        assert "cut.jpg" in message and "entry 1" in message


# ---- weights, devices, folders ----


def test_pretrained_weights_that_cannot_be_had_are_never_replaced_by_random_ones(monkeypatch, tiny, tmp_path):
    flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path]
    message = fails(
        monkeypatch, Pretrain, *flags, "--overrides", "init=pretrained", "image_encoder=/no/file.pth"
    )
    assert "/no/file.pth" in message and "init: scratch" in message
    assert "must be one of pretrained, image, text, scratch" in fails(
        monkeypatch, Pretrain, *flags, "--overrides", "init=random"
    )


def test_checkpoint_of_another_shape_or_kind(monkeypatch, tiny, tmp_path):
    args = script_arguments(Pretrain.__doc__, "", str(tmp_path / "a")).parse_args(["--device", "cpu"])
    Pretrain.main(args, read_config(str(tiny["Pretrain"]), PRETRAIN, ["schedular.epochs=1"]))
    checkpoint = tmp_path / "a" / "checkpoint_00.pth"
    flags = ["--output_dir", tmp_path / "b", "--checkpoint", checkpoint, "--config"]
    message = fails(monkeypatch, Pretrain, *flags, tiny["Pretrain"], "--overrides", "embed_dim=8")
    assert "vision_proj.weight" in message and str(checkpoint) in message
    wider = "--overrides", "vision_width=64", "bert_config.encoder_width=64"
    message = fails(monkeypatch, zero_shot_retrieval, *flags, tiny["Retrieval"], *wider)
    assert "of another shape" in message
    resumed = [*flags, tiny["Pretrain"], "--resume", "--overrides", "embed_dim=8"]
    assert "vision_proj.weight" in fails(monkeypatch, Pretrain, *resumed)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    broken = [
        "--config",
        tiny["Pretrain"],
        "--output_dir",
        tmp_path / "b",
        "--checkpoint",
        tmp_path / "text.pth",
    ]
    assert "text.pth" in fails(monkeypatch, Pretrain, *broken)
    broken[-1] = tmp_path / "nowhere.pth"
    assert "nowhere.pth" in fails(monkeypatch, Pretrain, *broken)
    assert not list((tmp_path / "b").glob("*.pth"))


def test_resume_needs_a_checkpoint(monkeypatch, tiny, tmp_path):
    message = fails(monkeypatch, Pretrain, "--config", tiny["Pretrain"], "--output_dir", tmp_path, "--resume")
    assert f"{tmp_path} holds no good checkpoint" in message and "--checkpoint" in message


def test_vocabulary_larger_than_the_model(monkeypatch, tiny, tmp_path):
    flags = [
        "--config",
        tiny["Pretrain"],
        "--output_dir",
        tmp_path,
        "--overrides",
        "bert_config.vocab_size=50",
    ]
    assert "raise its vocab_size" in fails(monkeypatch, Pretrain, *flags)
    flags[1] = tiny["Retrieval"]
    assert "raise its vocab_size" in fails(monkeypatch, zero_shot_retrieval, *flags)


def test_more_hidden_patches_than_patches(monkeypatch, tiny, tmp_path):
    flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path, "--overrides", "num_masking_patches=17"]
    assert "num_masking_patches 17 exceeds the 4 x 4 patches" in fails(monkeypatch, Pretrain, *flags)


@pytest.mark.parametrize(
    ("key", "batch_size", "accumulation", "expected"),
    [
        ("batch_size", 5, 1, r"of 5 \(batch_size 5 x 1 rank\(s\)\); lower batch_size$"),
        (
            "batch_size_train",
            2,
            2,
            r"\(batch_size_train 2 x grad_accumulation_steps 2 x 1 rank\(s\)\); lower ",
        ),
        ("batch_size_train", 2, 2, "lower batch_size_train or grad_accumulation_steps$"),
        ("batch_size_train", 1, 9, "lower grad_accumulation_steps$"),
    ],
)
def test_what_makes_a_step_too_large_is_named(key, batch_size, accumulation, expected):
    config = {key: batch_size, "grad_accumulation_steps": accumulation, "num_workers": 0}
    with pytest.raises(UserError, match="3 training samples are fewer than a step .*" + expected):
        train_loader([0, 1, 2], batch_size, 0, config, list)


def test_missing_weights_are_found_before_a_codebook_is_fitted(monkeypatch, tiny, tmp_path):
    codebook = tmp_path / "codebook.safetensors"
    flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path / "out", "--overrides", "init=pretrained"]
    (tmp_path / "vit.pth").write_bytes(b"")
    flags += [f"image_tokenizer.path={codebook}", f"image_encoder={tmp_path / 'vit.pth'}"]
    assert f"{tmp_path / 'vit.pth'}" in fails(monkeypatch, Pretrain, *flags)
    assert not codebook.exists()


def test_more_ranks_times_batch_than_samples(monkeypatch, tiny, tmp_path):
    flags = ["--config", tiny["Pretrain"], "--output_dir", tmp_path, "--overrides", "batch_size=100"]
    assert "lower batch_size" in fails(monkeypatch, Pretrain, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
@pytest.mark.parametrize(
    ("script", "name", "least"),
    [
        (Pretrain, "batch_size", 2),
        (Retrieval, "batch_size_train", 2),
        (Grounding, "batch_size_train", 2),
        (Pretrain_NLVR, "batch_size_train", 3),
    ],
)
def test_a_batch_that_holds_no_negatives_is_refused(monkeypatch, tmp_path, script, name, least):
    """With a file that is not there: what comes later fails at that."""
    config = {Pretrain: "Pretrain", Retrieval: "Retrieval_coco", Grounding: "Grounding"}
    flags = "--config", f"configs/{config.get(script, 'NLVR_Pretrain')}.yaml", "--output_dir", tmp_path
    overrides = "train_file=nowhere.json", "grad_accumulation_steps=9", "text_encoder=nowhere"
    message = fails(monkeypatch, script, *flags, "--overrides", *overrides, f"{name}={least - 1}")
    assert f"{name} is {least - 1}" in message and f"make it {least} or larger" in message
    assert "grad_accumulation_steps does not help" in message and not list(tmp_path.iterdir())
    message = fails(monkeypatch, script, *flags, "--overrides", *overrides, f"{name}={least}")
    assert "nowhere" in message
    if script in (Retrieval, Grounding):
        message = fails(monkeypatch, script, *flags, "--evaluate", "--overrides", *overrides, f"{name}=1")
        assert "nowhere" in message


def test_gpu_asked_for_where_there_is_none(tmp_path):
    args = script_arguments("x", "c", str(tmp_path)).parse_args(["--device", "cuda"])
    with pytest.raises(UserError, match="GPU 0 asked for, 0 found"):
        start(args, {})


def test_device_that_does_not_exist(tmp_path):
    args = script_arguments("x", "c", str(tmp_path)).parse_args(["--device", "toaster"])
    with pytest.raises(UserError, match="expected auto, cpu, cuda"):
        start(args, {})


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("here first")
    for folder in (tmp_path / "file", "/proc/simla"):
        args = script_arguments("x", "c", str(folder)).parse_args(["--device", "cpu"])
        with pytest.raises(UserError, match="cannot be written"):
            start(args, {"precision": "fp32", "wandb": {}})
    assert (tmp_path / "file").read_text() == "here first"


def test_the_user_sees_one_sentence_and_exit_code_1(tiny, tmp_path):
    done = run(
        "Pretrain.py",
        *("--config", tiny["Pretrain"], "--output_dir", tmp_path, "--overrides", "btch_size=3"),
        launcher="python",
    )
    assert done.returncode == 1
    assert "did you mean batch_size?" in done.stderr and "Traceback" not in done.stderr


def test_a_port_in_use_is_named(tiny, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        done = run(
            "Pretrain.py",
            *("--config", tiny["Pretrain"], "--output_dir", tmp_path),
            env={**variables, "MASTER_PORT": str(port)},
        )
    assert done.returncode == 1
    assert (
        str(port) in done.stderr and "is the port in use?" in done.stderr and "Traceback" not in done.stderr
    )


def test_one_failing_rank_ends_all(tiny, tmp_path):
    """Only rank 1's share has an unreadable image; rank 0 does not wait for it, and shows no traceback."""
    for name in ("good.jpg", "bad.jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    (tmp_path / "bad.jpg").write_bytes(b"")
    entries = [{"image": name, "caption": ["a", "b"]} for name in ("good.jpg", "bad.jpg")]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    flags = ["--config", tiny["Retrieval"], "--output_dir", tmp_path / "out"]
    overrides = ["--overrides", f"test_file={tmp_path}/test.json"]
    done = run("zero_shot_retrieval.py", *flags, *overrides, num_processes=2)
    assert done.returncode != 0
    assert "error (rank 1): " in done.stderr and "bad.jpg: empty file" in done.stderr
    assert "in gather" not in done.stderr and "in all_gather" not in done.stderr


def test_a_failing_run_leaves_the_folder_of_an_earlier_one_alone(monkeypatch, tiny, tmp_path):
    (tmp_path / "config.yaml").write_text("of an earlier run")
    for script, config in ((Pretrain, tiny["Pretrain"]), (zero_shot_retrieval, tiny["Retrieval"])):
        flags = ["--config", config, "--output_dir", tmp_path, "--checkpoint", tmp_path / "none.pth"]
        assert "none.pth" in fails(monkeypatch, script, *flags)
    left = ["config.yaml", "evaluation_none", "run.json"]  # the evaluation is beside the training
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert (tmp_path / "config.yaml").read_text() == "of an earlier run"


def test_pretraining_does_not_evaluate(monkeypatch, tiny, tmp_path):
    message = fails(
        monkeypatch, Pretrain, "--config", tiny["Pretrain"], "--output_dir", tmp_path, "--evaluate"
    )
    assert "zero_shot_retrieval.py" in message


def test_masked_words_belong_to_the_item_not_to_the_batch(tiny, tmp_path):
    config = read_config(str(tiny["Pretrain"]), PRETRAIN, ["mlm_probability=0.5"])
    entries = read_sets(config["train_file"])
    loader = pretrain_loader(entries, config, build_tokenizer(config["text_encoder"]), 32, 0)
    items = [loader.dataset[(0, index)] for index in range(6)]
    whole, alone = loader.collate_fn(items), [loader.collate_fn([item]) for item in items]
    for row, single in enumerate(alone):
        length = single["mlm_ids"].shape[1]
        assert torch.equal(whole["mlm_ids"][row, :length], single["mlm_ids"][0])
        assert torch.equal(whole["mlm_labels"][row, :length], single["mlm_labels"][0])
        assert (whole["mlm_labels"][row, length:] == -100).all() and (
            whole["mlm_ids"][row, length:] == 0
        ).all()


def test_one_value_of_a_bert_config_file_can_be_overridden():
    """As the message about a larger vocabulary advises."""
    config = read_config("configs/VE.yaml", TABLES["VE"], ["bert_config.vocab_size=31000"])
    assert config["bert_config"]["vocab_size"] == 31000 and config["bert_config"]["hidden_size"] == 768
