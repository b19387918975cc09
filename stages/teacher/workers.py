"""Building with many processes: one dask task is one block, made by whichever worker takes it.

Workers write blocks straight into the store and return only that they did; a worker that dies loses its block's claim
with its process, and the block is made again elsewhere. Each worker loads the teacher once.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from advkd.cache.errors import CacheError, CacheNotFoundError, MismatchError, UsageError
from advkd.cache.layout import seeds_of
from advkd.cache.writer import CacheWriter, OnMismatch
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.teacher.block import commit_block, sample_block
from advkd.stages.teacher.build import POLL_SECONDS, Built, begin_store, build, check_whole
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.plan import Plan, check_disk, make_plan, missing_blocks

REPORT_SECONDS = 0.5
RETRIES = 2
Outcome = Literal["made", "present", "busy"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a worker needs to know to make any block of a store."""

    teacher: TeacherConfig
    sampler: SamplerConfig
    config: CacheConfig
    store: Path
    """Absolute: all workers must see it at this path."""
    fingerprint: str
    layout_hash: str
    command: str
    threads: int | None
    """Threads that a local worker may use; an existing cluster's workers decide themselves."""

    @property
    def topic(self) -> str:
        """Of the events in which workers tell how far they are."""
        return f"advkd-{self.fingerprint[:16]}-{self.layout_hash[:8]}"


