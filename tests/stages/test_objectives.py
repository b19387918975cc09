"""Losses against what their formulas say in cases one can work out."""

import math

import pytest
import torch
from torch import nn

from advkd.stages.ema import ExponentialMovingAverage
from advkd.stages.schedules import one_cycle
from advkd.stages.student.training import losses as objectives


def test_pseudo_huber_is_quadratic_near_and_linear_far() -> None:
    zero = torch.zeros(2, 1, 4, 4)
    near = objectives.pseudo_huber(zero + 1e-3, zero, 0.1)
    assert float(near) == pytest.approx(1e-6 / 0.2, rel=1e-2)
    far = objectives.pseudo_huber(zero - 50.0, zero, 0.1)
    assert float(far) == pytest.approx(49.9, rel=1e-4)
    mixed = objectives.pseudo_huber(torch.tensor([0.0, 3.0]), torch.zeros(2), 4.0)
    assert float(mixed) == pytest.approx(0.5)


def test_relativistic_losses_are_each_others_mirror() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    assert float(objectives.relativistic_generator(real, fake)) == pytest.approx(
        (math.log1p(math.exp(1.5)) + math.log1p(math.exp(-4.0))) / 2
    )
    torch.testing.assert_close(
        objectives.relativistic_discriminator(real, fake), objectives.relativistic_generator(fake, real)
    )


def test_non_saturating_losses() -> None:
    logits = torch.zeros(3)
    assert float(objectives.non_saturating_generator(logits, logits)) == pytest.approx(math.log(2))
    assert float(objectives.non_saturating_discriminator(logits, logits)) == pytest.approx(2 * math.log(2))


def test_penalties_of_a_linear_discriminator() -> None:
    images = torch.randn(5, 1, 2, 2, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 2.0, 0.0])
    logits = images.flatten(1) @ weight
    assert float(objectives.squared_gradient(logits, images)) == pytest.approx(9.0)
    assert float(objectives.unit_gradient_penalty(images.flatten(1) @ weight, images)) == pytest.approx(4.0)


def test_one_cycle_rises_and_falls() -> None:
    factors = [one_cycle(step, 100, 0.1) for step in range(100)]
    assert factors.index(max(factors)) == 9
    assert factors[9] == pytest.approx(1.0)
    assert factors[99] == pytest.approx(0.0)
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)


def test_average_follows_and_copies_buffers() -> None:
    model = nn.BatchNorm1d(2)
    average = ExponentialMovingAverage(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(7.0)  # type: ignore[union-attr,operator]
    average.update(model, step=0)
    assert float(average.model.weight[0]) == pytest.approx(1.0 + 0.9 * 2.0)  # type: ignore[index,arg-type]
    assert float(average.model.running_mean[0]) == 7.0  # type: ignore[index,arg-type]
    for step in range(1, 200):
        average.update(model, step)
    assert float(average.model.weight[0]) == pytest.approx(3.0, abs=1e-6)  # type: ignore[index,arg-type]
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
