"""An exponential moving average of weights; only the average is ever evaluated."""

from __future__ import annotations

import copy

import torch
from torch import nn


class ExponentialMovingAverage:
    """Keeps a copy of a model that follows it slowly.

    Args:
        model: what to follow.
        decay: of the average per step, in [0, 1); early steps use (1 + n) / (10 + n) while that is smaller.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model after its step number `step`, counted from 0; buffers are copied."""
        weight = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(
            [parameter.data for parameter in self.model.parameters()],
            [parameter.data for parameter in model.parameters()],
            weight,
        )
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
