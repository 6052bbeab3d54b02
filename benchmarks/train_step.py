"""A training step, ours against the plain formulation: seconds, arithmetic, peak memory, equal losses.

python benchmarks/train_step.py [--task retrieval] [--batch 4] [--device cuda] [--precision bf16] [--compile]

The model of configs/Pretrain.yaml (256 x 256, 25 tokens) or configs/Retrieval_coco.yaml (384 x 384) with
random weights and inputs; a step is the image tokenizer, forward, backward and AdamW. Either way is a process
of its own, so that its peak memory means something. The first step, without dropout and with given negatives,
shows that the losses are equal; the others are timed. plain.py says what plain means.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from measure import TINY, arguments, last_line, row, utilization
from plain import PlainRetrieval, PlainSIMLA
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN, RETRIEVAL
from simla.engine.data_parallel import compile_layers, set_checkpointing
from simla.engine.measure import clock, peak_bytes
from simla.engine.memory import estimate
from simla.models.align import Draws
from simla.models.bert_config import BertConfig
from simla.models.dvae import DalleEncoder
from simla.models.pretrain import SIMLA, PretrainBatch
from simla.models.retrieval import RetrievalBatch, SIMLARetrieval
from simla.optim import create_optimizer
from simla.utils import autocast, set_precision, true_indices

TOKENS, WORDS_MASKED, PATCHES_MASKED = 25, 4, 75
FIGURES = "seconds", "cpu_seconds", "peak_bytes"
TASKS = {  # config, its table, our model, the plain one, their batch
    "pretrain": ("configs/Pretrain.yaml", PRETRAIN, SIMLA, PlainSIMLA, PretrainBatch),
    "retrieval": ("configs/Retrieval_coco.yaml", RETRIEVAL, SIMLARetrieval, PlainRetrieval, RetrievalBatch),
}


def settings(args: argparse.Namespace) -> dict:
    path, table, *_ = TASKS[args.task]
    overrides = ["test_file=none"] if args.task == "retrieval" else []
    if args.scale == "tiny":
        overrides += [*TINY, "queue_size=64", "vit.patch_size=8"]
        overrides += (
            ["image_tokenizer.vocab_size=64", "num_masking_patches=5"] if args.task == "pretrain" else []
        )
    return read_config(str(ROOT / path), table, overrides)


# ---- one way, in a process of its own ----


def inputs(config: dict, task: str, batch: int, device: torch.device) -> dict:
    """Return random inputs, the same for both ways."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = BertConfig.read(config["bert_config"]).vocab_size
    text_ids = torch.randint(110, vocab_size, (batch, TOKENS), generator=generator)
    found = {
        "image": torch.randn(batch, 3, *[config["image_res"]] * 2, generator=generator),
        "text_ids": text_ids,
        "text_mask": torch.ones_like(text_ids),
    }
    if task == "retrieval":
        found["idx"] = torch.arange(batch)
    else:
        patches = (config["image_res"] // config["vit"]["patch_size"]) ** 2
        words = torch.rand(batch, TOKENS - 1, generator=generator).topk(WORDS_MASKED).indices + 1
        labels = torch.full_like(text_ids, -100).scatter(1, words, text_ids.gather(1, words))
        hidden = (
            torch.rand(batch, patches, generator=generator).topk(min(PATCHES_MASKED, patches // 3)).indices
        )
        patch_mask = torch.zeros(batch, patches, dtype=torch.bool).scatter(1, hidden, True)
        found |= {
            "mlm_ids": text_ids.masked_fill(labels != -100, 103),
            "mlm_labels": labels,
            "patch_mask": patch_mask,
            "mlm_indices": true_indices(labels != -100),
            "mim_indices": true_indices(patch_mask),
            "code_view": torch.rand(batch, 3, *[8 * int(patches**0.5)] * 2, generator=generator),
        }
    return {name: value.to(device) for name, value in found.items()}


def build(args: argparse.Namespace, config: dict, device: torch.device) -> list[nn.Module]:
    """Return the model that `args.measure` names and, in pre-training, the image tokenizer."""
    model_class = TASKS[args.task][3 if args.measure == "plain" else 2]
    extra = {"cls_id": 101} if args.task == "pretrain" else {}
    model = model_class.from_config(config, **extra).to(device)
    set_checkpointing(model, args.checkpoint_activations)
    if args.task == "retrieval":
        return [model]
    tokenizer = DalleEncoder(*((8, 64) if args.scale == "tiny" else ())).to(device)
    return [model, tokenizer.to(memory_format=torch.channels_last)]


def losses_of(
    args: argparse.Namespace,
    batch: dict[str, Tensor],
    model: nn.Module,
    *tokenizer: nn.Module,
    draws: Draws | None = None,
) -> dict[str, Tensor]:
    if tokenizer:
        batch = {**batch, "visual_codes": tokenizer[0](batch["code_view"])}
    fields = TASKS[args.task][4]
    return model(fields(*(batch[name] for name in fields._fields)), 0.4, draws)


def flops_of_sample(args: argparse.Namespace) -> float:
    """Return the FLOPs of our step for one sample, counted without computing it."""
    config, meta = settings(args), torch.device("meta")
    batch = inputs(config, args.task, args.batch, torch.device("cpu"))
    args = argparse.Namespace(**{**vars(args), "measure": "ours"})

    def loss(*modules: nn.Module) -> Tensor:
        return sum(losses_of(args, batch, *modules).values())

    return estimate(lambda: build(args, config, meta), loss, args.precision).flops / args.batch


def measure(args: argparse.Namespace) -> dict:
    """Return seconds a step, peak memory, the first step's losses, where the time goes."""
    config, device = settings(args), torch.device(args.device)
    set_precision(device, args.precision)
    torch.manual_seed(0)
    model, *tokenizer = build(args, config, device)
    optimizer = create_optimizer(model, {"opt": "adamw", "lr": 1e-4, "weight_decay": 0.02})
    batch = inputs(config, args.task, args.batch, device)
    others = torch.arange(args.batch, device=device).roll(1)

    def step(draws: Draws | None = None) -> dict[str, Tensor]:
        optimizer.zero_grad()
        with autocast(device, args.precision):
            named = losses_of(args, batch, model, *tokenizer, draws=draws)
        sum(named.values()).backward()
        optimizer.step()
        return named

    model.eval()
    losses = {name: loss.item() for name, loss in step(Draws(others, others)).items()}
    model.train()
    if args.compile and args.measure == "ours":
        compile_layers(model)
        step()
    begin = time.process_time()
    seconds = [clock(step, device)[0] for _ in range(args.steps)]
    found = {
        "seconds": statistics.median(seconds),
        "cpu_seconds": (time.process_time() - begin) / args.steps,
        "peak_bytes": peak_bytes(device),
        "losses": losses,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if args.profile:
        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
            step()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda e: -operator_time(e, on_gpu))
        total = sum(operator_time(event, on_gpu) for event in events)
        found["profile"] = [
            {"operator": e.key, "share": operator_time(e, on_gpu) / total, "calls": e.count}
            for e in events[:15]
        ]
        found["profile_by"] = order
    return found


def operator_time(event, on_gpu: object) -> float:
    return event.self_device_time_total if on_gpu else event.self_cpu_time_total


# ---- the whole ----


def run(args: argparse.Namespace, way: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"a measurement failed, see above: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def report(args: argparse.Namespace, ways: dict[str, dict]) -> dict:
    device, flops = torch.device(args.device), flops_of_sample(args)
    print(f"\n{args.task}, {args.scale} size, batch {args.batch}, {args.precision}, {args.device}")
    row("", *ways)
    row("seconds a step", *(way["seconds"] for way in ways.values()))
    if device.type == "cpu":  # what a busy machine changes little, with OMP_NUM_THREADS=1
        row("of a processor, mean", *(way["cpu_seconds"] for way in ways.values()))
    row("samples a second", *(args.batch / way["seconds"] for way in ways.values()))
    row("peak memory, GiB", *(way["peak_bytes"] / 2**30 for way in ways.values()))
    found = {f"{name}_{key}": way[key] for name, way in ways.items() for key in FIGURES}
    ours = ways["ours"]
    if "plain" in ways:
        plain = ways["plain"]
        found["ratio"] = plain["seconds"] / ours["seconds"]
        found["memory_ratio"] = ours["peak_bytes"] / plain["peak_bytes"]
        found["loss_difference"] = max(
            abs(ours["losses"][name] - loss) / abs(loss) for name, loss in plain["losses"].items()
        )
        print(f"{found['ratio']:.2f} times as fast, {found['memory_ratio']:.2f} of the memory; ", end="")
        print(f"losses differ by {found['loss_difference']:.1e} at most")
    rate = flops * args.batch / ours["seconds"]
    used = utilization(rate, device, args.precision)
    print(f"{flops / 1e9:.1f} GFLOP a sample; {rate / 1e12:.3f} TFLOP/s", end="")
    print("" if used is None else f", {used:.1%} of the device's peak")
    for name, way in ways.items():
        if "profile" in way:
            print(f"\n{name}: the operators that take longest, by {way['profile_by']}")
            for one in way["profile"]:
                print(f"{one['operator'][:60]:60}{one['share']:>8.1%}{one['calls']:>8} calls")
    found |= {"samples_per_second": args.batch / ours["seconds"], "flops_per_sample": flops, "mfu": used}
    found |= {"profiles": {name: way.get("profile") for name, way in ways.items()}}
    found |= {key: getattr(args, key) for key in ("task", "scale", "batch", "precision", "compile")}
    return found | {"checkpoint_activations": args.checkpoint_activations}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--task", default="pretrain", choices=TASKS)
    parser.add_argument("--batch", type=int, help="default: 64 on a GPU, else 4")
    parser.add_argument("--steps", type=int, help="timed ones; default: 10 on a GPU, else 2")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint_activations", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one step more, by operator")
    parser.add_argument("--only_ours", action="store_true")
    parser.add_argument("--measure", choices=("ours", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    args.precision = args.precision or ("bf16" if on_gpu else "fp32")
    args.batch, args.steps = args.batch or (64 if on_gpu else 4), args.steps or (10 if on_gpu else 2)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    ways = {name: run(args, name) for name in (("ours",) if args.only_ours else ("plain", "ours"))}
    last_line(report(args, ways), torch.device(args.device))


if __name__ == "__main__":
    main()
