"""Every kind of damage to every file is found and named, mended by a rebuild, and never read as if it were data."""

import random
import re
import shutil
from collections.abc import Iterator
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from advkd.cache.care import strays
from advkd.cache.care.findings import Finding
from advkd.cache.care.verify import verify
from advkd.cache.errors import DamagedError, NotCachedError
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.store_paths import provenance_path
from advkd.cache.read import chunks
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from tests.cache.damage import IN_PLACE, PLACES, SEGMENT_BYTES, WHERE, check_mended, harm_of, look, quick
from tests.cache.harm import (
    NOTES_OF_NOW,
    Harm,
    Pristine,
    block_of,
    files_of,
    flipped,
    put,
    state_of,
)
from tests.stores import BLOCK_SIZE, ITEM_SHAPE, block_states, make_layout, make_recipe

ROW_BYTES = 2 * int(np.prod(ITEM_SHAPE))


def check_named(path: str, found: tuple[Finding, ...] | str) -> None:
    """A damaged file is named, with its block and its state."""
    if isinstance(found, str):
        assert path in found
        return
    of_file = [finding for finding in found if finding.file == path]
    assert of_file, (path, found)
    for finding in of_file:
        assert (finding.block, finding.state) == (block_of(path), state_of(path))
        assert path in str(finding)


def check_found(pristine: Pristine, harm: Harm) -> None:
    """What differs from before is named, and nothing else is."""
    before = pristine.files
    damaged = {path for path, data in harm.items() if before.get(path) != data} - set(NOTES_OF_NOW)
    with pristine.harmed(harm) as store:
        found = look(store)
    if isinstance(found, str):
        assert any(path in found for path in damaged)
        return
    for path in damaged:
        check_named(path, found)
    assert {finding.file for finding in found} == damaged


def changes(pristine: Pristine, harm: Harm) -> list[str]:
    return [path for path, data in harm.items() if pristine.files.get(path) != data]


def test_an_undamaged_store_has_no_findings_and_looking_changes_nothing(pristine: Pristine) -> None:
    assert look(pristine.root) == ()
    assert pristine.check_never_silent() == 0
    assert files_of(pristine.root) == pristine.files
    with pristine.harmed({"states/0002/c/77/0/0/0": b"stray", "provenance/writer.lock": None}) as store:
        before = files_of(store)
        assert len(look(store)) == 1
        assert files_of(store) == before


def test_a_flipped_bit_in_any_file_is_found(pristine: Pristine) -> None:
    generator = random.Random(0)
    for path in pristine.names:
        size = 8 * len(pristine.files[path])
        bits = {0, 7, size - 1, size - 8, size - 33, *(generator.randrange(size) for _ in range(12))}
        for bit in bits:
            check_found(pristine, {path: flipped(pristine.files[path], bit)})


@pytest.mark.slow
def test_a_flipped_bit_in_any_byte_is_found(pristine: Pristine) -> None:
    generator = random.Random(1)
    for path in pristine.names:
        for byte in range(len(pristine.files[path])):
            check_found(pristine, {path: flipped(pristine.files[path], 8 * byte + generator.randrange(8))})


def test_every_bit_of_what_arrays_declare_is_guarded(pristine: Pristine) -> None:
    """Here a flipped bit can make another number that would do as well: the ledger and the other arrays decide."""
    for path in (path for path in pristine.names if state_of(path) and path.endswith("/zarr.json")):
        data = pristine.files[path]
        start = data.index(b"    48,")
        for bit in range(8 * (start + 4), 8 * (start + 7)):
            harm = {path: flipped(data, bit)}
            check_found(pristine, harm)
            check_mended(pristine, harm)


