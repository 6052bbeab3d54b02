"""Visual entailment, NLVR and text assignment on tiny models: slots, draws, padding, gradients, twins."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from goldens_io import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import TINY_BERT, TINY_VIT, check_gradients, shake, tiny_texts
from test_initial import SIZES, bert_folder, deit_file  # noqa: F401 (fixtures)
from tiny import ROOT
from torch import nn
from transformers import BertForMaskedLM as HubBert

from simla.checkpoint.initial import load_initial_weights, starting_weights
from simla.configs.reader import read_config
from simla.configs.schema import NLVR, PRETRAIN_NLVR, VE
from simla.evaluation.classification import accuracy, confusion_counts, confusion_table, majority_accuracy
from simla.models.bert import BertConfig, BertModel, padding_mask
from simla.models.losses import negative_weights
from simla.models.nlvr import SIMLANLVR
from simla.models.pretrain_nlvr import NEITHER, PairDraws, SIMLAPretrainNLVR, draw_pairs, make_pairs
from simla.models.ve import SIMLAVE
from simla.utils import UserError

CLASSIFIERS = {"VE": SIMLAVE, "NLVR": SIMLANLVR}
MODELS = {**CLASSIFIERS, "Pretrain_NLVR": SIMLAPretrainNLVR}
SCREENED = settings(deadline=None, max_examples=60)


def tiny_model(task: str) -> nn.Module:
    vit = {**TINY_VIT, "mask_token": True}
    model = MODELS[task](vit, TINY_BERT, **({"embed_dim": 8} if task == "Pretrain_NLVR" else {}))
    return strong(model)


def strong(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, in eval mode; norms keep their scale, or the tokens would end up all alike."""
    shake(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1.0)
    return model


