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
from advkd.cache.format.condition import ClassCondition
from advkd.cache.format.space import MAX_SIDE, LatentSpace

FORMAT, CONDITIONAL_FORMAT = 1, 2
"""Formats of a store: of unconditional teachers in pixel space, and of all others, which older versions can't read."""


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value, as hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines the numbers of a trajectory, and nothing else."""

    teacher: dict[str, Any]
    """`tensors_sha256`, the network's configuration (`unet`) and the training scheduler's; `network`, its class in
    diffusers, unless that is UNet2DModel."""
    sampler: dict[str, Any]
    """`name`, `steps`, `deterministic`, the scheduler's class, its configuration and its timesteps."""
    precision: dict[str, Any]
    """`compute` dtype and whether `tf32` was allowed."""
    noise: dict[str, Any]
    """`rule` and `root_seed` (see `advkd.cache.format.noise`)."""
    item_shape: tuple[int, ...]
    """Shape of one state, (C, H, W)."""
    condition: ClassCondition | None = None
    """What the teacher is told besides the state; None for an unconditional one."""
    space: LatentSpace | None = None
    """Where states live; None for pixels in [−1, 1]."""

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

    @property
    def format(self) -> int:
        """Format of a store of this recipe."""
        return FORMAT if self.condition is None and self.space is None else CONDITIONAL_FORMAT

    @property
    def evaluations_at_once(self) -> int:
        """Network evaluations per prediction: two where the teacher is guided."""
        return 1 if self.condition is None else self.condition.evaluations

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image, (C, H, W): of a state, or of what it decodes to."""
        return self.item_shape if self.space is None else self.space.image_shape

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for attributes and hashing; a condition or space only where there is one."""
        value = {**asdict(self), "item_shape": list(self.item_shape)}
        for name, part in (("condition", self.condition), ("space", self.space)):
            del value[name]
            if part is not None:
                value[name] = part.to_json()
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            NewerCacheError: it has a member that this version doesn't know.
            NotACacheError: a part is missing or out of range.
        """
        if unknown := unknown_members(value, [field.name for field in fields(cls)]):
            raise NewerCacheError(f"the recipe has an unknown member {unknown[0]!r} of a newer advkd: upgrade advkd")
        recipe = cls(
            **{
                **value,
                "item_shape": tuple(integer(n) for n in value["item_shape"]),
                "condition": ClassCondition.from_json(value["condition"]) if "condition" in value else None,
                "space": LatentSpace.from_json(value["space"]) if "space" in value else None,
            }
        )
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
