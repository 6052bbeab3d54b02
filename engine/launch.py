"""Start and end of every script: flags, processes, device, seeds, what to resume, run.json, exit codes."""

import argparse
import logging
import os
import random
import re
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from simla.checkpoint.save import check_undamaged, load_checkpoint, newest_good, run_checkpoints
from simla.configs.reader import add_overrides
from simla.dataset.loaders import loader_problem
from simla.engine.command import run_command
from simla.engine.exit import end_process, end_stopped
from simla.engine.peers import leave_together, stop_others, wait_for_news, watch_peers
from simla.engine.run_log import check_wandb
from simla.engine.run_record import (
    RunRecord,
    hold_folder,
    holds_training,
    previous_run,
    release_folder,
    set_aside_logs,
    this_job,
)
from simla.engine.signals import Stopped, StopSignals
from simla.utils import (
    UserError,
    all_gather_objects,
    first_line,
    is_main,
    log,
    make_output_folder,
    pick_device,
    rank,
    set_precision,
    shipped,
    world_size,
)

# ---- start ----

OPEN_MPI = "OMPI_COMM_WORLD_"
LAUNCHERS = {  # its variables of rank, world size, local rank and the number of ranks on this machine
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
    "Open MPI's mpirun": tuple(OPEN_MPI + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH's, Intel's
}
WAITING_SAID_AFTER_SECONDS, WAITING_SAID_EVERY_SECONDS = 10, 60


def _launched_as() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from the variables of torchrun, SLURM or mpirun, else of a single
    process.

    Sets MASTER_PORT, and on one machine MASTER_ADDR, where mpirun or SLURM leave them out. Raises UserError
    where nothing says at which machine the ranks meet, or how many there are.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))
    for launcher, (this_rank, num_ranks, local_rank, num_local) in LAUNCHERS.items():
        total = int(os.environ.get(num_ranks) or 1)
        if total == 1 or this_rank not in os.environ:
            continue
        if launcher == "SLURM" and "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ:
            raise UserError(
                f"this SLURM job has {total} tasks, but a script without srun is one process, which waits "
                "for the others for ever: use srun, as in scripts/slurm.sbatch (`srun --ntasks=1` for one)"
            )
        if local_rank not in os.environ:
            raise UserError(f"{launcher} started {total} processes but {local_rank} is not set; use torchrun")
        if os.environ.get(num_local) == str(total):
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_ADDR" not in os.environ:
            address = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)"
            raise UserError(
                f"{launcher} started several processes but MASTER_ADDR, the machine of the first one, is not "
                f"set; in the batch script: export MASTER_ADDR={address if launcher == 'SLURM' else 'HOST'} "
                "MASTER_PORT=29500" + " and mpirun -x MASTER_ADDR -x MASTER_PORT" * ("Open" in launcher)
            )
        os.environ.setdefault("MASTER_PORT", "29500")
        return int(os.environ[this_rank]), total, int(os.environ[local_rank])
    if "PMIX_RANK" in os.environ and not any(names[1] in os.environ for names in LAUNCHERS.values()):
        raise UserError(
            "an MPI launcher (PMIX_RANK) started this, which does not say how many processes there "
            "are; use torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR"
        )
    return 0, 1, 0


class Run(NamedTuple):
    """A script's run as `start` has begun it; it stays the same to its end."""

    device: torch.device
    output_dir: str
    seed: int
    id: str  # the same in its checkpoints and in run.json
    checkpoint: str  # whose weights it starts from or, with `resume`, whose training goes on; "" for none
    resume: bool
    evaluate: bool  # no training
    dry_run: str  # "", "steps" or "estimate"
    chance: dict[str, float]  # loss -> its value for a model that knows nothing, in nats


def start(args: argparse.Namespace, config: dict, chance: dict[str, float] | None = None) -> Run:
    """Join the other processes, pick the device, seed all generators, lock the output folder, find what to
    resume, set an earlier run's logs aside and begin run.json; with --dry_run without these
    four. From here on a stop signal ends the script at once, outside of `fit`.

    All ranks have the same seed, so that they make the same model; each epoch seeds them differently.

    Raises UserError for another training in the folder, a --resume that finds nothing or comes with
    --evaluate, a GPU that is not there or lacks config `precision`, a taken port, an output folder that
    cannot be written, or Weights & Biases where config `wandb` asks for it and it is missing.
    """
    if args.resume and args.evaluate:
        raise UserError("--evaluate scores --checkpoint as it is, --resume trains on from it; leave one out")
    this_rank, num_ranks, local_rank = _launched_as()
    level = logging.INFO if this_rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    for note in args.notes:
        log.info(note)
    device = pick_device(args.device, local_rank)
    if num_ranks > 1 and not dist.is_initialized():
        _meet(args.dist_url, this_rank, num_ranks, device)
        watch_peers()
    if not (args.evaluate or args.dry_run):
        check_wandb(config)
    set_precision(device, config["precision"])
    flags = args.checkpoint, args.resume, args.evaluate, args.dry_run
    run = Run(device, args.output_dir, args.seed, "dry run", *flags, chance or {})
    if not run.dry_run:
        run = _begin(run, config)
    if _script is not None:  # not before the processes have met: a handler has to wait for that
        # Ctrl-C is a KeyboardInterrupt here, which packages know.
        names = "SIGTERM", "SIGUSR1"
        _script.enter_context(StopSignals(config["stop_grace_seconds"], names, at_once=True, remedy=""))
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    return run


