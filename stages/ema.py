"""Averages of weights over the course of training; only the average is evaluated."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn


class ExponentialMovingAverage:
    """A copy of a model whose weights are an average of the model's past weights.

    Args:
        model: to average.
        decay: of the average per step, in [0, 1); early steps use (1 + n) / (10 + n) while that is smaller.
        width: replaces `decay` by a power-function profile of this relative width, in (0, 0.28): the average covers a
            constant fraction of the training so far (Karras et al. 2024, §3.1).
    """

    def __init__(self, model: nn.Module, decay: float, width: float | None = None) -> None:
        self.decay = decay
        self._exponent = None if width is None else power_exponent(width)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def weight(self, step: int) -> float:
        """Weight of the model in the average after step number `step`, counted from 0; in [0, 1]."""
        if self._exponent is not None:
            return float(1.0 - (1.0 - 1.0 / (step + 1)) ** (self._exponent + 1.0))
        return 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average after step number `step`, counted from 0; buffers are copied."""
        torch._foreach_lerp_(
            [parameter.data for parameter in self.model.parameters()],
            [parameter.data for parameter in model.parameters()],
            self.weight(step),
        )
        for averaged, current in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)


def power_exponent(width: float) -> float:
    """γ of the profile t^γ whose standard deviation is `width` of the training so far (Karras et al. 2024, eq. 2)."""
    roots = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))
