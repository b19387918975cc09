"""Sampling with recorded states: diffusers' own loop, one batch of seeds at a time.

Noise comes from `advkd.cache.format.noise`, so a seed's trajectory depends on nothing but the recipe: not on the batch
it is in, the order of batches, or the machine that draws it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.cache.errors import TeacherError
from advkd.cache.format.noise import standard_normal
from advkd.stages.teacher.config import SamplerConfig
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.schedulers import make_scheduler
from advkd.stages.teacher.path.solvers import find_solver, trajectory_states

Evaluated = Callable[[], None]


def initial_noise(
    root_seed: int, seeds: Sequence[int] | range, item_shape: tuple[int, ...], dtype: str
) -> npt.NDArray[Any]:
    """x_T of some seeds as it is stored: unit variance, rounded to the storage dtype, which the teacher starts from."""
    return standard_normal(root_seed, seeds, item_shape).astype(dtype)


@torch.inference_mode()
def sample(
    teacher: Teacher,
    sampler: SamplerConfig,
    noise: npt.NDArray[Any],
    *,
    seeds: Sequence[int] | range,
    root_seed: int,
    record: Collection[int],
    evaluated: Evaluated = lambda: None,
) -> dict[int, Tensor]:
    """Denoise one batch and keep the states after some solver steps.

    Args:
        teacher: the network and its scheduler's configuration.
        sampler: which solver, how many steps.
        noise: x_T in stored units, shape (B, C, H, W).
        seeds: the batch's seeds, for the noise that ancestral samplers add.
        root_seed: the recipe's.
        record: solver steps after which the state is kept.
        evaluated: called after each network evaluation.

    Returns:
        By solver steps done, float32 on the CPU in stored units (x_t / scale), shape (B, C, H, W).

    Raises:
        TeacherError: x_0 is not finite.
    """
    solver = find_solver(sampler.name)
    scheduler = make_scheduler(teacher.scheduler_config, sampler)
    states = trajectory_states(sampler, scheduler)
    device = teacher.device
    timesteps = scheduler.timesteps.to(device)  # at once: a copy per step would make the host wait for the device
    x = torch.from_numpy(noise.astype(np.float32)).to(device, memory_format=teacher.memory_format)
    kept = {0: x} if 0 in record else {}
    x = x * float(scheduler.init_noise_sigma)  # as diffusers rounds it; the state's scale is the same to ten digits
    stochastic = solver.ancestral or sampler.eta > 0.0
    for call, timestep in enumerate(scheduler.timesteps):
        prediction = teacher.predict(scheduler.scale_model_input(x, timestep), timesteps[call])
        fresh = None
        if stochastic:
            drawn = standard_normal(root_seed, seeds, teacher.item_shape, stream=1 + call)
            fresh = torch.from_numpy(drawn).to(device)
        x = _step(scheduler, sampler, prediction, timestep, x, fresh)
        evaluated()
        done = solver.steps_done(call + 1, sampler.steps)
        if done in record and done is not None:
            kept[done] = x / states[done].scale  # stays on the device: fetching it would make the host wait
    if not bool(torch.isfinite(x).all()):
        raise TeacherError(
            f"teacher {teacher.source}: x_0 of seeds {seeds[0]}:{seeds[-1] + 1} is not finite (NaN or infinite); "
            "try float32 precision, or check the checkpoint"
        )
    return {done: values.cpu() for done, values in kept.items()}


def _step(
    scheduler: Any,
    sampler: SamplerConfig,
    prediction: Tensor,
    timestep: Tensor,
    x: Tensor,
    fresh: Tensor | None,
) -> Tensor:
    options: dict[str, Any] = {}
    drawing = nullcontext()
    if sampler.name == "ddim":
        options = {"eta": sampler.eta, "variance_noise": fresh if sampler.eta > 0.0 else None}
    elif fresh is not None:
        drawing = _drawing(scheduler, fresh)  # type: ignore[assignment]
    with drawing:
        return scheduler.step(prediction, timestep, x, **options).prev_sample  # type: ignore[no-any-return]


_replacing = threading.Lock()


@contextmanager
def _drawing(scheduler: Any, fresh: Tensor) -> Iterator[None]:
    """Let an ancestral scheduler draw this noise: its `step` takes a generator, but no noise."""
    module: Any = sys.modules[type(scheduler).__module__]
    with _replacing:  # another thread that samples would draw this one's noise
        original = module.randn_tensor
        module.randn_tensor = lambda shape, **_: fresh.reshape(shape)
        try:
            yield
        finally:
            module.randn_tensor = original
