"""Saving and resuming at full size against a plain torch.save and torch.load: seconds and peak memory.

python benchmarks/checkpoint.py [--scale full] [--out output/benchmark-checkpoint]

Full size is configs/Pretrain.yaml: 510 M fp32 values and AdamW's two moments, 4 GB a file; 12 GB of memory
and of disk are needed for some minutes. Every measurement is a process of its own, one after the other, so
that its peak resident memory means something; what is mapped of a file counts in it, though the system takes
that back at need. Files are in the page cache but where it says "from the disk".
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from measure import last_line

from simla.checkpoint.save import Saver, check_undamaged
from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN
from simla.engine.resume import resume
from simla.models.pretrain import SIMLA
from simla.optim import create_optimizer
from simla.scheduler import create_scheduler

OURS, PUBLISHED = "checkpoint_00.pth", "published.pth"
TINY = [
    *("vision_width=32", "vit.depth=2", "vit.num_heads=2", "embed_dim=16", "queue_size=64"),
    *("bert_config.hidden_size=32", "bert_config.encoder_width=32", "bert_config.num_hidden_layers=2"),
    *("bert_config.num_attention_heads=2", "bert_config.intermediate_size=64", "bert_config.vocab_size=400"),
    "image_tokenizer.vocab_size=16",
]


def build(scale: str):
    """Return model, optimizer, schedule and config of pre-training, with random weights."""
    torch.manual_seed(0)
    config = read_config(str(ROOT / "configs/Pretrain.yaml"), PRETRAIN, TINY if scale == "tiny" else [])
    model = SIMLA.from_config(config, cls_id=101)
    optimizer = create_optimizer(model, config["optimizer"])
    return model, optimizer, create_scheduler(optimizer, config["schedular"], "start"), config


def fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Fill the moments as after a step: memory that was really written to."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            moments = {"exp_avg": torch.randn_like(param), "exp_avg_sq": torch.rand_like(param)}
            optimizer.state[param] = {"step": torch.tensor(1.0), **moments}


def tensors(model, optimizer) -> list[torch.Tensor]:
    """Return all different tensors of a checkpoint."""
    found = [*model.state_dict().values()]
    found += [value for state in optimizer.state.values() for value in state.values()]
    return list({(tensor.data_ptr(), tensor.shape): tensor for tensor in found}.values())


def num_bytes(found: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in found)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def clock(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def published_config(config: dict) -> object:
    """Return the config as an OmegaConf-like object, whose class a reader does not have."""
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__})
    sys.modules.update({"omegaconf": types.ModuleType("omegaconf"), module.__name__: module})
    found = module.DictConfig()
    found.__dict__["_content"] = config
    return found


# ---- one process each ----


def make(folder: Path, scale: str) -> dict:
    """Write both files; return what saving costs."""
    model, optimizer, schedule, config = build(scale)
    fill_moments(optimizer)
    found = tensors(model, optimizer)
    of_model = tensors(model, torch.optim.SGD(model.parameters()))
    sizes = {"model_bytes": num_bytes(of_model), "state_bytes": num_bytes(found)}
    sizes["values"] = sum(tensor.numel() for tensor in of_model)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"lr_scheduler": schedule.state_dict(), "config": config, "epoch": 0}
    before = peak_bytes()

    def copy():
        [tensor.clone() for tensor in found]  # freed at once, as a copy that nobody keeps

    copy()  # the first one waits for the system's memory
    one_copy = clock(copy)
    saver = Saver(folder, keep_last=9, keep_epochs=True)
    first_blocked = clock(lambda: saver.save("checkpoint_01.pth", {**state, "run": "benchmark"}))
    saver.close()
    begin = time.perf_counter()
    saver.save(OURS, {**state, "run": "benchmark"})
    blocked = time.perf_counter() - begin
    saver.close()
    written, peak = time.perf_counter() - begin, peak_bytes() - before
    (folder / "checkpoint_01.pth").unlink()
    ints = {i: {**moments, "step": 1} for i, moments in state["optimizer"]["state"].items()}
    published = {**state, "optimizer": {**state["optimizer"], "state": ints}}
    torch.save({**published, "config": published_config(config)}, folder / PUBLISHED)
    return {
        **sizes,
        "one_copy_seconds": one_copy,
        "first_blocked_seconds": first_blocked,
        "blocked_seconds": blocked,
        "written_seconds": written,
        "extra_peak_bytes": peak,
    }


def plain_save(folder: Path, scale: str) -> dict:
    model, optimizer, schedule, config = build(scale)
    fill_moments(optimizer)
    before = peak_bytes()

    def save():
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"lr_scheduler": schedule.state_dict(), "config": config, "epoch": 0}
        with (folder / "plain.pth").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    seconds = clock(save)
    (folder / "plain.pth").unlink()
    return {"blocked_seconds": seconds, "extra_peak_bytes": peak_bytes() - before}


def plain_load(folder: Path, scale: str) -> dict:
    imports = peak_bytes()
    model, optimizer, _, _ = build(scale)

    def load():
        checkpoint = torch.load(folder / OURS, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    return {"seconds": clock(load), "imports_bytes": imports, "peak_bytes": peak_bytes()}


def our_load(folder: Path, scale: str, name: str = OURS) -> dict:
    imports = peak_bytes()
    model, optimizer, schedule, _ = build(scale)
    read_before = device_bytes()
    seconds = clock(lambda: resume(model, optimizer, schedule, folder / name))
    return {
        "seconds": seconds,
        "imports_bytes": imports,
        "peak_bytes": peak_bytes(),
        "device_bytes": device_bytes() - read_before,
    }


def published_load(folder: Path, scale: str) -> dict:
    return our_load(folder, scale, PUBLISHED)


def check(folder: Path, scale: str) -> dict:
    return {"seconds": clock(lambda: check_undamaged(folder / OURS))}


def device_bytes() -> int:
    """Return the bytes that the system read from its disk for this process; -1 where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").split()
    except OSError:
        return -1
    return int(lines[lines.index("read_bytes:") + 1])


