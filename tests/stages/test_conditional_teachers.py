"""Teachers with classes and latents: what is recorded equals diffusers' own loops and pipelines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from advkd.cache.errors import ConfigError, TeacherError
from advkd.cache.format.condition import LABELS_PATH
from advkd.cache.format.space import DECODER_PATH
from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.stages.decoder import cache_decoder
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.build.recompute import plan_of, recompute
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from tests.conftest import Invoke
from tests.stages.teachers import IMAGENET, save_conditional, save_dit, save_ldm
from tests.stores import tree

STEPS = 5
ONE_BATCH = {"block_size": 16, "batch_size": 16}
"""As the loops that results are compared with: other batches round differently."""
LABELS = (3, 207, 950)


def record(
    folder: Path, store: Path, sampler: SamplerConfig | None = None, null_class: int | None = None, **cache: Any
) -> TrajectoryCache:
    """Build a cache of a teacher: 16 seeds in blocks of 8, all states."""
    small = {"seeds": "0:16", "block_size": 8, "batch_size": 8, "record": STEPS, "dtype": "float32"}
    config = CacheConfig(**{**small, "accept_range": True, **cache})  # random weights make no images
    teacher = TeacherConfig(source=str(folder), null_class=null_class)
    build(make_plan(teacher, sampler or SamplerConfig(steps=STEPS), config, store))
    return TrajectoryCache.open(store)


def pipeline_images(pipeline: Any, noise: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> np.ndarray:
    """What a pipeline of diffusers makes of some noise: float32 in [0, 1], shape (N, C, H, W)."""
    monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: noise.clone())
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(num_inference_steps=STEPS, output_type="np", **options).images
    return np.asarray(made).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_conditional(tmp_path_factory.mktemp("conditional"))


@pytest.fixture(scope="module")
def ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ldm(tmp_path_factory.mktemp("ldm"), "AutoencoderKL")


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit(tmp_path_factory.mktemp("dit"))


@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc", "euler"])
@torch.no_grad()
def test_class_conditional_states_equal_diffusers_own_loop(
    conditional: Path, tmp_path: Path, name: str, guidance: float
) -> None:
    import diffusers

    sampler = SamplerConfig(name=name, steps=STEPS, guidance=guidance)
    null_class = None if guidance == 1.0 else 3
    cache = record(conditional, tmp_path / "a.zarr", sampler, null_class, **ONE_BATCH)
    unet = diffusers.UNet2DModel.from_pretrained(conditional / "unet").eval()
    config = diffusers.DDIMScheduler.from_pretrained(conditional / "scheduler").config
    scheduler = getattr(diffusers, cache.recipe.sampler["scheduler"]).from_config(config, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    count = 4 if guidance == 1.0 else 3
    seeds = np.arange(16)
    labels = torch.from_numpy(seeds % count)
    x = torch.from_numpy(cache.rows(0, seeds)) * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, timestep)
        prediction = unet(seen, timestep, class_labels=labels).sample
        if guidance != 1.0:
            null = unet(seen, timestep, class_labels=torch.full_like(labels, 3)).sample
            prediction = null + guidance * (prediction - null)
        x = scheduler.step(prediction, timestep, x).prev_sample
        found = torch.from_numpy(cache.rows(step + 1, seeds)) * cache.states[step + 1].scale
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-3)  # of values up to 500


@pytest.mark.parametrize("autoencoder", ["VQModel", "AutoencoderKL", "AutoencoderTiny"])
def test_latent_images_equal_the_pipelines(tmp_path: Path, autoencoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import LDMPipeline

    folder = save_ldm(tmp_path / "ldm", autoencoder)
    cache = record(folder, tmp_path / "a.zarr", **ONE_BATCH)
    decoder = cache_decoder(cache)
    assert decoder is not None
    ours = decoder(torch.from_numpy(cache.rows(STEPS, np.arange(16)))).numpy()
    pipeline = LDMPipeline.from_pretrained(folder)
    theirs = pipeline_images(pipeline, torch.from_numpy(cache.rows(0, np.arange(16))), monkeypatch, batch_size=16)
    np.testing.assert_allclose((ours / 2 + 0.5).clip(0, 1), theirs, atol=1e-5)
    assert ours.shape == (16, *cache.recipe.image_shape) == (16, 3, 8, 8)


def test_a_shift_of_latents_is_undone(tmp_path: Path) -> None:
    """As Stable Diffusion 3's pipeline does: decode(z / scaling_factor + shift_factor)."""
    from diffusers import AutoencoderKL

    folder = save_ldm(tmp_path / "ldm", "AutoencoderKL", shift_factor=0.25)
    cache = record(folder, tmp_path / "a.zarr")
    latents = torch.from_numpy(cache.rows(STEPS, np.arange(4)))
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(folder / "vqvae").eval().decode(latents / 0.5 + 0.25).sample
    decoder = cache_decoder(cache)
    assert decoder is not None
    torch.testing.assert_close(decoder(latents), expected)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dit_images_equal_the_pipelines(
    dit: Path, tmp_path: Path, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiTPipeline

    sampler = SamplerConfig(steps=STEPS, guidance=guidance)
    cache = record(dit, tmp_path / "a.zarr", sampler, labels=list(LABELS), **ONE_BATCH)
    assert cache.recipe.teacher["network"] == "DiTTransformer2DModel"
    decoder = cache_decoder(cache)
    assert decoder is not None
    ours = decoder(torch.from_numpy(cache.rows(STEPS, np.arange(16)))).numpy()
    labels = [LABELS[seed % 3] for seed in range(16)]
    noise = torch.from_numpy(cache.rows(0, np.arange(16)))
    pipeline = DiTPipeline.from_pretrained(dit)
    theirs = pipeline_images(pipeline, noise, monkeypatch, class_labels=labels, guidance_scale=guidance)
    np.testing.assert_allclose((ours / 2 + 0.5).clip(0, 1), theirs, atol=2e-5)
    assert np.abs(ours[::3][:5] - ours[1::3][:5]).max() > 1e-3  # labels and noise matter


def test_labels_are_an_array_that_any_zarr_reader_opens(conditional: Path, tmp_path: Path) -> None:
    cache = record(conditional, tmp_path / "a.zarr", labels=[0, 2, 3])
    by_zarr = np.asarray(zarr.open_group(tmp_path / "a.zarr", mode="r")[LABELS_PATH])
    assert by_zarr.dtype == np.int32
    np.testing.assert_array_equal(by_zarr, np.tile([0, 2, 3], 6)[:16])
    np.testing.assert_array_equal(cache.labels([5, 0, 5]), [3, 0, 3])


@pytest.mark.parametrize("family", ["conditional", "ldm", "dit"])
def test_stopped_builds_and_other_batches_give_the_same_store(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte where the batch is the same; to float tolerance in another batch."""
    folder: Path = request.getfixturevalue(family)
    guided: dict[str, Any] = {} if family == "ldm" else {"sampler": SamplerConfig(steps=STEPS, guidance=2.0)}
    if family == "conditional":
        guided["null_class"] = 3
    whole = record(folder, tmp_path / "whole.zarr", **guided)
    record(folder, tmp_path / "parts.zarr", seeds="8:16", **guided)
    (tmp_path / "parts.zarr" / DECODER_PATH).unlink(missing_ok=True)  # as if it had been killed there
    parts = record(folder, tmp_path / "parts.zarr", **guided)
    assert tree(tmp_path / "whole.zarr") == tree(tmp_path / "parts.zarr")
    assert parts.digest == whole.digest
    small = record(folder, tmp_path / "small.zarr", batch_size=3, **guided)
    np.testing.assert_allclose(small.rows(STEPS, range(16)), whole.rows(STEPS, range(16)), rtol=1e-4, atol=1e-3)
    again = recompute(whole, plan_of(whole, None, 8, "cpu"), [0, 1])
    assert all(not one.apart for one in again)


def test_two_workers_write_the_same_store(dit: Path, tmp_path: Path, invoke: Invoke) -> None:
    flags = [
        "--teacher",
        dit,
        "--steps",
        STEPS,
        "--record",
        STEPS,
        "--seeds",
        "0:16",
        "--block-size",
        8,
        "--labels",
        "1,5",
    ]
    flags += ["--batch-size", 8, "--guidance", 2, "--set", "pretrain=null"]
    for out, workers in (("one.zarr", []), ("two.zarr", ["--workers", 2])):
        result = invoke(cache_command, "build", *flags, "--out", tmp_path / out, *workers)
        assert result.exit_code == 0, result.output
    assert tree(tmp_path / "one.zarr") == tree(tmp_path / "two.zarr")
    assert (tmp_path / "one.png").is_file()


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("conditional", {"guidance": 2.0}, {}, "null_class"),
    ("conditional", {}, {"labels": [4]}, "no label 4; it has 0 to 3"),
    ("plain", {"guidance": 2.0}, {}, "unconditional"),
    ("plain", {}, {"labels": [0]}, "unconditional"),
    ("dit", {}, {"labels": [IMAGENET]}, f"no label {IMAGENET}.*null class {IMAGENET}"),
]


@pytest.mark.parametrize(("family", "sampler", "cache", "expected"), REFUSED)
def test_labels_and_guidance_that_do_not_fit_are_refused(
    family: str,
    sampler: dict[str, Any],
    cache: dict[str, Any],
    expected: str,
    tmp_path: Path,
    pipeline_folder: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = pipeline_folder if family == "plain" else request.getfixturevalue(family)
    with pytest.raises(ConfigError, match=expected):
        record(folder, tmp_path / "a.zarr", SamplerConfig(steps=STEPS, **sampler), **cache)
    assert not (tmp_path / "a.zarr").exists()


def change_config(path: Path, **options: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **options}))


HARMS: list[tuple[Callable[[Path], Path], str, dict[str, Any], str]] = [
    (
        save_conditional,
        "unet",
        {"class_embed_type": "timestep", "num_class_embeds": None},
        "class_embed_type 'timestep'",
    ),
    (save_ldm, "vqvae", {"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL; expected one of"),
    (save_ldm, "vqvae", {"latent_channels": 8}, "8 latent channels; expected the 4"),
    (save_ldm, "vqvae", {"scaling_factor": -1}, "scaling_factor -1"),
    (save_ldm, "vqvae", {"num_vq_embeddings": 17}, "weights that don't fit its configuration"),
    (save_dit, "vae", {"latents_mean": [0.0]}, "latents_mean"),
    (save_dit, "transformer", {"_class_name": "PixArtTransformer2DModel"}, "PixArtTransformer2DModel; expected"),
]


@pytest.mark.parametrize(("save", "part", "options", "expected"), HARMS)
def test_what_can_not_be_sampled_is_refused_by_name(
    save: Callable[[Path], Path], part: str, options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "teacher")
    change_config(folder / part / "config.json", **options)
    with pytest.raises(TeacherError, match=expected):
        record(folder, tmp_path / "a.zarr")


def test_null_class_that_is_none_is_refused(
    conditional: Path, dit: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    for folder, null_class, expected in (
        (conditional, 4, "its table has 4 rows"),
        (dit, 7, f"its null class is {IMAGENET}"),
        (pipeline_folder, 0, "it is unconditional"),
    ):
        with pytest.raises(TeacherError, match=expected):
            record(folder, tmp_path / "a.zarr", null_class=null_class)


def test_legacy_dit_folders_load(dit: Path, tmp_path: Path) -> None:
    """facebook/DiT-XL-2-256 names the class that diffusers had before 0.29, with options of that class."""
    import shutil

    shutil.copytree(dit, tmp_path / "old")
    options = {"_class_name": "Transformer2DModel", "attention_type": "default", "num_vector_embeds": None}
    change_config(tmp_path / "old/transformer/config.json", **options)
    old, new = (record(folder, tmp_path / name, labels=[1]) for folder, name in ((tmp_path / "old", "a"), (dit, "b")))
    assert old.recipe.fingerprint == new.recipe.fingerprint


def test_commands_say_condition_and_space(dit: Path, conditional: Path, tmp_path: Path, invoke: Invoke) -> None:
    record(dit, tmp_path / "dit.zarr", SamplerConfig(steps=STEPS, guidance=4.0), labels=list(LABELS))
    said = invoke(cache_command, "info", tmp_path / "dit.zarr").output
    assert "class labels 3, 207, 950 of 1001 rows" in said and "guidance 4 (null class 1000)" in said
    assert "latents; decoder AutoencoderKL" in said and "images of 3×8×8" in said
    assert "variance preserving" in said
    assert invoke(cache_command, "verify", tmp_path / "dit.zarr").exit_code == 0
    assert invoke(cache_command, "preview", tmp_path / "dit.zarr", "--out", tmp_path / "p.png").exit_code == 0
    flags = [
        "--teacher",
        dit,
        "--steps",
        5,
        "--record",
        5,
        "--seeds",
        "0:8",
        "--block-size",
        8,
        "--set",
        "pretrain=null",
    ]
    plain = invoke(cache_command, "build", *flags, "--dry-run").output
    guided = invoke(cache_command, "build", *flags, "--guidance", 4, "--dry-run").output
    assert "evaluations   40 of one image" in plain and "evaluations   80 of one image" in guided
    assert "guidance 4" in guided
