"""Sealed JSON: canonical bytes that end with their own hash, so that a torn or edited file is detected.

The file is `{…,"record_sha256":"<64 hex>"}`: the canonical JSON of a value, with one key more at its end, whose value
is the sha256 of the canonical JSON without it. Checking it needs no parsing.
"""

from __future__ import annotations

import hashlib
from typing import Any

from advkd.cache.files.strict_json import canonical_json, parse_json

_KEY = b',"record_sha256":"'
_TAIL = len(_KEY) + 64 + 2


def seal(value: dict[str, Any]) -> bytes:
    """A value's canonical JSON with its own hash at the end; `value` must not be empty."""
    body = canonical_json(value)
    return body[:-1] + _KEY + hashlib.sha256(body).hexdigest().encode() + b'"}'


def seal_of(raw: bytes) -> str:
    """The hash that a sealed file carries.

    Raises:
        ValueError: the file is torn or was altered.
    """
    body, tail = raw[:-_TAIL] + b"}", raw[-_TAIL:]
    stated = tail[len(_KEY) : -2]
    if not tail.startswith(_KEY) or not tail.endswith(b'"}') or hashlib.sha256(body).hexdigest().encode() != stated:
        raise ValueError("its own hash doesn't match")
    return stated.decode()


def unsealed(raw: bytes) -> bytes:
    """The canonical JSON without its last brace and without the hash."""
    return raw[:-_TAIL]


def unseal(raw: bytes) -> dict[str, Any]:
    """Read a sealed file.

    Raises:
        ValueError: the file is torn or was altered.
    """
    seal_of(raw)
    value: dict[str, Any] = parse_json(raw)
    return value
