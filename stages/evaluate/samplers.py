"""The samplers that a table compares: the student, the teacher itself, and few-step solvers of the same teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from advkd.cache.errors import ConfigError, TeacherError
from advkd.cache.format.equivalence import equivalent_teachers
from advkd.cache.format.recipe import NOT_RECORDED, Recipe
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate.prompted import PromptedTeacher, prompts_told
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.prompts import read_prompts
from advkd.stages.student.student import generate, labels_of, noise_of
from advkd.stages.teacher.config import SamplerConfig, TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.path.solvers import find_solver
from advkd.stages.teacher.pipelines.path import recorded_sampler
from advkd.stages.teacher.pipelines.teacher import load_pipeline_teacher
from advkd.stages.teacher.sample.sampling import initial_noise, record_states

FAST_SOLVERS, FAST_FLOW_SOLVERS = ("ddim", "dpmsolver++"), ("flow-euler", "flow-heun")
"""What a teacher's users would sample with in few steps."""
Generate = Callable[[range], Tensor]
Told = Callable[[range], Tensor | None]
"""Seeds → labels or prompts, as a student takes them; None if it is told nothing."""
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


def told_fresh(cache: TrajectoryCache, geometry: Geometry) -> Told:
    """What the teacher would be told for seeds beyond a cache: labels by its rule, or the cache's prompts."""
    if geometry.prompts is None:
        return partial(labels_of, geometry)
    return lambda seeds: read_prompts(cache, prompts_told(cache, seeds))


def student_sampler(student: nn.Module, geometry: Geometry, told: Told, decode: Decode = as_they_are) -> Sampler:
    """The student: one pass, with the labels or prompts that `told` gives to the seeds."""

    def make(seeds: range) -> Tensor:
        return decode(generate(student, noise_of(geometry, seeds), told(seeds), batch_size=len(seeds)))

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
    teacher: Teacher | PromptedTeacher | None,
    recipe: Recipe,
    dtype: str,
    solver_steps: list[int],
    say: Callable[[str], None],
    decode: Decode = as_they_are,
) -> list[Sampler]:
    """The table's rows: student, teacher, then each fast solver at each number of steps.

    The teacher's own row follows the rules that its cache was made by, the others what its scheduler asks for. A
    solver that can't follow the teacher's scheduler is not measured, and `say` gets the reason. Of an imported cache,
    whose sampler isn't known, only the student is measured.
    """
    if recipe.imported:
        return [student, Sampler(name=f"teacher ({NOT_RECORDED})", evaluations=0, generate=None)]
    own = recorded_sampler(recipe)
    wanted = {f"teacher ({own.name} {own.steps})": own}
    for name in FAST_FLOW_SOLVERS if find_solver(own.name).flow else FAST_SOLVERS:
        for steps in solver_steps:
            if (name, steps) != (own.name, own.steps):
                wanted[f"{name} {steps}"] = replace(own, name=name, steps=steps, eta=0.0)
    rows = [student]
    for name, config in wanted.items():
        evaluations = find_solver(config.name).num_evaluations(config.steps) * recipe.evaluations_at_once
        unmeasured = Sampler(name=name, evaluations=evaluations, generate=None)
        if teacher is None:
            rows.append(unmeasured)
            continue
        try:
            rows.append(_row(name, teacher, config, recipe, dtype, decode))
        except (TeacherError, ConfigError) as error:
            say(f"{name} is not measured: {error}")
            rows.append(unmeasured)
    return rows


def _row(
    name: str,
    teacher: Teacher | PromptedTeacher,
    config: SamplerConfig,
    recipe: Recipe,
    dtype: str,
    decode: Decode,
) -> Sampler:
    own = config == recorded_sampler(recipe)
    if isinstance(teacher, PromptedTeacher):
        sampled = teacher if own else teacher.sampled_by(config)
        evaluations = sampled.teacher.path.evaluations * recipe.evaluations_at_once
        return Sampler(name=name, evaluations=evaluations, generate=lambda seeds: decode(sampled.images(seeds)))
    path = SolverPath.recorded(recipe) if own else SolverPath.of(teacher.scheduler_config, config)
    return teacher_sampler(name, teacher, path, recipe, dtype, decode)


def find_teacher(
    candidates: Sequence[TeacherConfig], cache: TrajectoryCache, device: torch.device
) -> tuple[Teacher | PromptedTeacher | None, str]:
    """The first candidate that is the cache's teacher, and why there is none otherwise."""
    recipe = cache.recipe
    if recipe.imported:
        return None, "the cache was imported, and doesn't record how its teacher was sampled"
    reasons = []
    for candidate in dict.fromkeys(candidates):
        try:
            teacher = _load(candidate, cache, device)
        except (TeacherError, ConfigError) as error:
            reasons.append(str(error))
            continue
        loaded = teacher.teacher if isinstance(teacher, PromptedTeacher) else teacher
        if equivalent_teachers(loaded.identity(), recipe.teacher):
            return teacher, ""
        reasons.append(f"{candidate.source} is not the teacher that made this cache")
    return None, "; ".join(reasons) or "no teacher was named"


def _load(config: TeacherConfig, cache: TrajectoryCache, device: torch.device) -> Teacher | PromptedTeacher:
    precision, condition = str(cache.recipe.precision["compute"]), cache.recipe.prompts
    if condition is None:
        return load_teacher(config, device, precision)
    (prompt,) = cache.prompts.texts(cache.prompts.committed[:1])
    sampler = recorded_sampler(cache.recipe)
    loaded = load_pipeline_teacher(config, sampler, prompt, condition.seeds_per_prompt, device, precision)
    return PromptedTeacher(teacher=loaded, cache=cache)
