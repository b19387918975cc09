"""Stores that carry class labels besides their states, as a later version would write them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from advkd.cache.files.sealed_json import seal
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.array_record import crc32c
from tests.stores import BLOCK_SIZE, write_store

LABEL = "conditions/label"
EMBEDDING = "conditions/text/embedding"
"""Another array, with more than one dimension."""
DTYPES = {LABEL: "int32", EMBEDDING: "float16"}
ITEM_SHAPES: dict[str, tuple[int, ...]] = {LABEL: (), EMBEDDING: (3, 2)}


def values_of(array: str, block: int) -> npt.NDArray[Any]:
    """What a block of an array holds."""
    numbers = np.arange(BLOCK_SIZE * int(np.prod(ITEM_SHAPES[array])), dtype=np.int64) * 7 + 3 * block
    return (numbers % 10).reshape(BLOCK_SIZE, *ITEM_SHAPES[array]).astype(np.dtype(DTYPES[array]).newbyteorder("<"))


def write_labelled(path: Path, seeds: str = "0:64", arrays: tuple[str, ...] = (LABEL,), **changes: object) -> None:
    """A committed store over some seeds with further arrays."""
    write_store(path, seeds, **changes)
    add_arrays(path, arrays)


def add_arrays(store: Path, arrays: tuple[str, ...] = (LABEL,), fill_value: object = -1) -> None:
    """Give every block of a store further arrays: metadata, chunks, entries of the ledger."""
    declared = json.loads((store / "states/0000/zarr.json").read_text())["shape"][0]
    for array in arrays:
        for depth in range(1, len(array.split("/"))):
            group = store / "/".join(array.split("/")[:depth]) / "zarr.json"
            group.parent.mkdir(parents=True, exist_ok=True)
            group.write_bytes(pretty_json({"zarr_format": 3, "node_type": "group", "attributes": {}}))
        (store / array).mkdir(parents=True, exist_ok=True)
        (store / array / "zarr.json").write_bytes(pretty_json(metadata_of(array, declared, fill_value)))
    for file in sorted((store / "blocks").iterdir()):
        block, record = int(file.stem), json.loads(file.read_text())
        del record["record_sha256"]
        for array in arrays:
            values = values_of(array, block)
            body = values.tobytes()
            data = body + crc32c(body).to_bytes(4, "little")
            chunk = store / chunk_of(array, block)
            chunk.parent.mkdir(parents=True, exist_ok=True)
            chunk.write_bytes(data)
            of_kind = int if values.dtype.kind == "i" else float
            record["arrays"][array] = {
                "num_bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "segments": f"{crc32c(body):08x}",
                "minimum": of_kind(values.min()),
                "maximum": of_kind(values.max()),
                "num_nonfinite": 0,
            }
        file.write_bytes(seal(record))


def metadata_of(array: str, num_seeds: int, fill_value: object = -1) -> dict[str, Any]:
    """`zarr.json` of a further array."""
    shape = ITEM_SHAPES[array]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_seeds, *shape],
        "data_type": DTYPES[array],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [BLOCK_SIZE, *shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value if array == LABEL else "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "dimension_names": ["seed", *"ab"[: len(shape)]],
        "attributes": {},
        "storage_transformers": [],
    }


def chunk_of(array: str, block: int) -> str:
    """The file of one block of a further array."""
    return "/".join([array, "c", str(block), *["0"] * len(ITEM_SHAPES[array])])


def read_by_zarr(store: Path, array: str) -> npt.NDArray[Any]:
    """The whole array, as plain Zarr reads it."""
    found = zarr.open_group(store, mode="r")[array]
    assert isinstance(found, zarr.Array)
    return np.asarray(found[:])
