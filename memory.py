"""What a training step holds in memory and how much it computes, found out in seconds without either.

The step runs on tensors that have sizes, types and a device but no numbers (torch's fake tensors); every
storage is counted from its birth to its end. That is what torch's allocator hands out. What it cannot see:
the kernels' own workspaces, the allocator's rounding and gaps, NCCL, and the CUDA context (some 0.5 GiB);
`compile` is left out. An estimate, not a measurement.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models.bert import Attention
from training import Losses, set_checkpointing
from utils import PRECISIONS, as_one_process, autocast

Build = Callable[[], list[nn.Module]]  # the model, and what else its losses ask
NUM_MOMENTS = 2  # float32 values that AdamW keeps of a parameter


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device, and the floating-point operations of one batch, a multiply-add counting two.

    weights: parameters, twins, queues and an image tokenizer; optimizer: its moments; step: gradients,
    activations and what comes and goes, at their peak. flops: matrix products and convolutions, those that
    are computed a second time for the backward pass too. trainable, parameters: how many, of the model.
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


def estimate_step(
    build: Build,
    losses: Losses,
    batch: dict[str, Tensor],
    config: dict,
    alpha: float,
    device: torch.device,
    keeps_gradients: bool,
) -> Estimate:
    """One training step; nothing of it is computed, and a GPU need not be there.

    batch: as `to_device` would have it, on the CPU. keeps_gradients: they are there from the start, as where
    a step has several batches or several ranks add theirs.
    """
    inputs = build, losses, batch, config, alpha
    if device.type == "cpu" or torch.cuda.is_available():
        return _run(*inputs, device, keeps_gradients)[0]
    # Torch has no backward pass for a GPU that is not there: what it adds to what the forward pass has left
    # is taken from a CPU's, without dropout, so that its attention keeps no maps as a GPU's keeps none.
    here, left_here = _run(*inputs, torch.device("cpu"), keeps_gradients, without_dropout=True)
    there, left_there = _run(*inputs, device, keeps_gradients, is_whole=False)
    return replace(here, step=max(there.step, left_there + here.step - left_here))


def _run(
    build: Build,
    losses: Losses,
    batch: dict[str, Tensor],
    config: dict,
    alpha: float,
    device: torch.device,
    keeps_gradients: bool,
    without_dropout: bool = False,
    is_whole: bool = True,
) -> tuple[Estimate, int]:
    """The step, or its forward pass alone; the estimate and the bytes that the forward pass has left."""
    with torch.device("meta"):
        model, *others = build()
    set_checkpointing(model.train(), config["checkpoint_activations"])
    for module in model.modules() if without_dropout else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, Attention):
            module.dropout_prob = 0.0
    on_this_thread = torch.autograd.set_multithreading_enabled(False)  # where the account is kept
    with on_this_thread, keeping_account() as account:
        for module in (model, *others):
            give_sizes(module, device)
        weights = account.now
        trained = [param for param in model.parameters() if param.requires_grad]
        held = [torch.empty_like(param) for param in trained for _ in range(NUM_MOMENTS)]
        optimizer = account.now - weights
        if keeps_gradients:
            held += [torch.empty_like(param) for param in trained]
            for param in trained:
                param.register_post_accumulate_grad_hook(_forget_gradient)
        held.append({name: torch.empty_like(value, device=device) for name, value in batch.items()})
        with fused_attention(account):
            with _autocast(device, config["precision"]):
                total = sum(losses(model, held[-1], alpha, *others).values())
            left = account.now
            if is_whole:
                total.backward()
    sizes = weights, optimizer, account.peak - weights - optimizer
    return Estimate(*count_parameters(model), *sizes, account.flops), left - weights - optimizer


@dataclass(frozen=True)
class Evaluation:
    """weights, peak: bytes on the device, the latter all in all; flops: of one unit of each part of the work;
    parameters: how many.
    """

    parameters: int
    weights: int
    peak: int
    flops: dict[str, float]


def estimate_evaluation(
    make_model: Callable[[], nn.Module],
    parts: Callable[[nn.Module], dict[str, tuple[int, Callable[[], Tensor]]]],
    precision: str,
    device: torch.device,
) -> Evaluation:
    """Returns what the parts of an evaluation need; nothing of it is computed, and a GPU need not be there.

    parts(model): name -> how many units of work, and a function that does them.
    """
    with torch.device("meta"):
        model = make_model().eval()
    with torch.no_grad(), keeping_account() as account:
        give_sizes(model, device)
        weights, flops = account.now, {}
        with fused_attention(account), _autocast(device, precision):
            for name, (num, compute) in parts(model).items():
                before = account.flops
                compute()
                flops[name] = (account.flops - before) / num
    return Evaluation(count_parameters(model)[1], weights, account.peak, flops)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Those that are trained, and all, momentum twins included."""
    sizes = [(param.numel(), param.requires_grad) for param in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def give_sizes(module: nn.Module, device: torch.device) -> None:
    """Puts the tensors of a module built on the meta device onto a device, under FakeTensorMode; a parameter
    that two modules share stays shared.
    """
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is not None:
                    if id(value) not in moved:
                        there = torch.empty_like(value, device=device)
                        if isinstance(value, nn.Parameter):
                            there = nn.Parameter(there, value.requires_grad)
                        moved[id(value)] = there
                    own[name] = moved[id(value)]


def _forget_gradient(param: Tensor) -> None:
    param.grad = None


class Account(TorchDispatchMode):
    """now, peak: bytes of the storages that were made inside and live; flops: what was computed."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.flops = 0, 0, 0.0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._subtract, key, size)

    def _subtract(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextlib.contextmanager
def keeping_account() -> Iterator[Account]:
    """Inside, tensors have sizes but no numbers, and an account is kept of their storages."""
    account = Account()
    sizes_alone = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), as_one_process(), sizes_alone, account:
        warnings.filterwarnings("ignore", message="CUDA is not available")
        yield account


@contextlib.contextmanager
def fused_attention(account: Account) -> Iterator[None]:
    """F.scaled_dot_product_attention as GPUs have it in one kernel, without a map in memory, and CPUs without
    dropout. (Where torch has no such kernel, as for tensors without numbers, it makes the map.) It is
    replaced by name, since torch's modes are off in a backward pass, which may compute layers again.
    """
    theirs = F.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        if dropout_p and query.device.type == "cpu":
            return theirs(query, key, value, attn_mask, dropout_p, is_causal)
        return _Fused.apply(query, key, value, attn_mask, account)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = theirs


class _Fused(Function):
    @staticmethod
    def forward(ctx, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, account: Account):
        (*rows, width), length = query.shape, keys.shape[-2]
        out, log_sums = torch.empty_like(query), query.new_empty(rows, dtype=torch.float32)
        ctx.save_for_backward(query, keys, values, mask, out, log_sums)
        ctx.account, ctx.flops = account, 4.0 * log_sums.numel() * width * length  # two matrix products
        account.flops += ctx.flops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        query, keys, values, *_ = ctx.saved_tensors
        ctx.account.flops += 2 * ctx.flops
        return torch.empty_like(query), torch.empty_like(keys), torch.empty_like(values), None, None


@contextlib.contextmanager
def _autocast(device: torch.device, precision: str) -> Iterator[None]:
    """`utils.autocast`, which leaves out GPUs that are not there."""
    if device.type != "cuda" or PRECISIONS[precision] == torch.float32 or torch.cuda.is_available():
        with autocast(device, precision):
            yield
        return
    before = torch.get_autocast_dtype(device.type)
    torch.set_autocast_enabled(device.type, True)
    torch.set_autocast_dtype(device.type, PRECISIONS[precision])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device.type, False)
        torch.set_autocast_dtype(device.type, before)
