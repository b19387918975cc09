"""Format 1, as docs/cache-format.md has it: golden data, a reader written from the page alone, other Zarr readers."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from advkd.cache.care.summary import path_of, summarize
from advkd.cache.care.verify import verify
from advkd.cache.errors import DamagedError, NewerCacheError, NotACacheError
from advkd.cache.format.hashing import is_held_out
from advkd.cache.format.layout import State
from advkd.cache.format.noise import standard_normal
from advkd.cache.read.compare import tolerance_of
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from tests.cache import golden
from tests.conftest import ROOT
from tests.stores import tree

PAGE = (ROOT / "docs/cache-format.md").read_text()
FINGERPRINT = "bdb75809f83c9b3b292c7f267b7102aacb0ed9cd653e9974915e482028106d24"
LAYOUT_HASH = "8d7cb1de8db4105c556da670fd71a2a24caa0c793b9191c1c54673458ff5c975"
DIGEST = "6f185fc75a08dce4877d8dacf54a175a620b9005269d5a6a9c6afe4fafc164e6"
HELD_OUT = [6, 29, 38]


def test_the_golden_store_reads_for_ever() -> None:
    cache = TrajectoryCache.open(golden.FORMAT_1)
    assert (cache.recipe.fingerprint, cache.layout.layout_hash) == (FINGERPRINT, LAYOUT_HASH)
    assert (cache.blocks, cache.num_seeds, cache.digest) == (golden.BLOCKS, 12, DIGEST)
    assert (cache.recipe, cache.layout) == (golden.RECIPE, golden.LAYOUT)
    for block in golden.BLOCKS:
        for step, expected in golden.states_of(block).items():
            np.testing.assert_array_equal(cache.block_view(step, block), expected.astype(np.float16))
    assert verify(cache).findings == ()
    assert tolerance_of(cache) == {0: 0.0, 4: 2e-3, 10: 3e-3}
    summary = summarize(cache)
    assert (summary["seeds"], summary["gaps"]) == ([[0, 4], [8, 12]], [[4, 8]])
    assert summary["teacher"]["license"] == "apache-2.0"
    assert summary["states"][1]["rounding_rms"] == pytest.approx(2e-4, rel=0.1)


@pytest.mark.parametrize(
    ("levels", "path"),
    [
        ([(0.0, 1.0), (0.6, 0.8), (1.0, 0.0)], "variance preserving"),
        ([(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)], "flow matching"),
        ([(1.0, 80.0), (1.0, 0.0)], "variance exploding"),
        ([(0.5, 1.0), (1.0, 0.0)], "another linear path"),
        ([(1.7e308, 1.0), (1.0, 0.0)], "another linear path"),
    ],
)
def test_levels_tell_the_path(levels: list[tuple[float, float]], path: str) -> None:
    states = tuple(
        State(step=step, timestep=-1.0, alpha=alpha, sigma=sigma, scale=1.0)
        for step, (alpha, sigma) in enumerate(levels)
    )
    assert path_of(dataclasses.replace(golden.LAYOUT, states=states)) == path


def test_writing_the_golden_store_again_changes_nothing(tmp_path: Path) -> None:
    golden.write(tmp_path / "again.zarr")
    again, kept = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "again.zarr", golden.FORMAT_1)
    )
    assert again == kept


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_by_the_page(store: Path) -> dict[int, dict[int, np.ndarray[Any, Any]]]:
    """A reader that knows docs/cache-format.md and nothing of this package: by step, by seed."""
    attributes = json.loads((store / "zarr.json").read_text())["attributes"]["advkd"]
    recipe, layout = attributes["recipe"], attributes["layout"]
    assert attributes["format"] == 1 and layout["encoding"] == "raw"
    assert sha256(canonical(recipe)) == attributes["fingerprint"]
    assert sha256(canonical(layout)) == attributes["layout_hash"]
    size, shape, dtype = layout["block_size"], recipe["item_shape"], np.dtype(layout["dtype"]).newbyteorder("<")
    rows: dict[int, dict[int, np.ndarray[Any, Any]]] = {state["step"]: {} for state in layout["states"]}
    seals = []
    for record_file in sorted((store / "blocks").iterdir()):
        raw = record_file.read_bytes()
        tail = re.fullmatch(rb'(.*),"record_sha256":"([0-9a-f]{64})"\}', raw)
        assert tail and sha256(tail[1] + b"}") == tail[2].decode()
        record = json.loads(raw)
        block = record["block"]
        assert record_file.name == f"{block:06d}.json"
        assert record["fingerprint"] == attributes["fingerprint"] and record["layout_hash"] == attributes["layout_hash"]
        seals.append([block, record["record_sha256"]])
        for state in layout["states"]:
            name = f"states/{state['step']:04d}"
            array = json.loads((store / name / "zarr.json").read_text())
            assert array["attributes"] == {key: state[key] for key in ("timestep", "alpha", "sigma", "scale")}
            data, entry = (store / name / f"c/{block}/0/0/0").read_bytes(), record["arrays"][name]
            assert (len(data), sha256(data)) == (entry["num_bytes"], entry["sha256"])
            body = data[:-4]
            assert struct.unpack("<I", data[-4:])[0] == google_crc32c.value(body)
            starts = range(0, len(body), 1 << 20)
            assert entry["segments"] == "".join(f"{google_crc32c.value(body[i : i + (1 << 20)]):08x}" for i in starts)
            values = np.frombuffer(body, dtype=dtype).reshape(size, *shape)
            assert (entry["minimum"], entry["maximum"]) == (float(values.min()), float(values.max()))
            rows[state["step"]].update({block * size + i: values[i] for i in range(size)})
    assert sha256(canonical(seals)) == DIGEST
    return rows


def test_a_reader_written_from_the_page_alone_agrees() -> None:
    cache = TrajectoryCache.open(golden.FORMAT_1)
    for step, rows in read_by_the_page(golden.FORMAT_1).items():
        assert sorted(rows) == cache.seeds().tolist()
        np.testing.assert_array_equal(np.stack([rows[seed] for seed in sorted(rows)]), cache.rows(step, cache.seeds()))


def philox_word(key: int, seed: int, stream: int, index: int) -> int:
    """Philox4x64-10 (Salmon et al. 2011) as the page uses it, in Python's own integers."""
    mask = (1 << 64) - 1
    counter, keys = [1 + index // 4, 0, seed, stream], [key, 0]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [second >> 64 ^ counter[1] ^ keys[0], second & mask, first >> 64 ^ counter[3] ^ keys[1], first & mask]
        keys = [keys[0] + 0x9E3779B97F4A7C15 & mask, keys[1] + 0xBB67AE8584CAA73B & mask]
    return counter[index % 4]


@pytest.mark.parametrize(("root", "stream", "seed"), [(0, 0, 0), (7, 0, 5), (7, 3, 5), (2**63 - 1, 0, 2**40)])
def test_noise_follows_the_page(root: int, stream: int, seed: int) -> None:
    drawn = standard_normal(root, [seed], (11,), stream)[0]
    uniform = [((philox_word(root, seed, stream, j) >> 12) + 0.5) * 2.0**-52 for j in range(11)]
    np.testing.assert_array_equal(drawn, np.array([NormalDist().inv_cdf(u) for u in uniform], dtype=np.float32))


def vectors() -> list[tuple[int, int, int, list[str]]]:
    (block,) = re.findall(r"```text vectors\n(.*?)```", PAGE, re.S)
    lines = [line.split() for line in block.splitlines()]
    return [(int(root), int(stream), int(seed), bits) for root, stream, seed, *bits in lines]


def as_bits(root: int, stream: int, seed: int) -> list[str]:
    return [f"{bits:08x}" for bits in standard_normal(root, [seed], (4,), stream)[0].view(np.uint32)]


def test_the_pages_vectors_hold() -> None:
    assert len(vectors()) >= 6
    for root, stream, seed, bits in vectors():
        assert as_bits(root, stream, seed) == bits


def test_noise_is_the_same_bits_without_vector_instructions() -> None:
    """Under another choice of NumPy's and torch's vector instructions, in another process."""
    program = (
        "import hashlib; from advkd.cache.format.noise import standard_normal\n"
        "print(hashlib.sha256(standard_normal(3, range(100, 164), (3, 16, 16)).tobytes()).hexdigest())"
    )
    plain = {
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX2 FMA3 X86_V3 X86_V4 NEON_VFPV4 ASIMDHP",
        "ATEN_CPU_CAPABILITY": "default",
    }
    hashes = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env=os.environ | extra,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in ({}, plain)
    }
    assert hashes == {sha256(standard_normal(3, range(100, 164), (3, 16, 16)).tobytes()) + "\n"}