def batch_of(task: str, size: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keyword arguments of the forward without label, alpha and draws; sentences of 2 to 6 tokens."""
    rng = torch.Generator().manual_seed(seed)
    ids, mask = tiny_texts([2 + i % 5 for i in range(size)], 6, rng)
    num_images = 2 * size if task == "NLVR" else size
    return {
        "image": torch.randn(num_images, 3, 24, 24, generator=rng),
        "text_ids": ids,
        "text_mask": mask,
    }


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_the_baseline_of_sentences_alone_sees_no_image(task):
    """It answers from the sentence, the same for every image."""
    model, batch = tiny_model(task), batch_of(task)
    others = {**batch, "image": batch["image"].flip(0)}
    assert not torch.equal(model.predict(**batch), model.predict(**others))
    model.sentence_only = True
    assert torch.equal(model.predict(**batch), model.predict(**others))
    assert not torch.equal(*model.predict(**batch)[:2])
    loss_of(model, batch).backward()
    trained = [name for name, _ in model.named_parameters() if "_m." not in name]
    waited_for = [name for name in trained if not name.startswith(model.without_gradient)]
    assert all(model.get_parameter(name).grad is not None for name in waited_for)  # ranks wait for each


def test_the_config_builds_the_baseline():
    config = read_config("configs/demo/VE.yaml", VE, ["sentence_only=true"])
    assert SIMLAVE.from_config(config).sentence_only


def loss_of(model: nn.Module, batch: dict, alpha: float = 0.4) -> torch.Tensor:
    if isinstance(model, SIMLAPretrainNLVR):
        return model(**batch, draws=DRAWS)["loss"]
    label = torch.arange(len(batch["text_ids"])) % model.num_classes
    return model(**batch, label=label, alpha=alpha)["loss"]


DRAWS = PairDraws(  # labels 0, 1, 2, 1
    torch.tensor([[0.9, 0.9], [0.9, 0.1], [0.1, 0.9], [0.4, 0.2]]),
    torch.tensor([[2, 1], [3, 0], [0, 3], [1, 2]]),
)


# ---- the models ----


@pytest.mark.parametrize("task", MODELS)
def test_every_trainable_parameter_gets_a_gradient(task):
    model = tiny_model(task)
    loss_of(model, batch_of(task)).backward()
    check_gradients(model)


@pytest.mark.parametrize("task", MODELS)
def test_padding_changes_nothing(task):
    model, batch = tiny_model(task), batch_of(task)
    wide = {
        **batch,
        "text_ids": F.pad(batch["text_ids"], (0, 5)),
        "text_mask": F.pad(batch["text_mask"], (0, 5)),
    }
    before = model.state_dict() | {name: v.clone() for name, v in model.state_dict().items()}
    narrow = loss_of(model, batch)
    model.load_state_dict(before)  # the twins moved
    torch.testing.assert_close(loss_of(model, wide), narrow, rtol=1e-5, atol=1e-5)
    if task in CLASSIFIERS:
        torch.testing.assert_close(model.predict(**wide), model.predict(**batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", CLASSIFIERS)
@torch.no_grad()
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(task):
    model, batch = tiny_model(task), batch_of(task)
    together = model.predict(**batch)
    images = batch["image"].unflatten(0, (-1, 4))  # (n, B, 3, R, R)
    for row in range(4):
        length = int(batch["text_mask"][row].sum())
        ids, mask = (batch[name][row : row + 1, :length] for name in ("text_ids", "text_mask"))
        torch.testing.assert_close(
            model.predict(images[:, row], ids, mask)[0], together[row], rtol=1e-5, atol=1e-5
        )
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model.predict(
        images[:, order].flatten(0, 1), batch["text_ids"][order], batch["text_mask"][order]
    )
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_the_loss_is_the_formula_over_rows_with_twins_that_moved_once(task):
    model, batch = tiny_model(task), batch_of(task)
    for name, parameter in model.named_parameters():
        if "_m." in name:
            parameter.data.mul_(0.5)
    expected = {
        name: 0.995 * twin + 0.005 * dict(online.named_parameters())[name.partition(".")[2]]
        for part, (online, module) in zip(model.twin_names, model.twins(), strict=True)
        for name, twin in [(f"{part}_m.{key}", value.clone()) for key, value in module.named_parameters()]
    }
    loss = loss_of(model, batch, alpha=0.3)
    parameters = dict(model.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-6, atol=1e-7)
    logits, logits_m = (model.predict(**batch, suffix=suffix).tolist() for suffix in ("", "_m"))
    total = 0.0
    for row, (own, other) in enumerate(zip(logits, logits_m, strict=True)):
        norm = math.log(sum(map(math.exp, own)))
        soft = [math.exp(value) / sum(map(math.exp, other)) for value in other]
        total += 0.7 * (norm - own[row % model.num_classes])
        total += 0.3 * sum(p * (norm - value) for p, value in zip(soft, own, strict=True))
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)


def slow_hidden(bert: BertModel, ids, mask, slots: list[torch.Tensor]) -> torch.Tensor:
    """Layer by layer, layer i reading slots[i % 2] (B, N, D)."""
    hidden = bert.embeddings(ids)
    for i, layer in enumerate(bert.encoder.layer):
        hidden = layer(hidden, padding_mask(mask), layer.crossattention.project(slots[i % 2]))
    return hidden


@torch.no_grad()
def test_nlvr_images_swapped_in_the_batch_are_slots_swapped_in_the_layers():
    model, batch = tiny_model("NLVR"), batch_of("NLVR")
    first, second = batch["image"].chunk(2)
    texts = batch["text_ids"], batch["text_mask"]
    states = [model.visual_encoder(image) for image in (first, second)]
    answers = []
    for image, slots in ((batch["image"], states), (torch.cat([second, first]), states[::-1])):
        answers.append(model.predict(image, *texts))
        slow = model.cls_head(slow_hidden(model.text_encoder, *texts, slots)[:, 0])
        torch.testing.assert_close(answers[-1], slow, rtol=1e-5, atol=1e-5)
    assert (answers[0] - answers[1]).abs().max() > 1e-2  # the order matters
    same = torch.cat([first, first])
    slow = model.cls_head(slow_hidden(model.text_encoder, *texts, [states[0], states[0]])[:, 0])
    torch.testing.assert_close(model.predict(same, *texts), slow, rtol=1e-5, atol=1e-5)


def test_text_assignment_reads_the_drawn_images():
    """Loss and gradients equal those of every pair's images encoded and read on their own."""
    model, batch = tiny_model("Pretrain_NLVR"), batch_of("Pretrain_NLVR")
    pairs, label = make_pairs(DRAWS)
    assert label.tolist() == [0, 1, 2, 1] and pairs.T.tolist() == [[0, 2], [3, 1], [0, 3], [1, 3]]
    loss_of(model, batch).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    slots = [model.visual_encoder(batch["image"][slot]) for slot in pairs]
    hidden = slow_hidden(model.text_encoder, batch["text_ids"], batch["text_mask"], slots)
    slow = F.cross_entropy(model.ta_head(hidden[:, 0]), label)
    slow.backward()
    torch.testing.assert_close(loss_of(model, batch), slow, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_half_of_the_cross_attention_is_shared():
    """12 layers become 18; every layer from 6 on shares its keys and values with its neighbour."""
    encoder = BertModel(BertConfig.read({**SIZES, "encoder_width": 48}), two_images=True)
    layers = [layer.crossattention.self for layer in encoder.encoder.layer]
    assert len(layers) == 18
    for i, layer in enumerate(layers[:-1]):
        assert (
            (layer.key is layers[i + 1].key) == (layer.value is layers[i + 1].value) == (i in range(6, 18, 2))
        )
        assert layer.query is not layers[i + 1].query


# ---- the draws of text assignment ----


def test_draws_follow_the_weights():
    """3,000 captions with the same three candidates; errors below 4 standard deviations."""
    torch.manual_seed(1)
    rows, share = 3_000, [0.6, 0.3, 0.1]
    weights = torch.zeros(rows, rows)
    weights[:, :3] = 7 * torch.tensor(share)
    draws = draw_pairs(weights)
    _, label = make_pairs(draws)

    def check(event: torch.Tensor, probability: float) -> None:
        bound = 4 * math.sqrt(probability * (1 - probability) / rows)
        assert event.float().mean().item() == pytest.approx(probability, abs=bound)

    for value in (0, 1, NEITHER):
        check(label == value, 1 / 3)
    first, second = draws.negatives.unbind(1)
    for i in range(3):
        check(first == i, share[i])
        check((first == i) & (label == 0), share[i] / 3)  # independent of the label
        for j in range(3):
            expected = share[i] * share[j] / (1 - share[i]) if i != j else 0.0
            check((first == i) & (second == j), expected)


@SCREENED
@given(st.integers(1, 7), st.integers(0, 10_000), st.sampled_from([0.01, 0.07, 5.0]))
def test_pairs_hold_the_match_and_negatives_that_are_different(size, seed, temp):
    torch.manual_seed(seed)
    feats = F.normalize(torch.randn(size, 3), dim=-1)
    weights, has_negative = negative_weights(feats @ feats.T / temp, torch.eye(size, dtype=torch.bool))
    pairs, label = make_pairs(draw_pairs(weights))
    assert has_negative.tolist() == [size > 1] * size
    for own, (one, other) in enumerate(pairs.T.tolist() if size > 1 else []):
        assert one != other
        assert (own == one, own == other) == (label[own] == 0, label[own] == 1)
        assert size > 2 or label[own] != NEITHER


@SCREENED
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=8), st.integers(0, 999))
def test_labels_0_and_1_are_mirror_images(chance, seed):
    size, rng = len(chance), torch.Generator().manual_seed(seed)
    others = [
        [i for i in torch.randperm(size, generator=rng).tolist() if i != own][:2] for own in range(size)
    ]
    chance = torch.tensor(chance)
    mirrored = torch.stack([chance[:, 0], torch.where(chance[:, 1] > 0.5, 0.0, 1.0)], dim=1)
    pairs, label = make_pairs(PairDraws(chance, torch.tensor(others)))
    mirror, mirror_label = make_pairs(PairDraws(mirrored, torch.tensor(others)))
    for own in range(size):
        pair, other = pairs[:, own].tolist(), mirror[:, own].tolist()
        if label[own] == NEITHER:
            assert mirror_label[own] == NEITHER and pair == other == others[own]
        else:
            assert label[own] + mirror_label[own] == 1 and pair == other[::-1]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_batches(size):
    """One image has no negative: loss 0, zero gradients everywhere, for data-parallel training."""
    model = tiny_model("Pretrain_NLVR").train()
    for seed in range(5):
        loss = model(**batch_of("Pretrain_NLVR", size, seed))["loss"]
        assert loss.isfinite() and (loss > 0) == (size > 1)
    loss.backward()
    for name, parameter in model.named_parameters():
        if not name.startswith(model.without_gradient):
            assert parameter.grad.isfinite().all() and (size > 1 or not parameter.grad.any()), name


