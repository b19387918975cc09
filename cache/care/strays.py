"""Files that are in a store's folder and recorded nowhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from advkd.cache.care.findings import Finding
from advkd.cache.errors import CacheError, DamagedError
from advkd.cache.files.durable import PARTIAL_SUFFIX
from advkd.cache.files.locks import LOCK_FILE, StoreLocks
from advkd.cache.files.paths import walk
from advkd.cache.files.sealed_json import unseal
from advkd.cache.format.source import LocalSource
from advkd.cache.format.store_paths import record_path


def strays(root: Path, known: Collection[str], seals: Collection[str], listed: Collection[int]) -> Iterator[Finding]:
    """Files of a store that don't belong to it.

    Args:
        root: the store.
        known: files that do, relative to it.
        seals: hashes of the sealed files that are where they belong.
        listed: blocks that had a record when the verification began.
    """
    for path in walk(root):
        if path in known or path.endswith(PARTIAL_SUFFIX) or _is_later_note(root, path, seals):
            continue  # a write in flight, or one that the next build sweeps
        parts = path.split("/")
        state = parts[1] if parts[0] == "states" and len(parts) > 2 else None
        block = block_of(parts)
        if block is not None and block not in listed and _is_being_made(root, block):
            continue
        problem = "is recorded nowhere: left by an interrupted build, or foreign"
        yield Finding(kind="stray", file=path, problem=problem, block=block, state=state)


def block_of(parts: list[str]) -> int | None:
    """The block that a file would be of, by its path."""
    if parts[0] in ("blocks", "provenance"):
        return _number(parts[-1].removeprefix("block-").partition(".")[0])
    at = parts.index("c") if "c" in parts[:-1] else -1
    return _number(parts[at + 1]) if at > 0 else None


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _is_later_note(root: Path, path: str, seals: Collection[str]) -> bool:
    """Whether it may be provenance that a later version adds: sealed, and no copy of a file that has its place."""
    folder, _, name = path.rpartition("/")
    try:
        return (
            folder == "provenance"
            and not name.startswith("block-")
            and unseal(LocalSource(root).read(path))["record_sha256"] not in seals
        )
    except (OSError, ValueError, DamagedError):
        return False


def _is_being_made(root: Path, block: int) -> bool:
    """Whether another process makes a block, or has done so since the ledger was listed."""
    try:
        if (root / record_path(block)).exists():
            return True
        if not (root / "provenance" / LOCK_FILE).exists():
            return False  # verifying changes nothing
        with StoreLocks(root).block(block) as free:
            return not free
    except (OSError, CacheError):  # a read-only copy
        return False