def test_held_out_seeds_follow_the_page() -> None:
    assert np.flatnonzero(is_held_out(np.arange(100))).tolist() == HELD_OUT


def test_plain_zarr_reads_the_same_values() -> None:
    cache, group = TrajectoryCache.open(golden.FORMAT_1), zarr.open_group(golden.FORMAT_1, mode="r")
    for step, state in cache.states.items():
        array = group[f"states/{step:04d}"]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(np.asarray(array[:])[cache.seeds()], cache.rows(step, cache.seeds()))
        assert np.isnan(np.asarray(array[4:8])).all()
        assert {key: array.attrs[key] for key in ("timestep", "alpha", "sigma", "scale")} == {
            "timestep": state.timestep,
            "alpha": state.alpha,
            "sigma": state.sigma,
            "scale": state.scale,
        }


def test_tensorstore_reads_the_same_values() -> None:
    import tensorstore

    cache = TrajectoryCache.open(golden.FORMAT_1)
    for step in cache.states:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(golden.FORMAT_1 / f"states/{step:04d}")},
        }
        array = tensorstore.open(spec, read=True).result()
        np.testing.assert_array_equal(array.read().result()[cache.seeds()], cache.rows(step, cache.seeds()))


def test_zarrs_own_check_finds_a_flipped_bit(tmp_path: Path) -> None:
    """The CRC that ends a chunk file is what the crc32c codec expects."""
    store = tmp_path / "a.zarr"
    shutil.copytree(golden.FORMAT_1, store)
    chunk = store / "states/0004/c/0/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    array = zarr.open_group(store, mode="r")["states/0004"]
    assert isinstance(array, zarr.Array)
    with pytest.raises(ValueError, match="checksum"):
        array[0:4]


