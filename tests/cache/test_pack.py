"""Packing: what comes back, what is promised of its error, and that going on changes nothing that was there."""

import hashlib
import math
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advkd.cache import TrajectoryCache
from advkd.cache.care.verify import verify
from advkd.cache.codec.float16 import to_float16, to_float32
from advkd.cache.codec.residual import Exact
from advkd.cache.errors import CacheError, DamagedError, MismatchError, NotCachedError, UsageError
from advkd.cache.format.encoding import STANDARD, Packing, quantisation_step
from advkd.cache.format.seeds import parse_seed_range
from advkd.cache.write.combine import subset
from advkd.cache.write.pack import pack, unpack
from advkd.cache.write.writer import CacheWriter
from tests.cache.harm import content, files_of
from tests.cache.packs import (
    ARCHIVE,
    ERROR,
    EVERY,
    FIRST_GOLDEN,
    GOLDEN,
    LOSSLESS,
    packed_of,
    smooth_states,
    write_smooth,
)
from tests.stores import BLOCK_SIZE, block_states, make_layout, make_recipe, tree, write_store

# What comes back.


@pytest.mark.parametrize("codec", ["lossless", *STANDARD])
def test_an_unpacked_store_has_the_bytes_of_the_packed_one(whole: Path, codec: str) -> None:
    packed = packed_of(whole, Packing.of(codec, "float16"))
    unpack(TrajectoryCache.open(packed), whole.with_name("again.zarr"))
    before, after = files_of(whole), files_of(whole.with_name("again.zarr"))
    assert after.pop("provenance/writer.json")
    assert {name: data for name, data in before.items() if name != "provenance/writer.json"} == after


@pytest.mark.parametrize("packing", EVERY, ids=str)
def test_the_ledger_says_what_the_error_is(whole: Path, packing: Packing) -> None:
    cache, packed = TrajectoryCache.open(whole), TrajectoryCache.open(packed_of(whole, packing))
    assert packed.packed is not None
    for block in cache.blocks:
        record = packed.packed.records[block]
        for step, state in cache.states.items():
            found = packed.block_view(step, block).astype(np.float64) - cache.block_view(step, block)
            array = record.arrays[f"states/{state.name}"]
            assert array.error_max == np.abs(found).max()
            assert array.error_rms == pytest.approx(math.sqrt(np.mean(found**2)), rel=6e-3, abs=1e-12)
            assert array.error_max <= {"archive": ERROR}.get(packing.codec, math.inf)
            assert array.raw.rounding_max >= cache.record(block).arrays[f"states/{state.name}"].rounding_max
            if step == 0 or packing.error_bound == 0.0:
                assert array.error_max == 0 and array.raw == cache.record(block).arrays[f"states/{state.name}"]
    assert any(array.error_max for array in record.arrays.values()) == (packing.error_bound != 0.0)


@pytest.mark.parametrize("packing", [LOSSLESS, ARCHIVE], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("item_shape", [(1, 1, 1), (2, 3, 5), (3, 16, 12)])
def test_any_shape_and_dtype(tmp_path: Path, packing: Packing, dtype: str, item_shape: tuple[int, ...]) -> None:
    write_smooth(tmp_path / "store.zarr", item_shape, dtype, block_size=40, num_blocks=2)
    cache = TrajectoryCache.open(tmp_path / "store.zarr")
    done = pack(cache, tmp_path / "packed.zarr", packing)
    unpack(TrajectoryCache.open(tmp_path / "packed.zarr"), tmp_path / "again.zarr")
    again = TrajectoryCache.open(tmp_path / "again.zarr")
    apart = max(
        np.abs(again.rows(s, range(80)) - cache.rows(s, range(80)).astype(np.float64)).max() for s in cache.states
    )
    assert apart == done.error_max <= (0.0 if packing is LOSSLESS else ERROR)
    assert verify(again).findings == ()


def test_x_t_is_not_stored_and_smooth_states_take_little(tmp_path: Path) -> None:
    """Far below what general codecs take, also without the noise."""
    write_smooth(tmp_path / "store.zarr", (3, 16, 16), "float16", block_size=128, num_blocks=1)
    cache = TrajectoryCache.open(tmp_path / "store.zarr")
    size = {}
    for packing in (LOSSLESS, ARCHIVE, Packing.of("pcodec", "float16")):
        done = pack(cache, tmp_path / f"{packing.codec}.zarr", packing)
        size[packing.codec] = done.num_bytes / done.num_values
    assert not list((tmp_path / "archive.zarr/states/0000").glob("c/**/*"))
    assert size["archive"] < 0.6 * size["lossless"] < 0.6 * 0.6 * size["pcodec"]


@settings(max_examples=300, deadline=None)
@given(
    bits=st.integers(0, np.float16(15.5).view(np.uint16).item()),
    max_error=st.floats(2.0**-20, 0.5),
    part=st.floats(-1, 1),
)
def test_the_step_keeps_its_promise_after_rounding(bits: int, max_error: float, part: float) -> None:
    """For any half and any offset within half a step, both below 16: the nearest half is within the declared error."""
    x = np.uint16(bits).view(np.float16)
    v = np.float32(np.float64(x) + part * quantisation_step(max_error, "float16") / 2)
    assert abs(float(v.astype(np.float16)) - float(x)) <= max_error


def test_the_step_is_as_large_as_the_bound_allows() -> None:
    assert quantisation_step(1 / 255, "float16") > 0.99 * 2 / 255
    assert quantisation_step(2.0**-11, "float16") > 0.99 * 2.0**-10
    assert quantisation_step(0.01, "float32") == pytest.approx(0.02, rel=3e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_places_among_the_numbers_come_back(dtype: str) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 1 << 16, 1 << 16) if dtype == "float16" else rng.integers(0, 1 << 32, 1 << 16)
    bits = raw.astype(np.uint16 if dtype == "float16" else np.uint32).view(dtype)
    values = np.concatenate([bits[np.isfinite(bits)].astype(np.float32), np.float32([0.0, -0.0, 1.0, -1.0])])
    predicted = rng.permutation(values)
    residual = Exact(dtype)
    found = residual.values(residual.integers(values, predicted), predicted)
    assert found.tobytes() == values.tobytes()


def test_halves_and_floats_are_converted_as_numpy_does_it() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    assert to_float32(halves).tobytes() == halves.astype(np.float32).tobytes()
    exact = np.sort(halves.astype(np.float32))
    ties = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint64).astype(np.uint32).view(np.float32)
    beside = (np.nextafter(ties, np.float32(way)) for way in (-np.inf, np.inf))
    floats = np.concatenate([exact, ties, *beside, anything[~np.isnan(anything)], exact * np.float32(1e-5)])
    with np.errstate(over="ignore"):
        assert to_float16(floats).tobytes() == floats.astype(np.float16).tobytes()


