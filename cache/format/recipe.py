"""The recipe: everything that determines the numbers in a cache.

The **fingerprint** hashes the recipe, that is teacher, sampler, precision, noise and shape. A recipe holds no time,
host, path or duration, so two builds of one recipe are the same bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Self

from advkd.cache.errors import NewerCacheError, NotACacheError
from advkd.cache.files.strict_json import canonical_json, integer, shortened, unknown_members

MAX_CHANNELS, MAX_SIDE = 64, 8192
"""Largest item shape that a store may claim."""


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
    """`rule` and `root_seed` (see `advkd.cache.format.noise`)."""
    item_shape: tuple[int, ...]
    """Shape of one state, (C, H, W)."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that names this recipe."""
        return digest(self.to_json())

    @property
    def deterministic(self) -> bool:
        """Whether x_T alone determines x_0, as losses on pairs require."""
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
            NewerCacheError: it has a member that this version doesn't know.
            NotACacheError: a part is missing or out of range.
        """
        if unknown := unknown_members(value, [field.name for field in fields(cls)]):
            raise NewerCacheError(f"the recipe has an unknown member {unknown[0]!r} of a newer advkd: upgrade advkd")
        recipe = cls(**{**value, "item_shape": tuple(integer(n) for n in value["item_shape"])})
        parts: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            (recipe.teacher, {"tensors_sha256": str, "unet": dict, "scheduler": dict}),
            (recipe.sampler, {"name": str, "steps": int, "eta": (int, float), "deterministic": bool, "config": dict}),
            (recipe.precision, {"compute": str}),
            (recipe.noise, {"rule": str, "root_seed": int}),
        )
        for part, kinds in parts:
            if not isinstance(part, dict) or not all(isinstance(part.get(key), kind) for key, kind in kinds.items()):
                raise NotACacheError(
                    f"the recipe lacks a member or has one of another type: expected {', '.join(kinds)}"
                )
        if not 0 <= integer(recipe.noise["root_seed"]) < 1 << 63 or not 1 <= integer(recipe.sampler["steps"]) < 1e6:
            raise NotACacheError("root_seed or steps of the recipe are out of range")
        if len(recipe.item_shape) != 3 or not all(1 <= n <= MAX_SIDE for n in recipe.item_shape):
            raise NotACacheError(f"impossible item shape {shortened(recipe.item_shape)}")
        return recipe
