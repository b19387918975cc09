"""The content of a store as JSON values, for `advkd-cache info`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advkd.cache.codec.unpacked_source import UnpackedSource
from advkd.cache.files.sealed_json import unseal
from advkd.cache.format.array_record import ArrayRecord
from advkd.cache.format.arrays import ArraySpec
from advkd.cache.format.equivalence import SCHEDULER_OPTIONS
from advkd.cache.format.layout import Layout
from advkd.cache.format.ledger import BlockRecord, content_digest
from advkd.cache.format.recipe import NOT_RECORDED, Recipe
from advkd.cache.format.store_paths import states_path
from advkd.cache.format.zarr_metadata import CRC_BYTES
from advkd.cache.read.compare import tolerance_of
from advkd.cache.read.reader import TrajectoryCache

MAX_BLOCKS_FOR_STATISTICS = 2000
"""Of a larger store, evenly spaced records are read, so that `info` stays quick; the summary says how many."""

PATH_TOLERANCE = 1e-4
FLOW_MATCHING = "flow matching"
_MAX_CHARACTERS = 4096
"""Of each value of the origin: Linux' longest path."""
ORIGIN_PATHS = ("scheduler", "lora")
"""Parts of a teacher's origin that may be files on the machine that built the store."""
_ORIGIN = ("source", "commit", "license", "attribution", "unet", "variant", *ORIGIN_PATHS)


