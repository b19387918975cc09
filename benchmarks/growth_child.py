"""`python -m benchmarks.growth_child STORE`: times every way to look at a cache, in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from advkd.cache import CacheWriter, TrajectoryCache
from advkd.stages.student.training.data import epoch_order
from benchmarks.harness import peak_megabytes


def main() -> None:
    """Print seconds per act and megabytes as JSON."""
    store = Path(sys.argv[1])
    cache = TrajectoryCache.open(store)
    writer = CacheWriter(store, cache.recipe, cache.layout)
    found: dict[str, Any] = {}
    acts: dict[str, Callable[[], object]] = {
        "open": lambda: TrajectoryCache.open(store),
        "plan": lambda: TrajectoryCache.open(store).seeds(),
        "resume": lambda: len(writer.missing(range(cache.num_seeds))),
        "whole": lambda: len(writer.incomplete()),
        "order": lambda: epoch_order(cache.seeds(), 0, 0, 0),
        "batch": lambda: TrajectoryCache.open(store).rows(0, found["order"][:64]),
    }
    before, seconds = peak_megabytes(), {}
    for name, act in acts.items():
        begin = time.perf_counter()
        found[name] = act()
        seconds[name] = time.perf_counter() - begin
    assert len(np.unique(found["order"])) == len(found["plan"]) == cache.num_seeds
    assert found["resume"] == 0 and found["whole"] == 0
    print(json.dumps({"seconds": seconds, "megabytes": peak_megabytes() - before}))


if __name__ == "__main__":
    main()
