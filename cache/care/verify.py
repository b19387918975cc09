"""Every byte of a store against its ledger, every metadata file against the recipe.

What is found is named by file, block and state. Three kinds: **damage** (bytes that differ from what is recorded),
**missing** (recorded, but not there), **stray** (there, but recorded nowhere: left by an interrupted build, copied to
the wrong place, or foreign). A whole state that is absent is a partial copy and no fault.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import google_crc32c

from advkd.cache.care.declared import declared_seeds, expected_num_seeds, listed_blocks
from advkd.cache.errors import CacheError, DamagedError, NeedsDamagedError, NotCachedError
from advkd.cache.files.durable import PARTIAL_SUFFIX
from advkd.cache.files.locks import LOCK_FILE, NOTE_FILE, StoreLocks
from advkd.cache.files.paths import walk
from advkd.cache.files.sealed_json import unseal
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.layout import State
from advkd.cache.format.ledger import ArrayRecord, crc32c
from advkd.cache.format.store_paths import chunk_path, metadata_path, provenance_path, record_path, states_path
from advkd.cache.format.zarr_metadata import CRC_BYTES, MAX_BLOCKS, array_metadata, group_metadata, root_metadata
from advkd.cache.read.compare import TOLERANCE_FILE, tolerance_of
from advkd.cache.read.reader import TrajectoryCache

Kind = Literal["damage", "missing", "stray"]
_PIECE = 4 << 20
_CRC_OF_ALL = crc32c(bytes(CRC_BYTES))
"""Of any bytes that end with their own CRC, no bytes among them."""
STORE_FILE = "provenance/store.json"


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
    """Of values that were read, of a packed store decoded, and compared."""
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
        self.seals: set[str] = set()
        """Of the sealed files that are where they belong."""
        self.num_bytes = 0
        self.states = [state for state in cache.layout.states if state.step in cache.states or _has_files(cache, state)]

    def run(self) -> Verified:
        cache = self.cache
        blocks = listed_blocks(cache)  # before anything else: what is added meanwhile is no finding
        self._metadata(blocks)
        for block in blocks:
            self._block(block)
        self._store_provenance(STORE_FILE)
        self._store_provenance(TOLERANCE_FILE)
        if cache.files.root is not None:
            self._strays(cache.files.root, set(blocks))
        absent = tuple(state.name for state in cache.layout.states if state not in self.states)
        return Verified(
            findings=tuple(self.findings), num_blocks=len(blocks), num_bytes=self.num_bytes, absent_states=absent
        )

    def _find(self, kind: Kind, file: str, problem: str, block: int | None = None, state: str | None = None) -> None:
        self.findings.append(Finding(kind=kind, file=file, problem=problem, block=block, state=state))

    def _metadata(self, blocks: Sequence[int]) -> None:
        cache, declared = self.cache, declared_seeds(self.cache)
        expected = expected_num_seeds(cache, blocks, declared.values())
        names = {metadata_path(states_path(state)): state.name for state in self.states}
        for path, value in {
            "zarr.json": root_metadata(cache.recipe, cache.stored_layout),
            "states/zarr.json": group_metadata(),
            **{
                metadata_path(states_path(state)): array_metadata(
                    cache.recipe, cache.stored_layout, state, declared.get(state.step, expected)
                )
                for state in self.states
            },
        }.items():
            self.known.add(path)
            try:
                if cache.files.read(path) != pretty_json(value):
                    self._find("damage", path, "differs from what the recipe generates", state=names.get(path))
            except FileNotFoundError:
                self._find("missing", path, "is not there", state=names.get(path))
            except DamagedError as error:
                self._find("damage", path, str(error), state=names.get(path))
        for step, num_seeds in declared.items():
            if num_seeds != expected:
                path = metadata_path(states_path(cache.states[step]))
                problem = f"declares {num_seeds} seeds; by the other arrays and the ledger it is {expected}"
                self._find("damage", path, problem, state=names[path])

    def _block(self, block: int) -> None:
        cache, path = self.cache, record_path(block)
        chunks = {
            states_path(state): chunk_path(states_path(state), block, len(cache.item_shape)) for state in self.states
        }
        self.known |= {path, *(chunks[states_path(state)] for state in self.states if not cache.is_drawn_again(state))}
        self._provenance(block)
        try:
            record = cache.record(block)
        except NotCachedError:
            return  # somebody makes it anew just now
        except DamagedError as error:
            self._find("damage", path, _without_advice(error), block)
            for state in self.states if cache.packed is None else ():
                self._chunk(chunks[states_path(state)], None, block, state.name)
            return
        if block >= MAX_BLOCKS:
            self._find("damage", path, f"no store has more than {MAX_BLOCKS:,} blocks", block)
        self.seals.add(record.record_hash)
        for state in self.states:
            array = states_path(state)
            self._chunk(chunks[array], record.arrays[array], block, state.name)
        for array, expected in record.arrays.items():  # arrays of later versions, conditions for instance
            if not array.startswith("states/"):
                chunk = f"{array}/c/{block}"
                self.known.add(chunk)
                self._chunk(chunk, expected, block, None)

    def _chunk(self, chunk: str, expected: ArrayRecord | None, block: int, state: str | None) -> None:
        """Compare a chunk with its record; without one, with the CRC that it ends with."""
        size = expected.num_bytes if expected else self.cache.layout.block_bytes(self.cache.item_shape) + CRC_BYTES
        try:
            num_bytes, digest, fits_itself = self._hash(chunk, size)
        except FileNotFoundError:
            if expected:
                self._find("missing", chunk, "is not there, but the ledger has it", block, state)
            return
        except NeedsDamagedError:
            return  # what it is predicted from is a finding of its own
        except (CacheError, OSError) as error:
            self._find("damage", chunk, _own_words(error, f"{self.cache.address}/{chunk}"), block, state)
            return
        self.num_bytes += num_bytes
        self.checked(num_bytes)
        if num_bytes != size:
            self._find("damage", chunk, f"has {num_bytes} bytes, the ledger says {size}", block, state)
        elif expected and digest != expected.sha256:
            self._find("damage", chunk, f"its sha256 is {digest[:12]}…, recorded {expected.sha256[:12]}…", block, state)
        elif not expected and not fits_itself:
            self._find("damage", chunk, "its own CRC doesn't fit", block, state)

    def _hash(self, chunk: str, limit: int) -> tuple[int, str, bool]:
        """Size, sha256, and whether the CRC at the end fits: then the CRC of everything is a constant."""
        total, crc = hashlib.sha256(), 0
        with self.cache.source.open(chunk, limit) as file:
            num_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            while num_bytes <= limit and (piece := file.read(_PIECE)):
                total.update(piece)
                crc = google_crc32c.extend(crc, piece)
        return num_bytes, total.hexdigest(), crc == _CRC_OF_ALL

    def _provenance(self, block: int) -> None:
        path = provenance_path(block)
        self.known.add(path)
        try:
            note = self._unseal(path)
            if note.get("block", block) != block or note.keys() & {"arrays", "teacher", "rms"}:
                self._find("damage", path, "is of another block, or another file's", block)
        except FileNotFoundError:
            pass  # outside identity: a copy may come without it
        except (ValueError, DamagedError):
            self._find("damage", path, "is torn or altered", block)

    def _store_provenance(self, path: str) -> None:
        self.known.add(path)
        try:
            note = self._unseal(path)
            if path == TOLERANCE_FILE:
                tolerance_of(self.cache)
            elif note.keys() & {"arrays", "block", "rms"} or not isinstance(note.get("teacher", {}), dict):
                raise ValueError("it is another file's")
        except FileNotFoundError:
            pass
        except (ValueError, DamagedError):
            self._find("damage", path, "is torn or altered")

    def _unseal(self, path: str) -> dict[str, Any]:
        value = unseal(self.cache.source.read(path))
        self.seals.add(value["record_sha256"])
        return value

    def _strays(self, root: Path, listed: set[int]) -> None:
        for path in walk(root):
            if path in self.known or path.endswith(PARTIAL_SUFFIX) or self._is_later_note(path):
                continue  # a write in flight, or one that the next build sweeps
            parts = path.split("/")
            state = parts[1] if parts[0] == "states" and len(parts) > 2 else None
            block = _number(parts[3]) if state and len(parts) > 3 else None
            if parts[0] in ("blocks", "provenance"):
                block = _number(parts[-1].removeprefix("block-").partition(".")[0])
            if block is not None and block not in listed and self._is_being_made(root, block):
                continue
            self._find("stray", path, "is recorded nowhere: left by an interrupted build, or foreign", block, state)

    def _is_later_note(self, path: str) -> bool:
        """Whether it may be provenance that a later version adds: sealed, and no copy of what has its place."""
        folder, _, name = path.rpartition("/")
        try:
            return (
                folder == "provenance"
                and not name.startswith("block-")
                and unseal(self.cache.source.read(path))["record_sha256"] not in self.seals
            )
        except (OSError, ValueError, DamagedError):
            return False

    def _is_being_made(self, root: Path, block: int) -> bool:
        """Whether somebody makes a block, or has done so since the ledger was listed."""
        try:
            if (root / record_path(block)).exists():
                return True
            if not (root / "provenance" / LOCK_FILE).exists():
                return False  # looking changes nothing
            with StoreLocks(root).block(block) as free:
                return not free
        except (OSError, CacheError):  # a read-only copy
            return False


def _has_files(cache: TrajectoryCache, state: State) -> bool:
    root = cache.files.root
    return root is not None and next(walk(root / states_path(state)), None) is not None


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _without_advice(error: DamagedError) -> str:
    return str(error).split(": ", 1)[-1].split(";")[0]


def _own_words(error: Exception, where: str) -> str:
    """What a packed store says of a file, without its address and without advice."""
    text = str(error)
    return text.removeprefix(where).split("; ")[0].strip() if text.startswith(where) else text
