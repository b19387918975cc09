"""What determines the numbers in a cache (`Recipe`), and how they are laid out on disk (`Layout`).

The **fingerprint** hashes the recipe: teacher, sampler, precision, noise. The **layout hash** hashes which states
are kept, how they are stored and in what blocks, so that a subset of a cache keeps its identity. Neither holds a
time, host, path or duration: two builds of the same thing are the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

from advkd.cache.durable import canonical_json
from advkd.cache.errors import NotACacheError
from advkd.cache.packing import CODECS, MAX_PACKED_BLOCK_BYTES, Packing
from advkd.cache.parse import in_line

DTYPES = ("float16", "float32")
ENCODINGS = ("raw", *CODECS)
"""How a chunk's values are stored; a version that knows more ways adds them here."""
MAX_CHANNELS, MAX_SIDE = 64, 8192
"""What an item can have at most, wherever a shape comes from someone else."""
MAX_STATES = 10_001
MAX_BLOCK_BYTES = 1 << 34
MAX_BLOCK_SIZE = 1 << 20
"""Of seeds: a record of a few hundred bytes makes a reader list as many."""


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value, as hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines the numbers of a trajectory, and nothing else."""

    teacher: dict[str, Any]
    """`tensors_sha256`, the UNet's configuration and the training scheduler's."""
    sampler: dict[str, Any]
    """`name`, `steps`, `deterministic`, the scheduler's class, its configuration and its timesteps."""
    precision: dict[str, Any]
    """`compute` dtype and whether `tf32` was allowed."""
    noise: dict[str, Any]
    """`rule` and `root_seed` (see `advkd.cache.noise`)."""
    item_shape: tuple[int, ...]
    """Shape of one state, (C, H, W)."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that names this recipe."""
        return digest(self.to_json())

    @property
    def deterministic(self) -> bool:
        """Whether x_T alone determines x_0, so that paired losses mean something."""
        return bool(self.sampler["deterministic"])

    @property
    def root_seed(self) -> int:
        """Root seed of the noise rule."""
        return int(self.noise["root_seed"])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for attributes and hashing."""
        return {**asdict(self), "item_shape": list(self.item_shape)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            NotACacheError: a part is missing, or the shape can't be.
        """
        recipe = cls(**{**value, "item_shape": tuple(_integer(n) for n in value["item_shape"])})
        parts: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            (recipe.teacher, {"tensors_sha256": str, "unet": dict, "scheduler": dict}),
            (recipe.sampler, {"name": str, "steps": int, "eta": (int, float), "deterministic": bool, "config": dict}),
            (recipe.precision, {"compute": str}),
            (recipe.noise, {"rule": str, "root_seed": int}),
        )
        for part, kinds in parts:
            if not isinstance(part, dict) or not all(isinstance(part.get(key), kind) for key, kind in kinds.items()):
                raise NotACacheError(f"the recipe is not whole: expected {', '.join(kinds)}")
        if not 0 <= _integer(recipe.noise["root_seed"]) < 1 << 63 or not 1 <= _integer(recipe.sampler["steps"]) < 1e6:
            raise NotACacheError("its root seed or its number of steps can't be")
        if len(recipe.item_shape) != 3 or not all(1 <= n <= MAX_SIDE for n in recipe.item_shape):
            raise NotACacheError(f"impossible item shape {_short(recipe.item_shape)}")
        return recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """One recorded point of the denoising: x_t = alpha · x_0 + sigma · ε, stored as x_t / scale.

    Storing at unit variance keeps fp16 exact to about 2e-4 whatever the solver's own scale is (Euler starts at
    sigma = 157). In stored units the coefficients are `alpha / scale` and `sigma / scale`.
    """

    step: int
    """Solver steps done: 0 is x_T."""
    timestep: float
    """The teacher's timestep at which it would look at this state; −1 for the final one."""
    alpha: float
    sigma: float
    scale: float

    @property
    def name(self) -> str:
        """Name of its array below `states/`."""
        return f"{self.step:04d}"

    @property
    def stored_alpha(self) -> float:
        """Signal coefficient of the stored value."""
        return self.alpha / self.scale

    @property
    def stored_sigma(self) -> float:
        """Noise coefficient of the stored value."""
        return self.sigma / self.scale

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `asdict` wrote.

        Raises:
            NotACacheError: a number can't be.
        """
        state = cls(**{**value, "step": _integer(value["step"])})
        floats = (state.timestep, state.alpha, state.sigma, state.scale)
        if not all(type(number) is float and math.isfinite(number) for number in floats):
            raise NotACacheError(f"state {_short(state.step)}: its timestep, alpha, sigma or scale is no finite number")
        if state.scale <= 0 or not 0 <= state.step < 1e6:
            raise NotACacheError(f"state {_short(state.step)}: impossible scale {state.scale} or step")
        return state


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which states are stored, as what, in blocks of how many seeds."""

    states: tuple[State, ...]
    dtype: str
    block_size: int
    encoding: str = "raw"
    """`raw`: a chunk is its values; else a codec of `advkd.cache.packing`."""
    packing: Packing | None = None
    """Of a packed store."""

    def __post_init__(self) -> None:
        steps = [state.step for state in self.states]
        fitting = self.dtype in DTYPES and 1 <= self.block_size <= MAX_BLOCK_SIZE and len(steps) <= MAX_STATES
        if not fitting or steps != sorted(set(steps)) or steps[:1] != [0]:
            raise NotACacheError(
                f"impossible layout: dtype {_short(repr(self.dtype))}, block size {_short(self.block_size)}, "
                f"steps {_short(steps)}"
            )
        if self.encoding not in ENCODINGS:
            raise NotACacheError(f"encoding {_short(repr(self.encoding))} is unknown to this advkd: upgrade advkd")
        if self.encoding != ("raw" if self.packing is None else self.packing.codec):
            raise NotACacheError(f"encoding {self.encoding} with the parameters of another one")

    @cached_property
    def layout_hash(self) -> str:
        """sha256 that names this layout."""
        return digest(self.to_json())

    def block_bytes(self, item_shape: tuple[int, ...]) -> int:
        """Bytes of the values of one block of one state."""
        return self.block_size * math.prod(item_shape) * (2 if self.dtype == "float16" else 4)

    @property
    def max_block_bytes(self) -> int:
        """What `block_bytes` may be at most."""
        return MAX_BLOCK_BYTES if self.packing is None else MAX_PACKED_BLOCK_BYTES

    def packed(self, packing: Packing | None) -> Self:
        """The same states, dtype and blocks in another encoding; raw if None."""
        return replace(self, encoding="raw" if packing is None else packing.codec, packing=packing)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for attributes and hashing."""
        value = {**asdict(self), "states": [asdict(state) for state in self.states]}
        del value["packing"]
        return value if self.packing is None else {**value, "packing": self.packing.parameters}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            NotACacheError: a part can't be, or is of a newer version.
        """
        if len(value["states"]) > MAX_STATES:
            raise NotACacheError(f"it claims {len(value['states'])} states")
        states = tuple(State.from_json(state) for state in value["states"])
        packing = None
        if "packing" in value:
            packing = Packing.read(value["encoding"], value["packing"], value["dtype"])
        return cls(**{**value, "states": states, "block_size": _integer(value["block_size"]), "packing": packing})


def _integer(value: Any) -> int:
    """An integer that JSON wrote as one."""
    if type(value) is not int:
        raise ValueError(f"{str(value)[:40]!r} is no integer")
    return value


def differences(found: Any, expected: Any) -> list[str]:
    """Name what differs between two JSON values, as `path: found → expected`.

    What stands nearer the top comes first: the name of a sampler before the many options that follow from it.
    """
    return [line for _, line in sorted(_differences(found, expected, ()), key=lambda entry: len(entry[0]))]


def _differences(found: Any, expected: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted(found.keys() | expected.keys())
        return [entry for key in keys for entry in _differences(found.get(key), expected.get(key), (*path, str(key)))]
    if found == expected:
        return []
    short_found, short_expected = (_short(value) for value in (found, expected))
    return [(path, f"{in_line('.'.join(path), 120)}: {short_found} → {short_expected}")]


def _short(value: Any) -> str:
    text = str(value)
    if len(text) <= 40 or not hasattr(value, "__len__"):
        return in_line(text, 40)
    return f"{in_line(text, 16)}… ({len(value)} long)"
