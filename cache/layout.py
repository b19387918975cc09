"""Where things are in a store, and the Zarr v3 metadata that makes any Zarr reader open it.

    store.zarr/
      zarr.json                   group; attributes.advkd: format, recipe, fingerprint, layout, layout hash
      states/zarr.json            group
      states/<step>/zarr.json     array (N, *item_shape), one chunk a block, codecs bytes + crc32c
      states/<step>/c/<block>/0/0/0    C-order values + 4 bytes of CRC: can be memory-mapped
      blocks/<block>.json         the ledger (advkd.cache.ledger)
      provenance/                 who, when, where, how long: outside identity

Row i is seed i. A block is a fixed, aligned run of `block_size` seeds; only whole blocks exist. The metadata is
generated here rather than by the installed zarr so that it is the same bytes under every version.
"""

from __future__ import annotations

from typing import Any

from advkd.cache.errors import UsageError
from advkd.cache.plain import zarr_codecs
from advkd.cache.recipe import Layout, Recipe, State

FORMAT = 1
CRC_BYTES = 4
MAX_BLOCKS = 1_000_000
"""What a store can declare at most: a header that claims more is refused, not walked."""


def metadata_path(array: str) -> str:
    """`zarr.json` of an array, relative to the store."""
    return f"{array}/zarr.json"


def states_path(state: State) -> str:
    """Array path of a state, relative to the store."""
    return f"states/{state.name}"


def chunk_path(array: str, block: int, num_item_axes: int) -> str:
    """File of one block of an array, relative to the store."""
    return "/".join([array, "c", str(block), *["0"] * num_item_axes])


def record_path(block: int) -> str:
    """Ledger record of a block, relative to the store."""
    return f"blocks/{block:06d}.json"


def provenance_path(block: int) -> str:
    """Who made a block, when and where, relative to the store."""
    return f"provenance/block-{block:06d}.json"


def block_of_record(name: str) -> int | None:
    """The block that a file in `blocks/` is the record of, by its name; None if it is none."""
    stem, dot, suffix = name.partition(".")
    if dot and suffix == "json" and stem.isascii() and stem.isdigit() and name == record_path(int(stem)).split("/")[1]:
        return int(stem)
    return None


def root_metadata(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """`zarr.json` of the store: a plain group whose attributes say what it is."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {
            "advkd": {
                "format": FORMAT,
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
    """`zarr.json` of one state. The fill value is NaN, so that what is missing can't pass for data."""
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
    """Every `zarr.json` of a store, by relative path, the root's last: a store without it is not a store."""
    arrays = {
        metadata_path(states_path(state)): array_metadata(recipe, layout, state, num_seeds) for state in layout.states
    }
    return {"states/zarr.json": group_metadata(), **arrays, "zarr.json": root_metadata(recipe, layout)}


def parse_seed_range(text: str) -> range:
    """Read `A:B`, a half-open range of seeds.

    Raises:
        UsageError: not two integers, negative, empty or reversed.
    """
    first, colon, last = text.partition(":")
    try:
        start, stop = int(first or 0), int(last)
    except ValueError:
        start, stop, colon = 0, 0, ""
    if not colon:
        raise UsageError(f"seeds {text!r}: expected A:B, such as 0:4096")
    if start < 0 or stop < 0:
        raise UsageError(f"seeds {text!r}: seeds are not negative")
    if stop <= start:
        raise UsageError(f"seeds {text!r}: the range is {'empty' if stop == start else 'reversed'}; B must exceed A")
    if stop > 1 << 40:
        raise UsageError(f"seeds {text!r}: at most 2^40 seeds")
    return range(start, stop)


def blocks_of(seeds: range, block_size: int) -> range:
    """The whole blocks that cover a range of seeds: only whole blocks exist, so the range widens to their edges."""
    return range(seeds.start // block_size, -(-seeds.stop // block_size))


def seeds_of(block: int, block_size: int) -> range:
    """The seeds of one block."""
    return range(block * block_size, (block + 1) * block_size)
