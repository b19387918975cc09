"""A build that was checked but has not begun: what it would sample, how much, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advkd.cache.errors import ConfigError, TeacherError, UsageError
from advkd.cache.files.durable import holds_something
from advkd.cache.format.condition import ClassCondition
from advkd.cache.format.equivalence import equivalent
from advkd.cache.format.layout import Layout
from advkd.cache.format.metadata import read_metadata
from advkd.cache.format.noise import NOISE_RULE
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.seeds import blocks_of
from advkd.cache.format.source import LocalSource
from advkd.cache.format.zarr_metadata import MAX_BLOCKS
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from advkd.stages.device import best_device
from advkd.stages.reporter import Reporter
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig, recorded_steps
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.older_rules import older_rules
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.path.solvers import find_solver
from advkd.stages.teacher.pipelines.path import PipelinePath
from advkd.stages.teacher.pipelines.prompt_list import PromptList, left_out, requested_seeds
from advkd.stages.teacher.pipelines.teacher import PipelineTeacher, load_pipeline_teacher


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A build that was checked but has not begun."""

    teacher: Teacher | PipelineTeacher
    path: SolverPath | PipelinePath
    config: CacheConfig
    writer: CacheWriter
    """Of the store, which need not exist yet."""
    prompts: PromptList | None = None
    """Of a text-to-image pipeline."""
    older_rules: tuple[str, ...] = ()
    """The rules of the existing store that have changed since and that it keeps, a line each."""

    @property
    def sampler(self) -> SamplerConfig:
        """The sampler, with its spacing resolved."""
        return self.path.sampler

    @property
    def recipe(self) -> Recipe:
        """What determines the states' values."""
        return self.writer.recipe

    @property
    def layout(self) -> Layout:
        """Which states are stored, and how."""
        return self.writer.layout

    @property
    def store(self) -> Path:
        """The store's folder."""
        return self.writer.path

    @property
    def blocks(self) -> range:
        """The blocks that cover the requested seeds."""
        return blocks_of(requested_seeds(self.config, self.prompts), self.layout.block_size)

    @property
    def seeds(self) -> range:
        """The requested seeds, widened to whole blocks."""
        return range(self.blocks.start * self.layout.block_size, self.blocks.stop * self.layout.block_size)

    @property
    def evaluations_per_seed(self) -> int:
        """Network evaluations of one trajectory; guidance takes two per prediction."""
        return self.path.evaluations * self.recipe.evaluations_at_once

    @property
    def evaluations_per_block(self) -> int:
        """Network evaluations of one image, for all seeds of a block."""
        return self.layout.block_size * self.evaluations_per_seed

    @property
    def block_bytes(self) -> int:
        """Disk space of one block, all arrays."""
        further = sum(spec.block_bytes for spec in self.writer.further)
        return self.layout.block_bytes(self.recipe.item_shape) * len(self.layout.states) + further

    @property
    def network(self) -> Teacher:
        """The teacher, where it is a network that advkd samples by its own loop.

        Raises:
            ConfigError: it is a text-to-image pipeline.
        """
        if isinstance(self.teacher, PipelineTeacher):
            raise ConfigError(f"teacher {self.teacher.source}: a text-to-image pipeline, which can't do this")
        return self.teacher

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return self.teacher.device


def check_request(
    sampler: SamplerConfig, config: CacheConfig, store: Path, prompts: PromptList | None = None
) -> tuple[int, ...]:
    """Check a request as far as possible without a teacher; the solver steps after which states are recorded.

    Raises:
        UsageError: sampler, steps, recorded states, seeds or device don't fit.
        NotACacheError: the store's path holds something else.
    """
    find_solver(sampler.resolved().name)
    recorded = recorded_steps(config.record, sampler.steps)
    num_blocks = blocks_of(requested_seeds(config, prompts), config.block_size).stop
    if num_blocks > MAX_BLOCKS:
        raise UsageError(
            f"seeds {config.seeds} make {num_blocks:,} blocks of {config.block_size}: choose larger blocks"
        )
    best_device(config.device)
    if holds_something(store):
        read_metadata(LocalSource(store))
    return recorded