def test_a_draft_before_format_1_is_refused_by_name(tmp_path: Path) -> None:
    """Development snapshots wrote `format: 1` too, and a layout without an encoding."""
    store = tmp_path / "draft.zarr"
    shutil.copytree(golden.FORMAT_1, store)
    value = json.loads((store / "zarr.json").read_text())
    attributes = value["attributes"]["advkd"]
    del attributes["layout"]["encoding"]
    attributes["layout_hash"] = sha256(canonical(attributes["layout"]))
    (store / "zarr.json").write_text(json.dumps(value))
    before = tree(store)
    with pytest.raises(NotACacheError, match=r"draft.*`advkd-cache build`"):
        TrajectoryCache.open(store)
    assert tree(store) == before


@pytest.mark.parametrize("format_", [0, 3, 10**30, "1", 1.0, True, None])
def test_another_format_is_refused_with_both_named(tmp_path: Path, format_: object) -> None:
    store = tmp_path / "a.zarr"
    shutil.copytree(golden.FORMAT_1, store)
    value = json.loads((store / "zarr.json").read_text())
    value["attributes"]["advkd"]["format"] = format_
    (store / "zarr.json").write_text(json.dumps(value))
    before = tree(store)
    with pytest.raises(NotACacheError, match="reads formats 1 and 2"):
        TrajectoryCache.open(store)
    assert tree(store) == before


def change(store: Path, *path: str, value: object, rehash: bool = True) -> None:
    """Set a member of the root's attributes."""
    root = json.loads((store / "zarr.json").read_text())
    ours = part = root["attributes"]["advkd"]
    for name in path[:-1]:
        part = part[name] if isinstance(part, dict) else part[int(name)]
    part[path[-1]] = value
    if rehash:
        ours["fingerprint"], ours["layout_hash"] = (sha256(canonical(ours[name])) for name in ("recipe", "layout"))
    (store / "zarr.json").write_text(json.dumps(root))


@pytest.mark.parametrize(
    "path",
    [("format",), ("recipe", "conditions"), ("layout", "latents"), ("layout", "states", "1", "guidance"),
     ("layout", "encoding")],
    ids="/".join,
)  # fmt: skip
def test_an_intact_store_of_a_newer_version_is_not_called_altered(tmp_path: Path, path: tuple[str, ...]) -> None:
    for rehash in (True, False):
        store = tmp_path / f"{rehash}.zarr"
        shutil.copytree(golden.FORMAT_1, store)
        change(store, *path, value=3 if path == ("format",) else "new", rehash=rehash)
        before = tree(store)
        kind = NewerCacheError if rehash or path == ("format",) else DamagedError
        for act in (TrajectoryCache.open, lambda path: CacheWriter.open(path, golden.RECIPE, golden.LAYOUT)):
            with pytest.raises(kind) as raised:
                act(store)
            assert type(raised.value) is kind
            assert ("upgrade advkd" in str(raised.value)) == (kind is NewerCacheError)
        assert tree(store) == before


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    shutil.copytree(golden.FORMAT_1, store)
    value = json.loads((store / "zarr.json").read_text())
    attributes = value["attributes"]["advkd"]
    attributes["layout"]["encoding"] = "smooth"
    attributes["layout_hash"] = sha256(canonical(attributes["layout"]))
    (store / "zarr.json").write_text(json.dumps(value))
    with pytest.raises(NotACacheError, match="encoding 'smooth' is unknown"):
        TrajectoryCache.open(store)
