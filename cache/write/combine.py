"""Merging stores that several people built, and cutting subsets out of stores.

Files are linked, not copied, where the file system can. Every block is committed like one that was sampled, so a
killed merge resumes where it stopped, and two merges into one store share the blocks.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from advkd.cache.errors import MismatchError, NotCachedError, UsageError
from advkd.cache.files.durable import holds_something, write_atomically
from advkd.cache.files.paths import safe_target
from advkd.cache.files.processes import in_processes
from advkd.cache.format.differences import differences
from advkd.cache.format.equivalence import equivalent
from advkd.cache.format.layout import Layout
from advkd.cache.format.seeds import blocks_of, parse_seed_range
from advkd.cache.format.space import DECODER_PATH
from advkd.cache.format.store_paths import TEACHER_PATH
from advkd.cache.read.compare import (
    TOLERANCE_FILE,
    array_differences,
    block_distances,
    differing_arrays,
    tolerance_of,
    within,
)
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.read.weights import MAX_WEIGHTS_BYTES
from advkd.cache.write.divide import Outcome, divide
from advkd.cache.write.writer import CacheWriter

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Combined:
    """Result of a merge or subset."""

    store: Path
    num_added: int
    num_present: int
    """Blocks that were in the target already."""
    num_replaced: int
    """Blocks of the target that the preferred store's replaced."""
    how: dict[str, int]
    """Number of files by the way they were transferred: "hard link", "reflink", "copy"."""


def merge(
    sources: Sequence[TrajectoryCache],
    out: Path,
    *,
    prefer: TrajectoryCache | None = None,
    begin: Callable[[int], None] = lambda num_blocks: None,
    advance: Progress = lambda num_blocks: None,
) -> Combined:
    """Bring all blocks of some stores into one; the target may exist, and be one of them.

    Where recipes differ in neutral options only (`advkd.cache.format.equivalence`), the target's, else the first
    store's, is kept: its fingerprint goes into all records.

    Args:
        sources: of equivalent recipes and the same layout.
        out: the target.
        prefer: the store whose block to take where two differ within the recorded tolerance.
        begin: called with the number of blocks.
        advance: called with 1 for each finished block.

    Raises:
        MismatchError: the stores don't fit, or hold a block with bytes that differ and nothing is preferred, or
            that differ beyond the recorded tolerance.
        NotCachedError: a store is a partial copy.
    """
    there = [TrajectoryCache.open(out)] if holds_something(out) else []
    everyone = [*there, *sources]
    first = next((cache for cache in everyone if cache.blocks), sources[0])  # an empty store has no further arrays yet
    for cache in everyone:
        check_whole(cache)
        same = equivalent(first.recipe, cache.recipe)
        lines = [] if same else differences(first.recipe.to_json(), cache.recipe.to_json())
        lines = lines or differences(first.layout.to_json(), cache.layout.to_json()) or array_differences(first, cache)
        if lines:
            raise MismatchError(
                f"{first.address} and {cache.address} don't fit together ({'; '.join(lines[:3])}): only stores of one "
                "recipe, layout and set of arrays merge (`advkd-cache subset --states` brings two to the same states)"
            )
    wanted = {block: cache for block, cache in _choose(everyone, prefer).items() if cache not in there}
    writer = CacheWriter.open(out, first.recipe, first.layout, further=first.further)
    combined = _adopt(writer, wanted, prefer, begin, advance)
    carry(sources, out)
    return combined


def subset(
    cache: TrajectoryCache,
    out: Path,
    *,
    seeds: str | None = None,
    steps: Sequence[int] | None = None,
    begin: Callable[[int], None] = lambda num_blocks: None,
    advance: Progress = lambda num_blocks: None,
) -> Combined:
    """A store with some seeds and some states of another: the same fingerprint, another layout hash.

    Args:
        cache: local or remote.
        out: a new store, or one that an earlier call of the same kind began.
        seeds: `A:B`, widened to whole blocks; all if None.
        steps: solver steps done; x_T is always kept. All that are here if None.
        begin: called with the number of blocks.
        advance: called with 1 for each finished block.

    Raises:
        UsageError: no block lies in the range.
        NotCachedError: a state, or an array besides the states, is not here.
    """
    check_arrays_here(cache)
    wanted = sorted({0, *(steps if steps is not None else cache.states)})
    layout: Layout = replace(cache.layout, states=tuple(cache.state(step) for step in wanted))
    blocks: Sequence[int] = cache.blocks
    if seeds is not None:
        asked = blocks_of(parse_seed_range(seeds), layout.block_size)
        blocks = [block for block in blocks if block in asked]
        if not blocks:
            raise UsageError(f"{cache.address} has none of the seeds {seeds}")
    writer = CacheWriter.open(out, cache.recipe, layout, further=cache.further)
    combined = _adopt(writer, dict.fromkeys(blocks, cache), cache, begin, advance)
    carry([cache], out)
    return combined


