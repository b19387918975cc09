"""The training settings that all kinds of student share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from advkd.cache.errors import ConfigError
from advkd.stages.student.training.optimizers import OPTIMIZERS
from advkd.stages.student.training.trackers import TRACKERS

MIXED_PRECISIONS = ("no", "bf16", "fp16")
MAX_SEED = 2**31
MAX_EMA_WIDTH = 0.28
"""The plain mean of all weights so far has a relative width of 1/√12; no power-function average reaches it."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Data, steps, optimizer and logging of a training run."""

    seeds: str | None = None
    """A:B of the cache's seeds; all of them if null."""
    states: list[int] | None = None
    """Which recorded states to learn from, as numbers of solver steps; x_T and x_0 must be among them. All states if
    null. States left out are neither read nor needed on this machine."""
    steps: int = 100_000
    """Optimizer steps. (The progressive student counts epochs instead: `stages`.)"""
    batch_size: int = 128
    """Seeds per step and process."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches per optimizer step. Divides `batch_size`."""
    optimizer: str = "muon"
    """`muon` trains the convolutions inside the student with Muon and everything else with AdamW; `adamw` trains all
    weights with AdamW."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW."""
    kernel_learning_rate: float = 0.02
    """Learning rate of Muon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, of both optimizers."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises linearly; a cosine decay to zero follows."""
    gradient_clip: float = 1.0
    """Largest norm of the student's whole gradient; 0 doesn't clip."""
    ema: float = 0.9995
    """Decay per step of the exponential moving average of the weights. Only the average is saved and scored."""
    ema_width: float | None = None
    """Replaces `ema` by a power-function average of this relative width (Karras et al. 2024, §3), such as 0.05."""
    start: str | None = None
    """An earlier run, or a student's folder, from whose weights training starts: of the same architecture."""
    seed: int = 0
    """Seed of the initial weights, the order of batches and all random draws."""
    mixed_precision: str = "no"
    """`no`, `bf16`, or `fp16` (on a GPU only)."""
    compile: bool = False
    """Whether torch.compile compiles the student and the critics, which takes about a minute."""
    log_every: int = 50
    """Steps between rows of the log."""
    preview_every: int = 1000
    """Steps between previews, each scored on held-out seeds."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    trackers: list[str] = field(default_factory=list)
    """Experiment trackers that also get the log: `tensorboard`, `wandb`, `trackio`. Not part of a run's identity."""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate", "log_every", "preview_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"train.{key}: {getattr(self, key)} is not positive")
        one_of("train.mixed_precision", self.mixed_precision, MIXED_PRECISIONS)
        one_of("train.optimizer", self.optimizer, OPTIMIZERS)
        for name in self.trackers:
            one_of("train.trackers", name, TRACKERS)
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(f"train.seed: {self.seed} is not in [0, 2^31)")
        if (
            min(self.learning_rate, self.kernel_learning_rate) <= 0.0
            or self.weight_decay < 0.0
            or self.gradient_clip < 0.0
        ):
            raise ConfigError("train: learning rates must be positive, weight_decay and gradient_clip not negative")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"train.accumulate: {self.accumulate} doesn't divide train.batch_size {self.batch_size}")
        if self.ema_width is not None and not 0.0 < self.ema_width < MAX_EMA_WIDTH:
            raise ConfigError(f"train.ema_width: {self.ema_width} is not in (0, {MAX_EMA_WIDTH})")
        if not 0.0 <= self.ema < 1.0 or not 0.0 <= self.warmup < 1.0:
            raise ConfigError("train.ema and train.warmup must be in [0, 1)")


def one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Check a configured name against the registry that it names an entry of.

    Raises:
        ConfigError: it is none of them.
    """
    if value not in known:
        raise ConfigError(f"{key}: {value!r} is none of {', '.join(known)}")
