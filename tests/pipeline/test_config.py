"""Configurations: shipped ones load, mistakes are named with the nearest right answer."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from advkd.cache.errors import ConfigError, UsageError
from advkd.pipeline.config import Experiment, default_settings, from_dict, load_experiment, shipped_experiments
from advkd.pipeline.experiment import needs_pretraining, parse_record, with_flags
from advkd.stages.student.config import TrainConfig
from tests.conftest import ROOT

MINIMAL = {"name": "x", "teacher": {"source": "somewhere"}}


def test_all_of_them_ship_and_load() -> None:
    shipped = [
        "celebahq256",
        "cifar10",
        "digits",
        "digits-classes",
        "digits-flow",
        "digits-long",
        "digits-small",
        "emoji",
        "emoji-latent",
        "emoji-names",
        "mnist",
        "mnist-progressive",
        "mnist-small",
        "smoke",
    ]
    assert shipped_experiments() == shipped
    for name in shipped_experiments():
        experiment = load_experiment(name)
        assert from_dict(Experiment, dataclasses.asdict(experiment), "again") == experiment
    assert load_experiment(None).name == "digits"


def test_paths_work_outside_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cifar = load_experiment("configs/cifar10.yaml")
    assert (cifar.name, cifar.teacher.source, cifar.cache.seeds) == ("cifar", "google/ddpm-cifar10-32", "0:50000")
    assert cifar.sampler.steps == 1000
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/cifar10.yaml").write_text("name: mine\nteacher: {source: a/b}\n")
    assert load_experiment("configs/cifar10.yaml").name == "mine"


def test_the_references_setting_is_as_published() -> None:
    celeba = load_experiment("celebahq256")
    assert celeba.sampler.name == "ddpm"
    assert celeba.cache.record == [0, 1, *range(101, 1000, 100), 1000]
    assert celeba.train.stages.epochs == list(range(10, 120, 10))
    assert celeba.train.stages.batch_sizes == [64] * 8 + [32, 16, 16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smapler": {}}, "unknown key 'smapler'; did you mean 'sampler'"),
        ({"cache": {"block-size": 4}}, "cache: unknown key 'block-size'; did you mean 'block_size'"),
        ({"cache": {"block_size": "many"}}, 'file.yaml: cache.block_size: expected int, found "many"'),
        ({"cache": {"record": "all"}}, 'cache.record: expected int or a list, found "all"'),
        ({"cache": {"block_size": True}}, "expected int, found true"),
        ({"cache": {"block_size": 0}}, "file.yaml: cache.block_size: 0 is not positive"),
        ({"cache": {"dtype": "int8"}}, "'int8' is none of float16, float32"),
        ({"sampler": {"spacing": "even"}}, "'even' is none of trailing"),
        ({"sampler": {"eta": 1.0, "name": "euler"}}, "of ddim only"),
        ({"train": {"student": {"kind": "progressive"}, "compile": True}}, "don't apply to student.kind progressive"),
        ({"train": {"student": {"kind": "big"}}}, "'big' is none of unrolled, teacher, progressive"),
        ({"train": {"student": {"depth": 0}}}, "leave no blocks"),
        ({"train": {"ema": 1.0}}, r"in \[0, 1\)"),
        ({"train": {"objective": {"adversarial": {"start": 2}}}}, "no fraction"),
        ({"train": {"objective": {"adversarial": {"loss": "wasserstein"}}}}, "'wasserstein' is none of relativistic"),
        ({"train": {"batch_size": 10, "accumulate": 4}}, "4 doesn't divide train.batch_size 10"),
        ({"evaluate": {"num_sets": 1}}, "at least 2"),
        ({"pretrain": {"data": "cats"}}, "known are digits, mnist"),
        ({"teacher": "a/b"}, "teacher: expected keys and values"),
        ({"name": "../x"}, "can't name files"),
        ({"name": ".."}, "can't name files"),
        ({"train": {"learning_rate": float("nan")}}, "expected a finite number"),
        ({"train": {"learning_rate": -1}}, "learning rates must be positive"),
        ({"train": {"seed": -1}}, "seed: -1 is not in"),
        ({"train": {"mixed_precision": "fp8"}}, "'fp8' is none of no, bf16, fp16"),
        ({"train": {"stages": {"betas": [2, 0.9]}}}, "two numbers in"),
        ({"train": {"objective": {"head_target": "x1"}}}, "'x1' is none of jump, x0"),
        ({"pretrain": {"channels": [10]}}, "multiples of 8"),
        ({"pretrain": {"channels": [16, 8]}}, "expected 16 or more"),
        ({"pretrain": {"classifier": {"held_out": 0}}}, "held_out in"),
        ({"xyzzy": 1}, "known are name, pretrain, teacher"),
        ({"train": {"stages": {"betas": [0.5, float("inf")]}}}, r"train.stages.betas\[1\]: expected a finite number"),
        ({"train": {"learning_rate": "1e-3"}}, 'found "1e-3": write 1.0e-3'),
        ({"train": {"learning_rate": "2E3"}}, "write 2.0e\\+3"),
        ({"train": {"steps": "1e3"}}, 'expected int, found "1e3": write 1000'),
        ({"train": {"steps": 2.0}}, "expected int, found 2.0: write 2"),
        ({"cache": {"seeds": 992}}, "found 992: quote it; unquoted, YAML reads 16:32 as 992"),
        ({"name": 123}, "expected text, found 123: quote it$"),
        ({"train": {"steps": None}}, "expected int, found null$"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Experiment, MINIMAL | change, "file.yaml")


def test_what_the_hints_say_to_write_loads(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    text = "name: x\nteacher: {source: s}\ncache: {seeds: %s}\ntrain: {learning_rate: %s}\n"
    for seeds, rate in (("16:32", "1.0e-3"), ('"16:32"', "1e-3")):
        path.write_text(text % (seeds, rate))
        with pytest.raises(ConfigError, match=f"{path}: .* found "):
            load_experiment(path)
    path.write_text(text % ('"16:32"', "1.0e-3"))
    experiment = load_experiment(path)
    assert (experiment.cache.seeds, experiment.train.learning_rate) == ("16:32", 1e-3)


def test_integers_become_the_floats_that_are_asked_for() -> None:
    """As provenance and identity write them."""
    train = from_dict(Experiment, MINIMAL | {"train": {"learning_rate": 1}}, "file.yaml").train
    assert repr(train.learning_rate) == "1.0"


def test_json_files_load_too(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(MINIMAL | {"train": {"learning_rate": 1e-7}}))
    assert load_experiment(path).train.learning_rate == 1e-7
    path.write_text("name: x\n")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_experiment(path)


def test_overrides_do_what_editing_the_file_does(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    values = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    values["train"]["steps"] = 500
    values["train"]["objective"]["adversarial"] = {"weight": 0}
    values["cache"] |= {"seeds": "0:64", "record": [0, 10, 50]}
    values["teacher"]["revision"] = "main"
    values["evaluate"]["real"] = None
    values["pretrain"] = {"learning_rate": 1e-4}
    path.write_text(yaml.safe_dump(values))
    overrides = [
        "train.steps=500", "train.objective.adversarial=null", "train.objective.adversarial.weight=0",
        "cache.seeds=0:64", "cache.record=[0, 10, 50]", "teacher.revision=main", "evaluate.real=null",
        "pretrain=null", "pretrain.learning_rate=1e-4",
    ]  # fmt: skip
    assert load_experiment("digits", overrides) == load_experiment(path)
    assert load_experiment("digits", []) == load_experiment("digits")
    assert default_settings(["train.steps=5"]).train == TrainConfig(steps=5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", "digits with --set train.stepz=5: train: unknown key 'stepz'; did you mean 'steps'"),
        ("trian.steps=5", "unknown key 'trian'; did you mean 'train'"),
        ("train.steps=many", 'train.steps: expected int, found "many"'),
        ("train.states=0,50", r'found "0,50": write \[0,50\]'),
        ("train.steps=0", "train.steps: 0 is not positive"),
        ("train.ema=NaN", "train.ema: expected a finite number"),
        ("name.x=1", 'name holds "digits", no keys'),
        ("train.steps", "expected KEY=VALUE, such as"),
        ("=3", "expected KEY=VALUE, such as"),
    ],
)
def test_mistaken_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment("digits", [override])


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, message in (
        ("a: [", "not YAML"),
        ("[" * 20_000, "not YAML"),
        ("- 1", "expected keys"),
        ("name: x", "'teacher' is missing"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_experiment(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="can't be read"):
        load_experiment(path)
    with pytest.raises(ConfigError, match=r"no configuration .*nowhere.yaml: give a YAML .*, or one of celebahq256"):
        load_experiment(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("flags", "suffix"),
    [
        ({}, ""),
        ({"steps": 1000}, "-1000"),
        ({"steps": 50}, ""),
        ({"seeds": "0:64", "batch_size": 3, "device": "cpu"}, ""),
        ({"sampler": "euler", "steps": 20}, "-euler-20"),
        ({"teacher": "some/folder"}, "-folder"),
        ({"record": "10,20"}, "-record10_20"),
        ({"record": "7", "block_size": 32}, "-record7-block32"),
    ],
)
def test_a_flag_that_changes_the_recipe_gets_a_store_of_its_own(flags: dict[str, object], suffix: str) -> None:
    digits = load_experiment("digits")
    digits = dataclasses.replace(digits, teacher=dataclasses.replace(digits.teacher, revision="main"))
    changed, found = with_flags(digits, {"record": None, **flags})
    assert changed.teacher.revision == (None if "teacher" in flags else "main")
    assert found == suffix
    if "steps" in flags:
        assert changed.sampler.steps == flags["steps"]


def test_the_readmes_cifar_command_builds_the_configured_store() -> None:
    changed, suffix = with_flags(load_experiment("configs/cifar10.yaml"), {"steps": 1000})
    assert (str(changed.store), suffix) == ("cache/cifar.zarr", "")


def test_only_the_default_teacher_is_ever_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits = load_experiment("digits")
    assert needs_pretraining(digits)
    assert not needs_pretraining(with_flags(digits, {"teacher": "my/teacher"})[0])
    assert not needs_pretraining(load_experiment("cifar10"))
    (tmp_path / "teachers/digits/pipeline").mkdir(parents=True)
    assert not needs_pretraining(digits)


@pytest.mark.parametrize("text", ["x", "1,y", "", "1.5"])
def test_record_flags_that_are_no_numbers(text: str) -> None:
    with pytest.raises(UsageError, match="expected a number of states"):
        parse_record(text)
