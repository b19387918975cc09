"""A cache as a torch dataset, as read-only maps and as dask arrays."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from advkd.cache.dataset import BlockShuffle, TrajectoryDataset
from advkd.cache.errors import DamagedError, NotCachedError, UsageError
from advkd.cache.format.condition import ClassCondition
from advkd.cache.read.reader import TrajectoryCache
from tests.stores import BLOCK_SIZE, write_store


def test_items_are_the_chosen_states_of_the_chosen_seeds(store: Path) -> None:
    cache = TrajectoryCache.open(store)
    dataset = TrajectoryDataset(cache, steps=[0, 4], seeds=[200, 3, 17])
    assert len(dataset) == 3
    x_T, x_0 = dataset[1]
    np.testing.assert_array_equal(x_T.numpy(), cache.rows(0, [3])[0])
    np.testing.assert_array_equal(x_0.numpy(), cache.rows(4, [3])[0])
    assert x_0.dtype == torch.float16
    assert len(TrajectoryDataset(cache)) == 256 and len(TrajectoryDataset(cache)[0]) == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where this process may use one core alone
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_every_seed_once(store: Path, num_workers: int) -> None:
    dataset = TrajectoryDataset(TrajectoryCache.open(store), steps=[0])
    loader = DataLoader(dataset, batch_size=48, shuffle=True, num_workers=num_workers, multiprocessing_context="spawn"
                        if num_workers else None)  # fmt: skip
    batches = [batch for (batch,) in loader]
    assert [len(batch) for batch in batches] == [48] * 5 + [16]
    expected = TrajectoryCache.open(store).rows(0, range(256))
    found = torch.cat(batches).numpy()
    order = np.lexsort(found.reshape(256, -1).T)
    np.testing.assert_array_equal(found[order], expected[np.lexsort(expected.reshape(256, -1).T)])


@pytest.mark.parametrize("mixed", [1, 3, 16, 100])
def test_a_shuffle_by_blocks_gives_every_seed_once_few_blocks_at_a_time(store: Path, mixed: int) -> None:
    seeds = np.random.default_rng(0).permutation(256)[:200]
    dataset = TrajectoryDataset(TrajectoryCache.open(store), steps=[0], seeds=seeds)
    shuffle = BlockShuffle(dataset, mixed)
    order = list(shuffle)
    assert sorted(order) == list(range(200)) and len(shuffle) == 200
    blocks = seeds[order] // BLOCK_SIZE
    firsts = {block: int(np.flatnonzero(blocks == block)[0]) for block in np.unique(blocks)}
    lasts = {block: int(np.flatnonzero(blocks == block)[-1]) for block in np.unique(blocks)}
    for at in range(200):
        assert sum(firsts[block] <= at <= lasts[block] for block in firsts) <= mixed
    assert list(shuffle) == order and list(BlockShuffle(dataset, mixed)) == order
    shuffle.set_epoch(1)
    assert list(shuffle) != order and list(BlockShuffle(dataset, mixed, seed=1)) != order
    assert len(list(DataLoader(dataset, batch_size=48, sampler=shuffle))) == 5


def test_a_shuffle_of_no_blocks_is_refused(store: Path) -> None:
    dataset = TrajectoryDataset(TrajectoryCache.open(store), steps=[0])
    with pytest.raises(UsageError, match="at least 1"):
        BlockShuffle(dataset, 0)


def test_what_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    write_store(tmp_path / "gap.zarr", "32:64")
    cache = TrajectoryCache.open(tmp_path / "gap.zarr")
    assert len(TrajectoryDataset(cache)) == 32
    with pytest.raises(NotCachedError, match="does not hold seeds 0:16"):
        TrajectoryDataset(cache, seeds=[40, 5])
    with pytest.raises(NotCachedError, match="not after 3"):
        TrajectoryDataset(cache, steps=[3])


def test_a_block_is_a_map_that_torch_takes_without_copying(store: Path) -> None:
    cache = TrajectoryCache.open(store)
    view = cache.block_view(4, 2)
    assert not view.flags.writeable and not view.flags.owndata
    np.testing.assert_array_equal(view, cache.rows(4, range(2 * BLOCK_SIZE, 3 * BLOCK_SIZE)))
    with pytest.warns(UserWarning, match="not writable"):
        assert torch.from_numpy(view).data_ptr() == view.ctypes.data
    file = store / "states/0004/c/3/0/0/0"
    data = bytearray(file.read_bytes())
    data[-6] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError):
        cache.block_view(4, 3)


def test_an_opened_cache_travels_to_another_process(store: Path) -> None:
    cache = TrajectoryCache.open(store)
    cache.rows(0, [1])
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again.rows(4, [1, 9]), cache.rows(4, [1, 9]))


def test_dask_reads_lazily_and_shows_gaps_as_nan(tmp_path: Path) -> None:
    write_store(tmp_path / "gap.zarr", "32:64")
    cache = TrajectoryCache.open(tmp_path / "gap.zarr")
    array = cache.dask_array(4)
    assert array.shape == (64, 1, 8, 8) and array.numblocks[0] == 4 and array.dtype == np.float16
    np.testing.assert_array_equal(array[40:50].compute(scheduler="synchronous"), cache.rows(4, range(40, 50)))
    assert bool(np.isnan(array[:32].compute(scheduler="synchronous")).all())
    mean = array[32:].astype("float64").mean().compute(scheduler="synchronous")
    assert mean == pytest.approx(cache.rows(4, range(32, 64)).astype(np.float64).mean())
    shutil.rmtree(tmp_path / "gap.zarr/states/0002")
    with pytest.raises(NotCachedError, match="not here"):
        TrajectoryCache.open(tmp_path / "gap.zarr").dask_array(2)


def test_labels_come_with_the_states_where_asked(store: Path, tmp_path: Path) -> None:
    condition = ClassCondition(num_classes=3, labels=(0, 2))
    write_store(tmp_path / "labelled.zarr", condition=condition)
    dataset = TrajectoryDataset(TrajectoryCache.open(tmp_path / "labelled.zarr"), [0, 4], [5, 2], labels=True)
    x_t, x_0, labels = next(iter(DataLoader(dataset, batch_size=2)))
    assert x_t.shape == x_0.shape and labels.tolist() == [2, 0] and labels.dtype == torch.int64
    assert len(TrajectoryDataset(dataset.cache, [4])[0]) == 1
    with pytest.raises(UsageError, match="unconditional"):
        TrajectoryDataset(TrajectoryCache.open(store), labels=True)
