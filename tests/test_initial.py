"""Initial weights from local files: all of BERT and DeiT arrives, nothing is silently random."""

from pathlib import Path

import pytest
import timm
import torch
from models_for_tests import golden_pretrain_model
from transformers import BertConfig as HubConfig
from transformers import BertForMaskedLM as HubBert

from simla.checkpoint.initial import load_bert, load_initial_weights, load_vit
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError

SIZES = {
    "vocab_size": 160,
    "hidden_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


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


def test_weights_that_a_file_lacks_are_named_not_drawn(tmp_path, deit_file):
    """transformers would fill them with random numbers and a warning."""
    from transformers import BertModel as HubModel

    HubModel(HubConfig(**SIZES)).save_pretrained(tmp_path)  # no masked-LM head
    with pytest.raises(UserError, match=r"cls\.predictions"):
        load_bert(golden_pretrain_model().text_encoder, str(tmp_path))
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="no Vision Transformer"):
        load_vit(golden_pretrain_model().visual_encoder, str(tmp_path / "resnet.pth"))


def test_retrieval_model_takes_both_too(bert_folder, deit_file):
    from goldens_io import golden
    from models_for_tests import vit_sizes

    from simla.models.bert import BertConfig

    config = golden("retrieval_structure")["config"]
    model = SIMLARetrieval(vit_sizes(config), BertConfig.read(config["bert"]), 16, 32)
    load_initial_weights(
        model, {"init": "pretrained", "image_encoder": deit_file, "text_encoder": bert_folder}
    )
    source = HubBert.from_pretrained(bert_folder).state_dict()
    loaded = model.text_encoder_m.state_dict()["encoder.layer.5.output.dense.weight"]
    assert torch.equal(loaded, source["bert.encoder.layer.5.output.dense.weight"])
