"""The tasks that a cluster's workers run, one per block. `advkd.stages.teacher.build.workers` submits them.

A task may run twice (dask reruns the tasks of a lost worker), on any worker, beside other builds of the store: the
block's lock and its ledger record decide. Each worker loads the teacher once and samples one block at a time.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from advkd.cache.errors import AdvkdError, CacheNotFoundError, MismatchError
from advkd.cache.format.seeds import seeds_of
from advkd.cache.write.divide import Outcome
from advkd.cache.write.writer import OnMismatch
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.build.block import SampledBlock, commit_block, sample_block
from advkd.stages.teacher.build.build import Built, build
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig

P = ParamSpec("P")
R = TypeVar("R")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that a worker needs to make any block of a store."""

    run: str
    """Identifies one run of the command, so that its tasks and events are not mistaken for another run's."""
    teacher: TeacherConfig
    sampler: SamplerConfig
    config: CacheConfig
    store: Path
    """Absolute: all workers must see it at this path."""
    fingerprint: str
    layout_hash: str
    command: str
    report_seconds: float
    """How often each worker reports its progress."""
    threads: int | None
    """Threads of a local worker, which also takes its turn at the GPUs; None for workers of a running cluster."""

    @property
    def topic(self) -> str:
        """Of the events in which workers report their progress."""
        return f"advkd-{self.run}"


def without_retry(function: Callable[P, R]) -> Callable[P, R | AdvkdError | OSError]:
    """Return errors that would recur, perhaps after hours of sampling; dask retries errors that are raised."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | AdvkdError | OSError:
        try:
            return function(*args, **kwargs)
        except AdvkdError as error:
            return type(error)(str(error))  # without its cause, which may not be picklable
        except OSError as error:
            if error.errno in _DISK_FULL:
                return OSError(error.errno, error.strerror, error.filename)
            raise

    return wrapper


@without_retry
def make_first(request: Request, block: int, on_mismatch: OnMismatch) -> tuple[Built, list[str]]:
    """Make the first block like a build of its own: gate, store, tolerance, preview. Also returns the lines it said."""
    plan = _plan(request)
    seeds = seeds_of(block, plan.layout.block_size)
    config = dataclasses.replace(plan.config, seeds=f"{seeds.start}:{seeds.stop}")
    reporter = _Messenger(_reporting(request, block))
    plan = dataclasses.replace(plan, config=config)
    with _sampling:
        built = build(
            plan,
            on_mismatch=on_mismatch,
            reporter=reporter,
            command=request.command,
            workers=None if request.threads is None else 1,
        )
    return built, reporter.said


@without_retry
def make(request: Request, block: int) -> Outcome:
    """Make one block; idempotent, so dask may run it again."""
    plan = _plan(request)
    if not plan.writer.exists():
        raise CacheNotFoundError(f"{request.store} isn't there on a worker: all workers must see the store's folder")
    with plan.writer.writing(), ExitStack() as held:
        sampled: list[SampledBlock] = []

        def sample(claim: ExitStack) -> None:
            sampled.append(sample_block(plan, block, _reporting(request, block)))
            held.push(claim.pop_all())  # until the block is committed

        with _sampling:  # before the claim: while this thread waits, another process may make the block
            outcome = plan.writer.make(block, sample)
        for one in sampled:
            commit_block(plan, one, request.command)
        return outcome


_plans: dict[tuple[str, str, Path, int, str | None], Plan] = {}
_loading = threading.Lock()
_sampling = threading.Lock()
"""A worker's threads share one teacher and one device: one thread samples while another writes its block."""


def _plan(request: Request) -> Plan:
    """The worker's own plan, its teacher loaded once."""
    config = request.config
    key = (request.fingerprint, request.layout_hash, request.store, config.batch_size, config.device)
    with _loading:
        if key not in _plans:
            _plans.clear()  # before loading: two teachers may not fit into memory
            device = config.device
            if request.threads is not None:
                torch.set_num_threads(request.threads)
                device = worker_device(device, _worker_name())
            plan = make_plan(
                request.teacher, request.sampler, dataclasses.replace(config, device=device), request.store
            )
            if (plan.recipe.fingerprint, plan.layout.layout_hash) != (request.fingerprint, request.layout_hash):
                raise MismatchError(
                    f"a worker's teacher or versions give recipe {plan.recipe.fingerprint[:12]}, expected "
                    f"{request.fingerprint[:12]}: install the same diffusers and the same checkpoint on all machines"
                )
            _plans[key] = plan
        plan = _plans[key]
        if plan.config.accept_range != config.accept_range:  # as after a refusal; the teacher stays loaded
            changed = dataclasses.replace(plan.config, accept_range=config.accept_range)
            plan = _plans[key] = dataclasses.replace(plan, config=changed)
        return plan


def worker_device(wanted: str | None, name: object) -> str | None:
    """The device of a local worker: the one that was asked for, else GPU number `name` modulo their count."""
    count = torch.cuda.device_count()
    if wanted is not None or count < 2 or not str(name).isdecimal():
        return wanted
    return f"cuda:{int(str(name)) % count}"


def _worker_name() -> object:
    from distributed import get_worker

    return get_worker().name


def _reporting(request: Request, block: int) -> Callable[[int], None]:
    from distributed import get_worker

    worker, evaluations, reported = get_worker(), 0, time.monotonic()

    def advance(num_evaluations: int) -> None:
        nonlocal evaluations, reported
        evaluations += num_evaluations
        if time.monotonic() - reported > request.report_seconds:
            reported = time.monotonic()
            worker.log_event(request.topic, (block, evaluations))

    return advance


class _Messenger(SilentReporter):
    """Forwards the progress of a build in a worker, and keeps its lines."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.said: list[str] = []
        self._advance = advance

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Forward it."""
        self._advance(amount)

    def say(self, text: str) -> None:
        """Keep it."""
        self.said.append(text)