def check_whole(cache: TrajectoryCache) -> None:
    """Refuse a partial copy.

    Raises:
        NotCachedError: a state or another array is not here.
    """
    absent = [state.name for state in cache.layout.states if state.step not in cache.states]
    if absent:
        raise NotCachedError(
            f"{cache.address} is a partial copy (state {absent[0]} is not here): pull the rest, or "
            "`advkd-cache subset` both stores to the same states"
        )
    check_arrays_here(cache)


def check_arrays_here(cache: TrajectoryCache) -> None:
    """Refuse a copy without one of the arrays besides the states: what is made of it would lack them, unnoticed.

    Raises:
        NotCachedError: one is not here.
    """
    absent = set(cache.further_names) - {spec.path for spec in cache.further}
    if absent:
        raise NotCachedError(f"{cache.address} is a partial copy (array {min(absent)} is not here): pull it, too")


def _choose(sources: Sequence[TrajectoryCache], prefer: TrajectoryCache | None) -> dict[int, TrajectoryCache]:
    """For each block the store that it comes from."""
    chosen: dict[int, TrajectoryCache] = {}
    for cache in sources:
        for block in cache.blocks:
            earlier = chosen.setdefault(block, cache)
            if earlier is not cache and earlier.record(block).arrays != cache.record(block).arrays:
                chosen[block] = _settle(earlier, cache, block, prefer)
    return dict(sorted(chosen.items()))


def _settle(
    one: TrajectoryCache, other: TrajectoryCache, block: int, prefer: TrajectoryCache | None
) -> TrajectoryCache:
    apart = block_distances(one, other, block)
    limits, more = tolerance_of(one), tolerance_of(other)
    limit = {step: max(limits[step], more[step]) for step in limits}
    worst = max(apart, key=lambda step: apart[step] / max(limit[step], 1e-30), default=0)
    named = f"block {block} differs between {one.address} and {other.address}"
    if odd := differing_arrays(one, other, block):
        raise MismatchError(
            f"{named}: array {odd[0]} has other values, which no tolerance covers; one of them is wrong"
        )
    if not within(apart, limit):
        raise MismatchError(
            f"{named}: state {worst:04d} by rms {apart[worst]:.2g}, beyond the recorded tolerance {limit[worst]:.2g}; "
            "one of them is wrong (`advkd-cache verify --recompute` tells which)"
        )
    if not apart:
        return one  # the same values, described differently
    if prefer is None or prefer.address not in (one.address, other.address):
        raise MismatchError(
            f"{named} by rms {apart[worst]:.2g} at most, within the recorded tolerance (two kinds of machine?): "
            "--prefer STORE says whose to take"
        )
    return one if prefer.address == one.address else other


def _adopt(
    writer: CacheWriter,
    chosen: dict[int, TrajectoryCache],
    prefer: TrajectoryCache | None,
    begin: Callable[[int], None],
    advance: Progress,
) -> Combined:
    how: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()

    def adopt(block: int) -> Outcome:
        cache, outcome = chosen[block], "made"

        def is_present() -> bool:
            nonlocal outcome
            if not writer.is_committed(block):
                return False
            # Settled anew: another writer may have made it after the stores were compared.
            outcome = "replaced"
            return _same_bytes(there, block, cache) or _settle(there, cache, block, prefer) is there

        made = writer.make(block, lambda claim: writer.adopt(block, cache, lambda way: how.update([way])), is_present)
        outcomes[outcome if made == "made" else made] += 1
        return made

    begin(len(chosen))
    with writer.writing():
        if chosen:
            writer.grow(range((max(chosen) + 1) * writer.layout.block_size))
        there = TrajectoryCache.open(writer.path)
        for _ in divide(chosen, functools.partial(in_processes, adopt)):
            advance(1)
    return Combined(
        store=writer.path,
        num_added=outcomes["made"],
        num_present=outcomes["present"],
        num_replaced=outcomes["replaced"],
        how=dict(how),
    )


def _same_bytes(there: TrajectoryCache, block: int, cache: TrajectoryCache) -> bool:
    source, present = cache.record(block).arrays, there.record(block).arrays
    return all(name in source and array.sha256 == source[name].sha256 for name, array in present.items())


def carry(sources: Sequence[TrajectoryCache], out: Path) -> None:
    """What the first store knows of its origin goes along, and its networks' weights, where the target has none."""
    decoder = [DECODER_PATH] if sources[0].recipe.space else []
    for name in ("provenance/store.json", TOLERANCE_FILE, TEACHER_PATH, *decoder):
        for cache in sources:
            if (out / name).is_file():
                break
            try:
                write_atomically(safe_target(out, name), [cache.files.read(name, MAX_WEIGHTS_BYTES)])
            except FileNotFoundError:
                continue
