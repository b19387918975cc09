"""Somebody else's files: symlinks, pipes, wrong places. Nothing outside a cache is touched, and nothing hangs."""

import json
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advkd.cache.care.repair import repair
from advkd.cache.care.verify import verify
from advkd.cache.errors import CacheError, DamagedError, MismatchError
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.array_record import ArrayRecord, crc32c
from advkd.cache.read.compare import compare
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import merge
from advkd.cache.write.writer import CacheWriter
from tests.cache.exercise import adopt_into, read_everything, write_everything
from tests.cache.harm import Pristine, content, files_of, put, rebuild, state_of_folder
from tests.stores import BLOCK_SIZE, make_layout, make_recipe

FOLDERS = (
    "states",
    "states/0002",
    "states/0002/c",
    "states/0002/c/1",
    "states/0002/c/1/0",
    "states/0002/c/1/0/0",
    "blocks",
    "provenance",
)
FILES = (
    "zarr.json",
    "states/zarr.json",
    "states/0002/zarr.json",
    "states/0002/c/1/0/0/0",
    "blocks/000001.json",
    "provenance/block-000001.json",
    "provenance/store.json",
    "provenance/tolerance.json",
    "provenance/writer.lock",
    "provenance/writer.json",
)


def use_in_every_way(store: Path, like: Path) -> list[str]:
    """Read it, write to it, take it into another one, take another one into it; what the refusals said."""
    said = read_everything(store, like).said
    said += adopt_into(store, like).said
    return said + write_everything(store, store.parent / "out.zarr").said


