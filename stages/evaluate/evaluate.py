"""Scores a student beside what a user would do instead.

Protocol: the reference is the teacher's cached x_0; every sampler, the teacher itself included, makes the *same* sets
of fresh seeds, disjoint from the cache; Fréchet distances are a mean ± standard deviation over the sets; "ahead"
means that the paired difference's 95 % interval excludes zero. The whole protocol takes five sets of 2,048 seeds and
a reference of at least 8,192; the short form takes what the configuration says, and says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.cache.errors import NotCachedError, UsageError
from advkd.cache.noise import is_held_out
from advkd.cache.reader import TrajectoryCache
from advkd.stages.device import best_device
from advkd.stages.evaluate.config import (
    FULL_NUM_SETS,
    FULL_REFERENCE,
    FULL_SET_SIZE,
    FULL_SOLVER_STEPS,
    EvaluateConfig,
)
from advkd.stages.evaluate.cost import (
    LATENCY_BATCHES,
    Cost,
    count_macs,
    count_parameters,
    interleaved_latency,
)
from advkd.stages.evaluate.features import FeatureNetwork, extract, load_features
from advkd.stages.evaluate.frechet import Gaussian, Interval, frechet_distance, paired_difference
from advkd.stages.evaluate.images import real_batches
from advkd.stages.evaluate.samplers import Sampler, all_samplers, find_teacher, student_sampler
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.student.data import read_float
from advkd.stages.student.run import Run
from advkd.stages.student.student import generate, load_student
from advkd.stages.teacher.loader import Teacher

FIRST_FRESH_SEED = 1 << 40
"""Seeds of caches lie below this one."""


@dataclass(kw_only=True)
class Row:
    """One sampler's scores."""

    name: str
    evaluations: int
    distances: list[float] = field(default_factory=list)
    """Fréchet distance to the teacher's cached x_0, one a set; empty where it was not measured."""
    to_real: float | None = None
    difference: Interval | None = None
    """Student's distance minus this sampler's, over the sets."""

    @property
    def mean(self) -> float | None:
        """Mean distance over the sets."""
        return float(np.mean(self.distances)) if self.distances else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the sets."""
        return float(np.std(self.distances, ddof=1)) if len(self.distances) > 1 else None


@dataclass(kw_only=True)
class Evaluation:
    """Everything that was measured."""

    rows: list[Row]
    features: str
    num_sets: int
    set_size: int
    num_reference: int
    full: bool
    held_out_mse: float
    student: Cost
    teacher: Cost | None
    deployed_parameters: int
    without_teacher: str
    """Why the teacher's rows were not measured; empty if they were."""
    real_source: str | None
    pictures: dict[str, Tensor]
    """The first seeds' images by sampler, for a picture."""
    identity: dict[str, Any]
    """Of the run: its configuration, and the cache it was trained from."""
    device: str

    def latency_ratio(self, batch: int) -> float | None:
        """Seconds of one pass of the student in evaluations of the teacher."""
        return self.student.latency[batch] / self.teacher.latency[batch] if self.teacher else None