def summarize(cache: TrajectoryCache) -> dict[str, Any]:
    """Identity, origin, seeds, gaps, bytes, and statistics of each state and array, as JSON.

    Raises:
        DamagedError: a ledger record is torn, altered or of another cache.
    """
    size, recipe, blocks = cache.layout.block_size, cache.recipe, cache.blocks
    sampled = blocks[:: max(1, -(-len(blocks) // MAX_BLOCKS_FOR_STATISTICS))]
    chunk_bytes = cache.layout.block_bytes(cache.item_shape) + CRC_BYTES
    origin = origin_of(cache)
    content, records = _read_ledger(cache, sampled)
    if records:
        cache.further_names = records[0].further_names  # so that no record is read twice
    further_bytes = sum(spec.block_bytes + CRC_BYTES for spec in cache.further)
    return {
        "store": cache.address,
        "format": recipe.format,
        "fingerprint": recipe.fingerprint,
        "layout_hash": cache.layout.layout_hash,
        "digest": content,
        "item_shape": list(cache.item_shape),
        "dtype": cache.layout.dtype,
        "encoding": cache.stored_layout.encoding,
        "block_size": size,
        "teacher": {"tensors_sha256": recipe.teacher["tensors_sha256"], **origin},
        "sampler": _sampler(recipe),
        "path": NOT_RECORDED if recipe.imported and len(cache.layout.states) == 2 else path_of(cache.layout),
        **({} if recipe.condition is None else {"condition": recipe.condition.to_json()}),
        **({} if recipe.prompts is None else {"prompts": recipe.prompts.to_json()}),
        **({} if recipe.space is None else {"space": recipe.space.to_json()}),
        "precision": recipe.precision,
        "noise": recipe.noise,
        "num_seeds": len(blocks) * size,
        "num_blocks": len(blocks),
        "declared_seeds": cache.num_seeds,
        "seeds": [[run[0] * size, run[1] * size] for run in runs(blocks)],
        "gaps": [[run[0] * size, run[1] * size] for run in gaps(blocks, cache.num_blocks)],
        "num_bytes": len(blocks) * (len(cache.states) * chunk_bytes + further_bytes),
        **({} if cache.packed is None else {"packed": _packed(cache, cache.packed, sampled)}),
        "statistics_of_blocks": len(sampled),
        "states": _states(cache, records),
        "arrays": _arrays(cache, records),
    }


def _sampler(recipe: Recipe) -> dict[str, Any]:
    """The sampler and, as far as the recipe says them, its spacing, its offset and what it does to x̂_0."""
    sampler, config = recipe.sampler, recipe.sampler["config"]
    own = SCHEDULER_OPTIONS.get(str(sampler.get("scheduler")), {})  # a class ignores the options that it doesn't have
    clips = ("clip_sample" in own and config.get("clip_sample")) or sampler.get("x0") == "clip"
    thresholds = ("thresholding" in own and config.get("thresholding")) or sampler.get("x0") == "threshold"
    options = {
        "spacing": config.get("timestep_spacing"),
        "steps_offset": config.get("steps_offset"),
        "landing": sampler.get("landing"),
        "clips_x0": config.get("clip_sample_range", 1.0) if clips and not thresholds else None,
        "thresholds_x0": config.get("sample_max_value", 1.0) if thresholds else None,
    }
    known = {key: sampler[key] for key in ("name", "steps", "eta", "deterministic")}
    return known | {key: value for key, value in options.items() if value is not None}


def path_of(layout: Layout) -> str:
    """Which path the states lie on, as their levels say."""
    if all(state.alpha == 1.0 for state in layout.states):
        return "variance exploding"
    if all(abs(state.alpha + state.sigma - 1.0) < PATH_TOLERANCE for state in layout.states):
        return FLOW_MATCHING
    # Products, not powers: a float that overflows raises under ** and is infinite under *.
    squares = [state.alpha * state.alpha + state.sigma * state.sigma for state in layout.states]
    if all(abs(square - 1.0) < PATH_TOLERANCE for square in squares):
        return "variance preserving"
    return "another linear path"


def runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending blocks as half-open runs without gaps."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return found


def gaps(blocks: Sequence[int], num_blocks: int) -> list[tuple[int, int]]:
    """The half-open runs of declared blocks that are not among `blocks`."""
    edges = [0, *[edge for run in runs(blocks) for edge in run], num_blocks]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if stop > start]


def _read_ledger(cache: TrajectoryCache, sampled: Sequence[int]) -> tuple[str, list[BlockRecord]]:
    """The content digest, and the records of some blocks: each file is read once."""
    chosen, seals, records = set(sampled), [], []
    for block, raw in cache.records.raw(cache.blocks):
        seals.append((block, cache.records.hash_of(block, raw)))
        if block in chosen:
            records.append(cache.records.decode(block, raw))
    return content_digest(seals), records


def _states(cache: TrajectoryCache, records: Sequence[BlockRecord]) -> list[dict[str, Any]]:
    tolerance = tolerance_of(cache)
    states = []
    for state in cache.layout.states:
        arrays = [record.arrays[states_path(state)] for record in records]
        states.append(
            {
                "step": state.step,
                "timestep": state.timestep,
                "alpha": state.alpha,
                "sigma": state.sigma,
                "scale": state.scale,
                "here": state.step in cache.states,
                "tolerance_rms": tolerance[state.step],
                **(_statistics(arrays) if arrays else {}),
            }
        )
    return states


def _arrays(cache: TrajectoryCache, records: Sequence[BlockRecord]) -> list[dict[str, Any]]:
    """Arrays besides the states, such as class labels."""
    here = {spec.path: spec for spec in cache.further}
    return [
        {
            "path": name,
            **(_described(here[name]) if name in here else {}),
            "here": name in here,
            "minimum": min(record.arrays[name].minimum for record in records if name in record.arrays),
            "maximum": max(record.arrays[name].maximum for record in records if name in record.arrays),
        }
        for name in cache.further_names
    ]


def _described(spec: ArraySpec) -> dict[str, Any]:
    return {"item_shape": list(spec.item_shape), "dtype": spec.dtype, "seeds_per_row": spec.seeds_per_row}


def _packed(cache: TrajectoryCache, source: UnpackedSource, sampled: Sequence[int]) -> dict[str, Any]:
    """Codec, size and measured error of a packed store; the latter two from the sampled blocks."""
    arrays = [source.records[block].of(state) for block in sampled for state in cache.states.values()]
    num_bytes = sum(array.num_bytes for array in arrays)
    return {
        "codec": source.packing.codec,
        **source.packing.parameters,
        "num_bytes": round(num_bytes * len(cache.blocks) / max(1, len(sampled))),
        "error_rms": (sum(array.error_rms**2 for array in arrays) / max(1, len(arrays))) ** 0.5,
        "error_max": max((array.error_max for array in arrays), default=0.0),
    }


def _statistics(arrays: Sequence[ArrayRecord]) -> dict[str, Any]:
    return {
        "minimum": min(array.minimum for array in arrays),
        "maximum": max(array.maximum for array in arrays),
        "num_nonfinite": sum(array.num_nonfinite for array in arrays),
        "rounding_rms": (sum((array.rounding_rms or 0.0) ** 2 for array in arrays) / len(arrays)) ** 0.5,
        "rounding_max": max(array.rounding_max or 0.0 for array in arrays),
    }


def origin_of(cache: TrajectoryCache) -> dict[str, Any]:
    """Source, commit, licence and chosen files of the teacher as text, and `class_names` by label (as text), as the
    store's first builder recorded them; only what is known."""
    try:
        return origin_in(unseal(cache.source.read("provenance/store.json"))["teacher"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def origin_in(value: Any) -> dict[str, Any]:
    """The same of a teacher's description that may come from elsewhere."""
    if not isinstance(value, dict) or not isinstance(value.get("class_names", {}), dict):
        return {}
    names = {str(label): str(name)[:_MAX_CHARACTERS] for label, name in value.get("class_names", {}).items()}
    known = {key: str(value[key])[:_MAX_CHARACTERS] for key in _ORIGIN if value.get(key)}
    return {**known, "class_names": names} if names else known
