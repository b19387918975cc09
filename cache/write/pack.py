"""Packing a store, and unpacking it: block by block, each committed by its ledger record, as `build` does.

Both resume where they were stopped or killed, divide the blocks with others who do the same, and extend what is
there. The packer decodes every chunk from the file that it wrote before the block counts.
"""

from __future__ import annotations

import functools
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from advkd.cache.codec.packed_source import PackedSource
from advkd.cache.errors import CacheError, MismatchError
from advkd.cache.files.processes import in_processes
from advkd.cache.format.encoding import MAX_PACKED_BLOCK_BYTES, Packing
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import carry, check_whole
from advkd.cache.write.divide import divide
from advkd.cache.write.pack_block import pack_block, packed_source, unpack_block
from advkd.cache.write.writer import CacheWriter

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """What packing or unpacking did."""

    store: Path
    num_added: int
    num_present: int
    """Blocks that were there already."""
    num_bytes: int
    """Of the packed chunk files of all these blocks."""
    num_values: int
    error_rms: float
    """Over all these blocks and all states that are stored."""
    error_max: float


def pack(
    cache: TrajectoryCache,
    out: Path,
    packing: Packing,
    *,
    num_workers: int = 1,
    begin: Callable[[int], None] = lambda num_bytes: None,
    advance: Advance = lambda num_bytes: None,
) -> Packed:
    """Write a packed copy of a store, or extend one.

    Args:
        cache: the store, local or remote.
        out: a new store, or one that an earlier call of the same kind began.
        packing: codec and parameters.
        num_workers: processes that divide the blocks.
        begin: hears how many bytes of values there are.
        advance: hears of those that are done.

    Raises:
        MismatchError: `out` is of another recipe, layout or packing.
        NotCachedError: the store is a partial copy, or empty.
        CacheError: the codec can't keep its promise.
    """
    check_whole(cache)
    cache.check_begun()
    block_bytes = cache.layout.block_bytes(cache.item_shape)
    if block_bytes > MAX_PACKED_BLOCK_BYTES:
        raise CacheError(
            f"{cache.address} has blocks of {block_bytes:,} bytes a state, packing takes {MAX_PACKED_BLOCK_BYTES:,} "
            "at most: build with a smaller --block-size"
        )
    writer = CacheWriter(out, cache.recipe, cache.layout.packed(packing))
    problem = writer.mismatch()
    if problem:
        raise MismatchError(f"{out} holds something else ({problem}): choose another --out")
    writer = CacheWriter.open(out, cache.recipe, cache.layout.packed(packing))
    begin(len(cache.blocks) * len(cache.layout.states) * block_bytes)
    with writer.writing():
        writer.grow(range(cache.num_seeds))
        task = functools.partial(pack_block, cache.address, uuid.uuid4().hex, out, packing)
        num_added = 0
        for _, outcome in divide(cache.blocks, functools.partial(in_processes, task, num_workers=num_workers)):
            num_added += outcome == "made"
            advance(len(cache.layout.states) * block_bytes)
    carry([cache], out)
    return _sum_up(out, cache, packed_source(TrajectoryCache.open(out)), num_added)


def unpack(
    cache: TrajectoryCache,
    out: Path,
    *,
    num_workers: int = 1,
    begin: Callable[[int], None] = lambda num_bytes: None,
    advance: Advance = lambda num_bytes: None,
) -> Packed:
    """Write the raw store that a packed one stands for, or what is missing of it.

    Raises:
        MismatchError: `out` is of another recipe or layout.
        NotCachedError: the packed store is a partial copy, or no packed store.
        DamagedError: a file is missing or not what the ledger says; no block of it was written.
    """
    source = packed_source(cache)
    check_whole(cache)
    writer = CacheWriter(out, cache.recipe, cache.layout)
    problem = writer.mismatch()
    if problem:
        raise MismatchError(f"{out} holds something else ({problem}): choose another --out")
    writer = CacheWriter.open(out, cache.recipe, cache.layout)
    block_bytes = cache.layout.block_bytes(cache.item_shape)
    begin(len(cache.blocks) * len(cache.layout.states) * block_bytes)
    with writer.writing():
        if cache.num_seeds:
            writer.grow(range(cache.num_seeds))
        task = functools.partial(unpack_block, cache.address, uuid.uuid4().hex, out)
        num_added = 0
        for _, outcome in divide(cache.blocks, functools.partial(in_processes, task, num_workers=num_workers)):
            num_added += outcome == "made"
            advance(len(cache.layout.states) * block_bytes)
    carry([cache], out)
    return _sum_up(out, cache, source, num_added)


def _sum_up(out: Path, cache: TrajectoryCache, packed: PackedSource, num_added: int) -> Packed:
    arrays = [array for block in cache.blocks for array in packed.records[block].arrays.values()]
    return Packed(
        store=out,
        num_added=num_added,
        num_present=len(cache.blocks) - num_added,
        num_bytes=sum(array.num_bytes for array in arrays),
        num_values=len(arrays) * cache.layout.block_size * math.prod(cache.item_shape),
        error_rms=math.sqrt(sum(array.error_rms**2 for array in arrays) / max(1, len(arrays))),
        error_max=max((array.error_max for array in arrays), default=0.0),
    )
