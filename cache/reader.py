"""Reading a cache: states by seed, memory-mapped, checked against the ledger as they are touched.

A chunk file of our layout is the C-order array followed by a CRC, so a map of it reads random mini-batches some
80 times faster than the Zarr API (CRC checks included where a segment is touched for the first time). Readers obey
the ledger: an uncommitted seed is an error, never zeros or NaN.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import CacheError, CacheNotFoundError, DamagedError, NotACacheError, NotCachedError
from advkd.cache.layout import (
    CRC_BYTES,
    FORMAT,
    array_metadata,
    chunk_path,
    metadata_path,
    record_path,
    seeds_of,
    states_path,
)
from advkd.cache.ledger import SEGMENT_BYTES, ArrayRecord, BlockRecord, checked_seal, content_digest, crc32c
from advkd.cache.parse import in_line, parse_json
from advkd.cache.paths import open_file
from advkd.cache.recipe import MAX_BLOCK_BYTES, Layout, Recipe, State
from advkd.cache.scratch import Scratch, default_scratch
from advkd.cache.source import LocalSource, Source, check_num_blocks, open_source

if TYPE_CHECKING:
    import dask.array

Values = npt.NDArray[Any]
MAX_OPEN_MAPS = 128
_MOST_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
if _MOST_FILES != resource.RLIM_INFINITY:  # 256 on a Mac; several caches may be read at once
    MAX_OPEN_MAPS = min(MAX_OPEN_MAPS, max(8, _MOST_FILES // 8))
_Identity = tuple[int, int, int]
"""Device, inode and time of change of a file: what was checked of another doesn't count for it."""
_HOW_TO_MEND = (
    "pull the block anew, or run `advkd-cache verify --repair` and `advkd-cache build` with the same settings"
)
_NOT_JSON_OF_OURS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError)


def read_metadata(source: Source) -> tuple[Recipe, Layout]:
    """Read and check a store's root metadata.

    Raises:
        CacheNotFoundError: nothing is at that URL.
        NotACacheError: something else is there, or a newer format.
        DamagedError: its own hashes disagree.
    """
    address = source.address
    try:
        value = parse_json(source.read("zarr.json"))["attributes"]["advkd"]
        found_format = value["format"]
    except DamagedError as error:
        raise NotACacheError(f"{address} is not a trajectory cache ({error}); nothing was changed") from None
    except (OSError, *_NOT_JSON_OF_OURS) as error:
        if isinstance(error, FileNotFoundError) and not isinstance(source, LocalSource):
            raise CacheNotFoundError(f"no cache at {address}: there is no zarr.json") from None
        raise NotACacheError(
            f"{address} is not a trajectory cache (no zarr.json of one); nothing was changed"
        ) from None
    if type(found_format) is not int or found_format != FORMAT:
        raise NotACacheError(
            f"{address}/zarr.json has cache format {in_line(found_format, 20)}; this advkd reads format {FORMAT}: "
            "upgrade advkd"
        )
    if isinstance(value.get("layout"), dict) and "encoding" not in value["layout"]:
        raise NotACacheError(
            f"{address}/zarr.json was written before format 1 was settled: `advkd-cache upgrade {address}` rewrites "
            "the metadata and keeps the data"
        )
    try:
        recipe, layout = Recipe.from_json(value["recipe"]), Layout.from_json(value["layout"])
        intact = value["fingerprint"] == recipe.fingerprint and value["layout_hash"] == layout.layout_hash
        intact = intact and layout.block_bytes(recipe.item_shape) <= MAX_BLOCK_BYTES
    except NotACacheError as error:
        raise NotACacheError(f"{address}/zarr.json: {error}") from None
    except _NOT_JSON_OF_OURS:
        intact = False
    if not intact:
        raise DamagedError(f"{address}/zarr.json was altered: its recipe or layout doesn't match its own hash")
    return recipe, layout


