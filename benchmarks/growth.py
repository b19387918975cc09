"""What it costs to look at a cache as it grows from a thousand seeds to a million."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from advkd.cache.files.sealed_json import seal
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.array_record import SEGMENT_BYTES, crc32c
from advkd.cache.format.store_paths import chunk_path, record_path, states_path
from advkd.cache.format.zarr_metadata import metadata_files
from benchmarks.comparison import Comparison, Target, row_of
from benchmarks.harness import Benchmark, in_child, run
from benchmarks.networks import layout_of, recipe_of

SHAPE = (3, 256, 256)
BLOCK_SIZE = 160
ACTS = {
    "open": "open the cache",
    "plan": "list its seeds",
    "resume": "find missing blocks, checking each record",
    "whole": "check that all files are complete",
    "order": "draw an epoch's order",
    "batch": "read the epoch's first batch of 64",
}


def declare(store: Path, num_seeds: int, num_states: int) -> int:
    """Write a store with a record per block and sparse files: full size, no bytes on disk. Returns the block count."""
    recipe, layout = recipe_of(SHAPE), layout_of(num_states, BLOCK_SIZE)
    num_blocks = -(-num_seeds // BLOCK_SIZE)
    for name, value in metadata_files(recipe, layout, num_blocks * BLOCK_SIZE).items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(pretty_json(value))
    num_bytes = layout.block_bytes(SHAPE) + 4
    entry = {
        "num_bytes": num_bytes,
        "segments": zero_crcs(num_bytes - 4),
        "sha256": "00" * 32,
        "minimum": 0.0,
        "maximum": 0.0,
        "num_nonfinite": 0,
        "rounding_rms": 0.0,
        "rounding_max": 0.0,
    }
    record: dict[str, Any] = {
        "format": 1,
        "fingerprint": recipe.fingerprint,
        "layout_hash": layout.layout_hash,
        "arrays": {states_path(state): entry for state in layout.states},
    }
    (store / "blocks").mkdir()
    for block in range(num_blocks):
        (store / record_path(block)).write_bytes(seal(record | {"block": block}))
        for state in layout.states:
            chunk = store / chunk_path(states_path(state), block, 3)
            chunk.parent.mkdir(parents=True)
            with chunk.open("wb") as file:
                os.truncate(file.fileno(), num_bytes)
    return num_blocks


def zero_crcs(num_bytes: int) -> str:
    """The segment checksums of a file of zeros."""
    sizes = [min(SEGMENT_BYTES, num_bytes - start) for start in range(0, num_bytes, SEGMENT_BYTES)]
    known = {size: crc32c(bytes(size)).to_bytes(4, "big").hex() for size in set(sizes)}
    return "".join(known[size] for size in sizes)


def measure(bench: Benchmark, folder: Path) -> None:
    """Each size is ten times the previous one and measured in child processes."""
    sizes = (1_000, 10_000) if bench.quick else (1_000, 10_000, 100_000, 1_000_000)
    figures: dict[int, list[dict[str, Any]]] = {}
    blocks: dict[int, int] = {}
    for size in sizes:
        store = folder / f"{size}.zarr"
        blocks[size] = declare(store, size, 2)
        for _ in range(bench.rounds(3)):
            figures.setdefault(size, []).append(in_child("benchmarks.growth_child", store))
    largest, smaller = sizes[-1], sizes[-2]
    for act, words in ACTS.items():
        rows = [
            row_of(f"{size:,} seeds, {blocks[size]:,} blocks", [one["seconds"][act] for one in figures[size]])
            for size in sizes
        ]
        slope = (rows[-1].median - rows[0].median) / (blocks[largest] - blocks[sizes[0]])
        growth = (rows[-1].median / blocks[largest]) / (rows[-2].median / blocks[smaller])
        targets = [Target(what=f"{words}: time per block, {largest:,} / {smaller:,} seeds", found=growth, limit=1.5)]
        if act in ("open", "plan"):
            targets.append(
                Target(
                    what=f"{words}, {largest:,} seeds: seconds",
                    found=rows[-1].median,
                    limit=1.0,
                    headline="Opening a cache of a million seeds: seconds" if act == "open" and not bench.quick else "",
                )
            )
        bench.add(
            Comparison(
                title=words,
                unit="s",
                baseline=None,
                rows=rows,
                targets=targets,
                note=f"{slope * 1e6:.1f} µs per block."
                + (" The cost is the check of its 1 MiB segments, at any size." if act == "batch" else ""),
            )
        )  # fmt: skip
    rows = [row_of(f"{size:,} seeds", [one["megabytes"] for one in figures[size]]) for size in sizes]
    bench.add(
        Comparison(
            title="memory for all of this",
            unit="MB",
            baseline=None,
            rows=rows,
            note="A million seeds and their order take 8 MB each; NumPy sorts a copy.",
            targets=[Target(what=f"memory, {largest:,} seeds, MB", found=rows[-1].median, limit=200)],
        )
    )


if __name__ == "__main__":
    run("growth", "Growth: what does it cost to look at a cache of a thousand to a million seeds?", measure)
