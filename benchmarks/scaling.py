"""Training on 1 and 2 ranks over gloo, each on one core: what data-parallel training costs.

python benchmarks/scaling.py [--scale tiny]

A pre-training step of the demo's model with the batch of each rank fixed, through the wrapper that training
uses; inputs are random. Ideal is twice the samples a second; what is missing is the gathering of features,
the sum of gradients, and what two processes take from each other (memory bandwidth, cores).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from measure import TINY, arguments, last_line, row
from train_step import inputs

from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN
from simla.engine.data_parallel import distribute
from simla.models.pretrain import SIMLA
from simla.optim import create_optimizer
from simla.utils import free_port

BATCH, WARM_UP = 32, 3
CPU = torch.device("cpu")


def measure(scale: str, steps: int) -> dict:
    """Return the seconds a step of this rank."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    overrides = ["init=scratch"]
    if scale == "tiny":
        overrides += [*TINY, "vit.patch_size=8", "num_masking_patches=5"]
    config = read_config(str(ROOT / "configs/demo/Pretrain.yaml"), PRETRAIN, overrides)
    model = SIMLA.from_config(config, cls_id=1)
    wrapped = distribute(model, CPU)
    optimizer = create_optimizer(model, config["optimizer"])
    batch = inputs(config, "pretrain", BATCH, CPU)
    codes = config["image_tokenizer"]["vocab_size"]
    batch["visual_codes"] = torch.randint(codes, batch["patch_mask"].shape)
    del batch["code_view"]
    seconds = []
    for _ in range(WARM_UP + steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        sum(wrapped(**batch, alpha=0.4).values()).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[WARM_UP:])}


def run(args: argparse.Namespace, num_ranks: int) -> float:
    """Return the slowest rank's seconds a step."""
    command = [sys.executable, __file__, "--scale", args.scale, "--steps", str(args.steps), "--measure"]
    port = str(free_port())
    ranks = []
    for rank in range(num_ranks):
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit("a rank failed, see above")
    return max(json.loads(output.splitlines()[-1])["seconds"] for output in outputs)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=8, help="timed ones")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.scale, args.steps)))
        return
    seconds = {num_ranks: run(args, num_ranks) for num_ranks in (1, 2)}
    rates = {num_ranks: num_ranks * BATCH / taken for num_ranks, taken in seconds.items()}
    row("ranks", *seconds)
    row("seconds a step", *seconds.values())
    row("samples a second", *rates.values())
    ratio = rates[2] / rates[1]
    print(f"2 ranks: {ratio:.2f} times the samples a second of 1")
    figures = {"seconds_1": seconds[1], "seconds_2": seconds[2], "batch": BATCH, "scale": args.scale}
    last_line({"ratio": ratio, **figures}, CPU)


if __name__ == "__main__":
    main()
