"""Blocks over worker processes, and among writers that hold each other's."""

import concurrent.futures
import functools
import os
import signal
from typing import Any

import pytest

from advkd.cache.errors import CacheError
from advkd.cache.files import processes
from advkd.cache.files.processes import in_processes
from advkd.cache.write import divide


def square(block: int) -> int:
    return block * block


def die(block: int) -> int:
    if block == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return block


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_block_comes_back_once_with_its_result(num_workers: int) -> None:
    found = list(in_processes(square, range(7), num_workers=num_workers))
    assert sorted(found) == [(block, block * block) for block in range(7)]


def test_a_worker_that_is_killed_is_one_line() -> None:
    """As the kernel does when memory runs out."""
    with pytest.raises(CacheError, match="--workers"):
        list(in_processes(die, range(4), num_workers=2))


def test_ctrl_c_never_breaks_off_the_pool_s_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would leave a future locked, so that the pool waited for ever: once in sixty Ctrl-Cs."""
    unharmed = []

    def interrupted_wait(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        unharmed.append(True)
        return concurrent.futures.wait(*arguments)

    monkeypatch.setattr(processes, "wait", interrupted_wait)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(in_processes(square, range(1000), num_workers=2))
    assert unharmed == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_busy_blocks_are_tried_again_until_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divide, "POLL_SECONDS", 0.0)
    tries = dict.fromkeys(range(4), 0)

    def make(block: int) -> divide.Outcome:
        tries[block] += 1
        return "busy" if tries[block] <= block else "present" if block == 3 else "made"

    waited: list[list[int]] = []
    found = list(divide.divide(range(4), functools.partial(in_processes, make), waited.append))
    assert found == [(0, "made"), (1, "made"), (2, "made"), (3, "present")]
    assert tries == {block: block + 1 for block in range(4)}
    assert waited == []  # each round made some block
    tries = {3: 0}
    assert list(divide.divide([3], functools.partial(in_processes, make), waited.append)) == [(3, "present")]
    assert waited == [[3], [3], [3]]
