"""Scores: against closed forms, against pytorch-fid, and honest about what was not measured."""

import dataclasses
import functools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.cache.errors import ConfigError, UsageError
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate import evaluate as evaluating
from advkd.stages.evaluate import networks
from advkd.stages.evaluate.config import MAX_SEED, EvaluateConfig
from advkd.stages.evaluate.cost import compare_costs, count_macs, interleaved_latency
from advkd.stages.evaluate.measure import fresh_seeds
from advkd.stages.evaluate.networks import load_features
from advkd.stages.evaluate.results import write_results
from advkd.stages.images.real import RealImages
from advkd.stages.metrics.classifier import SmallClassifier, save_classifier
from advkd.stages.metrics.features import see
from advkd.stages.metrics.frechet import Gaussian, frechet_distance
from advkd.stages.metrics.self_supervised import train_self_supervised
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.run import Run, split_seeds
from advkd.stages.student.sharing.export import FIRST_CHECK_SEED
from advkd.stages.student.student import load_student, weights_sha256
from advkd.stages.student.train import train
from tests.conftest import save_random_inception
from tests.stores import tree, write_store


def test_distance_of_known_gaussians() -> None:
    one = Gaussian(mean=np.array([0.0, 0.0]), covariance=np.diag([1.0, 4.0]))
    other = Gaussian(mean=np.array([3.0, 4.0]), covariance=np.diag([9.0, 1.0]))
    # ‖μ‖² = 25; (1 − 3)² + (2 − 1)² = 5 for commuting covariances.
    assert frechet_distance(one, other) == pytest.approx(30.0)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))


def test_distance_of_samples_converges_to_the_closed_form() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(200_000, 3)) * [1.0, 2.0, 3.0]
    second = generator.normal(size=(200_000, 3)) + 1.0
    expected = 3.0 + 0.0 + 1.0 + 4.0
    assert frechet_distance(Gaussian.fit(first), Gaussian.fit(second)) == pytest.approx(expected, rel=0.01)


def test_weights_undo_unequal_shares() -> None:
    generator = np.random.default_rng(0)
    rare, frequent = generator.normal(size=(2, 500, 3)) + np.array([[[0.0]], [[4.0]]])
    equal = Gaussian.fit(np.concatenate([rare, frequent]))
    unequal = np.concatenate([rare, frequent, frequent, frequent])
    weights = np.repeat([1.0, 1.0 / 3.0], [500, 1500])
    assert frechet_distance(Gaussian.fit(unequal), equal) > 3.0
    assert frechet_distance(Gaussian.fit(unequal, weights), equal) == pytest.approx(0.0, abs=1e-4)


