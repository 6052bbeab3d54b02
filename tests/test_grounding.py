"""Grad-CAM and the choice of boxes: recorded numbers, slow twins, properties; the picture of heat maps."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from goldens_io import digest, fill_model, golden, golden_image
from hypothesis import given
from hypothesis import strategies as st
from models_for_tests import shake, tiny_texts, vit_sizes
from PIL import Image

from simla.dataset.readers.tables import is_box
from simla.evaluation.grounding import (
    HEAT_THRESHOLD,
    box_iou,
    box_score,
    choose_box,
    grounding_accuracy,
    grounding_chance,
    heat_box,
    resize_heat,
)
from simla.models.bert import BertConfig
from simla.models.gradcam import check_block, default_block, grad_cam
from simla.models.retrieval import SIMLARetrieval
from simla.plots import plot_heat_maps
from simla.utils import UserError

# ---- recorded numbers ----


@pytest.fixture(scope="module")
def recorded():
    """The recorded model, image (3, 3, 384, 384) and texts (3, 12), two of them padded."""
    record = golden("grounding")
    config = record["config"]
    model = SIMLARetrieval(
        vit_sizes(config), BertConfig.read(config["bert"]), config["embed_dim"], config["queue_size"]
    )
    fill_model(model, {})
    text_ids, text_mask = (torch.tensor(record["text"][name]) for name in ("input_ids", "attention_mask"))
    return model.eval(), golden_image(record["image_seed"], record["image_shape"]), text_ids, text_mask


@pytest.mark.parametrize("name", ["itm_block8", "itc_block1", "itc_block2"])
def test_recorded_maps(recorded, name):
    model, *inputs = recorded
    expected = golden("grounding")["maps"][name]
    maps = grad_cam(model, expected["mode"], expected["block"], *inputs)
    assert maps.shape == (3, 24, 24) and not maps.requires_grad
    for number, heat in enumerate(maps):
        allowed = 1e-3 * expected["max"][number]
        found, wanted = heat.flatten(), expected["digest"][number]
        assert found[::7].tolist() == pytest.approx(expected["every_7th_value"][number], rel=0, abs=allowed)
        assert found.argmax() == expected["argmax"][number]
        assert found.max().item() == pytest.approx(expected["max"][number], rel=1e-3)
        assert found.min().item() == pytest.approx(expected["min"][number], rel=0, abs=allowed)
        assert found.double().sum().item() == pytest.approx(wanted["sum"], rel=1e-5)
        assert digest(found, 0) == pytest.approx([wanted["norm"]], rel=1e-5)


@torch.no_grad()
def test_recorded_match_logits(recorded):
    model, image, text_ids, text_mask = recorded
    cross = model.text_encoder.project(model.visual_encoder(image))
    logits = model.itm_head(model.text_encoder(text_ids, text_mask, cross)[:, 0])
    expected = golden("grounding")["maps"]["itm_block8"]["itm_logits_digest"]
    assert digest(logits) == pytest.approx(expected, rel=5e-6)


def choices_of(refs: list[dict], heats: list[torch.Tensor]) -> list[dict]:
    chosen = []
    for ref, heat in zip(refs, heats, strict=True):
        box = choose_box(resize_heat(heat, ref["height"], ref["width"]), ref["dets"])
        iou = 0.0 if box is None else box_iou(ref["bbox"], box)
        chosen.append({"ref_box": ref["bbox"], "chosen_box": box, "iou": iou})
    return chosen


def accuracy_of(refs: list[dict], chosen: list[dict]) -> dict[str, float]:
    """As recorded: a share under the published name."""
    result = grounding_accuracy([ref["split"] for ref in refs], [c["iou"] for c in chosen])
    return {f"{split}_d": percent / 100 for split, percent in result.items()}


def test_recorded_choices():
    synthetic = golden("grounding")["synthetic"]
    refs = synthetic["refs"]
    heats = [torch.tensor(ref["map"]).view(24, 24) for ref in refs]
    chosen = choices_of(refs, heats)
    assert chosen == synthetic["chosen"]
    assert accuracy_of(refs, chosen) == synthetic["accuracy"]
    for ref, heat, gap in zip(refs, heats, synthetic["score_gap"], strict=True):
        resized = resize_heat(heat, ref["height"], ref["width"])
        best, second = sorted((box_score(resized, box) for box in ref["dets"]), reverse=True)[:2]
        assert best - second == pytest.approx(gap, abs=1e-4)


def test_recorded_ious():
    for case in golden("grounding")["ious"]:
        assert box_iou(case["a"], case["b"]) == case["iou"] == box_iou(case["b"], case["a"])


def test_recorded_chain_from_images_to_boxes(recorded):
    record = golden("grounding")
    refs = record["synthetic"]["refs"][:3]
    model, *inputs = recorded
    chosen = choices_of(refs, list(grad_cam(model, "itm", 8, *inputs)))
    assert chosen == record["chain"]["chosen"]
    accuracy = accuracy_of(refs, chosen)
    assert accuracy == {name: record["chain"]["accuracy"][name] for name in accuracy}


def test_what_the_published_code_leaves_undefined():
    """No score above 0: no box, wrong, whatever came before; a split without references: no accuracy."""
    refs = golden("grounding")["synthetic"]["refs"]
    heats = [torch.tensor(ref["map"]).view(24, 24) for ref in refs]
    for number in (0, 1):
        spoilt = [-torch.ones(24, 24) if i == number else heat for i, heat in enumerate(heats)]
        chosen = choices_of(refs, spoilt)
        assert chosen[number] == {"ref_box": refs[number]["bbox"], "chosen_box": None, "iou": 0.0}
        assert set(accuracy_of(refs, chosen)) == {"val_d", "testA_d", "testB_d"}
    without = [i for i, ref in enumerate(refs) if ref["split"] != "testB"]
    some = [refs[i] for i in without]
    assert set(accuracy_of(some, choices_of(some, [heats[i] for i in without]))) == {"val_d", "testA_d"}
    assert accuracy_of([], []) == {}
    heat = torch.ones(5, 6)
    assert choose_box(heat, []) is None
    assert choose_box(heat * float("nan"), [[0, 0, 2, 2]]) is None
    assert heat_box(heat * 0) is None and heat_box(heat * float("nan")) is None and heat_box(-heat) is None


# ---- Grad-CAM against the slow, obvious way ----


def small_model(
    grid: int = 3, vit_heads: int = 2, bert_heads: int = 3, layers: int = 3, alone: int = 0
) -> SIMLARetrieval:
    bert = BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=bert_heads,
        intermediate_size=32,
        max_position_embeddings=16,
        encoder_width=24,
        text_layers_alone=alone,
    )
    vit = {"img_size": 8 * grid, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": vit_heads}
    return shake(SIMLARetrieval(vit, bert, embed_dim=8, queue_size=4))


def small_inputs(
    grid: int, lengths: list[int], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    image = torch.randn(len(lengths), 3, 8 * grid, 8 * grid, generator=rng)
    return (image, *tiny_texts(lengths, width, rng))


def slow_attention(query, key, value, num_heads, seen):
    """One head at a time, nothing fused: (T, D), (S, D), (S, D) -> (T, D); the maps are kept in `seen`."""
    outputs, maps = [], []
    for q, k, v in zip(
        query.chunk(num_heads, 1), key.chunk(num_heads, 1), value.chunk(num_heads, 1), strict=True
    ):
        scores = q @ k.T / math.sqrt(q.shape[1])
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        weights.retain_grad()
        maps.append(weights)
        outputs.append(weights @ v)
    seen.append(maps)
    return torch.cat(outputs, 1)


def slow_maps(model: SIMLARetrieval, image: torch.Tensor, ids: torch.Tensor, mode: str) -> list[list]:
    """For one pair without padding, in float64: every layer's attention maps by head, with gradients from one
    backward pass through the whole model."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    vit, bert = model.visual_encoder, model.text_encoder
    image_maps, cross_maps = [], []
    tokens = vit.embed(image[None].double())[0]
    for block in vit.blocks:
        query, key, value = block.attn.qkv(block.norm1(tokens)).chunk(3, 1)
        tokens = tokens + block.attn.proj(slow_attention(query, key, value, block.attn.num_heads, image_maps))
        tokens = tokens + block.mlp(block.norm2(tokens))
    image_states = vit.norm(tokens)

    def text(multimodal: bool):
        hidden = bert.embeddings(ids[None])[0]
        for layer in bert.encoder.layer[: None if multimodal else bert.config.text_layers_alone or None]:
            sources = [(layer.attention, None, [])]
            if multimodal and layer.crossattention:
                sources.append((layer.crossattention, image_states, cross_maps))
            for attention, states, seen in sources:
                own = attention.self
                states = hidden if states is None else states
                parts = own.query(hidden), own.key(states), own.value(states)
                mixed = slow_attention(*parts, attention.num_heads, seen)
                hidden = attention.output(mixed, hidden)
            hidden = layer.feed_forward(hidden)
        return hidden[0]

    if mode == "itm":
        model.itm_head(text(True))[1].backward()
        return cross_maps
    features = model.vision_proj(image_states[0]), model.text_proj(text(False))
    (torch.cosine_similarity(*features, dim=0) / model.temp).backward()
    return image_maps


