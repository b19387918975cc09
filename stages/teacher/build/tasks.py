"""What a worker of a cluster runs: one task is one block. `advkd.stages.teacher.build.workers` is the other end.

A task may run twice (dask reruns what a lost worker did), on any worker, beside other builds of the store: the block's
lock and its ledger record decide. Each worker loads the teacher once and samples one block at a time.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch

from advkd.cache.errors import AdvkdError, CacheNotFoundError, MismatchError
from advkd.cache.format.seeds import seeds_of
from advkd.cache.write.writer import CacheWriter, OnMismatch
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.build.block import commit_block, sample_block
from advkd.stages.teacher.build.build import Built, build
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig

P = ParamSpec("P")
R = TypeVar("R")
Outcome = Literal["made", "present", "busy"]
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a worker needs to know to make any block of a store."""

    run: str
    """Of one run of the command: names its tasks and events, so that no other run's are mistaken for them."""
    teacher: TeacherConfig
    sampler: SamplerConfig
    config: CacheConfig
    store: Path
    """Absolute: all workers must see it at this path."""
    fingerprint: str
    layout_hash: str
    command: str
    report_seconds: float
    """How often each worker tells how far it is."""
    threads: int | None
    """Threads of a local worker, which also takes its turn at the GPUs; a cluster's workers are set up already."""

    @property
    def topic(self) -> str:
        """Of the events in which workers tell how far they are."""
        return f"advkd-{self.run}"


def without_retry(function: Callable[P, R]) -> Callable[P, R | AdvkdError | OSError]:
    """Return errors that another try would only meet again, after hours of sampling; dask retries what is raised."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | AdvkdError | OSError:
        try:
            return function(*args, **kwargs)
        except AdvkdError as error:
            return type(error)(str(error))  # without its cause, which may not travel
        except OSError as error:
            if error.errno in _DISK_FULL:
                return OSError(error.errno, error.strerror, error.filename)
            raise

    return wrapper


@without_retry
def make_first(request: Request, block: int, on_mismatch: OnMismatch) -> tuple[Built, list[str]]:
    """Make the first block like a build of its own: gate, store, tolerance, preview; what it said as well."""
    plan = _plan(request)
    seeds = seeds_of(block, plan.layout.block_size)
    config = dataclasses.replace(plan.config, seeds=f"{seeds.start}:{seeds.stop}")
    reporter = _Messenger(_reporting(request, block))
    plan = dataclasses.replace(plan, config=config)
    with _sampling:
        built = build(plan, on_mismatch=on_mismatch, reporter=reporter, command=request.command)
    return built, reporter.said


@without_retry
def make(request: Request, block: int) -> Outcome:
    """Make one block; running it again does no harm, so dask may."""
    plan = _plan(request)
    writer = CacheWriter(request.store, plan.recipe, plan.layout)
    if not writer.exists():
        raise CacheNotFoundError(f"{request.store} isn't there on a worker: all workers must see the store's folder")
    with ExitStack() as held:
        held.enter_context(writer.writing())
        with _sampling:  # before the claim: what this thread waits for, somebody else may make
            if not held.enter_context(writer.claim(block)):
                return "busy"
            if writer.is_committed(block):
                return "present"
            began = datetime.now(UTC)
            states = sample_block(plan, block, _reporting(request, block))
        commit_block(writer, plan, block, states, began, request.command)
        return "made"


_plans: dict[tuple[str, str, Path, int, str | None], Plan] = {}
_loading = threading.Lock()
_sampling = threading.Lock()
"""A worker with several threads has one teacher and one GPU; another thread may write its block meanwhile."""


def _plan(request: Request) -> Plan:
    """The worker's own plan, its teacher loaded once."""
    config = request.config
    key = (request.fingerprint, request.layout_hash, request.store, config.batch_size, config.device)
    with _loading:
        if key not in _plans:
            _plans.clear()  # first: two teachers may not fit
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
        return _plans[key]


def worker_device(wanted: str | None, name: object) -> str | None:
    """Which device a local worker uses: what it is told, else the GPU whose turn it is by the worker's number."""
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
    """Sends on what a build in a worker says of its progress, and keeps its lines."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.said: list[str] = []
        self._advance = advance

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Send it on."""
        self._advance(amount)

    def say(self, text: str) -> None:
        """Keep it."""
        self.said.append(text)
