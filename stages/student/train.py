"""Stage two: train a student from a cache.

The order of seeds and every random draw are functions of (seed, phase, step), so going on from a checkpoint needs no
random state: run the same command again, and on a CPU the metrics that follow are those of an uninterrupted run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from advkd.cache.errors import UsageError
from advkd.cache.format.recipe import digest
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.student.config import TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.progressive.network import ProgressiveStudent
from advkd.stages.student.progressive.program import ProgressiveProgram
from advkd.stages.student.student import build_student, load_student
from advkd.stages.student.training.data import fetch_states
from advkd.stages.student.training.distributed import Team
from advkd.stages.student.training.protocol import Program
from advkd.stages.student.training.run import Run, identity, split_seeds
from advkd.stages.student.training.trainer import Trainer
from advkd.stages.student.unrolled.program import UnrolledProgram


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a training run ended."""

    run: Path
    step: int
    num_steps: int
    held_out_mse: float
    preview: Path | None
    is_first: bool
    """Whether this process is the one of its team that speaks."""

    @property
    def complete(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.num_steps


def train(
    cache_path: str | Path,
    config: TrainConfig,
    run_path: Path,
    *,
    max_steps: int | None = None,
    resume: bool = False,
    on_mismatch: Literal["stop", "set-aside"] = "stop",
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train a student from a cache, or go on where an earlier call stopped.

    Args:
        cache_path: the trajectory cache, a folder or a URL; nothing else is read.
        config: the run.
        run_path: its folder.
        max_steps: stop after so many steps in all, resumable; the schedule stays that of the whole run.
        resume: insist that the run is there already.
        on_mismatch: where the folder holds another run: stop, or rename it.
        reporter: hears of progress.
        should_stop: asked after every step; True saves a checkpoint and returns.

    Raises:
        CacheError: the cache is missing, partial or damaged.
        UsageError: the request doesn't fit the cache or the folder.
        TrainingError: the loss is not finite; the last checkpoint stays.
    """
    team = Team(config.mixed_precision)
    reporter = reporter if reporter and team.is_first else SilentReporter()
    cache = TrajectoryCache.open(cache_path)
    run = Run(run_path)
    in_progress = team.told(run.seeds_in_progress(cache, on_mismatch) if team.is_first else None)
    split = split_seeds(cache, config.seeds or in_progress)
    _check_paired(cache, config)
    torch.manual_seed(config.seed)
    geometry = Geometry.of(cache, config.states)
    student = build_student(config.student, geometry).to(team.accelerator.device)
    program = _make_program(config, student, geometry, team, len(split.training))
    steps = sorted({step for phase in program.phases for step in phase.states} | {geometry.steps[-1]})
    for step in steps:
        cache.state(step)  # what a partial copy has not is said at once
    wanted = identity(config, cache, split, team.size)
    trainer = Trainer(
        cache=cache,
        config=config,
        run=run,
        split=split,
        geometry=geometry,
        program=program,
        team=team,
        reporter=reporter,
        identity=wanted,
        identity_digest=digest(wanted),
    )
    claim = run.claimed(wanted, resume=resume, on_mismatch=on_mismatch)
    with team.entered_by_first(claim) as status:
        if status == "complete":
            reporter.say(f"{run_path} is complete already; nothing to do")
            return _trained(trainer, load_student(run.student)[0], trainer.num_steps)
        fetch_states(cache, steps, split.blocks, reporter)
        if status == "resume":
            trainer.resume()
        elif team.is_first:
            shutil.rmtree(run.log, ignore_errors=True)
        trainer.run_to(min(trainer.num_steps, max_steps or trainer.num_steps), should_stop)
        team.accelerator.wait_for_everyone()
        return _trained(trainer, trainer.average.model, trainer.step)


def _trained(trainer: Trainer, student: nn.Module, step: int) -> Trained:
    previews = sorted(trainer.run.preview.glob("step-*.png"))
    return Trained(
        run=trainer.run.path,
        step=step,
        num_steps=trainer.num_steps,
        held_out_mse=trainer.held_out_mse(student.to(trainer.team.accelerator.device)),
        preview=previews[-1] if previews else None,
        is_first=trainer.team.is_first,
    )


def _check_paired(cache: TrajectoryCache, config: TrainConfig) -> None:
    if config.student.kind == "unrolled" and config.objective.paired and not cache.recipe.deterministic:
        raise UsageError(
            f"{cache.address} was sampled with {cache.recipe.sampler['name']}, which draws noise at every step: x_T "
            "does not determine x_0, so a paired loss would teach the average image. Build with a deterministic "
            "sampler (ddim, dpmsolver++, euler, heun), or train `student.kind: progressive`"
        )


def _make_program(config: TrainConfig, student: nn.Module, geometry: Geometry, team: Team, num_seeds: int) -> Program:
    if isinstance(student, ProgressiveStudent):
        if team.size > 1:
            raise UsageError(
                f"student.kind: progressive normalises over the batch of one process; {team.size} would train another "
                "student: use one process, or `student.kind: unrolled`"
            )
        return ProgressiveProgram(config, student, geometry, team.accelerator, num_seeds)
    if num_seeds < config.batch_size * team.size:
        raise UsageError(f"train.batch_size {config.batch_size * team.size} exceeds the {num_seeds} seeds to train on")
    return UnrolledProgram(config, student, geometry, team.accelerator)  # type: ignore[arg-type]
