"""What stage 0 can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from advkd.cache.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """The small classifier whose features score samples; no training loss uses it."""

    epochs: int = 25
    batch_size: int = 64
    learning_rate: float = 2e-3
    held_out: int = 360
    """Real images kept aside, stratified by label, to measure its accuracy on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How the teacher is trained."""

    data: str = "digits"
    """Real images; scikit-learn's handwritten digits."""
    size: int = 16
    channels: list[int] = field(default_factory=lambda: [16, 32, 48])
    """Widths of the UNet's resolutions."""
    layers_per_block: int = 1
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "v_prediction"
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: float = 0.1
    ema: float = 0.998
    seed: int = 0
    report_samples: int = 1024
    """Teacher's samples for its Fréchet distance to the real images."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self) -> None:
        if self.data != "digits":
            raise ConfigError(f"pretrain.data: {self.data!r} is unknown; stage 0 knows digits")
        for key in ("size", "layers_per_block", "steps", "batch_size", "report_samples"):
            if getattr(self, key) < 1:
                raise ConfigError(f"pretrain.{key}: {getattr(self, key)} is not positive")
