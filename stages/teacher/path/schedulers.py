"""diffusers' schedulers: which ones a teacher may come with, and the one that samples from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advkd.cache.errors import TeacherError
from advkd.stages.teacher.config import SamplerConfig
from advkd.stages.teacher.diffusers_api import diffusers, first_line, json_config
from advkd.stages.teacher.path.solvers import find_solver

KNOWN_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers whose configuration describes a discrete variance-preserving diffusion (betas and T)."""

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_DIFFUSION_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
)


def make_scheduler(scheduler_config: Mapping[str, Any], sampler: SamplerConfig) -> Any:
    """A fresh diffusers scheduler with its timesteps set; multistep solvers keep history, so one per batch."""
    cls = getattr(diffusers(), find_solver(sampler.name).scheduler)
    # Only what describes the diffusion: options of the teacher's own scheduler class would change the solver.
    diffusion = {key: scheduler_config[key] for key in _DIFFUSION_KEYS if key in scheduler_config}
    predicted = diffusion.get("prediction_type", "epsilon")
    if predicted not in _PREDICTIONS:
        raise TeacherError(f"the teacher predicts {predicted!r}; expected one of {', '.join(_PREDICTIONS)}")
    try:
        limit = int(diffusion.get("num_train_timesteps", 1000))
        if sampler.steps > limit:
            raise TeacherError(f"steps {sampler.steps} don't fit the teacher: it was trained with {limit} timesteps")
        scheduler = cls.from_config(diffusion, timestep_spacing=sampler.spacing)
        scheduler.set_timesteps(sampler.steps)
        if len(scheduler.alphas_cumprod) != limit:
            raise TeacherError(f"the teacher has {len(scheduler.alphas_cumprod)} betas for {limit} timesteps")
    except TeacherError:
        raise
    except Exception as error:  # whatever a foreign configuration makes diffusers raise
        raise TeacherError(
            f"{cls.__name__} can't be made from the teacher's scheduler with steps {sampler.steps} and spacing "
            f"{sampler.spacing!r} ({first_line(error)})"
        ) from error
    return scheduler


def sampler_identity(sampler: SamplerConfig, scheduler: Any, deterministic: bool) -> dict[str, Any]:
    """What the recipe records of the sampler."""
    return {
        "name": sampler.name,
        "steps": sampler.steps,
        "eta": sampler.eta,
        "deterministic": deterministic,
        "scheduler": type(scheduler).__name__,
        "config": json_config(scheduler.config),
        "timesteps": [float(t) for t in scheduler.timesteps],
    }
