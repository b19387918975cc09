"""What a teacher's model card tells people: licence, attribution, names of classes. Nothing is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_CHARACTERS = 200
"""Of each text; the rest is cut."""
_MAX_FRONT = 1_000_000
"""Characters read of a README.md."""


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """What is known of a teacher besides its files."""

    license: str | None = None
    """As the Hub names it."""
    attribution: str | None = None
    """Whom to name beside images, where the licence asks for it."""
    class_names: dict[int, str] = field(default_factory=dict)
    """By label; the key `id2label` of the card, or of `model_index.json`, where DiT pipelines have it."""

    @classmethod
    def read(cls, folder: Path, index: Mapping[str, Any]) -> TeacherCard:
        """Read the front matter of a folder's README.md, whose other keys have no effect.

        Args:
            folder: of the pipeline; it may have no card, or a malformed one.
            index: its `model_index.json`.
        """
        front = _front_matter(folder / "README.md")
        return cls(
            license=_text(front.get("license")),
            attribution=_text(front.get("attribution")),
            class_names=_names(front.get("id2label") or index.get("id2label")),
        )

    def to_markdown(self, text: str) -> str:
        """A README.md that `read` reads, with a text below."""
        import yaml

        values = {"license": self.license, "attribution": self.attribution, "id2label": self.class_names}
        front = {key: value for key, value in values.items() if value}
        return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{text}\n"

    def to_json(self) -> dict[str, Any]:
        """As a store's provenance records it: what is known, labels as text."""
        names = {str(label): name for label, name in self.class_names.items()}
        known = {"license": self.license, "attribution": self.attribution, "class_names": names}
        return {key: value for key, value in known.items() if value}


def _front_matter(path: Path) -> dict[str, Any]:
    import yaml

    try:
        opening, front, *rest = path.read_text(encoding="utf-8")[:_MAX_FRONT].split("---", 2)
        value = yaml.safe_load(front) if rest and not opening.strip() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return str(value)[:MAX_CHARACTERS] if value else None


def _names(value: object) -> dict[int, str]:
    if not isinstance(value, Mapping):
        return {}
    return {int(label): str(name)[:MAX_CHARACTERS] for label, name in value.items() if str(label).isdecimal()}
