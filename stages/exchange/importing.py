"""Makes a cache of trajectories that other tools have written.

Its noise is data: `noise.rule` is `stored`, and the recipe holds the digest of the source, so that no two sources are
taken for one. What the source doesn't say is "not recorded".
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from advkd.cache.care.summary import origin_in
from advkd.cache.errors import CacheError, LockedError, UsageError
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.condition import LABEL_DTYPE, LABELS_PATH, ClassCondition
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.recipe import NOT_RECORDED, STORED_NOISE, Recipe
from advkd.cache.format.space import LatentSpace
from advkd.cache.write.writer import CacheWriter
from advkd.stages.exchange.sources import Paths, Source, Survey
from advkd.stages.provenance import versions
from advkd.stages.reporter import Reporter
from advkd.stages.teacher.build.block import MAX_SHARE_BEYOND, MAX_VALUE
from advkd.stages.teacher.load.folders import autoencoder_part
from advkd.stages.teacher.load.latents import load_space

PURE_NOISE, IMAGE = (0.0, 1.0), (1.0, 0.0)
"""(alpha, sigma) of both ends of a path."""
NO_TIMESTEP = -1.0
MAX_DEFAULT_BLOCK = 1024
UNIT_TOLERANCE = 0.02
"""How far the noise's standard deviation may be from 1, beyond what chance does."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was written."""

    store: Path
    num_seeds: int
    num_present: int
    """Of them, those that an earlier call had written."""
    num_dropped: int
    """In the end of the source, too few for a block."""


def import_cache(
    folder: Path,
    store: Path,
    reporter: Reporter,
    *,
    levels: Sequence[tuple[float, float]] | None = None,
    decoder: str | None = None,
    block_size: int | None = None,
    dtype: str | None = None,
    accept_range: bool = False,
    command: str = "",
) -> Imported:
    """Write a store of the seeds in a folder of shards, or finish one that an earlier call began.

    Args:
        folder: with `.npz` or `.tar` shards, see `advkd.stages.exchange.sources`.
        store: to write.
        reporter: shows progress.
        levels: (alpha, sigma) of each state on the way, the noise's first, x_t = alpha · x_0 + sigma · ε; if None,
            those that `advkd-cache export` wrote down, else the states on the way are left out.
        decoder: folder of the autoencoder whose latents the values are; None for pixels.
        block_size: seeds per block; if None, 1,024, or fewer so that an eighth of the seeds is dropped at most.
        dtype: to store; the source's own if None.
        accept_range: whether values may lie beyond the range of images.
        command: for the provenance.

    Raises:
        UsageError: there are no shards, levels don't fit them, or a latent source has no decoder.
        CacheError: a shard is unreadable, or its values can't be what they should.
        MismatchError: the store holds something else.
    """
    source = Source.find(folder)
    survey = source.survey(reporter)
    block_size = block_size or _block_size(survey.num_seeds)
    num_blocks = survey.num_seeds // block_size
    if not num_blocks:
        raise UsageError(
            f"{folder} has {survey.num_seeds:,} seeds, less than a block of {block_size:,}: choose a smaller "
            "--block-size"
        )
    if survey.others:
        reporter.say(f"left out, for no student learns from it: {', '.join(survey.others[:8])}")
    states, on_the_way = _states(source, survey, levels, reporter)
    space, weights = _space(source, survey, decoder)
    recipe = Recipe(
        teacher={"tensors_sha256": NOT_RECORDED, "unet": {}, "scheduler": {}},
        sampler={
            "name": NOT_RECORDED,
            "steps": states[-1].step,
            "eta": 0.0,
            "deterministic": True,
            "config": {},
        },
        precision={"compute": NOT_RECORDED},
        noise={"rule": STORED_NOISE, "root_seed": 0, "source_sha256": survey.sha256},
        item_shape=survey.item_shape,
        condition=_condition(survey),
        space=space,
    )
    stored = dtype or ("float16" if survey.dtype == "float16" else "float32")
    writer = CacheWriter(store, recipe, Layout(states=states, dtype=stored, block_size=block_size))
    blocks, seeds, num_present = source.blocks(block_size), range(num_blocks * block_size), 0
    first = next(blocks)
    _check(_values(first, states, on_the_way), states, space is not None or accept_range, folder)
    writer.begin()
    with writer.writing():
        _describe(writer, seeds, weights, source, command)
        reporter.start("import", num_blocks, "blocks")
        for block, paths in enumerate(itertools.chain([first], blocks)):
            outcome = writer.make(block, partial(_commit, writer, block, paths, states, on_the_way))
            num_present += outcome == "present"
            reporter.advance(1)
        reporter.finish()
    if writer.missing(seeds):
        raise LockedError(f"{store}: another process imports some of the blocks: wait for it, then run this again")
    return Imported(
        store=store,
        num_seeds=len(seeds),
        num_present=num_present * block_size,
        num_dropped=survey.num_seeds - len(seeds),
    )


