"""`python -m benchmarks.recording_child …`: samples with or without recording, in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advkd.stages.teacher.build import background, build
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.sample.sampling import initial_noise, record_states
from benchmarks.harness import peak_megabytes


def timed(owner: Any, name: str) -> list[float]:
    """Replace a function by one that also appends its duration to the returned list."""
    original: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def call(*arguments: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - begin)

    setattr(owner, name, call)
    return seconds


def main() -> None:
    """Print peak memory and, where a build was asked for, the duration of its parts as JSON."""
    how, teacher, store, *numbers, device = sys.argv[1:]
    block_size, batch, blocks = map(int, numbers)
    config = CacheConfig(
        seeds=f"0:{block_size * blocks}", record=10, block_size=block_size, batch_size=batch, device=device
    )
    plan = make_plan(TeacherConfig(source=teacher), SamplerConfig(steps=10), config, Path(store))
    found: dict[str, Any] = {}
    if how == "sample":  # weights and activations only: batches are sampled and dropped
        path = SolverPath.of(plan.network.scheduler_config, plan.sampler)
        for start in range(0, block_size, batch):
            seeds = range(start, min(start + batch, block_size))
            noise = initial_noise(0, seeds, plan.recipe.item_shape, "float16")
            record_states(plan.network, path, noise, seeds=seeds, root_seed=0, record=[])
    else:
        found = {
            "waited": timed(background.Background, "wait"),
            "sampled": timed(build, "sample_block"),
            "committed": timed(build, "commit_block"),
        }
        build.build(plan)
    print(json.dumps({"peak": peak_megabytes(), **found}))


if __name__ == "__main__":
    main()