def evaluate(
    run_path: Path,
    cache_path: str | Path,
    config: EvaluateConfig,
    *,
    teacher_source: str | None,
    teacher_revision: str | None = None,
    full: bool = False,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Score a run's student.

    Args:
        run_path: the run.
        cache_path: the cache it was trained from; its last state is the reference.
        config: sets, features, solvers.
        teacher_source: folder or Hub id of the cache's teacher; None leaves its rows unmeasured.
        teacher_revision: on the Hub.
        full: the whole protocol instead of the configured short form.
        reporter: hears of progress.

    Raises:
        TrainingError: there is no student.
        UsageError: the run is of another cache, or the features don't fit.
        CacheError: the cache can't be read.
    """
    reporter = reporter or SilentReporter()
    cache = TrajectoryCache.open(cache_path)
    run = Run(run_path)
    student, geometry = load_student(run.student)
    identity = _check_same_cache(run, cache)
    device = best_device()
    student = student.to(device)
    seeds = cache.seeds()
    if full:
        config = dataclasses.replace(
            config,
            num_sets=max(FULL_NUM_SETS, config.num_sets),
            set_size=max(FULL_SET_SIZE, config.set_size),
            solver_steps=FULL_SOLVER_STEPS,
        )
        if len(seeds) < FULL_REFERENCE:
            raise UsageError(
                f"--full needs a reference of {FULL_REFERENCE} seeds; {cache_path} has {len(seeds)}: extend it with "
                f"`advkd-cache build --seeds 0:{FULL_REFERENCE}`"
            )
    network = load_features(config, cache.item_shape, device)
    real = _fit_real(network, config, cache.item_shape) if config.real else None
    teacher, why_not = find_teacher(teacher_source, teacher_revision, cache.recipe, device)
    if why_not:
        reporter.say(f"rows of the teacher are not measured: {why_not}")
    last = geometry.steps[-1]
    reference = _fit_cached(network, cache, last, seeds, config.batch_size)
    samplers = all_samplers(
        student_sampler(student, geometry), teacher, cache.recipe, cache.layout.dtype, config.solver_steps
    )
    rows, pictures = _measure(samplers, network, reference, real, config, reporter)
    held_out = seeds[is_held_out(seeds)]
    costs = _costs(student, teacher, cache.item_shape)
    return Evaluation(
        rows=rows,
        features=network.name,
        num_sets=config.num_sets,
        set_size=config.set_size,
        num_reference=len(seeds),
        full=full,
        held_out_mse=_paired_mse(student, cache, geometry.steps[0], last, held_out),
        student=costs[0],
        teacher=costs[1],
        deployed_parameters=student.deployed_parameters(),
        without_teacher=why_not,
        real_source=config.real,
        pictures=pictures,
        identity=identity,
        device=str(device),
    )


def _check_same_cache(run: Run, cache: TrajectoryCache) -> dict[str, Any]:
    identity: dict[str, Any] = run.read()["identity"]
    trained_on = identity["cache"]["fingerprint"]
    if trained_on != cache.recipe.fingerprint:
        raise UsageError(
            f"{run.path} was trained from a cache with fingerprint {trained_on[:12]}, "
            f"{cache.address} has {cache.recipe.fingerprint[:12]}: give the cache that it was trained from"
        )
    if not cache.blocks:
        raise NotCachedError(f"{cache.address} is empty: finish it with `advkd-cache build`")
    return identity


def _fit_cached(
    network: FeatureNetwork, cache: TrajectoryCache, step: int, seeds: npt.NDArray[np.int64], batch_size: int
) -> Gaussian:
    parts = [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]
    return Gaussian.fit(np.concatenate([extract(network, _pixels(read_float(cache, step, part))) for part in parts]))


def _fit_real(network: FeatureNetwork, config: EvaluateConfig, item_shape: tuple[int, ...]) -> Gaussian:
    batches = real_batches(str(config.real), item_shape, config.batch_size)
    return Gaussian.fit(np.concatenate([extract(network, batch) for batch in batches]))


def _pixels(images: Tensor) -> Tensor:
    """As a viewer would see them: clipped to [−1, 1]."""
    return images.clamp(-1.0, 1.0)


def _measure(
    samplers: list[Sampler],
    network: FeatureNetwork,
    reference: Gaussian,
    real: Gaussian | None,
    config: EvaluateConfig,
    reporter: Reporter,
) -> tuple[list[Row], dict[str, Tensor]]:
    measurable = [sampler for sampler in samplers if sampler.generate]
    work = sum(sampler.evaluations for sampler in measurable) * config.num_sets * config.set_size
    reporter.start("evaluate", work, "evaluations")
    rows: list[Row] = []
    pictures: dict[str, Tensor] = {}
    for sampler in samplers:
        row = Row(name=sampler.name, evaluations=sampler.evaluations)
        rows.append(row)
        if sampler.generate is None:
            continue
        features = []
        for index in range(config.num_sets):
            first = FIRST_FRESH_SEED + index * config.set_size
            parts = []
            for start in range(first, first + config.set_size, config.batch_size):
                seeds = range(start, min(start + config.batch_size, first + config.set_size))
                images = _pixels(sampler.generate(seeds))
                pictures.setdefault(sampler.name, images[:16])
                parts.append(extract(network, images))
                reporter.advance(len(seeds) * sampler.evaluations, sampler.name)
            features.append(np.concatenate(parts))
            row.distances.append(frechet_distance(Gaussian.fit(features[-1]), reference))
        if real is not None:
            row.to_real = frechet_distance(Gaussian.fit(np.concatenate(features)), real)
    reporter.finish()
    for row in rows[1:]:
        if row.distances:
            row.difference = paired_difference(rows[0].distances, row.distances)
    return rows, pictures


def _paired_mse(
    student: torch.nn.Module, cache: TrajectoryCache, first: int, last: int, held_out: npt.NDArray[np.int64]
) -> float:
    if not len(held_out):
        return math.nan
    made = generate(student, read_float(cache, first, held_out))
    return float((made - read_float(cache, last, held_out)).square().mean())


def _costs(student: torch.nn.Module, teacher: Teacher | None, item_shape: tuple[int, ...]) -> tuple[Cost, Cost | None]:
    device = next(student.parameters()).device

    def images_of(batch: int) -> Tensor:
        return torch.zeros(batch, *item_shape, device=device)

    def pass_of_student(batch: int) -> Tensor:
        images: Tensor = student(images_of(batch))
        return images

    evaluations: dict[str, Callable[[int], Tensor]] = {"student": pass_of_student}
    if teacher is not None:
        evaluations["teacher"] = lambda batch: teacher.predict(images_of(batch), torch.tensor(500, device=device))
    latency = {batch: interleaved_latency(evaluations, batch) for batch in LATENCY_BATCHES}
    modules = {"student": student, "teacher": teacher.unet if teacher else student}
    costs = {
        name: Cost(
            num_parameters=count_parameters(modules[name]),
            macs=count_macs(evaluate_),
            latency={batch: seconds[name] for batch, seconds in latency.items()},
        )
        for name, evaluate_ in evaluations.items()
    }
    return costs["student"], costs.get("teacher")