@pytest.mark.parametrize("kind", ["of the same", "empty", "dangling", "looping"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_read_or_written_through_a_symlinked_folder(
    store: Path, like: Path, outside: Path, folder: str, kind: str
) -> None:
    target = outside / "there"
    if kind == "of the same":
        (store / folder).rename(target)
    else:
        put(store / folder, None)
        if kind == "empty":
            target.mkdir()
    (store / folder).symlink_to(store / folder if kind == "looping" else target)
    before = state_of_folder(outside)
    if not folder.startswith("provenance"):
        with pytest.raises(CacheError, match="symlink"):
            TrajectoryCache.open(store).rows(2, [BLOCK_SIZE])
    said = use_in_every_way(store, like)
    assert state_of_folder(outside) == before
    assert any("symlink" in line and folder in line for line in said)


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_read_or_written_through_a_symlinked_file(store: Path, like: Path, outside: Path, file: str) -> None:
    (store / file).rename(outside / "there")
    (store / file).symlink_to(outside / "there")
    before = state_of_folder(outside)
    said = read_everything(store, like).said
    if file == "states/zarr.json" or file.endswith((".lock", "000001.json", "store.json", "writer.json")):
        found = {finding.file for finding in verify(TrajectoryCache.open(store)).findings}
        assert file in found or file.startswith("provenance/writer")
    else:
        assert any(file in line and "symlink" in line for line in said)
    use_in_every_way(store, like)
    assert state_of_folder(outside) == before


def test_a_file_that_dvc_linked_into_its_cache_is_read_and_never_written(
    store: Path, like: Path, outside: Path, pristine: Pristine
) -> None:
    objects = outside / "files/md5"
    names = ["zarr.json", "states/0002/zarr.json", "states/0002/c/1/0/0/0", "blocks/000001.json"]
    for number, name in enumerate([*names, "provenance/tolerance.json"]):
        target = objects / f"{number:02x}" / ("0123456789" * 3)
        target.parent.mkdir(parents=True)
        (store / name).rename(target)
        (store / name).symlink_to(target)
    cache = TrajectoryCache.open(store)
    assert verify(cache).findings == ()
    assert cache.rows(2, [BLOCK_SIZE]).tobytes() == pristine.truth[2, 1][0].tobytes()
    contents = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    assert use_in_every_way(store, like) == []
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == contents
    assert content(files_of(store)) == content(pristine.files)


def test_a_folder_is_never_dvcs(store: Path, outside: Path) -> None:
    target = outside / "files/md5/00" / ("0123456789" * 3)
    target.parent.mkdir(parents=True)
    (store / "states/0002/c/1").rename(target)
    (store / "states/0002/c/1").symlink_to(target)
    with pytest.raises(DamagedError, match="symlink"):
        TrajectoryCache.open(store).rows(2, [BLOCK_SIZE])


def test_repairing_removes_a_symlink_and_not_what_is_behind_it(store: Path, outside: Path, pristine: Pristine) -> None:
    """Else `verify --repair` would delete files outside of the store."""
    for number, name in enumerate(("states/0002/c/1", "states/0004/c/2/0/0/0", "blocks/000000.json")):
        (store / name).rename(outside / str(number))
        (store / name).symlink_to(outside / str(number))
    before = state_of_folder(outside)
    cache = TrajectoryCache.open(store)
    findings = verify(cache).findings
    assert {finding.block for finding in findings} == {0, 1, 2}
    repair(cache, findings)
    assert rebuild(store) == [0, 1, 2]
    assert state_of_folder(outside) == before
    assert content(files_of(store)) == content(pristine.files)
    assert not [path for path in store.rglob("*") if path.is_symlink()]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the whole path may be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero: it never ends
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        pytest.skip("making a device is refused here")


def _file(path: Path) -> None:
    path.write_bytes(b"x")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_bytes(b"x")


@pytest.mark.parametrize("make", [_fifo, _socket, _device, _folder])
@pytest.mark.parametrize("file", FILES)
def test_what_is_no_file_is_refused_and_not_waited_for(
    store: Path, like: Path, file: str, make: Callable[[Path], None]
) -> None:
    put(store / file, None)
    make(store / file)
    said = read_everything(store, like).said
    if file in ("zarr.json", "states/0002/zarr.json", "states/0002/c/1/0/0/0", "blocks/000001.json"):
        assert any(file in line for line in said)
    elif not file.startswith("provenance/writer"):
        found = {finding.file for finding in verify(TrajectoryCache.open(store)).findings}
        assert any(name.startswith(file) for name in found)
    use_in_every_way(store, like)


@pytest.mark.parametrize("make", [_fifo, _socket, _file])
def test_a_file_where_a_folder_belongs_is_refused(
    store: Path, like: Path, pristine: Pristine, make: Callable[[Path], None]
) -> None:
    for folder in FOLDERS:
        put(store / folder, None)
        make(store / folder)
        assert any(folder in line for line in use_in_every_way(store, like))
        pristine.make_anew()


@pytest.fixture
def nested(store: Path) -> Iterator[Path]:
    """A store with a folder in a folder, and so on, beyond what a path can say."""
    here = os.getcwd()
    try:
        os.chdir(store / "states/0002")
        for _ in range(2100):
            os.mkdir("d")
            os.chdir("d")
        Path("note").write_bytes(b"x")
        yield store
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", store / "states/0002/d"], check=True)


def test_folders_may_be_nested_deeper_than_a_path_can_be(nested: Path) -> None:
    (finding,) = verify(TrajectoryCache.open(nested)).findings
    assert finding.file.startswith("states/0002/d/d/d") and finding.kind == "stray"
    with CacheWriter.open(nested, make_recipe(), make_layout()).writing():
        pass


def sealed_with(raw: bytes, **changes: object) -> bytes:
    """A record with some parts changed, and a seal that fits."""
    value = json.loads(raw)
    del value["record_sha256"]
    return seal(value | changes)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "", ".", "..", "states/../../out", "states//0002", "states/0002/", "/states",
     "States/0002", "a b", "a\nb", "a\0b", "é", "a\\b", "c:/x", "~", "a" * 5000, "conditions/label"],
)  # fmt: skip
def test_a_ledger_names_no_file_outside_its_store(
    store: Path, like: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A name that could be one of a later version's arrays is looked for inside; others are damage."""
    raw = (store / "blocks/000001.json").read_bytes()
    arrays = json.loads(raw)["arrays"]
    put(store / "blocks/000001.json", sealed_with(raw, arrays=arrays | {name: arrays["states/0000"]}))
    opened: list[str] = []
    original = os.open

    def watched(path: Any, *arguments: Any, **keywords: Any) -> int:
        if keywords.get("dir_fd") is None:
            opened.append(os.path.realpath(path))
        return original(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", watched)
    findings = verify(TrajectoryCache.open(store)).findings
    read_everything(store, like)
    write_everything(store, store.parent / "out.zarr")
    inside = os.path.realpath(store.parent)
    assert opened and [path for path in opened if not path.startswith(inside)] == []
    if name in ("conditions/label", "a" * 5000):
        assert {finding.file for finding in findings} == {f"{name}/c/1"}
    else:
        assert [(finding.file, finding.block) for finding in findings] == [("blocks/000001.json", 1)]


def test_values_that_are_no_numbers_are_never_within_tolerance(store: Path, like: Path, pristine: Pristine) -> None:
    """Nothing here writes them; a difference that is not a number is not less than any tolerance, nor more."""
    values = pristine.truth[4, 1].copy()
    values[3] = np.nan
    chunk = values.tobytes() + crc32c(values.tobytes()).to_bytes(4, "little")
    raw = (store / "blocks/000001.json").read_bytes()
    arrays = json.loads(raw)["arrays"] | {"states/0004": asdict(ArrayRecord.of(chunk, values, values))}
    put(store / "blocks/000001.json", sealed_with(raw, arrays=arrays))
    put(store / "states/0004/c/1/0/0/0", chunk)
    one, other = TrajectoryCache.open(like), TrajectoryCache.open(store)
    assert verify(other).findings == ()
    assert compare(one, other).apart == {1: {4: np.inf}}
    with pytest.raises(MismatchError, match="state 0004 by rms inf, beyond the recorded tolerance"):
        merge([one, other], store.parent / "out.zarr", prefer=other)
