"""Stage one beside the bare loop that a user would write."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from advkd.stages.teacher.build.block import commit_block, sample_block
from advkd.stages.teacher.build.build import begin_store
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.sample.sampling import initial_noise
from benchmarks.harness import (
    Benchmark,
    Comparison,
    Target,
    interleaved,
    ratio_between,
    rows_of,
    run,
    seconds_of,
    wait_for,
)
from benchmarks.networks import CIFAR, layout_of, save_random, tiny, write_states

STEPS = 10
OURS, BARE = "advkd, recording 11 states", "bare loop, recording nothing"


class Bare:
    """diffusers' own loop, as its documentation has it."""

    def __init__(self, folder: Path, noise: np.ndarray[Any, Any], device: str, dtype: torch.dtype) -> None:
        from diffusers import DDIMScheduler, UNet2DModel

        self.unet = UNet2DModel.from_pretrained(folder, subfolder="unet").to(device, dtype).eval()
        self.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", timestep_spacing="trailing")
        self.scheduler.set_timesteps(STEPS)
        self.noise = torch.from_numpy(noise.astype(np.float32)).to(device, dtype)
        self.device = device

    @torch.no_grad()
    def states(self) -> list[torch.Tensor]:
        """All states, x_T first."""
        x = self.noise
        kept = [x]
        for timestep in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, timestep).sample, timestep, x).prev_sample
            kept.append(x)
        wait_for(self.device)
        return kept

    def pictures(self, folder: Path) -> None:
        """One PNG a state, as the method's published code keeps them."""
        for step, x in enumerate(self.states()):
            values = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            for number, image in enumerate(values):
                (folder / f"{number}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{number}/{step}.png")

    def files(self, folder: Path) -> None:
        """One `.pt` a trajectory."""
        folder.mkdir(exist_ok=True)
        for number, trajectory in enumerate(torch.stack(self.states(), dim=1).half().cpu()):
            torch.save(trajectory.clone(), folder / f"{number}.pt")


class Ours:
    """Stage one's own functions: sample a block, commit it."""

    def __init__(self, folder: Path, store: Path, batch: int, device: str, precision: str) -> None:
        config = CacheConfig(
            seeds=f"0:{batch}", record=STEPS, block_size=batch, batch_size=batch, precision=precision, device=device
        )
        self.plan: Plan = make_plan(TeacherConfig(source=str(folder)), SamplerConfig(steps=STEPS), config, store)
        self.plan.writer.begin()
        begin_store(self.plan)
        self.states: dict[int, Any] = {}
        self.seconds: list[tuple[float, float]] = []
        """Of sampling, and of writing, which a build does beside the next block's sampling; here it doesn't."""

    def __call__(self) -> None:
        """Sample and commit."""
        begin = time.perf_counter()
        block = sample_block(self.plan, 0)
        sampled = time.perf_counter()
        commit_block(self.plan, block, "benchmark")
        self.seconds.append((sampled - begin, time.perf_counter() - sampled))
        self.states = block.states


def seconds_to_commit(store: Path, block_size: int) -> float:
    """Of one block of 11 states: rounding, hashing, writing, reading back, waiting for the disk."""
    states = layout_of(STEPS + 1, block_size).states
    values = np.random.default_rng(0).standard_normal((block_size, 3, 32, 32), dtype=np.float32)
    return seconds_of(lambda: write_states(store, {state.step: values for state in states}, block_size))