# ---- where the weights come from ----


def saved(model: nn.Module, folder) -> str:
    path = folder / f"{type(model).__name__}.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def twins_equal_online(model: nn.Module) -> dict[str, bool]:
    return {
        name: all(map(torch.equal, online.parameters(), twin.parameters()))
        for name, (online, twin) in zip(model.twin_names, model.twins(), strict=True)
    }


def test_nlvr_twins_are_copied_after_loading_or_as_published_before(tmp_path):
    path = saved(tiny_model("Pretrain_NLVR"), tmp_path)
    for copy in (True, False):
        torch.manual_seed(3)
        model = SIMLANLVR({**TINY_VIT, "mask_token": True}, TINY_BERT)
        built = {name: value.clone() for name, value in model.state_dict().items()}
        starting_weights(model, {}, "NLVR", path, copy_twins=copy)
        own = torch.load(path, weights_only=True)["model"]
        assert torch.equal(model.visual_encoder.cls_token, own["visual_encoder.cls_token"])
        assert twins_equal_online(model) == {"visual_encoder": copy, "text_encoder": copy, "cls_head": True}
        for name, value in model.state_dict().items():
            if not copy and "_m." in name:
                assert torch.equal(value, built[name]), name


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_a_fine_tuned_checkpoint_keeps_its_own_twins(task, tmp_path):
    source = tiny_model(task)
    model = strong(tiny_model(task), seed=9)
    state = {name: v for name, v in source.state_dict().items() if not name.endswith("position_ids")}
    torch.save(state, tmp_path / "no_constants.pth")  # as some versions of transformers save
    for path in (saved(source, tmp_path), tmp_path / "no_constants.pth"):
        starting_weights(model, {}, task, path)
        assert not any(twins_equal_online(model).values())
        for name, value in state.items():
            assert torch.equal(model.state_dict()[name], value), name


