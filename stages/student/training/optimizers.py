"""Muon for the kernels inside the student, AdamW for everything else (Jordan et al. 2024).

Muon gives every step of a weight matrix the same size in all directions. On the unrolled student it reaches in half the
steps what AdamW does (docs/ablation.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from advkd.stages.student.config import TrainConfig


class KernelMuon(torch.optim.Muon):
    """torch's Muon, which takes matrices only, for convolution kernels: a matrix of outputs by inputs each."""

    def __init__(self, kernels: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        self._kernels = list(kernels)
        # The matrices share the kernels' memory: moving the one moves the other.
        matrices = [nn.Parameter(kernel.detach().view(len(kernel), -1)) for kernel in self._kernels]
        super().__init__(matrices, lr=learning_rate, weight_decay=weight_decay)

    def take_gradients(self) -> None:
        """Let the matrices have the kernels' gradients; what happens to the one happens to the other."""
        for matrix, kernel in zip(self.param_groups[0]["params"], self._kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.view(len(kernel), -1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of matrices and kernels."""
        super().zero_grad(set_to_none)
        for kernel in self._kernels:
            kernel.grad = None


def make_optimizers(student: nn.Module, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """The optimisers of the unrolled student, by the name that a checkpoint gives them."""
    inner = {
        name
        for name, weight in student.named_parameters()
        if weight.ndim == 4 and (".blocks." in name or ".coarse." in name)
    }
    if config.optimizer == "adamw":
        inner = set()
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if inner:
        kernels = [weight for name, weight in student.named_parameters() if name in inner]
        optimizers["student-muon"] = KernelMuon(kernels, config.kernel_learning_rate, config.weight_decay)
    options: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": config.weight_decay, "fused": True}
    rest = [weight for name, weight in student.named_parameters() if name not in inner]
    optimizers["student-adamw"] = torch.optim.AdamW(rest, lr=config.learning_rate, **options)
    return optimizers
