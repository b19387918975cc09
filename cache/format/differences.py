"""The differences between two JSON values, in words."""

from __future__ import annotations

from typing import Any

from advkd.cache.files.strict_json import in_line, shortened


def differences(found: Any, expected: Any) -> list[str]:
    """The differences between two JSON values, as `path: found → expected`.

    Shallow ones come first: the name of a sampler before the many options that follow from it.
    """
    return [line for _, line in sorted(_differences(found, expected, ()), key=lambda entry: len(entry[0]))]


def _differences(found: Any, expected: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted(found.keys() | expected.keys())
        return [entry for key in keys for entry in _differences(found.get(key), expected.get(key), (*path, str(key)))]
    if found == expected:
        return []
    if isinstance(found, list) and isinstance(expected, list) and any(isinstance(v, dict) for v in found + expected):
        if len(found) != len(expected):
            return [(path, f"{in_line('.'.join(path), 120)}: {len(found)} → {len(expected)} entries")]
        pairs = enumerate(zip(found, expected, strict=True))
        return [entry for index, (a, b) in pairs for entry in _differences(a, b, (*path, str(index)))]
    short_found, short_expected = (shortened(value) for value in (found, expected))
    return [(path, f"{in_line('.'.join(path), 120)}: {short_found} → {short_expected}")]
