"""Averages of weights over the course of training; only the average is ever evaluated."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn


class ExponentialMovingAverage:
    """Keeps a copy of a model that follows it slowly.

    Args:
        model: what to follow.
        decay: of the average per step, in [0, 1); early steps use (1 + n) / (10 + n) while that is smaller.
        width: instead of it, the relative width of a power-function profile, in (0, 0.28): the average looks back over
            a constant fraction of the training so far (Karras et al. 2024, §3.1).
    """

    def __init__(self, model: nn.Module, decay: float, width: float | None = None) -> None:
        self.decay = decay
        self._exponent = None if width is None else power_exponent(width)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def weight(self, step: int) -> float:
        """How far the average moves towards the model after its step number `step`, counted from 0."""
        if self._exponent is not None:
            return float(1.0 - (1.0 - 1.0 / (step + 1)) ** (self._exponent + 1.0))
        return 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model after its step number `step`, counted from 0; buffers are copied."""
        torch._foreach_lerp_(
            [parameter.data for parameter in self.model.parameters()],
            [parameter.data for parameter in model.parameters()],
            self.weight(step),
        )
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


def power_exponent(width: float) -> float:
    """γ of the profile t^γ whose standard deviation is `width` of the training so far (Karras et al. 2024, eq. 2)."""
    roots = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))
