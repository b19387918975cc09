"""Maps behind one another: the same rows whatever is asked of the system ahead."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from advkd.cache.read import mapping
from advkd.cache.read.mapping import MappedFiles, ReadAhead
from advkd.cache.read.reader import TrajectoryCache
from tests.stores import write_store

TAIL = b"tail"
"""What follows the rows in a file, as checksums do in a chunk's."""


class Asked:
    """Mapped files that only count what they are asked."""

    def __init__(self) -> None:
        self.times = 0

    def will_need_rows(self, index: object) -> None:
        self.times += 1


def test_rows_are_asked_for_only_while_the_disk_keeps_gathers_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = 0
    monkeypatch.setattr(mapping, "_num_waits", lambda: waits)
    asked, ahead = Asked(), ReadAhead()

    def gathers(number: int, waiting: bool = False) -> int:
        nonlocal waits
        before = asked.times
        for _ in range(number):
            waits += 1  # of something else, between gathers
            ahead.before(asked, np.arange(3))  # type: ignore[arg-type]
            waits += waiting
            ahead.after()
        return asked.times - before

    assert gathers(1000) == 0
    assert gathers(1, waiting=True) == 0
    assert gathers(1000) == ReadAhead.ASKED, "it goes on where everything is in memory by now"
    assert gathers(1, waiting=True) == 0
    assert gathers(ReadAhead.ASKED) == ReadAhead.ASKED
    assert gathers(1 + ReadAhead.ASKED, waiting=True) == ReadAhead.ASKED


def mapped(folder: Path, num_rows: int, row_bytes: int) -> tuple[MappedFiles, npt.NDArray[np.uint8]]:
    """Two files of random rows behind one another, and the rows, shape (2, num_rows, row_bytes)."""
    rows = np.random.default_rng(0).integers(0, 256, (2, num_rows, row_bytes), dtype=np.uint8)
    mapped_files = MappedFiles(2, num_rows * row_bytes + len(TAIL), row_bytes)
    for slot in range(2):
        (folder / str(slot)).write_bytes(rows[slot].tobytes() + TAIL)
        descriptor = os.open(folder / str(slot), os.O_RDONLY)
        mapped_files.put(slot, descriptor)
        os.close(descriptor)
    return mapped_files, rows


@pytest.mark.parametrize("row_bytes", [1, 96, 4096, 5000])
def test_any_row_may_be_asked_for(tmp_path: Path, row_bytes: int) -> None:
    """The first, the last, and those that begin and end inside a page."""
    mapped_files, rows = mapped(tmp_path, 50, row_bytes)
    index = np.concatenate([np.arange(50), mapped_files.rows_per_slot + np.arange(50)])
    mapped_files.will_need_rows(index[::-1])
    mapped_files.will_need(1, 49 * row_bytes, 1 << 20)
    np.testing.assert_array_equal(mapped_files.rows[index], rows.reshape(100, row_bytes))
    assert mapped_files.file(1).tobytes() == rows[1].tobytes() + TAIL


@pytest.mark.parametrize(("row_bytes", "aligned"), [(6144, True), (393216, True), (5000, False)])
def test_large_files_may_be_mapped_by_huge_pages(tmp_path: Path, row_bytes: int, aligned: bool) -> None:
    """Addresses agree with offsets in the files to 2 MiB, unless that takes more addresses than the files' bytes."""
    num_rows = 3 * (2 << 20) // row_bytes + 1
    mapped_files, rows = mapped(tmp_path, num_rows, row_bytes)
    addresses = [mapped_files.file(slot).__array_interface__["data"][0] for slot in range(2)]
    assert [address % (2 << 20) == 0 for address in addresses] == [True, aligned]
    assert addresses[1] - addresses[0] < 2 * (num_rows * row_bytes + len(TAIL))
    index = np.concatenate([np.arange(num_rows), mapped_files.rows_per_slot + np.arange(num_rows)])
    np.testing.assert_array_equal(mapped_files.rows[index], rows.reshape(-1, row_bytes))


def test_cold_files_read_as_warm_ones(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", "0:256")
    seeds = np.random.default_rng(0).integers(0, 256, (50, 32))
    expected = [TrajectoryCache.open(tmp_path / "a.zarr").rows(2, batch) for batch in seeds]
    for path in (tmp_path / "a.zarr/states").rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    cache = TrajectoryCache.open(tmp_path / "a.zarr")
    for batch, values in zip(seeds, expected, strict=True):
        np.testing.assert_array_equal(cache.rows(2, batch), values)
