"""The unrolled student, as the registry of kinds has it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from advkd.cache.errors import UsageError
from advkd.stages.student.unrolled.config import UnrolledOptions, UnrolledTraining

if TYPE_CHECKING:
    from accelerate import Accelerator

    from advkd.stages.student.geometry import Geometry
    from advkd.stages.student.training.protocol import Program, StudentNetwork

Training = TypeVar("Training", bound=UnrolledTraining)


class Unrolled:
    """The sampler unrolled into one network, trained by regression first and critics later."""

    normalises_over_batch = False
    counts_steps = True
    starts_from_teacher = False

    def is_paired(self, config: UnrolledTraining) -> bool:
        """Whether a loss assumes that x_T determines x_0."""
        return config.objective.paired

    def build(self, options: UnrolledOptions, geometry: Geometry) -> StudentNetwork:
        """A network with fresh weights."""
        from advkd.stages.student.unrolled.network import UnrolledStudent

        return UnrolledStudent(
            geometry, options.width, options.depth, options.patch, options.attention, options.shared, options.coarse
        )

    def divided(self, config: Training, num_processes: int, world_size: int) -> Training:
        """Batch and fresh images per process for another number of processes, the same in all."""
        if num_processes == world_size:
            return config
        adversarial = config.objective.adversarial
        batch, fresh = config.batch_size * num_processes, adversarial.fresh * num_processes
        divisible = math.gcd(batch // config.accumulate, fresh)
        if divisible % world_size:
            raise UsageError(
                f"the run was started by {num_processes} processes with {config.batch_size} seeds (train.batch_size) "
                f"and {adversarial.fresh} fresh images (adversarial.fresh) per process, which don't divide among "
                f"{world_size} processes: use a number of processes that divides {divisible}"
            )
        objective = replace(config.objective, adversarial=replace(adversarial, fresh=fresh // world_size))
        return replace(config, batch_size=batch // world_size, objective=objective)

    def program(
        self,
        config: UnrolledTraining,
        student: StudentNetwork,
        geometry: Geometry,
        accelerator: Accelerator,
        num_seeds: int,
    ) -> Program:
        """How to train it."""
        from advkd.stages.student.training.protocol import UnrollingNetwork
        from advkd.stages.student.unrolled.program import UnrolledProgram

        assert isinstance(student, UnrollingNetwork)
        global_batch = config.batch_size * accelerator.num_processes
        if num_seeds < global_batch:
            raise UsageError(f"train.batch_size {global_batch} exceeds the {num_seeds} seeds to train on")
        return UnrolledProgram(config, student, geometry, accelerator)
