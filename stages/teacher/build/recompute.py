"""Sampling blocks of a cache again, to check that the teacher still gives what is stored."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from advkd.cache.care.summary import origin_of
from advkd.cache.errors import MismatchError, UsageError
from advkd.cache.format.differences import differences
from advkd.cache.format.seeds import seeds_of
from advkd.cache.read.compare import distance, tolerance_of
from advkd.cache.read.contents import local_root
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.teacher.build.block import sample_block
from advkd.stages.teacher.build.plan import Plan, make_plan, recorded_list, say_warnings
from advkd.stages.teacher.config import CacheConfig, TeacherConfig
from advkd.stages.teacher.pipelines.path import recorded_sampler
from advkd.stages.teacher.pipelines.prompt_list import PromptList


@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputed:
    """One block, sampled again."""

    block: int
    apart: dict[int, float]
    """Largest root mean square difference of any seed, by solver steps done; only states with other bytes."""
    tolerance: dict[int, float]

    @property
    def within(self) -> bool:
        """Whether it equals what is stored, within what another machine's arithmetic may change."""
        return all(value <= self.tolerance[step] for step, value in self.apart.items())


def plan_of(cache: TrajectoryCache, teacher: TeacherConfig | None, batch_size: int, device: str | None) -> Plan:
    """The plan that would build this very cache.

    Args:
        cache: local.
        teacher: where to load it from; where the store says it came from, if None.
        batch_size: seeds in one evaluation.
        device: as in the configuration.

    Raises:
        UsageError: the store doesn't record where its teacher came from.
        MismatchError: that teacher, or these versions of the libraries, give another recipe.
        TeacherError: it can't be loaded.
    """
    recipe, layout = cache.recipe, cache.layout
    recipe.check_drawn_noise(cache.address, "be sampled again")
    if teacher is None:
        known = origin_of(cache)
        if "source" not in known:
            raise UsageError(f"{cache.address} doesn't say where its teacher came from: give --teacher")
        teacher = TeacherConfig.recorded(known)
    sampler, condition, prompts = recorded_sampler(recipe), recipe.condition, None
    if condition is not None and condition.null_class is not None:
        teacher = dataclasses.replace(teacher, null_class=condition.null_class)
    if recipe.prompts is not None:
        prompts = PromptList.stored(cache.prompts, local_root(cache))
    config = CacheConfig(
        labels="all" if condition is None else list(condition.labels),
        prompts=None if prompts is None else str(prompts.path),
        seeds_per_prompt=1 if recipe.prompts is None else recipe.prompts.seeds_per_prompt,
        seeds=f"0:{layout.block_size}",
        record=recorded_list(layout),
        block_size=layout.block_size,
        batch_size=batch_size,
        dtype=layout.dtype,
        precision=recipe.precision["compute"],
        root_seed=recipe.root_seed,
        device=device,
    )
    plan = make_plan(teacher, sampler, config, local_root(cache), prompts)
    lines = differences(recipe.to_json(), plan.recipe.to_json())
    if lines:
        raise MismatchError(
            f"{cache.address} was made by another recipe than {teacher.source} gives here ({'; '.join(lines[:3])})"
        )
    return plan


def recompute(
    cache: TrajectoryCache, plan: Plan, blocks: Sequence[int], reporter: Reporter | None = None
) -> list[Recomputed]:
    """Sample some blocks again and compare them with what is stored.

    Raises:
        DamagedError: stored bytes differ from the ledger.
        TeacherError: x_0 is not finite.
    """
    reporter = reporter or SilentReporter()
    say_warnings(plan, reporter)
    reporter.start("recompute", len(blocks) * plan.evaluations_per_block, "evaluations")
    tolerance, results = tolerance_of(cache), []
    for block in blocks:
        states = sample_block(plan, block, reporter.advance).states
        apart = {}
        for step in cache.states:
            made = states[step].astype(cache.dtype)
            stored = cache.rows(step, np.asarray(seeds_of(block, cache.layout.block_size)))
            if made.tobytes() != stored.tobytes():
                apart[step] = distance(made, stored)
        results.append(Recomputed(block=block, apart=apart, tolerance=tolerance))
    reporter.finish()
    return results


def choose_blocks(cache: TrajectoryCache, count: int) -> list[int]:
    """Some committed blocks, chosen at random on each call."""
    return sorted(random.SystemRandom().sample(cache.blocks, min(count, len(cache.blocks))))
