"""Build or extend a cache: plan, measure, sample block by block, look at the first block before going on."""

from __future__ import annotations

import platform
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from advkd.cache.durable import holds_something, write_json, write_once
from advkd.cache.errors import TeacherError, UsageError
from advkd.cache.layout import blocks_of, parse_seed_range, seeds_of
from advkd.cache.noise import NOISE_RULE
from advkd.cache.reader import read_metadata
from advkd.cache.recipe import Layout, Recipe
from advkd.cache.writer import CacheWriter, OnMismatch
from advkd.stages.device import best_device
from advkd.stages.pictures import save_trajectories
from advkd.stages.provenance import versions
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig, recorded_steps
from advkd.stages.teacher.loader import Teacher, load_teacher, make_scheduler, sampler_identity
from advkd.stages.teacher.sampling import initial_noise, sample
from advkd.stages.teacher.solvers import find_solver, is_deterministic, trajectory_states

MIN_SPREAD = 1e-3
"""Standard deviation over seeds below which x_0 counts as constant, where images lie in [−1, 1]."""
SPARE_DISK = 64 << 20
MAX_BLOCKS = 1_000_000


States = dict[int, npt.NDArray[Any]]
"""A block: by solver steps done, stored units and dtype, shape (block_size, *item_shape)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A build that was checked but has not begun."""

    teacher: Teacher
    sampler: SamplerConfig
    config: CacheConfig
    recipe: Recipe
    layout: Layout
    store: Path

    @property
    def seeds(self) -> range:
        """The seeds that were asked for, widened to whole blocks."""
        blocks = blocks_of(parse_seed_range(self.config.seeds), self.layout.block_size)
        return range(blocks.start * self.layout.block_size, blocks.stop * self.layout.block_size)

    @property
    def evaluations_per_seed(self) -> int:
        """Network evaluations of one trajectory."""
        return find_solver(self.sampler.name).num_evaluations(self.sampler.steps)

    @property
    def block_bytes(self) -> int:
        """Disk that one block takes, all states."""
        values = self.layout.block_size * int(np.prod(self.recipe.item_shape)) * len(self.layout.states)
        return values * np.dtype(self.layout.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build did."""

    store: Path
    num_blocks: int
    num_present: int
    set_aside: Path | None
    preview: Path | None


def check_request(sampler: SamplerConfig, config: CacheConfig, store: Path) -> tuple[int, ...]:
    """Check what can be checked without a teacher; the solver steps after which states are recorded.

    Raises:
        UsageError: sampler, steps, recorded states, seeds or device don't fit.
        NotACacheError: something that is no cache is at the store's path.
    """
    find_solver(sampler.name)
    recorded = recorded_steps(config.record, sampler.steps)
    num_blocks = len(blocks_of(parse_seed_range(config.seeds), config.block_size))
    if num_blocks > MAX_BLOCKS:
        raise UsageError(
            f"seeds {config.seeds} make {num_blocks:,} blocks of {config.block_size}: choose larger blocks"
        )
    best_device(config.device)
    if holds_something(store):
        read_metadata(store)
    return recorded


def make_plan(teacher: TeacherConfig, sampler: SamplerConfig, config: CacheConfig, store: Path) -> Plan:
    """Load the teacher and check everything that can be checked before the first evaluation.

    Raises:
        UsageError: the request doesn't fit (steps, recorded states, seeds, sampler).
        TeacherError: the teacher can't be loaded.
    """
    recorded = check_request(sampler, config, store)
    loaded = load_teacher(teacher, best_device(config.device), config.precision)
    scheduler = make_scheduler(loaded.scheduler_config, sampler)
    states = trajectory_states(sampler, scheduler)
    recipe = Recipe(
        teacher=loaded.identity(),
        sampler=sampler_identity(sampler, scheduler, is_deterministic(sampler)),
        precision={"compute": config.precision, "tf32": False},
        noise={"rule": NOISE_RULE, "root_seed": config.root_seed},
        item_shape=loaded.item_shape,
    )
    layout = Layout(states=tuple(states[step] for step in recorded), dtype=config.dtype, block_size=config.block_size)
    return Plan(teacher=loaded, sampler=sampler, config=config, recipe=recipe, layout=layout, store=store)


def missing_blocks(plan: Plan) -> list[int]:
    """Blocks still to be built; all of them where the store is absent or of another recipe."""
    writer = CacheWriter(plan.store, plan.recipe, plan.layout)
    if not writer.exists() or writer.mismatch():
        return list(blocks_of(plan.seeds, plan.layout.block_size))
    return writer.missing(plan.seeds)


def measure_evaluation(plan: Plan, repeats: int = 3) -> float:
    """Seconds of one network evaluation of one batch, the median of a few after a warm-up."""
    batch = min(plan.config.batch_size, plan.layout.block_size)
    parameter = next(plan.teacher.unet.parameters())
    x = torch.zeros(batch, *plan.recipe.item_shape, device=parameter.device)
    timestep = torch.tensor(500, device=parameter.device)
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        with torch.no_grad():
            float(plan.teacher.predict(x, timestep).sum())  # reading a value waits for the device
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2]


def build(
    plan: Plan,
    *,
    on_mismatch: OnMismatch = "stop",
    reporter: Reporter | None = None,
    command: str = "",
) -> Built:
    """Build the blocks of a plan that are not there yet.

    Raises:
        MismatchError: the store is of another recipe, and `on_mismatch` is "stop".
        TeacherError: its output is NaN or constant; nothing of that block was kept.
        LockedError: another build is writing the store.
    """
    reporter = reporter or SilentReporter()
    blocks, size = blocks_of(plan.seeds, plan.layout.block_size), plan.layout.block_size
    work = size * plan.evaluations_per_seed
    todo = missing_blocks(plan)
    _check_disk(plan, len(todo))
    reporter.start("cache", len(blocks) * work, "evaluations", done=(len(blocks) - len(todo)) * work)
    ready: dict[int, tuple[datetime, States]] = {}
    if not CacheWriter(plan.store, plan.recipe, plan.layout).continues(on_mismatch):
        # Nothing is made or moved until the teacher has shown that it can fill a block.
        ready[todo[0]] = _sample_first(plan, todo[0], reporter)
    writer = CacheWriter.open(plan.store, plan.recipe, plan.layout, on_mismatch)
    if writer.set_aside:
        reporter.say(f"set aside the cache of another recipe: {writer.set_aside}")
    preview: Path | None = None
    with writer.locked():
        writer.grow(plan.seeds)
        todo = writer.missing(plan.seeds)
        write_once(plan.store / "provenance" / "store.json", _provenance(plan))
        for position, block in enumerate(todo):
            if position == 0:
                began, states = ready.pop(block) if block in ready else _sample_first(plan, block, reporter)
            else:
                began, states = datetime.now(UTC), sample_block(plan, block, reporter)
            writer.commit(block, states)
            write_json(plan.store / "provenance" / f"block-{block:06d}.json", _block_provenance(plan, began, command))
            if position == 0:
                preview = _show(plan, block, states, reporter)
        reporter.finish()
    return Built(
        store=plan.store,
        num_blocks=len(todo),
        num_present=len(blocks) - len(todo),
        set_aside=writer.set_aside,
        preview=preview,
    )


def _sample_first(plan: Plan, block: int, reporter: Reporter) -> tuple[datetime, States]:
    """Sample a block and check its images before any other; when that began, and its states."""
    began, states = datetime.now(UTC), sample_block(plan, block, reporter)
    check_images(states[plan.sampler.steps], plan)
    return began, states


def _show(plan: Plan, block: int, states: States, reporter: Reporter) -> Path:
    preview = save_trajectories(
        plan.store / "provenance" / "preview.png",
        [state.timestep for state in plan.layout.states],
        [states[state.step][:8] for state in plan.layout.states],
    )
    seeds, described = seeds_of(block, plan.layout.block_size), check_images(states[plan.sampler.steps], plan)
    reporter.say(f"first block, seeds {seeds.start}:{seeds.stop}: x_0 {described}; look: {preview}")
    return preview


def sample_block(plan: Plan, block: int, reporter: Reporter) -> States:
    """All recorded states of a block, stored units and dtype; batches are cut at fixed places within the block."""
    seeds = seeds_of(block, plan.layout.block_size)
    shape = (plan.layout.block_size, *plan.recipe.item_shape)
    states = {state.step: np.empty(shape, dtype=plan.layout.dtype) for state in plan.layout.states}
    states[0][:] = initial_noise(plan.config.root_seed, seeds, plan.recipe.item_shape, plan.layout.dtype)
    for start in range(0, len(seeds), plan.config.batch_size):
        part = slice(start, min(start + plan.config.batch_size, len(seeds)))
        num_seeds = part.stop - part.start
        kept = sample(
            plan.teacher,
            plan.sampler,
            states[0][part],
            seeds=seeds[part],
            root_seed=plan.config.root_seed,
            record=[step for step in states if step],
            evaluated=partial(reporter.advance, num_seeds, f"block {block}"),
        )
        for step, values in kept.items():
            states[step][part] = values.numpy()
    return states


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


def _check_disk(plan: Plan, num_blocks: int) -> None:
    needed = num_blocks * plan.block_bytes
    folder = plan.store.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed and needed + SPARE_DISK > free:
        raise UsageError(
            f"{plan.store} needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free in {folder}: "
            "fewer --seeds, fewer --record states, or another --out"
        )


def _provenance(plan: Plan) -> dict[str, Any]:
    return {"teacher": {"source": plan.teacher.source, "commit": plan.teacher.commit}, "sampler": asdict(plan.sampler)}


def _block_provenance(plan: Plan, began: datetime, command: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    device = next(plan.teacher.unet.parameters()).device
    return {
        "began": began.isoformat(timespec="seconds"),
        "seconds": round((now - began).total_seconds(), 3),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "batch_size": plan.config.batch_size,
        "command": command,
        "versions": versions("diffusers", "zarr"),
    }
