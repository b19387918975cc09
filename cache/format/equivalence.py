"""Whether two recipes give the same numbers although diffusers described them differently.

A recipe holds the options of diffusers' classes. Later versions of diffusers add options whose defaults change nothing,
and a pipeline that is saved again lists options that were left out before. The tables here are the options and
defaults of diffusers 0.42: recipes are written from them, whatever version is installed, and an option that is absent
from a recipe counts as its default.
"""

from __future__ import annotations

from typing import Any

from advkd.cache.format.recipe import Recipe

_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "timestep_spacing": "linspace",
}
SCHEDULER_OPTIONS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DIFFUSION
    | _THRESHOLD
    | _CLIP
    | {"set_alpha_to_one": True, "timestep_spacing": "leading", "rescale_betas_zero_snr": False},
    "DDPMScheduler": _DIFFUSION
    | _THRESHOLD
    | _CLIP
    | {"variance_type": "fixed_small", "timestep_spacing": "leading", "rescale_betas_zero_snr": False},
    "DPMSolverMultistepScheduler": _DIFFUSION
    | _THRESHOLD
    | _SIGMAS
    | {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": "-inf",
        "variance_type": None,
        "rescale_betas_zero_snr": False,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "EulerDiscreteScheduler": _DIFFUSION
    | _SIGMAS
    | {
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    },
    "HeunDiscreteScheduler": _DIFFUSION
    | _SIGMAS
    | _CLIP
    | {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
    "UniPCMultistepScheduler": _DIFFUSION
    | _THRESHOLD
    | _SIGMAS
    | {
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
}
"""By solver class: its options and their defaults, as JSON."""

SCHEDULER_DEFAULTS: dict[str, list[Any]] = {
    "set_alpha_to_one": [False],
    "skip_prk_steps": [False],
    "algorithm_type": ["deis"],
    "solver_type": ["logrho", "bh2"],
    "lower_order_final": [False],
    "predict_x0": [True],
    "disable_corrector": [[]],
    "solver_p": [None],
    "shift_terminal": [None],
}
"""By option: its defaults in all classes. A recipe doesn't record the class of the teacher's own scheduler, which may
also be PNDM, DEIS, LMS, UniPC, DPM-Solver single-step or Euler ancestral: those stand here, the table's follow.
"""
for _options in SCHEDULER_OPTIONS.values():
    for _name, _default in _options.items():
        SCHEDULER_DEFAULTS.setdefault(_name, []).append(_default)

_UNET_OPTIONS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-05,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
_DIT_OPTIONS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-05,
}
DEFAULT_NETWORK = "UNet2DModel"
"""The class that a recipe's `network` leaves out."""
NETWORK_OPTIONS: dict[str, dict[str, Any]] = {DEFAULT_NETWORK: _UNET_OPTIONS, "DiTTransformer2DModel": _DIT_OPTIONS}
"""By class of network: its options and their defaults."""


def equivalent(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes differ at most in options that one leaves out and the other has at their defaults."""
    solver = SCHEDULER_OPTIONS.get(str(one.sampler.get("scheduler")), {})
    return (
        equivalent_teachers(one.teacher, other.teacher)
        and _same_options(one.sampler["config"], other.sampler["config"], solver)
        and one.sampler | {"config": 0} == other.sampler | {"config": 0}
        and one.to_json() | {"teacher": 0, "sampler": 0} == other.to_json() | {"teacher": 0, "sampler": 0}
    )


def equivalent_teachers(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two recipes' `teacher` members name the same weights in the same network.

    What the teacher's own scheduler does to the numbers stands in `sampler`.
    """
    network = str(one.get("network", DEFAULT_NETWORK))
    return (
        _same_options(one["unet"], other["unet"], NETWORK_OPTIONS.get(network, {}))
        and _same_options(one["scheduler"], other["scheduler"], {})
        and one | {"unet": 0, "scheduler": 0} == other | {"unet": 0, "scheduler": 0}
    )


def _same_options(one: dict[str, Any], other: dict[str, Any], defaults: dict[str, Any]) -> bool:
    """Whether options agree, where what one leaves out is at its default: of this class, else of any scheduler's."""
    return all(
        one[key] == other[key]
        if key in one and key in other
        else (one | other)[key] in ([defaults[key]] if key in defaults else SCHEDULER_DEFAULTS.get(key, ()))
        for key in one.keys() | other.keys()
    )
