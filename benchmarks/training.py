"""Stage two: how long steps wait for data, and how they compare with a naive loop."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from advkd.cache import TrajectoryCache
from advkd.pipeline.config import Experiment, load_experiment
from advkd.stages.schedules import one_cycle
from advkd.stages.student import trainer
from advkd.stages.student.config import TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.student import build_student
from advkd.stages.student.train import train
from advkd.stages.student.training.data import Batch, read_float
from advkd.stages.student.training.losses import relativistic_discriminator, relativistic_generator, squared_gradient
from advkd.stages.student.unrolled.program import UnrolledProgram
from benchmarks.comparison import Comparison, Target, ratio_between, rows_of
from benchmarks.harness import Benchmark, has_bfloat16, run, wait_for
from benchmarks.networks import CIFAR_SHAPE, DIGITS_SHAPE, smooth_store

OURS, NAIVE, HALF = "advkd's step", "naive loop", "advkd's step, mixed_precision: bf16"
HEADLINE = "Training: times faster than a straightforward loop"
STARTS = 3
"""Initial weights to begin from: after so few steps a single start says little about the error."""


def waiting_share(store: Path, run_path: Path, config: TrainConfig, steps: int) -> tuple[list[float], list[float]]:
    """Seconds per step of a real run: waiting for its batch, and in all."""
    original: Any = trainer.__dict__["prefetch_batches"]
    waits, moments = list[float](), list[float]()

    def timed(*arguments: Any) -> Iterator[Batch]:
        batches = iter(original(*arguments))
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            moments.append(time.perf_counter())
            waits.append(moments[-1] - begin)
            yield batch

    setattr(trainer, "prefetch_batches", timed)  # noqa: B010
    try:
        train(store, config, run_path, max_steps=steps)
    finally:
        setattr(trainer, "prefetch_batches", original)  # noqa: B010
    # The first steps warm up and draw the order of the first epoch.
    return waits[3:], [after - before for before, after in itertools.pairwise(moments[2:])]


class HalfProgram(UnrolledProgram):
    """Ours with `mixed_precision: bf16`; Accelerate has one precision per process, so autocast is applied here."""

    def step(self, batch: Batch, phase: int, step: int) -> dict[str, Tensor]:
        """One iteration with the student's pass in bfloat16."""
        device = next(self.student.parameters()).device.type
        unroll = self.student.unroll

        def autocast(noise: Tensor, labels: Tensor | None = None) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return unroll(noise, labels)  # type: ignore[operator]

        self._unroll = autocast
        return super().step(batch, phase, step)


class NaiveProgram(UnrolledProgram):
    """The same losses written naively: two student passes per iteration, penalties every time."""

    def step(self, batch: Batch, phase: int, step: int) -> dict[str, Tensor]:
        """One iteration: the critic, then the student."""
        if not self.adversary.trains_at(step):
            return super().step(batch, phase, step)
        config, critic = self.config.objective.adversarial, self.adversary.critic
        noise = batch.states[self.geometry.steps[0]]
        fresh = self.adversary.fresh_noise(step, min(config.fresh, len(noise)), noise)
        count = len(fresh)
        with torch.no_grad():
            fake = self._unroll(torch.cat([noise, fresh]))[0][-1][-count:]
        real = batch.states[self.geometry.steps[-1]][:count].clone().requires_grad_(True)
        shown = fake.clone().requires_grad_(True)
        real_logits, fake_logits = critic(real, noise[:count]), critic(shown, fresh)
        loss = relativistic_discriminator(real_logits, fake_logits)
        loss = loss + 0.5 * config.r1 * squared_gradient(real_logits, real)
        loss = loss + 0.5 * config.r2 * squared_gradient(fake_logits, shown)
        self.adversary.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adversary.optimizer.step()
        predictions, states = self._unroll(torch.cat([noise, fresh]))
        size = len(noise)
        loss, _ = self.regression([x0[:size] for x0 in predictions], [state[:size] for state in states], batch.states)
        gain = relativistic_generator(critic(real, noise[:count]), critic(predictions[-1][-count:], fresh))
        loss = loss + self.adversary.weight(step) * gain
        self.descent.backward(loss)
        self.descent.step(one_cycle(step, self.config.steps, self.config.warmup))
        return {}


