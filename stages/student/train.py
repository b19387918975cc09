"""The training loop: phases, logging, previews, checkpoints, resuming.

The order of seeds and every random draw are functions of (seed, phase, step), so going on from a checkpoint needs no
random state: run the same command again, and on a CPU the metrics that follow are those of an uninterrupted run.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.reader import TrajectoryCache
from advkd.cache.recipe import digest
from advkd.stages.ema import ExponentialMovingAverage
from advkd.stages.pictures import save_rows
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.student.checkpoint import load_checkpoint, read_scalars, save_checkpoint
from advkd.stages.student.config import TrainConfig
from advkd.stages.student.data import TrajectoryBatches, fetch_states, make_loader, read_float
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.programs import Program
from advkd.stages.student.progressive import ProgressiveStudent
from advkd.stages.student.progressive_program import ProgressiveProgram
from advkd.stages.student.run import Run, SeedSplit, identity, split_seeds
from advkd.stages.student.student import build_student, generate, load_student, save_student
from advkd.stages.student.unrolled_program import UnrolledProgram

PREVIEW_SEEDS = 8
VALIDATION_SEEDS = 256


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a training run ended."""

    run: Path
    step: int
    num_steps: int
    held_out_mse: float
    preview: Path | None

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
    reporter = reporter or SilentReporter()
    cache = TrajectoryCache.open(cache_path)
    run = Run(run_path)
    split = split_seeds(cache, config.seeds or run.seeds_in_progress(cache, on_mismatch))
    _check_paired(cache, config)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.num_processes > 1:
        raise UsageError(
            f"training in {accelerator.num_processes} processes is not there yet: gradients would not be shared"
        )
    torch.manual_seed(config.seed)
    geometry = Geometry.of(cache, config.states)
    student = build_student(config.student, geometry).to(accelerator.device)
    program = _make_program(config, student, geometry, accelerator, len(split.training))
    steps = sorted({step for phase in program.phases for step in phase.states} | {geometry.steps[-1]})
    for step in steps:
        cache.state(step)  # what a partial copy has not is said at once
    wanted = identity(config, cache, split)
    trainer = _Trainer(cache, config, run, split, geometry, program, accelerator, reporter, digest(wanted))
    with run.claimed(wanted, resume=resume, on_mismatch=on_mismatch) as status:
        if status == "complete":
            reporter.say(f"{run_path} is complete already; nothing to do")
            return trainer.finished(load_student(run.student)[0], trainer.num_steps)
        fetch_states(cache, steps, split.blocks, reporter)
        if status == "resume":
            trainer.resume()
        else:
            shutil.rmtree(run.log, ignore_errors=True)
        return trainer.run_to(min(trainer.num_steps, max_steps or trainer.num_steps), should_stop, wanted)


def _check_paired(cache: TrajectoryCache, config: TrainConfig) -> None:
    if config.student.kind == "unrolled" and config.objective.paired and not cache.recipe.deterministic:
        raise UsageError(
            f"{cache.address} was sampled with {cache.recipe.sampler['name']}, which draws noise at every step: x_T "
            "does not determine x_0, so a paired loss would teach the average image. Build with a deterministic "
            "sampler (ddim, dpmsolver++, euler, heun), or train `student.kind: progressive`"
        )


def _make_program(
    config: TrainConfig, student: nn.Module, geometry: Geometry, accelerator: Accelerator, num_seeds: int
) -> Program:
    if isinstance(student, ProgressiveStudent):
        return ProgressiveProgram(config, student, geometry, accelerator, num_seeds)
    if num_seeds < config.batch_size:
        raise UsageError(f"train.batch_size {config.batch_size} exceeds the {num_seeds} seeds to train on")
    return UnrolledProgram(config, student, geometry, accelerator)  # type: ignore[arg-type]


