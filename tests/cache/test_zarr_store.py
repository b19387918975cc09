"""A cache through zarr-python: the same values as the reader's, an error where a block is missing, durable writes."""

import asyncio
import hashlib
import multiprocessing
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import FsspecStore, LocalStore, ZipStore
from zarr.testing.stateful import ZarrStoreStateMachine

from advkd.cache import TrajectoryCache
from advkd.cache.errors import CacheError, DamagedError, NotCachedError
from advkd.cache.files import durable
from advkd.cache.format.encoding import STANDARD, Packing
from advkd.cache.read.zarr_store import CommittedFiles, CommittedStore, DurableStore
from advkd.cache.write.pack import unpack
from tests.cache import golden
from tests.cache.harm import files_of, flipped, put
from tests.cache.packs import ARCHIVE, FIRST_GOLDEN, GOLDEN, LOSSLESS, packed_of, write_smooth
from tests.stores import write_store

BUILT = "7adee388d5e8da195f30ed9022202e1e08c0617e147683c50afcf59cce650464"
"""Of the files of a store that this machine writes through its own zarr."""
CHUNK = "states/0004/c/2/0/0/0"


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def test_a_store_is_the_same_bytes_under_every_version_of_zarr(tmp_path: Path) -> None:
    golden.write(tmp_path / "built.zarr")
    total = hashlib.sha256()
    for name, data in sorted(files_of(tmp_path / "built.zarr").items()):
        total.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    assert total.hexdigest() == BUILT


# A cache's own group.


