"""`advkd-export` as a user has it: what it prints, one line for every mistake, and nothing left behind."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkd.cache.format.condition import ClassCondition
from advkd.pipeline.cli.export import main as export_command
from advkd.pipeline.cli.sample import main as sample_command
from advkd.stages.metrics.classifier import SmallClassifier, save_classifier
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.hub import Student
from advkd.stages.student.sharing.onnx_student import OnnxStudent
from advkd.stages.student.train import train
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig
from tests.conftest import ROOT, Invoke
from tests.pipeline.readme import TEXT, below, commands_below, python_blocks, readme_commands
from tests.pipeline.servers import model_hub
from tests.stores import write_store

STUDENTS = (ROOT / "docs/students.md").read_text()


CONFIG = TrainConfig(
    student=StudentConfig(width=8, depth=1, attention=False), steps=2, batch_size=16, preview_every=2,
    objective=ObjectiveConfig(adversarial=AdversarialConfig(width=4)),
)  # fmt: skip
CLASSES = ClassCondition(num_classes=11, labels=tuple(range(10)), guidance=2.0, null_class=10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cache/toy.zarr, runs/toy and a classifier."""
    folder = tmp_path_factory.mktemp("home")
    write_store(folder / "cache/toy.zarr", "0:256")
    train(folder / "cache/toy.zarr", CONFIG, folder / "runs/toy")
    torch.manual_seed(0)
    save_classifier(folder / "classifier", SmallClassifier(1, 8, 10).eval(), {})
    return folder


