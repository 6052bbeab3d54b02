"""The layers' parts that keep less for the backward pass, against the plain formulation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import lean


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6)])
def test_gelu_linear(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 4).double(), torch.randn(*shape, dtype=torch.double, requires_grad=True)
    inputs = [x, linear.weight, linear.bias]
    ours, plain = lean.gelu_linear(x, linear), linear(F.gelu(x))
    assert torch.equal(ours, plain)
    for one, other in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6)])
def test_norm_linear(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, norm = nn.Linear(6, 4).double(), nn.LayerNorm(6, eps=1e-6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(*shape, dtype=torch.double, requires_grad=True)
    inputs = [x, norm.weight, norm.bias, linear.weight, linear.bias]
    ours, plain = lean.norm_linear(x, norm, linear), linear(norm(x))
    assert torch.equal(ours, plain)
    for one, other in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    norm.requires_grad_(False)
    linear.bias.requires_grad_(False)
    lean.norm_linear(x, norm, linear).sum().backward()
    assert norm.weight.grad is None and linear.bias.grad is None
    assert x.grad is not None and linear.weight.grad is not None


def test_gelu_linear_leaves_frozen_weights_alone() -> None:
    linear = nn.Linear(3, 2).requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    lean.gelu_linear(x, linear).sum().backward()
    assert x.grad is not None and linear.weight.grad is None and linear.bias.grad is None
    with torch.no_grad():
        assert torch.equal(lean.gelu_linear(x, linear), linear(F.gelu(x)))


def test_norm_gelu_linear_in_bf16() -> None:
    torch.manual_seed(0)
    norm, first, linear = nn.LayerNorm(5), nn.Linear(5, 6), nn.Linear(6, 4)
    x = torch.randn(8, 5, requires_grad=True)
    inputs = [x, norm.weight, first.weight, linear.weight, linear.bias]
    with torch.autocast("cpu", torch.bfloat16):
        ours = lean.gelu_linear(lean.norm_linear(x, norm, first), linear)
        plain = linear(F.gelu(first(norm(x))))
    assert ours.dtype is torch.bfloat16 and torch.equal(ours, plain)
    for one, other in zip(gradients(ours.float(), inputs), gradients(plain.float(), inputs), strict=True):
        assert one.dtype is other.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_gelu_linear_in_bf16_of_a_float32_input() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 4), torch.randn(8, 6, requires_grad=True)
    inputs = [x, linear.weight, linear.bias]
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = lean.gelu_linear(x, linear), linear(F.gelu(x))
    assert ours.dtype is torch.bfloat16 and torch.equal(ours, plain)
    for one, other in zip(gradients(ours.float(), inputs), gradients(plain.float(), inputs), strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_of_no_rows_and_without_biases(shape: tuple[int, ...]) -> None:
    norm, wide, narrow = nn.LayerNorm(6), nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)
    x = torch.randn(*shape, requires_grad=True)
    output = lean.gelu_linear(lean.norm_linear(x, norm, wide), narrow)
    assert output.shape == (*shape[:-1], 4)
    output.sum().backward()
    for parameter in (wide.weight, narrow.weight, norm.weight, norm.bias):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert lean.dropout(x, 0.5, training=True).shape == shape


def test_all_is_dropped() -> None:
    x = torch.ones(1000)
    assert torch.equal(lean.dropout(x, 1.0, training=True), torch.zeros(1000))
    assert (lean.dropout(x, 1 - 1e-9, training=True) == 0).double().mean() > 0.99
    query, keys, values = torch.ones(3, 1, 2, 5, 4)
    assert torch.equal(lean.attend(query, keys, values, None, 1.0), torch.zeros(1, 2, 5, 4))


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(1)
    x = torch.ones(401, 999, requires_grad=True)
    dropped = lean.dropout(x, probability, training=True)
    kept = dropped != 0
    num = x.numel()
    spread = (probability * (1 - probability) / num) ** 0.5
    assert abs(1 - kept.double().mean().item() - probability) < 4 * spread
    assert dropped[kept].unique().item() == pytest.approx(1 / (1 - probability), rel=2e-5)
    for dim in (0, 1):  # neither rows nor columns are dropped together
        shares = 1 - kept.double().mean(dim)
        assert shares.std().item() == pytest.approx(spread * (num / kept.shape[dim]) ** 0.5, rel=0.15)
    (grad,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(grad, dropped.detach())
    assert not torch.equal(lean.dropout(x, probability, training=True), dropped)


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(2)
    kept = lean._keep(torch.Size([400_003]), 0.5)[0].double() - 0.5
    for distance in (1, 2, 3, 4, 8):
        assert abs((kept[distance:] * kept[:-distance]).mean().item()) < 0.25 * 4 / 400_000**0.5


def test_dropout_is_off_outside_training() -> None:
    x = torch.randn(5, 5)
    assert torch.equal(lean.dropout(x, 0.5, training=False), x)
    assert torch.equal(lean.dropout(x, 0.0, training=True), x)


def test_dropout_draws_what_the_random_state_says() -> None:
    x = torch.randn(3, 7)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = lean.dropout(x, 0.5, training=True)
    torch.set_rng_state(state)
    assert torch.equal(lean.dropout(x, 0.5, training=True), first)


@pytest.mark.parametrize("mask_shape", [None, (2, 1, 1, 6), (2, 1, 5, 6)])
def test_attention_with_dropout(mask_shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    query, keys, values = (torch.randn(2, 3, n, 4, dtype=torch.double) for n in (5, 6, 6))
    inputs = [part.requires_grad_() for part in (query, keys, values)]
    mask = None if mask_shape is None else torch.randn(mask_shape, dtype=torch.double)
    keep = torch.rand(2, 3, 5, 6) > 0.3
    monkeypatch.setattr(lean, "_keep", lambda shape, probability: (keep.view(shape), 1 / 0.7))
    ours = lean.attend(query, keys, values, mask, 0.3)
    scores = query @ keys.transpose(-1, -2) / 2
    probabilities = (scores if mask is None else scores + mask).softmax(-1)
    plain = (probabilities * keep / 0.7) @ values
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)  # softmax is computed in float32
    for one, other in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_attention_without_dropout_is_torchs() -> None:
    query, keys, values = (torch.randn(2, 3, 5, 4) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, keys, values)
    assert torch.equal(lean.attend(query, keys, values, None, 0.0), expected)


def test_attention_in_bf16() -> None:
    torch.manual_seed(5)
    inputs = [torch.randn(2, 3, 5, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    output = lean.attend(*inputs, None, 0.1)
    assert output.dtype is torch.bfloat16
    assert all(grad.dtype is torch.bfloat16 for grad in gradients(output, inputs))


def test_what_is_kept_for_the_backward_pass() -> None:
    """Bytes of all that a part keeps beyond its inputs and parameters."""

    def kept_bytes(run) -> int:
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = run()
        given = {p.untyped_storage().data_ptr() for p in [*inputs, *linear.parameters(), *norm.parameters()]}
        assert output.requires_grad
        return sum(size for place, size in storages.items() if place not in given)

    linear, norm = nn.Linear(64, 16), nn.LayerNorm(64)
    inputs = [torch.randn(2, 4, 32, 64, requires_grad=True) for _ in range(3)]
    assert kept_bytes(lambda: lean.gelu_linear(inputs[0], linear)) == 0
    num = inputs[0].numel()
    assert kept_bytes(lambda: lean.norm_linear(inputs[0], norm, linear)) == 2 * num // 64 * 4
    assert num <= kept_bytes(lambda: lean.dropout(inputs[0], 0.1, training=True)) < num + 8
    num = 2 * 4 * 32 * 32
    assert num <= kept_bytes(lambda: lean.attend(*inputs, None, 0.1)) < num + 8
