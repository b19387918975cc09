"""Every command in the README and docs/caches.md runs as it is written there (the team's in test_sharing.py)."""

import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from pytorch_fid.inception import FID_WEIGHTS_URL

from advkd.cache import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.config import main as config_command
from advkd.pipeline.cli.evaluate import main as evaluate_command
from advkd.pipeline.cli.sample import main as sample_command
from advkd.pipeline.cli.train import main as train_command
from tests.conftest import ROOT, Invoke, save_random_inception, settings
from tests.pipeline.clones import new_clone, run
from tests.pipeline.readme import TEXT, below, commands_below, python_blocks, readme_commands, shell_blocks
from tests.stores import write_store

CACHES = (ROOT / "docs/caches.md").read_text()
COMMANDS = {
    "advkd-cache": cache_command,
    "advkd-train": train_command,
    "advkd-sample": sample_command,
    "advkd-evaluate": evaluate_command,
}


def test_no_command_is_forgotten() -> None:
    """All shell blocks stand below the headings that these tests run."""
    headings = ("Install", "Two commands", "With your own teacher", "Use the student", "Sharing a cache")
    assert TEXT.count("```sh") == sum(len(readme_commands(heading)) for heading in headings)
    assert shell_blocks(CACHES) == commands_below(CACHES, "Look after")


def test_it_stays_short() -> None:
    assert len(TEXT.splitlines()) <= 135


def test_it_installs_from_a_clone_and_from_git(tmp_path: Path) -> None:
    """Literally, but into a folder and without dependencies, from a repository here."""
    clone = new_clone(tmp_path / "advkd.git", "LICENSE", "README.md", "pyproject.toml")
    (commands,) = readme_commands("Install")
    assert len(commands) == 2
    for place, command in enumerate(commands):
        pip, *arguments = shlex.split(command.replace("git+https://example.org/team/advkd.git", f"git+file://{clone}"))
        site = tmp_path / f"site{place}"
        options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", site)
        run(clone, sys.executable, "-m", pip, *arguments, *options)
        assert (site / "advkd/configs/digits.yaml").is_file()


def test_make_targets_do_what_the_readme_says() -> None:
    (commands,) = readme_commands("Two commands")
    assert commands == ["make demo", "make test"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    wanted = (["dvc repro", "ls -t runs/*/evaluation/report.html"], ["pytest -n 2"])
    for command, last in zip(commands, wanted, strict=True):
        plan = subprocess.run(
            [*shlex.split(command), "-n"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True
        )
        lines = plan.stdout.strip().splitlines()[-len(last) :]
        assert all(line.startswith(start) for line, start in zip(lines, last, strict=True))
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_the_commands_for_ones_own_teacher(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Literally, with the Hub's checkpoint replaced by a small one, fewer seeds and shorter defaults."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        **blocks,
    )  # fmt: skip
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "google/ddpm-cifar10-32")
    save_random_inception(tmp_path / "hub/checkpoints" / Path(FID_WEIGHTS_URL).name)
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "hub"))
    small = ("cache.seeds=0:16", "cache.block_size=16", "train.student.width=8")
    shorter = (*small, "train.steps=2", "train.batch_size=4", "evaluate.num_sets=2", "evaluate.set_size=2")
    shorter += ("evaluate.batch_size=8",)
    (tmp_path / "configs").mkdir()
    for command in itertools.chain(*readme_commands("With your own teacher")):
        name, *arguments = shlex.split(command)
        if name == "advkd-config":
            *arguments, arrow, target = arguments
            result = invoke(config_command, *arguments, *settings(*shorter))
            assert arrow == ">"
            Path(target).write_text(result.output)
        else:
            result = invoke(COMMANDS[name], *arguments)
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert (tmp_path / "mine.png").is_file()
    assert (tmp_path / "runs/mine/evaluation/metrics.json").is_file()


def test_the_commands_that_look_after_a_cache(invoke: Invoke, pipeline_folder: Path, tmp_path: Path) -> None:
    """Literally, on two stores of one teacher, the second with other seeds."""
    config = (
        f"name: digits\nteacher: {{source: {pipeline_folder}}}\ncache: {{block_size: 8, batch_size: 8, record: 2}}\n"
    )
    (tmp_path / "digits.yaml").write_text(config)
    for name, seeds in (("digits", "0:16"), ("theirs", "16:24")):
        build = ("build", "--config", "digits.yaml", "--seeds", seeds, "--out", f"cache/{name}.zarr")
        assert invoke(cache_command, *build).exit_code == 0
    for command in itertools.chain(*commands_below(CACHES, "Look after")):
        result = invoke(cache_command, *shlex.split(command)[1:])
        assert result.exit_code == (1 if " diff " in command else 0), f"{command}: {result.output}"
    assert TrajectoryCache.open("cache/ours.zarr").blocks == (0, 1, 2)
    assert Path("digits.gif").is_file() and sorted(TrajectoryCache.open("cache/small.zarr").states) == [0, 50]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a store whose states stand where the example looks."""
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "cache/digits.zarr", "0:64")
    (example,) = python_blocks(below(CACHES, "From Python"))
    names: dict[str, object] = {}
    for there, here in (("(50", "(4"), ("states/0050", "states/0004"), ("[0, 50]", "[0, 4]")):
        example = example.replace(there, here)
    exec(example, names)
    assert isinstance(names["cache"], TrajectoryCache)
    assert names["x_T"].shape == names["x_0"].shape == (64, 1, 8, 8)  # type: ignore[attr-defined]
    assert names["first"].shape == (8, 1, 8, 8)  # type: ignore[attr-defined]
    assert names["mean"].compute().shape == (1, 8, 8)  # type: ignore[attr-defined]
    assert len(names["dataset"]) == 64  # type: ignore[arg-type]


def test_links_and_pictures_are_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    targets = {page: re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()) for page in pages}
    assert not [(page, target) for page in pages for target in targets[page] if not (page.parent / target).is_file()]
    assert all(targets[ROOT / page] for page in ("README.md", "docs/caches.md", "docs/results.md"))


def test_every_page_is_linked_from_the_readme() -> None:
    assert all(f"(docs/{page.name})" in TEXT for page in (ROOT / "docs").glob("*.md"))


def test_extras_that_are_named_exist() -> None:
    """In pages and in messages."""
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    rooms = ("cache", "stages", "pipeline", "docs", "configs")
    files = [ROOT / "README.md", *(path for room in rooms for path in (ROOT / room).rglob("*.*"))]
    texts = [path.read_text() for path in files if path.suffix in (".py", ".md", ".yaml")]
    named = {extra for text in texts for extra in re.findall(r"(?:advkd|\.)\[([a-z]+)\]'", text)}
    assert {"export", "text", "emoji", "mnist"} <= named <= known
