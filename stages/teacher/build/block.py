"""One block of a cache: sampled in batches, looked at, committed with a note of who made it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from advkd.cache.errors import TeacherError
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.seeds import seeds_of
from advkd.cache.format.store_paths import provenance_path
from advkd.cache.write.writer import CacheWriter
from advkd.stages.provenance import versions
from advkd.stages.teacher.build.plan import Plan
from advkd.stages.teacher.sample.sampling import initial_noise, sample

MIN_SPREAD = 1e-3
"""Standard deviation over seeds below which x_0 counts as constant, where images lie in [−1, 1]."""

States = dict[int, npt.NDArray[Any]]
"""A block: by solver steps done, float32, stored units, shape (block_size, *item_shape)."""
Advance = Callable[[int], None]


def sample_block(plan: Plan, block: int, advance: Advance = lambda num_evaluations: None) -> States:
    """All recorded states of a block; batches are cut at fixed places within it.

    Args:
        plan: the build.
        block: its number.
        advance: hears of network evaluations of one image as they are done.

    Returns:
        Float32 in stored units; x_T is already rounded to the stored dtype, since the teacher starts from it.

    Raises:
        TeacherError: x_0 is not finite.
    """
    seeds = seeds_of(block, plan.layout.block_size)
    shape = (plan.layout.block_size, *plan.recipe.item_shape)
    states = {state.step: np.empty(shape, dtype=np.float32) for state in plan.layout.states}
    for start in range(0, len(seeds), plan.config.batch_size):
        part = slice(start, min(start + plan.config.batch_size, len(seeds)))
        states[0][part] = initial_noise(plan.recipe.root_seed, seeds[part], plan.recipe.item_shape, plan.layout.dtype)
        kept = sample(
            plan.teacher,
            plan.sampler,
            states[0][part],
            seeds=seeds[part],
            root_seed=plan.recipe.root_seed,
            record=[step for step in states if step],
            evaluated=partial(advance, part.stop - part.start),
        )
        for step, values in kept.items():
            states[step][part] = values.numpy()
    return states


def commit_block(writer: CacheWriter, plan: Plan, block: int, states: States, began: datetime, command: str) -> None:
    """Write a sampled block; its provenance first, so that nothing is written after it counts."""
    note = seal(block_provenance(plan, block, began, command))
    write_atomically(plan.store / provenance_path(block), [note])
    writer.commit(block, states)


def check_images(images: npt.NDArray[Any], plan: Plan) -> str:
    """The gate after the first block: x_0 in words.

    Raises:
        TeacherError: all seeds give the same image.
    """
    values = images.astype(np.float32)
    mean, spread = float(values.mean()), float(values.std(axis=0).max())
    described = f"mean {mean:+.3f}, sd {values.std():.3f}, range {values.min():+.2f} to {values.max():+.2f}"
    if len(values) > 1 and spread < MIN_SPREAD:
        raise TeacherError(
            f"teacher {plan.teacher.source}: x_0 is constant over {len(values)} seeds ({described}); nothing was kept"
        )
    return described


def block_provenance(plan: Plan, block: int, began: datetime, command: str) -> dict[str, Any]:
    """Who made a block, when, where, how long it took: outside identity."""
    now = datetime.now(UTC)
    device = plan.device
    return {
        "block": block,
        "began": began.isoformat(timespec="seconds"),
        "seconds": round((now - began).total_seconds(), 3),
        "host": platform.node(),
        "pid": os.getpid(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "batch_size": plan.config.batch_size,
        "command": command,
        "versions": versions("diffusers", "zarr"),
    }
