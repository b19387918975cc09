"""Versions of the software that produced an artefact."""

from __future__ import annotations

from importlib.metadata import version


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of advkd, NumPy, torch and the given packages."""
    return {name: version(name) for name in sorted({"advkd", "numpy", "torch", *packages})}
