"""What callers bring to `import simla`: settings of torch, long and odd texts, other configs and weights."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from api_data import make_checkpoints
from huggingface_hub import constants

import Grounding
import simla
from simla import utils
from simla.answers import check_no_file
from simla.checkpoint.tokenizer import tokenizer_text
from simla.dataset import transforms
from simla.dataset.grounding import GroundingEvalData
from simla.dataset.text import build_tokenizer
from simla.evaluation.grounding import heat_box
from simla.index import check_made_by
from simla.utils import UserError

CPU = torch.device("cpu")
NAMES = "retrieval", "pretrain", "vqa", "ve", "nlvr"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def models(tiny):
    return {kind: simla.load(tiny.checkpoints[kind], "cpu") for kind in NAMES}


@pytest.fixture(scope="module")
def images(tiny):
    return [str(tiny.data / entry["image"]) for entry in tiny.entries("retrieval_test")]


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("WARNING", "simla")


# ---- settings of torch ----


def ask_all(models: dict[str, simla.Simla], images: list[str]) -> dict[str, object]:
    """What every method answers, in values that == compares to the bit."""
    texts, found = ["a dog", "two red cups on a beach"], {}
    for kind in ("retrieval", "pretrain"):
        model = models[kind]
        tensors = {
            "image": model.encode_image(images[:2]),
            "text": model.encode_text(texts),
            "similarity": model.similarity(images[:2], texts),
            "match": model.match(images[:2], texts),
            "states": model.index(images[:3]).states,
        }
        for mode in ("itm", "itc"):
            shown = model.ground(images[0], texts[1], [[0, 0, 9, 9]], mode, block=0)
            tensors |= {f"{mode} {word}": heat for word, heat in shown.words} | {mode: shown.heat}
            found[f"{kind} {mode}"] = shown.box, shown.ranked
        for name, value in tensors.items():
            assert value.dtype == torch.float32 and value.device == CPU and not value.is_inference(), name
            found[f"{kind} {name}"] = value.tolist()
        found[f"{kind} search"] = model.search(images, texts)
    found["keywords"] = models["pretrain"].keywords(images[0], words=["dog", "beach"])
    found["answer"] = (
        models["vqa"].answer(images[0], "what?"),
        models["vqa"].answer(images[0], "what?", ["a", "b"]),
    )
    found["entails"] = models["ve"].entails(images[0], "a dog")
    found["compare"] = models["nlvr"].compare(*images[:2], "a dog")
    return found


class Setting:
    """Torch's default dtype or device inside `with`."""

    def __init__(self, change, value, before):
        self.change, self.value, self.before = change, value, before

    def __enter__(self):
        self.change(self.value)

    def __exit__(self, *_):
        self.change(self.before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16": lambda: Setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta": lambda: Setting(torch.set_default_device, "meta", None),
    "inference_mode": torch.inference_mode,
}


@pytest.fixture(scope="module")
def expected(models, images):
    transforms._constants.cache_clear()
    return ask_all(models, images)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_caller_has_set_for_torch_changes_nothing(tiny, models, images, expected, name):
    transforms._constants.cache_clear()  # the first call of the process may be made here
    with SETTINGS[name]():
        assert ask_all(models, images) == expected
        loaded = {kind: simla.load(tiny.checkpoints[kind], "cpu") for kind in NAMES}
        for model in loaded.values():
            for weight in model.model.state_dict().values():
                assert weight.dtype in (torch.float32, torch.int64) and not weight.is_inference()
    assert ask_all(loaded, images) == expected


def test_a_model_that_was_trained_on_is_asked_without_dropout(models, images):
    model = models["retrieval"]
    expected = model.match(images[0], "a dog")
    model.model.train()
    assert torch.equal(model.match(images[0], "a dog"), expected)


# ---- texts ----

LONG = " ".join(f"word{number}" for number in range(20))  # 21 words come to far more than 30 tokens here


def test_texts_are_read_to_the_same_token_by_every_call(models, images, caplog):
    model = models["retrieval"]
    calls = {
        "match": model.match,
        "similarity": model.similarity,
        "search": lambda image, text, **more: model.search([image], text, **more)[0].score,
        "encode_text": lambda image, text, **more: model.encode_text(text, **more)[0, 0],
        "ground": lambda image, text, **more: model.ground(image, text, **more).heat.sum(),
    }
    other = LONG + " two red dogs"
    for name, call in calls.items():
        caplog.clear()
        short = float(call(images[0], LONG)), float(call(images[0], other))
        assert short[0] == short[1], name
        assert caplog.text.count("text 0, 'word0 word1") == 2 and "30 tokens" in caplog.text
        whole = float(call(images[0], LONG, max_tokens=512)), float(call(images[0], other, max_tokens=512))
        assert whole[0] != short[0], name
    caplog.clear()
    model.match(images[0], ["a dog", LONG, "a cat", LONG])
    assert "2 of 4 texts (1, 3) are read up to 30 words and 30 tokens, and not to the end" in caplog.text
    caplog.clear()
    model.match(images[0], ["a dog"])
    assert not caplog.text
    for wrong in (1, 2.5, "30"):
        with pytest.raises(UserError, match=r"max_tokens .*expected a whole number from 2 on"):
            model.match(images[0], "a dog", max_tokens=wrong)


