"""Estimates without a GPU the memory and the arithmetic that a step or an evaluation needs on one.

The work runs on torch's fake tensors, which have sizes and types but no numbers, with attention as GPUs have
it: in one kernel that keeps no map. Every storage is counted from its birth to its end, as torch's allocator
does. Left out are kernels' workspaces, the allocator's rounding and gaps, NCCL, `compile`, and the CUDA
context (some 0.5 GiB).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry  # FlopCounterMode keeps alive what checkpointing frees

from simla.utils import as_one_process, autocast

CPU = torch.device("cpu")  # fake tensors of a GPU have no backward pass where there is none
NUM_MOMENTS = 2  # of a trained parameter, as AdamW keeps them


@dataclass(frozen=True)
class Estimate:
    """Numbers of parameters, bytes, and FLOPs, a multiply-add counting two.

    weights: with momentum twins, queues and an image tokenizer; optimizer: its moments; step: gradients,
    activations and what comes and goes, at their peak; flops: of matrix products, attention and convolutions.
    """

    trainable: int
    parameters: int
    weights: int
    optimizer: int
    step: int
    flops: float

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.step


def estimate(
    build: Callable[[], Sequence[nn.Module]],
    work: Callable[..., Tensor],
    precision: str,
    is_training: bool = True,
) -> Estimate:
    """Return what `work(*build())` needs, in training with the backward pass of the loss that it returns and
    with gradients that stay, as they do where a step has several batches or ranks.

    build(): first the model, whose parameters are trained and counted.
    """
    with torch.device("meta"):
        modules = build()
    with counting() as count, torch.set_grad_enabled(is_training):
        for module in modules:
            give_sizes(module)
        parameters, weights = list(modules[0].parameters()), count.now
        trained = list(modules[0].trained_parameters().values()) if is_training else []
        for param in trained:
            param.grad = torch.empty_like(param)
        with autocast(CPU, precision):
            result = work(*modules)
        if is_training:
            result.backward()
        numbers = (sum(param.numel() for param in params) for params in (trained, parameters))
        optimizer = NUM_MOMENTS * sum(param.nbytes for param in trained)
        return Estimate(*numbers, weights, optimizer, count.peak - weights, count.flops)


def give_sizes(module: nn.Module) -> None:
    """Replace a module's tensors of the meta device by fake ones; what two modules share stays shared."""
    fake: dict[int, Tensor] = {}
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, value in tensors.items():
                if value is not None and id(value) not in fake:
                    empty = torch.empty_like(value, device=CPU)
                    is_parameter = isinstance(value, nn.Parameter)
                    fake[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
                tensors[name] = fake.get(id(value))


class Count(TorchDispatchMode):
    """Counts the bytes of the storages that were made inside and live, `now` and at `peak`, and FLOPs."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.flops = 0, 0, 0.0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False) -> Tensor:
    """Return what F.scaled_dot_product_attention does, which makes a map of fake tensors, by one kernel."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal)[0]  # True: for a backward pass


@contextlib.contextmanager
def counting() -> Iterator[Count]:
    """Count storages and FLOPs of what is done inside, which computes nothing, as if on one rank alone."""
    theirs = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused_attention  # in a backward pass, too, where function modes are off
    one_thread = torch.autograd.set_multithreading_enabled(False)  # the modes are this thread's
    try:
        with as_one_process(), one_thread, FakeTensorMode(allow_non_fake_inputs=True), Count() as count:
            yield count
    finally:
        F.scaled_dot_product_attention = theirs
