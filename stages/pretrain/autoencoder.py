"""Training a small autoencoder for a latent teacher: diffusers' `AutoencoderKL` (Kingma & Welling 2014; Rombach et al.
2022, §3.1), by the absolute error of its images, without a critic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from advkd.cache.errors import TrainingError
from advkd.stages.ema import ExponentialMovingAverage
from advkd.stages.pretrain.config import AutoencoderConfig, PretrainConfig
from advkd.stages.reporter import Reporter
from advkd.stages.schedules import one_cycle
from advkd.stages.teacher.diffusers_api import diffusers

BATCH = 64
"""Images encoded at once after training."""


def make_autoencoder(config: AutoencoderConfig, channels: int, size: int) -> nn.Module:
    """An `AutoencoderKL` with fresh weights for images of (channels, size, size)."""
    levels = len(config.channels)
    model: nn.Module = diffusers().AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        sample_size=size,
        latent_channels=config.latent_channels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    return model


def train_autoencoder(
    images: Tensor, settings: PretrainConfig, config: AutoencoderConfig, reporter: Reporter, device: torch.device
) -> nn.Module:
    """Train on images in [−1, 1], shape (N, C, H, W); the same seed gives the same weights on a CPU.

    Args:
        images: to learn from.
        settings: of stage 0: seed, warmup and average hold here, too.
        config: of the autoencoder.
        reporter: shows progress.
        device: to train on.

    Returns:
        The averaged model, whose configuration has the factors that give latents mean 0 and deviation 1.

    Raises:
        TrainingError: the loss is not finite.
    """
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = make_autoencoder(config, images.shape[1], images.shape[2]).to(device)
    average = ExponentialMovingAverage(model, settings.ema)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    reporter.start("autoencoder", config.steps, "steps")
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * one_cycle(step, config.steps, settings.warmup)
        chosen = torch.randint(len(images), (config.batch_size,), generator=generator)
        loss = _loss(model, images[chosen].to(device), config.kl_weight, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        if step % 50 == 0 and not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the autoencoder's loss is not finite at step {step}: lower pretrain.autoencoder.learning_rate"
            )
        reporter.advance(1, f"loss {float(loss.detach()):.4f}" if step % 50 == 0 else "")
    reporter.finish()
    trained: Any = average.model.eval().requires_grad_(False)
    latents = encode(trained, images, device, scaled=False)
    shift = 0.0 if settings.texts else float(latents.mean())  # Stable Diffusion's pipeline knows no shift
    deviation = float((latents - shift).square().mean().sqrt())
    trained.register_to_config(shift_factor=shift, scaling_factor=1.0 / deviation)
    return average.model


def _loss(model: Any, images: Tensor, kl_weight: float, generator: torch.Generator) -> Tensor:
    """Mean absolute error of the images and, per value of the latents, the divergence from a standard normal."""
    posterior = model.encode(images).latent_dist
    latents = posterior.sample(generator=generator)
    error: Tensor = F.l1_loss(model.decode(latents).sample, images)
    divergence: Tensor = posterior.kl().mean() / latents[0].numel()
    return error + kl_weight * divergence


@torch.no_grad()
def encode(model: Any, images: Tensor, device: torch.device, *, scaled: bool = True) -> Tensor:
    """The modes of images' latents, shape (N, C, h, w), with the configuration's shift and scale unless `scaled` is
    False."""
    parts = [model.encode(part.to(device)).latent_dist.mode().cpu() for part in torch.split(images, BATCH)]
    latents = torch.cat(parts)
    return (latents - model.config.shift_factor) * model.config.scaling_factor if scaled else latents


@torch.no_grad()
def reconstruct(model: Any, images: Tensor, device: torch.device) -> Tensor:
    """Images through the autoencoder, in [−1, 1], shape (N, C, H, W)."""
    parts = [
        model.decode(model.encode(part.to(device)).latent_dist.mode()).sample.cpu()
        for part in torch.split(images, BATCH)
    ]
    return torch.cat(parts).clamp(-1.0, 1.0)
