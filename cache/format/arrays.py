"""The arrays of a store, all described in one way: where they are, and what a block of them holds.

A store has one array per recorded state, `states/<step>`, and where its teacher was told labels `conditions/label`;
their descriptions follow from recipe and layout. A ledger may name more **further arrays**; each is described by its
own `zarr.json`, a plain array of one chunk per block with the codecs `bytes` and `crc32c`. Whatever copies, checks or
resizes a store handles every array through `ArraySpec`, so that a new kind of array needs an entry here at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from advkd.cache.errors import DamagedError
from advkd.cache.files.strict_json import integer, parse_json
from advkd.cache.format.array_record import ArrayRecord, num_segments
from advkd.cache.format.condition import LABEL_DTYPE, LABELS_PATH
from advkd.cache.format.layout import MAX_BLOCK_BYTES, Layout, State
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.source import Source, check_num_blocks
from advkd.cache.format.store_paths import chunk_path, metadata_path, states_path
from advkd.cache.format.zarr_metadata import CRC_BYTES, array_metadata, group_metadata, metadata_files, zarr_codecs

ITEM_SIZES = {
    **{f"{kind}{8 * size}": size for kind in ("int", "uint") for size in (1, 2, 4, 8)},
    **{f"float{8 * size}": size for size in (2, 4, 8)},
    "bool": 1,
}
"""Bytes of a value, by the dtypes that an array may have."""
MAX_AXES = 8
_INVALID = (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of a store."""

    path: str
    """Relative to the store, such as `states/0050` or `conditions/label`."""
    item_shape: tuple[int, ...]
    """Shape of one seed's values; () for one number per seed."""
    dtype: str
    block_size: int
    template: dict[str, Any]
    """Its `zarr.json` when it declares no seeds."""

    @property
    def metadata_path(self) -> str:
        """Its `zarr.json`, relative to the store."""
        return metadata_path(self.path)

    @property
    def item_bytes(self) -> int:
        """Bytes of one seed's values."""
        return math.prod(self.item_shape) * ITEM_SIZES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of the values of one block, not packed and without their CRC."""
        return self.block_size * self.item_bytes

    def fits(self, record: ArrayRecord) -> bool:
        """Whether a ledger entry, not of a packed state, is of a chunk of this size."""
        expected = (self.block_bytes + CRC_BYTES, 8 * num_segments(self.block_bytes))
        return (record.num_bytes, len(record.segments)) == expected

    def chunk_path(self, block: int) -> str:
        """The file of one block, relative to the store."""
        return chunk_path(self.path, block, len(self.item_shape))

    def metadata(self, num_seeds: int) -> dict[str, Any]:
        """Its `zarr.json` when it declares so many seeds."""
        return {**self.template, "shape": [num_seeds, *self.item_shape]}


def state_spec(recipe: Recipe, layout: Layout, state: State) -> ArraySpec:
    """The array of a recorded state."""
    return ArraySpec(
        path=states_path(state),
        item_shape=recipe.item_shape,
        dtype=layout.dtype,
        block_size=layout.block_size,
        template=array_metadata(recipe, layout, state, 0),
    )


def label_spec(block_size: int) -> ArraySpec:
    """The array of the labels, `conditions/label`."""
    template = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [0],
        "data_type": LABEL_DTYPE,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [block_size]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": -1,
        "codecs": zarr_codecs(None, LABEL_DTYPE),
        "dimension_names": ["seed"],
        "attributes": {},
        "storage_transformers": [],
    }
    return ArraySpec(path=LABELS_PATH, item_shape=(), dtype=LABEL_DTYPE, block_size=block_size, template=template)


def required_specs(recipe: Recipe, block_size: int) -> tuple[ArraySpec, ...]:
    """The arrays besides the states that every store of a recipe has."""
    return () if recipe.condition is None else (label_spec(block_size),)


def read_spec(source: Source, path: str, block_size: int) -> tuple[ArraySpec, int]:
    """A further array as its `zarr.json` describes it, and how many seeds it declares.

    Raises:
        FileNotFoundError: the array is not in this copy of the store.
        DamagedError: it is no array of one raw chunk per block.
    """
    where = metadata_path(path)
    try:
        value = parse_json(source.read(where))
        num_seeds, *item_shape = (integer(length) for length in value["shape"])
        spec = ArraySpec(
            path=path,
            item_shape=tuple(item_shape),
            dtype=str(value["data_type"]),
            block_size=block_size,
            template={**value, "shape": [0, *item_shape]},
        )
        fits = len(item_shape) < MAX_AXES and min([num_seeds, *(n - 1 for n in item_shape)]) >= 0
        fits = fits and spec.block_bytes <= MAX_BLOCK_BYTES and value == _expected(value, spec, num_seeds)
    except _INVALID:
        fits = False
    if not fits:
        raise DamagedError(f"{source.address}/{where} describes no array of one uncompressed chunk per block")
    check_num_blocks(f"{source.address}/{where}", num_seeds, block_size)
    return spec, num_seeds


def _expected(value: dict[str, Any], spec: ArraySpec, num_seeds: int) -> dict[str, Any]:
    """What `zarr.json` must say, its free members (fill value, names and attributes) taken from what it says."""
    to_bytes, crc = zarr_codecs(None, spec.dtype)
    if ITEM_SIZES[spec.dtype] == 1 and value["codecs"][0] == {"name": "bytes"}:
        to_bytes = {"name": "bytes"}  # single bytes have no order
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_seeds, *spec.item_shape],
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [spec.block_size, *spec.item_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [to_bytes, crc],
        "fill_value": value["fill_value"],
        **{name: value[name] for name in ("dimension_names", "attributes") if name in value},
        **({"storage_transformers": []} if "storage_transformers" in value else {}),
    }


def store_metadata(
    recipe: Recipe, layout: Layout, further: tuple[ArraySpec, ...], num_seeds: int
) -> dict[str, dict[str, Any]]:
    """Every `zarr.json` of a store by relative path, the root's last: a folder without it is no store."""
    groups = {path: group_metadata() for spec in further for path in group_paths(spec.path)}
    arrays = {spec.metadata_path: spec.metadata(num_seeds) for spec in further}
    return {**groups, **arrays, **metadata_files(recipe, layout, num_seeds)}


def group_paths(path: str) -> list[str]:
    """`zarr.json` of the groups that lead to an array."""
    parts = path.split("/")[:-1]
    return ["/".join([*parts[: depth + 1], "zarr.json"]) for depth in range(len(parts))]
