import copy
import json

import numpy as np
import pytest
import torch
from goldens_io import FOLDER, filled_state, golden
from hypothesis import given
from hypothesis import strategies as st
from tiny import full_disk
from torch import nn

from simla.checkpoint.key_maps import MIM, MLM
from simla.checkpoint.load import check_same_build, interpolate_pos_embed, load_weights, map_state
from simla.checkpoint.save import Saver, load_checkpoint
from simla.checkpoint.tasks import TASKS
from simla.engine.resume import resume
from simla.optim import create_optimizer
from simla.scheduler import create_scheduler
from simla.utils import UserError, atomic_write

LOADINGS = sorted(path.stem for path in FOLDER.glob("loading_*_from_*.json"))
REFUSED = ("loading_NLVR_from_pretrain", "loading_NLVR_from_pretrain_same_res")
STRUCTURE = {
    "retrieval": "retrieval",
    "ve": "ve",
    "vqa": "vqa",
    "nlvr": "nlvr",
    "pretrain_nlvr": "pretrain_nlvr",
}
STRUCTURE["pretrain"] = "pretrain"


def checkpoint_state(kind):
    structure = golden(f"{kind}_structure")
    state = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype))
        for name, shape, dtype in structure["state_dict"]
    }
    return state | filled_state(structure, "simla-a-ckpt")


def shapes_of(kind, image_res=64):
    shapes = {name: tuple(shape) for name, shape, _ in golden(f"{kind}_structure")["state_dict"]}
    for name in shapes:
        if name.endswith("pos_embed"):
            shapes[name] = (1, 1 + (image_res // 16) ** 2, shapes[name][2])
    return shapes


class Stand(nn.Module):
    """A module with the given state-dict names and shapes; the names in `buffers` are buffers."""

    def __init__(self, shapes, buffers=()):
        super().__init__()
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            if leaf in buffers:
                owner.register_buffer(leaf, torch.zeros(shape))
            else:
                owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))


# ---- which entry of the file goes where ----


@pytest.mark.parametrize("name", [name for name in LOADINGS if name not in REFUSED])
def test_every_recorded_loading(name):
    recorded = golden(name)
    task = recorded["script"].removesuffix(".py")
    state = checkpoint_state(recorded["checkpoint"])
    shapes = shapes_of(recorded["model_task"], recorded["model_image_res"])
    if task == "zero_shot_retrieval":
        del shapes["idx_queue"]
    tensors, report = map_state(state, shapes, task)

    sources = {key: source.removeprefix("interpolated from ") for key, source in recorded["loaded"].items()}
    assert report.loaded == sources
    assert report.interpolated == [
        key for key, source in recorded["loaded"].items() if "interpolated" in source
    ]
    assert report.fresh == recorded["missing_keys"]
    if task == "Pretrain_NLVR":  # the recorded script renamed and doubled the layers of the unused twin, too
        twin = "text_encoder_m."
        assert {n for n in report.unused if twin not in n} == {
            n for n in recorded["unexpected_keys"] if twin not in n
        }
    elif task != "zero_shot_retrieval":  # the recorded script removed the rest itself
        assert sorted(report.unused) == sorted(recorded["unexpected_keys"])
    for key, source in sources.items():
        if key in report.interpolated:
            values = tensors[key].double()
            assert list(values.shape) == recorded[key]["shape"]
            assert values.sum().item() == pytest.approx(recorded[key]["sum"], abs=1e-5)
            assert values.norm().item() == pytest.approx(recorded[key]["norm"], rel=1e-6)
            assert values.flatten()[:8].tolist() == pytest.approx(recorded[key]["first"], abs=1e-7)
        else:
            assert tensors[key] is state[source]  # no copies


def test_nlvr_does_not_start_from_a_pretraining_checkpoint():
    with pytest.raises(
        UserError, match=r"is a pretrain checkpoint; NLVR starts from a pretrain_nlvr or nlvr"
    ):
        map_state(checkpoint_state("pretrain"), shapes_of("nlvr"), "NLVR")


