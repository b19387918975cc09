"""Seeds and blocks: ranges that a user writes, and the whole blocks that cover them."""

from __future__ import annotations

from advkd.cache.errors import UsageError


def parse_seed_range(text: str) -> range:
    """Read `A:B`, a half-open range of seeds.

    Raises:
        UsageError: not two integers, negative, empty or reversed.
    """
    first, colon, last = text.partition(":")
    try:
        start, stop = int(first or 0), int(last)
    except ValueError:
        start, stop, colon = 0, 0, ""
    if not colon:
        raise UsageError(f"seeds {text!r}: expected A:B, such as 0:4096")
    if start < 0 or stop < 0:
        raise UsageError(f"seeds {text!r}: seeds are not negative")
    if stop <= start:
        raise UsageError(f"seeds {text!r}: the range is {'empty' if stop == start else 'reversed'}; B must exceed A")
    if stop > 1 << 40:
        raise UsageError(f"seeds {text!r}: at most 2^40 seeds")
    return range(start, stop)


def blocks_of(seeds: range, block_size: int) -> range:
    """The whole blocks that cover a range of seeds: only whole blocks exist, so the range widens to their edges."""
    return range(seeds.start // block_size, -(-seeds.stop // block_size))


def seeds_of(block: int, block_size: int) -> range:
    """The seeds of one block."""
    return range(block * block_size, (block + 1) * block_size)
