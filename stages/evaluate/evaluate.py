"""Scores a student beside what a user would do instead.

Protocol: the reference is the teacher's cached x_0; every sampler, the teacher itself included, makes the *same* sets
of fresh seeds, disjoint from the cache; every score is a mean ± standard deviation over the sets; "ahead" means that
the paired difference's 95 % interval excludes zero. The whole protocol takes five sets of 2,048 seeds and a reference
of at least 8,192; the short form takes what the configuration says, and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.cache.errors import UsageError
from advkd.cache.format.hashing import is_held_out
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.device import best_device, forbid_tf32
from advkd.stages.evaluate.config import (
    FEATURES,
    FULL_NUM_SETS,
    FULL_REFERENCE,
    FULL_SET_SIZE,
    FULL_SOLVER_STEPS,
    LPIPS,
    EvaluateConfig,
)
from advkd.stages.evaluate.cost import LARGE_BATCH, compare_costs
from advkd.stages.evaluate.measure import ImageDistance, measure, pair_distance
from advkd.stages.evaluate.reference import Yardstick, to_numpy, to_pixels
from advkd.stages.evaluate.samplers import all_samplers, find_teacher, student_sampler
from advkd.stages.evaluate.scores import Evaluation, HeldOut
from advkd.stages.images.real import real_batches
from advkd.stages.metrics.features import FeatureNetwork, load_features, observe
from advkd.stages.metrics.intervals import mean_interval
from advkd.stages.metrics.lpips import Lpips
from advkd.stages.metrics.neighbours import to_rows
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.student.student import generate, load_student, weights_sha256
from advkd.stages.student.training.data import read_float
from advkd.stages.student.training.run import Run, seeds_of
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.load.identity import tensors_sha256

Seeds = npt.NDArray[np.int64]


def evaluate(
    run_path: Path,
    cache_path: str | Path,
    config: EvaluateConfig,
    *,
    teachers: Sequence[TeacherConfig] = (),
    full: bool = False,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Score a run's student.

    Args:
        run_path: the run.
        cache_path: the cache it was trained from; its last state is the reference.
        config: sets, features, solvers.
        teachers: where the cache's teacher may be, the first that is it being taken; none leave its rows unmeasured.
        full: the whole protocol instead of the configured short form.
        reporter: hears of progress.

    Raises:
        TrainingError: there is no student.
        UsageError: the run is of another cache, or the features don't fit.
        CacheError: the cache can't be read.
    """
    reporter = reporter or SilentReporter()
    forbid_tf32()  # a student's scores shall not depend on whether its teacher, which asks for this, is here
    cache = TrajectoryCache.open(cache_path)
    run = Run(run_path)
    weights = weights_sha256(run.student)  # before they are read: training may go on meanwhile
    student, geometry = load_student(run.student)
    identity = _check_same_cache(run, cache)
    device = best_device()
    student = student.to(device)
    seeds = cache.seeds()
    if full:
        config = _whole_protocol(config)
        if len(seeds) < FULL_REFERENCE:
            raise UsageError(
                f"--full needs a reference of {FULL_REFERENCE} seeds; {cache_path} has {len(seeds)}: the "
                f"`advkd-cache build` command that made it extends it, with `--seeds 0:{FULL_REFERENCE}`"
            )
    network = load_features(config, cache.item_shape, device)
    distance = None
    if config.perceptual == LPIPS:
        distance = Lpips(cache.item_shape, setting="evaluate.perceptual", otherwise=FEATURES).to(device)
    real = real_batches(config.real, cache.item_shape, config.batch_size) if config.real else None
    teacher, why_not = find_teacher(teachers, cache.recipe, device)
    if why_not:
        reporter.say(f"rows of the teacher are not measured: {why_not}")
    first, last = geometry.steps[0], geometry.steps[-1]
    trained_on = _training_seeds(identity, cache, seeds)
    samplers = all_samplers(
        student_sampler(student, geometry), teacher, cache.recipe, cache.layout.dtype, config.solver_steps
    )
    yardstick = Yardstick(network, _read(cache, last, seeds, config.batch_size), real, config.num_sets)
    costs = compare_costs(student, teacher, cache.item_shape, min(LARGE_BATCH, config.batch_size))
    measured = measure(
        samplers,
        network,
        yardstick,
        num_sets=config.num_sets,
        set_size=config.set_size,
        batch_size=config.batch_size,
        distance=distance,
        training=lambda: (to_rows(to_pixels(part)) for part in _read(cache, last, trained_on, config.batch_size)),
        reporter=reporter,
    )
    held_out = seeds[is_held_out(seeds)]
    return Evaluation(
        rows=measured.rows,
        features=network.name,
        features_sha256=tensors_sha256(network.network.state_dict()),
        perceptual=config.perceptual,
        num_sets=config.num_sets,
        set_size=config.set_size,
        num_reference=len(seeds),
        num_training=len(trained_on),
        held_out=_held_out(student, network, distance, cache, (first, last), held_out, config.batch_size),
        student=costs[0],
        teacher=costs[1],
        deployed_parameters=student.deployed_parameters(),
        without_teacher=why_not,
        real_source=config.real,
        reference_shares=yardstick.shares,
        pictures=measured.pictures,
        weights_sha256=weights,
        identity=identity,
        device=str(device),
    )


