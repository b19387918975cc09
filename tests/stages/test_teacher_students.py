"""Students that are their teacher's own network: they start as its DDIM, and learn to do it in fewer evaluations."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from advkd.cache.care.verify import verify
from advkd.cache.errors import DamagedError, NotCachedError, TrainingError
from advkd.cache.format.encoding import Packing
from advkd.cache.format.store_paths import TEACHER_PATH
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.read.weights import teacher_weights
from advkd.cache.write.combine import subset
from advkd.cache.write.pack import pack
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.geometry import Geometry, NetworkDescription
from advkd.stages.student.hub import Student
from advkd.stages.student.pipeline import StudentPipeline
from advkd.stages.student.sharing.export import export_onnx
from advkd.stages.student.student import build_student, generate, load_student, read_student, save_student
from advkd.stages.student.teacher.network import TeacherStudent
from advkd.stages.student.train import train
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from tests.stages.teachers import UNET, save_conditional, save_dit
from tests.stages.test_conditional_teachers import record
from tests.stores import tree

KEEP = {"block_size": 16, "batch_size": 16, "keep_weights": True}
ONE_STEP = TrainConfig(
    student=StudentConfig(kind="teacher"),
    states=[0, 5],
    steps=60,
    batch_size=8,
    optimizer="adamw",
    learning_rate=3e-3,
    ema=0.9,
    log_every=10,
    preview_every=60,
    objective=ObjectiveConfig(adversarial=AdversarialConfig(weight=0.0)),
)


def save_flow(folder: Path) -> Path:
    """A UNet and the scheduler of flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    torch.manual_seed(3)
    UNet2DModel(**UNET).save_pretrained(folder / "unet")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the weights of its teacher, which predicts v."""
    folder = tmp_path_factory.mktemp("kept")
    save_conditional(folder / "teacher", prediction_type="v_prediction", timestep_spacing="trailing")
    record(folder / "teacher", folder / "a.zarr", seeds="0:48", **KEEP)
    return folder / "a.zarr"


def started(cache: TrajectoryCache, shared: bool = True, states: list[int] | None = None) -> TeacherStudent:
    geometry = Geometry.of(cache, states, network=True)
    network = build_student(StudentConfig(kind="teacher", shared=shared), geometry)
    network.start_from(teacher_weights(cache))
    assert isinstance(network, TeacherStudent)
    return network.eval()


@pytest.mark.parametrize("teacher", ["v_prediction", "sample", "flow", "dit"])
@torch.no_grad()
def test_before_training_it_is_the_teachers_own_sampler(tmp_path: Path, teacher: str) -> None:
    sampler = SamplerConfig(name="flow-euler" if teacher == "flow" else "ddim", steps=5)
    if teacher == "flow":
        save_flow(tmp_path / "teacher")
    elif teacher == "dit":
        save_dit(tmp_path / "teacher")
    else:
        save_conditional(tmp_path / "teacher", prediction_type=teacher, timestep_spacing="trailing")
    cache = record(tmp_path / "teacher", tmp_path / "a.zarr", sampler, **KEEP)
    network, seeds = started(cache), np.arange(16)
    noise = torch.from_numpy(cache.rows(0, seeds))
    labels = None if cache.recipe.condition is None else torch.from_numpy(cache.labels(seeds).astype(np.int64))
    assert network.description.prediction == ("epsilon" if teacher == "dit" else teacher)
    for step, state in enumerate(network.heads(noise, labels), start=1):
        wanted = torch.from_numpy(cache.rows(step, seeds))
        if teacher == "dit":  # which predicts ε: at x_T its output is read as v, so that only the rest is comparable
            assert state.shape == wanted.shape
        else:
            torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_fewer_evaluations_are_the_teachers_sampler_in_fewer_steps(tmp_path: Path) -> None:
    """With the teacher's weights: DDIM by hand over the levels that are left, and all evaluations if not asked."""
    save_conditional(tmp_path / "teacher", prediction_type="sample", timestep_spacing="trailing")
    cache = record(tmp_path / "teacher", tmp_path / "a.zarr", SamplerConfig(steps=5), **KEEP)
    network = started(cache, states=[0, 1, 2, 3, 5])
    student = Student(network, StudentConfig(kind="teacher"), Geometry.of(cache, [0, 1, 2, 3, 5], network=True))
    pipe, given = StudentPipeline(student), {"seeds": range(3), "output_type": "latent"}
    noise, labels = student.noise([0, 1, 2]), student.labels([0, 1, 2])
    (unet,), (start, _, middle, _, _) = network.networks, network.levels
    first = unet(noise, network.timesteps[0], class_labels=labels).sample
    state = middle[0] * first + middle[1] * (noise - start[0] * first) / start[1]
    second = unet(state, network.timesteps[2], class_labels=labels).sample
    torch.testing.assert_close(pipe(num_inference_steps=2, **given).images, second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipe(num_inference_steps=1, **given).images, first, rtol=1e-4, atol=1e-4)
    assert torch.equal(pipe(num_inference_steps=4, **given).images, pipe(**given).images)
    with pytest.warns(UserWarning, match="num_inference_steps=9: the student takes 1 to 4"):
        assert torch.equal(pipe(num_inference_steps=9, **given).images, pipe(**given).images)


