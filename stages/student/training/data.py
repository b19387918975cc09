"""Batches of trajectories from a cache, in an order that is a pure function of (seed, phase, epoch, seeds)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.cache.format.hashing import Seeds, mix64, mixed
from advkd.cache.format.store_paths import states_path
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.reporter import Reporter
from advkd.stages.student.prompts import read_prompts

PREFETCH = 2
"""Batches read ahead. One is enough to hide reading behind a step; the second absorbs a slow block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one training step reads: each member has one row per seed, in the same order."""

    states: Mapping[int, Tensor]
    """By number of solver steps: float32, stored units, shape (N, C, H, W)."""
    condition: Tensor | None = None
    """What the teacher was told, as `read_condition` reads it."""

    @classmethod
    def read(cls, cache: TrajectoryCache, steps: Sequence[int], seeds: list[int]) -> Batch:
        """Some seeds' states and condition, in pinned memory where there is a GPU, so that copies to it don't block."""
        states = {step: read_float(cache, step, seeds) for step in steps}
        batch = cls(states=states, condition=read_condition(cache, seeds))
        return batch._each(Tensor.pin_memory) if torch.cuda.is_available() else batch

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self._each(lambda values: values.to(device, non_blocking=True))

    def micro_batches(self, count: int) -> list[Batch]:
        """The batch in equal parts for gradient accumulation; part i has every `count`-th row, from row i on.

        Interleaved as the ranks' shares of a global batch are: the first rows of all parts together are the first rows
        of the batch.
        """
        return [self._each(itemgetter(slice(index, None, count))) for index in range(count)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        states = {step: change(values) for step, values in self.states.items()}
        return Batch(states=states, condition=None if self.condition is None else change(self.condition))


def read_float(cache: TrajectoryCache, step: int, seeds: npt.ArrayLike) -> Tensor:
    """Rows of a cache as a float32 tensor, stored units."""
    return torch.from_numpy(cache.rows(step, seeds).astype(np.float32))


def read_condition(cache: TrajectoryCache, seeds: npt.ArrayLike) -> Tensor | None:
    """What the teacher was told for some seeds, as a student's network takes it.

    Returns:
        Class labels, int64, shape (N,), or prompts as `PromptForm` has them, float32, shape (N, rows, columns); None if
        it was told nothing.

    Raises:
        UsageError: no student learns from such prompts.
        NotCachedError: labels or prompts are not in this copy.
        DamagedError: they differ from the ledger, or labels from the recipe's rule.
    """
    if cache.recipe.prompts is not None:
        return read_prompts(cache, cache.recipe.prompts.prompts_of(seeds))
    return None if cache.recipe.condition is None else torch.from_numpy(cache.labels(seeds).astype(np.int64))


def value_range(cache: TrajectoryCache, step: int, blocks: Sequence[int]) -> tuple[float, float]:
    """Smallest and largest value of a state in some blocks, as the ledger records them; no values are read."""
    name = states_path(cache.state(step))
    arrays = [cache.record(block).arrays[name].raw for block in blocks]
    return min(array.minimum for array in arrays), max(array.maximum for array in arrays)


def fetch_states(cache: TrajectoryCache, steps: Sequence[int], blocks: Sequence[int], reporter: Reporter) -> None:
    """Download the states of a remote cache that training reads, once, after checking the free disk space."""
    if cache.is_remote:
        chunk_bytes = cache.layout.block_bytes(cache.item_shape)
        reporter.start("fetch", len(steps) * len(blocks) * chunk_bytes, "bytes")
        cache.fetch(steps, blocks, reporter.advance)
        reporter.finish()


def epoch_order(seeds: Seeds, root_seed: int, phase: int, epoch: int) -> Seeds:
    """A permutation of some seeds: sorted by a hash of (root seed, phase, epoch, seed), the same on every machine."""
    key = np.uint64(mixed(root_seed, phase, epoch))
    ordered: Seeds = seeds[np.argsort(mix64(seeds.astype(np.uint64) ^ key), kind="stable")]
    return ordered


def seed_batches(
    seeds: Seeds, *, batch_size: int, root_seed: int, phase: int, steps: range, rank: int = 0, world_size: int = 1
) -> Iterator[list[int]]:
    """The seeds that each step of a phase reads in one process: epoch after epoch, incomplete batches dropped.

    Args:
        seeds: to train on.
        batch_size: seeds per step and process; the global batch has `batch_size * world_size`.
        root_seed: of the order.
        phase: of training; each has its own order.
        steps: which steps of the phase to yield, so that resuming starts in the middle.
        rank: of this process, which takes every `world_size`-th seed of the global batch, from seed `rank` on.
        world_size: number of processes.
    """
    global_batch = batch_size * world_size
    per_epoch = len(seeds) // global_batch
    current, order = -1, seeds
    for step in steps:
        epoch, position = divmod(step, per_epoch)
        if epoch != current:
            current, order = epoch, epoch_order(seeds, root_seed, phase, epoch)
        batch = order[position * global_batch : (position + 1) * global_batch]
        yield batch[rank::world_size].tolist()


def prefetch_batches(cache: TrajectoryCache, steps: Sequence[int], seeds: Iterable[list[int]]) -> Iterator[Batch]:
    """The states of each list of seeds; a thread reads the next batches while one is used.

    Raises:
        CacheError: data are missing or damaged.
    """
    remaining = iter(seeds)
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading")
    pending = deque(executor.submit(Batch.read, cache, steps, some) for some in itertools.islice(remaining, PREFETCH))
    try:
        while pending:
            batch = pending.popleft().result()
            pending.extend(executor.submit(Batch.read, cache, steps, some) for some in itertools.islice(remaining, 1))
            yield batch
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
