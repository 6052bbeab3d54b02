"""Momentum twins and feature queues (MoCo, as ALBEF and SIMLA use them).

E shared embedding, Q queue.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from simla.utils import UserError


def make_twin(module: nn.Module) -> nn.Module:
    """Return a copy without gradients."""
    return copy.deepcopy(module).requires_grad_(False)


class MomentumModel(nn.Module):
    """A model in which every module named in `twin_names` has a momentum twin, `<name>_m`."""

    twin_names: tuple[str, ...] = ()
    # Prefixes of the parameters that no loss reaches; only pre-training hides patches. They stay among the
    # optimiser's, whose state knows its parameters by their order.
    without_gradient: tuple[str, ...] = ("visual_encoder.mask_token",)
    momentum: float
    holds_twins = False  # while a step's further batches are read: the online weights have not moved either

    def twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online, momentum) pairs."""
        return [(getattr(self, name), getattr(self, name + "_m")) for name in self.twin_names]

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return by name the parameters that the losses reach."""
        named = {name: param for name, param in self.named_parameters() if param.requires_grad}
        return {name: param for name, param in named.items() if not name.startswith(self.without_gradient)}

    def copy_twins(self, names: Iterable[str] | None = None) -> None:
        """Copy the online weights to the momentum twins, after they were loaded or filled anew; of the
        modules `names`, None = of all.
        """
        for name in self.twin_names if names is None else names:
            getattr(self, name + "_m").load_state_dict(getattr(self, name).state_dict())

    def update_twins(self) -> None:
        """Move the twins, once a step, before they are asked."""
        if not self.holds_twins:
            update_twins(self.twins(), self.momentum)


@torch.no_grad()
def update_twins(pairs: list[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """Move all twins of (online, twin) pairs at once: twin <- momentum * twin + (1 - momentum) * online.

    Raises UserError where a twin is not made as its online module is, adapters included.
    """
    online, twins = [], []
    for module, twin in pairs:
        ours, theirs = dict(module.named_parameters()), dict(twin.named_parameters())
        if differing := ours.keys() ^ theirs.keys():
            raise UserError(
                f"a momentum twin must be made as its online {type(module).__name__} is, but only one of the "
                f"two has {min(differing)}; put into the twin (NAME_m beside NAME) what was put into the "
                "online module"
            )
        online += ours.values()
        twins += theirs.values()
    torch._foreach_mul_(twins, momentum)
    torch._foreach_add_(twins, online, alpha=1.0 - momentum)


def new_queue(embed_dim: int, queue_size: int) -> Tensor:
    """Return normalised noise (E, Q), which a queue holds before features have filled it."""
    return nn.functional.normalize(torch.randn(embed_dim, queue_size), dim=0)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, entries: Tensor) -> None:
    """Write entries (n, E) into the columns of queue (E, Q) from `pointer` (1,) on, wrapping round.

    Any n goes; of more than Q entries the last Q stay. What is not finite would spoil the contrast of every
    step to come: there the queue stays as it was. The pointer is left to `advance`.
    """
    queue_size = queue.shape[1]
    skipped = max(0, len(entries) - queue_size)
    columns = (pointer + torch.arange(skipped, len(entries), device=queue.device)) % queue_size
    fresh = entries[skipped:].T.to(queue.dtype)
    queue[:, columns] = torch.where(fresh.isfinite(), fresh, queue[:, columns])


@torch.no_grad()
def advance(pointer: Tensor, num_entries: int, queue_size: int) -> None:
    """Move `pointer` (1,) on by `num_entries`, modulo the queue size."""
    pointer.copy_((pointer + num_entries) % queue_size)
