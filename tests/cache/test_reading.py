"""Rows are gathered from few mapped files, by many threads, and what was seen stays."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from advkd.cache.read.reader import TrajectoryCache


def test_few_files_stay_mapped_and_none_open(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that touch more blocks than are mapped at once are gathered in parts."""
    everything = TrajectoryCache.open(store).rows(2, range(256))
    monkeypatch.setattr("advkd.cache.read.chunks.MAX_MAPPED_FILES", 3)
    cache = TrajectoryCache.open(store)
    generator = np.random.default_rng(0)
    for size in (1, 3, 16, 256, 300):
        seeds = generator.integers(0, 256, size)
        np.testing.assert_array_equal(cache.rows(2, seeds), everything[seeds])
        out = np.zeros((size, *cache.item_shape), cache.dtype)
        assert cache.rows(2, seeds, out=out) is out
        np.testing.assert_array_equal(out, everything[seeds])
    if Path("/proc/self/maps").exists():
        assert Path("/proc/self/maps").read_text().count(str(store.resolve())) <= 3
        assert not [link for link in Path("/proc/self/fd").iterdir() if str(store) in os.path.realpath(link)]


def test_threads_that_read_one_cache_do_not_disturb_each_other(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = TrajectoryCache.open(store).rows(2, range(256))
    monkeypatch.setattr("advkd.cache.read.chunks.MAX_MAPPED_FILES", 2)
    cache = TrajectoryCache.open(store)
    batches = [np.random.default_rng(seed).integers(0, 256, 64) for seed in range(100)]
    with ThreadPoolExecutor(4) as executor:
        for seeds, rows in zip(batches, executor.map(lambda seeds: cache.rows(2, seeds), batches), strict=True):
            np.testing.assert_array_equal(rows, everything[seeds])


def test_a_block_seen_stays_what_it_is(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds a view isn't shown another block when the reader needs the place."""
    monkeypatch.setattr("advkd.cache.read.chunks.MAX_MAPPED_FILES", 1)
    cache = TrajectoryCache.open(store)
    view = cache.block_view(2, 0)
    before = view.copy()
    cache.rows(2, range(256))
    np.testing.assert_array_equal(view, before)
    assert not view.flags.writeable
