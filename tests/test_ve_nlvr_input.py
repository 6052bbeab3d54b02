"""What the data of VE and NLVR become, and the sentence that bad input ends in."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from test_bad_input import fails
from test_ve_nlvr_scripts import make_task_files, records_of, write_config

import NLVR
import Pretrain_NLVR
import VE
from simla.configs.reader import read_config
from simla.configs.schema import NLVR as NLVR_TABLE
from simla.configs.schema import PRETRAIN_NLVR
from simla.dataset import loaders
from simla.dataset.items import Collate, evaluation_items, finetune_loader
from simla.dataset.nlvr import read_nlvr
from simla.dataset.pretrain import read_pairs
from simla.dataset.text import build_tokenizer
from simla.dataset.transforms import EvalTransform
from simla.dataset.ve import read_ve
from simla.utils import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_task_files(tmp_path_factory.mktemp("tiny"))


def write(folder: Path, entries: list[dict] | str, name: str = "entries.json") -> str:
    path = folder / name
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(path)


def ve_entry(**changes) -> dict:
    return {"image": "train/00000", "sentence": "two ducks", "label": "neutral", **changes}


def nlvr_entry(**changes) -> dict:
    images = ["train/00000.jpg", "train/00001.jpg"]
    return {"images": images, "sentence": "two ducks", "label": "True", "identifier": "a-1", **changes}


ENTRY = {VE: ve_entry, NLVR: nlvr_entry}


def record_of(monkeypatch, script, tiny, out: Path, *flags: object) -> dict:
    """What a script, run here, writes to log.txt, one line."""
    command = ["--device", "cpu", "--config", tiny[script.__name__], "--output_dir", out, *flags]
    monkeypatch.setattr("sys.argv", ["script", *map(str, command)])
    script.parse_and_run()
    (record,) = records_of(out)
    return record


# ---- labels ----


def test_ve_labels_and_images(tmp_path):
    labels = ["contradiction", "neutral", "entailment"]
    path = write(tmp_path, [ve_entry(label=label, extra=1) for label in labels])
    items = read_ve([path], "/pictures")
    assert [item["label"] for item in items] == [0, 1, 2]
    assert items[2] == {
        "images": ["/pictures/train/00000.jpg"],
        "text": "two ducks",
        "label": 2,
        "where": f"{path}: entry 2",
    }


@pytest.mark.parametrize("label", ["-", "Neutral", "", "entailment "])
def test_an_unknown_ve_label_is_named_with_the_known_ones(tmp_path, label):
    path = write(tmp_path, [ve_entry(), ve_entry(label=label)])
    with pytest.raises(UserError) as error:
        read_ve(path, "")
    assert str(error.value).startswith(f"{path}: entry 1: unknown label {label!r}, expected contradiction,")
    assert "neutral, entailment" in str(error.value)


@pytest.mark.parametrize(
    ("label", "number"),
    [("True", 1), ("true", 1), ("TRUE", 1), (True, 1), ("False", 0), ("false", 0), (False, 0)],
)
def test_nlvr_labels_as_text_or_json_booleans(tmp_path, label, number):
    (item,) = read_nlvr(write(tmp_path, [nlvr_entry(label=label)]), "/pictures")
    assert item["label"] == number and type(item["label"]) is int
    assert item["images"] == ["/pictures/train/00000.jpg", "/pictures/train/00001.jpg"]


@pytest.mark.parametrize("label", ["yes", "", 1, 0, None, ["True"], "none"])
def test_other_nlvr_labels_are_refused(tmp_path, label):
    path = write(tmp_path, [nlvr_entry(), nlvr_entry(label=label)])
    with pytest.raises(UserError) as error:
        read_nlvr(path, "")
    assert str(error.value).startswith(f"{path}: entry 1: 'label' must be True or False, found {label!r}")


@pytest.mark.parametrize("number", [1, 3])
def test_nlvr_takes_two_images(tmp_path, number):
    path = write(tmp_path, [nlvr_entry(images=["a.jpg"] * number)])
    with pytest.raises(UserError, match=rf"entry 0: 'images' must be two paths, found {number}"):
        read_nlvr(path, "")


@pytest.mark.parametrize(
    ("script", "content", "words"),
    [
        (VE, "[]", "no entries in"),
        (NLVR, "[]", "no entries in"),
        (Pretrain_NLVR, "[]", "no entries in"),
        (VE, [nlvr_entry()], "entry 0 has no 'image'"),
        (NLVR, [ve_entry()], "entry 0 has no 'images'"),
        (Pretrain_NLVR, [ve_entry()], "entry 0 has no 'caption'"),
        (VE, [{"image": "a.jpg", "caption": ["b"]}], "entry 0 has no 'sentence'"),
        (VE, [ve_entry(label=2)], "entry 0: 'label' must be text, found 2"),
        (VE, [ve_entry(label=None)], "entry 0: 'label' must be text, found None"),
        (VE, [{"image": "a", "sentence": "b"}], "entry 0 has no 'label'"),
        (NLVR, [nlvr_entry(images="a.jpg")], "entry 0: 'images' must be a non-empty list of texts"),
        (NLVR, [nlvr_entry(sentence=["a"])], "entry 0: 'sentence' must be text"),
        (NLVR, '[{"images": ["a.j', "not valid JSON"),
    ],
)
def test_empty_files_and_files_of_another_task(monkeypatch, tiny, tmp_path, script, content, words):
    path = write(tmp_path, content)
    flags = ["--config", tiny[script.__name__], "--output_dir", tmp_path / "out"]
    blind = ["sentence_only=true"] if script is VE else []
    for more in ([], blind):
        message = fails(monkeypatch, script, *flags, "--overrides", f"train_file={path}", *more)
        assert path in message and words in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


def test_text_assignment_does_not_evaluate(monkeypatch, tiny, tmp_path):
    flags = ["--config", tiny["Pretrain_NLVR"], "--output_dir", tmp_path, "--evaluate"]
    assert "NLVR.py --evaluate" in fails(monkeypatch, Pretrain_NLVR, *flags)


@pytest.mark.parametrize(
    "identifiers",
    [
        ["dev-1-0-0", None],
        ["dev-1-0-0", 7],
        ["dev-1-0-0", "dev-1-0-0"],
        ["dev-1-0-0", "a-1"],
        ["dev,1-0-0-0"] * 2,
    ],
)
def test_nlvr_without_official_identifiers_has_accuracy_alone_and_says_so(
    monkeypatch, capsys, tiny, tmp_path, identifiers
):
    """As in the published files, which have none."""
    entries = [nlvr_entry(identifier=identifier) for identifier in identifiers]
    path = write(tmp_path, entries)
    flags = ["--evaluate", "--overrides", f"test_file={path}"]
    record = record_of(monkeypatch, NLVR, tiny, tmp_path / "out", *flags)
    assert "test_consistency" not in record and "val_consistency" in record
    assert f"{path}: no consistency, and no file of predictions; for them" in capsys.readouterr().out
    written = [file.name for file in (tmp_path / "out" / "result").iterdir()]
    assert sorted(written) == ["nlvr.json", "nlvr_val_predictions.csv"]


# ---- images ----


def colour(folder: Path, name: str, value: int) -> str:
    Image.new("RGB", (40, 40), (value, 255 - value, 90)).save(folder / name)
    return str(folder / name)


def nlvr_loader(tiny, entries: list[dict], train: bool, **changes):
    overrides = [f"{key}={value}" for key, value in changes.items()]
    config = read_config(str(tiny["NLVR"]), NLVR_TABLE, overrides)
    tokenizer = build_tokenizer(config["text_encoder"])
    if train:
        return finetune_loader(entries, config, tokenizer, seed=0)
    items = evaluation_items(entries, config)
    return loaders.test_loader(items, config["batch_size_test"], config, Collate(tokenizer, 64))


def test_first_images_of_a_batch_come_first(tiny, tmp_path):
    files = [[colour(tmp_path, f"{i}_{slot}.png", 40 * i + 100 * slot) for slot in (0, 1)] for i in range(3)]
    entries = [nlvr_entry(images=pair, label=str(i == 1)) for i, pair in enumerate(files)]
    items = read_nlvr(write(tmp_path, entries), "")
    (batch,) = nlvr_loader(tiny, items, train=False, batch_size_test=8)
    assert batch["label"].tolist() == [0, 1, 0]
    transform = EvalTransform(32)
    expected = [transform(Image.open(files[i][slot])) for slot in (0, 1) for i in range(3)]
    assert torch.equal(batch["image"], torch.stack(expected))


def test_an_unreadable_second_image_replaces_the_whole_training_item(tiny, tmp_path):
    """With its sentence, label and both images; each failed read is counted with its file."""
    colour(tmp_path, "good.png", 200)
    (tmp_path / "bad.png").write_bytes(b"")
    entries = [nlvr_entry(images=["good.png", "good.png"], label="True", sentence="fine") for _ in range(7)]
    entries.append(nlvr_entry(images=["good.png", "bad.png"], label="False", sentence="broken"))
    items = read_nlvr(write(tmp_path, entries), "")
    batches = list(nlvr_loader(tiny, items, train=True, batch_size_train=4, **{"randaugment.num_ops": 0}))
    assert [batch["image"].shape for batch in batches] == [(8, 3, 32, 32)] * 2
    bad = [pair for batch in batches for pair in batch["bad"]]
    assert bad and set(bad) == {(str(tmp_path / "bad.png"), "empty file")}
    assert all(batch["label"].tolist() == [1] * 4 and batch["text"] == ["fine"] * 4 for batch in batches)


@pytest.mark.parametrize("script", [VE, NLVR, Pretrain_NLVR])
def test_a_training_run_names_and_counts_unreadable_images(monkeypatch, capsys, tiny, tmp_path, script):
    config = read_yaml(tiny[script.__name__])
    entries = json.loads(Path(config["train_file"]).read_text(encoding="utf-8"))
    root = Path(config.get("image_root") or Path(config["train_file"]).parent)
    for entry in entries:
        for key in ("image", "images"):
            if key in entry:
                value = entry[key]
                entry[key] = str(root / value) if key == "image" else [str(root / path) for path in value]
    nowhere = str(tmp_path / "nowhere")
    if script is NLVR:
        entries[0]["images"][1] = nowhere
    else:
        entries[0]["image"] = nowhere
    path = write(tmp_path, entries)
    flags = ["--overrides", "schedular.epochs=1", f"train_file={path}"]
    record = record_of(monkeypatch, script, tiny, tmp_path / "out", *flags)
    assert record["train_bad_images"] >= 1
    assert f"replaced an image that cannot be read: {nowhere}" in capsys.readouterr().out


def read_yaml(path: Path) -> dict:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", [VE, NLVR])
def test_evaluation_names_an_image_it_cannot_read(monkeypatch, tiny, tmp_path, script):
    gone = {"image": "train/gone"} if script is VE else {"images": ["train/00000.jpg", "train/gone.jpg"]}
    path = write(tmp_path, [ENTRY[script](), ENTRY[script](**gone)])
    flags = ["--config", tiny[script.__name__], "--output_dir", tmp_path / "out", "--evaluate", "--overrides"]
    message = fails(monkeypatch, script, *flags, f"test_file={path}")
    assert "train/gone.jpg: no such file" in message and f"{path}: entry 1" in message


# ---- texts ----


def test_texts_are_cleaned_and_keep_every_token(tiny, tmp_path):
    sentence = "Two <person>s; next-to THE ducks, " + "and more " * 20
    items = read_nlvr(write(tmp_path, [nlvr_entry(sentence=sentence)]), str(tiny["data"] / "images"))
    (batch,) = nlvr_loader(tiny, items, train=False)
    words = batch["text"][0].split(" ")
    assert words[:6] == ["two", "persons", "next", "to", "the", "ducks"] and len(words) == 30
    assert batch["text_ids"].shape[1] >= 31 and batch["text_mask"].all()  # [CLS], nothing cut


def test_captions_of_text_assignment_are_cut(tiny, tmp_path):
    image = str(tiny["data"] / "images" / "train" / "00000.jpg")
    entries = [{"image": image, "caption": ["duck " * 40, "ducks " * 40]} for _ in range(4)]
    config = read_config(
        str(tiny["Pretrain_NLVR"]), PRETRAIN_NLVR, [f"train_file={write(tmp_path, entries)}"]
    )
    assert (config["max_tokens"], config["min_crop_scale"]) == (25, 0.2)
    tokenizer = build_tokenizer(config["text_encoder"])
    pairs = read_pairs(config["train_file"])
    loader = finetune_loader(pairs, config, tokenizer, seed=0, max_tokens=config["max_tokens"])
    (batch,) = loader
    assert batch["text_ids"].shape == (4, 25) and batch["image"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("script", [VE, NLVR])
def test_a_sentence_longer_than_the_position_table_is_cut_and_named(
    monkeypatch, capsys, tiny, tmp_path, script
):
    path = write(tmp_path, [ENTRY[script](), ENTRY[script](sentence="two ducks " * 8)])
    flags = ["--evaluate", "--overrides", f"test_file={path}", "bert_config.max_position_embeddings=12"]
    record = record_of(monkeypatch, script, tiny, tmp_path / "out", *flags)
    assert sum(map(sum, record["test_confusion"])) == 2
    out = capsys.readouterr().out
    assert f"{path}: entry 1: more tokens than the text encoder's 12 positions, cut" in out
    assert f"{path}: entry 0" not in out


def test_sides_named_in_the_sentence_keep_the_images_as_they_are(tiny, tmp_path):
    """Neither image is mirrored under "left"; without it some are."""
    half = np.zeros((40, 40, 3), dtype=np.uint8)
    half[:, :20] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    mirrored = {}
    for sentence in ("the left picture is white", "the picture is white"):
        entry = nlvr_entry(images=["half.png", "half.png"], sentence=sentence)
        items = read_nlvr(write(tmp_path, [entry] * 16), "")
        changes = {"randaugment.num_ops": 0, "min_crop_scale": 1.0}
        batches = nlvr_loader(tiny, items, train=True, **changes)
        images = torch.cat([batch["image"] for batch in batches])
        mirrored[sentence] = (images[:, :, :, 0] < images[:, :, :, -1]).all(-1).all(-1)
    assert not mirrored["the left picture is white"].any()
    assert 8 < mirrored["the picture is white"].sum() < 24  # of 32


def test_published_configs_may_list_their_evaluation_files(tiny, tmp_path):
    config = read_yaml(tiny["NLVR"])
    lists = {key: [config[key]] for key in ("train_file", "val_file", "test_file")}
    read = read_config(str(write_config(tmp_path / "c.yaml", {**config, **lists})), NLVR_TABLE)
    assert len(read_nlvr(read["test_file"], read["image_root"])) == 7
