"""Blocks over cores: the same function on many blocks, here or in processes of its own.

Workers end with the process that started them, even if that is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

POLL_SECONDS = 0.5
"""How often to look whether a block that somebody else makes is done."""
T = TypeVar("T")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_blocks(function: Callable[[int], T | None], blocks: Iterable[int], num_workers: int) -> Iterator[T]:
    """Results as they come; a block of which the result is None is busy elsewhere, and tried again later.

    Args:
        function: picklable if there is more than one worker.
        blocks: in this order.
        num_workers: processes; 1 works in this one.
    """
    pending = list(blocks)
    while pending:
        busy = []
        for block, result in _once(function, pending, num_workers):
            if result is None:
                busy.append(block)
            else:
                yield result
        if len(busy) == len(pending):
            time.sleep(POLL_SECONDS)
        pending = sorted(busy)


def _once(function: Callable[[int], T | None], blocks: list[int], num_workers: int) -> Iterator[tuple[int, T | None]]:
    if min(num_workers, len(blocks)) <= 1:
        yield from ((block, function(block)) for block in blocks)
        return
    # Not forked: the parent may have threads. Few are handed out ahead, so that stopping waits for little.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(blocks)), context, _begin_worker) as pool:
        left = iter(blocks)
        running: dict[Future[T | None], int] = {}
        try:
            while True:
                while len(running) < num_workers + 1 and (block := next(left, None)) is not None:
                    running[pool.submit(function, block)] = block
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and lets blocks in work end
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
