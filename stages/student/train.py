"""Stage two: train a student from a cache.

The order of seeds and all random draws are functions of (seed, phase, step), so a checkpoint holds no generator state.
On a CPU a resumed run gives the same metrics and weights as an uninterrupted one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from advkd.cache.errors import UsageError
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.read.weights import teacher_weights
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.student.config import KINDS, TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.run import Run, SeedSplit, identity, split_seeds
from advkd.stages.student.student import build_student, folder_of, load_student
from advkd.stages.student.trainer import Trainer
from advkd.stages.student.training.data import fetch_states, read_condition, value_range
from advkd.stages.student.training.distributed import ProcessGroup
from advkd.stages.student.training.trackers import check_installed


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a training run."""

    run: Path
    step: int
    num_steps: int
    held_out_mse: float
    preview: Path | None
    is_main: bool
    """Whether this process has rank 0, which prints."""

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
    device: str | None = None,
) -> Trained:
    """Train a student from a cache, or resume where an earlier call stopped.

    Args:
        cache_path: the trajectory cache, a folder or a URL.
        config: settings of the run.
        run_path: folder of the run.
        max_steps: stop at this step and stay resumable; the learning rate's schedule remains that of the whole run.
        resume: require that the run exists.
        on_mismatch: if the folder holds another run, stop or rename it.
        reporter: shows progress.
        should_stop: called after every step; True saves a checkpoint and returns.
        device: such as cuda:1; the best of this machine if None.

    Raises:
        CacheError: the cache is missing, partial or damaged.
        UsageError: the request doesn't fit the cache, the folder or the number of processes.
        TrainingError: training diverged; the last checkpoint stays.
    """
    check_installed(config.trackers)
    processes = ProcessGroup(config.mixed_precision, device)
    reporter = reporter if reporter and processes.is_main else SilentReporter()
    cache = TrajectoryCache.open(cache_path)
    run = Run(run_path)
    started = processes.broadcast(run.started_with(cache, on_mismatch) if processes.is_main else None)
    seeds, num_processes = started or (None, processes.world_size)
    split = split_seeds(cache, config.seeds or seeds)
    _check_kind(cache, config, processes.world_size)
    torch.manual_seed(config.seed)
    kind = KINDS[config.student.kind]
    geometry = Geometry.of(cache, config.states, network=kind.starts_from_teacher)
    student = build_student(config.student, geometry)
    if config.start:
        _start(student, Path(config.start))
    elif kind.starts_from_teacher:
        student.start_from(teacher_weights(cache))
    student.to(processes.accelerator.device)
    # The global batch stays that of the start, divided among the processes of now.
    divided = kind.divided(config, num_processes, processes.world_size)
    program = kind.program(divided, student, geometry, processes.accelerator, len(split.training))
    steps = sorted({step for phase in program.phases for step in phase.states} | {geometry.steps[-1]})
    for step in steps:
        cache.state(step)  # raises now if a partial copy lacks it
    read_condition(cache, split.training[:1])  # likewise
    wanted = identity(config, cache, split, num_processes)
    trainer = Trainer(
        cache=cache,
        config=config,
        run=run,
        split=split,
        geometry=geometry,
        program=program,
        processes=processes,
        reporter=reporter,
        identity=wanted,
    )
    claim = run.claimed(wanted, resume=resume, on_mismatch=on_mismatch)
    with processes.entered_by_main(claim) as claimed:
        grown = _grown(cache, config, split)
        if claimed.status == "complete":
            reporter.say(f"{run_path} is already complete; nothing to do{grown and f'. {grown}'}")
            return _trained(trainer, load_student(run.student)[0], trainer.num_steps)
        fetch_states(cache, steps, split.blocks, reporter)
        reporter.say(_images_in_words(cache, split.blocks))
        if grown:
            reporter.say(grown)
        if claimed.status == "resume":
            trainer.resume(claimed.segments)
        elif processes.is_main:
            shutil.rmtree(run.log, ignore_errors=True)
        trainer.record_segment(claimed.segments)
        trainer.run_to(min(trainer.num_steps, max_steps or trainer.num_steps), should_stop)
        processes.accelerator.wait_for_everyone()
        return _trained(trainer, trainer.average.model, trainer.step)


def _grown(cache: TrajectoryCache, config: TrainConfig, split: SeedSplit) -> str:
    """A note if the cache has seeds that it didn't have when the run started; empty if not."""
    seeds = sorted([*split.training, *split.held_out])
    if config.seeds or cache.num_seeds <= seeds[-1] + 1:
        return ""
    return (
        f"The run keeps its seeds {seeds[0]}:{seeds[-1] + 1}; the cache has grown to 0:{cache.num_seeds} since: choose "
        "another --run to train on all of them"
    )


def _images_in_words(cache: TrajectoryCache, blocks: Sequence[int], max_records: int = 16) -> str:
    """The range of x_0 as the ledger records it for some blocks; no values are read."""
    some = blocks[:: -(-len(blocks) // max_records)]
    low, high = value_range(cache, max(cache.states), some)
    where = f", in {len(some)} of {len(blocks)} blocks" if len(some) < len(blocks) else ""
    return f"x_0 in {cache.address}: values from {low:+.2f} to {high:+.2f}{where}"


def _trained(trainer: Trainer, student: nn.Module, step: int) -> Trained:
    previews = sorted(trainer.run.preview.glob("step-*.png"))
    return Trained(
        run=trainer.run.path,
        step=step,
        num_steps=trainer.num_steps,
        held_out_mse=trainer.held_out_mse(student.to(trainer.processes.accelerator.device)),
        preview=previews[-1] if previews else None,
        is_main=trainer.processes.is_main,
    )


def _start(student: nn.Module, other: Path) -> None:
    """Take the weights of an earlier student.

    Raises:
        TrainingError: there is none.
        UsageError: it is of another architecture.
    """
    weights, own = load_student(folder_of(other))[0].state_dict(), student.state_dict()
    if {name: tensor.shape for name, tensor in weights.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise UsageError(
            f"train.start: {other} is a student of another architecture: expected the same student settings, states, "
            "image shape and classes"
        )
    student.load_state_dict(weights)


def _check_kind(cache: TrajectoryCache, config: TrainConfig, world_size: int) -> None:
    kind = KINDS[config.student.kind]
    if kind.is_paired(config) and not cache.recipe.deterministic:
        sampler, eta = cache.recipe.sampler["name"], float(cache.recipe.sampler["eta"])
        raise UsageError(
            f"{cache.address} was sampled with {sampler}{f' and eta {eta:g}' if eta else ''}, which draws noise at "
            "every step: x_T does not determine x_0, so a paired loss would teach the average image. Build with a "
            "deterministic sampler (ddim with eta 0, dpmsolver++, euler, heun), or train `student.kind: progressive`"
        )
    if kind.normalises_over_batch and world_size > 1:
        raise UsageError(
            f"student.kind: {config.student.kind} normalises over the batch of one process; {world_size} processes "
            "would train another student: use one process, or `student.kind: unrolled`"
        )
