"""VQA.py for real: its files, training, resuming, ranks, bad input, the list of answers. As a program:
evaluates as N forked ranks, since the imports take longer than the work.
"""

import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ruamel.yaml import YAML
from tiny import MODEL, ROOT, make_tiny, run, run_forked

import VQA
from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN
from simla.configs.schema import VQA as TABLE
from simla.dataset import vqa as vqa_data
from simla.dataset.items import Collate
from simla.dataset.prepare.answers import main as list_answers
from simla.dataset.text import build_tokenizer, clean_question
from simla.dataset.vqa import VQAEvalData, answer_texts, read_answer_list, vqa_loader
from simla.engine.peers import leave_together
from simla.evaluation.vqa import answer_scores, best_constant, mean_by_label
from simla.models.vqa import SIMLAVQA
from simla.plots import plot_answers
from simla.utils import UserError

PLACE = "what is the place?"
ENTRY = {"dataset": "vqa", "image": "a.jpg", "question": PLACE, "question_id": 1, "answer": ["beach"]}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def questions(data: Path, split: str, first_id: int = 0) -> list[dict]:
    """Two questions about every scene; annotators disagree about the place."""
    entries = []
    for number, scene in enumerate(json.loads((data / f"scenes_{split}.json").read_text())):
        kind, place = scene["objects"][0]["kind"], scene["background"]
        places = [place] * (6 + number % 4) + ["the sea"] * (4 - number % 4)
        count = sum(thing["kind"] == kind for thing in scene["objects"])
        rows = ((PLACE, places, "what", "other"), (f"how many {kind}s?", [str(count)] * 10, "how", "number"))
        for question, answers, question_type, answer_type in rows:
            entry = {"dataset": "vqa", "image": scene["image"], "question": question, "answer": answers}
            types = {"question_type": question_type, "answer_type": answer_type}
            entries.append({**entry, **types, "question_id": first_id + len(entries)})
    return entries


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A data folder with questions and a config: {"data", "config"}."""
    folder = tmp_path_factory.mktemp("tiny")
    data = make_tiny(folder)["data"]
    train = questions(data, "train")
    genome = [{**entry, "dataset": "vg", "answer": entry["answer"][0]} for entry in train[:8]]
    write(data / "vqa_train.json", train)
    write(data / "vg_train.json", genome)
    write(data / "vqa_val.json", questions(data, "val"))
    write(data / "vqa_test.json", questions(data, "test", 7000)[:-1])  # 13, which 2 and 3 ranks do not divide
    answers = list(dict.fromkeys(answer for entry in train for answer in entry["answer"]))
    write(data / "answer_list.json", answers)
    config = {name: value for name, value in MODEL.items() if name not in ("embed_dim", "queue_size")}
    config |= {
        "train_file": [str(data / "vqa_train.json"), str(data / "vg_train.json")],
        "val_file": str(data / "vqa_val.json"),
        "test_file": str(data / "vqa_test.json"),
        "answer_list": str(data / "answer_list.json"),
        "text_encoder": str(data / "bert"),
        "batch_size_train": 8,
        "batch_size_test": 3,
        "k_test": 4,
        "max_answer_tokens": 3,
        "optimizer": {"lr": 1e-3},
        "schedular": {"epochs": 2, "warmup_epochs": 1, "warmup_step_size": 2},
    }
    with (folder / "VQA.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(config, file)
    return {"data": data, "config": folder / "VQA.yaml", "num_answers": len(answers)}


def config_of(tiny: dict, *overrides: str) -> dict:
    return read_config(str(tiny["config"]), TABLE, list(overrides))


def tokenizer_of(tiny: dict):
    return build_tokenizer(str(tiny["data"] / "bert"))


def vqa(monkeypatch, tiny: dict, out: Path, *flags: object) -> dict[str, float]:
    """VQA.py in this process -> the accuracies of result/vqa_accuracy.json, if there are any."""
    common = ["--device", "cpu", "--config", tiny["config"], "--output_dir", out]
    monkeypatch.setattr(sys, "argv", ["VQA.py", *map(str, common), *map(str, flags)])
    VQA.parse_and_run()
    if not (out / "result" / "vqa_accuracy.json").exists():
        return {}
    return {name: x for name, x in result(out, "vqa_accuracy").items() if name.startswith("accuracy")}


def result(out: Path, name: str) -> list | dict:
    return json.loads((out / "result" / f"{name}.json").read_text())


# ---- data ----


def test_a_training_batch(tiny):
    """Distinct answers with their share of the annotators and the end mark; Visual Genome counts half."""
    config, tokenizer = config_of(tiny, "batch_size_train=56", "max_tokens=4"), tokenizer_of(tiny)
    loader = vqa_loader(config, tokenizer, seed=1)
    batch, keys = next(iter(loader)), [index for _, index in loader.sampler]
    entries = json.loads((tiny["data"] / "vqa_train.json").read_text())
    entries += json.loads((tiny["data"] / "vg_train.json").read_text())
    assert sorted(keys) == list(range(56)) and batch["text_ids"].shape == (56, 4)
    answers = iter(zip(batch["answer_ids"], batch["answer_mask"], batch["weights"], strict=True))
    for index, num_answers in zip(keys, batch["num_answers"].tolist(), strict=True):
        given, share = entries[index]["answer"], 0.1
        given, share = ([given], 0.5) if isinstance(given, str) else (given, share)
        assert num_answers == len(set(given))
        for text in dict.fromkeys(given):
            ids, mask, weight = next(answers)
            pieces = tokenizer(text)["input_ids"]
            assert ids[: mask.sum()].tolist() == [*pieces, tokenizer.sep_token_id]
            assert pieces[0] == tokenizer.cls_token_id and ids[mask == 0].eq(tokenizer.pad_token_id).all()
            assert weight.item() == pytest.approx(given.count(text) * share)
    assert next(answers, None) is None


def test_questions_are_cut_in_training_only(tiny, tmp_path):
    long = {**ENTRY, "question": " ".join(["tree"] * 60), "image": str(tiny["data"] / "images/val/00000.jpg")}
    path, tokenizer = write(tmp_path / "q.json", [long]), tokenizer_of(tiny)
    config = config_of(tiny, f"train_file={path}", "batch_size_train=1", "max_tokens=40")
    assert next(iter(vqa_loader(config, tokenizer, 0)))["text_ids"].shape == (1, 1 + 30)  # words
    config["max_tokens"] = 25
    assert next(iter(vqa_loader(config, tokenizer, 0)))["text_ids"].shape == (1, 25)  # tokens
    batch = Collate(tokenizer, 64, clean=clean_question)([VQAEvalData(str(path), config, is_test=True)[0]])
    assert batch["text_ids"].shape == (1, 1 + 50) and batch["text"] == [clean_question(long["question"], 50)]


@pytest.mark.parametrize("answer", ["left", "beach"])
def test_no_mirroring_under_an_answer_that_names_a_side(tiny, tmp_path, answer):
    entries = [{**ENTRY, "image": str(tiny["data"] / "images/val/00000.jpg"), "answer": [answer, "x"]}] * 16
    path = write(tmp_path / "q.json", entries)
    overrides = [f"train_file={path}", "min_crop_scale=1.0", "randaugment.num_ops=0", "batch_size_train=16"]
    images = next(iter(vqa_loader(config_of(tiny, *overrides), tokenizer_of(tiny), 0)))["image"]
    mirrored = [torch.equal(image, images[0].flip(-1)) for image in images]
    assert any(mirrored) == (answer == "beach")


def test_each_data_set_has_its_own_root(tiny, tmp_path):
    path = write(tmp_path / "q.json", [ENTRY, {**ENTRY, "dataset": "vg"}, {**ENTRY, "image": "/abs/b.jpg"}])
    for overrides, expected in (
        ([], [tmp_path / "a.jpg", tmp_path / "a.jpg"]),
        (["image_root=/all"], ["/all/a.jpg", "/all/a.jpg"]),
        (["vqa_root=/coco", "vg_root=/genome"], ["/coco/a.jpg", "/genome/a.jpg"]),
        (["vg_root=/genome", "image_root=/all"], ["/all/a.jpg", "/genome/a.jpg"]),
    ):
        entries = vqa_data.read_questions(str(path), config_of(tiny, *overrides))
        assert [entry["images"][0] for entry in entries] == [*map(str, expected), "/abs/b.jpg"]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{**ENTRY, "dataset": "gqa"}], ["entry 0", "'dataset' must be 'vqa' or 'vg', found 'gqa'"]),
        ([ENTRY, ENTRY], ["entry 1", "question_id 1", "entry 0"]),
        ([{k: v for k, v in ENTRY.items() if k != "question_id"}], ["entry 0 has no 'question_id'"]),
        ([{**ENTRY, "question_id": 1.0}], ["'question_id' must be a whole number or text, found 1.0"]),
        ([{**ENTRY, "question_id": None}], ["'question_id' must be a whole number or text, found None"]),
        ([{**ENTRY, "question_id": "01"}] * 2, ["entry 1", "question_id '01'", "entry 0"]),
        ([{"image": "a.jpg", "caption": ["a"]}], ["entry 0 has no 'dataset'; found image, caption"]),
        ([{**ENTRY, "answer": []}], ["'answer' must be text or a non-empty list of texts, found []"]),
        ([{**ENTRY, "answer": [3]}], ["entry 0: 'answer' must be", "[3]"]),
        (
            [ENTRY, {**{k: ENTRY[k] for k in ENTRY if k != "answer"}, "question_id": 2}],
            ["entry 1", "'answer'"],
        ),
        ([], ["no entries", "q.json"]),
    ],
)
def test_annotation_files_that_do_not_fit(tiny, tmp_path, entries, expected):
    path = write(tmp_path / "q.json", entries)
    with pytest.raises(UserError) as error:
        VQAEvalData([str(path)], config_of(tiny), is_test=True)
    assert all(part in str(error.value) for part in [*expected, str(path)]), str(error.value)


def test_a_val_file_needs_answers_but_no_question_ids(tiny, tmp_path):
    path = write(tmp_path / "q.json", [{k: v for k, v in ENTRY.items() if k != "question_id"}])
    assert VQAEvalData(str(path), config_of(tiny), is_test=False).annotations == [["beach"]]
    path = write(tmp_path / "q.json", [{k: v for k, v in ENTRY.items() if k != "answer"}])
    with pytest.raises(UserError, match=r"q.json: entry 0 has no 'answer'"):
        VQAEvalData(str(path), config_of(tiny), is_test=False)
    assert VQAEvalData(str(path), config_of(tiny), is_test=True).annotations is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], ["an empty list", "python -m simla.dataset.prepare answers"]),
        ({"yes": 1}, ["must hold a JSON list, found dict"]),
        (["yes", 2], ["each a text, found 2"]),
        (["yes", " "], ["each a text, found ' '"]),
        (["yes", "\u200b"], ["each a text, found '\\u200b'"]),  # a text without a token
        (["yes", "tree " * 80], ["82 tokens long", "64 positions", "max_position_embeddings"]),
    ],
)
def test_answer_lists_that_do_not_fit(tiny, tmp_path, content, expected):
    path = write(tmp_path / "answers.json", content)
    with pytest.raises(UserError) as error:
        read_answer_list(str(path), tokenizer_of(tiny), "[SEP]", 64)
    assert all(part in str(error.value) for part in [*expected, str(path)]), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "kept", "said"),
    [
        (["yes", "Yes", "no", "NO", " yes"], ["yes", "no"], "3 of 5 answers .*such as 'Yes' with 'yes'"),
        (["two", "yes", "two"], ["two", "yes"], "1 of 3 answers .*such as 'two' with 'two'"),
        (["a  tree", "a tree", "á tree"], ["a  tree"], "2 of 3 answers .*such as 'a tree' with 'a  tree'"),
        (["yes", "yes yes", "no"], ["yes", "yes yes", "no"], None),
    ],
)
def test_answers_of_the_same_tokens_are_merged_and_said(tiny, tmp_path, caplog, content, kept, said):
    """As two answers they would share the first places of `k_test` and each other's probability."""
    path = write(tmp_path / "answers.json", content)
    with caplog.at_level(logging.WARNING, "simla"):
        answers = read_answer_list(str(path), tokenizer_of(tiny), "[SEP]", 64)
    assert answers.texts == kept and len(answers.ids) == len(kept)
    if said is None:
        assert not caplog.text
    else:
        assert re.search(f"answer_list {path}: {said}", caplog.text)


