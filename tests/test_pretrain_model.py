"""The pre-training model as a whole: gradients, corner cases, switches, and the sizes of every config."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from goldens_io import golden
from models_for_tests import (
    TINY_BERT,
    TINY_CLS_ID,
    TINY_VIT,
    check_gradients,
    losses_of,
    shake,
    tiny_batch,
    tiny_pretrain_model,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig as HubConfig
from transformers import BertForMaskedLM as HubBertForMaskedLM

from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN, RETRIEVAL
from simla.models.align import Draws
from simla.models.pretrain import LOSSES, SIMLA
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError

ROOT = Path(__file__).parents[1]
NAMES = ["loss_ita", "loss_itm", "loss_mlm", "loss_mim", "loss_psl"]


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs name bert_config relative to it


@pytest.fixture
def model():
    return shake(tiny_pretrain_model())


def no_draws(batch: int) -> Draws:
    """Negatives that are the same in every call: the next one."""
    following = torch.arange(batch).roll(-1)
    return Draws(following, following)


def losses_with(batch: dict, **switches) -> dict[str, float]:
    torch.manual_seed(0)  # the queues start as noise
    model = shake(tiny_pretrain_model(**switches))
    return {name: loss.item() for name, loss in losses_of(model, batch, no_draws(4)).items()}


def all_finite(model: SIMLA, named: dict[str, torch.Tensor]) -> bool:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    buffers = [model.image_queue, model.text_queue]
    return all(tensor.isfinite().all() for tensor in [*named.values(), *grads, *buffers])


# ---- gradients and corner cases ----


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_every_trainable_parameter_gets_a_gradient(model, alpha):
    """Data-parallel training waits for all of them."""
    named = losses_of(model, tiny_batch(3) | {"alpha": alpha})
    assert list(named) == NAMES
    assert all(loss.item() > 0 for loss in named.values())
    sum(named.values()).backward()
    check_gradients(model)


def test_every_loss_alone_has_a_gradient(model):
    for name in NAMES:
        model.zero_grad()
        losses_of(model, tiny_batch(3))[name].backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), name


def test_a_batch_of_one_has_no_negatives_and_finite_losses(model):
    batch = tiny_batch(1)
    named = losses_of(model, batch)
    sum(named.values()).backward()
    assert all_finite(model, named)
    assert named["loss_itm"] == 0  # the true pair alone would teach that everything matches
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_dropout_in_training_leaves_everything_finite():
    model = tiny_pretrain_model().train()  # as constructed: the weights of a run without initial weights
    named = losses_of(model, tiny_batch(4))
    sum(named.values()).backward()
    assert all_finite(model, named)


def test_equal_images_at_the_lowest_temperature_are_finite(model):
    """Rows whose negatives underflow: the diagonal takes all of the softmax."""
    batch = tiny_batch(4)
    batch["image"] = batch["image"][:1].expand(4, -1, -1, -1)
    with torch.no_grad():
        model.temp.fill_(1e-9)
    named = losses_of(model, batch)
    sum(named.values()).backward()
    assert model.temp.item() == pytest.approx(0.001)
    assert all_finite(model, named)


def test_temperature_is_clamped_before_use():
    batch = tiny_batch(4)
    assert losses_with(batch, temp=3.0) == losses_with(batch, temp=0.5)
    assert losses_with(batch, temp=1e-9) == losses_with(batch, temp=0.001)


@pytest.mark.parametrize("over_sequence", [False, True])
def test_no_masked_word_is_a_word_loss_of_zero(over_sequence):
    model = shake(tiny_pretrain_model(mlm_distill_over_sequence=over_sequence))
    batch = tiny_batch(3)
    batch["mlm_labels"] = torch.full_like(batch["mlm_labels"], -100)
    named = losses_of(model, batch)
    assert named["loss_mlm"].item() == 0
    sum(named.values()).backward()
    assert all_finite(model, named)
    head = model.text_encoder.cls["predictions"]
    for parameter in head.transform.parameters():  # present, so that data-parallel training does not wait
        assert parameter.grad is not None and not parameter.grad.any()


def test_no_hidden_patch_is_a_patch_loss_of_zero(model):
    batch = tiny_batch(3)
    batch["patch_mask"] = torch.zeros_like(batch["patch_mask"])
    named = losses_of(model, batch)
    assert named["loss_mim"].item() == 0
    sum(named.values()).backward()
    assert all_finite(model, named)
    assert model.mim_head.weight.grad is not None and not model.mim_head.weight.grad.any()
    assert model.visual_encoder.mask_token.grad is not None


def test_patches_of_one_image_all_hidden_and_of_another_none(model):
    batch = tiny_batch(3)
    batch["patch_mask"][0], batch["patch_mask"][1] = True, False
    named = losses_of(model, batch)
    sum(named.values()).backward()
    assert named["loss_mim"] > 0
    assert all_finite(model, named)


def test_only_hidden_patches_and_masked_words_have_targets(model):
    batch, draws = tiny_batch(3), no_draws(3)
    other = dict(batch)
    shift = torch.where(batch["patch_mask"], 0, 1)
    other["visual_codes"] = (batch["visual_codes"] + shift) % 30
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = losses_of(model, batch, draws)
    model.load_state_dict(before)
    second = losses_of(model, other, draws)
    for name in NAMES:
        assert first[name].item() == second[name].item(), name


def test_captions_of_cls_alone_are_finite(model):
    batch = tiny_batch(3)
    batch["text_ids"][:, 1:] = 0
    batch["text_mask"][:, 1:] = 0
    batch["mlm_ids"], batch["mlm_labels"] = batch["text_ids"], torch.full_like(batch["text_ids"], -100)
    named = losses_of(model, batch)
    sum(named.values()).backward()
    assert all_finite(model, named)


def test_padding_columns_change_no_loss(model):
    batch, draws = tiny_batch(3), no_draws(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    narrow = losses_of(model, batch, draws)
    model.load_state_dict(before)
    for name, value in (("text_ids", 0), ("text_mask", 0), ("mlm_ids", 0), ("mlm_labels", -100)):
        batch[name] = torch.nn.functional.pad(batch[name], (0, 4), value=value)
    wide = losses_of(model, batch, draws)
    for name in NAMES:
        torch.testing.assert_close(wide[name], narrow[name], rtol=1e-5, atol=1e-6, msg=name)


def test_queues_take_the_momentum_features_in_and_wrap_round(model):
    """12 places, batches of 5: the third one wraps."""
    for seed, pointer in ((0, 5), (1, 10), (2, 3)):
        losses_of(model, tiny_batch(5, seed))
        assert model.queue_ptr.tolist() == [pointer]
    batch = tiny_batch(5, 2)
    with torch.no_grad():
        states = model.visual_encoder_m(batch["image"])[:, 0]
        feats = torch.nn.functional.normalize(model.vision_proj_m(states), dim=-1)
    torch.testing.assert_close(model.image_queue[:, [10, 11, 0, 1, 2]].T, feats)
    losses_of(model, tiny_batch(20))  # more than the queue holds
    assert model.queue_ptr.tolist() == [(3 + 20) % 12]
    torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(12))


# ---- losses of weight 0 ----


def step_with(computed: set[str]) -> tuple[SIMLA, dict[str, torch.Tensor], int]:
    """A model after a step of these losses, their values, and the step's FLOPs."""
    torch.manual_seed(0)  # the queues start as noise
    model = shake(tiny_pretrain_model(computed=computed))
    batch = tiny_batch(4)
    torch.manual_seed(1)  # the negatives
    with FlopCounterMode(display=False) as counter:
        named = losses_of(model, batch if "mim" in computed else {**batch, "visual_codes": None})
        sum(named.values()).backward()
    return model, named, counter.get_total_flops()


