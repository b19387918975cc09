"""The unrolled student's paired losses: every submodule against the cached states."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from advkd.stages.student.geometry import Geometry
from advkd.stages.student.training.losses import REGRESSIONS, mean_square
from advkd.stages.student.unrolled.config import ObjectiveConfig
from advkd.stages.student.unrolled.network import MIN_REACH, Level, jump_target, reach

Metrics = dict[str, Tensor]
Tensors = Sequence[Tensor]
States = Mapping[int, Tensor]
"""By number of solver steps: shape (N, C, H, W), stored units."""


class Regression:
    """Losses of x̂_0 and of states, weighted by configuration."""

    def __init__(self, objective: ObjectiveConfig, geometry: Geometry) -> None:
        self._objective = objective
        self._steps, self._levels = geometry.steps, geometry.levels
        self._weights = head_weights(objective.head_weighting, geometry.levels)

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return REGRESSIONS[self._objective.regression](prediction, target, self._objective.huber_width)

    @property
    def states(self) -> tuple[int, ...]:
        """The states that the losses read, as numbers of solver steps."""
        objective = self._objective
        ends_suffice = not objective.state and (not objective.heads or objective.head_target == "x0")
        return (self._steps[0], self._steps[-1]) if ends_suffice else self._steps

    def __call__(
        self, predictions: Sequence[Tensor], states: Sequence[Tensor], batch: States
    ) -> tuple[Tensor, Metrics]:
        """The weighted loss and its parts.

        Args:
            predictions: every submodule's x̂_0 for the batch's x_T.
            states: every submodule's state.
            batch: the cached states.
        """
        objective, real = self._objective, batch[self._steps[-1]]
        final = self._loss(predictions[-1], real)
        loss = objective.x0 * final
        metrics = {"x0": final.detach(), "mse": mean_square(predictions[-1], real).detach()}
        if objective.heads and len(predictions) > 1:
            targets = zip(predictions[:-1], head_targets(batch, self._steps, self._levels, objective.head_target),
                          self._weights, strict=True)  # fmt: skip
            error = torch.stack([weight * self._loss(x0, target) for x0, target, weight in targets]).sum()
            loss = loss + objective.heads * error
        if objective.state and len(states) > 1:
            reached = zip(states[:-1], self._steps[1:-1], strict=True)
            error = torch.stack([mean_square(state, batch[at]) for state, at in reached]).sum()
            metrics["state"] = error.detach()
            loss = loss + objective.state * error
        return loss, metrics


def head_targets(batch: States, steps: Sequence[int], levels: Sequence[Level], kind: str) -> list[Tensor]:
    """Targets of the submodules before the last; see `ObjectiveConfig.head_target`."""
    x0 = batch[steps[-1]]
    if kind == "x0":
        return [x0] * (len(steps) - 2)
    targets = []
    for k, (before, after) in enumerate(itertools.pairwise(levels[:-1])):
        close = reach(before, after) < MIN_REACH
        targets.append(x0 if close else jump_target(batch[steps[k]], batch[steps[k + 1]], before, after))
    return targets


def head_weights(kind: str, levels: Sequence[Level]) -> list[float]:
    """Weights of the submodules before the last: 1, or √SNR = alpha / sigma of their state, scaled to mean 1."""
    inner = levels[1:-1]
    if kind == "uniform" or not inner:
        return [1.0] * len(inner)
    roots = [alpha / sigma for alpha, sigma in inner]
    return [root * len(roots) / sum(roots) for root in roots]
