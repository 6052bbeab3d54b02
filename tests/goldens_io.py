"""Reads the recorded numbers in tests/goldens and rebuilds the weights and inputs they were recorded with.

The weights are a function of their names: see `fill`. Digests are `[L2 norm, first four values]`.
"""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "goldens"
SALT = "simla-a"


@cache
def golden(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def fill(salt: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value of the state-dict entry `name`."""
    raw = np.random.RandomState(zlib.crc32((salt + name).encode())).standard_normal(shape)
    leaf = name.split(".")[-1]
    if leaf == "temp":
        return np.float32(0.07)
    if leaf in ("image_queue", "text_queue"):
        return (raw / np.sqrt((raw * raw).sum(0, keepdims=True))).astype("float32")
    value = np.asarray(raw * 0.05).astype("float32")
    norms = ("LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
    if len(shape) == 1 and name.endswith(norms):
        value = np.float32(1) + value
    return value


def filled_state(structure: dict, salt: str = SALT) -> dict[str, torch.Tensor]:
    """Every float entry of a `*_structure` golden, aliases decided by the earlier name."""
    state = {}
    for name, shape, dtype in structure["state_dict"]:
        if dtype == "float32":
            source = structure["aliases"].get(name, name)
            state[name] = torch.from_numpy(np.asarray(fill(salt, source, tuple(shape))))
    return state


def fill_model(model: torch.nn.Module, aliases: dict[str, str], salt: str = SALT) -> None:
    """Overwrites every float entry of the model's state dict in place; integer entries stay."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.from_numpy(np.asarray(fill(salt, aliases.get(name, name), tuple(tensor.shape))))
                )


def golden_image(seed: int, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype("float32"))


def digest(tensor: torch.Tensor, num_values: int = 4) -> list[float]:
    flat = tensor.detach().reshape(-1)
    return [flat.double().norm().item(), *flat[:num_values].double().tolist()]