def test_words_that_are_cut_off_are_said_in_every_call(models, images, caplog):
    letters = " ".join("abcdefghij" * 5)  # 50 words, as many tokens
    for ask in (
        lambda: models["retrieval"].match(images[0], letters, 60),
        lambda: models["retrieval"].ground(images[0], letters, max_tokens=60),
        lambda: models["ve"].entails(images[0], letters),
        lambda: models["nlvr"].compare(*images[:2], letters),
        lambda: models["vqa"].answer(images[0], letters + " k"),
    ):
        caplog.clear()
        ask()
        assert "text 0, 'a b c" in caplog.text and ", is read up to " in caplog.text
    assert "50 words" in caplog.text
    caplog.clear()
    models["vqa"].answer(images[0], letters)
    assert not caplog.text


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_a_map_shows_no_word_that_was_not_read(models, images, mode):
    model = models["retrieval"]
    found = model.ground(images[0], "a dog and a cup", mode=mode, block=0, max_tokens=4)
    assert found.text == "a dog and" and [word for word, _ in found.words] == ["a", "dog", "and"]
    whole = model.ground(images[0], "a dog and", mode=mode, block=0)
    torch.testing.assert_close(found.heat, whole.heat)
    cut = model.ground(images[0], "word0 word1", mode=mode, block=0, max_tokens=3)
    assert len(cut.words) == 1 and "word0".startswith(cut.text) and cut.words[0][0] == cut.text != "word0"


def test_a_search_is_the_same_in_a_program_of_several_processes(models, images, monkeypatch):
    """Each process asks with images of its own: no other one shares the work."""
    alone = models["retrieval"].search(images, ["two dogs", "a cup"], top=3)
    monkeypatch.setattr(utils, "_rank_and_size", lambda: (1, 2))
    assert models["retrieval"].search(images, ["two dogs", "a cup"], top=3) == alone


@pytest.mark.parametrize("boxes", [[[70, 70, 90, 90], [60, 66, 90, 92]], [[0.2, 0.2, 0.5, 0.5]]])
def test_corners_and_shares_are_no_boxes(models, images, boxes):
    with pytest.raises(UserError, match=r"boxes for '.*' are not inside the image, .* no corners or shares"):
        models["retrieval"].ground(images[0], "a thing", boxes)


def test_512_tokens_are_what_grounding_reads(tiny, models, tmp_path):
    model, config = tiny.script_model("Grounding", "retrieval")
    entries = [{**entry, "text": f"{LONG} {entry['text']}"} for entry in tiny.entries("grounding_test")[:2]]
    (tmp_path / "long.json").write_text(json.dumps(entries))
    config |= {"test_file": str(tmp_path / "long.json"), "image_root": str(tiny.data), "det_file": ""}
    config |= {"gradcam_mode": "itm", "block_num": 0}
    choices = Grounding.choose(model, GroundingEvalData(config), tiny.tokenizer(), config, CPU)
    for entry, choice in zip(entries, choices, strict=True):
        image = tiny.data / entry["image"]
        found = models["retrieval"].ground(image, entry["text"], block=0, max_tokens=512)
        assert heat_box(found.at_image_size()) == choice["box"]


@pytest.mark.parametrize(
    "text", ["\u200b", "\x00\x07", "\u0301 \u200d", "\ufeff\u2060", "\ue000", "\ufffd ."]
)
def test_a_text_that_holds_nothing_to_read_is_refused_in_every_call(models, images, text):
    describing = models["retrieval"]
    for ask in (
        lambda: describing.encode_text(["a", text]),
        lambda: describing.similarity(images[0], ["a", text]),
        lambda: describing.match(images[0], ["a", text]),
        lambda: describing.search(images, ["a", text]),
        lambda: describing.ground(images[:2], ["a", text]),
        lambda: models["vqa"].answer(images[:2], ["a", text]),
        lambda: models["ve"].entails(images[:2], ["a", text]),
        lambda: models["nlvr"].compare(images[:2], images[:2], ["a", text]),
    ):
        with pytest.raises(UserError, match=r"text 1, .*, has no word"):
            ask()
    with pytest.raises(UserError, match="must be a JSON list of answers"):
        models["vqa"].answer(images[0], "what?", ["a", text.strip(".")])


