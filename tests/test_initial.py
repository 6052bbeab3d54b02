"""Initial weights from local files: all of BERT and DeiT arrives, nothing is silently random."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from models_for_tests import golden_pretrain_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig as HubConfig
from transformers import BertForMaskedLM as HubBert
from transformers import BertModel as HubModel

from simla.checkpoint.initial import load_bert, load_initial_weights, load_vit
from simla.models.bert import BertConfig
from simla.models.nlvr import SIMLANLVR
from simla.models.retrieval import SIMLARetrieval
from simla.models.vqa import SIMLAVQA
from simla.utils import UserError, log

SIZES = {
    "vocab_size": 160,
    "hidden_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 4}


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    HubBert(HubConfig(**SIZES)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def deit_file(tmp_path_factory):
    torch.manual_seed(2)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}
    path = tmp_path_factory.mktemp("deit") / "deit.pth"
    torch.save({"model": timm.models.VisionTransformer(**sizes).state_dict()}, path)
    return str(path)


def test_bert(bert_folder):
    model = golden_pretrain_model()
    before = {key: value.clone() for key, value in model.text_encoder.state_dict().items()}
    load_bert(model.text_encoder, bert_folder)
    source = HubBert.from_pretrained(bert_folder).state_dict()
    for key, value in model.text_encoder.state_dict().items():
        if "crossattention" in key:
            assert torch.equal(value, before[key]), key  # BERT has none: random, as built
        elif not key.endswith(("position_ids", "decoder.bias")):
            assert torch.equal(value, source[key]), key
    predictions = model.text_encoder.cls["predictions"]
    assert predictions.decoder.weight is model.text_encoder.bert.embeddings.word_embeddings.weight
    assert torch.equal(predictions.decoder.bias, source["cls.predictions.bias"])


def test_vit_with_positions_interpolated(deit_file):
    model = golden_pretrain_model()
    load_vit(model.visual_encoder, deit_file)
    source = torch.load(deit_file, weights_only=True)["model"]
    state = model.visual_encoder.state_dict()
    assert torch.equal(state["blocks.2.mlp.fc1.weight"], source["blocks.2.mlp.fc1.weight"])
    assert torch.equal(state["pos_embed"][:, 0], source["pos_embed"][:, 0])
    assert state["pos_embed"].shape == (1, 17, 48) and source["pos_embed"].shape == (1, 5, 48)


def test_both_reach_the_twins(bert_folder, deit_file):
    model = golden_pretrain_model()
    load_initial_weights(
        model, {"init": "pretrained", "image_encoder": deit_file, "text_encoder": bert_folder}
    )
    for online, twin in model.twins():
        for (name, a), b in zip(online.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b), name
            assert not b.requires_grad


def test_scratch_is_the_only_way_to_random_weights(bert_folder, deit_file, tmp_path):
    model = golden_pretrain_model()
    missing = str(tmp_path / "nothing.pth")
    for vit, bert in ((missing, bert_folder), (deit_file, str(tmp_path / "nothing"))):
        with pytest.raises(UserError, match=r"nothing.*init: scratch"):
            load_initial_weights(model, {"init": "pretrained", "image_encoder": vit, "text_encoder": bert})


def test_a_folder_cloned_without_its_large_files_is_called_that(bert_folder, tmp_path):
    for file in Path(bert_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"model\.safetensors is a pointer of Git LFS.*git lfs pull"):
        load_bert(golden_pretrain_model().text_encoder, str(tmp_path))


def test_sizes_that_do_not_fit_are_named(tmp_path, deit_file):
    model = golden_pretrain_model()
    HubBert(HubConfig(**{**SIZES, "num_hidden_layers": 11})).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layer\.11"):
        load_bert(model.text_encoder, str(tmp_path))
    state = torch.load(deit_file, weights_only=True)["model"]
    torch.save({key: value for key, value in state.items() if key != "norm.weight"}, tmp_path / "deit.pth")
    with pytest.raises(UserError, match=r"norm\.weight"):
        load_vit(model.visual_encoder, str(tmp_path / "deit.pth"))


def test_weights_that_a_file_lacks_are_named_not_drawn(bert_folder, tmp_path):
    """transformers would fill them with random numbers and a warning."""
    lacking = "cls.predictions.transform.LayerNorm.weight"
    state = {k: v for k, v in load_file(f"{bert_folder}/model.safetensors").items() if k != lacking}
    shutil.copytree(bert_folder, tmp_path, dirs_exist_ok=True)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=lacking):
        load_bert(golden_pretrain_model().text_encoder, str(tmp_path))
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="no Vision Transformer"):
        load_vit(golden_pretrain_model().visual_encoder, str(tmp_path / "resnet.pth"))


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A BERT of 14 layers as sentence encoders are saved: no head, no "bert." before the names."""
    folder = tmp_path_factory.mktemp("headless")
    torch.manual_seed(3)
    HubModel(HubConfig(**{**SIZES, "num_hidden_layers": 14, "max_position_embeddings": 100})).save_pretrained(
        folder
    )
    assert "embeddings.word_embeddings.weight" in load_file(folder / "model.safetensors")
    return str(folder)