def build_with_workers(
    plan: Plan,
    teacher: TeacherConfig,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    on_mismatch: OnMismatch = "stop",
    reporter: Reporter | None = None,
    command: str = "",
) -> Built:
    """Build the missing blocks of a plan with local processes, or on an existing dask cluster.

    Args:
        plan: as for `build`; its teacher is only used to know the recipe.
        teacher: where workers load it from.
        workers: so many local processes, one per GPU where there are several.
        scheduler: address of a running scheduler, such as `tcp://host:8786`; its workers must see the store's folder.
        on_mismatch: where the store is of another recipe: stop, or rename it.
        reporter: hears of progress.
        command: for the provenance.

    Raises:
        UsageError: the scheduler can't be reached.
        CacheError: workers don't see the store, or die again and again on a block.
        AdvkdError: whatever `build` raises.
    """
    reporter = reporter or SilentReporter()
    work, todo = plan.evaluations_per_block, missing_blocks(plan)
    check_disk(plan, len(todo))
    continues = CacheWriter(plan.store, plan.recipe, plan.layout).continues(on_mismatch)
    if continues:
        check_whole(CacheWriter(plan.store, plan.recipe, plan.layout), plan)
    if not todo:
        return build(plan, on_mismatch=on_mismatch, reporter=reporter, command=command)
    source = Path(teacher.source)
    request = Request(
        teacher=dataclasses.replace(teacher, source=str(source.absolute()) if source.is_dir() else teacher.source),
        sampler=plan.sampler,
        config=plan.config,
        store=plan.store.absolute(),
        fingerprint=plan.recipe.fingerprint,
        layout_hash=plan.layout.layout_hash,
        command=command,
        threads=None if workers is None else max(1, (os.cpu_count() or 1) // workers),
    )
    reporter.start("cache", len(plan.blocks) * work, "evaluations", done=(len(plan.blocks) - len(todo)) * work)
    with _client(workers, scheduler) as client, _listening(client, request.topic, reporter, work) as finished:
        # A worker makes the first block like a build of its own: gate, store, tolerance, preview.
        first = client.submit(
            _make_first, request, todo[0], on_mismatch, key=_key(request, todo[0], "first"), retries=RETRIES
        )
        built: Built = _result(first.result, todo[0])
        if built.set_aside:
            reporter.say(f"set aside the cache of another recipe: {built.set_aside}")
        if built.preview:
            reporter.say(f"first block done; look: {built.preview}")
        finished(todo[0])
        writer = CacheWriter(plan.store, plan.recipe, plan.layout)
        if not writer.exists():
            raise CacheNotFoundError(f"the worker made {request.store}, but it isn't here: is the folder shared?")
        with writer.writing():
            begin_store(writer, plan)
            outcomes = _make_all(client, request, writer.missing(plan.seeds), finished, reporter)
    reporter.finish()
    num_made = built.num_blocks + outcomes.count("made")
    return Built(
        store=plan.store,
        num_blocks=num_made,
        num_present=len(plan.blocks) - num_made,
        set_aside=built.set_aside,
        preview=built.preview,
    )


def _make_all(
    client: Any, request: Request, blocks: list[int], finished: Callable[[int], None], reporter: Reporter
) -> list[Outcome]:
    """Have all blocks made; those that somebody outside this cluster makes are asked for again until they are there."""
    from distributed import as_completed

    outcomes: list[Outcome] = []
    attempt = 0
    while blocks:
        futures = {
            client.submit(
                _make, request, block, key=_key(request, block, str(attempt)), pure=False, retries=RETRIES
            ): block
            for block in blocks
        }
        busy = []
        try:
            for future in as_completed(futures, loop=client.loop):
                block = futures[future]
                outcome: Outcome = _result(future.result, block)
                if outcome == "busy":
                    busy.append(block)
                else:
                    outcomes.append(outcome)
                    finished(block)
                future.release()
        except BaseException:
            client.cancel(list(futures))
            raise
        if busy and len(busy) == len(blocks):
            if attempt == 0:
                reporter.say(f"waiting for {len(busy)} blocks that another build is making")
            time.sleep(POLL_SECONDS)
        blocks, attempt = busy, attempt + 1
    return outcomes


def _key(request: Request, block: int, attempt: str) -> str:
    return f"block-{request.fingerprint[:16]}-{request.layout_hash[:8]}-{block}-{attempt}"


def _result(result: Callable[[], Any], block: int) -> Any:
    from distributed import KilledWorker

    try:
        return result()
    except KilledWorker as error:
        raise CacheError(
            f"workers died again and again while making block {block} (out of memory? a smaller --batch-size may "
            f"fit); what was committed is kept ({str(error).splitlines()[0][:120]})"
        ) from None


@contextmanager
def _client(workers: int | None, scheduler: str | None) -> Iterator[Any]:
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=10, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise UsageError(f"no dask scheduler answers at {scheduler} ({str(error).splitlines()[0][:120]})") from None
        with client:
            yield client
        return
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, memory_limit=0, silence_logs="CRITICAL"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def _listening(client: Any, topic: str, reporter: Reporter, work: int) -> Iterator[Callable[[int], None]]:
    """One bar over all workers; yields what to call when a block is finished."""
    done: dict[int, int] = {}

    def reach(block: int, evaluations: int) -> None:
        before, done[block] = done.get(block, 0), evaluations
        reporter.advance(evaluations - before, f"block {block}")

    def heard(event: tuple[float, Any]) -> None:
        block, evaluations = event[1]
        if done.get(block, 0) < work:  # a late word about a finished block changes nothing
            reach(int(block), min(int(evaluations), work - 1))

    client.subscribe_topic(topic, heard)
    try:
        yield lambda block: reach(block, work)
    finally:
        client.unsubscribe_topic(topic)


# What follows runs in the workers.

_plans: dict[tuple[str, Path, int], Plan] = {}


def _plan(request: Request) -> Plan:
    """The worker's own plan, its teacher loaded once."""
    key = (request.topic, request.store, request.config.batch_size)
    if key not in _plans:
        if request.threads is not None:
            torch.set_num_threads(request.threads)
        config = dataclasses.replace(request.config, device=worker_device(request.config.device, _worker_name()))
        plan = make_plan(request.teacher, request.sampler, config, request.store)
        if (plan.recipe.fingerprint, plan.layout.layout_hash) != (request.fingerprint, request.layout_hash):
            raise MismatchError(
                f"a worker's teacher or versions give recipe {plan.recipe.fingerprint[:12]}, expected "
                f"{request.fingerprint[:12]}: install the same diffusers and the same checkpoint on all machines"
            )
        _plans.clear()
        _plans[key] = plan
    return _plans[key]


def worker_device(wanted: str | None, name: object) -> str | None:
    """Which device a worker uses: what it is told, else the GPU whose turn it is by the worker's number.

    A worker of dask-cuda sees one GPU only and takes that.
    """
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
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            worker.log_event(request.topic, (block, evaluations))

    return advance


def _make_first(request: Request, block: int, on_mismatch: OnMismatch) -> Built:
    plan = _plan(request)
    seeds = seeds_of(block, plan.layout.block_size)
    config = dataclasses.replace(plan.config, seeds=f"{seeds.start}:{seeds.stop}")
    reporter = _WorkerReporter(_reporting(request, block))
    return build(
        dataclasses.replace(plan, config=config), on_mismatch=on_mismatch, reporter=reporter, command=request.command
    )


def _make(request: Request, block: int) -> Outcome:
    """Make one block; running it again does no harm, so dask may."""
    plan = _plan(request)
    writer = CacheWriter(request.store, plan.recipe, plan.layout)
    if not writer.exists():
        raise CacheNotFoundError(f"{request.store} isn't there on a worker: all workers must see the store's folder")
    with writer.writing(), writer.claim(block) as claimed:
        if not claimed:
            return "busy"
        if writer.is_committed(block):
            return "present"
        began = datetime.now(UTC)
        states = sample_block(plan, block, _reporting(request, block))
        commit_block(writer, plan, block, states, began, request.command)
        return "made"


class _WorkerReporter(SilentReporter):
    """Sends on what a build in a worker says of its progress."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Send it on."""
        self._advance(amount)
