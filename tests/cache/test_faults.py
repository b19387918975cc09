"""A disk that fails, fills up or is cut off at any moment: nothing half-made counts, repeating gives the same bytes."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from advkd.cache.care.repair import repair
from advkd.cache.care.verify import verify
from advkd.cache.errors import DamagedError
from advkd.cache.format.store_paths import record_path
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import merge, subset
from advkd.cache.write.writer import CacheWriter
from tests.cache.faults import Faults, Killed
from tests.cache.harm import content, files_of, flipped, put
from tests.conftest import ROOT
from tests.stores import BLOCK_SIZE, block_states, make_layout, make_recipe, write_store

HOWS = ("once", "full", "killed")


def writer_of(store: Path) -> CacheWriter:
    return CacheWriter.open(store, make_recipe(), make_layout())


def commit(folder: Path) -> None:
    """Add a block, after the arrays have room for it."""
    writer = CacheWriter(folder / "a", make_recipe(), make_layout())
    with writer.writing():
        writer.grow(range(2 * BLOCK_SIZE))
        if not writer.is_committed(1):
            writer.commit(1, block_states(make_layout(), 1))


def commit_again(folder: Path) -> None:
    """Make a block anew that is there."""
    CacheWriter(folder / "a", make_recipe(), make_layout()).commit(0, block_states(make_layout(), 0))


def grow(folder: Path) -> None:
    CacheWriter(folder / "a", make_recipe(), make_layout()).grow(range(8 * BLOCK_SIZE))


def create(folder: Path) -> None:
    writer = writer_of(folder / "deep" / "out")
    with writer.writing():
        pass


def merge_new(folder: Path) -> None:
    merge([TrajectoryCache.open(folder / name) for name in ("a", "b")], folder / "out")


def merge_by_copying(folder: Path) -> None:
    """Where neither links nor reflinks are to be had."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", refused)
        merge([TrajectoryCache.open(folder / "b")], folder / "a")


def cut(folder: Path) -> None:
    subset(TrajectoryCache.open(folder / "b"), folder / "out", steps=[4])


def mend(folder: Path) -> None:
    cache = TrajectoryCache.open(folder / "damaged")
    repair(cache, verify(cache).findings)


ACTS: dict[Callable[[Path], None], tuple[str, ...]] = {
    commit: ("a",),
    commit_again: ("a",),
    grow: ("a",),
    create: (),
    merge_new: ("a", "b"),
    merge_by_copying: ("a", "b"),
    cut: ("b",),
    mend: ("damaged",),
}
"""And the stores that each begins with."""


@pytest.fixture(scope="module")
def template(fast_folder: Path) -> Path:
    """Block 0 in a store, block 1 in another, and both in a damaged one."""
    folder = fast_folder / "template"
    write_store(folder / "a", f"0:{BLOCK_SIZE}")
    write_store(folder / "b", f"{BLOCK_SIZE}:{2 * BLOCK_SIZE}")
    write_store(folder / "damaged", f"0:{2 * BLOCK_SIZE}")
    chunk = folder / "damaged/states/0002/c/1/0/0/0"
    put(chunk, flipped(chunk.read_bytes(), 99))
    put(folder / "damaged/states/0004/zarr.json", None)
    return folder


def stores_of(folder: Path) -> list[Path]:
    """Stores in a folder, by the file that makes one."""
    return sorted(path.parent for path in folder.rglob("zarr.json") if (path.parent / "states").is_dir())


def litter(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".partial")]


def all_content(folder: Path) -> dict[str, dict[str, bytes]]:
    return {str(store.relative_to(folder)): content(files_of(store)) for store in stores_of(folder)}


def check_sound(folder: Path, before: dict[str, dict[str, bytes]], act: Callable[[Path], None]) -> None:
    """Every store is whole as far as it counts, and none lost more than the block that was being made."""
    for store in stores_of(folder):
        if store.name.endswith(".partial"):
            continue  # of a store that was being created
        cache = TrajectoryCache.open(store)
        name = str(store.relative_to(folder))
        if name == "damaged":
            assert set(cache.blocks) >= {0}
            continue
        for block in cache.blocks:
            for state in cache.states.values():
                expected = block_states(make_layout(), block)[state.step].astype(np.float16)
                assert cache.block_view(state.step, block).tobytes() == expected.tobytes()
        had = {path for path in before.get(name, {}) if path.startswith("blocks/")}
        lost = had - {record_path(block) for block in cache.blocks}
        assert lost <= ({record_path(0)} if act is commit_again else set())


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("act", ACTS)
def test_whatever_change_of_the_disk_fails_nothing_half_made_counts(
    template: Path, fast_folder: Path, act: Callable[[Path], None], how: str
) -> None:
    """Every change fails in one way here, and in all of them in the long form."""
    check_faults(template, fast_folder / "work", act, how, slice(HOWS.index(how), None, len(HOWS)))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("act", ACTS)
