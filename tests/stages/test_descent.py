"""Steps in several passes, of several processes and in half precision are the steps of one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from advkd.stages.ema import ExponentialMovingAverage, power_exponent
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.student import build_student
from advkd.stages.student.train import train
from advkd.stages.student.training.descent import Descent
from advkd.stages.student.training.muon import KernelMuon
from advkd.stages.student.training.optimizers import OPTIMIZERS
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig

CONFIG = TrainConfig(
    student=StudentConfig(width=8, depth=1),
    objective=ObjectiveConfig(
        adversarial=AdversarialConfig(width=4, start=0.3, lead=0.1, fresh=8, penalty_every=2, augment=["translate"])
    ),
    steps=8,
    batch_size=16,
    log_every=2,
    preview_every=4,
    checkpoint_every=4,
)
SAME = 0.01
"""Sums are rounded in another order, and Muon computes in bfloat16."""
TRAIN = """
import dataclasses, json, sys
from pathlib import Path
from advkd.pipeline.config import from_dict
from advkd.stages.student.config import TrainConfig
from advkd.stages.student.train import train

store, config, run, steps = sys.argv[1:]
trained = train(store, from_dict(TrainConfig, json.loads(config), "test"), Path(run), max_steps=int(steps))
sys.stdout.write(f"step {trained.step}\\n")  # at once: two processes share the pipe
"""


def apart(one: Path, other: Path) -> float:
    """Distance of two students of one seed in units of how far training has moved them."""
    first, second = (load_file(run / "student/model.safetensors") for run in (one, other))
    geometry = Geometry.from_json(json.loads((one / "student/config.json").read_text())["geometry"])
    torch.manual_seed(CONFIG.seed)
    start = build_student(CONFIG.student, geometry).state_dict()
    moved = sum(float((first[name] - start[name]).square().sum()) for name in first)
    return (sum(float((first[name] - second[name]).square().sum()) for name in first) / moved) ** 0.5


def launch(store: Path, config: TrainConfig, run: Path, steps: int) -> str:
    """Train in two processes, as `accelerate launch` does."""
    script = run.with_suffix(".py")
    script.write_text(TRAIN)
    # What `accelerate launch` calls for several processes of one machine; on CPUs too.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [str(store), json.dumps(dataclasses.asdict(config)), str(run), str(steps)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_train_what_one_does_with_the_doubled_batch(store: Path, tmp_path: Path) -> None:
    """Critics, fresh noise and augmentation included; stopped and resumed on the way."""
    objective = CONFIG.objective
    doubled = dataclasses.replace(
        CONFIG,
        batch_size=32,
        objective=dataclasses.replace(objective, adversarial=dataclasses.replace(objective.adversarial, fresh=16)),
    )
    train(store, doubled, tmp_path / "one")
    assert launch(store, CONFIG, tmp_path / "two", 4).split() == ["step", "4"] * 2
    assert launch(store, CONFIG, tmp_path / "two", 8).split() == ["step", "8"] * 2
    assert apart(tmp_path / "one", tmp_path / "two") < SAME
    table = "log/plots/metrics/train/ahead.tsv"
    assert (tmp_path / "one" / table).read_text() == (tmp_path / "two" / table).read_text()


def test_several_passes_make_the_step_of_one(store: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(CONFIG.objective.adversarial, augment=[])
    config = dataclasses.replace(CONFIG, objective=dataclasses.replace(CONFIG.objective, adversarial=plain))
    train(store, config, tmp_path / "one")
    train(store, dataclasses.replace(config, accumulate=4), tmp_path / "four")
    assert apart(tmp_path / "one", tmp_path / "four") < SAME
    train(store, dataclasses.replace(config, batch_size=12), tmp_path / "other")
    assert apart(tmp_path / "one", tmp_path / "other") > 10 * SAME


def test_muon_moves_the_kernels_themselves_by_steps_of_one_size() -> None:
    """The orthogonalised step of a square matrix has singular values about 1, whatever the gradient's size."""
    kernel = nn.Parameter(torch.randn(16, 16, 1, 1))
    before = kernel.detach().clone()
    optimizer = KernelMuon([kernel], 0.5, 0.0)
    (kernel * torch.randn(16, 16, 1, 1) * 1e-3).sum().backward()
    optimizer.take_gradients()
    optimizer.step()
    sizes = torch.linalg.svdvals((before - kernel.detach()).reshape(16, 16)) / 0.5
    assert 0.6 < float(sizes.median()) < 1.3
    assert float(sizes.max()) < 1.4
    optimizer.zero_grad()
    assert kernel.grad is None


