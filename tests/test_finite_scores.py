"""Weights and scores that are not finite: loaders name the tensor, evaluations end, no file has NaN."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from api_data import make_checkpoints
from transformers import BertConfig as HubConfig
from transformers import BertForMaskedLM as HubBert

import Grounding
import NLVR
import Retrieval
import simla
import VE
import VQA
import zero_shot_retrieval
from simla.checkpoint.export import export
from simla.checkpoint.image_tokenizers import load_codebook, load_dalle
from simla.checkpoint.initial import load_bert, load_vit, starting_weights
from simla.checkpoint.tasks import TASKS
from simla.engine.results import save_result
from simla.models.dvae import DalleEncoder
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError, append_log, num_not_finite

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("finite"))


@pytest.fixture(scope="module")
def images(tiny):
    return [str(tiny.data / entry["image"]) for entry in tiny.entries("retrieval_test")]


def spoiled(tiny, kind: str, path: Path, name: str, value: float) -> Path:
    """The checkpoint of that kind with `value` in tensors whose names end so: one NaN or inf, or all."""
    content = torch.load(tiny.checkpoints[kind], weights_only=True)
    chosen = [key for key in content["model"] if key.endswith(name) and "_m." not in key]
    assert chosen
    for key in chosen:
        tensor = content["model"][key]
        (tensor.view(-1)[-1:] if value in (INF, -INF) or value != value else tensor).fill_(value)
    torch.save(content, path)
    return path


# ---- weights ----


@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_value_among_many(dtype, value):
    values = torch.randn(40, 50).to(dtype)
    assert not any(map(num_not_finite, (values, values[:0], values.T, values.int())))
    values[17, 3] = value
    assert [num_not_finite(part) for part in (values, values.T, values[:17], values[17])] == [1, 1, 0, 1]


@pytest.mark.parametrize(("task", "kind"), [(t, kind) for t in TASKS for kind in TASKS[t].starts_from])
def test_every_task_names_the_tensor_that_is_not_finite(tiny, tmp_path, task, kind):
    path = spoiled(tiny, kind, tmp_path / "bad.pth", "attn.qkv.weight", NAN)
    config = tiny.config(task)
    said = (
        r"bad\.pth: 1 of the \d+ values of visual_encoder\.blocks\.0\.attn\.qkv\.weight are NaN or infinite"
    )
    with pytest.raises(UserError, match=said):
        starting_weights(TASKS[task].build(config), config, task, str(path))


@pytest.mark.parametrize("kind", ["pretrain", "retrieval", "vqa", "ve", "nlvr"])
def test_so_do_the_interface_and_export(tiny, tmp_path, kind):
    path = spoiled(tiny, kind, tmp_path / "bad.pth", "embeddings.LayerNorm.bias", INF)
    for load in (lambda: simla.load(path, "cpu"), lambda: export(str(path), str(tmp_path / "o.safetensors"))):
        with pytest.raises(UserError, match=r"bad\.pth: 1 of the .*LayerNorm\.bias are NaN or infinite"):
            load()
    assert not (tmp_path / "o.safetensors").exists()


def test_of_the_concept_head_too(tiny, tmp_path):
    path = spoiled(tiny, "pretrain", tmp_path / "bad.pth", "concept_head.bias", NAN)
    with pytest.raises(UserError, match=r"values of concept_head\.bias are NaN"):
        simla.load(path, "cpu")


def test_initial_weights_are_looked_at_too(tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = HubBert(HubConfig(vocab_size=40, max_position_embeddings=16, **sizes))
    vit_sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    vit = timm.models.VisionTransformer(**vit_sizes, num_classes=0)
    for tensor in (bert.bert.encoder.layer[0].output.dense.weight, vit.blocks[0].mlp.fc1.weight):
        tensor.data[0, 0] = NAN
    bert.save_pretrained(tmp_path / "bert")
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    from simla.models.bert import BertConfig

    model = SIMLARetrieval(vit_sizes, BertConfig(**sizes, vocab_size=40, max_position_embeddings=16), 8, 12)
    with pytest.raises(
        UserError, match=r"text_encoder .*bert.* encoder\.layer\.0\.output\.dense\.weight are"
    ):
        load_bert(model.text_encoder, str(tmp_path / "bert"))
    with pytest.raises(UserError, match=r"image_encoder .*vit\.pth.* blocks\.0\.mlp\.fc1\.weight are NaN"):
        load_vit(model.visual_encoder, str(tmp_path / "vit.pth"))


def test_image_tokenizers_are_looked_at_too(tmp_path):
    dalle = DalleEncoder(n_hid=4, vocab_size=8, n_blk_per_group=1, groups=2)
    dalle.blocks.output.conv.b[3] = INF
    torch.save(dalle.state_dict(), tmp_path / "encoder.pkl")
    with pytest.raises(
        UserError, match=r"encoder\.pkl: 1 of the 8 values of blocks\.output\.conv\.b are NaN"
    ):
        load_dalle(tmp_path / "encoder.pkl")
    centres = torch.zeros(5, 192)
    centres[0, 0] = NAN
    safetensors.torch.save_file({"centres": centres}, tmp_path / "codebook.safetensors")
    with pytest.raises(UserError, match=r"codebook\.safetensors: 1 of the 960 values of centres are NaN"):
        load_codebook(tmp_path / "codebook.safetensors")


def test_no_code_of_a_local_image_encoder_is_run(tmp_path):
    class Call:
        def __reduce__(self):
            return Path.touch, (tmp_path / "trace",)

    torch.save({"model": {}, "more": Call()}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"vit\.pth: its pickle asks for"):
        load_vit(torch.nn.Identity(), str(tmp_path / "vit.pth"))
    assert not (tmp_path / "trace").exists()


# ---- scores ----

HUGE = 3e38  # finite in float32, and what it multiplies is not
SCRIPTS = [
    (
        zero_shot_retrieval,
        "zero_shot_retrieval",
        "pretrain",
        "itm_head.weight",
        "matching scores of images and",
    ),
    (
        zero_shot_retrieval,
        "zero_shot_retrieval",
        "retrieval",
        "vision_proj.weight",
        "similarities of images and",
    ),
    (Retrieval, "Retrieval", "retrieval", "itm_head.weight", "matching scores of images and texts"),
    (VQA, "VQA", "vqa", "cls.predictions.transform.dense.weight", "probabilities of answers"),
    (VE, "VE", "ve", "cls_head.0.weight", "scores of classes"),
    (NLVR, "NLVR", "nlvr", "cls_head.0.weight", "scores of classes"),
    (Grounding, "Grounding", "retrieval", "itm_head.weight", "values of heat maps"),
]


@pytest.mark.parametrize(("script", "task", "kind", "name", "what"), SCRIPTS)
def test_an_evaluation_whose_scores_are_not_finite_ends(
    tiny, tmp_path, monkeypatch, script, task, kind, name, what
):
    path, out = spoiled(tiny, kind, tmp_path / "huge.pth", name, HUGE), tmp_path / "out"
    argv = ["x.py", "--device", "cpu", "--evaluate", "--checkpoint", str(path), "--output_dir", str(out)]
    flags = {"Grounding": ["--block_num", "1"]}.get(task, [])
    monkeypatch.setattr(sys, "argv", [*argv, *flags, "--config", str(tiny.configs[task])])
    with pytest.raises(
        UserError, match=rf"\d+ of \d+ {what}.* are NaN or infinite: .* use another checkpoint"
    ):
        script.parse_and_run()
    assert not list(out.rglob("result/*")) and not (out / "log.txt").exists()


def test_written_answers_are_looked_at_too(tiny, tmp_path, monkeypatch):
    path = spoiled(tiny, "vqa", tmp_path / "huge.pth", "cls.predictions.transform.dense.weight", HUGE)
    argv = ["VQA.py", "--device", "cpu", "--evaluate", "--inference", "generate", "--checkpoint", str(path)]
    argv += ["--config", str(tiny.configs["VQA"]), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match="probabilities of answers are NaN or infinite"):
        VQA.parse_and_run()


ASKED = [
    ("retrieval", "vision_proj.weight", lambda m, i: m.encode_image(i[0]), "features of images"),
    ("retrieval", "text_proj.weight", lambda m, i: m.encode_text("a dog"), "features of texts"),
    ("retrieval", "text_proj.weight", lambda m, i: m.similarity(i, "a dog"), "features of texts"),
    ("retrieval", "vision_proj.weight", lambda m, i: m.index(i), "features of images"),
    ("retrieval", "itm_head.weight", lambda m, i: m.match(i, ["a dog", "a cat"]), "matching scores"),
    ("retrieval", "itm_head.weight", lambda m, i: m.search(i, "a dog"), "matching scores"),
    ("retrieval", "itm_head.weight", lambda m, i: m.ground(i[0], "a dog", block=1), "heat map of 'a dog'"),
    (
        "retrieval",
        "vision_proj.weight",
        lambda m, i: m.ground(i[0], "a dog", mode="itc"),
        "heat map of 'a dog'",
    ),
    ("pretrain", "vision_proj.weight", lambda m, i: m.keywords(i[0]), "features of images"),
    (
        "vqa",
        "cls.predictions.transform.dense.weight",
        lambda m, i: m.answer(i[0], "what?", ["a", "b"]),
        "answers",
    ),
    ("vqa", "cls.predictions.transform.dense.weight", lambda m, i: m.answer(i[0], "what?"), "answers"),
    ("ve", "cls_head.0.weight", lambda m, i: m.entails(i[0], "a dog"), "scores of classes"),
    ("nlvr", "cls_head.0.weight", lambda m, i: m.compare(i[0], i[1], "a dog"), "scores of classes"),
]


@pytest.mark.parametrize(("kind", "name", "ask", "what"), ASKED, ids=[f"{row[1]}-{row[3]}" for row in ASKED])
def test_the_interface_returns_no_score_that_is_not_finite(tiny, images, tmp_path, kind, name, ask, what):
    model = simla.load(spoiled(tiny, kind, tmp_path / "huge.pth", name, HUGE), "cpu")
    with pytest.raises(UserError, match=rf"{what}.* are NaN or infinite"):
        ask(model, images)


def test_an_overflow_in_half_precision_is_told_from_bad_weights(tiny, images, tmp_path):
    path = spoiled(tiny, "retrieval", tmp_path / "large.pth", "visual_encoder.norm.weight", 60_000.0)
    assert simla.load(path, "cpu").encode_image(images[0]).isfinite().all()
    with pytest.raises(UserError, match=r"features of images are NaN.* too large for fp16; compute in fp32"):
        simla.load(path, "cpu", "fp16").encode_image(images[0])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("script", "task", "kind", "name", "what"), SCRIPTS)
def test_so_does_one_whose_scores_overflow_in_half_precision(
    tiny, tmp_path, monkeypatch, precision, script, task, kind, name, what
):
    path, out = spoiled(tiny, kind, tmp_path / "huge.pth", name, HUGE), tmp_path / "out"
    argv = ["x.py", "--device", "cpu", "--evaluate", "--checkpoint", str(path), "--output_dir", str(out)]
    argv += ["--block_num", "1"] if task == "Grounding" else []
    argv += ["--config", str(tiny.configs[task]), "--overrides", f"precision={precision}"]
    monkeypatch.setattr(sys, "argv", argv)
    remedy = (
        "use another checkpoint" if task == "Grounding" else f"too large for {precision}; compute in fp32"
    )
    with pytest.raises(UserError, match=rf"\d+ of \d+ {what}.* are NaN or infinite: .*{remedy}"):
        script.parse_and_run()
    assert not list(out.rglob("result/*")) and not (out / "log.txt").exists()


@pytest.mark.parametrize("inference", ["rank", "generate"])
def test_one_token_of_minus_infinity_is_no_probability_of_0(tiny, images, tmp_path, monkeypatch, inference):
    """Which is finite, as the others are."""
    path = spoiled(tiny, "vqa", tmp_path / "huge.pth", "cls.predictions.bias", 0.0)
    content = torch.load(path, weights_only=True)
    for key in content["model"]:
        if key.endswith("cls.predictions.bias"):
            content["model"][key][-1] = -HUGE  # finite in the file
    torch.save(content, path)
    argv = ["VQA.py", "--device", "cpu", "--evaluate", "--inference", inference, "--checkpoint", str(path)]
    argv += ["--config", str(tiny.configs["VQA"]), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, "--overrides", "precision=fp16"])
    with pytest.raises(UserError, match=r"probabilities of answers are NaN or infinite: .* for fp16"):
        VQA.parse_and_run()
    assert not list((tmp_path / "out").rglob("result/*"))
    model = simla.load(path, "cpu", "fp16")
    with pytest.raises(UserError, match=r"probabilities of answers are NaN or infinite: .* for fp16"):
        model.answer(images[0], "what?", ["a", "b"] if inference == "rank" else None)


@pytest.mark.parametrize(("kind", "value"), [("ve", HUGE), ("nlvr", HUGE), ("retrieval", INF)])
def test_nor_is_one_class(tiny, images, kind, value):
    model = simla.load(tiny.checkpoints[kind], "cpu", "fp16")
    head = model.model.itm_head if kind == "retrieval" else model.model.cls_head[-1]
    head.bias.data[-1] = -value
    ask = {"ve": model.entails, "retrieval": model.match}.get(kind)
    with pytest.raises(UserError, match=r"scores.* are NaN or infinite: .* for fp16"):
        ask(images[0], "a dog") if ask else model.compare(images[0], images[1], "a dog")


# ---- files ----


@pytest.mark.parametrize("value", [NAN, INF])
def test_no_file_takes_a_value_that_is_not_finite(tmp_path, value):
    content = {"accuracy": 1.0, "splits": [{"n": 3}, {"acc": value}]}
    with pytest.raises(UserError, match=rf"ve\.json was not written: its splits\.1\.acc would be {value}"):
        save_result(str(tmp_path), "ve", content)
    with pytest.raises(UserError, match=r"log\.txt was not written: its val_acc would be"):
        append_log(str(tmp_path), {"epoch": 0, "val_acc": value})
    assert not list(tmp_path.rglob("*.*"))
    save_result(str(tmp_path), "ve", {"accuracy": None, "n": 3})
    append_log(str(tmp_path), {"epoch": 0})
    assert json.loads((tmp_path / "result" / "ve.json").read_text()) == {"accuracy": None, "n": 3}
    assert json.loads((tmp_path / "log.txt").read_text()) == {"epoch": 0}
