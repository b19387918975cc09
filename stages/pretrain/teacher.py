"""Training a small teacher: diffusion (Ho et al. 2020) with a velocity target (Salimans & Ho 2022, app. D), or flow
matching (Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkd.cache.errors import TrainingError
from advkd.stages.ema import ExponentialMovingAverage
from advkd.stages.images.datasets import DATASETS
from advkd.stages.pretrain.autoencoder import make_autoencoder
from advkd.stages.pretrain.config import HEAD_WIDTH, PretrainConfig
from advkd.stages.pretrain.texts import HEADS, WIDTH, TextUNet, make_encoder, make_tokenizer, tokenize
from advkd.stages.reporter import Reporter
from advkd.stages.schedules import one_cycle
from advkd.stages.teacher.diffusers_api import diffusers

NUM_TIMESTEPS = 1000


def make_network(config: PretrainConfig) -> nn.Module:
    """The UNet, with fresh weights; with a text encoder where it is told names."""
    levels = len(config.channels)
    channels, side, _ = config.item_shape
    common: dict[str, Any] = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": config.layers_per_block,
        "block_out_channels": tuple(config.channels),
        "norm_num_groups": 8,
    }
    if config.texts:  # all resolutions but the first attend to the words
        unet = diffusers().UNet2DConditionModel(
            **common,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
            up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
            attention_head_dim=HEADS,
            cross_attention_dim=WIDTH,
        )
        return TextUNet(unet, make_encoder())
    plain: nn.Module = diffusers().UNet2DModel(
        **common,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        attention_head_dim=HEAD_WIDTH,
        num_class_embeds=config.table_rows or None,
    )
    return plain


def make_scheduler(config: PretrainConfig) -> Any:
    """How its training adds noise."""
    if config.path == "flow":
        return diffusers().FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS)
    return diffusers().DDPMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )


def save_pipeline(folder: Path, unet: Any, scheduler: Any, autoencoder: Any = None, names: Sequence[str] = ()) -> None:
    """Save a `DDPMPipeline` folder as diffusers does, with safetensors; a `StableDiffusionPipeline` of a `TextUNet`.

    diffusers has no pipeline for a class-conditional UNet, or for one of an `AutoencoderKL`'s latents: only the parts
    are saved then.

    Args:
        folder: to write.
        unet: the network.
        scheduler: how its training adds noise.
        autoencoder: of its latents; None for pixels.
        names: that a `TextUNet` was told.
    """
    if isinstance(unet, TextUNet):
        diffusers().StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=unet.encoder,
            tokenizer=make_tokenizer(names),
            unet=unet.unet,
            scheduler=diffusers().DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=True, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
        return
    if unet.config.num_class_embeds is None and autoencoder is None:
        diffusers().DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
        return
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    if autoencoder is not None:
        autoencoder.save_pretrained(folder / "vae")


def save_untrained(folder: Path, config: PretrainConfig) -> None:
    """Save a pipeline with fresh weights, to measure its cost."""
    autoencoder = None
    if config.autoencoder is not None:
        autoencoder = make_autoencoder(config.autoencoder, DATASETS[config.data].channels, config.size)
    named = DATASETS[config.data].names
    names = named() if config.texts and named else []
    save_pipeline(folder, make_network(config), make_scheduler(config), autoencoder, names)


def train_teacher(
    images: Tensor,
    labels: Tensor,
    config: PretrainConfig,
    reporter: Reporter,
    device: torch.device,
    names: Sequence[str] = (),
) -> tuple[nn.Module, Any]:
    """Train on images or latents; the same seed gives the same teacher on a CPU.

    Args:
        images: images in [−1, 1] or latents of deviation 1, float32, shape (N, *config.item_shape).
        labels: int64, shape (N,); the network is told them if `config.classes` says so.
        config: of stage 0.
        reporter: shows progress.
        device: to train on.
        names: N texts; the network is told them if `config.texts` says so.

    Returns:
        The averaged UNet and its scheduler.

    Raises:
        TrainingError: the loss is not finite.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    unet = make_network(config).to(device)
    scheduler = make_scheduler(config)
    conditions = _conditions(labels, names, config)
    average = ExponentialMovingAverage(unet, config.ema)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    order = torch.empty(0, dtype=torch.int64)
    reporter.start("teacher", config.steps, "steps")
    for step in range(config.steps):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * one_cycle(step, config.steps, config.warmup)
        told = {}
        for name, rows in conditions.items():
            dropped = torch.rand(len(chosen), generator=generator) < config.null_share
            told[name] = rows[torch.where(dropped, len(rows) - 1, chosen)]
        loss = diffusion_loss(unet, scheduler, images[chosen].to(device), generator, told)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update(unet, step)
        if step % 50 == 0 and not bool(torch.isfinite(loss)):
            raise TrainingError(f"the teacher's loss is not finite at step {step}: lower pretrain.learning_rate")
        reporter.advance(1, f"loss {float(loss.detach()):.4f}" if step % 50 == 0 else "")
    reporter.finish()
    return average.model, scheduler


def _conditions(labels: Tensor, names: Sequence[str], config: PretrainConfig) -> dict[str, Tensor]:
    """What the network is told, by its argument: a row per image, and a last one that says nothing."""
    if config.texts:
        return {"words": tokenize(make_tokenizer(names), [*names, ""])}
    if config.classes:
        return {"class_labels": torch.cat([labels, torch.tensor([config.num_classes])])}
    return {}


def diffusion_loss(
    unet: nn.Module,
    scheduler: Any,
    images: Tensor,
    generator: torch.Generator,
    told: dict[str, Tensor] | None = None,
) -> Tensor:
    """Mean squared error of the predicted target at stratified timesteps, one stratum per image.

    `told` are further arguments of the network, a row per image.

    Random numbers are drawn on the CPU whatever the images' device, so that every machine draws the same.
    """
    told = {name: values.to(images.device) for name, values in (told or {}).items()}
    strata = (torch.arange(len(images)) + torch.rand(len(images), generator=generator)) / len(images)
    if isinstance(scheduler, diffusers().FlowMatchEulerDiscreteScheduler):
        return _flow_loss(unet, images, strata, generator, told)
    timesteps = (strata * NUM_TIMESTEPS).long().clamp_(max=NUM_TIMESTEPS - 1)  # the last stratum may round up to 1
    timesteps = timesteps.to(images.device)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    noisy = scheduler.add_noise(images, noise, timesteps)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        target = scheduler.get_velocity(images, noise, timesteps)
    else:
        target = noise if kind == "epsilon" else images
    return nn.functional.mse_loss(unet(noisy, timesteps, **told).sample, target)


def _flow_loss(
    unet: nn.Module, images: Tensor, strata: Tensor, generator: torch.Generator, told: dict[str, Tensor]
) -> Tensor:
    """Mean squared error of the velocity ε − x_0 at x = (1 − σ) · x_0 + σ · ε (Lipman et al. 2023, eq. 23).

    σ is logit-normal with mean 0 and deviation 1 (Esser et al. 2024, eq. 19): the middle of the path, where images are
    decided, is trained on most. With uniform σ the default digits teacher is nearly twice as far from the real digits.
    """
    sigmas = torch.sigmoid(torch.special.ndtri(strata.double())).float().to(images.device)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    mixed = torch.lerp(images, noise, sigmas[:, None, None, None])
    return nn.functional.mse_loss(unet(mixed, sigmas * NUM_TIMESTEPS, **told).sample, noise - images)
