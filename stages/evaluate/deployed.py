"""What an exported student lost: scores and latency of each deployed form beside PyTorch's, on the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from advkd.cache.errors import UsageError
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.evaluate.cost import LARGE_BATCH, interleaved_latency
from advkd.stages.evaluate.measure import FIRST_FRESH_SEED
from advkd.stages.metrics.features import FeatureNetwork, extract
from advkd.stages.metrics.frechet import Gaussian, frechet_distance
from advkd.stages.metrics.intervals import Distances, Interval, paired_difference
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.student.hub import Student
from advkd.stages.student.training.data import read_float

Form = Callable[[Tensor], Tensor]
"""x_T (N, C, H, W) → x_0."""


@dataclass(frozen=True, kw_only=True)
class FormScore(Distances):
    """One form's Fréchet distances to the teacher's cached x_0."""

    difference: Interval | None
    """This form's distance minus the first form's, over the sets; None for the first itself."""


@torch.no_grad()
def score_forms(
    forms: Mapping[str, Form],
    student: Student,
    cache: TrajectoryCache,
    network: FeatureNetwork,
    config: EvaluateConfig,
    reporter: Reporter | None = None,
) -> list[FormScore]:
    """Score forms of a student on the sets of fresh seeds that `advkd-evaluate` takes.

    Args:
        forms: by name, the one to compare with first.
        student: whose forms they are.
        cache: the one it was trained from; its last state is the reference.
        network: that gives features.
        config: sets.
        reporter: hears of progress.

    Raises:
        UsageError: the cache is another one.
        CacheError: the cache can't be read.
    """
    reporter = reporter or SilentReporter()
    check_same_cache(student, cache)
    seeds, size = cache.seeds(), config.batch_size
    reporter.start("reference", len(seeds), "images")
    parts = []
    for start in range(0, len(seeds), size):
        part = seeds[start : start + size]
        parts.append(_features(network, read_float(cache, student.geometry.steps[-1], part)))
        reporter.advance(len(part))
    reporter.finish()
    reference = Gaussian.fit(np.concatenate(parts))
    reporter.start("score", config.num_sets * config.set_size * len(forms), "images")
    distances: dict[str, list[float]] = {name: [] for name in forms}
    for index in range(config.num_sets):
        first = FIRST_FRESH_SEED + index * config.set_size
        noise = student.noise(range(first, first + config.set_size))
        for name, form in forms.items():
            features = []
            for batch in torch.split(noise, size):
                features.append(_features(network, form(batch)))
                reporter.advance(len(batch), name)
            distances[name].append(frechet_distance(Gaussian.fit(np.concatenate(features)), reference))
    reporter.finish()
    base = next(iter(forms))
    return [
        FormScore(
            name=name,
            distances=values,
            difference=None if name == base else paired_difference(values, distances[base]),
        )
        for name, values in distances.items()
    ]


def _features(network: FeatureNetwork, images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return extract(network, images.clamp(-1.0, 1.0))


def check_same_cache(student: Student, cache: TrajectoryCache) -> None:
    """Refuse a cache that has nothing to compare a student's images with.

    Raises:
        UsageError: it is not the one that the student was trained from, or holds no such images.
    """
    known = student.provenance.get("cache")
    trained_on = known.get("fingerprint") if isinstance(known, dict) else None
    if trained_on is not None and trained_on != cache.recipe.fingerprint:
        raise UsageError(
            f"the student was trained from a cache with fingerprint {str(trained_on)[:12]}, {cache.address} has "
            f"{cache.recipe.fingerprint[:12]}: give the cache that it was trained from"
        )
    if not cache.blocks or cache.item_shape != student.geometry.item_shape:
        raise UsageError(f"{cache.address} holds no images to compare this student's with")


@torch.inference_mode()
def time_forms(forms: Mapping[str, Form], student: Student) -> dict[int, dict[str, float]]:
    """Median seconds of a pass by batch size and form, taken in turns."""
    timed: dict[int, dict[str, float]] = {}
    for batch in (1, LARGE_BATCH):
        noise = student.noise(range(batch))
        passes = {name: _timed_pass(form, noise) for name, form in forms.items()}
        timed[batch] = interleaved_latency(passes, batch)
    return timed


def _timed_pass(form: Form, noise: Tensor) -> Callable[[int], Tensor]:
    return lambda _: form(noise)
