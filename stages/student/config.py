"""What stage two can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from advkd.cache.errors import ConfigError

STUDENTS = ("unrolled", "progressive")
HEAD_TARGETS = ("jump", "x0")
MIXED_PRECISIONS = ("no", "bf16")
MAX_SEED = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """Which network; its shape, levels and number of submodules follow from the cache."""

    kind: str = "unrolled"
    width: int = 128
    """unrolled: channels of the trunk."""
    depth: int = 3
    """unrolled: residual blocks of a submodule."""
    patch: int = 2
    """unrolled: the trunk works on patches of this many pixels squared."""
    attention: bool = True
    """unrolled: self-attention over the trunk's positions, once a submodule."""
    base_channels: int = 16
    """progressive: width of the first submodule."""
    max_channels: int = 128
    """progressive: where the width stops doubling."""

    def __post_init__(self) -> None:
        if self.kind not in STUDENTS:
            raise ConfigError(f"student.kind: {self.kind!r} is none of {', '.join(STUDENTS)}")
        for key in ("width", "depth", "patch", "base_channels", "max_channels"):
            if getattr(self, key) < 1:
                raise ConfigError(f"student.{key}: {getattr(self, key)} is not positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Weights of the unrolled student's losses."""

    x0: float = 1.0
    """Pseudo-Huber of the final x̂_0 against the teacher's x_0."""
    heads: float = 0.5
    """The same of every earlier submodule's x̂_0, against its `head_target`."""
    head_target: str = "jump"
    """`jump`: the x̂_0 that leads from one cached state to the next (x_0 where they are too close); `x0`: x_0."""
    huber_width: float = 0.03
    state: float = 0.3
    """Mean square of every submodule's state against the cached one."""
    adversarial: float = 0.1
    """Relativistic GAN on the final x̂_0; 0 trains by regression alone."""
    adversarial_start: float = 0.4
    """Fraction of the steps after which the critic joins."""
    adversarial_ramp: float = 0.05
    """Fraction of the steps over which its weight rises to the full."""
    fresh: int = 32
    """Images a step, from noise that is in no cache, that the critic judges; 0 takes the batch's own."""
    conditional: bool = False
    """Whether the critic sees the noise too."""
    penalty: float = 0.05
    """γ of the zero-centred gradient penalties R1 and R2."""
    penalty_every: int = 4
    """Steps between penalties, which are weighted up accordingly (Karras et al. 2020, §3.1)."""
    critic_width: int = 48
    critic_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 <= self.adversarial_start <= 1.0:
            raise ConfigError(f"objective.adversarial_start: {self.adversarial_start} is no fraction of the steps")
        if self.head_target not in HEAD_TARGETS:
            raise ConfigError(f"objective.head_target: {self.head_target!r} is none of {', '.join(HEAD_TARGETS)}")
        weights = (self.x0, self.heads, self.state, self.adversarial, self.adversarial_ramp, self.penalty)
        if min(weights) < 0.0 or self.huber_width <= 0.0 or self.critic_learning_rate <= 0.0:
            raise ConfigError(
                "objective: weights must not be negative, huber_width and critic_learning_rate be positive"
            )
        if self.penalty_every < 1 or self.critic_width < 1 or self.fresh < 0:
            raise ConfigError("objective: penalty_every and critic_width must be positive, fresh not negative")

    @property
    def paired(self) -> bool:
        """Whether a loss assumes that x_T determines x_0."""
        return max(self.x0, self.heads, self.state) > 0.0


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
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    """unrolled: fraction of the steps in which the learning rate rises; then it falls as a cosine."""
    gradient_clip: float = 1.0
    ema: float = 0.9995
    seed: int = 0
    mixed_precision: str = "no"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    log_every: int = 50
    preview_every: int = 1000
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "log_every", "preview_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"train.{key}: {getattr(self, key)} is not positive")
        if self.mixed_precision not in MIXED_PRECISIONS:
            raise ConfigError(
                f"train.mixed_precision: {self.mixed_precision!r} is none of {', '.join(MIXED_PRECISIONS)}"
            )
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(f"train.seed: {self.seed} is not in [0, 2^31)")
        if self.learning_rate <= 0.0 or self.weight_decay < 0.0 or self.gradient_clip < 0.0:
            raise ConfigError("train: learning_rate must be positive, weight_decay and gradient_clip not negative")
        if not 0.0 <= self.ema < 1.0 or not 0.0 <= self.warmup < 1.0:
            raise ConfigError("train.ema and train.warmup are in [0, 1)")
