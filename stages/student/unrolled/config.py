"""Configuration of the unrolled student: its network, and the losses that train it."""

from __future__ import annotations

from dataclasses import dataclass, field

from advkd.cache.errors import ConfigError
from advkd.stages.student.training.config import TrainingConfig, one_of
from advkd.stages.student.training.losses import ADVERSARIAL, REGRESSIONS

HEAD_TARGETS = ("jump", "x0")
HEAD_WEIGHTINGS = ("uniform", "snr")
PERCEPTUAL = ("critic", "lpips")
JUDGED = ("last", "each", "shared")
MOVES, COLOURS = ("flip", "translate", "cutout"), ("brightness", "contrast")
"""Augmentations of an image with its x_T, and of the image alone; `augment.py` has a function for each."""
AUGMENTATIONS = (*MOVES, *COLOURS)


@dataclass(frozen=True, kw_only=True)
class UnrolledOptions:
    """Size of the unrolled network; its number of submodules follows from the cache."""

    width: int = 128
    """unrolled: channels of the trunk."""
    depth: int = 3
    """unrolled: residual blocks per submodule."""
    coarse: int = 0
    """unrolled: further residual blocks per submodule, at half the trunk's resolution with twice the channels."""
    patch: int = 2
    """unrolled: side in pixels of the square patches that are one position of the trunk."""
    attention: bool = True
    """unrolled: whether each submodule has self-attention over the trunk's positions."""
    shared: bool = False
    """unrolled: whether all submodules share their weights, except for a scale and a shift in every block. teacher:
    whether all evaluations share them."""

    def __post_init__(self) -> None:
        if self.depth + self.coarse < 1 or min(self.depth, self.coarse) < 0:
            raise ConfigError(f"student.depth and coarse: {self.depth} and {self.coarse} leave no blocks")
        for key in ("width", "patch"):
            if getattr(self, key) < 1:
                raise ConfigError(f"student.{key}: {getattr(self, key)} is not positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialConfig:
    """The critics, and their weight in the student's loss."""

    weight: float = 0.1
    """Weight of the student's adversarial loss; 0 trains by regression alone."""
    loss: str = "relativistic"
    """`relativistic` (real and fake in pairs), `hinge` or `non-saturating`."""
    judged: str = "last"
    """`last`: one critic of x_0; `each`: a critic per submodule, as in Adv-KD; `shared`: one critic of all submodules'
    x̂_0, conditioned on the submodule's number."""
    conditional: bool = False
    """Whether critics see x_T too."""
    start: float = 0.4
    """Fraction of the steps after which the adversarial loss begins."""
    ramp: float = 0.05
    """Fraction of the steps over which its weight rises linearly to the full."""
    lead: float = 0.0
    """Fraction of the steps for which the critics are trained before that."""
    every: int = 1
    """Steps per critic step. The adversarial loss is applied in those steps only, with `every` times the weight."""
    fresh: int = 32
    """Images per step and process that the critics judge, made from noise that is in no cache; 0 judges the batch's
    own."""
    r1: float = 0.05
    """γ of the zero-centred gradient penalty on real images."""
    r2: float = 0.05
    """γ of the zero-centred gradient penalty on the student's images."""
    penalty_every: int = 4
    """Critic steps per gradient penalty, which is weighted up accordingly (Karras et al. 2020, §3.1)."""
    augment: list[str] = field(default_factory=list)
    """Random changes of images, real or not, before critics see them (Zhao et al. 2020): `flip` (where the data allows
    it), `translate`, `cutout`, `brightness`, `contrast`."""
    width: int = 48
    """Channels of a critic's first layer."""
    scales: int = 1
    """Number of resolutions at which a critic judges."""
    learning_rate: float = 1e-3
    """Learning rate of the critics' AdamW."""

    def __post_init__(self) -> None:
        one_of("adversarial.loss", self.loss, ADVERSARIAL)
        one_of("adversarial.judged", self.judged, JUDGED)
        for name in self.augment:
            one_of("adversarial.augment", name, AUGMENTATIONS)
        for key in ("start", "ramp", "lead"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ConfigError(f"adversarial.{key}: {getattr(self, key)} is no fraction of the steps")
        for key in ("weight", "r1", "r2", "fresh"):
            if getattr(self, key) < 0:
                raise ConfigError(f"adversarial.{key}: {getattr(self, key)} is negative")
        for key in ("every", "penalty_every", "width", "scales", "learning_rate"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"adversarial.{key}: {getattr(self, key)} is not positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Losses of the unrolled student and their weights."""

    regression: str = "huber"
    """Loss of every x̂_0: `huber` (pseudo-Huber) or `mse`."""
    huber_width: float = 0.03
    """Error below which pseudo-Huber is quadratic, in units of images in [−1, 1]."""
    x0: float = 1.0
    """Weight of the last x̂_0's regression on the teacher's x_0."""
    heads: float = 0.5
    """Weight of every earlier submodule's regression on its `head_target`."""
    head_target: str = "jump"
    """`jump`: the x̂_0 whose DDIM step leads from one cached state to the next (x_0 where the two are too close); `x0`:
    the teacher's x_0."""
    head_weighting: str = "uniform"
    """`uniform`, or `snr`: earlier submodules are weighted by √SNR of the state that they make, with mean weight 1."""
    state: float = 0.3
    """Weight of the mean square error of every submodule's state against the cached one."""
    perceptual: float = 0.0
    """Weight of the distance between the last x̂_0 and x_0 in the layers of a network, `perceptual_features`."""
    perceptual_features: str = "critic"
    """`critic`: the critic's own layers; `lpips`: the lpips package's AlexNet, for colour images."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The critics."""

    def __post_init__(self) -> None:
        one_of("objective.regression", self.regression, REGRESSIONS)
        one_of("objective.head_target", self.head_target, HEAD_TARGETS)
        one_of("objective.head_weighting", self.head_weighting, HEAD_WEIGHTINGS)
        one_of("objective.perceptual_features", self.perceptual_features, PERCEPTUAL)
        if min(self.x0, self.heads, self.state, self.perceptual) < 0.0 or self.huber_width <= 0.0:
            raise ConfigError("objective: weights must not be negative, huber_width must be positive")
        if self.perceptual and self.perceptual_features == "critic" and not self.adversarial.weight:
            raise ConfigError("objective.perceptual_features: critic needs a critic, but adversarial.weight is 0")

    @property
    def paired(self) -> bool:
        """Whether a loss assumes that x_T determines x_0."""
        return max(self.x0, self.heads, self.state, self.perceptual) > 0.0


@dataclass(frozen=True, kw_only=True)
class UnrolledTraining(TrainingConfig):
    """Training of the unrolled student."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """unrolled: the losses."""
