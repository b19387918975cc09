"""Stores written without a teacher: small, quick, and free of torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from advkd.cache.format.layout import Layout, State
from advkd.cache.format.noise import NOISE_RULE, standard_normal
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.seeds import parse_seed_range
from advkd.cache.write.writer import CacheWriter

ITEM_SHAPE = (1, 8, 8)
BLOCK_SIZE = 16


def make_recipe(**changes: object) -> Recipe:
    """A recipe as stage one would write it, with made-up contents."""
    values: dict[str, object] = {
        "teacher": {"tensors_sha256": "0" * 64, "unet": {"sample_size": 8}, "scheduler": {"beta_start": 0.0001}},
        "sampler": {"name": "ddim", "steps": 4, "eta": 0.0, "deterministic": True, "config": {}, "timesteps": [3.0]},
        "precision": {"compute": "float32", "tf32": False},
        "noise": {"rule": NOISE_RULE, "root_seed": 0},
        "item_shape": ITEM_SHAPE,
    }
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def make_layout(block_size: int = BLOCK_SIZE, dtype: str = "float16") -> Layout:
    """Three recorded states of a variance-preserving path."""
    states = (
        State(step=0, timestep=999.0, alpha=0.0, sigma=1.0, scale=1.0),
        State(step=2, timestep=499.0, alpha=0.6, sigma=0.8, scale=1.0),
        State(step=4, timestep=-1.0, alpha=1.0, sigma=0.0, scale=1.0),
    )
    return Layout(states=states, dtype=dtype, block_size=block_size)


def block_states(layout: Layout, block: int) -> dict[int, npt.NDArray[np.float32]]:
    """States that follow from the seeds: x_0 is a smooth function of x_T, the others lie between."""
    seeds = range(block * layout.block_size, (block + 1) * layout.block_size)
    noise = standard_normal(0, seeds, ITEM_SHAPE).astype(layout.dtype).astype(np.float32)
    x0 = np.tanh(noise.mean(axis=(1, 2, 3), keepdims=True) * 4.0 + noise * 0.1).astype(np.float32)
    return {state.step: (state.alpha * x0 + state.sigma * noise).astype(np.float32) for state in layout.states}


def write_store(path: Path, seeds: str = "0:64", **changes: object) -> CacheWriter:
    """A committed store over some seeds."""
    layout = make_layout()
    writer = CacheWriter.open(path, make_recipe(**changes), layout)
    with writer.writing():
        writer.grow(parse_seed_range(seeds))
        for block in writer.missing(parse_seed_range(seeds)):
            writer.commit(block, block_states(layout, block))
    return writer


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without provenance."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "provenance" not in path.relative_to(folder).parts
    }
