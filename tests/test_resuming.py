"""Going back, going on elsewhere, evaluating beside a training, two trainings in one folder, edited data."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_ve_nlvr_scripts import make_task_files
from tiny import FORKS

import VE
import zero_shot_retrieval
from simla.checkpoint.save import BEST, epoch_name, load_checkpoint, step_name
from simla.dataset.loaders import data_account, data_difference
from simla.dataset.mixture import Mixture
from simla.dataset.prepare.__main__ import main as prepare
from simla.dataset.pretrain import read_sets
from simla.engine import launch, run_record
from simla.engine.run_record import LOCK, hold_folder, holds_training, release_folder
from simla.engine.training import Training
from simla.utils import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    return make_task_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def train(tiny, monkeypatch):
    """train(out, *flags, scores=(...)) -> what each batch held: VE.py in this process; `scores`: those of
    validation after its epochs, in place of an evaluation.
    """

    def run(out: Path, *flags: str, scores: tuple[float, ...] = (), **values: object) -> list[str]:
        seen, coming, count = [], iter(scores), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]

        def losses(model, batch, alpha, original=VE.losses):
            seen.extend(batch["where"])
            return original(model, batch, alpha)

        def evaluate(*given) -> dict:
            accuracy = next(coming) if given[-1] == "val" else 50.0
            return {"acc": accuracy, "confusion": count, "predicted": []}

        values = {"keep_last": 99, "log_steps": 1, **values}
        overrides = [f"{name.replace('__', '.')}={value}" for name, value in values.items()]
        argv = ["VE.py", "--device", "cpu", "--config", str(tiny["VE"]), "--output_dir", str(out), *flags]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*argv, "--overrides", *overrides])
            patch.setattr(VE, "losses", losses)
            if scores:
                patch.setattr(VE, "evaluate", evaluate)
            VE.parse_and_run()
        assert next(coming, None) is None, "not every epoch was evaluated"
        return seen

    return run


@pytest.fixture
def printed(capsys):
    """printed() -> what was printed so far."""
    lines = []

    def read() -> str:
        lines.append(capsys.readouterr().out)
        return "".join(lines)

    return read


def scores_in(out: Path) -> list[tuple[int, float]]:
    return [(line["epoch"], line["val_acc"]) for line in map(json.loads, (out / "log.txt").open())]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- going back, and elsewhere ----


def test_going_back_to_an_earlier_checkpoint_leaves_no_other_branch_behind(
    train, tmp_path, printed, monkeypatch
):
    train(tmp_path, scores=(10, 20, 30, 40), schedular__epochs=4)
    before = (tmp_path / "log.txt").read_text()
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 3
    flags = ["--resume", "--checkpoint", str(tmp_path / epoch_name(1))]
    train(tmp_path, *flags, scores=(15,), schedular__epochs=3)

    (aside,) = (tmp_path / "abandoned").iterdir()
    assert f"{epoch_name(3)}, {epoch_name(2)}, {BEST} are in {aside} now" in printed()
    assert names(aside) == {epoch_name(2), epoch_name(3), BEST, "log.txt", "train_steps.jsonl", "result"}
    assert load_checkpoint(aside / BEST)["epoch"] == 3 and (aside / "log.txt").read_text() == before
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 1  # the best of what this branch has seen
    assert load_checkpoint(tmp_path / epoch_name(2))["best"]["val_acc"] == 20
    assert scores_in(tmp_path) == [(0, 10), (1, 20), (2, 15)]
    assert json.loads((tmp_path / "result" / "ve.json").read_text())["weights"].startswith(
        str(tmp_path / BEST)
    )

    # a requeue and a plain --resume go on in this branch, and move nothing
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train(tmp_path, *flags, scores=(25,), schedular__epochs=4)
    monkeypatch.undo()
    assert f"going on from {tmp_path / epoch_name(2)}" in printed()
    train(tmp_path, "--resume", schedular__epochs=4)
    assert (
        scores_in(tmp_path)[2:] == [(2, 15), (3, 25)] and len(list((tmp_path / "abandoned").iterdir())) == 1
    )
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 3


def test_going_back_to_the_best_or_to_an_abandoned_one(train, tmp_path, monkeypatch):
    train(tmp_path, scores=(10, 30, 20, 25), schedular__epochs=4, keep_last=1)
    assert {epoch_name(3), BEST} <= names(tmp_path) and epoch_name(1) not in names(tmp_path)
    train(tmp_path, "--resume", "--checkpoint", str(tmp_path / BEST), schedular__epochs=2)  # no step is left
    assert {epoch_name(1), BEST} <= names(tmp_path) and epoch_name(3) not in names(tmp_path)
    train(tmp_path, "--resume", scores=(5,), schedular__epochs=3, keep_last=1)  # found by its own name
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 1
    abandoned = next((tmp_path / "abandoned").glob(f"*/{epoch_name(3)}"))
    train(
        tmp_path, "--resume", "--checkpoint", str(abandoned), scores=(35,), schedular__epochs=5, keep_last=1
    )
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 4
    assert not list(tmp_path.glob("checkpoint_0[0-3]*"))  # they were of the branch in between


def test_a_best_checkpoint_that_is_not_there_is_not_claimed(train, tmp_path, printed):
    first, moved = tmp_path / "first", tmp_path / "moved"
    train(first, scores=(10, 30, 20), schedular__epochs=3)
    moved.mkdir()
    shutil.copy(first / epoch_name(2), moved)
    train(moved, "--resume", scores=(12,), schedular__epochs=3)  # at its end: evaluated itself
    said = f"{moved / BEST} is missing; the best epoch is looked for among those to come"
    assert said in printed() and BEST not in names(moved)
    assert json.loads((moved / "result" / "ve.json").read_text())["weights"].startswith(
        str(moved / epoch_name(2))
    )
    train(moved, "--resume", scores=(5, 4), schedular__epochs=5)
    assert load_checkpoint(moved / BEST)["best"] == load_checkpoint(moved / epoch_name(4))["best"]
    assert load_checkpoint(moved / BEST)["epoch"] == 3

    # resumed into another folder, which takes the best one along
    other = tmp_path / "other"
    train(other, "--resume", "--checkpoint", str(first / epoch_name(2)), scores=(29,), schedular__epochs=4)
    assert load_checkpoint(other / BEST)["epoch"] == 1


def test_another_number_of_heads_is_refused(train, tmp_path):
    """All weights would fit."""
    train(tmp_path, scores=(10, 20), schedular__epochs=2)
    with pytest.raises(UserError, match=r"made with another model.*vit.num_heads 4, not 2"):
        train(tmp_path, "--resume", schedular__epochs=3, vit__num_heads=4)


def test_resume_takes_the_run_that_was_last_started(train, tmp_path, printed):
    """The times of its files do not count, which a copy may have lost."""
    old, new = tmp_path / "old", tmp_path / "new"
    for out in (old, new):
        train(out, scores=(10, 20), schedular__epochs=2)
    for name in (epoch_name(0), epoch_name(1)):
        shutil.copy(old / name, new / name.replace("_0", "_1"))
    record = json.loads((new / "run.json").read_text())
    assert launch._what_to_resume(str(new), "", resume=True) == str(new / epoch_name(1))
    (new / "run.json").write_text(json.dumps({**record, "run": "another"}))
    assert launch._what_to_resume(str(new), "", resume=True) == str(new / epoch_name(11))
    assert f"last started in {new} saved nothing; {new / epoch_name(11)} is of an earlier one" in printed()


def test_another_kind_of_optimiser_has_no_use_for_the_moments(train, tmp_path):
    train(tmp_path, scores=(10,), schedular__epochs=1)
    with pytest.raises(UserError, match=r"moments of the optimiser adamW, which are no use to sgd"):
        train(tmp_path, "--resume", optimizer__opt="sgd")
    train(tmp_path, "--resume", scores=(11,), optimizer__opt="adamw", optimizer__weight_decay=0.5)
    groups = load_checkpoint(tmp_path / epoch_name(1))["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.5]


# ---- an evaluation in a training's folder ----


def test_an_evaluation_leaves_a_training_s_files_alone(train, tiny, tmp_path, monkeypatch, printed):
    train(tmp_path, scores=(10, 20), schedular__epochs=2)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    checkpoint = str(tmp_path / epoch_name(0))
    train(tmp_path, "--evaluate", "--checkpoint", checkpoint)
    here = tmp_path / "evaluation_checkpoint_00"
    assert f"what this evaluation writes goes to {here}" in printed()
    assert names(here) == {"run.json", "config.yaml", "log.txt", "result"}
    assert "val_acc" in (here / "log.txt").read_text() and (here / "result" / "ve.json").is_file()
    record = json.loads((here / "run.json").read_text())
    assert not record["is_training"] and record["run"] != json.loads(kept[tmp_path / "run.json"])["run"]

    retrieval = ["--device", "cpu", "--config", str(tiny["VE"].with_name("Retrieval.yaml")), "--output_dir"]
    with monkeypatch.context() as patch:  # which scores without being told to, and with untrained weights
        patch.setattr(sys, "argv", ["zero_shot_retrieval.py", *retrieval, str(tmp_path)])
        zero_shot_retrieval.parse_and_run()
    assert "retrieval.json" in names(tmp_path / "evaluation_without_training" / "result")
    assert {path: path.read_bytes() for path in kept} == kept
    assert names(tmp_path) - {path.relative_to(tmp_path).parts[0] for path in kept} == {
        "evaluation_checkpoint_00",
        "evaluation_without_training",
    }
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(tmp_path, scores=(30,), schedular__epochs=3)
    assert f"started again: going on from {tmp_path / epoch_name(1)}" in printed()

    # elsewhere as ever
    assert train(tmp_path / "elsewhere", "--evaluate", "--checkpoint", checkpoint) == []
    assert names(tmp_path / "elsewhere") == {"run.json", "config.yaml", "log.txt", "result"}
    train(tmp_path / "elsewhere", "--evaluate", "--checkpoint", checkpoint)
    assert len((tmp_path / "elsewhere" / "log.txt").read_text().splitlines()) == 2


def test_a_training_that_has_saved_nothing_yet_is_one_too(tmp_path):
    assert not holds_training(str(tmp_path / "nowhere")) and not holds_training(str(tmp_path))
    run_record.RunRecord(str(tmp_path), "abc", {}, torch.device("cpu"), "", is_training=False)
    assert not holds_training(str(tmp_path))
    run_record.RunRecord(str(tmp_path), "abc", {}, torch.device("cpu"), "")
    assert holds_training(str(tmp_path))
    (tmp_path / "run.json").write_text("{")
    assert not holds_training(str(tmp_path))
    (tmp_path / "train_steps.jsonl").touch()
    assert holds_training(str(tmp_path))


# ---- two trainings in one folder ----


def hold(folder: str, held) -> None:
    hold_folder(folder)
    held.set()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path."""
    held = FORKS.Event()
    process = FORKS.Process(target=hold, args=(str(tmp_path), held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


@pytest.fixture(autouse=True)
def _released():
    yield
    release_folder()


def test_a_second_training_is_refused_and_an_evaluation_is_not(holder, train, tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "PREDECESSOR_SECONDS", 0.2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch, ExitStack() as stack:
        patch.setattr(launch, "_script", stack)  # as under run_script
        with pytest.raises(UserError) as error:
            train(tmp_path)
    started = json.loads((tmp_path / f"{LOCK}.json").read_text())["start"]
    who = f"host {socket.gethostname()}, process {holder.pid}, started {started}"
    assert f"{tmp_path} is in use by another training ({who})" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    train(tmp_path, "--evaluate")


def test_a_dead_run_s_lock_is_no_obstacle(holder, tmp_path, monkeypatch):
    """However it died; one that is just dying is waited for."""
    threading.Timer(0.5, os.kill, (holder.pid, signal.SIGKILL)).start()
    begin = time.monotonic()
    hold_folder(str(tmp_path))
    assert 0.3 < time.monotonic() - begin < run_record.PREDECESSOR_SECONDS
    assert json.loads((tmp_path / f"{LOCK}.json").read_text())["pid"] == os.getpid()

    # neither does a process forked from a training, such as a loader's, free it as that ends
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.01,))
    child.start()
    child.join()
    with (tmp_path / LOCK).open("r+") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        release_folder()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_disk_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog):
    def acquire(*_, **__) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_record.FileLock, "acquire", acquire)
    hold_folder(str(tmp_path))
    assert f"{tmp_path} cannot be locked ([Errno 37] No locks available)" in caplog.text


