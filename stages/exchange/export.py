"""Writes a cache for other tools: a shard per block, and `index.json`, which says what they hold.

A shard is written whole or not at all, so that the same call goes on where an earlier one stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advkd.cache.care.summary import origin_of, path_of
from advkd.cache.errors import NotCachedError, UsageError
from advkd.cache.files.durable import write_atomically, write_json
from advkd.cache.files.strict_json import parse_json
from advkd.cache.format.seeds import parse_seed_range
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.exchange.forms import FORMS, Form, Rows
from advkd.stages.reporter import Reporter

INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    num_shards: int
    num_present: int
    """Shards that an earlier call had written."""
    num_seeds: int


def export_cache(
    cache: TrajectoryCache,
    folder: Path,
    form: str,
    reporter: Reporter,
    *,
    seeds: str | None = None,
    steps: Sequence[int] | None = None,
) -> Exported:
    """Write a cache's seeds in one of `FORMS`.

    Args:
        cache: local or remote.
        folder: to write to.
        form: a key of `FORMS`.
        reporter: shows progress.
        seeds: A:B; all that are there if None.
        steps: the states of a path, as numbers of solver steps, x_T and x_0 among them; all if None.

    Raises:
        UsageError: the folder holds something else, or the states don't begin with x_T and end with x_0.
        NotCachedError: no such seed is there, or a state isn't here.
    """
    known, path = FORMS[form], _path(cache, steps)
    asked = parse_seed_range(seeds) if seeds else range(cache.num_seeds)
    size = cache.layout.block_size
    shards = {}
    for block in cache.blocks:
        rows = range(max(asked.start, block * size), min(asked.stop, (block + 1) * size))
        if rows:
            shards[f"{block:05d}.{known.suffix}"] = rows
    if not shards:
        raise NotCachedError(f"{cache.address} has none of the seeds {asked.start}:{asked.stop}")
    index = _index(cache, form, known, path, shards)
    _begin(folder, index)
    todo = {name: rows for name, rows in shards.items() if not (folder / name).is_file()}
    reporter.start("export", len(shards), "shards", done=len(shards) - len(todo))
    for name, rows in todo.items():
        write_atomically(folder / name, [known.make(_rows(cache, path if known.whole_path else path[-1:], rows))])
        reporter.advance(1, name)
    reporter.finish()
    return Exported(
        folder=folder,
        num_shards=len(shards),
        num_present=len(shards) - len(todo),
        num_seeds=sum(map(len, shards.values())),
    )


def _path(cache: TrajectoryCache, steps: Sequence[int] | None) -> list[int]:
    recorded = [*cache.states]
    chosen = recorded if steps is None else sorted(set(steps))
    first, last = cache.layout.states[0].step, cache.layout.states[-1].step
    if len(chosen) < 2 or (chosen[0], chosen[-1]) != (first, last):
        raise UsageError(f"states {chosen}: must include x_T and x_0, the states after {first} and {last} steps")
    for step in chosen:
        cache.state(step)  # raises if it isn't here
    return chosen


def _rows(cache: TrajectoryCache, path: Sequence[int], seeds: range) -> Rows:
    wanted = np.arange(seeds.start, seeds.stop, dtype=np.int64)
    stored = {step: cache.rows(step, wanted) for step in {*path, cache.layout.states[0].step}}
    scaled = [stored[step].astype(np.float32) * np.float32(cache.states[step].scale) for step in path]
    dtype = cache.layout.dtype
    return Rows(
        seeds=wanted,
        path=np.stack(scaled, axis=1).astype(dtype),
        noise=stored[cache.layout.states[0].step],
        labels=None if cache.recipe.condition is None else cache.labels(wanted),
    )


def _index(
    cache: TrajectoryCache, form: str, known: Form, path: Sequence[int], shards: dict[str, range]
) -> dict[str, Any]:
    states = [cache.states[step] for step in path]
    inner = states if form == "webdataset" else states[:-1]
    space = cache.recipe.space
    return {
        "made_by": "advkd-cache export",
        "format": form,
        "fingerprint": cache.recipe.fingerprint,
        "digest": cache.digest_of([int(name.split(".")[0]) for name in shards]),
        "teacher": origin_of(cache),
        "item_shape": list(cache.item_shape),
        "dtype": cache.layout.dtype,
        "space": None if space is None else space.to_json(),
        "path_kind": path_of(cache.layout),
        **(
            {
                "path_steps": [state.step for state in inner],
                "path_timesteps": [state.timestep for state in inner],
                "path_levels": [[state.alpha, state.sigma] for state in inner],
            }
            if known.whole_path
            else {}
        ),
        "shards": {name: [rows.start, rows.stop] for name, rows in shards.items()},
    }


def _begin(folder: Path, index: dict[str, Any]) -> None:
    """Write the index, unless an earlier call has written the same.

    Raises:
        UsageError: the folder holds something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        write_json(folder / INDEX, index)
        return
    try:
        found = parse_json((folder / INDEX).read_bytes())
    except (OSError, ValueError):
        found = None
    if found != index:
        raise UsageError(f"{folder} holds something other than this export: choose another --out, or move it away")
