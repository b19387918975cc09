"""What a training step gets: seeds in an order that is a pure function, and their states as they were recorded."""

from pathlib import Path

import numpy as np
import torch

from advkd.cache.format.hashing import is_held_out
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.student.training.data import TrajectoryBatches, epoch_order, make_loader
from advkd.stages.student.training.run import split_seeds


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
        return list(TrajectoryBatches(np.arange(50), batch_size=8, root_seed=0, phase=0, steps=steps))

    whole = batches(range(20))
    assert batches(range(0, 7)) + batches(range(7, 20)) == whole
    assert all(len({seed for batch in whole[epoch * 6 :][:6] for seed in batch}) == 48 for epoch in range(3))
    cache = TrajectoryCache.open(store)
    sampler = TrajectoryBatches(np.arange(50), batch_size=8, root_seed=0, phase=0, steps=range(2))
    for batch, seeds in zip(make_loader(cache, (0, 4), sampler), whole, strict=False):
        assert batch[4].dtype == torch.float32
        np.testing.assert_array_equal(batch[4].numpy(), cache.rows(4, seeds).astype(np.float32))