# Going on, extending, dividing.


@pytest.mark.parametrize("packing", [ARCHIVE, Packing.of("zstd", "float16")], ids=str)
def test_extending_adds_files_and_changes_none(tmp_path: Path, packing: Packing) -> None:
    """So DVC moves the new blocks, and what says how many there are."""
    write_store(tmp_path / "store.zarr", "0:32")
    out = packed_of(tmp_path / "store.zarr", packing)
    before = {path: path.stat() for path in out.rglob("*") if path.is_file()}
    write_store(tmp_path / "store.zarr", "0:48")
    done = pack(TrajectoryCache.open(tmp_path / "store.zarr"), out, packing)
    assert (done.num_added, done.num_present) == (1, 2)
    changed = [path for path, status in before.items() if (path.stat().st_ino, path.stat().st_mtime_ns) != (
        status.st_ino, status.st_mtime_ns)]  # fmt: skip
    assert {path.name for path in changed} <= {"zarr.json", "writer.json"}
    assert (out / "blocks/000002.json").is_file() and verify(TrajectoryCache.open(out)).findings == ()


def test_a_block_that_was_built_anew_is_packed_anew(whole: Path) -> None:
    out = packed_of(whole)
    layout = make_layout()
    other = {step: values + np.float32(step / 100) for step, values in block_states(layout, 1).items()}
    CacheWriter(whole, make_recipe(), layout).commit(1, other)
    done = pack(TrajectoryCache.open(whole), out, LOSSLESS)
    assert (done.num_added, done.num_present) == (1, 2)
    np.testing.assert_array_equal(TrajectoryCache.open(out).rows(4, [17])[0], other[4][1].astype(np.float16))


