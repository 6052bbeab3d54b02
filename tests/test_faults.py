"""What ends a run early, on real processes: kills, stop signals, a rank that is lost, loader processes that
give no batches; and how it goes on.

Run as a script (`test_faults.py FOLDER`) this file is most of those runs: one process imports everything and
forks the ranks of each, since the imports take longer than the work. Under torch's launcher it is one rank.
"""

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fault_test import different, differing_values, fault_test
from tiny import ROOT, make_tiny, run, run_forked

import Pretrain
from simla.checkpoint.save import load_checkpoint
from simla.dataset import loaders
from simla.dataset.loaders import loader_problem
from simla.engine import launch, run_record
from simla.engine.exit import RESUMABLE
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.signals import StopSignals
from simla.utils import LOG, UserError

LOST, HANGS = 10, 100  # seconds: others end within LOST of a lost rank; a hanging step takes HANGS
SETTINGS = ("save_every_steps=1", "keep_last=99")  # 2 epochs: on 2 ranks 3 steps each, on 1 rank 6

# (folder, number of ranks, event, flags, other config values); those of one folder come one after the other
RUNS = (
    ("whole_2", 2, "", (), ()),
    ("whole_1", 1, "", (), ()),
    ("SIGTERM", 2, "SIGTERM", (), ()),
    ("SIGTERM", 2, "", ("--resume",), ()),
    ("SIGUSR1", 1, "SIGUSR1", (), ()),
    ("SIGUSR1", 1, "", ("--resume",), ()),
    ("SIGINT", 1, "SIGINT", (), ("num_workers=1",)),
    ("SIGINT", 1, "", ("--resume",), ("num_workers=1",)),
    ("hangs", 1, "hangs", (), ()),
    ("hangs_in_c", 2, "hangs in C", (), ("stop_grace_seconds=0.5",)),
    ("worker_hangs", 1, "worker hangs", (), ("num_workers=1", "batch_timeout_minutes=0.02")),
    ("worker_dies", 2, "worker dies", (), ("num_workers=1",)),
    ("killed", 2, "killed", (), ()),
    ("bad_data", 2, "bad data", (), ()),
    ("crash", 2, "crash", (), ()),
)


# ---- the processes ----


