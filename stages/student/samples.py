"""A student's images, written while they are made: memory holds one batch, except a .png grid, which is one image."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from advkd.cache.errors import UsageError
from advkd.cache.files.durable import write_atomically
from advkd.stages.pictures import save_image, to_pixels
from advkd.stages.student.hub import Student
from advkd.stages.student.student import generate

Images = npt.NDArray[np.float32]
_PNG = re.compile(r"\d{6,}\.png(\.partial)?", re.ASCII)


def sample(student: Student, seeds: range, batch_size: int, told: Tensor | None = None) -> Iterator[Images]:
    """Images of some seeds in batches, shape (N, *image_shape), about [−1, 1].

    Args:
        student: to sample.
        seeds: for its noise.
        batch_size: images per pass.
        told: class labels or prompts, which the images have in turn; the teacher's own labels for these seeds if None.
    """
    told = student.labels(seeds) if told is None else told
    for start in range(0, len(seeds), batch_size):
        some = seeds[start : start + batch_size]
        condition = None if told is None else told[(start + torch.arange(len(some))) % len(told)]
        yield student.decode(generate(student, student.noise(some), condition, batch_size)).numpy()


def write_npy(path: Path, batches: Iterable[Images], shape: tuple[int, ...]) -> None:
    """Write images as a .npy file: float32, shape (N, C, H, W)."""
    write_atomically(path, _npy(batches, shape, "<f4"))


def write_npz(path: Path, batches: Iterable[Images], shape: tuple[int, ...]) -> None:
    """Write images as evaluation suites read them: `arr_0`, uint8, shape (N, H, W, 3), in an uncompressed .npz file."""
    count, _, height, width = shape
    pixels = (to_pixels(images) for images in batches)
    write_atomically(path, _zip("arr_0.npy", _npy(pixels, (count, height, width, 3), "|u1")))


def write_folder(folder: Path, batches: Iterable[Images], seeds: Sequence[int]) -> None:
    """Write one PNG per seed, named by it; several processes may fill a folder with different seeds."""
    remaining = iter(seeds)
    for images in batches:
        for pixels in to_pixels(images):
            save_image(png_path(folder, next(remaining)), Image.fromarray(pixels))


def png_path(folder: Path, seed: int) -> Path:
    """The file of one seed's image."""
    return folder / f"{seed:06d}.png"


def check_folder(folder: Path, seeds: Sequence[int]) -> None:
    """Check that a folder holds nothing but images of other seeds.

    Raises:
        UsageError: it holds something else.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(name for name in names if not _PNG.fullmatch(name))
    if foreign:
        raise UsageError(f"--out {folder}: the folder is not empty ({foreign[0]}); nothing was written")
    present = [seed for seed in seeds if png_path(folder, seed).name in names]
    if present:
        raise UsageError(
            f"--out {folder}: already holds {len(present)} of these images, the first of seed {present[0]}; nothing "
            "was written: choose other --seeds, or remove them"
        )


def _npy(batches: Iterable[npt.NDArray[Any]], shape: tuple[int, ...], descr: str) -> Iterator[bytes]:
    """A .npy file's bytes, piece by piece."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    yield header.getvalue()
    for batch in batches:
        yield np.ascontiguousarray(batch).tobytes()


def _zip(name: str, parts: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of a zip file with one uncompressed member, piece by piece."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # noqa: SIM117
        # Zip64, since the size isn't known when the member begins.
        with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
            for part in parts:
                member.write(part)
                yield sink.take()
    yield sink.take()


class _Sink:
    """A write-only file for `zipfile` whose bytes are taken out as they come."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken
