"""Paired losses: what each submodule is asked for, and how much it counts."""

import math

import pytest
import torch

from advkd.stages.student.geometry import Geometry
from advkd.stages.student.unrolled.config import ObjectiveConfig
from advkd.stages.student.unrolled.network import jump
from advkd.stages.student.unrolled.regression import Regression, head_targets, head_weights

LEVELS = ((0.0, 1.0), (0.6, 0.8), (0.9, math.sqrt(0.19)), (1.0, 0.0))
STEPS = (0, 2, 4, 6)
GEOMETRY = Geometry(
    item_shape=(1, 4, 4),
    levels=LEVELS,
    timesteps=(999.0, 600.0, 200.0, -1.0),
    steps=STEPS,
    root_seed=0,
    noise_dtype="float16",
)


@pytest.fixture
def batch() -> dict[int, torch.Tensor]:
    return {step: torch.randn(5, 1, 4, 4) for step in STEPS}


def test_jump_targets_lead_from_state_to_state(batch: dict[int, torch.Tensor]) -> None:
    targets = head_targets(batch, STEPS, LEVELS, "jump")
    for k, target in enumerate(targets):
        reached = jump(batch[STEPS[k]], target, LEVELS[k], LEVELS[k + 1])
        torch.testing.assert_close(reached, batch[STEPS[k + 1]])
    assert all(target is batch[6] for target in head_targets(batch, STEPS, LEVELS, "x0"))


def test_levels_too_close_for_a_jump_aim_at_x0(batch: dict[int, torch.Tensor]) -> None:
    close = ((0.0, 1.0), (0.001, 0.9999995), (0.9, math.sqrt(0.19)), (1.0, 0.0))
    first, second = head_targets(batch, STEPS, close, "jump")
    assert first is batch[6] and second is not batch[6]


def test_heads_count_by_the_signal_in_what_they_make() -> None:
    assert head_weights("uniform", LEVELS) == [1.0, 1.0]
    first, second = head_weights("snr", LEVELS)
    assert first + second == pytest.approx(2.0)
    assert second / first == pytest.approx((0.9 / math.sqrt(0.19)) / (0.6 / 0.8))


def test_only_what_is_asked_for_counts_and_is_read(batch: dict[int, torch.Tensor]) -> None:
    predictions = [torch.randn(5, 1, 4, 4) for _ in range(3)]
    states = [torch.randn(5, 1, 4, 4) for _ in range(3)]

    def loss(**changes: object) -> float:
        settings = {"regression": "mse", "x0": 0.0, "heads": 0.0, "state": 0.0} | changes
        return float(Regression(ObjectiveConfig(**settings), GEOMETRY)(predictions, states, batch)[0])  # type: ignore[arg-type]

    assert loss() == 0.0
    assert loss(x0=2.0) == pytest.approx(2 * float((predictions[2] - batch[6]).square().mean()))
    targets = head_targets(batch, STEPS, LEVELS, "jump")
    by_hand = sum(float((p - t).square().mean()) for p, t in zip(predictions[:2], targets, strict=True))
    assert loss(heads=0.5) == pytest.approx(0.5 * by_hand)
    by_hand = sum(float((s - batch[step]).square().mean()) for s, step in zip(states[:2], (2, 4), strict=True))
    assert loss(state=3.0) == pytest.approx(3 * by_hand)
    assert Regression(ObjectiveConfig(heads=0.0, state=0.0), GEOMETRY).states == (0, 6)
    assert Regression(ObjectiveConfig(head_target="x0", state=0.0), GEOMETRY).states == (0, 6)
    assert Regression(ObjectiveConfig(state=0.0), GEOMETRY).states == STEPS


def test_readings_say_what_was_weighted(batch: dict[int, torch.Tensor]) -> None:
    predictions = [batch[6]] * 3
    _, metrics = Regression(ObjectiveConfig(), GEOMETRY)(predictions, [batch[2], batch[4], batch[6]], batch)
    assert float(metrics["mse"]) == float(metrics["state"]) == 0.0