def test_everything_at_once(invoke: Invoke, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advkd.stages.evaluate.config.FULL_SET_SIZE", 64)
    result = invoke(
        export_command, trained / "runs/toy", "--onnx", "out/toy.onnx", "--int8", "--time", "--folder", "saved",
        "--cache", trained / "cache/toy.zarr", "--features", trained / "classifier",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    first, whole, small, title, *rest = result.output.splitlines()
    assert first == "saved: weights, configuration, model card"
    deviation = r"MB; deviation from PyTorch on 64 seeds: largest (\S+), root mean square (\S+)$"
    off = re.match(rf"out/toy\.onnx: float32, 0\.\d\d {deviation}", whole)
    off_small = re.match(rf"out/toy\.int8\.onnx: int8 convolutions, 0\.\d\d {deviation}", small)
    assert off and off_small and float(off[1]) < 1e-4 < float(off_small[1]) < 1.0
    assert title.startswith("Fréchet distance to the teacher's cached x_0, mean ± sd over 5 sets of 64 fresh seeds")
    names = [line[2:12].strip() for line in rest[:3]]
    assert names == ["PyTorch", "ONNX", "ONNX int8"] and rest[3] == "median latency on this machine's CPU:"
    assert "minus PyTorch" not in rest[0] and "95 %: not distinguishable" in rest[1]
    assert re.search(r"batch 1 .*PyTorch [\d.]+ ms \(1\.00×\), ONNX [\d.]+ ms .*, ONNX int8 [\d.]+ ms", rest[4])
    assert re.search(r"batch 64 ", rest[5]) and len(rest) == 6
    student = Student.from_pretrained("saved")
    noise = student.noise([1, 2, 3])
    torch.testing.assert_close(OnnxStudent(Path("out/toy.onnx"))(noise), student(noise), rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in Path("out").iterdir()) == ["toy.int8.onnx", "toy.onnx"]


def test_mistakes_cost_a_line(invoke: Invoke, trained: Path, tmp_path: Path) -> None:
    run = trained / "runs/toy"
    (tmp_path / "kept.onnx").write_text("kept")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years")
    before = sorted(tmp_path.rglob("*"))
    for arguments, code, message in (
        ((run,), 2, "nothing to do: give --onnx FILE, --folder FOLDER or --push REPO"),
        ((run, "--int8", "--folder", "x"), 2, "and --time need --onnx FILE"),
        ((run, "--onnx", "x.pt"), 2, "expected a name that ends in .onnx"),
        ((run, "--onnx", "x.onnx", "--cache", "y"), 2, "needs both --cache STORE and --features"),
        ((run, "--onnx", "x.onnx", "--cache", "none.zarr", "--features", "f"), 1, "no cache at none.zarr"),
        ((run, "--onnx", "x.onnx", "--cache", run.parents[1] / "cache/toy.zarr", "--features", "f"), 2, "features f: "),
        ((run, "--folder", "thesis"), 2, "thesis holds something other than a student"),
        ((trained / "classifier", "--onnx", "x.onnx"), 1, "holds no student that this advkd can load"),
        ((trained, "--onnx", "x.onnx"), 1, "no student in"),
        (("/no/such/place", "--onnx", "x.onnx"), 1, "/no/such/place: neither a folder nor"),
        ((run, "--onnx", "kept.onnx", "--max-error", "0"), 1, "more than 0; kept.onnx was not written"),
    ):
        result = invoke(export_command, *arguments)
        assert result.exit_code == code and message in result.stderr, result.output
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and not result.stdout
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "kept.onnx").read_text() == "kept"


def test_without_the_extra_it_says_what_to_install(
    invoke: Invoke, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    finding = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else finding(name))
    result = invoke(export_command, trained / "runs/toy", "--onnx", "x.onnx")
    assert result.exit_code == 2
    assert result.stderr == "error: exporting needs onnx, onnxruntime, onnxscript: pip install 'advkd[export]'\n"
    assert invoke(export_command, trained / "runs/toy", "--folder", "saved").exit_code == 0


def test_interrupted_it_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    """Ctrl-C while torch exports: exit code 130, one line, and neither a file nor a part of one."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from advkd.stages.student.sharing import export\n"
        "exporting = export.torch.onnx.export\n"
        "def slow(*a, **k): print('now', flush=True); exporting(*a, **k); import time; time.sleep(60)\n"
        "export.torch.onnx.export = slow\n"
        "from advkd.pipeline.cli.export import main\n"
        f"sys.argv = ['advkd-export', {str(trained / 'runs/toy')!r}, '--onnx', 'x.onnx']\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 130 and time.monotonic() - started < 50, errors
    assert errors.strip().startswith("stopped. To start again: advkd-export")
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert not [path for path in temporary.iterdir() if path.is_file() or any(path.rglob("*.onnx"))]


@pytest.fixture
def as_digits(trained: Path, tmp_path: Path) -> Path:
    """That folder under the names that the documents use."""
    for source, target in (("runs/toy", "runs/digits"), ("cache/toy.zarr", "cache/digits.zarr")):
        shutil.copytree(trained / source, tmp_path / target)
    shutil.copytree(trained / "classifier", tmp_path / "teachers/digits/classifier")
    return tmp_path


def test_the_readmes_way_to_use_a_student(invoke: Invoke, as_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands and Python literally, on a small run, with a Hub on loopback."""
    monkeypatch.setattr("advkd.stages.evaluate.config.FULL_SET_SIZE", 64)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    names: dict[str, Any] = {}
    (example,) = python_blocks(below(TEXT, "Use the student"))
    exec(example, names)
    assert len(names["images"]) == 4 and names["same"].shape == (2, 8, 8, 1)
    with model_hub(as_digits / "hub") as (address, commits):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        (commands,) = readme_commands("Use the student")
        for command in commands:
            name, *arguments = shlex.split(command)
            result = invoke(export_command, *arguments)
            assert name == "advkd-export" and result.exit_code == 0, f"{command}: {result.output}"
        assert result.output.splitlines()[-1].startswith(f"{address}/me/digits-one-pass/commit/") and len(commits) == 1
    assert (as_digits / "hub/me/digits-one-pass/model.safetensors").is_file()
    exec(example.replace('"runs/digits"', '"digits.onnx"'), names)
    np.testing.assert_allclose(names["pipe"](seeds=[0, 1], output_type="np").images, names["same"], atol=1e-4)


def test_the_students_page_runs(invoke: Invoke, as_digits: Path) -> None:
    write_store(as_digits / "cache/digits-classes.zarr", condition=CLASSES)
    train(as_digits / "cache/digits-classes.zarr", CONFIG, as_digits / "runs/digits-classes")
    ((command,),) = commands_below(STUDENTS, "Classes, prompts and latents")
    result = invoke(sample_command, *shlex.split(command)[1:])
    assert result.exit_code == 0 and Path("digits.png").is_file(), result.output
    names: dict[str, Any] = {}
    for block in python_blocks(STUDENTS):
        exec(block, names)
    assert names["x_0"].shape == (2, 1, 8, 8) and len(names["states"]) == 2
    assert len(names["sevens"]) == len(names["own"]) == 2
    assert sorted(path.name for path in Path("digits-one-pass").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "provenance.json",
    ]  # fmt: skip
    listed = set(re.findall(r"^\| `([\w.]+)` \|", STUDENTS, flags=re.MULTILINE))
    assert listed == {path.name for path in Path("digits-one-pass").iterdir()}
    told = set(json.loads(Path("digits-one-pass/config.json").read_text()))
    assert told == {"format", "student", "geometry"} and all(f"`{key}`" in STUDENTS for key in told)
    flags = {flag for parameter in export_command.params for flag in parameter.opts}
    flags |= {option for item in sample_command.params for option in item.opts}
    assert set(re.findall(r"`(--[\w-]+)", STUDENTS)) <= flags