class TrajectoryCache:
    """A trajectory cache opened for reading.

    Attributes:
        source: where its bytes come from.
        recipe: what made it.
        layout: which states it holds, how they are stored.
        num_seeds: seeds that the arrays declare; not all of them need to be committed.
        states: the recorded states that are present, by solver steps done.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        layout: Layout,
        num_seeds: int,
        states: dict[int, State],
        scratch: Path | None = None,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.layout = layout
        self.num_seeds = num_seeds
        self.states = states
        self._scratch = None if isinstance(source, LocalSource) else Scratch(source, scratch or default_scratch())
        self._maps: OrderedDict[tuple[int, int], npt.NDArray[np.uint8]] = OrderedDict()
        self._checked: dict[tuple[int, int], tuple[_Identity, npt.NDArray[np.bool_]]] = {}
        self._records: OrderedDict[int, BlockRecord] = OrderedDict()

    @classmethod
    def open(cls, address: str | Path, *, scratch: Path | None = None) -> TrajectoryCache:
        """Open a store; reads only its metadata.

        Args:
            address: a folder, or a URL that fsspec reads (`s3://`, `gs://`, `hf://`, `http(s)://`).
            scratch: folder for chunks of a remote store; `ADVKD_SCRATCH` or the user's cache folder if not given.

        Raises:
            CacheNotFoundError: nothing is there.
            NotACacheError: it is no trajectory cache.
            DamagedError: its metadata contradicts itself.
        """
        source = open_source(address)
        recipe, layout = read_metadata(source)
        num_seeds: int | None = None
        present: dict[int, State] = {}
        paths = [metadata_path(states_path(state)) for state in layout.states]
        for state, path, raw in zip(layout.states, paths, source.read_many(paths), strict=True):
            if raw is None:
                continue  # a partial pull: that state is not here
            try:
                metadata = parse_json(raw)
                declared = metadata["shape"][0]
                fitting = type(declared) is int and metadata == array_metadata(recipe, layout, state, declared)
            except _NOT_JSON_OF_OURS:
                fitting = False
            if not fitting or declared < 0:
                raise DamagedError(f"{source.address}/{path} doesn't fit the recipe in {source.address}/zarr.json")
            check_num_blocks(f"{source.address}/{path}", declared, layout.block_size)
            # A crash while growing leaves some arrays larger; the smaller size is the one that all of them have.
            num_seeds = declared if num_seeds is None else min(num_seeds, declared)
            present[state.step] = state
        return cls(source, recipe, layout, num_seeds or 0, present, scratch)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it anew."""
        return _reopen, (self.address, None if self._scratch is None else self._scratch.folder)

    @property
    def address(self) -> str:
        """The path or URL that it was opened at."""
        return self.source.address

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one state, (C, H, W)."""
        return self.recipe.item_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype that states are stored in."""
        return np.dtype(self.layout.dtype).newbyteorder("<")

    @property
    def is_remote(self) -> bool:
        """Whether it is read through a URL."""
        return self._scratch is not None

    @property
    def num_blocks(self) -> int:
        """Blocks that the arrays declare."""
        return self.num_seeds // self.layout.block_size

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Committed blocks, ascending: those that the ledger has a record of, valid or not."""
        return self.source.blocks(self.num_blocks)

    @property
    def digest(self) -> str:
        """The content digest of all committed blocks."""
        return self.digest_of(self.blocks)

    def digest_of(self, blocks: Sequence[int]) -> str:
        """The content digest of some committed blocks, each record checked against its own hash.

        Raises:
            NotCachedError: a block was never committed.
            DamagedError: a record is torn or altered.
        """
        return content_digest([(block, self.seal(block, raw)) for block, raw in self.raw_records(blocks)])

    def raw_records(self, blocks: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """The ledger records of some committed blocks, as they are in their files.

        Raises:
            NotCachedError: a block was never committed.
        """
        raws = self.source.read_many([record_path(block) for block in blocks])
        for block, raw in zip(blocks, raws, strict=True):
            if raw is None:
                raise self._not_committed(block)
            yield block, raw

    def seal(self, block: int, raw: bytes) -> str:
        """The hash that a block's record carries, checked without parsing it.

        Raises:
            DamagedError: the record is torn, altered or of another block or cache.
        """
        where = f"{self.address}/{record_path(block)}"
        return checked_seal(raw, block, self.recipe.fingerprint, self.layout.layout_hash, where)

    def seeds(self) -> npt.NDArray[np.int64]:
        """Every committed seed, ascending, int64."""
        size = self.layout.block_size
        starts = np.asarray(self.blocks, dtype=np.int64)[:, None] * size
        return (starts + np.arange(size, dtype=np.int64)).ravel()

    def record(self, block: int) -> BlockRecord:
        """The ledger record of a committed block.

        Raises:
            NotCachedError: the block was never committed.
            DamagedError: its record is torn, altered or of another cache.
        """
        if block not in self._records:
            try:
                raw = self.source.read(record_path(block))
            except FileNotFoundError:
                raise self._not_committed(block) from None
            self._records[block] = self.parse_record(block, raw)
            if len(self._records) > 4 * MAX_OPEN_MAPS:
                self._records.popitem(last=False)
        return self._records[block]

    def parse_record(self, block: int, raw: bytes) -> BlockRecord:
        """Read a block's ledger record.

        Raises:
            DamagedError: it is torn, altered or of another block or cache.
        """
        record = BlockRecord.parse(raw, block, f"{self.address}/{record_path(block)}")
        if (record.fingerprint, record.layout_hash) != (self.recipe.fingerprint, self.layout.layout_hash):
            raise DamagedError(f"{self.address}: the ledger record of block {block} belongs to another cache")
        body_bytes = self.layout.block_bytes(self.item_shape)
        for state in self.layout.states:
            array = record.arrays.get(states_path(state))
            expected = (body_bytes + CRC_BYTES, 8 * -(-body_bytes // SEGMENT_BYTES))
            if array is None or (array.num_bytes, len(array.segments)) != expected:
                raise DamagedError(
                    f"{self.address}: the ledger record of block {block} doesn't fit the layout; {_HOW_TO_MEND}"
                )
        return record

    def _not_committed(self, block: int) -> NotCachedError:
        seeds = seeds_of(block, self.layout.block_size)
        return NotCachedError(
            f"{self.address} does not hold seeds {seeds.start}:{seeds.stop}; "
            f"`advkd-cache build --seeds {seeds.start}:{seeds.stop}` adds them"
        )

    def state(self, step: int) -> State:
        """A recorded state that is present, by solver steps done.

        Raises:
            NotCachedError: it isn't here, or never was recorded.
        """
        if step in self.states:
            return self.states[step]
        known = [state.step for state in self.layout.states]
        if step in known:
            raise NotCachedError(
                f"{self.address}: state {step:04d} is not here (a partial copy?): `dvc pull` it, or choose among "
                f"{sorted(self.states)}"
            )
        raise NotCachedError(f"{self.address} records the states after {known} steps, not after {step}")

    def chunk(self, step: int, block: int) -> tuple[str, ArrayRecord]:
        """Path and ledger entry of one block of one state."""
        array = states_path(self.state(step))
        return chunk_path(array, block, len(self.item_shape)), self.record(block).arrays[array]

    def fetch(
        self, steps: Sequence[int], blocks: Sequence[int], fetched: Callable[[int], None] = lambda num_bytes: None
    ) -> None:
        """Bring some states of some blocks of a remote store to the scratch folder; nothing to do for a local one.

        Args:
            steps: solver steps done.
            blocks: committed ones.
            fetched: hears of the bytes of each chunk that came.

        Raises:
            UsageError: they don't fit on the disk.
            DamagedError: bytes differ from the ledger.
        """
        if self._scratch is not None:
            self._scratch.fetch_all([self.chunk(step, block) for block in blocks for step in steps], fetched)

    def _map(self, step: int, block: int) -> npt.NDArray[np.uint8]:
        key = (step, block)
        if key in self._maps:
            self._maps.move_to_end(key)
            return self._maps[key]
        chunk, expected = self.chunk(step, block)
        where = f"{self.address}/{chunk}"
        try:
            descriptor = self._open_chunk(chunk, expected)
        except FileNotFoundError:
            raise DamagedError(f"{where} is missing, but the ledger has it; {_HOW_TO_MEND}") from None
        try:
            status = os.fstat(descriptor)
            size, identity = status.st_size, (status.st_dev, status.st_ino, status.st_mtime_ns)
            if size != expected.num_bytes:
                raise DamagedError(f"{where} has {size} bytes, the ledger says {expected.num_bytes}; {_HOW_TO_MEND}")
            mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        view: npt.NDArray[np.uint8] = np.frombuffer(mapped, dtype=np.uint8)
        self._maps[key] = view
        if key not in self._checked or self._checked[key][0] != identity:
            self._checked[key] = (identity, np.zeros(len(expected.segments) // 8, dtype=np.bool_))
        if len(self._maps) > MAX_OPEN_MAPS:
            self._maps.popitem(last=False)
        return view

    def chunk_file(self, step: int, block: int) -> Path:
        """The local file of one block of one state, of the recorded size; a remote one comes to the scratch folder.

        Raises:
            DamagedError: it is missing or has another size.
        """
        chunk, expected = self.chunk(step, block)
        if self._scratch is not None:
            return self._scratch.fetch(chunk, expected)
        try:
            descriptor = self._open_chunk(chunk, expected)
        except FileNotFoundError:
            raise DamagedError(f"{self.address}/{chunk} is missing, but the ledger has it; {_HOW_TO_MEND}") from None
        try:
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if size != expected.num_bytes:
            raise DamagedError(
                f"{self.address}/{chunk} has {size} bytes, the ledger says {expected.num_bytes}; {_HOW_TO_MEND}"
            )
        return Path(self.address) / chunk

    def _open_chunk(self, chunk: str, expected: ArrayRecord) -> int:
        if self._scratch is not None:
            return os.open(self._scratch.fetch(chunk, expected), os.O_RDONLY | os.O_CLOEXEC)
        assert isinstance(self.source, LocalSource)
        self.source.check_folder(chunk)
        return open_file(self.source.root, chunk)

    def _check(self, step: int, block: int, file: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> None:
        """Check the segments that some rows touch, once each."""
        checked = self._checked[step, block][1]
        if checked.all():
            return
        row_bytes = math.prod(self.item_shape) * self.dtype.itemsize
        first = rows * row_bytes // SEGMENT_BYTES
        last = ((rows + 1) * row_bytes - 1) // SEGMENT_BYTES
        touched = np.unique([np.minimum(first + i, last) for i in range(int((last - first).max()) + 1)])
        expected = self.chunk(step, block)[1].crcs()
        for segment in touched[~checked[touched]]:
            start = int(segment) * SEGMENT_BYTES
            stop = min(start + SEGMENT_BYTES, file.size - CRC_BYTES)
            if crc32c(file[start:stop].tobytes()) != expected[segment]:
                raise DamagedError(
                    f"{self.address}: state {step:04d} of block {block} is damaged near byte {start}; {_HOW_TO_MEND}"
                )
            checked[segment] = True

    def _values(self, step: int, block: int, rows: npt.NDArray[np.int64]) -> Values:
        """All rows of a block as a map, after checking the segments that some rows touch."""
        file = self._map(step, block)
        self._check(step, block, file, rows)
        return file[:-CRC_BYTES].view(self.dtype).reshape(self.layout.block_size, *self.item_shape)

    def block_view(self, step: int, block: int) -> Values:
        """One block of one state without copying: a read-only map of the file, checked as a whole.

        Returns:
            Stored dtype, shape (block_size, *item_shape); `torch.from_numpy` takes it as it is.

        Raises:
            NotCachedError: the block or state is not here.
            DamagedError: bytes differ from the ledger.
        """
        return self._values(step, block, np.arange(self.layout.block_size))

    def rows(self, step: int, seeds: npt.ArrayLike) -> Values:
        """Read the stored values of some seeds at one recorded state.

        Args:
            step: solver steps done; 0 is x_T, the last is x_0.
            seeds: seeds in any order, repeats allowed.

        Returns:
            Stored dtype, shape (len(seeds), *item_shape), in the order of `seeds`. Multiply by the state's `scale`
            for the solver's own x_t.

        Raises:
            NotCachedError: a seed or state is not here.
            DamagedError: bytes differ from the ledger.
        """
        wanted = np.asarray(seeds, dtype=np.int64).ravel()
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.num_seeds):
            outside = wanted[(wanted < 0) | (wanted >= self.num_seeds)][0]
            raise NotCachedError(f"{self.address} declares seeds 0:{self.num_seeds}; seed {outside} is outside")
        blocks, rows = np.divmod(wanted, self.layout.block_size)
        if wanted.size:
            self._map(step, int(blocks[0]))  # a file of the size that is claimed is there before memory is taken
        out = np.empty((wanted.size, *self.item_shape), dtype=self.dtype)
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            out[here] = self._values(step, int(block), rows[here])[rows[here]]
        return out

    def dask_array(self, step: int) -> dask.array.Array:
        """A lazy dask view of one state over all declared seeds, for analysis; one dask chunk a block.

        Returns:
            Stored dtype, shape (num_seeds, *item_shape). Rows of uncommitted blocks are NaN.

        Raises:
            NotCachedError: the state is not here.
        """
        import dask.array as da

        self.state(step)
        size = self.layout.block_size
        chunks = ((size,) * self.num_blocks, *((n,) for n in self.item_shape))
        return da.map_blocks(
            _dask_block, self, step, dtype=self.dtype, chunks=chunks, meta=np.empty((0,) * len(chunks), self.dtype)
        )


def _reopen(address: str, scratch: Path | None) -> TrajectoryCache:
    return TrajectoryCache.open(address, scratch=scratch)


def _dask_block(cache: TrajectoryCache, step: int, block_info: Any = None) -> Values:
    block = int(block_info[None]["chunk-location"][0])
    if block not in cache.blocks:
        return np.full((cache.layout.block_size, *cache.item_shape), np.nan, dtype=cache.dtype)
    return cache.block_view(step, block)


def local_root(cache: TrajectoryCache) -> Path:
    """The folder of a local cache.

    Raises:
        CacheError: it is remote.
    """
    if not isinstance(cache.source, LocalSource):
        raise CacheError(f"{cache.address} is read only: copy it to a folder first (`advkd-cache subset --out STORE`)")
    return cache.source.root
