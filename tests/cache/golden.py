"""The golden stores of both formats. `python -m tests.cache.golden` writes them again, which must change nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.condition import ClassCondition
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.noise import NOISE_RULE, standard_normal
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.space import LatentSpace
from advkd.cache.format.store_paths import provenance_path
from advkd.cache.write.writer import CacheWriter

DATA = Path(__file__).resolve().parents[1] / "data"
FORMAT_1 = DATA / "format-1.zarr"
CLASSES = DATA / "format-2-classes.zarr"
LATENTS = DATA / "format-2-latents.zarr"
SHAPE = (1, 4, 4)
BLOCKS = (0, 2)
RECIPE = Recipe(
    teacher={"tensors_sha256": "11" * 32, "unet": {"sample_size": 4}, "scheduler": {"beta_start": 0.0001}},
    sampler={
        "name": "ddim",
        "steps": 10,
        "eta": 0.0,
        "deterministic": True,
        "scheduler": "DDIMScheduler",
        "config": {"timestep_spacing": "trailing"},
        "timesteps": [999.0, 899.0],
    },
    precision={"compute": "float32", "tf32": False},
    noise={"rule": NOISE_RULE, "root_seed": 7},
    item_shape=SHAPE,
)
LAYOUT = Layout(
    states=(
        State(step=0, timestep=999.0, alpha=0.0, sigma=1.0, scale=1.0),
        State(step=4, timestep=599.0, alpha=0.6, sigma=0.8, scale=1.0),
        State(step=10, timestep=-1.0, alpha=1.0, sigma=0.0, scale=1.0),
    ),
    dtype="float16",
    block_size=4,
)


def states_of(block: int) -> dict[int, npt.NDArray[np.float32]]:
    """The states of a block: x_0 is a coarse copy of the noise."""
    noise = standard_normal(7, range(4 * block, 4 * block + 4), SHAPE).astype(np.float16).astype(np.float32)
    x0 = (np.round(noise * 4) / 8).astype(np.float32)
    return {0: noise, 4: np.float32(0.6) * x0 + np.float32(0.8) * noise, 10: x0}


def decoder() -> bytes:
    """A safetensors file with made-up weights of a decoder."""
    weights = np.arange(6, dtype="<f4").reshape(3, 2) / 8
    entry = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, weights.nbytes]}
    header = json.dumps({"decoder.weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + weights.tobytes()


CLASS_RECIPE = replace(RECIPE, condition=ClassCondition(num_classes=5, labels=(0, 1, 3), guidance=2.5, null_class=4))
LATENT_RECIPE = replace(
    RECIPE,
    space=LatentSpace(
        decoder="AutoencoderKL",
        config={"latent_channels": 1},
        tensors_sha256="f5b3bc735584de5054641324a0011708619d6604028c3785ecd5ad4f0d82b2b7",
        scaling_factor=0.5,
        shift_factor=0.25,
        image_shape=(3, 8, 8),
    ),
)
RECIPES = {FORMAT_1: RECIPE, CLASSES: CLASS_RECIPE, LATENTS: LATENT_RECIPE}


def write(path: Path, recipe: Recipe = RECIPE) -> None:
    """Write the store of two blocks of four seeds, and a gap between them."""
    writer = CacheWriter.open(path, recipe, LAYOUT)
    with writer.writing():
        writer.grow(range(12))
        if recipe.space is not None:
            writer.write_decoder(decoder())
        for block in BLOCKS:
            note = {"began": "2026-11-23T08:00:00+00:00", "host": "example", "seconds": 0.1}
            write_atomically(path / provenance_path(block), [seal(note)])
            writer.commit(block, states_of(block))
    origin = {"teacher": {"source": "team/teacher", "commit": None, "license": "apache-2.0"}}
    write_atomically(path / "provenance/store.json", [seal(origin)])
    write_atomically(path / "provenance/tolerance.json", [seal({"rms": {"0004": 2e-3, "0010": 3e-3}})])
    for name in ("writer.lock", "writer.json"):
        (path / "provenance" / name).unlink()


if __name__ == "__main__":
    for store, its_recipe in RECIPES.items():
        shutil.rmtree(store, ignore_errors=True)
        write(store, its_recipe)
