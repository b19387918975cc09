"""Optimiser steps, over passes and over processes that train together.

Processes hold the same weights and average their gradients, one message a step. Not through DistributedDataParallel:
its hooks know nothing of gradients of gradients, which the critics' penalties need, nor of losses of several passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from advkd.stages.student.training.optimizers import KernelMuon


class Descent:
    """Some parameters and the optimisers that move them.

    Args:
        accelerator: device, precision and the other processes.
        parameters: what is moved.
        optimizers: each of a part of them.
        clip: largest norm of the whole gradient; 0 doesn't clip.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parameters: Iterable[nn.Parameter],
        optimizers: Sequence[Optimizer],
        clip: float = 0.0,
    ) -> None:
        self._accelerator = accelerator
        self._parameters = list(parameters)
        self._optimizers = list(optimizers)
        self._clip = clip
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to what was gathered since the last step."""
        self._accelerator.backward(loss)

    def step(self, factor: float = 1.0) -> None:
        """Move the parameters along what was gathered, and forget it.

        Args:
            factor: of the learning rates.
        """
        average_gradients(self._accelerator, self._parameters)
        scaler = self._accelerator.scaler  # of float16 alone
        for optimizer in self._optimizers:
            if isinstance(optimizer, KernelMuon):
                optimizer.take_gradients()
            if scaler is not None:
                scaler.unscale_(optimizer)
        moves = True
        if self._clip or scaler is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, self._clip or math.inf)
            # An overflow anywhere spoils the norm that everything is clipped by: all optimisers skip the step, or none.
            moves = scaler is None or bool(torch.isfinite(norm))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            if moves:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Let the gradients be the mean of all processes'."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mean: Tensor = accelerator.reduce(flat, reduction="mean")
    parts = torch.split(mean, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
