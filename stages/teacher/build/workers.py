"""Building with many processes: one dask task is one block, made by whichever worker takes it.

Workers write blocks straight into the store and return only that they did; a worker that dies loses its block's claim
with its process, and the block is made again elsewhere. What runs in the workers: `advkd.stages.teacher.build.tasks`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from advkd.cache.errors import CacheError, CacheNotFoundError, UsageError
from advkd.cache.read.compare import TOLERANCE_FILE
from advkd.cache.write.writer import CacheWriter, OnMismatch
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.teacher.build.build import POLL_SECONDS, Built, begin_store, build, check_whole
from advkd.stages.teacher.build.plan import Plan, check_disk, missing_blocks
from advkd.stages.teacher.build.tasks import Request, make, make_first
from advkd.stages.teacher.config import TeacherConfig

CONNECT_SECONDS = 5.0
"""How long to try to reach a scheduler."""
REPORT_SECONDS = 0.5
"""How often a worker tells how far it is; in a large cluster less often, so that all together stay below …"""
REPORTS_PER_SECOND = 100
IN_FLIGHT = 4096
"""Tasks that the scheduler knows at a time: some for each of a thousand workers, however many blocks there are."""
RETRIES = 2
"""Of a task that failed in a way that may pass; see `advkd.stages.teacher.build.tasks.without_retry`."""
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": 1 << 32, "MALLOC_MMAP_THRESHOLD_": 1 << 30, "MALLOC_ARENA_MAX": 1}
"""For the C library of workers. Dask lets them give memory back at once, so that a network's would be mapped anew for
every layer; that took over half of the time on CPUs. So does a thread's own arena, which ends at 64 MiB."""
_SELDOM = {"distributed.admin.tick.interval": "500ms", "distributed.worker.profile.enabled": False}
"""What dask watches itself by, 50 and 100 times a second in each process: the network's thread has to wait for it."""
_SILENT = logging.CRITICAL + 1


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
    writer = CacheWriter(plan.store, plan.recipe, plan.layout)
    continues = writer.continues(on_mismatch)
    if continues:
        check_whole(writer, plan)
    if not todo:
        return build(plan, on_mismatch=on_mismatch, reporter=reporter, command=command)
    built = Built(store=plan.store, num_blocks=0, num_present=0, set_aside=None, preview=None)
    reporter.start("cache", len(plan.blocks) * work, "evaluations", done=(len(plan.blocks) - len(todo)) * work)
    with _client(workers, scheduler) as client:
        request = _request(plan, teacher, workers, command, _num_workers(client, scheduler, reporter))
        with _listening(client, request.topic, reporter, work) as finished:
            if not (continues and _has_begun(plan)):
                # A worker makes the first block like a build of its own; the others wait for what it shows.
                future = client.submit(
                    make_first, request, todo[0], on_mismatch, key=_key(request, todo[0], "first"), retries=RETRIES
                )
                built, said = _result(future, todo[0])
                for line in said:
                    reporter.say(line)
                finished(todo[0])
                if not writer.exists():
                    raise CacheNotFoundError(f"the worker made {request.store}, but it isn't here: is it shared?")
            with writer.writing():
                begin_store(writer, plan)
                num_made = _make_all(client, request, writer.missing(plan.seeds), finished, reporter)
    reporter.finish()
    num_made += built.num_blocks
    return dataclasses.replace(built, num_blocks=num_made, num_present=len(plan.blocks) - num_made)


