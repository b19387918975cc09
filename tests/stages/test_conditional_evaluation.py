"""Evaluation of students with classes and latents: labels by the rule, guided samplers, decoded images."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from advkd.cache.format.condition import ClassCondition
from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.evaluate_tables import print_evaluation
from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.evaluate.evaluate import evaluate
from advkd.stages.evaluate.measure import make_reference, measure
from advkd.stages.evaluate.results import write_results
from advkd.stages.evaluate.samplers import Sampler, all_samplers, student_sampler, teacher_sampler, told_fresh
from advkd.stages.evaluate.scores import Evaluation
from advkd.stages.metrics.classes import ASKED_CLASS, agreement
from advkd.stages.metrics.classifier import SmallClassifier, save_classifier
from advkd.stages.metrics.features import FeatureNetwork, Look
from advkd.stages.metrics.frechet import MIN_PER_DIMENSION, frechet_by_class
from advkd.stages.metrics.table import ScoreTable
from advkd.stages.reporter import SilentReporter
from advkd.stages.student.run import Run
from advkd.stages.student.student import load_student, noise_of
from advkd.stages.student.train import train
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.path.solver_path import SolverPath
from tests.stages.teachers import IMAGENET, save_conditional, save_dit
from tests.stages.test_conditional_students import SHORT

GUIDED = SamplerConfig(steps=4, guidance=2.0)


def made(folder: Path, teacher: TeacherConfig, labels: str | list[int] = "all") -> tuple[Path, Path]:
    """A cache of 64 seeds and a run of six steps."""
    config = CacheConfig(seeds="0:64", block_size=16, batch_size=16, record=2, labels=labels, accept_range=True)
    build(make_plan(teacher, GUIDED, config, folder / "a.zarr"))
    train(folder / "a.zarr", SHORT, folder / "run")
    return folder / "a.zarr", folder / "run"


def classifier(folder: Path, channels: int, size: int, num_classes: int = 4) -> str:
    torch.manual_seed(5)
    save_classifier(folder / "classifier", SmallClassifier(channels, size, num_classes), {"held_out_accuracy": 0.5})
    return str(folder / "classifier")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, TeacherConfig, Evaluation]:
    folder = tmp_path_factory.mktemp("classes")
    teacher = TeacherConfig(source=str(save_conditional(folder / "teacher", prediction_type="sample")), null_class=3)
    store, run = made(folder, teacher)
    config = EvaluateConfig(features=classifier(folder, 1, 8), num_sets=2, set_size=24, solver_steps=[2], batch_size=16)
    # The null class comes from the recipe, wherever the teacher's configuration comes from.
    evaluation = evaluate(run, store, config, teachers=[replace(teacher, null_class=None)], require_teacher=True)
    return store, run, teacher, evaluation


def test_the_teachers_own_row_is_what_the_cache_would_hold(
    classes: tuple[Path, Path, TeacherConfig, Evaluation],
) -> None:
    store, _, config, _ = classes
    cache = TrajectoryCache.open(store)
    teacher = load_teacher(config, torch.device("cpu"))
    sampler = teacher_sampler("teacher", teacher, SolverPath.recorded(cache.recipe), cache.recipe, "float16")
    assert sampler.generate is not None
    drawn = sampler.generate(range(16)).numpy().astype(np.float16)
    np.testing.assert_array_equal(drawn, cache.rows(4, range(16)))


def test_guided_evaluations_count_twice(classes: tuple[Path, Path, TeacherConfig, Evaluation]) -> None:
    store, run, _, evaluation = classes
    assert [row.evaluations for row in evaluation.table.rows] == [1, 8, 4, 4]
    cache, (student, geometry) = TrajectoryCache.open(store), load_student(Run(run).student)
    unmeasured = all_samplers(
        student_sampler(student, geometry, told_fresh(cache, geometry)), None, cache.recipe, "float16", [2], print
    )
    assert [row.evaluations for row in unmeasured] == [1, 8, 4, 4]


def test_students_draw_the_labels_of_the_rule(classes: tuple[Path, Path, TeacherConfig, Evaluation]) -> None:
    store, run, _, _ = classes
    cache = TrajectoryCache.open(store)
    assert cache.recipe.condition == ClassCondition(num_classes=4, labels=(0, 1, 2), guidance=2.0, null_class=3)
    student, geometry = load_student(Run(run).student)
    for name, parameter in student.named_parameters():
        if "film" in name:  # after six steps labels would hardly change a thing
            torch.nn.init.normal_(parameter)
    sampler = student_sampler(student, geometry, told_fresh(cache, geometry))
    assert sampler.generate is not None
    seeds = range(1 << 40, (1 << 40) + 6)
    noise, labels = noise_of(geometry, seeds), torch.tensor([seed % 3 for seed in seeds])
    drawn = sampler.generate(seeds)
    torch.testing.assert_close(drawn, student(noise, labels))
    assert (drawn - student(noise, labels.roll(1))).abs().amax((1, 2, 3)).min() > 1e-3


def test_asked_classes_are_scored_beside_the_teachers(
    classes: tuple[Path, Path, TeacherConfig, Evaluation],
) -> None:
    store, run, _, evaluation = classes
    for row in evaluation.table.rows:
        assert len(row.values[ASKED_CLASS.name]) == 2
        assert all(0.0 <= value <= 1.0 for value in row.values[ASKED_CLASS.name])
    write_results(run / "evaluation", evaluation, TrajectoryCache.open(store))
    written = json.loads((run / "evaluation/scores.json").read_text())["samplers"]
    student, teacher, *others = (written[row.name] for row in evaluation.table.rows)
    assert student["scores"][ASKED_CLASS.name]["student_minus_this"] is None
    gap = teacher["scores"][ASKED_CLASS.name]["student_minus_this"]
    pairs = zip(student["scores"][ASKED_CLASS.name]["sets"], teacher["scores"][ASKED_CLASS.name]["sets"], strict=True)
    assert gap["mean"] == pytest.approx(np.mean([mine - theirs for mine, theirs in pairs]))
    assert gap["low"] <= gap["mean"] <= gap["high"]
    # 16 images of a class are too few for 64 features, which is said and not left out.
    assert student["class_frechet"] == teacher["class_frechet"] == {"0": None, "1": None, "2": None}
    assert not any("class_frechet" in row for row in others)
    assert (run / "evaluation/trajectory.png").is_file()


def test_agreement_is_with_the_label_that_was_asked() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]], dtype=np.float32)
    assert agreement(probabilities, np.array([0, 1, 1], dtype=np.int32)).tolist() == [1.0, 0.0, 1.0]


def test_the_terminal_says_which_classes_have_no_distance(
    classes: tuple[Path, Path, TeacherConfig, Evaluation], capsys: pytest.CaptureFixture[str]
) -> None:
    *_, evaluation = classes
    print_evaluation(evaluation)
    said = capsys.readouterr().out
    assert "asked class drawn" in said and "within each class: not measured" in said
    student, teacher, *others = evaluation.table.rows
    rows = [
        replace(student, class_frechet={"0": None, "1": 36.04}),
        replace(teacher, class_frechet={"0": None, "1": 7.0}),
        *others,
    ]
    print_evaluation(replace(evaluation, table=ScoreTable(rows=rows)))
    assert "0: – (–), 1: 36.0 (7.0)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_classes", "same"),
    [(50, False), (99, True), (100, True), (101, False)],
    ids=["fewer", "without the null row", "with it", "more"],
)
def test_only_a_classifier_of_the_teachers_classes_can_tell(num_classes: int, same: bool) -> None:
    """Labels in turn: some parts of a set would hold only labels that a classifier of fewer classes has, too."""
    condition = ClassCondition(num_classes=100, labels=tuple(range(99)), guidance=2.0, null_class=99)
    seen = torch.zeros(1, num_classes)
    seen[0, 0] = 1.0
    network = FeatureNetwork(
        name="sees class 0",
        network=torch.nn.Identity(),
        look=lambda images: Look(features=images.flatten(1), maps=[], probabilities=seen.expand(len(images), -1)),
    )
    sampler = Sampler(name="any", evaluations=1, generate=lambda seeds: torch.rand(len(seeds), 1, 2, 2))
    config = EvaluateConfig(num_sets=2, set_size=198, batch_size=8)
    reference = make_reference(network, [torch.rand(198, 1, 2, 2)], None, 2)
    (row,) = measure([sampler], network, reference, config, reporter=SilentReporter(), condition=condition).table.rows
    assert row.values.get(ASKED_CLASS.name) == (pytest.approx([2 / 198] * 2) if same else None)


def test_frechet_within_a_class_needs_enough_of_it() -> None:
    generator = np.random.default_rng(0)
    reference, labels = generator.normal(size=(120, 4)), np.repeat([0, 1], 60).astype(np.int32)
    moved = reference + np.where(labels == 1, 3.0, 0.0)[:, None]
    found = frechet_by_class(moved, labels, reference, labels)
    assert found == {0: pytest.approx(0.0, abs=1e-6), 1: pytest.approx(36.0)}
    few = MIN_PER_DIMENSION * 4 - 1
    kept = np.r_[0:few, 60:120]
    assert frechet_by_class(moved[kept], labels[kept], reference, labels) == {0: None, 1: found[1]}


def test_latents_of_every_sampler_are_decoded(tmp_path: Path) -> None:
    teacher = TeacherConfig(source=str(save_dit(tmp_path / "dit")))
    store, run = made(tmp_path, teacher, [1, 5])
    config = EvaluateConfig(
        features=classifier(tmp_path, 3, 8, IMAGENET), num_sets=2, set_size=16, solver_steps=[2], batch_size=16
    )
    evaluation = evaluate(run, store, config, teachers=[teacher], require_teacher=True)
    assert {tuple(images.shape[1:]) for images in evaluation.pictures.values()} == {(3, 8, 8)}
    assert evaluation.decoder is not None and evaluation.decoder.macs > 0
    assert all(ASKED_CLASS.name in row.values for row in evaluation.table.rows)
    write_results(run / "evaluation", evaluation, TrajectoryCache.open(store))
    assert "decoder" in json.loads((run / "evaluation/scores.json").read_text())["cost"]
