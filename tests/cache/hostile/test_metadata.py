"""Somebody else's metadata: absurd, deep, huge or mutated, they are read or refused, in little memory."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.recipe import digest
from tests.cache.exercise import Mutant
from tests.cache.mutations import mutated_stores
from tests.conftest import ROOT

# A store that fails is long to print; as an error, Hypothesis' warning about that would hide the failure.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="its own size is told by Linux only")


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
from tests.cache.exercise import Mutant, read_everything, write_everything
from tests.cache.hostile.test_metadata import absurdities, rehashed
from tests.stores import make_layout, make_recipe
from advkd.cache.format.zarr_metadata import root_metadata

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
from tests.cache.exercise import Mutant, read_everything, write_everything
from tests.cache.hostile.test_metadata import JSON_FILES, json_bombs, sealed_bomb
from advkd.cache.errors import CacheError
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.care.verify import verify

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
