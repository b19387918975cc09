"""Packing from the command line: what it says, what a kill leaves, training from a packed store, sharing with DVC."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from advkd.cache import TrajectoryCache
from advkd.cache.care.verify import verify
from advkd.pipeline.cli.cache import main as command
from advkd.pipeline.cli.train import main as train_command
from tests.cache.harm import content, files_of
from tests.conftest import ROOT, Invoke
from tests.pipeline.processes import BIN, ENVIRONMENT, Process, committed, finish, start, stop, wait_until
from tests.pipeline.readme import shell_blocks
from tests.pipeline.servers import plain_http
from tests.pipeline.test_remote import TRAIN
from tests.stores import tree, write_store

PAGE = (ROOT / "docs/packing.md").read_text()


@pytest.fixture(autouse=True)
def scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADVKD_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def test_pack_and_unpack_say_what_they_did(invoke: Invoke, store: Path) -> None:
    result = invoke(command, "pack", store, "--out", "packed.zarr", "--workers", "1")
    assert result.exit_code == 0 and "16 blocks packed, 0 were there" in result.output
    assert "bytes a value; no error" in result.output
    assert "0 blocks packed, 16 were there" in invoke(command, "pack", store, "--out", "packed.zarr").output
    assert "all as recorded" in invoke(command, "verify", "packed.zarr").output
    shown = invoke(command, "info", "packed.zarr").output
    assert "float16, packed-lossless; 0.000 GB unpacked" in shown and "no error" in shown
    assert json.loads(invoke(command, "info", "packed.zarr", "--json").output)["packed"]["codec"] == "lossless"
    result = invoke(command, "unpack", "packed.zarr", "--out", "again.zarr", "--workers", "1")
    assert result.exit_code == 0 and "16 blocks unpacked, 0 were there" in result.output
    assert tree(Path("again.zarr")) == tree(store)
    assert "the same: 16 blocks" in invoke(command, "diff", "packed.zarr", store).output
    result = invoke(command, "pack", store, "--max-error", "0.004", "--out", "archive.zarr")
    assert "at most 3.9e-03" in result.output or "at most 4.0e-03" in result.output
    assert "archive, max_error 0.004" in invoke(command, "info", "archive.zarr").output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--codec", "archive"], 2, "--max-error and --codec archive go together"),
        (["--codec", "zstd", "--max-error", "0.1"], 2, "--max-error and --codec archive go together"),
        (["--max-error", "-1"], 2, "expected 9.5e-07 to 0.5"),
        (["--keep-bits", "3"], 2, "not for lossless"),
        (["--codec", "pcodec", "--keep-bits", "0"], 2, "float16 has 1 to 10"),
        (["--codec", "zip"], 2, "Invalid value for '--codec'"),
    ],
)
def test_wrong_wishes_end_in_one_line(invoke: Invoke, store: Path, arguments: list[str], code: int, said: str) -> None:
    result = invoke(command, "pack", store, "--out", "packed.zarr", *arguments)
    assert result.exit_code == code and said in result.stderr
    assert not Path("packed.zarr").exists()


def test_what_is_no_cache_or_not_packed_is_refused(invoke: Invoke, store: Path) -> None:
    for arguments, said in (
        (("pack", "nothing.zarr"), "no cache at"),
        (("unpack", "nothing.zarr"), "no cache at"),
        (("unpack", store), "is no packed store"),
    ):
        result = invoke(command, *arguments, "--out", "out.zarr")
        assert result.exit_code == 1 and said in result.stderr and result.stderr.count("\n") == 1
    assert not Path("out.zarr").exists()


def test_an_ancestral_cache_is_packed_with_a_word(invoke: Invoke, tmp_path: Path) -> None:
    sampler = {"name": "ddpm", "steps": 4, "eta": 1.0, "deterministic": False, "config": {}, "timesteps": [3.0]}
    write_store(tmp_path / "store.zarr", "0:32", sampler=sampler)
    result = invoke(command, "pack", "store.zarr", "--out", "packed.zarr")
    assert result.exit_code == 0 and "ddpm draws noise at every step" in result.stderr
    assert invoke(command, "diff", "store.zarr", "packed.zarr").exit_code == 0


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_pack_goes_on(tmp_path: Path, workers: int) -> None:
    """Its workers end with it; what was committed is kept; the end is as if nothing had happened."""
    write_store(tmp_path / "store.zarr", "0:960")
    line = [BIN / "advkd-cache", "pack", "store.zarr", "--max-error", "0.01", "--workers", workers, "--out"]
    finish(start(tmp_path, *line, "whole.zarr"))
    process = start(tmp_path, *line, "killed.zarr", session=True)
    wait_until(lambda: len(committed(tmp_path / "killed.zarr")) >= 3, process)
    stop(process, signal.SIGKILL)
    wait_until_gone(process)
    done = committed(tmp_path / "killed.zarr")
    if len(done) < 60:
        assert verify(TrajectoryCache.open(tmp_path / "killed.zarr")).num_blocks == len(done)
    said, _ = finish(start(tmp_path, *line, "killed.zarr"))
    assert f"{60 - len(done)} blocks packed, {len(done)} were there" in said
    assert content(files_of(tmp_path / "killed.zarr")) == content(files_of(tmp_path / "whole.zarr"))


def test_an_interrupted_unpack_goes_on(tmp_path: Path) -> None:
    write_store(tmp_path / "store.zarr", "0:800")
    finish(start(tmp_path, BIN / "advkd-cache", "pack", "store.zarr", "--out", "packed.zarr"))
    line = [BIN / "advkd-cache", "unpack", "packed.zarr", "--workers", 2, "--out", "again.zarr"]
    process = start(tmp_path, *line, session=True)
    wait_until(lambda: len(committed(tmp_path / "again.zarr")) >= 3, process)
    code, said = stop(process, signal.SIGINT)
    wait_until_gone(process)
    assert code in (130, 0) and (code == 0 or "To resume: advkd-cache unpack packed.zarr" in said)
    finish(start(tmp_path, *line))
    assert tree(tmp_path / "again.zarr") == tree(tmp_path / "store.zarr")


def wait_until_gone(process: Process) -> None:
    """Until nobody of its group is left."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a worker outlived its parent")


