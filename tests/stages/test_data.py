"""What a training step gets: seeds in an order that is a pure function, and their states as they were recorded."""

from pathlib import Path

import numpy as np
import torch

from advkd.cache.format.hashing import is_held_out
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.student.run import split_seeds
from advkd.stages.student.training.data import Batch, epoch_order, prefetch_batches, seed_batches


def test_held_out_seeds_are_never_trained_on(store: Path) -> None:
    split = split_seeds(TrajectoryCache.open(store), None)
    assert not is_held_out(split.training).any()
    assert is_held_out(split.held_out).all()
    assert sorted([*split.training, *split.held_out]) == list(range(256))


def test_order_is_a_permutation_and_a_function_of_seed_phase_and_epoch() -> None:
    seeds = np.arange(100, 200)
    orders = [epoch_order(seeds, root, phase, epoch) for root in (0, 1) for phase in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(seeds) for order in orders)
    assert len({order.tobytes() for order in orders}) == len(orders)
    np.testing.assert_array_equal(epoch_order(seeds, 1, 0, 2), epoch_order(seeds, 1, 0, 2))


def test_batches_cut_anywhere_are_the_same_batches(store: Path) -> None:
    def batches(steps: range) -> list[list[int]]:
        return list(seed_batches(np.arange(50), batch_size=8, root_seed=0, phase=0, steps=steps))

    whole = batches(range(20))
    assert batches(range(0, 7)) + batches(range(7, 20)) == whole
    assert all(len({seed for batch in whole[epoch * 6 :][:6] for seed in batch}) == 48 for epoch in range(3))
    cache = TrajectoryCache.open(store)
    seed_lists = seed_batches(np.arange(50), batch_size=8, root_seed=0, phase=0, steps=range(2))
    for batch, seeds in zip(prefetch_batches(cache, (0, 4), seed_lists), whole, strict=False):
        assert batch.states[4].dtype == torch.float32
        np.testing.assert_array_equal(batch.states[4].numpy(), cache.rows(4, seeds).astype(np.float32))


def test_ranks_divide_the_global_batch_and_micro_batches_a_ranks_share(store: Path) -> None:
    """Both interleaved, so that the first rows of all parts are the first rows of the global batch."""

    def batches(batch_size: int, rank: int, world_size: int) -> list[list[int]]:
        shares = seed_batches(
            np.arange(50), batch_size=batch_size, root_seed=0, phase=0, steps=range(9), rank=rank, world_size=world_size
        )
        return list(shares)

    for whole, *shares in zip(batches(12, 0, 1), *(batches(4, rank, 3) for rank in range(3)), strict=True):
        assert [seed for column in zip(*shares, strict=True) for seed in column] == whole
    batch = Batch.read(TrajectoryCache.open(store), (0, 4), list(range(12)))
    parts = batch.micro_batches(3)
    assert [len(part.states[4]) for part in parts] == [4, 4, 4]
    together = torch.stack([part.states[4] for part in parts], dim=1).flatten(0, 1)
    assert torch.equal(together, batch.states[4])