@pytest.mark.parametrize(
    ("grid", "vit_heads", "bert_heads", "alone"),
    [(3, 2, 3, 0), (2, 3, 1, 0), (4, 1, 4, 0), (3, 2, 3, 1)],
    ids=["a", "b", "c", "two stages"],
)
@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_maps_are_those_of_one_pair_at_a_time_through_the_whole_model(
    mode, grid, vit_heads, bert_heads, alone
):
    model = small_model(grid, vit_heads, bert_heads, alone=alone)
    lengths, width = [2, 5, 7], 9
    image, ids, mask = small_inputs(grid, lengths, width)
    first, layers = {"itm": (alone, 3), "itc": (0, 2)}[mode]
    for block in range(first, layers):
        maps = grad_cam(model, mode, block, image, ids, mask)
        assert maps.shape == (3, grid, grid) and (maps >= 0).all()
        for number, length in enumerate(lengths):
            heads = slow_maps(model, image[number], ids[number, :length], mode)[block - first]
            heat = torch.zeros(grid * grid, dtype=torch.float64)
            for weights in heads:
                weighed = weights.detach() * weights.grad.clamp(min=0)
                rows = weighed.sum(0) / width if mode == "itm" else weighed[0]  # padding counts as 0
                heat += rows[1:] / len(heads)
            assert heat.max() > 0
            difference = (maps[number].flatten() - heat).abs().max() / heat.max()
            assert difference < 1e-4, (block, number, difference)


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_padding_and_the_rest_of_the_batch_change_no_map(mode):
    """Mode itm divides by the number of positions, padded ones included, as published: the scale, no more."""
    model = small_model()
    image, ids, mask = small_inputs(3, [3, 6, 4], 6)
    maps = grad_cam(model, mode, 1, image, ids, mask)
    for number in range(3):
        for padding in (0, 7):
            length = int(mask[number].sum())
            one = torch.nn.functional.pad(ids[number : number + 1, :length], (0, padding))
            alone = grad_cam(model, mode, 1, image[number : number + 1], one, (one != 0).long())[0]
            scale = (length + padding) / 6 if mode == "itm" else 1
            torch.testing.assert_close(alone * scale, maps[number], rtol=1e-4, atol=1e-5 * maps.max().item())