def _block_size(num_seeds: int) -> int:
    """A power of two, at most an eighth of the seeds."""
    return min(MAX_DEFAULT_BLOCK, 1 << max(0, (num_seeds // 8).bit_length() - 1))


def _states(
    source: Source, survey: Survey, levels: Sequence[tuple[float, float]] | None, reporter: Reporter
) -> tuple[tuple[State, ...], bool]:
    """The states that the store records, and whether those on the way are among them: where their levels are known."""
    index, count = source.index, survey.num_inner
    steps, timesteps = list(range(count)), [NO_TIMESTEP] * count
    if levels is None and "path_levels" in index and count:
        levels = [(float(alpha), float(sigma)) for alpha, sigma in index["path_levels"][:count]]
        steps = [int(step) for step in index["path_steps"][:count]]
        timesteps = [float(timestep) for timestep in index["path_timesteps"][:count]]
    known = levels is not None
    if levels is None:
        if count > 1:
            reporter.say(
                f"{source.folder} doesn't say at which noise levels its {count} states on the way lie: only noise and "
                "image are imported; --levels tells"
            )
        levels, steps, timesteps = [PURE_NOISE], [0], [NO_TIMESTEP]
    elif len(levels) != max(count, 1):
        raise UsageError(
            f"--levels has {len(levels)} levels; {source.folder} has {count} states on the way, the noise first"
        )
    signal = [alpha / sigma if sigma > 0 else float("inf") for alpha, sigma in levels]
    if not all(before < after for before, after in itertools.pairwise([*signal, float("inf")])):
        raise UsageError(
            "--levels: the share of signal must grow from each level to the next, and end below an image's"
        )
    last = steps[-1] + 1 if index.get("path_steps") is None else max(steps[-1] + 1, *map(int, index["path_steps"]))
    numbered = zip([*steps, last], [*timesteps, NO_TIMESTEP], [*levels, IMAGE], strict=True)
    states = tuple(
        State(step=step, timestep=timestep, alpha=alpha, sigma=sigma, scale=(alpha**2 + sigma**2) ** 0.5)
        for step, timestep, (alpha, sigma) in numbered
    )
    return states, known and count > 0


def _space(source: Source, survey: Survey, decoder: str | None) -> tuple[LatentSpace | None, dict[str, Tensor]]:
    """Where the values live, and the decoder's weights."""
    said = source.index.get("space")
    if decoder is None:
        if said is not None:
            raise UsageError(f"{source.folder} holds latents: give the folder of their autoencoder with --decoder")
        return None, {}
    channels, height, width = survey.item_shape
    space, weights = load_space(autoencoder_part(decoder), (channels, height, width), decoder)
    if said is not None and said["tensors_sha256"] != space.tensors_sha256:
        raise UsageError(f"--decoder {decoder} has other weights than the decoder of {source.folder}'s latents")
    return space, weights


def _condition(survey: Survey) -> ClassCondition | None:
    if not survey.labels:
        return None
    if survey.labels[0] < 0:
        raise CacheError(f"the source has the class label {survey.labels[0]}; expected 0 and above")
    return ClassCondition(num_classes=survey.labels[-1] + 1, labels=survey.labels, rule="stored")


def _values(paths: Paths, states: Sequence[State], on_the_way: bool) -> dict[int, Any]:
    """A block's states in stored units."""
    image = paths.image
    if image.dtype == np.uint8:
        image = image.astype(np.float32) / 127.5 - 1.0
    inner = paths.inner if on_the_way and paths.inner is not None else paths.noise[:, None]
    before = {
        state.step: inner[:, place].astype(np.float32) / np.float32(state.scale)
        for place, state in enumerate(states[:-1])
    }
    return {**before, states[-1].step: image}


def _commit(
    writer: CacheWriter, block: int, paths: Paths, states: Sequence[State], on_the_way: bool, claim: ExitStack
) -> None:
    labels = {} if paths.labels is None else {LABELS_PATH: paths.labels.astype(LABEL_DTYPE)}
    writer.commit(block, _values(paths, states, on_the_way), labels)


def _check(values: Mapping[int, Any], states: Sequence[State], any_range: bool, folder: Path) -> None:
    """Stop where the first block can't be what it should be.

    Raises:
        CacheError: the noise isn't unit normal in stored units, or the images lie outside their range.
    """
    noise, image = values[states[0].step].astype(np.float64), values[states[-1].step].astype(np.float32)
    spread = float(noise.std())
    if not abs(spread - 1.0) <= UNIT_TOLERANCE + 3.0 / noise.size**0.5:
        raise CacheError(
            f"{folder}: the noise has standard deviation {spread:.4g}; expected unit normal: divide it by its "
            "sigma, or give --levels with the sigma that it has"
        )
    beyond = float((np.abs(image) > MAX_VALUE).mean())
    if not any_range and not beyond <= MAX_SHARE_BEYOND:
        raise CacheError(
            f"{folder}: {beyond:.1%} of the images' values lie beyond ±{MAX_VALUE:g}; expected [−1, 1]. If they are "
            "latents, name their autoencoder with --decoder; --accept-range keeps such values"
        )


def _describe(writer: CacheWriter, seeds: range, weights: Mapping[str, Tensor], source: Source, command: str) -> None:
    """Let the arrays declare the seeds, and put the decoder beside them and where the store came from."""
    writer.grow(seeds)
    if writer.recipe.space is not None:
        writer.write_decoder(save(dict(weights)))
    note = writer.path / "provenance" / "store.json"
    if not note.is_file():
        teacher = {"source": NOT_RECORDED, **origin_in(source.index.get("teacher"))}
        made = {"folder": source.folder.name, "num_shards": len(source.shards), "command": command}
        write_atomically(note, [seal({"teacher": teacher, "imported": made, "versions": versions("zarr")})])
