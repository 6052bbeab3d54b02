"""A model on this device and over the processes: memory saving, compilation, DistributedDataParallel."""

import inspect
import warnings

import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simla.models.bert import BertModel, Layer
from simla.models.momentum import MomentumModel
from simla.models.vit import VisionTransformer
from simla.utils import world_size


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Let both encoders compute their layers again in the backward pass or not, to save memory."""
    for module in model.modules():
        if isinstance(module, VisionTransformer | BertModel):
            module.checkpoint_activations = on


def compile_layers(model: nn.Module) -> None:
    """Compile every layer of the encoders, in place: all of a kind share what is compiled, and it serves any
    length of text.
    """
    # A layer is compiled for each of its uses (a dozen: modes, with and without gradient), then no more.
    torch._dynamo.config.recompile_limit = 32
    for module in model.modules():
        if isinstance(module, Block | Layer):
            module.compile(dynamic=True)


def distribute(model: MomentumModel, device: torch.device) -> nn.Module:
    """Return the model on its device, wrapped for data-parallel training where there are several ranks.

    Buffers are made equal once and not broadcast every step: the queues take the same gathered features
    everywhere.
    """
    model = model.to(device)
    if world_size() == 1:
        return model
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    names = inspect.signature(DistributedDataParallel).parameters
    no_sync = (
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    )  # its older name
    devices = [device.index] if device.type == "cuda" else None
    # Parameters that the losses do not reach would keep the wrapper waiting for their gradient: it looks for
    # them, since a script may leave a loss out; those that no task trains need no looking for. Without
    # looking it would also sort gradients into other buckets after its first step, so that of more than two
    # ranks a resumed run would add in another order.
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified")
    ignored = [name for name, _ in model.named_parameters() if name.startswith(model.without_gradient)]
    ignored += [f".{name}" for name in ignored]  # what the wrapper calls those of the outermost module
    model._ddp_params_and_buffers_to_ignore = ignored
    settings = {"gradient_as_bucket_view": True, "find_unused_parameters": True, no_sync: False}
    return DistributedDataParallel(model, devices, **settings)
