"""What a student's network takes from its cache: item shape, noise levels, and the rule that draws noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from advkd.cache.errors import UsageError
from advkd.cache.format.layout import DTYPES
from advkd.cache.format.space import MAX_CHANNELS, MAX_SIDE
from advkd.cache.read.reader import TrajectoryCache

MAX_LEVELS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Item shape, noise levels in stored units, and noise rule; saved beside the weights."""

    item_shape: tuple[int, int, int]
    """(C, H, W)."""
    levels: tuple[tuple[float, float], ...]
    """(alpha, sigma) of x_T and of each recorded state after it: stored = alpha · x_0 + sigma · ε."""
    timesteps: tuple[float, ...]
    """The teacher's timestep at each level, −1 for x_0."""
    steps: tuple[int, ...]
    """Number of solver steps at each level."""
    root_seed: int
    """Root seed of the cache's noise: seed i has the same x_T here as for the teacher."""
    noise_dtype: str
    """Dtype that x_T is rounded to, as for the teacher."""

    @classmethod
    def of(cls, cache: TrajectoryCache, steps: Sequence[int] | None = None) -> Self:
        """The geometry of some of a cache's recorded states.

        Args:
            cache: the cache.
            steps: the states to learn from, as numbers of solver steps; all recorded ones if None.

        Raises:
            UsageError: x_T or x_0 is not among `steps`.
            NotCachedError: one of `steps` isn't recorded.
        """
        channels, height, width = cache.item_shape
        known = {state.step: state for state in cache.layout.states}
        recorded = list(known)
        wanted = sorted(set(recorded if steps is None else steps))
        if wanted[:1] != recorded[:1] or wanted[-1] != recorded[-1] or len(wanted) < 2:
            raise UsageError(
                f"train.states {wanted}: must include x_T and x_0, the states after {recorded[0]} and {recorded[-1]} "
                "steps"
            )
        states = [known[step] if step in known else cache.state(step) for step in wanted]
        return cls(
            item_shape=(channels, height, width),
            levels=tuple((state.stored_alpha, state.stored_sigma) for state in states),
            timesteps=tuple(state.timestep for state in states),
            steps=tuple(state.step for state in states),
            root_seed=cache.recipe.root_seed,
            noise_dtype=cache.layout.dtype,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a value is out of range.
        """
        channels, height, width = (int(n) for n in value["item_shape"])
        sizes_fit = 1 <= channels <= MAX_CHANNELS and 1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE
        levels_fit = 2 <= len(value["levels"]) <= MAX_LEVELS and all(sigma > 0 for _, sigma in value["levels"][:-1])
        noise_fits = value["noise_dtype"] in DTYPES and 0 <= int(value["root_seed"]) < 1 << 63
        levels_fit = levels_fit and all(math.isfinite(float(number)) for level in value["levels"] for number in level)
        levels_fit = levels_fit and len(value["levels"]) == len(value["timesteps"]) == len(value["steps"])
        if not (sizes_fit and levels_fit and noise_fits):
            raise ValueError(
                "geometry: item_shape, root_seed or noise_dtype is out of range, or levels, timesteps, steps don't fit"
            )
        return cls(
            item_shape=(channels, height, width),
            levels=tuple((float(alpha), float(sigma)) for alpha, sigma in value["levels"]),
            timesteps=tuple(float(t) for t in value["timesteps"]),
            steps=tuple(int(step) for step in value["steps"]),
            root_seed=int(value["root_seed"]),
            noise_dtype=str(value["noise_dtype"]),
        )
