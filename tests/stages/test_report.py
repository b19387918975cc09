"""The report: everything of a run in one file, and runs side by side, with nothing compared that can't be."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from advkd.cache.errors import TrainingError, UsageError
from advkd.pipeline.cli.report import main as report_command
from advkd.pipeline.config import load_experiment
from advkd.stages.pictures import save_rows
from advkd.stages.report.runs import read_runs, table_lines
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.run import Run
from advkd.stages.student.student import weights_sha256
from advkd.stages.student.train import train
from tests.browser import errors, open_browser, require_browser, set_device
from tests.conftest import Invoke
from tests.stores import write_store

LADDER = Path("configs/ablation")


def write_scores(run: Path, distances: list[float], **protocol: Any) -> Path:
    value = {
        "student": {"cache": {"fingerprint": "ab" * 32}},
        "protocol": {"features": "small-cnn", "num_sets": 3, "set_size": 64, "num_reference": 900} | protocol,
        "held_out_mse": 0.0123,
        "samplers": {"student": {"frechet": distances}, "teacher (ddim 50)": {"frechet": [3.0, 4.0, 5.0]}},
        "cost": {
            "student": {"num_parameters": 1500, "deployed_parameters": 1234, "macs": 2.5e6, "latency": {"1": 0.001}},
            "teacher": None,
        },
    }
    (run / "evaluation").mkdir(parents=True)
    (run / "evaluation/scores.json").write_text(json.dumps(value))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trained runs with scores that somebody made up, and one picture."""
    home = tmp_path_factory.mktemp("home")
    write_store(home / "toy.zarr", "0:128")
    made = []
    for name, width, gain in (("narrow", 8, 0.0), ("wide <b>", 16, -1.0)):
        run = home / name
        student = StudentConfig(width=width, depth=1, attention=False)
        train(home / "toy.zarr", TrainConfig(student=student, steps=4, batch_size=16, preview_every=2), run)
        write_scores(run, [10.0 + gain, 20.0 + gain, 30.1 + gain])
        path = run / "evaluation/scores.json"
        value = json.loads(path.read_text())
        for row, shares in zip(value["samplers"].values(), ([0.25, 0.75], [0.5, 0.5]), strict=True):
            row |= {"class_shares": shares, "class_frechet": {"0": 4.5, "1": None}}
        value |= {"student": Run(run).read()["identity"], "weights_sha256": weights_sha256(run / "student")}
        path.write_text(json.dumps(value))
        path = run / "student/provenance.json"
        known = json.loads(path.read_text())
        known["teacher"] |= {"class_names": {"0": "faces"}, "attribution": "drawn by somebody"}
        path.write_text(json.dumps(known))
        save_rows(run / "evaluation/samples.png", {"student": np.zeros((2, 1, 8, 8))})
        made.append(run)
    return made