def test_a_text_of_unknown_words_is_said_to_be_one(models, images, caplog):
    assert models["retrieval"].tokenizer.tokenize("漢") == ["[UNK]"]
    models["retrieval"].match(images[0], ["a dog", "漢 字 dog"])
    assert "text 1, '漢 字 dog', is mostly [UNK]" in caplog.text
    caplog.clear()
    models["ve"].entails(images[0], ["漢", "a 漢 dog", "字"])
    assert "2 of 3 texts (0, 2) are mostly [UNK]" in caplog.text


def test_bytes_that_are_no_utf_8_are_no_text(models, images):
    with pytest.raises(UserError, match=r"text 1, 'a \\udcff dog', is no UTF-8 at character 2"):
        models["retrieval"].match(images[0], ["a dog", b"a \xff dog".decode(errors="surrogateescape")])
    with pytest.raises(UserError, match="text 0 is a bytes, expected str"):
        models["retrieval"].match(images[0], b"a dog")


# ---- answers ----


@pytest.mark.parametrize(
    "answers", [["anwsers.json"], ["no/answers"], ["~x"], ["yes", "answers.TXT "], ["a.lst"]]
)
def test_the_name_of_a_file_is_no_answer(models, images, answers):
    with pytest.raises(
        UserError, match=r"one of the answers is .*, and there is no such file; give the path"
    ):
        models["vqa"].answer(images[0], "what?", answers)


def test_answers_that_are_no_file(models, images, caplog):
    check_no_file(["yes", "black/white", "3.5", "n/a", 3])
    check_no_file(["3.5"])
    assert not caplog.text
    for wrong, message in (
        (5, "answers are a int"),
        (b"yes", "answers are a bytes"),
        (["\udcff"], r"found '\\udcff'"),
    ):
        with pytest.raises(UserError, match=message):
            models["vqa"].answer(images[0], "what?", wrong)
    with pytest.raises(UserError, match="is no word of the vocabulary"):
        models["pretrain"].keywords(images[0], words=["\udcff"])
    ((text, probability),) = models["vqa"].answer(images[0], "what?", ["yes"])
    assert (text, probability) == ("yes", 1.0)
    assert "there is one answer to rank, 'yes': its probability is 1 for any image" in caplog.text


# ---- another config ----


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vit", "num_heads", 4),
        ("vit", "norm_eps", 1e-5),
        ("vit", "patch_size", 16),
        ("bert_config", "num_attention_heads", 4),
        ("bert_config", "layer_norm_eps", 1e-6),
    ],
)
def test_a_config_of_another_build_is_refused(tiny, section, key, value):
    config = tiny.config("VE")
    config[section] = {**config[section], key: value}
    with pytest.raises(
        UserError, match=rf"ve\.pth was made with another model .*: {section}\.{key} {value}, not"
    ):
        simla.load(tiny.checkpoints["ve"], "cpu", config=config)
    with pytest.raises(UserError, match=rf"{section}\.{key} {value}, not"):  # the scripts likewise
        from simla.checkpoint.initial import starting_weights
        from simla.models.ve import SIMLAVE

        starting_weights(SIMLAVE.from_config(config), config, "VE", str(tiny.checkpoints["ve"]))


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("Retrieval", "retrieval"),
        ("zero_shot_retrieval", "pretrain"),
        ("Grounding", "retrieval"),
        ("VQA", "vqa"),
        ("VE", "ve"),
        ("NLVR", "nlvr"),
    ],
)
def test_every_script_warns_of_another_vocabulary_and_says_where_one_is_missing(
    tiny, tmp_path, monkeypatch, capsys, task, kind
):
    words = tiny.tokenizer().convert_ids_to_tokens(range(len(tiny.tokenizer())))
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]))
    content = torch.load(tiny.checkpoints[kind], weights_only=True)
    content["tokenizer"] = tokenizer_text(build_tokenizer(str(tmp_path)))
    path = tmp_path / "alone.pth"
    torch.save(content, path)
    argv = [f"{task}.py", "--device", "cpu", "--evaluate", "--config", str(tiny.configs[task])]
    argv += ["--checkpoint", str(path), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    importlib.import_module(task).parse_and_run()
    said = f"{path} was trained with another vocabulary, of {len(words)} words, than text_encoder"
    assert capsys.readouterr().out.count(said) == 1
    monkeypatch.setattr(sys, "argv", [*argv, "--text_encoder", str(tmp_path / "not_there")])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"No BERT vocabulary for .*not_there.*: name as text_encoder a folder"
    ):
        importlib.import_module(task).parse_and_run()
    assert simla.load(path, "cpu").tokenizer.convert_ids_to_tokens(len(words) - 1) == words[-2]


