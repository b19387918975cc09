"""Caches are read where they are: S3, plain HTTP, the Hub; what comes is checked, and only what is needed comes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from advkd.cache.care.verify import verify
from advkd.cache.errors import CacheNotFoundError, DamagedError, NotCachedError, UsageError
from advkd.cache.files import durable
from advkd.cache.read import chunk_cache as scratch
from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.train import main as train_command
from tests.conftest import Invoke
from tests.pipeline.servers import hub, plain_http
from tests.stores import BLOCK_SIZE, tree

TRAIN = (
    "name: toy\nteacher: {source: none}\ntrain: {student: {width: 8, depth: 1}, steps: 4, batch_size: 16,\n"
    "  log_every: 2, preview_every: 4, checkpoint_every: 2, objective: {adversarial: {width: 4}}}\n"
)


@pytest.fixture(autouse=True)
def scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADVKD_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(store: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store, uploaded to a bucket behind a real S3 API."""
    import fsspec
    import s3fs

    for name, value in (
        ("AWS_ENDPOINT_URL", s3_endpoint),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = fsspec.filesystem("s3")
    bucket.mkdirs("caches", exist_ok=True)
    bucket.put(str(store), "caches/toy.zarr", recursive=True)
    return "s3://caches/toy.zarr"


def check_same(address: str, store: Path) -> None:
    remote, local = TrajectoryCache.open(address), TrajectoryCache.open(store)
    assert (remote.blocks, remote.digest, sorted(remote.states)) == (local.blocks, local.digest, sorted(local.states))
    wanted = [200, 3, 3, 255]
    for step in local.states:
        np.testing.assert_array_equal(remote.rows(step, wanted), local.rows(step, wanted))
    verified = verify(remote)
    assert verified.findings == () and verified.num_bytes == verify(local).num_bytes


def check_training(invoke: Invoke, address: str, store: Path) -> None:
    Path("toy.yaml").write_text(TRAIN)
    for cache, run in ((address, "remote"), (store, "local")):
        assert invoke(train_command, "--cache", cache, "--config", "toy.yaml", "--run", run).exit_code == 0
    weights = [Path(run, "student/model.safetensors").read_bytes() for run in ("remote", "local")]
    assert weights[0] == weights[1]


def test_s3(invoke: Invoke, store: Path, s3_url: str) -> None:
    check_same(s3_url, store)
    assert TrajectoryCache.open(store).digest in invoke(cache_command, "info", s3_url).output
    check_training(invoke, s3_url, store)
    missing = invoke(cache_command, "info", "s3://no-such-bucket/toy.zarr")
    assert missing.exit_code == 1 and missing.stderr.count("\n") == 1


def test_plain_http(invoke: Invoke, store: Path) -> None:
    with plain_http(store.parent) as (address, _):
        check_same(f"{address}/toy.zarr", store)
        assert "256 in 16 blocks" in invoke(cache_command, "info", f"{address}/toy.zarr/").output
        assert "all as recorded" in invoke(cache_command, "verify", f"{address}/toy.zarr").output
        check_training(invoke, f"{address}/toy.zarr", store)
        with pytest.raises(CacheNotFoundError, match="no cache at"):
            TrajectoryCache.open(f"{address}/none.zarr")
    assert "can't be read" in invoke(cache_command, "info", f"{address}/toy.zarr").stderr


def test_the_hub(store: Path) -> None:
    with hub(store.parent) as endpoint:
        run = subprocess.run(
            [Path(sys.executable).parent / "advkd-cache", "verify", "hf://datasets/team/caches/toy.zarr"],
            env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert run.returncode == 0, run.stderr
    assert f"16 blocks, {verify(TrajectoryCache.open(store)).num_bytes:,} bytes compared: all as recorded" in run.stdout


def test_only_the_chosen_states_come_and_only_once(store: Path, scratch_folder: Path) -> None:
    with plain_http(store.parent) as (address, requested):
        cache = TrajectoryCache.open(f"{address}/toy.zarr")
        assert not any("/c/" in path for path in requested)
        cache.fetch([0, 4], range(8))
        chunks = [path for path in requested if "/c/" in path]
        assert len(chunks) == 16 and not any("/0002/" in path for path in chunks)
        cache.rows(0, range(8 * BLOCK_SIZE))
        TrajectoryCache.open(f"{address}/toy.zarr").fetch([0, 4], range(8))
        assert len([path for path in requested if "/c/" in path]) == 16
    assert len([path for path in scratch_folder.rglob("*") if path.is_file()]) == 16


def test_training_from_two_states_reads_no_others(invoke: Invoke, store: Path) -> None:
    Path("toy.yaml").write_text(TRAIN)
    with plain_http(store.parent) as (address, requested):
        url = f"{address}/toy.zarr"
        result = invoke(train_command, "--cache", url, "--config", "toy.yaml", "--states", "0,4", "--run", "r")
        assert result.exit_code == 0
    assert {path.split("/")[3] for path in requested if "/c/" in path} == {"0000", "0004"}


def test_what_does_not_fit_is_said_before_anything_comes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(store)
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with plain_http(store.parent) as (address, requested):
        with pytest.raises(UsageError, match=r"the chosen states need .* are free"):
            TrajectoryCache.open(f"{address}/toy.zarr").fetch([0], range(16))
        assert not any("/c/" in path for path in requested)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_remote_damage_is_never_used(store: Path, harm: str) -> None:
    chunk = store / "states/0004/c/1/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[7] ^= 4
    chunk.write_bytes(data if harm == "flip" else data[:-9])
    if harm == "delete":
        chunk.unlink()
    with plain_http(store.parent) as (address, _):
        cache = TrajectoryCache.open(f"{address}/toy.zarr")
        assert len(cache.rows(4, [0])) == 1
        with pytest.raises(DamagedError, match=r"states/0004/c/1"):
            cache.rows(4, [BLOCK_SIZE])
        (finding,) = verify(cache).findings
    assert (finding.block, finding.state) == (1, "0004")


def test_damage_in_the_scratch_folder_is_found_too(store: Path, scratch_folder: Path) -> None:
    with plain_http(store.parent) as (address, _):
        TrajectoryCache.open(f"{address}/toy.zarr").fetch([4], [1])
        (file,) = [path for path in scratch_folder.rglob("*") if path.is_file()]
        data = bytearray(file.read_bytes())
        data[0] ^= 1
        durable.write_atomically(file, [bytes(data)])
        with pytest.raises(DamagedError, match="states/0004/c/1"):
            TrajectoryCache.open(f"{address}/toy.zarr").rows(4, [BLOCK_SIZE])


def test_a_partial_copy_and_gaps_are_named_from_afar(store: Path) -> None:
    shutil.rmtree(store / "states/0002")
    (store / "blocks/000003.json").unlink()
    with plain_http(store.parent) as (address, _):
        cache = TrajectoryCache.open(f"{address}/toy.zarr")
        assert sorted(cache.states) == [0, 4] and 3 not in cache.blocks and len(cache.blocks) == 15
        with pytest.raises(NotCachedError, match="state 0002 is not here"):
            cache.rows(2, [0])
        with pytest.raises(NotCachedError, match="does not hold seeds 48:64"):
            cache.rows(0, [50])


def test_a_remote_cache_is_cut_to_a_local_one(invoke: Invoke, store: Path) -> None:
    with plain_http(store.parent) as (address, _):
        result = invoke(cache_command, "subset", f"{address}/toy.zarr", "--seeds", "0:64", "--out", "part.zarr")
        assert result.exit_code == 0, result.output
        assert invoke(cache_command, "merge", f"{address}/toy.zarr", "part.zarr", "--out", "all.zarr").exit_code == 0
        assert invoke(cache_command, "verify", f"{address}/toy.zarr", "--repair").exit_code == 0
    assert TrajectoryCache.open("part.zarr").blocks == (0, 1, 2, 3)
    assert tree(Path("all.zarr")) == tree(store)


@pytest.mark.parametrize("url", ["gs://bucket/toy.zarr", "foo://bucket/toy.zarr"])
def test_a_kind_of_url_that_is_not_installed_is_named(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    result = invoke(cache_command, "info", url)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and url in result.stderr
