"""Rules that have changed: a store is extended and checked by the rules that made it."""

from __future__ import annotations

import copy
from typing import Any

from advkd.cache.format.equivalence import equivalent
from advkd.cache.format.recipe import Recipe


def older_rules(found: Recipe, wanted: Recipe) -> tuple[str, ...] | None:
    """The older rules that explain how a store's recipe differs from the one that today's rules give.

    Returns:
        A line per older rule; none if the recipes give the same numbers; None if they differ in anything else.
    """
    value = copy.deepcopy(wanted.to_json())
    sampler: dict[str, Any] = value["sampler"]
    config, lines = sampler["config"], []
    if "landing" in sampler and "landing" not in found.sampler:
        del sampler["landing"]
        lines.append("its DDIM steps end at t − T // n instead of at the next timestep")
    if "x0" in sampler and "x0" not in found.sampler:
        lines.append(f"its solver leaves out what the teacher's scheduler does to x̂_0 ({sampler.pop('x0')})")
    found_clips = found.sampler["config"].get("clip_sample")
    if found_clips and config.get("clip_sample") is False and "clip_sample" not in found.teacher["scheduler"]:
        config["clip_sample"] = found_clips
        lines.append("it clips x̂_0, which the teacher's own scheduler does not")
    offset = config.get("steps_offset")  # flow matching's have none
    if offset and found.sampler["config"].get("steps_offset") == 0:
        config["steps_offset"] = 0
        sampler["timesteps"] = [timestep - offset for timestep in sampler["timesteps"]]
        lines.append(f"it leaves out the teacher's steps_offset of {offset}")
    return tuple(lines) if equivalent(found, Recipe.from_json(value)) else None
