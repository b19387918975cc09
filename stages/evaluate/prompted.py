"""Rows of a text-to-image teacher: its own pipeline's call, for the noise and the prompts that a cache would have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.cache.format.prompts import Prompt
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate.config import FIRST_FRESH_SEED
from advkd.stages.teacher.config import SamplerConfig
from advkd.stages.teacher.pipelines.encoding import Encoded, EncodedPrompts
from advkd.stages.teacher.pipelines.loading import denoiser_of
from advkd.stages.teacher.pipelines.teacher import PipelineTeacher
from advkd.stages.teacher.sample.sampling import initial_noise

GOLDEN = 0.618
"""Leaps of this share of a circle spread points evenly over it, however many there are."""


def leaps(count: int) -> npt.NDArray[np.int64]:
    """All numbers below `count`, each once, in leaps, so that any run of them comes from all over: shape (count,)."""
    leap = max(1, round(count * GOLDEN))
    while math.gcd(leap, count) > 1:
        leap += 1
    return np.arange(count) * leap % max(1, count)


def prompts_told(cache: TrajectoryCache, seeds: range) -> npt.NDArray[np.int64]:
    """Which of a cache's prompts seeds have, int64, shape (N,): below `FIRST_FRESH_SEED` their own.

    Fresh seeds have all that it holds, in leaps over the list: prompts of a kind often stand together, and a set of
    fewer seeds than prompts must be as varied as the cache.
    """
    condition, there = cache.recipe.prompts, cache.prompts.committed
    assert condition is not None
    if seeds.stop <= FIRST_FRESH_SEED:
        return condition.prompts_of(seeds)
    numbers: npt.NDArray[np.int64] = there[leaps(len(there))[np.asarray(seeds) % len(there)]]
    return numbers


@dataclass(frozen=True, kw_only=True)
class PromptedTeacher:
    """A cache's teacher, and the prompts of the cache, each encoded when it is first asked for."""

    teacher: PipelineTeacher
    cache: TrajectoryCache
    encoded: dict[int, tuple[Prompt, Encoded]] = field(default_factory=dict)

    @property
    def network(self) -> torch.nn.Module:
        """The network that denoises."""
        return denoiser_of(self.teacher.pipe)

    def sampled_by(self, sampler: SamplerConfig) -> PromptedTeacher:
        """The same with another sampler.

        Raises:
            ConfigError: the sampler doesn't fit.
        """
        (prompt,) = self.cache.prompts.texts(self.cache.prompts.committed[:1])
        return PromptedTeacher(teacher=self.teacher.sampled_by(sampler, prompt), cache=self.cache, encoded=self.encoded)

    def images(self, seeds: range) -> Tensor:
        """x_0 of some seeds: float32 on the CPU, shape (N, C, H, W)."""
        recipe, steps = self.cache.recipe, self.teacher.path.sampler.steps
        noise = initial_noise(recipe.root_seed, seeds, recipe.item_shape, self.cache.layout.dtype)
        numbers = prompts_told(self.cache, seeds)
        once, rows = np.unique(numbers, return_inverse=True)
        return self.teacher.record(noise, self._encoded(once), rows.tolist(), record=[steps])[steps]

    def evaluation(self) -> Callable[[int], Tensor]:
        """Evaluates the network once for a batch of that many images, for timing and counting."""
        prompts, inputs = self._encoded(self.cache.prompts.committed[:1]), dict[int, Any]()

        def evaluate(batch: int) -> Tensor:
            if batch not in inputs:
                inputs[batch] = self.teacher.network_inputs(prompts, batch)
            args, kwargs = inputs[batch]
            with torch.inference_mode():
                return _tensor(self.network(*args, **kwargs))

        return evaluate

    def _encoded(self, numbers: npt.NDArray[np.int64]) -> EncodedPrompts:
        new = [number for number in numbers.tolist() if number not in self.encoded]
        if new:
            made = self.teacher.encode(self.cache.prompts.texts(new))
            self.encoded.update(zip(new, zip(made.prompts, made.encoded, strict=True), strict=True))
        prompts, encoded = zip(*(self.encoded[number] for number in numbers.tolist()), strict=True)
        return EncodedPrompts(prompts=prompts, encoded=encoded)


def _tensor(output: Any) -> Tensor:
    """The first tensor of what a network returns: a tensor, a tuple, a list or an output object of tensors."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output