def has_bfloat16(device: str) -> bool:
    """Whether the device has instructions for it."""
    return device != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def peak_flops(device: str) -> float:
    """Floating-point operations a second of the commonest convolution alone, 256 channels at 16×16."""
    x = torch.randn(8, 256, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        for _ in range(12):
            begin = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            wait_for(device)
            times.append(time.perf_counter() - begin)
    return 2 * 8 * 256 * 256 * 9 * 256 / statistics.median(times[2:])


def measure(bench: Benchmark, folder: Path) -> None:
    """Both precisions, one after the other in each round."""
    batch = 2 if bench.quick else 32 if bench.device == "cpu" else 256
    teacher = save_random(folder / "teacher", tiny() if bench.quick else CIFAR)
    noise = initial_noise(0, range(batch), (3, 32, 32), "float16")
    bare = Bare(teacher, noise, bench.device, torch.float32)
    ours = {"float32": Ours(teacher, folder / "a.zarr", batch, bench.device, "float32")}
    ways: dict[str, Any] = {
        BARE: bare.states,
        OURS: ours["float32"],
        "bare loop, a PNG per state": lambda: bare.pictures(folder / "png"),
        "bare loop, a .pt per trajectory": lambda: bare.files(folder / "pt"),
    }
    half = "bfloat16" if bench.device == "cpu" else "float16"
    if bench.device != "cpu" or has_bfloat16(bench.device):
        ours[half] = Ours(teacher, folder / "b.zarr", batch, bench.device, half)
        ways[f"{OURS}, {half}"] = ours[half]
    if bench.device != "cpu":
        ways[f"{BARE}, {half}"] = Bare(teacher, noise, bench.device, torch.float16).states
    for way in ways.values():
        way()
    reference = torch.stack(bare.states()).float().cpu().numpy()
    times = interleaved(ways, bench.rounds(3))
    own = np.stack([ours["float32"].states[step] for step in range(STEPS + 1)])
    apart = float(np.abs(own - reference).max())
    if apart > 5e-3:  # sums are taken in another order, by the memory's and the threads'; ten steps amplify it
        raise SystemExit(f"the states differ from the bare loop's by {apart:.1e}")
    sampling, writing = (statistics.median(values) for values in zip(*ours["float32"].seconds, strict=True))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare.unet(bare.noise, 500)
    flops = counter.get_total_flops() * STEPS / statistics.median(times[OURS])
    limit = peak_flops(bench.device)
    block = 64 if bench.quick else 2500
    share = seconds_to_commit(folder / "large.zarr", block) / (sampling * block / batch)
    network = "a tiny network" if bench.quick else "google/ddpm-cifar10-32's network (35.75 M, random weights)"
    comparison = Comparison(
        title=f"{network}, DDIM {STEPS}, a batch of {batch}, float32",
        unit="s",
        baseline=BARE,
        rows=rows_of({name: values for name, values in times.items() if half not in name}, BARE),
        agreement=f"All {STEPS + 1} states are the bare loop's to {apart:.1e}.",
        note=f"Of its time here {writing:.3f} s go into writing {batch} seeds as a block of their own, after they were "
        f"sampled. A build has blocks of {block} seeds, for which writing is {share:.2%} of sampling, and does it "
        f"beside the next block's sampling. The limit is arithmetic: {flops / 1e9:,.0f} GFLOP/s of the "
        f"{limit / 1e9:,.0f} that the commonest convolution reaches alone; convolutions are three quarters of the "
        "time, attention's products and normalisation the rest. The gain over the bare loop is channels-last memory, "
        "in which oneDNN needs no copies.",
    )
    target = 0.95 if bench.device == "cpu" else 0.6
    comparison.targets = [
        Target(what="stage one by the bare loop, float32", found=ratio_between(times, OURS, BARE), limit=target),
        Target(what="recording's share of stage one", found=share, limit=0.01),
    ]
    bench.add(comparison)
    if half in ours:
        add_half(bench, times, ours, half)
    else:
        comparison.note += " bfloat16: this processor has no instructions for it."


def add_half(bench: Benchmark, times: dict[str, list[float]], ours: dict[str, Ours], half: str) -> None:
    """The same in half precision, and how far its states are."""
    name = f"{OURS}, {half}"
    apart = {
        step: float(np.sqrt(np.mean((ours[half].states[step] - ours["float32"].states[step]) ** 2)))
        for step in range(STEPS + 1)
    }
    chosen = {key: values for key, values in times.items() if key in (BARE, OURS) or half in key}
    base = BARE if bench.device == "cpu" else f"{BARE}, {half}"
    bench.add(
        Comparison(
            title=f"the same in {half}",
            unit="s",
            baseline=base,
            rows=rows_of(chosen, base),
            targets=[
                Target(
                    what=f"stage one in {half} by the bare loop" + (" in float32" if bench.device == "cpu" else ""),
                    found=ratio_between(times, name, base),
                    limit=0.55 if bench.device == "cpu" else 0.6,
                )
            ],
            agreement=f"Root mean square by which its states differ from float32's, after 0 to {STEPS} steps: "
            + " ".join(f"{value:.1e}" for value in apart.values()) + ".",
            note="Twice the arithmetic an instruction; normalisation, attention's softmax and memory don't double: on "
            "the CPU of 2026-11-23 convolutions are 65 % of it, attention 17 %, normalisation 9 %. In batches of 8 it "
            "was 0.53 to 0.56: weights are laid out anew for every call, whatever the batch. Laying them out once gave "
            "0.50 to 0.52 there, nothing in batches of a build's size, and was left.",
        )
    )  # fmt: skip


if __name__ == "__main__":
    run("sampling", "Stage one: how fast is recording beside a bare diffusers loop?", measure)
