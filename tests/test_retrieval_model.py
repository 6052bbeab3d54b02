"""Retrieval fine-tuning: positives and negatives by image identity, on tiny models and real runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import TINY_BERT, TINY_VIT, check_gradients, losses_of, shake, tiny_batch
from ruamel.yaml import YAML
from tiny import make_tiny, run

import Retrieval
from simla.checkpoint import save as saving
from simla.checkpoint.initial import starting_weights
from simla.configs.reader import read_config
from simla.configs.schema import RETRIEVAL
from simla.engine.training import Training
from simla.models import losses
from simla.models.align import Draws
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError

IDS = torch.tensor([4, 7, 4, 4])


@pytest.fixture
def model():
    return shake(SIMLARetrieval({**TINY_VIT, "mask_token": True}, TINY_BERT, embed_dim=8, queue_size=12))


def batch_of(seed: int = 0) -> dict:
    batch = tiny_batch(4, seed)
    return {name: batch[name] for name in ("image", "text_ids", "text_mask", "alpha")} | {"idx": IDS}


def test_every_trainable_parameter_gets_a_gradient(model):
    named = losses_of(model, batch_of())
    assert list(named) == ["loss_ita", "loss_itm"]
    sum(named.values()).backward()
    check_gradients(model)


def test_identities_fill_their_queue_in_step_with_the_features(model):
    for step in range(4):  # 4 steps of 4 in a queue of 12: the last overwrites the first
        losses_of(model, batch_of(step) | {"idx": IDS + 10 * step})
    expected = torch.cat([IDS + 30, IDS + 10, IDS + 20])
    assert model.idx_queue[0].tolist() == expected.tolist() and model.queue_ptr.item() == 4


def test_other_captions_of_the_image_are_positives_once_queued(model):
    """The same batch twice: the second time every row has positives in the queue, unless that is frozen."""
    batch = batch_of() | {"alpha": 0.0}
    losses_of(model, batch)
    written = model.idx_queue.clone()
    after = {}
    for name, queue in (("written", written), ("frozen", torch.full_like(written, -100))):
        again = shake(SIMLARetrieval(TINY_VIT, TINY_BERT, embed_dim=8, queue_size=12))
        again.load_state_dict({**model.state_dict(), "idx_queue": queue}, strict=False)
        after[name] = losses_of(again, batch, Draws(torch.tensor([1, 0, 1, 1]), torch.tensor([1, 0, 1, 1])))
    assert after["written"]["loss_ita"] != after["frozen"]["loss_ita"]
    assert after["written"]["loss_itm"] == after["frozen"]["loss_itm"]


def test_negatives_are_never_of_the_same_image(model, monkeypatch):
    seen = []
    original = losses.draw_negatives
    monkeypatch.setattr(losses, "draw_negatives", lambda w: seen.append(original(w)) or seen[-1])
    for seed in range(20):
        losses_of(model, batch_of(seed))
    for drawn in seen:
        assert (IDS[drawn] != IDS).all()


def test_a_batch_of_one_image_alone_leaves_matching_out(model):
    """Its matches, too: without a mismatch they teach nothing but to say yes. Every parameter has a gradient,
    for data-parallel training.
    """
    named = losses_of(model, batch_of() | {"idx": torch.full((4,), 3)})
    assert named["loss_itm"] == 0 and named["loss_ita"].isfinite()
    sum(named.values()).backward()
    head = [*model.itm_head.parameters(), model.text_encoder.encoder.layer[0].crossattention.self.key.weight]
    assert all(param.grad is not None and not param.grad.any() for param in head)
    assert model.vision_proj.weight.grad.any()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(-1, 3), max_size=8))
def test_positives_are_shared_evenly(own, queued):
    result = losses.identity_positives(torch.tensor(own), torch.tensor([queued], dtype=torch.long))
    for row, mine in enumerate(own):
        same = [int(other == mine) for other in own + queued]
        assert result[row].tolist() == pytest.approx([value / sum(same) for value in same])


# ---- the script ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    paths = make_tiny(folder)
    config = YAML(typ="safe").load(paths["Retrieval"])
    config |= {
        "train_file": str(paths["data"] / "retrieval_train.json"),
        "val_file": str(paths["data"] / "retrieval_val.json"),
        "batch_size_train": 4,
        "optimizer": {"lr": 1e-3},
        "schedular": {"lr": 1e-3, "epochs": 2, "warmup_epochs": 2, "warmup_step_size": 1},
    }
    with paths["Retrieval"].open("w") as file:
        YAML(typ="safe", pure=True).dump(config, file)
    return paths


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    flags = ["--config", tiny["Retrieval"], "--output_dir", out, "--overrides", "save_scores=true"]
    done = run("Retrieval.py", *flags, num_processes=2)
    assert done.returncode == 0, done.stderr
    return out


def records_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def test_the_best_checkpoint_is_chosen_on_validation(trained):
    records = records_of(trained)
    assert [record["epoch"] for record in records] == [0, 1]
    best = max(records, key=lambda record: record["val_r_mean"])
    checkpoint = torch.load(trained / "checkpoint_best.pth", weights_only=True)
    assert checkpoint["epoch"] == best["epoch"] and checkpoint["best"]["val_r_mean"] == best["val_r_mean"]
    assert torch.load(trained / "checkpoint_01.pth", weights_only=True)["epoch"] == 1
    assert [path.name for path in (trained / "result").iterdir()] == [
        "retrieval.json"
    ]  # no score matrices, of whatever epoch
    result = json.loads((trained / "result" / "retrieval.json").read_text())
    assert result["r_mean"] == best["test_r_mean"] and "checkpoint_best" in result["weights"]
    for name in ("loss_ita", "loss_itm", "lr", "bad_images"):
        assert all(isinstance(record[f"train_{name}"], int | float) for record in records)


def test_evaluation_repeats_the_training_run_s_scores_on_any_number_of_ranks(trained, tiny, tmp_path):
    best = max(records_of(trained), key=lambda record: record["val_r_mean"])
    flags = ["--evaluate", "--config", tiny["Retrieval"], "--checkpoint", trained / "checkpoint_best.pth"]
    for processes in (0, 3):
        out = tmp_path / str(processes)
        more = ["--output_dir", out, "--overrides", "save_scores=true"]
        done = run("Retrieval.py", *flags, *more, num_processes=processes)
        assert done.returncode == 0, done.stderr
        assert (out / "result" / "retrieval_scores.pt").is_file()
        assert records_of(out) == [{k: v for k, v in best.items() if k.startswith("test_")}]


def called(monkeypatch, tiny, out, *flags) -> dict[str, float]:
    command = ["Retrieval.py", "--device", "cpu", "--config", tiny["Retrieval"], "--output_dir", out, *flags]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    return Retrieval.parse_and_run()


def test_resume_goes_on_as_if_nothing_had_happened(monkeypatch, tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    called(monkeypatch, tiny, whole)

    def finish_and_stop(training, *args, original=Training.finish_epoch):
        original(training, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "finish_epoch", finish_and_stop)
        with pytest.raises(KeyboardInterrupt):
            called(patched, tiny, parts)
    called(monkeypatch, tiny, parts, "--resume", "--checkpoint", parts / "checkpoint_00.pth")
    assert records_of(whole) == records_of(parts)
    first, second = (torch.load(p / "checkpoint_01.pth", weights_only=True) for p in (whole, parts))
    assert first["best"] == second["best"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def test_a_resumed_run_keeps_its_best_epoch_until_a_better_one_comes(monkeypatch, tiny, tmp_path):
    """As good as an unbroken run: the report is of the best epoch, which was before the resume."""
    called(monkeypatch, tiny, tmp_path, "--overrides", "schedular.epochs=1")
    path = tmp_path / "checkpoint_00.pth"
    state = torch.load(path, weights_only=True)
    state["best"] = {**state["best"], "val_r_mean": 1000.0, "test_r_mean": 77.0}
    torch.save(state, path)
    best = (tmp_path / "checkpoint_best.pth").read_bytes()
    for _ in range(2):  # the second time the run is complete already
        called(monkeypatch, tiny, tmp_path, "--resume")
        result = json.loads((tmp_path / "result" / "retrieval.json").read_text())
        assert result["r_mean"] == 77.0 and result["weights"].endswith(
            "checkpoint_best.pth, best by val_r_mean"
        )
        assert torch.load(tmp_path / "checkpoint_01.pth", weights_only=True)["epoch"] == 1
        assert (tmp_path / "checkpoint_best.pth").read_bytes() == best
    assert [record["epoch"] for record in records_of(tmp_path)] == [0, 1]


def test_a_best_epoch_of_another_protocol_is_scored_anew(monkeypatch, tiny, tmp_path):
    out, alone, best = tmp_path / "run", tmp_path / "alone", tmp_path / "run" / "checkpoint_best.pth"
    test_file = Path(read_config(str(tiny["Retrieval"]), RETRIEVAL)["test_file"])
    fewer = test_file.with_name("fewer.json")
    fewer.write_text(json.dumps(json.loads(test_file.read_text(encoding="utf-8"))[:4]))
    called(monkeypatch, tiny, out, "--overrides", "schedular.epochs=1")
    for number, epochs in enumerate((1, 2, 2)):  # at its end, going on, and after that
        how = ["score=itc", f"test_file={fewer}"]
        called(monkeypatch, tiny, out, "--resume", "--overrides", f"schedular.epochs={epochs}", *how)
        result = json.loads((out / "result" / "retrieval.json").read_text())
        flags = ["--evaluate", "--checkpoint", best, "--overrides", *how]
        recall = called(monkeypatch, tiny, alone / str(number), *flags)
        assert {name: result[name] for name in recall} == pytest.approx(recall)
        assert (result["score"], result["n"]) == ("itc", 4)
    assert torch.load(out / "checkpoint_01.pth", weights_only=True)["epoch"] == 1


def test_the_best_checkpoint_is_on_the_disk_before_the_last_says_so(monkeypatch, tiny, tmp_path):
    seen = []

    def same_file(source, path, original=saving._same_file):
        original(source, path)
        seen.append((path.name, (tmp_path / "checkpoint_00.pth").exists()))

    monkeypatch.setattr(saving, "_same_file", same_file)
    called(monkeypatch, tiny, tmp_path, "--overrides", "schedular.epochs=1")
    assert seen == [("checkpoint_best.pth", False)]
    best, last = (
        torch.load(tmp_path / f"checkpoint_{name}.pth", weights_only=True) for name in ("best", "00")
    )
    assert best["best"] == last["best"] and best["epoch"] == 0


def test_identities_of_another_data_set_are_forgotten_at_the_start(monkeypatch, tiny, trained, tmp_path):
    assert (torch.load(trained / "checkpoint_01.pth", weights_only=True)["model"]["idx_queue"] >= 0).any()
    config = read_config(str(tiny["Retrieval"]), RETRIEVAL)
    model = SIMLARetrieval.from_config(config)
    starting_weights(model, config, "Grounding", str(trained / "checkpoint_01.pth"))
    assert (model.idx_queue == -100).all()


def test_evaluate_and_resume_together_are_refused(monkeypatch, tiny, trained, tmp_path):
    flags = ("--evaluate", "--resume", "--checkpoint", trained / "checkpoint_01.pth")
    with pytest.raises(UserError, match="leave one out"):
        called(monkeypatch, tiny, tmp_path, *flags)


def test_fields_that_only_some_entries_have_do_no_harm(monkeypatch, tiny, tmp_path):
    entries = json.loads((tiny["data"] / "retrieval_test.json").read_text())
    entries = [{**entry, "image": str(tiny["data"] / entry["image"])} for entry in entries]
    entries[1] |= {"bad": 1, "split": "test", "sentids": 2**70}
    (tmp_path / "test.json").write_text(json.dumps(entries))
    called(monkeypatch, tiny, tmp_path, "--evaluate", "--overrides", f"test_file={tmp_path}/test.json")
    assert "test_r_mean" in records_of(tmp_path)[0] and (tmp_path / "config.yaml").is_file()


def test_a_frozen_image_encoder_stays_as_it_was(monkeypatch, tiny, trained, tmp_path):
    start = trained / "checkpoint_01.pth"
    flags = ["--checkpoint", start, "--freeze_visual_encoder"]
    called(monkeypatch, tiny, tmp_path, *flags, "--overrides", "schedular.epochs=1")
    before, after = (
        torch.load(path, weights_only=True)["model"] for path in (start, tmp_path / "checkpoint_00.pth")
    )
    for name, value in before.items():
        if name.startswith("visual_encoder."):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["itm_head.weight"], after["itm_head.weight"])


def test_batches_of_one_image_are_counted(monkeypatch, tiny, trained, tmp_path):
    """An epoch has nothing else: its two batches; a run that has none does not say so."""
    entry = json.loads((tiny["data"] / "retrieval_train.json").read_text())[0]
    entries = [{**entry, "image": str(tiny["data"] / entry["image"])}] * 8
    (tmp_path / "one.json").write_text(json.dumps(entries))
    changes = f"train_file={tmp_path / 'one.json'}", "schedular.epochs=1", "grad_accumulation_steps=2"
    called(monkeypatch, tiny, tmp_path, "--overrides", *changes)
    (record,) = records_of(tmp_path)
    assert record["train_num_batches_of_one_image"] == 2 and record["train_loss_itm"] == 0
    assert not any("one_image" in name for record in records_of(trained) for name in record)


def test_select_on_test_is_a_switch(monkeypatch, tiny, tmp_path):
    seen = {}
    monkeypatch.setattr(
        "Retrieval.fit", lambda training, _: seen.update(best=training.best) or ("", {"test_r_mean": 1})
    )
    monkeypatch.setattr("Retrieval.report", lambda *_: None)
    called(monkeypatch, tiny, tmp_path)
    assert seen["best"] == "val_r_mean"
    called(monkeypatch, tiny, tmp_path, "--overrides", "released_code.select_on_test=true", "val_file=''")
    assert seen["best"] == "test_r_mean"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("val_file=''", "needs train_file and val_file"),
        ("train_file={data}/pretrain_train.json", "pretrain_train.json: entry 0.*'caption' must be text"),
        ("test_file={data}/scenes_test.json", "entry 0 has no 'caption'"),
    ],
)
def test_files_of_another_task_are_named(monkeypatch, tiny, tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        called(monkeypatch, tiny, tmp_path, "--overrides", override.format(data=tiny["data"]))