def _whole_protocol(config: EvaluateConfig) -> EvaluateConfig:
    return dataclasses.replace(
        config,
        num_sets=max(FULL_NUM_SETS, config.num_sets),
        set_size=max(FULL_SET_SIZE, config.set_size),
        solver_steps=FULL_SOLVER_STEPS,
    )


def _check_same_cache(run: Run, cache: TrajectoryCache) -> dict[str, Any]:
    identity: dict[str, Any] = run.read()["identity"]
    trained_on = identity["cache"]["fingerprint"]
    if trained_on != cache.recipe.fingerprint:
        raise UsageError(
            f"{run.path} was trained from a cache with fingerprint {trained_on[:12]}, "
            f"{cache.address} has {cache.recipe.fingerprint[:12]}: give the cache that it was trained from"
        )
    cache.check_begun()
    return identity


def _training_seeds(identity: dict[str, Any], cache: TrajectoryCache, seeds: Seeds) -> Seeds:
    """The cached seeds that the run trained on."""
    begun = seeds_of(identity, cache.layout.block_size)
    chosen: Seeds = seeds[(begun.start <= seeds) & (seeds < begun.stop) & ~is_held_out(seeds)]
    return chosen


def _read(cache: TrajectoryCache, step: int, seeds: Seeds, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(seeds), batch_size):
        yield read_float(cache, step, seeds[start : start + batch_size])


def _held_out(
    student: torch.nn.Module,
    network: FeatureNetwork,
    distance: ImageDistance | None,
    cache: TrajectoryCache,
    steps: tuple[int, int],
    seeds: Seeds,
    batch_size: int,
) -> HeldOut | None:
    """The student's x_0 against the cache's, from the same noise; None with too few seeds for an interval."""
    if len(seeds) < 2:
        return None
    errors, perceptual = [], []
    for start in range(0, len(seeds), batch_size):
        part = seeds[start : start + batch_size]
        made, wanted = generate(student, read_float(cache, steps[0], part)), read_float(cache, steps[1], part)
        errors.append(to_numpy((made - wanted).square().flatten(1).mean(1)))
        looks = zip(observe(network, to_pixels(made)), observe(network, to_pixels(wanted)), strict=True)
        for (chosen, look), (_, other) in looks:
            perceptual.append(to_numpy(pair_distance(distance, look, other, made[chosen], wanted[chosen])))
    return HeldOut(
        num_seeds=len(seeds),
        mse=mean_interval(np.concatenate(errors)),
        perceptual=mean_interval(np.concatenate(perceptual)),
    )
