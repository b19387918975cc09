"""What a million seeds cost: what is opened and read is counted, not timed."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advkd.cache.care.summary import MAX_BLOCKS_FOR_STATISTICS, runs, summarize
from advkd.cache.files.sealed_json import seal
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.store_paths import chunk_path, record_path, states_path
from advkd.cache.format.zarr_metadata import metadata_files
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from tests.conftest import ROOT
from tests.stores import BLOCK_SIZE, block_states, make_layout, make_recipe, write_store

NUM_BLOCKS = 6250
SHAPE = (3, 256, 256)
WATCHED = ("open", "stat", "lstat", "scandir", "listdir", "mkdir", "unlink", "replace", "rename", "link", "fsync")


def declare_million(store: Path, num_states: int) -> None:
    """A store of a million seeds at 256×256: a record for every block, no chunk but some empty ones of their size."""
    states = tuple(
        State(step=i * 10, timestep=999.0 - i, alpha=i / 100, sigma=1.0, scale=1.0) for i in range(num_states)
    )
    recipe, layout = make_recipe(item_shape=SHAPE), Layout(states=states, dtype="float16", block_size=160)
    for name, value in metadata_files(recipe, layout, NUM_BLOCKS * layout.block_size).items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(pretty_json(value))
    num_bytes = layout.block_bytes(SHAPE) + 4
    entry = {
        "num_bytes": num_bytes,
        "sha256": "00" * 32,
        "segments": "0" * 8 * -(-(num_bytes - 4) // (1 << 20)),
        "minimum": -4.0,
        "maximum": 4.0,
        "num_nonfinite": 0,
        "rounding_rms": 0.0002,
        "rounding_max": 0.001,
    }
    record: dict[str, Any] = {
        "format": 1,
        "fingerprint": recipe.fingerprint,
        "layout_hash": layout.layout_hash,
        "arrays": {states_path(state): entry for state in states},
    }
    (store / "blocks").mkdir()
    for block in range(NUM_BLOCKS):
        (store / record_path(block)).write_bytes(seal(record | {"block": block}))
    for block in (0, NUM_BLOCKS - 1):
        for state in states:
            chunk = store / chunk_path(states_path(state), block, 3)
            chunk.parent.mkdir(parents=True)
            with chunk.open("wb") as file:
                file.truncate(num_bytes)


@pytest.fixture(scope="module")
def million(fast_folder: Path) -> Path:
    declare_million(fast_folder / "million.zarr", 3)
    return fast_folder / "million.zarr"


@contextmanager
def counted(store: Path) -> Iterator[Counter[tuple[str, str]]]:
    """Calls of the operating system about paths in a store, by call and path relative to it."""
    counts: Counter[tuple[str, str]] = Counter()

    def watching(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
            text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
            if str(text).startswith(str(store)):
                counts[name, os.path.relpath(str(text), store)] += 1
            return original(path, *arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WATCHED:
            patch.setattr(os, name, watching(name, getattr(os, name)))
        yield counts


def opened(counts: Counter[tuple[str, str]]) -> Counter[str]:
    return Counter({path: count for (call, path), count in counts.items() if call == "open"})


def test_looking_at_a_million_seeds_opens_no_chunk_and_each_record_once(million: Path) -> None:
    with counted(million) as counts:
        cache = TrajectoryCache.open(million)
        assert len(cache.seeds()) == 1_000_000
    arrays = [f"{states_path(state)}/zarr.json" for state in cache.states.values()]
    assert opened(counts) == Counter(["zarr.json", *arrays])
    assert [path for call, path in counts if call in ("scandir", "listdir")] == ["blocks"]
    for look in (lambda cache: cache.digest, summarize):
        cache = TrajectoryCache.open(million)
        with counted(million) as counts:
            look(cache)
        records = Counter({path: count for path, count in opened(counts).items() if path.startswith("blocks/")})
        assert len(records) == NUM_BLOCKS and set(records.values()) == {1}
        assert not [path for path in opened(counts) if "/c/" in path]
        # A bounded number of calls a record, and no more listing of folders than one.
        assert sum(counts.values()) <= 3 * NUM_BLOCKS + 100
    summary = summarize(TrajectoryCache.open(million))
    assert summary["num_seeds"] == 1_000_000 and summary["seeds"] == [[0, 1_000_000]] and summary["gaps"] == []
    assert summary["statistics_of_blocks"] <= MAX_BLOCKS_FOR_STATISTICS


def test_choosing_seeds_of_a_million_reads_no_record(million: Path) -> None:
    pytest.importorskip("filelock")
    from advkd.stages.student.run import split_seeds

    with counted(million) as counts:
        split = split_seeds(TrajectoryCache.open(million), None)
    assert len(split.training) + len(split.held_out) == 1_000_000
    assert not [path for path in opened(counts) if path.startswith("blocks/") or "/c/" in path]


def test_gaps_are_found_among_many_blocks(million: Path) -> None:
    gone = [1, 2, 77, NUM_BLOCKS - 1]
    kept = {block: (million / record_path(block)).read_bytes() for block in gone}
    for block in gone:
        (million / record_path(block)).unlink()
    try:
        cache = TrajectoryCache.open(million)
        assert runs(cache.blocks) == [(0, 1), (3, 77), (78, NUM_BLOCKS - 1)]
        assert summarize(cache)["gaps"] == [
            [160, 480], [77 * 160, 78 * 160], [(NUM_BLOCKS - 1) * 160, NUM_BLOCKS * 160]
        ]  # fmt: skip
    finally:
        for block, data in kept.items():
            (million / record_path(block)).write_bytes(data)


FIGURES = """
import json, resource, sys, time
import numpy, advkd.cache, advkd.cache.care.summary
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.care.summary import summarize

