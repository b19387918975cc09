"""Every byte of a store against its ledger, every metadata file against the recipe.

What is found is named by file, block and state. Three kinds: **damage** (bytes that differ from what is recorded),
**missing** (recorded, but not there), **stray** (there, but recorded nowhere: left by an interrupted build, copied to
the wrong place, or foreign). A whole state that is absent is a partial copy and no fault.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from advkd.cache.durable import PARTIAL_SUFFIX, pretty_json, write_atomically
from advkd.cache.errors import CacheError, DamagedError
from advkd.cache.layout import (
    array_metadata,
    block_of_record,
    chunk_path,
    group_metadata,
    metadata_path,
    provenance_path,
    record_path,
    root_metadata,
    states_path,
)
from advkd.cache.ledger import ArrayRecord
from advkd.cache.locks import LOCK_FILE, NOTE_FILE, StoreLocks
from advkd.cache.paths import open_file
from advkd.cache.reader import TrajectoryCache, local_root
from advkd.cache.seal import seal_of
from advkd.cache.source import LocalSource

Kind = Literal["damage", "missing", "stray"]
_PIECE = 4 << 20


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What a verification saw."""

    findings: tuple[Finding, ...]
    num_blocks: int
    num_bytes: int
    """Of values that were read and compared."""
    absent_states: tuple[str, ...]
    """Recorded states that this copy has not."""


def verify(cache: TrajectoryCache, checked: Callable[[int], None] = lambda num_bytes: None) -> Verified:
    """Compare every byte of a store with its ledger and recipe.

    Args:
        cache: local, or remote (where files that don't belong can't be seen).
        checked: hears of the bytes of each chunk that was read.
    """
    return _Verification(cache, checked).run()


def bytes_to_verify(cache: TrajectoryCache) -> int:
    """Bytes of all chunks that `verify` reads."""
    return len(cache.blocks) * len(cache.states) * cache.layout.block_bytes(cache.item_shape)