@pytest.mark.parametrize("off", LOSSES)
def test_a_loss_of_weight_0_is_not_computed_and_leaves_the_others_as_they_are(off):
    _, all_five, flops = step_with(set(LOSSES))
    model, others, fewer = step_with(set(LOSSES) - {off})
    assert [f"loss_{name}" for name in LOSSES if name != off] == list(others)
    assert all(torch.equal(loss, all_five[name]) for name, loss in others.items())
    assert fewer < flops
    assert list(model.state_dict()) == list(tiny_pretrain_model().state_dict())
    check_gradients(model)


@pytest.mark.parametrize("only", LOSSES)
def test_a_loss_alone_moves_what_it_reads(only):
    _, all_five, _ = step_with(set(LOSSES))
    model, named, _ = step_with({only})
    assert list(named) == [f"loss_{only}"] and torch.equal(*named.values(), all_five[f"loss_{only}"])
    check_gradients(model)
    trained = model.trained_parameters()
    assert ("temp" in trained) == (only == "ita") == (model.queue_ptr.item() != 0)
    assert ("concept_head.weight" in trained) == (only == "psl")
    assert any("crossattention" in name for name in trained) == (only in ("itm", "mlm", "mim"))


# ---- switches and errors ----


def test_released_switches_change_their_loss_and_nothing_else():
    batch = tiny_batch(4)
    paper = losses_with(batch)
    for switch, changed in (("mlm_distill_over_sequence", "loss_mlm"), ("psl_padding", "loss_psl")):
        published = losses_with(batch, **{switch: True})
        assert [name for name in NAMES if published[name] != paper[name]] == [changed]


