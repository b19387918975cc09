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
from advkd.stages.device import best_device

T = TypeVar("T")


class ProcessGroup:
    """The processes that `torchrun` or `accelerate launch` started.

    Args:
        mixed_precision: "no", "bf16" or "fp16".
        device: such as cuda:1; the best of this machine if None.

    Raises:
        UsageError: this machine doesn't support that precision, or a launcher started fewer processes than asked for.
    """

    def __init__(self, mixed_precision: str, device: str | None = None) -> None:
        _check_launcher()
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
            # Otherwise `best_device` would allocate on the first GPU in every process. Modulo as in Accelerate.
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        chosen = best_device(device)
        if chosen.index is not None and several:
            raise UsageError(f"device {device}: each process takes the GPU of its own rank; leave out the number")
        if chosen.index is not None:
            torch.accelerator.set_device_index(chosen.index)
        # Accelerate joins processes on CPUs only if `cpu` is set; otherwise each would train alone.
        on_cpus = chosen.type == "cpu" and (several or device is not None)
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


def _check_launcher() -> None:
    """Refuse `accelerate launch --cpu --num_processes N`, which starts one process unless it goes through MPI.

    It announces N > 1 processes by MASTER_ADDR, but nothing gives this process a rank.
    """
    announced = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys()
    ranks = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
    if announced and not any(name in os.environ for name in ranks):
        raise UsageError(
            "accelerate launch --cpu started one process of the several asked for: use `torchrun --nproc-per-node N -- "
            '"$(which advkd-train)" …`, or give it --mpirun_hostfile'
        )
