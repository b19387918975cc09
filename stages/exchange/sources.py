"""Trajectories in other tools' files: folders of shards, each a pair of arrays (`.npz`) or WebDataset's tar.

Nothing that is read executes code: arrays come without pickled objects, tensors through `weights_only`, and members
of a tar are read where they are, never unpacked to the disk.
"""

from __future__ import annotations

import hashlib
import io
import math
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import CacheError, UsageError, first_line
from advkd.cache.files.strict_json import parse_json
from advkd.stages.exchange.export import INDEX
from advkd.stages.reporter import Reporter

Values = npt.NDArray[Any]
MAX_MEMBER_BYTES = 1 << 30
"""Of a file within a shard."""
_IMAGES = ("image", "latent")
_INVALID = (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile, tarfile.TarError)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Some seeds of a source."""

    noise: Values
    """ε, unit normal, shape (N, C, H, W)."""
    inner: Values | None
    """States on the way, from the noise as it enters the path to the last before the image, shape (N, K, C, H, W); None
    where the source holds pairs."""
    image: Values
    """Shape (N, C, H, W); 8-bit integers are pixels 0 to 255."""
    labels: Values | None
    """Class labels, integers, shape (N,)."""
    others: frozenset[str] = frozenset()
    """Names of what else there is per seed, and isn't read."""

    def __len__(self) -> int:
        return len(self.image)

    def part(self, rows: slice) -> Paths:
        """Some of the rows."""
        inner, labels = self.inner, self.labels
        return Paths(
            noise=self.noise[rows],
            inner=None if inner is None else inner[rows],
            image=self.image[rows],
            labels=None if labels is None else labels[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a source holds."""

    sha256: str
    """Digest of the shards' names and contents, in order, and of the index."""
    num_seeds: int
    item_shape: tuple[int, ...]
    num_inner: int
    """States on the way per seed, the noise among them; 0 for pairs."""
    dtype: str
    """Of the noise."""
    labels: tuple[int, ...]
    """Class labels in use, ascending; none if the source has no classes."""
    others: tuple[str, ...]
    """Names of what else the shards hold, such as prompts."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of shards, in the order of their names."""

    folder: Path
    shards: tuple[Path, ...]
    index: Mapping[str, Any]
    """What `advkd-cache export` wrote of them; empty where another tool made the folder."""

    @classmethod
    def find(cls, folder: Path) -> Source:
        """The shards in a folder.

        Raises:
            UsageError: there are none, or of both kinds, or the index was changed.
        """
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; expected one with shards (.npz, .tar)")
        shards = sorted(path for path in folder.iterdir() if path.suffix in (".npz", ".tar") and path.is_file())
        kinds = {path.suffix for path in shards}
        if len(kinds) != 1:
            found = "shards of both kinds" if kinds else "no shard"
            raise UsageError(f"{folder}: {found}; expected files *.npz, or files *.tar")
        return cls(folder=folder, shards=tuple(shards), index=_index(folder))

    def survey(self, reporter: Reporter) -> Survey:
        """Read everything once: what the shards hold, and their digest.

        Raises:
            CacheError: a shard is unreadable, lacks an array, or holds other arrays than the others.
        """
        total = hashlib.sha256()
        num_seeds, labels, kinds, others = 0, set[int](), set[tuple[Any, ...]](), set[str]()
        reporter.start("read", len(self.shards), "shards")
        if self.index:
            total.update((self.folder / INDEX).read_bytes())
        for path, paths in self._read():
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
            num_seeds += len(paths)
            num_inner = 0 if paths.inner is None else paths.inner.shape[1]
            kinds.add((paths.image.shape[1:], num_inner, str(paths.noise.dtype), paths.labels is None))
            if len(kinds) > 1:
                raise CacheError(f"{path} holds other arrays, shapes or dtypes than the shards before it")
            labels.update([] if paths.labels is None else np.unique(paths.labels).tolist())
            others |= paths.others
            reporter.advance(1, path.name)
        reporter.finish()
        if not num_seeds:
            raise CacheError(f"{self.folder}: its shards hold no seeds")
        ((item_shape, num_inner, dtype, _),) = kinds
        return Survey(
            sha256=total.hexdigest(),
            num_seeds=num_seeds,
            item_shape=item_shape,
            num_inner=num_inner,
            dtype=dtype,
            labels=tuple(sorted(labels)),
            others=tuple(sorted(others)),
        )

    def _read(self) -> Iterator[tuple[Path, Paths]]:
        """Each shard's seeds, one shard in memory at a time.

        Raises:
            CacheError: a shard is unreadable, or lacks an array.
        """
        for path in self.shards:
            try:
                paths = _npz(path) if path.suffix == ".npz" else _tar(path)
            except _INVALID as error:
                line = first_line(error, 200)
                raise CacheError(f"{path}: no trajectories can be read from it ({line})") from error
            yield path, paths

    def blocks(self, size: int) -> Iterator[Paths]:
        """The seeds in parts of `size`; those that are left in the end are dropped."""
        held: list[Paths] = []
        for _, paths in self._read():
            held.append(paths)
            if sum(map(len, held)) < size:
                continue
            joined = _join(held)
            whole = len(joined) // size * size
            yield from (joined.part(slice(start, start + size)) for start in range(0, whole, size))
            held = [joined.part(slice(whole, None))]


def _index(folder: Path) -> dict[str, Any]:
    try:
        value = parse_json((folder / INDEX).read_bytes())
        if value["made_by"] != "advkd-cache export":
            return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    steps, timesteps, levels = (value.get(f"path_{name}", []) for name in ("steps", "timesteps", "levels"))
    try:
        numbers = [*steps, *timesteps, *(number for alpha, sigma in levels for number in (alpha, sigma))]
        fits = len(steps) == len(timesteps) == len(levels) and all(math.isfinite(number) for number in numbers)
        fits = fits and (value.get("space") is None or isinstance(value["space"]["tensors_sha256"], str))
    except (TypeError, ValueError, KeyError):
        fits = False
    if not fits:
        raise UsageError(f"{folder / INDEX} is not what `advkd-cache export` wrote: restore it, or remove it")
    return dict(value)


def _join(parts: list[Paths]) -> Paths:
    """Parts that hold the same arrays, one after the other."""
    if len(parts) == 1:
        return parts[0]
    held = {name for name, value in vars(parts[0]).items() if isinstance(value, np.ndarray)}
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in held}
    return replace(parts[0], **joined)


def _npz(path: Path) -> Paths:
    """Arrays `noise` and `image` (or `latent`), shape (N, C, H, W), and where there are classes `label`, shape (N,)."""
    with np.load(path, allow_pickle=False) as arrays:
        name = next((name for name in _IMAGES if name in arrays), None)
        if name is None or "noise" not in arrays:
            raise ValueError(f"it has {sorted(arrays)}; expected noise and image, and label where there are classes")
        others = frozenset(arrays.files) - {"noise", name, "label", "seed"}
        return _checked(arrays["noise"], None, arrays[name], arrays.get("label"), others)


def _tar(path: Path) -> Paths:
    """Samples of FastGen (`latent.pth`, `noise.pth`, `path.pth`, `label.pth`) or of `advkd-cache export --format
    webdataset` (`path.npy`, `cls`)."""
    rows: list[tuple[Values, Values | None, Values, Values | None]] = []
    others = set[str]()
    with tarfile.open(path) as tar:
        for sample in _samples(tar, others):
            if ("noise.pth" if "latent.pth" in sample else "path.npy") not in sample:
                raise ValueError(f"a sample has {sorted(sample)}; expected latent.pth and noise.pth, or path.npy")
            if "latent.pth" in sample:
                rows.append(
                    (sample["noise.pth"], sample.get("path.pth"), sample["latent.pth"], sample.get("label.pth"))
                )
            else:
                whole = sample["path.npy"]
                rows.append((whole[0], whole[:-1], whole[-1], sample.get("cls")))
    if not rows:
        raise ValueError("it has no samples")
    noise, inner, image, labels = zip(*rows, strict=True)
    stacked = [None if any(one is None for one in part) else np.stack(part) for part in (inner, labels)]
    return _checked(np.stack(noise), stacked[0], np.stack(image), stacked[1], frozenset(others))


def _samples(tar: tarfile.TarFile, others: set[str]) -> Iterator[dict[str, Values]]:
    """Consecutive members with one key, by the rest of their names: WebDataset's convention.

    Names of members that aren't read are added to `others`.
    """
    key: tuple[str, str] | None = None
    sample: dict[str, Values] = {}
    for member in tar:
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, name = base.partition(".")
        if (folder, stem) != key and sample:
            yield sample
            sample = {}
        key = (folder, stem)
        if name in _READERS:
            if member.size > MAX_MEMBER_BYTES:
                raise ValueError(f"{member.name[:80]} has {member.size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
            file = tar.extractfile(member)
            assert file is not None
            sample[name] = _READERS[name](io.BytesIO(file.read()))
        elif name != "json":  # which repeats the seed
            others.add(name)
    if sample:
        yield sample


def _tensor(file: BinaryIO) -> Values:
    import pickle

    import torch

    try:
        found: Any = torch.load(file, weights_only=True, map_location="cpu")
        tensor = found if isinstance(found, torch.Tensor) else torch.as_tensor(found)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"a tensor can't be read: {error}") from error
    array: Values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _array(file: BinaryIO) -> Values:
    array: Values = np.load(file, allow_pickle=False)
    return array


_READERS: dict[str, Callable[[BinaryIO], Values]] = {
    **{f"{name}.pth": _tensor for name in ("latent", "noise", "path", "label")},
    "path.npy": _array,
    "cls": lambda file: np.asarray(int(file.read())),
}


def _checked(
    noise: Values, inner: Values | None, image: Values, labels: Values | None, others: frozenset[str]
) -> Paths:
    """The arrays, if their shapes fit each other."""
    fits = image.ndim == 4 and noise.shape == image.shape
    fits = fits and (inner is None or (inner.ndim == 5 and inner.shape[2:] == image.shape[1:]))
    if not fits:
        on_the_way = "" if inner is None else f", states on the way {inner.shape}"
        raise ValueError(
            f"noise has shape {noise.shape}, image {image.shape}{on_the_way}; expected (N, C, H, W) of both, and "
            "(N, K, C, H, W)"
        )
    if labels is not None:
        labels = _class_labels(labels.reshape(len(image), -1))
    return Paths(noise=noise, inner=inner, image=image, labels=labels, others=others)


def _class_labels(labels: Values) -> Values:
    """Labels, shape (N,), of integers (N, 1) or of one-hot rows (N, K)."""
    if labels.shape[1] > 1:
        one_hot = bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())
        if not one_hot:
            raise ValueError(f"labels have shape {labels.shape}; expected whole numbers, or one-hot rows")
        classes: Values = labels.argmax(1)
        return classes
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype}; expected whole numbers, or one-hot rows")
    return labels[:, 0]