@pytest.mark.parametrize(
    ("task", "kind"),
    [(t, kind) for t in TASKS for kind in TASKS[t].starts_from if not kind.startswith("pretrain")],
)
def test_finetuned_checkpoints_load_into_their_own_task(task, kind):
    shapes = shapes_of(kind)
    _, report = map_state(checkpoint_state(kind), shapes, task)
    assert report.loaded == {name: name for name in shapes} and not report.fresh


def test_zero_shot_takes_a_finetuned_checkpoint_and_needs_no_momentum():
    shapes = {
        name: shape
        for name, shape in shapes_of("retrieval").items()
        if "_m." not in name and "queue" not in name
    }
    for kind in ("retrieval", "pretrain"):
        _, report = map_state(checkpoint_state(kind), shapes, "zero_shot_retrieval")
        assert set(report.loaded) == set(shapes)
    assert "unused: " in str(report)


def without_lower_crossattention(entries: dict) -> dict:
    """As in github.com/salesforce/ALBEF (models/xbert.py, `fusion_layer` 6 of configs/config_bert.json)."""
    lower = {f".layer.{i}.crossattention" for i in range(6)}
    return {name: value for name, value in entries.items() if not any(part in name for part in lower)}


def albef_state(kind: str) -> dict:
    """Invented weights under ALBEF's names (models/model_pretrain.py, model_retrieval.py there): with token
    types, without what SIMLA added.
    """
    state = without_lower_crossattention(checkpoint_state(kind))
    state = {name: value for name, value in state.items() if not name.startswith(MIM)}
    positions = [name for name in state if name.endswith("position_embeddings.weight")]
    for name in positions:
        types = torch.arange(2.0)[:, None] + torch.ones(2, state[name].shape[1])  # ones and twos
        state[name.replace("position_embeddings", "token_type_embeddings")] = types
    assert len(positions) == 2
    return state


@pytest.mark.parametrize(
    ("task", "kind", "fresh"),
    [
        ("Retrieval", "pretrain", {"idx_queue"}),
        ("Retrieval", "retrieval", set()),
        ("Pretrain", "pretrain", set(MIM)),
    ],
)
def test_albef_s_checkpoints_load_into_its_layout(task, kind, fresh):
    state, model = albef_state(kind), "pretrain" if task == "Pretrain" else "retrieval"
    tensors, report = map_state(state, without_lower_crossattention(shapes_of(model)), task)
    assert all(name.startswith(tuple(fresh)) for name in report.fresh) and bool(report.fresh) == bool(fresh)
    assert all(name.startswith(MLM) for name in report.unused)
    (name,) = (name for name in tensors if name.startswith("text_encoder.") and "position_emb" in name)
    assert torch.equal(tensors[name], state[report.loaded[name]] + 1)  # every token is of type 0
    with pytest.raises(UserError, match=r"first 6 layers .*, the model's first 0; set .*_alone=6 "):
        map_state(state, shapes_of(model), task)
    with pytest.raises(UserError, match=r"first 0 layers .*, the model's first 6; set .*_alone=0 "):
        map_state(checkpoint_state(kind), without_lower_crossattention(shapes_of(model)), task)


def test_what_does_not_fit_is_listed_with_the_file_and_a_remedy():
    state, shapes = checkpoint_state("pretrain"), shapes_of("retrieval")
    state["surprise.weight"] = torch.zeros(1)
    del state["vision_proj.weight"]
    shapes["itm_head.bias"] = (3,)
    with pytest.raises(UserError) as error:
        map_state(state, shapes, "Retrieval", "x.pth")
    message = str(error.value)
    assert message.startswith(
        "x.pth, a pretrain checkpoint, does not fit the model; missing: vision_proj.weight; "
    )
    assert (
        "itm_head.bias ((2,) in the file, (3,) in the model); not in the model: surprise.weight. Use"
        in message
    )

    for name in [name for name in shapes if name.startswith("visual_encoder.blocks")]:
        del state[name]
    with pytest.raises(UserError, match=r"missing: vis[^;]*, \.\.\. \(37 in all\);"):
        map_state(state, shapes, "Retrieval")


