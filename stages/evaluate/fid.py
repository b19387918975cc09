"""FID as papers quote it: 50,000 images of a student against published statistics (Heusel et al. 2017).

Images are rounded to 8 bits, as the files are from which such statistics are made. Their features are kept shard by
shard, so that a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from advkd.cache.errors import UsageError, first_line
from advkd.cache.files.durable import write_atomically, write_json
from advkd.cache.files.npy import npy_bytes
from advkd.cache.files.strict_json import parse_json
from advkd.cache.format.recipe import digest
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.decoder import cache_decoder
from advkd.stages.device import best_device, forbid_tf32
from advkd.stages.evaluate.config import FIRST_FRESH_SEED, MAX_FRESH_SEEDS, EvaluateConfig
from advkd.stages.evaluate.evaluate import check_same_cache
from advkd.stages.evaluate.networks import load_features
from advkd.stages.evaluate.samplers import as_they_are, student_sampler, told_fresh
from advkd.stages.metrics.base import Floats
from advkd.stages.metrics.features import clipped, observe, to_numpy
from advkd.stages.metrics.frechet import Gaussian, frechet_distance
from advkd.stages.reporter import Reporter
from advkd.stages.student.run import Run
from advkd.stages.student.student import load_student, weights_sha256
from advkd.stages.teacher.load.identity import tensors_sha256

NUM_SAMPLES = 50_000
"""As published figures have it; the distance falls with the number of samples."""
SHARD = 1000
RESULT = "fid.json"


@dataclass(frozen=True, kw_only=True)
class Fid:
    """The figure, and everything that it depends on."""

    value: float
    num_samples: int
    first_seed: int
    statistics: str
    """Name of the file."""
    statistics_sha256: str
    features: str
    features_sha256: str
    """Of the feature network's weights."""
    weights_sha256: str
    """Of the student's."""
    evaluations: int
    """Passes of the student per image."""
    images: str
    """Shape and rounding, and who resizes them."""
    dtype: str
    device: str

    def __str__(self) -> str:
        return (
            f"FID {self.value:.2f} to {self.statistics} (sha256 {self.statistics_sha256[:12]}): {self.num_samples:,} "
            f"images of {self.images}; features {self.features} (sha256 {self.features_sha256[:12]}), {self.dtype}"
        )


def measured_fid(run_path: Path) -> Fid | None:
    """What the last call wrote of a run; None if that was of another student, or nothing readable is there."""
    try:
        found = Fid(**parse_json((run_path / "evaluation" / RESULT).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.weights_sha256 == weights_sha256(Run(run_path).student) else None


def read_statistics(path: Path) -> Gaussian:
    """Statistics as pytorch-fid and others write them: a `.npz` file with `mu`, shape (D,), and `sigma`, shape (D, D).

    Raises:
        UsageError: it is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mu has shape {mean.shape}, sigma {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("they are not finite")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        line = first_line(error)
        raise UsageError(f"{path}: no statistics ({line}); expected a .npz file with mu and sigma") from error
    return Gaussian(mean=mean, covariance=covariance)


def fid(
    run_path: Path,
    cache_path: str | Path,
    statistics: Path,
    config: EvaluateConfig,
    reporter: Reporter,
    *,
    num_samples: int = NUM_SAMPLES,
    device: str | None = None,
) -> Fid:
    """Compare a student's images of fresh seeds with published statistics; also written to RUN/evaluation/fid.json.

    Args:
        run_path: the run.
        cache_path: the cache that it was trained from; says nothing but the seeds' noise and labels.
        statistics: see `read_statistics`.
        config: features, seed and batch size; `self` is no network that anyone else has.
        reporter: shows progress.
        num_samples: images to make.
        device: to compute on; the best there is if not given.

    Raises:
        UsageError: the statistics are of other features, or the run is of another cache.
    """
    wanted, on = read_statistics(statistics), best_device(device)
    if not 2 <= num_samples <= MAX_FRESH_SEEDS:
        raise UsageError(f"{num_samples} samples: expected 2 to {MAX_FRESH_SEEDS:,}")
    forbid_tf32()
    cache, run = TrajectoryCache.open(cache_path), Run(run_path)
    weights = weights_sha256(run.student)
    student, geometry = load_student(run.student)
    assert weights is not None  # else there was nothing to load
    check_same_cache(run.read()["identity"]["cache"]["fingerprint"], cache, str(run.path))
    decoder, network = cache_decoder(cache), load_features(config, cache.recipe.image_shape, on)
    ((_, look),) = observe(network, torch.zeros(1, *cache.recipe.image_shape))
    if look.features.shape[1] != len(wanted.mean):
        raise UsageError(
            f"{statistics} is of {len(wanted.mean)} features, {network.name} has {look.features.shape[1]}: choose "
            "--features"
        )
    sampler = student_sampler(
        student.to(on), geometry, told_fresh(cache, geometry), as_they_are if decoder is None else decoder.to(on)
    )
    assert sampler.generate is not None
    first = FIRST_FRESH_SEED + config.seed * MAX_FRESH_SEEDS
    features_sha256 = tensors_sha256(network.network.state_dict())
    key = digest([weights, features_sha256, network.name, first, config.batch_size, str(on)])[:16]
    shards = run_path / "evaluation" / "fid" / key
    shards.mkdir(parents=True, exist_ok=True)
    starts = range(first, first + num_samples, SHARD)
    count, total, products = 0, np.zeros(len(wanted.mean)), np.zeros_like(wanted.covariance)
    done = sum((shards / f"{start - first:08d}.npy").is_file() for start in starts)
    reporter.start("fid", num_samples, "images", done=min(done * SHARD, num_samples))
    for start in starts:
        seeds = range(start, min(start + SHARD, first + num_samples))
        path = shards / f"{start - first:08d}.npy"
        found = _read(path, len(seeds))
        if found is None:
            parts = []
            for begin in range(seeds.start, seeds.stop, config.batch_size):
                some = range(begin, min(begin + config.batch_size, seeds.stop))
                images = _eight_bits(sampler.generate(some))
                parts += [to_numpy(look.features) for _, look in observe(network, images)]
                reporter.advance(len(some))
            found = np.concatenate(parts).astype(np.float32)
            _write(path, found)
        values = found.astype(np.float64) - wanted.mean  # near 0, so that sums of products lose no digits
        count, total, products = count + len(values), total + values.sum(0), products + values.T @ values
    reporter.finish()
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    made = Gaussian(mean=wanted.mean + mean, covariance=covariance)
    shape = "×".join(map(str, cache.recipe.image_shape))
    result = Fid(
        value=frechet_distance(made, wanted),
        num_samples=count,
        first_seed=first,
        statistics=statistics.name,
        statistics_sha256=hashlib.sha256(statistics.read_bytes()).hexdigest(),
        features=network.name,
        features_sha256=features_sha256,
        weights_sha256=weights,
        evaluations=sampler.evaluations,
        images=f"{shape}, rounded to 8 bits; the feature network resizes them",
        dtype="float32",
        device=str(on),
    )
    write_json(run_path / "evaluation" / RESULT, asdict(result))
    shutil.rmtree(shards.parent)
    return result


def _eight_bits(images: torch.Tensor) -> torch.Tensor:
    return ((clipped(images) + 1.0) * 127.5).round() / 127.5 - 1.0


def _read(path: Path, num_rows: int) -> Floats | None:
    """A shard that an earlier call has kept, if it is whole."""
    try:
        found: Floats = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 2 and len(found) == num_rows else None


def _write(path: Path, values: Floats) -> None:
    write_atomically(path, [npy_bytes(values)])
