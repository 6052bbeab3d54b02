"""Checkpoint files: background writing, damage, which are kept, which is the newest; a disk that is full."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT, full_disk, make_tiny, run

import zero_shot_retrieval
from NLVR import report_predictions
from simla.checkpoint import save as saving
from simla.checkpoint.save import Saver, check_undamaged, epoch_name, load_checkpoint, newest_good, step_name
from simla.dataset.check.images import _append_to_cache
from simla.dataset.prepare import answers
from simla.engine.results import save_result
from simla.engine.run_record import save_config
from simla.utils import UserError, atomic_write, import_pyplot, make_output_folder, save_figure


def state(run="a", fill=0.0, **more):
    return {"model": {"w": torch.full((1000,), fill)}, "run": run, **more}


def saved(saver, *names, **more):
    for name in names:
        saver.save(name, state(**more))
    saver.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- in the background ----


@pytest.fixture
def slow_disk(monkeypatch):
    """Nothing is written before the event is set."""
    go = threading.Event()
    original = torch.save

    def slow(*args):
        assert go.wait(30)
        original(*args)

    monkeypatch.setattr(torch, "save", slow)
    yield go
    go.set()
    Saver.wait()


def test_what_is_saved_is_the_moment_of_the_call(tmp_path, slow_disk):
    weight = torch.zeros(3)
    saver = Saver(tmp_path, 2, False)
    saver.save("checkpoint_00.pth", {"model": {"w": weight, "tied": weight}})
    weight.fill_(1.0)  # training goes on
    assert all(name.startswith(".checkpoint_00.pth.") for name in names(tmp_path))
    slow_disk.set()
    saver.close()
    model = load_checkpoint(tmp_path / "checkpoint_00.pth")["model"]
    assert not model["w"].any() and model["w"].data_ptr() == model["tied"].data_ptr()


def test_one_at_a_time(tmp_path, slow_disk):
    saver = Saver(tmp_path, 5, False)
    saver.save("checkpoint_00.pth", state())
    second = threading.Thread(target=saver.save, args=("checkpoint_01.pth", state()))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # waits for the first
    slow_disk.set()
    second.join()
    saver.close()
    assert names(tmp_path) == ["checkpoint_00.pth", "checkpoint_01.pth"]


def test_a_failed_write_is_reported_and_the_next_good_one_makes_up_for_it(tmp_path, monkeypatch, caplog):
    saver = Saver(tmp_path, 2, False)
    saved(saver, "checkpoint_00.pth", fill=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save("checkpoint_00.pth", state(fill=2.0))
        saver.wait()
        assert "training goes on" in caplog.text and "No space left on device" in caplog.text
        with pytest.raises(UserError, match=r"checkpoint_00\.pth could not be written .*No space left"):
            saver.close()
    assert names(tmp_path) == ["checkpoint_00.pth"]
    assert load_checkpoint(tmp_path / "checkpoint_00.pth")["model"]["w"][0] == 1.0
    saved(saver, "checkpoint_01.pth")
    for error in (MemoryError("no memory"), AssertionError("a bug")):  # a thread would end without a word
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", lambda *_, error=error: (_ for _ in ()).throw(error))
            saver.save("checkpoint_02.pth", state())
            with pytest.raises(UserError, match=str(error)):
                saver.close()


def test_a_best_checkpoint_that_was_not_written_is_not_made_up_for_by_the_next_one(tmp_path, monkeypatch):
    saver = Saver(tmp_path, 2, False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save(epoch_name(0), state(), is_best=True)
        saver.wait()
    saver.save(epoch_name(1), state())
    with pytest.raises(UserError, match=r"checkpoint_00\.pth could not be written"):
        saver.close()
    saver.save(epoch_name(2), state(), is_best=True)
    saver.close()


def test_values_that_are_not_plain_are_refused_at_the_call(tmp_path):
    with pytest.raises(TypeError, match=r"state\.config\.path"):
        Saver(tmp_path, 2, False).save("checkpoint_00.pth", {"config": {"path": Path()}})


# ---- which are kept ----


def test_the_newest_are_kept_and_every_epoch_where_asked(tmp_path):
    order = [
        step_name(0, 5),
        epoch_name(0),
        step_name(1, 5),
        step_name(1, 10),
        epoch_name(1),
        step_name(2, 5),
    ]
    for keep_epochs in (False, True):
        folder = tmp_path / str(keep_epochs)
        folder.mkdir()
        (folder / "checkpoint_07.pth").write_text("of somebody else")
        saved(Saver(folder, 2, keep_epochs), *order)
        epochs = [epoch_name(0), epoch_name(1)] if keep_epochs else [epoch_name(1)]
        assert names(folder) == [*epochs, step_name(2, 5), "checkpoint_07.pth"]


def test_a_resumed_saver_deletes_what_the_run_wrote_before(tmp_path):
    saved(Saver(tmp_path, 2, False), *map(epoch_name, range(3)))
    known = load_checkpoint(tmp_path / epoch_name(2))["saved"]
    saver = Saver(tmp_path, 2, False)
    saver.saved = known
    saved(saver, epoch_name(3))
    assert names(tmp_path) == [epoch_name(2), epoch_name(3)]


def test_the_checkpoint_before_an_evaluation_goes_when_the_epoch_s_is_there(tmp_path):
    saver = Saver(tmp_path, 3, True)
    saved(saver, epoch_name(0), step_name(1, 9))
    saver.save(epoch_name(1), state(), replaces=step_name(1, 9))
    saver.close()
    assert names(tmp_path) == [epoch_name(0), epoch_name(1)]


def test_the_best_is_a_second_name_or_a_copy(tmp_path, monkeypatch):
    for can_link in (True, False):
        if not can_link:
            monkeypatch.setattr(
                Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(1, "not on this disk"))
            )
        saver = Saver(tmp_path, 1, False)
        saver.save(epoch_name(0), state(fill=float(can_link)), is_best=True)
        saver.close()
        saved(saver, epoch_name(1), fill=9.0)
        assert names(tmp_path) == [epoch_name(1), saving.BEST]
        assert load_checkpoint(tmp_path / saving.BEST)["model"]["w"][0] == float(can_link)


# ---- the best one, and what is later ----


def run_of(folder, scores, run="a", keep_last=99):
    """Epochs with those scores, one after the other; returns the best as the last state has it."""
    folder.mkdir()
    best = {}
    with Saver(folder, keep_last, False) as saver:
        for epoch, score in enumerate(scores):
            is_best = score > best.get("acc", 0)
            best = {"acc": score, "epoch": epoch} if is_best else best
            content = state(run, fill=float(epoch), epoch=epoch, step=0, best=best)
            saver.save(epoch_name(epoch), content, is_best=is_best)
    return best


def test_the_best_file_is_believed_where_run_epoch_and_scores_agree(tmp_path):
    folder = tmp_path / "run"
    best = run_of(folder, [10.0, 30.0, 20.0])
    assert best == {"acc": 30.0, "epoch": 1}
    path = folder / saving.BEST
    assert saving.best_problem(path, "a", best) == ""
    assert saving.best_problem(path, "b", best) == f"{path} is of another run"
    assert "is not of the best epoch" in saving.best_problem(path, "a", best | {"epoch": 0})
    assert "is not of the best epoch" in saving.best_problem(path, "a", best | {"acc": 30.5})
    # a later state of the run names the same scores, but has other weights; so has one of the epoch after
    assert "is not of the best epoch" in saving.best_problem(folder / epoch_name(2), "a", best)
    torch.save(state("a", epoch=1, step=5, best=best), folder / step_name(2, 5))
    assert "is not of the best epoch" in saving.best_problem(folder / step_name(2, 5), "a", best)
    for damage in (b"", path.read_bytes()[:-2000]):
        (tmp_path / "damaged.pth").write_bytes(damage)
        assert str(tmp_path / "damaged.pth") in saving.best_problem(tmp_path / "damaged.pth", "a", best)


def test_a_best_file_is_found_by_what_it_holds(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    best = run_of(folder, [10.0, 30.0, 20.0])
    other.mkdir()
    shutil.copy(folder / epoch_name(2), other / epoch_name(2))  # the newest alone
    problem = saving.find_best(other / epoch_name(2), other, "a", best)
    assert problem == f"{other / saving.BEST} is missing" and names(other) == [epoch_name(2)]
    assert saving.find_best(folder / epoch_name(2), other, "a", best) == ""  # the one beside it
    assert load_checkpoint(other / saving.BEST)["epoch"] == 1
    (folder / saving.BEST).unlink()
    shutil.copy(folder / epoch_name(2), folder / saving.BEST)  # by mistake
    assert saving.find_best(folder / epoch_name(2), folder, "a", best) == ""
    assert load_checkpoint(folder / saving.BEST)["epoch"] == 1
    shutil.copy(folder / epoch_name(1), tmp_path / "mine.pth")
    assert saving.find_best(tmp_path / "mine.pth", tmp_path, "a", best) == ""
    assert load_checkpoint(tmp_path / saving.BEST)["epoch"] == 1


def test_what_is_later_of_the_run_is_set_aside(tmp_path, caplog):
    folder = tmp_path / "run"
    run_of(folder, [10.0, 20.0, 30.0])
    torch.save(state("a", epoch=0, step=9), folder / step_name(1, 9))
    torch.save(state("b", epoch=7, step=0), folder / epoch_name(7))
    (folder / epoch_name(8)).write_text("damaged")
    assert saving.set_aside_later(folder, "none", (9, 0)) is None
    first = saving.set_aside_later(folder, "a", (2, 0))
    assert names(first) == [epoch_name(2), epoch_name(8), saving.BEST]
    assert first.parent == folder / "abandoned" and str(first) in caplog.text
    assert load_checkpoint(first / saving.BEST)["epoch"] == 2
    second = saving.set_aside_later(folder, "a", (1, 5))
    assert names(second) == [epoch_name(1), step_name(1, 9)] and second != first
    assert names(folder) == ["abandoned", epoch_name(0), epoch_name(7)]


# ---- damage, and the newest ----


@given(where=st.floats(0, 1), flip=st.integers(1, 255))
def test_a_changed_byte_is_told_or_does_not_matter(tmp_path_factory, where, flip):
    """Some bytes are padding; a file that passes for good has its values."""
    path = tmp_path_factory.mktemp("damage") / "c.pth"
    torch.save(state(fill=3.0), path)
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= flip
    path.write_bytes(content)
    try:
        check_undamaged(path)
        read = load_checkpoint(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert (read["model"]["w"] == 3.0).all() and read["run"] == "a"


def test_every_changed_byte_of_a_tensor_is_told(tmp_path):
    path = tmp_path / "c.pth"
    torch.save(state(fill=3.0), path)
    content = path.read_bytes()
    start = content.index(torch.full((1000,), 3.0).numpy().tobytes())
    for place in (start, start + 1999, start + 3999):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"checksum of its part .* does not match"):
            check_undamaged(path)
    path.write_bytes(content)
    check_undamaged(path)


def test_damaged_files_are_skipped_for_the_one_before(tmp_path, caplog):
    order = [epoch_name(0), step_name(1, 4), epoch_name(1), step_name(2, 4)]
    saved(Saver(tmp_path, 9, False), *order)
    assert newest_good(tmp_path) == tmp_path / order[-1]
    for name, damage in ((order[3], "cut"), (order[2], "flip"), (order[1], "empty")):
        content = (tmp_path / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (tmp_path / name).write_bytes({"cut": content[:middle], "flip": flipped, "empty": b""}[damage])
        assert newest_good(tmp_path) == tmp_path / order[order.index(name) - 1]
        assert f"skipped: {tmp_path / name}" in caplog.text
    (tmp_path / order[0]).write_bytes(b"PK\x03\x04 and rubbish")
    assert newest_good(tmp_path) is None


def test_another_run_s_further_file_is_not_the_newest(tmp_path):
    saved(Saver(tmp_path, 9, True), epoch_name(8), epoch_name(9), run="earlier")
    for name in (epoch_name(8), epoch_name(9)):
        os.utime(tmp_path / name, (1, 1))
    saved(Saver(tmp_path, 9, True), epoch_name(0), epoch_name(1), run="this")
    assert newest_good(tmp_path) == tmp_path / epoch_name(1)
    assert newest_good(tmp_path, "earlier") == tmp_path / epoch_name(9)
    assert newest_good(tmp_path, "none") is None
    assert newest_good(tmp_path / "nowhere") is None


def test_two_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path):
    """As two runs that fit one codebook: the last one to finish wins."""
    path = tmp_path / "codebook.safetensors"
    with atomic_write(path) as slow:
        slow.write(b"slow")
        with atomic_write(path) as fast:
            fast.write(b"fast and longer")
        assert path.read_bytes() == b"fast and longer"
    assert path.read_bytes() == b"slow" and names(tmp_path) == [path.name]


def test_processes_of_one_number_may_prove_one_folder_at_once(tmp_path):
    """As on two hosts; here threads."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(make_output_folder, [tmp_path] * 400))
    assert names(tmp_path) == []


