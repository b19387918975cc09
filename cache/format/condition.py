"""Conditions: what a conditional teacher is told besides the noisy state.

By the rule `cyclic` the label of a seed depends on nothing else, which keeps blocks independent: a store can be
extended, merged and built by several processes at once, and a student's fresh seeds have labels by the same rule. An
imported store has the labels of its source (rule `stored`); fresh seeds then take its labels in turn, too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import NewerCacheError, NotACacheError
from advkd.cache.files.strict_json import integer, shortened, unknown_members

LABELS_PATH = "conditions/label"
"""Array of the seeds' class labels: int32, one per seed."""
LABEL_DTYPE = "int32"
LABEL_RULES = ("cyclic", "stored")
MAX_CLASSES = 1 << 20
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class ClassCondition:
    """Class labels, and how strongly they guide the sampler."""

    num_classes: int
    """Rows of the teacher's table of classes, its null row included."""
    labels: tuple[int, ...]
    """The labels in use, ascending."""
    guidance: float = 1.0
    """Scale w of classifier-free guidance (Ho & Salimans 2022): null + w · (labelled − null); 1 is none."""
    null_class: int | None = None
    """The row that stands for no label; None if guidance is 1, which doesn't use it."""
    rule: str = LABEL_RULES[0]
    """What the labels of cached seeds follow from: `cyclic`, the seed; `stored`, nothing but the array."""

    def __post_init__(self) -> None:
        within = all(0 <= label < self.num_classes for label in (*self.labels, self.null_class or 0))
        if not (1 <= self.num_classes <= MAX_CLASSES and self.labels and within):
            raise NotACacheError(
                f"condition: labels {shortened(list(self.labels))} of {self.num_classes} classes are impossible"
            )
        if list(self.labels) != sorted(set(self.labels)) or self.null_class in self.labels:
            raise NotACacheError(
                f"condition: labels {shortened(list(self.labels))} repeat, descend or hold the null class"
            )
        guided = self.guidance != 1.0
        if not math.isfinite(self.guidance) or self.guidance < 0 or guided == (self.null_class is None):
            raise NotACacheError(
                f"condition: guidance {self.guidance} with null class {self.null_class}; expected a number ≥ 0, and a "
                "null class unless it is 1"
            )

    def labels_of(self, seeds: npt.ArrayLike) -> Labels:
        """Labels in turn, `labels[seed mod len(labels)]`, balanced over any run of seeds.

        By the rule `cyclic` the cached seeds' labels are these, too.

        Args:
            seeds: whole numbers, shape (N,).

        Returns:
            int32, shape (N,).
        """
        chosen: Labels = self._table[np.asarray(seeds, dtype=np.int64) % len(self.labels)]
        return chosen

    @cached_property
    def _table(self) -> Labels:
        return np.asarray(self.labels, dtype=np.int32)

    @property
    def stored(self) -> bool:
        """Whether the array is all that says the labels of cached seeds."""
        return self.rule == "stored"

    @property
    def evaluations(self) -> int:
        """Network evaluations per prediction: guidance takes one with the label and one without."""
        return 1 if self.null_class is None else 2

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"kind": "class", **asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            NewerCacheError: it is of a kind, or has a rule or a member, that this version doesn't know.
            NotACacheError: a part is out of range.
        """
        unknown = unknown_members(value, ["kind", *(field.name for field in fields(cls))])
        if value["kind"] != "class" or value["rule"] not in LABEL_RULES or unknown:
            what = unknown[0] if unknown else f"{shortened(value['kind'])}/{shortened(value['rule'])}"
            raise NewerCacheError(f"its condition ({what}) is of a newer advkd: upgrade advkd")
        guidance, null_class = value["guidance"], value["null_class"]
        if type(guidance) is not float:
            raise NotACacheError(f"condition: guidance {shortened(guidance)} is no float")
        return cls(
            num_classes=integer(value["num_classes"]),
            labels=tuple(integer(label) for label in value["labels"]),
            guidance=guidance,
            null_class=None if null_class is None else integer(null_class),
            rule=value["rule"],
        )