def test_constants_that_some_versions_store_may_be_absent_or_left_over():
    state, shapes = checkpoint_state("pretrain"), shapes_of("pretrain")
    constants = [name for name in shapes if name.endswith("position_ids")]
    assert len(constants) == 2
    _, report = map_state(
        {name: value for name, value in state.items() if name not in constants}, shapes, "Pretrain"
    )
    assert report.fresh == constants
    for name in constants:
        del shapes[name]
    _, report = map_state(state, shapes, "Pretrain")
    assert report.unused == constants


def test_foreign_files_are_refused():
    with pytest.raises(UserError, match=r"not a SIMLA checkpoint: it holds conv1\.weight"):
        map_state({"conv1.weight": torch.zeros(1)}, {}, "Retrieval")


# ---- position embeddings ----


@pytest.mark.parametrize(
    "case", golden("pos_embed_interpolation")["cases"], ids=lambda c: f"{c['from_res']}-{c['to_res']}"
)
def test_recorded_interpolations(case):
    values = np.random.RandomState(case["seed"]).standard_normal(case["shape_in"]).astype("float32")
    pos_embed = torch.from_numpy(values)
    out = interpolate_pos_embed(pos_embed, case["out"]["shape"][1] - 1)
    assert list(out.shape) == case["out"]["shape"]
    assert out.flatten()[::211][:64].tolist() == pytest.approx(case["every_211th"], abs=2e-6)
    assert out.flatten()[:8].tolist() == pytest.approx(case["out"]["first"], abs=2e-6)
    assert out.double().norm().item() == pytest.approx(case["out"]["norm"], rel=1e-6)


@given(st.integers(1, 6), st.integers(1, 6))
def test_interpolation_keeps_cls_constants_and_the_same_grid(side, other):
    pos_embed = torch.randn(1, 1 + side * side, 5)
    out = interpolate_pos_embed(pos_embed, other * other)
    assert out.shape == (1, 1 + other * other, 5) and torch.equal(out[:, 0], pos_embed[:, 0])
    same = interpolate_pos_embed(pos_embed, side * side)
    assert torch.allclose(same, pos_embed, atol=1e-6)
    constant = interpolate_pos_embed(torch.ones_like(pos_embed), other * other)
    assert torch.allclose(constant, torch.ones(1), atol=1e-5)


def test_interpolation_needs_squares():
    for num_tokens, grid in ((6, 4), (5, 6)):
        with pytest.raises(UserError, match="no square"):
            interpolate_pos_embed(torch.zeros(1, num_tokens, 2), grid)


# ---- files ----

SMALL = {
    "visual_encoder.pos_embed": (1, 5, 4),
    "concept_head.weight": (3, 4),
    "concept_head.bias": (3,),
    "temp": (),
}


def random_state(shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def renamed(front: str, **inside: str):
    """Puts `front` before every name, and into the names what replaces the keys of `inside`."""

    def rename(state: dict) -> dict:
        for old, new in inside.items():
            state = {name.replace(old, new): value for name, value in state.items()}
        return {front + name: value for name, value in state.items()}

    return rename


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "epoch": 3},
        lambda s: s,
        renamed("module."),
        lambda s: {"state_dict": s},
        lambda s: {"model_state_dict": renamed("module.")(s)},
        renamed("model."),
        renamed("_orig_mod."),
        lambda s: {"state_dict": renamed("model._orig_mod.")(s), "hyper_parameters": {"lr": 1e-4}},
        renamed("module._orig_mod.module."),
        renamed("_orig_mod.net.simla.", visual_encoder="visual_encoder._orig_mod"),
        renamed("_forward_module.model.module."),
        lambda s: {"state_dict": {"module": s}},
        lambda s: {"model": {"state_dict": renamed("module.")(s)}, "metadata": "of another program"},
        lambda s: {"model": s, "metadata": None, "config": {"vit": "base", "bert_config": None}},
    ],
)
def test_load_weights_copies_in_place(tmp_path, wrap):
    state = random_state(SMALL)
    torch.save(wrap(state), tmp_path / "c.pth")
    model = Stand(SMALL | {"visual_encoder.pos_embed": (1, 10, 4)})
    memory = {name: value.data_ptr() for name, value in model.state_dict().items()}
    report = load_weights(model, tmp_path / "c.pth", "Pretrain")
    assert (
        str(report)
        == f"4 tensors from {tmp_path}/c.pth (pretrain checkpoint); interpolated: visual_encoder.pos_embed"
    )
    own = model.state_dict()
    assert memory == {name: value.data_ptr() for name, value in own.items()}
    assert (
        torch.equal(own["concept_head.weight"], state["concept_head.weight"]) and own["temp"] == state["temp"]
    )
    assert torch.equal(
        own["visual_encoder.pos_embed"], interpolate_pos_embed(state["visual_encoder.pos_embed"], 9)
    )


