"""Merging, cutting out, comparing: stores out of stores, without a byte made twice."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from advkd.cache.care.verify import verify
from advkd.cache.errors import DamagedError, MismatchError, NotCachedError, UsageError
from advkd.cache.files import durable
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.seeds import parse_seed_range
from advkd.cache.read.compare import MAX_TOLERANCE, compare, tolerance_of
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write import divide
from advkd.cache.write.combine import Combined, merge, subset
from advkd.cache.write.writer import CacheWriter
from tests.stores import BLOCK_SIZE, block_states, make_layout, make_recipe, tree, write_store

TOLERANCE = {"0002": 1e-2, "0004": 1e-2}


def other_machine(path: Path, seeds: str, off: float, tolerance: dict[str, float] | None = None) -> None:
    """A store whose states, but not its noise, are off by so much."""
    layout = make_layout()
    writer = CacheWriter.open(path, make_recipe(), layout)
    with writer.writing():
        writer.grow(parse_seed_range(seeds))
        for block in writer.missing(parse_seed_range(seeds)):
            states = block_states(layout, block)
            writer.commit(block, {step: values + off * (step > 0) for step, values in states.items()})
    if tolerance is not None:
        write_atomically(path / "provenance/tolerance.json", [seal({"rms": tolerance})])


def run_merge(out: Path, *stores: Path, prefer: Path | None = None) -> Combined:
    caches = {store: TrajectoryCache.open(store) for store in stores}
    return merge(list(caches.values()), out, prefer=caches[prefer] if prefer else None)


def test_a_merge_is_the_store_that_one_builder_would_have_made(tmp_path: Path) -> None:
    for name, seeds in (("a", "0:64"), ("b", "128:256"), ("c", "32:160"), ("whole", "0:256")):
        write_store(tmp_path / name, seeds)
    combined = run_merge(tmp_path / "out", *(tmp_path / name for name in "abc"))
    assert (combined.num_added, combined.num_present, combined.how) == (16, 0, {"hard link": 48})
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert verify(TrajectoryCache.open(tmp_path / "out")).findings == ()
    again = run_merge(tmp_path / "out", *(tmp_path / name for name in "abc"))
    assert (again.num_added, again.how) == (0, {})


def test_a_store_may_grow_by_what_another_has(tmp_path: Path) -> None:
    write_store(tmp_path / "mine", "0:64")
    write_store(tmp_path / "theirs", "32:128")
    combined = run_merge(tmp_path / "mine", tmp_path / "mine", tmp_path / "theirs")
    assert combined.num_added == 4
    write_store(tmp_path / "whole", "0:128")
    assert tree(tmp_path / "mine") == tree(tmp_path / "whole")


@pytest.mark.parametrize("refused", ["link", "link and reflink"])
def test_where_links_are_refused_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def no(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    write_store(tmp_path / "a", "0:32")
    monkeypatch.setattr(os, "link", no)
    if refused == "link and reflink":
        monkeypatch.setattr(durable.fcntl, "ioctl", no)
    combined = run_merge(tmp_path / "out", tmp_path / "a")
    assert sum(combined.how.values()) == 6 and set(combined.how) <= {"copy", "reflink"}
    assert tree(tmp_path / "out") == tree(tmp_path / "a")


def test_links_share_bytes_but_not_fate(tmp_path: Path) -> None:
    """A block that is made anew in one store leaves the other as it was."""
    write_store(tmp_path / "a", "0:32")
    run_merge(tmp_path / "b", tmp_path / "a")
    before = tree(tmp_path / "b")
    layout = make_layout()
    CacheWriter.open(tmp_path / "a", make_recipe(), layout).commit(
        0, {step: values * 0.5 for step, values in block_states(layout, 0).items()}
    )
    assert tree(tmp_path / "b") == before


def test_stores_of_other_recipes_or_layouts_do_not_merge(tmp_path: Path) -> None:
    write_store(tmp_path / "a", "0:32")
    write_store(tmp_path / "other", "0:32", noise={"rule": "philox4x64-as241-v1", "root_seed": 1})
    with pytest.raises(MismatchError, match=r"a and .*other don't fit together \(noise.root_seed: 0 → 1\)"):
        run_merge(tmp_path / "out", tmp_path / "a", tmp_path / "other")
    subset(TrajectoryCache.open(tmp_path / "a"), tmp_path / "two", steps=[4])
    with pytest.raises(MismatchError, match="subset --states"):
        run_merge(tmp_path / "out", tmp_path / "a", tmp_path / "two")
    with pytest.raises(MismatchError, match=r"two and .*a don't fit together"):
        run_merge(tmp_path / "two", tmp_path / "a")
    assert not (tmp_path / "out").exists()


def test_a_partial_copy_is_not_merged(tmp_path: Path) -> None:
    write_store(tmp_path / "a", "0:32")
    shutil.rmtree(tmp_path / "a/states/0002")
    with pytest.raises(NotCachedError, match=r"partial copy \(state 0002"):
        run_merge(tmp_path / "out", tmp_path / "a")
    (tmp_path / "b").mkdir()
    write_store(tmp_path / "b", "0:32")
    (tmp_path / "b/states/0002/c/1/0/0/0").unlink()
    with pytest.raises(DamagedError, match="is missing, but the ledger has it"):
        run_merge(tmp_path / "out", tmp_path / "b")
    assert TrajectoryCache.open(tmp_path / "out").blocks == (0,)


def test_blocks_within_tolerance_need_a_word_and_beyond_it_stop(tmp_path: Path) -> None:
    write_store(tmp_path / "a", "0:64")
    other_machine(tmp_path / "close", "32:96", 4e-3, TOLERANCE)
    other_machine(tmp_path / "far", "32:96", 4e-2, TOLERANCE)
    with pytest.raises(MismatchError, match=r"block 2 differs between .*a and .*close by rms 0.004.*--prefer"):
        run_merge(tmp_path / "out", tmp_path / "a", tmp_path / "close")
    with pytest.raises(MismatchError, match=r"block 2 differs .* beyond the recorded tolerance 0.01"):
        run_merge(tmp_path / "out", tmp_path / "a", tmp_path / "far", prefer=tmp_path / "a")
    assert not (tmp_path / "out").exists()
    for name in ("a", "close"):
        combined = run_merge(tmp_path / f"as-{name}", tmp_path / "a", tmp_path / "close", prefer=tmp_path / name)
        assert combined.num_added == 6
        merged, preferred = (TrajectoryCache.open(tmp_path / store) for store in (f"as-{name}", name))
        np.testing.assert_array_equal(merged.rows(4, range(32, 64)), preferred.rows(4, range(32, 64)))
        assert verify(merged).findings == ()
        assert tolerance_of(merged)[4] == 1e-2
    replaced = run_merge(tmp_path / "a", tmp_path / "a", tmp_path / "close", prefer=tmp_path / "close")
    assert (replaced.num_added, replaced.num_replaced) == (2, 2)
    assert tree(tmp_path / "a") == tree(tmp_path / "as-close")


def test_other_noise_is_never_within_tolerance(tmp_path: Path) -> None:
    write_store(tmp_path / "a", "0:16")
    layout = make_layout()
    writer = CacheWriter.open(tmp_path / "b", make_recipe(), layout)
    writer.grow(range(16))
    writer.commit(0, {step: values + np.float32(2e-3) for step, values in block_states(layout, 0).items()})
    with pytest.raises(MismatchError, match=r"state 0000 .* beyond the recorded tolerance 0"):
        run_merge(tmp_path / "out", tmp_path / "a", tmp_path / "b", prefer=tmp_path / "a")


def test_a_tolerance_is_bounded_whatever_a_store_claims(tmp_path: Path) -> None:
    other_machine(tmp_path / "a", "0:16", 0.0, {"0002": 1e6})
    assert tolerance_of(TrajectoryCache.open(tmp_path / "a")) == {0: 0.0, 2: MAX_TOLERANCE, 4: 2.0**-10}
    for claimed in (-1.0, "much", None, [1.0]):
        write_atomically(tmp_path / "a/provenance/tolerance.json", [seal({"rms": {"0002": claimed}})])
        with pytest.raises(DamagedError, match=r"tolerance.json .*remove it"):
            tolerance_of(TrajectoryCache.open(tmp_path / "a"))


def test_a_block_that_somebody_makes_now_is_waited_for_and_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divide, "POLL_SECONDS", 0.01)
    write_store(tmp_path / "a", "0:64")
    writer = write_store(tmp_path / "out", "0:16")
    layout = make_layout()
    with ThreadPoolExecutor(1) as executor:
        with writer.writing(), writer.claim(2) as claimed:
            assert claimed
            merging = executor.submit(run_merge, tmp_path / "out", tmp_path / "a")
            while TrajectoryCache.open(tmp_path / "out").blocks != (0, 1, 3):
                time.sleep(0.01)
            with pytest.raises(TimeoutError):
                merging.result(0.1)
            writer.commit(2, block_states(layout, 2))
        assert (merging.result().num_added, merging.result().num_present) == (2, 1)
    assert tree(tmp_path / "out") == tree(tmp_path / "a")


def test_a_block_that_appears_during_a_merge_is_settled_like_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not replaced unasked, and not taken for the same."""
    write_store(tmp_path / "a", "0:64")
    writing = CacheWriter.writing

    def late(self: CacheWriter) -> AbstractContextManager[None]:
        monkeypatch.setattr(CacheWriter, "writing", writing)
        other_machine(tmp_path / "out", "32:48", 4e-3, TOLERANCE)
        return writing(self)

    monkeypatch.setattr(CacheWriter, "writing", late)
    with pytest.raises(MismatchError, match=r"block 2 differs .*--prefer"):
        run_merge(tmp_path / "out", tmp_path / "a")
    combined = run_merge(tmp_path / "out", tmp_path / "a", prefer=tmp_path / "a")
    assert (combined.num_added, combined.num_replaced) == (1, 1)
    assert tree(tmp_path / "out") == tree(tmp_path / "a")


