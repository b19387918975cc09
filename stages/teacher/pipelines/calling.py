"""A pipeline's own call with our noise and embeddings, and what a first look at it tells."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advkd.cache.errors import ConfigError, TeacherError, first_line
from advkd.cache.format.space import MAX_CHANNELS, MAX_SIDE
from advkd.stages.teacher.config import SamplerConfig
from advkd.stages.teacher.path.solver_path import initial_scale
from advkd.stages.teacher.pipelines.encoding import NEGATIVE
from advkd.stages.teacher.pipelines.loading import denoiser_of
from advkd.stages.teacher.pipelines.path import PipelinePath
from advkd.stages.teacher.pipelines.stepping import OnStep, counting_rows, listening

_OURS = (
    "prompt",
    "negative_prompt",
    "latents",
    "generator",
    "output_type",
    "return_dict",
    "num_inference_steps",
    "num_images_per_prompt",
    "guidance_scale",
    "height",
    "width",
    "eta",
)
"""Arguments of a call that other keys of the configuration set."""


class EnoughError(Exception):
    """Ends a pipeline's call once what was wanted is known."""


def check_call(pipe: Any, sampler: SamplerConfig) -> None:
    """Refuse arguments that a pipeline's call doesn't know, or that other keys set.

    Raises:
        ConfigError: names the first one.
    """
    known = inspect.signature(pipe.__call__).parameters
    for key in sampler.call:
        if key in _OURS or key.endswith("prompt_embeds") or key not in known:
            what = "is set by another key" if key in known else f"is none of {type(pipe).__name__}'s"
            raise ConfigError(f"sampler.call: {key} {what}; remove it")


def call_pipeline(
    pipe: Any, sampler: SamplerConfig, latents: Tensor | None, embeddings: dict[str, Any], on_step: OnStep
) -> Tensor:
    """Make a batch of latents by a pipeline's call.

    Args:
        pipe: the pipeline.
        sampler: steps, guidance, sizes and further arguments.
        latents: the noise as the pipeline takes it; None lets it draw some.
        embeddings: of the prompts, by argument.
        on_step: called after each step of the scheduler; it may raise `EnoughError`.

    Returns:
        What the call returns; of no meaning after `EnoughError`.

    Raises:
        TeacherError: the call fails.
        Exception: whatever `on_step` raises.
    """
    known = inspect.signature(pipe.__call__).parameters
    given: dict[str, Any] = {
        **embeddings,
        "num_inference_steps": sampler.steps,
        "guidance_scale": sampler.guidance,
        "output_type": "latent",
        "return_dict": False,
        "use_resolution_binning": False,  # it would change the sizes
        **({"latents": latents} if latents is not None else {"generator": torch.Generator().manual_seed(0)}),
        **({"negative_prompt": None} if f"{NEGATIVE}prompt_embeds" in embeddings else {}),
        **{key: size for key in ("height", "width") if (size := getattr(sampler, key)) is not None},
        **sampler.call,
    }
    own: list[Exception] = []

    def guarded(output: Tensor, state: Tensor, reached: Tensor) -> None:
        try:
            on_step(output, state, reached)
        except Exception as error:
            own.append(error)
            raise

    try:
        with torch.inference_mode(), listening(pipe.scheduler, guarded):
            returned = pipe(**{name: value for name, value in given.items() if name in known})
    except EnoughError:
        return torch.empty(0)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign pipeline raises for sizes or arguments that don't fit
        if error in own:
            raise
        raise TeacherError(f"a {type(pipe).__name__}'s call fails ({first_line(error)})") from error
    images: Tensor = returned[0]
    return images


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a pipeline has its latents: as they are, or packed into tokens, as Flux does."""

    pipe: Any
    item_shape: tuple[int, int, int]
    """Of a state, (C, H, W)."""
    size: tuple[int, int] | None
    """Height and width of the images in pixels, where latents are packed."""

    @classmethod
    def of(cls, pipe: Any, sampler: SamplerConfig, state: Tensor) -> Packing:
        """How one image's state is packed.

        Args:
            pipe: the pipeline.
            sampler: the sizes that were asked for.
            state: as its scheduler sees it, a batch of one.

        Raises:
            TeacherError: it isn't (1, C, H, W) even when it is unpacked.
        """
        size = None
        if hasattr(pipe, "_unpack_latents"):
            default = getattr(pipe, "default_sample_size", 0) * getattr(pipe, "vae_scale_factor", 0)
            size = (sampler.height or default, sampler.width or default)
            state = pipe._unpack_latents(state, *size, pipe.vae_scale_factor)
        shape = [length for axis, length in enumerate(state.shape[1:]) if not (axis == 1 and state.ndim == 5)]
        if len(shape) != 3 or shape[0] > MAX_CHANNELS or max(shape) > MAX_SIDE or len(state) != 1:
            raise TeacherError(
                f"a {type(pipe).__name__}'s states are {'×'.join(map(str, state.shape[1:]))}; expected "
                f"channels×height×width, up to {MAX_CHANNELS} channels"
            )
        return cls(pipe=pipe, item_shape=(shape[0], shape[1], shape[2]), size=size)

    def unpack(self, latents: Tensor) -> Tensor:
        """States, shape (B, C, H, W), of a pipeline's latents."""
        if self.size is not None:
            latents = self.pipe._unpack_latents(latents, *self.size, self.pipe.vae_scale_factor)
        return latents.reshape(len(latents), *self.item_shape)

    def pack(self, states: Tensor) -> Tensor:
        """The inverse of `unpack`."""
        if self.size is None:
            return states
        packed: Tensor = self.pipe._pack_latents(states, len(states), *self.item_shape)
        return packed


