"""Repairing a store after a verification: what is damaged is removed, so that the next build makes it again."""

from __future__ import annotations

from pathlib import Path

from advkd.cache.care.findings import Finding
from advkd.cache.care.metadata import StoreMetadata
from advkd.cache.files.durable import remove_durably, write_atomically
from advkd.cache.files.locks import StoreLocks
from advkd.cache.files.paths import safe_target
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.store_paths import record_path
from advkd.cache.read.contents import local_root
from advkd.cache.read.reader import TrajectoryCache


def repair(cache: TrajectoryCache, findings: tuple[Finding, ...]) -> list[str]:
    """Remove what is damaged, so that the next build makes it again; write metadata anew.

    A block with a damaged file loses that file and its ledger record; its other files stay until the build replaces
    them. A block with a missing file loses its record too. Stray files are left alone.

    Returns:
        One line per change.

    Raises:
        LockedError: another process writes to the store.
        CacheError: the store is remote.
    """
    root = local_root(cache)
    done: list[str] = []
    with StoreLocks(root).alone():
        wrong = [found for found in findings if found.kind != "stray"]
        for block in sorted({found.block for found in wrong if found.block is not None}):
            of_block = [found for found in wrong if found.block == block]
            if any(not found.file.startswith("provenance/") for found in of_block):
                _remove(root, record_path(block), done)  # first: without it nothing of the block counts
                done.append(f"block {block} is no longer recorded: the next build makes it again")
        for found in wrong:
            if found.kind == "damage" and not found.file.endswith("zarr.json"):
                _remove(root, found.file, done)
        expected = {name: pretty_json(value) for name, value in StoreMetadata(TrajectoryCache.open(root)).files.items()}
        for file in sorted({found.file for found in wrong} & expected.keys()):
            write_atomically(safe_target(root, file), [expected[file]])
            done.append(f"{file} is written anew from the recipe")
        for file in sorted({found.file for found in wrong if found.file.endswith("zarr.json")} - expected.keys()):
            done.append(f"{file} describes an array that the recipe does not: take it from another copy of the store")
    return done


def _remove(root: Path, file: str, done: list[str]) -> None:
    """Remove a file, or the symlink that its path leads through: files outside the store are never touched."""
    path = root
    for part in file.split("/"):
        path = path / part
        if path.is_symlink():
            break
    try:
        remove_durably(path)
    except OSError as error:
        done.append(f"{file} can't be removed ({error.strerror}): remove it yourself")
