"""The arrays of a store, all described in one way: where they are, and what a block of them holds.

A store has one array per recorded state, `states/<step>`, and where its teacher was told labels or prompts arrays of
`conditions/`; their descriptions follow from recipe and layout. A ledger may name more **further arrays**; each is
described by its own `zarr.json`, a plain array of one chunk per block with the codecs `bytes` and `crc32c`. Whatever
copies, checks or resizes a store handles every array through `ArraySpec`, so that a new kind of array needs an entry
here at most.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from advkd.cache.errors import DamagedError
from advkd.cache.files.strict_json import integer, parse_json
from advkd.cache.format.array_record import ArrayRecord, num_segments
from advkd.cache.format.condition import LABEL_DTYPE, LABELS_PATH
from advkd.cache.format.layout import MAX_BLOCK_BYTES, Layout, State
from advkd.cache.format.prompts import MAX_TEXT_BYTES, TEXT_PATH, PromptCondition
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
_INVALID = (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError, ZeroDivisionError)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of a store."""

    path: str
    """Relative to the store, such as `states/0050` or `conditions/label`."""
    item_shape: tuple[int, ...]
    """Shape of one row's values; () for one number per row."""
    dtype: str
    block_size: int
    """Rows of a chunk: as many as a block has seeds, or prompts."""
    template: dict[str, Any]
    """Its `zarr.json` when it declares no seeds."""
    seeds_per_row: int = 1
    """Seeds that share a row, such as those of a prompt."""

    @property
    def metadata_path(self) -> str:
        """Its `zarr.json`, relative to the store."""
        return metadata_path(self.path)

    @property
    def item_bytes(self) -> int:
        """Bytes of one row's values."""
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
        return {**self.template, "shape": [num_seeds // self.seeds_per_row, *self.item_shape]}


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
    return _plain_spec(LABELS_PATH, (), LABEL_DTYPE, fill_value=-1, block_size=block_size)


def prompt_specs(prompts: PromptCondition, block_size: int) -> tuple[ArraySpec, ...]:
    """The arrays of a store's prompts: texts, embeddings, and the lengths of padded ones; a row per prompt."""
    make = functools.partial(
        _plain_spec,
        block_size=block_size // prompts.seeds_per_prompt,
        seeds_per_row=prompts.seeds_per_prompt,
    )
    found = [make(TEXT_PATH, (MAX_TEXT_BYTES,), "uint8", fill_value=0)]
    for one in prompts.embeddings:
        fill = {"f": "NaN", "b": False}.get(one.dtype[0], -1)
        found.append(make(one.path, one.shape, one.dtype, fill_value=fill))
        if one.padded:
            found.append(make(one.length_path, (), "int64", fill_value=-1))
    return tuple(found)


def _plain_spec(
    path: str,
    item_shape: tuple[int, ...],
    dtype: str,
    *,
    fill_value: Any,
    block_size: int,
    seeds_per_row: int = 1,
) -> ArraySpec:
    rows = "seed" if seeds_per_row == 1 else "prompt"
    template = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [0, *item_shape],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [block_size, *item_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": zarr_codecs(None, dtype),
        "dimension_names": [rows, *[None] * len(item_shape)],
        "attributes": {},
        "storage_transformers": [],
    }
    return ArraySpec(
        path=path,
        item_shape=item_shape,
        dtype=dtype,
        block_size=block_size,
        seeds_per_row=seeds_per_row,
        template=template,
    )


def required_specs(recipe: Recipe, block_size: int) -> tuple[ArraySpec, ...]:
    """The arrays besides the states that every store of a recipe has."""
    if recipe.prompts is not None:
        return prompt_specs(recipe.prompts, block_size)
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
        num_rows, *item_shape = (integer(length) for length in value["shape"])
        rows = integer(value["chunk_grid"]["configuration"]["chunk_shape"][0])
        seeds_per_row, uneven = divmod(block_size, rows)
        spec = ArraySpec(
            path=path,
            item_shape=tuple(item_shape),
            dtype=str(value["data_type"]),
            block_size=rows,
            seeds_per_row=seeds_per_row,
            template={**value, "shape": [0, *item_shape]},
        )
        fits = len(item_shape) < MAX_AXES and min([num_rows, *(n - 1 for n in item_shape)]) >= 0 and not uneven
        fits = fits and spec.block_bytes <= MAX_BLOCK_BYTES and value == _expected(value, spec, num_rows)
    except _INVALID:
        fits = False
    if not fits:
        raise DamagedError(f"{source.address}/{where} describes no array of one uncompressed chunk per block")
    check_num_blocks(f"{source.address}/{where}", num_rows, rows)
    return spec, num_rows * seeds_per_row


def _expected(value: dict[str, Any], spec: ArraySpec, num_rows: int) -> dict[str, Any]:
    """What `zarr.json` must say, its free members (fill value, names and attributes) taken from what it says."""
    to_bytes, crc = zarr_codecs(None, spec.dtype)
    if ITEM_SIZES[spec.dtype] == 1 and value["codecs"][0] == {"name": "bytes"}:
        to_bytes = {"name": "bytes"}  # single bytes have no order
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_rows, *spec.item_shape],
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
