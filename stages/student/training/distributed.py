"""The processes that train one student together, and what they must agree on. A single process sends nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from advkd.cache.errors import AdvkdError, UsageError

T = TypeVar("T")


class ProcessGroup:
    """The processes that `torchrun` or `accelerate launch` started.

    Args:
        mixed_precision: "no", "bf16" or "fp16".

    Raises:
        UsageError: this machine doesn't support that precision.
    """

    def __init__(self, mixed_precision: str) -> None:
        # Accelerate joins processes on CPUs only if `cpu` is set; otherwise each would train alone.
        on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
        try:
            self.accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpus)
        except ValueError as error:
            raise UsageError(f"train.mixed_precision: {mixed_precision} doesn't work here ({error})") from None

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """This process's number."""
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this process has rank 0, which writes files and prints."""
        return self.rank == 0

    def broadcast(self, value: T | None) -> T:
        """The main process's value, in every process."""
        if self.world_size == 1:
            return cast("T", value)
        box: list[Any] = [value]
        broadcast_object_list(box)
        return cast("T", box[0])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.world_size == 1 else bool(self._reduce(float(flag), "sum") > 0)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Numbers averaged over processes; all processes have the same names."""
        return {name: value if self.world_size == 1 else self._reduce(value, "mean") for name, value in values.items()}

    def _reduce(self, value: float, how: str) -> float:
        tensor = torch.tensor(value, device=self.accelerator.device, dtype=torch.float64)
        return float(self.accelerator.reduce(tensor, reduction=how))

    @contextmanager
    def entered_by_main(self, context: AbstractContextManager[T]) -> Iterator[T]:
        """A context that the main process enters for all.

        If it fails to enter, the main process raises the error and the others exit without a message.
        """
        with ExitStack() as stack:
            entered: tuple[bool, Any] = (False, None)
            try:
                if self.is_main:
                    entered = (True, stack.enter_context(context))
            except AdvkdError:
                self.broadcast(entered)
                raise
            succeeded, value = self.broadcast(entered)
            if not succeeded:
                raise SystemExit(1)
            yield value
