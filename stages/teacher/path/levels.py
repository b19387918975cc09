"""Noise levels of a diffusers scheduler, the same numbers on every machine.

diffusers computes betas and their products in float32 with torch, whose `linspace` rounds differently on CPUs with
different vector instructions. The levels identify a store, so such machines could not build one together. This module
recomputes them in double precision from the scheduler's configuration and rounds them to ten digits. It keeps
diffusers' own numbers for what it does not reproduce (another schedule of betas, a clipped last level).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Scheduler = Any
"""A diffusers scheduler after `set_timesteps`; diffusers' own types are not imported here."""
Levels = npt.NDArray[np.float64]
_SAME = 1e-2
"""Relative tolerance: above float32's error in 1 − ᾱ near x_0, below the difference between two schedules."""


def rounded(value: float) -> float:
    """Ten digits: a double's last bits depend on the compiler."""
    return float(f"{value:.9e}")


def alpha_bars(scheduler: Scheduler) -> Levels:
    """ᾱ at every training timestep (Ho et al. 2020, eq. 4): float64, shape (T,)."""
    config = scheduler.config
    # Any other schedule is taken as torch computed it.
    betas = np.asarray(scheduler.betas, dtype=np.float64)
    if config.get("trained_betas") is None and config.beta_schedule == "linear":
        betas = _ramp(config.beta_start, config.beta_end, len(betas))
    elif config.get("trained_betas") is None and config.beta_schedule == "scaled_linear":
        betas = np.square(_ramp(config.beta_start**0.5, config.beta_end**0.5, len(betas)))
    bars = np.cumprod(1.0 - betas, dtype=np.float64)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1
        roots = np.sqrt(bars)
        bars = np.square((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1])))
    return _unless_other(bars, np.asarray(scheduler.alphas_cumprod, dtype=np.float64))


def sigmas(scheduler: Scheduler) -> Levels:
    """σ/α at the scheduler's timesteps, and what it ends with (Karras et al. 2022): float64, as `scheduler.sigmas`."""
    bars, theirs = alpha_bars(scheduler), np.asarray(scheduler.sigmas, dtype=np.float64)
    with np.errstate(divide="ignore"):
        ratios = np.sqrt((1.0 - bars) / bars)
    visited = np.interp(np.asarray(scheduler.timesteps, dtype=np.float64), np.arange(len(ratios)), ratios)
    ours = np.append(visited, theirs[-1:])
    return _unless_other(ours, theirs) if ours.shape == theirs.shape else theirs


def _ramp(start: float, stop: float, num: int) -> Levels:
    return start + (stop - start) * (np.arange(num) / max(1, num - 1))


def _unless_other(ours: Levels, theirs: Levels) -> Levels:
    return np.where(np.isclose(ours, theirs, rtol=_SAME, atol=0.0), ours, theirs)