# ---- the whole ----


def start(measurement: str, folder: Path, scale: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--scale", scale, "--out", str(folder), "--measure", measurement]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> dict:
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"a measurement failed, see above: {' '.join(process.args)}")
    return json.loads(output.splitlines()[-1])


def forget(path: Path) -> None:
    """Drops the file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--out", default=Path("output/benchmark-checkpoint"), type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(json.dumps(globals()[args.measure](args.out, args.scale)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    try:
        for name in ("make", "plain_save", "plain_load", "our_load", "published_load", "check"):
            found[name] = result(start(name, args.out, args.scale))
        size = (args.out / OURS).stat().st_size
        forget(args.out / OURS)
        both = [result(process) for process in [start("our_load", args.out, args.scale) for _ in range(2)]]
    finally:
        for name in (OURS, PUBLISHED, "checkpoint_01.pth", "plain.pth"):
            (args.out / name).unlink(missing_ok=True)
    found["two_at_once"] = {"device_bytes": sum(one["device_bytes"] for one in both), "file_bytes": size}
    report(found)
    plain, ours = found["plain_load"], found["our_load"]
    state = found["make"]["state_bytes"]
    figures = {
        "ratio": plain["seconds"] / ours["seconds"],  # of resuming
        "save_ratio": found["plain_save"]["blocked_seconds"] / found["make"]["blocked_seconds"],
        "resume_peak_states": (ours["peak_bytes"] - ours["imports_bytes"]) / state,
        "plain_resume_peak_states": (plain["peak_bytes"] - plain["imports_bytes"]) / state,
    }
    last_line({**figures, "scale": args.scale, **found}, torch.device("cpu"))


def report(found: dict) -> None:
    made, plain_saved, plain, ours = (found[k] for k in ("make", "plain_save", "plain_load", "our_load"))
    published, two = found["published_load"], found["two_at_once"]
    state, gib = made["state_bytes"], 2**30
    print(f"\nmodel {made['values'] / 1e6:.0f} M values, {made['model_bytes'] / gib:.2f} GiB", end="")
    print(f"; with the optimiser {state / gib:.2f} GiB")
    print(f"\n{'saving':36}{'torch.save':>12}{'ours':>10}{'ratio':>8}")
    row("training stands still, s, at first", plain_saved["blocked_seconds"], made["first_blocked_seconds"])
    row("  from the second save on", plain_saved["blocked_seconds"], made["blocked_seconds"])
    row("until it is on the disk, s", plain_saved["blocked_seconds"], made["written_seconds"])
    print(f"{'extra memory, states':36}", end="")
    print(f"{plain_saved['extra_peak_bytes'] / state:12.2f}{made['extra_peak_bytes'] / state:10.2f}")
    print(f"one copy of all tensors takes {made['one_copy_seconds']:.2f} s")
    print(f"\n{'resuming':36}{'torch.load':>12}{'ours':>10}{'ratio':>8}")
    row("seconds", plain["seconds"], ours["seconds"])
    row("peak memory, states", plain["peak_bytes"] / state, ours["peak_bytes"] / state)
    without = [(one["peak_bytes"] - one["imports_bytes"]) / state for one in (plain, ours)]
    row("  without the imported libraries", *without)
    print(
        f"a published file: {published['seconds']:.2f} s, peak {published['peak_bytes'] / state:.2f} states"
    )
    print(f"checking every checksum: {found['check']['seconds']:.2f} s")
    read = two["device_bytes"] / two["file_bytes"]
    print(f"two processes at once, from the disk: {read:.2f} of the file read in all")


def row(label: str, plain: float, ours: float) -> None:
    print(f"{label:36}{plain:12.2f}{ours:10.2f}{ours / plain:8.2f}")


if __name__ == "__main__":
    main()
