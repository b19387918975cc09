"""Optimizer steps with gradient accumulation, over all processes.

Processes hold the same weights and average their gradients, with one all-reduce per step. DistributedDataParallel isn't
used: its hooks don't support gradients of gradients, which the critics' penalties need, nor losses of several forward
passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from advkd.stages.student.training.muon import KernelMuon


class Descent:
    """Some parameters and the optimizers that update them.

    Args:
        accelerator: device, precision and the other processes.
        parameters: to update.
        optimizers: each of a part of the parameters.
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
        """Accumulate a loss's gradients."""
        self._accelerator.backward(loss)

    def step(self, factor: float = 1.0) -> None:
        """Update the parameters by the accumulated gradients, and clear them.

        Args:
            factor: of the learning rates.
        """
        average_gradients(self._accelerator, self._parameters)
        scaler = self._accelerator.scaler  # None unless in float16
        for optimizer in self._optimizers:
            if isinstance(optimizer, KernelMuon):
                optimizer.take_gradients()
            if scaler is not None:
                scaler.unscale_(optimizer)
        updates = True
        if self._clip or scaler is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, self._clip or math.inf)
            # An overflow anywhere makes the common norm infinite: either all optimizers skip the step, or none does.
            updates = scaler is None or bool(torch.isfinite(norm))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            if updates:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mean: Tensor = accelerator.reduce(flat, reduction="mean")
    parts = torch.split(mean, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
