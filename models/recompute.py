"""What a training step computes again in its backward pass, instead of keeping it in memory till then."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_layer(layer: nn.Module, *inputs, again: bool) -> Tensor:
    """layer(*inputs); with `again` only its inputs are kept. Dropout draws the same the second time."""
    if again and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(gelu(x)); gelu's output, a sixth of what a transformer layer keeps, costs next to nothing."""

    def compute(x: Tensor) -> Tensor:
        return linear(F.gelu(x))

    if not torch.is_grad_enabled():
        return compute(x)
    return checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)
