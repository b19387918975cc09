"""Batches of trajectories from a cache, in an order that is a pure function of (seed, phase, epoch, seeds)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from advkd.cache.format.hashing import mix64, mixed
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.reporter import Reporter

AHEAD = 2
"""Batches that are read before they are asked for."""
Seeds = npt.NDArray[np.int64]


def epoch_order(seeds: Seeds, root_seed: int, phase: int, epoch: int) -> Seeds:
    """A permutation of some seeds: sorted by a hash of (root seed, phase, epoch, seed), the same on every machine."""
    key = np.uint64(mixed(root_seed, phase, epoch))
    ordered: Seeds = seeds[np.argsort(mix64(seeds.astype(np.uint64) ^ key), kind="stable")]
    return ordered


class StatesBySeed(Dataset[dict[int, Tensor]]):
    """What a training step reads: index i is seed i, and a batch comes as one float32 tensor per state."""

    def __init__(self, cache: TrajectoryCache, steps: Sequence[int]) -> None:
        self.cache = cache
        self.steps = tuple(steps)

    def __getitems__(self, seeds: list[int]) -> dict[int, Tensor]:
        """Float32 states by solver steps done, stored units, shape (N, C, H, W)."""
        return {step: read_float(self.cache, step, seeds) for step in self.steps}


def fetch_states(cache: TrajectoryCache, steps: Sequence[int], blocks: Sequence[int], reporter: Reporter) -> None:
    """Bring what will be read of a remote cache here, once, after a look at the disk."""
    if cache.is_remote:
        chunk_bytes = cache.layout.block_bytes(cache.item_shape)
        reporter.start("fetch", len(steps) * len(blocks) * chunk_bytes, "bytes")
        cache.fetch(steps, blocks, reporter.advance)
        reporter.finish()


def read_float(cache: TrajectoryCache, step: int, seeds: npt.ArrayLike) -> Tensor:
    """Rows of a cache as a float32 tensor, stored units."""
    return torch.from_numpy(cache.rows(step, seeds).astype(np.float32))


class TrajectoryBatches(Sampler[list[int]]):
    """Which seeds each step of a phase uses: epoch after epoch, incomplete batches dropped.

    Args:
        seeds: to train on.
        batch_size: seeds a step.
        root_seed: of the order.
        phase: of training; each has its own order.
        steps: which steps of the phase to yield, so that resuming begins in the middle.
        share: (rank, processes) of a team, each of which takes every so-manieth seed of batches as many times as large.
    """

    def __init__(
        self,
        seeds: Seeds,
        *,
        batch_size: int,
        root_seed: int,
        phase: int,
        steps: range,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.seeds = seeds
        self.batch_size = batch_size * share[1]
        self.share = share
        self.root_seed = root_seed
        self.phase = phase
        self.steps = steps

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of seeds."""
        per_epoch = len(self.seeds) // self.batch_size
        current, order = -1, self.seeds
        for step in self.steps:
            epoch, position = divmod(step, per_epoch)
            if epoch != current:
                current, order = epoch, epoch_order(self.seeds, self.root_seed, self.phase, epoch)
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield batch[self.share[0] :: self.share[1]].tolist()


def make_loader(
    cache: TrajectoryCache, steps: Sequence[int], batches: TrajectoryBatches
) -> Iterator[dict[int, Tensor]]:
    """{solver steps done: states} of each batch, float32; the next ones are read while one is used.

    Raises:
        CacheError: what is read is missing or damaged.
    """
    states, chosen = StatesBySeed(cache, steps), iter(batches)
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading")
    pending = deque(executor.submit(_read, states, seeds) for seeds in itertools.islice(chosen, AHEAD))
    try:
        while pending:
            batch = pending.popleft().result()
            pending.extend(executor.submit(_read, states, seeds) for seeds in itertools.islice(chosen, 1))
            yield batch
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _read(states: StatesBySeed, seeds: list[int]) -> dict[int, Tensor]:
    batch = states.__getitems__(seeds)
    if torch.cuda.is_available():  # a GPU fetches it from pinned memory without anyone waiting
        return {step: values.pin_memory() for step, values in batch.items()}
    return batch