@dataclass(frozen=True, kw_only=True)
class FirstLook:
    """What two calls that end at their first step tell."""

    path: PipelinePath
    packing: Packing
    evaluations: int
    """Network evaluations per prediction."""
    factor: float
    """What noise must be multiplied by before it is given: most pipelines don't multiply given latents by their
    scheduler's `init_noise_sigma`."""


def look_at(pipe: Any, sampler: SamplerConfig, name: str, embeddings: dict[str, Any], dtype: torch.dtype) -> FirstLook:
    """Look at a pipeline.

    Args:
        pipe: the pipeline, with its scheduler chosen.
        sampler: the sampler.
        name: of the solver.
        embeddings: of one prompt, a batch of one.
        dtype: of the pipeline's latents.

    Raises:
        TeacherError: its call fails, or does with given latents what the table doesn't say.
    """
    seen: list[Tensor] = []

    def first_step(output: Tensor, state: Tensor, reached: Tensor) -> None:
        seen.append(state)
        raise EnoughError

    with counting_rows(denoiser_of(pipe)) as rows:
        call_pipeline(pipe, sampler, None, embeddings, first_step)
        num_rows = sum(rows)
    packing = Packing.of(pipe, sampler, seen[0])
    unit = torch.randn(1, *packing.item_shape, generator=torch.Generator().manual_seed(0)).to(seen[0].device, dtype)
    call_pipeline(pipe, sampler, packing.pack(unit), embeddings, first_step)
    scale, given = initial_scale(pipe.scheduler), packing.unpack(seen[1])
    path = PipelinePath.of(pipe.scheduler, sampler, name)
    for factor in (1.0, scale):
        if torch.allclose(given.float() * factor, unit.float() * scale, rtol=1e-2, atol=1e-2):
            return FirstLook(path=path, packing=packing, evaluations=num_rows, factor=factor)
    raise TeacherError(
        f"a {type(pipe).__name__} starts from something else than the noise that it is given; expected one that takes "
        "`latents` as they are, or multiplied by its scheduler's init_noise_sigma"
    )