def test_a_script_lets_go_of_its_folder_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record.RunRecord, "current", None)
    launch.run_script(lambda: hold_folder(str(tmp_path)))
    with (tmp_path / LOCK).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- data that are edited ----


@pytest.fixture
def edited(tiny, train, tmp_path):
    """A run of 4 steps an epoch with a checkpoint of each, and a training file with one entry changed."""
    given = tiny["VE"].parent / "tasks" / "ve_train.json"
    entries = json.loads(given.read_text())
    seen = train(tmp_path / "run", scores=(10, 20), save_every_steps=1)
    assert len(set(seen)) == len(entries) == 16
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps([{**entries[0], "sentence": "another"}, *entries[1:]]))
    return tmp_path / "run", changed


def test_an_epoch_in_progress_starts_anew_with_other_data(edited, train, printed):
    run, changed = edited
    flags = ["--resume", "--checkpoint", str(run / step_name(0, 2))]
    seen = train(run, *flags, scores=(10,), schedular__epochs=1, train_file=changed, save_every_steps=1)
    assert "the training data differ from those of" in printed()
    assert f"the entries of {changed} are others; epoch 0 starts anew, from its first sample" in printed()
    assert len(seen) == len(set(seen)) == 16  # all, once
    # steps go on being counted: names of files stay in order, and the warm-up comes once
    state = load_checkpoint(run / step_name(0, 5))
    assert (state["step"], state["samples"]) == (5, 12)
    assert load_checkpoint(run / epoch_name(0))["total_steps"] == 6
    assert len(train(run, "--resume", scores=(10,), schedular__epochs=2, train_file=changed)) == 16


