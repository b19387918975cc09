"""Packed stores for tests, of smooth images as a trained teacher makes them."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from advkd.cache import TrajectoryCache
from advkd.cache.format.encoding import STANDARD, Packing
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.noise import standard_normal
from advkd.cache.format.recipe import Recipe
from advkd.cache.write.pack import pack
from advkd.cache.write.writer import CacheWriter
from tests.conftest import ROOT
from tests.stores import make_recipe

FIRST_GOLDEN = ROOT / "tests/data/packed-1.zarr"
"""Of the encoding `archive`, whose arrays list `advkd.chain`."""
GOLDEN = ROOT / "tests/data/packed-2.zarr"
"""Of the encoding `packed-lossless`, whose arrays list `advkd.packed`."""
ERROR = 1 / 256
ARCHIVE = Packing.of("archive", "float16", max_error=ERROR)
LOSSLESS = Packing.of("lossless", "float16")
EVERY = [
    LOSSLESS,
    ARCHIVE,
    *(Packing.of(codec, "float16") for codec in STANDARD),
    *(Packing.of(codec, "float16", keep_bits=5, level=3) for codec in STANDARD),
]


def packed_of(store: Path, packing: Packing = LOSSLESS) -> Path:
    out = store.with_name(f"packed-{packing.codec}.zarr")
    pack(TrajectoryCache.open(store), out, packing)
    return out


def smooth_states(recipe: Recipe, layout: Layout, block: int) -> dict[int, npt.NDArray[np.float32]]:
    """x_k = c_k · x_T + a smooth image that changes slowly, as a trained teacher's are."""
    seeds = range(block * layout.block_size, (block + 1) * layout.block_size)
    noise = standard_normal(recipe.root_seed, seeds, recipe.item_shape).astype(layout.dtype).astype(np.float32)
    _, height, width = recipe.item_shape
    y, x = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 3, width), indexing="ij")
    phases = noise.reshape(len(noise), -1)[:, [0, -1], None, None, None]
    image = np.tanh(2 * np.sin(y + phases[:, 0]) * np.cos(x + phases[:, 1])).astype(np.float32)
    image = image * np.linspace(0.5, 1, recipe.item_shape[0], dtype=np.float32)[None, :, None, None]
    return {s.step: (s.stored_alpha * image + s.stored_sigma * noise).astype(np.float32) for s in layout.states}


def write_smooth(
    path: Path, item_shape: tuple[int, ...], dtype: str, block_size: int, num_blocks: int, num_states: int = 3
) -> None:
    recipe = make_recipe(item_shape=item_shape)
    parts = np.linspace(0, 1, num_states)
    levels = [(float(np.sin(part * np.pi / 2)), float(np.cos(part * np.pi / 2))) for part in parts]
    states = tuple(
        State(step=2 * k, timestep=float(999 - k), alpha=alpha, sigma=sigma, scale=1.0)
        for k, (alpha, sigma) in enumerate(levels)
    )
    layout = Layout(states=states, dtype=dtype, block_size=block_size)
    writer = CacheWriter.open(path, recipe, layout)
    with writer.writing():
        writer.grow(range(block_size * num_blocks))
        for block in range(num_blocks):
            writer.commit(block, smooth_states(recipe, layout, block))
