"""A tiny Stable Diffusion with random weights, whole: tokenizer, text encoder, autoencoder, UNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = 16


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows single letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def text_encoder() -> Any:
    """A CLIP text model for it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=TOKENS,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return CLIPTextModel(config)


def autoencoder(**options: Any) -> Any:
    """An AutoencoderKL that halves the sides, with four channels of latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **options,
    )


def unet(**options: Any) -> Any:
    """A conditional UNet of 8×8 latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion(folder: Path) -> Path:
    """A saved Stable Diffusion pipeline, whole."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder.with_name("tokenizer")),
        unet=unet(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """A saved pipeline, as its users load it; encoders that were left out are named, as diffusers wants."""
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(
        folder, **{part: None for part, value in index.items() if value == [None, None]}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