def test_bert_fills_the_two_image_encoder_with_its_upper_layers_twice(bert_folder, deit_file):  # noqa: F811
    vit = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 4}
    bert = BertConfig.read({**SIZES, "encoder_width": 48})
    source = HubBert.from_pretrained(bert_folder).state_dict()
    config = {"init": "pretrained", "image_encoder": deit_file, "text_encoder": bert_folder}
    for model in (SIMLANLVR(vit, bert), SIMLAPretrainNLVR(vit, bert, 8)):
        before = {name: value.clone() for name, value in model.text_encoder.state_dict().items()}
        load_initial_weights(model, config)
        for name, value in model.text_encoder.state_dict().items():
            if "crossattention" in name or name.endswith("position_ids"):
                assert torch.equal(value, before[name]), name
                continue
            stem, dot, rest = name.removeprefix("encoder.layer.").partition(".")
            if stem.isdigit():
                layer = int(stem) if int(stem) < 6 else 6 + (int(stem) - 6) // 2
                name = f"encoder.layer.{layer}{dot}{rest}"
            assert torch.equal(value, source[f"bert.{name}"]), name
        assert all(twins_equal_online(model).values()) or not model.twin_names
    with pytest.raises(UserError, match=r"text_encoder .* does not fit"):
        load_initial_weights(SIMLANLVR(vit, BertConfig.read({**SIZES, "hidden_size": 96})), config)