def test_what_is_resumed_of_other_data_at_or_after_an_epoch_s_last_step_goes_on(edited, train, printed):
    run, changed = edited
    with pytest.raises(StopIteration):  # as if killed in its last evaluation
        train(run, "--resume", "--checkpoint", str(run / epoch_name(0)), scores=(15,), schedular__epochs=3)
    at_end = ["--resume", "--checkpoint", str(run / step_name(2, 4))]  # which is to come
    assert train(run, *at_end, scores=(20,), schedular__epochs=3, train_file=changed) == []
    assert "the run goes on with those of now" in printed()
    between = ["--resume", "--checkpoint", str(run / epoch_name(0))]
    assert len(train(run, *between, scores=(20,), train_file=changed)) == 16
    assert "starts anew" not in printed()
    copy, before = run.parent / "copy.json", printed()
    shutil.copy(changed, copy)  # neither name nor date matters
    assert train(run, "--resume", train_file=copy) == []
    assert "data differ" not in printed().removeprefix(before)


def test_a_file_that_has_shrunk_is_no_traceback(edited, train, printed):
    run, changed = edited
    changed.write_text(json.dumps(json.loads(changed.read_text())[:4]))
    flags = ["--resume", "--checkpoint", str(run / step_name(0, 2))]
    assert len(train(run, *flags, scores=(10,), schedular__epochs=1, train_file=changed)) == 4
    assert f"{changed} had 16 entries, has 4" in printed()