def events(event: str, rank: int, batch: int) -> None:
    """What happens in the process of a rank as it comes to a batch, from 1."""
    if event.startswith("SIG") and batch == 2:  # as Ctrl-C: the loader's workers get it too
        os.killpg(os.getpgrp(), signal.Signals[event])
    if event == "hangs" and batch == 2:
        again = StopSignals.REPEATED_AFTER + 0.5
        # The second is the first one, passed on by a launcher.
        for seconds, number in ((0.0, signal.SIGINT), (0.3, signal.SIGINT), (again, signal.SIGTERM)):
            threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
        time.sleep(HANGS)
    if event == "hangs in C" and batch == 2:
        os.kill(os.getpid(), signal.SIGTERM)
        if rank == 1:  # the other one comes to wait for it, in C too
            hang_in_c()
    if event == "killed" and (rank, batch) == (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "bad data" and (rank, batch) == (1, 2):
        raise UserError("broken.json cannot be read")
    if event == "crash" and (rank, batch) == (1, 2):
        raise KeyError("loss_new")
    if event == "killed once" and (rank, batch) == (1, 5) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def hang_in_c() -> None:
    """For ever; no handler of Python's is called."""
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def train(event: str, rank: int) -> None:
    """Pretrain.py with an event."""
    original, batches = Pretrain.losses, iter(range(1, 1000))
    start_worker = loaders._start_worker

    def start_bad_worker(number: int) -> None:
        start_worker(number)
        if event == "worker dies" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does for want of memory
        if event == "worker hangs":
            time.sleep(HANGS)

    if event.startswith("worker"):
        loaders._start_worker = start_bad_worker

    def losses(*args) -> dict:
        events(event, rank, next(batches))
        return original(*args)

    Pretrain.losses = losses
    run_script(Pretrain.parse_and_run)


def work(rank: int, num_ranks: int, output: Path, command: list[str], event: str) -> None:
    os.setsid()
    with output.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    sys.argv = ["Pretrain.py", *command]
    train(event, rank)


def run_all(folder: Path) -> None:
    """RUNS; each leaves in its folder, by number, what was printed and run_N.json: the exit codes by rank and
    the seconds from the first rank's end to the last one's.
    """
    for name, num_ranks, event, flags, values in RUNS:
        out = folder / name
        out.mkdir(exist_ok=True)
        number = len(list(out.glob("run_*.json")))
        meeting_place = f"file://{out}/meet_{number}"  # unlike a port, nobody else can have taken it
        command = ["--device", "cpu", "--config", str(folder / "Pretrain.yaml"), "--output_dir", str(out)]
        command += ["--dist_url", meeting_place, *flags, "--overrides", *SETTINGS, *values]
        ranks = [
            multiprocessing.Process(
                target=work, args=(rank, num_ranks, out / f"run_{number}.txt", command, event)
            )
            for rank in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        ends, deadline = {}, time.monotonic() + 40
        while len(ends) < num_ranks and time.monotonic() < deadline:
            ends |= {rank: time.monotonic() for rank in ranks if rank not in ends and not rank.is_alive()}
            time.sleep(0.01)
        for rank in ranks:
            rank.kill()
            rank.join()
        seconds = max(ends.values()) - min(ends.values()) if len(ends) == num_ranks else 40
        result = {"codes": [rank.exitcode for rank in ranks], "seconds": seconds}
        (out / f"run_{number}.json").write_text(json.dumps(result))


# ---- the tests ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All of RUNS."""
    folder = tmp_path_factory.mktemp("faults")
    make_tiny(folder)
    done = run_forked(__file__, folder)
    assert done.returncode == 0, done.stderr
    return folder


def ended(out: Path, number: int = 0) -> tuple[list[int], float, str]:
    """Of a run: exit codes, seconds from the first end to the last, what was printed."""
    result = json.loads((out / f"run_{number}.json").read_text())
    return result["codes"], result["seconds"], (out / f"run_{number}.txt").read_text()


def record(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimiser, random states of the last epoch, and the losses of all, bit for bit."""
    states = [load_checkpoint(out / "checkpoint_01.pth") for out in (one, other)]
    for state in states:
        for name in ("run", "saved", "config"):  # its id, files and number of workers
            del state[name]
    assert differing_values(*states, "state") == []
    assert (one / LOG).read_text() == (other / LOG).read_text()


def test_kills_at_random_moments_lose_nothing(tmp_path):
    summary = fault_test(tmp_path, num_kills=3, seed=1)
    assert summary["identical"], summary["failure"]
    assert summary["kills"] == 3 and summary["kills_during_save"] >= 1
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_the_fault_test_finds_what_differs(folder, tmp_path):
    shutil.copytree(folder / "whole_1", tmp_path / "copy")
    assert different(folder / "whole_1", tmp_path / "copy") == []
    name = "checkpoint_01.pth"
    state = {**load_checkpoint(folder / "whole_1" / name), "epoch": 5}
    moments = state["optimizer"]["state"][0]["exp_avg"] = state["optimizer"]["state"][0]["exp_avg"].clone()
    moments.view(-1)[0] += 1e-7
    torch.save(state, tmp_path / "copy" / name)
    with (tmp_path / "copy" / LOG).open("a") as log:
        log.write("{}\n")
    (tmp_path / "copy" / "checkpoint_00.pth").unlink()
    assert different(folder / "whole_1", tmp_path / "copy") == [
        "checkpoint_00.pth",
        LOG,
        f"{name}: optimizer: state: 0: exp_avg",
        f"{name}: epoch",
    ]


@pytest.mark.parametrize(("name", "num_ranks"), [("SIGTERM", 2), ("SIGUSR1", 1), ("SIGINT", 1)])
def test_a_stop_signal_ends_the_step_saves_and_the_run_goes_on_as_if_it_had_not_come(folder, name, num_ranks):
    out = folder / name
    codes, _, printed = ended(out)
    assert codes == [RESUMABLE] * num_ranks, printed
    assert f"stopped by {name} in epoch 0 after step 2" in printed
    assert "Traceback" not in printed
    codes, _, printed = ended(out, 1)
    assert codes == [0] * num_ranks, printed
    assert f"resumed {out / 'checkpoint_00_000002.pth'}: epoch 0, step 2" in printed
    assert record(out)["status"] == "done"
    assert_same_end(folder / f"whole_{num_ranks}", out)


def test_a_stopped_run_says_so_and_a_second_signal_ends_it_at_once(folder):
    out = folder / "hangs"
    (code,), _, printed = ended(out)
    assert code == RESUMABLE, printed  # not killed, as one that hung on would be
    assert record(out)["status"] == "stopped"
    assert "stopped by SIGINT without another save: SIGTERM came after it" in record(out)["message"]
    assert record(out)["seconds"] < HANGS / 2
    assert [path.name for path in out.glob("checkpoint_*")] == ["checkpoint_00_000001.pth"]


def test_a_step_that_hangs_is_left_when_the_grace_is_over(folder):
    """Signals reach no handler there; both ranks hear them. What was saved before is whole."""
    out = folder / "hangs_in_c"
    codes, seconds, printed = ended(out)
    assert codes == [RESUMABLE, RESUMABLE] and seconds < LOST, printed
    assert "SIGTERM without another save: what was going on did not end within stop_grace_sec" in printed
    assert "--resume goes on from the newest checkpoint" in printed and "Traceback" not in printed
    assert record(out)["status"] == "stopped" and record(out)["seconds"] < HANGS / 2
    assert [path.name for path in out.glob("*checkpoint_*")] == ["checkpoint_00_000001.pth"]


@pytest.mark.parametrize(
    ("name", "num_ranks", "what"),
    [("worker_hangs", 1, "timed out after 1.2 s"), ("worker_dies", 2, "DataLoader worker (pid")],
)
def test_loader_processes_that_give_no_batch_end_the_run_with_a_sentence(folder, name, num_ranks, what):
    out = folder / name
    codes, seconds, printed = ended(out)
    assert codes == [1] * num_ranks and seconds < LOST, printed
    (line,) = [line for line in printed.splitlines() if "give no batches" in line]
    assert what in line and f"error (rank {num_ranks - 1})" in line
    assert all(word in line for word in ("/dev/shm", "num_workers", "ulimit -n", "batch_timeout_minutes"))
    assert record(out)["status"] == "failed" and "Traceback" not in printed


def test_a_batch_that_cannot_be_handed_over_ends_the_loader_at_once():
    """As where shared memory is full or too few files may be open: it fails in a thread of the process."""
    config = {"num_workers": 1, "batch_timeout_minutes": 5}
    loader = loaders.test_loader(range(4), 2, config, NotSent)
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        next(iter(loader))
    assert time.monotonic() - begin < 60
    assert "give no batches (DataLoader worker" in loader_problem(error.value)


class NotSent:
    def __init__(self, items: list):
        pass

    def __reduce__(self):
        raise OSError(28, "unable to allocate shared memory(shm)")


@pytest.mark.parametrize(
    ("error", "is_loaders"),
    [
        (RuntimeError("Caught RuntimeError in pin memory thread.\nreceived 0 items of ancdata"), True),
        (OSError(24, "Too many open files"), True),
        (RuntimeError("unable to write to file </torch_7_9>: No space left on device (28)"), True),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: shapes"), False),
        (RuntimeError("out of resource: shared memory, Required: 147456"), False),  # a compiled kernel's
        (KeyError("DataLoader timed out"), False),
    ],
)
def test_what_is_the_loaders_fault(error, is_loaders):
    assert bool(loader_problem(error)) == is_loaders


@pytest.fixture
def ends(monkeypatch) -> list[str]:
    """What StopSignals would have ended this process with."""
    messages = []
    monkeypatch.setattr("simla.engine.signals.end_stopped", lambda name, message: messages.append(message))
    return messages


def test_a_signal_that_was_answered_may_take_its_time(ends):
    with StopSignals(grace_seconds=0.1) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        signals.is_answered = True
        time.sleep(0.3)
        assert signals.received == "SIGTERM" and not ends
    with StopSignals(grace_seconds=0.1) as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        assert ends[0].startswith("stopped by SIGUSR1 without another save")


def test_what_a_child_is_told_is_not_for_its_parent(ends):
    with StopSignals(grace_seconds=0.1) as signals:
        begun, begin = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(begin, b"!")
            time.sleep(HANGS)
            os._exit(0)
        os.read(begun, 1)
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.kill(child, number)
            time.sleep(0.1)
        os.waitpid(child, 0)
        time.sleep(0.2)
        assert not signals.received and not ends


def test_a_killed_rank_takes_the_other_with_it(folder):
    codes, seconds, printed = ended(folder / "killed")
    assert codes == [1, -signal.SIGKILL], printed
    assert seconds < LOST, "the default timeout of a collective is half an hour"
    assert "lost rank 1" in printed


def test_bad_data_on_one_rank_ends_the_other(folder):
    codes, seconds, printed = ended(folder / "bad_data")
    assert codes == [1, 1], printed
    assert seconds < LOST
    assert "error (rank 1): broken.json cannot be read" in printed and "Traceback" not in printed


def test_a_crash_of_one_rank_ends_the_other_and_the_record(folder):
    codes, seconds, printed = ended(folder / "crash")
    assert codes == [1, 1], printed
    assert seconds < LOST
    assert printed.count("Traceback (most recent call last)") == 1 and "KeyError: 'loss_new'" in printed
    assert record(folder / "crash")["status"] == "failed"
    assert "lost rank 1" in record(folder / "crash")["message"]


def test_torchrun_starts_a_killed_run_again_by_itself(folder, tmp_path):
    flags = ["--config", folder / "Pretrain.yaml", "--output_dir", tmp_path, "--overrides", *SETTINGS]
    done = run(
        "tests/test_faults.py",
        *flags,
        num_processes=2,
        launcher="run",
        env={"PET_MAX_RESTARTS": "1", "PYTHONPATH": str(ROOT)},  # as torchrun --max-restarts=1
    )
    assert done.returncode == 0, done.stderr
    assert f"started again: going on from {tmp_path / 'checkpoint_0'}" in done.stdout, done.stdout
    assert_same_end(folder / "whole_2", tmp_path)


@pytest.fixture
def restarted(monkeypatch, tmp_path) -> Iterator:
    """`start`'s choice in a folder with a checkpoint of run "earlier", as torchrun starts "this" again."""
    torch.save({"run": "earlier"}, tmp_path / "checkpoint_07.pth")

    def choose(restarts: str, *flags: str) -> tuple[str, bool, str]:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        (tmp_path / "run.json").write_text(json.dumps({"run": "this", "job": run_record.this_job()}))
        args = script_arguments("x", "c", str(tmp_path)).parse_args(["--device", "cpu", *flags])
        run = start(args, {"precision": "fp32", "wandb": {}})
        return Path(run.checkpoint).name, run.resume, run.id

    return choose


def test_a_restart_does_not_take_an_earlier_runs_checkpoint_for_its_own(restarted, tmp_path):
    checkpoint, resume, found = restarted("1")
    assert (checkpoint, resume) == ("", False) and found not in ("", "earlier")
    torch.save({"run": "this"}, tmp_path / "checkpoint_00_000002.pth")  # nearer to its start
    assert restarted("1") == ("checkpoint_00_000002.pth", True, "this")
    assert restarted("0")[:2] == ("", False)  # the first start


def test_a_restart_before_the_run_has_said_what_it_is_takes_no_other_s_checkpoint(
    restarted, tmp_path, monkeypatch
):
    torch.save({"run": "this"}, tmp_path / "checkpoint_00_000002.pth")
    assert restarted("1") == ("checkpoint_00_000002.pth", True, "this")
    monkeypatch.setattr(launch, "this_job", lambda: "that of yesterday")
    assert restarted("1")[:2] == ("", False)


def test_a_job_is_the_same_over_restarts_whatever_program_lies_between(monkeypatch):
    """torchrun has a folder for each call, and in it one for each attempt; a wrapper is another process."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    jobs = []
    for call, attempt, parent in (("a", 0, 1), ("a", 1, 2), ("b", 1, 3)):
        file = f"/tmp/torchelastic_x/none_{call}/attempt_{attempt}/0/error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        jobs.append(run_record.this_job())
    assert jobs[0] == jobs[1] != jobs[2]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    assert run_record.this_job().endswith(" 3")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run_record.this_job() == "SLURM 7"


def test_a_restart_of_a_resumed_run_goes_on_from_its_own_last_checkpoint(restarted, tmp_path):
    flags = ["--resume", "--checkpoint", str(tmp_path / "checkpoint_07.pth")]
    assert restarted("1", *flags) == ("checkpoint_07.pth", True, "earlier")  # nothing of its own yet
    torch.save({"run": "this"}, tmp_path / "checkpoint_08.pth")
    assert restarted("1", *flags) == ("checkpoint_08.pth", True, "this")


def test_a_file_of_elsewhere_to_resume_is_said_where_the_folder_has_its_own(restarted, tmp_path, capsys):
    """Whoever starts a fine-tuning by a command with --checkpoint must not add --resume to that."""
    (tmp_path / "pretraining").mkdir()
    torch.save({"run": "earlier"}, tmp_path / "pretraining" / "checkpoint_15.pth")
    own, other = tmp_path / "checkpoint_07.pth", tmp_path / "pretraining" / "checkpoint_15.pth"
    for file, is_said in ((own, False), (other, True)):
        assert restarted("0", "--resume", "--checkpoint", str(file))[0] == file.name
        said = "".join(capsys.readouterr())
        assert (f"without --checkpoint it would go on from what {tmp_path} holds" in said) == is_said


if __name__ == "__main__":
    if "RANK" in os.environ:
        this_rank = int(os.environ["RANK"])
        if (this_rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, "1"):
            time.sleep(3)  # so that the other one could find the address it had before
        train("killed once", this_rank)
    else:
        torch.set_num_threads(1)
        multiprocessing.set_start_method("fork", force=True)
        run_all(Path(sys.argv[1]))