class _Verification:
    def __init__(self, cache: TrajectoryCache, checked: Callable[[int], None]) -> None:
        self.cache = cache
        self.checked = checked
        self.findings: list[Finding] = []
        self.known: set[str] = {f"provenance/{LOCK_FILE}", f"provenance/{NOTE_FILE}"}
        self.num_bytes = 0

    def run(self) -> Verified:
        cache = self.cache
        self._metadata()
        # Records beyond what the arrays declare count too, where they can be seen.
        blocks = _listed_blocks(cache.source) if isinstance(cache.source, LocalSource) else cache.blocks
        for block in blocks:
            self._block(block)
        if isinstance(cache.source, LocalSource):
            self._strays(cache.source.root)
        absent = tuple(state.name for state in cache.layout.states if state.step not in cache.states)
        return Verified(
            findings=tuple(self.findings), num_blocks=len(blocks), num_bytes=self.num_bytes, absent_states=absent
        )

    def _find(self, kind: Kind, file: str, problem: str, block: int | None = None, state: str | None = None) -> None:
        self.findings.append(Finding(kind=kind, file=file, problem=problem, block=block, state=state))

    def _metadata(self) -> None:
        cache = self.cache
        expected = {
            "zarr.json": root_metadata(cache.recipe, cache.layout),
            "states/zarr.json": group_metadata(),
        }
        declared = {}
        for state in cache.states.values():
            path = metadata_path(states_path(state))
            declared[path] = int(json.loads(cache.source.read(path))["shape"][0])
            expected[path] = array_metadata(cache.recipe, cache.layout, state, declared[path])
        for path, value in expected.items():
            self.known.add(path)
            try:
                if cache.source.read(path) != pretty_json(value):
                    self._find("damage", path, "differs from what the recipe generates")
            except FileNotFoundError:
                self._find("missing", path, "is not there")
            except DamagedError as error:
                self._find("damage", path, str(error))
        most = max(declared.values(), default=0)
        for path, num_seeds in declared.items():
            if num_seeds != most:
                self._find("damage", path, f"declares {num_seeds} seeds, another array {most}")

    def _block(self, block: int) -> None:
        cache, path = self.cache, record_path(block)
        self.known.add(path)
        try:
            record = cache.record(block)
        except DamagedError as error:
            self._find("damage", path, _without_advice(error), block)
            return
        if block >= cache.num_blocks:
            self._find("damage", path, f"lies beyond the {cache.num_seeds} seeds that the arrays declare", block)
        for state in cache.states.values():
            array = states_path(state)
            chunk = chunk_path(array, block, len(cache.item_shape))
            self.known.add(chunk)
            self._chunk(chunk, record.arrays[array], block, state.name)
        for array, expected in record.arrays.items():  # arrays of later versions, conditions for instance
            if not array.startswith("states/"):
                chunk = f"{array}/c/{block}"
                self.known.add(chunk)
                self._chunk(chunk, expected, block, None)
        self._provenance(block)

    def _chunk(self, chunk: str, expected: ArrayRecord, block: int, state: str | None) -> None:
        try:
            num_bytes, digest = self._hash(chunk, expected.num_bytes)
        except FileNotFoundError:
            self._find("missing", chunk, "is not there, but the ledger has it", block, state)
            return
        except (CacheError, OSError) as error:
            self._find("damage", chunk, str(error), block, state)
            return
        self.num_bytes += num_bytes
        self.checked(num_bytes)
        if num_bytes != expected.num_bytes:
            self._find("damage", chunk, f"has {num_bytes} bytes, the ledger says {expected.num_bytes}", block, state)
        elif digest != expected.sha256:
            self._find("damage", chunk, f"its sha256 is {digest[:12]}…, recorded {expected.sha256[:12]}…", block, state)

    def _hash(self, chunk: str, limit: int) -> tuple[int, str]:
        source, total = self.cache.source, hashlib.sha256()
        if not isinstance(source, LocalSource):
            data = source.read(chunk, limit)
            return len(data), hashlib.sha256(data).hexdigest()
        source.check_folder(chunk)
        with open(open_file(source.root, chunk), "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            while num_bytes <= limit and (piece := file.read(_PIECE)):
                total.update(piece)
        return num_bytes, total.hexdigest()

    def _provenance(self, block: int) -> None:
        path = provenance_path(block)
        self.known.add(path)
        try:
            seal_of(self.cache.source.read(path))
        except FileNotFoundError:
            pass  # outside identity: a copy may come without it
        except (ValueError, DamagedError):
            self._find("damage", path, "is torn or altered", block)

    def _strays(self, root: Path) -> None:
        for path in _files(root):
            if path in self.known or path.endswith(PARTIAL_SUFFIX):
                continue  # a write in flight, or one that the next build sweeps
            folder, _, name = path.rpartition("/")
            if folder == "provenance" and not name.startswith("block-"):
                self._store_provenance(path)
                continue
            parts = path.split("/")
            state = parts[1] if parts[0] == "states" and len(parts) > 2 else None
            block = int(parts[3]) if state and len(parts) > 4 and parts[3].isdecimal() else None
            if block is not None and self._is_being_made(root, block):
                continue
            self._find("stray", path, "is recorded nowhere: left by an interrupted build, or foreign", block, state)

    def _store_provenance(self, path: str) -> None:
        try:
            raw = self.cache.source.read(path)
            if path.endswith(".json"):
                seal_of(raw)
        except (ValueError, DamagedError):
            self._find("damage", path, "is torn or altered")

    def _is_being_made(self, root: Path, block: int) -> bool:
        try:
            with StoreLocks(root).block(block) as free:
                return not free
        except (OSError, CacheError):  # a read-only copy
            return False


def repair(cache: TrajectoryCache, findings: tuple[Finding, ...]) -> list[str]:
    """Remove what is provably damaged, so that the next build makes it again; metadata is written anew.

    A block loses its ledger record and the file that is damaged; its other files stay until the build replaces them.
    A block of which files are only missing loses its record too. Stray files are left alone.

    Returns:
        What was done, one line each.

    Raises:
        LockedError: somebody writes to the store.
        CacheError: the store is remote.
    """
    root, done = local_root(cache), []
    with StoreLocks(root).alone():
        for block in sorted({found.block for found in findings if found.block is not None and found.kind != "stray"}):
            of_block = [found for found in findings if found.block == block and found.kind != "stray"]
            if any(not found.file.startswith("provenance/") for found in of_block):
                (root / record_path(block)).unlink(missing_ok=True)  # first: without it nothing of the block counts
                done.append(f"block {block} is no longer recorded: the next build makes it again")
            for found in of_block:
                if found.kind == "damage":
                    (root / found.file).unlink(missing_ok=True)
        most = cache.num_seeds
        for found in findings:
            if found.block is None and found.file.endswith("zarr.json") and found.kind != "stray":
                expected = {
                    "states/zarr.json": group_metadata(),
                    "zarr.json": root_metadata(cache.recipe, cache.layout),
                    **{
                        metadata_path(states_path(state)): array_metadata(cache.recipe, cache.layout, state, most)
                        for state in cache.states.values()
                    },
                }
                write_atomically(root / found.file, [pretty_json(expected[found.file])])
                done.append(f"{found.file} is written anew from the recipe")
    return done


def _listed_blocks(source: LocalSource) -> tuple[int, ...]:
    try:
        source.check_folder("blocks/")
        names = os.listdir(source.root / "blocks")
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return tuple(sorted(block for name in names if (block := block_of_record(name)) is not None))


def _files(root: Path) -> Iterator[str]:
    """Every file below a folder, relative, sorted; links are listed and not followed."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*names, *linked]):
            yield os.path.relpath(os.path.join(folder, name), root)


def _without_advice(error: DamagedError) -> str:
    return str(error).split(": ", 1)[-1].split(";")[0]
