"""A folder where thousands of small stores are quickly made."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from advkd.cache.format import array_record
from advkd.cache.read import chunks
from tests.cache.damage import SEGMENT_BYTES
from tests.cache.harm import Pristine, put

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def fast_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory where the system has such a place: what is tested there isn't whether a disk keeps its promises."""
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK)):
        yield tmp_path_factory.mktemp("fast")
        return
    with tempfile.TemporaryDirectory(prefix="advkd-", dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def whole(fast_folder: Path) -> Path:
    """A store with every kind of file."""
    for left in fast_folder.iterdir():
        put(left, None)
    return Pristine(fast_folder / "whole.zarr").root


@pytest.fixture(scope="module")
def pristine(fast_folder: Path) -> Iterator[Pristine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_record, "SEGMENT_BYTES", SEGMENT_BYTES)
        patch.setattr(chunks, "SEGMENT_BYTES", SEGMENT_BYTES)
        yield Pristine(fast_folder / "toy.zarr")
