"""The teacher's own network, evaluated once per submodule; between two recorded levels the state follows the DDIM step.

Before training this is the teacher's DDIM (Song et al. 2021, eq. 12 with η = 0) in as many steps as there are chosen
states. Its output is read as the teacher's is:

    v: x̂_0 = α x − σ v        ε: x̂_0 = (x − σ ε) / α        x_0: itself        flow: x̂_0 = x − σ u

with (α, σ) of the level, in the units that the teacher was trained in. Where α is next to nothing, as at x_T, an error
of ε would be multiplied by 1 / α: there the output of an ε-network is read as v instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from advkd.cache.errors import TrainingError, first_line
from advkd.stages.diffusers_models import model_class
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.training.protocol import UnrollingNetwork, check_condition
from advkd.stages.student.unrolled.network import Level, jump

MIN_ALPHA = 0.05
"""Below it, an ε-network's output is read as v."""


class TeacherStudent(UnrollingNetwork):
    """As many evaluations of the teacher's network as there are recorded states after x_T.

    Args:
        geometry: with the description of the teacher's network.
        shared: whether all evaluations have one set of weights, instead of one each.

    Raises:
        TrainingError: the network can't be made.
    """

    def __init__(self, geometry: Geometry, shared: bool) -> None:
        super().__init__()
        assert geometry.network is not None
        self.description = geometry.network
        self.levels, self.timesteps = geometry.levels, geometry.timesteps
        self.num_classes = geometry.num_classes
        self.channels = geometry.item_shape[0]
        self.num_evaluations = len(geometry.levels) - 1
        self.networks = nn.ModuleList(self._make() for _ in range(1 if shared else self.num_evaluations))

    def _make(self) -> nn.Module:
        try:
            made: nn.Module = model_class(self.description.name).from_config(self.description.config)
            if any(buffer.is_meta for buffer in made.buffers()):  # fixed filters and positions, which no file holds
                with torch.device("cpu"):
                    made = model_class(self.description.name).from_config(self.description.config)
        except Exception as error:  # whatever a configuration from elsewhere makes diffusers and torch raise
            problem = first_line(error)
            raise TrainingError(f"a {self.description.name} can't be made of its configuration ({problem})") from error
        return made

    def start_from(self, weights: bytes) -> None:
        """Give all evaluations the teacher's weights.

        Args:
            weights: a safetensors file that was checked.
        """
        tensors = {name: tensor.float() for name, tensor in load(weights).items()}
        for network in self.networks:
            network.load_state_dict(tensors)

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """x_T (N, C, H, W), unit normal → x_0 of the same shape.

        Args:
            noise: x_T.
            condition: class labels, int64, shape (N,); None of a student without classes.

        Raises:
            UsageError: they are missing or surplus.
        """
        return self.unroll(noise, condition)[0][-1]

    def unroll(self, noise: Tensor, condition: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Every evaluation's x̂_0, and every state after x_T, in stored units; the last state is the last x̂_0."""
        return self._unroll(noise, condition, range(self.num_evaluations))

    def in_fewer(self, noise: Tensor, condition: Tensor | None, count: int) -> Tensor:
        """x_0 by `count` evaluations, evenly spaced among the levels that it was trained at, the first among them."""
        chosen = [k * self.num_evaluations // count for k in range(count)]
        return self._unroll(noise, condition, chosen)[0][-1]

    def _unroll(
        self, noise: Tensor, condition: Tensor | None, submodules: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As `unroll`, by some of the submodules, each of which leads to the level of the next."""
        check_condition(noise, condition, self.num_classes)
        state, predictions, states = noise, [], []
        for k, following in itertools.pairwise([*submodules, self.num_evaluations]):
            before = self.levels[k]
            x0 = self._x0(state, before, self._evaluate(state, before, k, condition))
            state = jump(state, x0, before, self.levels[following])
            predictions.append(x0)
            states.append(state)
        states[-1] = predictions[-1]
        return predictions, states

    def heads(self, noise: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """One prediction per recorded state after x_T."""
        return self.unroll(noise, condition)[1]

    def _evaluate(self, state: Tensor, level: Level, k: int, condition: Tensor | None) -> Tensor:
        """The network's output at the level of submodule k, without a learned variance."""
        network: Any = self.networks[k % len(self.networks)]
        whole = self.description.config.get("time_embedding_type") == "learned"
        dtype = torch.int64 if whole else torch.float32
        timesteps = torch.full((state.shape[0],), self.timesteps[k], dtype=dtype, device=state.device)
        known = {} if condition is None else {"class_labels": condition}
        output: Tensor = network(state * self._unit(level), timesteps, **known).sample
        return output[:, : self.channels]

    def _unit(self, level: Level) -> float:
        """What a state in stored units is multiplied by to be in the units of the teacher's training."""
        return 1.0 / (level[0] + level[1]) if self.description.prediction == "flow" else 1.0

    def _x0(self, state: Tensor, level: Level, output: Tensor) -> Tensor:
        alpha, sigma = level
        prediction = self.description.prediction
        if prediction == "flow":
            unit = self._unit(level)
            return unit * (state - sigma * output)
        if prediction == "sample":
            return output
        if prediction == "v_prediction" or alpha < MIN_ALPHA:
            return alpha * state - sigma * output
        return (state - sigma * output) / alpha
