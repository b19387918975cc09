"""A `torch.utils.data` dataset over a cache: (x_T, later states …) of chosen seeds.

The one module of this package that imports torch; nothing else here imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from advkd.cache.reader import TrajectoryCache


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
