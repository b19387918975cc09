"""A text-to-image pipeline as a teacher: what its call needs, what identifies it, and its recorded states."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.cache.errors import TeacherError
from advkd.cache.format.equivalence import SCHEDULER_DEFAULTS
from advkd.cache.format.prompts import Prompt, PromptCondition
from advkd.cache.format.space import LatentSpace
from advkd.stages.teacher.config import SamplerConfig, TeacherConfig
from advkd.stages.teacher.diffusers_api import recorded_config
from advkd.stages.teacher.load.card import TeacherCard
from advkd.stages.teacher.load.folders import autoencoder_part, read_json
from advkd.stages.teacher.load.identity import tensors_sha256
from advkd.stages.teacher.load.latents import load_space
from advkd.stages.teacher.pipelines.calling import EnoughError, Packing, call_pipeline, check_call, look_at
from advkd.stages.teacher.pipelines.encoding import EncodedPrompts, embeddings_of, encode
from advkd.stages.teacher.pipelines.loading import denoiser_of, find_pipeline, load_pipeline
from advkd.stages.teacher.pipelines.path import TOLERANCE, PipelinePath, choose_scheduler
from advkd.stages.teacher.pipelines.stepping import disturbing, first_rows

_DEFAULT_LENGTH = 512
"""Tokens for which padded embeddings have room where a pipeline's call names no `max_sequence_length`."""
_TIMED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class PipelineTeacher:
    """A loaded text-to-image pipeline."""

    pipe: Any
    source: str
    commit: str | None
    """Commit of the Hub's repository, where it came from there."""
    card: TeacherCard
    parts: dict[str, str]
    """As `Teacher.parts`."""
    device: torch.device
    precision: str
    tensors_sha256: str
    """Of the network that denoises, in the precision in which it computes."""
    encoders: dict[str, str]
    """The same of the text encoders, by part."""
    scheduler_config: dict[str, Any]
    """Of the pipeline's own scheduler, whichever samples."""
    condition: PromptCondition
    path: PipelinePath
    packing: Packing
    factor: float
    """As `FirstLook.factor`."""
    space: LatentSpace | None
    """None for a pipeline that denoises pixels."""
    decoder: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the decoder of its latents."""

    @property
    def item_shape(self) -> tuple[int, int, int]:
        """Of a state as it is stored, (C, H, W)."""
        return self.packing.item_shape

    def identity(self) -> dict[str, Any]:
        """What the recipe records of the teacher."""
        network: Any = denoiser_of(self.pipe)
        name = type(network).__name__
        return {
            "tensors_sha256": self.tensors_sha256,
            "unet": recorded_config({"_class_name": name, **network.config}, ()),
            "network": name,
            "scheduler": recorded_config(self.scheduler_config, SCHEDULER_DEFAULTS),
            "pipeline": type(self.pipe).__name__,
            "encoders": self.encoders,
        }

    def sampled_by(self, sampler: SamplerConfig, prompt: Prompt) -> PipelineTeacher:
        """The same pipeline with another sampler; the networks are shared.

        Args:
            sampler: the sampler.
            prompt: one to look at the pipeline's first step with.

        Raises:
            ConfigError: the sampler doesn't fit.
            TeacherError: the pipeline's own scheduler is none that advkd knows.
        """
        pipe = type(self.pipe).from_pipe(self.pipe)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = type(self.pipe.scheduler).from_config(self.scheduler_config)
        name = choose_scheduler(pipe, sampler)
        prompts = self.encode([prompt])
        look = look_at(pipe, sampler, name, prompts.arguments(pipe, [0]), getattr(torch, self.precision))
        return replace(self, pipe=pipe, path=look.path, packing=look.packing, factor=look.factor)

    def network_inputs(self, prompts: EncodedPrompts, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the network is given for one evaluation of a batch: positional and named arguments.

        Args:
            prompts: of which all images have the first.
            batch: number of images.
        """
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def take(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append((args, kwargs))

        def first_step(output: Tensor, state: Tensor, reached: Tensor) -> None:
            raise EnoughError

        handle = denoiser_of(self.pipe).register_forward_pre_hook(take, with_kwargs=True)
        try:
            start = torch.zeros(batch, *self.item_shape)
            self._call(start, prompts.arguments(self.pipe, [0] * batch), first_step)
        finally:
            handle.remove()
        args, kwargs = first_rows(given[0], batch)
        return args, kwargs

    def encode(self, prompts: Sequence[Prompt]) -> EncodedPrompts:
        """Encode some prompts, each alone.

        Raises:
            TeacherError: the pipeline can't.
        """
        encoded = tuple(encode(self.pipe, prompt, self.path.sampler.call, self.device) for prompt in prompts)
        return EncodedPrompts(prompts=tuple(prompts), encoded=encoded)

    @torch.inference_mode()
    def record(
        self,
        noise: npt.NDArray[Any],
        prompts: EncodedPrompts,
        rows: Sequence[int],
        *,
        record: Collection[int],
        evaluated: Callable[[], None] = lambda: None,
        disturb: Callable[[Tensor, int], Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """Make images of a batch by the pipeline's own call, and keep the states after some of its steps.

        Each call is checked: it starts from our noise, each step starts from the state before and goes where the table
        of noise levels says, and the last state is what the call returns.

        Args:
            noise: x_T in stored units, shape (B, C, H, W).
            prompts: encoded ones.
            rows: which of them each image has, B numbers.
            record: solver steps after which the state is kept.
            evaluated: called after each prediction.
            disturb: changes the network's outputs, shape (k b, …), of calls with b images, for a measurement.

        Returns:
            By solver steps done, float32 on the CPU in stored units (x_t / scale), shape (B, C, H, W).

        Raises:
            TeacherError: a check fails, or x_0 is not finite.
        """
        groups = prompts.groups(self.pipe, rows)
        if len(groups) > 1:
            return self._record_groups(noise, prompts, rows, groups, record, evaluated, disturb)
        states, solver = self.path.states, self.path.solver
        start = torch.from_numpy(noise.astype(np.float32))
        kept = {0: start} if 0 in record else {}
        expected, call = self._given(start).float() * (states[0].scale / self.factor), 0

        def on_step(output: Tensor, state: Tensor, reached: Tensor) -> None:
            nonlocal expected, call
            self._check_start(call, self.packing.unpack(state), expected)
            if disturb is None:
                self._check_jump(call, output, state, reached)
            call, expected = call + 1, self.packing.unpack(reached)
            done = solver.steps_done(call, self.path.sampler.steps)
            if done in record and done is not None:
                kept[done] = expected.float() / states[done].scale
            evaluated()

        changed = None if disturb is None else lambda output: disturb(output, len(rows))
        with disturbing(denoiser_of(self.pipe), changed):
            images = self._call(start, prompts.arguments(self.pipe, rows), on_step)
        if call != self.path.evaluations or not torch.equal(self.packing.unpack(images).to(expected.dtype), expected):
            raise TeacherError(
                f"teacher {self.source}: its call returns something else than its last state, or took {call} steps "
                f"instead of {self.path.evaluations}; expected a pipeline that returns what its scheduler reached"
            )
        if not bool(torch.isfinite(expected).all()):
            raise TeacherError(
                f"teacher {self.source}: x_0 of a batch is not finite (NaN or infinite); "
                f"{'check the checkpoint' if self.precision == 'float32' else 'try another precision'}"
            )
        return {done: values.cpu() for done, values in kept.items()}

    def _record_groups(
        self,
        noise: npt.NDArray[Any],
        prompts: EncodedPrompts,
        rows: Sequence[int],
        groups: list[list[int]],
        record: Collection[int],
        evaluated: Callable[[], None],
        disturb: Callable[[Tensor, int], Tensor] | None,
    ) -> dict[int, Tensor]:
        """As `record`, by a call for each group of places; `evaluated` is called during the last one."""
        made: dict[int, Tensor] = {}
        for number, group in enumerate(groups, start=1):
            report = evaluated if number == len(groups) else (lambda: None)
            some = [rows[place] for place in group]
            part = self.record(noise[group], prompts, some, record=record, evaluated=report, disturb=disturb)
            for done, values in part.items():
                made.setdefault(done, values.new_empty(len(rows), *values.shape[1:]))[group] = values
        return made

    def seconds_per_evaluation(self, noise: npt.NDArray[Any], prompts: EncodedPrompts) -> float:
        """Seconds of one network evaluation for a batch of the first prompt; with guidance, half of a prediction's."""
        times: list[float] = []

        def on_step(output: Tensor, state: Tensor, reached: Tensor) -> None:
            float(reached.float().sum())  # reading a value waits for the device
            times.append(time.perf_counter())
            if len(times) > _TIMED_STEPS:
                raise EnoughError

        start = torch.from_numpy(noise.astype(np.float32))
        times.append(time.perf_counter())
        self._call(start, prompts.arguments(self.pipe, [0] * len(noise)), on_step)
        first = 1 if len(times) > 2 else 0  # the first one warms up, if there is another
        return (times[-1] - times[first]) / (len(times) - 1 - first) / self.condition.evaluations

    def _call(self, start: Tensor, embeddings: dict[str, Any], on_step: Callable[..., None]) -> Tensor:
        latents = self.packing.pack(self._given(start))
        return call_pipeline(self.pipe, self.path.sampler, latents, embeddings, on_step)

    def _given(self, start: Tensor) -> Tensor:
        """Noise as the pipeline is given it, in its own dtype."""
        return (start * self.factor).to(self.device, getattr(torch, self.precision))

    def _check_start(self, call: int, state: Tensor, expected: Tensor) -> None:
        if call:
            same = torch.equal(state.to(expected.dtype), expected)
        else:  # multiplied in the pipeline's dtype
            tolerance = 1e-5 if self.precision == "float32" else 2e-2
            same = torch.allclose(state.float(), expected, rtol=tolerance, atol=tolerance)
        if not same:
            raise TeacherError(
                f"teacher {self.source}: step {call} starts from something else than "
                f"{'the state that the step before reached' if call else 'the noise that it was given'}; expected a "
                "pipeline that only steps its scheduler"
            )

    def _check_jump(self, call: int, output: Tensor, state: Tensor, reached: Tensor) -> None:
        error, limit = self.path.jump_error(call, output, state, reached), TOLERANCE[self.precision]
        if error is not None and not error < limit:
            level = self.path.states[call + 1]
            raise TeacherError(
                f"teacher {self.source}: step {call} of its {self.path.scheduler} ends {error:.2g} of the state away "
                f"from the table's level (alpha {level.alpha:.4g}, sigma {level.sigma:.4g}); expected at most "
                f"{limit:g}: its states are not where they would be recorded"
            )


def load_pipeline_teacher(
    config: TeacherConfig,
    sampler: SamplerConfig,
    prompt: Prompt,
    seeds_per_prompt: int,
    device: torch.device,
    precision: str,
) -> PipelineTeacher:
    """Load a text-to-image pipeline, and look at its first step for one prompt.

    Raises:
        ConfigError: the sampler doesn't fit.
        TeacherError: it is missing, or none that advkd can record.
    """
    source = config.source
    folder, commit = find_pipeline(config)
    pipe = load_pipeline(folder, config, device, precision)
    own_scheduler = {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config}
    name = choose_scheduler(pipe, sampler)
    check_call(pipe, sampler)
    encoded = encode(pipe, prompt, sampler.call, device)
    texts = ("a", f"{prompt.text}, {prompt.text}")
    others = [encode(pipe, Prompt(text=text), sampler.call, device) for text in texts]
    look = look_at(
        pipe,
        sampler,
        name,
        EncodedPrompts(prompts=(prompt,), encoded=(encoded,)).arguments(pipe, [0]),
        getattr(torch, precision),
    )
    space, decoder = _space(folder, look.packing.item_shape, source)
    condition = PromptCondition(
        seeds_per_prompt=seeds_per_prompt,
        guidance=float(sampler.guidance),
        evaluations=look.evaluations,
        embeddings=embeddings_of(encoded, others, _longest(pipe, sampler)),
    )
    index = read_json(folder / "model_index.json")
    return PipelineTeacher(
        pipe=pipe,
        source=source,
        commit=commit,
        card=TeacherCard.read(folder, index),
        parts=config.parts(),
        device=device,
        precision=precision,
        tensors_sha256=tensors_sha256(denoiser_of(pipe).state_dict()),
        encoders=encoder_hashes(pipe),
        scheduler_config=own_scheduler,
        condition=condition,
        path=look.path,
        packing=look.packing,
        factor=look.factor,
        space=space,
        decoder=decoder,
    )


def encoder_hashes(pipe: Any) -> dict[str, str]:
    """SHA-256 of the tensors of a pipeline's text encoders, by name."""
    return {
        part: tensors_sha256(module.state_dict())
        for part, module in sorted(pipe.components.items())
        if part.startswith("text_encoder") and module is not None
    }


def _space(folder: Path, item_shape: tuple[int, int, int], source: str) -> tuple[LatentSpace | None, dict[str, Tensor]]:
    if not (folder / "vae").is_dir():
        return None, {}
    return load_space(autoencoder_part(str(folder)), item_shape, source)


def _longest(pipe: Any, sampler: SamplerConfig) -> int:
    """Tokens for which padded embeddings have room."""
    if "max_sequence_length" in sampler.call:
        return int(sampler.call["max_sequence_length"])
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    return _DEFAULT_LENGTH if parameter is None else int(parameter.default)
