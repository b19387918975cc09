"""Configuration of stage two, and the registry of the kinds of student.

A new kind is a folder like `unrolled/` and a line in `KINDS`; its own configuration keys, if any, come in through the
bases of `StudentConfig` (`train.student`) and `TrainConfig` (`train`). Importing this module doesn't import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from advkd.cache.errors import ConfigError
from advkd.stages.student.progressive.config import ProgressiveOptions, ProgressiveTraining
from advkd.stages.student.progressive.kind import Progressive
from advkd.stages.student.teacher.kind import Teacher
from advkd.stages.student.training.config import one_of
from advkd.stages.student.unrolled.config import UnrolledOptions, UnrolledTraining
from advkd.stages.student.unrolled.kind import Unrolled

if TYPE_CHECKING:
    from accelerate import Accelerator

    from advkd.stages.student.geometry import Geometry
    from advkd.stages.student.training.protocol import Program, StudentNetwork


@dataclass(frozen=True, kw_only=True)
class StudentConfig(UnrolledOptions, ProgressiveOptions):
    """Which network; its shape, noise levels and number of submodules follow from the cache."""

    kind: str = "unrolled"
    """`unrolled`, `teacher` (the teacher's own network, from a store that keeps it: `cache.keep_weights`), or
    `progressive` (the paper's)."""

    def __post_init__(self) -> None:
        one_of("student.kind", self.kind, KINDS)
        UnrolledOptions.__post_init__(self)
        ProgressiveOptions.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(UnrolledTraining, ProgressiveTraining):
    """A training run."""

    student: StudentConfig = field(default_factory=StudentConfig)
    """The network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options = (self.mixed_precision, self.compile, self.accumulate)
        if KINDS[self.student.kind].normalises_over_batch and options != ("no", False, 1):
            raise ConfigError(
                f"train: mixed_precision, compile and accumulate don't apply to student.kind {self.student.kind}"
            )


class Kind(Protocol):
    """What stage two asks of a kind of student."""

    normalises_over_batch: bool
    """Whether the network normalises over its batch, so that it is trained in one process, in float32 and without
    gradient accumulation."""
    counts_steps: bool
    """Whether `train.steps` and `train.batch_size` say how long it trains, on how many seeds per process and step."""
    starts_from_teacher: bool
    """Whether it is the teacher's network with the teacher's weights, which the store must keep."""

    def is_paired(self, config: TrainConfig) -> bool:
        """Whether a loss assumes that x_T determines x_0."""

    def build(self, options: StudentConfig, geometry: Geometry) -> StudentNetwork:
        """A network with fresh weights.

        Raises:
            TrainingError: the geometry doesn't allow this kind.
            UsageError: it has classes or a space that this kind doesn't learn.
        """

    def divided(self, config: TrainConfig, num_processes: int, world_size: int) -> TrainConfig:
        """Settings for `world_size` processes that keep the global batch of a run started by `num_processes`.

        Raises:
            UsageError: the global batch doesn't divide among so many.
        """

    def program(
        self,
        config: TrainConfig,
        student: StudentNetwork,
        geometry: Geometry,
        accelerator: Accelerator,
        num_seeds: int,
    ) -> Program:
        """How to train a network that `build` made, on so many seeds.

        Raises:
            UsageError: the configuration doesn't fit the seeds, the geometry or this machine.
        """


KINDS: dict[str, Kind] = {"unrolled": Unrolled(), "teacher": Teacher(), "progressive": Progressive()}
"""By the name in `student.kind`."""