def test_question_ids_as_text_are_written_back_unchanged(tiny, tmp_path, monkeypatch):
    """As GQA has them; "01" is not "1"."""
    entries = json.loads((tiny["data"] / "vqa_test.json").read_text())[:3]
    ids = ["01827492", "1827492", 1827492]
    for entry, number in zip(entries, ids, strict=True):
        entry |= {"question_id": number, "image": str(tiny["data"] / entry["image"])}
    path = write(tmp_path / "q.json", entries)
    accuracies = vqa(monkeypatch, tiny, tmp_path, "--evaluate", "--overrides", f"test_file={path}")
    assert 0 <= accuracies["accuracy"] <= 100
    for name in ("vqa_result_epoch0", "vqa_top_answers"):
        assert [row["question_id"] for row in result(tmp_path, name)] == ids


def test_a_training_answer_beyond_the_position_table_is_cut_and_said(tiny, tmp_path, caplog):
    entry = {**ENTRY, "image": str(tiny["data"] / "images/val/00000.jpg"), "answer": ["tree " * 80, "sea"]}
    path = write(tmp_path / "q.json", [entry])
    config = config_of(tiny, f"train_file={path}", "batch_size_train=1")
    with caplog.at_level(logging.WARNING, "simla"):
        batch = next(iter(vqa_loader(config, tokenizer_of(tiny), 0)))
    assert batch["answer_ids"].shape == (2, 64) and f"{path}: entry 0: more tokens than" in caplog.text


