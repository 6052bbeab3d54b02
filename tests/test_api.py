"""`import simla`: the numbers of the task scripts, every kind of input and checkpoint, and messages."""

import ast
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from api_data import make_checkpoints
from PIL import Image
from test_safe_load import foreign, omega  # noqa: F401
from tiny import ROOT

import Grounding
import simla
import VE
import VQA
import zero_shot_retrieval
from simla.checkpoint.export import export
from simla.checkpoint.tasks import TASKS
from simla.configs.reader import check_values
from simla.configs.schema import RETRIEVAL, VIT, Key
from simla.dataset.grounding import GroundingEvalData
from simla.dataset.images import load_image
from simla.dataset.items import evaluation_batches, evaluation_items
from simla.dataset.nlvr import read_nlvr
from simla.dataset.retrieval import RetrievalEvalData
from simla.dataset.text import check_vocabulary, tokenize
from simla.dataset.transforms import EvalTransform, normalise
from simla.dataset.ve import read_ve
from simla.dataset.vqa import VQAEvalData, read_answer_list
from simla.evaluation.rerank import NOT_SCORED
from simla.heat import EVERYWHERE, grounding
from simla.loading import fill_in_what_is_missing, text_encoder_sizes
from simla.models.bert import BertConfig
from simla.models.gradcam import grad_cam
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError, pick_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def models(tiny):
    return {
        kind: simla.load(tiny.checkpoints[kind], "cpu")
        for kind in ("pretrain", "retrieval", "vqa", "ve", "nlvr")
    }


@pytest.fixture(scope="module")
def images(tiny):
    """The seven test images."""
    return [str(tiny.data / entry["image"]) for entry in tiny.entries("retrieval_test")]


# ---- the numbers of the task scripts ----


@pytest.mark.parametrize("kind", ["pretrain", "retrieval"])
def test_features_matching_and_search_are_those_of_zero_shot_retrieval(tiny, models, images, kind):
    ours, (model, config) = models[kind], tiny.script_model("zero_shot_retrieval", kind)
    data = RetrievalEvalData(config["test_file"], config)
    _, scores_t2i = zero_shot_retrieval.score(model, data, tiny.tokenizer(), config, CPU)
    captions = [
        text for entry in tiny.entries("retrieval_test") for text in entry["caption"]
    ]  # not yet cleaned
    ids, mask = tokenize(tiny.tokenizer(), data.texts, 30)
    pixels = normalise(torch.stack([data[i]["images"][0] for i in range(len(data))]))
    with torch.no_grad():
        states, image_feats = model.encode_image(pixels)
        text_feats = model.encode_text(ids, mask)
        cross = model.text_encoder.project(states.repeat_interleave(len(ids), 0))
        hidden = model.text_encoder(ids.repeat(len(states), 1), mask.repeat(len(states), 1), cross)
        expected = model.itm_head(hidden[:, 0]).softmax(-1)[:, 1].view(len(states), -1)
    torch.testing.assert_close(ours.encode_image(images), image_feats)
    torch.testing.assert_close(ours.encode_text(captions), text_feats)
    torch.testing.assert_close(ours.similarity(images, captions), image_feats @ text_feats.T)
    probabilities = ours.match(images, captions)
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=1e-4)
    assert probabilities.std() > 0.01  # the model tells pairs apart, or nothing is compared

    found = ours.search(images, captions, top=3, candidates=3)
    for row, hits in zip(scores_t2i, found, strict=True):
        order = row.argsort(descending=True, stable=True)[: int((row != NOT_SCORED).sum())]
        assert len(order) == len(hits) == 3
        assert [hit.file for hit in hits] == [images[i] for i in order]
        assert [hit.score for hit in hits] == pytest.approx(row[order].tolist(), abs=1e-5)
    for rule, weight in (("itc", 0), ("itm+itc", 2.0)):
        rule_config = {**config, "score": rule, "score_itc_weight": weight}
        _, scores_t2i = zero_shot_retrieval.score(model, data, tiny.tokenizer(), rule_config, CPU)
        found = ours.search(images, captions, 3, 3, score=rule, score_itc_weight=weight)
        for row, hits in zip(scores_t2i, found, strict=True):
            order = row.argsort(descending=True, stable=True)[:3]
            assert [hit.file for hit in hits] == [images[i] for i in order]
            assert [hit.score for hit in hits] == pytest.approx(row[order].tolist(), abs=1e-5)
    (first,) = ours.search(images, [captions[4]], top=1, candidates=7)
    exact = ours.similarity(first[0].file, captions[4])
    assert first[0].similarity == pytest.approx(float(exact), abs=1e-5)