def test_distance_agrees_with_pytorch_fid() -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance

    generator = np.random.default_rng(1)
    features = [generator.normal(size=(500, 16)) @ generator.normal(size=(16, 16)) for _ in range(2)]
    one, other = (Gaussian.fit(values) for values in features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytorch-fid calls SciPy's sqrtm in a way that is deprecated
        try:
            theirs = calculate_frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
        except (TypeError, ValueError):  # … and newer SciPy refuses: its formula, by hand
            from scipy import linalg

            root = linalg.sqrtm(one.covariance @ other.covariance).real
            theirs = np.sum((one.mean - other.mean) ** 2) + np.trace(one.covariance + other.covariance - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(float(theirs), rel=1e-6)


def test_costs_are_counted() -> None:
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert count_macs(lambda batch: layer(torch.zeros(batch, 3, 8, 8))) == 3 * 5 * 9 * 64
    latency = interleaved_latency({"a": lambda batch: torch.zeros(batch)}, 4)
    assert latency["a"] > 0.0
    student = compare_costs(layer, None, (3, 8, 8), large_batch=2)["student"]
    assert set(student.latency) == {1, 2} and student.macs == 3 * 5 * 9 * 64


def read_real(folder: Path, shape: tuple[int, ...] = (3, 8, 8)) -> torch.Tensor:
    return torch.cat(list(RealImages(str(folder), shape).batches(2)))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    for index in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"photos/{index}.png")
    assert RealImages("~/photos", (3, 8, 8)).num_images == 2
    save_classifier(tmp_path / "classifier", SmallClassifier(1, 8, 10), {})
    assert load_features(EvaluateConfig(features="~/classifier"), (1, 8, 8)).name == SmallClassifier.architecture
    save_random_inception(tmp_path / "weights.pth")
    weights = EvaluateConfig(features="inception", inception_weights="~/weights.pth")
    assert load_features(weights, (3, 32, 32)).name == "inception"


def test_real_images_from_a_folder(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / f"{index}.png")
    images = read_real(tmp_path)
    assert images.shape == (3, 3, 8, 8)
    assert float(images[0, 0].min()) == 1.0 and float(images[0, 1].max()) == -1.0
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"3\.png can't be read"):
        read_real(tmp_path)
    Image.new("I;16", (8, 8)).save(tmp_path / "3.png")
    with pytest.raises(UsageError, match=r"3\.png .*I;16.* 8 bits"):
        read_real(tmp_path)
    with pytest.raises(UsageError, match="they are grey, the cache's have 3 channels"):
        RealImages("digits", (3, 8, 8))
    with pytest.raises(UsageError, match="found 0 image files; expected `digits`, `mnist`, `emoji`, or a folder"):
        RealImages(str(tmp_path / "none"), (3, 8, 8))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8)])
