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
    world_size,
)

# ---- start and end ----


# Launcher -> its variables of rank, world size, local rank and the number of ranks on this machine.
LAUNCHERS = {
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
    "Open MPI's mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
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
                f"this SLURM job has {total} tasks, but a script started without srun is one process, which "
                "would wait for the others for ever: use srun, as in scripts/slurm.sbatch; for a single "
                "process, `srun --ntasks=1`"
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


def start(args: argparse.Namespace, config: dict) -> torch.device:
    """Joins the other processes, picks the device, seeds all generators (differently on each rank), locks the
    output folder, finds what to resume, sets an earlier run's logs aside and begins run.json; with --dry_run
    without these four. Sets args.run, the run's id, and for an evaluation args.output_dir, as
    `_evaluation_folder` says. From here on a stop signal ends the script at once, outside of `fit`.

    Raises UserError for another training in the folder, a --resume that finds nothing or comes with
    --evaluate, a GPU that is not there or lacks config `precision`, a taken port, an output folder that
    cannot be written, or Weights & Biases where config `wandb` asks for it and it is missing.
    """
    if args.resume and args.evaluate:
        raise UserError("--evaluate scores --checkpoint as it is, --resume trains on from it; leave one out")
    this_rank, num_ranks, local_rank = _launched_as()
    logging.basicConfig(
        level=logging.INFO if this_rank == 0 else logging.ERROR,
        format="%(message)s",
        stream=sys.stdout,
        force=True,
    )
    for note in args.notes:
        log.info(note)
    device = pick_device(args.device, local_rank)
    if num_ranks > 1 and not dist.is_initialized():
        try:
            _meet(args.dist_url, this_rank, num_ranks, device)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the {num_ranks} processes could not meet at {args.dist_url} (MASTER_ADDR="
                f"{os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}): "
                f"{first_line(error)}; is the port in use? Choose another with --master_port"
            ) from error
        watch_peers()
    if not (args.evaluate or args.dry_run):
        check_wandb(config)
    set_precision(device, config["precision"])
    if args.dry_run:
        args.run = "dry run"
    else:
        if args.evaluate:
            args.output_dir = _evaluation_folder(args)
        make_output_folder(args.output_dir)
        if is_main() and not args.evaluate and _script is not None:
            hold_folder(args.output_dir)
        run = _find_what_to_resume(args)
        (args.run,) = set(all_gather_objects(run)) - {""}  # the main rank's
        if is_main() and not args.evaluate:
            set_aside_logs(args.output_dir, args.run)
        resumed_from = args.checkpoint if args.resume else ""
        RunRecord(args.output_dir, args.run, config, device, resumed_from, is_training=not args.evaluate)
    if _script is not None:  # not before the processes have met: a handler has to wait for that
        # Ctrl-C is a KeyboardInterrupt here, which packages know.
        names = "SIGTERM", "SIGUSR1"
        _script.enter_context(StopSignals(config["stop_grace_seconds"], names, at_once=True, remedy=""))
    seed = args.seed + rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return device


def _meet(url: str, this_rank: int, num_ranks: int, device: torch.device) -> None:
    """Joins the other processes: NCCL on GPUs, gloo on CPUs.

    torchrun's store outlives a restart, and with it the addresses of the processes before: those started
    again meet under a name of their own. Only where one launcher counts the restarts, several may differ.
    """
    whom = f"the other {num_ranks - 1} of {num_ranks} processes" if this_rank == 0 else "rank 0"
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}" if url == "env://" else url
    with _say_while_waiting(f"rank {this_rank} waits at {where} for {whom}"):
        _join(url, this_rank, num_ranks, device)


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


def _join(url: str, this_rank: int, num_ranks: int, device: torch.device) -> None:
    store, this_rank, num_ranks = next(dist.rendezvous(url, this_rank, num_ranks))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart_{restarts}", store)
    is_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        store=store,
        rank=this_rank,
        world_size=num_ranks,
        device_id=device if is_gpu else None,
    )