def test_files_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / ".checkpoint_03.pth.tmp").write_text("half")  # as older versions called it
    (tmp_path / ".checkpoint_03.pth.1f2e.tmp").write_text("half")
    saved(Saver(tmp_path, 2, False), epoch_name(4))
    assert names(tmp_path) == [epoch_name(4)]


# ---- results on a full disk ----


def write_predictions(out: Path) -> None:
    entries = [{"identifier": f"dev-850-0-{number}"} for number in range(9)]
    report_predictions({"val": SimpleNamespace(entries=entries)}, {"val": [1] * 9}, {}, str(out))


def write_scores(out: Path) -> None:
    data = SimpleNamespace(img2txt=[[0], [1]], txt2img=[0, 1], coco_ids=[])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(zero_shot_retrieval, "score", lambda *_: (torch.eye(2), torch.eye(2)))
        zero_shot_retrieval.evaluate(None, data, None, {}, None, out / "result" / "retrieval_scores.pt")


def write_answers(out: Path) -> None:
    entries = [{"dataset": "vqa", "answer": [f"answer {i}"] * 10} for i in range(9)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(answers, "read_annotations", lambda *_: entries)
        command = ["x", "--train", "a.json", "--out", str(out / "answers.json")]
        patched.setattr(sys, "argv", command)
        answers.main(command[1:])


WRITERS = {
    "config.yaml": lambda out: save_config({"text_encoder": "x" * 99}, str(out)),
    "result/retrieval.json": lambda out: save_result(str(out), "retrieval", {"recalls": [0.5] * 99}),
    "result/nlvr_val_predictions.csv": write_predictions,
    "result/retrieval_scores.pt": write_scores,
    "answers.json": write_answers,
    "curves.png": lambda out: save_figure(import_pyplot().figure(), out / "curves.png", 50),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_result_takes_its_place_whole_or_not_at_all(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    WRITERS[name](tmp_path)
    assert len(path.read_bytes()) > 50 and names(path.parent) == [path.name]
    path.write_bytes(b"earlier")
    with (
        full_disk(20),
        pytest.raises(UserError, match=rf"{path.name} could not be written \(.*File too large"),
    ):
        WRITERS[name](tmp_path)
    assert path.read_bytes() == b"earlier" and names(path.parent) == [path.name]


def test_the_check_ends_with_a_sentence_where_its_records_find_no_place(tmp_path):
    with full_disk(20), pytest.raises(UserError, match="cannot be written: File too large"):  # noqa: SIM117
        with _append_to_cache(tmp_path) as cache:
            cache.write(b"x" * 99)
            cache.flush()


# ---- a real full disk ----

ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
import Pretrain
from simla.utils import UserError
config, disk, out = sys.argv[1:4]
mount = ["mount", "-t", "tmpfs", "tmpfs", disk, "-o"]
subprocess.run([*mount, "size=4m"], check=True)
flags = ["Pretrain.py", "--device", "cpu", "--config", config, "--output_dir", disk]
sys.argv = flags
try:
    Pretrain.parse_and_run()
except UserError as error:
    print("at the end:", error, flush=True)
print("on the disk:", sorted(path.name for path in Path(disk).glob("*.pth")), flush=True)
print("lines:", len(Path(disk, "train_steps.jsonl").read_text().splitlines()), flush=True)
subprocess.run([*mount[:4], disk, "-o", "remount,size=40m"], check=True)  # somebody made room
sys.argv = [*flags, "--resume"]
Pretrain.parse_and_run()
Path(out).write_bytes(Path(disk, "checkpoint_01.pth").read_bytes())
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this user may not mount a small disk")
def test_a_full_disk_costs_checkpoints_but_not_the_run(tmp_path):
    """4 MB hold two checkpoints of 1.5 MB; the run writes five and keeps three."""
    config = make_tiny(tmp_path)["Pretrain"]
    text = config.read_text()
    config.write_text(re.sub("log_steps: .*", "log_steps: 1\nsave_every_steps: 2", text))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [
        "unshare",
        "-rm",
        sys.executable,
        "-c",
        ON_A_SMALL_DISK,
        config,
        disk,
        tmp_path / "resumed.pth",
    ]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint not saved, training goes on" in done.stdout and "No space left" in done.stdout
    assert "at the end:" in done.stdout and "Epoch 1  [6/6]" in done.stdout
    assert "on the disk: ['checkpoint_00_000002.pth', 'checkpoint_00_000004.pth']" in done.stdout
    assert "lines: 12" in done.stdout
    whole = tmp_path / "whole"
    assert run("Pretrain.py", "--config", config, "--output_dir", whole).returncode == 0
    one, other = (
        torch.load(path, weights_only=True)
        for path in (whole / "checkpoint_01.pth", tmp_path / "resumed.pth")
    )
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


def test_waiting_for_a_writer_that_is_just_being_started(tmp_path, monkeypatch):
    """As a rank does that notices, in another thread, that its peer is gone."""
    starting, start = threading.Event(), threading.Thread.start

    def slow_start(thread: threading.Thread) -> None:
        if thread.name == "saver":
            starting.set()
            time.sleep(0.2)
        start(thread)

    failures = []

    def wait() -> None:
        starting.wait()
        try:
            Saver.wait()
            failures.extend([] if (tmp_path / "checkpoint_00.pth").exists() else ["did not wait"])
        except RuntimeError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    monkeypatch.setattr(threading.Thread, "start", slow_start)
    with Saver(tmp_path, keep_last=1, keep_epochs=True) as saver:
        saver.save("checkpoint_00.pth", {"model": {}})
    waiting.join()
    assert failures == []


def test_a_run_killed_before_it_deleted_what_is_too_old_does_so_when_it_goes_on(tmp_path, monkeypatch):
    """What is in the folder, and what the next checkpoint says of it, is as if nobody had killed it."""
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        with Saver(folder, keep_last=2, keep_epochs=True) as saver:
            for step in (1, 2, 3):
                saver.save(step_name(0, step), {"step": step})
                saver.wait()
            if folder.name == "killed":
                monkeypatch.setattr(Saver, "_delete_old", lambda self: None)
                monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
            saver.save(epoch_name(0), {"step": 0}, replaces=step_name(0, 3))
            saver.wait()
            monkeypatch.undo()
        if folder.name == "killed":
            assert (folder / step_name(0, 3)).exists() and (folder / step_name(0, 2)).exists()
            saver = Saver(folder, keep_last=2, keep_epochs=True)
            saver.take_up(load_checkpoint(folder / epoch_name(0)))
        with saver:
            saver.save(step_name(1, 1), {"step": 1})
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == sorted([epoch_name(0), step_name(1, 1)])
    last = [load_checkpoint(folder / step_name(1, 1)) for folder in folders]
    assert last[0] == last[1]
