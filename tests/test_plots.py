"""The pictures are written, and the chance levels are what a model that knows nothing gets."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from config import PRETRAIN, read_config
from plots import chance_levels, plot_gallery, plot_losses
from utils import UserError


@pytest.fixture
def config():
    return read_config("configs/demo/Pretrain.yaml", PRETRAIN)


def test_chance_levels_are_the_losses_of_even_guesses(config):
    chance = chance_levels(config)
    vocab, candidates = config["bert_config"]["vocab_size"], config["batch_size"] + config["queue_size"]
    for name, size in (("loss_mlm", vocab), ("loss_ita", candidates)):
        assert chance[name] == pytest.approx(F.cross_entropy(torch.zeros(1, size), torch.tensor([0])).item())
    base_rate = torch.tensor([[2 / 3, 1 / 3]]).log()  # one row of three matches
    labels = torch.tensor([0, 0, 1])
    assert chance["loss_itm"] == pytest.approx(F.cross_entropy(base_rate.expand(3, 2), labels).item())
    assert chance["loss_itm"] == pytest.approx(0.6365, abs=1e-4)
    assert chance["loss_psl"] == pytest.approx(math.log(2))


def test_loss_curves(config, tmp_path):
    names = ("loss_ita", "loss_itm", "loss_mlm", "loss_mim", "loss_psl")
    lines = [json.dumps({"step": 10 * i, "epoch": 0, **dict.fromkeys(names, 5 / i)}) for i in range(1, 5)]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines))
    plot_losses(tmp_path / "steps.jsonl", config, tmp_path / "losses.png")
    picture = np.asarray(Image.open(tmp_path / "losses.png").convert("RGB"))
    assert picture.shape[1] > 1000 and picture.std() > 5
    for content, message in (("", "no steps"), ("{", "cannot be read")):
        (tmp_path / "steps.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            plot_losses(tmp_path / "steps.jsonl", config, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


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
