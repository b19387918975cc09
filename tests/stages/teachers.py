"""Teachers of every family with tiny random weights, as diffusers saves their pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
"""Of an AutoencoderTiny that halves images once."""
IMAGENET = 1000
"""Classes of a DiT: its pipeline's null class is this number, whatever its table has."""


def save_conditional(folder: Path, rows: int = 4, **scheduler: Any) -> Path:
    """A class-conditional UNet and a scheduler: diffusers has no pipeline class of it, only the two folders."""
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(1)
    UNet2DModel(**UNET, num_class_embeds=rows).save_pretrained(folder / "unet")
    DDIMScheduler(clip_sample=False, **scheduler).save_pretrained(folder / "scheduler")
    return folder


def save_ldm(folder: Path, autoencoder: str = "VQModel", **options: Any) -> Path:
    """An LDMPipeline: 4×4 latents of 8×8 images."""
    import diffusers
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel

    torch.manual_seed(2)
    own = {
        "VQModel": {**AUTOENCODER, "num_vq_embeddings": 16},
        "AutoencoderKL": {**AUTOENCODER, "scaling_factor": 0.5},
        "AutoencoderTiny": TINY,
    }
    vae = getattr(diffusers, autoencoder)(**{**own[autoencoder], **options})
    unet = UNet2DModel(**{**UNET, "sample_size": 4, "in_channels": 4, "out_channels": 4})
    # Predicting x_0, so that latents are small: a VQModel's choice of the nearest code must not hang on rounding.
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="sample")
    LDMPipeline(vqvae=vae.eval(), unet=unet.eval(), scheduler=scheduler).save_pretrained(folder)
    return folder


def save_dit(folder: Path) -> Path:
    """A DiTPipeline with guidance's null row and learned variance: 4×4 latents of 8×8 images."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(3)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=IMAGENET,
        norm_num_groups=4,
    )
    for parameter in transformer.parameters():  # DiT starts at zero in places, where labels would change nothing
        torch.nn.init.normal_(parameter, std=0.2)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, timestep_spacing="trailing")
    vae = AutoencoderKL(**AUTOENCODER, scaling_factor=0.4)
    DiTPipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler).save_pretrained(folder)
    return folder
