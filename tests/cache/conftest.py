"""A folder where thousands of small stores are quickly made."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from advkd.cache.format import array_record
from advkd.cache.read import chunks
from tests.cache.damage import SEGMENT_BYTES
from tests.cache.harm import Pristine, put


@pytest.fixture(scope="module")
def fast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fast")


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
