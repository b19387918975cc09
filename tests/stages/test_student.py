"""Students: the paper's sizes, the unrolled sampler's laws, folders that run no code."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from advkd.cache.errors import TrainingError
from advkd.pipeline.config import load_experiment
from advkd.stages.student.config import StudentConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.progressive.network import (
    ConditionalDiscriminator,
    ProgressiveStudent,
    reduce_noise,
    upsampling_submodules,
)
from advkd.stages.student.student import build_student, generate, load_student, noise_of, save_student
from advkd.stages.student.unrolled.network import UnrolledStudent, jump, jump_target


def geometry(channels: int = 1, size: int = 16, submodules: int = 4) -> Geometry:
    angles = torch.linspace(torch.pi / 2, 0, submodules + 1).tolist()
    levels = tuple((float(torch.tensor(a).cos()), float(torch.tensor(a).sin())) for a in angles)
    levels = ((0.01, 0.99995), *levels[1:-1], (1.0, 0.0))
    return Geometry(
        item_shape=(channels, size, size),
        levels=levels,
        timesteps=tuple(float(1000 - 100 * k) for k in range(submodules + 1)),
        steps=tuple(range(0, 10 * submodules + 1, 10)),
        root_seed=0,
        noise_dtype="float16",
    )


def test_progressive_has_the_references_size() -> None:
    """Adv-KD at 256 px: 2,429,937 parameters with all heads, 1,721,235 deployed."""
    config = load_experiment("celebahq256").train.student
    student = build_student(config, geometry(channels=3, size=256, submodules=11))
    assert isinstance(student, ProgressiveStudent)
    assert sum(parameter.numel() for parameter in student.parameters()) == 2_429_937
    assert student.deployed_parameters() == 1_721_235
    assert student.sizes == [8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 256]


@pytest.mark.parametrize(
    ("submodules", "size", "doubling"),
    [(11, 256, (0, 2, 4, 6, 8, 10)), (5, 16, (0, 4)), (10, 32, (0, 4, 9)), (3, 8, (2,)), (2, 16, (0, 1))],
)
def test_upsamplings_are_spread_evenly_and_end_in_the_last(
    submodules: int, size: int, doubling: tuple[int, ...]
) -> None:
    assert upsampling_submodules(submodules, size) == doubling
    student = ProgressiveStudent(geometry(size=size, submodules=submodules))
    images = student.heads(torch.randn(3, 1, size, size))
    assert [image.shape[-1] for image in images] == student.sizes
    assert images[-1].shape == (3, 1, size, size)
    assert max(float(image.detach().abs().max()) for image in images) <= 1.0


@pytest.mark.parametrize(("submodules", "size"), [(5, 24), (5, 4), (2, 64), (5, 20)])
def test_shapes_that_cannot_grow_are_refused(submodules: int, size: int) -> None:
    with pytest.raises(TrainingError, match="progressive needs"):
        upsampling_submodules(submodules, size)


def test_reduced_noise_stays_unit_normal() -> None:
    torch.manual_seed(0)
    for size in (8, 32, 256):
        reduced = reduce_noise(torch.randn(200, 3, size, size))
        assert reduced.shape == (200, 3, 4, 4)
        assert float(reduced.std()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("size", [4, 8, 64])
def test_discriminators_fit_every_stage(size: int) -> None:
    discriminator = ConditionalDiscriminator(3, size)
    logits = discriminator(torch.randn(5, 3, size, size), torch.randn(5, 3, 64, 64))
    assert logits.shape == (5,)
    first = next(module for module in discriminator.modules() if isinstance(module, nn.Conv2d))
    assert first.out_channels == 32
    assert any(isinstance(module, nn.BatchNorm1d) for module in discriminator.modules())


class Truth(nn.Module):
    """A submodule that knows x_0."""

    def __init__(self, x0: torch.Tensor) -> None:
        super().__init__()
        self.x0 = x0

    def forward(
        self,
        features: torch.Tensor | None,
        state: torch.Tensor,
        time: int,
        embedding: torch.Tensor | None,
        tokens: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return state, self.x0


def test_unrolled_jumps_are_the_ddim_path_of_its_x0() -> None:
    """With the right x̂_0 in every submodule, the states are alpha · x_0 + sigma · ε for the one ε in x_T."""
    shape = geometry()
    student = UnrolledStudent(shape, width=8, depth=1)
    torch.manual_seed(1)
    x0, epsilon = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16)
    student.submodules = nn.ModuleList(Truth(x0) for _ in range(4))
    alpha, sigma = shape.levels[0]
    states = student.heads(alpha * x0 + sigma * epsilon)
    for (alpha, sigma), state in zip(shape.levels[1:], states, strict=True):
        torch.testing.assert_close(state, alpha * x0 + sigma * epsilon, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[-1], x0, rtol=0, atol=0)


def test_a_jump_to_its_target_lands() -> None:
    torch.manual_seed(2)
    state, reached = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    for before, after in (((0.01, 0.99), (0.6, 0.8)), ((0.6, 0.8), (1.0, 0.0))):
        x0 = jump_target(state, reached, before, after)
        torch.testing.assert_close(jump(state, x0, before, after), reached)


def test_shared_weights_are_told_the_point_of_the_denoising() -> None:
    """A fraction of the parameters; each point has a scale and a shift of its own, from which it learns."""
    torch.manual_seed(0)
    three = geometry(channels=1, size=8, submodules=3)
    student, separate = UnrolledStudent(three, 8, 1, shared=True), UnrolledStudent(three, 8, 1)
    assert student.deployed_parameters() < separate.deployed_parameters() / 2.5
    noise = torch.randn(2, 1, 8, 8)
    for weight in student.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    before = student.unroll(noise)[0]
    modulation = student.submodules[0].blocks[0].modulation
    with torch.no_grad():
        modulation[1] += 0.5
    after = student.unroll(noise)[0]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1]) and not torch.equal(before[2], after[2])
    student(noise).square().mean().backward()
    assert all(bool(part.abs().sum() > 0) for part in modulation.grad)


@pytest.mark.parametrize(("attention", "coarse", "shared"), [(True, 0, False), (False, 1, False), (True, 1, True)])
def test_unrolled_shapes_and_gradients(attention: bool, coarse: int, shared: bool) -> None:
    student = UnrolledStudent(geometry(channels=3, size=8, submodules=2), 16, 1, 2, attention, shared, coarse)
    noise = torch.randn(3, 3, 8, 8)
    predictions, states = student.unroll(noise)
    assert [p.shape for p in predictions] == [s.shape for s in states] == [noise.shape] * 2
    torch.testing.assert_close(student(noise), predictions[-1], rtol=0, atol=0)
    student(noise).square().mean().backward()
    last = f"submodules.{len(student.submodules) - 1}."
    assert all(p.grad is not None for name, p in student.named_parameters() if name.startswith(last))
    assert len(list(student.submodules)) == (1 if shared else 2)
    with pytest.raises(TrainingError, match="patches of 3"):
        UnrolledStudent(geometry(), patch=3)
    with pytest.raises(TrainingError, match="1×1 positions can't be halved"):
        UnrolledStudent(geometry(channels=1, size=2), patch=2, coarse=1)


@pytest.mark.parametrize("kind", ["unrolled", "progressive"])
def test_a_saved_student_comes_back_whole(tmp_path: Path, kind: str) -> None:
    config = StudentConfig(kind=kind, width=8, depth=1)
    student = build_student(config, geometry()).eval()
    save_student(tmp_path, student, config, geometry())
    loaded, found = load_student(tmp_path)
    assert found == geometry()
    noise = noise_of(found, [5, 2**40])
    assert noise.shape == (2, 1, 16, 16)
    torch.testing.assert_close(generate(loaded, noise), generate(student, noise, batch_size=1), rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_what_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no student in"):
        load_student(tmp_path)
    config = StudentConfig(width=8, depth=1)
    save_student(tmp_path, build_student(config, geometry()), config, geometry())
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(TrainingError, match="holds no student"):
        load_student(tmp_path)
    weights.write_bytes(whole)
    value = json.loads((tmp_path / "config.json").read_text())
    for section, key, wrong in (
        ("student", "width", 16),
        ("student", "width", 20_000),  # would be 14 GB, if it were believed
        ("student", "kind", "os.system"),
        ("geometry", "item_shape", [1, 10**6, 10**6]),
        ("geometry", "root_seed", -1),
        ("geometry", "noise_dtype", "object"),
        ("geometry", "levels", [[0.1, 0.0], [1.0, 0.0]]),
        ("geometry", "steps", [0]),
        ("geometry", "timesteps", []),
    ):
        changed = json.loads(json.dumps(value))
        changed[section][key] = wrong
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(TrainingError, match="holds no student"):
            load_student(tmp_path)
