"""Where things are in a store.

    store.zarr/
      zarr.json                   group; attributes.advkd: format, recipe, fingerprint, layout, layout hash
      states/zarr.json            group
      states/<step>/zarr.json     array (N, *item_shape), one chunk per block, codecs bytes + crc32c
      states/<step>/c/<block>/0/0/0    C-order values + 4 bytes of CRC: can be memory-mapped
      blocks/<block>.json         the ledger (advkd.cache.format.ledger)
      teacher/model.safetensors   the teacher's network, where it was kept: outside identity, named by the recipe's hash
      provenance/                 who, when, where, how long: outside identity

Row i is seed i. A block is a fixed, aligned run of `block_size` seeds; only whole blocks exist.
"""

from __future__ import annotations

from advkd.cache.format.layout import State

TEACHER_PATH = "teacher/model.safetensors"
"""Relative to the store."""


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
