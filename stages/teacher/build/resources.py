"""What a build needs: disk space, memory and time."""

from __future__ import annotations

import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch

from advkd.cache.errors import UsageError
from advkd.stages.teacher.build.plan import Plan
from advkd.stages.teacher.pipelines.teacher import PipelineTeacher
from advkd.stages.teacher.sample.sampling import initial_noise

SPARE_DISK = 64 << 20
SPARE_MEMORY = 1 << 30
"""For Python, torch and the network's activations."""
BLOCKS_AT_ONCE = 2
"""In one process: one is sampled while the one before is written."""
_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_disk(plan: Plan, num_blocks: int) -> None:
    """Check that this many more blocks fit on the disk.

    Raises:
        UsageError: they don't.
    """
    needed = num_blocks * plan.block_bytes
    folder = plan.store.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed and needed + SPARE_DISK > free:
        raise UsageError(
            f"{plan.store} needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free in {folder}: "
            "fewer --seeds, fewer --record states, or another --out"
        )


def measure_evaluation(plan: Plan, repeats: int = 3) -> float:
    """Seconds of one network evaluation for one batch, the median of a few after a warm-up.

    With guidance the network evaluates two batches in one; half the time is one's.
    """
    batch = min(plan.config.batch_size, plan.layout.block_size)
    if isinstance(plan.teacher, PipelineTeacher):
        assert plan.prompts is not None
        noise = initial_noise(plan.recipe.root_seed, range(batch), plan.recipe.item_shape, plan.layout.dtype)
        return plan.teacher.seconds_per_evaluation(noise, plan.teacher.encode(plan.prompts.prompts[:1]))
    x = torch.zeros(batch, *plan.recipe.item_shape, device=plan.device)
    x = x.contiguous(memory_format=plan.teacher.memory_format)
    timestep = torch.tensor(plan.teacher.num_timesteps // 2, device=plan.device)
    condition = plan.recipe.condition
    labels = None if condition is None else torch.full((batch,), condition.labels[0], device=plan.device)
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        with torch.inference_mode():
            float(plan.teacher.predict(x, timestep, labels, condition).sum())  # reading a value waits for the device
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2] / plan.recipe.evaluations_at_once


def memory_bytes(plan: Plan, workers: int | None = None) -> int:
    """Host memory that blocks take while they are sampled, checked and written: beside the network and one batch.

    Args:
        plan: the build.
        workers: number of processes that make one block at a time; None for one that makes `BLOCKS_AT_ONCE`.
    """
    # A state is copied to be written, and x_0 is looked at in float32.
    copies = 3 * plan.layout.block_size * math.prod(plan.recipe.item_shape) * torch.float32.itemsize
    num_blocks, num_processes = (BLOCKS_AT_ONCE, 1) if workers is None else (workers, workers)
    return num_blocks * plan.block_bytes + num_processes * copies


def memory_limit() -> int:
    """Memory that this process can have: the machine's, or less in a container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _LIMIT_FILES:
        with suppress(OSError, ValueError):  # absent, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def check_memory(plan: Plan, workers: int | None = None) -> None:
    """Check that the blocks that are made at the same time fit into memory; `workers` as for `memory_bytes`.

    Raises:
        UsageError: they don't.
    """
    needed, there = memory_bytes(plan, workers), max(0, memory_limit() - SPARE_MEMORY)
    if needed > there:
        fitting = plan.layout.block_size * there // needed
        advice = "no --block-size would fit: fewer --record states, fewer --workers, or more memory"
        if fitting:
            advice = f"--block-size {1 << (fitting.bit_length() - 1)} would fit"
        num_blocks = BLOCKS_AT_ONCE if workers is None else workers
        raise UsageError(
            f"blocks of {plan.layout.block_size} seeds need {needed / 1e9:.2f} GB of memory ({num_blocks} at a time), "
            f"{there / 1e9:.2f} GB are available: {advice}"
        )