def _begin(run: Run, config: dict) -> Run:
    """Make the output folder this run's; return the run with that folder, its id and what it resumes."""
    if run.evaluate:
        run = run._replace(output_dir=_evaluation_folder(run.output_dir, run.checkpoint))
    make_output_folder(run.output_dir)
    resumed, run_id = "", uuid.uuid4().hex[:12]
    if is_main() and not run.evaluate:
        if _script is not None:
            hold_folder(run.output_dir)
        resumed = _what_to_resume(run.output_dir, run.checkpoint, run.resume)
        run_id = load_checkpoint(resumed).get("run", run_id) if resumed else run_id
    resumed, run_id = all_gather_objects((resumed, run_id))[0]
    run = run._replace(id=run_id, checkpoint=resumed or run.checkpoint, resume=bool(resumed))
    if is_main() and not run.evaluate:
        set_aside_logs(run.output_dir, run.id)
    RunRecord(run.output_dir, run.id, config, run.device, resumed, not run.evaluate, run.chance)
    return run


def _evaluation_folder(folder: str, checkpoint: str) -> str:
    """Return where an evaluation writes: `folder`, or where that holds a training, which may be going on,
    evaluation_NAME in it, after the checkpoint's name. All ranks come here.
    """
    target = folder
    if is_main() and holds_training(folder):
        target = str(Path(folder, f"evaluation_{Path(checkpoint).stem or 'without_training'}"))
        log.info(f"{folder} holds a training; what this evaluation writes goes to {target}")
    return all_gather_objects(target)[0]


def _what_to_resume(folder: str, checkpoint: str, resume: bool) -> str:
    """Return the checkpoint that the run goes on from, "" for none.

    --resume with --checkpoint: that file. --resume alone: the furthest good one of the run that was last
    started in the folder, or, where it saved none, of the run that wrote last. Either way, and without
    --resume, where torchrun or SLURM started the run again: its own furthest good one, if it wrote any.
    """
    restarts = [os.environ.get(name) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    is_restart = any(count not in (None, "", "0") for count in restarts)
    if is_restart and (run := previous_run(folder, this_job())) and (newest := newest_good(folder, run)):
        log.info(f"started again: going on from {newest}")
        return str(newest)
    if resume and checkpoint:
        check_undamaged(checkpoint)
        if run_checkpoints(folder) and Path(checkpoint).parent.resolve() != Path(folder).resolve():
            log.warning(
                f"--resume goes on from --checkpoint {checkpoint}; without --checkpoint it would go on from "
                f"what {folder} holds"
            )
        return checkpoint
    if resume:
        run = previous_run(folder)
        newest = newest_good(folder, run) if run else None
        if newest is None and (newest := newest_good(folder)) and run:
            log.warning(
                f"the run that was last started in {folder} saved nothing; {newest} is of an earlier one"
            )
        if newest:
            return str(newest)
        raise UserError(
            f"--resume: {folder} holds no good checkpoint; leave it out to start the run, or name a file "
            "with --checkpoint"
        )
    if run_checkpoints(folder):
        log.info(
            f"{folder} holds checkpoints of an earlier run, which this one will overwrite as it gets there; "
            "--resume would continue it"
        )
    return ""


def _meet(url: str, this_rank: int, num_ranks: int, device: torch.device) -> None:
    """Join the other processes: NCCL on GPUs, gloo on CPUs. Raise UserError where they cannot meet.

    torchrun's store outlives a restart, and with it the addresses of the processes before: those started
    again meet under a name of their own. Only where one launcher counts the restarts, several may differ.
    """
    address, port = (os.environ.get(f"MASTER_{name}") for name in ("ADDR", "PORT"))
    whom = f"the other {num_ranks - 1} of {num_ranks} processes" if this_rank == 0 else "rank 0"
    where = f"{address}:{port}" if url == "env://" else url
    restarts, is_gpu = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), device.type == "cuda"
    try:
        with _say_while_waiting(f"rank {this_rank} waits at {where} for {whom}"):
            store, this_rank, num_ranks = next(dist.rendezvous(url, this_rank, num_ranks))
            if restarts != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
                store = dist.PrefixStore(f"restart_{restarts}", store)
            where_from = {"store": store, "rank": this_rank, "world_size": num_ranks}
            backend, device_id = ("nccl", device) if is_gpu else ("gloo", None)
            dist.init_process_group(backend, **where_from, device_id=device_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {num_ranks} processes could not meet at {url} (MASTER_ADDR={address}, MASTER_PORT={port}): "
            f"{first_line(error)}; is the port in use? Choose another with --master_port"
        ) from error


