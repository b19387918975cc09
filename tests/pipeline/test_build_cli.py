"""`advkd-cache build` as a user has it: what a dry run says, where a store goes, what is refused before it costs."""

import shutil
from pathlib import Path

import pytest

from advkd.pipeline.cli.cache import main as cache_command
from advkd.stages.teacher.build import resources
from tests.conftest import Invoke
from tests.stores import tree, write_store

SMALL = ("--seeds", "0:16", "--block-size", "8", "--batch-size", "8", "--record", "2", "--steps", "4")


def test_dry_run_measures_and_writes_nothing(invoke: Invoke, tmp_path: Path, toy_yaml: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = invoke(cache_command, "build", "--config", toy_yaml, "--dry-run")
    assert result.exit_code == 0
    for part in (
        "256 of them still to build",
        "evaluations   1,024 of one image",
        "in 4 blocks",
        "time ",
        "disk ",
        "memory ",
        "trailing: 999, ",
    ):
        assert part in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_checks_the_memory_that_the_build_will_need(
    invoke: Invoke, toy_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "memory_limit", lambda: 0)
    command = (cache_command, "build", "--config", toy_yaml, "--dry-run")
    for flags, blocks in (((), 2), (("--workers", 1), 1), (("--workers", 3), 3)):
        result = invoke(*command, *flags)
        assert result.exit_code == 2 and f"({blocks} at a time)" in result.stderr
    result = invoke(*command, "--scheduler", "tcp://127.0.0.1:9")
    assert result.exit_code == 0, result.output
    assert "in each worker" in result.output


def test_dry_run_counts_what_is_left(invoke: Invoke, toy_yaml: Path) -> None:
    invoke(cache_command, "build", "--config", toy_yaml, "--seeds", "64:128")
    store = tree(Path("cache/toy.zarr"))
    result = invoke(cache_command, "build", "--config", toy_yaml, "--dry-run")
    assert "192 of them still to build" in result.output
    assert tree(Path("cache/toy.zarr")) == store


def test_the_default_command_has_a_store_of_its_own(invoke: Invoke, pipeline_folder: Path) -> None:
    """`advkd-cache build --steps 1000` with the default teacher in place; few seeds to keep it short."""
    shutil.copytree(pipeline_folder, "teachers/digits/pipeline")
    result = invoke(cache_command, "build", "--steps", "1000", "--dry-run")
    assert "store         cache/digits-1000.zarr (new)" in result.output
    assert "ddim, 1000 steps; states after 0, 200, 400, 600, 800, 1000 steps" in result.output
    assert not Path("cache").exists()


def test_a_dry_run_measures_a_default_teacher_that_is_not_there_yet(invoke: Invoke) -> None:
    result = invoke(cache_command, "build", "--config", "smoke", "--steps", "20", "--dry-run")
    assert result.exit_code == 0
    assert "teachers/smoke/pipeline (not there yet: a build would train it first)" in result.output
    assert "evaluations   7,680 of one image" in result.output
    assert not list(Path().iterdir())


def test_the_samplers_flags_name_the_store(invoke: Invoke, toy_yaml: Path) -> None:
    for flags, suffix, timesteps in (
        (("--spacing", "leading"), "-leading", "leading: 750, 500, 250, 0"),
        (("--eta", "0.5"), "-eta0.5", "trailing: 999, 749, 499, 249"),
    ):
        result = invoke(cache_command, "build", "--config", toy_yaml, *flags, "--dry-run")
        assert result.exit_code == 0, result.output
        assert f"store         cache/toy{suffix}.zarr (new)" in result.output
        assert timesteps in result.output
    result = invoke(cache_command, "build", "--config", toy_yaml, "--spacing", "sideways")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and "sampler.spacing: 'sideways'" in result.stderr


@pytest.mark.parametrize(
    "flags", [("--steps", "7", "--record", "10"), ("--sampler", "magic"), ("--seeds", "5:5"), ("--device", "cuda:99")]
)
def test_a_bad_request_is_seen_before_the_default_teacher_is_trained(invoke: Invoke, flags: tuple[str, ...]) -> None:
    result = invoke(cache_command, "build", "--config", "smoke", *flags)
    assert result.exit_code == 2
    assert not list(Path().iterdir())


BAD_BUILDS = [
    (("--config", "nowhere.yaml"), 2, "no configuration nowhere.yaml"),
    (("--config", "bad.yaml"), 2, "unknown key 'stpes'; did you mean 'steps'"),
    (("--steps", "7", "--record", "10"), 2, "record 10 doesn't fit steps 7"),
    (("--steps", "0"), 2, "0 is not a positive number of steps"),
    (("--steps", "5000"), 1, "steps 5000 don't fit the teacher: it was trained with 1000 timesteps"),
    (("--seeds", "0:1000000000000"), 2, "choose larger blocks"),
    (("--sampler", "a/b"), 2, "sampler 'a/b' is unknown"),
    (("--record", "1,2,99"), 2, "record 1,2,99 doesn't fit steps 4"),
    (("--record", "some"), 2, "expected a number of states"),
    (("--seeds", "5:5"), 2, "the range is empty"),
    (("--seeds", "9:5"), 2, "the range is reversed"),
    (("--seeds", "-4:5"), 2, "seeds are not negative"),
    (("--seeds", "all"), 2, "expected A:B"),
    (("--block-size", "0"), 2, "block_size: 0 is not positive"),
    (("--teacher", "no/such/folder"), 1, "no such folder"),
    (("--teacher", "notes"), 1, "no network in it"),
    (("--sampler", "magic"), 2, "sampler 'magic' is unknown; advkd has tables for: ddim, ddpm"),
    (("--device", "cuda:99"), 2, "device 'cuda:99'"),
    (("--out", "notes"), 1, "notes is not a trajectory cache"),
]


@pytest.mark.parametrize(("flags", "code", "message"), BAD_BUILDS, ids=[case[2][:30] for case in BAD_BUILDS])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["build", "dry-run"])
def test_bad_builds(
    invoke: Invoke,
    tmp_path: Path,
    toy_yaml: Path,
    flags: tuple[str, ...],
    code: int,
    message: str,
    dry: tuple[str, ...],
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    (tmp_path / "bad.yaml").write_text("name: x\nteacher: {source: a/b}\nsampler: {stpes: 4}\n")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    config = () if "--config" in flags else ("--config", toy_yaml)
    result = invoke(cache_command, "build", *config, *flags, *dry)
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.output
    assert message in result.stderr
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_store_of_another_teacher_stops_the_build(invoke: Invoke, tmp_path: Path, toy_yaml: Path) -> None:
    write_store(tmp_path / "cache/toy.zarr", "0:16")
    before = tree(tmp_path / "cache/toy.zarr")
    result = invoke(cache_command, "build", "--config", toy_yaml)
    assert result.exit_code == 1
    assert "was built otherwise" in result.stderr and "--on-mismatch set-aside" in result.stderr
    assert tree(tmp_path / "cache/toy.zarr") == before