def make_plan(
    teacher: TeacherConfig,
    sampler: SamplerConfig,
    config: CacheConfig,
    store: Path,
    prompts: PromptList | None = None,
) -> Plan:
    """Load the teacher and check everything that can be checked before the first evaluation.

    Args:
        teacher: where it is.
        sampler: how it is sampled.
        config: of the cache.
        store: the store, which need not exist.
        prompts: of a text-to-image pipeline; those that `config` names if not given.

    Raises:
        UsageError: the request doesn't fit (steps, recorded states, seeds, sampler).
        TeacherError: the teacher can't be loaded.
    """
    if prompts is None and config.prompts is not None:
        prompts = PromptList.read(config.prompts)
    recorded = check_request(sampler, config, store, prompts)
    if prompts is not None:
        return _plan_pipeline(teacher, sampler, config, store, recorded, prompts)
    _check_no_pipeline_options(teacher, sampler)
    loaded = load_teacher(teacher, best_device(config.device), config.precision)
    path = SolverPath.of(loaded.scheduler_config, sampler)
    _check_evaluations(loaded, path)
    recipe = Recipe(
        teacher=loaded.identity(),
        sampler=path.identity(),
        precision={"compute": config.precision, "tf32": False},
        noise={"rule": NOISE_RULE, "root_seed": config.root_seed},
        item_shape=loaded.item_shape,
        condition=_condition(loaded, sampler, config),
        space=loaded.space,
    )
    older: tuple[str, ...] = ()
    if holds_something(store):
        found, _ = read_metadata(LocalSource(store))
        rules = older_rules(found, recipe)
        if rules is not None:
            older, recipe, path = rules, found, SolverPath.recorded(found)
    states = tuple(path.states[step] for step in recorded)
    layout = Layout(states=states, dtype=config.dtype, block_size=config.block_size)
    writer = CacheWriter(store, recipe, layout)
    return Plan(teacher=loaded, path=path, config=config, writer=writer, older_rules=older)


def _plan_pipeline(
    teacher: TeacherConfig,
    sampler: SamplerConfig,
    config: CacheConfig,
    store: Path,
    recorded: tuple[int, ...],
    prompts: PromptList,
) -> Plan:
    """The plan of a text-to-image pipeline.

    Raises:
        ConfigError: the request doesn't fit such a teacher.
        MismatchError: the list of prompts isn't the store's.
        TeacherError: it can't be loaded.
    """
    for key, given in (("cache.labels", config.labels != "all"), ("cache.keep_weights", config.keep_weights)):
        if given:
            raise ConfigError(f"{key}: of a teacher that is told labels or nothing, not prompts; leave it out")
    device = best_device(config.device)
    loaded = load_pipeline_teacher(
        teacher, sampler, prompts.prompts[0], config.seeds_per_prompt, device, config.precision
    )
    recipe = Recipe(
        teacher=loaded.identity(),
        sampler=loaded.path.identity(),
        precision={"compute": config.precision, "tf32": False},
        noise={"rule": NOISE_RULE, "root_seed": config.root_seed},
        item_shape=loaded.item_shape,
        prompts=loaded.condition,
        space=loaded.space,
    )
    if holds_something(store):
        found, _ = read_metadata(LocalSource(store))
        if equivalent(found, recipe):
            recipe = found
            prompts.check_continues(TrajectoryCache.open(store).prompts, store)
    states = tuple(loaded.path.states[step] for step in recorded)
    layout = Layout(states=states, dtype=config.dtype, block_size=config.block_size)
    writer = CacheWriter(store, recipe, layout)
    return Plan(teacher=loaded, path=loaded.path, config=config, writer=writer, prompts=prompts)


def _check_no_pipeline_options(teacher: TeacherConfig, sampler: SamplerConfig) -> None:
    """Refuse options of text-to-image pipelines where no prompts are given.

    Raises:
        ConfigError: names the first one.
    """
    for key, given in (
        ("teacher.lora", teacher.lora),
        ("teacher.offload", teacher.offload),
        ("sampler.height", sampler.height),
        ("sampler.width", sampler.width),
        ("sampler.call", sampler.call),
    ):
        if given:
            raise ConfigError(f"{key}: of a text-to-image pipeline, and no prompts are given: give cache.prompts")


