"""FID to published statistics: equal to what the saved images give, resumed to the same figure, refused by name."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkd.cache.errors import UsageError
from advkd.pipeline.cli.evaluate import main as evaluate_command
from advkd.stages.evaluate import fid as module
from advkd.stages.evaluate.config import FIRST_FRESH_SEED, EvaluateConfig
from advkd.stages.evaluate.fid import fid, measured_fid, read_statistics
from advkd.stages.metrics.classifier import SmallClassifier, save_classifier
from advkd.stages.metrics.frechet import Gaussian, frechet_distance
from advkd.stages.reporter import SilentReporter
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.pipeline import StudentPipeline
from advkd.stages.student.train import train
from tests.conftest import Invoke
from tests.stores import write_store

QUIET = SilentReporter()
NUM_SAMPLES = 200


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a run of two steps, a classifier, and statistics in its features."""
    folder = tmp_path_factory.mktemp("fid")
    write_store(folder / "a.zarr")
    settings = TrainConfig(student=StudentConfig(width=4), batch_size=4, steps=2)
    train(folder / "a.zarr", settings, folder / "run")
    torch.manual_seed(0)
    save_classifier(folder / "classifier", SmallClassifier(1, 8, 10), {})
    features = np.random.default_rng(0).normal(size=(300, 64))
    np.savez(folder / "published.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    return folder


def settings(place: Path, batch_size: int = 32) -> EvaluateConfig:
    return EvaluateConfig(features=str(place / "classifier"), batch_size=batch_size)


def test_it_is_the_distance_of_the_images_that_the_student_would_save(place: Path) -> None:
    """Independently: PIL images of the pipeline, looked at by the classifier, all at once."""
    found = fid(
        place / "run", place / "a.zarr", place / "published.npz", settings(place), QUIET, num_samples=NUM_SAMPLES
    )
    seeds = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + NUM_SAMPLES)
    images = np.stack(
        [np.asarray(image) for image in StudentPipeline.from_pretrained(place / "run")(seeds=seeds).images]
    )
    network = module.load_features(settings(place), (1, 8, 8))
    with torch.no_grad():
        look = network.look(torch.from_numpy(images / np.float32(127.5) - np.float32(1.0))[:, None])
    statistics = np.load(place / "published.npz")
    wanted = Gaussian(mean=statistics["mu"], covariance=statistics["sigma"])
    assert found.value == pytest.approx(frechet_distance(Gaussian.fit(look.features.numpy()), wanted), rel=1e-4)
    said = json.loads((place / "run/evaluation/fid.json").read_text())
    assert (
        said["value"] == found.value and said["num_samples"] == NUM_SAMPLES and said["first_seed"] == FIRST_FRESH_SEED
    )
    assert len(said["statistics_sha256"]) == len(said["features_sha256"]) == len(said["weights_sha256"]) == 64
    assert not (place / "run/evaluation/fid").exists()


def test_a_stopped_run_goes_on_to_the_same_figure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 50)
    arguments: Any = (place / "run", place / "a.zarr", place / "published.npz", settings(place), QUIET)
    whole = fid(*arguments, num_samples=NUM_SAMPLES)
    write, made = module._write, []

    def stopped(path: Path, values: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        write(path, values)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            fid(*arguments, num_samples=NUM_SAMPLES)
    (torn,) = (place / "run/evaluation/fid").glob("*/00000050.npy")
    torn.write_bytes(torn.read_bytes()[:-100])
    again: list[str] = []

    def watched(path: Path, values: Any) -> None:
        again.append(path.name)
        write(path, values)

    monkeypatch.setattr(module, "_write", watched)
    assert fid(*arguments, num_samples=NUM_SAMPLES) == whole
    assert again == ["00000050.npy", "00000100.npy", "00000150.npy"]


def test_the_command_says_everything_that_the_figure_depends_on(place: Path, invoke: Invoke) -> None:
    given = ("--run", place / "run", "--cache", place / "a.zarr", "--features", place / "classifier")
    said = invoke(evaluate_command, *given, "--fid-statistics", place / "published.npz", "--fid-samples", "64")
    assert said.exit_code == 0, said.output
    for part in ("FID ", "published.npz (sha256 ", "64 images of 1×8×8", "rounded to 8 bits", "features small-cnn"):
        assert part in said.output
    found = measured_fid(place / "run")
    assert found is not None and str(found) in said.output
    (place / "run/evaluation/fid.json").write_text(json.dumps(asdict(found) | {"weights_sha256": "0" * 64}))
    assert measured_fid(place / "run") is None
    for wrong in (("--fid-samples", "64"), ("--fid-statistics", place / "published.npz", "--full")):
        refused = invoke(evaluate_command, *given, *wrong)
        assert refused.exit_code == 2 and refused.output.count("\n") == 1


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(64)},
        {"mu": np.zeros(64), "sigma": np.eye(63)},
        {"mu": np.full(64, np.nan), "sigma": np.eye(64)},
        {"mu": np.array([{}] * 64), "sigma": np.eye(64)},
    ],
)
def test_other_files_are_no_statistics(tmp_path: Path, arrays: Any) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=r"expected a \.npz file with mu and sigma"):
        read_statistics(tmp_path / "a.npz")


def test_statistics_of_other_features_are_refused(place: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UsageError, match="is of 2048 features, small-cnn has 64"):
        fid(place / "run", place / "a.zarr", tmp_path / "a.npz", settings(place), QUIET, num_samples=8)


def test_the_report_tells_the_figure(place: Path, invoke: Invoke) -> None:
    given = ("--run", place / "run", "--cache", place / "a.zarr", "--features", place / "classifier")
    assert (
        invoke(evaluate_command, *given, "--fid-statistics", place / "published.npz", "--fid-samples", "64").exit_code
        == 0
    )
    small = ("--set", "evaluate.set_size=8", "--sets", "2", "--set", "evaluate.real=null", "--no-teacher")
    assert invoke(evaluate_command, *given, *small).exit_code == 0
    assert f"{measured_fid(place / 'run')}." in (place / "run/evaluation/report.html").read_text()
