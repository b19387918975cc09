"""What processes that train together must agree on. A single process is a team of one, and nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from advkd.cache.errors import AdvkdError, UsageError

T = TypeVar("T")


class Team:
    """The processes of one `accelerate launch`.

    Args:
        mixed_precision: "no", "bf16" or "fp16".

    Raises:
        UsageError: this machine can't compute so.
    """

    def __init__(self, mixed_precision: str) -> None:
        # Without being told so, processes on CPUs would each believe to be alone.
        on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
        try:
            self.accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpus)
        except ValueError as error:
            raise UsageError(f"train.mixed_precision: {mixed_precision} doesn't work here ({error})") from None

    @property
    def size(self) -> int:
        """Processes."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return int(self.accelerator.process_index)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def told(self, value: T | None) -> T:
        """What the first process says, in every process."""
        if self.size == 1:
            return cast("T", value)
        box: list[Any] = [value]
        broadcast_object_list(box)
        return cast("T", box[0])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.size == 1 else bool(self._reduce(float(flag), "sum") > 0)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Numbers averaged over processes, which all have the same names."""
        return {name: value if self.size == 1 else self._reduce(value, "mean") for name, value in values.items()}

    def _reduce(self, value: float, how: str) -> float:
        tensor = torch.tensor(value, device=self.accelerator.device, dtype=torch.float64)
        return float(self.accelerator.reduce(tensor, reduction=how))

    @contextmanager
    def entered_by_first(self, entering: AbstractContextManager[T]) -> Iterator[T]:
        """A context that the first process enters for all; where it can't, it says why and the others end quietly."""
        if not self.is_first:
            told: tuple[bool, Any] = self.told(None)
            if not told[0]:
                raise SystemExit(1)
            yield told[1]
            return
        try:
            value = entering.__enter__()
        except AdvkdError:
            self.told((False, None))
            raise
        with _Entered(entering):
            self.told((True, value))
            yield value


class _Entered(AbstractContextManager[None]):
    """Leaves a context that was entered already."""

    def __init__(self, entered: AbstractContextManager[Any]) -> None:
        self._entered = entered

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.__exit__(*error)