def test_in_whatever_way_a_change_of_the_disk_fails_nothing_half_made_counts(
    template: Path, fast_folder: Path, act: Callable[[Path], None], how: str
) -> None:
    check_faults(template, fast_folder / "work", act, how, slice(None))


def check_faults(template: Path, folder: Path, act: Callable[[Path], None], how: str, which: slice) -> None:
    """Do something while the disk fails; look; do it again on a sound disk; look."""

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ACTS[act]:
            shutil.copytree(template / name, folder / name)

    begin()
    counting = Faults(None, how)
    with counting.happening():
        act(folder)
    expected, before = all_content(folder), all_content(template)
    assert counting.count >= 5
    assert litter(folder) == []
    for nth in range(counting.count)[which]:
        begin()
        with Faults(nth, how).happening(), suppress(OSError, Killed):
            act(folder)
        check_sound(folder, before, act)
        if how != "killed":
            assert litter(folder) == []
        if act in (commit_again, grow, mend):  # the others begin with this themselves
            with CacheWriter(folder / ACTS[act][0], make_recipe(), make_layout()).writing():
                pass
        act(folder)
        assert litter(folder) == []
        assert all_content(folder) == expected
    shutil.rmtree(folder)


def test_a_record_torn_at_any_byte_counts_for_nothing(fast_folder: Path) -> None:
    store = fast_folder / "torn.zarr"
    write_store(store, "0:32")
    whole = (store / record_path(1)).read_bytes()
    writer = writer_of(store)
    other = (store / record_path(0)).read_bytes()
    for size in [*range(0, len(whole), 13), *range(len(whole) - 90, len(whole))]:
        for torn in (whole[:size], whole[:size] + bytes(len(whole) - size), whole[:size] + other[size:]):
            if torn == whole:
                continue
            put(store / record_path(1), torn)
            assert writer.missing(range(32)) == [1]
            with pytest.raises(DamagedError, match=r"blocks/000001\.json"):
                TrajectoryCache.open(store).rows(0, [BLOCK_SIZE])
    writer.commit(1, block_states(make_layout(), 1))
    assert (store / record_path(1)).read_bytes() == whole


FULL = """
import shutil, subprocess, sys
from pathlib import Path
from advkd.cache.write.combine import merge, subset
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from tests.cache.harm import content, files_of
from tests.cache.test_faults import litter
from tests.stores import block_states, make_layout, make_recipe

disk, source, whole = (Path(name) for name in sys.argv[1:])
store = disk / "a.zarr"
layout = make_layout()
expected = {name: content(files_of(path)) for name, path in (("whole", whole), ("source", source))}

def build():
    writer = CacheWriter.open(store, make_recipe(), layout)
    with writer.writing():
        for block in range(4):
            writer.grow(range(16 * block + 16))
            if not writer.is_committed(block):
                writer.commit(block, block_states(layout, block))
    return expected["whole"]

def merge_all():
    merge([TrajectoryCache.open(source), TrajectoryCache.open(whole)], store)
    return expected["whole"]

def cut():
    subset(TrajectoryCache.open(source), store)
    return expected["source"]

full = 0
for act in (build, merge_all, cut):
    for pages in range(2, 40, 3):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", disk], check=True)
        try:
            act()
        except OSError as error:
            assert error.errno == 28, error
            full += 1
        if store.exists():
            cache = TrajectoryCache.open(store)
            for block in cache.blocks:
                for step in cache.states:
                    assert cache.block_view(step, block).tobytes() == block_states(layout, block)[step].astype(
                        "float16").tobytes()
            del cache
        assert litter(disk) == []
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        wanted = act()
        assert content(files_of(store)) == wanted
        assert litter(disk) == []
        subprocess.run(["umount", disk], check=True)
print(full)
"""


def test_a_full_disk_loses_at_most_the_block_in_flight(fast_folder: Path, tmp_path: Path) -> None:
    """On a real one, mounted for this."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0" && umount "$0"', str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is refused here")
    write_store(fast_folder / "source.zarr", "0:32")
    write_store(fast_folder / "whole.zarr", "0:64")
    run = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL, disk, fast_folder / "source.zarr", fast_folder / "whole.zarr"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 15