def _request(plan: Plan, teacher: TeacherConfig, workers: int | None, command: str, num_workers: int) -> Request:
    source = Path(teacher.source)
    return Request(
        run=uuid.uuid4().hex[:12],
        teacher=dataclasses.replace(teacher, source=str(source.absolute()) if source.is_dir() else teacher.source),
        sampler=plan.sampler,
        config=plan.config,
        store=plan.store.absolute(),
        fingerprint=plan.recipe.fingerprint,
        layout_hash=plan.layout.layout_hash,
        command=command,
        report_seconds=max(REPORT_SECONDS, num_workers / REPORTS_PER_SECOND),
        # What this process may use, by its affinity and OMP_NUM_THREADS, shared among them.
        threads=None if workers is None else max(1, torch.get_num_threads() // workers),
    )


def _has_begun(plan: Plan) -> bool:
    """Whether a store has shown that its teacher works, and knows its tolerance: then all workers start at once."""
    records = plan.store / "blocks"
    return (plan.store / TOLERANCE_FILE).is_file() and records.is_dir() and any(records.glob("*.json"))


def _make_all(
    client: Any, request: Request, blocks: list[int], finished: Callable[[int], None], reporter: Reporter
) -> int:
    """Have all blocks made; those that somebody outside this cluster makes are asked for again until they are there.

    Returns:
        How many were made here.
    """
    from distributed import as_completed

    queue, later, num_made, attempt = deque(blocks), list[int](), 0, 0
    futures: dict[Any, int] = {}
    completed = as_completed(loop=client.loop)

    def submit() -> None:
        while queue and len(futures) < IN_FLIGHT:
            block = queue.popleft()
            future = client.submit(make, request, block, key=_key(request, block, str(attempt)), retries=RETRIES)
            futures[future] = block
            completed.add(future)

    try:
        while queue:
            submit()
            for future in completed:
                block = futures.pop(future)
                outcome = _result(future, block)
                future.release()
                if outcome == "busy":
                    later.append(block)
                else:
                    num_made += outcome == "made"
                    finished(block)
                submit()
            if later:
                if attempt == 0:
                    reporter.say(f"waiting for {len(later)} blocks that another build is making")
                time.sleep(POLL_SECONDS)
            queue, later, attempt = deque(later), [], attempt + 1
    except BaseException:
        client.cancel(list(futures))
        raise
    return num_made


def _key(request: Request, block: int, attempt: str) -> str:
    return f"block-{request.run}-{block}-{attempt}"


def _result(future: Any, block: int) -> Any:
    from distributed import KilledWorker

    try:
        outcome = future.result()
    except KilledWorker as error:
        raise CacheError(
            f"workers died again and again while making block {block} (out of memory? a smaller --batch-size may "
            f"fit); what was committed is kept ({str(error).splitlines()[0][:120]})"
        ) from None
    except (CancelledError, asyncio.CancelledError):
        raise CacheError(
            "the dask scheduler went away; what was committed is kept: run the command again once it is back"
        ) from None
    except ImportError as error:
        raise CacheError(f"a worker has not what this needs ({error}): install the same packages everywhere") from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _num_workers(client: Any, scheduler: str | None, reporter: Reporter) -> int:
    count = len(client.nthreads())
    if not count:
        reporter.say(f"no worker has joined the cluster at {scheduler} yet; the build begins when one does")
    return count


@contextmanager
def _client(workers: int | None, scheduler: str | None) -> Iterator[Any]:
    from distributed import Client

    # What goes wrong comes as one line of ours; dask's own words about lost connections would come on top.
    logging.getLogger("distributed").setLevel(_SILENT)
    if scheduler is not None:
        _check_answers(scheduler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # versions that matter are in the fingerprint
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        with client:
            yield client
        return
    with _local_cluster(workers) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def _check_answers(scheduler: str) -> None:
    """Greet a scheduler as dask does; dask itself would wait for ever for whoever takes the call and says nothing.

    Raises:
        UsageError: none answers there.
    """
    from distributed import Security
    from distributed.comm import connect

    async def greet() -> None:
        options = Security().get_connection_args("client")
        comm = await asyncio.wait_for(connect(scheduler, timeout=CONNECT_SECONDS, **options), CONNECT_SECONDS)
        await comm.close()

    def run() -> None:  # in a thread of its own, as a notebook's has a loop already
        asyncio.run(greet())

    try:
        with ThreadPoolExecutor(max_workers=1) as executor:
            executor.submit(run).result()
    except Exception as error:  # something else may be there, and say anything
        what = str(error).strip() or f"no word within {CONNECT_SECONDS:g} s"
        raise UsageError(f"no dask scheduler answers at {scheduler} ({what.splitlines()[0][:120]})") from None


@contextmanager
def _local_cluster(workers: int | None) -> Iterator[Any]:
    """Processes of our own. When something ends the build early they are killed: no block is hurt by that."""
    import dask
    from distributed import LocalCluster

    key = "distributed.nanny.pre-spawn-environ"
    environment = {**dask.config.get(key), **_KEEP_MEMORY}
    with dask.config.set({key: environment, **_SELDOM}), _undisturbed():
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            worker_dashboard_address=None,
            memory_limit=0,
            silence_logs=_SILENT,
        )
    with cluster:
        try:
            yield cluster
        except BaseException:
            for nanny in cluster.workers.values():
                nanny.close_gracefully()  # don't start another
                if nanny.pid is not None:
                    os.kill(nanny.pid, signal.SIGKILL)
            raise


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hear Ctrl-C and SIGTERM only afterwards; threads that begin here, and what they start, never: we stop them."""
    resource_tracker.ensure_running()  # starting it later would unblock the signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _listening(client: Any, topic: str, reporter: Reporter, work: int) -> Iterator[Callable[[int], None]]:
    """One bar over all workers; yields what to call when a block is finished."""
    done: dict[int, int] = {}
    lock = threading.Lock()  # events come in dask's own thread

    def reach(block: int, evaluations: int) -> None:
        with lock:
            before = done.get(block, 0)
            if before < work:  # a late word about a finished block changes nothing
                done[block] = evaluations
                reporter.advance(evaluations - before, f"block {block}")

    def heard(event: tuple[float, Any]) -> None:
        block, evaluations = event[1]
        reach(int(block), min(int(evaluations), work - 1))

    client.subscribe_topic(topic, heard)
    try:
        yield lambda block: reach(block, work)
    finally:
        client.unsubscribe_topic(topic)
