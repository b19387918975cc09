"""Listening to a pipeline's scheduler: what each of its steps is given, and what it gives.

Pipelines differ in their callbacks, and some have none; all call `scheduler.step`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OnStep = Callable[[Tensor, Tensor, Tensor], None]
"""(the network's output after guidance, the state, the next state), as the scheduler has them."""


@contextmanager
def listening(scheduler: Any, on_step: OnStep) -> Iterator[None]:
    """Have a function called after each step of a scheduler."""
    original = scheduler.step

    @functools.wraps(original)  # pipelines look up which arguments a scheduler's step takes
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(model_output, timestep, sample, *args, **kwargs)
        on_step(model_output, sample, result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step  # the class's own again


@contextmanager
def counting_rows(network: nn.Module) -> Iterator[list[int]]:
    """Count the rows of each batch that a network evaluates; Z-Image's takes a list of them."""
    rows: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = args[0] if args else next(kwargs[key] for key in ("hidden_states", "sample", "x") if key in kwargs)
        rows.append(len(batch))

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@contextmanager
def disturbing(network: nn.Module, disturb: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Have a network's outputs changed, each tensor by the same function; not at all if there is none."""
    if disturb is None:
        yield
        return
    change = disturb

    def changed(output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, list):  # a tensor per image
            return list(change(torch.stack(output)).unbind())
        if isinstance(output, tuple):
            return tuple(changed(part) for part in output)
        output.sample = changed(output.sample)
        return output

    handle = network.register_forward_hook(lambda module, args, output: changed(output))
    try:
        yield
    finally:
        handle.remove()


def first_rows(given: Any, batch: int) -> Any:
    """What a network was given, for `batch` images alone where guidance evaluates twice as many rows at once."""
    if isinstance(given, Tensor):
        return given[:batch] if given.ndim and len(given) == 2 * batch else given
    if isinstance(given, dict):
        return {name: first_rows(value, batch) for name, value in given.items()}
    if isinstance(given, list | tuple):
        rows = given[:batch] if isinstance(given, list) and len(given) == 2 * batch else given
        return type(given)(first_rows(value, batch) for value in rows)
    return given
