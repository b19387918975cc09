"""A store to harm, one to compare with, and a deadline, for a pipe that nobody writes to is waited for for ever."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache.exercise import Mutant
from tests.cache.harm import Pristine, put


@pytest.fixture(scope="module")
def pristine(fast_folder: Path) -> Pristine:
    return Pristine(fast_folder / "toy.zarr")


@pytest.fixture(scope="module")
def like(fast_folder: Path, pristine: Pristine) -> Path:
    """A sound store to compare with and to take blocks from."""
    return Pristine(fast_folder / "like.zarr").root


@pytest.fixture
def store(pristine: Pristine) -> Iterator[Path]:
    """The store as it should be; what is done to it is undone."""
    yield pristine.root
    pristine.make_anew()


@pytest.fixture
def outside(fast_folder: Path) -> Iterator[Path]:
    """An empty folder on the same file system that no store has to do with."""
    folder = fast_folder / "outside"
    folder.mkdir()
    yield folder
    put(folder, None)


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A pipe that nobody writes to would be waited for for ever."""

    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def mutant(fast_folder: Path) -> Mutant:
    return Mutant(fast_folder / "mutant.zarr")