def test_training_from_a_packed_store_is_training_from_the_unpacked_one(
    invoke: Invoke, store: Path, scratch_folder: Path
) -> None:
    """The same weights; only the states that are used were unpacked, and once."""
    Path("train.yaml").write_text(TRAIN)
    assert invoke(command, "pack", store, "--max-error", "0.01", "--out", "packed.zarr").exit_code == 0
    assert invoke(command, "unpack", "packed.zarr", "--out", "unpacked.zarr").exit_code == 0
    for name in ("packed", "unpacked"):
        line = ("--cache", f"{name}.zarr", "--config", "train.yaml", "--run", f"runs/{name}", "--states", "0,4")
        result = invoke(train_command, *line)
        assert result.exit_code == 0, result.output
    one, other = (Path(f"runs/{name}/student/model.safetensors").read_bytes() for name in ("packed", "unpacked"))
    assert one == other
    chunks = [path for path in scratch_folder.rglob("*") if path.is_file()]
    assert len(chunks) == 2 * 16
    before = {path: path.stat().st_mtime_ns for path in chunks}
    again = ("--cache", "packed.zarr", "--config", "train.yaml", "--run", "runs/again", "--states", "0,4")
    assert invoke(train_command, *again).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in scratch_folder.rglob("*") if path.is_file()} == before


def test_a_packed_store_is_read_over_http(invoke: Invoke, store: Path, tmp_path: Path) -> None:
    assert invoke(command, "pack", store, "--out", tmp_path / "site/packed.zarr").exit_code == 0
    with plain_http(tmp_path / "site") as (url, _):
        assert "all as recorded" in invoke(command, "verify", f"{url}/packed.zarr").output
        assert invoke(command, "unpack", f"{url}/packed.zarr", "--out", "again.zarr").exit_code == 0
    assert tree(Path("again.zarr")) == tree(store)


def test_the_page_s_commands_run_and_an_extension_moves_only_what_is_new(tmp_path: Path) -> None:
    """docs/packing.md, as two people play it, with a folder as the remote."""
    ann, remote = tmp_path / "ann", tmp_path / "remote"
    publish, extend, receive = shell_blocks(PAGE)
    write_store(ann / "cache/digits.zarr", "0:64")
    for line in ("git init -q", "git config user.email a@example.org", "git config user.name Ann", "dvc init -q",
                 f"dvc remote add -q --default team {remote}"):  # fmt: skip
        play(ann, line)
    shutil.copy(ROOT / ".dvcignore", ann)
    play(ann, "git add .dvc .dvcignore")
    for line in publish:
        play(ann, line)
    pushed = objects(remote)
    write_store(ann / "cache/digits.zarr", "0:80")
    for line in extend:
        play(ann, line)
    new = objects(remote) - pushed
    # Two states and a record; the three arrays' zarr.json, DVC's list.
    assert len(new) == 2 + 1 + 3 + 1 and pushed <= objects(remote)
    play(tmp_path, f"git clone -q {ann} ben")
    for line in receive:
        play(tmp_path / "ben", line)
    assert (
        tree(tmp_path / "ben/cache/digits.zarr") != {}
        and verify(TrajectoryCache.open(tmp_path / "ben/cache/digits.zarr")).findings == ()
    )


def play(folder: Path, line: str) -> None:
    done = subprocess.run(shlex.split(line), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}: {done.stderr}"


def objects(remote: Path) -> set[str]:
    return {path.name + path.parent.name for path in remote.rglob("*") if path.is_file()}
