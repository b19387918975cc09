"""Configuration of stage one: teacher, sampler, cache."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from advkd.cache.care.summary import ORIGIN_PATHS
from advkd.cache.errors import ConfigError
from advkd.cache.format.layout import DTYPES

PARTS = ("unet", "variant", *ORIGIN_PATHS)
"""Keys of `TeacherConfig` that say which files of a pipeline to load."""
PRECISIONS = ("float32", "bfloat16", "float16")
AUTO = "auto"
"""The value of a key whose default depends on the teacher."""
DEFAULT_SEEDS = "0:4096"
OFFLOADS = ("model", "sequential")
SPACINGS = ("trailing", "leading", "linspace")
"""How diffusers chooses the timesteps (Lin et al. 2024, table 2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Which diffusers pipeline is the teacher."""

    source: str
    """A folder saved by diffusers, or a Hub id such as `google/ddpm-cifar10-32`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    unet: str | None = None
    """The network's sub-folder if it is not `unet` or `transformer`, such as `unet_ema`."""
    variant: str | None = None
    """Which of the saved weights to load, such as `fp16`."""
    scheduler: str | None = None
    """A scheduler_config.json, or a folder that holds it, for a folder with a UNet only."""
    null_class: int | None = None
    """The row of a class-conditional UNet's table that was trained to stand for no label, such as 10 after ten classes;
    guidance needs it, and no file says it. A DiT's is known."""
    lora: str | None = None
    """Of a text-to-image pipeline: a LoRA's safetensors file, its folder, or a Hub id; it is fused into the weights."""
    offload: str | None = None
    """Of a text-to-image pipeline that is larger than the GPU's memory: `model` keeps one of its networks there at a
    time, `sequential` one layer, which is much slower."""

    def __post_init__(self) -> None:
        if self.offload is not None and self.offload not in OFFLOADS:
            raise ConfigError(f"teacher.offload: {self.offload!r} is none of {', '.join(OFFLOADS)}")

    def parts(self) -> dict[str, str]:
        """The keys of `PARTS` that are given."""
        return {key: value for key in PARTS if (value := getattr(self, key)) is not None}

    @classmethod
    def recorded(cls, origin: Mapping[str, str], source: str | None = None) -> TeacherConfig:
        """What loads the teacher of a store again, from what its provenance says about it.

        Args:
            origin: the teacher's entry in the store's provenance.
            source: where the teacher is, if not where the provenance says.
        """
        parts: dict[str, Any] = {key: origin[key] for key in PARTS if key in origin}
        if source is not None:
            for key in ORIGIN_PATHS:
                if key in parts and not Path(os.path.expanduser(parts[key])).exists():
                    del parts[key]
            return cls(source=source, **parts)
        return cls(source=origin["source"], revision=origin.get("commit"), **parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """Which diffusers scheduler denoises, in how many steps."""

    name: str = "auto"
    """`ddim`, `ddpm`, `dpmsolver++`, `dpmsolver++sde`, `euler`, `heun` or `unipc`; `flow-euler` or `flow-heun` for a
    flow-matching teacher. `auto` is ddim, or the own scheduler of a text-to-image pipeline."""
    steps: int = 50
    """Solver steps from x_T to x_0."""
    eta: float = 0.0
    """Only for ddim: 0 is the deterministic ODE solver, 1 as noisy as DDPM (Song et al. 2021, eq. 16)."""
    spacing: str = "auto"
    """How timesteps are chosen: trailing, leading or linspace (Lin et al. 2024, table 2), or teacher, which is what the
    teacher's own scheduler has. Trailing starts at pure noise. Of flow matching, where it spaces σ before the shift:
    trailing (as Flux) or linspace (as Stable Diffusion 3). `auto` is trailing, or teacher for a text-to-image
    pipeline."""
    guidance: float = 1.0
    """Scale of classifier-free guidance for a class-conditional teacher (Ho & Salimans 2022), which doubles its
    evaluations; 1 is none. Of a text-to-image pipeline its `guidance_scale`."""
    height: int | None = None
    """Of a text-to-image pipeline's images, in pixels; the pipeline's own default if not given."""
    width: int | None = None
    """The same."""
    call: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Further arguments of a text-to-image pipeline's call, such as `max_sequence_length: 256` or `true_cfg_scale:
    4.0`. Part of the recipe."""

    def resolved(self) -> SamplerConfig:
        """Itself, with what `auto` is for a network that is sampled by advkd's own loop."""
        name, spacing = ("ddim" if self.name == AUTO else self.name), self.spacing
        return replace(self, name=name, spacing="trailing" if spacing == AUTO else spacing)

    def __post_init__(self) -> None:
        for key in ("height", "width"):
            if (getattr(self, key) or 1) < 1:
                raise ConfigError(f"sampler.{key}: {getattr(self, key)} is not positive")
        if not 0 <= self.guidance < math.inf:
            raise ConfigError(f"sampler.guidance: {self.guidance} is no number ≥ 0")
        if self.steps < 1:
            raise ConfigError(f"sampler.steps: {self.steps} is not a positive number of steps")
        if self.spacing not in (*SPACINGS, "teacher", AUTO):
            raise ConfigError(f"sampler.spacing: {self.spacing!r} is none of {', '.join(SPACINGS)}, teacher, {AUTO}")
        if self.eta < 0 or (self.eta and self.name not in ("ddim", AUTO)):
            raise ConfigError(f"sampler.eta: {self.eta} (it is a number ≥ 0, and of ddim only)")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """What is recorded, for which seeds, and how it is stored."""

    seeds: str = "auto"
    """A:B, half open; widened to whole blocks. `auto` is 0:4096, or with `prompts` all that fill whole blocks."""
    prompts: str | None = None
    """Of a text-to-image pipeline: a file with a prompt per line, or `.jsonl` with the keys `prompt` and `negative`;
    or `emoji`, the names of those drawings. A list that grew at its end extends the cache."""
    seeds_per_prompt: int = 1
    """How many seeds in a row have the same prompt; a divisor of `block_size`."""
    labels: str | list[int] = "all"
    """Which classes of a class-conditional teacher: `all`, or a list such as [0, 3]. Seeds take them in turn."""
    record: int | list[int] = 10
    """K evenly spaced states after x_T, or a list of solver steps. x_T and x_0 are always recorded."""
    block_size: int = 1024
    """Seeds in a block: one file per state; 16 to 64 MB per file work well."""
    batch_size: int = 256
    """Seeds in one evaluation of the teacher."""
    dtype: str = "float16"
    """What states are stored as: `float16` or `float32`."""
    precision: str = "float32"
    """What the teacher computes in; states between its evaluations are always float32."""
    root_seed: int = 0
    """Seed of all noise: with another one, the same seed numbers give other noise."""
    accept_range: bool = False
    """Whether to build although more than 1 % of x_0's values in the first block lie beyond ±2."""
    keep_weights: bool = False
    """Whether the store also gets the teacher's network, from which a student of kind `teacher` starts. Not part of the
    recipe."""
    device: str | None = None
    """`cuda`, `cuda:1`, `mps`, `cpu`; the best that is there if not given. Not part of the recipe."""

    def __post_init__(self) -> None:
        for key in ("block_size", "batch_size", "seeds_per_prompt"):
            if getattr(self, key) < 1:
                raise ConfigError(f"cache.{key}: {getattr(self, key)} is not positive")
        if self.prompts is None and self.seeds_per_prompt != 1:
            raise ConfigError(f"cache.seeds_per_prompt: {self.seeds_per_prompt}, but no cache.prompts are given")
        if self.prompts is not None and self.block_size % self.seeds_per_prompt:
            raise ConfigError(
                f"cache.seeds_per_prompt: {self.seeds_per_prompt} is no divisor of block_size {self.block_size}"
            )
        labels = self.labels
        if isinstance(labels, str) and labels != "all":
            raise ConfigError(f"cache.labels: {labels!r} is neither all nor a list of labels such as [0, 3]")
        if not labels or (isinstance(labels, list) and (min(labels) < 0 or len(set(labels)) != len(labels))):
            raise ConfigError(f"cache.labels: {labels} are not one or more different labels ≥ 0")
        if self.dtype not in DTYPES:
            raise ConfigError(f"cache.dtype: {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"cache.precision: {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if not 0 <= self.root_seed < 1 << 63:
            raise ConfigError(f"cache.root_seed: {self.root_seed} is not in [0, 2^63)")


def recorded_steps(record: int | list[int], num_steps: int) -> tuple[int, ...]:
    """Which states are kept, by solver steps done; x_T (0) and x_0 (`num_steps`) always are.

    Raises:
        ConfigError: more states than steps, or a step that is not there.
    """
    if isinstance(record, int):
        if not 1 <= record <= num_steps:
            raise ConfigError(
                f"record {record} doesn't fit steps {num_steps}: from 1 to {num_steps} states after x_T can be recorded"
            )
        return tuple(round(k * num_steps / record) for k in range(record + 1))
    outside = [step for step in record if not 0 <= step <= num_steps]
    if outside or len(set(record)) != len(record):
        raise ConfigError(
            f"record {','.join(map(str, record))} doesn't fit steps {num_steps}: "
            f"expected different numbers of steps from 0 to {num_steps}"
        )
    return tuple(sorted({0, num_steps, *record}))
