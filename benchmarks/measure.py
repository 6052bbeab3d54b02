"""What the benchmarks of ranking share: clock, memory, FLOPs, the tiny model, the last line."""

import argparse
import json
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simla.engine.run_record import versions

# Dense peak of the matrix units in FLOP/s (data sheets); fp32 is without TF32, as torch computes by default.
PEAK = {
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
}
TINY = [
    *("vision_width=32", "vit.depth=2", "vit.num_heads=2", "image_res=32", "init=scratch"),
    *("bert_config.hidden_size=32", "bert_config.encoder_width=32", "bert_config.num_hidden_layers=2"),
    *("bert_config.num_attention_heads=2", "bert_config.intermediate_size=64"),
]


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="full", choices=("full", "tiny"), help="tiny: does it run at all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, else fp32"
    )
    return parser


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} thread(s)"


def utilization(flops_per_second: float, device: torch.device, precision: str) -> float | None:
    """Return the share of the GPU's peak; None where the peak is not known."""
    name = device_name(device)
    peaks = [peak[precision] for gpu, peak in PEAK.items() if device.type == "cuda" and gpu in name]
    return flops_per_second / peaks[0] if peaks else None


def count_flops(function: Callable[[], object]) -> int:
    """Return the FLOPs of what the function computes, a multiply-add counting two, attention as two matrix
    products, since torch counts no other on a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def row(label: str, *values: object) -> None:
    print(f"{label:44}" + "".join(f"{v:>14.4g}" if isinstance(v, float) else f"{v:>14}" for v in values))


def last_line(found: dict, device: torch.device) -> None:
    """Print all figures as one line of JSON."""
    print(json.dumps({**found, "device": device_name(device), "versions": versions()}), flush=True)