def test_before_token_types_are_trained_the_encoder_computes_without_them():
    torch.manual_seed(0)
    two = BertModel(TINY_BERT, two_images=True).eval()
    one = BertModel(TINY_BERT).eval()
    one.embeddings.load_state_dict(two.embeddings.state_dict(), strict=False)
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(one.embeddings(ids), two.embeddings(ids))


# ---- configs ----


TASKS = {
    "VE": (VE, SIMLAVE),
    "NLVR": (NLVR, SIMLANLVR),
    "NLVR_Pretrain": (PRETRAIN_NLVR, SIMLAPretrainNLVR),
}


def configs_of_these_tasks() -> list[tuple[str, str]]:
    """Folder and name of every config, with its task."""
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    tasks = {file: re.sub(r"_\d+gb$", "", file.stem) for file in files}
    return [(str(file), task) for file, task in tasks.items() if task in TASKS]


@pytest.mark.parametrize(("path", "task"), configs_of_these_tasks())
def test_every_config_builds_its_model(path, task):
    table, model_class = TASKS[task]
    config = read_config(path, table)
    with torch.device("meta"):
        model = model_class.from_config(config)
    layers = model.text_encoder.config.num_hidden_layers
    expected = layers if task == "VE" else layers + (layers + 1) // 2
    assert len(model.text_encoder.encoder.layer) == expected
    tokens = (config["image_res"] // config["vit"]["patch_size"]) ** 2 + 1
    assert model.visual_encoder.pos_embed.shape == (1, tokens, config["vision_width"])
    if path == f"configs/{task}.yaml":
        published = golden("schedules")[f"{task}.yaml"]
        for section in ("optimizer", "schedular"):
            assert {key: config[section][key] for key in published[section]} == published[section]


# ---- scores ----


@st.composite
def answers(draw) -> tuple[int, list[int], list[int]]:
    classes = draw(st.integers(1, 4))
    pairs = draw(st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), max_size=30))
    return classes, [label for label, _ in pairs], [predicted for _, predicted in pairs]


@SCREENED
@given(answers())
def test_confusion_and_accuracy_equal_counting_by_hand(case):
    classes, labels, predicted = case
    counts = confusion_counts(torch.tensor(labels).long(), torch.tensor(predicted).long(), classes)
    both = list(zip(labels, predicted, strict=True))
    assert counts.tolist() == [[both.count((i, j)) for j in range(classes)] for i in range(classes)]
    right = sum(label == guess for label, guess in both)
    assert accuracy(counts) == pytest.approx(100 * right / max(len(both), 1))
    most = max(labels.count(i) for i in range(classes))
    assert majority_accuracy(counts) == pytest.approx(100 * most / max(len(both), 1))


@SCREENED
@given(answers())
def test_the_printed_table_can_be_read_back(case):
    classes, labels, predicted = case
    counts = confusion_counts(torch.tensor(labels).long(), torch.tensor(predicted).long(), classes)
    names = ["contradiction", "no", "entailment", "x"][:classes]
    head, *rows = confusion_table(counts, names).splitlines()
    assert head.split() == ["true", "\\", "predicted", *names]
    assert [row.split() for row in rows] == [
        [name, *map(str, row)] for name, row in zip(names, counts.tolist(), strict=True)
    ]
    assert len({len(line) for line in [head, *rows]}) == 1  # columns stand below each other
