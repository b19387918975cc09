"""Scores a student beside the samplers that a user would otherwise use.

Protocol: the reference is the teacher's cached x_0. Every sampler, the teacher itself included, makes the *same* sets
of fresh seeds, disjoint from the cache. Every score is a mean ± standard deviation over the sets; "ahead" means that
the paired difference's 95 % interval excludes zero. The whole protocol takes five sets of 2,048 seeds and a reference
of at least 8,192; the short form takes what the configuration sets, and the output names it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkd.cache.care.summary import origin_of
from advkd.cache.errors import UsageError
from advkd.cache.format.hashing import Seeds
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.decoder import cache_decoder
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
from advkd.stages.evaluate.measure import (
    ImageDistance,
    cached_batches,
    make_reference,
    measure,
    pair_distances,
    reported,
)
from advkd.stages.evaluate.networks import load_features, with_own_features
from advkd.stages.evaluate.prompted import prompts_told
from advkd.stages.evaluate.samplers import Decode, all_samplers, as_they_are, find_teacher, student_sampler, told_fresh
from advkd.stages.evaluate.scores import Evaluation, HeldOut
from advkd.stages.images.real import RealImages
from advkd.stages.metrics.clip_score import ClipScorer
from advkd.stages.metrics.features import FeatureNetwork, clipped, observe, to_numpy
from advkd.stages.metrics.intervals import mean_interval
from advkd.stages.metrics.lpips import Lpips
from advkd.stages.metrics.pairs import squared_errors
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.student.run import Run, seeds_of_run
from advkd.stages.student.student import generate, load_student, weights_sha256
from advkd.stages.student.training.data import read_condition, read_float
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.load.identity import tensors_sha256


def evaluate(
    run_path: Path,
    cache_path: str | Path,
    config: EvaluateConfig,
    *,
    teachers: Sequence[TeacherConfig] = (),
    require_teacher: bool = False,
    full: bool = False,
    device: str | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Score a run's student.

    Args:
        run_path: the run.
        cache_path: the cache it was trained from; its last state is the reference.
        config: sets, features, solvers.
        teachers: where the cache's teacher may be; the first match is taken, and without one its rows stay unmeasured.
        require_teacher: refuse if none of them matches.
        full: the whole protocol instead of the configured short form.
        device: to compute on; the best there is if not given.
        reporter: reports progress.

    Raises:
        TrainingError: there is no student.
        UsageError: the run is of another cache, the features do not fit, or a required teacher is missing.
        CacheError: the cache can't be read.
    """
    reporter = reporter or SilentReporter()
    forbid_tf32()  # a student's scores must not depend on whether its teacher, whose loading sets this, is here
    cache = TrajectoryCache.open(cache_path)
    run = Run(run_path)
    weights = weights_sha256(run.student)  # before they are read: training may go on meanwhile
    student, geometry = load_student(run.student)
    identity: dict[str, Any] = run.read()["identity"]
    check_same_cache(identity["cache"]["fingerprint"], cache, str(run.path))
    on = best_device(device)
    student = student.to(on)
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
                f"--full needs a reference of {FULL_REFERENCE} seeds; {cache_path} has {len(seeds)}: the "
                f"`advkd-cache build` command that made it extends it, with `--seeds 0:{FULL_REFERENCE}`"
            )
    teacher, why_not = find_teacher(teachers, cache, on)
    if why_not and require_teacher:
        raise UsageError(f"{why_not}; give the teacher that made {cache.address}, or --no-teacher")
    if why_not and teachers:  # without any the summary says so
        reporter.say(f"rows of the teacher are not measured: {why_not}")
    decoder, image_shape, condition = cache_decoder(cache), cache.recipe.image_shape, cache.recipe.condition
    decode: Decode = as_they_are if decoder is None else decoder.to(on)
    config = with_own_features(config, cache, run_path / "evaluation" / "features", reporter, on, decode)
    network = load_features(config, image_shape, on)
    clip = _clip(config, cache, on, reporter)
    distance = None
    if config.perceptual == LPIPS:
        distance = Lpips(image_shape, setting="evaluate.perceptual", otherwise=FEATURES).to(on)
    real = RealImages(config.real, image_shape) if config.real else None
    first, last = geometry.steps[0], geometry.steps[-1]
    trained_on = _training_seeds(identity, cache, seeds)
    samplers = all_samplers(
        student_sampler(student, geometry, told_fresh(cache, geometry), decode),
        teacher,
        cache.recipe,
        cache.layout.dtype,
        config.solver_steps,
        reporter.say,
        decode,
    )
    reference = make_reference(
        network,
        reported(cached_batches(cache, last, seeds, config.batch_size, decode), "reference", len(seeds), reporter),
        reported(real.batches(config.batch_size), "real images", real.num_images, reporter) if real else None,
        config.num_sets,
        None if condition is None else cache.labels(seeds),
        mixed=cache.recipe.prompts is not None,
    )
    if real and real.note():
        reporter.say(real.note())
    costs = compare_costs(
        student,
        teacher,
        cache.item_shape,
        min(LARGE_BATCH, config.batch_size),
        condition=read_condition(cache, seeds[:1]),
        decoder=decoder,
    )
    rows_to_train = partial(cached_batches, cache, last, trained_on, config.batch_size, decode)
    measured = measure(
        samplers,
        network,
        reference,
        config,
        reporter=reporter,
        teacher=samplers[1].name if teacher else None,
        distance=distance,
        training=lambda: map(clipped, rows_to_train()),
        condition=condition,
        prompted=None if clip is None else partial(_asked, clip, cache),
    )
    held_out = seeds[cache.recipe.held_out(seeds)]
    return Evaluation(
        table=measured.table,
        features=network.name,
        features_sha256=tensors_sha256(network.network.state_dict()),
        clip_sha256=None if clip is None else tensors_sha256(clip.model.state_dict()),
        config=config,
        num_reference=len(seeds),
        num_training=len(trained_on),
        held_out=_held_out(student, network, distance, cache, (first, last), held_out, config.batch_size, decode),
        student=costs["student"],
        teacher=costs.get("teacher"),
        decoder=costs.get("decoder"),
        deployed_parameters=student.deployed_parameters(),
        without_teacher=why_not,
        real=real,
        reference_shares=reference.class_shares,
        class_names=origin_of(cache).get("class_names", {}),
        pictures=measured.pictures,
        nearest=measured.nearest,
        weights_sha256=weights,
        identity=identity,
        device=str(on),
    )