def test_a_cut_or_an_addition_in_any_file_is_found(pristine: Pristine) -> None:
    for path in pristine.names:
        data = pristine.files[path]
        for changed in (b"", data[:1], data[: len(data) // 2], data[:-4], data[:-1], data + b"\0", data + data):
            check_found(pristine, {path: changed})


def test_a_file_that_is_gone_is_found(pristine: Pristine) -> None:
    for path in pristine.names:
        with pristine.harmed({path: None}) as store:
            found = look(store)
            if path.startswith("provenance/"):
                assert found == ()  # outside identity: a copy may come without it
            elif path.startswith("blocks/"):  # a block that nobody recorded doesn't exist; its files say that it did
                strays = {finding.file for finding in found if isinstance(finding, Finding)}
                assert strays == {name for name in pristine.names if block_of(name) == block_of(path)} - {path}
                assert all(isinstance(finding, Finding) and finding.block == block_of(path) for finding in found)
            else:
                check_named(path, found)
                assert isinstance(found, str) or len(found) == 1


def test_any_two_files_that_changed_places_are_found(pristine: Pristine) -> None:
    for one, other in combinations(pristine.names, 2):
        check_found(pristine, {one: pristine.files[other], other: pristine.files[one]})


def test_a_file_that_lies_in_anothers_place_is_found(pristine: Pristine) -> None:
    for one, other in permutations(pristine.files, 2):
        if pristine.files[one]:  # the lock is an empty file, which was a cut above
            check_found(pristine, {other: pristine.files[one]})


def test_a_file_that_lies_where_none_belongs_is_found(pristine: Pristine) -> None:
    for path in pristine.names:
        for place in PLACES:
            with pristine.harmed({place: pristine.files[path]}) as store:
                found = look(store)
                assert isinstance(found, tuple)
                assert [finding.file for finding in found] == [place]


def test_a_sealed_note_that_a_later_version_adds_is_no_finding(pristine: Pristine) -> None:
    with pristine.harmed({"provenance/evaluation.json": seal({"fid": 3.2})}) as store:
        assert look(store) == ()


def test_without_a_whole_state_it_is_a_partial_copy_and_no_fault(pristine: Pristine) -> None:
    names = [state.name for state in make_layout().states]
    for absent in (names[:1], names[1:2], names[2:], names[:2], names[1:], names):
        harm = {path: None for path in pristine.files if state_of(path) in absent}
        with pristine.harmed(harm) as store:
            cache = TrajectoryCache.open(store)
            verified = verify(cache)
            assert (verified.findings, verified.absent_states) == ((), tuple(absent))
            for step in (int(name) for name in absent):
                with pytest.raises(NotCachedError):
                    cache.rows(step, [0])
            for step in (int(name) for name in names if name not in absent):
                assert cache.rows(step, range(BLOCK_SIZE)).tobytes() == pristine.truth[step, 0].tobytes()


@quick
@given(kind=IN_PLACE, where=WHERE)
def test_reading_a_damaged_chunk_gives_the_true_bytes_or_an_error(pristine: Pristine, kind: str, where: int) -> None:
    harm = harm_of(pristine, kind, where, only="/c/")
    with pristine.harmed(harm) as store:
        num_errors = pristine.check_never_silent()
        values_differ = any(
            (store / path).read_bytes()[:-4] != pristine.files[path][:-4] for path in changes(pristine, harm)
        )
    assert bool(num_errors) == values_differ or kind == "truncate"


@quick
@given(kind=IN_PLACE, where=WHERE)
def test_reading_under_a_damaged_record_gives_the_true_bytes_or_an_error(
    pristine: Pristine, kind: str, where: int
) -> None:
    harm = harm_of(pristine, kind, where, only="blocks/")
    with pristine.harmed(harm):
        num_errors = pristine.check_never_silent()
    records = [path for path in changes(pristine, harm) if path.startswith("blocks/")]
    assert num_errors >= len(records) * len(make_layout().states) * BLOCK_SIZE


def test_a_flipped_bit_spoils_the_rows_of_its_segment_and_no_others(pristine: Pristine) -> None:
    path, step, block = "states/0002/c/1/0/0/0", 2, 1
    values = pristine.truth[step, block]
    for byte in range(0, values.nbytes, 61):
        start = byte // SEGMENT_BYTES * SEGMENT_BYTES
        spoilt = range(start // ROW_BYTES, -(-min(start + SEGMENT_BYTES, values.nbytes) // ROW_BYTES))
        with pristine.harmed({path: flipped(pristine.files[path], 8 * byte)}) as store:
            cache = TrajectoryCache.open(store)
            for row in range(BLOCK_SIZE):
                if row in spoilt:
                    with pytest.raises(DamagedError, match=re.escape(path)):
                        cache.rows(step, [block * BLOCK_SIZE + row])
                else:
                    assert cache.rows(step, [block * BLOCK_SIZE + row]).tobytes() == values[row].tobytes()


def test_a_file_that_was_replaced_is_checked_again(pristine: Pristine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open reader keeps few maps: a file that it opens again may be another one."""
    monkeypatch.setattr(chunks, "MAX_MAPPED_FILES", 1)
    path = "states/0002/c/1/0/0/0"
    seeds = range(BLOCK_SIZE, 2 * BLOCK_SIZE)
    with pristine.harmed({}) as store:
        cache = TrajectoryCache.open(store)
        assert cache.rows(2, seeds).tobytes() == pristine.truth[2, 1].tobytes()
        cache.rows(2, [0])
        put(store / path, flipped(pristine.files[path], 77))
        with pytest.raises(DamagedError, match=re.escape(path)):
            cache.rows(2, seeds)


def test_what_is_built_during_a_verification_is_no_finding(pristine: Pristine, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout()
    with pristine.harmed({}) as store:
        writer = CacheWriter.open(store, make_recipe(), layout)
        writer.grow(range(5 * BLOCK_SIZE))
        note = seal({"began": "now"})
        with writer.claim(3):
            put(store / provenance_path(3), note)
            put(store / "states/0000/c/3/0/0/0", b"in the making")
            assert look(store) == ()
        assert len(look(store)) == 2
        listing = strays.walk

        def later(root: Path) -> Iterator[str]:
            for block in (3, 4):
                put(store / provenance_path(block), note)
                writer.commit(block, block_states(layout, block))
            return listing(root)

        monkeypatch.setattr(strays, "walk", later)
        assert look(store) == ()


def test_a_store_without_blocks_has_no_findings(fast_folder: Path) -> None:
    path = fast_folder / "empty.zarr"
    writer = CacheWriter.open(path, make_recipe(), make_layout())
    assert look(path) == ()
    writer.grow(range(1))
    assert look(path) == ()
    shutil.rmtree(path)
