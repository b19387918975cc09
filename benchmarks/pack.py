"""Rate, error and speed of every codec of `advkd-cache pack`, on the default cache and on crops of photographs.

    python -m benchmarks.pack --cache cache/digits.zarr --plot pack.png

Prints a table and plots rate against error. Bytes per value cover all recorded states including x_T; errors cover the
coded states (x_T is exact). Speeds are megabytes of raw values per second of one core, in memory: coding and drawing
x_T, without files, hashes and the packer's verification; the best of several rounds.

The photographs are scikit-learn's two, cut into 32×32 colour crops. Their trajectories are exact DDIM ones: the
posterior mean of a mixture of all crops as points is E[x_0 | x_t] = Σ softmax(−‖x_t − α x_i‖² / 2σ²) x_i.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advkd.cache import CacheWriter, Layout, State, TrajectoryCache, standard_normal
from advkd.cache.codec import standard
from advkd.cache.codec.state_codec import StateCodec
from advkd.cache.format.encoding import STANDARD, Packing
from benchmarks.networks import recipe_of

Values = npt.NDArray[Any]
SIDE, FACTOR, NUM_CROPS, NUM_PHOTO_SEEDS, STEPS, RECORDED = 32, 4, 4096, 512, 50, 5
NAMED = {"lossless": None, "archive 2⁻¹²": 2.0**-12, "archive 2⁻¹¹": 2.0**-11, "archive 1/255": 1 / 255}
CURVE = [2.0**-12, 2.0**-11, 2.0**-10, 2.0**-9, 1 / 255, 2.0**-7, 2.0**-6, 2.0**-5, 2.0**-4]


@dataclass(frozen=True)
class Result:
    """One codec on one store."""

    name: str
    bytes_per_value: float
    rms: float
    largest: float
    encode: float
    decode: float


def crops(rng: np.random.Generator) -> Values:
    """Random crops of two photographs at a quarter of their size, half of them mirrored.

    Returns:
        float32, shape (n, 3, 32, 32), values in [−1, 1].
    """
    from sklearn.datasets import load_sample_images

    photographs = [image.astype(np.float32) / 127.5 - 1 for image in load_sample_images().images]
    size, found = SIDE * FACTOR, []
    for _ in range(NUM_CROPS):
        image = photographs[rng.integers(len(photographs))]
        y, x = (rng.integers(edge - size + 1) for edge in image.shape[:2])
        small = image[y : y + size, x : x + size].reshape(SIDE, FACTOR, SIDE, FACTOR, 3).mean(axis=(1, 3))
        found.append((small[:, ::-1] if rng.random() < 0.5 else small).transpose(2, 0, 1))
    return np.stack(found).astype(np.float32)


def write_photographs(path: Path) -> None:
    """A store of exact DDIM trajectories."""
    points = crops(np.random.default_rng(0)).reshape(NUM_CROPS, -1)
    squares = np.sum(points.astype(np.float64) ** 2, axis=1)
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    timesteps = np.arange(STEPS)[::-1] * (1000 // STEPS) + (1000 // STEPS - 1)
    alphas, sigmas = np.append(np.sqrt(bars[timesteps]), 1.0), np.append(np.sqrt(1 - bars[timesteps]), 0.0)
    shape = (3, SIDE, SIDE)
    x = standard_normal(0, range(NUM_PHOTO_SEEDS), shape).astype(np.float16).astype(np.float32).reshape(-1, 3 * SIDE**2)
    kept = {0: x}
    for step in range(STEPS):
        alpha, sigma = float(alphas[step]), float(sigmas[step])
        logits = (alpha * (x @ points.T) - alpha**2 * squares / 2) / sigma**2
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        mean = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32) @ points
        x = (alphas[step + 1] * mean + sigmas[step + 1] / sigma * (x - alpha * mean)).astype(np.float32)
        if (step + 1) % (STEPS // RECORDED) == 0:
            kept[step + 1] = x
    states = tuple(
        State(step=step, timestep=float([*timesteps, -1][step]), alpha=float(alphas[step] if step else 0.0),
              sigma=float(sigmas[step] if step else 1.0), scale=1.0)
        for step in kept
    )  # fmt: skip
    writer = CacheWriter.open(
        path, recipe_of(shape), Layout(states=states, dtype="float16", block_size=NUM_PHOTO_SEEDS)
    )
    with writer.writing():
        writer.grow(range(NUM_PHOTO_SEEDS))
        writer.commit(0, {step: values.reshape(-1, *shape) for step, values in kept.items()})


def coders(cache: TrajectoryCache, packing: Packing) -> tuple[Callable[[Values], bytes], Callable[[bytes], Values]]:
    """Encoder and decoder of the next state of block 0; predictive codecs begin with x_T, which has no bytes."""
    if not packing.is_predictive:
        shape = (cache.layout.block_size, *cache.item_shape)
        return (
            lambda values: standard.encode(standard.round_mantissas(values, packing), packing),
            lambda data: standard.decode(data, packing, cache.dtype, shape),
        )
    encoder, decoder = (StateCodec(cache.recipe, cache.layout, packing, 0) for _ in range(2))
    begun = False

    def encode(values: Values) -> bytes:
        nonlocal begun
        if begun:
            return encoder.encode(values)
        begun = bool(encoder.draw_initial().size)
        return b""

    return encode, lambda data: decoder.decode(data) if data else decoder.draw_initial()


def measure(cache: TrajectoryCache, packing: Packing, name: str, rounds: int) -> Result:
    """Code block 0 and decode it."""
    states = [np.array(cache.block_view(step, 0)) for step in cache.states]
    encoding, decoding = math.inf, math.inf
    exact = Packing.of(packing.codec, cache.layout.dtype, level=packing.parameters.get("level")) if (
        packing.codec in STANDARD) else packing  # fmt: skip
    for _ in range(rounds):
        first_encode, first_decode = coders(cache, exact)  # standard codecs keep x_T exactly
        encode, decode = coders(cache, packing) if packing is not exact else (first_encode, first_decode)
        began = time.process_time()
        coded = [first_encode(states[0]), *(encode(values) for values in states[1:])]
        encoding = min(encoding, time.process_time() - began)
        began = time.process_time()
        decoded = [first_decode(coded[0]), *(decode(data) for data in coded[1:])]
        decoding = min(decoding, time.process_time() - began)
    assert decoded[0].tobytes() == states[0].tobytes()
    errors = [one.astype(np.float64) - two for one, two in zip(decoded[1:], states[1:], strict=True)]
    megabytes = sum(values.nbytes for values in states) / 1e6
    return Result(
        name=name,
        bytes_per_value=sum(map(len, coded)) / sum(values.size for values in states),
        rms=math.sqrt(float(np.mean([np.mean(one**2) for one in errors]))),
        largest=max(float(np.abs(one).max()) for one in errors),
        encode=megabytes / encoding,
        decode=megabytes / decoding,
    )


def results(cache: TrajectoryCache, rounds: int) -> Iterator[Result]:
    """Every row of the table."""
    for name, error in NAMED.items():
        codec = "lossless" if error is None else "archive"
        yield measure(cache, Packing.of(codec, "float16", max_error=error), name, rounds)
    for codec in STANDARD:
        yield measure(cache, Packing.of(codec, "float16"), codec, rounds)
    for codec in STANDARD:
        yield measure(cache, Packing.of(codec, "float16", keep_bits=6), f"{codec}, 6 bits", rounds)


def curves(cache: TrajectoryCache) -> dict[str, list[Result]]:
    """Rate against error."""
    found = {"archive": [measure(cache, Packing.of("archive", "float16", max_error=e), "archive", 1) for e in CURVE]}
    for codec in STANDARD:
        packings = [Packing.of(codec, "float16", keep_bits=bits) for bits in range(9, 2, -1)]
        found[codec] = [measure(cache, packing, codec, 1) for packing in packings]
    return found


def main() -> None:
    """Print the tables and save the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pack", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path("cache/digits.zarr"), help="the default experiment's cache")
    parser.add_argument("--plot", type=Path, default=Path("pack.png"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    from advkd.pipeline.memory import keep_freed_memory

    keep_freed_memory()
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "photographs.zarr")
        stores = {"default cache": arguments.cache, "photographs": Path(folder) / "photographs.zarr"}
        figure, panels = plt.subplots(1, len(stores), figsize=(11, 4.2), sharey=True, layout="constrained")
        for panel, (title, path) in zip(panels, stores.items(), strict=True):
            cache = TrajectoryCache.open(path)
            print(f"\n{title}: {'×'.join(map(str, cache.item_shape))}, {len(cache.states)} states\n")
            print("| codec | bytes per value | rms error | largest | encode MB/s | decode MB/s |\n" + "|---" * 6 + "|")
            for row in results(cache, arguments.rounds):
                errors = f"{row.rms:.1e} | {row.largest:.1e}" if row.largest else "0 | 0"
                print(f"| {row.name} | {row.bytes_per_value:.3f} | {errors} | {row.encode:.0f} | {row.decode:.0f} |")
            for codec, points in curves(cache).items():
                panel.plot([p.rms for p in points], [p.bytes_per_value for p in points], "o-", label=codec)
            panel.set(xscale="log", title=title, xlabel="rms error of the coded states", ylim=(0, None))
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("bytes per value, all recorded states")
        panels[0].legend()
        figure.savefig(arguments.plot, dpi=110)
    print(f"\nplot: {arguments.plot}")


if __name__ == "__main__":
    main()
