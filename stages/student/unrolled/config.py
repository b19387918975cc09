"""What the unrolled student is taught by: a regression on the cached states, and critics on top."""

from __future__ import annotations

from dataclasses import dataclass, field

from advkd.cache.errors import ConfigError

REGRESSIONS = ("huber", "mse")
HEAD_TARGETS = ("jump", "x0")
HEAD_WEIGHTINGS = ("uniform", "snr")
PERCEPTUAL = ("critic", "lpips")
ADVERSARIAL_LOSSES = ("relativistic", "hinge", "non-saturating")
JUDGED = ("last", "each", "shared")
AUGMENTATIONS = ("flip", "translate", "cutout", "brightness", "contrast")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialConfig:
    """The critics, and how much the student hears of them."""

    weight: float = 0.1
    """Of the student's adversarial loss; 0 trains by regression alone."""
    loss: str = "relativistic"
    """`relativistic` (pairs), `hinge` or `non-saturating`."""
    judged: str = "last"
    """`last`: one critic of x_0; `each`: a critic of its own for every submodule, as in Adv-KD; `shared`: one critic of
    all of them that is told which it sees."""
    conditional: bool = False
    """Whether critics see x_T too."""
    start: float = 0.4
    """Fraction of the steps after which the student hears the critics."""
    ramp: float = 0.05
    """Fraction of the steps over which their weight rises to the full."""
    lead: float = 0.0
    """Fraction of the steps for which the critics learn before that."""
    every: int = 1
    """Steps between those with critics, whom the student hears the more then."""
    fresh: int = 32
    """Images a step, in each process, from noise that is in no cache, that the critics judge; 0 takes the batch's
    own."""
    r1: float = 0.05
    """γ of the zero-centred gradient penalty on real images."""
    r2: float = 0.05
    """The same on the student's."""
    penalty_every: int = 4
    """Steps of the critics between penalties, which are weighted up accordingly (Karras et al. 2020, §3.1)."""
    augment: list[str] = field(default_factory=list)
    """What is done to images before critics see them, real or not (Zhao et al. 2020): flip (where the data allows),
    translate, cutout, brightness, contrast."""
    width: int = 48
    """Channels of a critic's first layer."""
    scales: int = 1
    """At how many resolutions it judges."""
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        _one_of("adversarial.loss", self.loss, ADVERSARIAL_LOSSES)
        _one_of("adversarial.judged", self.judged, JUDGED)
        for name in self.augment:
            _one_of("adversarial.augment", name, AUGMENTATIONS)
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
    """Weights of the unrolled student's losses."""

    regression: str = "huber"
    """`huber` (pseudo-Huber) or `mse`, of every x̂_0."""
    huber_width: float = 0.03
    x0: float = 1.0
    """Weight of the final x̂_0's regression on the teacher's x_0."""
    heads: float = 0.5
    """Weight of every earlier submodule's x̂_0's, on its `head_target`."""
    head_target: str = "jump"
    """`jump`: the x̂_0 that leads from one cached state to the next (x_0 where they are too close); `x0`: x_0."""
    head_weighting: str = "uniform"
    """`snr` weights each of them by √SNR of the state that it makes, the mean weight staying 1."""
    state: float = 0.3
    """Mean square of every submodule's state against the cached one."""
    perceptual: float = 0.0
    """Weight of the distance of final x̂_0 and x_0 in the layers of a network, `perceptual_features`."""
    perceptual_features: str = "critic"
    """`critic`: the critic's own layers; `lpips`: the lpips package's AlexNet, for colour images."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)

    def __post_init__(self) -> None:
        _one_of("objective.regression", self.regression, REGRESSIONS)
        _one_of("objective.head_target", self.head_target, HEAD_TARGETS)
        _one_of("objective.head_weighting", self.head_weighting, HEAD_WEIGHTINGS)
        _one_of("objective.perceptual_features", self.perceptual_features, PERCEPTUAL)
        if min(self.x0, self.heads, self.state, self.perceptual) < 0.0 or self.huber_width <= 0.0:
            raise ConfigError("objective: weights must not be negative, huber_width be positive")
        if self.perceptual and self.perceptual_features == "critic" and not self.adversarial.weight:
            raise ConfigError("objective.perceptual_features: critic needs one: adversarial.weight is 0")

    @property
    def paired(self) -> bool:
        """Whether a loss assumes that x_T determines x_0."""
        return max(self.x0, self.heads, self.state, self.perceptual) > 0.0


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: {value!r} is none of {', '.join(known)}")
