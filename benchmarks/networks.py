"""Networks with random weights and synthetic stores; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from advkd.cache import CacheWriter, Layout, Recipe, State, TrajectoryCache
from advkd.cache.format.noise import NOISE_RULE
from advkd.stages.teacher.diffusers_api import diffusers

DIGITS_SHAPE = (1, 16, 16)
CIFAR_SHAPE = (3, 32, 32)
CIFAR_UNET: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
"""`unet/config.json` of google/ddpm-cifar10-32: 35.75 M parameters."""


def tiny(size: int = 32, channels: int = 3, width: int = 8) -> dict[str, Any]:
    """Options of a UNet that costs next to nothing."""
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [width, width],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": width // 2,
    }


def save_random(folder: Path, options: dict[str, Any]) -> Path:
    """A pipeline folder with random weights from a fixed seed."""
    torch.manual_seed(0)
    unet, scheduler = diffusers().UNet2DModel(**options), diffusers().DDPMScheduler(clip_sample=True)
    diffusers().DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


def recipe_of(item_shape: tuple[int, ...]) -> Recipe:
    """A recipe with invented contents."""
    sampler = {"name": "ddim", "steps": 50, "eta": 0.0, "deterministic": True, "config": {}, "timesteps": [3.0]}
    return Recipe(
        teacher={"tensors_sha256": "0" * 64, "unet": {}, "scheduler": {}},
        sampler=sampler,
        precision={"compute": "float32", "tf32": False},
        noise={"rule": NOISE_RULE, "root_seed": 0},
        item_shape=item_shape,
    )


def layout_of(num_states: int, block_size: int) -> Layout:
    """Evenly spaced states of a variance-preserving path."""
    angles = np.linspace(0.0, np.pi / 2, num_states)
    steps = np.linspace(0, 50, num_states).round().astype(int)
    states = tuple(
        State(
            step=int(step),
            timestep=999.0 - 20.0 * step,
            alpha=round(float(np.sin(angle)), 10),
            sigma=round(float(np.cos(angle)), 10),
            scale=1.0,
        )
        for step, angle in zip(steps, angles, strict=True)
    )
    return Layout(states=states, dtype="float16", block_size=block_size)


def write_states(store: Path, states: dict[int, np.ndarray[Any, Any]], block_size: int) -> None:
    """Write a store of the given states, shape (N, C, H, W) each; the block size divides N."""
    num_seeds, *item_shape = next(iter(states.values())).shape
    layout = layout_of(len(states), block_size)
    writer = CacheWriter.open(store, recipe_of(tuple(item_shape)), layout)
    with writer.writing():
        writer.grow(range(num_seeds))
        for block in range(num_seeds // block_size):
            part = slice(block * block_size, (block + 1) * block_size)
            writer.commit(block, {step: values[part] for step, values in states.items()})


def smooth_store(store: Path, item_shape: tuple[int, ...], num_states: int, num_seeds: int) -> TrajectoryCache:
    """A store whose noise determines its images, so that there is something to learn."""
    noise = np.random.default_rng(0).standard_normal((num_seeds, *item_shape), dtype=np.float32)
    coarse = noise.reshape(num_seeds, item_shape[0], item_shape[1] // 4, 4, item_shape[2] // 4, 4).mean((3, 5))
    image = np.tanh(4.0 * coarse).repeat(4, axis=2).repeat(4, axis=3)
    angles = np.linspace(0.0, np.pi / 2, num_states)
    steps = np.linspace(0, 50, num_states).round().astype(int)
    states = {int(s): np.sin(a) * image + np.cos(a) * noise for s, a in zip(steps, angles, strict=True)}
    write_states(store, {s: values.astype(np.float16) for s, values in states.items()}, num_seeds // 4)
    return TrajectoryCache.open(store)