def test_released_switches_matter_only_where_they_should():
    """Without momentum targets there is nothing to distil; without padding none can be a keyword."""
    batch = tiny_batch(4) | {"alpha": 0.0}
    assert losses_with(batch)["loss_mlm"] == pytest.approx(
        losses_with(batch, mlm_distill_over_sequence=True)["loss_mlm"], rel=1e-6
    )
    full = tiny_batch(4)
    full["text_ids"], full["text_mask"] = full["text_ids"].clamp(min=2), torch.ones_like(full["text_mask"])
    full["text_ids"][:, 0] = TINY_CLS_ID
    assert losses_with(full) == losses_with(full, psl_padding=True)


def test_released_switches_come_from_the_config():
    for switch in ("mlm_distill_over_sequence", "psl_padding"):
        config = read_config("configs/demo/Pretrain.yaml", PRETRAIN, [f"released_code.{switch}=true"])
        with torch.device("meta"):
            model = SIMLA.from_config(config, cls_id=2)
        assert model.cls_id == 2
        assert [model.mlm_distill_over_sequence, model.psl_padding] == [
            switch == "mlm_distill_over_sequence",
            switch == "psl_padding",
        ]


@pytest.mark.parametrize(
    ("vit", "bert", "words"),
    [
        ({"embed_dim": 36}, {}, r"vision_width \(36\), hidden_size \(24\) and encoder_width \(24\)"),
        ({}, {"encoder_width": 20}, r"encoder_width \(20\)"),
        ({}, {"hidden_size": 30}, r"hidden_size \(30\)"),
        ({"img_size": 32}, {}, "17 image tokens exceed the 16 positions"),
    ],
)
def test_sizes_that_do_not_fit_are_named(vit, bert, words):
    with pytest.raises(UserError, match=words):
        tiny_pretrain_model({**TINY_VIT, **vit}, replace(TINY_BERT, **bert))


# ---- the sizes of every config ----


def configs_of(*stems: str) -> list[str]:
    paths = (path for stem in stems for path in (ROOT / "configs").glob(f"**/{stem}*.yaml"))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def read(name: str) -> dict:
    return read_config(name, PRETRAIN if Path(name).stem.startswith("Pretrain") else RETRIEVAL)


def build(config: dict) -> SIMLA | SIMLARetrieval:
    """Sizes without memory."""
    with torch.device("meta"):
        if "mlm_probability" in config:
            return SIMLA.from_config(config, cls_id=101)
        return SIMLARetrieval.from_config(config)


def names_at_depth(task: str, vit_depth: int, bert_depth: int) -> list[str]:
    """The recorded state-dict names, in order, as if their model had had these depths."""
    names = [name for name, _, _ in golden(f"{task}_structure")["state_dict"]]
    for stem, depth in ((r"\.blocks\.", vit_depth), (r"\.layer\.", bert_depth)):
        scaled, stacks = [], set()
        for name in names:
            found = re.match(rf"(.*?{stem})\d+\.", name)
            if not found:
                scaled.append(name)
            elif found[1] not in stacks:  # the first time: every block with the names of block 0
                stacks.add(found[1])
                first = [other for other in names if other.startswith(f"{found[1]}0.")]
                for block in range(depth):
                    scaled += [f"{found[1]}{block}.{other[len(found[1]) + 2 :]}" for other in first]
        names = scaled
    return names


