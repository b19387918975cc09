"""Sampling with recorded states: diffusers' own loop, one batch of seeds at a time.

Noise comes from `advkd.cache.format.noise`, so a seed's trajectory depends on nothing but the recipe: not on the batch
it is in, the order of batches, or the machine that draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.cache.errors import TeacherError
from advkd.cache.format.condition import ClassCondition
from advkd.cache.format.noise import standard_normal
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.solver_path import SolverPath, initial_scale

Evaluated = Callable[[], None]


def initial_noise(
    root_seed: int, seeds: Sequence[int] | range, item_shape: tuple[int, ...], dtype: str
) -> npt.NDArray[Any]:
    """x_T of some seeds as it is stored: unit variance, rounded to the storage dtype, which the teacher starts from."""
    return standard_normal(root_seed, seeds, item_shape).astype(dtype)


@torch.inference_mode()
def record_states(
    teacher: Teacher,
    path: SolverPath,
    noise: npt.NDArray[Any],
    *,
    seeds: Sequence[int] | range,
    root_seed: int,
    record: Collection[int],
    condition: ClassCondition | None = None,
    evaluated: Evaluated = lambda: None,
) -> dict[int, Tensor]:
    """Denoise one batch and keep the states after some solver steps.

    Args:
        teacher: the network.
        path: the solver, set up for this teacher's diffusion.
        noise: x_T in stored units, shape (B, C, H, W).
        seeds: the batch's seeds, for their labels and the noise that ancestral samplers add.
        root_seed: the recipe's.
        record: solver steps after which the state is kept.
        condition: the recipe's; None for an unconditional teacher.
        evaluated: called after each prediction.

    Returns:
        By solver steps done, float32 on the CPU in stored units (x_t / scale), shape (B, C, H, W).

    Raises:
        TeacherError: x_0 is not finite.
    """
    scheduler, device = path.new_scheduler(), teacher.device
    labels = None
    if condition is not None:
        labels = torch.from_numpy(condition.labels_of(np.asarray(seeds, dtype=np.int64))).to(device, torch.int64)
    timesteps = path.timesteps.to(device)  # at once: a copy per step would make the host wait for the device
    x = torch.from_numpy(noise.astype(np.float32)).to(device, memory_format=teacher.memory_format)
    kept = {0: x} if 0 in record else {}
    x = x * initial_scale(scheduler)  # as diffusers rounds it; the state's scale is the same to ten digits
    for call in range(path.evaluations):
        seen = x if path.solver.flow else scheduler.scale_model_input(x, scheduler.timesteps[call])
        prediction = teacher.predict(seen, timesteps[call], labels, condition)
        if not path.uses_variance:
            prediction = prediction[:, : x.shape[1]]
        if path.applied_x0 is not None:
            ratio = float(scheduler.sigmas[call])
            prediction = path.applied_x0.constrain(prediction, seen, ratio, path.prediction_type)
        fresh = None
        if path.stochastic:
            drawn = standard_normal(root_seed, seeds, teacher.item_shape, stream=1 + call)
            fresh = torch.from_numpy(drawn).to(device)
        x = path.solver.step(scheduler, call, prediction, x, path.sampler.eta, fresh)
        evaluated()
        done = path.solver.steps_done(call + 1, path.sampler.steps)
        if done in record and done is not None:
            kept[done] = x / path.states[done].scale  # stays on the device: fetching it would make the host wait
    if not bool(torch.isfinite(x).all()):
        raise TeacherError(
            f"teacher {teacher.source}: x_0 of seeds {seeds[0]}:{seeds[-1] + 1} is not finite (NaN or infinite); "
            f"{'check the checkpoint' if teacher.dtype == torch.float32 else 'try float32 precision'}"
        )
    return {done: values.cpu() for done, values in kept.items()}