def test_workers_write_the_same_bytes(whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    pack(cache, whole.with_name("one.zarr"), ARCHIVE)
    heard: list[int] = []
    pack(cache, whole.with_name("two.zarr"), ARCHIVE, num_workers=2, advance=heard.append)
    assert content(files_of(whole.with_name("one.zarr"))) == content(files_of(whole.with_name("two.zarr")))
    assert sum(heard) == 3 * 3 * BLOCK_SIZE * 64 * 2
    assert not multiprocessing.active_children()


def test_what_does_not_fit_is_refused_and_left_alone(whole: Path) -> None:
    cache, out = TrajectoryCache.open(whole), packed_of(whole, ARCHIVE)
    before = files_of(out)
    with pytest.raises(MismatchError, match=r"packing\.max_error: 0\.00390625 → 0\.01"):
        pack(cache, out, Packing.of("archive", "float16", max_error=0.01))
    with pytest.raises(MismatchError, match="encoding: packed-archive → raw"):
        unpack(TrajectoryCache.open(out), out)
    with pytest.raises(MismatchError, match="encoding: raw → packed-archive"):
        pack(cache, whole, ARCHIVE)
    with pytest.raises(MismatchError, match="encoding"):
        CacheWriter.open(out, make_recipe(), make_layout())
    with pytest.raises(NotCachedError, match="no packed store"):
        unpack(cache, whole.with_name("none.zarr"))
    assert files_of(out) == before
    shutil.rmtree(whole / "states/0002")
    with pytest.raises(NotCachedError, match="partial copy"):
        pack(TrajectoryCache.open(whole), whole.with_name("none.zarr"), ARCHIVE)
    assert not whole.with_name("none.zarr").exists()


def test_a_store_of_an_equivalent_recipe_is_extended_under_its_own(tmp_path: Path) -> None:
    """The same teacher, saved again by a diffusers that lists an option which was left out before."""
    teacher = make_recipe().teacher
    resaved = teacher | {"unet": teacher["unet"] | {"dropout": 0.0}}
    write_store(tmp_path / "whole", "0:64")
    write_store(tmp_path / "begun", "0:32")
    write_store(tmp_path / "resaved", "0:64", teacher=resaved)
    source = TrajectoryCache.open(tmp_path / "resaved")
    for name in ("whole", "begun"):
        pack(TrajectoryCache.open(tmp_path / name), tmp_path / f"{name}-packed", LOSSLESS)
    assert pack(source, tmp_path / "begun-packed", LOSSLESS).num_added == 2
    assert tree(tmp_path / "begun-packed") == tree(tmp_path / "whole-packed")
    pack(source, tmp_path / "resaved-packed", LOSSLESS)
    shutil.copytree(tmp_path / "begun", tmp_path / "copy")
    assert unpack(TrajectoryCache.open(tmp_path / "resaved-packed"), tmp_path / "begun").num_added == 2
    assert subset(source, tmp_path / "copy").num_added == 2
    assert tree(tmp_path / "begun") == tree(tmp_path / "copy") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("codec", "wrong", "said"),
    [
        ("zip", {}, "codec 'zip' is unknown"),
        ("archive", {}, "go together"),
        ("lossless", {"max_error": 0.1}, "go together"),
        ("archive", {"max_error": 0.7}, "expected 9.5e-07 to 0.5"),
        ("archive", {"max_error": math.nan}, "expected"),
        ("lossless", {"keep_bits": 4}, "are for zstd, blosc, pcodec"),
        ("zstd", {"keep_bits": 11}, "float16 has 1 to 10"),
        ("blosc", {"level": 10}, "blosc has 1 to 9"),
    ],
)
def test_impossible_wishes(codec: str, wrong: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Packing.of(codec, "float16", **wrong)  # type: ignore[arg-type]


def test_noise_that_is_not_of_the_seeds_can_not_be_left_out(tmp_path: Path) -> None:
    layout = make_layout()
    states = block_states(layout, 0)
    writer = CacheWriter.open(tmp_path / "odd.zarr", make_recipe(), layout)
    with writer.writing():
        writer.grow(parse_seed_range("0:16"))
        writer.commit(0, states | {0: states[0] + 1})
    with pytest.raises(DamagedError, match="x_T of block 0 is not what its seeds draw"):
        packed_of(tmp_path / "odd.zarr")
    assert TrajectoryCache.open(tmp_path / "packed-lossless.zarr").blocks == ()
    packed_of(tmp_path / "odd.zarr", Packing.of("pcodec", "float16"))


def test_an_error_that_float32_cannot_keep_is_refused(tmp_path: Path) -> None:
    layout = make_layout()
    states = block_states(layout, 0)
    writer = CacheWriter.open(tmp_path / "large.zarr", make_recipe(), layout)
    with writer.writing():
        writer.grow(parse_seed_range("0:16"))
        writer.commit(0, states | {4: np.linspace(-6e4, 6e4, states[4].size).reshape(states[4].shape)})
    with pytest.raises(CacheError, match="lossless"):
        packed_of(tmp_path / "large.zarr", Packing.of("archive", "float16", max_error=2.0**-20))
    assert packed_of(tmp_path / "large.zarr", LOSSLESS)


# What is promised to stay.


@pytest.mark.parametrize(
    ("golden", "encoding", "digest"),
    [
        (FIRST_GOLDEN, "archive", "77411333661e166bf1e8c290d857734be1352dbbd5e7d1f90bc43e3ee96329bf"),
        (GOLDEN, "packed-lossless", "f109a398c6c927462ba01a912ef386b4f0129268ad651a7fe304ee43bc1f1a1b"),
    ],
)
def test_golden_packed_stores_decode_to_the_same_bytes_for_ever(golden: Path, encoding: str, digest: str) -> None:
    cache = TrajectoryCache.open(golden)
    assert cache.stored_layout.encoding == encoding
    assert cache.packed is not None and cache.source is cache.packed
    assert verify(cache).findings == ()
    total = hashlib.sha256()
    for block in cache.blocks:
        for _, chunk in cache.packed.states(block, set(cache.states)):
            total.update(chunk)
    assert total.hexdigest() == digest


def make_golden() -> None:
    """Writes the golden store of the encoding `packed-lossless`; run it once, when an encoding is new."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with_states = GOLDEN.with_name("tmp.zarr")
    layout = replace(make_layout(8), block_size=8)
    recipe = make_recipe(item_shape=(2, 6, 7))
    writer = CacheWriter.open(with_states, recipe, layout)
    with writer.writing():
        writer.grow(range(24))
        for block in (0, 2):
            writer.commit(block, smooth_states(recipe, layout, block))
    pack(TrajectoryCache.open(with_states), GOLDEN, LOSSLESS)
    shutil.rmtree(with_states)
    shutil.rmtree(GOLDEN / "provenance")


if __name__ == "__main__":
    make_golden()
