"""Packing and unpacking a store block by block, each committed by its ledger record, as `build` does.

Both resume after being stopped or killed, share the blocks with other processes that do the same, and extend an
existing store. The packer decodes every chunk that it wrote before it commits the block.
"""

from __future__ import annotations

import functools
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from advkd.cache.codec.unpacked_source import UnpackedSource
from advkd.cache.errors import CacheError, MismatchError
from advkd.cache.files.processes import in_processes
from advkd.cache.format.encoding import MAX_PACKED_BLOCK_BYTES, Packing
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import carry, check_whole
from advkd.cache.write.divide import Outcome, divide
from advkd.cache.write.folder import equivalent_there
from advkd.cache.write.pack_block import PackedWriter, pack_block, packed_source, unpack_block
from advkd.cache.write.writer import CacheWriter

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Result of packing or unpacking."""

    store: Path
    num_added: int
    num_present: int
    """Blocks that were there already."""
    num_bytes: int
    """Bytes of the packed chunk files of all these blocks."""
    num_values: int
    error_rms: float
    """Over all these blocks and states, stored units."""
    error_max: float


def pack(
    cache: TrajectoryCache,
    out: Path,
    packing: Packing,
    *,
    num_workers: int = 1,
    begin: Advance = lambda num_bytes: None,
    advance: Advance = lambda num_bytes: None,
) -> Packed:
    """Write a packed copy of a store, or extend one.

    Args:
        cache: the store, local or remote.
        out: a new store, or one that an earlier call with the same arguments began.
        packing: codec and parameters.
        num_workers: processes that share the blocks.
        begin: called with the number of bytes of values.
        advance: called with the number of bytes of each finished block.

    Raises:
        MismatchError: `out` has another recipe, layout or packing.
        NotCachedError: the store is a partial copy or empty.
        CacheError: the codec can't keep its error bound.
        UsageError: x_T doesn't follow from the seeds, as packing needs.
    """
    cache.recipe.check_drawn_noise(cache.address, "be packed")
    check_whole(cache)
    cache.check_begun()
    block_bytes = cache.layout.block_bytes(cache.item_shape)
    if block_bytes > MAX_PACKED_BLOCK_BYTES:
        raise CacheError(
            f"{cache.address} has blocks of {block_bytes:,} bytes per state, packing takes at most "
            f"{MAX_PACKED_BLOCK_BYTES:,}: build with a smaller --block-size"
        )
    recipe, first_written = equivalent_there(out, cache.recipe), packing.as_first_written()
    existing = PackedWriter(out, recipe, cache.layout.packed(first_written), cache.further)
    if existing.exists() and existing.mismatch() is None:
        packing = first_written  # extend an older store in its own encoding
    writer = PackedWriter(out, recipe, cache.layout.packed(packing), cache.further)
    task = functools.partial(pack_block, cache.address, uuid.uuid4().hex, writer, packing)
    num_added = _make_blocks(cache, writer, task, num_workers, begin, advance)
    return _sum_up(out, cache, packed_source(TrajectoryCache.open(out)), num_added)


def unpack(
    cache: TrajectoryCache,
    out: Path,
    *,
    num_workers: int = 1,
    begin: Advance = lambda num_bytes: None,
    advance: Advance = lambda num_bytes: None,
) -> Packed:
    """Write the raw store that a packed one unpacks to, or the blocks of it that are missing.

    Raises:
        MismatchError: `out` has another recipe or layout.
        NotCachedError: the packed store is a partial copy, or no packed store.
        DamagedError: a file is missing or differs from the ledger; its block was not written.
    """
    source = packed_source(cache)
    check_whole(cache)
    writer = CacheWriter(out, equivalent_there(out, cache.recipe), cache.layout, cache.further)
    task = functools.partial(unpack_block, cache.address, uuid.uuid4().hex, writer)
    return _sum_up(out, cache, source, _make_blocks(cache, writer, task, num_workers, begin, advance))


def _make_blocks(
    cache: TrajectoryCache,
    writer: CacheWriter,
    task: Callable[[int], Outcome],
    num_workers: int,
    begin: Advance,
    advance: Advance,
) -> int:
    """Run a task for each block of a cache; the number of blocks that it made."""
    problem = writer.mismatch()
    if problem:
        raise MismatchError(f"{writer.path} holds another store ({problem}): choose another --out")
    writer.begin()
    num_bytes, num_made = len(cache.states) * cache.layout.block_bytes(cache.item_shape), 0
    begin(len(cache.blocks) * num_bytes)
    with writer.writing():
        if cache.num_seeds:
            writer.grow(range(cache.num_seeds))
        for _, outcome in divide(cache.blocks, functools.partial(in_processes, task, num_workers=num_workers)):
            num_made += outcome == "made"
            advance(num_bytes)
    carry([cache], writer.path)
    return num_made


def _sum_up(out: Path, cache: TrajectoryCache, packed: UnpackedSource, num_added: int) -> Packed:
    arrays = [packed.records[block].of(state) for block in cache.blocks for state in packed.layout.states]
    return Packed(
        store=out,
        num_added=num_added,
        num_present=len(cache.blocks) - num_added,
        num_bytes=sum(array.num_bytes for array in arrays),
        num_values=len(arrays) * cache.layout.block_size * math.prod(cache.item_shape),
        error_rms=math.sqrt(sum(array.error_rms**2 for array in arrays) / max(1, len(arrays))),
        error_max=max((array.error_max for array in arrays), default=0.0),
    )
