"""Tells on the device whether losses and gradients are finite, so that no step waits for the answer."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simla.utils import world_size


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the 2-norm of all gradients, a scalar on the model's device."""
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


class FiniteCheck:
    """Finds whether named scalars are finite on all ranks: at once on the device, for the host later.

    bad: float scalar on the device, 1 where any value of any rank is not.
    """

    def __init__(self, values: dict[str, Tensor]):
        self.names = list(values)
        wrong = ~torch.stack([value.detach().float() for value in values.values()]).isfinite()  # (K,)
        self.bad = wrong.any().float()
        if world_size() > 1:
            dist.all_reduce(self.bad, dist.ReduceOp.MAX)
        flags = torch.cat([self.bad[None].bool(), wrong])
        self.on_host, self.arrived = flags, None
        if flags.is_cuda:
            self.on_host = torch.empty_like(flags, device="cpu", pin_memory=True)
            self.on_host.copy_(flags, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> tuple[bool, list[str]]:
        """Wait for the device; return whether any is not finite, and the names of this rank's."""
        if self.arrived:
            self.arrived.synchronize()
        bad, *wrong = self.on_host.tolist()
        return bad, [name for name, is_wrong in zip(self.names, wrong, strict=True) if is_wrong]
