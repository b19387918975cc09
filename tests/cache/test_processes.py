"""Blocks over worker processes, and among writers that hold each other's."""

import functools
import os
import signal

import pytest

from advkd.cache.errors import CacheError
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