def test_a_store_is_not_created_where_none_can_be(store: Path, tmp_path: Path) -> None:
    before = tree(store)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling.zarr").symlink_to(tmp_path / "nothing")
    places = [store / "inner.zarr", store / "states/inner.zarr", tmp_path / "file/a.zarr", tmp_path / "dangling.zarr"]
    for place in places:
        with pytest.raises(UsageError, match=r"--out"):
            subset(TrajectoryCache.open(store), place)
    assert tree(store) == before
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nothing").exists()


def test_a_subset_keeps_its_identity_and_its_bytes(store: Path, tmp_path: Path) -> None:
    whole = TrajectoryCache.open(store)
    combined = subset(whole, tmp_path / "part", seeds="20:60", steps=[4])
    assert (combined.num_added, combined.how) == (3, {"hard link": 6})
    part = TrajectoryCache.open(tmp_path / "part")
    assert part.recipe.fingerprint == whole.recipe.fingerprint and part.layout.layout_hash != whole.layout.layout_hash
    assert (part.blocks, list(part.states), part.num_seeds) == ((1, 2, 3), [0, 4], 64)
    for step in (0, 4):
        np.testing.assert_array_equal(part.rows(step, range(16, 64)), whole.rows(step, range(16, 64)))
    assert verify(part).findings == ()
    subset(whole, tmp_path / "again", seeds="16:64", steps=[0, 4])
    assert tree(tmp_path / "again") == tree(tmp_path / "part")


