"""What a student's network takes from its cache: item shape, noise levels, the rules of noise and labels, space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy.typing as npt

from advkd.cache.care.summary import FLOW_MATCHING, path_of
from advkd.cache.errors import UsageError
from advkd.cache.files.strict_json import integer
from advkd.cache.format.condition import ClassCondition, Labels
from advkd.cache.format.equivalence import DEFAULT_NETWORK, NETWORK_OPTIONS
from advkd.cache.format.layout import DTYPES
from advkd.cache.format.prompts import PromptCondition
from advkd.cache.format.space import MAX_CHANNELS, MAX_SIDE, LatentSpace
from advkd.cache.read.reader import TrajectoryCache

MAX_LEVELS = 4096
FORMAT, CONDITIONAL_FORMAT = 1, 2
"""Formats of a student's folder: of unconditional ones in pixel space, and of all others, as for stores."""
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
"""What a teacher's network may predict."""
MAX_NUMBER, MAX_NUMBERS, MAX_DEPTH = 1 << 16, 512, 128
"""Bounds of a network's configuration, which may come from elsewhere: modules are built before weights are read."""
MAX_NAMED = 20
"""Labels that a message lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkDescription:
    """The teacher's network, for a student that is one."""

    name: str
    """Its class in diffusers."""
    config: dict[str, Any]
    """Of that class."""
    prediction: str
    """What it predicts: one of `PREDICTIONS`."""

    @classmethod
    def of(cls, cache: TrajectoryCache) -> Self:
        """That of a cache's teacher."""
        teacher = cache.recipe.teacher
        flow = path_of(cache.layout) == FLOW_MATCHING
        predicted = "flow" if flow else str(teacher["scheduler"].get("prediction_type", "epsilon"))
        return cls(name=teacher.get("network", DEFAULT_NETWORK), config=dict(teacher["unet"]), prediction=predicted)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read a description, which may come from elsewhere.

        Raises:
            ValueError: it names another class, or its network would be excessive.
        """
        name, config, prediction = value["name"], value["config"], value["prediction"]
        if name not in NETWORK_OPTIONS or prediction not in PREDICTIONS or not isinstance(config, dict):
            raise ValueError(f"network: {str(name)[:40]} with prediction {str(prediction)[:20]} is unknown")
        numbers = [number for found in config.values() for number in (found if isinstance(found, list) else [found])]
        depths = [config.get(key) or 0 for key in ("layers_per_block", "num_layers")]
        excessive = any(isinstance(number, int) and abs(number) > MAX_NUMBER for number in numbers)
        if excessive or len(numbers) > MAX_NUMBERS or any(not 0 <= int(depth) <= MAX_DEPTH for depth in depths):
            raise ValueError("network: its configuration is excessive")
        return cls(name=name, config=config, prediction=prediction)


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
    num_classes: int = 0
    """Rows of the table of classes, the teacher's null row included; 0 for an unconditional student."""
    labels: tuple[int, ...] = ()
    """The class labels that the student learns, ascending."""
    prompts: PromptCondition | None = None
    """The prompts that the student learns; None for one that is told none."""
    space: LatentSpace | None = None
    """Where items live; None for pixels, about [−1, 1]."""
    network: NetworkDescription | None = None
    """Of the teacher, where the student is that network."""

    @classmethod
    def of(cls, cache: TrajectoryCache, steps: Sequence[int] | None = None, *, network: bool = False) -> Self:
        """The geometry of some of a cache's recorded states.

        Args:
            cache: the cache.
            steps: the states to learn from, as numbers of solver steps; all recorded ones if None.
            network: whether to describe the teacher's network, too.

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
        condition = cache.recipe.condition
        states = [known[step] if step in known else cache.state(step) for step in wanted]
        return cls(
            item_shape=(channels, height, width),
            levels=tuple((state.stored_alpha, state.stored_sigma) for state in states),
            timesteps=tuple(state.timestep for state in states),
            steps=tuple(state.step for state in states),
            root_seed=cache.recipe.root_seed,
            noise_dtype=cache.layout.dtype,
            num_classes=0 if condition is None else condition.num_classes,
            labels=() if condition is None else condition.labels,
            prompts=cache.recipe.prompts,
            space=cache.recipe.space,
            network=NetworkDescription.of(cache) if network else None,
        )

    @property
    def format(self) -> int:
        """Format of the folder of a student of this geometry."""
        return CONDITIONAL_FORMAT if self.num_classes or self.prompts or self.space else FORMAT

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W): of an item, or of what it decodes to."""
        return self.item_shape if self.space is None else self.space.image_shape

    @property
    def known_labels(self) -> str:
        """The labels in words, such as "0 to 9"."""
        first, last = self.labels[0], self.labels[-1]
        if len(self.labels) > 2 and last - first == len(self.labels) - 1:
            return f"{first} to {last}"
        return ", ".join(map(str, self.labels[:MAX_NAMED])) + (", …" if len(self.labels) > MAX_NAMED else "")

    def labels_of(self, seeds: npt.ArrayLike) -> Labels | None:
        """Labels of some seeds by the cache's rule: int32, shape (N,); None for an unconditional student."""
        if not self.num_classes:
            return None
        return ClassCondition(num_classes=self.num_classes, labels=self.labels).labels_of(seeds)

    def checked_labels(self, labels: Sequence[int]) -> list[int]:
        """Labels that someone asked for, if the student knows them.

        Raises:
            UsageError: it is unconditional, or doesn't know one.
        """
        if not self.num_classes:
            what = "told prompts, not classes" if self.prompts else "unconditional"
            raise UsageError(f"the student is {what}: leave out the class labels")
        unknown = sorted(set(labels) - set(self.labels))
        if unknown or not labels:
            what = f"class label {unknown[0]} is unknown to the student" if unknown else "no class labels"
            raise UsageError(f"{what}; expected some of {self.known_labels}")
        return list(labels)

    def to_json(self) -> dict[str, Any]:
        """As JSON; classes, prompts, a space or a network only where there are any."""
        value = asdict(self)
        if self.network is None:
            del value["network"]
        if not self.num_classes:
            del value["num_classes"], value["labels"]
        for name, part in (("prompts", self.prompts), ("space", self.space)):
            del value[name]
            if part is not None:
                value[name] = part.to_json()
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a value is out of range.
            NewerCacheError: the space is one that this version doesn't know.
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
        classes: dict[str, Any] = {}
        if "num_classes" in value or "labels" in value:
            num_classes, labels = integer(value["num_classes"]), tuple(map(integer, value["labels"]))
            ClassCondition(num_classes=num_classes, labels=labels)  # raises if they are impossible
            classes = {"num_classes": num_classes, "labels": labels}
        return cls(
            item_shape=(channels, height, width),
            levels=tuple((float(alpha), float(sigma)) for alpha, sigma in value["levels"]),
            timesteps=tuple(float(t) for t in value["timesteps"]),
            steps=tuple(int(step) for step in value["steps"]),
            root_seed=int(value["root_seed"]),
            noise_dtype=str(value["noise_dtype"]),
            **classes,
            prompts=PromptCondition.from_json(value["prompts"]) if "prompts" in value else None,
            space=LatentSpace.from_json(value["space"]) if "space" in value else None,
            network=NetworkDescription.from_json(value["network"]) if "network" in value else None,
        )