def test_pairs_in_small_batches_are_the_same(monkeypatch, models, images):
    texts = ["a cup", "two dogs on a beach", "a red car"]
    whole = models["retrieval"].match(images, texts)
    monkeypatch.setattr("simla.model.PAIRS_AT_A_TIME", 3)
    torch.testing.assert_close(models["retrieval"].match(images, texts), whole)


def test_a_single_input_has_no_axis_of_its_own(models, images):
    model = models["retrieval"]
    for ask in (model.match, model.similarity):
        whole = ask(images[:2], ["a cup", "a dog", "a car"])
        assert whole.shape == (2, 3)
        torch.testing.assert_close(ask(images[1], ["a cup", "a dog", "a car"]), whole[1])
        torch.testing.assert_close(ask(images[:2], "a dog"), whole[:, 1])
        assert float(ask(images[1], "a dog")) == pytest.approx(float(whole[1, 1]), abs=1e-6)


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_boxes_are_those_of_grounding(tiny, models, mode):
    model, config = tiny.script_model("Grounding", "retrieval")
    entries = tiny.entries("grounding_test")
    files, texts = (
        [str(tiny.data / entry["image"]) for entry in entries],
        [entry["text"] for entry in entries],
    )
    config |= {"gradcam_mode": mode, "block_num": 1}
    for det_file in (config["det_file"], ""):
        data = GroundingEvalData({**config, "det_file": det_file})
        choices = Grounding.choose(model, data, tiny.tokenizer(), config, CPU)
        boxes = [target.candidates for target in data.targets] if det_file else None
        found = models["retrieval"].ground(files, texts, boxes, mode, block=1)
        assert len(found) == len(choices) > 3
        for choice, ours, target in zip(choices, found, data.targets, strict=True):
            assert (ours.height, ours.width) == (target.height, target.width)
            if not det_file:
                _, _, width, height = choice["box"]
                is_everything = width * height >= EVERYWHERE * target.width * target.height
                assert ours.box == (None if is_everything else choice["box"])
            elif choice["box"] is not None:
                assert ours.ranked[0][0] == choice["box"]
                assert sorted(box for box, _ in ours.ranked) == sorted(box[:4] for box in target.candidates)


def test_words_of_a_heat_map(tiny, models, images):
    """itm: the maps of words and [CLS] add up to that of the text; itc: a word's is that of it alone."""
    model, (script_model, _) = models["retrieval"], tiny.script_model("Grounding", "retrieval")
    text = "A dog, two-cups!"  # cleaned: a dog two cups
    found = model.ground([images[0]], [text], block=0)[0]
    assert found.text == "a dog two cups" and [word for word, _ in found.words] == found.text.split()
    image = normalise(EvalTransform(32)(load_image(images[0])))[None]
    ids, mask = tokenize(tiny.tokenizer(), [found.text])
    torch.testing.assert_close(found.heat, grad_cam(script_model, "itm", 0, image, ids, mask)[0])
    total = sum(heat for _, heat in found.words)
    assert (total <= found.heat + 1e-7).all() and 0 < total.sum() < found.heat.sum()
    assert found.at_image_size().shape == (48, 48) == found.at_image_size(found.words[1][1]).shape
    alone = model.ground(images[0], text, mode="itc", block=1).words[1][1]
    ids, mask = tokenize(tiny.tokenizer(), ["dog"])
    torch.testing.assert_close(alone, grad_cam(script_model, "itc", 1, image, ids, mask)[0])


def test_a_word_of_several_pieces_has_one_map(models, images):
    tokenizer = models["retrieval"].tokenizer
    assert len(tokenizer.tokenize("xqzdog")) > 1
    found = models["retrieval"].ground(images[0], "a xqzdog", block=0)
    assert [word for word, _ in found.words] == ["a", "xqzdog"]


