"""The Zarr v3 metadata with which any Zarr reader opens a store.

Generated here, not by the installed zarr: zarr's own JSON is neither sorted nor ends in a newline, and its members
differ between versions, while a store's bytes are a function of its recipe.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from advkd.cache.format.encoding import Packing
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.store_paths import metadata_path, states_path

CRC_BYTES = 4
MAX_BLOCKS = 1_000_000
"""Largest number that a store may declare: a header that claims more is refused, not iterated over."""
_BLOSC = {"cname": "zstd", "shuffle": "bitshuffle", "blocksize": 0}
_PCODEC = {"mode_spec": "auto", "delta_spec": "auto", "paging_spec": "equal_pages_up_to", "equal_pages_up_to": 1 << 18}


def root_metadata(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """`zarr.json` of the store: a plain group whose attributes say what it is."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {
            "advkd": {
                "format": recipe.format,
                "recipe": recipe.to_json(),
                "fingerprint": recipe.fingerprint,
                "layout": layout.to_json(),
                "layout_hash": layout.layout_hash,
            }
        },
    }


def group_metadata() -> dict[str, Any]:
    """`zarr.json` of the group `states`."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {}}


def array_metadata(recipe: Recipe, layout: Layout, state: State, num_seeds: int) -> dict[str, Any]:
    """`zarr.json` of one state. The fill value is NaN, so that a missing chunk never passes for data."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_seeds, *recipe.item_shape],
        "data_type": layout.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [layout.block_size, *recipe.item_shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN",
        "codecs": zarr_codecs(layout.packing, layout.dtype),
        "dimension_names": ["seed", "channel", "y", "x"],
        "attributes": {
            "timestep": state.timestep,
            "alpha": state.alpha,
            "sigma": state.sigma,
            "scale": state.scale,
        },
        "storage_transformers": [],
    }


def metadata_files(recipe: Recipe, layout: Layout, num_seeds: int) -> dict[str, dict[str, Any]]:
    """Every `zarr.json` of a store by relative path, the root's last: a folder without it is no store."""
    arrays = {
        metadata_path(states_path(state)): array_metadata(recipe, layout, state, num_seeds) for state in layout.states
    }
    return {"states/zarr.json": group_metadata(), **arrays, "zarr.json": root_metadata(recipe, layout)}


def zarr_codecs(packing: Packing | None, dtype: str) -> list[dict[str, Any]]:
    """The `codecs` of an array's `zarr.json`; raw if None."""
    to_bytes: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    crc: list[dict[str, Any]] = [{"name": "crc32c"}]
    if packing is None:
        return to_bytes + crc
    if packing.is_predictive:
        configuration = {"codec": packing.codec, **packing.parameters}
        if packing.encoding == packing.codec:  # as these stores were first written
            return [{"name": "advkd.chain", "configuration": configuration}, *crc]
        return [{"name": "advkd.packed", "configuration": configuration}]
    level = packing.parameters["level"]
    if packing.codec == "zstd":
        return [*to_bytes, {"name": "zstd", "configuration": {"level": level, "checksum": False}}, *crc]
    if packing.codec == "blosc":
        size = np.dtype(dtype).itemsize
        return [*to_bytes, {"name": "blosc", "configuration": {**_BLOSC, "clevel": level, "typesize": size}}, *crc]
    return [{"name": "numcodecs.pcodec", "configuration": {"level": level, **_PCODEC}}, *crc]
