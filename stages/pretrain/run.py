"""Stage 0: trains the teacher and the classifier, and measures both.

teachers/NAME/
  pipeline/     a normal diffusers DDPMPipeline, of names a StableDiffusionPipeline; only its parts where no class of
                pipeline fits: classes, latents
  classifier/   config.json and model.safetensors: features to score with
  report.json   Fréchet distance to the real images beside real against real; accuracy
  samples.png   what the teacher makes
  reconstructions.png   of a teacher of latents: held-out images, and below them what its autoencoder makes of them
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.files.durable import PARTIAL_SUFFIX, holds_something, write_json
from advkd.cache.files.locks import LOCK_FILE
from advkd.cache.format.condition import ClassCondition
from advkd.cache.format.prompts import Prompt
from advkd.stages.decoder import build_decoder
from advkd.stages.device import best_device
from advkd.stages.images.datasets import DATASETS, LabelledImages, load_dataset
from advkd.stages.metrics.classifier import SmallClassifier, save_classifier
from advkd.stages.metrics.frechet import Gaussian, frechet_distance
from advkd.stages.pictures import save_grid, save_rows
from advkd.stages.pretrain.autoencoder import encode, reconstruct, train_autoencoder
from advkd.stages.pretrain.classifier import split_drawings, train_classifier
from advkd.stages.pretrain.config import SOURCE_NOTE, AutoencoderConfig, PretrainConfig
from advkd.stages.pretrain.teacher import save_pipeline, train_teacher
from advkd.stages.provenance import versions
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.teacher.config import SamplerConfig, TeacherConfig
from advkd.stages.teacher.load.card import TeacherCard
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.schedulers import is_flow
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.pipelines.teacher import PipelineTeacher, load_pipeline_teacher
from advkd.stages.teacher.sample.sampling import initial_noise, record_states

Noise = npt.NDArray[Any]
HALVINGS = 10
REPORT_ROOT_SEED = 1
REPORT_STEPS = 50
NUM_RECONSTRUCTIONS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainReport:
    """The quality of the teacher and the classifier."""

    frechet_to_real: float
    """Of a teacher of classes: to real images weighted to equal shares, as its own classes have."""
    frechet_real_to_real: float
    """Mean Fréchet distance between random halves of the real images, weighted alike."""
    classifier_accuracy: float
    num_parameters: int
    """Of the network, without an autoencoder."""
    reconstruction_mse: float | None = None
    """Of a teacher of latents: mean squared error of its autoencoder on held-out images in [−1, 1]."""
    frechet_reconstructed_to_real: float | None = None
    """Of a teacher of latents: the distance of all real images through its autoencoder to the real images."""


def pretrain(config: PretrainConfig, folder: Path, reporter: Reporter | None = None) -> PretrainReport:
    """Train teacher and classifier; the folder appears once it is complete, and replaces an earlier teacher.

    Raises:
        UsageError: the folder holds something else.
        TrainingError: the teacher diverged, or another process is making it.
    """
    reporter = reporter or SilentReporter()
    check_folder(folder)
    partial = folder.with_name(f"{folder.name}{PARTIAL_SUFFIX}")
    with _alone(partial, folder):
        report = _make(config, partial, reporter)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        (folder / LOCK_FILE).unlink(missing_ok=True)
    reporter.say(
        f"teacher: {report.num_parameters:,} parameters; Fréchet distance to the real images "
        f"{report.frechet_to_real:.1f}, real against real {report.frechet_real_to_real:.1f}; "
        f"look: {folder / 'samples.png'}"
    )
    return report


@contextmanager
def _alone(partial: Path, folder: Path) -> Iterator[None]:
    """Lock an empty folder to make a teacher in; the lock moves with the folder, and ends with its process.

    Raises:
        TrainingError: another process holds the lock, such as the child of a killed `dvc repro`.
    """
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(f"another process is making {folder}: wait for it, or stop it") from None
    try:
        for entry in partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK_FILE:
                entry.unlink()
        yield
    finally:
        lock.release()


def _make(config: PretrainConfig, partial: Path, reporter: Reporter) -> PretrainReport:
    dataset, data = DATASETS[config.data], load_dataset(config.data, config.size)
    images, labels, _ = data
    classifier, accuracy = train_classifier(data, config.classifier, config.seed, reporter, dataset.background)
    save_classifier(partial / "classifier", classifier, {"held_out_accuracy": accuracy})
    reporter.say(f"classifier: {accuracy:.1%} correct on {config.classifier.held_out} held-out real images")
    device = best_device()
    coded = None
    if config.autoencoder is not None:
        coded = _encode(config, config.autoencoder, data, classifier, partial, reporter, device)
    items, names = coded.latents if coded else images, list[str]()
    if config.texts and dataset.names:
        named = [(row, name) for row, name in enumerate(dataset.names()) if name]
        rows, names = [row for row, _ in named], [name for _, name in named]
        items, images, labels = items[rows], images[rows], labels[rows]
    unet, scheduler = train_teacher(items, labels, config, reporter, device, names)
    save_pipeline(partial / "pipeline", unet, scheduler, coded.autoencoder if coded else None, names)
    card = TeacherCard(
        license=dataset.license,
        attribution=dataset.attribution,
        class_names=dict(enumerate(dataset.class_names)) if config.classes else {},
    )
    if card != TeacherCard():
        text = card.to_markdown(f"Trained by advkd on the data set `{config.data}`.")
        (partial / "pipeline/README.md").write_text(text, encoding="utf-8")
    if names:
        made = sample_named(partial / "pipeline", names, config.report_samples, reporter, device)
    else:
        made = sample_pipeline(partial / "pipeline", config.report_samples, reporter, device, config.num_classes)
    columns = config.num_classes or 8
    save_grid(partial / "samples.png", made[: columns**2].numpy(), columns)
    weights = _balanced(labels) if config.classes else None  # it made as many of each class
    report = PretrainReport(
        frechet_to_real=frechet_distance(_fit(classifier, made), _fit(classifier, images, weights)),
        frechet_real_to_real=real_to_real(classifier, images, weights),
        classifier_accuracy=accuracy,
        num_parameters=sum(parameter.numel() for parameter in unet.parameters()),
        reconstruction_mse=coded.mse if coded else None,
        frechet_reconstructed_to_real=coded.frechet if coded else None,
    )
    made_by = {"config": asdict(config), "versions": versions("diffusers", *dataset.packages)}
    write_json(partial / "report.json", {**asdict(report), **made_by})
    return report


@dataclass(frozen=True, kw_only=True)
class _Coded:
    """An autoencoder, and all images through it."""

    autoencoder: nn.Module
    latents: Tensor
    mse: float
    """Of held-out images."""
    frechet: float
    """To the images."""


def _encode(
    config: PretrainConfig,
    autoencoder: AutoencoderConfig,
    data: LabelledImages,
    classifier: SmallClassifier,
    partial: Path,
    reporter: Reporter,
    device: torch.device,
) -> _Coded:
    """Train an autoencoder, measure it on what it hasn't seen, and encode all images."""
    learnt, held_out = split_drawings(data, config.classifier.held_out)
    model = train_autoencoder(data.images[learnt], config, autoencoder, reporter, device)
    decoded = reconstruct(model, data.images, device)
    mse = float((decoded - data.images)[held_out].square().mean())
    shown = held_out[:: max(1, len(held_out) // NUM_RECONSTRUCTIONS)][:NUM_RECONSTRUCTIONS]
    rows = {"real": data.images[shown].numpy(), "decoded": decoded[shown].numpy()}
    save_rows(partial / "reconstructions.png", rows)
    reporter.say(f"autoencoder: mean squared error {mse:.4f} on held-out images")
    return _Coded(
        autoencoder=model,
        latents=encode(model, data.images, device),
        mse=mse,
        frechet=frechet_distance(_fit(classifier, decoded), _fit(classifier, data.images)),
    )


def check_folder(folder: Path) -> None:
    """Check that nothing but an earlier teacher, or the note of one from elsewhere, would be replaced.

    Raises:
        UsageError: the folder holds something else.
    """
    if not holds_something(folder) or (folder.is_dir() and {entry.name for entry in folder.iterdir()} == {SOURCE_NOTE}):
        return
    if not ((folder / "report.json").is_file() and (folder / "pipeline").is_dir()):
        raise UsageError(
            f"{folder} holds something other than an earlier teacher: choose another --out, or move it away"
        )


def sample_pipeline(
    pipeline: Path, count: int, reporter: Reporter, device: torch.device, num_classes: int = 0, batch_size: int = 256
) -> Tensor:
    """Images of `count` seeds by DDIM (flow matching: Euler) in 50 steps, clipped to [−1, 1], shape (count, C, H, W).

    Seeds take the labels 0 to `num_classes` − 1 in turn, without guidance.
    """
    teacher = load_teacher(TeacherConfig(source=str(pipeline)), device)
    sampler = SamplerConfig(name="flow-euler" if is_flow(teacher.scheduler_config) else "ddim", steps=REPORT_STEPS)
    condition = None
    if num_classes:
        condition = ClassCondition(num_classes=teacher.num_classes, labels=tuple(range(num_classes)))
    path = SolverPath.of(teacher.scheduler_config, sampler)

    def make(noise: Noise, seeds: range) -> Tensor:
        states = record_states(
            teacher,
            path,
            noise,
            seeds=seeds,
            root_seed=REPORT_ROOT_SEED,
            record=[REPORT_STEPS],
            condition=condition,
        )
        return states[REPORT_STEPS]

    return _images(teacher, make, count, batch_size, reporter)


def sample_named(
    pipeline: Path, names: Sequence[str], count: int, reporter: Reporter, device: torch.device, batch_size: int = 256
) -> Tensor:
    """Images of a text-to-image teacher by DDIM in 50 steps, clipped to [−1, 1], shape (count, C, H, W).

    Seeds take every n-th name, so that they reach over all of them, without guidance.
    """
    prompts = [Prompt(text=name) for name in names[:: max(1, len(names) // count)][:count]]
    sampler = SamplerConfig(name="ddim", steps=REPORT_STEPS, spacing="trailing")
    teacher = load_pipeline_teacher(TeacherConfig(source=str(pipeline)), sampler, prompts[0], 1, device, "float32")
    encoded = teacher.encode(prompts)

    def make(noise: Noise, seeds: range) -> Tensor:
        told = [seed % len(prompts) for seed in seeds]
        return teacher.record(noise, encoded, told, record=[REPORT_STEPS])[REPORT_STEPS]

    return _images(teacher, make, count, batch_size, reporter)


def _images(
    teacher: Teacher | PipelineTeacher,
    make: Callable[[Noise, range], Tensor],
    count: int,
    batch_size: int,
    reporter: Reporter,
) -> Tensor:
    """Images of `count` seeds in batches, where `make` gives x_0 for x_T and its seeds."""
    decoder = None if teacher.space is None else build_decoder(teacher.space, teacher.decoder).to(teacher.device)
    parts = []
    reporter.start("samples", count, "images")
    for start in range(0, count, batch_size):
        seeds = range(start, min(start + batch_size, count))
        noise = initial_noise(REPORT_ROOT_SEED, seeds, teacher.item_shape, "float32")
        made = make(noise, seeds)
        parts.append((made if decoder is None else decoder(made)).clamp(-1.0, 1.0))
        reporter.advance(len(seeds))
    reporter.finish()
    return torch.cat(parts)


def _fit(classifier: SmallClassifier, images: Tensor, weights: Tensor | None = None) -> Gaussian:
    features = classifier.body(images).numpy()
    return Gaussian.fit(features, None if weights is None else weights.numpy())


def _balanced(labels: Tensor) -> Tensor:
    """Weights that give all classes the same share, shape (N,)."""
    return 1.0 / torch.bincount(labels)[labels].double()


def real_to_real(classifier: SmallClassifier, images: Tensor, weights: Tensor | None = None) -> float:
    """Mean Fréchet distance between random halves of the real images, each with its weight."""
    generator = np.random.default_rng(0)
    half = len(images) // 2
    distances = []
    for _ in range(HALVINGS):
        order = torch.from_numpy(generator.permutation(len(images)))
        first, second = (
            _fit(classifier, images[part], None if weights is None else weights[part])
            for part in (order[:half], order[half : 2 * half])
        )
        distances.append(frechet_distance(first, second))
    return float(np.mean(distances))
