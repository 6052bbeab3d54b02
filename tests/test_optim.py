import copy

import pytest
import torch
from goldens_io import golden
from torch import nn

from simla.engine.resume import _optimizer_state
from simla.optim import create_optimizer, param_groups
from simla.utils import UserError


def golden_parameters(task):
    shapes = {name: shape for name, shape, _ in golden(f"{task}_structure")["state_dict"]}
    return {
        name: nn.Parameter(torch.empty(shapes[name]), requires_grad=trainable)
        for name, trainable in golden(f"{task}_structure")["named_parameters"]
    }


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_groups_have_the_recorded_names_in_the_recorded_order(task):
    parameters = golden_parameters(task)
    name_of = {id(param): name for name, param in parameters.items()}
    groups = param_groups(parameters.items(), 0.02)
    recorded = golden(f"{task}_structure")["optimizer_groups"]
    assert [[name_of[id(param)] for param in group["params"]] for group in groups] == [
        group["params"] for group in recorded
    ]
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in recorded]


def test_the_optimiser_is_torch_adamw_with_the_published_settings():
    model = nn.Linear(3, 2)
    optimizer = create_optimizer(model, {"opt": "adamW", "lr": 1e-4, "weight_decay": 0.02})
    assert type(optimizer) is torch.optim.AdamW
    no_decay, decay = optimizer.param_groups
    assert no_decay["params"] == [model.bias] and decay["params"] == [model.weight]
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0.0, 0.02)
    for group in (no_decay, decay):
        assert (group["lr"], group["betas"], group["eps"]) == (1e-4, (0.9, 0.999), 1e-8)


def test_optional_settings_and_frozen_parameters():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    config = {"opt": "AdamW", "lr": 1e-4, "weight_decay": 0.02, "eps": 1e-6, "betas": [0.9, 0.98]}
    optimizer = create_optimizer(model, config)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.98) and optimizer.param_groups[1]["eps"] == 1e-6
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion"])
def test_other_optimisers_of_timm(name):
    create_optimizer(nn.Linear(3, 2), {"opt": name, "lr": 1e-4, "weight_decay": 0.02})


def test_an_unknown_optimiser_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"no optimiser 'adamv'; did you mean adam.*sgd"):
        create_optimizer(nn.Linear(3, 2), {"opt": "adamv", "lr": 1e-4, "weight_decay": 0.02})
    with pytest.raises(UserError, match="adamw does not take"):
        create_optimizer(nn.Linear(3, 2), {"opt": "adamw", "lr": -1.0, "weight_decay": 0.02})


@pytest.mark.parametrize("opt", ["adamw", "lamb", "adan", "lookahead_adamw", "adamp"])
def test_a_resumed_optimiser_goes_on_with_its_counters(opt):
    """Of 16 steps the last 8, after a stop, move the weights as without one, at the config's rate."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        betas = {"betas": (0.98, 0.92, 0.99)} if opt == "adan" else {}
        return model, create_optimizer(model, {"opt": opt, "lr": 1e-2, "weight_decay": 0.02, **betas})

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            values = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            model(values).square().mean().backward()
            optimizer.step()

    whole, stopped = made(), made()
    run(*whole, range(16))
    run(*stopped, range(8))
    saved = copy.deepcopy([part.state_dict() for part in stopped])
    model, optimizer = made()
    model.load_state_dict(saved[0])
    saved[1]["param_groups"][0]["lr"] = 7.0  # of another config
    optimizer.load_state_dict(_optimizer_state(optimizer, saved[1], "here"))
    run(model, optimizer, range(8, 16))
    for ours, theirs in zip(model.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
