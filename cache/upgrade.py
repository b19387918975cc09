"""Rewriting an older store's metadata for this version; its data stays as it is.

Format 1 was preceded by a draft of development snapshots: records were indented JSON with lists of CRCs, knew nothing
of rounding, and the layout named no encoding. A draft's chunk files are format 1's. New formats get a step here each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from advkd.cache.durable import pretty_json, write_atomically
from advkd.cache.errors import DamagedError, NotACacheError
from advkd.cache.layout import CRC_BYTES, FORMAT, block_of_record, chunk_path, metadata_files, states_path
from advkd.cache.ledger import ArrayRecord, BlockRecord
from advkd.cache.locks import NOTE_FILE, StoreLocks
from advkd.cache.paths import read_bounded
from advkd.cache.reader import TrajectoryCache, read_metadata
from advkd.cache.recipe import Layout, Recipe, digest
from advkd.cache.seal import seal
from advkd.cache.source import LocalSource, open_source

_DRAFT = "draft of format 1"


def format_of(store: Path) -> str:
    """The format of a store, in words.

    Raises:
        NotACacheError: it is no cache.
    """
    try:
        value = json.loads(LocalSource(store).read("zarr.json"))["attributes"]["advkd"]
        draft = value["format"] == FORMAT and "encoding" not in value["layout"]
        return _DRAFT if draft else f"format {value['format']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise NotACacheError(f"{store} is not a trajectory cache (no zarr.json of one); nothing was changed") from None


def upgrade(store: Path) -> tuple[str, int]:
    """Bring a store to the newest format; repeating it after a crash goes on.

    Returns:
        The format that it had, and how many blocks' records were rewritten.

    Raises:
        NotACacheError: it is no cache, or of a newer format.
        DamagedError: a block's file differs from what its record says.
        LockedError: somebody writes to it.
    """
    open_source(store)
    found = format_of(store)
    if found != _DRAFT:
        read_metadata(LocalSource(store))  # a newer format is refused there
        return found, 0
    with StoreLocks(store).alone():
        return found, _from_draft(store)


def _from_draft(store: Path) -> int:
    value = json.loads(LocalSource(store).read("zarr.json"))["attributes"]["advkd"]
    recipe = Recipe.from_json(value["recipe"])
    draft_layout = digest(value["layout"])
    layout = Layout.from_json(value["layout"])
    num_blocks = 0
    for path in sorted((store / "blocks").glob("*.json")):
        block = block_of_record(path.name)
        if block is None:
            continue
        raw = json.loads(read_bounded(store, f"blocks/{path.name}"))
        if "record_sha256" in raw and raw.get("layout_hash") == layout.layout_hash:
            continue  # an earlier attempt did it
        _check_draft(raw, block, draft_layout, path)
        arrays = {states_path(state): _array(store, recipe, layout, states_path(state), block, raw)
                  for state in layout.states}  # fmt: skip
        BlockRecord(block=block, fingerprint=recipe.fingerprint, layout_hash=layout.layout_hash, arrays=arrays).write(
            store
        )
        num_blocks += 1
    _seal_provenance(store)
    num_seeds = _declared(store, layout)
    for name, metadata in metadata_files(
        recipe, layout, num_seeds
    ).items():  # the root's last: until then it is a draft
        write_atomically(store / name, [pretty_json(metadata)])
    TrajectoryCache.open(store)
    return num_blocks


def _check_draft(raw: dict[str, Any], block: int, layout_hash: str, path: Path) -> None:
    stated = raw.pop("record_sha256", None)
    if digest(raw) != stated or raw.get("block") != block or raw.get("layout_hash") != layout_hash:
        raise DamagedError(f"{path}: the ledger record of block {block} is torn or altered; remove it and go on")


def _array(store: Path, recipe: Recipe, layout: Layout, array: str, block: int, raw: dict[str, Any]) -> ArrayRecord:
    """A draft's entry, checked against the bytes; what rounding cost can't be known any more and counts as nought."""
    chunk = chunk_path(array, block, len(recipe.item_shape))
    data = LocalSource(store).read(chunk, layout.block_bytes(recipe.item_shape) + CRC_BYTES)
    values = np.frombuffer(data[:-CRC_BYTES], dtype=np.dtype(layout.dtype).newbyteorder("<"))
    record = ArrayRecord.of(data, values, values)
    if record.sha256 != raw["arrays"][array]["sha256"]:
        raise DamagedError(f"{store / chunk} differs from what its record says; remove blocks/{block:06d}.json, go on")
    return record


def _seal_provenance(store: Path) -> None:
    """The draft's notes had no hash of their own."""
    for path in sorted((store / "provenance").glob("*.json")):
        raw = read_bounded(store, f"provenance/{path.name}")
        if path.name != NOTE_FILE and b'"record_sha256"' not in raw:
            write_atomically(path, [seal(json.loads(raw))])


def _declared(store: Path, layout: Layout) -> int:
    source = LocalSource(store)
    shapes = [json.loads(source.read(f"{states_path(state)}/zarr.json"))["shape"][0] for state in layout.states]
    return int(min(shapes))
