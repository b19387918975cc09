"""Two zarr stores: a cache's committed blocks for reading, and a local folder that is written durably.

zarr-python implements Zarr; these add what its own stores lack. They make a missing block an error instead of NaN and
a written chunk survive a power cut.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.storage import LocalStore, MemoryStore

from advkd.cache.errors import NotCachedError
from advkd.cache.files.durable import write_verified
from advkd.cache.files.paths import safe_target
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.arrays import store_metadata
from advkd.cache.format.store_paths import metadata_path, states_path
from advkd.cache.read.contents import Contents

_CHUNK = re.compile(r"(.+)/c/(\d+)(/0)*")


class CommittedFiles(Mapping[str, Buffer]):
    """The files of a cache's raw Zarr hierarchy by path, read when they are asked for.

    Metadata are those of the arrays that are present.

    Args:
        cache: local, remote or packed.
        fill_uncommitted: whether blocks that were never committed count as missing chunks, which read as NaN.
    """

    def __init__(self, cache: Contents, *, fill_uncommitted: bool = False) -> None:
        self._cache = cache
        self._fill_uncommitted = fill_uncommitted
        self._arrays = {spec.path: spec for spec in cache.arrays}
        files = store_metadata(cache.recipe, cache.layout, cache.further, cache.num_seeds)
        absent = {metadata_path(states_path(state)) for state in cache.layout.states if state.step not in cache.states}
        self._metadata = {path: pretty_json(value) for path, value in files.items() if path not in absent}

    def __getitem__(self, path: str) -> Buffer:
        """A file.

        Raises:
            KeyError: the hierarchy has no such file.
            NotCachedError: the chunk's block was never committed.
            DamagedError: the chunk or its ledger record is missing or damaged.
        """
        if path in self._metadata:
            return cpu.Buffer.from_bytes(self._metadata[path])
        found = _CHUNK.fullmatch(path)
        if found is None or found[1] not in self._arrays:
            raise KeyError(path)
        try:
            return cpu.Buffer.from_bytes(self._cache.array_bytes(self._arrays[found[1]], int(found[2])))
        except NotCachedError:
            if self._fill_uncommitted:
                raise KeyError(path) from None
            raise

    def __contains__(self, path: object) -> bool:
        return any(path == found for found in self)

    def __iter__(self) -> Iterator[str]:
        yield from self._metadata
        for spec in self._arrays.values():
            for block in self._cache.blocks:
                yield spec.chunk_path(block)

    def __len__(self) -> int:
        return len(self._metadata) + len(self._arrays) * len(self._cache.blocks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CommittedFiles) and self._identity == other._identity

    @property
    def _identity(self) -> tuple[Any, ...]:
        return self._cache.address, self._fill_uncommitted, self._metadata


class CommittedStore(MemoryStore):
    """A read-only store over `CommittedFiles`."""

    def __init__(self, store_dict: Any, *, read_only: bool = True) -> None:
        super().__init__(store_dict, read_only=True)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """A file or part of one; raises as `CommittedFiles` does. Others can be read meanwhile."""
        return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)


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