@contextmanager
def _say_while_waiting(message: str) -> Iterator[None]:
    """Print the message where what is inside takes long, again and again."""
    done = threading.Event()

    def say() -> None:
        seconds = WAITING_SAID_AFTER_SECONDS
        while not done.wait(seconds):
            print(message, flush=True)
            seconds = WAITING_SAID_EVERY_SECONDS

    threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        done.set()


# ---- end ----

_script: ExitStack | None = None  # what ends with the script that `run_script` runs


def run_script(main: Callable[[], object]) -> None:
    """Run a task script as `run_command` does, and end run.json.

    A stop signal ends it with exit code 75, "resumable", once what is trained is saved, and with the shell's
    code for that signal where no training could go on. What is being written is finished first, and every
    rank ends at once, so that none waits for one that failed.
    """
    run_command(partial(_run_ranks, main), end=partial(end_process, status="failed"))


def _run_ranks(main: Callable[[], object]) -> object:
    global _script
    try:
        with ExitStack() as _script:
            result = main()
    except UserError as error:
        who = f" (rank {rank()})" if world_size() > 1 else ""
        end_process(1, "failed", f"error{who}: {error}")
    except Stopped as stop:
        end_stopped(stop.signal_name, str(stop))
    except KeyboardInterrupt as interrupt:
        stop_others()
        end_stopped("SIGINT", str(interrupt) or "interrupted")
    except Exception as error:
        if problem := loader_problem(error):
            end_process(1, "failed", f"error (rank {rank()}): {problem}")
        if world_size() > 1 and isinstance(error, RuntimeError) and re.search("by peer|NCCL", str(error)):
            wait_for_news()  # which ends this process, and says why
            end_process(1, "failed", f"error (rank {rank()}): lost another process, whose message says why")
        if RunRecord.current:
            what = "".join(traceback.format_exception_only(error))
            RunRecord.current.finish("failed", what.splitlines()[0])
        raise
    finally:
        _script = None
    if RunRecord.current:
        RunRecord.current.finish("done")
        RunRecord.current = None
    if dist.is_initialized():
        leave_together()
        dist.destroy_process_group()
    release_folder()
    return result


# ---- flags ----


def boolean(text: str) -> bool:
    """Return the value of a flag that is 'True', 'false', '1', 'no', ..."""
    for value, words in ((True, "true t yes y 1 on"), (False, "false f no n 0 off")):
        if text.lower() in words.split():
            return value
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def seed_number(text: str) -> int:
    """Return a seed of all generators; numpy's are of 32 bits."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected an int from 0 to {2**31 - 1}, got {text!r}")
    return int(text)


def add_flag(parser: argparse.ArgumentParser, name: str, help: str, default: bool = False) -> None:
    """Add a flag that takes `--name`, `--name True` and `--name False`."""
    parser.add_argument(name, nargs="?", const=True, default=default, type=boolean, help=help)


def script_arguments(description: str, config: str, output_dir: str) -> argparse.ArgumentParser:
    """Return a parser of the flags that all task scripts share."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    add = parser.add_argument
    resume = "continue the run that --checkpoint was saved by, or the newest of --output_dir"
    add("--config", default=shipped(config), help="YAML file (default: %(default)s)")
    add("--output_dir", default=output_dir, help="where results go (default: %(default)s)")
    add("--checkpoint", default="", help="weights to start from")
    add_flag(parser, "--resume", resume)
    add_flag(parser, "--evaluate", "no training")
    text = "two steps on random input: memory, speed, length of the run; `estimate`: of a GPU, without it"
    kinds = {"nargs": "?", "const": "steps", "default": "", "choices": ("steps", "estimate")}
    add("--dry_run", "--dry-run", **kinds, help=text)
    add("--text_encoder", default="", help="BERT name or folder; replaces the config's")
    add("--text_decoder", default="", help="VQA: where the decoder's BERT weights come from")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--seed", default=42, type=seed_number, help="of all generators (default: %(default)s)")
    add("--dist_url", default="env://", help="where the processes meet (default: %(default)s)")
    # What published commands and torch.distributed.launch give; the launcher's variables say the same.
    add("--world_size", default=1, type=int, help=argparse.SUPPRESS)
    add("--local-rank", "--local_rank", default=0, type=int, help=argparse.SUPPRESS)
    add_flag(parser, "--distributed", argparse.SUPPRESS, default=True)
    add_overrides(parser)
    parser.set_defaults(notes=[])  # on the config, see `parse`
    return parser
