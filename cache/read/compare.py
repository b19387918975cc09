"""Distances between two stores or two versions of a block, and the tolerance for them.

Noise has the same bits everywhere. States have the same bits on the same machine; elsewhere the teacher's arithmetic
rounds differently, and they agree within a **tolerance**: the root mean square difference per seed, in stored units,
that stage one measured when it made the store (`provenance/tolerance.json`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from advkd.cache.errors import DamagedError
from advkd.cache.files.sealed_json import unseal
from advkd.cache.files.strict_json import in_line
from advkd.cache.format.differences import differences
from advkd.cache.format.equivalence import equivalent
from advkd.cache.format.store_paths import states_path
from advkd.cache.read.reader import TrajectoryCache, Values

TOLERANCE_FILE = "provenance/tolerance.json"
MAX_TOLERANCE = 0.25
"""At unit variance: beyond this two states differ, whatever tolerance a store records."""
_ROUNDING = {"float16": 2.0**-10, "float32": 2.0**-22}
"""Always within tolerance: one or two units in the last place of the stored dtype."""


def tolerance_of(cache: TrajectoryCache) -> dict[int, float]:
    """Largest root mean square difference per seed of another machine's states, by solver steps done.

    Raises:
        DamagedError: the recorded tolerance is damaged or impossible.
    """
    floor, states = _ROUNDING[cache.layout.dtype], cache.layout.states
    values = {state.step: 0.0 for state in states}
    with suppress(FileNotFoundError):
        raw = cache.source.read(TOLERANCE_FILE)
        try:
            recorded = unseal(raw)["rms"]
            values = {state.step: float(recorded.get(state.name, 0.0)) for state in states}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DamagedError(
                f"{cache.address}/{TOLERANCE_FILE} is torn or altered ({in_line(error)}): remove it"
            ) from None
    if not all(math.isfinite(value) and value >= 0 for value in values.values()):
        raise DamagedError(f"{cache.address}/{TOLERANCE_FILE} holds a negative or infinite number: remove it")
    return {step: 0.0 if step == 0 else min(max(value, floor), MAX_TOLERANCE) for step, value in values.items()}


def distance(one: Values, other: Values) -> float:
    """The largest root mean square difference of any seed, between two blocks of states, shape (N, *item_shape).

    Infinite if a value is not finite, which no cache holds.
    """
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return math.inf  # NaN would compare as no difference
        difference = a.astype(np.float64) - b.astype(np.float64)
        worst = max(worst, math.sqrt(float(np.mean(difference * difference))))
    return worst


def block_distances(one: TrajectoryCache, other: TrajectoryCache, block: int) -> dict[int, float]:
    """Distance of a block in two stores, by solver steps done, for states of both whose bytes differ.

    Raises:
        DamagedError: bytes of either differ from its ledger.
    """
    apart = {}
    for step in sorted(one.states.keys() & other.states.keys()):
        array = states_path(one.states[step])
        if one.record(block).arrays[array].sha256 != other.record(block).arrays[array].sha256:
            apart[step] = distance(one.block_view(step, block), other.block_view(step, block))
    return apart


def differing_arrays(one: TrajectoryCache, other: TrajectoryCache, block: int) -> tuple[str, ...]:
    """Paths of the arrays besides the states, such as `conditions/label`, of which a block differs in two stores."""
    found, expected = one.array_records(block), other.array_records(block)
    names = set(one.further_names) | set(other.further_names)
    return tuple(name for name in sorted(names) if found.get(name) != expected.get(name))


def array_differences(one: TrajectoryCache, other: TrajectoryCache) -> list[str]:
    """Name what differs between the descriptions of two stores' arrays besides the states; none if one is empty."""
    if not (one.blocks and other.blocks):
        return []
    found, expected = ({spec.path: spec.template for spec in cache.further} for cache in (one, other))
    lines = [f"array {name}: present → absent" for name in sorted(found.keys() - expected.keys())]
    lines += [f"array {name}: absent → present" for name in sorted(expected.keys() - found.keys())]
    both = sorted(found.keys() & expected.keys())
    return lines + [f"{name}.{line}" for name in both for line in differences(found[name], expected[name])]


def within(apart: Mapping[int, float], tolerance: Mapping[int, float]) -> bool:
    """Whether all distances lie within a tolerance."""
    return all(value <= tolerance[step] for step, value in apart.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Differences of two stores."""

    recipe: tuple[str, ...]
    layout: tuple[str, ...]
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]
    apart: dict[int, dict[int, float]]
    """Distances by block and solver steps done, for blocks of both stores whose bytes differ."""
    other_arrays: dict[int, tuple[str, ...]]
    """By block: paths of arrays besides the states whose values differ."""
    num_equal: int

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        only_one = self.only_first or self.only_second
        return not (self.recipe or self.layout or only_one or self.apart or self.other_arrays)


def compare(one: TrajectoryCache, other: TrajectoryCache) -> Difference:
    """Compare recipe, layout and content; values are read only where the ledgers differ.

    Raises:
        DamagedError: bytes of either differ from its ledger.
    """
    comparable = equivalent(one.recipe, other.recipe) and one.layout.block_size == other.layout.block_size
    comparable = comparable and one.layout.dtype == other.layout.dtype
    first, second = set(one.blocks), set(other.blocks)
    both = sorted(first & second) if comparable else []
    apart = {block: found for block in both if (found := block_distances(one, other, block))}
    odd = {block: names for block in both if (names := differing_arrays(one, other, block))}
    return Difference(
        recipe=tuple(differences(one.recipe.to_json(), other.recipe.to_json())),
        layout=(*differences(one.layout.to_json(), other.layout.to_json()), *array_differences(one, other)),
        only_first=tuple(sorted(first - second)) if comparable else (),
        only_second=tuple(sorted(second - first)) if comparable else (),
        apart=apart,
        other_arrays=odd,
        num_equal=len(both) - len(apart.keys() | odd.keys()),
    )
