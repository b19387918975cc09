"""How many seeds a store's arrays declare, and should: what a verification expects and a repair restores."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress

from advkd.cache.errors import DamagedError, NotCachedError
from advkd.cache.files.strict_json import parse_json
from advkd.cache.format.store_paths import metadata_path, states_path
from advkd.cache.format.zarr_metadata import MAX_BLOCKS
from advkd.cache.read.reader import TrajectoryCache


def listed_blocks(cache: TrajectoryCache) -> tuple[int, ...]:
    """Blocks that have a record; where they can be listed, also those beyond what the arrays declare."""
    return cache.blocks if cache.files.root is None else cache.files.blocks(sys.maxsize)


def declared_seeds(cache: TrajectoryCache) -> dict[int, int]:
    """Seeds that each array declares, by solver steps done; one that can't be read is named by its bytes."""
    declared = {}
    for step, state in cache.states.items():
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            declared[step] = int(parse_json(cache.files.read(metadata_path(states_path(state))))["shape"][0])
    return declared


def expected_num_seeds(cache: TrajectoryCache, blocks: Sequence[int], declared: Iterable[int]) -> int:
    """What all arrays should declare: what most do, if it has room for the ledger's last block."""
    last = next((block for block in reversed(blocks) if block < MAX_BLOCKS and _is_recorded(cache, block)), -1)
    needed = (last + 1) * cache.layout.block_size
    enough = sorted(num_seeds for num_seeds in declared if num_seeds >= needed)
    return max(enough, key=enough.count, default=needed)


def _is_recorded(cache: TrajectoryCache, block: int) -> bool:
    try:
        cache.record(block)
    except (DamagedError, NotCachedError):
        return False
    return True
