"""A cache is data from someone else: whatever it holds, it is read or refused, and nothing outside it is touched."""

import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from advkd.cache.combine import merge
from advkd.cache.compare import compare
from advkd.cache.durable import pretty_json
from advkd.cache.errors import CacheError, DamagedError, MismatchError
from advkd.cache.ledger import ArrayRecord, crc32c
from advkd.cache.locks import StoreLocks
from advkd.cache.reader import TrajectoryCache
from advkd.cache.recipe import digest
from advkd.cache.repair import repair
from advkd.cache.seal import seal
from advkd.cache.upgrade import upgrade
from advkd.cache.verify import verify
from advkd.cache.writer import CacheWriter
from tests.cache import golden
from tests.cache.exercise import Attempts, adopt_into, read_everything, write_everything
from tests.cache.harm import Pristine, content, files_of, put, rebuild
from tests.cache.mutations import make_consistent, mutated_stores
from tests.conftest import Invoke
from tests.stores import BLOCK_SIZE, make_layout, make_recipe

ROOT = Path(__file__).resolve().parents[2]
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


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="its own size is told by Linux only")


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


def state_of_folder(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything that writing below a folder would change."""
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.lstat().st_ino, path.lstat().st_nlink)
        + ((path.read_bytes(),) if path.is_file() else ())
        for path in [folder, *folder.rglob("*")]
    }


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


def rehashed(root: dict[str, Any]) -> bytes:
    """Root metadata whose own hashes fit."""
    ours = root["attributes"]["advkd"]
    ours["fingerprint"], ours["layout_hash"] = digest(ours["recipe"]), digest(ours["layout"])
    return pretty_json(root)


def absurdities() -> Iterator[tuple[str, tuple[str | int, ...], object]]:
    """Where in the root's metadata, what."""
    numbers: list[object] = [0, -1, 10**12, 1 << 63, 10**300, 1.5, 16.0, True, False, None, "16", [], {}, 1e308, "NaN"]
    for value in numbers:
        yield "block size", ("layout", "block_size"), value
        yield "channels", ("recipe", "item_shape", 0), value
        yield "side", ("recipe", "item_shape", 2), value
        yield "step", ("layout", "states", 1, "step"), value
        if value != 0 or isinstance(value, bool):
            yield "root seed", ("recipe", "noise", "root_seed"), value
        yield "steps", ("recipe", "sampler", "steps"), value
        yield "scale", ("layout", "states", 1, "scale"), value
    for shape in ([], [1], [1, 8], [1, 8, 8, 8], [1] * 1_000_000, [8192] * 3, [64, 8192, 8192], "188", {"0": 1}, None):
        yield "item shape", ("recipe", "item_shape"), shape
    for dtype in ("float64", "bfloat16", "int8", "object", "|O", "<f2", "float16 ", "", None, 16, ["float16"], {}):
        yield "dtype", ("layout", "dtype"), dtype
    for encoding in ("pickle", "raw\n", None, 1, ["raw"], "x" * 1_000_000):
        yield "encoding", ("layout", "encoding"), encoding
    for states in ([], {}, None, "0000", [None], [[]], [{}] * 20_000, [{"step": 0}]):
        yield "states", ("layout", "states"), states
    for part in ("teacher", "sampler", "precision", "noise", "item_shape"):
        for value in (None, [], {}, "x", 5):
            yield part, ("recipe", part), value
    for key, kind in (("tensors_sha256", "teacher"), ("name", "sampler"), ("deterministic", "sampler"),
                      ("config", "sampler"), ("compute", "precision"), ("rule", "noise")):  # fmt: skip
        for value in (None, 5, [], ["x"]):
            yield key, ("recipe", kind, key), value
    for name in ("recipe", "layout"):
        for value in (None, [], {}, "x", {"x": 1}):
            yield name, (name,), value


ABSURD = """
import gc, json, resource, sys
from pathlib import Path
from tests.cache.exercise import read_everything, write_everything
from tests.cache.test_hostile import absurdities, rehashed
from tests.stores import make_layout, make_recipe
from advkd.cache.layout import root_metadata

store, like, out = (Path(name) for name in sys.argv[1:])
read_everything(like, like)
forbidden = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "exec",
             "compile", "import", "socket.connect", "ctypes.dlopen")
watching = False

def watch(event, arguments):
    if watching and event in forbidden:
        raise AssertionError(f"{event} {arguments}")

sys.addaudithook(watch)
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (512 << 20), resource.RLIM_INFINITY))
accepted, refused = [], 0
for name, path, value in absurdities():
    root = json.loads(json.dumps(root_metadata(make_recipe(), make_layout())))
    part = root["attributes"]["advkd"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (store / "zarr.json").write_bytes(rehashed(root))
    watching = True
    refusals = read_everything(store, like).said
    watching = False
    if refusals:
        refused += 1
    else:
        accepted.append((name, value))
print(json.dumps([refused, accepted]))
"""


@needs_proc
def test_absurd_metadata_is_refused_in_little_memory_and_runs_nothing(store: Path, like: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", ABSURD, store, like, store.parent / "out.zarr"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    refused, accepted = json.loads(run.stdout)
    assert refused > 180
    assert accepted == []


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def json_bombs(size: int) -> dict[str, bytes]:
    """Files that are, or nearly are, JSON."""
    return {
        "nothing": b"",
        "100,000 levels of lists": deep(100_000),
        "100,000 levels of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "unclosed levels": b"[" * 200_000,
        "500 levels": deep(500),
        "many small parts": b"[" + b"{}," * (size // 3) + b"{}]",
        "one long number": b"9" * size,
        "one long string": b'"' + b"x" * size + b'"',
        "many numbers": b"[" + b"1.5," * (size // 4) + b"1]",
        "too large": b" " * ((16 << 20) + 1),
        "no UTF-8": b'{"attributes":"\xff\xfe"}',
        "a raw surrogate": b'{"attributes":"\xed\xa0\x80"}',
        "half a surrogate pair": b'{"attributes":"\\ud800"}',
        "UTF-16": '{"attributes":1}'.encode("utf-16"),
        "a byte order mark": b'\xef\xbb\xbf{"attributes":1}',
        "a key twice": b'{"attributes":1,"attributes":1}',
        "nulls": bytes(1000),
        "two values": b"{}{}",
        "a list": b"[]",
        "infinity": b"1e999",
        "not a number": b'{"attributes":NaN}',
    }


JSON_FILES = {
    "zarr.json": "attributes",
    "states/zarr.json": "attributes",
    "states/0002/zarr.json": "attributes",
    "blocks/000001.json": "arrays",
    "provenance/tolerance.json": "rms",
    "provenance/store.json": "teacher",
    "provenance/block-000001.json": "block",
}
"""And a part of each that matters."""
BOMBS = """
import resource, sys
from pathlib import Path
from tests.cache.exercise import read_everything, write_everything
from tests.cache.test_hostile import JSON_FILES, json_bombs, sealed_bomb
from advkd.cache.errors import CacheError
from advkd.cache.reader import TrajectoryCache
from advkd.cache.verify import verify

store, like, out = (Path(name) for name in sys.argv[1:])
read_everything(like, like)
write_everything(like, out)
bombs = {size: json_bombs(size) for size in (1 << 16, 12 << 20)}
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (512 << 20), resource.RLIM_INFINITY))
for file, key in JSON_FILES.items():
    before = (store / file).read_bytes()
    large = file in ("zarr.json", "provenance/tolerance.json")
    for name, bomb in bombs[12 << 20 if large else 1 << 16].items():
        for content in (bomb, sealed_bomb(key, bomb)) if key != "attributes" else (bomb,):
            (store / file).write_bytes(content)
            try:
                said = [str(finding) for finding in verify(TrajectoryCache.open(store)).findings]
            except CacheError as error:
                said = [str(error)]
            assert any(file in line for line in said), (file, name, said)
            if not large:
                said = read_everything(store, like).said
                assert all(file in line for line in said), (file, name, said)
    (store / file).write_bytes(before)
with open(store / "blocks/000001.json", "wb") as sparse:
    sparse.truncate(1 << 40)
assert "larger than" in read_everything(store, like).said[0]
print("done")
"""


def sealed_bomb(key: str, bomb: bytes) -> bytes:
    """An object in which one value may be no JSON, under a seal that fits."""
    body = b'{"%s":%s' % (key.encode(), bomb)
    return body + b',"record_sha256":"' + hashlib.sha256(body + b"}").hexdigest().encode() + b'"}'


@needs_proc
def test_json_that_is_deep_large_or_no_json_is_refused_in_little_memory(store: Path, like: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", BOMBS, store, like, store.parent / "out.zarr"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "done\n"


class Mutant:
    """A small store of which only the metadata change, and a fresh copy for every example."""

    def __init__(self, root: Path) -> None:
        self.pristine = Pristine(root)
        self.metadata = {name: data for name, data in self.pristine.files.items() if name.endswith(".json")}

    def check(self, changed: dict[str, bytes], like: Path, out: Path) -> None:
        """Everything that can be done with it ends well or is refused."""
        with self.pristine.harmed(changed) as store:
            read_everything(store, like)
            write_everything(store, out)
            read_everything(store)


@pytest.fixture(scope="module")
def mutant(fast_folder: Path) -> Mutant:
    return Mutant(fast_folder / "mutant.zarr")


def fuzz(mutant: Mutant, like: Path, fast_folder: Path, max_examples: int) -> None:
    @settings(max_examples=max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed=mutated_stores(mutant.metadata))
    def run(changed: dict[str, bytes]) -> None:
        mutant.check(changed, like, fast_folder / "out.zarr")

    run()


def test_mutated_metadata_are_read_or_refused(mutant: Mutant, like: Path, fast_folder: Path) -> None:
    fuzz(mutant, like, fast_folder, 300)


@pytest.mark.slow
def test_ten_thousand_mutations_of_metadata_are_read_or_refused(mutant: Mutant, like: Path, fast_folder: Path) -> None:
    signal.alarm(0)
    fuzz(mutant, like, fast_folder, 10_000)


@pytest.fixture
def draft(fast_folder: Path) -> Iterator[Path]:
    """A store as a development snapshot before format 1 wrote it."""
    shutil.copytree(golden.DRAFT, fast_folder / "draft.zarr")
    yield fast_folder / "draft.zarr"
    put(fast_folder / "draft.zarr", None)


def make_draft(store: Path, files: dict[str, bytes]) -> None:
    put(store, None)
    for name, data in files.items():
        put(store / name, data)


def test_mutated_drafts_are_upgraded_or_refused(draft: Path) -> None:
    files = files_of(draft)

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed=mutated_stores({name: data for name, data in files.items() if name.endswith(".json")}))
    def run(changed: dict[str, bytes]) -> None:
        make_draft(draft, files | changed)
        attempt = Attempts(draft)
        if attempt(upgrade, draft) is not None:
            assert TrajectoryCache.open(draft).blocks
        read_everything(draft)

    run()


@pytest.mark.parametrize("folder", ["blocks", "states", "states/0004", "states/0004/c/0", "provenance"])
def test_an_upgrade_writes_nothing_through_a_symlink(draft: Path, outside: Path, folder: str) -> None:
    put(draft / "provenance/block-000000.json", b"{}")
    (draft / folder).rename(outside / "there")
    (draft / folder).symlink_to(outside / "there")
    before = state_of_folder(outside)
    with pytest.raises(CacheError, match="symlink"):
        upgrade(draft)
    assert state_of_folder(outside) == before


CONTROLS = "\x1b[2J\x1b]0;owned\x07\r\n\u202e\u2028\x85\x9b31m"


def with_controls(pristine: Pristine) -> dict[str, bytes]:
    """A store that is sound but for its names and texts, which would rule a terminal."""
    root = json.loads(pristine.files["zarr.json"])
    recipe = root["attributes"]["advkd"]["recipe"]
    recipe["sampler"]["name"] = recipe["noise"]["rule"] = recipe["precision"]["compute"] = CONTROLS
    recipe["teacher"] |= {"tensors_sha256": CONTROLS, CONTROLS: CONTROLS}
    texts = {"source": CONTROLS, "commit": CONTROLS, "license": CONTROLS}
    files = make_consistent(pristine.files | {"zarr.json": pretty_json(root)})
    return files | {
        f"states/0002/c/1/0/0/{CONTROLS}": b"x",
        f"blocks/{CONTROLS}.json": b"x",
        f"provenance/{CONTROLS}": b"x",
        "states/\udcff\udcfe": b"x",
        "provenance/store.json": seal({"teacher": texts}),
        "provenance/writer.json": json.dumps({"pid": CONTROLS, "host": CONTROLS}).encode(),
    }


def commands(store: Path, like: Path) -> Iterator[tuple[str, ...]]:
    for name in ("info", "verify", "upgrade"):
        yield name, str(store)
    yield "info", str(store), "--json"
    yield "verify", str(store), "--json"
    yield "diff", str(store), str(like)
    yield "diff", str(like), str(store)
    yield "subset", str(store), "--states", "4", "--out", "part.zarr"
    yield "merge", str(store), str(like), "--out", "both.zarr"
    yield "verify", str(store), "--repair"


@pytest.fixture
def run_command(request: pytest.FixtureRequest) -> Invoke:
    """Where what the command line needs is installed."""
    pytest.importorskip("rich")
    invoke: Invoke = request.getfixturevalue("invoke")
    return invoke


def check_commands(invoke: Invoke, store: Path, like: Path) -> None:
    """Each command ends with what it has to say, or with one line and an exit code."""
    from advkd.pipeline.cli.cache import main

    for arguments in commands(store, like):
        result = invoke(main, *arguments)
        said = result.stdout + result.stderr
        assert all(letter.isprintable() or letter == "\n" for letter in said), (arguments, said)
        assert result.exit_code in (0, 1, 2)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == (1 if result.exit_code and not result.stdout else 0), (arguments, said)


def test_what_a_terminal_would_obey_is_escaped(
    run_command: Invoke, store: Path, like: Path, pristine: Pristine
) -> None:
    with pristine.harmed(with_controls(pristine)):
        check_commands(run_command, store, like)
        with StoreLocks(store).alone():
            from advkd.pipeline.cli.cache import main

            assert "another build is writing" in run_command(main, "verify", store, "--repair").stderr


def test_commands_end_with_a_line_whatever_the_metadata(run_command: Invoke, mutant: Mutant, like: Path) -> None:

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed=mutated_stores(mutant.metadata))
    def run(changed: dict[str, bytes]) -> None:
        with mutant.pristine.harmed(changed) as store:
            check_commands(run_command, store, like)

    run()
