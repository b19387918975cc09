"""Arrays besides the states, class labels for instance, go where the states go, or the store is refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from advkd.cache import CacheWriter, TrajectoryCache
from advkd.cache.care.repair import repair
from advkd.cache.care.summary import summarize
from advkd.cache.care.verify import bytes_to_verify, verify
from advkd.cache.errors import CacheError, DamagedError, MismatchError, NotCachedError
from advkd.cache.format.encoding import Packing
from advkd.cache.format.layout import Layout
from advkd.cache.read.compare import compare
from advkd.cache.write.combine import merge, subset
from advkd.cache.write.pack import pack, unpack
from tests.cache.harm import flipped
from tests.cache.labels import (
    DTYPES,
    EMBEDDING,
    LABEL,
    add_arrays,
    chunk_of,
    metadata_of,
    read_by_zarr,
    values_of,
    write_labelled,
)
from tests.cache.packs import ARCHIVE, LOSSLESS
from tests.stores import BLOCK_SIZE, block_states, make_layout, make_recipe, tree, write_store

BOTH = (LABEL, EMBEDDING)


def findings(store: Path) -> list[tuple[str, str, int | None]]:
    return [(found.kind, found.file, found.block) for found in verify(TrajectoryCache.open(store)).findings]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    write_labelled(tmp_path / "labelled.zarr", "0:64", BOTH)
    return tmp_path / "labelled.zarr"


def test_a_store_with_further_arrays_is_read_and_described(labelled: Path) -> None:
    cache = TrajectoryCache.open(labelled)
    assert cache.further_names == BOTH
    assert [(spec.path, spec.item_shape, spec.dtype) for spec in cache.further] == [
        (LABEL, (), "int32"),
        (EMBEDDING, (3, 2), "float16"),
    ]
    assert findings(labelled) == []
    for array in BOTH:
        values = cache.zarr[array]
        assert isinstance(values, zarr.Array)
        np.testing.assert_array_equal(values[:], np.concatenate([values_of(array, block) for block in range(4)]))
    arrays = {array["path"]: array for array in summarize(cache)["arrays"]}
    assert arrays[LABEL] == {
        "path": LABEL, "item_shape": [], "dtype": "int32", "seeds_per_row": 1, "here": True, "minimum": 0, "maximum": 9,
    }  # fmt: skip
    sizes = [len(data) for name, data in tree(labelled).items() if "/c/" in name]
    assert (summarize(cache)["num_bytes"], bytes_to_verify(cache)) == (sum(sizes), sum(sizes) - 4 * len(sizes))


def test_a_merge_and_a_subset_take_further_arrays_along(tmp_path: Path) -> None:
    for name, seeds in (("a", "0:64"), ("b", "128:256"), ("c", "32:160"), ("whole", "0:256")):
        write_labelled(tmp_path / name, seeds, BOTH)
    combined = merge([TrajectoryCache.open(tmp_path / name) for name in "abc"], tmp_path / "out")
    assert combined.how == {"hard link": 16 * 5}
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert findings(tmp_path / "out") == []
    for array in BOTH:
        expected = np.concatenate([values_of(array, block) for block in range(16)])
        np.testing.assert_array_equal(read_by_zarr(tmp_path / "out", array), expected)
    subset(TrajectoryCache.open(tmp_path / "out"), tmp_path / "part", seeds="16:48", steps=[4])
    part = TrajectoryCache.open(tmp_path / "part")
    assert (part.blocks, list(part.states), part.further_names) == ((1, 2), [0, 4], BOTH)
    np.testing.assert_array_equal(read_by_zarr(tmp_path / "part", LABEL)[16:32], values_of(LABEL, 1))
    assert (read_by_zarr(tmp_path / "part", LABEL)[:16] == -1).all()
    assert findings(tmp_path / "part") == []


def test_a_store_grows_with_all_its_arrays(tmp_path: Path) -> None:
    write_labelled(tmp_path / "a", "0:32")
    write_labelled(tmp_path / "b", "64:96")
    merge([TrajectoryCache.open(tmp_path / name) for name in "ab"], tmp_path / "a")
    for array in ("states/0000", LABEL):
        assert json.loads((tmp_path / "a" / array / "zarr.json").read_text())["shape"][0] == 96
    write_labelled(tmp_path / "both", "0:32")
    shutil.rmtree(tmp_path / "both")
    assert findings(tmp_path / "a") == []


def test_stores_with_and_without_labels_are_refused_by_name(tmp_path: Path) -> None:
    write_store(tmp_path / "plain", "0:32")
    write_labelled(tmp_path / "labelled", "32:64")
    caches = [TrajectoryCache.open(tmp_path / name) for name in ("plain", "labelled")]
    for pair in (caches, caches[::-1]):
        with pytest.raises(MismatchError, match=LABEL):
            merge(pair, tmp_path / "out")
    for cache, out in zip(caches, ("labelled", "plain"), strict=True):
        with pytest.raises(MismatchError, match=LABEL):
            merge([cache], tmp_path / out)
    with pytest.raises(MismatchError, match=LABEL):  # a build that knows no labels would leave them out
        CacheWriter.open(tmp_path / "labelled", make_recipe(), make_layout())
    assert not (tmp_path / "out").exists()
    write_store(tmp_path / "empty", "0:16")
    (tmp_path / "empty/blocks/000000.json").unlink()
    merge([TrajectoryCache.open(tmp_path / "empty"), caches[1]], tmp_path / "empty")
    assert TrajectoryCache.open(tmp_path / "empty").further_names == (LABEL,)


def test_stores_whose_arrays_are_described_otherwise_do_not_merge(tmp_path: Path) -> None:
    for name, fill_value in (("a", -1), ("b", 0)):
        write_store(tmp_path / name, "0:32")
        add_arrays(tmp_path / name, fill_value=fill_value)
    caches = [TrajectoryCache.open(tmp_path / name) for name in "ab"]
    with pytest.raises(MismatchError, match=f"{LABEL}.fill_value: -1 → 0"):
        merge(caches, tmp_path / "out")
    assert not compare(*caches).same


def test_other_labels_of_the_same_seeds_are_never_within_tolerance(tmp_path: Path) -> None:
    for name in "ab":
        write_labelled(tmp_path / name, "0:32")
    relabel(tmp_path / "b", 1)
    caches = [TrajectoryCache.open(tmp_path / name) for name in "ab"]
    with pytest.raises(MismatchError, match=f"block 1 differs .*{LABEL}"):
        merge(caches, tmp_path / "out", prefer=caches[0])
    found = compare(*caches)
    assert (found.other_arrays, found.apart, found.num_equal, found.same) == ({1: (LABEL,)}, {}, 1, False)


def relabel(store: Path, block: int) -> None:
    """Commit a block again with other labels."""
    cache = TrajectoryCache.open(store)
    writer = CacheWriter(store, cache.recipe, cache.layout, cache.further)
    states = {step: cache.block_view(step, block).copy() for step in cache.states}
    writer.commit(block, states, {LABEL: (values_of(LABEL, block) + 1) % 10})


def test_a_writer_commits_every_array_of_a_block(tmp_path: Path) -> None:
    """With the bytes that the helper wrote by hand; what is missing, superfluous or of another kind is refused."""
    write_labelled(tmp_path / "by-hand", "0:32", BOTH)
    further = TrajectoryCache.open(tmp_path / "by-hand").further
    layout: Layout = make_layout()
    writer = CacheWriter.open(tmp_path / "out", make_recipe(), layout, further=further)
    with writer.writing():
        writer.grow(range(32))
        for block in range(2):
            arrays = {array: values_of(array, block) for array in BOTH}
            for wrong in (
                {LABEL: arrays[LABEL]},
                arrays | {"conditions/more": arrays[LABEL]},
                arrays | {LABEL: arrays[LABEL].astype(np.int64)},
                arrays | {LABEL: arrays[LABEL][:-1]},
                arrays | {EMBEDDING: np.full_like(arrays[EMBEDDING], np.inf)},
            ):
                with pytest.raises(CacheError):
                    writer.commit(block, block_states(layout, block), wrong)
                assert not writer.is_committed(block)
            writer.commit(block, block_states(layout, block), arrays)
    assert tree(tmp_path / "out") == tree(tmp_path / "by-hand")


@pytest.mark.parametrize("array", BOTH)
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_to_any_array_is_named_and_repaired(labelled: Path, array: str, harm: str) -> None:
    file = chunk_of(array, 2)
    data = (labelled / file).read_bytes()
    if harm == "remove":
        (labelled / file).unlink()
    else:
        (labelled / file).write_bytes(flipped(data, 9) if harm == "flip" else data[:-1])
    assert findings(labelled) == [("missing" if harm == "remove" else "damage", file, 2)]
    cache = TrajectoryCache.open(labelled)
    writer = CacheWriter(labelled, cache.recipe, cache.layout, cache.further)
    assert writer.incomplete() == ([] if harm == "flip" else [2])
    repair(cache, verify(cache).findings)
    assert TrajectoryCache.open(labelled).blocks == (0, 1, 3)
    assert not (labelled / file).exists()
    layout = make_layout()
    writer.commit(2, block_states(layout, 2), {array: values_of(array, 2) for array in BOTH})
    assert findings(labelled) == []


@pytest.mark.parametrize(
    ("change", "mended"),
    [({"shape": [32]}, True), ({"shape": [64, 5]}, False), ({"data_type": "int16"}, False),
     ({"codecs": []}, False), ({"shape": [1 << 62]}, False), ({"shape": "all"}, False)],
)  # fmt: skip
def test_damaged_metadata_of_a_further_array_is_named(tmp_path: Path, change: dict[str, object], mended: bool) -> None:
    write_labelled(tmp_path / "a", "0:64")
    file = tmp_path / "a" / LABEL / "zarr.json"
    file.write_text(json.dumps(metadata_of(LABEL, 64) | change, indent=2, sort_keys=True) + "\n")
    cache = TrajectoryCache.open(tmp_path / "a")
    found = verify(cache).findings
    assert {(finding.kind, finding.file) for finding in found} == {("damage", f"{LABEL}/zarr.json")}
    (said,) = repair(cache, found)
    assert f"{LABEL}/zarr.json" in said
    assert (findings(tmp_path / "a") == []) == mended
    assert TrajectoryCache.open(tmp_path / "a").blocks == (0, 1, 2, 3)


def test_an_array_that_is_not_here_makes_a_partial_copy_and_is_never_dropped(labelled: Path, tmp_path: Path) -> None:
    shutil.rmtree(labelled / LABEL)
    cache = TrajectoryCache.open(labelled)
    verified = verify(cache)
    assert (verified.findings, verified.absent_states) == ((), (LABEL,))
    assert {array["path"]: array["here"] for array in summarize(cache)["arrays"]} == {LABEL: False, EMBEDDING: True}
    writer = CacheWriter(labelled, cache.recipe, cache.layout, cache.further)
    assert writer.incomplete() == [0, 1, 2, 3]
    for make in (
        lambda: merge([cache], tmp_path / "out"),
        lambda: subset(cache, tmp_path / "out"),
        lambda: pack(cache, tmp_path / "out", LOSSLESS),
    ):
        with pytest.raises(NotCachedError, match=LABEL):
            make()
    assert not (tmp_path / "out").exists()


def test_a_block_with_other_arrays_than_the_rest_is_damage(tmp_path: Path) -> None:
    write_labelled(tmp_path / "a", "0:64")
    write_store(tmp_path / "plain", "0:64")
    shutil.copy(tmp_path / "plain/blocks/000002.json", tmp_path / "a/blocks/000002.json")
    assert findings(tmp_path / "a") == [("damage", "blocks/000002.json", 2)]
    with pytest.raises(DamagedError, match=f"block 2 lacks an array {LABEL}"):
        merge([TrajectoryCache.open(tmp_path / "a")], tmp_path / "out")


@pytest.mark.parametrize("packing", [LOSSLESS, ARCHIVE, Packing.of("zstd", "float16")], ids=str)
def test_packed_stores_keep_further_arrays_raw(labelled: Path, tmp_path: Path, packing: Packing) -> None:
    cache = TrajectoryCache.open(labelled)
    packed, unpacked = tmp_path / "packed.zarr", tmp_path / "unpacked.zarr"
    pack(cache, packed, packing)
    assert pack(cache, packed, packing).num_present == 4
    found = TrajectoryCache.open(packed)
    assert found.further == cache.further
    assert findings(packed) == []
    for array in BOTH:
        assert read_by_zarr(packed, array).dtype == DTYPES[array]
        np.testing.assert_array_equal(read_by_zarr(packed, array), read_by_zarr(labelled, array))
    unpack(found, unpacked)
    assert findings(unpacked) == []
    if packing.error_bound == 0.0:
        assert tree(unpacked) == tree(labelled)
        assert merge([found], tmp_path / "merged.zarr").num_added == 4
        assert tree(tmp_path / "merged.zarr") == tree(labelled)
    (packed / chunk_of(LABEL, 1)).unlink()  # which may be a hard link
    (packed / chunk_of(LABEL, 1)).write_bytes(b"")
    assert findings(packed) == [("damage", chunk_of(LABEL, 1), 1)]
    assert pack(cache, packed, packing).num_added == 1
    assert findings(packed) == []
    assert cache.num_seeds == BLOCK_SIZE * 4


def test_making_a_block_leaves_what_others_write_in_the_same_folder(labelled: Path, tmp_path: Path) -> None:
    """The chunks of all blocks of a one-dimensional array lie in one folder."""
    source, target = TrajectoryCache.open(labelled), tmp_path / "target.zarr"
    writer = CacheWriter.open(target, source.recipe, source.layout, further=source.further)
    writer.grow(range(source.num_seeds))
    folder = (target / chunk_of(LABEL, 1)).parent
    folder.mkdir()
    others, own = folder / "2.0123456789ab.partial", folder / "1.0123456789ab.partial"
    for partial in (others, own):
        partial.write_bytes(b"half")
    writer.adopt(1, source)
    assert writer.is_committed(1) and others.exists() and not own.exists()
