"""A packed store is read as if it were not packed, and nothing of it is believed unseen."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advkd.cache import TrajectoryCache
from advkd.cache.care.repair import repair
from advkd.cache.care.summary import summarize
from advkd.cache.care.verify import verify
from advkd.cache.codec.residual import integers_from_bytes, integers_to_bytes
from advkd.cache.codec.state_codec import StateCodec
from advkd.cache.errors import CacheError, DamagedError, NotACacheError, NotCachedError
from advkd.cache.files.sealed_json import seal, unsealed
from advkd.cache.format.encoding import CODECS, PREDICTIVE, STANDARD, Packing
from advkd.cache.format.layout import Layout
from advkd.cache.format.store_paths import record_path
from advkd.cache.read.compare import compare
from advkd.cache.write.combine import merge, subset
from advkd.cache.write.pack import pack, unpack
from advkd.cache.write.pack_block import packed_source
from tests.cache.exercise import read_everything
from tests.cache.harm import content, files_of, flipped, put
from tests.cache.mutations import mutated_stores
from tests.cache.packs import ARCHIVE, EVERY, FIRST_GOLDEN, LOSSLESS, packed_of
from tests.conftest import ROOT
from tests.stores import ITEM_SHAPE, block_states, make_layout, make_recipe, write_store

# What any Zarr reader sees.


@pytest.mark.parametrize("packing", [packing for packing in EVERY if packing.codec in STANDARD], ids=str)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_plain_codecs_open_in_zarr(whole: Path, packing: Packing) -> None:
    import zarr

    packed = packed_of(whole, packing)
    group, cache = zarr.open_group(packed, mode="r"), TrajectoryCache.open(packed)
    for step in cache.states:
        array = group[f"states/{step:04d}"]
        assert isinstance(array, zarr.Array)
        assert np.asarray(array[:]).tobytes() == cache.rows(step, range(cache.num_seeds)).tobytes()


def test_zarr_refuses_the_codec_of_the_first_packed_stores_by_name() -> None:
    """It can't decode them, and an error is better than NaN."""
    import zarr

    group = zarr.open_group(FIRST_GOLDEN, mode="r")
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
    assert told["encoding"] == packing.encoding and told["packed"]["num_bytes"] < told["num_bytes"]
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
    monkeypatch.setattr(
        "advkd.cache.codec.state_codec.standard_normal", lambda *_: np.zeros((16, *ITEM_SHAPE), dtype=np.float32)
    )
    with pytest.raises(DamagedError, match="x_T of block 0, drawn again"):
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
def test_a_predictive_chunk_of_any_bytes_is_refused_or_decoded(data: st.DataObject) -> None:
    recipe, layout = make_recipe(), make_layout()
    encoder = StateCodec(recipe, layout, ARCHIVE, 0)
    encoder.draw_initial()
    states = block_states(layout, 0)
    chunk = bytearray(encoder.encode(states[2].astype(np.float16)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(chunk) - 1))
        chunk[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(chunk)))
    decoder = StateCodec(recipe, layout, ARCHIVE, 0)
    decoder.draw_initial()
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


@pytest.mark.parametrize("max_examples", [150, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packing", [ARCHIVE, Packing.of("zstd", "float16")], ids=str)
def test_mutated_packed_metadata_are_read_or_refused(
    whole: Path, packing: Packing, max_examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVKD_SCRATCH", str(whole.with_name("scratch")))
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


BOMBS = """
import resource, sys
from pathlib import Path
import numpy as np
from advkd.cache.codec import standard as plain
from advkd.cache.format.encoding import STANDARD, Packing
from advkd.cache.codec.residual import integers_from_bytes, integers_to_bytes

zeros = np.zeros(64 << 20, dtype=np.float16)
bombs = {codec: plain.encode(zeros, Packing.of(codec, "float16", level=1)) for codec in STANDARD}
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
        ("packed-zstd", {"level": 3}), ("packed-archive", {}), ("packed-lossless", {"max_error": 0.1}), ("packed-", {}),
        ("raw", {"level": 3}), ("zstd", ["level"]), ("blosc", {"level": 9, "keep_bits": 10}), ("pickle", {}),
    ):  # fmt: skip
        layout = root["attributes"]["advkd"]["layout"] | {"encoding": encoding, "packing": parameters}
        with pytest.raises(NotACacheError):
            Layout.from_json(layout)
    assert set(PREDICTIVE) | set(STANDARD) == set(CODECS)


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
