"""Ways to store the noise and one state per seed, and to read random batches of them."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from PIL import Image

from advkd.cache import TrajectoryCache
from benchmarks.networks import write_states

Values = npt.NDArray[Any]
Pair = tuple[Values, Values]
STATES = (0, 50)
CEILING, OURS = "two .npy files, np.memmap (the ceiling)", "advkd"
FRESH = "advkd, first read: every byte checked"
LMDB, ZARR = "LMDB, one value per seed", "Zarr's API on the same store"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One way to store and read."""

    read: Callable[[Values], Pair]
    """Seeds → noise and state, float16, shape (n, C, H, W)."""
    files: list[Path]
    forget: Callable[[], None] = lambda: None
    """Release mapped pages so that they can be evicted."""
    exact: bool = True
    """Whether the values come back exactly; PNG clips and rounds them."""


def make_readers(folder: Path, size: int, num_seeds: int, block_size: int) -> dict[str, Reader]:
    """The same values stored in every way whose package is installed."""
    generator = np.random.default_rng(0)
    shape = (num_seeds, 3, size, size)
    noise = generator.standard_normal(shape, dtype=np.float32).astype(np.float16)
    smooth = generator.uniform(-1.0, 1.0, (num_seeds, 3, size // 8, size // 8)).astype(np.float32)
    state = (smooth.repeat(8, axis=2).repeat(8, axis=3) + 0.05 * noise).clip(-1, 1).astype(np.float16)
    readers = {CEILING: _memmap(folder / "npy", noise, state), OURS: _ours(folder / "a.zarr", noise, state, block_size)}
    readers[ZARR] = _zarr_on_ours(folder / "a.zarr")
    readers["Zarr, blosc chunks of 64"] = _zarr_blosc(folder / "blosc.zarr", noise, state)
    with contextlib.suppress(ImportError):
        readers[LMDB] = _lmdb(folder / "lmdb", noise, state)
    readers["one PNG per state"] = _png(folder / "png", noise, state)
    readers["one .pt per seed"] = _torch(folder / "pt", noise, state)
    return readers


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _memmap(folder: Path, noise: Values, state: Values) -> Reader:
    folder.mkdir()
    np.save(folder / "0.npy", noise)
    np.save(folder / "1.npy", state)
    maps = [np.load(folder / f"{i}.npy", mmap_mode="r") for i in range(2)]

    def forget() -> None:
        for item in maps:
            item._mmap.madvise(4)  # MADV_DONTNEED

    return Reader(read=lambda seeds: (maps[0][seeds], maps[1][seeds]), files=_files(folder), forget=forget)


def _ours(store: Path, noise: Values, state: Values, block_size: int) -> Reader:
    write_states(store, dict(zip(STATES, (noise, state), strict=True)), block_size)
    cache = TrajectoryCache.open(store)

    def forget() -> None:
        for step in STATES:
            mapped = cache._rows_of(step)._mapped  # private: only a benchmark needs it
            if mapped is not None:
                mapped._reserved.madvise(4)

    return Reader(read=lambda seeds: (cache.rows(0, seeds), cache.rows(50, seeds)), files=_files(store), forget=forget)


def first_touch(store: Path) -> Reader:
    """Ours on a freshly opened store, of which nothing has been checked."""
    opened: list[TrajectoryCache] = []

    def read(seeds: Values) -> Pair:
        if not opened:
            opened.append(TrajectoryCache.open(store))
        return opened[0].rows(0, seeds), opened[0].rows(50, seeds)

    return Reader(read=read, files=[], forget=opened.clear)


def _zarr_on_ours(store: Path) -> Reader:
    arrays: list[Any] = [zarr.open_array(store / f"states/{step:04d}", mode="r") for step in STATES]
    return Reader(read=lambda seeds: (arrays[0].oindex[seeds], arrays[1].oindex[seeds]), files=_files(store))


def _zarr_blosc(store: Path, noise: Values, state: Values) -> Reader:
    from zarr.codecs import BloscCodec

    arrays: list[Any] = []
    for name, values in (("noise", noise), ("state", state)):
        chunks = (64, *values.shape[1:])
        array = zarr.create_array(
            store / name, shape=values.shape, chunks=chunks, dtype=values.dtype, compressors=[BloscCodec(cname="zstd")]
        )
        array[:] = values
        arrays.append(array)
    return Reader(read=lambda seeds: (arrays[0].oindex[seeds], arrays[1].oindex[seeds]), files=_files(store))


def _lmdb(folder: Path, noise: Values, state: Values) -> Reader:
    lmdb = importlib.import_module("lmdb")
    folder.mkdir()
    size = 4 * (noise.nbytes + state.nbytes) + (1 << 24)
    with lmdb.open(str(folder), map_size=size) as environment, environment.begin(write=True) as transaction:
        for seed in range(len(noise)):
            transaction.put(seed.to_bytes(8, "big"), noise[seed].tobytes() + state[seed].tobytes())
    shape, half = noise.shape[1:], noise[0].nbytes
    opened: list[Any] = []

    def read(seeds: Values) -> Pair:
        if not opened:
            opened.append(lmdb.open(str(folder), readonly=True, lock=False, readahead=False))
        batch = np.empty((len(seeds), 2 * half), dtype=np.uint8)
        with opened[0].begin(buffers=True) as transaction:
            for place, seed in enumerate(seeds.tolist()):
                batch[place] = np.frombuffer(transaction.get(seed.to_bytes(8, "big")), dtype=np.uint8)
        both = batch.view(np.float16).reshape(len(seeds), 2, *shape)
        return both[:, 0], both[:, 1]

    def forget() -> None:
        if opened:
            opened.pop().close()

    return Reader(read=read, files=_files(folder), forget=forget)


def _png(folder: Path, noise: Values, state: Values) -> Reader:
    folder.mkdir()
    for name, values in (("noise", noise), ("state", state)):
        for seed, image in enumerate(values):
            pixels = ((image.astype(np.float32).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(pixels).save(folder / f"{seed}-{name}.png", compress_level=1)

    def read_one(seeds: Values, name: str) -> Values:
        batch = np.empty((len(seeds), *noise.shape[1:]), dtype=np.float16)
        for place, seed in enumerate(seeds.tolist()):
            batch[place] = np.asarray(Image.open(folder / f"{seed}-{name}.png")).transpose(2, 0, 1) / 127.5 - 1
        return batch

    return Reader(
        read=lambda seeds: (read_one(seeds, "noise"), read_one(seeds, "state")), files=_files(folder), exact=False
    )


def _torch(folder: Path, noise: Values, state: Values) -> Reader:
    folder.mkdir()
    for seed in range(len(noise)):
        pair = torch.from_numpy(np.stack([noise[seed], state[seed]]))
        torch.save(pair, folder / f"{seed}.pt")

    def read(seeds: Values) -> Pair:
        loaded = [torch.load(folder / f"{seed}.pt", weights_only=True) for seed in seeds.tolist()]
        batch = torch.stack(loaded).numpy()
        return batch[:, 0], batch[:, 1]

    return Reader(read=read, files=_files(folder))


def random_batches(reader: Reader, num_seeds: int, batch: int) -> Callable[[], None]:
    """A method that reads another random batch on each call."""
    generator = np.random.default_rng(2)

    def read_batch() -> None:
        noise, state = reader.read(generator.integers(0, num_seeds, batch))
        assert len(noise) == len(state) == batch

    return read_batch


def check_agreement(readers: dict[str, Reader], num_seeds: int) -> str:
    """Compare one batch of every reader with the ceiling's; returns the finding as a sentence."""
    seeds = np.random.default_rng(1).integers(0, num_seeds, 32)
    expected = readers[CEILING].read(seeds)
    for name, reader in readers.items():
        for found, wanted in zip(reader.read(seeds), expected, strict=True):
            apart = np.abs(found.astype(np.float32) - wanted.astype(np.float32).clip(-1, 1) if not reader.exact else 0)
            if (reader.exact and found.tobytes() != wanted.tobytes()) or apart.max() > 1 / 120:
                raise SystemExit(f"{name} reads different values")
    return "All methods give the same bytes; PNG's agree to 8 bits after clipping."


def evict(readers: dict[str, Reader]) -> None:
    """Drop every file from the page cache, as a data set larger than memory does by itself."""
    os.sync()
    for reader in readers.values():
        reader.forget()
        for path in reader.files:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
