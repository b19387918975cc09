"""A store is written whole, read back equal, and never trusted further than its ledger."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from advkd.cache.errors import (
    CacheError,
    CacheNotFoundError,
    DamagedError,
    MismatchError,
    NotACacheError,
    NotCachedError,
    UsageError,
)
from advkd.cache.files import durable
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.differences import differences
from advkd.cache.format.seeds import blocks_of, parse_seed_range
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from tests.stores import BLOCK_SIZE, ITEM_SHAPE, block_states, make_layout, make_recipe, tree, write_store


def test_rows_come_back_in_the_order_asked_for(store: Path) -> None:
    cache = TrajectoryCache.open(store)
    wanted = [200, 3, 3, 17, 255]
    rows = cache.rows(4, wanted)
    layout = make_layout()
    expected = [block_states(layout, seed // BLOCK_SIZE)[4][seed % BLOCK_SIZE] for seed in wanted]
    np.testing.assert_array_equal(rows, np.stack(expected).astype(np.float16))
    assert rows.shape == (5, *ITEM_SHAPE)


def test_any_zarr_reader_opens_it(store: Path) -> None:
    cache = TrajectoryCache.open(store)
    group = zarr.open_group(store, mode="r")
    for step in (0, 2, 4):
        array = group[f"states/{step:04d}"]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(array[:], cache.rows(step, cache.seeds()))
        assert array.attrs["timestep"] == cache.states[step].timestep
    np.testing.assert_array_equal(cache.dask_array(4)[5:9].compute(), cache.rows(4, range(5, 9)))


def test_a_seed_that_nobody_built_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    path = tmp_path / "gap.zarr"
    write_store(path, "32:64")
    cache = TrajectoryCache.open(path)
    assert cache.num_seeds == 64
    assert cache.blocks == (2, 3)
    with pytest.raises(NotCachedError, match=r"does not hold seeds 0:16.*--seeds 0:16"):
        cache.rows(0, [5])
    with pytest.raises(NotCachedError, match="seed 64 is outside"):
        cache.rows(0, [64])
    group = zarr.open_group(path, mode="r")
    array = group["states/0000"]
    assert isinstance(array, zarr.Array)
    assert np.isnan(array[0]).all()


def test_a_state_that_was_not_pulled_is_named(store: Path) -> None:
    shutil.rmtree(store / "states" / "0002")
    cache = TrajectoryCache.open(store)
    assert sorted(cache.states) == [0, 4]
    assert len(cache.rows(4, [1, 2])) == 2
    with pytest.raises(NotCachedError, match=r"state 0002 is not here.*pull"):
        cache.rows(2, [1])
    with pytest.raises(NotCachedError, match="not after 3"):
        cache.rows(3, [1])


def test_extending_leaves_what_was_there_byte_for_byte(store: Path) -> None:
    before = tree(store)
    write_store(store, "256:320")
    after = tree(store)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"states/{step}/zarr.json" for step in ("0000", "0002", "0004")}
    assert TrajectoryCache.open(store).num_seeds == 320
    write_store(store, "0:16")
    assert tree(store) == after


def test_two_builds_are_the_same_bytes_in_any_order(tmp_path: Path, store: Path) -> None:
    other = tmp_path / "other.zarr"
    for seeds in ("128:256", "0:32", "0:256"):
        write_store(other, seeds)
    assert tree(other) == tree(store)
    assert TrajectoryCache.open(other).digest == TrajectoryCache.open(store).digest


def test_another_recipe_is_refused_with_both_sides_named(store: Path) -> None:
    before = tree(store)
    changed = make_recipe(noise={"rule": "philox4x64-as241-v1", "root_seed": 1})
    with pytest.raises(MismatchError, match=r"noise.root_seed: 0 → 1"):
        CacheWriter.open(store, changed, make_layout())
    with pytest.raises(MismatchError, match=r"block_size: 16 → 8"):
        CacheWriter.open(store, make_recipe(), make_layout(block_size=8))
    assert tree(store) == before


def test_what_differs_at_the_top_is_named_first() -> None:
    """The sampler, before the many options that follow from it."""
    found, expected = (
        {"sampler": {"config": {"beta": index, "clip": index}, "name": name}}
        for index, name in ((1, "ddim"), (2, "heun"))
    )
    assert differences(found, expected) == [
        "sampler.name: ddim → heun",
        "sampler.config.beta: 1 → 2",
        "sampler.config.clip: 1 → 2",
    ]


def test_lists_of_objects_are_compared_by_their_entries() -> None:
    states = [{"step": 0, "sigma": 1.0}, {"step": 2, "sigma": 0.5}]
    assert differences({"states": states}, {"states": states[:1]}) == ["states: 2 → 1 entries"]
    assert differences({"states": states}, {"states": [states[0], {"step": 2, "sigma": 0.4}]}) == [
        "states.1.sigma: 0.5 → 0.4"
    ]
    assert differences([1, 2], [1, 3]) == [": [1, 2] → [1, 3]"]


def test_set_aside_renames_and_never_deletes(store: Path) -> None:
    before = tree(store)
    changed = make_recipe(noise={"rule": "philox4x64-as241-v1", "root_seed": 1})
    writer = CacheWriter.open(store, changed, make_layout(), "set-aside")
    assert writer.set_aside is not None
    assert tree(writer.set_aside) == before
    assert TrajectoryCache.open(store).blocks == ()
    again = CacheWriter.open(store, make_recipe(), make_layout(), "set-aside")
    third = CacheWriter.open(store, changed, make_layout(), "set-aside")
    assert again.set_aside != third.set_aside != writer.set_aside


def test_what_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    write_store(tmp_path / "mine-50.zarr", "0:16")
    with pytest.raises(CacheNotFoundError, match=r"no cache at .*none\.zarr: .* beside it are mine-50\.zarr"):
        TrajectoryCache.open(tmp_path / "none.zarr")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(NotACacheError, match="not a trajectory cache"):
        TrajectoryCache.open(folder)
    for policy in ("stop", "set-aside"):
        with pytest.raises(NotACacheError):
            CacheWriter.open(folder, make_recipe(), make_layout(), policy)  # type: ignore[arg-type]
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    zarr.open_group(tmp_path / "foreign.zarr", mode="w")
    with pytest.raises(NotACacheError):
        TrajectoryCache.open(tmp_path / "foreign.zarr")


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_where_it_is_touched(store: Path) -> None:
    _flip(store / "states/0002/c/3/0/0/0", 100)
    cache = TrajectoryCache.open(store)
    assert len(cache.rows(2, [0, 255])) == 2
    with pytest.raises(DamagedError, match=r"states/0002/c/3.* is damaged near byte 0"):
        cache.rows(2, [3 * BLOCK_SIZE])
    assert len(cache.rows(4, [3 * BLOCK_SIZE])) == 1


def test_only_the_touched_segments_are_read(tmp_path: Path) -> None:
    """In a file of several MiB, damage beyond the rows that are read is not looked at."""
    from advkd.cache.format.array_record import SEGMENT_BYTES

    shape = (1, 128, 128)
    layout = make_layout(block_size=96)
    writer = CacheWriter.open(tmp_path / "big.zarr", make_recipe(item_shape=shape), layout)
    writer.grow(range(96))
    writer.commit(0, {step: np.full((96, *shape), step, dtype=np.float16) for step in (0, 2, 4)})
    file = tmp_path / "big.zarr/states/0002/c/0/0/0/0"
    assert file.stat().st_size > 2 * SEGMENT_BYTES
    _flip(file, 2 * SEGMENT_BYTES + 5)
    cache = TrajectoryCache.open(tmp_path / "big.zarr")
    assert float(cache.rows(2, range(32)).min()) == 2.0
    with pytest.raises(DamagedError):
        cache.rows(2, [80])


@pytest.mark.parametrize("harm", ["truncate", "delete", "empty", "swap"])
def test_damaged_files_are_recognised(store: Path, harm: str) -> None:
    file, other = store / "states/0004/c/1/0/0/0", store / "states/0004/c/2/0/0/0"
    if harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "delete":
        file.unlink()
    elif harm == "empty":
        file.write_bytes(b"")
    else:
        file.write_bytes(other.read_bytes())
    with pytest.raises(DamagedError, match=r"advkd-cache build"):
        TrajectoryCache.open(store).rows(4, [BLOCK_SIZE])
    if harm != "swap":
        writer = CacheWriter.open(store, make_recipe(), make_layout())
        assert (writer.missing(range(256)), writer.incomplete(range(256))) == ([], [1])


def test_a_torn_or_edited_record_does_not_count(store: Path) -> None:
    record = store / "blocks" / "000002.json"
    whole = record.read_bytes()
    edited = whole.replace(b'"maximum":', b'"maximum":9', 1)
    for content in (whole[:-20], b"", b"[]", edited, pretty_json(json.loads(whole))):
        record.write_bytes(content)
        with pytest.raises(DamagedError, match="torn or altered"):
            TrajectoryCache.open(store).rows(0, [2 * BLOCK_SIZE])
        assert CacheWriter.open(store, make_recipe(), make_layout()).missing(range(256)) == [2]
    shutil.copy(store / "blocks" / "000001.json", record)
    with pytest.raises(DamagedError):
        TrajectoryCache.open(store).rows(0, [2 * BLOCK_SIZE])


@pytest.mark.parametrize("name", ["zarr.json", "states/0002/zarr.json"])
def test_edited_metadata_is_recognised(store: Path, name: str) -> None:
    text = (store / name).read_text()
    (store / name).write_text(text.replace("0.8", "0.7"))
    with pytest.raises(DamagedError):
        TrajectoryCache.open(store)


def test_a_newer_format_is_named(store: Path) -> None:
    value = json.loads((store / "zarr.json").read_text())
    value["attributes"]["advkd"]["format"] = 3
    (store / "zarr.json").write_text(json.dumps(value))
    with pytest.raises(NotACacheError, match=r"format 3; this advkd reads formats 1 and 2"):
        TrajectoryCache.open(store)


def test_values_that_are_not_finite_never_get_in(tmp_path: Path) -> None:
    layout = make_layout()
    writer = CacheWriter.open(tmp_path / "nan.zarr", make_recipe(), layout)
    writer.grow(range(16))
    states = block_states(layout, 0)
    states[2][3, 0, 0, 0] = np.nan
    with pytest.raises(CacheError, match="not finite"):
        writer.commit(0, states)
    states[2][3, 0, 0, 0] = 1e6  # finite, but not as float16
    with pytest.raises(CacheError, match="not finite"), np.errstate(over="ignore"):
        writer.commit(0, states)
    with pytest.raises(CacheError, match="shape"):
        writer.commit(0, {step: values[:3] for step, values in block_states(layout, 0).items()})
    assert TrajectoryCache.open(tmp_path / "nan.zarr").blocks == ()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", range(4))
def test_a_failing_disk_loses_at_most_the_block_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    path = tmp_path / "faulty.zarr"
    write_store(path, "0:16")
    layout, count = make_layout(), 0
    writer = CacheWriter.open(path, make_recipe(), layout)
    writer.grow(range(32))
    owner = durable.os if call == "fsync" else Path
    original = getattr(owner, call)

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count > nth:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, failing)
        with pytest.raises(OSError, match="No space left"):
            writer.commit(1, block_states(layout, 1))
    assert TrajectoryCache.open(path).blocks == (0,)
    assert not list(path.rglob("*.partial"))
    write_store(path, "0:32")
    write_store(tmp_path / "whole.zarr", "0:32")
    assert tree(path) == tree(tmp_path / "whole.zarr")


def test_litter_of_a_killed_writer_is_swept(store: Path) -> None:
    before = tree(store)
    (store / "states/0000/c/0/0/0/0.0123456789ab.partial").write_bytes(b"half")
    with CacheWriter.open(store, make_recipe(), make_layout()).writing():
        assert tree(store) == before


def test_an_empty_folder_counts_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.zarr").mkdir()
    write_store(tmp_path / "empty.zarr", "0:16")
    assert TrajectoryCache.open(tmp_path / "empty.zarr").blocks == (0,)


@given(start=st.integers(0, 10_000), length=st.integers(1, 10_000), size=st.integers(1, 3000))
def test_whole_blocks_cover_a_range_tightly(start: int, length: int, size: int) -> None:
    blocks = blocks_of(range(start, start + length), size)
    assert blocks.start * size <= start < (blocks.start + 1) * size
    assert (blocks.stop - 1) * size < start + length <= blocks.stop * size


@pytest.mark.parametrize("text", ["5:5", "9:3", "-3:4", "0:-4", "5", "a:b", "", ":", "1:2:3", "0:2000000000000"])
def test_impossible_seed_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="seeds"):
        parse_seed_range(text)


def test_the_cache_room_needs_no_torch() -> None:
    program = "import sys, advkd.cache; print([m for m in ('torch', 'diffusers', 'zarr', 'dask') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
