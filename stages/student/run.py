"""A run's folder: its configuration, the seeds and the cache that it trains on, and its progress.

runs/NAME/
  run.json        identity (configuration, cache, seeds), global batch, segments, status, versions
  student/        config.json and model.safetensors: the averaged weights at the last step
  best/           the same at the step with the smallest error on held-out seeds
  checkpoint/     last.safetensors, from which training resumes
  log/            DVCLive's metrics.json and plots
  preview/        teacher beside student, on the same held-out seeds every time

A run keeps its seeds and its global batch: another number of processes may resume it, also after its cache has grown. A
finished run is prolonged by more `train.steps`, unless its kind of student has a schedule of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from advkd.cache.errors import NotCachedError, TrainingError, UsageError
from advkd.cache.files.durable import fsync_folder, write_json
from advkd.cache.format.differences import differences
from advkd.cache.format.hashing import Seeds
from advkd.cache.format.recipe import digest
from advkd.cache.format.seeds import blocks_of, parse_seed_range
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.provenance import versions
from advkd.stages.student.config import KINDS, TrainConfig
from advkd.stages.student.student import folder_of, weights_sha256

FORMAT = 1
LOCK_FILE = "run.lock"
OnMismatch = Literal["stop", "set-aside"]
Status = Literal["new", "resume", "complete"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a run that one number of processes trained, under one identity."""

    step: int
    """The first step, counted from 0."""
    processes: int
    steps: int
    """Number of steps of the whole run, as then configured."""
    identity: str
    """Digest of the run's identity, which its checkpoints carry."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the folder of a claimed run holds."""

    status: Status
    segments: tuple[Segment, ...]
    """The run so far, in order; empty for a new run."""


@dataclass(frozen=True, kw_only=True)
class SeedSplit:
    """The seeds of a run, int64, and the blocks that hold them."""

    blocks: tuple[int, ...]
    training: Seeds
    held_out: Seeds


def split_seeds(cache: TrajectoryCache, wanted: str | None) -> SeedSplit:
    """Split seeds into those to train on and those held out; all of them are in committed blocks.

    Raises:
        NotCachedError: the cache is empty, or blocks of the range are missing.
    """
    cache.check_begun()
    size = cache.layout.block_size
    asked = parse_seed_range(wanted) if wanted else range(cache.num_seeds)
    if asked.stop > cache.num_seeds:
        raise NotCachedError(
            f"{cache.address} declares seeds 0:{cache.num_seeds}, train.seeds asks for {asked.start}:{asked.stop}; "
            f"extend it with the `advkd-cache build` command that made it and `--seeds {asked.start}:{asked.stop}`"
        )
    blocks = blocks_of(asked, size)
    missing = sorted(set(blocks) - set(cache.blocks))
    if missing:
        raise NotCachedError(
            f"{cache.address} is partial: {len(blocks) - len(missing)} of the {len(blocks)} blocks of seeds "
            f"{asked.start}:{asked.stop} are there, block {missing[0]} (seeds {missing[0] * size}:"
            f"{(missing[0] + 1) * size}) is not; finish it with the `advkd-cache build` command that "
            "started it, or choose train.seeds"
        )
    seeds = np.arange(asked.start, asked.stop, dtype=np.int64)
    held_out = cache.recipe.held_out(seeds)
    if held_out.all():
        raise UsageError(f"seeds {asked.start}:{asked.stop} are all held out: choose more with train.seeds")
    return SeedSplit(blocks=tuple(blocks), training=seeds[~held_out], held_out=seeds[held_out])


def identity(config: TrainConfig, cache: TrajectoryCache, split: SeedSplit, num_processes: int = 1) -> dict[str, Any]:
    """What identifies a run: its configuration, the number of processes it started with, the content of its blocks,
    and the weights that it started from, if they are an earlier student's.

    Trackers are left out: they change nothing about the result, and may be added to a run that has begun.
    """
    settings = asdict(config)
    del settings["trackers"]
    start = {}
    if config.start is None:
        del settings["start"]
    else:
        start = {"start": weights_sha256(folder_of(Path(config.start)))}
    return {
        "config": settings,
        "processes": num_processes,
        "cache": {
            "fingerprint": cache.recipe.fingerprint,
            "layout_hash": cache.layout.layout_hash,
            "blocks": [min(split.blocks), max(split.blocks) + 1],
            "digest": cache.digest_of(split.blocks),
        },
        **start,
    }


def seeds_of_run(identity: dict[str, Any], block_size: int) -> range:
    """The seeds that a run started with, including those held out.

    Raises:
        UsageError: the record of them is malformed.
    """
    first, last = identity["cache"]["blocks"]
    asked = identity["config"].get("seeds")
    return parse_seed_range(str(asked)) if asked else range(first * block_size, last * block_size)


