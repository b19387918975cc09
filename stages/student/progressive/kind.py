"""The progressive student, as the registry of kinds has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from advkd.cache.errors import UsageError
from advkd.stages.student.progressive.config import ProgressiveOptions, ProgressiveTraining

if TYPE_CHECKING:
    from accelerate import Accelerator

    from advkd.stages.student.geometry import Geometry
    from advkd.stages.student.training.protocol import Program, StudentNetwork

Training = TypeVar("Training", bound=ProgressiveTraining)


class Progressive:
    """The paper's student: resolution and network grow along the trajectory, adversarial losses alone."""

    normalises_over_batch = True
    counts_steps = False
    starts_from_teacher = False

    def is_paired(self, config: ProgressiveTraining) -> bool:
        """No loss assumes that x_T determines x_0."""
        return False

    def build(self, options: ProgressiveOptions, geometry: Geometry) -> StudentNetwork:
        """A network with fresh weights.

        Raises:
            UsageError: the cache has class labels, prompts or latents.
        """
        if geometry.num_classes or geometry.prompts:
            what = "prompts" if geometry.prompts else "class labels"
            raise UsageError(f"student.kind: progressive learns no {what}, which this cache has: use unrolled")
        if geometry.space is not None:  # its heads end in a tanh
            raise UsageError("student.kind: progressive makes pixels in [−1, 1], this cache has latents: use unrolled")
        from advkd.stages.student.progressive.network import ProgressiveStudent

        return ProgressiveStudent(geometry, options.base_channels, options.max_channels)

    def divided(self, config: Training, num_processes: int, world_size: int) -> Training:
        """The settings as they are: this kind is trained by one process."""
        return config

    def program(
        self,
        config: ProgressiveTraining,
        student: StudentNetwork,
        geometry: Geometry,
        accelerator: Accelerator,
        num_seeds: int,
    ) -> Program:
        """How to train it."""
        from advkd.stages.student.progressive.network import ProgressiveStudent
        from advkd.stages.student.progressive.program import ProgressiveProgram

        assert isinstance(student, ProgressiveStudent)
        return ProgressiveProgram(config, student, geometry, accelerator, num_seeds)