def test_a_subset_of_everything_is_everything(store: Path, tmp_path: Path) -> None:
    subset(TrajectoryCache.open(store), tmp_path / "all")
    assert tree(tmp_path / "all") == tree(store)


def test_subsets_of_what_is_not_there_are_refused(store: Path, tmp_path: Path) -> None:
    cache = TrajectoryCache.open(store)
    with pytest.raises(UsageError, match="has none of the seeds 300:400"):
        subset(cache, tmp_path / "a", seeds="300:400")
    with pytest.raises(NotCachedError, match="not after 3"):
        subset(cache, tmp_path / "a", steps=[3])
    assert not (tmp_path / "a").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a trajectory cache"):
        subset(cache, tmp_path / "notes")


def test_differences_are_named(tmp_path: Path) -> None:
    write_store(tmp_path / "a", "0:64")
    other_machine(tmp_path / "b", "32:96", 4e-3)
    found = compare(TrajectoryCache.open(tmp_path / "a"), TrajectoryCache.open(tmp_path / "b"))
    assert (found.only_first, found.only_second, sorted(found.apart)) == ((0, 1), (4, 5), [2, 3])
    assert found.apart[2] == {2: pytest.approx(4e-3, rel=0.1), 4: pytest.approx(4e-3, rel=0.1)}
    assert not found.same
    same = compare(TrajectoryCache.open(tmp_path / "a"), TrajectoryCache.open(tmp_path / "a"))
    assert same.same and same.num_equal == 4
    write_store(tmp_path / "c", "0:64", precision={"compute": "bfloat16", "tf32": False})
    other = compare(TrajectoryCache.open(tmp_path / "a"), TrajectoryCache.open(tmp_path / "c"))
    assert other.recipe == ("precision.compute: float32 → bfloat16",) and not other.same


def test_comparing_reads_only_what_differs(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(store, tmp_path / "copy")
    layout = make_layout()
    states = block_states(layout, 3)
    CacheWriter.open(tmp_path / "copy", make_recipe(), layout).commit(3, {**states, 4: states[4] + np.float32(0.1)})
    one, other = TrajectoryCache.open(store), TrajectoryCache.open(tmp_path / "copy")
    seen: list[tuple[int, int]] = []
    original = TrajectoryCache.block_view
    monkeypatch.setattr(TrajectoryCache, "block_view", lambda self, *at: (seen.append(at), original(self, *at))[1])
    assert list(compare(one, other).apart) == [3]
    assert seen == [(4, 3), (4, 3)]
    assert len(one.rows(0, [0])) == 1 and BLOCK_SIZE == 16