@pytest.fixture(params=["local", "remote", *STANDARD, "lossless", "archive", "first packed"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrajectoryCache]:
    """The same three states in any kind of store."""
    monkeypatch.setenv("ADVKD_SCRATCH", str(tmp_path / "scratch"))
    if request.param == "first packed":
        yield TrajectoryCache.open(FIRST_GOLDEN)
        return
    write_smooth(tmp_path / "store.zarr", (2, 5, 6), "float16", block_size=16, num_blocks=3)
    if request.param == "local":
        yield TrajectoryCache.open(tmp_path / "store.zarr")
    elif request.param == "remote":
        memory = fsspec.filesystem("memory")
        memory.put(str(tmp_path / "store.zarr"), "/remote.zarr", recursive=True)
        yield TrajectoryCache.open("memory://remote.zarr")
        memory.rm("/remote.zarr", recursive=True)
    else:
        error = {"max_error": 0.01} if request.param == "archive" else {}
        packing = Packing.of(request.param, "float16", **error)  # type: ignore[arg-type]
        yield TrajectoryCache.open(packed_of(tmp_path / "store.zarr", packing))


def test_every_kind_of_store_is_the_raw_group(cache: TrajectoryCache) -> None:
    group = cache.zarr
    assert group.read_only
    ours: Any = group.attrs["advkd"]
    assert ours["fingerprint"] == cache.recipe.fingerprint and ours["layout"]["encoding"] == "raw"
    states = group["states"]
    assert isinstance(states, zarr.Group)
    assert sorted(states.array_keys()) == [state.name for state in cache.states.values()]
    for step, state in cache.states.items():
        array = array_of(group, f"states/{state.name}")
        assert array.attrs["alpha"] == state.alpha and array.shape == (cache.num_seeds, *cache.item_shape)
        block = cache.blocks[-1] * cache.layout.block_size
        seeds = range(block, block + cache.layout.block_size)
        assert np.asarray(array[block : seeds.stop]).tobytes() == cache.rows(step, seeds).tobytes()
        np.testing.assert_array_equal(array.oindex[[block + 5, block]], cache.rows(step, [block + 5, block]))
        np.testing.assert_array_equal(array[block + 2, 1, ::2], cache.rows(step, [block + 2])[0, 1, ::2])


def test_a_pickled_array_reads_the_same(cache: TrajectoryCache) -> None:
    array = array_of(cache.zarr, "states/0004")
    again = pickle.loads(pickle.dumps(array))
    assert again.store == array.store
    np.testing.assert_array_equal(again[:8], array[:8])


def test_a_block_that_was_never_committed_is_an_error_to_zarr_and_nan_to_dask(tmp_path: Path) -> None:
    write_store(tmp_path / "gap.zarr", "0:16")
    write_store(tmp_path / "gap.zarr", "32:48")
    cache = TrajectoryCache.open(tmp_path / "gap.zarr")
    array = array_of(cache.zarr, "states/0004")
    assert np.isfinite(np.asarray(array[:16])).all()
    with pytest.raises(NotCachedError, match="seeds 16:32"):
        array[10:20]
    values = cache.dask_array(4).compute()
    assert np.isnan(values[16:32]).all() and np.isfinite(values[:16]).all() and np.isfinite(values[32:]).all()
    np.testing.assert_array_equal(values[32:], cache.rows(4, range(32, 48)))


@pytest.mark.parametrize("harm", [None, lambda data: data[:-1], lambda data: flipped(data, 77)])
@pytest.mark.parametrize("packing", [None, ARCHIVE], ids=str)
def test_a_missing_or_damaged_chunk_is_an_error_to_zarr_and_to_dask(
    whole: Path, packing: Packing | None, harm: Callable[[bytes], bytes] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVKD_SCRATCH", str(whole.with_name("scratch")))
    store = whole if packing is None else packed_of(whole, packing)
    put(store / CHUNK, None if harm is None else harm((store / CHUNK).read_bytes()))
    cache = TrajectoryCache.open(store)
    array = array_of(cache.zarr, "states/0004")
    assert array[:32].shape[0] == 32
    for read in (lambda: array[40], lambda: cache.dask_array(4)[40].compute()):
        with pytest.raises(DamagedError):
            read()


def test_an_absent_state_is_no_member(whole: Path) -> None:
    shutil.rmtree(whole / "states/0002")
    cache = TrajectoryCache.open(whole)
    states = cache.zarr["states"]
    assert isinstance(states, zarr.Group)
    assert sorted(states.array_keys()) == ["0000", "0004"]
    with pytest.raises(KeyError):
        states["0002"]


def test_the_committed_store_keeps_the_contract_of_stores(whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    store, prototype = CommittedStore(CommittedFiles(cache)), default_buffer_prototype()

    async def check() -> None:
        listed = {key async for key in store.list()}
        arrays = [name for name in files_of(whole) if name.endswith("zarr.json") or "/c/" in name]
        assert listed == set(arrays)
        assert {key async for key in store.list_prefix("states/0002/")} == {k for k in arrays if "/0002/" in k}
        assert sorted([key async for key in store.list_dir("")]) == ["states", "zarr.json"]
        assert sorted([key async for key in store.list_dir("states/0002")]) == ["c", "zarr.json"]
        for key in listed:
            data = (whole / key).read_bytes()
            assert await store.exists(key) and await store.getsize(key) == len(data)
            for part, expected in (
                (None, data),
                (RangeByteRequest(3, 9), data[3:9]),
                (OffsetByteRequest(5), data[5:]),
                (SuffixByteRequest(4), data[-4:]),
            ):
                found = await store.get(key, prototype, part)
                assert found is not None and found.to_bytes() == expected
        for key in ("none", "blocks/000000.json", "states/0003/zarr.json", "states/0003/c/0/0/0/0", "states/../x"):
            assert not await store.exists(key) and await store.get(key, prototype) is None
        for act in (store.set("x", prototype.buffer.from_bytes(b"x")), store.delete("x")):
            with pytest.raises(ValueError, match="read-only"):
                await act

    asyncio.run(check())
    assert store == CommittedStore(CommittedFiles(TrajectoryCache.open(whole)))
    assert store != CommittedStore(CommittedFiles(cache, fill_uncommitted=True))
    assert len(CommittedFiles(cache)) == len(list(CommittedFiles(cache)))


# The codec, by plain zarr.


@pytest.mark.parametrize("packing", [LOSSLESS, ARCHIVE], ids=str)
def test_plain_zarr_reads_a_packed_store_wherever_it_is(whole: Path, packing: Packing) -> None:
    packed = packed_of(whole, packing)
    unpack(TrajectoryCache.open(packed), whole.with_name("raw.zarr"))
    raw = zarr.open_group(whole.with_name("raw.zarr"), mode="r")
    with zipfile.ZipFile(packed.with_suffix(".zip"), "w") as archive:
        for name, data in files_of(packed).items():
            archive.writestr(f"inside/{name}", data)
    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/packed.zarr", recursive=True)
    opened = {
        "path": zarr.open_group(packed, mode="r"),
        "parent": array_parent(packed),
        "zip": zarr.open_group(ZipStore(packed.with_suffix(".zip"), mode="r"), path="inside", mode="r"),
        "fsspec": zarr.open_group(FsspecStore.from_url("memory://packed.zarr"), mode="r"),
    }
    for name in ("0000", "0002", "0004"):
        expected = np.asarray(array_of(raw, f"states/{name}")[:])
        for where, group in opened.items():
            assert np.asarray(array_of(group, f"states/{name}")[:]).tobytes() == expected.tobytes(), where
        alone = zarr.open_array(packed / "states" / name, mode="r")
        np.testing.assert_array_equal(alone[5:40], expected[5:40])
    memory.rm("/packed.zarr", recursive=True)


def array_parent(packed: Path) -> zarr.Group:
    group = zarr.open_group(LocalStore(packed.parent, read_only=True), path=packed.name, mode="r")
    assert group.store_path.path == packed.name
    return group


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_selection_of_a_packed_array_is_that_of_its_values(data: st.DataObject) -> None:
    cache = TrajectoryCache.open(GOLDEN)
    name = data.draw(st.sampled_from(["0000", "0002", "0004"]))
    values = np.full((24, *cache.item_shape), np.nan, np.float16)
    for block in cache.blocks:
        values[8 * block : 8 * block + 8] = cache.block_view(int(name), block)
    array = array_of(zarr.open_group(GOLDEN, mode="r"), f"states/{name}")
    start, stop, step = (data.draw(st.integers(0, 24)), data.draw(st.integers(0, 24)), data.draw(st.integers(1, 5)))
    np.testing.assert_array_equal(array[start:stop:step], values[start:stop:step])
    seeds = data.draw(st.lists(st.integers(0, 23), min_size=1, max_size=6))
    rows = sorted(data.draw(st.sets(st.integers(0, cache.item_shape[1] - 1), min_size=1)))
    np.testing.assert_array_equal(array.oindex[seeds, 1, rows], values[np.ix_(seeds, [1], rows)][:, 0])


def test_plain_zarr_gives_nan_for_an_uncommitted_block_and_an_error_for_a_damaged_one(whole: Path) -> None:
    packed = packed_of(whole, LOSSLESS)
    (packed / "blocks/000001.json").unlink()
    array = array_of(zarr.open_group(packed, mode="r"), "states/0004")
    assert np.isnan(np.asarray(array[16:32])).all() and np.isfinite(np.asarray(array[:16])).all()
    body = (packed / "states/0002/c/2/0/0/0").read_bytes()
    for harmed in (None, flipped(body, 99), flipped(body, 8 * len(body) - 3)):
        put(packed / "states/0002/c/2/0/0/0", harmed)
        array = array_of(zarr.open_group(packed, mode="r"), "states/0004")
        assert np.isfinite(np.asarray(array[:16])).all()
        with pytest.raises(DamagedError, match=r"states/0002/c/2"):
            array[40]


def test_a_packed_array_without_its_store_says_what_it_needs(whole: Path, tmp_path: Path) -> None:
    packed = packed_of(whole, LOSSLESS)
    shutil.copytree(packed / "states/0004", tmp_path / "alone/deep/array")
    with pytest.raises(CacheError, match="whole store"):
        zarr.open_array(tmp_path / "alone/deep/array", mode="r")[0]
    shutil.copytree(packed / "states", tmp_path / "renamed/arrays")
    with pytest.raises(CacheError, match="whole store"):
        array_of(zarr.open_group(tmp_path / "renamed/arrays", mode="r"), "0004")[0]


def test_plain_zarr_cannot_write_a_packed_store(whole: Path) -> None:
    packed = packed_of(whole, LOSSLESS)
    before = files_of(packed)
    array = array_of(zarr.open_group(packed, mode="r+"), "states/0004")
    with pytest.raises(CacheError, match="advkd-cache pack"):
        array[:16] = 0
    assert files_of(packed) == before


def test_many_chunks_at_once_and_a_fork_end_well(whole: Path) -> None:
    array = array_of(zarr.open_group(packed_of(whole, LOSSLESS), mode="r"), "states/0004")
    expected = np.asarray(array[:])
    with zarr.config.set({"async.concurrency": 64}):
        np.testing.assert_array_equal(array.oindex[list(range(0, 48, 3))], expected[::3])
    child = multiprocessing.get_context("fork").Process(target=check_equal, args=(array, expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def check_equal(array: zarr.Array[Any], expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(array[:], expected)


# Durable writes.


def test_any_sequence_of_writes_leaves_what_a_dictionary_would(tmp_path: Path) -> None:
    """zarr's own model of a store, beside this one."""
    folder = tmp_path / "store"

    def machine() -> ZarrStoreStateMachine:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return ZarrStoreStateMachine(DurableStore(folder))

    limits = settings(max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=limits)  # type: ignore[no-untyped-call]


def test_a_write_that_fails_leaves_the_earlier_value_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DurableStore(tmp_path)
    store.set_sync("a/b", cpu.Buffer.from_bytes(b"first"))

    def failing(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", failing)
        with pytest.raises(OSError, match="No space left"):
            store.set_sync("a/b", cpu.Buffer.from_bytes(b"second"))
    assert files_of(tmp_path) == {"a/b": b"first"}


def test_what_reads_back_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = durable.write_atomically
    for lie in (b"", b"valuf", b"value "):
        monkeypatch.setattr(durable, "write_atomically", lambda path, parts, lie=lie: original(path, [lie]))
        with pytest.raises(CacheError, match="reads back differently"):
            DurableStore(tmp_path).set_sync("a", cpu.Buffer.from_bytes(b"value"))


def test_nothing_is_written_through_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store/states").symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedError, match="symlink"):
        DurableStore(tmp_path / "store").set_sync("states/x", cpu.Buffer.from_bytes(b"x"))
    assert files_of(tmp_path / "outside") == {}
