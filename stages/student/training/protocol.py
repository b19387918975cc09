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

    Where the teacher was told something, the network takes it as `condition`: class labels, int64, shape (N,), or
    prompts as `PromptForm` has them, float32, shape (N, rows, columns).
    """

    num_evaluations = 1
    """Of the network inside, per image."""

    def in_fewer(self, noise: Tensor, condition: Tensor | None, count: int) -> Tensor:
        """x_0 by `count` of the evaluations; of networks that have several."""
        raise NotImplementedError

    def heads(self, noise: Tensor, condition: Tensor | None = None) -> list[Tensor]:
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

    def unroll(self, noise: Tensor, condition: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Every submodule's x̂_0, and every state after x_T, in stored units; the last state is the last x̂_0."""
        raise NotImplementedError


def check_condition(
    noise: Tensor, condition: Tensor | None, num_classes: int = 0, prompt_shape: tuple[int, int] | None = None
) -> None:
    """Check that a network is told what it needs; the range of labels is left to whoever has them as numbers.

    Args:
        noise: x_T, shape (N, C, H, W).
        condition: labels or prompts.
        num_classes: of a student of classes; else 0.
        prompt_shape: rows and columns of a prompt, of a student that is told prompts; else None.

    Raises:
        UsageError: the condition is missing or surplus, or has another shape or dtype.
    """
    if prompt_shape is not None:
        shape = (noise.shape[0], *prompt_shape)  # len() would fix the exported batch
        if condition is None or condition.shape != shape or not condition.is_floating_point():
            found = "none" if condition is None else f"{condition.dtype}, shape {tuple(condition.shape)}"
            raise UsageError(f"the student needs prompts as floats of shape {shape}; found {found}")
    elif condition is None:
        if num_classes:
            raise UsageError(f"the student needs class labels for its {num_classes} classes: give int64, shape (N,)")
    elif not num_classes:
        raise UsageError("the student is unconditional: leave out the class labels")
    elif condition.dtype != torch.int64 or condition.shape != noise.shape[:1]:
        found = f"{condition.dtype}, shape {tuple(condition.shape)}"
        raise UsageError(f"class labels are {found}: expected int64, shape (N,)")


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