class Page(HTMLParser):
    """The tags of a page, all of which are closed, with its texts and pictures."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts += [data.strip()] if data.strip() else []


def test_a_report_holds_everything(runs: list[Path], invoke: Invoke) -> None:
    result = invoke(report_command, runs[0], "--out", "sent/report.html")
    assert result.exit_code == 0 and result.output == "look: sent/report.html\n"
    text = Path("sent/report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and all(source.startswith("data:image/") for source in page.sources)
    assert len(page.sources) == 4  # samples, curves, two previews
    assert {"narrow", "20.0 ± 10.1", "teacher (ddim 50)", "1,234", "training steps", "step 4"} <= set(page.texts)
    assert any("width: 8" in found for found in page.texts)  # the configuration
    first = page.texts.index("faces")
    assert page.texts[first : first + 5] == ["faces", "25.0 %", "50.0 %", "4.5", "4.5"]
    assert page.texts[first + 5 : first + 10] == ["1", "75.0 %", "50.0 %", "–", "–"]
    assert "drawn by somebody" in page.texts
    assert invoke(report_command, runs[0], "--out", "again.html").exit_code == 0
    assert Path("again.html").read_text() == text


def test_several_runs_are_compared(runs: list[Path], invoke: Invoke) -> None:
    result = invoke(report_command, *runs)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[:-1] == table_lines(read_runs(runs)) and lines[-1] == "look: report.html"
    page = Page(Path("report.html").read_text())
    assert "b" not in page.tags and "wide <b>" in page.texts and "-1.0 [-1.0, -1.0]" in page.texts
    changed = page.texts.index("What differs in the configurations")
    assert page.texts[changed + 4 : changed + 7] == ["student.width", "8", "16"]


def test_a_browser_shows_it_without_complaint(runs: list[Path], invoke: Invoke) -> None:
    require_browser()
    assert invoke(report_command, *runs).exit_code == 0
    with open_browser() as driver:
        for width, scheme in ((390, "light"), (1280, "dark")):
            set_device(driver, width, 844, scheme)
            driver.get(Path("report.html").absolute().as_uri())
            style = "const style = getComputedStyle(document.body); return style.backgroundColor"
            assert (driver.execute_script(style) == "rgb(255, 255, 255)") == (scheme == "light")
            assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
            shown = "return Array.from(document.images).every((image) => image.complete && image.naturalWidth > 0)"
            assert driver.execute_script(shown)
        assert errors(driver) == []


def test_differences_are_paired(tmp_path: Path) -> None:
    """Sets differ by far more than the runs do, and still the second is ahead."""
    one = write_scores(tmp_path / "one", [10.0, 20.0, 30.0])
    two = write_scores(tmp_path / "two", [8.9, 19.0, 29.1])
    first, second = read_runs([one, two])
    assert first.gain is None and second.gain is not None
    assert second.gain.mean == pytest.approx(-1.0)
    assert second.gain.excludes_zero
    lines = table_lines([first, second])
    assert "| one | 20.0 ± 10.0 |  | 0.0123 | 1,234 | 2.5 |" in lines
    assert "| two | 19.0 ± 10.1 | -1.0 [-1.2, -0.8] | 0.0123 | 1,234 | 2.5 |" in lines
    assert "| the teacher itself | 4.0 ± 1.0 |  |  |  |  |" in lines


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    one = write_scores(tmp_path / "one", [1.0, 2.0, 3.0])
    other = write_scores(tmp_path / "other", [1.0, 2.0, 3.0], set_size=128)
    with pytest.raises(UsageError, match=r"one and .*other .*\(set_size: 64 → 128\)"):
        read_runs([one, other])
    otherwise = write_scores(tmp_path / "otherwise", [1.0, 2.0, 3.0], features_sha256="ab" * 32)
    with pytest.raises(UsageError, match="features_sha256: "):
        read_runs([one, otherwise])
    (other / "student").mkdir()
    (other / "student/model.safetensors").write_bytes(b"weights of a later step")
    with pytest.raises(TrainingError, match=r"other .*`advkd-evaluate --run .*other"):
        read_runs([other])
    with pytest.raises(TrainingError, match=r"none was not evaluated .*`advkd-evaluate --run"):
        read_runs([tmp_path / "none"])
    again = write_scores(tmp_path / "again", [1.0, 2.0, 3.0], seed=1)
    with pytest.raises(UsageError, match="seed: 0 → 1"):
        read_runs([one, again])
    for malformed in ('{"protocol": 3}', "[]", '{"protocol": [], "samplers": []}'):
        (one / "evaluation/scores.json").write_text(malformed)
        with pytest.raises(TrainingError, match="is not what advkd-evaluate writes"):
            read_runs([one])
    (other / "evaluation/scores.json").write_text("[]")
    with pytest.raises(TrainingError, match="is not what advkd-evaluate writes"):
        read_runs([other])


def test_caches_are_compared_by_another_command(tmp_path: Path, invoke: Invoke) -> None:
    for name in ("a.zarr", "b.zarr"):
        write_store(tmp_path / name, "0:16")
    result = invoke(report_command, "a.zarr", "b.zarr")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "a.zarr is a trajectory cache" in result.stderr and "advkd-cache diff" in result.stderr


def test_every_rung_of_the_ladder_trains(tmp_path: Path) -> None:
    """Each says one thing more than the one before; a few steps of each on a tiny cache."""
    store = tmp_path / "toy.zarr"
    write_store(store, "0:128")
    ladder = yaml.safe_load((LADDER / "dvc.yaml").read_text())["stages"]
    rungs = ladder["train"]["matrix"]["rung"]
    assert rungs == ladder["evaluate"]["matrix"]["rung"] == sorted(path.stem for path in LADDER.glob("[0-9]*.yaml"))
    for rung in rungs:
        assert f"runs/ablation/{rung} " in ladder["compare"]["cmd"]
        assert f"runs/ablation/{rung}/evaluation" in ladder["compare"]["deps"]
        experiment = load_experiment(LADDER / f"{rung}.yaml")
        assert experiment.name == f"ablation-{rung}"
        settings = dataclasses.replace(experiment.train, seeds=None)
        assert train(store, settings, tmp_path / rung, max_steps=2).step == 2
