"""Connecting to a dask cluster: one that is running, or local processes started for this build."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from advkd.cache.errors import UsageError

CONNECT_SECONDS = 5.0
"""How long to try to reach a scheduler."""
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": 1 << 32, "MALLOC_MMAP_THRESHOLD_": 1 << 30, "MALLOC_ARENA_MAX": 1}
"""Workers' malloc settings. dask's own make them return memory at once, so that a network's buffers are mapped anew for
every layer, which took over half of the time on CPUs; so does a thread's own arena, which is limited to 64 MiB."""
_SELDOM = {"distributed.admin.tick.interval": "500ms", "distributed.worker.profile.enabled": False}
"""By default dask monitors each process 50 and 100 times per second, and the network's thread waits for that."""
_SILENT = logging.CRITICAL + 1


@contextmanager
def connect(workers: int | None, scheduler: str | None) -> Iterator[Any]:
    """A dask client of a running scheduler, or of so many local processes.

    Raises:
        UsageError: no scheduler answers there.
    """
    from distributed import Client

    # Errors are reported in one line of ours; dask would log lost connections as well.
    logging.getLogger("distributed").setLevel(_SILENT)
    if scheduler is not None:
        _check_answers(scheduler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about versions; those that matter are in the fingerprint
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        with client:
            yield client
        return
    with _local_cluster(workers) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def _check_answers(scheduler: str) -> None:
    """Connect to a scheduler as dask does, with a time limit: dask itself waits for ever if the peer stays silent.

    Raises:
        UsageError: no scheduler answers there.
    """
    from distributed import Security
    from distributed.comm import connect as open_comm

    async def probe() -> None:
        options = Security().get_connection_args("client")
        comm = await asyncio.wait_for(open_comm(scheduler, timeout=CONNECT_SECONDS, **options), CONNECT_SECONDS)
        await comm.close()

    def run() -> None:  # in a thread of its own: a notebook's main thread already runs an event loop
        asyncio.run(probe())

    try:
        with ThreadPoolExecutor(max_workers=1) as executor:
            executor.submit(run).result()
    except Exception as error:  # another service may be there, and answer anything
        what = str(error).strip() or f"no answer within {CONNECT_SECONDS:g} s"
        raise UsageError(f"no dask scheduler answers at {scheduler} ({what.splitlines()[0][:120]})") from None


@contextmanager
def _local_cluster(workers: int | None) -> Iterator[Any]:
    """Local processes. If the build ends early they are killed, which costs only the blocks in flight."""
    import dask
    from distributed import LocalCluster

    key = "distributed.nanny.pre-spawn-environ"
    environment = {**dask.config.get(key), **_KEEP_MEMORY}
    with dask.config.set({key: environment, **_SELDOM}), _signals_blocked():
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # else it warns where port 8787 is in use
            worker_dashboard_address=None,
            memory_limit=0,
            silence_logs=_SILENT,
        )
    with cluster:
        try:
            yield cluster
        except BaseException:
            for nanny in cluster.workers.values():
                nanny.close_gracefully()  # so that it doesn't start another worker
                if nanny.pid is not None:
                    os.kill(nanny.pid, signal.SIGKILL)
            raise


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM; threads and processes started meanwhile keep them blocked, and are stopped by us."""
    resource_tracker.ensure_running()  # started later, it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