def test_a_file_of_several_models_is_refused(tmp_path):
    state = random_state(SMALL)
    torch.save(renamed("model.")(state) | renamed("ema_model.")(state), tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"several models: ema_model\.visual_encoder, model\.visual_encoder"):
        load_weights(Stand(SMALL), tmp_path / "c.pth", "Pretrain")
    torch.save({**state, "module.temp": state["temp"]}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth holds temp more than once"):
        load_weights(Stand(SMALL), tmp_path / "c.pth", "Pretrain")
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"found a whole module; save its state_dict\(\)"):
        load_weights(Stand(SMALL), tmp_path / "c.pth", "Pretrain")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.to(torch.int8), r"temp is of torch\.int8, in the model of torch\.float32"),
        (lambda value: value > 0, r"of torch\.bool, in the model of torch\.float32: perhaps quantised"),
        (lambda value: value.to(torch.complex64), r"of torch\.complex64, in the model"),
        (lambda value: value.double() * 0 + 1e300, "1 of the 1 values of temp are NaN or infinite"),
    ],
)
def test_numbers_that_are_no_weights_of_the_model_are_refused(tmp_path, change, said):
    state = random_state(SMALL)
    torch.save({**state, "temp": change(state["temp"])}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=said):
        load_weights(Stand(SMALL), tmp_path / "c.pth", "Pretrain")


@pytest.mark.parametrize("vit", ["base", None])
@pytest.mark.parametrize("bert", [None, 5, []])
def test_what_another_program_calls_config_is_taken_as_unsaid(vit, bert):
    ours = {"vit": {}, "bert_config": {}}
    check_same_build(ours, {"vit": vit, "bert_config": bert}, "c.pth")
    with pytest.raises(UserError, match=r"vit\.num_heads 3, not 12"):
        check_same_build({**ours, "vit": {"num_heads": 3}}, {"vit": vit, "bert_config": bert}, "c.pth")


def test_a_failed_load_leaves_the_model_unchanged(tmp_path):
    torch.save(random_state(SMALL), tmp_path / "c.pth")
    model = Stand(SMALL | {"temp": (2,)})
    with pytest.raises(UserError, match=r"c\.pth.*temp"):
        load_weights(model, tmp_path / "c.pth", "Pretrain")
    assert not any(value.any() for value in model.state_dict().values())
    for content in ({"model": {"a": "text"}}, [1, 2], {1: torch.ones(1)}, {"model": {b"a": torch.ones(1)}}):
        torch.save(content, tmp_path / "d.pth")
        with pytest.raises(UserError, match="holds no weights"):
            load_weights(model, tmp_path / "d.pth", "Pretrain")


