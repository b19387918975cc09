"""Writing a cache: whole blocks, each committed by its ledger record, beside other writers.

A block's life: claim it → skip if committed → write each array's chunk whole → read back and hash → fsync → ledger
record. A crash at any moment loses the block in flight and nothing else. For the locks see `advkd.cache.files.locks`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import CacheError, DamagedError, NotCachedError
from advkd.cache.files.durable import PARTIAL_SUFFIX, link_or_copy, remove_durably, write_atomically, write_verified
from advkd.cache.files.locks import StoreLocks
from advkd.cache.files.paths import safe_target
from advkd.cache.format.array_record import ArrayRecord, Rounding
from advkd.cache.format.arrays import ArraySpec, state_spec
from advkd.cache.format.condition import LABELS_PATH
from advkd.cache.format.ledger import BlockRecord, checked_seal
from advkd.cache.format.seeds import blocks_of, seeds_of
from advkd.cache.format.source import LocalSource
from advkd.cache.format.store_paths import provenance_path, record_path, states_path
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.divide import Outcome
from advkd.cache.write.folder import PARTIAL, OnMismatch, StoreFolder

__all__ = ["CacheWriter", "OnMismatch"]
_NO_ARRAYS: Mapping[str, npt.NDArray[Any]] = {}


class CacheWriter(StoreFolder):
    """A store opened for writing blocks of one recipe in one layout."""

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Every array of the store: the states, then the others."""
        return (*(state_spec(self.recipe, self.layout, state) for state in self.layout.states), *self.further)

    def claim(self, block: int) -> AbstractContextManager[bool]:
        """Hold one block while it is made; False if another process makes it now."""
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
            is_present: whether what is there will do, called under the claim; `is_committed` if None.

        Returns:
            "made"; "present" if it was there; "busy" if another process makes it now.
        """
        with ExitStack() as claim:
            if not claim.enter_context(self.claim(block)):
                return "busy"
            if self.is_committed(block) if is_present is None else is_present():
                return "present"
            make(claim)
        return "made"

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
        specs = {spec.path: spec for spec in (*self.arrays, *cache.further)}
        return [block for block in cache.blocks if block in wanted and not self._is_whole(cache, block, specs)]

    def give_up_incomplete(self, seeds: range) -> None:
        """Take blocks covering `seeds` of which a file is not here out of the ledger, so that they are made again.

        Raises:
            LockedError: another process is writing.
        """
        if self.incomplete(seeds):
            with StoreLocks(self.path).alone():
                for block in self.incomplete(seeds):
                    remove_durably(self.path / record_path(block))

    def _is_whole(self, cache: TrajectoryCache, block: int, specs: Mapping[str, ArraySpec]) -> bool:
        try:
            arrays = cache.record(block).arrays
        except (DamagedError, NotCachedError):
            return True  # not committed at all, or another process makes it again just now
        return all(name in specs and self._holds(specs[name], block, entry.num_bytes) for name, entry in arrays.items())

    def _holds(self, spec: ArraySpec, block: int, num_bytes: int) -> bool:
        """Whether a block's chunk file is here, of the recorded size."""
        try:
            return (self.path / spec.chunk_path(block)).stat().st_size == num_bytes
        except OSError:  # the file or a part of its path is not there, or something else is
            return False

    def commit(
        self,
        block: int,
        states: Mapping[int, npt.NDArray[np.floating[Any]]],
        further: Mapping[str, npt.NDArray[Any]] = _NO_ARRAYS,
        roundings: Mapping[int, Rounding] | None = None,
    ) -> BlockRecord:
        """Write one block, every array of all its seeds, and commit it.

        Args:
            block: its number.
            states: by solver steps done, values in stored units as they were computed, float32 or the stored
                dtype, shape (block_size, *item_shape).
            further: the values of each of the writer's further arrays by path, shape (rows of a block, *its item
                shape), in its dtype; without labels that follow from the recipe.
            roundings: by solver steps done, what rounding to the stored dtype has changed; None if `states` are as
                they were computed.

        Raises:
            CacheError: the values have another shape, are not finite, or read back differently.
            OSError: the disk is full or failing; nothing of the block counts then.
        """
        self._prepare(block)
        if self.recipe.condition is not None and not self.recipe.condition.stored:
            labels = self.recipe.condition.labels_of(seeds_of(block, self.layout.block_size))
            further = {**further, LABELS_PATH: labels}
        if further.keys() != {spec.path for spec in self.further}:
            raise CacheError(f"block {block} comes with the arrays {sorted(further)}, expected those of the store")
        values = {states_path(state): states[state.step] for state in self.layout.states} | dict(further)
        known = {states_path(state): roundings[state.step] for state in self.layout.states} if roundings else {}
        arrays = {spec.path: self._write(spec, block, values[spec.path], known.get(spec.path)) for spec in self.arrays}
        return self._record(block, arrays)

    def _write(self, spec: ArraySpec, block: int, values: npt.NDArray[Any], rounding: Rounding | None) -> ArrayRecord:
        """Write the chunk of one array and read it back."""
        computed, dtype = np.ascontiguousarray(values), np.dtype(spec.dtype).newbyteorder("<")
        shape, is_state = (spec.block_size, *spec.item_shape), spec not in self.further
        if computed.shape != shape or not (is_state or computed.dtype == dtype):
            raise CacheError(
                f"{spec.path} of block {block} has {computed.dtype} values of shape {computed.shape}, expected "
                f"{spec.dtype} of shape {shape}"
            )
        with np.errstate(over="ignore"):  # values that become infinite are refused below
            stored = computed.astype(dtype, copy=False)
        if not (np.isfinite(stored.min()) and np.isfinite(stored.max())):
            seeds = seeds_of(block, self.layout.block_size)
            raise CacheError(
                f"{spec.path} of seeds {seeds.start}:{seeds.stop} has {np.count_nonzero(~np.isfinite(stored))} values "
                "that are not finite; the block was not written"
            )
        path = self._target(spec.chunk_path(block))
        self._write_through_zarr(spec, block, stored)
        del stored
        data = path.read_bytes()
        written = np.frombuffer(data, dtype, computed.size)
        return ArrayRecord.of(data, written, (rounding or computed) if is_state else None)

    def _write_through_zarr(self, spec: ArraySpec, block: int, values: npt.NDArray[Any]) -> None:
        """Write one whole chunk through zarr, durably and read back.

        The array's metadata are those of its description, so that what someone put into the store's own `zarr.json`
        has no say in it.
        """
        from zarr import Array, AsyncArray
        from zarr.storage import StorePath

        from advkd.cache.read.zarr_store import DurableStore

        rows = seeds_of(block, spec.block_size)
        metadata: Any = spec.metadata(rows.stop * spec.seeds_per_row)
        at = StorePath(DurableStore(self.path), spec.path)
        Array(AsyncArray(metadata, at, {"write_empty_chunks": True}))[rows.start : rows.stop] = values

    def adopt(self, block: int, cache: TrajectoryCache, linked: Callable[[str], None] = lambda how: None) -> None:
        """Commit a block of another store of the same fingerprint by linking its files, or copying where that fails.

        States that this layout has not are left out. Files of a remote store come by way of the scratch folder.

        Args:
            block: its number.
            cache: the other store, of the same block size, dtype, encoding and further arrays.
            linked: called with how each file came: "hard link", "reflink" or "copy".

        Raises:
            DamagedError: a file of the other store is missing or of another size than recorded, or the block has other
                arrays than the store's other blocks.
        """
        records = cache.array_records(block)
        self._prepare(block)
        for spec in self.arrays:
            linked(link_or_copy(cache.array_file(spec, block), self._target(spec.chunk_path(block))))
        self._write_provenance(block, cache.provenance(block))
        self._record(block, {spec.path: records[spec.path] for spec in self.arrays})

    def restore(self, block: int, chunks: Iterable[tuple[str, bytes]], record: BlockRecord, provenance: bytes) -> None:
        """Commit a block whose chunk files are at hand as bytes.

        Args:
            block: its number.
            chunks: path and bytes of each array of the record.
            record: the block's entries for the ledger.
            provenance: of the block; none if empty.

        Raises:
            DamagedError: a chunk is not what the record says; the block is not committed.
            CacheError: a file reads back differently.
        """
        self._prepare(block)
        specs = {spec.path: spec for spec in self.arrays}
        if record.arrays.keys() != specs.keys():
            raise DamagedError(f"the record of block {block} has other arrays than those of other blocks")
        for array, data in chunks:
            if hashlib.sha256(data).hexdigest() != record.arrays[array].sha256:
                raise DamagedError(f"{array} of block {block} differs from what was recorded; it was not written")
            write_verified(self._target(specs[array].chunk_path(block)), data)
        self._write_provenance(block, provenance)
        self._record(block, record.arrays)

    def _prepare(self, block: int) -> None:
        """Take a block out of the ledger before it is made anew, so that no power cut leaves it over other chunks."""
        remove_durably(safe_target(self.path, record_path(block)))

    def _target(self, chunk: str) -> Path:
        """Where a chunk is to be written, swept of what a killed writer left there."""
        path = safe_target(self.path, chunk)
        # Only this file's: chunks of other blocks, which others write now, may lie in the same folder.
        for left in path.parent.glob(f"{path.name}.*{PARTIAL_SUFFIX}"):
            if PARTIAL.fullmatch(left.name):
                left.unlink(missing_ok=True)
        return path

    def _write_provenance(self, block: int, note: bytes) -> None:
        if note:
            write_atomically(safe_target(self.path, provenance_path(block)), [note])

    def _record(self, block: int, arrays: dict[str, ArrayRecord]) -> BlockRecord:
        record = BlockRecord(
            block=block, fingerprint=self.recipe.fingerprint, layout_hash=self.layout.layout_hash, arrays=arrays
        )
        record.write(self.path)
        return record
