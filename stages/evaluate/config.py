"""Configuration of the evaluation: features, sets of seeds, reference."""

from __future__ import annotations

from dataclasses import dataclass, field

from advkd.cache.errors import ConfigError

SELF = "self"
FEATURES = "features"
LPIPS = "lpips"
FULL_SOLVER_STEPS = [5, 10, 20]
FULL_NUM_SETS = 5
FULL_SET_SIZE = 2048
FULL_REFERENCE = 8192
FIRST_FRESH_SEED = 1 << 40
"""Seeds of caches lie below this one."""
MAX_FRESH_SEEDS = 1 << 24
"""Of one evaluation: the sets of two values of `seed` lie that far apart."""
MAX_SEED = (1 << 16) - 1
"""So that fresh seeds end where those that check exported files begin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """How samplers are compared."""

    features: str = "inception"
    """The network whose features are compared: `inception` (pytorch-fid's, for colour images of at least 32 pixels),
    `self` (trained on the cache's own images, for any images), or a folder: of a small classifier, or of DINOv2 as
    transformers saves it."""
    inception_weights: str | None = None
    """pytorch-fid's weights as a local file; null takes torch's own download folder."""
    clip: str | None = None
    """Of a text-to-image student: the folder of a CLIP model as transformers saves it, for the CLIP score; null for
    none."""
    real: str | None = None
    """Real images to compare with: `digits`, `mnist`, `emoji`, or a folder of image files; null for none."""
    perceptual: str = FEATURES
    """How image pairs are compared: `features`, by the layers of the network above, or `lpips`, by its package."""
    num_sets: int = 5
    """Sets of fresh seeds, the same for every sampler."""
    set_size: int = 512
    """Seeds per set; the whole protocol (`--full`) takes 2,048 and a reference of at least 8,192 seeds."""
    seed: int = 0
    """Which fresh seeds: two evaluations with different values share none. Runs are compared on equal ones."""
    solver_steps: list[int] = field(default_factory=lambda: [5, 10, 20])
    """Steps of DDIM and DPM-Solver++ with the same teacher; of Euler and Heun for a flow-matching one."""
    batch_size: int = 256
    """Seeds at one time."""

    def __post_init__(self) -> None:
        if self.num_sets < 2:
            raise ConfigError(f"evaluate.num_sets: {self.num_sets} gives no interval; at least 2")
        if self.set_size < 2 or self.batch_size < 1 or not all(steps > 0 for steps in self.solver_steps):
            raise ConfigError("evaluate: set_size, batch_size and solver_steps must be positive")
        if self.num_sets * self.set_size > MAX_FRESH_SEEDS:
            raise ConfigError(
                f"evaluate: num_sets × set_size is {self.num_sets * self.set_size}, at most {MAX_FRESH_SEEDS}"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"evaluate.seed: {self.seed} is out of range; expected 0 to {MAX_SEED}")
        if self.perceptual not in (FEATURES, LPIPS):
            raise ConfigError(f"evaluate.perceptual: {self.perceptual!r} is unknown; known are {FEATURES}, {LPIPS}")