def account(mixture: Mixture, readers: tuple | None = None) -> dict:
    sampler = SimpleNamespace(num_items=mixture.samples_per_epoch, global_batch=4, readers=readers)
    return data_account(SimpleNamespace(sampler=sampler, dataset=SimpleNamespace(entries=mixture)))


def test_what_counts_as_other_data(tiny, tmp_path):
    data = tiny["VE"].parent / "data"
    file = tmp_path / "pretrain_train.json"
    shutil.copy(data / "pretrain_train.json", file)
    made = ["--annotations", str(data / file.name), "--out", str(tmp_path / "shards")]
    prepare(["shards", *made, "--samples_per_shard", "12", "--workers", "1"])
    shards = f"{tmp_path}/shards/{{00000..00001}}.tar"

    def sets(weights=(1, 3), samples=24, names=(str(file), shards)) -> Mixture:
        listed = [{"path": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]
        return read_sets(listed, samples, str(data))

    def differs(changed: Mixture | dict) -> str:
        return data_difference(before, account(changed) if isinstance(changed, Mixture) else changed)

    before = account(sets())
    assert differs(json.loads(json.dumps(account(sets())))) == ""
    shutil.copytree(tmp_path / "shards", tmp_path / "moved")
    os.utime(file, (1, 1))
    assert differs(sets(names=(str(file), shards.replace("/shards/", "/moved/")))) == ""
    assert differs(sets(weights=(1, 1))) == "an epoch had 24 samples, of the sets [6, 18], has 24, [12, 12]"
    assert "has 20, [5, 15]" in differs(sets(samples=20))
    assert differs(sets(names=(shards, str(file)))).endswith(
        "entries of " + shards.replace("{00000..00001}", "00000") + " are others"
    )
    assert "there were 2 file(s), there are 1" in differs(sets((1,), names=(str(file),)))
    assert "streamed" in data_difference(account(sets(), (1, 4, 9)), account(sets(), (2, 4, 9)))
    (tmp_path / "moved" / "00001.tar").unlink()
    gone = differs(sets(names=(str(file), f"{tmp_path}/moved/00000.tar")))
    assert gone == f"{tmp_path}/moved/00000.tar had 24 entries, has 12"
    text = file.read_text()
    middle = text.index('"caption"', len(text) // 2) + 14
    file.write_text(text[:middle] + "x" + text[middle + 1 :])  # of the same length
    assert differs(sets()) == f"the entries of {file} are others"


def test_identities_of_other_data_are_not_compared_with_the_queue_s(tiny):
    """Retrieval numbers the images of its file."""
    model = SimpleNamespace(idx_queue=torch.arange(5))
    sampler = SimpleNamespace(num_items=8, global_batch=4)
    old, new = ({"files": [["a.json", n, "x"]], "samples": n, "shares": [], "readers": []} for n in (7, 8))
    run = SimpleNamespace(
        data=old, model=model, loader=SimpleNamespace(sampler=sampler), step=0, samples=0, epoch=1
    )
    Training.compare_data(run, old, "c.pth")
    assert model.idx_queue.tolist() == [0, 1, 2, 3, 4]
    run.data = new
    Training.compare_data(run, old, "c.pth")
    assert set(model.idx_queue.tolist()) == {-100}
