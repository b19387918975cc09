"""A `torch.utils.data` dataset over a cache: (x_T, later states …) of chosen seeds.

The only module of `advkd.cache` that imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from advkd.cache.errors import UsageError
from advkd.cache.read.reader import TrajectoryCache


class TrajectoryDataset(Dataset[tuple[Tensor, ...]]):
    """States of a cache by seed, as stored: float16 (or the store's float32) in stored units, x_t / scale.

    For x_t convert to float32 and multiply by `cache.states[step].scale`.

    Item i is the tuple of the chosen states of the i-th chosen seed, each of shape (C, H, W), and its class label
    (int64, shape ()) if that was asked for. A batch is read at once, so any `DataLoader` with shuffling is fast;
    workers open the store again.

    Args:
        cache: the store.
        steps: solver steps done, in the order of an item's states; all present states, x_T first, if None.
        seeds: the seeds; all committed ones if None.
        labels: whether items end with the class label, for caches of conditional teachers.

    Raises:
        NotCachedError: a state, seed or label is absent.
        UsageError: labels are asked for, and the teacher is unconditional.
    """

    def __init__(
        self,
        cache: TrajectoryCache,
        steps: Sequence[int] | None = None,
        seeds: npt.ArrayLike | None = None,
        *,
        labels: bool = False,
    ) -> None:
        self.cache = cache
        self.steps = tuple(cache.states if steps is None else steps)
        self.seeds = cache.seeds() if seeds is None else np.asarray(seeds, dtype=np.int64).ravel()
        self.labels = labels
        for step in self.steps:
            cache.state(step)
        if labels:
            cache.labels(self.seeds[:1])
        blocks = np.unique(self.seeds // cache.layout.block_size)
        absent = np.setdiff1d(blocks, np.asarray(cache.blocks, dtype=np.int64))
        if absent.size:
            cache.record(int(absent[0]))

    def __len__(self) -> int:
        """Number of seeds."""
        return len(self.seeds)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """The states of one seed."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        """The states of some seeds, read at once."""
        seeds = self.seeds[indices]
        batches = [torch.from_numpy(self.cache.rows(step, seeds)) for step in self.steps]
        if self.labels:
            batches.append(torch.from_numpy(self.cache.labels(seeds).astype(np.int64)))
        return list(zip(*batches, strict=True))


class BlockShuffle(Sampler[int]):
    """An order for a `DataLoader` that mixes the seeds of a few randomly chosen blocks at a time.

    For data much larger than memory on a disk with slow random access: a batch needs few files, which are read once per
    epoch. Because seeds are independent draws, a batch represents the data set as well as after a full shuffle, but
    consecutive batches come from the same blocks (`benchmarks/cold.py` measures both).

    Args:
        dataset: the items to order.
        mixed: number of blocks to mix at a time.
        seed: seed of the order; call `set_epoch` before each epoch to change it.
    """

    def __init__(self, dataset: TrajectoryDataset, mixed: int, seed: int = 0) -> None:
        if mixed < 1:
            raise UsageError(f"mixed = {mixed} blocks: expected at least 1")
        self._blocks = dataset.seeds // dataset.cache.layout.block_size
        self._mixed = mixed
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, a function of (seed, epoch, the dataset's seeds)."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of items."""
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        """Every index once."""
        generator = np.random.default_rng((self._seed, self._epoch))
        blocks = generator.permutation(np.unique(self._blocks))
        places = np.empty(int(blocks.max()) + 1 if len(blocks) else 0, dtype=np.int64)
        places[blocks] = np.arange(len(blocks)) // self._mixed
        groups = places[self._blocks]
        return iter(np.lexsort((generator.random(len(groups)), groups)).tolist())