@pytest.mark.parametrize("name", configs_of("Pretrain", "Retrieval"))
def test_every_config_builds_its_model_with_the_published_names(name):
    config = read(name)
    model = build(config)
    bert = model.text_encoder.bert if isinstance(model, SIMLA) else model.text_encoder
    task = "pretrain" if isinstance(model, SIMLA) else "retrieval"
    expected = names_at_depth(task, config["vit"]["depth"], bert.config.num_hidden_layers)
    assert list(model.state_dict()) == expected
    assert model.image_queue.shape == (config["embed_dim"], config["queue_size"])
    tokens = (config["image_res"] // config["vit"]["patch_size"]) ** 2 + 1
    assert model.visual_encoder.pos_embed.shape == (1, tokens, config["vision_width"])


def test_the_small_model_has_the_size_that_its_page_says():
    """As it is, and 384 wide as docs/flickr8k.md starts it from MiniLM's weights."""
    page = (ROOT / "docs" / "flickr8k.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^torchrun [^`]*?init=text[^`]*", page, re.M)
    wider = re.findall(r"\b(?:vision_width|vit\.\w+|bert_config\.\w+)=\d+", command)
    for overrides, millions in (([], 15), (wider, 33)):
        config = read_config(str(ROOT / "configs/small/Pretrain.yaml"), PRETRAIN, overrides)
        trained = sum(param.numel() for param in build(config).parameters() if param.requires_grad)
        assert f"{millions} M" in page and round(trained / 1e6) == millions
    assert config["vision_width"] == 384


def test_names_at_the_recorded_depth_are_the_recorded_names():
    for task in ("pretrain", "retrieval"):
        recorded = [name for name, _, _ in golden(f"{task}_structure")["state_dict"]]
        assert names_at_depth(task, 3, 12) == recorded


@pytest.fixture(scope="module")
def full_size_shapes():
    config = read_config(str(ROOT / "configs/Pretrain.yaml"), PRETRAIN)
    config["bert_config"] = str(ROOT / config["bert_config"])
    return {name: tuple(value.shape) for name, value in build(config).state_dict().items()}


def test_full_size_text_encoder_is_bert_base_with_cross_attention(full_size_shapes):
    with torch.device("meta"):
        theirs = HubBertForMaskedLM(HubConfig()).state_dict()  # the defaults are bert-base-uncased
    own = {
        name.removeprefix("text_encoder."): shape
        for name, shape in full_size_shapes.items()
        if name.startswith("text_encoder.")
    }
    shapes = {name: tuple(value.shape) for name, value in theirs.items() if "token_type" not in name}
    assert {name: own[name] for name in shapes} == shapes
    extra = {name for name in own if name not in shapes}
    cross = {name for name in extra if ".crossattention." in name}
    assert extra - cross == {"bert.embeddings.position_ids"}
    assert {name.replace("crossattention", "attention") for name in cross} == {
        name for name in shapes if ".attention." in name
    }
    assert all(own[name] == own[name.replace("crossattention", "attention")] for name in cross)


def test_full_size_image_encoder_is_vit_base_and_the_heads_have_their_sizes(full_size_shapes):
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", img_size=256, num_classes=0, global_pool="")
    shapes = {f"visual_encoder.{name}": tuple(value.shape) for name, value in theirs.state_dict().items()}
    own = {name: shape for name, shape in full_size_shapes.items() if name.startswith("visual_encoder.")}
    assert own == {**shapes, "visual_encoder.mask_token": (1, 1, 768)}
    for name, shape in {
        "vision_proj": (256, 768),
        "text_proj": (256, 768),
        "itm_head": (2, 768),
        "mim_head": (8192, 768),
        "concept_head": (30522, 256),
    }.items():
        assert full_size_shapes[f"{name}.weight"] == shape
    assert full_size_shapes["text_queue"] == (256, 65536)
