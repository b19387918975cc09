"""The samplers that a table compares: the student, the teacher itself, and few-step solvers of the same teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkd.cache.errors import ConfigError, TeacherError
from advkd.cache.format.equivalence import equivalent_teachers
from advkd.cache.format.recipe import Recipe
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.student import generate, labels_of, noise_of
from advkd.stages.teacher.config import SamplerConfig, TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.path.solvers import find_solver
from advkd.stages.teacher.sample.sampling import initial_noise, record_states

FAST_SOLVERS, FAST_FLOW_SOLVERS = ("ddim", "dpmsolver++"), ("flow-euler", "flow-heun")
"""What a teacher's users would sample with in few steps."""
Generate = Callable[[range], Tensor]
Decode = Callable[[Tensor], Tensor]
"""x_0 → images."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One row of the table."""

    name: str
    evaluations: int
    """Network evaluations per image: the teacher's, two per prediction where it is guided, or passes of the student."""
    generate: Generate | None
    """Seeds → images, float32 in about [−1, 1], shape (N, C, H, W); None where it can't be measured."""
    x0: str | None = None
    """What the solver does to the predicted image, such as "x̂_0 clipped to ±1"; None if nothing."""


def as_they_are(x_0: Tensor) -> Tensor:
    """Images of x_0 in pixels."""
    return x_0


def student_sampler(student: nn.Module, geometry: Geometry, decode: Decode = as_they_are) -> Sampler:
    """The student: one pass, with the labels that the cache's rule gives to the seeds."""

    def make(seeds: range) -> Tensor:
        labels = labels_of(geometry, seeds)
        return decode(generate(student, noise_of(geometry, seeds), labels, batch_size=len(seeds)))

    return Sampler(name="student", evaluations=1, generate=make)


def teacher_sampler(
    name: str, teacher: Teacher, path: SolverPath, recipe: Recipe, dtype: str, decode: Decode = as_they_are
) -> Sampler:
    """A solver with the cache's teacher, from the very noise and labels that the cache's seeds would have."""
    steps = path.sampler.steps

    def generate(seeds: range) -> Tensor:
        noise = initial_noise(recipe.root_seed, seeds, recipe.item_shape, dtype)
        kept = record_states(
            teacher,
            path,
            noise,
            seeds=seeds,
            root_seed=recipe.root_seed,
            record=[steps],
            condition=recipe.condition,
        )
        return decode(kept[steps])

    x0 = None if path.x0 is None else str(path.x0)
    return Sampler(name=name, evaluations=path.evaluations * recipe.evaluations_at_once, generate=generate, x0=x0)


def all_samplers(
    student: Sampler,
    teacher: Teacher | None,
    recipe: Recipe,
    dtype: str,
    solver_steps: list[int],
    say: Callable[[str], None],
    decode: Decode = as_they_are,
) -> list[Sampler]:
    """The table's rows: student, teacher, then each fast solver at each number of steps.

    The teacher's own row follows the rules that its cache was made by, the others what its scheduler asks for. A
    solver that can't follow the teacher's scheduler is not measured, and `say` gets the reason.
    """
    recorded = SolverPath.recorded(recipe)
    own = recorded.sampler
    wanted = {f"teacher ({own.name} {own.steps})": own}
    for name in FAST_FLOW_SOLVERS if recorded.solver.flow else FAST_SOLVERS:
        for steps in solver_steps:
            if (name, steps) != (own.name, own.steps):
                wanted[f"{name} {steps}"] = SamplerConfig(name=name, steps=steps, spacing=own.spacing)
    rows = [student]
    for name, config in wanted.items():
        evaluations = find_solver(config.name).num_evaluations(config.steps) * recipe.evaluations_at_once
        unmeasured = Sampler(name=name, evaluations=evaluations, generate=None)
        if teacher is None:
            rows.append(unmeasured)
            continue
        try:
            path = recorded if config is own else SolverPath.of(teacher.scheduler_config, config)
        except (TeacherError, ConfigError) as error:
            say(f"{name} is not measured: {error}")
            rows.append(unmeasured)
        else:
            rows.append(teacher_sampler(name, teacher, path, recipe, dtype, decode))
    return rows


def find_teacher(
    candidates: Sequence[TeacherConfig], recipe: Recipe, device: torch.device
) -> tuple[Teacher | None, str]:
    """The first candidate that is the cache's teacher, and why there is none otherwise."""
    reasons = []
    for candidate in dict.fromkeys(candidates):
        try:
            teacher = load_teacher(candidate, device, str(recipe.precision["compute"]))
        except (TeacherError, ConfigError) as error:
            reasons.append(str(error))
            continue
        if equivalent_teachers(teacher.identity(), recipe.teacher):
            return teacher, ""
        reasons.append(f"{candidate.source} is not the teacher that made this cache")
    return None, "; ".join(reasons) or "no teacher was named"
