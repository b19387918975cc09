"""The layout of a cache: which states it holds, in which dtype and encoding, in blocks of how many seeds.

The **layout hash** is separate from the recipe's fingerprint, so that a subset of a cache keeps its identity.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

from advkd.cache.errors import NewerCacheError, NotACacheError
from advkd.cache.files.strict_json import integer, shortened, unknown_members
from advkd.cache.format.encoding import MAX_PACKED_BLOCK_BYTES, PACKED_ENCODINGS, Packing
from advkd.cache.format.recipe import digest

DTYPES = ("float16", "float32")
ENCODINGS = ("raw", *PACKED_ENCODINGS)
"""How a chunk's values are stored; a version that knows more ways adds them here."""
MAX_STATES = 10_001
MAX_BLOCK_BYTES = 1 << 34
MAX_BLOCK_SIZE = 1 << 20
"""Seeds per block: a record of a few hundred bytes makes a reader list as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """One recorded point of the denoising: x_t = alpha · x_0 + sigma · ε, stored as x_t / scale.

    Storing at unit variance keeps fp16 exact to about 2e-4 whatever the solver's own scale is (Euler starts at
    sigma = 157). In stored units the coefficients are `alpha / scale` and `sigma / scale`.
    """

    step: int
    """Solver steps done: 0 is x_T."""
    timestep: float
    """The timestep that the teacher would be given with this state; −1 for the final one, or if not recorded."""
    alpha: float
    sigma: float
    scale: float

    @property
    def name(self) -> str:
        """Name of its array below `states/`."""
        return f"{self.step:04d}"

    @property
    def label(self) -> str:
        """What to write beside it: its timestep, or which end of the path it is, else its noise level."""
        if self.timestep >= 0:
            return f"t={self.timestep:g}"
        if self.sigma == 0:
            return "x_0"
        return f"σ={self.sigma:g}" if self.step else "x_T"

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
            NewerCacheError: it has a member that this version doesn't know.
            NotACacheError: a number is out of range.
        """
        if unknown := unknown_members(value, [field.name for field in fields(cls)]):
            raise NewerCacheError(f"a state has an unknown member {unknown[0]!r} of a newer advkd: upgrade advkd")
        state = cls(**{**value, "step": integer(value["step"])})
        floats = (state.timestep, state.alpha, state.sigma, state.scale)
        if not all(type(number) is float and math.isfinite(number) for number in floats):
            raise NotACacheError(f"state {shortened(state.step)}: its timestep, alpha, sigma or scale is not finite")
        if state.scale <= 0 or not 0 <= state.step < 1e6:
            raise NotACacheError(f"state {shortened(state.step)}: scale {state.scale} or step out of range")
        return state


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which states are stored, as what, in blocks of how many seeds."""

    states: tuple[State, ...]
    dtype: str
    block_size: int
    encoding: str = "raw"
    """`raw`: a chunk is its values; else a codec of `advkd.cache.format.encoding`."""
    packing: Packing | None = None
    """Of a packed store."""

    def __post_init__(self) -> None:
        steps = [state.step for state in self.states]
        fitting = self.dtype in DTYPES and 1 <= self.block_size <= MAX_BLOCK_SIZE and len(steps) <= MAX_STATES
        if not fitting or steps != sorted(set(steps)) or steps[:1] != [0]:
            raise NotACacheError(
                f"invalid layout: dtype {shortened(repr(self.dtype))}, block size {shortened(self.block_size)}, "
                f"steps {shortened(steps)}"
            )
        if self.encoding not in ENCODINGS:
            raise NewerCacheError(f"encoding {shortened(repr(self.encoding))} is unknown to this advkd: upgrade advkd")
        if self.encoding != ("raw" if self.packing is None else self.packing.encoding):
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
        """Largest allowed `block_bytes`."""
        return MAX_BLOCK_BYTES if self.packing is None else MAX_PACKED_BLOCK_BYTES

    def packed(self, packing: Packing | None) -> Self:
        """The same states, dtype and blocks in another encoding; raw if None."""
        return replace(self, encoding="raw" if packing is None else packing.encoding, packing=packing)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for attributes and hashing."""
        value = {**asdict(self), "states": [asdict(state) for state in self.states]}
        del value["packing"]
        return value if self.packing is None else {**value, "packing": self.packing.parameters}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            NewerCacheError: it has a member or an encoding that this version doesn't know.
            NotACacheError: a part is out of range.
        """
        if unknown := unknown_members(value, [field.name for field in fields(cls)]):
            raise NewerCacheError(f"the layout has an unknown member {unknown[0]!r} of a newer advkd: upgrade advkd")
        if len(value["states"]) > MAX_STATES:
            raise NotACacheError(f"it claims {len(value['states'])} states")
        states = tuple(State.from_json(state) for state in value["states"])
        packing = None
        if "packing" in value:
            packing = Packing.read(value["encoding"], value["packing"], value["dtype"])
        return cls(**{**value, "states": states, "block_size": integer(value["block_size"]), "packing": packing})