def test_an_encoder_without_a_head_fills_all_but_the_head_which_is_said(headless, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(4)
    encoder = golden_pretrain_model().text_encoder
    with torch.no_grad():
        encoder.cls["predictions"].bias += 1  # a random head stays as built, whatever that is
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    load_bert(encoder, headless)
    for key, value in encoder.state_dict().items():
        if "crossattention" in key or (key.startswith("cls.") and key != "cls.predictions.decoder.weight"):
            assert torch.equal(value, before[key]), key
    source = HubModel.from_pretrained(headless).eval()
    source.encoder.layer = source.encoder.layer[:12]
    ids = torch.randint(160, (2, 64))
    with torch.no_grad():  # token types, which this encoder lacks, are in its positions
        torch.testing.assert_close(encoder.eval()(ids), source(ids).last_hidden_state)
    predictions = encoder.cls["predictions"]
    assert predictions.decoder.weight is encoder.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is predictions.bias
    messages = [record.getMessage() for record in caplog.records if record.name == log.name]
    assert messages == [
        f"text_encoder {headless!r}: its num_hidden_layers is 14, of which the first 12 are taken",
        f"text_encoder {headless!r}: its max_position_embeddings is 100, of which the first 64 are taken",
        f"text_encoder {headless!r} has no head for masked words: it starts from random weights, but for the "
        "word embeddings, which it shares",
    ]


def test_decoder_and_two_image_encoder_start_from_the_layers_that_the_text_encoder_takes(headless):
    """Of 14 layers the text encoder takes 6: VQA's decoder starts from layers 3 to 5, NLVR has them twice."""
    bert, source = (
        BertConfig.read({**SIZES, "num_hidden_layers": 6}),
        load_file(f"{headless}/model.safetensors"),
    )
    config = {"init": "text", "text_encoder": headless}
    vqa, nlvr = SIMLAVQA(VIT, bert), SIMLANLVR(VIT, bert)
    for model, layers in (
        (vqa.text_decoder.bert, [3, 4, 5]),
        (nlvr.text_encoder, [0, 1, 2, 3, 3, 4, 4, 5, 5]),
    ):
        load_initial_weights(vqa if model is vqa.text_decoder.bert else nlvr, config)
        for layer, number in zip(model.encoder.layer, layers, strict=True):
            assert torch.equal(
                layer.output.dense.weight, source[f"encoder.layer.{number}.output.dense.weight"]
            )
    words = vqa.text_decoder.bert.embeddings.word_embeddings.weight
    assert vqa.text_decoder.cls["predictions"].decoder.weight is words
    assert torch.equal(words, source["embeddings.word_embeddings.weight"])


@pytest.mark.parametrize(("init", "drawn"), [("text", "image"), ("image", "text")])
def test_one_encoder_alone_starts_random_when_init_says_so(init, drawn, bert_folder, deit_file, caplog):
    caplog.set_level("INFO")
    model = golden_pretrain_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    files = {"image_encoder": deit_file, "text_encoder": bert_folder, f"{drawn}_encoder": "/no/where"}
    load_initial_weights(model, {"init": init, **files})
    assert f"init: {init} - the {drawn} encoder starts from random weights" in caplog.messages
    for name, value in model.state_dict().items():
        kind = {"visual_encoder": "image", "text_encoder": "text"}.get(name.partition(".")[0])
        if kind == drawn:
            assert torch.equal(value, before[name]), name
        elif kind and name.endswith((".attention.self.query.weight", "qkv.weight")):
            assert not torch.equal(value, before[name]), name
    for online, twin in model.twins():
        assert all(map(torch.equal, online.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"hidden_size": 96}, "its hidden_size is 96, bert_config's 48"),
        ({"layer_norm_eps": 1e-5}, "its layer_norm_eps is 1e-05, bert_config's 1e-12"),
        ({"hidden_act": "gelu_new"}, "its hidden_act is 'gelu_new', this encoder's 'gelu'"),
        ({"num_attention_heads": 8}, "its num_attention_heads is 8, bert_config's 4"),
        (
            {"vocab_size": 170, "max_position_embeddings": 32},
            "vocab_size is 170, bert_config's 160; its max_pos",
        ),
        ({"model_type": "roberta"}, r"is of the kind 'roberta' .*not 'bert'.*name a BERT"),
    ],
)
def test_sizes_and_kinds_that_would_compute_otherwise_name_both(sizes, expected, tmp_path):
    sizes = {**SIZES, "num_hidden_layers": 1, "intermediate_size": 8} | sizes
    kind = sizes.pop("model_type", "bert")
    HubModel(HubConfig(**sizes)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(UserError, match=expected):
        load_bert(golden_pretrain_model().text_encoder, str(tmp_path))


def test_retrieval_model_takes_both_too(bert_folder, deit_file):
    from goldens_io import golden
    from models_for_tests import vit_sizes

    config = golden("retrieval_structure")["config"]
    model = SIMLARetrieval(vit_sizes(config), BertConfig.read(config["bert"]), 16, 32)
    load_initial_weights(
        model, {"init": "pretrained", "image_encoder": deit_file, "text_encoder": bert_folder}
    )
    source = HubBert.from_pretrained(bert_folder).state_dict()
    loaded = model.text_encoder_m.state_dict()["encoder.layer.5.output.dense.weight"]
    assert torch.equal(loaded, source["bert.encoder.layer.5.output.dense.weight"])
