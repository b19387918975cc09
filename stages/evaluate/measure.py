"""Every sampler on the same sets of fresh seeds, batch by batch: nothing larger than a set's features is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from advkd.stages.evaluate.reference import Floats, Yardstick, to_numpy, to_pixels
from advkd.stages.evaluate.samplers import Sampler
from advkd.stages.evaluate.scores import Row
from advkd.stages.metrics.classes import class_shares
from advkd.stages.metrics.features import FeatureNetwork, Look, observe
from advkd.stages.metrics.neighbours import nearest_distances, to_rows
from advkd.stages.metrics.perceptual import perceptual_distance
from advkd.stages.reporter import Reporter

FIRST_FRESH_SEED = 1 << 40
"""Seeds of caches lie below this one."""
SEEDS_IN_PICTURES = 16
CLOSEST = 0.01
ImageDistance = Callable[[Tensor, Tensor], Tensor]


@dataclass(kw_only=True)
class _Seen:
    """What one set of one sampler has shown so far."""

    features: list[Floats] = field(default_factory=list)
    probabilities: list[Floats] = field(default_factory=list)
    squared_errors: list[Floats] = field(default_factory=list)
    perceptual: list[Floats] = field(default_factory=list)

    def add(self, look: Look) -> None:
        self.features.append(to_numpy(look.features))
        if look.probabilities is not None:
            self.probabilities.append(to_numpy(look.probabilities))

    def class_probabilities(self) -> Floats | None:
        return np.concatenate(self.probabilities) if self.probabilities else None

    def paired(self) -> dict[str, float]:
        if not self.squared_errors:
            return {}
        return {
            "mse_to_teacher": float(np.concatenate(self.squared_errors).mean()),
            "perceptual_to_teacher": float(np.concatenate(self.perceptual).mean()),
        }


@dataclass(kw_only=True)
class Measured:
    """Rows in the samplers' order, and the first images of each."""

    rows: list[Row]
    pictures: dict[str, Tensor]


def measure(
    samplers: Sequence[Sampler],
    network: FeatureNetwork,
    yardstick: Yardstick,
    *,
    num_sets: int,
    set_size: int,
    batch_size: int,
    distance: ImageDistance | None,
    training: Callable[[], Iterable[npt.NDArray[np.float32]]],
    reporter: Reporter,
) -> Measured:
    """Score samplers on the same sets of fresh seeds.

    Args:
        samplers: the student, the teacher, then others; one that can't generate gets a row without scores.
        network: that gives features.
        yardstick: the reference.
        num_sets: of seeds.
        set_size: seeds a set.
        batch_size: seeds at one time.
        distance: of image pairs in [−1, 1]; None takes the layers of `network`.
        training: rows of the cached training images, see `neighbours`.
        reporter: hears of progress.
    """
    measurable = [sampler for sampler in samplers if sampler.generate]
    teacher = samplers[1].name if samplers[1].generate else None
    rows = {sampler.name: Row(name=sampler.name, evaluations=sampler.evaluations) for sampler in samplers}
    near = {sampler.name: list[npt.NDArray[np.float32]]() for sampler in samplers[:2] if sampler.generate}
    probabilities = {sampler.name: list[Floats]() for sampler in measurable}
    pictures: dict[str, Tensor] = {}
    work = sum(sampler.evaluations for sampler in measurable) * num_sets * set_size
    reporter.start("evaluate", work, "evaluations")
    for index in range(num_sets):
        seen = {sampler.name: _Seen() for sampler in measurable}
        first = FIRST_FRESH_SEED + index * set_size
        for start in range(first, first + set_size, batch_size):
            seeds = range(start, min(start + batch_size, first + set_size))
            images = {sampler.name: _generate(sampler, seeds, reporter) for sampler in measurable}
            _look(network, images, teacher, distance, seen)
            for name, made in images.items():
                pictures.setdefault(name, to_pixels(made[:SEEDS_IN_PICTURES]))
                if name in near:
                    near[name].append(to_rows(to_pixels(made)))
        for name, found in seen.items():
            classes = found.class_probabilities()
            rows[name].add(yardstick.score(index, np.concatenate(found.features), classes) | found.paired())
            if classes is not None:
                probabilities[name].append(classes)
    reporter.finish()
    for name, parts in probabilities.items():
        if parts:
            rows[name].class_shares = class_shares(np.concatenate(parts))
    _add_neighbours(rows, near, num_sets, training)
    return Measured(rows=list(rows.values()), pictures=pictures)


def _generate(sampler: Sampler, seeds: range, reporter: Reporter) -> Tensor:
    assert sampler.generate is not None
    images = sampler.generate(seeds)
    reporter.advance(len(seeds) * sampler.evaluations, sampler.name)
    return images


def _look(
    network: FeatureNetwork,
    images: dict[str, Tensor],
    teacher: str | None,
    distance: ImageDistance | None,
    seen: dict[str, _Seen],
) -> None:
    """Add a batch's images, side by side by seed: the teacher's are looked at once for all samplers."""
    looks = {name: observe(network, to_pixels(made)) for name, made in images.items()}
    if teacher is None:
        for name, parts in looks.items():
            for _, look in parts:
                seen[name].add(look)
        return
    for part, theirs in looks.pop(teacher):
        seen[teacher].add(theirs)
        wanted = images[teacher][part]
        for name, parts in looks.items():
            _, look = next(parts)
            made = images[name][part]
            seen[name].add(look)
            seen[name].squared_errors.append(to_numpy((made - wanted).square().flatten(1).mean(1)))
            seen[name].perceptual.append(to_numpy(pair_distance(distance, look, theirs, made, wanted)))


def pair_distance(distance: ImageDistance | None, look: Look, other: Look, images: Tensor, others: Tensor) -> Tensor:
    """Perceptual distance of N image pairs, shape (N,): by a distance of images, or by what was seen in them."""
    if distance is None:
        return perceptual_distance(look.maps, other.maps)
    device = look.features.device
    return distance(to_pixels(images).to(device), to_pixels(others).to(device))


def _add_neighbours(
    rows: dict[str, Row],
    near: dict[str, list[npt.NDArray[np.float32]]],
    num_sets: int,
    training: Callable[[], Iterable[npt.NDArray[np.float32]]],
) -> None:
    """Nearest training images of all sets of student and teacher, in one pass over the cache."""
    distances = nearest_distances(np.concatenate([part for parts in near.values() for part in parts]), training())
    if not np.isfinite(distances).all():  # this copy of the cache has none of the run's seeds
        return
    for name, of_sampler in zip(near, np.split(distances, len(near)), strict=True):
        for of_set in np.split(of_sampler, num_sets):
            rows[name].add(
                {
                    "nearest_training": float(of_set.mean()),
                    "nearest_training_closest": float(np.quantile(of_set, CLOSEST)),
                }
            )
