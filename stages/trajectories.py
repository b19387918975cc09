"""Pictures of a cache's trajectories, as a build, a preview, a card and an evaluation show them."""

from __future__ import annotations

from pathlib import Path

import numpy.typing as npt

from advkd.cache.care.summary import origin_of
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.decoder import as_images, cache_decoder
from advkd.stages.pictures import save_denoising, save_trajectories


def draw_trajectories(path: Path, cache: TrajectoryCache, seeds: npt.ArrayLike, film: Path | None = None) -> Path:
    """Draw one row per seed, with what the teacher was told before it, and one column per recorded state.

    Args:
        path: PNG to write.
        cache: that holds them.
        seeds: whose, shape (N,).
        film: GIF to write as well, of the denoising.

    Returns:
        The PNG.

    Raises:
        NotCachedError: a seed, or a state, is not in this copy.
        DamagedError: bytes differ from the ledger.
    """
    decoder = cache_decoder(cache)
    names = [state.label for state in cache.states.values()]
    states = [as_images(cache.rows(step, seeds), decoder) for step in cache.states]
    told, classes = cache.told(seeds), origin_of(cache).get("class_names", {})
    if film is not None:
        save_denoising(film, names, states)
    return save_trajectories(path, names, states, told and [classes.get(text, text) for text in told])
