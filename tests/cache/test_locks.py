"""Locks are the operating system's: shared by builders, refused to movers, gone with their process."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from advkd.cache.errors import LockedError
from advkd.cache.files.locks import StoreLocks
from advkd.cache.write.writer import CacheWriter
from tests.conftest import ROOT
from tests.stores import make_layout, make_recipe


def in_another_process(store: Path, program: str) -> str:
    """Run a program that has `store`, `writer` and `locks`; what it prints."""
    prelude = (
        "from pathlib import Path; from tests.stores import *; from advkd.cache.files.locks import StoreLocks\n"
        f"store = Path({str(store)!r}); writer = CacheWriter.open(store, make_recipe(), make_layout())\n"
        "locks = StoreLocks(store)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_two_writers_share_a_store_but_no_block(store: Path) -> None:
    writer = CacheWriter.open(store, make_recipe(), make_layout())
    program = "with writer.writing(), writer.claim(3) as third, writer.claim(4) as fourth: print(third, fourth)"
    with writer.writing(), writer.claim(3) as claimed:
        assert claimed
        assert in_another_process(store, program) == "False True"
        with CacheWriter.open(store, make_recipe(), make_layout()).claim(3) as again:
            assert not again
    assert in_another_process(store, program) == "True True"


def test_who_moves_a_store_is_alone_and_told_who_is_not(store: Path) -> None:
    writer = CacheWriter.open(store, make_recipe(), make_layout())
    program = "try:\n    with locks.alone(): print('alone')\nexcept BlockingIOError as error: print(error)"
    with writer.writing():
        assert f"process {os.getpid()} on" in in_another_process(store, program)
        changed = make_recipe(noise={"rule": "philox4x64-as241-v1", "root_seed": 1})
        with pytest.raises(LockedError, match="another build is writing"):
            CacheWriter.open(store, changed, make_layout(), "set-aside")
    assert in_another_process(store, program) == "alone"


def test_a_writer_does_not_outwait_a_repair(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advkd.cache.files.locks.PATIENCE", 0.05)
    writer = CacheWriter.open(store, make_recipe(), make_layout())
    with StoreLocks(store).alone(), pytest.raises(LockedError, match="being moved or repaired"), writer.writing():
        pass


def test_a_lock_dies_with_its_owner(store: Path) -> None:
    program = "import os, signal\nwith writer.claim(3) as claimed: os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(subprocess.CalledProcessError):
        in_another_process(store, program)
    with CacheWriter.open(store, make_recipe(), make_layout()).claim(3) as claimed:
        assert claimed


def test_a_file_system_without_locks_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("advkd.cache.files.locks.fcntl.fcntl", no_locks)
    with pytest.raises(LockedError, match="no locks"), StoreLocks(store).alone():
        pass
