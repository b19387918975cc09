"""`advkd-cache advise`: which solver in how many steps, told from pairs of images."""

import json
from pathlib import Path

import numpy as np
import pytest

from advkd.pipeline.cli.cache import main as cache_command
from advkd.stages.evaluate import advise as module
from advkd.stages.evaluate.advise import Tried, advise
from advkd.stages.metrics.classifier import SmallClassifier, save_classifier
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from tests.conftest import Invoke
from tests.stages.teachers import save_conditional

CACHE = CacheConfig(seeds="0:64", block_size=16, record=2)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to see them converge."""
    monkeypatch.setattr(module, "STEPS", (2, 5, 20))
    monkeypatch.setattr(module, "REFERENCE_STEPS", 50)


def plan_of(folder: Path, tmp_path: Path, sampler: SamplerConfig, null_class: int | None = None) -> Plan:
    return make_plan(TeacherConfig(source=str(folder), null_class=null_class), sampler, CACHE, tmp_path / "none.zarr")


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that predicts x_0, whose paths are smooth although its weights are random."""
    return save_conditional(tmp_path_factory.mktemp("smooth"), prediction_type="sample")


def test_errors_fall_with_steps_and_the_cheapest_within_tolerance_is_named(smooth: Path, tmp_path: Path) -> None:
    plan = plan_of(smooth, tmp_path, SamplerConfig(steps=20))
    advice = advise(plan, 4, None, tmp_path / "advice", SilentReporter())
    by = {(one.name, one.steps): one for one in advice.tried}
    assert {name for name, _ in by} == {"ddim", "euler", "dpmsolver++", "unipc", "heun"}
    for name in ("ddim", "dpmsolver++", "euler"):
        assert by[name, 20].error < by[name, 5].error < by[name, 2].error
    assert by["heun", 5].evaluations == 9
    assert advice.tolerance == by["ddim", 20].error
    assert advice.enough is not None and advice.enough.evaluations <= 20
    cheaper = [one for one in advice.tried if one.evaluations < advice.enough.evaluations]
    assert all(one.error > advice.tolerance for one in cheaper)
    assert advice.plot.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none.zarr").exists()


def test_an_interrupted_call_goes_on(smooth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(smooth, tmp_path, SamplerConfig(steps=20))
    folder, solved = tmp_path / "advice", []
    solve = module._Trial._solve

    def counted(self: module._Trial, path: object) -> object:
        solved.append(path)
        if len(solved) == 5:
            raise KeyboardInterrupt
        return solve(self, path)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Trial, "_solve", counted)
    with pytest.raises(KeyboardInterrupt):
        advise(plan, 4, 0.1, folder, SilentReporter())
    known = json.loads((folder / module.KNOWN).read_text())["tried"]
    assert len(known) == 3  # the reference is no row
    again = advise(plan, 4, 0.1, folder, SilentReporter())
    assert len(solved) == 5 + len(again.tried) - 3
    assert {name: Tried(**one) for name, one in known.items()}.items() <= {
        f"{one.name} {one.steps}": one for one in again.tried
    }.items()
    advise(plan, 3, 0.1, folder, SilentReporter())  # other seeds: nothing of it holds
    assert np.load(folder / module.REFERENCE).shape[0] == 3


def test_guidance_counts_twice(smooth: Path, tmp_path: Path) -> None:
    plan = plan_of(smooth, tmp_path, SamplerConfig(steps=5, guidance=2.0), null_class=3)
    advice = advise(plan, 2, 10.0, tmp_path / "advice", SilentReporter())
    assert {one.evaluations for one in advice.tried if one.name == "ddim"} == {4, 10, 40}


def test_the_command_prints_a_table_and_yaml(smooth: Path, tmp_path: Path, invoke: Invoke) -> None:
    common = (cache_command, "advise", "--teacher", smooth, "--num", 2, "--set", "pretrain=null", "--set")
    said = invoke(*common, "sampler.steps=20")
    assert said.exit_code == 0, said.output
    assert "cheapest within the tolerance" in said.output and "sampler:\n  name: " in said.output
    assert (tmp_path / "cache/digits.advice/advice.png").is_file()
    tight = invoke(*common, "sampler.steps=20", "--tolerance", 1e-9)
    assert "none is within 1e-09" in tight.output
    noisy = invoke(*common, "sampler.name=ddpm")
    assert "adds noise at each step" in noisy.output


def test_images_are_compared_by_features_where_asked(smooth: Path, tmp_path: Path, invoke: Invoke) -> None:
    save_classifier(tmp_path / "classifier", SmallClassifier(1, 8, 10), {})
    common = (cache_command, "advise", "--teacher", smooth, "--num", 8, "--set", "pretrain=null", "--out", "advice")
    said = invoke(*common, "--features", "classifier")
    assert said.exit_code == 0, said.output
    assert "error   Fréchet   " in said.output
    tried = json.loads(Path("advice/tried.json").read_text())["tried"]
    assert tried["ddim 20"]["frechet"] < tried["ddim 5"]["frechet"] < tried["ddim 2"]["frechet"]
    assert "Fréchet" not in invoke(*common).output
    assert json.loads(Path("advice/tried.json").read_text())["tried"]["ddim 20"]["frechet"] is None
    wrong = invoke(*common, "--features", "inception")
    assert wrong.exit_code == 2 and "needs colour images" in wrong.output
