"""What sets of samples are held against: the teacher's cached x_0, and real images where there are some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.stages.metrics.classes import Shares, class_shares, mean_confidence, overlap, rarest_class
from advkd.stages.metrics.features import FeatureNetwork, observe
from advkd.stages.metrics.frechet import Gaussian, frechet_distance
from advkd.stages.metrics.kid import KernelReference, kernel_distance
from advkd.stages.metrics.precision_recall import NEIGHBOURS, precision_and_recall

Floats = npt.NDArray[np.floating[Any]]


def to_pixels(images: Tensor) -> Tensor:
    """As a viewer would see them: clipped to [−1, 1]."""
    return images.clamp(-1.0, 1.0)


def see(network: FeatureNetwork, batches: Iterable[Tensor]) -> tuple[Floats, Floats | None]:
    """Features (N, D) and, of a classifier, probabilities (N, K) of images that come in batches."""
    features: list[Floats] = []
    probabilities: list[Floats] = []
    for batch in batches:
        for _, look in observe(network, to_pixels(batch)):
            features.append(to_numpy(look.features))
            if look.probabilities is not None:
                probabilities.append(to_numpy(look.probabilities))
    return np.concatenate(features), np.concatenate(probabilities) if probabilities else None


def to_numpy(values: Tensor) -> npt.NDArray[np.float32]:
    """As float32 on the CPU."""
    array: npt.NDArray[np.float32] = values.to("cpu", torch.float32).numpy()
    return array


class Yardstick:
    """Holds a set of samples against the reference.

    Args:
        network: that gives features.
        reference: the teacher's cached x_0 in batches, shape (N, C, H, W).
        real: real images in batches; None where there are none.
        num_sets: how many sets will be scored.
    """

    def __init__(
        self, network: FeatureNetwork, reference: Iterable[Tensor], real: Iterable[Tensor] | None, num_sets: int
    ) -> None:
        self.features, probabilities = see(network, reference)
        self.shares: Shares | None = None if probabilities is None else class_shares(probabilities)
        self._gaussian = Gaussian.fit(self.features)
        parts = [self.features[index::num_sets] for index in range(num_sets)]
        self._kernels = [KernelReference(part) for part in parts if len(part) > 1]
        self._real = None if real is None else Gaussian.fit(see(network, real)[0])

    def score(self, index: int, features: Floats, probabilities: Floats | None) -> dict[str, float]:
        """Scores of one set by measure.

        Args:
            index: of the set, from 0. KID compares it with a part of the reference of its own, so that sets are
                independent; precision and recall with as many reference seeds, others for each set.
            features: shape (N, D).
            probabilities: shape (N, K), or None.
        """
        gaussian = Gaussian.fit(features)
        found = {"frechet": frechet_distance(gaussian, self._gaussian)}
        if index < len(self._kernels):
            found["kid"] = kernel_distance(features, self._kernels[index])
        count = min(len(features), len(self.features))
        if count > NEIGHBOURS:
            chosen = (np.arange(count) + index * count) % len(self.features)
            found["precision"], found["recall"] = precision_and_recall(features[:count], self.features[chosen])
        if self._real is not None:
            found["frechet_to_real"] = frechet_distance(gaussian, self._real)
        if probabilities is not None and self.shares is not None:
            shares = class_shares(probabilities)
            found["class_overlap"] = overlap(shares, self.shares)
            found["rarest_class"] = rarest_class(shares, self.shares)
            found["confidence"] = mean_confidence(probabilities)
        return found
