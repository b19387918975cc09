"""The wheel holds three packages and the configurations, and the commands work outside a clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from advkd.pipeline.config import shipped_experiments
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", ".typecheck/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    (built,) = folder.glob("advkd-*.whl")
    return built


def test_the_wheel_holds_the_packages_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    rooms = {name.split("/")[1] for name in names if name.startswith("advkd/")}
    assert rooms == {"cache", "configs", "pipeline", "stages"}
    assert {name.split("/")[0] for name in names} - {"advkd"} == {wheel.name.split("-py3")[0] + ".dist-info"}
    for experiment in shipped_experiments():
        assert f"advkd/configs/{experiment}.yaml" in names
    assert {f"advkd/{room}/py.typed" for room in rooms} | {"advkd/stages/images/emoji_classes.yaml"} <= set(names)
    sources = {path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert {Path(name).relative_to("advkd") for name in names if name.endswith(".py")} == sources


def test_it_works_outside_a_clone(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import advkd.cache, sys; print(advkd.cache.__file__)\n"
        "from advkd.pipeline.cli.cache import main\n"
        "sys.argv = ['advkd-cache', 'build', '--config', 'configs/cifar10.yaml', '--teacher', 'none/at/all']\n"
        "main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == str(site / "advkd/cache/__init__.py")
    assert result.returncode == 1
    assert result.stderr.startswith("error: teacher none/at/all: no such folder; expected ")