def test_a_checkpoint_comes_back_as_plain_values(tmp_path):
    class Lr(float):
        pass

    state = {
        "model": {"a": torch.ones(2)},
        "config": {"lr": Lr(0.1), "n": np.int64(3), "x": (1, [None, "b"])},
        "epoch": 2,
    }
    with Saver(tmp_path, keep_last=1, keep_epochs=True) as saver:
        saver.save("checkpoint_02.pth", state)
    loaded = load_checkpoint(tmp_path / "checkpoint_02.pth")
    assert loaded["config"] == state["config"] and type(loaded["config"]["lr"]) is float
    assert torch.equal(loaded["model"]["a"], torch.ones(2))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pth")


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "c.pth"
    path.write_bytes(b"earlier")
    problem = r"c\.pth could not be written \(.*File too large.*unchanged"
    with full_disk(200_000), pytest.raises(UserError, match=problem), atomic_write(path) as file:
        torch.save({"epoch": 2, "model": torch.zeros(1_000_000)}, file)
    assert [file.name for file in tmp_path.iterdir()] == ["c.pth"] and path.read_bytes() == b"earlier"
    with (
        pytest.raises(UserError, match="could not be written"),
        atomic_write(tmp_path / "no_folder" / "c.pth"),
    ):
        pass


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.pth"
    path.write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["c.pth"] and path.read_bytes() == b"earlier"


# ---- resuming ----

SCHEDULE = {"epochs": 5, "min_lr": 1e-4, "warmup_lr": 1e-3, "warmup_epochs": 2, "warmup_step_size": 1}


def training(seed, epoch_step="start", width=4, epochs=5, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999)):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 6), nn.LayerNorm(6), nn.Linear(6, 1))
    settings = {"opt": "adamW", "lr": lr, "weight_decay": weight_decay, "betas": betas}
    optimizer = create_optimizer(model, settings)
    return model, optimizer, create_scheduler(optimizer, SCHEDULE | {"epochs": epochs}, epoch_step)


def train(model, optimizer, scheduler, epochs, first_step=0, last_step=4):
    """Returns the rate of every step."""
    rates = []
    for epoch in epochs:
        scheduler.start_epoch(epoch)
        generator = torch.Generator().manual_seed(epoch)
        for i in range(first_step, last_step):
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=generator)).square().mean().backward()
            rates.append(optimizer.param_groups[1]["lr"])
            optimizer.step()
            scheduler.after_step(epoch, i)
        if last_step == 4:
            scheduler.end_epoch(epoch)
    return rates


def saved(model, optimizer, scheduler, epoch):
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler}
    return {key: part.state_dict() for key, part in parts.items()} | {"epoch": epoch, "config": {}}


def as_torch_1_9(checkpoint):
    """As the published runs saved it: steps are ints, and the dicts lack the keys of later versions."""
    checkpoint = copy.deepcopy(checkpoint)
    for state in checkpoint["optimizer"]["state"].values():
        state["step"] = int(state["step"])
    known = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad", "initial_lr")
    groups = checkpoint["optimizer"]["param_groups"]
    checkpoint["optimizer"]["param_groups"] = [{k: v for k, v in g.items() if k in known} for g in groups]
    for key in ("k_decay", "noise_type", "metric"):
        checkpoint["lr_scheduler"].pop(key)
    checkpoint["lr_scheduler"]["t_mul"] = 1.0
    return checkpoint