class _Trainer:
    def __init__(
        self,
        cache: TrajectoryCache,
        config: TrainConfig,
        run: Run,
        split: SeedSplit,
        geometry: Geometry,
        program: Program,
        accelerator: Accelerator,
        reporter: Reporter,
        identity_digest: str,
    ) -> None:
        self.identity_digest = identity_digest
        self.cache = cache
        self.config = config
        self.run = run
        self.split = split
        self.geometry = geometry
        self.program = program
        self.accelerator = accelerator
        self.reporter = reporter
        self.average = ExponentialMovingAverage(program.student, config.ema)
        self.step = 0
        self.phase = 0
        self.starts = np.cumsum([0, *[phase.num_steps for phase in program.phases]]).tolist()
        self.num_steps: int = self.starts[-1]
        self._note = ""
        self.program.begin(0)

    def resume(self) -> None:
        """Go on from the last checkpoint; metrics logged after it are forgotten."""
        scalars = read_scalars(self.run.checkpoint)
        if scalars.get("identity") != self.identity_digest or not 0 <= scalars["step"] <= self.num_steps:
            raise TrainingError(f"{self.run.checkpoint} is the checkpoint of another run: remove it to begin anew")
        self.step = int(scalars["step"])
        self.phase = self._phase_of(self.step)
        # A checkpoint at a phase's very end holds that phase's discriminator; the next phase makes its own.
        self.program.begin(self._phase_of(max(0, self.step - 1)))
        load_checkpoint(self.run.checkpoint, self._modules(), self.program.optimizers())
        if self._phase_of(max(0, self.step - 1)) != self.phase:
            self.program.begin(self.phase)
        forget_metrics_after(self.run.log, self.step)
        self.reporter.say(f"going on from step {self.step} of {self.run.path}")

    def _phase_of(self, step: int) -> int:
        return min(int(np.searchsorted(self.starts, step, side="right")) - 1, len(self.program.phases) - 1)

    def _modules(self) -> Mapping[str, nn.Module]:
        return {**self.program.modules(), "average": self.average.model}

    def run_to(self, last_step: int, should_stop: Callable[[], bool], wanted: dict[str, Any]) -> Trained:
        """Train up to a step, or until asked to stop."""
        from dvclive import Live

        self.reporter.start("train", last_step, "steps", done=self.step)
        stopped = False
        with Live(dir=str(self.run.log), resume=True, save_dvc_exp=False, dvcyaml=None) as live:
            while self.step < last_step and not stopped:
                phase = self._phase_of(self.step)
                if phase != self.phase:
                    self.phase = phase
                    self.program.begin(phase)
                stopped = self._run_phase(phase, min(last_step, self.starts[phase + 1]), live, should_stop)
        self.reporter.finish()
        if self.step == self.num_steps:
            self._save()
            self.run.write(wanted, "complete")
        elif not stopped:
            self._save()
        return self.finished(self.average.model, self.step)

    def _run_phase(self, phase: int, last_step: int, live: Any, should_stop: Callable[[], bool]) -> bool:
        start, plan = self.starts[phase], self.program.phases[phase]
        batches = TrajectoryBatches(
            self.split.training,
            batch_size=plan.batch_size,
            root_seed=self.config.seed,
            phase=phase,
            steps=range(self.step - start, last_step - start),
        )
        readings: list[dict[str, Tensor]] = []
        self.program.student.train()
        for batch in make_loader(self.cache, plan.states, batches):
            on_device = {at: states.to(self.accelerator.device, non_blocking=True) for at, states in batch.items()}
            readings.append(self.program.step(on_device, phase, self.step - start))
            self.average.update(self.program.student, self.step)
            self.step += 1
            stop = should_stop()
            if self.step % self.config.log_every == 0 or self.step == last_step or stop:
                self._log(live, readings, phase)
                readings = []
            if self.step % self.config.preview_every == 0 or self.step == self.num_steps:
                self._validate(live)
            if stop or (self.step % self.config.checkpoint_every == 0 and self.step < self.num_steps):
                self._save()
            self.reporter.advance(1, self._note)
            if stop:
                return True
        return False

    def _log(self, live: Any, readings: list[dict[str, Tensor]], phase: int) -> None:
        names = sorted({name for reading in readings for name in reading})
        values = {
            name: float(torch.stack([reading[name].float() for reading in readings if name in reading]).mean())
            for name in names
        }
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self._diverged(", ".join(bad))
        live.step = self.step
        for name, value in values.items():
            live.log_metric(f"train/{name}", value)
        live.make_summary()
        self._note = " ".join(
            f"{name} {value:.4f}" for name, value in values.items() if name in ("loss", "mse", "ahead")
        )
        if len(self.program.phases) > 1:
            self._note = f"stage {phase + 1}/{len(self.program.phases)} {self._note}"

    def _validate(self, live: Any) -> None:
        mse = self.held_out_mse(self.average.model)
        if math.isfinite(mse):
            live.step = self.step
            live.log_metric("held_out/mse", mse)
            live.make_summary()
        self._preview()

    def held_out_mse(self, student: nn.Module) -> float:
        """Mean squared error of a student's x_0 against the teacher's on some held-out seeds."""
        seeds = self.split.held_out[:VALIDATION_SEEDS]
        if not len(seeds):
            return math.nan
        made = generate(student, read_float(self.cache, self.geometry.steps[0], seeds))
        real = read_float(self.cache, self.geometry.steps[-1], seeds)
        return float((made - real).square().mean())

    def _preview(self) -> Path:
        """The same seeds every time, held out where there are any: the teacher's x_0 beside the student's."""
        seeds = self.split.held_out[:PREVIEW_SEEDS] if len(self.split.held_out) else self.split.training[:PREVIEW_SEEDS]
        noise = read_float(self.cache, self.geometry.steps[0], seeds)
        real = read_float(self.cache, self.geometry.steps[-1], seeds)
        made = generate(self.average.model, noise)
        path = self.run.preview / f"step-{self.step:06d}.png"
        return save_rows(path, {"x_T": noise.numpy(), "teacher": real.numpy(), "student": made.numpy()})

    def _save(self) -> None:
        """Keep this step; what is not finite never replaces a good checkpoint."""
        for name, module in self._modules().items():
            if not all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values()):
                self._diverged(f"weights of the {name}")
        scalars = {"step": self.step, "identity": self.identity_digest}
        save_checkpoint(self.run.checkpoint, self._modules(), self.program.optimizers(), scalars)
        save_student(self.run.student, self.average.model, self.config.student, self.geometry)

    def _diverged(self, what: str) -> NoReturn:
        good = self.run.checkpoint if self.run.checkpoint.is_file() else "none yet"
        raise TrainingError(
            f"training diverged: {what} not finite by step {self.step}; the last good checkpoint is {good}: "
            "lower train.learning_rate"
        )

    def finished(self, student: nn.Module, step: int) -> Trained:
        """The result as it stands."""
        previews = sorted(self.run.preview.glob("step-*.png"))
        return Trained(
            run=self.run.path,
            step=step,
            num_steps=self.num_steps,
            held_out_mse=self.held_out_mse(student.to(self.accelerator.device)),
            preview=previews[-1] if previews else None,
        )


def forget_metrics_after(log: Path, step: int) -> None:
    """Drop the rows of DVCLive's tables past a step, which a resumed run will log again, and whatever was torn."""
    for path in sorted((log / "plots" / "metrics").rglob("*.tsv")):
        with path.open(newline="") as file:
            header, *rows = [*csv.reader(file, delimiter="\t")] or [[]]
        kept = [row for row in rows if len(row) == len(header) and row[0].isdigit() and int(row[0]) <= step]
        if len(kept) != len(rows):
            with path.open("w", newline="") as file:
                csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *kept])
    summary = log / "metrics.json"
    try:
        json.loads(summary.read_bytes())
    except FileNotFoundError:
        pass
    except ValueError:
        summary.unlink()