@torch.no_grad()
def test_a_network_that_predicts_noise_is_read_as_v_at_the_start_alone(tmp_path: Path) -> None:
    save_conditional(tmp_path / "teacher", timestep_spacing="trailing")
    cache = record(tmp_path / "teacher", tmp_path / "a.zarr", **KEEP)
    network = started(cache)
    state, output = torch.randn(2, 3, 1, 8, 8).unbind()
    first, _, second, third = network.levels[:4]
    assert first[0] < 0.05 < second[0]
    torch.testing.assert_close(network._x0(state, first, output), first[0] * state - first[1] * output)
    torch.testing.assert_close(network._x0(state, second, output), (state - second[1] * output) / second[0])
    labels = torch.from_numpy(cache.labels(np.arange(16)).astype(np.int64))
    reached = torch.from_numpy(cache.rows(2, np.arange(16)))
    x0 = network._x0(reached, second, network._evaluate(reached, second, 2, labels))
    made = third[0] * x0 + third[1] / second[1] * (reached - second[0] * x0)
    torch.testing.assert_close(made, torch.from_numpy(cache.rows(3, np.arange(16))), rtol=1e-4, atol=1e-4)


def test_one_evaluation_learns_from_the_teachers_weights(kept: Path, tmp_path: Path) -> None:
    trained = train(kept, ONE_STEP, tmp_path / "run")
    cache, student = TrajectoryCache.open(kept), Student.from_pretrained(tmp_path / "run")
    seeds = cache.seeds()[:40]
    noise, labels = student.noise(seeds), student.labels(seeds)
    x0 = torch.from_numpy(cache.rows(5, seeds))
    before, after = (
        float((generate(network, noise, labels) - x0).square().mean())
        for network in (started(cache, states=[0, 5]), student)
    )
    assert after < 0.5 * before and np.isfinite(trained.held_out_mse)
    assert student.deployed_parameters() == sum(tensor.numel() for tensor in load(teacher_weights(cache)).values())
    loaded, config, geometry = read_student(tmp_path / "run/student")
    assert config.kind == "teacher" and geometry.network == NetworkDescription.of(cache)
    assert torch.equal(generate(loaded, noise, labels), generate(student, noise, labels))


def test_evaluations_have_weights_of_their_own_unless_they_share_them(kept: Path, tmp_path: Path) -> None:
    """And training goes on where it stopped."""
    for shared, count in ((False, 2), (True, 1)):
        config = dataclasses.replace(
            ONE_STEP, states=[0, 2, 5], steps=6, student=StudentConfig(kind="teacher", shared=shared)
        )
        train(kept, config, tmp_path / f"whole-{shared}")
        train(kept, config, tmp_path / f"parts-{shared}", max_steps=3)
        train(kept, config, tmp_path / f"parts-{shared}")
        whole, parts = (load_student(tmp_path / f"{name}-{shared}/student")[0] for name in ("whole", "parts"))
        assert isinstance(whole, TeacherStudent) and len(whole.networks) == count
        values = zip(whole.state_dict().values(), parts.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in values)


