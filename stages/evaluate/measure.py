"""Every sampler on the same sets of fresh seeds, batch by batch: images are looked at, then let go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from advkd.cache.format.condition import ClassCondition, Labels
from advkd.cache.format.hashing import Seeds
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate.config import FIRST_FRESH_SEED, MAX_FRESH_SEEDS, EvaluateConfig
from advkd.stages.evaluate.prompted import leaps
from advkd.stages.evaluate.samplers import Decode, Sampler, as_they_are
from advkd.stages.metrics.base import Floats, Observed, Reference
from advkd.stages.metrics.classes import agreement, class_shares, same_classes
from advkd.stages.metrics.features import FeatureNetwork, Look, clipped, observe, see, to_numpy
from advkd.stages.metrics.frechet import frechet_by_class
from advkd.stages.metrics.neighbours import nearest_images, to_rows
from advkd.stages.metrics.pairs import perceptual_distances, squared_errors
from advkd.stages.metrics.registry import Scorer
from advkd.stages.metrics.sharpness import gradient_magnitudes, upper_octave_power
from advkd.stages.metrics.table import Row, ScoreTable
from advkd.stages.reporter import Reporter
from advkd.stages.student.training.data import read_float

SEEDS_IN_PICTURES = 16
ImageDistance = Callable[[Tensor, Tensor], Tensor]
Observations = dict[Observed, list[Floats]]
"""Of one set of one sampler: parts of shape (n, …) that make up the set."""


@dataclass(kw_only=True)
class Measured:
    """Rows in the samplers' order, and the first images of each."""

    table: ScoreTable
    pictures: dict[str, Tensor]
    nearest: list[Tensor]
    """The training images nearest to the student's first ones; empty where they weren't searched."""


def fresh_seeds(config: EvaluateConfig, index: int) -> Iterator[range]:
    """The seeds of one set, the same for every sampler, in batches; sets of another `config.seed` share none."""
    first = FIRST_FRESH_SEED + config.seed * MAX_FRESH_SEEDS + index * config.set_size
    for start in range(first, first + config.set_size, config.batch_size):
        yield range(start, min(start + config.batch_size, first + config.set_size))


def cached_batches(
    cache: TrajectoryCache, step: int, seeds: Seeds, batch_size: int, decode: Decode = as_they_are
) -> Iterator[Tensor]:
    """Rows of one cached state, float32, in batches of shape (n, C, H, W); decoded to images if `decode` does."""
    for start in range(0, len(seeds), batch_size):
        yield decode(read_float(cache, step, seeds[start : start + batch_size]))


def reported(batches: Iterable[Tensor], what: str, total: int, reporter: Reporter) -> Iterator[Tensor]:
    """The same batches, with progress."""
    reporter.start(what, total, "images")
    for batch in batches:
        yield batch
        reporter.advance(len(batch))
    reporter.finish()


def make_reference(
    network: FeatureNetwork,
    cached: Iterable[Tensor],
    real: Iterable[Tensor] | None,
    num_sets: int,
    labels: Labels | None = None,
    *,
    mixed: bool = False,
) -> Reference:
    """Look at what samples are compared with.

    Args:
        network: the features.
        cached: the teacher's cached images in batches, shape (N, C, H, W).
        real: real images in batches; None without any.
        num_sets: sets that will be scored.
        labels: of the cached images, shape (N,); None if the teacher is unconditional.
        mixed: whether to take the cached images from all over, since neighbours have prompts of a kind: some measures
            compare with a part of them.
    """
    features, probabilities = see(network, cached)
    if mixed:
        features = features[leaps(len(features))]
    return Reference(
        features=features,
        class_shares=None if probabilities is None else class_shares(probabilities),
        real_features=None if real is None else see(network, real)[0],
        num_sets=num_sets,
        labels=labels,
    )


