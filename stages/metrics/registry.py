"""All measures, in the order of tables."""

from __future__ import annotations

from advkd.stages.metrics.base import Floats, Measure, Observed, Reference, Score
from advkd.stages.metrics.classes import ASKED_CLASS, CLASS_OVERLAP, CONFIDENCE, RAREST_CLASS
from advkd.stages.metrics.clip_score import CLIP_SCORE
from advkd.stages.metrics.frechet import FRECHET, FRECHET_TO_REAL
from advkd.stages.metrics.kid import KID
from advkd.stages.metrics.neighbours import NEAREST_TRAINING, NEAREST_TRAINING_CLOSEST
from advkd.stages.metrics.pairs import MSE_TO_TEACHER, PERCEPTUAL_TO_TEACHER
from advkd.stages.metrics.precision_recall import PRECISION, RECALL
from advkd.stages.metrics.sharpness import FINE_POWER, GRADIENT

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        FRECHET,
        KID,
        PRECISION,
        RECALL,
        FRECHET_TO_REAL,
        MSE_TO_TEACHER,
        PERCEPTUAL_TO_TEACHER,
        ASKED_CLASS,
        CLIP_SCORE,
        CLASS_OVERLAP,
        RAREST_CLASS,
        CONFIDENCE,
        GRADIENT,
        FINE_POWER,
        NEAREST_TRAINING,
        NEAREST_TRAINING_CLOSEST,
    )
}


class Scorer:
    """Scores sets of samples against one reference, by every measure that it allows."""

    def __init__(self, reference: Reference) -> None:
        prepared = {name: measure.prepare(reference) for name, measure in MEASURES.items()}
        self._scores: dict[str, Score] = {name: score for name, score in prepared.items() if score is not None}

    def score(self, observed: dict[Observed, Floats], index: int) -> dict[str, float]:
        """Scores of one set by measure.

        Args:
            observed: what was observed of the set; measures that need something else are left out.
            index: of the set, from 0.
        """
        found = {}
        for name, score in self._scores.items():
            if MEASURES[name].observed in observed:
                value = score(observed[MEASURES[name].observed], index)
                if value is not None:
                    found[name] = value
        return found
