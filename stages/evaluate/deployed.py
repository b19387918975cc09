"""What an exported student lost: scores and latency of each deployed form beside PyTorch's, on the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from advkd.cache.errors import UsageError
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.evaluate.cost import LARGE_BATCH, interleaved_latency
from advkd.stages.evaluate.evaluate import check_same_cache
from advkd.stages.evaluate.measure import cached_batches, make_reference, measure, reported
from advkd.stages.evaluate.samplers import Sampler
from advkd.stages.metrics.features import FeatureNetwork
from advkd.stages.metrics.table import ScoreTable
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.student.hub import Student

Form = Callable[..., Tensor]
"""x_T (N, C, H, W), and labels (N,) if it has classes → x_0."""
SETTLE_SECONDS = 0.05
"""ONNX Runtime's threads spin for a while after their work, and occupy the cores."""


@torch.no_grad()
def score_forms(
    forms: Mapping[str, Form],
    student: Student,
    cache: TrajectoryCache,
    network: FeatureNetwork,
    config: EvaluateConfig,
    reporter: Reporter | None = None,
) -> ScoreTable:
    """Score forms of a student on the sets of fresh seeds that `advkd-evaluate` uses.

    Args:
        forms: by name, the one to compare with first.
        student: whose forms they are.
        cache: the one it was trained from; its last state is the reference.
        network: the features.
        config: sets.
        reporter: reports progress.

    Returns:
        One row per form, in their order.

    Raises:
        UsageError: the cache is another one.
        CacheError: the cache can't be read.
    """
    check_cache_of(student, cache)
    samplers = [_one_pass(name, form, student) for name, form in forms.items()]
    reporter, seeds = reporter or SilentReporter(), cache.seeds()
    cached = cached_batches(cache, student.geometry.steps[-1], seeds, config.batch_size, student.decode)
    reference = make_reference(network, reported(cached, "reference", len(seeds), reporter), None, config.num_sets)
    return measure(samplers, network, reference, config, reporter=reporter).table


def _one_pass(name: str, form: Form, student: Student) -> Sampler:
    """A form as a sampler; all are decoded by the student's own decoder."""
    return Sampler(name=name, evaluations=1, generate=lambda seeds: student.decode(form(*student.inputs(seeds))))


def check_cache_of(student: Student, cache: TrajectoryCache) -> None:
    """Refuse a cache that holds nothing to compare a student's images with.

    Raises:
        UsageError: it is not the one that the student was trained from, or its images have another shape.
        NotCachedError: it is empty.
    """
    known = student.provenance.get("cache")
    trained_on = known.get("fingerprint") if isinstance(known, dict) else None
    check_same_cache(None if trained_on is None else str(trained_on), cache, "the student")
    if cache.item_shape != student.geometry.item_shape:
        raise UsageError(
            f"{cache.address} holds images of shape {cache.item_shape}, the student makes "
            f"{student.geometry.item_shape}: give the cache that it was trained from"
        )


@torch.inference_mode()
def time_forms(forms: Mapping[str, Form], student: Student) -> dict[int, dict[str, float]]:
    """Median seconds per pass by batch size and form, timed in turns."""
    timed: dict[int, dict[str, float]] = {}
    for batch in (1, LARGE_BATCH):
        given = student.inputs(range(batch))
        passes = {name: lambda _, form=form, given=given: form(*given) for name, form in forms.items()}
        timed[batch] = interleaved_latency(passes, batch, settle=SETTLE_SECONDS)
    return timed
