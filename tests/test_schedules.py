import pytest
import torch
from goldens_io import golden
from torch import nn

from simla.configs.reader import read_config
from simla.configs.schema import TABLES
from simla.scheduler import create_scheduler
from simla.utils import UserError

CONFIGS = [key for key in golden("schedules") if key != "meta"]
LENGTHS = [(name, key) for name in CONFIGS for key in golden("schedules")[name] if key.startswith("iter")]


def schedule(name, **changes):
    recorded = golden("schedules")[name]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=recorded["optimizer"]["lr"])
    return optimizer, create_scheduler(optimizer, recorded["schedular"] | changes, recorded["epoch_step"])


def run(optimizer, scheduler, epochs, iterations, from_epoch=0):
    """The scheduler's calls and the rates used, in the rows of the recorded file."""
    calls, used, step = [], [], scheduler.cosine.step
    place = [0, 0]

    def recorded_step(argument):
        step(argument)
        calls.append([*place, argument, optimizer.param_groups[0]["lr"]])

    scheduler.cosine.step = recorded_step
    for epoch in range(from_epoch, epochs):
        place[:] = epoch, -1
        scheduler.start_epoch(epoch)
        for i in range(iterations):
            place[:] = epoch, i
            if not used or used[-1][2] != optimizer.param_groups[0]["lr"]:
                used.append([epoch, i, optimizer.param_groups[0]["lr"]])
            scheduler.after_step(epoch, i)
        place[:] = epoch, iterations
        scheduler.end_epoch(epoch)
    return calls, used


def assert_same(ours, recorded):
    assert [row[:-1] for row in ours] == [row[:-1] for row in recorded]
    assert [row[-1] for row in ours] == pytest.approx([row[-1] for row in recorded], rel=1e-12, abs=0)


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_every_recorded_rate(name, length):
    recorded = golden("schedules")[name]
    optimizer, scheduler = schedule(name)
    before = optimizer.param_groups[0]["lr"]
    assert before == pytest.approx(recorded[length]["lr_before_any_step"], rel=1e-12, abs=0)
    iterations = int(length.removeprefix("iterations_"))
    calls, used = run(optimizer, scheduler, recorded["schedular"]["epochs"], iterations)
    assert_same(calls, recorded[length]["scheduler_calls"])
    assert_same(used, recorded[length]["used_by_optimizer"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(name):
    epochs = golden("schedules")[name]["schedular"]["epochs"]
    _, whole = run(*schedule(name), epochs, 3)
    for start in range(1, epochs):
        optimizer, scheduler = schedule(name)
        scheduler.resume_at(start)
        _, resumed = run(optimizer, scheduler, epochs, 3, from_epoch=start)
        assert_same(resumed, [row for row in whole if row[0] >= start])


def test_short_runs_can_warm_up_in_fewer_iterations():
    optimizer, scheduler = schedule("Pretrain.yaml", warmup_step_size=2)
    _, used = run(optimizer, scheduler, 1, 60)
    assert [i for _, i, _ in used] == [0, *range(3, 42, 2)]
    assert used[-1][2] == pytest.approx(1e-4)


def test_without_warm_up_the_first_rate_is_the_peak():
    optimizer, scheduler = schedule("Pretrain.yaml", warmup_epochs=0)
    _, used = run(optimizer, scheduler, 2, 5)
    assert used[0] == [0, 0, 1e-4] and used[1][:2] == [1, 0]


def test_only_cosine():
    with pytest.raises(UserError, match="only cosine"):
        schedule("Pretrain.yaml", sched="step")
    with pytest.raises(ValueError, match="start"):
        create_scheduler(None, {"epochs": 1, "min_lr": 0, "warmup_lr": 0, "warmup_epochs": 0}, "middle")


@pytest.mark.parametrize("name", CONFIGS)
def test_our_configs_have_the_published_values(name):
    recorded = golden("schedules")[name]
    config = read_config(f"configs/{name}", TABLES[recorded["script"].removesuffix(".py")])
    for section in ("optimizer", "schedular"):
        for key, value in recorded[section].items():
            assert config[section][key] == value, (section, key)
    if recorded["warm_up_key"] is not None:
        assert config["warm_up"] == recorded["warm_up_key"]
    if recorded["alpha"] is not None:
        assert config["alpha"] == recorded["alpha"]
