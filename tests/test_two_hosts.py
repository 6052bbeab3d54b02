"""scripts/ on two machines, network namespaces joined by a virtual cable, and under a stand-in for SLURM."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ROOT, make_tiny

TIMEOUT_SECONDS = 300
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21
SRUN = """#!/usr/bin/env bash
# Runs the command as the tasks of a job, one on each machine, and ends with their highest code.
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_LOCALID=0 "$@" &
    pids+=($!)
done
echo "${pids[@]}" > "$JOB_FOLDER/pids.part"
mv "$JOB_FOLDER/pids.part" "$JOB_FOLDER/pids"
highest=0
for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    highest=$((code > highest ? code : highest))
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) echo localhost; echo "after $3" ;;
    *) echo "$@" >> "$JOB_FOLDER/scontrol" ;;
esac
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def environment(tmp_path):
    """With a folder ahead on PATH whose `python` is this one."""
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(programs / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def write_program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def flags(tiny: dict, out: Path, *overrides: str) -> list[str]:
    where = ["--config", str(tiny["Pretrain"]), "--output_dir", str(out), "--device", "cpu"]
    return ["Pretrain.py", *where, "--overrides", "batch_size=2", *overrides]


def ended(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def start(command: list[str], environment: dict) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    """What each printed, when all have ended; of a test that fails here nothing runs on: torchrun,
    told to stop, ends its processes, which are in sessions of their own.
    """
    try:
        return [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    finally:
        for number, seconds in ((signal.SIGTERM, 60), (signal.SIGKILL, 10)):
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(seconds)


# ---- two machines ----


def cannot_make_networks() -> str:
    """Why this process cannot make network namespaces, "" where it can: it takes root and iproute2, nothing
    else excuses this test.
    """
    if not shutil.which("ip"):
        return "needs the command ip (package iproute2)"
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    rights = int(status.split("CapEff:")[1].split()[0], 16)
    if not all(rights >> right & 1 for right in (CAP_NET_ADMIN, CAP_SYS_ADMIN)):
        return "needs root's rights CAP_NET_ADMIN and CAP_SYS_ADMIN, to make network namespaces"
    return ""


@pytest.fixture
def hosts():
    """Names of two network namespaces; their interfaces "cable" have the addresses 10.7.0.1 and 10.7.0.2."""
    names = [f"simla-{os.getpid()}-{letter}" for letter in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        first, second = ({"name": "cable", "netns": name} for name in names)
        ends = [[word for pair in end.items() for word in pair] for end in (first, second)]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.7.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names


@pytest.mark.skipif(bool(cannot_make_networks()), reason=cannot_make_networks() or "can")
def test_two_machines_train_together(hosts, tiny, tmp_path, environment):
    out = tmp_path / "out"
    environment |= {"PROCESSES": "1", "INTERFACE": "cable"}
    run = ["10.7.0.1", *flags(tiny, out)]
    as_host = ["unshare", "--uts", "sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"']
    processes = [
        start(
            ["ip", "netns", "exec", host, *as_host, host, "scripts/torchrun_nodes.sh", str(number), *run],
            environment,
        )
        for number, host in enumerate(hosts)
    ]
    printed = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    record = ended(out)
    assert (record["status"], record["num_hosts"], record["num_ranks"]) == ("done", 2, 2)
    assert [json.loads(line)["epoch"] for line in (out / "log.txt").read_text().splitlines()] == [0, 1]
    assert torch.load(out / "checkpoint_01.pth", weights_only=True)["epoch"] == 1


def test_the_script_for_several_machines_says_how_it_is_used(environment):
    (usage,) = outputs([start(["scripts/torchrun_nodes.sh", "0"], environment)])
    assert usage.startswith("One run on several machines") and "NUM_NODES" in usage


# ---- SLURM ----


@pytest.fixture
def slurm(environment, tmp_path):
    """What SLURM sets in a batch script of two machines with a task each, its commands on PATH."""
    write_program(tmp_path / "bin" / "srun", SRUN)
    write_program(tmp_path / "bin" / "scontrol", SCONTROL)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NTASKS": "2"}
    return environment | job | {"JOB_FOLDER": str(tmp_path), "INTERFACE": "lo"}


def test_a_job_saves_before_its_time_is_over_and_goes_on_when_it_is_queued_again(slurm, tiny, tmp_path):
    out = tmp_path / "out"
    job = start(["scripts/slurm.sbatch", *flags(tiny, out, "schedular.epochs=1000")], slurm)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while job.poll() is None and not (out / "train_steps.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    if job.poll() is None:
        for pid in (tmp_path / "pids").read_text().split():
            os.kill(int(pid), signal.SIGUSR1)  # as --signal=USR1@120 does
    printed = outputs([job])
    assert job.returncode == 75, printed
    record = ended(out)
    assert (record["status"], record["num_ranks"]) == ("stopped", 2), printed
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"

    reached = max(torch.load(path, weights_only=True)["epoch"] for path in out.glob("checkpoint_*.pth"))
    again = start(
        ["scripts/slurm.sbatch", *flags(tiny, out, f"schedular.epochs={reached + 2}")],
        slurm | {"SLURM_RESTART_COUNT": "1"},
    )
    printed = outputs([again])
    assert again.returncode == 0, printed
    assert "started again: going on from" in printed[0]
    epochs = [json.loads(line)["epoch"] for line in (out / "log.txt").read_text().splitlines()]
    assert epochs == list(range(reached + 2))
    assert ended(out)["status"] == "done"
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"  # not a second time


def test_the_batch_script_asks_for_what_it_counts_on():
    text = (ROOT / "scripts" / "slurm.sbatch").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / "slurm.sbatch"]).returncode == 0
    asked = dict(
        line[8:].split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH --") and "=" in line
    )
    assert asked["--signal"] == "USR1@120" and asked["--ntasks-per-node"] == asked["--gpus-per-node"]
    assert "#SBATCH --requeue\n" in text
