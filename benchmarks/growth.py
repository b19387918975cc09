"""What looking at a cache costs as it grows from a thousand seeds to a million."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from advkd.cache.files.sealed_json import seal
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.store_paths import chunk_path, record_path, states_path
from advkd.cache.format.zarr_metadata import metadata_files
from benchmarks.harness import Benchmark, Comparison, Row, Target, run
from benchmarks.networks import layout_of, recipe_of

SHAPE = (3, 256, 256)
BLOCK_SIZE = 160
ACTS = {
    "open": "open it",
    "plan": "which seeds there are",
    "resume": "which blocks are missing, each record checked",
    "whole": "whether all files are whole",
    "order": "an epoch's order",
    "batch": "the epoch's first batch of 64",
}
PROGRAM = """
import json, sys, time
from pathlib import Path
import numpy as np
from benchmarks.harness import peak_megabytes
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from advkd.stages.student.training.data import epoch_order

store = Path(sys.argv[1])
cache = TrajectoryCache.open(store)
writer = CacheWriter(store, cache.recipe, cache.layout)
before, seconds, found = peak_megabytes(), {}, {}
for name, act in (
    ("open", lambda: TrajectoryCache.open(store)),
    ("plan", lambda: TrajectoryCache.open(store).seeds()),
    ("resume", lambda: len(writer.missing(range(cache.num_seeds)))),
    ("whole", lambda: len(writer.incomplete())),
    ("order", lambda: epoch_order(cache.seeds(), 0, 0, 0)),
    ("batch", lambda: TrajectoryCache.open(store).rows(0, found["order"][:64])),
):
    begin = time.perf_counter()
    found[name] = act()
    seconds[name] = time.perf_counter() - begin
assert len(np.unique(found["order"])) == len(found["plan"]) == cache.num_seeds
assert found["resume"] == 0 and found["whole"] == 0
print(json.dumps({"seconds": seconds, "megabytes": peak_megabytes() - before}))
"""


def declare(store: Path, num_seeds: int, num_states: int) -> int:
    """A store with a record of every block, its files sparse: they have their sizes, but no bytes on the disk."""
    recipe, layout = recipe_of(SHAPE), layout_of(num_states, BLOCK_SIZE)
    num_blocks = -(-num_seeds // BLOCK_SIZE)
    for name, value in metadata_files(recipe, layout, num_blocks * BLOCK_SIZE).items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(pretty_json(value))
    num_bytes = layout.block_bytes(SHAPE) + 4
    entry = {
        "num_bytes": num_bytes,
        # Of a mebibyte of zeros, and of the last segment, which is as long here.
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
    """What a ledger record says of a file of zeros."""
    from advkd.cache.format.ledger import SEGMENT_BYTES, crc32c

    sizes = [min(SEGMENT_BYTES, num_bytes - start) for start in range(0, num_bytes, SEGMENT_BYTES)]
    known = {size: crc32c(bytes(size)).to_bytes(4, "big").hex() for size in set(sizes)}
    return "".join(known[size] for size in sizes)


def measure(bench: Benchmark, folder: Path) -> None:
    """Sizes ten times as large each, in processes of their own."""
    sizes = (1_000, 10_000) if bench.quick else (1_000, 10_000, 100_000, 1_000_000)
    figures: dict[int, list[dict[str, Any]]] = {}
    blocks: dict[int, int] = {}
    for size in sizes:
        store = folder / f"{size}.zarr"
        blocks[size] = declare(store, size, 2)
        for _ in range(bench.rounds(3)):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(store)],
                cwd=Path(__file__).parents[1],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            figures.setdefault(size, []).append(json.loads(done.stdout.splitlines()[-1]))
    largest, smaller = sizes[-1], sizes[-2]
    slopes = {}
    for act, words in ACTS.items():
        rows = [
            _row(f"{size:,} seeds, {blocks[size]:,} blocks", [one["seconds"][act] for one in figures[size]])
            for size in sizes
        ]
        slopes[act] = (rows[-1].median - rows[0].median) / (blocks[largest] - blocks[sizes[0]])
        growth = (rows[-1].median / blocks[largest]) / (rows[-2].median / blocks[smaller])
        targets = [
            Target(what=f"{words}: time a block at {largest:,} seeds by that at {smaller:,}", found=growth, limit=1.5)
        ]
        if act in ("open", "plan"):
            targets.append(Target(what=f"{words}, {largest:,} seeds: seconds", found=rows[-1].median, limit=1.0))
        bench.add(
            Comparison(
                title=words,
                unit="s",
                baseline=None,
                rows=rows,
                targets=targets,
                note=f"{slopes[act] * 1e6:.1f} µs a block."
                + (" Its segments of 1 MiB are checked: the same whatever the size." if act == "batch" else ""),
            )
        )  # fmt: skip
    rows = [_row(f"{size:,} seeds", [one["megabytes"] for one in figures[size]]) for size in sizes]
    bench.add(
        Comparison(
            title="memory that all this took",
            unit="MB",
            baseline=None,
            rows=rows,
            note="A list of a million seeds and its order are 8 MB each; NumPy sorts a copy.",
            targets=[Target(what=f"memory, {largest:,} seeds, MB", found=rows[-1].median, limit=200)],
        )
    )


def _row(name: str, values: list[float]) -> Row:
    low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return Row(name=name, median=middle, low=low, high=high)


if __name__ == "__main__":
    run("growth", "Growth: what does looking at a cache cost, from a thousand seeds to a million?", measure)