def test_it_exports(kept: Path, tmp_path: Path) -> None:
    cache = TrajectoryCache.open(kept)
    network = started(cache, states=[0, 2, 5])
    student = Student(network, StudentConfig(kind="teacher", shared=True), Geometry.of(cache, [0, 2, 5], network=True))
    deviation = export_onnx(student, tmp_path / "a.onnx")
    assert deviation.largest < 1e-4 and (tmp_path / "a.onnx").is_file()


def test_a_store_without_the_weights_says_how_to_add_them(kept: Path, tmp_path: Path) -> None:
    teacher = str(kept.parent / "teacher")
    cache = record(kept.parent / "teacher", tmp_path / "b.zarr", block_size=16, batch_size=16)
    assert not (tmp_path / "b.zarr" / TEACHER_PATH).exists()
    with pytest.raises(NotCachedError, match="with --keep-weights, which adds it"):
        train(tmp_path / "b.zarr", ONE_STEP, tmp_path / "run")
    before = tree(tmp_path / "b.zarr")
    config = CacheConfig(
        seeds="0:16", block_size=16, batch_size=16, record=5, dtype="float32", accept_range=True, keep_weights=True
    )
    build(make_plan(TeacherConfig(source=teacher), SamplerConfig(steps=5), config, tmp_path / "b.zarr"))
    after = tree(tmp_path / "b.zarr")
    assert after.keys() - before.keys() == {TEACHER_PATH} and before.items() <= after.items()
    assert TrajectoryCache.open(tmp_path / "b.zarr").recipe.fingerprint == cache.recipe.fingerprint


def test_weights_travel_with_the_store_and_are_checked(kept: Path, tmp_path: Path) -> None:
    cache = TrajectoryCache.open(kept)
    subset(cache, tmp_path / "part.zarr", seeds="0:16")
    pack(cache, tmp_path / "packed.zarr", Packing.of("zstd", "float32"))
    for name in ("part", "packed"):
        store = tmp_path / f"{name}.zarr"
        assert teacher_weights(TrajectoryCache.open(store)) == teacher_weights(cache)
        assert not verify(TrajectoryCache.open(store)).findings
    tensors = load(teacher_weights(cache))
    name = next(iter(tensors))
    (tmp_path / "part.zarr" / TEACHER_PATH).write_bytes(save(tensors | {name: tensors[name] + 1.0}))
    with pytest.raises(DamagedError, match="another teacher than the recipe names"):
        teacher_weights(TrajectoryCache.open(tmp_path / "part.zarr"))
    (found,) = verify(TrajectoryCache.open(tmp_path / "part.zarr")).findings
    assert (found.kind, found.file) == ("damage", TEACHER_PATH)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "StableDiffusionPipeline"},
        {"prediction": "anything"},
        {"config": {"layers_per_block": 10**6}},
        {"config": {"block_out_channels": [8] * 10_000}},
        {"config": {"sample_size": 10**9}},
        {"config": {"norm_num_groups": 7}},
    ],
)
def test_a_foreign_description_is_refused(kept: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    cache = TrajectoryCache.open(kept)
    config = StudentConfig(kind="teacher", shared=True)
    save_student(tmp_path, started(cache, states=[0, 5]), config, Geometry.of(cache, [0, 5], network=True))
    value = json.loads((tmp_path / "config.json").read_text())
    network = value["geometry"]["network"]
    value["geometry"]["network"] = network | changes | {"config": network["config"] | changes.get("config", {})}
    (tmp_path / "config.json").write_text(json.dumps(value))
    with pytest.raises(TrainingError, match="holds no student that this advkd can load"):
        load_student(tmp_path)


def test_it_needs_diffusers_networks_but_no_pipeline(kept: Path, tmp_path: Path) -> None:
    """No pipeline, and of stage one its configuration alone."""
    config = {"name": "x", "teacher": {"source": "none"}, "train": dataclasses.asdict(ONE_STEP) | {"steps": 2}}
    (tmp_path / "x.json").write_text(json.dumps(config))
    program = f"""
import sys
from advkd.pipeline.cli.train import main
sys.argv = ["advkd-train", "--cache", {str(kept)!r}, "--config", {str(tmp_path / "x.json")!r}, "--run", "run"]
try:
    main()
except SystemExit as end:
    assert not end.code
print(sorted(name for name in sys.modules if name.startswith(
    ("diffusers.pipelines.", "advkd.stages.teacher."))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['advkd.stages.teacher.config']"