def test_every_weight_has_one_optimiser() -> None:
    student = nn.ModuleDict(
        {"blocks": nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2)), "read": nn.Conv2d(2, 1, 3)}
    )
    wrapped = nn.ModuleDict({"submodules": student})
    for optimizer, expected in (("muon", ["student-muon", "student-adamw"]), ("adamw", ["student-adamw"])):
        made = OPTIMIZERS[optimizer](wrapped, 1e-3, 0.02, 0.01)
        assert list(made) == expected
        moved = [p for item in made.values() for group in item.param_groups for p in group["params"]]
        assert sum(p.numel() for p in moved) == sum(p.numel() for p in wrapped.parameters())


def test_half_precision_is_unscaled_before_it_is_clipped() -> None:
    """With a scaler of gradients, as float16 has, the steps are those without."""

    def stepped(scaler: torch.amp.GradScaler | None) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        kernel = nn.Parameter(torch.randn(4, 4, 1, 1, generator=generator))
        bias = nn.Parameter(torch.randn(4, generator=generator))
        accelerator = Accelerator()
        accelerator.scaler = scaler
        optimizers = [KernelMuon([kernel], 0.1, 0.0), torch.optim.SGD([bias], lr=0.1)]
        descent = Descent(accelerator, [kernel, bias], optimizers, clip=0.5)
        for _ in range(3):
            descent.backward(kernel.square().sum() * 3.0 + bias.square().sum())
            descent.step(factor=0.5)
        accelerator.scaler = None
        assert optimizers[1].param_groups[0]["lr"] == pytest.approx(0.05)
        return kernel.detach(), bias.detach()

    plain, scaled = stepped(None), stepped(torch.amp.GradScaler("cpu", init_scale=1024.0))
    torch.testing.assert_close(plain, scaled)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("what", [torch.inf, torch.nan])
def test_an_overflow_of_one_optimisers_weights_skips_the_step_of_all(clip: float, what: float) -> None:
    """The norm that everything is clipped by is of them all."""
    kernel, bias = nn.Parameter(torch.ones(4, 4, 1, 1)), nn.Parameter(torch.ones(4))
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [KernelMuon([kernel], 0.1, 0.0), torch.optim.SGD([bias], lr=0.1)]
    descent = Descent(accelerator, [kernel, bias], optimizers, clip=clip)
    descent.backward(kernel.square().sum() + (bias * what).sum())
    descent.step()
    assert torch.equal(kernel.detach(), torch.ones(4, 4, 1, 1)) and torch.equal(bias.detach(), torch.ones(4))
    assert accelerator.scaler.get_scale() == 512.0
    descent.backward(kernel.square().sum() + bias.sum())
    descent.step()
    accelerator.scaler = None
    assert bool((bias < 1.0).all()) and bool((kernel < 1.0).all())


def test_an_overflow_in_half_precision_skips_the_step() -> None:
    weight = nn.Parameter(torch.ones(3))
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    descent = Descent(accelerator, [weight], [torch.optim.SGD([weight], lr=0.1)])
    descent.backward(weight.sum() * torch.inf)
    descent.step()
    assert torch.equal(weight.detach(), torch.ones(3))
    assert accelerator.scaler.get_scale() == 512.0
    descent.backward(weight.sum())
    descent.step()
    accelerator.scaler = None
    assert torch.allclose(weight.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_a_power_function_average_looks_back_over_a_fraction_of_the_training(width: float) -> None:
    """The weights that steps have in the average: t^γ, whose relative deviation is the width."""
    model = nn.Linear(1, 1)
    average = ExponentialMovingAverage(model, 0.5, width)
    weights = torch.zeros(2000, dtype=torch.float64)
    for step in range(len(weights)):
        moved = average.weight(step)
        weights *= 1.0 - moved
        weights[step] += moved
    assert float(weights.sum()) == pytest.approx(1.0)
    position = (torch.arange(len(weights), dtype=torch.float64) + 0.5) / len(weights)
    mean = (weights * position).sum()
    assert float(((position - mean).square() * weights).sum().sqrt()) == pytest.approx(width, rel=2e-3)
    exponent = power_exponent(width)
    assert width**2 == pytest.approx((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))
