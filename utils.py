"""Start-up and what every script shares: errors for people, distributed helpers, flags, the training log.

Every helper works without a process group, as one process of one.
"""

import argparse
import datetime
import json
import logging
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("simla")


class UserError(Exception):
    """Something the user can mend: one clear sentence that names the file or key and the remedy."""


# ---- processes ----


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _launched_as() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's or SLURM's variables, else one process."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                "SLURM started several tasks but MASTER_ADDR is not set; in the batch script: export "
                "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1) MASTER_PORT=29500"
            )
        os.environ.setdefault("MASTER_PORT", "29500")
        return tuple(int(os.environ[key]) for key in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    return 0, 1, 0


def start(args: argparse.Namespace) -> torch.device:
    """Joins the other processes, picks the device, seeds all generators (differently on each rank).

    Raises UserError for --resume without a checkpoint or with --evaluate, a GPU that is not there, a taken
    port, or an output folder that cannot be written.
    """
    if args.resume and not args.checkpoint:
        raise UserError("--resume continues the run that saved --checkpoint; name that file too")
    if args.resume and args.evaluate:
        raise UserError("--evaluate scores --checkpoint as it is, --resume trains on from it; leave one out")
    this_rank, num_ranks, local_rank = _launched_as()
    logging.basicConfig(
        level=logging.INFO if this_rank == 0 else logging.ERROR,
        format="%(message)s",
        stream=sys.stdout,
        force=True,
    )
    device = _pick_device(args.device, local_rank)
    if num_ranks > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend,
                init_method=args.dist_url,
                rank=this_rank,
                world_size=num_ranks,
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the {num_ranks} processes could not meet at {args.dist_url} (MASTER_ADDR="
                f"{os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}): "
                f"{first_line(error)}; is the port in use? Choose another with --master_port"
            ) from error
    make_output_folder(args.output_dir)
    seed = args.seed + rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return device


def _pick_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        local_rank = (
            0 if num_gpus == 1 and "SLURM_LOCALID" in os.environ else local_rank
        )  # one GPU bound per task
        index = local_rank if device.index is None else device.index
        if index >= num_gpus:
            raise UserError(
                f"--device {name}: GPU {index} asked for, {num_gpus} found; use --device cpu or start "
                "fewer processes"
            )
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    return device


def make_output_folder(folder: str) -> Path:
    """Creates the folder and proves that a file can be written there; UserError if not."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_test_{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from error
    return path


def run_script(main: Callable[[], None]) -> None:
    """Runs a task script: a UserError ends it as one sentence and exit code 1, without a traceback.

    Every rank ends at once, so that none waits for one that failed.
    """
    try:
        main()
    except UserError as error:
        print(f"error (rank {rank()}): {error}" if world_size() > 1 else f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    except RuntimeError as error:
        if world_size() == 1 or ("by peer" not in str(error) and "NCCL" not in str(error)):
            raise
        print(f"error (rank {rank()}): lost another process, whose own message says why", file=sys.stderr)
        os._exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        os._exit(130)
    finally:
        sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@torch.no_grad()
def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all ranks in rank order, (n * ranks, ...); the same n everywhere; no gradient."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def all_gather_objects(value: object) -> list:
    """Any small picklable value of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A port on this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- flags ----


def boolean(text: str) -> bool:
    """'True', 'false', '1', 'no', ... as a flag's value."""
    if text.lower() in ("true", "t", "yes", "y", "1", "on"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


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
        parser, "--resume", "continue the run that --checkpoint was saved by: optimiser, schedule, epoch"
    )
    add_flag(parser, "--evaluate", "no training")
    parser.add_argument("--text_encoder", default="", help="BERT name or folder; replaces the config's")
    parser.add_argument("--text_decoder", default="", help="VQA: where the decoder's BERT weights come from")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--seed", default=42, type=int)
    parser.add_argument(
        "--world_size", default=1, type=int, help="read from the launcher; kept for old commands"
    )
    parser.add_argument(
        "--dist_url", default="env://", help="where the processes meet (default: %(default)s)"
    )
    parser.add_argument(
        "--distributed", nargs="?", const=True, default=True, type=boolean, help="as --world_size"
    )
    parser.add_argument(
        "--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="config values, a.b=c"
    )
    return parser


# ---- log ----


class MetricLog:
    """Running means of named values; they stay tensors until they are read."""

    def __init__(self):
        self.sums: dict[str, Tensor | float] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor | float]) -> None:
        for name, value in values.items():
            value = value.detach().double() if isinstance(value, Tensor) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, float]:
        """Means over this rank's additions."""
        return {name: float(total) / max(self.count, 1) for name, total in self.sums.items()}

    def global_means(self) -> dict[str, float]:
        """Means over the additions of all ranks, weighted by their number."""
        gathered = all_gather_objects(({name: float(total) for name, total in self.sums.items()}, self.count))
        total = sum(count for _, count in gathered)
        names = gathered[0][0]
        return {name: sum(sums.get(name, 0.0) for sums, _ in gathered) / max(total, 1) for name in names}


def with_progress(
    items: Iterable, total: int, header: str, log_steps: int, describe: Callable[[], str] = lambda: ""
) -> Iterator:
    """Passes the items through and logs a line with the ETA every `log_steps` items and at the last."""
    begin = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done % log_steps == 0 or done == total:
            seconds = (time.monotonic() - begin) / done
            eta = datetime.timedelta(seconds=int(seconds * (total - done)))
            memory = (
                f"  max mem {torch.cuda.max_memory_allocated() >> 20} MiB"
                if torch.cuda.is_available()
                else ""
            )
            log.info(f"{header}  [{done}/{total}]  eta {eta}  {describe()}  {seconds:.3f} s/it{memory}")


def append_log(output_dir: str, record: dict) -> None:
    """One JSON object a line in log.txt; on the main rank only."""
    if is_main():
        with (Path(output_dir) / "log.txt").open("a") as file:
            file.write(json.dumps(record) + "\n")


def save_result(output_dir: str, name: str, content: dict | list) -> None:
    """Writes result/<name>.json; on the main rank only."""
    if is_main():
        folder = Path(output_dir) / "result"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
