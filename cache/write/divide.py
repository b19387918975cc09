"""Dividing blocks among everyone who makes them: processes here, a cluster's workers, other hosts with this folder.

A block is made by one sequence, `CacheWriter.make`: claim it, look whether it is committed, make it, commit it. A block
that another process holds is busy, and `divide` tries it again until it is there:

    def make(block: int) -> Outcome:
        return writer.make(block, lambda claim: writer.commit(block, states_of(block)))

    with writer.writing():
        writer.grow(seeds)
        for block, outcome in divide(writer.missing(seeds), functools.partial(in_processes, make, num_workers=1)):
            ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

POLL_SECONDS = 0.5
"""Pause before trying busy blocks again."""
Outcome = Literal["made", "present", "busy"]
Attempt = Callable[[list[int]], Iterable[tuple[int, Outcome]]]
"""Tries each of some blocks once; yields the outcomes in any order."""


def divide(
    blocks: Iterable[int], attempt: Attempt, waiting: Callable[[list[int]], None] = lambda blocks: None
) -> Iterator[tuple[int, Outcome]]:
    """Have blocks made, each by the process that claims it first, and wait for those that others make.

    Any number of processes may divide the same blocks at once; each returns when all of them are committed.

    Args:
        blocks: in the order in which to try them.
        attempt: tries each of some blocks once: `in_processes` of `advkd.cache.files.processes`, or a cluster's tasks.
        waiting: called with the blocks that are left before each pause, when others hold all of them.

    Yields:
        Each block once, with "made" or "present".
    """
    pending = list(blocks)
    while pending:
        busy = []
        for block, outcome in attempt(pending):
            if outcome == "busy":
                busy.append(block)
            else:
                yield block, outcome
        if len(busy) == len(pending):
            waiting(busy)
            time.sleep(POLL_SECONDS)
        pending = sorted(busy)
