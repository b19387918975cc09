"""The recipe: everything that determines the numbers in a cache.

The **fingerprint** hashes the recipe, that is teacher, sampler, precision, noise and shape. A recipe holds no time,
host, path or duration, so two builds of one recipe are the same bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import NewerCacheError, NotACacheError, UsageError
from advkd.cache.files.strict_json import canonical_json, integer, shortened, unknown_members
from advkd.cache.format.condition import ClassCondition
from advkd.cache.format.hashing import Seeds, is_held_out
from advkd.cache.format.noise import NOISE_RULE
from advkd.cache.format.prompts import PromptCondition
from advkd.cache.format.space import MAX_SIDE, LatentSpace

FORMAT, CONDITIONAL_FORMAT = 1, 2
"""Formats of a store: of unconditional teachers in pixel space, and of all others, which older versions can't read."""
STORED_NOISE = "stored"
"""The noise rule of an imported store, whose x_T is known from its array alone; `source_sha256` says from what."""
NOT_RECORDED = "not recorded"
"""What the source of an imported store doesn't say."""


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
    """`rule` and `root_seed` (see `advkd.cache.format.noise`). By the rule `stored`, x_T comes from files whose digest
    is `source_sha256`, and the root seed is for fresh seeds alone."""
    item_shape: tuple[int, ...]
    """Shape of one state, (C, H, W)."""
    condition: ClassCondition | None = None
    """The class labels that the teacher is told besides the state; None for one without classes."""
    prompts: PromptCondition | None = None
    """The prompts that it is told; None for one that is no text-to-image pipeline."""
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
        plain = self.condition is None and self.prompts is None and self.space is None and not self.imported
        return FORMAT if plain else CONDITIONAL_FORMAT

    @property
    def imported(self) -> bool:
        """Whether other tools' files are all that the numbers follow from."""
        return bool(self.noise["rule"] == STORED_NOISE)

    def check_drawn_noise(self, address: str, what: str) -> None:
        """Refuse what needs x_T from the seeds.

        Args:
            address: of the store.
            what: it can't, such as "be packed".

        Raises:
            UsageError: x_T doesn't follow from the seeds.
        """
        if self.noise["rule"] != NOISE_RULE:
            raise UsageError(
                f"{address} can't {what}: its x_T doesn't follow from the seeds (noise rule "
                f"{shortened(self.noise['rule'])}; expected {NOISE_RULE}), for it was imported from other tools' files"
            )

    @property
    def evaluations_at_once(self) -> int:
        """Network evaluations per prediction: two where the teacher is guided."""
        told = self.condition or self.prompts
        return 1 if told is None else told.evaluations

    def held_out(self, seeds: Seeds) -> npt.NDArray[np.bool_]:
        """Which of some seeds, int64, shape (N,), are held out of training: one in sixteen, a pure function of the
        seed; with prompts, all seeds of one prompt in sixteen."""
        return is_held_out(seeds if self.prompts is None else self.prompts.prompts_of(seeds))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image, (C, H, W): of a state, or of what it decodes to."""
        return self.item_shape if self.space is None else self.space.image_shape

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for attributes and hashing; condition, prompts and space only where there are some."""
        value = {**asdict(self), "item_shape": list(self.item_shape)}
        for name, part in (("condition", self.condition), ("prompts", self.prompts), ("space", self.space)):
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
                "prompts": PromptCondition.from_json(value["prompts"]) if "prompts" in value else None,
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
        if recipe.condition is not None and recipe.prompts is not None:
            raise NotACacheError("the recipe has both class labels and prompts")
        return recipe
