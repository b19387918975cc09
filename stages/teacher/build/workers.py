"""Building with many processes: one dask task is one block, made by whichever worker takes it.

Workers write blocks straight into the store and return only the outcome. A worker that dies loses its block's claim
with its process, and the block is made again elsewhere. `advkd.stages.teacher.build.tasks` runs in the workers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from advkd.cache.errors import CacheError, CacheNotFoundError
from advkd.cache.read.compare import TOLERANCE_FILE
from advkd.cache.write.divide import Outcome
from advkd.cache.write.writer import OnMismatch
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.teacher.build.build import Built, begin_store, build, check_whole, make_missing, start
from advkd.stages.teacher.build.cluster import connect
from advkd.stages.teacher.build.plan import Plan, say_warnings
from advkd.stages.teacher.build.tasks import Request, make, make_first
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.load.folders import local_folder

REPORT_SECONDS = 0.5
"""How often a worker reports its progress; less often in a large cluster: below `REPORTS_PER_SECOND` in total."""
REPORTS_PER_SECOND = 100
IN_FLIGHT = 4096
"""Tasks that the scheduler knows at a time: a few for each of a thousand workers, however many blocks there are."""
RETRIES = 2
"""Of a task that failed with an error that may be transient; see `advkd.stages.teacher.build.tasks.without_retry`."""


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
        plan: as for `build`; its teacher only determines the recipe.
        teacher: where workers load it from.
        workers: number of local processes; they take turns at the GPUs where there are several.
        scheduler: address of a running scheduler, such as `tcp://host:8786`; its workers must see the store's folder.
        on_mismatch: where the store is of another recipe: stop, or rename it.
        reporter: shows the progress of all workers together.
        command: for the provenance.

    Raises:
        UsageError: the scheduler can't be reached.
        CacheError: workers don't see the store, or a block keeps killing workers.
        AdvkdError: whatever `build` raises.
    """
    reporter = reporter or SilentReporter()
    writer = plan.writer
    continues = writer.continues(on_mismatch)
    if continues:
        check_whole(plan)
    if continues and not writer.missing(plan.seeds):
        return build(plan, on_mismatch=on_mismatch, reporter=reporter, command=command)
    todo = start(plan, reporter, continues=continues, workers=workers or 0)  # a cluster's memory is elsewhere
    built = Built(store=plan.store, num_blocks=0, num_present=0, set_aside=None, preview=None)
    with connect(workers, scheduler) as client:
        request = _request(plan, teacher, workers, command, _num_workers(client, scheduler, reporter))
        with _progress_of(client, request.topic, reporter, plan.evaluations_per_block) as finished:
            if continues and _has_begun(plan):
                say_warnings(plan, reporter)
            else:
                # One worker makes the first block like a build of its own; the others wait for its result.
                future = client.submit(
                    make_first, request, todo[0], on_mismatch, key=_key(request, todo[0], "first"), retries=RETRIES
                )
                built, said = _result(future, todo[0])
                for line in said:
                    reporter.say(line)
                finished(todo[0], "made")
                if not writer.exists():
                    raise CacheNotFoundError(f"a worker made {request.store}, but it isn't here: is it shared?")
            with writer.writing():
                begin_store(plan)
                num_made = make_missing(plan, partial(attempt_on, client, request), finished, reporter)
    reporter.finish()
    num_made += built.num_blocks
    return dataclasses.replace(built, num_blocks=num_made, num_present=len(plan.blocks) - num_made)


def attempt_on(client: Any, request: Request, blocks: list[int]) -> Iterator[tuple[int, Outcome]]:
    """Have each block tried once by some worker; the outcomes in the order in which they come."""
    from distributed import as_completed

    attempt, queue = uuid.uuid4().hex[:8], iter(blocks)
    running: dict[Any, int] = {}
    completed = as_completed(loop=client.loop)

    def submit() -> None:
        for block in itertools.islice(queue, IN_FLIGHT - len(running)):
            future = client.submit(make, request, block, key=_key(request, block, attempt), retries=RETRIES)
            running[future] = block
            completed.add(future)

    try:
        submit()
        for future in completed:
            block = running.pop(future)
            yield block, _result(future, block)
            future.release()
            submit()
    except BaseException:
        client.cancel(list(running))
        raise


def _request(plan: Plan, teacher: TeacherConfig, workers: int | None, command: str, num_workers: int) -> Request:
    # A worker's working directory may be another.
    folder, scheduler = local_folder(teacher.source), teacher.scheduler
    return Request(
        run=uuid.uuid4().hex[:12],
        teacher=dataclasses.replace(
            teacher,
            source=teacher.source if folder is None else str(folder.absolute()),
            scheduler=None if scheduler is None else str(Path(os.path.expanduser(scheduler)).absolute()),
        ),
        sampler=plan.sampler,
        config=dataclasses.replace(
            plan.config, prompts=None if plan.prompts is None else str(plan.prompts.path.absolute())
        ),
        store=plan.store.absolute(),
        fingerprint=plan.recipe.fingerprint,
        layout_hash=plan.layout.layout_hash,
        command=command,
        report_seconds=max(REPORT_SECONDS, num_workers / REPORTS_PER_SECOND),
        # This process's threads, by its affinity and OMP_NUM_THREADS, divided among the workers.
        threads=None if workers is None else max(1, torch.get_num_threads() // workers),
    )


def _has_begun(plan: Plan) -> bool:
    """Whether the store has a block and its tolerance: then the teacher works, and all workers start at once."""
    records = plan.store / "blocks"
    return (plan.store / TOLERANCE_FILE).is_file() and records.is_dir() and any(records.glob("*.json"))


def _key(request: Request, block: int, attempt: str) -> str:
    return f"block-{request.run}-{block}-{attempt}"


def _result(future: Any, block: int) -> Any:
    from distributed import KilledWorker

    try:
        outcome = future.result()
    except KilledWorker as error:
        raise CacheError(
            f"workers died repeatedly while making block {block} (out of memory? a smaller --batch-size may "
            f"fit); what was committed is kept ({str(error).splitlines()[0][:120]})"
        ) from None
    except (CancelledError, asyncio.CancelledError):
        raise CacheError(
            "the dask scheduler went away; what was committed is kept: run the command again once it is back"
        ) from None
    except ImportError as error:
        raise CacheError(f"a worker lacks a package ({error}): install the same packages everywhere") from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _num_workers(client: Any, scheduler: str | None, reporter: Reporter) -> int:
    count = len(client.nthreads())
    if not count:
        reporter.say(f"no worker has joined the cluster at {scheduler} yet; the build begins when one does")
    return count


@contextmanager
def _progress_of(client: Any, topic: str, reporter: Reporter, work: int) -> Iterator[Callable[[int, Outcome], None]]:
    """One bar over all workers; yields the function to call when a block is finished."""
    done: dict[int, int] = {}
    lock = threading.Lock()  # events arrive in dask's own thread

    def reach(block: int, evaluations: int) -> None:
        with lock:
            before = done.get(block, 0)
            if before < work:  # a late report of a finished block changes nothing
                done[block] = evaluations
                reporter.advance(evaluations - before, f"block {block}")

    def on_event(event: tuple[float, Any]) -> None:
        block, evaluations = event[1]
        reach(int(block), min(int(evaluations), work - 1))

    client.subscribe_topic(topic, on_event)
    try:
        yield lambda block, outcome: reach(block, work)
    finally:
        client.unsubscribe_topic(topic)