def _condition(teacher: Teacher, sampler: SamplerConfig, config: CacheConfig) -> ClassCondition | None:
    """What the teacher is told; None for an unconditional one.

    Raises:
        ConfigError: labels or guidance don't fit the teacher.
    """
    if not teacher.num_classes:
        if config.labels != "all" or sampler.guidance != 1.0:
            asked = f"labels {config.labels}" if config.labels != "all" else f"guidance {sampler.guidance:g}"
            raise ConfigError(f"teacher {teacher.source} is unconditional: it can't follow {asked}; leave it out")
        return None
    known = [label for label in range(teacher.num_classes) if label != teacher.null_class]
    labels = known if isinstance(config.labels, str) else sorted(config.labels)
    if impossible := sorted(set(labels) - set(known)):
        null = "" if teacher.null_class is None else f", without its null class {teacher.null_class}"
        raise ConfigError(
            f"cache.labels: teacher {teacher.source} has no label {impossible[0]}; it has {known[0]} to {known[-1]}"
            f"{null}"
        )
    guided = sampler.guidance != 1.0
    if guided and teacher.null_class is None:
        raise ConfigError(
            f"sampler.guidance {sampler.guidance:g}: which row of teacher {teacher.source}'s {teacher.num_classes} "
            "stands for no label is in none of its files: name it as teacher.null_class (often the last one), or leave "
            "guidance at 1"
        )
    return ClassCondition(
        num_classes=teacher.num_classes,
        labels=tuple(labels),
        guidance=float(sampler.guidance),
        null_class=teacher.null_class if guided else None,
    )


def say_warnings(plan: Plan, reporter: Reporter) -> None:
    """Warn of prompts that fill no block, and of rules that the store keeps although they have changed since."""
    if plan.prompts is not None and (rest := left_out(plan.config, plan.prompts)):
        reporter.say(f"warning: {rest}")
    for rule in plan.older_rules:
        reporter.say(
            f"warning: {plan.store} was made by an older rule, which it keeps: {rule}; "
            "another --out builds by the present one"
        )


def _check_evaluations(teacher: Teacher, path: SolverPath) -> None:
    """Check that the teacher says what the sampler needs at every timestep that it visits.

    Raises:
        TeacherError: it has an embedding per timestep, and the sampler visits timesteps between them; or it predicts
            the noise, and is asked for it where there is nothing but noise; or it lacks the variance that it should
            have learned.
    """
    sampler, timesteps, start = path.sampler, path.timesteps, path.states[0]
    if path.uses_variance and not teacher.learned_variance:
        raise TeacherError(
            f"teacher {teacher.source}: its scheduler has variance_type {path.options['variance_type']!r}, and its "
            f"network gives no variance ({teacher.item_shape[0]} channels out); expected twice as many, or another "
            "sampler than ddpm"
        )
    if teacher.only_whole_timesteps and not bool((timesteps == timesteps.round()).all()):
        raise TeacherError(
            f"teacher {teacher.source}: it learned one embedding per timestep, and {sampler.name} with spacing "
            f"{sampler.spacing!r} and {sampler.steps} steps visits fractional ones; expected whole timesteps: choose "
            "spacing trailing or leading, or ddim"
        )
    predicts_noise = teacher.scheduler_config.get("prediction_type", "epsilon") == "epsilon"
    if start.alpha == 0.0 and predicts_noise and not path.solver.flow:
        raise TeacherError(
            f"teacher {teacher.source}: it predicts the noise, and {sampler.name} with spacing {sampler.spacing!r} "
            f"starts at timestep {start.timestep:g} without any signal (rescale_betas_zero_snr), where x_0 doesn't "
            "follow from the noise; expected a teacher that predicts v or x_0, or --spacing leading"
        )


def recorded_list(layout: Layout) -> list[int]:
    """The solver steps of a layout's states, as a configuration would list them."""
    return [state.step for state in layout.states if state.step]


def origin(plan: Plan) -> dict[str, Any]:
    """What the store's provenance says about the teacher and the sampler."""
    teacher = plan.teacher
    return {
        "teacher": {"source": teacher.source, "commit": teacher.commit, **teacher.card.to_json(), **teacher.parts},
        "sampler": {"name": plan.sampler.name, "spacing": plan.sampler.spacing, "eta": plan.sampler.eta},
    }
