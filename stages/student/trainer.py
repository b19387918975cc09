"""The training loop: phases, logging, previews, checkpoints, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from advkd.cache.errors import TrainingError
from advkd.cache.format.recipe import digest
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.read.weights import decoder_weights
from advkd.stages.decoder import as_images, cache_decoder
from advkd.stages.ema import ExponentialMovingAverage
from advkd.stages.pictures import save_rows
from advkd.stages.reporter import Reporter
from advkd.stages.student.config import TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.provenance import describe, write_provenance
from advkd.stages.student.run import Run, SeedSplit, Segment
from advkd.stages.student.student import generate, save_student
from advkd.stages.student.training.checkpoint import load_checkpoint, read_scalars, save_checkpoint
from advkd.stages.student.training.data import prefetch_batches, read_condition, read_float, seed_batches, value_range
from advkd.stages.student.training.distributed import ProcessGroup
from advkd.stages.student.training.log import MetricsLog, forget_metrics_after
from advkd.stages.student.training.protocol import Program, mean_metrics
from advkd.stages.student.training.trackers import Trackers

PREVIEW_SEEDS = 8
VALIDATION_SEEDS = 256
MAX_MSE = 100.0
"""Images in [−1, 1] differ by at most 4 in mean square; beyond this, training has diverged. That of latents is in
proportion to the square of their own range."""
MAX_LOGGED_CLASSES = 20
"""Up to so many classes, the log has the held-out error of each."""


class Trainer:
    """One run, in one process of a group.

    Args:
        cache: to learn from.
        config: of the run.
        run: its folder, claimed by the main process.
        split: its seeds.
        geometry: of the cache's chosen states.
        program: how the student is trained.
        processes: the process group.
        reporter: shows progress.
        identity: of the run, as in `run.json`.
    """

    def __init__(
        self,
        *,
        cache: TrajectoryCache,
        config: TrainConfig,
        run: Run,
        split: SeedSplit,
        geometry: Geometry,
        program: Program,
        processes: ProcessGroup,
        reporter: Reporter,
        identity: dict[str, Any],
    ) -> None:
        self.cache = cache
        self.config = config
        self.run = run
        self.split = split
        self.geometry = geometry
        self.program = program
        self.processes = processes
        self.reporter = reporter
        self.identity = identity
        self.segments: tuple[Segment, ...] = ()
        self.provenance = describe(cache, identity, split)
        self._decoder = cache_decoder(cache)
        self._decoder_file = decoder_weights(cache) if geometry.space else None
        self._max_mse = MAX_MSE if geometry.space is None else MAX_MSE / 4.0 * _squared_range(cache, split)
        self.average = ExponentialMovingAverage(program.student, config.ema, config.ema_width)
        self.step = 0
        self.phase = 0
        self.best = math.inf
        self.starts = np.cumsum([0, *[phase.num_steps for phase in program.phases]]).tolist()
        self.num_steps: int = self.starts[-1]
        self._note = ""
        self.program.begin(0)

    def record_segment(self, segments: tuple[Segment, ...]) -> None:
        """Record in run.json which processes train from this step on, after earlier segments."""
        now = Segment(
            step=self.step, processes=self.processes.world_size, steps=self.num_steps, identity=digest(self.identity)
        )
        earlier = tuple(segment for segment in segments if segment.step < self.step)
        same = earlier and replace(earlier[-1], step=self.step) == now
        self.segments = earlier if same else (*earlier, now)
        if self.processes.is_main:
            self.run.write(self.identity, "training", self.segments)

    def resume(self, segments: tuple[Segment, ...]) -> None:
        """Load the last checkpoint of the run's segments, and drop the metrics that were logged after it."""
        scalars = read_scalars(self.run.checkpoint)
        known = {digest(self.identity), *(segment.identity for segment in segments)}
        if scalars.get("identity") not in known or not 0 <= scalars["step"] <= self.num_steps:
            raise TrainingError(f"{self.run.checkpoint} is the checkpoint of another run: remove it to start over")
        self.step = int(scalars["step"])
        self.best = math.inf if scalars.get("best") is None else float(scalars["best"])
        self.phase = self._phase_of(self.step)
        # A checkpoint at the end of a phase holds that phase's discriminator; the next phase creates its own.
        self.program.begin(self._phase_of(max(0, self.step - 1)))
        load_checkpoint(self.run.checkpoint, self._modules(), self.program.optimizers())
        scaler = self.processes.accelerator.scaler  # None unless in float16
        if scaler is not None and scalars.get("scaler"):
            scaler.load_state_dict(scalars["scaler"])
        if self._phase_of(max(0, self.step - 1)) != self.phase:
            self.program.begin(self.phase)
        if self.processes.is_main:
            forget_metrics_after(self.run.log, self.step)
            self.reporter.say(f"resuming {self.run.path} from step {self.step}")

    def _phase_of(self, step: int) -> int:
        return min(int(np.searchsorted(self.starts, step, side="right")) - 1, len(self.program.phases) - 1)

    def _modules(self) -> Mapping[str, nn.Module]:
        return {**self.program.modules(), "average": self.average.model}

    def run_to(self, last_step: int, should_stop: Callable[[], bool]) -> None:
        """Train up to a step, or until `should_stop()` is True in any process."""
        self.reporter.start("train", last_step, "steps", done=self.step)
        stopped = False
        main = self.processes.is_main
        trackers = Trackers(
            self.config.trackers if main else (),
            self.run.log,
            step=self.step,
            identity=self.identity,
            reporter=self.reporter,
        )
        with trackers, MetricsLog(self.run.log if main else None, trackers) as log:
            while self.step < last_step and not stopped:
                phase = self._phase_of(self.step)
                if phase != self.phase:
                    self.phase = phase
                    self.program.begin(phase)
                stopped = self._run_phase(phase, min(last_step, self.starts[phase + 1]), log, should_stop)
        self.reporter.finish()
        if not stopped:
            self._save()
        if self.step == self.num_steps and self.processes.is_main:
            self.run.write(self.identity, "complete", self.segments)

    def _run_phase(self, phase: int, last_step: int, log: MetricsLog, should_stop: Callable[[], bool]) -> bool:
        start, plan, device = self.starts[phase], self.program.phases[phase], self.processes.accelerator.device
        seeds = seed_batches(
            self.split.training,
            batch_size=plan.batch_size,
            root_seed=self.config.seed,
            phase=phase,
            steps=range(self.step - start, last_step - start),
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        readings: list[dict[str, Tensor]] = []
        self.program.student.train()
        for batch in prefetch_batches(self.cache, plan.states, seeds):
            readings.append(self.program.step(batch.to(device), phase, self.step - start))
            self.average.update(self.program.student, self.step)
            self.step += 1
            stop = self.processes.any(should_stop())
            saved = stop or (self.step % self.config.checkpoint_every == 0 and self.step < self.num_steps)
            if self.step % self.config.log_every == 0 or self.step == last_step or saved:
                self._log(log, readings)  # before saving, so that diverged weights aren't saved and no metric is lost
                readings = []
            if self.step % self.config.preview_every == 0 or self.step == self.num_steps:
                self._validate(log)
            if saved:
                self._save()
            self.reporter.advance(1, self._note)
            if stop:
                return True
        return False

    def _log(self, log: MetricsLog, readings: list[dict[str, Tensor]]) -> None:
        values = self.processes.mean({name: float(value) for name, value in mean_metrics(readings).items()})
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not bad and values.get("mse", 0.0) > self._max_mse:
            bad = [f"the mean squared error is {values['mse']:.3g}"]
        if bad:
            self._diverged(", ".join(bad))
        log.log(self.step, {f"train/{name}": value for name, value in values.items()})
        self._note = " ".join(
            f"{name} {value:.4f}" for name, value in values.items() if name in ("loss", "mse", "ahead")
        )
        if len(self.program.phases) > 1:
            self._note = f"stage {self.phase + 1}/{len(self.program.phases)} {self._note}"

    def _validate(self, log: MetricsLog) -> None:
        """Score the average on held-out seeds; in the last phase, save it if it is the best so far."""
        if not self.processes.is_main:
            return
        errors, labels = self._held_out_errors(self.average.model)
        mse = float(errors.mean()) if len(errors) else math.nan
        if math.isfinite(mse):
            known = self.geometry.labels if len(self.geometry.labels) <= MAX_LOGGED_CLASSES else ()
            of_class = {label: errors[labels == label] for label in known if labels is not None}
            by_class = {f"held_out/class_{label}": float(some.mean()) for label, some in of_class.items() if len(some)}
            log.log(self.step, {"held_out/mse": mse, **by_class})
            if mse < self.best and self.phase == len(self.program.phases) - 1:
                self.best = mse
                self._keep(self.run.best)
        log.show(self.step, "preview", self._preview())

    def held_out_mse(self, student: nn.Module) -> float:
        """Mean squared error of a student's x_0 against the teacher's on some held-out seeds."""
        errors, _ = self._held_out_errors(student)
        return float(errors.mean()) if len(errors) else math.nan

    def _held_out_errors(self, student: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Squared errors of x_0 on some held-out seeds, shape (N, C, H, W), and the seeds' labels."""
        seeds = self.split.held_out[:VALIDATION_SEEDS]
        condition, real = read_condition(self.cache, seeds), read_float(self.cache, self.geometry.steps[-1], seeds)
        labels = condition if self.geometry.num_classes else None
        if not len(seeds):
            return real, labels
        made = generate(student, read_float(self.cache, self.geometry.steps[0], seeds), condition)
        return (made - real).square(), labels

    def _preview(self) -> Path:
        """Save x_0 of teacher and student, on the same seeds every time, held-out ones where there are any."""
        known = self.split.held_out if len(self.split.held_out) else self.split.training
        seeds = self.cache.varied(known, PREVIEW_SEEDS)
        noise = read_float(self.cache, self.geometry.steps[0], seeds)
        real = read_float(self.cache, self.geometry.steps[-1], seeds)
        made = generate(self.average.model, noise, read_condition(self.cache, seeds))
        path = self.run.preview / f"step-{self.step:06d}.png"
        rows = {"x_T": noise, "teacher": real, "student": made}
        return save_rows(path, {name: as_images(values, self._decoder) for name, values in rows.items()})

    def _save(self) -> None:
        """Save a checkpoint and the student; weights that are not finite never replace good ones."""
        for name, module in self._modules().items():
            if not all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values()):
                self._diverged(f"weights of the {name} are not finite")
        if not self.processes.is_main:
            return
        best = self.best if math.isfinite(self.best) else None
        scaler = self.processes.accelerator.scaler
        scalars = {
            "step": self.step,
            "identity": digest(self.identity),
            "best": best,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        save_checkpoint(self.run.checkpoint, self._modules(), self.program.optimizers(), scalars)
        self._keep(self.run.student)

    def _keep(self, folder: Path) -> None:
        save_student(folder, self.average.model, self.config.student, self.geometry, self._decoder_file)
        segments = [asdict(segment) for segment in self.segments]
        write_provenance(folder, {**self.provenance, "segments": segments, "step": self.step})

    def _diverged(self, what: str) -> NoReturn:
        checkpoint = self.run.checkpoint if self.run.checkpoint.is_file() else "none yet"
        raise TrainingError(
            f"training diverged: {what} by step {self.step}; the last good checkpoint is {checkpoint}: lower the "
            "learning rates"
        )


def _squared_range(cache: TrajectoryCache, split: SeedSplit) -> float:
    low, high = value_range(cache, max(cache.states), split.blocks[:1])
    return (high - low) ** 2
