"""The Zarr v3 codec `advkd.packed`: plain Zarr reads `lossless` and `archive` stores wherever advkd is installed.

A chunk of such a store says little by itself: decoding it takes the recipe, the block's seeds and the states before it,
and x_T has no chunk at all. zarr-python tells a codec which chunk of which store it decodes only if the codec is the
array's only one and decodes partially; it is then asked for missing chunks, too. So this codec also checks the CRC at
the end of a chunk file, which `crc32c` does elsewhere.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, StorePath

from advkd.cache.codec.unpacked_source import UnpackedSource
from advkd.cache.errors import CacheError, DamagedError, NotCachedError
from advkd.cache.files.paths import MAX_METADATA_BYTES
from advkd.cache.format.metadata import read_metadata
from advkd.cache.format.source import WholeFileSource, too_large
from advkd.cache.format.zarr_metadata import CRC_BYTES

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

_CHUNK = re.compile(r"(?P<prefix>|.*/)(?P<chunk>states/\d+/c/\d+(/0)*)")


@dataclass(frozen=True)
class PackedCodec(ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin):
    """Decodes chunks of packed stores; `advkd-cache pack` writes them.

    Blocks that were never committed read as the fill value, like missing chunks of a raw store.
    """

    is_fixed_size = False
    configuration: Mapping[str, Any]
    """`codec` and its parameters, as in the store's layout."""
    _opened: list[tuple[Store, str, UnpackedSource]] = field(default_factory=list, compare=False, repr=False)
    """The store that was read last; it keeps the block that it decoded last."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read an entry of `codecs`."""
        return cls(data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        """The entry of `codecs`."""
        return {"name": "advkd.packed", "configuration": dict(self.configuration)}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.configuration,)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Unknown before encoding."""
        raise NotImplementedError

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        raise CacheError("a packed store is read only to Zarr: write it with `advkd-cache pack`")

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        raise CacheError("zarr's codec pipeline doesn't say which chunk this is: use zarr-python's own pipeline")

    async def _decode_partial_single(self, byte_getter: Any, selection: Any, chunk_spec: ArraySpec) -> NDBuffer | None:
        loop = asyncio.get_running_loop()
        # One chunk at a time: each takes several times its size, and neighbours share what the last one decoded.
        chunk = await loop.run_in_executor(_decoder(os.getpid()), self._chunk, byte_getter, loop)
        if chunk is None:
            return None
        dtype = chunk_spec.dtype.to_native_dtype().newbyteorder("<")
        values = np.frombuffer(chunk[:-CRC_BYTES], dtype).reshape(chunk_spec.shape)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values[selection])

    def _chunk(self, at: StorePath, loop: asyncio.AbstractEventLoop) -> bytes | None:
        store, path = at.store, at.path
        if path.startswith("c/") and isinstance(store, LocalStore):  # opened by the array's own folder
            path = f"states/{store.root.name}/{path}"
            store = LocalStore(store.root.parent.parent, read_only=True)
        found = _CHUNK.fullmatch(path)
        if found is None:
            raise CacheError(f"{at}: a packed state needs its whole store: open the group that holds `states`")
        if not self._opened or self._opened[0][:2] != (store, found["prefix"]):
            files = _ZarrFiles(store, found["prefix"], loop)
            recipe, layout = read_metadata(files)
            if layout.packing is None:
                raise DamagedError(f"{files.address} is no packed store, but its array lists the codec advkd.packed")
            self._opened[:] = [(store, found["prefix"], UnpackedSource(files, recipe, layout, 0))]
        source = self._opened[0][2]
        assert isinstance(source.files, _ZarrFiles)
        source.files.loop = loop
        try:
            return source.read(found["chunk"])
        except NotCachedError:
            return None


@functools.cache
def _decoder(process_id: int) -> ThreadPoolExecutor:
    """The thread that decodes, of its own because stores read in the loop's threads meanwhile; a fork has another."""
    return ThreadPoolExecutor(1, "advkd-packed")


class _ZarrFiles(WholeFileSource):
    """The files of a cache in any Zarr store, read from a thread other than the event loop's."""

    def __init__(self, store: Store, prefix: str, loop: asyncio.AbstractEventLoop) -> None:
        self.address = f"{store}/{prefix}".rstrip("/")
        self.loop = loop
        self._store, self._prefix = store, prefix

    def read(self, path: str, limit: int = MAX_METADATA_BYTES) -> bytes:
        """A whole file."""
        get = self._store.get(self._prefix + path, default_buffer_prototype(), RangeByteRequest(0, limit + 1))
        buffer = asyncio.run_coroutine_threadsafe(get, self.loop).result()
        if buffer is None:
            raise FileNotFoundError(f"{self.address}/{path}")
        if len(buffer) > limit:
            raise too_large(f"{self.address}/{path}", limit)
        return buffer.to_bytes()
