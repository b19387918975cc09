"""The forms in which other tools read trajectories: each is a function that makes one shard of some seeds."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from advkd.cache.files.npy import npy_bytes
from advkd.cache.format.condition import Labels

Values = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some seeds of a cache."""

    seeds: npt.NDArray[np.int64]
    """Shape (N,)."""
    path: Values
    """From noise to image, shape (N, K + 1, C, H, W): x_t = α x_0 + σ ε, in the solver's own units."""
    noise: Values
    """ε of x_T: unit normal, shape (N, C, H, W)."""
    labels: Labels | None
    """Shape (N,); None without classes."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How shards are written."""

    suffix: str
    make: Callable[[Rows], bytes]
    whole_path: bool
    """Whether it has the states between noise and image."""


def npz(rows: Rows) -> bytes:
    """Arrays `seed`, `noise`, `image` and, with classes, `label`."""
    arrays = {"seed": rows.seeds, "noise": rows.noise, "image": rows.path[:, -1]}
    if rows.labels is not None:
        arrays["label"] = rows.labels
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def webdataset(rows: Rows) -> bytes:
    """Per seed `path.npy`, from noise to image, `json` and, with classes, `cls`: as webdataset decodes them."""

    def members() -> Iterable[tuple[str, bytes]]:
        for index, seed in enumerate(rows.seeds):
            key = f"{seed:012d}"
            yield f"{key}.path.npy", npy_bytes(rows.path[index])
            yield f"{key}.json", json.dumps({"seed": int(seed)}).encode()
            if rows.labels is not None:
                yield f"{key}.cls", str(int(rows.labels[index])).encode()

    return _tar(members())


def fastgen(rows: Rows) -> bytes:
    """Per seed `latent.pth`, the image or its latent, `noise.pth`, `path.pth` and, with classes, `label.pth`.

    As NVIDIA FastGen's loaders for knowledge distillation document them (fastgen/datasets/README.md): the path begins
    with the noise and ends before the image, shape (K, C, H, W).
    """

    def members() -> Iterable[tuple[str, bytes]]:
        for index, seed in enumerate(rows.seeds):
            key = f"{seed:012d}"
            yield f"{key}.latent.pth", _pth(rows.path[index, -1])
            yield f"{key}.noise.pth", _pth(rows.noise[index])
            yield f"{key}.path.pth", _pth(rows.path[index, :-1])
            if rows.labels is not None:
                yield f"{key}.label.pth", _pth(rows.labels[index].astype(np.int64))

    return _tar(members())


FORMS = {
    "npz": Form(suffix="npz", make=npz, whole_path=False),
    "webdataset": Form(suffix="tar", make=webdataset, whole_path=True),
    "fastgen": Form(suffix="tar", make=fastgen, whole_path=True),
}
"""By the name in `--format`."""


def _pth(values: npt.NDArray[Any]) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(torch.from_numpy(np.array(values)), file)
    return file.getvalue()


def _tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar file without times and owners: the same members give the same bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()