def test_maps_leave_the_model_as_it_was():
    model = small_model()
    flags = [p.requires_grad for p in model.parameters()]
    inputs = small_inputs(3, [3, 6], 6)
    with torch.no_grad():
        quiet = [grad_cam(model, mode, 0, *inputs) for mode in ("itm", "itc")]
    for mode, expected in zip(("itm", "itc"), quiet, strict=True):
        assert torch.equal(grad_cam(model, mode, 0, *inputs), expected)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize(("mode", "count"), [("itm", 5), ("itc", 2)])
def test_a_block_that_there_is_not(mode, count):
    model = small_model(layers=5)
    for block in range(count):
        check_block(model, mode, block)
    for block in (-1, count, 8):
        with pytest.raises(UserError, match=rf"^block {block}: .*has {count}; choose 0 to {count - 1}"):
            grad_cam(model, mode, block, *small_inputs(3, [3], 3))


def test_a_block_that_reads_text_alone():
    inputs = small_inputs(3, [3], 3)
    model = small_model(alone=2)
    with pytest.raises(UserError, match=r"has 3, of which the first 2 read text alone; choose 2 to 2"):
        grad_cam(model, "itm", 1, *inputs)
    assert default_block(model, "itm") == 2 and grad_cam(model, "itm", 2, *inputs).max() > 0
    check_block(model, "itc", 0)


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, 0), (2, 0), (3, 1), (4, 2), (6, 4), (12, 8), (18, 12), (24, 16)]
)
def test_the_default_block_is_two_thirds_up(layers, expected):
    """Below the last one of several, in which itm sees [CLS] alone; of the encoder that is looked into."""
    config = SimpleNamespace(text_layers_alone=0)
    model = SimpleNamespace(
        text_encoder=SimpleNamespace(encoder=SimpleNamespace(layer=[None] * layers), config=config),
        visual_encoder=SimpleNamespace(blocks=[None] * (layers + 12)),
    )
    assert default_block(model, "itm") == expected
    assert default_block(model, "itc") == (layers + 12) * 2 // 3


