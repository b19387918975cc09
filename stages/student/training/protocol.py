"""What the training loop asks of a network and of the program that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from advkd.cache.errors import UsageError

if TYPE_CHECKING:
    from advkd.stages.student.training.data import Batch

Metrics = dict[str, Tensor]


class StudentNetwork(nn.Module):
    """A student's network: x_T (N, C, H, W), unit normal → x_0 of the same shape; pixels are about [−1, 1].

    A conditional one takes class labels, too: int64, shape (N,).
    """

    def heads(self, noise: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """One prediction per recorded state after x_T."""
        raise NotImplementedError

    def start_from(self, weights: bytes) -> None:
        """Take the weights of the teacher's network, a checked safetensors file; of kinds that start from them."""
        raise NotImplementedError

    def deployed_parameters(self) -> int:
        """Parameters that a sample needs; all of them, unless a kind has some for training only."""
        return sum(parameter.numel() for parameter in self.parameters())


class UnrollingNetwork(StudentNetwork):
    """A network whose submodules each predict x̂_0 and make the next state from it."""

    def unroll(self, noise: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Every submodule's x̂_0, and every state after x_T, in stored units; the last state is the last x̂_0."""
        raise NotImplementedError


def check_labels(noise: Tensor, labels: Tensor | None, num_classes: int) -> None:
    """Check that a network gets labels if it has classes; their range is left to whoever has the labels as numbers.

    Raises:
        UsageError: labels are missing or surplus, or not one whole number for each x_T.
    """
    if labels is None:
        if num_classes:
            raise UsageError(f"the student needs class labels for its {num_classes} classes: give int64, shape (N,)")
    elif not num_classes:
        raise UsageError("the student is unconditional: leave out the class labels")
    elif labels.dtype != torch.int64 or labels.shape != noise.shape[:1]:
        raise UsageError(f"class labels are {labels.dtype}, shape {tuple(labels.shape)}: expected int64, shape (N,)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A stretch of training with one batch size and one set of states."""

    num_steps: int
    batch_size: int
    """Per process."""
    states: tuple[int, ...]
    """The states that it reads, as numbers of solver steps."""


class Program(Protocol):
    """How one kind of student is trained: in phases, each with its own critics and optimizers."""

    student: nn.Module
    phases: list[Phase]

    def begin(self, phase: int) -> None:
        """Create a phase's critics and optimizers."""

    def step(self, batch: Batch, phase: int, step: int) -> Metrics:
        """Train on one batch, on the device; returns scalar tensors."""

    def modules(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds besides the average."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers that a checkpoint holds."""


def mean_metrics(readings: Sequence[Metrics]) -> Metrics:
    """The mean of several readings, by name."""
    names = sorted({name for reading in readings for name in reading})
    return {
        name: torch.stack([reading[name].float() for reading in readings if name in reading]).mean() for name in names
    }