def peak():
    try:  # what getrusage says begins with what the parent had when it forked
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)

before, figures = peak(), {}
for name, act in (
    ("open", lambda: TrajectoryCache.open(sys.argv[1])),
    ("seeds", lambda: TrajectoryCache.open(sys.argv[1]).seeds()),
    ("digest", lambda: TrajectoryCache.open(sys.argv[1]).digest),
    ("summarize", lambda: summarize(TrajectoryCache.open(sys.argv[1]))),
):
    begin = time.perf_counter()
    act()
    figures[name] = round(time.perf_counter() - begin, 4)
print(json.dumps({"seconds": figures, "megabytes": round(peak() - before, 1)}))
"""


def measure(store: Path) -> dict[str, Any]:
    """Seconds and megabytes of looking, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", FIGURES, store], cwd=ROOT, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(run.stdout)
    return figures


def test_looking_at_a_million_seeds_takes_little_memory(million: Path) -> None:
    figures = measure(million)
    assert figures["megabytes"] < 200, figures


@pytest.fixture(scope="module")
def many(fast_folder: Path) -> tuple[Path, Path]:
    """Two stores of 400 blocks × 3 states, which differ everywhere."""
    paths = fast_folder / "one.zarr", fast_folder / "other.zarr"
    states = block_states(make_layout(), 0)
    for path, factor in zip(paths, (1.0, 0.5), strict=True):
        writer = CacheWriter.open(path, make_recipe(), make_layout())
        writer.grow(range(400 * BLOCK_SIZE))
        for block in range(400):
            writer.commit(block, {step: np.float32(factor) * values for step, values in states.items()})
    return paths


FEW_DESCRIPTORS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import numpy as np
from advkd.cache.read.compare import compare
from advkd.cache.read.reader import TrajectoryCache

one, other = (TrajectoryCache.open(path) for path in sys.argv[1:3])
for block in one.blocks:
    for step in one.states:
        assert len(one.rows(step, range(block * 16, block * 16 + 16))) == 16
generator = np.random.default_rng(0)
for _ in range(30):
    assert len(one.rows(2, generator.integers(0, one.num_seeds, 512))) == 512
found = compare(one, other)
assert len(found.apart) == 400 and found.num_equal == 0
"""


def test_few_descriptors_suffice_for_many_blocks(many: tuple[Path, Path]) -> None:
    """Where a process may have 256 files open, as on a Mac."""
    run = subprocess.run([sys.executable, "-c", FEW_DESCRIPTORS, *many], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def costs(store: Path, block: int) -> dict[str, Counter[str]]:
    """Calls of the operating system by kind, for each thing that is done to one block."""
    layout = make_layout()
    writer = CacheWriter(store, make_recipe(), layout)
    found: dict[str, Counter[str]] = {}
    for name, act in (
        ("grow", lambda: writer.grow(range((block + 1) * BLOCK_SIZE))),
        ("missing", lambda: writer.missing(range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE))),
        ("claim", lambda: writer.claim(block).__enter__()),
        ("commit", lambda: writer.commit(block, block_states(layout, block))),
        ("open", lambda: TrajectoryCache.open(store)),
        ("rows", lambda: TrajectoryCache.open(store).rows(2, range(block * BLOCK_SIZE, block * BLOCK_SIZE + 4))),
        ("record", lambda: TrajectoryCache.open(store).record(block)),
    ):
        with counted(store) as counts:
            act()
        found[name] = Counter()
        for (call, _), count in counts.items():
            found[name][call] += count
    return found


def test_a_block_costs_the_same_beside_400_others_as_beside_one(fast_folder: Path, many: tuple[Path, Path]) -> None:
    write_store(fast_folder / "small.zarr", "0:16")
    assert costs(fast_folder / "small.zarr", 1) == costs(many[0], 400)