# ---- boxes ----


@pytest.mark.parametrize("side", [1e308, 10**400, math.inf, math.nan, 1e-200, 0, -1, True, "1"])
def test_a_box_without_an_area_that_can_be_reckoned_is_none(side):
    assert is_box([1, 2, 3.5, 4, 0.9]) and is_box([-5, 1e6, 1e6, 1e-3])
    for box in ([1, 2, side, 4], [1, 2, 3, side], [side, 2, 3, 4]):
        if box[0] is not side or side not in (1e-200, 0, -1):
            assert not is_box(box)


SIZES = st.integers(1, 12)
WHOLE_BOXES = st.tuples(st.integers(-3, 12), st.integers(-3, 12), SIZES, SIZES)
HEATS = st.tuples(SIZES, SIZES, st.integers(0, 2**31 - 1)).map(
    lambda t: torch.from_numpy(np.random.RandomState(t[2]).randint(-2, 5, t[:2]).astype(np.float32))
)


def pixels(box) -> set[tuple[int, int]]:
    x, y, w, h = box
    return {(column, row) for column in range(x, x + w) for row in range(y, y + h)}


@given(WHOLE_BOXES, WHOLE_BOXES)
def test_iou_counts_pixels(a, b):
    both = pixels(a) & pixels(b)
    is_thin = len({x for x, _ in both}) < 2 or len({y for _, y in both}) < 2  # a single row or column: none
    overlap = 0 if is_thin else len(both)
    assert box_iou(a, b) == overlap / (len(pixels(a)) + len(pixels(b)) - overlap)


@given(HEATS, st.lists(WHOLE_BOXES.map(lambda box: tuple(value + 0.25 for value in box)), max_size=5))
def test_the_first_box_with_the_largest_score_above_0(heat, boxes):
    height, width = heat.shape
    scores = []
    for x, y, w, h in boxes:
        inside = [
            heat[row, column].item()
            for row in range(int(y), int(y + h))
            for column in range(int(x), int(x + w))
            if 0 <= row < height and 0 <= column < width
        ]
        scores.append(sum(inside) / math.sqrt(w * h))
    assert [box_score(heat, box) for box in boxes] == pytest.approx(scores)
    chosen = choose_box(heat, [[*box, 0.9] for box in boxes])
    if max(scores, default=0) <= 0:
        assert chosen is None
    else:
        close = [i for i, score in enumerate(scores) if score > max(scores) - 1e-9]
        assert chosen == list(boxes[close[0]]) or len({boxes[i] for i in close}) > 1


