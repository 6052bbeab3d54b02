"""One step of training: what the host must not wait for, precision, clipping, compilation."""

import copy
import sys
from functools import partialmethod
from pathlib import Path
from unittest import mock

import pytest
import torch
from models_for_tests import TINY_BERT, TINY_VIT, losses_of, tiny_batch, tiny_pretrain_model
from PIL import Image
from test_vqa_model import tiny_batch as tiny_questions
from test_vqa_model import tiny_model as tiny_vqa_model
from tiny import make_tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import Pretrain
import simla
from simla.engine.data_parallel import compile_layers
from simla.engine.resume import resume
from simla.engine.step import weighted_sum
from simla.engine.training import Training
from simla.models.align import Draws
from simla.models.bert import Layer
from simla.models.pretrain import LOSSES
from simla.models.retrieval import SIMLARetrieval
from simla.models.vqa import VQABatch
from simla.utils import UserError, autocast, set_precision, true_indices

CPU = torch.device("cpu")
WAITS = {  # what makes the host wait for a device's result, or a result's shape
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::unique2",
}


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU's host would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        by_flags = name.startswith(("aten::index.", "aten::index_put")) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counts = name == "aten::repeat_interleave.Tensor" and (kwargs or {}).get("output_size") is None
        assert name not in WAITS and not by_flags and not counts, f"the host waits in {name}"
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def pretraining(tiny, out: Path, *overrides: str) -> tuple[Training, list[dict]]:
    """A pre-training run before its first step, and the batches of an epoch."""
    runs = []
    flags = ["--device", "cpu", "--config", str(tiny["Pretrain"]), "--output_dir", str(out)]
    argv = ["Pretrain.py", *flags, "--overrides", "schedular.warmup_epochs=0", *overrides]
    with mock.patch.object(Pretrain, "fit", runs.append), mock.patch.object(sys, "argv", argv):
        Pretrain.parse_and_run()
    (run,) = runs
    return run, list(run.loader)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_host_waits_for_nothing_inside_a_step(tiny, tmp_path, accumulation):
    run, batches = pretraining(tiny, tmp_path, f"grad_accumulation_steps={accumulation}", "clip_grad_norm=1")
    with NoWaiting():
        run.one_step(batches[:accumulation], 0.4)
    run.check_last_step()
    assert run.num_not_finite == 0 and run.window.means()["loss_mim"] > 0
    with pytest.raises(AssertionError, match="the host waits in aten::"), NoWaiting():
        true_indices(batches[0]["patch_mask"])  # what a batch has its indices counted for beforehand


def test_nor_in_the_steps_of_questions_and_of_retrieval():
    batch = VQABatch(**tiny_questions())
    model, retrieval = tiny_vqa_model(), SIMLARetrieval(TINY_VIT, TINY_BERT, embed_dim=8, queue_size=12)
    pairs = {name: tiny_batch(4)[name] for name in ("image", "text_ids", "text_mask")}
    with NoWaiting():
        model(batch, 0.4)["loss"].backward()
        sum(losses_of(retrieval, {**pairs, "idx": torch.arange(4), "alpha": 0.4}).values()).backward()


def test_losses_are_weighed_where_they_are_summed_and_logged_as_they_are(tiny, tmp_path):
    seen = []
    for number, weights in enumerate(([], ["loss_weights.ita=0.5", "loss_weights.psl=0"])):
        run, batches = pretraining(tiny, tmp_path / str(number), *weights)
        torch.manual_seed(0)
        run.model.eval()  # no dropout
        run.one_step(batches[:1], 0.4)
        seen.append((run.window.means(), run.model.temp.grad, run.model.concept_head.weight.grad))
    (one, temp, concepts), (other, halved, none) = seen
    assert concepts is not None and none is None
    assert other == {name: mean for name, mean in one.items() if name != "loss_psl"}
    assert torch.equal(halved, temp / 2)  # ITA alone moves it
    named = {f"loss_{name}": torch.rand(()) for name in LOSSES}
    assert torch.equal(weighted_sum(named, {"loss_weights": dict.fromkeys(LOSSES, 1)}), sum(named.values()))


def test_a_run_resumes_with_other_weights(tiny, tmp_path):
    """And without MIM no image tokenizer is made."""
    nowhere = tmp_path / "codebook.safetensors"
    run, batches = pretraining(
        tiny, tmp_path / "before", "loss_weights.mim=0", f"image_tokenizer.path={nowhere}"
    )
    run.one_step(batches[:1], 0.4)
    assert "loss_mim" not in run.window.means() and "loss_mim" not in run.chance_check.levels
    assert not nowhere.exists()
    torch.save(run.state(), tmp_path / "checkpoint.pth")
    run, batches = pretraining(tiny, tmp_path / "after", "loss_weights.psl=0")
    resume(run.model, run.optimizer, run.schedule, tmp_path / "checkpoint.pth")
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.one_step(batches[:1], 0.4)
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    assert "mim_head.weight" in moved and "concept_head.weight" not in moved


