"""The unrolled student, as the registry of kinds has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advkd.cache.errors import UsageError
from advkd.stages.student.unrolled.config import UnrolledOptions, UnrolledTraining

if TYPE_CHECKING:
    from accelerate import Accelerator

    from advkd.stages.student.geometry import Geometry
    from advkd.stages.student.training.protocol import Program, StudentNetwork


class Unrolled:
    """The sampler unrolled into one network, trained by regression first and critics later."""

    normalises_over_batch = False

    def is_paired(self, config: UnrolledTraining) -> bool:
        """Whether a loss assumes that x_T determines x_0."""
        return config.objective.paired

    def build(self, options: UnrolledOptions, geometry: Geometry) -> StudentNetwork:
        """A network with fresh weights."""
        from advkd.stages.student.unrolled.network import UnrolledStudent

        return UnrolledStudent(
            geometry, options.width, options.depth, options.patch, options.attention, options.shared, options.coarse
        )

    def program(
        self,
        config: UnrolledTraining,
        student: StudentNetwork,
        geometry: Geometry,
        accelerator: Accelerator,
        num_seeds: int,
    ) -> Program:
        """How to train it."""
        from advkd.stages.student.unrolled.network import UnrolledStudent
        from advkd.stages.student.unrolled.program import UnrolledProgram

        assert isinstance(student, UnrolledStudent)
        global_batch = config.batch_size * accelerator.num_processes
        if num_seeds < global_batch:
            raise UsageError(f"train.batch_size {global_batch} exceeds the {num_seeds} seeds to train on")
        return UnrolledProgram(config, student, geometry, accelerator)
