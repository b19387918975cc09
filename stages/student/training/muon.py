"""Muon for convolution kernels (Jordan et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class KernelMuon(torch.optim.Muon):
    """torch's Muon takes matrices only; each kernel becomes a matrix of output channels × inputs."""

    def __init__(self, kernels: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        self._kernels = list(kernels)
        # The matrices share the kernels' memory, so a step on a matrix changes its kernel.
        matrices = [nn.Parameter(kernel.detach().view(len(kernel), -1)) for kernel in self._kernels]
        super().__init__(matrices, lr=learning_rate, weight_decay=weight_decay)

    def take_gradients(self) -> None:
        """Make the kernels' gradients those of the matrices; they share memory too."""
        for matrix, kernel in zip(self.param_groups[0]["params"], self._kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.view(len(kernel), -1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of matrices and kernels."""
        super().zero_grad(set_to_none)
        for kernel in self._kernels:
            kernel.grad = None
