"""What a pass costs: parameters, multiply-accumulates, latency."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

LATENCY_BATCHES = (1, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of one network evaluation."""

    num_parameters: int
    macs: float
    """Multiply-accumulates of one image: convolutions, matrix products, attention."""
    latency: dict[int, float]
    """Seconds by batch size, the median of a few runs."""


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def count_macs(evaluate: Callable[[int], object]) -> float:
    """Multiply-accumulates of one image, half of the counted floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        evaluate(1)
    return float(counter.get_total_flops()) / 2


@torch.no_grad()
def interleaved_latency(
    evaluations: Mapping[str, Callable[[int], torch.Tensor]], batch: int, repeats: int = 15
) -> dict[str, float]:
    """Median seconds of each evaluation at a batch size, taken in turns so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in evaluations}
    for round_ in range(repeats + 2):
        for name, evaluate in evaluations.items():
            begin = time.perf_counter()
            float(evaluate(batch).flatten()[0])  # reading a value waits for the device
            if round_ >= 2:
                times[name].append(time.perf_counter() - begin)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}
