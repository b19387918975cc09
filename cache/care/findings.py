"""Findings of a verification, one per file and problem, in three kinds.

**damage**: bytes that differ from what is recorded; **missing**: recorded, but not there; **stray**: there, but
recorded nowhere (left by an interrupted build, copied to the wrong place, or foreign).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["damage", "missing", "stray"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: Kind
    file: str
    """Relative to the store."""
    problem: str
    block: int | None = None
    state: str | None = None

    def __str__(self) -> str:
        """One line."""
        place = [f"block {self.block}"] if self.block is not None else []
        place += [f"state {self.state}"] if self.state is not None else []
        where = f" ({', '.join(place)})" if place else ""
        return f"{self.kind:8}{self.file}: {self.problem}{where}"
