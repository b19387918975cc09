"""A `torch.utils.data` dataset over a cache: (x_T, later states …) of chosen seeds.

The one module of this package that imports torch; nothing else here imports it.
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
    """States of a cache by seed, in the stored units and dtype.

    Item i is the tuple of the chosen states of the i-th chosen seed, each of shape (C, H, W). A batch is read at once,
    sorted by file, so any `DataLoader` with shuffling is fast; workers open the store anew.

    Args:
        cache: the store.
        steps: solver steps done, in the order wanted; all present states, x_T first, if None.
        seeds: which seeds; all committed ones if None.

    Raises:
        NotCachedError: a state or seed is not here.
    """

    def __init__(
        self, cache: TrajectoryCache, steps: Sequence[int] | None = None, seeds: npt.ArrayLike | None = None
    ) -> None:
        self.cache = cache
        self.steps = tuple(cache.states if steps is None else steps)
        self.seeds = cache.seeds() if seeds is None else np.asarray(seeds, dtype=np.int64).ravel()
        for step in self.steps:
            cache.state(step)
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
        return list(zip(*batches, strict=True))


class BlockShuffle(Sampler[int]):
    """An order for a `DataLoader` that mixes the seeds of a few blocks at a time, those blocks chosen at random.

    For data that is much larger than memory, on a disk that is slow at random: what a batch needs lies in few files,
    which are read once an epoch. The price: seeds are independent draws, so a batch strays no further from the whole
    than with a whole shuffle, but batches of the same blocks follow each other (`benchmarks/cold.py` measures both).

    Args:
        dataset: whose items are ordered.
        mixed: blocks whose seeds are mixed.
        seed: of the order; call `set_epoch` before each epoch for another one.
    """

    def __init__(self, dataset: TrajectoryDataset, mixed: int, seed: int = 0) -> None:
        if mixed < 1:
            raise UsageError(f"{mixed} blocks can't be mixed: expected at least 1")
        self._blocks = dataset.seeds // dataset.cache.layout.block_size
        self._mixed = mixed
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order: a function of (seed, epoch, the dataset's seeds)."""
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
