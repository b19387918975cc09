"""Writing a cache: whole blocks, each committed by its ledger record, beside other writers.

A block's life: claim it → skip if committed → write each state whole → read back and hash → fsync → ledger record. A
crash at any moment loses the block in flight and nothing else. `advkd.cache.files.locks` says who may do what at once.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import CacheError, DamagedError, MismatchError, NotACacheError
from advkd.cache.files.durable import (
    PARTIAL_SUFFIX,
    fsync_folder,
    holds_something,
    link_or_copy,
    write_atomically,
    write_json,
    write_verified,
)
from advkd.cache.files.locks import StoreLocks
from advkd.cache.files.paths import safe_target, walk
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.differences import differences
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.ledger import ArrayRecord, BlockRecord, checked_seal
from advkd.cache.format.metadata import read_metadata
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.seeds import blocks_of, seeds_of
from advkd.cache.format.source import LocalSource, check_num_blocks
from advkd.cache.format.store_paths import chunk_path, provenance_path, record_path, states_path
from advkd.cache.format.zarr_metadata import array_metadata, metadata_files
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.divide import Outcome

OnMismatch = Literal["stop", "set-aside"]
SWEEP_SECONDS = 2.0
_PARTIAL = re.compile(r".*(\.[0-9a-f]{12}\.partial)")


class CacheWriter:
    """A store opened for writing one recipe in one layout."""

    def __init__(self, path: Path, recipe: Recipe, layout: Layout) -> None:
        self.path = path
        self.recipe = recipe
        self.layout = layout
        self.set_aside: Path | None = None
        """Where a store of another recipe was moved to make room, if one was."""

    @classmethod
    def open(cls, path: str | Path, recipe: Recipe, layout: Layout, on_mismatch: OnMismatch = "stop") -> Self:
        """A writer whose store is there: see `begin`."""
        writer = cls(Path(path), recipe, layout)
        writer.begin(on_mismatch)
        return writer

    def begin(self, on_mismatch: OnMismatch = "stop") -> None:
        """Make the store unless it is there; one of another recipe or layout is renamed first, if that was asked for.

        Raises:
            MismatchError: a cache of another recipe or layout is there, and `on_mismatch` is "stop".
            NotACacheError: something that is no cache is there.
            LockedError: the store is to be set aside, but somebody writes to it.
        """
        if not self.continues(on_mismatch) and self.exists():
            # Alone with the old store: a builder that still writes it must not find another in its place.
            with StoreLocks(self.path).alone():
                self.set_aside = _set_aside(self.path)
        if not self.exists():
            self._create()

    def continues(self, on_mismatch: OnMismatch) -> bool:
        """Whether a store of this very recipe and layout is there.

        Raises:
            MismatchError: another one is, and `on_mismatch` is "stop".
        """
        problem = self.mismatch()
        if problem and on_mismatch == "stop":
            raise MismatchError(
                f"{self.path} was built otherwise ({problem}): choose another --out, "
                "or --on-mismatch set-aside renames it"
            )
        return problem is None and self.exists()

    def exists(self) -> bool:
        """Whether a store is there; an empty folder counts as nothing."""
        return holds_something(self.path)

    def mismatch(self) -> str | None:
        """In words, how the store that is there differs from what is to be written; None if it doesn't.

        Raises:
            NotACacheError: something that is no cache is there.
        """
        if not self.exists():
            return None
        found_recipe, found_layout = read_metadata(LocalSource(self.path))
        lines = differences(found_recipe.to_json(), self.recipe.to_json())
        lines += differences(found_layout.to_json(), self.layout.to_json())
        if not lines:
            return None
        return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")

    def _create(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
        try:
            for name, value in metadata_files(self.recipe, self.layout, 0).items():
                write_json(partial / name, value)
            partial.rename(self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not self.exists():
                raise
            if self.mismatch():  # somebody else made another store there just now
                raise NotACacheError(
                    f"{self.path} appeared while it was being created; run the command again"
                ) from None
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync_folder(self.path.parent)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store for adding blocks, beside others who do the same.

        Raises:
            LockedError: somebody moves or repairs it.
        """
        with StoreLocks(self.path).present(self._sweep):
            yield

    def claim(self, block: int) -> AbstractContextManager[bool]:
        """Hold one block while it is made; False if somebody else makes it now."""
        return StoreLocks(self.path).block(block)

    def make(
        self, block: int, make: Callable[[ExitStack], object], is_present: Callable[[], bool] | None = None
    ) -> Outcome:
        """Make one block unless it is there: claim it, look whether it is committed, make and commit it.

        Whoever makes blocks goes through here (building, merging, packing), and `advkd.cache.write.divide` asks again
        for busy ones. Only to be called while `writing`.

        Args:
            block: its number.
            make: makes the block and commits it (`commit`, `adopt`, `restore`). It gets the claim, which is given up
                when it returns; to commit later, in another thread for instance, it takes the claim over with
                `held = claim.pop_all()` and commits within `with held:`.
            is_present: whether what is there will do, asked under the claim; `is_committed` if None.

        Returns:
            "made"; "present" if it was there; "busy" if somebody else makes it now.
        """
        with ExitStack() as claim:
            if not claim.enter_context(self.claim(block)):
                return "busy"
            if self.is_committed(block) if is_present is None else is_present():
                return "present"
            make(claim)
        return "made"

    def _sweep(self) -> None:
        """Remove what a killed writer left half-written; only called while nobody else writes.

        Others wait meanwhile, so a large store isn't walked to its end: making a block sweeps its own folders too.
        """
        deadline = time.monotonic() + SWEEP_SECONDS
        for path in walk(self.path):
            if _PARTIAL.fullmatch(path):
                (self.path / path).unlink(missing_ok=True)
            if time.monotonic() > deadline:
                break
        for beside in self.path.parent.glob("*" + PARTIAL_SUFFIX):  # of who was killed while creating the store
            found = _PARTIAL.fullmatch(beside.name)
            if found and beside.name == self.path.name + found[1]:
                shutil.rmtree(beside, ignore_errors=True)

    def missing(self, seeds: range) -> list[int]:
        """Blocks covering `seeds` that are not committed: no record, a torn or altered one, or one of another recipe.

        All of them where no store is there yet.
        """
        return [block for block in blocks_of(seeds, self.layout.block_size) if not self.is_committed(block)]

    def is_committed(self, block: int) -> bool:
        """Whether a block has a valid record."""
        source, path = LocalSource(self.path), record_path(block)
        try:
            checked_seal(source.read(path), block, self.recipe.fingerprint, self.layout.layout_hash, path)
        except (FileNotFoundError, DamagedError):
            return False
        return True

    def incomplete(self, seeds: range | None = None) -> list[int]:
        """Committed blocks, all or those covering `seeds`, of which a file is not here or has another size."""
        cache = TrajectoryCache.open(self.path)
        wanted = set(cache.blocks if seeds is None else blocks_of(seeds, self.layout.block_size))
        return [block for block in cache.blocks if block in wanted and not self._is_whole(cache, block)]

    def give_up_incomplete(self, seeds: range) -> None:
        """Take blocks covering `seeds` of which a file is not here out of the ledger, so that they are made again.

        Raises:
            LockedError: somebody is writing.
        """
        if self.incomplete(seeds):
            with StoreLocks(self.path).alone():
                for block in self.incomplete(seeds):
                    (self.path / record_path(block)).unlink()

    def _is_whole(self, cache: TrajectoryCache, block: int) -> bool:
        try:
            arrays = cache.record(block).arrays
        except DamagedError:
            return True  # not committed at all
        for state in self.layout.states:
            file = self.path / chunk_path(states_path(state), block, len(self.recipe.item_shape))
            try:
                if file.stat().st_size != arrays[states_path(state)].num_bytes:
                    return False
            except OSError:  # not there, or a file or a loop of symlinks in its folder's place
                return False
        return True

    def grow(self, seeds: range) -> None:
        """Let the arrays declare at least these seeds, widened to whole blocks. Never shrinks.

        Raises:
            LockedError: somebody else is at it, and doesn't end.
        """
        wanted = blocks_of(seeds, self.layout.block_size).stop * self.layout.block_size
        check_num_blocks(str(self.path), wanted, self.layout.block_size)
        with StoreLocks(self.path).metadata():
            num_seeds = max(wanted, TrajectoryCache.open(self.path).num_seeds)
            for name, value in metadata_files(self.recipe, self.layout, num_seeds).items():
                path, data = safe_target(self.path, name), pretty_json(value)
                if not self._is_file(name, data):
                    write_atomically(path, [data])

    def _is_file(self, name: str, data: bytes) -> bool:
        try:
            return LocalSource(self.path).read(name) == data
        except (FileNotFoundError, DamagedError):
            return False

    def commit(self, block: int, states: Mapping[int, npt.NDArray[np.floating[Any]]]) -> BlockRecord:
        """Write one block, every recorded state of all its seeds, and commit it.

        Args:
            block: its number.
            states: by solver steps done, values in stored units as they were computed, float32 or the stored
                dtype, shape (block_size, *item_shape).

        Raises:
            CacheError: the values have another shape, are not finite, or read back differently.
            OSError: the disk is full or failing; nothing of the block counts then.
        """
        self._prepare(block)
        arrays: dict[str, ArrayRecord] = {}
        shape = (self.layout.block_size, *self.recipe.item_shape)
        for state in self.layout.states:
            computed = np.ascontiguousarray(states[state.step])
            if computed.shape != shape:
                raise CacheError(f"state {state.name} of block {block} has shape {computed.shape}, expected {shape}")
            with np.errstate(over="ignore"):  # values that become infinite are refused below
                stored = computed.astype(np.dtype(self.layout.dtype).newbyteorder("<"))
            if not (np.isfinite(stored.min()) and np.isfinite(stored.max())):
                seeds = seeds_of(block, self.layout.block_size)
                raise CacheError(
                    f"state {state.name} of seeds {seeds.start}:{seeds.stop} has "
                    f"{np.count_nonzero(~np.isfinite(stored))} values that are not finite; the block was not written"
                )
            path = self._chunk(state.name, block)
            self._write_values(state, block, stored)
            del stored
            data = path.read_bytes()
            written = np.frombuffer(data, np.dtype(self.layout.dtype).newbyteorder("<"), computed.size)
            arrays[states_path(state)] = ArrayRecord.of(data, written, computed)
            del data, written
        return self._record(block, arrays)

    def _write_values(self, state: State, block: int, values: npt.NDArray[Any]) -> None:
        """Write one whole chunk through zarr, durably and read back.

        The array's metadata are those that the recipe generates, so that what someone put into the store's own
        `zarr.json` has no say in it.
        """
        from zarr import Array, AsyncArray
        from zarr.storage import StorePath

        from advkd.cache.read.zarr_store import DurableStore

        seeds = seeds_of(block, self.layout.block_size)
        metadata: Any = array_metadata(self.recipe, self.layout, state, seeds.stop)
        at = StorePath(DurableStore(self.path), states_path(state))
        Array(AsyncArray(metadata, at, {"write_empty_chunks": True}))[seeds.start : seeds.stop] = values

    def adopt(self, block: int, cache: TrajectoryCache, linked: Callable[[str], None] = lambda how: None) -> None:
        """Commit a block of another store of the same fingerprint by linking its files, or copying where that fails.

        States that this layout has not are left out. Files of a remote store come by way of the scratch folder.

        Args:
            block: its number.
            cache: the other store, of the same block size, dtype and encoding.
            linked: hears how each file came: "hard link", "reflink" or "copy".

        Raises:
            DamagedError: a file of the other store is missing or of another size than recorded.
        """
        self._prepare(block)
        arrays = {}
        for state in self.layout.states:
            path = self._chunk(state.name, block)
            linked(link_or_copy(cache.chunk_file(state.step, block), path))
            arrays[states_path(state)] = cache.chunk(state.step, block)[1]
        try:
            provenance = cache.source.read(provenance_path(block))
        except FileNotFoundError:
            provenance = b""  # a copy without it
        if provenance:
            write_atomically(safe_target(self.path, provenance_path(block)), [provenance])
        self._record(block, arrays)

    def restore(
        self, block: int, chunks: Iterable[tuple[State, bytes]], record: BlockRecord, provenance: bytes
    ) -> None:
        """Commit a block whose chunk files are at hand as bytes.

        Args:
            block: its number.
            chunks: of every state of the layout.
            record: what the ledger will say of them.
            provenance: of the block; none if empty.

        Raises:
            DamagedError: a chunk is not what the record says; the block is not committed.
            CacheError: a file reads back differently.
        """
        self._prepare(block)
        for state, data in chunks:
            path = self._chunk(state.name, block)
            if hashlib.sha256(data).hexdigest() != record.arrays[states_path(state)].sha256:
                raise DamagedError(f"state {state.name} of block {block} is not what was recorded; it was not written")
            write_verified(path, data)
        if provenance:
            write_atomically(safe_target(self.path, provenance_path(block)), [provenance])
        self._record(block, record.arrays)

    def _prepare(self, block: int) -> None:
        """A block that is made anew doesn't exist meanwhile."""
        safe_target(self.path, record_path(block)).unlink(missing_ok=True)

    def _chunk(self, name: str, block: int) -> Path:
        path = safe_target(self.path, chunk_path(f"states/{name}", block, len(self.recipe.item_shape)))
        for left in path.parent.glob(f"*{PARTIAL_SUFFIX}"):
            if _PARTIAL.fullmatch(left.name):
                left.unlink()
        return path

    def _record(self, block: int, arrays: dict[str, ArrayRecord]) -> BlockRecord:
        record = BlockRecord(
            block=block, fingerprint=self.recipe.fingerprint, layout_hash=self.layout.layout_hash, arrays=arrays
        )
        record.write(self.path)
        return record


def _set_aside(path: Path) -> Path:
    """Rename a store out of the way, never over anything."""
    recipe, layout = read_metadata(LocalSource(path))
    label = f"{path.stem}.stale-{recipe.fingerprint[:8]}-{layout.layout_hash[:4]}"
    target = path.with_name(f"{label}{path.suffix}")
    attempt = 1
    while target.exists():
        attempt += 1
        target = path.with_name(f"{label}.{attempt}{path.suffix}")
    path.rename(target)
    fsync_folder(path.parent)
    return target
