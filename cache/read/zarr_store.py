"""Two zarr stores: a cache's committed blocks for reading, and a local folder that is written durably.

zarr-python implements Zarr; these add what its own stores lack. They make a missing block an error instead of NaN and
a written chunk survive a power cut.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Protocol

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from advkd.cache.errors import NotCachedError
from advkd.cache.files.durable import write_verified
from advkd.cache.files.paths import safe_target
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.arrays import ArraySpec, store_metadata
from advkd.cache.format.layout import Layout
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.store_paths import metadata_path, states_path

_CHUNK = re.compile(r"(.+)/c/(\d+)(/0)*")


class Cache(Protocol):
    """What a `TrajectoryCache` has that reading it through zarr takes."""

    recipe: Recipe
    layout: Layout
    num_seeds: int

    @property
    def address(self) -> str: ...  # noqa: D102

    @property
    def blocks(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def arrays(self) -> tuple[ArraySpec, ...]: ...  # noqa: D102

    def array_bytes(self, spec: ArraySpec, block: int) -> bytes: ...  # noqa: D102


class CommittedStore(Store):
    """The raw hierarchy of a cache, read only: local, remote and packed stores look alike.

    Metadata are those of the arrays that are present. Chunks are checked against the ledger.

    Args:
        cache: the store.
        fill_uncommitted: whether a block that was never committed reads as the fill value, NaN, instead of raising.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, cache: Cache, *, fill_uncommitted: bool = False) -> None:
        super().__init__(read_only=True)
        self._cache = cache
        self._fill_uncommitted = fill_uncommitted
        self._arrays = {spec.path: spec for spec in cache.arrays}
        further = tuple(spec for spec in cache.arrays if not spec.path.startswith("states/"))
        files = store_metadata(cache.recipe, cache.layout, further, cache.num_seeds)
        absent = {metadata_path(states_path(state)) for state in cache.layout.states} - {
            spec.metadata_path for spec in cache.arrays
        }
        self._metadata = {path: pretty_json(value) for path, value in files.items() if path not in absent}

    def __eq__(self, other: object) -> bool:
        """Whether it is the same cache, read in the same way."""
        if not isinstance(other, CommittedStore):
            return NotImplemented
        return (self._cache.address, self._fill_uncommitted) == (other._cache.address, other._fill_uncommitted)

    def __repr__(self) -> str:
        """The address."""
        return f"CommittedStore({self._cache.address!r})"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """A `zarr.json`, a chunk, or None for any other key.

        Raises:
            NotCachedError: the chunk's block was never committed.
            DamagedError: the chunk or its ledger record is missing or damaged.
        """
        data = self._metadata.get(key)
        if data is None:
            data = await asyncio.to_thread(self._chunk, key)
        return None if data is None else prototype.buffer.from_bytes(_part(data, byte_range))

    def _chunk(self, key: str) -> bytes | None:
        found = _CHUNK.fullmatch(key)
        if found is None or found[1] not in self._arrays:
            return None
        try:
            return self._cache.array_bytes(self._arrays[found[1]], int(found[2]))
        except NotCachedError:
            if self._fill_uncommitted:
                return None
            raise

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Parts of some values."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether a key is listed."""
        return key in self._metadata or key in self._chunk_keys()

    async def set(self, key: str, value: Buffer) -> None:
        """Raise ValueError: the store is read only."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Raise ValueError: the store is read only."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """Every `zarr.json` and every chunk of a committed block."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """The keys that begin with a prefix."""
        for key in (*self._metadata, *self._chunk_keys()):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names right below a prefix."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        keys = [key async for key in self.list_prefix(folder)]
        for name in dict.fromkeys(key.removeprefix(folder).split("/")[0] for key in keys):
            yield name

    def _chunk_keys(self) -> Iterator[str]:
        for spec in self._arrays.values():
            for block in self._cache.blocks:
                yield spec.chunk_path(block)


class DurableStore(LocalStore):
    """A folder in which each value is written whole or not at all, survives a power cut, and is read back."""

    async def set(self, key: str, value: Buffer) -> None:
        """Write a value."""
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a value.

        Raises:
            DamagedError: the key leads through a symlink.
            CacheError: the file reads back differently.
        """
        self._check_writable()
        write_verified(safe_target(self.root, key), value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a value unless there is one."""
        await Store.set_if_not_exists(self, key, value)


def _part(data: bytes, byte_range: ByteRequest | None) -> bytes:
    match byte_range:
        case None:
            return data
        case RangeByteRequest(start, end):
            return data[start:end]
        case OffsetByteRequest(offset):
            return data[offset:]
        case SuffixByteRequest(suffix):
            return data[max(0, len(data) - suffix) :]
    raise TypeError(f"Unexpected byte_range, got {byte_range}.")