def _clip(
    config: EvaluateConfig, cache: TrajectoryCache, device: torch.device, reporter: Reporter
) -> ClipScorer | None:
    """What tells how well images fit their prompts; None without prompts, or without a model.

    Raises:
        UsageError: there is a CLIP model but no prompts, or it can't be loaded.
    """
    if cache.recipe.prompts is None:
        if config.clip is not None:
            raise UsageError(f"evaluate.clip {config.clip}: the cache has no prompts; leave it out")
        return None
    if config.clip is None:
        reporter.say("CLIP score: not measured; evaluate.clip names no model")
        return None
    return ClipScorer.load(Path(os.path.expanduser(config.clip)), device)


def _asked(clip: ClipScorer, cache: TrajectoryCache, seeds: range) -> Callable[[Tensor], Tensor]:
    """What tells how well images fit the prompts that fresh seeds are told."""
    return clip.asked([prompt.text for prompt in cache.prompts.texts(prompts_told(cache, seeds))])


def check_same_cache(trained_on: str | None, cache: TrajectoryCache, who: str) -> None:
    """Refuse a cache whose teacher a student did not learn from.

    Args:
        trained_on: fingerprint of the cache that the student was trained from; None where that is not known.
        cache: to compare with.
        who: the student, for the message.

    Raises:
        UsageError: it is another cache.
        NotCachedError: it is empty.
    """
    if trained_on is not None and trained_on != cache.recipe.fingerprint:
        raise UsageError(
            f"{who} was trained from a cache with fingerprint {trained_on[:12]}, {cache.address} has "
            f"{cache.recipe.fingerprint[:12]}: give the cache that it was trained from"
        )
    cache.check_begun()


def _training_seeds(identity: dict[str, Any], cache: TrajectoryCache, seeds: Seeds) -> Seeds:
    """The cached seeds that the run trained on."""
    begun = seeds_of_run(identity, cache.layout.block_size)
    chosen: Seeds = seeds[(begun.start <= seeds) & (seeds < begun.stop) & ~cache.recipe.held_out(seeds)]
    return chosen


def _held_out(
    student: torch.nn.Module,
    network: FeatureNetwork,
    distance: ImageDistance | None,
    cache: TrajectoryCache,
    steps: tuple[int, int],
    seeds: Seeds,
    batch_size: int,
    decode: Decode,
) -> HeldOut | None:
    """The student's x_0 against the cache's, from the same noise; None with too few seeds for an interval.

    Squared errors are of x_0 as it is stored, perceptual distances of images.
    """
    if len(seeds) < 2:
        return None
    errors, perceptual = [], []
    for start in range(0, len(seeds), batch_size):
        some = seeds[start : start + batch_size]
        noise, wanted = (read_float(cache, step, some) for step in steps)
        made = generate(student, noise, read_condition(cache, some))
        errors.append(to_numpy(squared_errors(made, wanted)))
        made, wanted = decode(made), decode(wanted)
        for (part, look), (_, other) in zip(observe(network, made), observe(network, wanted), strict=True):
            perceptual.append(to_numpy(pair_distances(distance, look, other, made[part], wanted[part])))
    return HeldOut(
        num_seeds=len(seeds),
        mse=mean_interval(np.concatenate(errors)),
        perceptual=mean_interval(np.concatenate(perceptual)),
    )
