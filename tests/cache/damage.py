"""Kinds of damage, what verifying says of one, and how often to try."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from advkd.cache.care.findings import Finding
from advkd.cache.care.repair import repair
from advkd.cache.care.verify import verify
from advkd.cache.errors import CacheError
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from tests.cache.harm import (
    NUM_BLOCKS,
    Harm,
    Pristine,
    block_of,
    content,
    files_of,
    flipped,
    rebuild,
)
from tests.stores import make_layout, make_recipe

SEGMENT_BYTES = 192
"""Small, and no multiple of a row: so a chunk has many segments, and rows lie in one or in two of them."""
PLACES = (
    "zarr.json.bak",
    "blocks/000002 (1).json",
    "blocks/000077.json",
    "blocks/1.json",
    "conditions/label/c/0",
    "provenance/block-000077.json",
    "provenance/copy.json",
    "provenance/deep/note.json",
    "provenance/readme.txt",
    "states/0002/c/1/0/0/1",
    "states/0002/c/77/0/0/0",
    "states/0002/c/1/0/0/0.bak",
    "states/0003/zarr.json",
    "states/0003/c/0/0/0/0",
    "states/note",
)
"""Where no file of a store belongs."""
IN_PLACE = st.sampled_from(["flip", "truncate", "append", "swap", "overwrite"])
WHERE = st.integers(0, 1 << 40)
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def look(store: Path) -> tuple[Finding, ...] | str:
    """What verifying finds; where the store can't even be opened, what that says."""
    try:
        return verify(TrajectoryCache.open(store)).findings
    except CacheError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    return said


def harm_of(pristine: Pristine, kind: str, where: int, only: str = "") -> Harm:
    """What happens to one file, or two; `where` chooses which and at what place."""
    names = [path for path in pristine.names if only in path]
    where, which = divmod(where, len(names))
    path, data = names[which], pristine.files[names[which]]
    if kind == "flip":
        return {path: flipped(data, where % (8 * len(data)))}
    if kind == "truncate":
        return {path: data[: where % len(data)]}
    if kind == "append":
        return {path: data + bytes([where % 256])}
    if kind == "stray":
        return {PLACES[where % len(PLACES)]: data}
    other = pristine.names[where % len(pristine.names)]
    return {path: pristine.files[other]} | ({other: data} if kind == "swap" else {})


def check_mended(pristine: Pristine, harm: Harm) -> None:
    """Repairing removes what is damaged and its blocks' records, and a rebuild makes the store as it was."""
    before = content(pristine.files)
    damaged = {path for path, data in harm.items() if before.get(path) != data}
    blocks = {block_of(path) for path in damaged}
    with pristine.harmed(harm) as store:
        found = look(store)
        if isinstance(found, str):
            if "zarr.json" in harm:
                with pytest.raises(CacheError):  # without it nothing says what the store is: another must not begin
                    CacheWriter.open(store, make_recipe(), make_layout())
                return
            for path in damaged:
                if path in found:
                    (store / path).unlink()
            found = look(store)
            if isinstance(found, str):
                return  # two arrays changed places: the second is found when the first is gone
        harmed = content(files_of(store))
        repair(TrajectoryCache.open(store), found)
        repaired = content(files_of(store))
        for path in harmed.keys() | repaired.keys():
            if path not in damaged:
                is_record = path.startswith("blocks/") and block_of(path) in blocks
                assert repaired.get(path) == before[path] or (is_record and path not in repaired)
        left = look(store)
        assert isinstance(left, tuple)
        assert {finding.kind for finding in left} <= {"stray"}
        rebuild(store)
        assert TrajectoryCache.open(store).blocks == tuple(range(NUM_BLOCKS))
        strays = harm.keys() - pristine.files.keys()
        after = content(files_of(store))
        assert {path: data for path, data in after.items() if path not in strays} == before
        last = look(store)
        assert isinstance(last, tuple)
        assert {finding.file for finding in last} <= strays
