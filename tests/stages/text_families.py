"""Tiny text-to-image pipelines with random weights, one per family, without their encoders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.stages.text_to_image import BETAS, autoencoder, unet

Embeddings = dict[str, Any]
"""Of one prompt, by argument of the pipeline's call, without the axis of the batch."""


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _with_negative(names: list[str], tensors: list[Tensor], negative: list[Tensor]) -> Embeddings:
    return {**dict(zip(names, tensors, strict=True)),
            **{f"negative_{name}": value for name, value in zip(names, negative, strict=True)}}  # fmt: skip


def _pooled() -> Embeddings:
    """Tokens and a pooled embedding, and what guidance leads away from."""
    values = _normal((7, 32), (16,), (7, 32), (16,))
    return _with_negative(["prompt_embeds", "pooled_prompt_embeds"], values[:2], values[2:])


def _masked(width: int) -> Embeddings:
    """Tokens and which of them count, and what guidance leads away from."""
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0])
    embedded, other = _normal((7, width), (7, width))
    return _with_negative(["prompt_embeds", "prompt_attention_mask"], [embedded, mask], [other, mask])


def stable_diffusion_xl() -> tuple[Any, Embeddings]:
    """With two encoders' embeddings, sizes as a condition, and Euler's method."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    )
    return pipe, _pooled()


def stable_diffusion_3() -> tuple[Any, Embeddings]:
    """Flow matching, with a pooled embedding."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    encoders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1),
        **encoders,
    )
    return pipe, _pooled()


def flux() -> tuple[Any, Embeddings]:
    """Latents packed into tokens, noise levels shifted by the image's size, guidance distilled into the network."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    return pipe, dict(zip(["prompt_embeds", "pooled_prompt_embeds"], _normal((7, 32), (16,)), strict=True))


def pixart() -> tuple[Any, Embeddings]:
    """DPM-Solver++, learned variance, masks of tokens."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=32,
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
    )
    return pipe, _masked(32)


def z_image() -> tuple[Any, Embeddings]:
    """Embeddings as a list of tensors of different lengths."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    pipe = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=None,
        tokenizer=None,
    )
    embedded, other = _normal((9, 16), (3, 16))
    return pipe, {"prompt_embeds": embedded, "negative_prompt_embeds": other}


def qwen_image() -> tuple[Any, Embeddings]:
    """An autoencoder of video, that normalises by channel; guidance of its own; prompts of different lengths."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    )
    pipe = QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
    )
    embedded, other = _normal((7, 16), (3, 16))
    return pipe, {"prompt_embeds": embedded, "negative_prompt_embeds": other}


def sana() -> tuple[Any, Embeddings]:
    """Flow matching by DPM-Solver++, a deep autoencoder, masks of tokens."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
    )
    autoencoder = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", algorithm_type="dpmsolver++"
    )
    pipe = SanaPipeline(
        transformer=transformer, scheduler=scheduler, vae=autoencoder, text_encoder=None, tokenizer=None
    )
    return pipe, _masked(16)


FAMILIES: dict[str, Callable[[], tuple[Any, Embeddings]]] = {
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "sana": sana,
}


def save(name: str, folder: Path) -> Embeddings:
    """Save a family's pipeline with random weights; the embeddings of a prompt."""
    torch.manual_seed(0)
    pipe, embeddings = FAMILIES[name]()
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    with torch.no_grad():
        for parameter in network.parameters():
            if not bool(parameter.any()):  # outputs that start as zero would make every prediction zero
                parameter.normal_(0.0, 0.05)
    pipe.save_pretrained(folder)
    return embeddings
