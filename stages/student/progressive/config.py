"""Configuration of the progressive student: its network, and its training stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from advkd.cache.errors import ConfigError
from advkd.stages.student.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ProgressiveOptions:
    """Size of the progressive network; its number of submodules follows from the cache."""

    base_channels: int = 16
    """progressive: width of the first submodule."""
    max_channels: int = 128
    """progressive: the width doubles with the resolution up to this."""

    def __post_init__(self) -> None:
        for key in ("base_channels", "max_channels"):
            if getattr(self, key) < 1:
                raise ConfigError(f"student.{key}: {getattr(self, key)} is not positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesConfig:
    """Schedule and losses of the progressive student, by default those of the paper's published code."""

    epochs: list[int] = field(default_factory=lambda: [10])
    """Epochs of each stage; the last value holds for all later stages."""
    batch_sizes: list[int] = field(default_factory=lambda: [64])
    """Batch size of each stage; the last value holds for all later stages."""
    learning_rate: float = 1e-4
    """Learning rate of Adam, for student and discriminator."""
    betas: list[float] = field(default_factory=lambda: [0.5, 0.999])
    """β₁ and β₂ of Adam."""
    gradient_penalty: float = 10.0
    """Weight of the discriminator's gradient penalty."""
    eight_bit: bool = False
    """Whether states are clipped to [−1, 1] and rounded to 256 values, as the published code's PNG files are."""
    weight_clip: float = 0.1
    """Bound on the absolute value of each of the discriminator's weights; 0 doesn't clip."""

    def __post_init__(self) -> None:
        if not self.epochs or min(self.epochs) < 1 or not self.batch_sizes or min(self.batch_sizes) < 2:
            raise ConfigError("stages: epochs must be positive, batch sizes at least 2 (BatchNorm)")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"stages.betas: expected two numbers in [0, 1), found {self.betas}")
        if self.learning_rate <= 0.0 or self.gradient_penalty < 0.0 or self.weight_clip < 0.0:
            raise ConfigError("stages: learning_rate must be positive, gradient_penalty and weight_clip not negative")


@dataclass(frozen=True, kw_only=True)
class ProgressiveTraining(TrainingConfig):
    """Training of the progressive student."""

    stages: StagesConfig = field(default_factory=StagesConfig)
    """progressive: schedule and losses."""