def test_what_a_config_may_change_is_said(tiny, images, tmp_path, monkeypatch, caplog):
    config = tiny.config("Retrieval")
    model = simla.load(tiny.checkpoints["retrieval"], "cpu", config={**config, "image_res": 48, "k_test": 5})
    assert "the config given changes image_res 48 instead of 32, k_test 5 instead of 3" in caplog.text
    assert model.encode_image(images[0]).shape == (1, 16)
    caplog.clear()
    simla.load(tiny.checkpoints["retrieval"], "cpu", config=config)
    assert not caplog.text
    content = torch.load(tiny.checkpoints["retrieval"], weights_only=True)
    content["config"]["text_encoder"] = "tests/tiny.py"  # a file of this code, named as from its own folder
    content["tokenizer"] = tokenizer_text(tiny.tokenizer())
    torch.save(content, tmp_path / "r.pth")
    monkeypatch.chdir(tmp_path)
    simla.load(tmp_path / "r.pth", "cpu", config=content["config"])
    assert "text_encoder" not in caplog.text


def test_what_the_scripts_warn_of_is_said_of_a_loaded_model(tiny, tmp_path, caplog):
    content = torch.load(tiny.checkpoints["ve"], weights_only=True)
    content["config"]["sentence_only"] = True
    torch.save(content, tmp_path / "blind.pth")
    simla.load(tmp_path / "blind.pth", "cpu")
    assert "blind.pth says does not depend on the image" in caplog.text
    caplog.clear()
    simla.load(tmp_path / "blind.pth", "cpu", config=tiny.config("VE"))
    assert "the config given changes sentence_only False instead of True" in caplog.text
    caplog.clear()
    content["tokenizer"] = tokenizer_text(tiny.tokenizer())
    torch.save(content, tmp_path / "ve.pth")
    words = tiny.tokenizer().convert_ids_to_tokens(range(len(tiny.tokenizer())))
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]))
    simla.load(tmp_path / "ve.pth", "cpu", text_encoder=str(tmp_path))
    assert "was trained with another vocabulary" in caplog.text


def test_sizes_that_are_gone_are_not_compared(tiny, tmp_path, caplog):
    content = torch.load(tiny.checkpoints["ve"], weights_only=True)
    content["config"]["bert_config"] = "/gone/bert.json"
    torch.save(content, tmp_path / "ve.pth")
    simla.load(tmp_path / "ve.pth", "cpu", config=tiny.config("VE"))
    assert "made with bert_config /gone/bert.json, which is not here: heads are not compared" in caplog.text


def test_an_index_belongs_to_a_build_and_to_how_images_are_read(models):
    ours = models["retrieval"].image_side
    for key, value, message in (
        ("architecture", {**ours["architecture"], "num_heads": 4}, "an image encoder of another build"),
        ("preprocessing", {**ours["preprocessing"], "image_res": 48}, "a model that reads images otherwise"),
    ):
        assert ours[key] != value
        with pytest.raises(UserError, match=message):
            check_made_by(json.loads(json.dumps({**ours, key: value})), ours, "the index")
    check_made_by(json.loads(json.dumps(ours)), ours, "the index")


# ---- other weights ----


def by_optimizer(model):
    weight = model.visual_encoder.patch_embed.proj.weight.requires_grad_()
    weight.sum().backward()
    torch.optim.SGD([weight], lr=0.1).step()


def by_loading(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def by_data(model):
    model.vision_proj.weight.data.mul_(1.5)


def by_replacing(model):
    model.vision_proj.weight = torch.nn.Parameter(model.vision_proj.weight.detach() * 1.5)


def by_turning(model):  # the sum stays
    with torch.no_grad():
        model.vision_proj.weight.copy_(model.vision_proj.weight.flip(0))


@pytest.mark.parametrize("change", [by_optimizer, by_loading, by_data, by_replacing, by_turning])
def test_an_index_of_the_weights_before_is_refused(tiny, images, tmp_path, change):
    model = simla.load(tiny.checkpoints["retrieval"], "cpu")
    index = model.index(images, tmp_path / "index")
    assert np.isfinite(model.search(index, "a dog")[0].score)
    change(model.model)
    for use in (lambda: model.search(index, "a dog"), lambda: model.open_index(tmp_path / "index")):
        with pytest.raises(UserError, match="made by another image encoder"):
            use()
    model.model.load_state_dict(simla.load(tiny.checkpoints["retrieval"], "cpu").model.state_dict())
    assert model.open_index(tmp_path / "index").files == images