def measure(
    samplers: Sequence[Sampler],
    network: FeatureNetwork,
    reference: Reference,
    config: EvaluateConfig,
    *,
    reporter: Reporter,
    teacher: str | None = None,
    distance: ImageDistance | None = None,
    training: Callable[[], Iterable[Tensor]] | None = None,
    condition: ClassCondition | None = None,
    prompted: Callable[[range], Callable[[Tensor], Tensor]] | None = None,
) -> Measured:
    """Score samplers on the same sets of fresh seeds.

    Args:
        samplers: to score; one that can't generate gets a row without scores.
        network: the features.
        reference: what sets are compared with.
        config: the sets of fresh seeds.
        reporter: reports progress.
        teacher: the sampler whose images the others' are paired with; None for no pairs.
        distance: of image pairs in [−1, 1]; None compares in the layers of `network`.
        training: the cached training images, for the nearest to the first two samplers' images; None for no
            neighbours.
        condition: whose labels the samplers are asked for; None if the teacher is unconditional.
        prompted: seeds → images → how well each image fits the prompt of its seed, shape (N,); None without CLIP.
    """
    scorer = Scorer(reference)
    measurable = [(sampler, sampler.generate) for sampler in samplers if sampler.generate]
    rows = {
        sampler.name: Row(name=sampler.name, evaluations=sampler.evaluations, x0=sampler.x0) for sampler in samplers
    }
    near: dict[str, list[npt.NDArray[np.float32]]] = {
        sampler.name: [] for sampler in samplers[:2] if sampler.generate and training
    }
    probabilities: dict[str, list[Floats]] = defaultdict(list)
    features: dict[str, list[Floats]] = {sampler.name: [] for sampler, _ in measurable[:2] if condition}
    asked: list[Labels] = []
    pictures: dict[str, Tensor] = {}
    work = sum(sampler.evaluations for sampler, _ in measurable) * config.num_sets * config.set_size
    reporter.start("evaluate", work, "evaluations")
    for index in range(config.num_sets):
        found: dict[str, Observations] = {sampler.name: defaultdict(list) for sampler, _ in measurable}
        for seeds in fresh_seeds(config, index):
            images = {}
            for sampler, generate in measurable:
                images[sampler.name] = generate(seeds)
                reporter.advance(len(seeds) * sampler.evaluations, sampler.name)
            _observe(network, images, teacher, distance, found)
            fit = prompted(seeds) if prompted else None
            for name, made in images.items():
                if fit:
                    found[name]["clip_scores"].append(to_numpy(fit(made)))
                pictures.setdefault(name, clipped(made[:SEEDS_IN_PICTURES]))
                if name in near:
                    near[name].append(to_rows(clipped(made)))
        if condition:
            asked.append(np.concatenate([condition.labels_of(seeds) for seeds in fresh_seeds(config, index)]))
        for name, parts in found.items():
            observed: dict[Observed, Floats] = {kind: np.concatenate(values) for kind, values in parts.items()}
            if name in features:
                features[name].append(observed["features"])
            if "probabilities" in observed:
                probabilities[name].append(observed["probabilities"])
                if condition and same_classes(observed["probabilities"], condition):
                    observed["agreement"] = agreement(observed["probabilities"], asked[-1])
            rows[name].add(scorer.score(observed, index))
    reporter.finish()
    for name, of_sets in probabilities.items():
        rows[name].class_shares = class_shares(np.concatenate(of_sets)).tolist()
    for name, of_sets in features.items():
        rows[name].class_frechet = _by_class(np.concatenate(of_sets), np.concatenate(asked), reference)
    nearest = add_neighbours(rows, near, config.num_sets, scorer, training()) if training and near else []
    return Measured(table=ScoreTable(rows=list(rows.values())), pictures=pictures, nearest=nearest)


def _observe(
    network: FeatureNetwork,
    images: dict[str, Tensor],
    teacher: str | None,
    distance: ImageDistance | None,
    found: dict[str, Observations],
) -> None:
    """Add a batch's images, side by side by seed: the teacher's are looked at once for all samplers."""
    for name, made in images.items():
        shown = clipped(made)
        found[name]["gradients"].append(to_numpy(gradient_magnitudes(shown)))
        found[name]["fine_power"].append(to_numpy(upper_octave_power(shown)))
    looks = {name: observe(network, made) for name, made in images.items()}
    if teacher is None:
        for name, parts in looks.items():
            for _, look in parts:
                _add(found[name], look)
        return
    for part, theirs in looks.pop(teacher):
        _add(found[teacher], theirs)
        wanted = images[teacher][part]
        for name, parts in looks.items():
            _, look = next(parts)
            made = images[name][part]
            _add(found[name], look)
            found[name]["squared_errors"].append(to_numpy(squared_errors(made, wanted)))
            found[name]["perceptual_distances"].append(to_numpy(pair_distances(distance, look, theirs, made, wanted)))


def _by_class(features: Floats, labels: Labels, reference: Reference) -> dict[str, float | None] | None:
    if reference.labels is None:
        return None
    by_class = frechet_by_class(features, labels, reference.features, reference.labels)
    return {str(label): value for label, value in by_class.items()}


def _add(found: Observations, look: Look) -> None:
    found["features"].append(to_numpy(look.features))
    if look.probabilities is not None:
        found["probabilities"].append(to_numpy(look.probabilities))


def pair_distances(distance: ImageDistance | None, look: Look, other: Look, images: Tensor, others: Tensor) -> Tensor:
    """Perceptual distances of N image pairs, shape (N,): by a distance of images, or by what was seen in them."""
    if distance is None:
        return perceptual_distances(look.maps, other.maps)
    device = look.features.device
    return distance(clipped(images).to(device), clipped(others).to(device))


def add_neighbours(
    rows: Mapping[str, Row],
    near: Mapping[str, list[npt.NDArray[np.float32]]],
    num_sets: int,
    scorer: Scorer,
    training: Iterable[Tensor],
) -> list[Tensor]:
    """Add the nearest training images of all sets of some samplers, in one pass over the cache.

    Args:
        rows: by sampler, to add scores to.
        near: by sampler, its images as rows, all sets in order.
        num_sets: of one size.
        scorer: for the scores.
        training: the training images, in parts; without any, nothing is added.

    Returns:
        The nearest images of the first sampler's first images.
    """
    samples = np.concatenate([part for parts in near.values() for part in parts])
    distances, nearest = nearest_images(samples, training, SEEDS_IN_PICTURES)
    if np.isfinite(distances).all():  # infinite if this copy of the cache has none of the run's seeds
        for name, of_sampler in zip(near, np.split(distances, len(near)), strict=True):
            for index, of_set in enumerate(np.split(of_sampler, num_sets)):
                rows[name].add(scorer.score({"training_distances": of_set}, index))
    return nearest