@pytest.mark.parametrize("epoch_step", ["start", "end"])
@pytest.mark.parametrize("convert", [lambda checkpoint: checkpoint, as_torch_1_9])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, epoch_step, convert):
    whole = training(1, epoch_step)
    train(*whole, range(2))
    torch.save(convert(saved(*whole, epoch=1)), tmp_path / "c.pth")
    train(*whole, range(2, 5))

    again = training(2, epoch_step)
    assert resume(*again, tmp_path / "c.pth")["epoch"] == 1
    train(*again, range(2, 5))
    for one, other in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert json.dumps(whole[2].state_dict()) == json.dumps(again[2].state_dict())
    assert all(torch.is_tensor(state["step"]) for state in again[1].state.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_does_not_go_on_from_what_is_not_finite(tmp_path, value):
    run = training(1)
    train(*run, range(1))
    good = saved(*run, epoch=0)
    for part, name, tensor in (
        ("model", r"2\.weight", good["model"]["2.weight"]),
        ("optimizer", r"optimizer\.state\.3\.exp_avg_sq", good["optimizer"]["state"][3]["exp_avg_sq"]),
    ):
        bad = copy.deepcopy(good)
        (bad["model"]["2.weight"] if part == "model" else bad[part]["state"][3]["exp_avg_sq"]).view(-1)[0] = (
            value
        )
        torch.save(bad, tmp_path / "c.pth")
        said = rf"c\.pth: 1 of the {tensor.numel()} values of {name} are NaN or infinite"
        with pytest.raises(UserError, match=said):
            resume(*training(2), tmp_path / "c.pth")


@pytest.mark.parametrize("epoch_step", ["start", "end"])
@pytest.mark.parametrize(("before", "done", "epochs"), [(2, 2, 5), (5, 2, 3), (4, 2, 8), (5, 1, 5)])
def test_every_rate_is_that_of_the_resumed_run_s_own_config(tmp_path, epoch_step, before, done, epochs):
    """At its end, shortened, extended half-way, unchanged; the file's optimiser gives its moments alone."""
    fresh = train(*training(1, epoch_step, epochs=epochs), range(epochs))
    old = training(1, epoch_step, epochs=before, weight_decay=0.3, betas=(0.8, 0.9))
    train(*old, range(done))
    torch.save(saved(*old, epoch=done - 1), tmp_path / "c.pth")
    again = training(2, epoch_step, epochs=epochs)
    resume(*again, tmp_path / "c.pth")
    for ours, theirs in zip(again[0].parameters(), old[0].parameters(), strict=True):
        assert torch.equal(again[1].state[ours]["exp_avg"], old[1].state[theirs]["exp_avg"])
    rates = train(*again, range(done, epochs))
    assert rates == fresh[4 * done :]
    assert epochs == 3 or min(rates) > 1.5 * SCHEDULE["min_lr"]
    assert [(g["weight_decay"], g["betas"]) for g in again[1].param_groups] == [
        (0.0, (0.9, 0.999)),
        (0.1, (0.9, 0.999)),
    ]


@pytest.mark.parametrize("steps", range(1, 5))
def test_a_resume_inside_the_warm_up_has_its_rates(tmp_path, steps):
    """And those of another peak where the config has another."""
    whole = training(1)
    rates = train(*whole, range(1))
    assert len(set(rates)) == 3  # the warm-up's two rises
    old = training(1, lr=5e-2, epochs=9)
    train(*old, range(1), last_step=steps)
    torch.save(saved(*old, epoch=-1) | {"step": steps}, tmp_path / "c.pth")
    again = training(2)
    resume(*again, tmp_path / "c.pth")
    assert train(*again, range(1), first_step=steps) == rates[steps:]


def test_what_cannot_be_resumed_is_refused_before_anything_changes(tmp_path):
    run = training(1)
    train(*run, range(1))
    good = saved(*run, epoch=0)

    def refused(checkpoint, match, width=4):
        torch.save(checkpoint, tmp_path / "c.pth")
        other = training(2, width=width)
        before = [param.clone() for param in other[0].parameters()]
        with pytest.raises(UserError, match=match):
            resume(*other, tmp_path / "c.pth")
        assert all(map(torch.equal, before, other[0].parameters())) and not other[1].state

    refused(good, r"of another shape: 0\.weight \(\(6, 4\) in the file, \(6, 5\)", width=5)
    refused({"model": good["model"]}, "no optimizer and no epoch; .* without --resume")
    one_group = good["optimizer"] | {"param_groups": good["optimizer"]["param_groups"][:1]}
    refused(
        good | {"optimizer": one_group}, r"optimiser belongs to another model .* have \[4\] .* here \[4, 2\]"
    )
    swapped = good["optimizer"] | {"state": {i: good["optimizer"]["state"][5 - i] for i in range(6)}}
    refused(good | {"optimizer": swapped}, "or their shapes differ")