def _evaluation_folder(args: argparse.Namespace) -> str:
    """Return where an evaluation writes: --output_dir, or where that holds a training, which may be going on,
    evaluation_NAME in it, after the checkpoint's name. All ranks come here.
    """
    folder = args.output_dir
    if is_main() and holds_training(folder):
        folder = str(Path(folder, f"evaluation_{Path(args.checkpoint).stem or 'without_training'}"))
        log.info(f"{args.output_dir} holds a training; what this evaluation writes goes to {folder}")
    return all_gather_objects(folder)[0]


def _find_what_to_resume(args: argparse.Namespace) -> str:
    """Sets args.checkpoint and args.resume on all ranks alike; returns the run's id on the main one, else "".

    --resume with --checkpoint: that file. --resume alone: the newest good one in the output folder. Without
    either, started again by torchrun or SLURM: the newest good one of this very run, if it wrote any.
    """
    found, run = args.checkpoint if args.resume else "", uuid.uuid4().hex[:12]
    if is_main() and not args.evaluate:
        restarts = [os.environ.get(name) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
        own = None
        if any(count not in (None, "", "0") for count in restarts) and (
            mine := previous_run(args.output_dir)
        ):
            own = newest_good(args.output_dir, mine)
        if own is not None:
            log.info(f"started again: going on from {own}")
            found = str(own)
        elif args.resume and not found:
            newest = newest_good(args.output_dir)
            if newest is None:
                raise UserError(
                    f"--resume: {args.output_dir} holds no good checkpoint; leave it out to start the run, "
                    "or name a file with --checkpoint"
                )
            found = str(newest)
        elif found:
            check_undamaged(found)
        if found:
            run = load_checkpoint(found).get("run", run)
        elif run_checkpoints(args.output_dir):
            log.info(
                f"{args.output_dir} holds checkpoints of an earlier run, which this one will overwrite as it "
                "gets there; --resume would continue it"
            )
    found = all_gather_objects(found)[0]
    if found:
        args.checkpoint, args.resume = found, True
    return run if is_main() else ""


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
    """'True', 'false', '1', 'no', ... as a flag's value."""
    if text.lower() in ("true", "t", "yes", "y", "1", "on"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def seed_number(text: str) -> int:
    """A seed of all generators, ranks added; numpy's are of 32 bits."""
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**31:
        raise argparse.ArgumentTypeError(f"expected an int from 0 to {2**31 - 1}, got {text!r}")
    return seed


def add_flag(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    """A boolean flag that takes `--name`, `--name True` and `--name False`."""
    parser.add_argument(name, nargs="?", const=True, default=False, type=boolean, help=help)


def script_arguments(description: str, config: str, output_dir: str) -> argparse.ArgumentParser:
    """The flags that all task scripts share."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    parser.add_argument("--config", default=config, help="YAML file (default: %(default)s)")
    parser.add_argument("--output_dir", default=output_dir, help="where results go (default: %(default)s)")
    parser.add_argument("--checkpoint", default="", help="weights to start from")
    add_flag(
        parser, "--resume", "continue the run that --checkpoint was saved by, or the newest of --output_dir"
    )
    add_flag(parser, "--evaluate", "no training")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        nargs="?",
        const="steps",
        default="",
        choices=("steps", "estimate"),
        help="two steps on random input: memory, speed, length of the run; `estimate`: of a GPU, without it",
    )
    parser.add_argument("--text_encoder", default="", help="BERT name or folder; replaces the config's")
    parser.add_argument("--text_decoder", default="", help="VQA: where the decoder's BERT weights come from")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--seed", default=42, type=seed_number)
    parser.add_argument(
        "--world_size", default=1, type=int, help="read from the launcher; kept for old commands"
    )
    parser.add_argument(
        "--dist_url", default="env://", help="where the processes meet (default: %(default)s)"
    )
    parser.add_argument(  # from torch.distributed.launch without --use_env; LOCAL_RANK says the same
        "--local-rank", "--local_rank", default=0, type=int, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--distributed", nargs="?", const=True, default=True, type=boolean, help="as --world_size"
    )
    add_overrides(parser)
    parser.set_defaults(notes=[])  # on the config, see `parse`
    return parser