def test_answers_are_those_of_vqa(tiny, models):
    model, config = tiny.script_model("VQA", "vqa")
    data, tokenizer = VQAEvalData(config["test_file"], config, is_test=True), tiny.tokenizer()
    answers = read_answer_list(config["answer_list"], tokenizer, config["eos"], 64)
    files = [question["images"][0] for question in data.questions]
    questions = [question["question"] for question in data.questions]
    for candidates, given in ((answers, config["answer_list"]), (answers, answers.texts), (None, None)):
        expected = VQA.answer(model, data, candidates, tokenizer, config, CPU)
        found = models["vqa"].answer(files, questions, given)
        assert len(found) == len(expected) > 5
        for row, pairs in zip(expected, found, strict=True):
            texts, probabilities = zip(*pairs, strict=True)
            assert list(texts) == row["answers"]
            assert probabilities == pytest.approx(row["probabilities"], abs=1e-5)
        first = models["vqa"].answer(files[0], questions[0], given, top=1)
        assert [text for text, _ in first] == expected[0]["answers"][:1]


@pytest.mark.parametrize("kind", ["ve", "nlvr"])
def test_classes_are_those_of_ve_and_nlvr(tiny, models, kind):
    task = kind.upper()
    model, config = tiny.script_model(task, kind)
    entries = {"ve": read_ve, "nlvr": read_nlvr}[kind](config["test_file"], config["image_root"])
    items = evaluation_items(entries, config)
    with torch.no_grad():
        batches = evaluation_batches(items, config, tiny.tokenizer(), CPU, "test")
        logits = [model.predict(batch["image"], batch["text_ids"], batch["text_mask"]) for batch in batches]
    expected = torch.cat(logits).softmax(-1)
    texts = [entry["text"] for entry in entries]
    if kind == "ve":
        found = models["ve"].entails([entry["images"][0] for entry in entries], texts)
        assert list(found[0]) == ["contradiction", "neutral", "entailment"]
        ours = torch.tensor([list(row.values()) for row in found])
    else:
        pairs = ([entry["images"][side] for entry in entries] for side in (0, 1))
        true = torch.tensor(models["nlvr"].compare(*pairs, texts))
        ours = torch.stack([1 - true, true], dim=1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert expected.std(0).min() > 1e-4
    counts = VE.evaluate(model, items, tiny.tokenizer(), config, CPU, "test")["confusion"]
    labels = torch.tensor([entry["label"] for entry in entries])
    right = int((ours.argmax(1) == labels).sum())
    assert right == sum(row[i] for i, row in enumerate(counts))


def test_keywords_are_those_of_the_concept_head(tiny, models, images):
    model, _ = tiny.script_model("Pretrain", "pretrain")
    pixels = normalise(torch.stack([EvalTransform(32)(load_image(file)) for file in images]))
    with torch.no_grad():
        cls = model.visual_encoder(pixels)[:, 0]
        feats = torch.nn.functional.normalize(model.vision_proj(cls), dim=-1)
        expected = model.concept_head(feats).sigmoid()
    tokenizer = tiny.tokenizer()
    found = models["pretrain"].keywords(images, top=4)
    for row, words in zip(expected, found, strict=True):
        numbers = [tokenizer.convert_tokens_to_ids(word) for word, _ in words]
        assert [value for _, value in words] == pytest.approx(row[numbers].tolist(), abs=1e-6)
        assert row[numbers].tolist() == sorted(row[numbers].tolist(), reverse=True)
    every = dict(models["pretrain"].keywords(images[0], top=10_000))
    assert not every.keys() & {"[PAD]", "[CLS]", "a", "the", "of"} and "beach" in every
    ((_, best),) = models["pretrain"].keywords(images[0], top=1)  # in a batch its last digit may differ
    assert max(every.values()) == best
    chosen = models["pretrain"].keywords(images[0], words=["beach", "Dog"])
    assert dict(chosen) == pytest.approx({word: every[word] for word in ("beach", "dog")})
    (one,) = models["pretrain"].keywords(images[0], words="beach")  # a word, not its letters
    assert one[0] == "beach" and one[1] == pytest.approx(every["beach"])


def test_half_precision_is_that_of_the_scripts(tiny, models, images):
    """To the last bit, a text at a time: then both multiply matrices of the same shapes."""
    model, config = tiny.script_model("zero_shot_retrieval", "retrieval")
    config["precision"] = "bf16"
    data = RetrievalEvalData(config["test_file"], config)
    ours = simla.load(tiny.checkpoints["retrieval"], dtype=torch.bfloat16, device="cpu")
    for text in data.texts[:6]:
        data.texts = [text]
        _, (expected,) = zero_shot_retrieval.score(model, data, tiny.tokenizer(), config, CPU)
        scores = {hit.file: hit.score for hit in ours.search(images, text, top=3, candidates=3)}
        rows = expected != NOT_SCORED
        assert scores == dict(zip(np.array(images)[rows].tolist(), expected[rows].tolist(), strict=True))
        full = {hit.file: hit.score for hit in models["retrieval"].search(images, text, top=7, candidates=7)}
        assert all(score != full[file] for file, score in scores.items())


# ---- inputs ----


def test_every_kind_of_input_gives_the_same_features(models, images, tmp_path):
    model, loaded = models["retrieval"], [load_image(file) for file in images[:2]]
    arrays = np.stack([np.asarray(image) for image in loaded])
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected = model.encode_image(images[:2])
    assert expected.shape == (2, 16)
    for several in (
        loaded,
        tuple(images[:2]),
        list(arrays),
        arrays,
        list(tensors),
        tensors,
        [images[0], arrays[1]],
    ):
        torch.testing.assert_close(model.encode_image(several), expected, rtol=0, atol=1e-6)
    for single in (images[0], loaded[0], arrays[0], tensors[0]):
        torch.testing.assert_close(model.encode_image(single), expected[:1], rtol=0, atol=1e-6)
    with Image.open(images[0]) as unread:  # not yet decoded
        torch.testing.assert_close(model.encode_image(unread), expected[:1], rtol=0, atol=1e-6)


def test_an_image_in_memory_is_turned_and_put_on_white_like_its_file(models, images, tmp_path):
    photo = load_image(images[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    clear = photo.convert("RGBA")
    clear.putalpha(100)
    clear.save(tmp_path / "clear.png")
    plain = models["retrieval"].encode_image(photo)
    for name in ("turned.png", "clear.png"):
        with Image.open(tmp_path / name) as image:
            size = image.size
            ours = models["retrieval"].encode_image([tmp_path / name, image])
            assert image.size == size
        torch.testing.assert_close(ours[0], ours[1])
        assert (ours[0] - plain[0]).abs().max() > 1e-3


def test_one_input_goes_with_many(models, images):
    ve = models["ve"]
    both = ve.entails(images[0], ["a dog", "a cat"])
    assert both[1] == pytest.approx(ve.entails(images[0], "a cat"), abs=1e-5)
    assert ve.entails(images[:2], "a dog")[0] == pytest.approx(both[0], abs=1e-5)
    nlvr = models["nlvr"]
    assert isinstance(nlvr.compare(images[0], images[1], "a dog"), float)
    rows = nlvr.compare(images[0], images[1:3], "a dog")
    assert rows == pytest.approx([nlvr.compare(images[0], other, "a dog") for other in images[1:3]], abs=1e-6)


def test_asking_leaves_no_trace(models, images):
    state = torch.get_rng_state()
    model = models["retrieval"]
    model.ground(images[0], "a dog", block=1)
    model.match(images[0], "a dog")
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())
    assert not model.model.training


def test_features_are_what_a_head_can_be_trained_on(models, images):
    for features in (
        models["retrieval"].encode_image(images[:2]),
        models["retrieval"].encode_text(["a", "b"]),
    ):
        head = torch.nn.Linear(16, 1)
        head(features).sum().backward()
        torch.testing.assert_close(head.weight.grad[0], features.sum(0))


def test_several_threads_may_ask_one_model(models, images):
    model, index = models["pretrain"], models["pretrain"].index(images)

    def ask(number: int) -> tuple:
        image, text = images[number], f"a {'red ' * number}cup"
        found = model.ground(image, text, block=0)
        return model.search(index, text), found.box, found.heat.tolist(), model.keywords(image)

    expected = [ask(number) for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            assert list(threads.map(ask, range(4))) == expected


# ---- checkpoints ----


@pytest.mark.parametrize("kind", ["pretrain", "retrieval", "vqa", "ve", "nlvr"])
def test_loading_takes_no_random_numbers_and_no_twins(tiny, kind):
    state = torch.get_rng_state()
    model = simla.load(tiny.checkpoints[kind], "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.kind == kind and kind in repr(model)
    assert not any("_m." in name or "queue" in name for name in model.model.state_dict())


def test_the_baseline_of_sentences_alone_sees_no_image_here_either(tiny, models, images, tmp_path):
    content = torch.load(tiny.checkpoints["ve"], weights_only=True)
    content["config"]["sentence_only"] = True
    torch.save(content, tmp_path / "blind.pth")
    one, other = simla.load(tmp_path / "blind.pth", "cpu").entails(images[:2], "a dog")
    assert one == other and one != models["ve"].entails(images[0], "a dog")


def test_published_layouts(tiny, models, images, tmp_path):
    """Weights without a config, from a DDP wrapper, in torch's old format; exported files."""
    content = torch.load(tiny.checkpoints["retrieval"], weights_only=True)
    expected = models["retrieval"].encode_image(images[0])
    wrapped = {f"module.{name}": value for name, value in content["model"].items()}
    torch.save({"model": wrapped}, tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="holds no config"):
        simla.load(tmp_path / "bare.pth", "cpu")
    config = tiny.config("Retrieval")
    for given in (config, tiny.configs["Retrieval"], str(tiny.configs["Retrieval"])):
        ours = simla.load(tmp_path / "bare.pth", "cpu", config=given)
        assert torch.equal(ours.encode_image(images[0]), expected)

    other = {**content["config"], "from_another_version": 1, "released_code": {"gone": True}}
    torch.save(
        {**content, "config": {k: v for k, v in other.items() if k != "train_file"}}, tmp_path / "other.pth"
    )
    assert torch.equal(simla.load(tmp_path / "other.pth", "cpu").encode_image(images[0]), expected)

    for kind in ("pretrain", "vqa"):
        export(str(tiny.checkpoints[kind]), str(tmp_path / f"{kind}.safetensors"), inference=True)
    words = simla.load(tmp_path / "pretrain.safetensors", "cpu").keywords(images[0])
    assert words == models["pretrain"].keywords(images[0])
    answers = simla.load(tmp_path / "vqa.safetensors", "cpu").answer(images[0], "what?", ["a dog", "two"])
    assert answers == models["vqa"].answer(images[0], "what?", ["a dog", "two"])
    export(str(tiny.checkpoints["pretrain"]), str(tmp_path / "r.safetensors"), task="Retrieval")
    ours = simla.load(tmp_path / "r.safetensors", "cpu")
    assert torch.equal(ours.encode_image(images[0]), models["pretrain"].encode_image(images[0]))
    with pytest.raises(UserError, match="without its concept head"):
        ours.keywords(images[0])


def test_a_pickled_omegaconf_config(tiny, models, images, tmp_path, foreign):  # noqa: F811
    content = torch.load(tiny.checkpoints["retrieval"], weights_only=True)
    torch.save({**content, "config": omega(foreign, content["config"])}, tmp_path / "old.pth")
    foreign.forget()  # as if OmegaConf were not installed
    ours = simla.load(tmp_path / "old.pth", "cpu")
    assert torch.equal(ours.encode_image(images[0]), models["retrieval"].encode_image(images[0]))


PUBLISHED_CONFIG = {  # of a published run of retrieval: its keys, and private paths like its own
    "train_file": ["/net/disk10/data/someone/finetuning-json/flickr30k_train.json"],
    "val_file": "/net/disk10/data/someone/finetuning-json/flickr30k_val.json",
    "test_file": "/net/disk10/data/someone/finetuning-json/flickr30k_test.json",
    "image_root": "/net/disk10/data/someone/flickr30k/",
    "bert_config": "configs/shared_bert.json",
    "image_res": 32,
    "batch_size_train": 32,
    "batch_size_test": 64,
    "queue_size": 24,
    "momentum": 0.995,
    "vision_width": 768,
    "embed_dim": 16,
    "temp": 0.07,
    "k_test": 128,
    "mlm_probability": 0.15,
    "alpha": 0.4,
    "distill": True,
    "warm_up": True,
    "optimizer": {"opt": "adamW", "lr": 1e-5, "weight_decay": 0.02},
    "schedular": {
        "sched": "cosine",
        "lr": 1e-5,
        "epochs": 10,
        "min_lr": 1e-6,
        "decay_rate": 1,
        "warmup_lr": 1e-5,
    }
    | {"warmup_epochs": 1, "cooldown_epochs": 0},
    "vit_mask_token": False,
}
PUBLISHED_SIZES = {
    "vocab_size": 400,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


def test_a_published_checkpoint_whose_config_names_files_of_another_machine(
    tiny,
    images,
    tmp_path,
    monkeypatch,
    caplog,
    foreign,  # noqa: F811
):
    """Of the published widths, but shallow: the layout says nothing of depths, which are the defaults'."""
    monkeypatch.setitem(VIT, "depth", Key(int, 1))
    full = check_values(
        {**PUBLISHED_CONFIG, "bert_config": PUBLISHED_SIZES, "schedular": {"epochs": 1}}
        | {"mlm_probability": 0},
        {**RETRIEVAL, "mlm_probability": Key(int, 0)},
        "here",
    )
    model = SIMLARetrieval.from_config(full)
    content = {"model": model.state_dict(), "config": omega(foreign, PUBLISHED_CONFIG), "epoch": 9}
    torch.save(content, tmp_path / "checkpoint_best.pth", _use_new_zipfile_serialization=False)
    foreign.forget()
    monkeypatch.chdir(tmp_path)
    ours = simla.load("checkpoint_best.pth", "cpu", text_encoder=str(tiny.data / "bert"))
    (said,) = [record.message for record in caplog.records if "bert_config" in record.message]
    assert (
        "configs/shared_bert.json is not here" in said
        and "2 layers of width 768" in said
        and "12 heads" in said
    )
    given = simla.load("checkpoint_best.pth", "cpu", config=full, text_encoder=str(tiny.data / "bert"))
    assert torch.equal(ours.match(images[:2], "a dog"), given.match(images[:2], "a dog"))
    assert ours.config["bert_config"] == asdict(BertConfig.read(PUBLISHED_SIZES))


@pytest.mark.parametrize("alone", [0, 2])
@pytest.mark.parametrize("kind", ["pretrain", "retrieval", "vqa", "ve", "nlvr"])
def test_sizes_of_the_text_encoder_are_those_of_its_weights(tiny, kind, alone):
    task = {"pretrain": "Pretrain", "retrieval": "Retrieval", "nlvr": "NLVR", "vqa": "VQA", "ve": "VE"}[kind]
    sizes = {**PUBLISHED_SIZES, "num_hidden_layers": 4, "encoder_width": 768, "text_layers_alone": alone}
    config = tiny.config(task) | {"bert_config": sizes, "vision_width": 768}
    if alone and kind == "pretrain":
        config["loss_weights"] = {**config["loss_weights"], "mim": 0}
    with torch.device("meta"):
        state = TASKS[task].build(config).state_dict()
    found = text_encoder_sizes(state, kind, "x.pth", "configs/shared_bert.json")
    assert found == asdict(BertConfig.read(sizes))
    stored = {"bert_config": "configs/config_bert.json", "text_encoder": "bert-base-uncased"}
    named = fill_in_what_is_missing(stored, RETRIEVAL, state, kind, "x.pth")["bert_config"]
    assert named["text_layers_alone"] == 2 if alone else named == stored["bert_config"]
    values = {"text_encoder": "/net/disk10/data/someone/bert", "bert_config": found}
    assert fill_in_what_is_missing(values, RETRIEVAL, state, kind, "x.pth") == values  # 400 words: no BERT's
    for name in list(state):
        if name.endswith("word_embeddings.weight"):
            state[name] = torch.empty(30522, 768, device="meta")
    values = fill_in_what_is_missing(values, RETRIEVAL, state, kind, "x.pth")
    assert values["text_encoder"] == "bert-base-uncased"


def test_paths_of_a_config_are_found_from_any_folder(tiny, images, monkeypatch, tmp_path):
    content = torch.load(tiny.checkpoints["retrieval"], weights_only=True)
    bert = tmp_path / "bert.json"
    bert.write_text(json.dumps(content["config"]["bert_config"]))
    content["config"]["bert_config"] = "bert.json"
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"bert\.json cannot be read"):
        simla.load(tmp_path / "c.pth", "cpu")
    monkeypatch.setattr("simla.utils.ROOT", tmp_path)
    assert simla.load(tmp_path / "c.pth", "cpu").kind == "retrieval"


# ---- errors ----


@pytest.mark.parametrize(
    ("kind", "ask", "message"),
    [
        (
            "vqa",
            lambda m, i: m.encode_image(i),
            "vqa checkpoint, which has no projection.*Pretrain.py or Retrieval.py",
        ),
        ("vqa", lambda m, i: m.encode_text("a"), "no projection"),
        ("ve", lambda m, i: m.similarity(i, "a"), "no projection"),
        ("nlvr", lambda m, i: m.match(i, "a"), "no matching head"),
        ("ve", lambda m, i: m.search(i, "a"), "no matching head"),
        ("ve", lambda m, i: m.index(i), "no projection"),
        ("ve", lambda m, i: m.open_index("x"), "no projection"),
        ("ve", lambda m, i: m.ground(i, "a"), "no matching head"),
        (
            "retrieval",
            lambda m, i: m.answer(i, "a"),
            "no answer decoder; answer needs a checkpoint of VQA.py",
        ),
        ("pretrain", lambda m, i: m.entails(i, "a"), "needs a checkpoint of VE.py"),
        ("ve", lambda m, i: m.compare(i, i, "a"), "needs a checkpoint of NLVR.py"),
        ("retrieval", lambda m, i: m.keywords(i), "needs a checkpoint of Pretrain.py"),
        ("pretrain", lambda m, i: m.keywords(i, words=["dogs and cats"]), "'dogs and cats' is no word"),
        ("pretrain", lambda m, i: m.keywords(i, words=[]), "no words given"),
        ("pretrain", lambda m, i: m.keywords(i, words=["dog", 3]), "a word is a int"),
        ("pretrain", lambda m, i: m.keywords(i, top=-1), "top -1: expected a whole number from 1 on"),
        ("vqa", lambda m, i: m.answer(i, "what?", top=0), "top 0: expected"),
        ("pretrain", lambda m, i: m.search([i, i], "a", top=-1), "top -1: expected"),
        ("pretrain", lambda m, i: m.search([i, i], "a", top=2.0), "top 2.0: expected"),
        ("pretrain", lambda m, i: m.search([i, i], "a", candidates=0), "candidates 0: expected"),
        ("retrieval", lambda m, i: m.match([i, Image.new("L", (0, 4))], "a"), "image 1 has no pixels"),
        ("retrieval", lambda m, i: m.match([], "a"), "no images given"),
        ("retrieval", lambda m, i: m.match(i, []), "no texts given"),
        ("retrieval", lambda m, i: m.match(i, "!?"), r"text 0, '!\?', has no word"),
        ("retrieval", lambda m, i: m.ground(i, "\ufffd", mode="itc"), "text 0, '\ufffd', has no word"),
        ("retrieval", lambda m, i: m.ground(i, "\u0301 \u200b", mode="itc"), "text 0, .*, has no word"),
        ("vqa", lambda m, i: m.answer(i, "\x07"), "text 0, .*, has no word"),
        ("retrieval", lambda m, i: m.match(i, ["a", 3]), "text 1 is a int"),
        ("retrieval", lambda m, i: m.match(7, "a"), "image 0 is a int; expected a path"),
        ("retrieval", lambda m, i: m.match("none.jpg", "a"), "none.jpg: no such file"),
        ("retrieval", lambda m, i: m.match([i, __file__], "a"), "test_api.py: not an image"),
        ("retrieval", lambda m, i: m.match(np.zeros((8, 8), np.uint8), "a"), r"uint8 of shape \(8, 8\)"),
        (
            "retrieval",
            lambda m, i: m.match(torch.zeros(3, 8, 8), "a"),
            r"float32 of shape.*uint8 \(3, H, W\)",
        ),
        (
            "retrieval",
            lambda m, i: m.match(np.zeros((3, 8, 8), np.uint8), "a"),
            r"expected uint8 \(H, W, 3\)",
        ),
        ("ve", lambda m, i: m.entails([i, i], ["a", "b", "c"]), "2 and 3 images and sentences"),
        ("nlvr", lambda m, i: m.compare([i, i], [i, i, i], "a"), "2 and 3 images"),
        ("retrieval", lambda m, i: m.ground(i, "a", mode="gradient"), "expected itm or itc"),
        ("retrieval", lambda m, i: m.ground(i, "a", block=2), "choose 0 to 1"),
        ("retrieval", lambda m, i: m.ground(i, "a", [[1, 2, 0, 4]]), "width and height above 0"),
        ("retrieval", lambda m, i: m.ground(i, "a", [1, 2, 3, 4]), "must be a list of"),
        ("retrieval", lambda m, i: m.ground([i, i], "a", [[[0, 0, 1, 1]]]), "1 lists of boxes for 2 pairs"),
        ("vqa", lambda m, i: m.answer(i, "what?", []), "an empty list"),
        ("vqa", lambda m, i: m.answer(i, "what?", ["a", " "]), "each a text, found ' '"),
        ("vqa", lambda m, i: m.answer(i, "what?", "none.json"), "none.json"),
        ("retrieval", lambda m, i: m.search("no_folder", "a"), "no_folder is no folder"),
    ],
)
def test_what_is_wrong_is_said(models, images, kind, ask, message):
    with pytest.raises(UserError, match=message) as error:
        ask(models[kind], images[0])
    assert "--" not in str(error.value)  # flags are of the scripts


def test_no_message_of_the_api_names_flags():
    """Nor one of the models, of texts or devices, which it shares with the scripts."""
    shared = [*(ROOT / "simla").glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("evaluation/*.py")]
    of_programs = ("__main__.py", "page.py", "initial.py")
    for file in [path for path in shared if path.name not in of_programs] + [ROOT / "dataset" / "text.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                assert not re.search(r"--[a-z]", ast.unparse(node)), (file.name, ast.unparse(node))
    for name in ("abacus", "mps", "cuda:99"):
        with pytest.raises(UserError, match=f"^device {name}: "):
            pick_device(name)
    with pytest.raises(UserError, match=r"bert_config\.vocab_size=3\) or name another text_encoder"):
        check_vocabulary(["a", "b", "c"], 2)


@pytest.mark.parametrize(("share", "is_said"), [(0.4, True), (0.85, True), (1.0, False)])
def test_a_box_round_nearly_everything_is_none(share, is_said):
    heat = torch.full((20, 20), 1e-3)
    heat[:, : round(20 * share)] = 1.0
    found = grounding("a", heat, [], 40, 40, [])
    assert (found.box is not None) == is_said
    assert not is_said or found.box[2] == pytest.approx(40 * share, abs=2)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("pretrain_nlvr", {}, "pretrain_nlvr checkpoint, half-way"),
        ("ve", {"dtype": "fp8"}, "expected one of fp32"),
        ("ve", {"device": "abacus"}, "abacus"),
        ("ve", {"config": "none.yaml"}, "none.yaml cannot be read"),
        ("ve", {"config": {"vision_width": 32}}, "config given: missing key image_res"),
        ("ve", {"config": {"image_res": 32, "text_encoder": "gone"}}, "No BERT vocabulary for 'gone'"),
        ("ve", {"text_encoder": "no_tokenizer"}, "no_tokenizer"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded(tiny, kind, arguments, message):
    with pytest.raises(UserError, match=message):
        simla.load(tiny.checkpoints[kind], **{"device": "cpu", **arguments})


def test_a_config_of_another_size_is_refused(tiny):
    with pytest.raises(UserError, match="does not fit the model; of another shape"):
        simla.load(tiny.checkpoints["ve"], "cpu", config={**tiny.config("VE"), "vision_width": 64})


def test_a_damaged_picture_in_memory_is_named(models, images, tmp_path):
    half = tmp_path / "half.jpg"
    half.write_bytes(Path(images[0]).read_bytes()[:-300])
    with Image.open(half) as image, pytest.raises(UserError, match="image 1: "):
        models["retrieval"].encode_image([images[0], image])
