"""Optimizers of the student by name: a new one is a function and a line in `OPTIMIZERS`.

Importing this module doesn't import torch, so that a configuration can be checked against the names alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def adamw(
    student: nn.Module, learning_rate: float, kernel_learning_rate: float, weight_decay: float
) -> dict[str, Optimizer]:
    """AdamW for all weights (Loshchilov and Hutter 2019); `kernel_learning_rate` has no effect."""
    return {"student-adamw": _adamw(list(student.parameters()), learning_rate, weight_decay)}


def muon(
    student: nn.Module, learning_rate: float, kernel_learning_rate: float, weight_decay: float
) -> dict[str, Optimizer]:
    """Muon for the convolution kernels inside submodules, AdamW for the rest (Jordan et al. 2024).

    Muon makes the step of a weight matrix equally large in all directions. The unrolled student needs half the steps
    that it needs with AdamW (docs/ablation.md).
    """
    from advkd.stages.student.training.muon import KernelMuon

    kernels: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in student.named_parameters():
        is_inner_kernel = weight.ndim == 4 and (".blocks." in name or ".coarse." in name)
        (kernels if is_inner_kernel else rest).append(weight)
    optimizers: dict[str, Optimizer] = {}
    if kernels:
        optimizers["student-muon"] = KernelMuon(kernels, kernel_learning_rate, weight_decay)
    optimizers["student-adamw"] = _adamw(rest, learning_rate, weight_decay)
    return optimizers


def _adamw(weights: list[nn.Parameter], learning_rate: float, weight_decay: float) -> Optimizer:
    import torch

    # β₂ = 0.99 instead of torch's 0.999: the adversarial loss changes as the critics learn.
    return torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


OPTIMIZERS: dict[str, Callable[[nn.Module, float, float, float], dict[str, Optimizer]]] = {"muon": muon, "adamw": adamw}
"""By the name in `train.optimizer`: a function of (student, `learning_rate`, `kernel_learning_rate`, `weight_decay`)
that returns optimizers by the name under which a checkpoint stores them."""
