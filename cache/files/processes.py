"""The same function on many blocks, in this process or in a pool of worker processes.

Workers end with the process that started them, even if that is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

from advkd.cache.errors import CacheError
from advkd.cache.files.interrupts import StopRequest

T = TypeVar("T")
POLL_SECONDS = 0.2
"""How often to look for Ctrl-C while no block is finished."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[int], T], blocks: Iterable[int], *, num_workers: int = 1
) -> Iterator[tuple[int, T]]:
    """Call a function on each of some blocks, in this process or in several.

    Args:
        function: picklable if there is more than one worker.
        blocks: begun in this order.
        num_workers: processes; 1 works in this one.

    Yields:
        Each block and its result, as they come.

    Raises:
        CacheError: a worker process was killed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; blocks that workers had begun are finished first.
    """
    blocks = list(blocks)
    if min(num_workers, len(blocks)) <= 1:
        yield from ((block, function(block)) for block in blocks)
        return
    # Spawned, since the parent may have threads. Few blocks are submitted ahead, so that stopping waits for few.
    context = multiprocessing.get_context("spawn")
    # An exception from a signal handler inside the pool's own code would leave its locks held, and the pool waiting.
    with StopRequest() as stop, ProcessPoolExecutor(min(num_workers, len(blocks)), context, _begin_worker) as pool:
        left = iter(blocks)
        running: dict[Future[T], int] = {}
        try:
            while True:
                while len(running) < num_workers + 1 and (block := next(left, None)) is not None:
                    running[pool.submit(function, block)] = block
                if not running:
                    return
                if stop():
                    raise KeyboardInterrupt
                for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise CacheError(
                "a worker process was killed (out of memory?); what was committed is kept: run the command again, with "
                "fewer --workers"
            ) from None
        finally:
            for future in running:
                future.cancel()


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and lets started blocks finish
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
