"""How a process learns its rank from torchrun, SLURM and mpirun, and what it says while it waits."""

import os
import time

import pytest

from simla.engine import launch
from simla.engine.launch import _launched_as, _say_while_waiting, script_arguments
from simla.utils import UserError

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "3",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No launcher's variables."""
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "MPI_", "SLURM_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")):
            monkeypatch.delenv(name)


def launched(monkeypatch, variables: dict[str, str]) -> tuple[int, int, int]:
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(os, "environ", dict(os.environ))  # what is set in it goes with it
        return (*_launched_as(), os.environ.get("MASTER_ADDR"))


def test_ranks_of_every_launcher(monkeypatch):
    assert launched(monkeypatch, {}) == (0, 1, 0, None)
    assert launched(monkeypatch, OPEN_MPI) == (3, 4, 3, "127.0.0.1")
    assert launched(monkeypatch, MPICH) == (1, 2, 1, "127.0.0.1")
    assert launched(monkeypatch, STEP | {"MASTER_ADDR": "a"}) == (3, 4, 1, "a")
    torchrun = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1"}
    assert launched(monkeypatch, BATCH | torchrun) == (5, 6, 1, None)  # torchrun in a batch script
    two_hosts = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert launched(monkeypatch, two_hosts | {"MASTER_ADDR": "a"}) == (3, 4, 1, "a")


def test_one_process_of_any_launcher_is_one_process(monkeypatch):
    for variables in (OPEN_MPI, MPICH, STEP):
        sizes = {name: "1" for name in variables if name.endswith(("SIZE", "NTASKS", "NRANKS"))}
        assert launched(monkeypatch, variables | sizes)[:3] == (0, 1, 0)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (BATCH, "use srun"),
        (BATCH | {"MASTER_ADDR": "a"}, "use srun"),
        (STEP, "MASTER_ADDR=.*scontrol"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x MASTER_ADDR"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is not set"),
        ({"PMIX_RANK": "1"}, "does not say how many"),
    ],
)
def test_what_would_run_twice_or_wait_for_ever_is_refused(variables, told, monkeypatch):
    with pytest.raises(UserError, match=told):
        launched(monkeypatch, variables)


def test_a_wait_for_peers_says_whom_it_waits_for(monkeypatch, capsys):
    monkeypatch.setattr(launch, "WAITING_SAID_AFTER_SECONDS", 0.01)
    with _say_while_waiting("rank 1 waits at a:1 for rank 0"):
        time.sleep(0.2)
    assert capsys.readouterr().out == "rank 1 waits at a:1 for rank 0\n"
    with _say_while_waiting("never"):
        pass
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_the_older_launcher_s_flag_is_accepted():
    for flag in ("--local-rank=1", "--local_rank=1"):
        assert script_arguments("x", "c", "o").parse_args([flag, "--seed", "3"]).seed == 3