def test_transparency_changes_no_pixel_and_no_score(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Images with an opaque alpha channel, or cut out of a white ground are the images on white."""
    generator = np.random.default_rng(0)
    for index in range(20):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        alpha = np.where(generator.random((8, 8)) < 0.3, 0, 255).astype(np.uint8)
        on_white = Image.fromarray(np.where(alpha[..., None] == 0, 255, pixels).astype(np.uint8))
        cut_out = Image.fromarray(np.dstack([pixels, alpha]))
        opaque = on_white.convert("RGBA")
        for name, image in (("white", on_white), ("cut", cut_out), ("alpha", opaque)):
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / f"{index:02d}.png")
    images = {name: read_real(tmp_path / name, shape) for name in ("white", "cut", "alpha")}
    assert torch.equal(images["cut"], images["white"]) and torch.equal(images["alpha"], images["white"])
    reference = Gaussian.fit(torch.randn(50, int(np.prod(shape))).numpy())
    scores = {
        name: frechet_distance(Gaussian.fit(found.flatten(1).numpy()), reference) for name, found in images.items()
    }
    assert scores["white"] == scores["cut"] == scores["alpha"]
    real = RealImages(str(tmp_path / "cut"), shape)
    list(real.batches())
    assert (real.num_images, real.num_resized, real.num_transparent) == (
        20,
        0,
        20,
    ) and "20 were transparent" in real.note()
    opaque_ones = RealImages(str(tmp_path / "alpha"), shape)
    list(opaque_ones.batches())
    assert opaque_ones.num_transparent == 0 and not opaque_ones.note()


def test_other_sizes_are_cropped_around_the_centre_and_antialiased(tmp_path: Path) -> None:
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    wide[:, 32:64] = 255  # what lies in the central square
    Image.fromarray(wide).save(tmp_path / "a.png")
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "b.png")
    real = RealImages(str(tmp_path), (1, 8, 8))
    (images,) = real.batches()
    assert bool((images[0] == 1.0).all())
    assert float(images[1].abs().max()) < 0.02  # the mean of black and white, no moiré
    assert real.num_resized == 2 and real.resizing in real.note() and "2 were resized" in real.note()


def test_a_classifier_comes_back_from_its_folder(tmp_path: Path) -> None:
    classifier = SmallClassifier(1, 16, 10).eval()
    save_classifier(tmp_path, classifier, {"held_out_accuracy": 0.5})
    network = load_features(EvaluateConfig(features=str(tmp_path)), (1, 16, 16))
    images = torch.randn(5, 1, 16, 16)
    features, probabilities = see(network, torch.split(images, 2))
    assert features.shape == (5, 64)
    shown = images.clamp(-1.0, 1.0)
    np.testing.assert_allclose(features, classifier.body(shown).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert probabilities is not None
    np.testing.assert_allclose(probabilities, classifier(shown).softmax(1).detach().numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="made for 1×16×16 images, these are 1×8×8"):
        load_features(EvaluateConfig(features=str(tmp_path)), (1, 8, 8))
    with pytest.raises(UsageError, match=r"none: no network that advkd can load"):
        load_features(EvaluateConfig(features=str(tmp_path / "none")), (1, 16, 16))


def test_inception_is_for_colour_images_of_32_pixels_and_more() -> None:
    for shape in ((1, 32, 32), (3, 16, 16)):
        with pytest.raises(UsageError, match="needs colour images of at least 32 pixels"):
            load_features(EvaluateConfig(), shape)


def test_inception_weights_from_a_local_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_features(EvaluateConfig(inception_weights=str(tmp_path / "none.pth")), (3, 32, 32))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="not pytorch-fid's"):
        load_features(EvaluateConfig(inception_weights=str(tmp_path / "other.pth")), (3, 32, 32))
    save_random_inception(tmp_path / "weights.pth")
    features = load_features(EvaluateConfig(inception_weights=str(tmp_path / "weights.pth")), (3, 32, 32))
    assert see(features, [torch.zeros(2, 3, 32, 32)])[0].shape == (2, 2048)


def test_absent_inception_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    from pytorch_fid import inception

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("unreachable")

    monkeypatch.setattr(inception, "load_state_dict_from_url", unreachable)
    with pytest.raises(UsageError, match=r"pt_inception-2015-12-05-6726825d.pth .* --inception-weights FILE"):
        load_features(EvaluateConfig(), (3, 32, 32))


CONFIG = TrainConfig(student=StudentConfig(width=8, depth=1), steps=4, batch_size=16, seeds="10:200")


@pytest.fixture
def protocol(tmp_path: Path) -> EvaluateConfig:
    save_classifier(tmp_path / "classifier", SmallClassifier(1, 8, 10), {})
    return EvaluateConfig(features=str(tmp_path / "classifier"), num_sets=2, set_size=8, solver_steps=[])


def test_scores_name_the_weights_that_were_scored(
    store: Path, tmp_path: Path, protocol: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where training goes on meanwhile, and writes the next ones."""
    run = tmp_path / "run"
    train(store, CONFIG, run, max_steps=2)
    scored = weights_sha256(Run(run).student)

    def load_and_go_on(folder: Path) -> object:
        student = load_student(folder)
        train(store, CONFIG, run)
        return student

    monkeypatch.setattr(evaluating, "load_student", load_and_go_on)
    scores = evaluating.evaluate(run, store, protocol)
    assert scores.weights_sha256 == scored != weights_sha256(Run(run).student)


def test_a_report_tells_what_was_measured_and_harms_no_linked_file(
    store: Path, tmp_path: Path, protocol: EvaluateConfig
) -> None:
    train(store, CONFIG, tmp_path / "run")
    cache = TrajectoryCache.open(store)
    scores = evaluating.evaluate(tmp_path / "run", store, protocol)
    assert scores.num_training == len(split_seeds(cache, CONFIG.seeds).training)
    # The whole protocol is what is one, whichever option asked for it.
    whole = {"num_sets": 5, "set_size": 2048, "num_reference": 8192}

    def is_full(num_reference: int, **sets: int) -> bool:
        config = dataclasses.replace(scores.config, **sets)
        return dataclasses.replace(scores, config=config, num_reference=num_reference).full

    assert not scores.full and is_full(**whole)
    assert not any(is_full(**whole | {name: value - 1}) for name, value in whole.items())
    # As DVC leaves its outputs where `cache.type` is hardlink: the same file as in its own cache.
    evaluation = tmp_path / "evaluation"
    write_results(evaluation, scores, cache)
    (tmp_path / "linked").mkdir()
    for path in evaluation.iterdir():
        (tmp_path / "linked" / path.name).hardlink_to(path)
    before = tree(tmp_path / "linked")
    assert before.keys() >= {"samplers.csv", "scores.json", "scores.png", "samples.png", "trajectory.png"}
    write_results(evaluation, dataclasses.replace(scores, num_reference=7, features="others"), cache)
    assert tree(tmp_path / "linked") == before
    assert tree(evaluation)["scores.png"] != before["scores.png"]
    assert not any(path.name.endswith(".partial") for path in evaluation.iterdir())


def test_any_cache_can_be_scored_by_features_of_its_own(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained once, kept beside the scores, and trained anew for another cache."""
    monkeypatch.setattr(networks, "train_self_supervised", functools.partial(train_self_supervised, num_steps=2))
    train(store, CONFIG, tmp_path / "run", max_steps=2)
    config = EvaluateConfig(features="self", num_sets=2, set_size=8, solver_steps=[])
    first = evaluating.evaluate(tmp_path / "run", store, config)
    assert first.features == "self-supervised-cnn" and first.table.student.values["frechet"][0] > 0.0
    assert not {"confidence", "class_overlap"} & first.table.student.values.keys()
    folder = tmp_path / "run/evaluation/features"
    kept = (folder / "model.safetensors").stat().st_mtime_ns
    again = evaluating.evaluate(tmp_path / "run", store, config)
    assert again.features_sha256 == first.features_sha256 and again.table == first.table
    named = evaluating.evaluate(tmp_path / "run", store, dataclasses.replace(config, features=str(folder)))
    assert named.table == first.table and (folder / "model.safetensors").stat().st_mtime_ns == kept
    write_store(tmp_path / "toy.zarr", "0:512")
    grown = evaluating.evaluate(tmp_path / "run", store, config)
    assert grown.features_sha256 != first.features_sha256
    with pytest.raises(UsageError, match="RUN/evaluation/features"):
        load_features(config, (1, 8, 8))


def test_another_seed_gives_other_sets_and_the_same_seed_the_same(
    store: Path, tmp_path: Path, protocol: EvaluateConfig
) -> None:
    train(store, CONFIG, tmp_path / "run", max_steps=2)
    one, same, other = (
        evaluating.evaluate(tmp_path / "run", store, dataclasses.replace(protocol, seed=seed), device="cpu")
        for seed in (0, 0, 1)
    )
    assert one.table == same.table and one.table.student.values["frechet"] != other.table.student.values["frechet"]
    with pytest.raises(UsageError, match="no-such-device"):
        evaluating.evaluate(tmp_path / "run", store, protocol, device="no-such-device")


def test_fresh_seeds_of_all_evaluations_are_disjoint() -> None:
    """At the bounds: the longest evaluation of one seed ends where the next begins, the last where others do."""
    config = EvaluateConfig(num_sets=1 << 13, set_size=1 << 11, batch_size=1 << 11)
    *_, last = fresh_seeds(config, config.num_sets - 1)
    assert last.stop == next(fresh_seeds(dataclasses.replace(config, seed=1), 0)).start
    *_, last = fresh_seeds(dataclasses.replace(config, seed=MAX_SEED), config.num_sets - 1)
    assert last.stop == FIRST_CHECK_SEED
    for wrong in ({"seed": MAX_SEED + 1}, {"seed": -1}, {"num_sets": (1 << 13) + 1, "set_size": 1 << 11}):
        with pytest.raises(ConfigError):
            EvaluateConfig(**wrong)
