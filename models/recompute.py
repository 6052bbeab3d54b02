"""What a training step computes again in its backward pass, instead of keeping it in memory till then."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_layer(layer: nn.Module, *inputs, again: bool) -> Tensor:
    """layer(*inputs); with `again` only its inputs are kept. Dropout draws the same the second time."""
    if again and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)
