"""Recording batches of a build, whichever kind its teacher is: a network in advkd's loop, or a pipeline's own call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy.typing as npt
from torch import Tensor

from advkd.stages.teacher.build.plan import Plan
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.pipelines.teacher import PipelineTeacher
from advkd.stages.teacher.sample.disturbed import Disturbance, DisturbedTeacher
from advkd.stages.teacher.sample.sampling import record_states


class Recorder:
    """Records batches of some seeds; encodes their prompts once.

    Args:
        plan: the build.
        seeds: all that will be recorded.
        disturb: changes the network's predictions, for a measurement.
    """

    def __init__(self, plan: Plan, seeds: Sequence[int] | range, disturb: Disturbance | None = None) -> None:
        self._plan = plan
        self._steps = [state.step for state in plan.layout.states if state.step]
        self._disturb = disturb
        if isinstance(plan.teacher, PipelineTeacher):
            assert plan.prompts is not None
            numbers = sorted({int(number) for number in plan.teacher.condition.prompts_of(seeds)})
            self._rows = {number: row for row, number in enumerate(numbers)}
            self._prompts = plan.teacher.encode([plan.prompts.prompts[number] for number in numbers])

    def __call__(
        self, noise: npt.NDArray[Any], seeds: Sequence[int] | range, evaluated: Callable[[], None] = lambda: None
    ) -> dict[int, Tensor]:
        """Denoise one batch and keep the plan's states but x_T.

        Args:
            noise: x_T in stored units, shape (B, C, H, W).
            seeds: the batch's, B of them.
            evaluated: called after each prediction.

        Returns:
            By solver steps done, float32 on the CPU in stored units, shape (B, C, H, W).

        Raises:
            TeacherError: x_0 is not finite, or the teacher's states are not where they would be recorded.
        """
        plan, teacher = self._plan, self._plan.teacher
        if isinstance(teacher, PipelineTeacher):
            rows = [self._rows[int(number)] for number in teacher.condition.prompts_of(seeds)]
            return teacher.record(
                noise, self._prompts, rows, record=self._steps, evaluated=evaluated, disturb=self._disturb
            )
        assert isinstance(plan.path, SolverPath)
        if self._disturb is not None:
            known = {item.name: getattr(teacher, item.name) for item in fields(Teacher)}
            teacher = DisturbedTeacher(**known, disturb=self._disturb)
        return record_states(
            teacher,
            plan.path,
            noise,
            seeds=seeds,
            root_seed=plan.recipe.root_seed,
            record=self._steps,
            condition=plan.recipe.condition,
            evaluated=evaluated,
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What the store keeps of the prompts, by array path; nothing without prompts."""
        teacher = self._plan.teacher
        if not isinstance(teacher, PipelineTeacher) or self._plan.recipe.prompts is None:
            return {}
        return self._prompts.arrays(self._plan.recipe.prompts.embeddings)
