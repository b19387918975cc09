"""What a training step is. A program is a list of phases, each with its own discriminator and optimisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A stretch of training with one batch size and one set of states."""

    num_steps: int
    batch_size: int
    states: tuple[int, ...]
    """Which states it reads, by solver steps done."""


class Program(Protocol):
    """One way to train one kind of student."""

    student: nn.Module
    phases: list[Phase]

    def begin(self, phase: int) -> None:
        """Make the discriminator and optimisers of a phase afresh."""

    def step(self, batch: Mapping[int, Tensor], phase: int, step: int) -> Metrics:
        """Train on one batch of states (float32, stored units, on the device); readings as 0-d tensors."""

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint must hold besides the average."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The same for optimisers."""


def mean_metrics(readings: Sequence[Metrics]) -> Metrics:
    """By name, the mean of several readings."""
    names = sorted({name for reading in readings for name in reading})
    return {
        name: torch.stack([reading[name].float() for reading in readings if name in reading]).mean() for name in names
    }