def test_a_run_in_albef_s_layout_makes_a_file_that_answers(tiny, tmp_path):
    overrides = "bert_config.text_layers_alone=1", "loss_weights.mim=0", "loss_weights.psl=0"
    run, batches = pretraining(tiny, tmp_path, *overrides)
    run.one_step(batches[:1], 0.4)
    run.check_last_step()
    assert run.num_not_finite == 0 and list(run.window.means())[:3] == ["loss_ita", "loss_itm", "loss_mlm"]
    torch.save(run.state(), tmp_path / "checkpoint.pth")
    model = simla.load(tmp_path / "checkpoint.pth", "cpu")
    assert model.config["bert_config"]["text_layers_alone"] == 1
    scores = model.match([Image.new("RGB", (32, 32))], ["a dog", "a red ball on the grass"])
    assert scores.isfinite().all() and len(scores.flatten().unique()) == 2


@pytest.mark.parametrize(("limit", "expected"), [(0.25, 0.25), (1e6, None), (0, None)])
def test_a_long_gradient_is_shortened_to_clip_grad_norm(tiny, tmp_path, limit, expected):
    sgd = ("optimizer.opt=momentum", "optimizer.lr=1.0", "optimizer.weight_decay=0")
    run, batches = pretraining(tiny, tmp_path, f"clip_grad_norm={limit}", *sgd)
    before = {name: value.clone() for name, value in run.model.named_parameters() if value.requires_grad}
    run.one_step(batches[:1], 0.4)
    moved = [value - before[name] for name, value in run.model.named_parameters() if value.requires_grad]
    norm = torch.cat([change.flatten() for change in moved]).norm().item()
    if expected:
        assert norm == pytest.approx(expected, rel=1e-4)
    else:
        assert norm > 0.5


@pytest.mark.parametrize("opt", ["adamw", "lamb"])  # skips on the device, and by the host's word
def test_a_step_that_is_not_finite_changes_no_weights(tiny, tmp_path, opt):
    run, batches = pretraining(tiny, tmp_path, f"optimizer.opt={opt}")
    run.one_step(batches[:1], 0.4)
    before = {name: value.clone() for name, value in run.model.named_parameters() if "_m." not in name}
    temp, original = run.model.temp.item(), run.take_step.losses
    run.take_step.losses = lambda *args: {name: loss * float("nan") for name, loss in original(*args).items()}
    run.one_step(batches[1:2], 0.4)
    assert all(
        torch.equal(value, before[name]) for name, value in run.model.named_parameters() if name in before
    )
    run.check_last_step()
    assert run.model.temp.item() == temp and run.num_not_finite == 1 and run.window.counts["loss_ita"] == 1
    run.take_step.losses = original
    run.one_step(batches[2:3], 0.4)
    run.check_last_step()
    assert run.num_not_finite == 0 and run.window.counts["loss_ita"] == 2


def test_bf16_is_close_to_fp32_and_keeps_twins_queues_and_scores_in_fp32():
    """Within 2% of each loss: 8 bits of mantissa are 0.4%, through some layers, and ITA divides by 0.07."""
    model, batch = tiny_pretrain_model().eval(), tiny_batch(4)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    model.copy_twins()
    model.momentum = 1.0  # both runs see the same twins
    results, before = [], copy.deepcopy(model.state_dict())
    draws = training_draws(4)
    for precision in ("fp32", "bf16"):
        model.load_state_dict(before)
        with autocast(CPU, precision):
            results.append(losses_of(model, batch, draws))
        assert model.image_queue.dtype == torch.float32
        assert model.image_queue.norm(dim=0).allclose(torch.ones(12), atol=1e-6)  # normalised in fp32
    for name, value in results[0].items():
        assert results[1][name].dtype == torch.float32
        assert results[1][name].item() == pytest.approx(value.item(), rel=0.02), name


def training_draws(batch: int) -> Draws:
    others = torch.arange(batch).roll(1)
    return Draws(image_neg=others, text_neg=others)


def test_a_text_of_nothing_but_padding_stays_finite_in_half_precision():
    model, batch = tiny_pretrain_model().eval(), tiny_batch(4)
    batch["text_mask"][1] = 0
    for precision in ("fp32", "bf16"):
        with autocast(CPU, precision):
            assert all(loss.isfinite() for loss in losses_of(model, batch).values()), precision


def test_compiled_layers_compute_the_same_at_every_length_of_text(monkeypatch):
    """On the compiler's front end, which needs no C++ compiler; recompiling at a new length would be an
    error after the first two.
    """
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    model = tiny_pretrain_model().eval()
    twin = tiny_pretrain_model().eval()
    twin.load_state_dict(model.state_dict())
    compile_layers(model)
    assert any(module._compiled_call_impl for module in model.modules() if isinstance(module, Layer))
    draws = training_draws(4)
    for number, length in enumerate([6, 5, 3, 4, 2]):
        batch = {name: value[:, :length] if name in TEXTS else value for name, value in tiny_batch(4).items()}
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            ours, theirs = losses_of(model, batch, draws), losses_of(twin, batch, draws)
        for name, loss in theirs.items():
            torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


TEXTS = ("text_ids", "text_mask", "mlm_ids", "mlm_labels")


def test_precision_that_a_gpu_lacks_is_refused_before_anything_starts():
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(7, 0)),
        mock.patch("torch.cuda.get_device_name", return_value="Tesla V100"),
        pytest.raises(UserError, match=r"precision bf16: Tesla V100 does not have it.*use precision: fp16"),
    ):
        set_precision(torch.device("cuda"), "bf16")


def test_tf32_is_used_only_where_asked_for():
    for precision in ("tf32", "fp32"):
        set_precision(CPU, precision)
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
