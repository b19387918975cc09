"""Packed stores: what comes back, what is promised of its error, and that nothing of it is believed unseen."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advkd.cache import TrajectoryCache
from advkd.cache.chain import Chain
from advkd.cache.combine import merge, subset
from advkd.cache.compare import compare
from advkd.cache.errors import CacheError, DamagedError, MismatchError, NotACacheError, NotCachedError, UsageError
from advkd.cache.halves import to_float16, to_float32
from advkd.cache.layout import parse_seed_range, record_path
from advkd.cache.noise import standard_normal
from advkd.cache.pack import pack, unpack
from advkd.cache.pack_block import packed_source
from advkd.cache.packed import PackedSource
from advkd.cache.packing import CODECS, PLAIN, REDRAWN, Packing, quantisation_step
from advkd.cache.recipe import Layout, Recipe, State
from advkd.cache.repair import repair
from advkd.cache.residual import Exact, integers_from_bytes, integers_to_bytes
from advkd.cache.seal import seal, unsealed
from advkd.cache.summary import summarize
from advkd.cache.verify import verify
from advkd.cache.writer import CacheWriter
from tests.cache.exercise import read_everything
from tests.cache.harm import Pristine, content, files_of, flipped, put
from tests.cache.mutations import mutated_stores
from tests.conftest import ROOT
from tests.stores import BLOCK_SIZE, ITEM_SHAPE, block_states, make_layout, make_recipe, write_store

GOLDEN = ROOT / "tests/data/packed-1.zarr"
ERROR = 1 / 256
ARCHIVE = Packing.of("archive", "float16", max_error=ERROR)
LOSSLESS = Packing.of("lossless", "float16")
EVERY = [
    LOSSLESS,
    ARCHIVE,
    *(Packing.of(codec, "float16") for codec in PLAIN),
    *(Packing.of(codec, "float16", keep_bits=5, level=3) for codec in PLAIN),
]


@pytest.fixture
def whole(fast_folder: Path) -> Path:
    """A store with every kind of file."""
    for left in fast_folder.iterdir():
        put(left, None)
    return Pristine(fast_folder / "whole.zarr").root


def packed_of(store: Path, packing: Packing = LOSSLESS) -> Path:
    out = store.with_name(f"packed-{packing.codec}.zarr")
    pack(TrajectoryCache.open(store), out, packing)
    return out


def smooth_states(recipe: Recipe, layout: Layout, block: int) -> dict[int, npt.NDArray[np.float32]]:
    """x_k = c_k · x_T + a smooth image that changes slowly, as a trained teacher's are."""
    seeds = range(block * layout.block_size, (block + 1) * layout.block_size)
    noise = standard_normal(recipe.root_seed, seeds, recipe.item_shape).astype(layout.dtype).astype(np.float32)
    _, height, width = recipe.item_shape
    y, x = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 3, width), indexing="ij")
    phases = noise.reshape(len(noise), -1)[:, [0, -1], None, None, None]
    image = np.tanh(2 * np.sin(y + phases[:, 0]) * np.cos(x + phases[:, 1])).astype(np.float32)
    image = image * np.linspace(0.5, 1, recipe.item_shape[0], dtype=np.float32)[None, :, None, None]
    return {s.step: (s.stored_alpha * image + s.stored_sigma * noise).astype(np.float32) for s in layout.states}


def write_smooth(
    path: Path, item_shape: tuple[int, ...], dtype: str, block_size: int, num_blocks: int, num_states: int = 3
) -> None:
    recipe = make_recipe(item_shape=item_shape)
    parts = np.linspace(0, 1, num_states)
    levels = [(float(np.sin(part * np.pi / 2)), float(np.cos(part * np.pi / 2))) for part in parts]
    states = tuple(
        State(step=2 * k, timestep=float(999 - k), alpha=alpha, sigma=sigma, scale=1.0)
        for k, (alpha, sigma) in enumerate(levels)
    )
    layout = Layout(states=states, dtype=dtype, block_size=block_size)
    writer = CacheWriter.open(path, recipe, layout)
    with writer.writing():
        writer.grow(range(block_size * num_blocks))
        for block in range(num_blocks):
            writer.commit(block, smooth_states(recipe, layout, block))


# What comes back.


@pytest.mark.parametrize("codec", ["lossless", *PLAIN])
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
    bits=st.integers(0, 0x4BFF),
    max_error=st.floats(2.0**-20, 0.5),
    part=st.floats(-1, 1),
)
def test_the_step_keeps_its_promise_after_rounding(bits: int, max_error: float, part: float) -> None:
    """For any half below 16 and any offset within half a step: the nearest half is within the declared error."""
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


