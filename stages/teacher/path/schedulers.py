"""From a teacher's own scheduler to the options of the one that samples from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advkd.cache.errors import TeacherError
from advkd.cache.format.equivalence import SCHEDULER_OPTIONS
from advkd.stages.teacher.config import SPACINGS
from advkd.stages.teacher.diffusers_api import json_config
from advkd.stages.teacher.path.x0 import clips

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

_LEADING_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
"""Classes whose timesteps are spaced so where their configuration doesn't say; the others' are "linspace"."""
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
"""What describes the diffusion; other options of the teacher's own class would change the solver."""


def own_spacing(scheduler_config: Mapping[str, Any]) -> str:
    """The spacing of timesteps that a teacher's own scheduler has.

    Raises:
        TeacherError: none that advkd knows.
    """
    default = "leading" if scheduler_config.get("_class_name") in _LEADING_BY_DEFAULT else "linspace"
    spacing = str(scheduler_config.get("timestep_spacing", default))
    if spacing not in SPACINGS:
        raise TeacherError(
            f"the teacher's scheduler spaces its timesteps by {spacing!r}; expected one of {', '.join(SPACINGS)}: "
            "choose one of them as sampler.spacing"
        )
    return spacing


def solver_options(scheduler_config: Mapping[str, Any], scheduler: str, spacing: str) -> dict[str, Any]:
    """All options of a solver's class, as JSON: those of the teacher's diffusion, the others at their defaults.

    What describes the diffusion but is no option of the class is there too, since diffusers keeps it as well.

    Args:
        scheduler_config: the teacher's.
        scheduler: the solver's class.
        spacing: one of `SPACINGS`.

    Raises:
        TeacherError: the class can't follow the teacher's diffusion.
    """
    known = SCHEDULER_OPTIONS[scheduler]
    given = json_config({key: scheduler_config[key] for key in _DIFFUSION_KEYS if key in scheduler_config})
    predicted = given.get("prediction_type", "epsilon")
    if predicted not in _PREDICTIONS:
        raise TeacherError(f"the teacher predicts {predicted!r}; expected one of {', '.join(_PREDICTIONS)}")
    if given.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise TeacherError(
            f"{scheduler} has no rescale_betas_zero_snr, with which the teacher was trained: choose ddim, ddpm, "
            "dpmsolver++ or euler"
        )
    if "clip_sample" in known:
        given["clip_sample"] = clips(scheduler_config)
    if spacing == "leading":
        given["steps_offset"] = scheduler_config.get("steps_offset", 0)
    return known | given | {"timestep_spacing": spacing}
