"""Rewriting an older store's metadata for this version; its data stays as it is.

Format 1 was preceded by a draft of development snapshots: records were indented JSON with lists of CRCs, knew nothing
of rounding, and the layout named no encoding. A draft's chunk files are format 1's. New formats get a step here each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from advkd.cache.errors import CacheError, DamagedError, NotACacheError
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.locks import NOTE_FILE, StoreLocks
from advkd.cache.files.paths import safe_target
from advkd.cache.files.sealed_json import seal
from advkd.cache.files.strict_json import in_line, parse_json, pretty_json
from advkd.cache.format.layout import MAX_BLOCK_BYTES, Layout
from advkd.cache.format.ledger import ArrayRecord, BlockRecord
from advkd.cache.format.metadata import read_metadata
from advkd.cache.format.recipe import Recipe, digest
from advkd.cache.format.source import LocalSource, check_num_blocks, open_source
from advkd.cache.format.store_paths import chunk_path, metadata_path, record_path, states_path
from advkd.cache.format.zarr_metadata import CRC_BYTES, FORMAT, MAX_BLOCKS, metadata_files
from advkd.cache.read.reader import TrajectoryCache

_DRAFT = "draft of format 1"


def format_of(store: Path) -> str:
    """The format of a store, in words.

    Raises:
        NotACacheError: it is no cache.
    """
    try:
        value = parse_json(LocalSource(store).read("zarr.json"))["attributes"]["advkd"]
        draft = value["format"] == FORMAT and "encoding" not in value["layout"]
        return _DRAFT if draft else f"format {value['format']}"
    except (OSError, ValueError, KeyError, TypeError):
        raise NotACacheError(f"{store} is not a trajectory cache (no zarr.json of one); nothing was changed") from None


def upgrade(store: Path) -> tuple[str, int]:
    """Bring a store to the newest format; repeating it after a crash goes on.

    Returns:
        The format that it had, and how many blocks' records were rewritten.

    Raises:
        NotACacheError: it is no cache, or of a newer format.
        DamagedError: a file is missing, or differs from what its record says.
        LockedError: somebody writes to it.
    """
    open_source(store)
    found = format_of(store)
    if found != _DRAFT:
        read_metadata(LocalSource(store))  # a newer format is refused there
        return found, 0
    with StoreLocks(store).alone():
        try:
            return found, _from_draft(store)
        except CacheError:
            raise
        except FileNotFoundError as error:
            raise DamagedError(f"{error.filename or error} is missing: an upgrade needs the whole store") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise DamagedError(f"{store}: its metadata are no draft's ({in_line(error)})") from None


def _from_draft(store: Path) -> int:
    source = LocalSource(store)
    value = parse_json(source.read("zarr.json"))["attributes"]["advkd"]
    recipe = Recipe.from_json(value["recipe"])
    draft_layout = digest(value["layout"])
    layout = Layout.from_json(value["layout"])
    num_blocks, num_seeds = 0, _declared(source, layout)
    check_num_blocks(str(store), num_seeds, layout.block_size)
    if layout.block_bytes(recipe.item_shape) > MAX_BLOCK_BYTES:
        raise DamagedError(f"{store}: its blocks can't be so large")
    for block in source.blocks(MAX_BLOCKS):
        raw = parse_json(source.read(record_path(block)))
        if "record_sha256" in raw and raw.get("layout_hash") == layout.layout_hash:
            continue  # an earlier attempt did it
        _check_draft(raw, block, draft_layout, store / record_path(block))
        arrays = {states_path(state): _array(store, recipe, layout, states_path(state), block, raw)
                  for state in layout.states}  # fmt: skip
        BlockRecord(block=block, fingerprint=recipe.fingerprint, layout_hash=layout.layout_hash, arrays=arrays).write(
            store
        )
        num_blocks += 1
    _seal_provenance(store)
    # The root's last: until then it is a draft.
    for name, metadata in metadata_files(recipe, layout, num_seeds).items():
        write_atomically(safe_target(store, name), [pretty_json(metadata)])
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
    source = LocalSource(store)
    for path in sorted((store / "provenance").glob("*.json")):
        name = f"provenance/{path.name}"
        raw = source.read(name)
        if path.name != NOTE_FILE and b'"record_sha256"' not in raw:
            write_atomically(safe_target(store, name), [seal(parse_json(raw))])


def _declared(source: LocalSource, layout: Layout) -> int:
    shapes = [parse_json(source.read(metadata_path(states_path(state))))["shape"][0] for state in layout.states]
    return int(min(shapes))