# What any Zarr reader sees.


@pytest.mark.parametrize("packing", [packing for packing in EVERY if packing.codec in PLAIN], ids=str)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_plain_codecs_open_in_zarr(whole: Path, packing: Packing) -> None:
    import zarr

    packed = packed_of(whole, packing)
    group, cache = zarr.open_group(packed, mode="r"), TrajectoryCache.open(packed)
    for step in cache.states:
        array = group[f"states/{step:04d}"]
        assert isinstance(array, zarr.Array)
        assert np.asarray(array[:]).tobytes() == cache.rows(step, range(cache.num_seeds)).tobytes()


def test_zarr_opens_a_chain_s_group_and_names_the_codec(whole: Path) -> None:
    import zarr

    group = zarr.open_group(packed_of(whole, ARCHIVE), mode="r")
    ours = group.attrs["advkd"]
    assert isinstance(ours, dict)
    assert ours["layout"]["encoding"] == "archive" and ours["layout"]["packing"] == {"max_error": ERROR}  # type: ignore[index,call-overload]
    with pytest.raises(Exception, match=r"advkd\.chain"):
        group["states/0002"]


# Reading it as if it were unpacked.


@pytest.mark.parametrize("packing", [LOSSLESS, ARCHIVE, Packing.of("blosc", "float16")], ids=str)
def test_everything_that_reads_a_store_reads_a_packed_one(
    whole: Path, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVKD_SCRATCH", str(whole.with_name("scratch")))
    packed = TrajectoryCache.open(packed_of(whole, packing))
    unpack(packed, whole.with_name("again.zarr"))
    again = TrajectoryCache.open(whole.with_name("again.zarr"))
    assert packed.digest == again.digest and compare(packed, again).same
    packed.fetch([0, 4], packed.blocks)
    np.testing.assert_array_equal(packed.rows(4, [40, 3, 3]), again.rows(4, [40, 3, 3]))
    subset(packed, whole.with_name("part.zarr"), steps=[0, 4])
    merge([packed, again], whole.with_name("both.zarr"))
    assert verify(TrajectoryCache.open(whole.with_name("part.zarr"))).findings == ()
    assert content(files_of(whole.with_name("both.zarr"))) == content(files_of(whole.with_name("again.zarr")))
    told = summarize(packed)
    assert told["encoding"] == packing.codec and told["packed"]["num_bytes"] < told["num_bytes"]
    assert json.dumps(told)


def test_only_the_chosen_states_come_to_the_scratch_folder(whole: Path, tmp_path: Path) -> None:
    packed = TrajectoryCache.open(packed_of(whole, ARCHIVE), scratch=tmp_path)
    packed.fetch([0, 4], packed.blocks)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2 * len(packed.blocks)


def test_a_packed_store_packs_again(whole: Path) -> None:
    packed = TrajectoryCache.open(packed_of(whole, LOSSLESS))
    pack(packed, whole.with_name("second.zarr"), LOSSLESS)
    assert content(files_of(whole.with_name("second.zarr"))) == content(
        files_of(whole.with_name("packed-lossless.zarr"))
    )


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
    with pytest.raises(MismatchError, match="encoding: archive → raw"):
        unpack(TrajectoryCache.open(out), out)
    with pytest.raises(MismatchError, match="encoding: raw → archive"):
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


# Damage.


def names_to_harm(packed: Path) -> list[str]:
    return [name for name in files_of(packed) if not name.endswith(("writer.json", "writer.lock"))]


@pytest.mark.parametrize("packing", [ARCHIVE, Packing.of("blosc", "float16")], ids=str)
def test_every_damaged_file_is_found_and_no_damaged_value_is_read(whole: Path, packing: Packing) -> None:
    packed = packed_of(whole, packing)
    sound = files_of(packed)
    truth = {s: TrajectoryCache.open(packed).rows(s, range(48)).tobytes() for s in (0, 2, 4)}
    assert verify(TrajectoryCache.open(packed)).findings == ()
    refused: set[str] = set()
    for name in names_to_harm(packed):
        for harm in (sound[name][: len(sound[name]) // 2], flipped(sound[name], 8 * len(sound[name]) - 70)):
            put(packed / name, harm)
            try:
                findings = verify(TrajectoryCache.open(packed)).findings
            except CacheError:
                refused.add(name)
            else:
                assert [found.file for found in findings] == [name]
            if not name.startswith("provenance/"):
                check_never_silent(packed, truth)
            put(packed / name, sound[name])
    assert refused and all(name.endswith("zarr.json") for name in refused)
    put(packed / "states/0002/c/7/0/0/0", b"x")
    put(packed / "states/0000/c/1/0/0/0", b"x")
    strays = {found.file for found in verify(TrajectoryCache.open(packed)).findings}
    assert "states/0002/c/7/0/0/0" in strays
    assert ("states/0000/c/1/0/0/0" in strays) == (packing is ARCHIVE or "states/0000/c/1/0/0/0" in sound)


def check_never_silent(packed: Path, truth: dict[int, bytes]) -> None:
    try:
        cache = TrajectoryCache.open(packed, scratch=packed.with_name("fresh"))
    except CacheError:
        return
    for step, expected in truth.items():
        try:
            assert cache.rows(step, range(48)).tobytes() == expected
        except CacheError:
            continue
    shutil.rmtree(packed.with_name("fresh"), ignore_errors=True)


def test_repair_gives_up_a_block_and_packing_again_makes_it(whole: Path) -> None:
    packed = packed_of(whole, ARCHIVE)
    sound = content(files_of(packed))
    put(packed / "states/0002/c/1/0/0/0", b"rubbish")
    cache = TrajectoryCache.open(packed)
    assert repair(cache, verify(cache).findings)
    assert TrajectoryCache.open(packed).blocks == (0, 2)
    done = pack(TrajectoryCache.open(whole), packed, ARCHIVE)
    assert (done.num_added, done.num_present) == (1, 2)
    assert content(files_of(packed)) == sound


def test_a_missing_file_is_packed_again(whole: Path) -> None:
    packed = packed_of(whole, ARCHIVE)
    sound = content(files_of(packed))
    put(packed / "states/0004/c/2/0/0/0", None)
    assert [found.kind for found in verify(TrajectoryCache.open(packed)).findings] == ["missing"]
    pack(TrajectoryCache.open(whole), packed, ARCHIVE)
    assert content(files_of(packed)) == sound


def test_drawn_noise_is_checked_against_its_hash(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = TrajectoryCache.open(packed_of(whole, ARCHIVE), scratch=whole.with_name("fresh"))
    monkeypatch.setattr("advkd.cache.chain.standard_normal", lambda *_: np.zeros((16, *ITEM_SHAPE), dtype=np.float32))
    with pytest.raises(DamagedError, match="x_T of block 0, drawn again, is not what was recorded"):
        packed.rows(4, [0])
    assert {found.state for found in verify(packed).findings} == {"0000"}


def test_a_partial_copy_says_what_it_lacks(whole: Path) -> None:
    packed = packed_of(whole, ARCHIVE)
    shutil.rmtree(packed / "states/0002")
    cache = TrajectoryCache.open(packed, scratch=whole.with_name("fresh"))
    assert cache.rows(0, [3]).size and sorted(cache.states) == [0, 4]
    with pytest.raises(DamagedError, match="states/0002/c/0/0/0/0 is missing"):
        cache.rows(4, [3])
    with pytest.raises(NotCachedError, match="partial copy"):
        unpack(cache, whole.with_name("again.zarr"))


# Somebody else's store.


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_chain_chunk_of_any_bytes_is_refused_or_decoded(data: st.DataObject) -> None:
    recipe, layout = make_recipe(), make_layout()
    encoder = Chain(recipe, layout, ARCHIVE, 0)
    encoder.first()
    states = block_states(layout, 0)
    chunk = bytearray(encoder.encode(states[2].astype(np.float16)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(chunk) - 1))
        chunk[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(chunk)))
    decoder = Chain(recipe, layout, ARCHIVE, 0)
    decoder.first()
    with contextlib.suppress(ValueError):
        assert decoder.decode(bytes(chunk[:cut] if data.draw(st.booleans()) else chunk)).shape == (16, *ITEM_SHAPE)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 300))
def test_a_stream_of_any_bytes_takes_no_more_memory_than_is_asked_for(data: bytes, count: int) -> None:
    sound = integers_to_bytes(np.arange(-20, 20, dtype=np.int32))
    for stream in (data, sound + data, sound[: len(data)], data + sound):
        try:
            assert integers_from_bytes(stream, count).size == count
        except ValueError:
            continue


def fuzz_metadata(whole: Path, packing: Packing, max_examples: int) -> None:
    packed = packed_of(whole, packing)
    sound = files_of(packed)
    metadata = {name: data for name, data in sound.items() if name.endswith(".json") and "writer" not in name}

    @settings(max_examples=max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed=mutated_stores(metadata))
    def run(changed: dict[str, bytes]) -> None:
        for name, data in changed.items():
            put(packed / name, data)
        try:
            read_everything(packed, whole)
        finally:
            for name in files_of(packed).keys() - sound.keys():
                put(packed / name, None)
            for name in changed:
                put(packed / name, sound.get(name))

    run()


MUTATED = pytest.mark.parametrize("packing", [ARCHIVE, Packing.of("zstd", "float16")], ids=str)


@MUTATED
def test_mutated_packed_metadata_are_read_or_refused(
    whole: Path, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVKD_SCRATCH", str(whole.with_name("scratch")))
    fuzz_metadata(whole, packing, 150)


@pytest.mark.slow
@MUTATED
def test_five_thousand_mutations_of_packed_metadata_are_read_or_refused(
    whole: Path, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVKD_SCRATCH", str(whole.with_name("scratch")))
    fuzz_metadata(whole, packing, 5000)


BOMBS = """
import resource, sys
from pathlib import Path
import numpy as np
from advkd.cache import plain
from advkd.cache.packing import PLAIN, Packing
from advkd.cache.residual import integers_from_bytes, integers_to_bytes

zeros = np.zeros(64 << 20, dtype=np.float16)
bombs = {codec: plain.encode(zeros, Packing.of(codec, "float16", level=1)) for codec in PLAIN}
stream = integers_to_bytes(zeros.view(np.int32))
del zeros
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (64 << 20), resource.RLIM_INFINITY))
for codec, bomb in bombs.items():
    assert len(bomb) < 1 << 20
    try:
        plain.decode(bomb, Packing.of(codec, "float16"), np.dtype("<f2"), (16, 1, 8, 8))
    except ValueError:
        continue
    assert codec == "pcodec", codec  # which writes no more than there is room for
assert integers_from_bytes(stream, 100).size == 100
print("done")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks at memory as Linux shows it")
def test_chunks_that_unpack_to_128_mib_take_the_memory_that_their_block_has() -> None:
    run = subprocess.run([sys.executable, "-c", BOMBS], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr


def test_a_packing_that_cannot_be_is_refused(whole: Path) -> None:
    packed = packed_of(whole, ARCHIVE)
    root = json.loads((packed / "zarr.json").read_bytes())
    for encoding, parameters in (
        ("archive", {}), ("archive", {"max_error": 1}), ("archive", {"max_error": 0.1, "level": 3}), ("lossless", None),
        ("archive", {"max_error": 1e300}), ("zstd", {"level": True}), ("zstd", {"max_error": 0.1}),
        ("raw", {"level": 3}), ("zstd", ["level"]), ("blosc", {"level": 9, "keep_bits": 10}), ("pickle", {}),
    ):  # fmt: skip
        layout = root["attributes"]["advkd"]["layout"] | {"encoding": encoding, "packing": parameters}
        with pytest.raises(NotACacheError):
            Layout.from_json(layout)
    assert set(REDRAWN) | set(PLAIN) == set(CODECS)


# What is promised to stay.


def test_the_golden_packed_store_decodes_to_what_it_always_did() -> None:
    cache = TrajectoryCache.open(GOLDEN)
    assert isinstance(cache.source, PackedSource) and cache.packed is not None
    assert verify(cache).findings == ()
    total = hashlib.sha256()
    for block in cache.blocks:
        for _, chunk in cache.packed.states(block, set(cache.states)):
            total.update(chunk)
    assert total.hexdigest() == "77411333661e166bf1e8c290d857734be1352dbbd5e7d1f90bc43e3ee96329bf"


def make_golden() -> None:
    """Run this once, when a format is new."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with_states = GOLDEN.with_name("tmp.zarr")
    layout = replace(make_layout(8), block_size=8)
    recipe = make_recipe(item_shape=(2, 6, 7))
    writer = CacheWriter.open(with_states, recipe, layout)
    with writer.writing():
        writer.grow(range(24))
        for block in (0, 2):
            writer.commit(block, smooth_states(recipe, layout, block))
    pack(TrajectoryCache.open(with_states), GOLDEN, ARCHIVE)
    shutil.rmtree(with_states)
    shutil.rmtree(GOLDEN / "provenance")


if __name__ == "__main__":
    make_golden()


def test_a_record_of_further_arrays_is_no_packed_one(tmp_path: Path) -> None:
    """And what it says to do is what makes packed blocks."""
    write_store(tmp_path / "toy.zarr", "0:16")
    packed_of(tmp_path / "toy.zarr")
    store = tmp_path / "packed-lossless.zarr"
    path = store / record_path(0)
    value = json.loads(unsealed(path.read_bytes()) + b"}")
    value["arrays"]["labels"] = value["arrays"]["states/0000"]
    path.write_bytes(seal(value))
    with pytest.raises(DamagedError, match=r"doesn't fit the layout; .*`advkd-cache pack`"):
        packed_source(TrajectoryCache.open(store)).records[0]
