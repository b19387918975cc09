"""JSON from files that a stranger may have written.

Refused are Python's extensions of the standard, and whatever could exhaust memory or the stack.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NoReturn

MAX_PARTS = 1 << 18
"""Objects and lists in one file; no record needs as many. An empty one takes twenty times its two bytes in memory."""
MAX_DEPTH = 64


def parse_json(raw: bytes) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is no UTF-8 or no JSON, repeats a key, has a NaN or half a surrogate pair, or has too many or too
            deeply nested parts.
    """
    if raw.count(b"{") + raw.count(b"[") > MAX_PARTS:
        raise ValueError("too many parts")
    try:
        value = _DECODER.decode(raw.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check(value)
    return value


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, shortest float that reads back the same; no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def pretty_json(value: Any) -> bytes:
    """The same, indented, for files that people open."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def in_line(text: object, most: int = 80) -> str:
    """A stranger's text for a message: one line of bounded length."""
    line = str(text)[:most]
    return line if line.isprintable() else ascii(line)[1:-1]


def integer(value: Any) -> int:
    """A value that JSON wrote as an integer.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int:
        raise ValueError(f"{str(value)[:40]!r} is no integer")
    return value


def unknown_members(value: Any, known: Collection[str]) -> list[str]:
    """Members of an object that this version doesn't know, for a message; none of what is no object."""
    return sorted(in_line(name, 40) for name in value.keys() - known) if isinstance(value, dict) else []


def shortened(value: Any) -> str:
    """A value cut to a few words, for a message."""
    text = str(value)
    if len(text) <= 40 or not hasattr(value, "__len__"):
        return in_line(text, 40)
    return f"{in_line(text, 16)}… ({len(value)} long)"


def _check(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                below += part.keys()
                below += part.values()
            elif isinstance(part, list):
                below += part
            elif isinstance(part, str) and not part.isascii():
                part.encode()  # half a surrogate pair is a UnicodeEncodeError, thus a ValueError
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("it repeats a key")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
