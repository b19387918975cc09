"""Mutations of a store's metadata, sealed and hashed again so that no hash shields the code behind it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from hypothesis import strategies as st

from advkd.cache.files.sealed_json import seal
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.array_record import ArrayRecord, crc32c
from advkd.cache.format.layout import Layout
from advkd.cache.format.recipe import Recipe, digest
from advkd.cache.format.store_paths import chunk_path, record_path, states_path
from advkd.cache.format.zarr_metadata import metadata_files

Files = dict[str, bytes]
Place = tuple[str | int, ...]
MOST_BYTES = 1 << 16

NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 16, 48, 64, 255, 1 << 20, 1 << 31, 1 << 63, 1 << 64, 10**12, 10**30, 10**400,
     0.0, -0.0, 0.5, 1e-320, 1e30, 1e200, 1.7e308, -1e308, 16.0, True, False]
)  # fmt: skip
TEXTS = st.sampled_from(
    ["", "0", "0000", "0002", "9999", "float32", "raw", "../../etc/passwd", "/", "a" * 300, "\n", "\x1b[2J", "\0",
     "\u202e", "é", "\U0001f600", "0" * 64, "f" * 64, "NaN", "states/0002", "16"]
) | st.text(max_size=8)  # fmt: skip
LEAVES = st.none() | NUMBERS | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
INSERTIONS = [b"{", b"[", b'"', b"9" * 30, b"\0", b"\xff", b"\\ud800", b",", b"-"]
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(TEXTS, LEAVES, max_size=3)


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every part of a JSON value."""
    yield place
    if isinstance(value, dict):
        for key, below in value.items():
            yield from places(below, (*place, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from places(below, (*place, index))


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three parts changed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = [place for place in places(value) if place]
        if not found:
            break
        *above, last = draw(st.sampled_from(found))
        parent = value
        for key in above:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "remove", "add", "repeat", "move", "nest"]))
        if how == "replace":
            parent[last] = draw(VALUES)
        elif how == "remove":
            del parent[last]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(TEXTS)] = draw(VALUES)
        elif how == "move" and isinstance(parent, dict):
            parent[draw(TEXTS)] = parent.pop(last)
        elif how == "nest":
            for _ in range(draw(st.sampled_from([1, 3, 30, 70, 400]))):
                parent[last] = [parent[last]]
        elif isinstance(parent, list):
            parent.insert(int(last), copy.deepcopy(parent[last]))
    return value


@st.composite
def broken_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes with a few places changed."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(changed)))
        how = draw(st.sampled_from(["flip", "insert", "remove", "copy"]))
        if how == "flip" and at < len(changed):
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "insert":
            changed[at:at] = draw(
                st.sampled_from([b"{", b"[", b'"', b"9" * 30, b"\0", b"\xff", b"\\ud800", b",", b"-"])
            )
        elif how == "remove":
            del changed[at : at + draw(st.integers(1, 40))]
        else:
            changed[at:at] = changed[max(0, at - draw(st.integers(1, 200))) : at]
    return bytes(changed)


def make_consistent(files: Files) -> Files:
    """Everything fits what the root now says, as far as it says something: hashes, arrays, records, small chunks."""
    files = dict(files)
    try:
        root = json.loads(files["zarr.json"])
        ours = root["attributes"]["advkd"]
        ours["fingerprint"], ours["layout_hash"] = digest(ours["recipe"]), digest(ours["layout"])
        files["zarr.json"] = pretty_json(root)
        recipe, layout = Recipe.from_json(ours["recipe"]), Layout.from_json(ours["layout"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return files
    arrays = metadata_files(recipe, layout, 3 * layout.block_size)
    files |= {name: pretty_json(value) for name, value in arrays.items() if name != "zarr.json"}
    size = layout.block_bytes(recipe.item_shape)
    if size > MOST_BYTES:
        return files
    body = bytes(size)
    chunk = body + crc32c(body).to_bytes(4, "little")
    values = np.zeros(1, dtype=np.float32)
    entry = asdict(ArrayRecord.of(chunk, values, values))
    for block in range(3):
        record = {"arrays": {states_path(state): entry for state in layout.states}, "block": block, "format": 1,
                  "fingerprint": ours["fingerprint"], "layout_hash": ours["layout_hash"]}  # fmt: skip
        files[record_path(block)] = seal(record)
    for state in layout.states[:4]:
        files[chunk_path(states_path(state), 0, len(recipe.item_shape))] = chunk
    return files


def sealed(value: Any) -> bytes:
    """Anything, with a seal that fits where there can be one."""
    if isinstance(value, dict):
        value = {key: part for key, part in value.items() if key != "record_sha256"}
    if isinstance(value, dict) and value:
        return seal(value)
    return json.dumps(value).encode()


@st.composite
def mutated_stores(draw: st.DrawFn, files: Files) -> Files:
    """A sound store's files of JSON, one or two of them changed; only those that differ from before."""
    after = dict(files)
    names = draw(st.lists(st.sampled_from(["zarr.json"] * 3 + sorted(files)), min_size=1, max_size=2, unique=True))
    for name in sorted(names, key=lambda name: name != "zarr.json"):
        if draw(st.integers(0, 3)) == 0:
            after[name] = draw(broken_bytes(after[name]))
            continue
        value = draw(mutated(json.loads(after[name])))
        has_seal = name.startswith(("blocks/", "provenance/block-", "provenance/store", "provenance/tolerance"))
        after[name] = sealed(value) if has_seal else json.dumps(value, sort_keys=True, indent=2).encode() + b"\n"
        if name == "zarr.json" and draw(st.integers(0, 3)):
            after = make_consistent(after)
    return {name: data for name, data in after.items() if data != files.get(name)}
