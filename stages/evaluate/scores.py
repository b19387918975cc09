"""What an evaluation found: the table of scores, and what was measured once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from advkd.stages.evaluate.config import FULL_NUM_SETS, FULL_REFERENCE, FULL_SET_SIZE, EvaluateConfig
from advkd.stages.evaluate.cost import Cost
from advkd.stages.images.real import RealImages
from advkd.stages.metrics.base import Floats
from advkd.stages.metrics.intervals import Interval
from advkd.stages.metrics.table import ScoreTable


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The student against the cache on seeds that no training used."""

    num_seeds: int
    mse: Interval
    perceptual: Interval


@dataclass(kw_only=True)
class Evaluation:
    """Everything that was measured, and how."""

    table: ScoreTable
    """The student first, the teacher second."""
    features: str
    features_sha256: str
    """Of that network's weights: only scores by the same weights are comparable."""
    clip_sha256: str | None
    """Of the CLIP model's weights; None where no CLIP score was measured."""
    config: EvaluateConfig
    """Of the sets, as they were made."""
    num_reference: int
    num_training: int
    """Cached training images among which nearest neighbours were searched."""
    held_out: HeldOut | None
    student: Cost
    teacher: Cost | None
    decoder: Cost | None = None
    """Of decoding the latents of an image; None for pixels."""
    deployed_parameters: int
    without_teacher: str
    """Why the teacher's rows were not measured; empty if they were."""
    real: RealImages | None
    reference_shares: Floats | None
    """Of the classes in the reference, shape (K,), where there is a classifier."""
    class_names: dict[str, str] = field(default_factory=dict)
    """Of the teacher's classes, by label; those that are missing go by their numbers."""
    pictures: dict[str, Tensor]
    """The first seeds' images by sampler, for a picture."""
    nearest: list[Tensor]
    """The cached training images nearest to the student's first images; empty where they weren't searched."""
    weights_sha256: str | None
    """Of the student's file: scores are of these weights, whatever is trained later."""
    identity: dict[str, Any]
    """Of the run: its configuration, and the cache it was trained from."""
    device: str

    def name_of(self, label: object) -> str:
        """What to call a class."""
        return self.class_names.get(str(label), str(label))

    @property
    def full(self) -> bool:
        """Whether sets and reference are at least the whole protocol's, whichever options asked for them."""
        enough = self.config.num_sets >= FULL_NUM_SETS and self.config.set_size >= FULL_SET_SIZE
        return enough and self.num_reference >= FULL_REFERENCE

    def latency_ratio(self, batch: int) -> float | None:
        """Seconds of one pass of the student per evaluation of the teacher."""
        return self.student.latency[batch] / self.teacher.latency[batch] if self.teacher else None
