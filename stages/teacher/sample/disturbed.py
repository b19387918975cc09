"""A small random error in a network's predictions for one half of a batch, like another machine's arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkd.cache.format.condition import ClassCondition
from advkd.stages.teacher.load.network import Teacher


class Disturbance:
    """Adds an error to the second half of each batch.

    Args:
        relative_error: of a prediction, root mean square.
    """

    def __init__(self, relative_error: float) -> None:
        self._relative_error = relative_error
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, predicted: Tensor, batch: int) -> Tensor:
        """Shape (k · batch, …) in and out: guidance may evaluate several batches at once, each of an even number."""
        parts = predicted.reshape(-1, 2, batch // 2, *predicted.shape[1:])
        second = parts[:, 1]
        noise = torch.randn(second.shape, generator=self._generator).to(predicted)
        size = second.float().square().mean().sqrt()
        second = second + (self._relative_error * size * noise).to(predicted.dtype)
        return torch.stack([parts[:, 0], second], dim=1).flatten(0, 2)


@dataclass(frozen=True, kw_only=True)
class DisturbedTeacher(Teacher):
    """A teacher with such an error in its predictions."""

    disturb: Disturbance

    def predict(
        self, x: Tensor, timestep: Tensor, labels: Tensor | None = None, condition: ClassCondition | None = None
    ) -> Tensor:
        """As `Teacher.predict`, but for the error."""
        return self.disturb(Teacher.predict(self, x, timestep, labels, condition), len(x))
