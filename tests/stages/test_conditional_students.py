"""Students of class labels and latents: trained from the cache alone, sampled, shared, exported."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from advkd.cache.errors import AdvkdError, DamagedError, NotCachedError, TrainingError, UsageError
from advkd.cache.format.condition import LABELS_PATH, ClassCondition
from advkd.cache.format.seeds import parse_seed_range
from advkd.cache.format.space import DECODER_PATH, LatentSpace
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from advkd.pipeline.cli.export import main as export_command
from advkd.pipeline.cli.sample import main as sample_command
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.hub import Student
from advkd.stages.student.pipeline import StudentPipeline
from advkd.stages.student.student import build_student, generate
from advkd.stages.student.train import train
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig
from advkd.stages.teacher.load.identity import tensors_sha256
from tests.cache.test_conditions import HARMS
from tests.conftest import Invoke
from tests.stages.teachers import AUTOENCODER, TINY
from tests.stores import ITEM_SHAPE, block_states, make_layout, make_recipe, write_store

CONDITION = ClassCondition(num_classes=5, labels=(0, 1, 3), guidance=2.5, null_class=4)
SHORT = TrainConfig(
    student=StudentConfig(width=8, depth=1, coarse=1),
    objective=ObjectiveConfig(adversarial=AdversarialConfig(width=4, start=0.4, fresh=4, penalty_every=2)),
    steps=6,
    batch_size=8,
    log_every=2,
    preview_every=3,
    checkpoint_every=3,
)


def make_decoder() -> tuple[LatentSpace, dict[str, torch.Tensor]]:
    """The decoder of one-channel latents, with random weights: 8×8 → 16×16."""
    from diffusers import AutoencoderKL

    from advkd.stages.decoder import decoding_tensors

    torch.manual_seed(0)
    options = {**AUTOENCODER, "latent_channels": 1, "scaling_factor": 0.5}
    tensors = decoding_tensors("AutoencoderKL", AutoencoderKL(**options).state_dict())
    space = LatentSpace(
        decoder="AutoencoderKL",
        config={key: list(value) if isinstance(value, tuple) else value for key, value in options.items()},
        tensors_sha256=tensors_sha256(tensors),
        scaling_factor=0.5,
        shift_factor=0.0,
        image_shape=(3, 16, 16),
    )
    return space, tensors


def write_latents(path: Path, condition: ClassCondition | None = None, scale: float = 40.0) -> None:
    """A store whose states would be far out of the range of pixels."""
    space, tensors = make_decoder()
    layout = make_layout()
    writer = CacheWriter.open(path, make_recipe(space=space, condition=condition), layout)
    with writer.writing():
        writer.grow(parse_seed_range("0:64"))
        writer.write_decoder(save(tensors))
        for block in range(4):
            states = block_states(layout, block)
            writer.commit(block, {step: values * (1.0 if step == 0 else scale) for step, values in states.items()})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "a.zarr"
    write_store(path, condition=CONDITION)
    return path


@pytest.fixture(scope="module")
def run(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "a"
    train(labelled, SHORT, path)
    return path


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder / "a.zarr", CONDITION)
    train(folder / "a.zarr", SHORT, folder / "run")
    return folder / "run"


def test_classes_reach_every_block_and_change_what_is_drawn(labelled: Path) -> None:
    geometry = Geometry.of(TrajectoryCache.open(labelled))
    assert (geometry.num_classes, geometry.labels, geometry.known_labels) == (5, (0, 1, 3), "0, 1, 3")
    student = build_student(SHORT.student, geometry)
    noise, labels = torch.randn(3, *ITEM_SHAPE), torch.tensor([0, 1, 3])
    before = student(noise, labels)
    torch.testing.assert_close(before, student(noise, labels.flip(0)))  # FiLM begins as the identity
    films = [parameter for name, parameter in student.named_parameters() if "film.weight" in name]
    assert len(films) == 2 * (SHORT.student.depth + SHORT.student.coarse)
    for film in films:
        torch.nn.init.normal_(film)
    for parameter in student.parameters():
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter)
    assert (student(noise, labels) - student(noise, labels.flip(0))).abs()[[0, 2]].amax() > 1e-3
    for wrong in (None, labels.int(), labels[:2]):
        with pytest.raises(UsageError, match="label"):
            student(noise, wrong)


def test_unconditional_students_have_no_trace_of_classes(store: Path) -> None:
    geometry = Geometry.of(TrajectoryCache.open(store))
    assert not {"num_classes", "labels", "space"} & geometry.to_json().keys()
    student = build_student(SHORT.student, geometry)
    assert not [name for name in student.state_dict() if "film" in name or "classes" in name]
    with pytest.raises(UsageError, match="unconditional"):
        student(torch.randn(1, *ITEM_SHAPE), torch.tensor([0]))


def test_training_learns_labels_and_logs_each_class(run: Path, labelled: Path, tmp_path: Path) -> None:
    student = Student.from_pretrained(run)
    assert json.loads((run / "student/config.json").read_text())["format"] == 2
    logged = json.loads((run / "log/metrics.json").read_text())["held_out"]
    assert set(logged) == {"mse", "class_0", "class_3"}  # of the seeds that are held out
    assert (run / "preview/step-000006.png").is_file()
    cache = TrajectoryCache.open(labelled)
    assert student.provenance["condition"] == CONDITION.to_json()
    labels = student.labels(range(64))
    assert labels is not None and labels.tolist() == cache.labels(range(64)).tolist()
    train(labelled, SHORT, tmp_path / "again", max_steps=3)
    train(labelled, SHORT, tmp_path / "again")
    again = Student.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_a_label_is_learned(tmp_path: Path) -> None:
    """Where x_0 is the label alone, the student draws what is asked."""
    path, layout = tmp_path / "a.zarr", make_layout()
    condition = ClassCondition(num_classes=2, labels=(0, 1))
    writer = CacheWriter.open(path, make_recipe(condition=condition), layout)
    with writer.writing():
        writer.grow(range(64))
        for block in range(4):
            noise = block_states(layout, block)[0]
            labels = condition.labels_of(range(16 * block, 16 * block + 16))
            x0 = np.where(labels == 1, 0.8, -0.8)[:, None, None, None].astype(np.float32) + 0 * noise
            writer.commit(block, {s.step: s.alpha * x0 + s.sigma * noise for s in layout.states})
    config = replace(SHORT, steps=80, objective=ObjectiveConfig(adversarial=AdversarialConfig(weight=0.0)))
    train(path, config, tmp_path / "run")
    student = Student.from_pretrained(tmp_path / "run")
    noise = student.noise([1000, 1000])
    low, high = generate(student, noise, torch.tensor([0, 1])).mean(dim=(1, 2, 3)).tolist()
    assert high - low > 0.4


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"class_labels": 9}, "label 9 is unknown.*0, 1, 3"), ({"class_labels": [4]}, "label 4"),
     ({}, "draws classes; expected some of 0, 1, 3"), ({"class_labels": []}, "no class labels"),
     ({"class_labels": [0, 1, 3], "batch_size": 2}, "3 class_labels for 2 images"),
     ({"class_labels": [0, 1], "seeds": [1, 2, 3]}, "2 class_labels for 3 images")],
)  # fmt: skip
def test_labels_that_can_not_be_are_one_line(run: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        StudentPipeline.from_pretrained(run)(**options)


def test_the_pipeline_draws_what_is_asked(run: Path) -> None:
    pipe = StudentPipeline.from_pretrained(run)
    student = Student.from_pretrained(run)
    made = pipe(class_labels=[3, 1], seeds=[5, 6], output_type="pt").images
    expected = generate(student, student.noise([5, 6]), torch.tensor([3, 1]))
    torch.testing.assert_close(made, (expected / 2 + 0.5).clamp(0, 1))
    own = pipe(seeds=[0, 1, 2], output_type="pt").images
    torch.testing.assert_close(own, pipe(seeds=[0, 1, 2], class_labels=[0, 1, 3], output_type="pt").images)
    assert len(pipe(class_labels=1, batch_size=3).images) == 3
    assert len(pipe(class_labels=[1, 1, 3, 0]).images) == 4


def test_latents_are_learned_whatever_their_range_and_shown_as_images(latent_run: Path) -> None:
    student = Student.from_pretrained(latent_run)
    latents = generate(student, student.noise([0, 1]), student.labels([0, 1]))
    assert latents.shape == (2, *ITEM_SHAPE)
    images = student.decode(latents)
    assert images.shape == (2, 3, 16, 16)
    pipe = StudentPipeline.from_pretrained(latent_run)
    torch.testing.assert_close(pipe(seeds=[0, 1], output_type="pt").images, (images / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(pipe(seeds=[0, 1], output_type="latent").images, latents)


def test_a_saved_student_brings_labels_decoder_and_a_card(latent_run: Path, tmp_path: Path) -> None:
    student = Student.from_pretrained(latent_run)
    student.save_pretrained(tmp_path / "mine")
    card = (tmp_path / "mine/README.md").read_text()
    assert "class_labels=[0, 1, 3, 0]" in card and "classes 0, 1, 3" in card and "student.decode(" in card
    assert "16×16 RGB" in card and "unconditional" not in card
    again = Student.from_pretrained(tmp_path / "mine")
    items = torch.randn(1, *ITEM_SHAPE)
    torch.testing.assert_close(again.decode(items), student.decode(items))
    (tmp_path / "mine" / DECODER_PATH).write_bytes(b"x")
    with pytest.raises(TrainingError, match="decoder"):
        Student.from_pretrained(tmp_path / "mine")


def test_the_command_draws_labels_in_their_order(run: Path, latent_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke(sample_command, "--run", run, "--labels", "3,3,0", "--out", tmp_path / "a.npy")
    assert result.exit_code == 0, result.output
    student = Student.from_pretrained(run)
    expected = generate(student, student.noise(range(3)), torch.tensor([3, 3, 0]))
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected.numpy(), atol=1e-6)
    invoke(sample_command, "--run", run, "--labels", "3,0", "--num", 5, "--out", tmp_path / "b.npy")
    assert np.load(tmp_path / "b.npy").shape == (5, *ITEM_SHAPE)
    invoke(sample_command, "--run", latent_run, "--labels", "3,0", "--out", tmp_path / "c.npz")
    assert np.load(tmp_path / "c.npz")["arr_0"].shape == (2, 16, 16, 3)
    for labels, expected_line in (("x", "expected class labels"), ("4", "label 4 is unknown")):
        refused = invoke(sample_command, "--run", run, "--labels", labels, "--out", tmp_path / "d.png")
        assert refused.exit_code == 2 and expected_line in refused.stderr
    assert not (tmp_path / "d.png").exists()


def test_exported_students_take_labels_and_decode(latent_run: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke(export_command, latent_run, "--onnx", tmp_path / "a.onnx", "--int8")
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} >= {"a.onnx", "a.int8.onnx", "a.decoder.onnx"}
    ours, theirs = (StudentPipeline.from_pretrained(source) for source in (latent_run, tmp_path / "a.onnx"))
    options: dict[str, Any] = {"class_labels": [0, 1, 3], "seeds": [4, 5, 6], "output_type": "pt"}
    torch.testing.assert_close(theirs(**options).images, ours(**options).images, rtol=1e-3, atol=1e-3)
    assert StudentPipeline.from_pretrained(tmp_path / "a.int8.onnx")(**options).images.shape[0] == 3
    with pytest.raises(UsageError, match="draws classes"):
        theirs(batch_size=2)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["noise", "label"]


def test_a_tiny_decoder_can_take_the_place_of_the_teachers(
    latent_run: Path, run: Path, tmp_path: Path, invoke: Invoke
) -> None:
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny(**{**TINY, "latent_channels": 1})
    tiny.save_pretrained(tmp_path / "tiny")
    result = invoke(export_command, latent_run, "--onnx", tmp_path / "a.onnx", "--decoder", tmp_path / "tiny")
    assert result.exit_code == 0, result.output
    items = torch.randn(2, *ITEM_SHAPE)
    with torch.no_grad():
        expected = tiny.decode(items).sample
    student = StudentPipeline.from_pretrained(tmp_path / "a.onnx").student
    torch.testing.assert_close(student.decode(items), expected, rtol=1e-3, atol=1e-4)
    refused = invoke(export_command, latent_run, "--onnx", tmp_path / "b.onnx", "--decoder", latent_run)
    assert refused.exit_code == 2 and "AutoencoderTiny" in refused.stderr
    refused = invoke(export_command, run, "--onnx", tmp_path / "b.onnx", "--decoder", tmp_path / "tiny")
    assert refused.exit_code == 2 and "makes pixels" in refused.stderr
    assert not (tmp_path / "b.onnx").exists()


def test_progressive_refuses_what_it_can_not_learn(labelled: Path, tmp_path: Path) -> None:
    progressive = replace(SHORT, student=StudentConfig(kind="progressive"))
    write_latents(tmp_path / "latents.zarr")
    for store, expected in ((labelled, "learns no class labels"), (tmp_path / "latents.zarr", "has latents")):
        with pytest.raises(UsageError, match=expected):
            train(store, progressive, tmp_path / "run")


def test_what_is_for_pixels_is_refused_on_latents(tmp_path: Path) -> None:
    write_latents(tmp_path / "a.zarr")
    adversarial = AdversarialConfig(width=4, augment=["brightness"])
    for objective in (
        ObjectiveConfig(adversarial=adversarial),
        ObjectiveConfig(perceptual=0.1, perceptual_features="lpips", adversarial=AdversarialConfig(weight=0.0)),
    ):
        with pytest.raises(UsageError, match="latents"):
            train(tmp_path / "a.zarr", replace(SHORT, objective=objective), tmp_path / "run")


TRAINING_HARMS: list[tuple[str, type[AdvkdError]]] = [
    ("label out of range", DamagedError), ("other dtype", DamagedError), ("no array", NotCachedError),
    ("flipped bit", DamagedError), ("no entry", DamagedError),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "kind"), TRAINING_HARMS)
def test_training_refuses_harmed_labels_in_one_line(harm: str, kind: type[AdvkdError], tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", condition=CONDITION)
    act: Callable[[Path], object] = HARMS[harm][0]
    act(tmp_path / "a.zarr")
    with pytest.raises(kind) as caught:
        train(tmp_path / "a.zarr", SHORT, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/student").exists()


def test_training_needs_the_decoder_from_the_start(tmp_path: Path) -> None:
    write_latents(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / DECODER_PATH).unlink()
    with pytest.raises(NotCachedError, match="decoder"):
        train(tmp_path / "a.zarr", SHORT, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert LABELS_PATH not in str(sorted(tmp_path.rglob("*")))