def compare_steps(bench: Benchmark, cache: TrajectoryCache, config: TrainConfig, steps: int, device: str) -> None:
    """Train all programs from the same weights on the same batches, in turns of a few steps, from several starts.

    Steps are timed once the critic has begun.
    """
    adversarial = config.objective.adversarial
    always = replace(adversarial, every=1, penalty_every=1)
    config = replace(config, steps=steps)
    naive = replace(config, objective=replace(config.objective, adversarial=always))
    geometry, accelerator = Geometry.of(cache, None), Accelerator(cpu=device == "cpu")
    kinds: dict[str, type[UnrolledProgram]] = {NAIVE: NaiveProgram, OURS: UnrolledProgram}
    if has_bfloat16(device):
        kinds[HALF] = HalfProgram
    held_out = cache.seeds()[-256:]
    noise, image = (read_float(cache, step, held_out).to(device) for step in (min(cache.states), max(cache.states)))
    turn, times, errors = 4, {name: list[float]() for name in kinds}, {name: list[float]() for name in kinds}
    for start in range(1 if bench.quick else STARTS):
        programs: dict[str, UnrolledProgram] = {}
        for name, program in kinds.items():
            torch.manual_seed(start)
            student = build_student(config.student, geometry).to(device)
            chosen = naive if program is NaiveProgram else config
            programs[name] = program(chosen, student, geometry, accelerator)  # type: ignore[arg-type]
            programs[name].begin(0)
        order = np.random.default_rng(start)
        batches = [order.choice(len(cache.seeds()) - 256, config.batch_size, replace=False) for _ in range(steps)]
        loaded = [Batch.read(cache, list(cache.states), seeds.tolist()).to(torch.device(device)) for seeds in batches]
        for first in range(0, steps, turn):
            for name in sorted(programs, reverse=(first // turn) % 2 == 0):
                begin = time.perf_counter()
                for step in range(first, min(first + turn, steps)):
                    programs[name].step(loaded[step], 0, step)
                wait_for(device)
                if first >= adversarial.start * steps:
                    times[name].append((time.perf_counter() - begin) / turn)
        for name, done in programs.items():
            with torch.inference_mode():
                errors[name].append(float((done.student(noise) - image).square().mean()))
    scores = {name: statistics.geometric_mean(values) for name, values in errors.items()}
    times = {name: values[1:] for name, values in times.items()}
    rows = rows_of(times, NAIVE)
    targets = []
    for name, label in ((OURS, "training step"), (HALF, "training step in bf16")):
        if name in programs:
            factor, error = ratio_between(times, NAIVE, name), scores[name] / scores[NAIVE]
            targets += [
                Target(
                    what=f"{label}, times faster than the naive loop",
                    found=factor,
                    limit=1.5,
                    at_most=False,
                    headline=HEADLINE if name == OURS else "",
                ),
                Target(what=f"{label} / naive loop: held-out error after equal steps", found=error, limit=1.05),
            ]
    bench.add(
        Comparison(
            title=f"a training step with its critic, batch {config.batch_size}, {'×'.join(map(str, cache.item_shape))}",
            unit="s",
            baseline=NAIVE,
            rows=rows,
            targets=targets,
            agreement=f"Held-out mean squared error after {steps} steps from the same weights on the same batches, "
            f"geometric mean of {len(errors[OURS])}: "
            + ", ".join(f"{name} {score:.4f} ({low:.4f} to {high:.4f})" for name, score, low, high in (
                (name, scores[name], min(errors[name]), max(errors[name])) for name in errors))
            + ".",
            note="Per iteration, the naive loop runs the student twice, trains the critic and computes R1 and R2; ours "
            f"runs it once, trains the critic every {adversarial.every} steps and computes R1 and R2 in every "
            f"{adversarial.penalty_every} of those. The limit is one forward and one backward pass of student and "
            "critic: convolutions take 77 % of our step. Channels-last memory gave nothing here; bfloat16 halves the "
            "student's convolutions. All use the same optimiser.",
        )
    )  # fmt: skip


def waits_comparison(
    bench: Benchmark, folder: Path, name: str, config: TrainConfig, cache: TrajectoryCache, limit: float
) -> None:
    """How long a real run waits for data."""
    store, steps = Path(cache.address), 8 if bench.quick else 100
    waits, wholes = waiting_share(store, folder / name, config, steps)
    share = sum(waits) / sum(wholes)
    bench.add(
        Comparison(
            title=f"{name}: a real run of {steps} steps",
            unit="s",
            baseline=None,
            rows=rows_of({"a step": wholes, "waiting for its batch": waits}, None),
            targets=[Target(what=f"{name}: waiting for data / step, seconds", found=share, limit=limit)],
            note="Another thread reads the next two batches while one is used; on a GPU they are copied from pinned "
            "memory. The limit is zero: reading a batch takes less than a step.",
        )
    )  # fmt: skip


def measure(bench: Benchmark, folder: Path) -> None:
    """The default run; also CIFAR-10's size on a GPU."""
    experiment: Experiment = load_experiment("digits")
    num = 512 if bench.quick else 8192
    config = replace(experiment.train, preview_every=10**9, checkpoint_every=10**9)
    if bench.quick:
        config = replace(config, batch_size=8, student=replace(config.student, width=8, depth=1))
    cache = smooth_store(folder / "digits.zarr", DIGITS_SHAPE, 6, num)
    waits_comparison(bench, folder, "default run", config, cache, 0.01)
    if bench.device != "cpu":
        large = smooth_store(folder / "cifar.zarr", CIFAR_SHAPE, 11, num)
        wanted = replace(load_experiment("cifar10").train, preview_every=10**9, checkpoint_every=10**9)
        waits_comparison(bench, folder, "CIFAR-10's size", wanted, large, 0.02)
    compare_steps(bench, cache, config, 24 if bench.quick else 120, bench.device)


if __name__ == "__main__":
    run("training", "Stage two: does training wait for data, and how fast is a step?", measure)
