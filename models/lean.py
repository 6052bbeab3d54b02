"""Parts of a layer that keep less for the backward pass than autograd does of its own: what costs little to
compute is computed again there.

B rows, H heads, T tokens, S tokens they read, d width of a head; L leading dimensions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

LEVELS = 1 << 16  # of the random numbers that decide what is dropped


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(gelu(x)): (L, D) -> (L, E). gelu's output, the widest tensor of a layer, is not kept."""
    if torch.is_grad_enabled():
        return _GeluLinear.apply(x, linear.weight, linear.bias)
    return linear(F.gelu(x))


class _GeluLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        activated = F.gelu(x).to(grad.dtype)
        grad_gelu, *of_linear = _linear_backward(grad, activated, weight, ctx.needs_input_grad[1:])
        return torch.ops.aten.gelu_backward(grad_gelu.to(x.dtype), x), *of_linear


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x)): (L, D) -> (L, E). The normalised states are not kept beside x."""
    if torch.is_grad_enabled():
        return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)
    return linear(norm(x))


class _NormLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, eps: float, *linear: Tensor) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, scale.shape, scale, shift, eps)
        ctx.save_for_backward(x, mean, rstd, scale, shift, linear[0])
        return F.linear(normed, *linear)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift, weight = ctx.saved_tensors
        normed = torch.addcmul(shift, (x - mean) * rstd, scale).to(grad.dtype)
        grad_normed, *of_linear = _linear_backward(grad, normed, weight, ctx.needs_input_grad[4:])
        needed = ctx.needs_input_grad[:3]
        grad_normed = grad_normed.to(x.dtype)
        of_norm = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x, scale.shape, mean, rstd, scale, shift, needed
        )
        return *of_norm, None, *of_linear


def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of F.linear(x, weight, bias), in the precision of the forward pass but for the parameters';
    `needed`: of weight and bias.
    """
    rows = grad.flatten(0, -2)
    of_weight = (rows.T @ x.flatten(0, -2)).to(weight.dtype) if needed[0] else None
    of_bias = rows.sum(0, dtype=weight.dtype) if needed[1] else None
    return grad @ weight.to(grad.dtype), of_weight, of_bias


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """F.dropout. On a CPU torch draws one number after the other and keeps four bytes of each; here four
    come of one draw, and one byte is kept.
    """
    if x.device.type != "cpu" or not (training and 0 < probability < 1):
        return F.dropout(x, probability, training)
    return _Dropout.apply(x, probability)


def _keep(shape: torch.Size, probability: float) -> tuple[Tensor, float]:
    """Which elements stay (bool, on the CPU), and what they are multiplied by."""
    dropped = min(round(probability * LEVELS), LEVELS - 1)
    bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: shape.numel()] >= dropped - LEVELS // 2
    return keep.view(shape), LEVELS / (LEVELS - dropped)


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x: Tensor, probability: float) -> Tensor:
        keep, ctx.scale = _keep(x.shape, probability)
        ctx.save_for_backward(keep)
        return torch.where(keep, x, 0.0).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, grad, 0.0).mul_(ctx.scale), None


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """F.scaled_dot_product_attention with dropout of the given probability: query (B, H, T, d), keys and
    values (B, H, S, d), additive mask -> (B, H, T, d).

    With dropout on a CPU torch keeps three maps (B, H, T, S); here a byte for each of their elements is kept.
    """
    if query.device.type != "cpu" or not 0 < probability < 1:
        return F.scaled_dot_product_attention(query, keys, values, mask, probability)
    return _Attend.apply(query, keys, values, mask, probability)


def _attention_map(query: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return (scores if mask is None else scores.add_(mask)).softmax(-1, dtype=torch.float32).to(query.dtype)


class _Attend(Function):
    @staticmethod
    def forward(
        ctx, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, probability: float
    ) -> Tensor:
        found = _attention_map(query, keys, mask)
        keep, ctx.scale = _keep(found.shape, probability)
        ctx.save_for_backward(query, keys, values, mask, keep)
        return (torch.where(keep, found, 0.0) @ values).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, keys, values, mask, keep = ctx.saved_tensors
        found, grad = _attention_map(query, keys, mask), grad * ctx.scale
        grad_values = torch.where(keep, found, 0.0).transpose(-1, -2) @ grad
        grad_found = torch.where(keep, grad @ values.transpose(-1, -2), 0.0)
        grad_scores = found * (grad_found - (found * grad_found).sum(-1, keepdim=True))
        grad_scores *= query.shape[-1] ** -0.5
        return grad_scores @ keys, grad_scores.transpose(-1, -2) @ query, grad_values, None, None
