"""The pictures are written, and show what they say."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models_for_tests import losses_of, tiny_batch, tiny_pretrain_model
from PIL import Image
from ruamel.yaml import YAML
from tiny import make_tiny

from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN
from simla.dataset.text import build_tokenizer
from simla.demo import keywords
from simla.demo.keywords import plot_keywords
from simla.models.pretrain import SIMLA
from simla.plots import plot_gallery, plot_word_maps
from simla.utils import UserError


def test_gallery_frames_the_right_picture_in_green(tmp_path):
    files = []
    for i, colour in enumerate(("red", "blue", "yellow")):
        files.append(str(tmp_path / f"{i}.jpg"))
        Image.new("RGB", (32, 32), colour).save(files[-1])
    right = [[False, True, False], [False, False, False]]
    plot_gallery(
        ["a blue square", "a long query " * 8], [files, files], right, tmp_path / "g.png", "two queries"
    )
    picture = np.asarray(Image.open(tmp_path / "g.png").convert("RGB")).astype(int)
    green = (np.abs(picture - [0x1A, 0x96, 0x41]).sum(-1) < 30).any(0).nonzero()[0]
    assert (
        len(green) and picture.shape[1] * 0.5 < green.mean() < picture.shape[1] * 0.8
    )  # the second of three


GREEN = np.array([0x1A, 0x96, 0x41])


def test_keywords_are_the_targets_of_psl(monkeypatch):
    """The loss of a head that answers exactly the words found, and no others, is next to nothing."""
    model, batch = tiny_pretrain_model().eval(), tiny_batch(4)
    image, ids, mask = batch["image"], batch["text_ids"], batch["text_mask"]
    attention, votes, chosen = model.keywords(image, ids, mask)
    assert attention.shape[0::2] == ids.shape and torch.allclose(attention.sum(-1), torch.ones(()))
    assert not chosen[mask == 0].any() and not chosen[ids == model.cls_id].any() and chosen.any(-1).all()
    assert (votes[mask == 0] == -1).all() and (votes[mask == 1] >= 0).all()
    logits = torch.full((4, model.concept_head.out_features), -30.0)
    logits[torch.arange(4)[:, None].expand_as(ids)[chosen], ids[chosen]] = 30.0
    monkeypatch.setattr(model.concept_head, "forward", lambda features: logits)
    assert losses_of(model, {**batch, "alpha": 0.0})["loss_psl"] < 1e-6


def test_keywords_are_green(tmp_path):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "0.jpg")
    files, words = [str(tmp_path / "0.jpg")] * 2, [["[CLS]", "a", "dog"], ["[CLS]", "sky"]]
    attention = torch.full((2, 4, 3), 0.3)
    votes, none = torch.tensor([[4, 0, 4], [4, 4, -1]]), torch.zeros(2, 3, dtype=torch.bool)
    for chosen, has_green in ((none, False), (votes == 4, True)):
        plot_keywords(files, words, attention, votes, chosen, tmp_path / "k.png")
        picture = np.asarray(Image.open(tmp_path / "k.png").convert("RGB")).astype(int)
        assert ((np.abs(picture - GREEN).sum(-1) < 10).sum() > 500) == has_green


def test_keywords_of_a_checkpoint(tmp_path, monkeypatch):
    paths = make_tiny(tmp_path)
    config = read_config(str(paths["Pretrain"]), PRETRAIN)
    model = SIMLA.from_config(config, build_tokenizer(config["text_encoder"]).cls_token_id)
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint_00.pth")
    with (tmp_path / "config.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(config, file)
    command = ["simla.demo.keywords", str(tmp_path / "checkpoint_00.pth"), "-o", str(tmp_path / "k.png")]
    monkeypatch.setattr(sys, "argv", command)
    keywords.main()
    assert np.asarray(Image.open(tmp_path / "k.png")).std() > 5
    pairs = json.loads((paths["data"] / "pretrain_train.json").read_bytes())
    names = [{**pair, "image": Path(pair["image"]).name} for pair in pairs]
    (tmp_path / "names.json").write_text(json.dumps(names))
    config["image_root"] = str(paths["data"] / Path(pairs[0]["image"]).parent)
    config["train_file"] = [{"path": str(tmp_path / "names.json"), "weight": 1}]
    with (tmp_path / "config.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(config, file)
    (tmp_path / "k.png").unlink()
    keywords.main()  # of the photos in image_root, and of a list with weights
    assert (tmp_path / "k.png").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--file", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match=r"none\.json"):
        keywords.main()


@pytest.mark.parametrize("size", [(300, 80), (96, 96), (60, 200)], ids=["flat", "square", "high"])
@pytest.mark.parametrize("num_words", [0, 3])
def test_no_text_of_heat_maps_is_cut_off(tmp_path, size, num_words):
    """All that is written lies within the picture, whose edge is white."""
    words = [("word", torch.rand(4, 4))] * num_words
    text = "a sandy beach with a cake above a small banana and a house"
    boxes = [("hottest region", [5.0, 5.0, 20.0, 20.0])]
    plot_word_maps(Image.new("RGB", size, "blue"), text, torch.rand(4, 4), words, boxes, tmp_path / "w.png")
    picture = np.asarray(Image.open(tmp_path / "w.png").convert("L"))
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all()
