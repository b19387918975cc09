"""docs/clusters.md: its commands run as they stand there, its scripts parse, its numbers are the code's."""

import ast
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import dask.config
import distributed  # noqa: F401 – its configuration
import pytest

from advkd.cache.care.verify import verify
from advkd.cache.format.zarr_metadata import MAX_BLOCKS
from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.stages.teacher.build import cluster, workers
from tests.conftest import ROOT, Invoke
from tests.pipeline.processes import BIN, ENVIRONMENT
from tests.pipeline.readme import commands_below
from tests.stores import tree

TEXT = (ROOT / "docs/clusters.md").read_text()
HEADINGS = (
    "One machine",
    "Several machines with a shared folder",
    "A dask cluster",
    "Machines that share nothing",
)


@pytest.fixture
def here(tmp_path: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The experiment `digits` with a tiny teacher and few steps, its seeds as they are."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "configs/digits.yaml").write_text(
        f"name: digits\nteacher: {{source: {pipeline_folder}}}\nsampler: {{steps: 2}}\n"
        "cache: {seeds: '0:22528', record: 1, block_size: 1024, batch_size: 256}\n"
    )
    return tmp_path


class Page:
    """Runs what stands below a heading: our commands in this process, dask's beside it."""

    def __init__(self, here: Path, invoke: Invoke) -> None:
        self.here = here
        self.invoke = invoke
        self.beside: list[subprocess.Popen[bytes]] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])

    def commands(self, heading: str) -> list[list[str]]:
        """As they are to be run here."""
        found = [command for block in commands_below(TEXT, heading) for command in block]
        told = {"/mnt/shared": str(self.here / "shared"), "tcp://head:8786": f"tcp://127.0.0.1:{self.port}"}
        for there, ours in (told | {"8786": self.port}).items():
            found = [command.replace(there, ours) for command in found]
        return [shlex.split(command) for command in found]

    def run(self, heading: str) -> list[str]:
        """What each of our commands says in the end."""
        said = []
        for command, *arguments in self.commands(heading):
            if command == "dask":
                process = subprocess.Popen(
                    [BIN / command, *arguments],
                    cwd=self.here,
                    env=ENVIRONMENT,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                self.beside.append(process)
                continue
            assert command == "advkd-cache"
            result = self.invoke(cache_command, *arguments)
            assert result.exit_code == 0, result.output
            said.append(result.output.splitlines()[-1])
        return said


@pytest.fixture
def page(here: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 60.0)  # the page's scheduler has just been started
    page = Page(here, invoke)
    yield page
    for process in reversed(page.beside):
        process.terminate()
    for process in page.beside:
        process.wait(60)


def test_no_command_is_forgotten() -> None:
    assert TEXT.count("```sh\n") == sum(len(commands_below(TEXT, heading)) for heading in HEADINGS)


def test_one_machine(page: Page) -> None:
    (said,) = page.run("One machine")
    assert said == "cache/digits.zarr: seeds 0:22528; built 22 blocks, 0 were there"


def test_a_shared_folder(page: Page) -> None:
    heading = "Several machines with a shared folder"
    assert [said.split("; ")[1] for said in page.run(heading) + page.run(heading)] == [
        "built 22 blocks, 0 were there",
        "built 0 blocks, 22 were there",
    ]


def test_a_dask_cluster(page: Page) -> None:
    (said,) = page.run("A dask cluster")
    assert said.endswith("built 22 blocks, 0 were there")


def test_machines_that_share_nothing(page: Page) -> None:
    north, south, both = page.run("Machines that share nothing")
    assert north.endswith("built 11 blocks, 0 were there") and south.endswith("built 11 blocks, 0 were there")
    assert both.startswith("cache/digits.zarr: 22 blocks added")
    page.run("Several machines with a shared folder")
    assert tree(page.here / "cache/digits.zarr") == tree(page.here / "shared/digits.zarr")
    assert verify(TrajectoryCache.open(page.here / "cache/digits.zarr")).findings == ()


def test_scripts_parse_and_name_flags_that_are_there() -> None:
    known = {option for p in cache_command.commands["build"].params if isinstance(p, click.Option) for option in p.opts}
    (script,) = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    ours = [line for line in script.splitlines() if "advkd-cache build" in line]
    assert ours and all(flag in known for line in ours for flag in re.findall(r"--[a-z-]+", line))
    (text,) = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
    options = subprocess.run([BIN / "dask", "worker", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(flag in options for flag in re.findall(r"--[a-z-]+", text))  # dask-cuda's worker takes them too
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    assert len(calls) == 4


def test_numbers_are_the_codes() -> None:
    assert f"holds {workers.IN_FLIGHT:,} tasks at a time" in TEXT
    assert f"no more than {workers.REPORTS_PER_SECOND} times a second" in " ".join(TEXT.split())
    assert MAX_BLOCKS == 1_000_000 and "a million blocks at most" in TEXT
    assert workers.RETRIES == 2 and "is tried twice more" in TEXT
    assert dask.config.get("distributed.scheduler.allowed-failures") == 3 and "died four times" in TEXT
    assert "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES" in TEXT
