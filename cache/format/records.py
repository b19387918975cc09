"""The ledger records of one store, read when they are asked for and checked against the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Generic, TypeVar

from advkd.cache.errors import DamagedError, NotCachedError
from advkd.cache.format.array_record import ArrayRecord
from advkd.cache.format.arrays import required_specs, state_spec
from advkd.cache.format.layout import Layout
from advkd.cache.format.ledger import LedgerRecord, checked_seal, content_digest
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.seeds import seeds_of
from advkd.cache.format.source import Source
from advkd.cache.format.store_paths import record_path, states_path

MAX_RECORDS = 512
"""Kept in memory, a few kilobytes each."""
MAX_FURTHER_ARRAYS = 64
"""Arrays besides the states."""
_OWN_FOLDERS = ("states", "blocks", "provenance")
Record = TypeVar("Record", bound=LedgerRecord[Any])


class Records(Generic[Record]):
    """Ledger records by block.

    Args:
        source: where the store's files come from.
        recipe: the store's recipe.
        layout: the store's layout.
        kind: class of the records.
    """

    def __init__(self, source: Source, recipe: Recipe, layout: Layout, kind: type[Record]) -> None:
        self._source = source
        self._recipe = recipe
        self._layout = layout
        self._kind = kind
        self._names = {states_path(state) for state in layout.states}
        self._state = state_spec(recipe, layout, layout.states[0])  # all are of one size
        self._required = {spec.path: spec for spec in required_specs(recipe, layout.block_size)}
        self._kept = lru_cache(MAX_RECORDS)(self._read)

    def __getitem__(self, block: int) -> Record:
        """The record of a committed block.

        Raises:
            NotCachedError: the block was never committed.
            DamagedError: its record is torn, altered or of another cache.
        """
        return self._kept(block)

    def _read(self, block: int) -> Record:
        try:
            raw = self._source.read(record_path(block))
        except FileNotFoundError:
            raise self._not_committed(block) from None
        return self.decode(block, raw)

    def further_names(self, blocks: Iterable[int]) -> tuple[str, ...]:
        """Paths of the arrays besides the states: the first valid record's, as all blocks have the same.

        Those that the recipe requires where no block has a valid record.
        """
        for block in blocks:
            with suppress(DamagedError, NotCachedError):
                return self[block].further_names
        return tuple(sorted(self._required))

    def decode(self, block: int, raw: bytes) -> Record:
        """A block's record from the bytes of its file.

        Raises:
            DamagedError: it is torn, altered or of another block or cache.
        """
        address = self._source.address
        record = self._kind.parse(raw, block, f"{address}/{record_path(block)}")
        if (record.fingerprint, record.layout_hash) != (self._recipe.fingerprint, self._layout.layout_hash):
            raise DamagedError(f"{address}: the ledger record of block {block} belongs to another cache")
        if not self._fits(record):
            raise DamagedError(
                f"{address}: the ledger record of block {block} doesn't fit the layout; {self._kind.how_to_fix}"
            )
        return record

    def _fits(self, record: Record) -> bool:
        """Whether a record has an entry of the right kind and size for every array that the recipe requires, and others
        only of arrays."""
        if not record.arrays.keys() >= self._names | self._required.keys():
            return False
        for name in self._names:
            entry = record.arrays[name]
            is_packed = not isinstance(entry, ArrayRecord)
            if is_packed != (self._layout.packing is not None) or entry.raw.rounding_max is None:
                return False
            if not self._state.fits(entry.raw):
                return False
        further = record.arrays.keys() - self._names
        return (
            len(further) <= MAX_FURTHER_ARRAYS
            and all(isinstance(record.arrays[name], ArrayRecord) for name in further)
            and all(spec.fits(record.arrays[name].raw) for name, spec in self._required.items())
            and not any(name.partition("/")[0] in _OWN_FOLDERS for name in further)
        )

    def raw(self, blocks: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """The records of some committed blocks, as they are in their files.

        Raises:
            NotCachedError: a block was never committed.
        """
        raws = self._source.read_many([record_path(block) for block in blocks])
        for block, raw in zip(blocks, raws, strict=True):
            if raw is None:
                raise self._not_committed(block)
            yield block, raw

    def hash_of(self, block: int, raw: bytes) -> str:
        """The hash that a block's record carries, checked without parsing it.

        Raises:
            DamagedError: the record is torn, altered or of another block or cache.
        """
        where = f"{self._source.address}/{record_path(block)}"
        return checked_seal(raw, block, self._recipe.fingerprint, self._layout.layout_hash, where)

    def digest_of(self, blocks: Sequence[int]) -> str:
        """The content digest of some committed blocks, each record checked against its own hash.

        Raises:
            NotCachedError: a block was never committed.
            DamagedError: a record is torn or altered.
        """
        return content_digest([(block, self.hash_of(block, raw)) for block, raw in self.raw(blocks)])

    def _not_committed(self, block: int) -> NotCachedError:
        seeds = seeds_of(block, self._layout.block_size)
        return NotCachedError(
            f"{self._source.address} does not hold seeds {seeds.start}:{seeds.stop}; "
            f"the `advkd-cache build` command that made it adds them, with `--seeds {seeds.start}:{seeds.stop}`"
        )
