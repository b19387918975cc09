"""What a pass costs: parameters, multiply-accumulates, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from advkd.stages.decoder import Decoder
from advkd.stages.evaluate.prompted import PromptedTeacher
from advkd.stages.teacher.load.network import Teacher

LARGE_BATCH = 64
"""Images timed together, beside one alone."""
MIN_REPEATS, MAX_REPEATS = 3, 15
SECONDS_OF_TIMING = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of one network evaluation."""

    num_parameters: int
    macs: float
    """Multiply-accumulates of one image: convolutions, matrix products, attention."""
    latency: dict[int, float]
    """Seconds by batch size, the median of several runs."""


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
    evaluations: Mapping[str, Callable[[int], Tensor]], batch: int, *, settle: float = 0.0
) -> dict[str, float]:
    """Median seconds of each evaluation at a batch size, timed in turns so that drift affects all alike.

    Args:
        evaluations: by name, what is timed: batch size → values.
        batch: its size.
        settle: seconds of rest before each, for libraries of which one's threads disturb the next one's.
    """

    def seconds(name: str) -> float:
        time.sleep(settle)
        float(evaluations[name](batch).flatten()[0])
        begin = time.perf_counter()
        float(evaluations[name](batch).flatten()[0])  # reading a value waits for the device
        return time.perf_counter() - begin

    warm = max(seconds(name) for name in evaluations)
    repeats = min(MAX_REPEATS, max(MIN_REPEATS, round(SECONDS_OF_TIMING / warm)))
    rounds = [{name: seconds(name) for name in evaluations} for _ in range(repeats)]
    return {name: statistics.median(times[name] for times in rounds) for name in evaluations}


def compare_costs(
    student: nn.Module,
    teacher: Teacher | PromptedTeacher | None,
    item_shape: tuple[int, ...],
    large_batch: int = LARGE_BATCH,
    *,
    condition: Tensor | None = None,
    decoder: Decoder | None = None,
) -> dict[str, Cost]:
    """Cost per pass of the `student`, per evaluation of the `teacher`, and of decoding (`decoder`), timed in turns.

    Args:
        student: x_T (N, C, H, W) → x_0.
        teacher: None where it was not found.
        item_shape: of an item, (C, H, W).
        large_batch: images timed together, beside one alone.
        condition: one row of what the student is told; None if it is told nothing.
        decoder: of latents; None for pixels.
    """
    device = next(student.parameters()).device

    def images_of(batch: int) -> Tensor:
        return torch.zeros(batch, *item_shape, device=device)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        told = [] if condition is None else [condition.to(device).expand(batch, *condition.shape[1:])]
        return (images_of(batch), *told)

    modules = {"student": student}
    evaluations: dict[str, Callable[[int], Tensor]] = {"student": lambda batch: student(*inputs(batch))}
    if isinstance(teacher, PromptedTeacher):
        modules["teacher"], evaluations["teacher"] = teacher.network, teacher.evaluation()
    elif teacher is not None:
        modules["teacher"] = teacher.network
        timestep = torch.tensor(teacher.num_timesteps // 2, device=device)

        def evaluate_teacher(batch: int) -> Tensor:
            images, *labels = inputs(batch)
            return teacher.predict(images, timestep, labels[0] if labels else None)

        evaluations["teacher"] = evaluate_teacher
    if decoder is not None:
        modules["decoder"] = decoder.model
        evaluations["decoder"] = lambda batch: decoder(images_of(batch))
    latency = {batch: interleaved_latency(evaluations, batch) for batch in sorted({1, large_batch})}
    return {
        name: Cost(
            num_parameters=count_parameters(modules[name]),
            macs=count_macs(evaluate),
            latency={batch: seconds[name] for batch, seconds in latency.items()},
        )
        for name, evaluate in evaluations.items()
    }