@given(HEATS)
def test_heat_box_bounds_the_largest_connected_region(heat):
    hot = (heat >= HEAT_THRESHOLD * heat.max()) if heat.max() > 0 else torch.zeros_like(heat)
    left = {(int(x), int(y)) for y, x in hot.nonzero()}
    regions = []
    while left:
        region, edge = set(), [min(left)]
        while edge:
            x, y = edge.pop()
            if (x, y) in left:
                left.remove((x, y))
                region.add((x, y))
                edge += [(x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        regions.append(region)
    largest = [region for region in regions if len(region) == max(map(len, regions))]
    bounds = []
    for region in largest:
        xs, ys = zip(*region, strict=True)
        bounds.append([min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1])
    found = heat_box(heat)
    assert found in bounds if bounds else found is None


def test_heat_box_finds_a_bright_patch_whatever_the_scale():
    heat = torch.zeros(8, 8)
    heat[2:5, 3:6] = 1.0
    heat[7, 0] = 1.3  # a hotter spot, but smaller
    for scale in (1e-12, 1.0, 1e6):
        x, y, w, h = heat_box(resize_heat(heat * scale, 80, 160))
        assert abs(x - 60) < 12 and abs(y - 20) < 6 and abs(w - 60) < 24 and abs(h - 30) < 12


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.49, 0.5, 0.51, 1.0]))))
def test_accuracy_is_a_count(pairs):
    result = grounding_accuracy([split for split, _ in pairs], [iou for _, iou in pairs])
    assert set(result) == {split for split, _ in pairs}
    for split, percent in result.items():
        own = [iou for name, iou in pairs if name == split]
        assert percent == 100 * sum(iou >= 0.5 for iou in own) / len(own)


@given(WHOLE_BOXES, st.lists(WHOLE_BOXES, max_size=6))
def test_chance_is_the_mean_over_every_choice(truth, boxes):
    outcomes = [grounding_accuracy(["val"], [box_iou(truth, box)])["val"] / 100 for box in boxes]
    assert grounding_chance(truth, boxes) == pytest.approx(sum(outcomes) / len(boxes) if boxes else 0)


def test_resized_heat_keeps_constants_and_places():
    assert resize_heat(torch.full((3, 5), 2.5), 37, 61).shape == (37, 61)
    torch.testing.assert_close(resize_heat(torch.full((3, 5), 2.5), 37, 61), torch.full((37, 61), 2.5))
    heat = torch.zeros(4, 6)
    heat[1, 4] = 1
    row, column = divmod(resize_heat(heat, 40, 90).argmax().item(), 90)
    assert 10 <= row < 20 and 60 <= column < 75


# ---- the picture ----


def test_picture_shows_heat_and_both_boxes(tmp_path):
    file = str(tmp_path / "grey.png")
    Image.new("RGB", (64, 48), (128, 128, 128)).save(file)
    hot = torch.zeros(4, 4)
    hot[1, 2] = 1e-7
    out = tmp_path / "maps.png"
    plot_heat_maps(
        [file] * 3,
        ["the cup on the shelf", "a long expression " * 5, "nothing here"],
        [hot, hot, torch.zeros(4, 4)],
        [[4, 4, 20, 20], [4, 4, 20, 20], [4, 4, 20, 20]],
        [[30, 20, 20, 20], [4, 4, 20, 20], None],
        [False, True, False],
        out,
    )
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)

    def near(colour, columns, rows=slice(None)):
        return (np.abs(picture[rows, columns] - colour).sum(-1) < 40).any(0).sum()

    third = picture.shape[1] // 3
    parts = [slice(i * third, (i + 1) * third) for i in range(3)]
    green, orange, red = (0, 0xC8, 0x53), (0xFF, 0x91, 0x00), (0xB2, 0x18, 0x2B)
    assert all(near(green, part) > 10 for part in parts)
    assert near(orange, parts[0]) > 10 and near(orange, parts[1]) > 10
    titles = slice(0, 55)
    assert [near(red, part, titles) > 10 for part in parts] == [True, False, True]
    for part, is_hot in zip(parts, (True, True, False), strict=True):
        middle = picture[60 : picture.shape[0] - 70, part]  # without titles and legend
        reddish = (middle[..., 0] > 150) & (middle[..., 1:].max(-1) < 100)
        assert reddish.any() == is_hot