class Run:
    """The folder of one run.

    Args:
        path: of the folder; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.student = path / "student"
        self.best = path / "best"
        self.checkpoint = path / "checkpoint" / "last.safetensors"
        self.log = path / "log"
        self.preview = path / "preview"
        self._file = path / "run.json"

    def exists(self) -> bool:
        """Whether the folder holds any file; a failed `dvc pull` leaves folders without files."""
        return self.path.is_file() or any(path.is_file() and path.name != LOCK_FILE for path in self.path.rglob("*"))

    def read(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            TrainingError: it is missing or malformed.
        """
        try:
            value: dict[str, Any] = json.loads(self._file.read_bytes())
            cache, first_last = value["identity"]["cache"], value["identity"]["cache"]["blocks"]
            fitting = value["format"] == FORMAT and isinstance(value["identity"]["config"], dict)
            fitting = fitting and value["status"] in ("training", "complete") and isinstance(cache["fingerprint"], str)
            if not fitting or [type(block) for block in first_last] != [int, int]:
                raise ValueError("not written by advkd")
            _segments_of(value)
        except (FileNotFoundError, NotADirectoryError):
            raise TrainingError(
                f"{self.path} is no run (no run.json): start one with `advkd-train --cache STORE --run {self.path}`, "
                "or fetch a shared one with `dvc pull train`"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise TrainingError(f"{self.path} is no run (run.json: {error})") from None
        return value

    def write(
        self, wanted: dict[str, Any], status: Literal["training", "complete"], segments: Sequence[Segment] = ()
    ) -> None:
        """Write run.json; the global batch is null where each phase has its own."""
        config = wanted["config"]
        counts_steps = KINDS[config["student"]["kind"]].counts_steps
        value = {
            "format": FORMAT,
            "identity": wanted,
            "global_batch": config["batch_size"] * wanted["processes"] if counts_steps else None,
            "segments": [asdict(segment) for segment in segments],
            "status": status,
            "versions": versions("accelerate"),
        }
        write_json(self._file, value)

    def started_with(self, cache: TrajectoryCache, on_mismatch: OnMismatch) -> tuple[str, int] | None:
        """Seeds and number of processes of the run in the folder, if it is of this cache; it keeps both.

        With "set-aside", as `dvc repro` has it, results must not depend on what the folder holds: nothing is kept.
        """
        if on_mismatch != "stop" or not self._file.is_file():
            return None
        found = self.read()["identity"]
        if found["cache"]["fingerprint"] != cache.recipe.fingerprint:
            return None
        seeds = seeds_of_run(found, cache.layout.block_size)
        return f"{seeds.start}:{seeds.stop}", int(found["processes"])

    @contextmanager
    def claimed(self, wanted: dict[str, Any], *, resume: bool, on_mismatch: OnMismatch) -> Iterator[Claim]:
        """Lock the folder for this run; the lock ends with the process.

        Raises:
            UsageError: the folder holds another run or other files, or there is nothing to resume.
            TrainingError: run.json is malformed, or another process trains this run.
        """
        if not self.exists():
            if resume:
                raise UsageError(f"--resume: there is no run in {self.path}; leave out --resume to start one")
        else:
            self._make_room(wanted, on_mismatch)
        self.path.mkdir(parents=True, exist_ok=True)
        with self._held():
            if not self._file.is_file():
                self.write(wanted, "training")
                yield Claim(status="new", segments=())
                return
            found = self.read()
            status: Status = "resume" if self.checkpoint.is_file() else "new"
            if found["status"] == "complete":
                if found["identity"] == wanted:
                    status = "complete"
                elif status == "new":
                    raise TrainingError(
                        f"{self.path} is complete and can't be prolonged: {self.checkpoint} is missing (`dvc pull` "
                        "doesn't bring it); train in another --run"
                    )
            yield Claim(status=status, segments=() if status == "new" else _segments_of(found))

    def _make_room(self, wanted: dict[str, Any], on_mismatch: OnMismatch) -> None:
        if not self._file.is_file():
            raise UsageError(f"{self.path} holds files but no run.json: choose another --run, or move them away")
        found = self.read()
        lines = differences(found["identity"], wanted)
        if not lines or (on_mismatch == "stop" and _prolongs(found, wanted)):
            return
        if on_mismatch == "set-aside":
            with self._held():
                self._set_aside()
            return
        before = _more_steps(found, wanted)
        if before is not None:
            raise UsageError(
                f"{self.path} is a run of {before} steps that isn't finished: finish it first (the same command with "
                f"train.steps={before}), then more steps prolong it"
            )
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UsageError(
            f"{self.path} holds another run ({'; '.join(lines[:3])}{more}): choose another --run, "
            "or --on-mismatch set-aside renames it"
        )

    @contextmanager
    def _held(self) -> Iterator[None]:
        lock = FileLock(self.path / LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise TrainingError(f"another process is training {self.path}: wait until it ends, or stop it") from None
        try:
            yield
        finally:
            lock.release()

    def _set_aside(self) -> None:
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(target)
        fsync_folder(target.parent)


def _prolongs(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a run is the finished one with more steps."""
    return found["status"] == "complete" and _more_steps(found, wanted) is not None


def _more_steps(found: dict[str, Any], wanted: dict[str, Any]) -> int | None:
    """The number of steps of the run that was found, if the one wanted differs by having more, and only so."""
    before, now = found["identity"]["config"].get("steps"), wanted["config"]["steps"]
    same = {**found["identity"], "config": {**found["identity"]["config"], "steps": now}} == wanted
    counted = KINDS[wanted["config"]["student"]["kind"]].counts_steps
    return before if same and counted and isinstance(before, int) and before < now else None


def _segments_of(value: dict[str, Any]) -> tuple[Segment, ...]:
    """The segments in run.json, or the one of a run from before they were recorded.

    Raises:
        KeyError, TypeError: they are malformed.
    """
    found = value["identity"]
    if segments := value.get("segments"):
        return tuple(Segment(**segment) for segment in segments)
    steps = found["config"].get("steps", 0)
    return (Segment(step=0, processes=found["processes"], steps=steps, identity=digest(found)),)
