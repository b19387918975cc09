"""What stage two can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from advkd.cache.errors import ConfigError
from advkd.stages.student.unrolled.config import ObjectiveConfig

STUDENTS = ("unrolled", "progressive")
OPTIMIZERS = ("muon", "adamw")
MIXED_PRECISIONS = ("no", "bf16", "fp16")
MAX_SEED = 2**31
MAX_EMA_WIDTH = 0.28
"""Of power-function averages, the plain mean's is 1/√12."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """Which network; its shape, levels and number of submodules follow from the cache."""

    kind: str = "unrolled"
    width: int = 128
    """unrolled: channels of the trunk."""
    depth: int = 3
    """unrolled: residual blocks of a submodule."""
    coarse: int = 0
    """unrolled: residual blocks of a submodule at half the trunk's resolution, with twice the channels."""
    patch: int = 2
    """unrolled: the trunk works on patches of this many pixels squared."""
    attention: bool = True
    """unrolled: self-attention over the trunk's positions, once a submodule."""
    shared: bool = False
    """unrolled: one set of weights for all submodules, but for a scale and a shift in every block."""
    base_channels: int = 16
    """progressive: width of the first submodule."""
    max_channels: int = 128
    """progressive: where the width stops doubling."""

    def __post_init__(self) -> None:
        if self.kind not in STUDENTS:
            raise ConfigError(f"student.kind: {self.kind!r} is none of {', '.join(STUDENTS)}")
        if self.depth + self.coarse < 1 or min(self.depth, self.coarse) < 0:
            raise ConfigError(f"student.depth and coarse: {self.depth} and {self.coarse} leave no blocks")
        for key in ("width", "patch", "base_channels", "max_channels"):
            if getattr(self, key) < 1:
                raise ConfigError(f"student.{key}: {getattr(self, key)} is not positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesConfig:
    """The progressive student's schedule and losses, as the reference has them."""

    epochs: list[int] = field(default_factory=lambda: [10])
    """Epochs of stage k; the last value holds for the stages that follow."""
    batch_sizes: list[int] = field(default_factory=lambda: [64])
    """Batch size of stage k; the last value holds for the stages that follow."""
    learning_rate: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.5, 0.999])
    gradient_penalty: float = 10.0
    eight_bit: bool = False
    """Whether states are clipped to [−1, 1] and rounded to 256 values, as the reference's PNG files keep them."""
    weight_clip: float = 0.1
    """Bound on each of the discriminator's weights; 0 doesn't clip."""

    def __post_init__(self) -> None:
        if not self.epochs or min(self.epochs) < 1 or not self.batch_sizes or min(self.batch_sizes) < 2:
            raise ConfigError("stages: epochs must be positive, batch sizes at least 2 (BatchNorm)")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"stages.betas: expected two numbers in [0, 1), found {self.betas}")
        if self.learning_rate <= 0.0 or self.gradient_penalty < 0.0 or self.weight_clip < 0.0:
            raise ConfigError("stages: learning_rate must be positive, gradient_penalty and weight_clip not negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole training run."""

    student: StudentConfig = field(default_factory=StudentConfig)
    seeds: str | None = None
    """A:B of the cache's seeds; all of them if null."""
    states: list[int] | None = None
    """Which recorded states to learn from, by solver steps done, x_T and x_0 among them; all if null. What isn't
    chosen is neither read nor needs to be here."""
    steps: int = 100_000
    """unrolled: optimiser steps. (progressive counts epochs: `stages`.)"""
    batch_size: int = 128
    """Seeds a step in each process, in as many passes as `accumulate` says."""
    accumulate: int = 1
    """Passes whose gradients make one optimiser step; divides the batch."""
    optimizer: str = "muon"
    """`muon` for the kernels inside the student and AdamW for the rest, or `adamw` for all."""
    learning_rate: float = 1e-3
    """AdamW's."""
    kernel_learning_rate: float = 0.02
    """Muon's."""
    weight_decay: float = 0.01
    warmup: float = 0.1
    """unrolled: fraction of the steps in which the learning rate rises; then it falls as a cosine."""
    gradient_clip: float = 1.0
    ema: float = 0.9995
    """Decay per step of the weights' average, which is what is kept and scored."""
    ema_width: float | None = None
    """Instead: the relative width of a power-function average (Karras et al. 2024, §3), 0.05 for instance."""
    seed: int = 0
    mixed_precision: str = "no"
    """`bf16`, or `fp16` on a GPU."""
    compile: bool = False
    """Whether torch.compile makes the student's and critics' passes faster; the first steps take a minute."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    log_every: int = 50
    preview_every: int = 1000
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate", "log_every", "preview_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"train.{key}: {getattr(self, key)} is not positive")
        if self.mixed_precision not in MIXED_PRECISIONS:
            raise ConfigError(
                f"train.mixed_precision: {self.mixed_precision!r} is none of {', '.join(MIXED_PRECISIONS)}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"train.optimizer: {self.optimizer!r} is none of {', '.join(OPTIMIZERS)}")
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(f"train.seed: {self.seed} is not in [0, 2^31)")
        if (
            min(self.learning_rate, self.kernel_learning_rate) <= 0.0
            or self.weight_decay < 0.0
            or self.gradient_clip < 0.0
        ):
            raise ConfigError("train: learning rates must be positive, weight_decay and gradient_clip not negative")
        unrolled_only = (self.mixed_precision, self.compile, self.accumulate)
        if self.student.kind == "progressive" and unrolled_only != ("no", False, 1):
            raise ConfigError("train: mixed_precision, compile and accumulate are the unrolled student's alone")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"train.accumulate: {self.accumulate} doesn't divide train.batch_size {self.batch_size}")
        if self.ema_width is not None and not 0.0 < self.ema_width < MAX_EMA_WIDTH:
            raise ConfigError(f"train.ema_width: {self.ema_width} is not in (0, {MAX_EMA_WIDTH})")
        if not 0.0 <= self.ema < 1.0 or not 0.0 <= self.warmup < 1.0:
            raise ConfigError("train.ema and train.warmup are in [0, 1)")
