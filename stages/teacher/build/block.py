"""One block of a cache: sampled in batches, checked, committed with a note of who made it."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from advkd.cache.errors import TeacherError
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.array_record import Rounding
from advkd.cache.format.seeds import seeds_of
from advkd.cache.format.store_paths import provenance_path
from advkd.stages.provenance import versions
from advkd.stages.teacher.build.plan import Plan
from advkd.stages.teacher.build.recorder import Recorder
from advkd.stages.teacher.sample.sampling import initial_noise

MAX_VALUE = 2.0
"""Images lie in [−1, 1]; a sampler that doesn't clip overshoots a little, latents by far."""
MAX_SHARE_BEYOND = 0.01
"""Of x_0's values that may lie beyond `MAX_VALUE`."""
MIN_SPREAD = 1e-3
"""Standard deviation over seeds below which x_0 counts as constant, where images lie in [−1, 1]."""

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class SampledBlock:
    """A block that is sampled and not committed yet."""

    number: int
    states: dict[int, npt.NDArray[Any]]
    """By solver steps done: in the stored dtype and units, shape (block_size, *item_shape)."""
    roundings: dict[int, Rounding]
    """By solver steps done: what rounding to the stored dtype has changed."""
    further: dict[str, npt.NDArray[Any]]
    """By array path: the block's prompts and their embeddings."""
    began: datetime


def sample_block(plan: Plan, block: int, advance: Advance = lambda num_evaluations: None) -> SampledBlock:
    """Sample all recorded states of a block; batches are cut at fixed places within it.

    Args:
        plan: the build.
        block: its number.
        advance: called with the number of network evaluations of one image that have just been done.

    Raises:
        TeacherError: x_0 is not finite.
    """
    began = datetime.now(UTC)
    seeds = seeds_of(block, plan.layout.block_size)
    shape = (plan.layout.block_size, *plan.recipe.item_shape)
    states = {state.step: np.empty(shape, dtype=plan.layout.dtype) for state in plan.layout.states}
    roundings = {step: Rounding() for step in states}
    record = Recorder(plan, seeds)
    for start in range(0, len(seeds), plan.config.batch_size):
        part = slice(start, min(start + plan.config.batch_size, len(seeds)))
        states[0][part] = initial_noise(plan.recipe.root_seed, seeds[part], plan.recipe.item_shape, plan.layout.dtype)
        kept = record(
            states[0][part],
            seeds[part],
            evaluated=partial(advance, (part.stop - part.start) * plan.recipe.evaluations_at_once),
        )
        for step, values in kept.items():
            computed = values.numpy()
            with np.errstate(over="ignore"):  # values that become infinite are refused when the block is committed
                states[step][part] = computed
            roundings[step].add(states[step][part], computed)
    return SampledBlock(number=block, states=states, roundings=roundings, further=record.arrays(), began=began)


def commit_block(plan: Plan, sampled: SampledBlock, command: str) -> None:
    """Write a sampled block; its provenance first, since the ledger record must be the last file written."""
    note = seal(block_provenance(plan, sampled, command))
    write_atomically(plan.store / provenance_path(sampled.number), [note])
    plan.writer.commit(sampled.number, sampled.states, sampled.further, roundings=sampled.roundings)


def check_images(plan: Plan, sampled: SampledBlock) -> str:
    """Check x_0 of a build's first block; x_0 in words.

    Raises:
        TeacherError: all seeds give the same image, or pixels too large for images (unless `accept_range` is set).
    """
    images = sampled.states[plan.sampler.steps].astype(np.float32)
    with np.errstate(all="ignore"):  # values that are infinite in float16 are refused below
        mean, spread = float(images.mean()), float(images.std(axis=0).max())
        described = f"mean {mean:+.3f}, sd {images.std():.3f}, range {images.min():+.2f} to {images.max():+.2f}"
    if len(images) > 1 and spread < MIN_SPREAD:
        raise TeacherError(
            f"teacher {plan.teacher.source}: x_0 is constant over {len(images)} seeds ({described}); nothing was kept"
        )
    if plan.recipe.space is not None:
        return described  # latents have no range
    beyond = _share_beyond(images)
    if beyond > MAX_SHARE_BEYOND and not plan.config.accept_range:
        raise TeacherError(
            f"teacher {plan.teacher.source}: {beyond:.1%} of x_0's values lie beyond ±{MAX_VALUE:g} ({described}); "
            f"expected images in [−1, 1], at most {MAX_SHARE_BEYOND:.0%} beyond; nothing was kept. Another sampler, "
            "more steps or a teacher that clips may help; --accept-range keeps such values"
        )
    return described


def _share_beyond(images: npt.NDArray[Any]) -> float:
    return float((np.abs(images) > MAX_VALUE).mean())


def block_provenance(plan: Plan, sampled: SampledBlock, command: str) -> dict[str, Any]:
    """Who made a block, when, where and in what time; no part of its identity."""
    device = plan.device
    return {
        "block": sampled.number,
        "began": sampled.began.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - sampled.began).total_seconds(), 3),
        "host": platform.node(),
        "pid": os.getpid(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "batch_size": plan.config.batch_size,
        "command": command,
        **_accepted(plan, sampled),
        "versions": versions("diffusers", "zarr"),
    }


def _accepted(plan: Plan, sampled: SampledBlock) -> dict[str, Any]:
    """What `accept_range` let through, if it did; a block that isn't finite is refused when it is committed."""
    if not plan.config.accept_range or plan.recipe.space is not None:
        return {}
    x_0 = sampled.states[plan.sampler.steps]
    minimum, maximum = float(x_0.min()), float(x_0.max())
    if not (math.isfinite(minimum) and math.isfinite(maximum)):
        return {}
    return {"accepted_range": {"minimum": minimum, "maximum": maximum, "share_beyond_2": _share_beyond(x_0)}}
