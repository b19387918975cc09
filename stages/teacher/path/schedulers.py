"""From a teacher's own scheduler to the options of the one that samples from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advkd.cache.errors import TeacherError
from advkd.cache.format.equivalence import SCHEDULER_OPTIONS
from advkd.stages.teacher.config import SPACINGS
from advkd.stages.teacher.diffusers_api import json_config
from advkd.stages.teacher.path.solvers import SOLVERS, Solver
from advkd.stages.teacher.path.x0 import clips

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Schedulers whose configuration describes flow matching: x = (1 − σ) · x_0 + σ · ε, velocity ε − x_0."""
VP_SCHEDULERS = (
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
LEARNED = ("learned", "learned_range")
"""Values of `variance_type` with which the network gives a variance besides its prediction."""
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
_FLOW_KEYS = ("num_train_timesteps", "shift", "shift_terminal")
"""The same for flow matching: how the teacher's noise levels are distributed."""


def check_scheduler(scheduler_config: Mapping[str, Any], source: str) -> None:
    """Refuse a teacher's scheduler that no solver can follow.

    Raises:
        TeacherError: its class is unknown, or it needs what only its pipeline knows.
    """
    name, known = scheduler_config.get("_class_name"), (*VP_SCHEDULERS, *FLOW_SCHEDULERS)
    if name not in known:
        raise TeacherError(
            f"teacher {source}: its scheduler {name!r} is unknown; expected a discrete variance-preserving or "
            f"flow-matching one ({', '.join(known)})"
        )
    num_timesteps = scheduler_config.get("num_train_timesteps", 1000)
    if type(num_timesteps) is not int or num_timesteps < 1:
        raise TeacherError(
            f"teacher {source}: its scheduler has num_train_timesteps {num_timesteps!r}; expected a positive integer"
        )
    for option, reason in (
        ("use_dynamic_shifting", "shifts its noise levels by what its pipeline computes from the image's size"),
        ("invert_sigmas", "numbers its noise levels backwards"),
    ):
        if name in FLOW_SCHEDULERS and scheduler_config.get(option):
            raise TeacherError(
                f"teacher {source}: its scheduler {reason} ({option}); expected fixed levels: name a "
                f"scheduler_config.json with a constant `shift` and without {option} as teacher.scheduler"
            )


def is_flow(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a teacher's scheduler is one of flow matching; otherwise it preserves variance."""
    return scheduler_config.get("_class_name") in FLOW_SCHEDULERS


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


def solver_options(scheduler_config: Mapping[str, Any], solver: Solver, spacing: str) -> dict[str, Any]:
    """All options of a solver's class, as JSON: those of the teacher's diffusion, the others at their defaults.

    What describes the diffusion but is no option of the class is there too, since diffusers keeps it as well.

    Args:
        scheduler_config: the teacher's.
        solver: how to sample.
        spacing: one of `SPACINGS`.

    Raises:
        TeacherError: the class can't follow the teacher's diffusion.
    """
    scheduler, known = solver.scheduler, SCHEDULER_OPTIONS[solver.scheduler]
    if solver.flow != is_flow(scheduler_config):
        fitting = " or ".join(name for name, other in SOLVERS.items() if other.flow != solver.flow)
        raise TeacherError(
            f"the teacher's scheduler is a {scheduler_config.get('_class_name')}, which {scheduler} can't follow: "
            f"choose {fitting} as sampler.name"
        )
    if solver.flow:
        return known | _flow_options(scheduler_config, solver) | {"timestep_spacing": spacing}
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
    if scheduler != "DDPMScheduler" and given.get("variance_type") in LEARNED:
        del given["variance_type"]  # DPM-Solver would cut the prediction to three channels
    return known | given | {"timestep_spacing": spacing} | solver.fixed


def _flow_options(scheduler_config: Mapping[str, Any], solver: Solver) -> dict[str, Any]:
    known = SCHEDULER_OPTIONS[solver.scheduler]
    given = json_config({key: scheduler_config[key] for key in _FLOW_KEYS if scheduler_config.get(key) is not None})
    missing = [key for key in given if key not in known]
    if missing:
        raise TeacherError(
            f"{solver.scheduler} has no {missing[0]}, with which the teacher was trained: choose flow-euler"
        )
    return given
