"""Learning rates, optimisers and the moving average of the weights."""

import copy
import math

import pytest
import torch
from tiny_runs import recipe

from cifar_ft import models
from cifar_ft.training import (
    lr_factor,
    make_optimizer,
    move_average,
    set_lr,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def factors(steps_per_epoch=7, **overrides):
    mine = recipe(**overrides)
    return [lr_factor(mine, step, steps_per_epoch) for step in range(mine.epochs * steps_per_epoch)]


def test_a_constant_schedule_stays():
    assert set(factors(schedule="constant", epochs=5)) == {1.0}


def test_the_cosine_schedule_is_torchs_stepped_once_an_epoch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    expected = []
    for _ in range(60):
        optimizer.step()
        expected += [schedule.get_last_lr()[0]] * 7
        schedule.step()
    assert factors(schedule="cosine", epochs=60) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("epochs", [1, 2, 10])
def test_one_cycle_rises_to_1_and_falls_to_nearly_0(warmup, epochs):
    values = factors(20, schedule="one_cycle", epochs=epochs, warmup=warmup)
    peak = values.index(max(values))
    assert values[peak] == pytest.approx(1, abs=0.07)
    assert peak == pytest.approx(warmup * (len(values) - 1), abs=1)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[-1] == pytest.approx(0.01)
    assert min(values) > 0


def test_one_cycle_of_a_single_step_has_a_learning_rate():
    assert 0 < lr_factor(recipe(schedule="one_cycle", epochs=1), 0, 1) <= 1


def test_the_head_gets_its_own_learning_rate_and_frozen_parts_none():
    mine = recipe(lr=0.02, head_lr_factor=10, freeze="stem")
    model = models.build_model(mine)
    body, head = make_optimizer(model, mine).param_groups
    assert (body["lr"], head["lr"]) == (0.02, 0.2)
    assert {id(p) for p in head["params"]} == {id(p) for p in model.fc.parameters()}
    assert {id(p) for p in body["params"]} == {id(p) for p in model.layer1.parameters()}
    assert all((g["momentum"], g["weight_decay"], g["nesterov"]) == (0.9, 5e-4, True) for g in (body, head))
    set_lr(optimizer := make_optimizer(model, mine), 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]


def test_adamw_is_adamw():
    mine = recipe(optimizer="adamw", lr=0.001, head_lr_factor=3, weight_decay=0.05)
    optimizer = make_optimizer(models.build_model(mine), mine)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.001, 0.05), (0.003, 0.05)]


def test_with_the_backbone_frozen_only_the_head_is_optimised():
    mine = recipe(freeze="backbone", head_lr_factor=10)
    (group,) = make_optimizer(models.build_model(mine), mine).param_groups
    assert group["lr"] == pytest.approx(0.5)


def test_the_moving_average_is_the_one_computed_by_hand():
    model = torch.nn.BatchNorm1d(3)
    average = copy.deepcopy(model)
    generator, expected = torch.Generator().manual_seed(0), model.weight.detach().double()
    for step in range(41):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3, generator=generator))
            model.running_mean.copy_(model.weight)
            model.num_batches_tracked += 1
        move_average(average, model, 0.7, step)
        if step % 4 == 3:  # every fourth step, so to the fourth power; at first it forgets faster
            decay = min(0.7, (1 + step) / (10 + step)) ** 4
            expected = decay * expected + (1 - decay) * model.weight.detach().double()
            running = expected - left_of_the_start(step)
            torch.testing.assert_close(average.running_mean.double(), running, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(average.weight.double(), expected, atol=1e-5, rtol=1e-5)
    assert average.num_batches_tracked == 40


def left_of_the_start(step):
    """What is left of the start: weights begin at 1 and running means at 0, and see the same values."""
    return math.prod(min(0.7, (1 + each) / (10 + each)) ** 4 for each in range(3, step + 1, 4))
