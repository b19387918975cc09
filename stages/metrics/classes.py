"""Which classes samples fall into, by a classifier: a dropped mode shows here.

p is the share of samples in each class, q the reference's. With few samples both the student's and the teacher's shares
deviate from q by chance, so tables show them side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from advkd.cache.format.condition import ClassCondition, Labels
from advkd.stages.metrics.base import Floats, Measure, Reference, Score, mean_of_set


def class_shares(probabilities: Floats) -> Floats:
    """Share of samples whose most probable class is k; from shape (N, K) to (K,)."""
    count, num_classes = probabilities.shape
    shares: Floats = np.bincount(probabilities.argmax(1), minlength=num_classes) / count
    return shares


def mean_confidence(probabilities: Floats) -> float:
    """Mean probability of the most probable class, in [1/K, 1]."""
    return float(probabilities.max(1).mean())


def same_classes(probabilities: Floats, condition: ClassCondition) -> bool:
    """Whether a classifier with probabilities of shape (N, K) has the teacher's classes, a null row apart."""
    num_classes = probabilities.shape[1]
    return num_classes in (condition.num_classes - 1, condition.num_classes) and condition.labels[-1] < num_classes


def agreement(probabilities: Floats, labels: Labels) -> Floats:
    """1 where the most probable class is the label that was asked, else 0; shape (N,)."""
    agrees: Floats = (probabilities.argmax(1) == labels).astype(np.float32)
    return agrees


def overlap(shares: Floats, reference: Floats) -> float:
    """Σ_k min(p_k, q_k) in [0, 1]: one minus the total variation distance of the two histograms."""
    return float(np.minimum(shares, reference).sum())


def rarest_class(shares: Floats, reference: Floats) -> float:
    """min_k p_k / q_k over the classes that the reference has: 0 if one is missing, 1 at best."""
    present = reference > 0.0
    return float((shares[present] / reference[present]).min())


def _of_shares(score: Callable[[Floats, Floats], float]) -> Callable[[Reference], Score | None]:
    def prepare(reference: Reference) -> Score | None:
        wanted = reference.class_shares
        return None if wanted is None else lambda probabilities, _: score(class_shares(probabilities), wanted)

    return prepare


CLASS_OVERLAP = Measure(
    name="class_overlap",
    title="class shares' overlap with reference",
    label="overlap of the class shares with the reference's",
    better="higher",
    observed="probabilities",
    prepare=_of_shares(overlap),
)
RAREST_CLASS = Measure(
    name="rarest_class",
    title="rarest class, relative to reference",
    label="the rarest class's share, relative to the reference's share of it",
    better="higher",
    observed="probabilities",
    prepare=_of_shares(rarest_class),
)
ASKED_CLASS = Measure(
    name="asked_class",
    title="asked class drawn",
    label="share of images that the classifier takes for the class that was asked",
    better="higher",
    observed="agreement",
    prepare=mean_of_set,
    share=True,
)
CONFIDENCE = Measure(
    name="confidence",
    title="classifier's confidence",
    label="the classifier's mean confidence",
    better="as teacher",
    observed="probabilities",
    prepare=lambda _: lambda probabilities, _: mean_confidence(probabilities),
)
