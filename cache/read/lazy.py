"""A recorded state as a lazy dask array, for analysis."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np

from advkd.cache.read.reader import TrajectoryCache, Values


def dask_view(cache: TrajectoryCache, step: int) -> da.Array:
    """`TrajectoryCache.dask_array`: all declared seeds, one dask chunk a block, NaN where none was committed."""
    cache.state(step)
    chunks = ((cache.layout.block_size,) * cache.num_blocks, *((n,) for n in cache.item_shape))
    meta = np.empty((0,) * len(chunks), cache.dtype)
    return da.map_blocks(_block, cache, step, dtype=cache.dtype, chunks=chunks, meta=meta)


def _block(cache: TrajectoryCache, step: int, block_info: Any = None) -> Values:
    block = int(block_info[None]["chunk-location"][0])
    if block not in cache.blocks:
        return np.full((cache.layout.block_size, *cache.item_shape), np.nan, dtype=cache.dtype)
    return cache.block_view(step, block)