def test_the_answer_list_builder(tiny, tmp_path, capsys):
    entries = [
        {**ENTRY, "answer": ["beach", "a Beach", "beach", "sea"]},
        {**ENTRY, "dataset": "vg", "answer": "two"},
    ]
    train = [write(tmp_path / "a.json", entries), write(tmp_path / "b.json", [entries[1]])]
    out = tmp_path / "answers.json"

    def build(*flags: object) -> list[str]:
        list_answers(["--train", *map(str, train), "--out", str(out), *map(str, flags)])
        return json.loads(out.read_text())

    assert build() == ["two", "beach"]
    assert build("--num", 1) == build("--min_count", 2) == ["two"]
    assert "1 answers, the most common one of 66.7% of 3 questions" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no answer in .*a.json, .*b.json is counted 3 times"):
        build("--min_count", 3)
    out = tmp_path / "nowhere" / "answers.json"
    with pytest.raises(UserError, match=r"answers.json could not be written \(.*No such file"):
        build()


# ---- the script ----


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Two epochs on two ranks, as a user starts them."""
    out = tmp_path_factory.mktemp("trained")
    done = run("VQA.py", "--config", tiny["config"], "--output_dir", out, num_processes=2)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_training_writes_its_outputs(trained, tiny):
    out, stdout = trained
    *epochs, last = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in epochs] == [0, 1]
    names = ("train_loss", "train_lr", "val_accuracy", "val_accuracy_number", "val_accuracy_other")
    assert all(isinstance(record[name], float) for record in epochs for name in names)
    assert sorted(path.name for path in out.glob("*.pth")) == ["checkpoint_00.pth", "checkpoint_01.pth"]
    checkpoint = torch.load(out / "checkpoint_01.pth", weights_only=True)
    assert checkpoint["epoch"] == 1 and "text_decoder_m.cls.predictions.bias" in checkpoint["model"]

    entries = json.loads((tiny["data"] / "vqa_test.json").read_text())
    submission = result(out, "vqa_result_epoch1")
    assert [set(row) for row in submission] == [{"question_id", "answer"}] * 13
    assert [row["question_id"] for row in submission] == [entry["question_id"] for entry in entries]
    annotations = [entry["answer"] for entry in entries]
    scores = answer_scores([row["answer"] for row in submission], annotations)
    accuracy = result(out, "vqa_accuracy")
    assert accuracy["accuracy"] == last["test_accuracy"] == sum(scores) / 13
    by_type = mean_by_label(scores, [entry["answer_type"] for entry in entries])
    assert by_type == {name: last[f"test_accuracy_{name}"] for name in ("number", "other")}
    assert accuracy["by_question_type"] == {"how": by_type["number"], "what": by_type["other"]}
    constant, score = best_constant(annotations)
    assert accuracy["best_constant"] == {"answer": constant, "accuracy": score}
    assert (accuracy["n"], accuracy["k_test"], accuracy["inference"]) == (13, 4, "rank")
    assert accuracy["weights"] == str(out / "checkpoint_01.pth") and f"always {constant!r}" in stdout


def test_top_answers_have_probabilities(trained, tiny):
    out, _ = trained
    known = json.loads((tiny["data"] / "answer_list.json").read_text())
    for row, first in zip(result(out, "vqa_top_answers"), result(out, "vqa_result_epoch1"), strict=True):
        assert row["answers"][0] == first["answer"] and row["question_id"] == first["question_id"]
        assert len(set(row["answers"])) == 4 and set(row["answers"]) <= set(known)
        assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_every_rank_count_gives_the_same_answers(trained, tiny, tmp_path):
    out, _ = trained
    done = run_forked(__file__, tiny["config"], out / "checkpoint_01.pth", tmp_path)
    assert done.returncode == 0, done.stderr
    for inference in ("rank", "generate"):
        folders = [tmp_path / f"{inference}{num_ranks}" for num_ranks in (1, 2, 3)]
        for name in ("vqa_result_epoch0", "vqa_accuracy", "vqa_top_answers"):
            first, *others = (result(folder, name) for folder in folders)
            if name != "vqa_top_answers":
                assert all(other == first for other in others)
                continue
            for rows in zip(first, *others, strict=True):
                assert len({tuple(row["answers"]) for row in rows}) == 1
                assert all(r["probabilities"] == pytest.approx(rows[0]["probabilities"], 1e-4) for r in rows)
        logs = {(folder / "log.txt").read_text() for folder in folders}
        assert len(logs) == 1 and "test_accuracy_number" in logs.pop()
    # what the run itself reported of these weights
    assert result(tmp_path / "rank1", "vqa_result_epoch0") == result(out, "vqa_result_epoch1")
    generated = result(tmp_path / "generate1", "vqa_accuracy")
    assert (generated["inference"], generated["num_beams"]) == ("generate", 3) and "k_test" not in generated


def stop_at_second_call(function):
    calls = []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*args)

    return stopping


def test_an_interrupted_run_resumes_as_if_unbroken(tiny, tmp_path, monkeypatch):
    whole = vqa(monkeypatch, tiny, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VQA, "answer", stop_at_second_call(VQA.answer))
        vqa(patch, tiny, tmp_path / "broken")
    resumed = vqa(monkeypatch, tiny, tmp_path / "broken", "--resume")
    assert resumed == whole and "accuracy" in whole
    states = [torch.load(tmp_path / name / "checkpoint_01.pth")["model"] for name in ("whole", "broken")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 3


def test_without_answers_there_are_results_but_no_accuracy(tiny, tmp_path, monkeypatch, capsys):
    entries = json.loads((tiny["data"] / "vqa_test.json").read_text())
    entries = [{k: e[k] for k in ("dataset", "image", "question", "question_id")} for e in entries[:4]]
    flags = [f"test_file={write(tmp_path / 'test.json', entries)}", f"image_root={tiny['data']}", "k_test=99"]
    (tmp_path / "out" / "result").mkdir(parents=True)
    write(tmp_path / "out" / "result" / "vqa_accuracy.json", {"of": "an earlier evaluation"})
    assert vqa(monkeypatch, tiny, tmp_path / "out", "--evaluate", "--overrides", *flags) == {}
    assert len(result(tmp_path / "out", "vqa_result_epoch0")) == 4
    assert len(result(tmp_path / "out", "vqa_top_answers")[0]["answers"]) == 5  # num_top_answers of all
    assert not (tmp_path / "out" / "result" / "vqa_accuracy.json").exists()
    assert not (tmp_path / "out" / "log.txt").exists()
    shown = capsys.readouterr().out
    assert f"k_test 99: all {tiny['num_answers']} answers are re-scored" in shown
    assert "only the server can score result/vqa_result_epoch0.json" in shown


def test_generated_answers_come_best_first(tiny, tmp_path, monkeypatch):
    flags = ["--evaluate", "--inference", "generate", "--overrides", "answer_list=/no/where.json"]
    accuracy = vqa(monkeypatch, tiny, tmp_path, *flags)
    assert set(accuracy) == {"accuracy", "accuracy_number", "accuracy_other"}
    for row in result(tmp_path, "vqa_top_answers"):
        assert len(row["answers"]) == 3 and row["probabilities"] == sorted(row["probabilities"], reverse=True)
        assert not any("[" in answer for answer in row["answers"])  # no special tokens


def test_a_generated_answer_is_scored_with_the_blanks_that_people_write(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "10", ":", "15", "t", "-", "shirt"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = build_tokenizer(str(tmp_path))
    answers = ["10:15", "t-shirt"]
    ids = torch.zeros(2, 1, 6, dtype=torch.long)
    for row, answer in enumerate(answers):
        tokens = tokenizer(answer)["input_ids"]
        ids[row, 0, : len(tokens)] = torch.tensor(tokens)
    assert answer_texts(tokenizer, ids) == [["10:15"], ["t-shirt"]]


def test_what_stops_a_run(tiny, tmp_path, monkeypatch):
    def message(*flags: object) -> str:
        with pytest.raises(UserError) as error:
            vqa(monkeypatch, tiny, tmp_path / "out", *flags)
        return str(error.value)

    entries = json.loads((tiny["data"] / "vqa_test.json").read_text())
    entries[1]["image"] = "images/gone.jpg"
    test = write(tmp_path / "test.json", entries)
    found = message("--evaluate", "--overrides", f"test_file={test}", f"image_root={tiny['data']}")
    assert "images/gone.jpg: no such file" in found and "test.json: entry 1" in found
    retrieval = tiny["data"] / "retrieval_train.json"
    assert "entry 0 has no 'dataset'" in message("--overrides", f"train_file={retrieval}")
    assert "eos '</s>' is no word" in message("--overrides", "eos=</s>")
    assert "/no/where.json cannot be read" in message("--overrides", "answer_list=/no/where.json")
    flags = [*initial_weights(tiny, tmp_path), "--text_decoder", "/no/where"]
    assert "text_decoder '/no/where': transformers cannot get" in message("--overrides", *flags)
    assert not list((tmp_path / "out").glob("*.pth"))


def initial_weights(tiny: dict, folder: Path) -> list[str]:
    """Overrides that name weights of the right sizes, made here."""
    import timm
    from transformers import BertConfig as HubConfig
    from transformers import BertForMaskedLM as HubBert

    sizes = {key: value for key, value in MODEL["bert_config"].items() if key != "encoder_width"}
    shutil.copytree(tiny["data"] / "bert", folder / "bert")
    HubBert(HubConfig(**sizes)).save_pretrained(folder / "bert")
    vit = {"img_size": 32, "embed_dim": 32, "num_classes": 0, **MODEL["vit"]}
    torch.save(timm.models.VisionTransformer(**vit).state_dict(), folder / "vit.pth")
    return ["init=pretrained", f"image_encoder={folder}/vit.pth", f"text_encoder={folder}/bert"]


def test_configs_load_and_the_published_one_is_published():
    published = read_config("configs/VQA.yaml", TABLE)
    recorded = json.loads((ROOT / "tests" / "goldens" / "schedules.json").read_text())["VQA.yaml"]
    for section in ("optimizer", "schedular"):
        assert recorded[section].items() <= published[section].items()
    assert (published["image_res"], published["k_test"], published["warm_up"]) == (384, 128, True)
    demo, first = (
        read_config("configs/demo/VQA.yaml", TABLE),
        read_config("configs/demo/Pretrain.yaml", PRETRAIN),
    )
    shared = ("image_res", "vision_width", "vit", "bert_config")
    assert [demo[key] for key in shared] == [first[key] for key in shared]
    assert len(SIMLAVQA.from_config(demo).text_decoder.bert.encoder.layer) == 2  # of 3


def test_the_picture_shows_right_answers_green_and_wrong_ones_red(tmp_path):
    Image.new("RGB", (32, 32), "grey").save(tmp_path / "a.png")
    files, texts = [str(tmp_path / "a.png")] * 5, ["what is the place?"] * 5
    right = [True, False, False, False, False]
    plot_answers(files, texts, ["beach"] * 5, right, ["sea"] * 5, tmp_path / "answers.png")
    picture = np.asarray(Image.open(tmp_path / "answers.png").convert("RGB")).astype(int)
    green, red = (
        (np.abs(picture - colour).sum(-1) < 30).any(0).nonzero()[0]
        for colour in ([0x1A, 0x96, 0x41], [0xB2, 0x18, 0x2B])
    )
    assert 0 < green.max() < picture.shape[1] / 4 and red.max() > picture.shape[1] * 3 / 4


# ---- N ranks ----


def work(this_rank: int, num_ranks: int, config: str, checkpoint: str, folder: str) -> None:
    os.environ |= {"RANK": f"{this_rank}", "LOCAL_RANK": f"{this_rank}", "WORLD_SIZE": f"{num_ranks}"}
    for inference in ("rank", "generate"):
        flags = f"--evaluate --device cpu --config {config} --checkpoint {checkpoint} --inference {inference}"
        flags += f" --output_dir {folder}/{inference}{num_ranks} --dist_url file://{folder}/meet{num_ranks}"
        sys.argv = ["VQA.py", *flags.split()]
        VQA.parse_and_run()
    if dist.is_initialized():
        leave_together()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in (1, 2, 3):
        torch.multiprocessing.start_processes(work, (number, *sys.argv[1:]), number, start_method="fork")
