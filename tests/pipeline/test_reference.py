"""docs/configuration.md is what the dataclasses say, and `advkd-config` prints files that load and build."""

import dataclasses
from pathlib import Path

import pytest

from advkd.cache import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.config import main as config_command
from advkd.pipeline.cli.train import main as train_command
from advkd.pipeline.config import Experiment, load_experiment, shipped_experiments
from advkd.pipeline.reference import keys_of, markdown
from advkd.stages.student.progressive.network import upsampling_submodules
from advkd.stages.teacher.config import recorded_steps
from tests.conftest import ROOT, Invoke


def test_the_page_is_up_to_date() -> None:
    """If not: `python -m advkd.pipeline.reference > docs/configuration.md`."""
    assert (ROOT / "docs/configuration.md").read_text() == markdown()


def test_every_key_stands_on_the_page_with_its_meaning() -> None:
    pending, page = [("", Experiment)], markdown()
    while pending:
        path, section = pending.pop()
        assert not path or f"\n## {path}\n" in page
        for item, key in zip(dataclasses.fields(section), keys_of(section), strict=True):
            assert item.name == key.name and f"| `{key.name}` | " in page
            assert key.meaning and "|" not in key.kind + key.meaning, f"{path}.{key.name} has no docstring for a table"
            if key.section is not None:
                pending.append((f"{path}.{key.name}".lstrip("."), key.section))


@pytest.mark.parametrize("name", shipped_experiments())
def test_a_template_is_the_experiment_it_was_printed_from(invoke: Invoke, name: str) -> None:
    for flags in ((), ("--small",)):
        result = invoke(config_command, name, *flags)
        Path("mine.yaml").write_text(result.output)
        assert result.exit_code == 0 and (load_experiment("mine.yaml") == load_experiment(name)) == (not flags)


def test_a_renamed_template_makes_its_own_teacher(invoke: Invoke) -> None:
    Path("mine.yaml").write_text(invoke(config_command, "digits", "--name", "mine").output)
    mine, digits = load_experiment("mine.yaml"), load_experiment("digits")
    assert mine.teacher.source == "teachers/mine/pipeline" and mine.evaluate.features == "teachers/mine/classifier"
    assert mine.name == "mine" and (mine.pretrain, mine.train) == (digits.pretrain, digits.train)
    assert "teachers/mine/" not in invoke(config_command, "mnist-small", "--name", "mine").output


def test_a_small_template_builds_and_trains(invoke: Invoke, pipeline_folder: Path) -> None:
    seeds = ("--set", "cache.seeds=16:32", "--set", f"teacher.source={pipeline_folder}")
    Path("mine.yaml").write_text(invoke(config_command, "cifar10", "--name", "mine", "--small", *seeds).output)
    assert invoke(cache_command, "build", "--config", "mine.yaml").exit_code == 0
    assert TrajectoryCache.open("cache/mine.zarr").blocks == (0,)
    result = invoke(train_command, "--config", "mine.yaml", "--cache", "cache/mine.zarr", "--max-steps", 2)
    assert result.exit_code == 0 and "step 2 of 200" in result.output


def test_the_small_progressive_template_records_enough_states(invoke: Invoke) -> None:
    Path("mine.yaml").write_text(invoke(config_command, "celebahq256", "--small").output)
    mine = load_experiment("mine.yaml")
    assert mine.train.student.kind == "progressive"
    num_submodules = len(recorded_steps(mine.cache.record, mine.sampler.steps)) - 1
    assert len(upsampling_submodules(num_submodules, 256)) == 6


def test_text_of_any_characters_survives_a_template(invoke: Invoke) -> None:
    strange = 'C:\\a "b" – ü: #c'
    Path("mine.yaml").write_text(invoke(config_command, "digits", "--set", f"evaluate.features={strange}").output)
    assert load_experiment("mine.yaml").evaluate.features == strange


def test_mistakes_leave_an_error_and_no_template(invoke: Invoke) -> None:
    for flags in (("nowhere",), ("digits", "--set", "train.stepz=1"), ("digits", "--name", "../x")):
        result = invoke(config_command, *flags)
        assert (result.exit_code, result.stdout, result.stderr[:7]) == (2, "", "error: ")
