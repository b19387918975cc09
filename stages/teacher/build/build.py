"""Build or extend a cache in this process: block by block, beside others who build the same store.

A background thread writes a block while the next one is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import save

from advkd.cache.errors import NotCachedError
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.seeds import seeds_of
from advkd.cache.format.store_paths import TEACHER_PATH
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.divide import Attempt, Outcome, divide
from advkd.cache.write.writer import OnMismatch
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.teacher.build.background import Background
from advkd.stages.teacher.build.block import SampledBlock, check_images, commit_block, sample_block
from advkd.stages.teacher.build.plan import Plan, origin, say_warnings
from advkd.stages.teacher.build.resources import check_disk, check_memory
from advkd.stages.teacher.build.tolerance import record_tolerance
from advkd.stages.teacher.load.loader import saved_network
from advkd.stages.trajectories import draw_trajectories

PREVIEWED = 8
"""Seeds in the picture of the first block."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build did."""

    store: Path
    num_blocks: int
    """Made by this build."""
    num_present: int
    """There already, or made meanwhile by another build."""
    set_aside: Path | None
    preview: Path | None


def build(
    plan: Plan,
    *,
    on_mismatch: OnMismatch = "stop",
    reporter: Reporter | None = None,
    command: str = "",
    workers: int | None = None,
) -> Built:
    """Build the blocks of a plan that are not there yet.

    Any number of builds of the same store may run at once, in other processes and on other hosts with a shared folder:
    each takes blocks that no other is making, and all end when every block is there.

    Args:
        plan: the build.
        on_mismatch: where the store is of another recipe: stop, or rename it.
        reporter: shows the progress.
        command: for the provenance.
        workers: for the memory check, as for `check_memory`.

    Raises:
        MismatchError: the store is of another recipe, and `on_mismatch` is "stop".
        NotCachedError: the store is a partial copy.
        TeacherError: its output is NaN or constant; nothing of that block was kept.
        LockedError: the store is being moved or repaired.
    """
    reporter = reporter or SilentReporter()
    say_warnings(plan, reporter)
    writer, work = plan.writer, plan.evaluations_per_block
    continues = writer.continues(on_mismatch)
    todo = start(plan, reporter, continues=continues, workers=workers)
    # Nothing is created or moved until the teacher has shown that it can fill a block.
    first = None if continues else _sample_first(plan, todo[0], reporter)
    writer.begin(on_mismatch)
    if writer.set_aside:
        reporter.say(f"set aside the cache of another recipe: {writer.set_aside}")
    check_whole(plan)

    def finished(block: int, outcome: Outcome) -> None:
        if outcome == "present":
            reporter.advance(work)

    with writer.writing(), Background() as background:
        begin_store(plan)
        maker = _Maker(plan, first, background, reporter, command)
        num_made = make_missing(plan, maker.attempt, finished, reporter)
    reporter.finish()
    return Built(
        store=plan.store,
        num_blocks=num_made,
        num_present=len(plan.blocks) - num_made,
        set_aside=writer.set_aside,
        preview=maker.preview,
    )


def start(plan: Plan, reporter: Reporter, *, continues: bool, workers: int | None = None) -> list[int]:
    """Start the progress bar; the blocks to make.

    Args:
        plan: the build.
        reporter: shows the progress.
        continues: whether the store is there already; all blocks are to be made if it is new or to be renamed.
        workers: as for `check_memory`; with 0, memory isn't checked here.

    Raises:
        UsageError: they don't fit on the disk, or those that are made at the same time not into memory.
    """
    todo, work = plan.writer.missing(plan.seeds) if continues else list(plan.blocks), plan.evaluations_per_block
    check_disk(plan, len(todo))
    if todo and workers != 0:
        check_memory(plan, workers)
    reporter.start("cache", len(plan.blocks) * work, "evaluations", done=(len(plan.blocks) - len(todo)) * work)
    return todo


def begin_store(plan: Plan) -> None:
    """Let the arrays declare the plan's seeds, and record where the teacher came from."""
    plan.writer.grow(plan.seeds)
    if plan.recipe.space is not None:
        plan.writer.write_decoder(save(plan.teacher.decoder))
    if plan.config.keep_weights and not (plan.store / TEACHER_PATH).is_file():
        plan.writer.write_teacher(saved_network(plan.network))
    note = plan.store / "provenance" / "store.json"
    if not note.is_file():
        write_atomically(note, [seal(origin(plan))])
    record_tolerance(plan)


def check_whole(plan: Plan) -> None:
    """Refuse to extend a partial copy: its absent blocks exist elsewhere, and would be missing from what is shared.

    Raises:
        NotCachedError: files of committed blocks are not here.
    """
    incomplete = plan.writer.incomplete()
    if incomplete:
        seeds = seeds_of(incomplete[0], plan.layout.block_size)
        raise NotCachedError(
            f"{plan.store}: {len(incomplete)} blocks are in the ledger but not wholly here (the first: block "
            f"{incomplete[0]}, seeds {seeds.start}:{seeds.stop}); `dvc pull` fetches them, or `rebuild: true` in the "
            "experiment's configuration makes those that it asks for again"
        )


def make_missing(plan: Plan, attempt: Attempt, finished: Callable[[int, Outcome], None], reporter: Reporter) -> int:
    """Have the plan's missing blocks made, and wait for those that other builds are making.

    Args:
        plan: the build; its store is there and held for writing.
        attempt: tries each of some blocks once.
        finished: called once per block.
        reporter: gets one line if this build has to wait.

    Returns:
        How many blocks `attempt` made.
    """
    num_made, num_waits = 0, 0

    def waiting(blocks: list[int]) -> None:
        nonlocal num_waits
        if not num_waits:
            reporter.say(f"waiting for {len(blocks)} blocks that another build is making")
        num_waits += 1

    for block, outcome in divide(plan.writer.missing(plan.seeds), attempt, waiting):
        num_made += outcome == "made"
        finished(block, outcome)
    return num_made


class _Maker:
    """Makes blocks in this process, each written while the next one is sampled."""

    def __init__(
        self, plan: Plan, first: SampledBlock | None, background: Background, reporter: Reporter, command: str
    ) -> None:
        self.preview: Path | None = None
        self._plan = plan
        self._first = first
        """A block that was sampled and checked before the store was there."""
        self._background = background
        self._reporter = reporter
        self._command = command

    def attempt(self, blocks: list[int]) -> Iterator[tuple[int, Outcome]]:
        """Try each block once; all that were made are committed in the end."""
        for block in blocks:
            yield block, self._plan.writer.make(block, partial(self._make, block))
        self._background.wait()

    def _make(self, block: int, claim: ExitStack) -> None:
        if self._first is not None and self._first.number == block:
            sampled, self._first = self._first, None
        elif self.preview is None:
            sampled = _sample_first(self._plan, block, self._reporter)
        else:
            sampled = _sample(self._plan, block, self._reporter, self._background.check)
        self._background.wait()
        held = claim.pop_all()  # released when the block is committed

        def commit() -> None:
            with held:
                commit_block(self._plan, sampled, self._command)

        self._background.submit(commit)
        if self.preview is None:  # the user waits to see it
            self._background.wait()
            self.preview = _show(self._plan, sampled, self._reporter)


def _sample(plan: Plan, block: int, reporter: Reporter, check: Callable[[], None] = lambda: None) -> SampledBlock:
    def advance(num_evaluations: int) -> None:
        check()
        reporter.advance(num_evaluations, f"block {block}")

    return sample_block(plan, block, advance)


def _sample_first(plan: Plan, block: int, reporter: Reporter) -> SampledBlock:
    sampled = _sample(plan, block, reporter)
    check_images(plan, sampled)
    return sampled


def _show(plan: Plan, sampled: SampledBlock, reporter: Reporter) -> Path:
    cache = TrajectoryCache.open(plan.store)
    seeds, described = seeds_of(sampled.number, plan.layout.block_size), check_images(plan, sampled)
    preview = draw_trajectories(plan.store.with_suffix(".png"), cache, cache.varied(seeds, PREVIEWED))
    reporter.say(f"first block, seeds {seeds.start}:{seeds.stop}: x_0 {described}; look: {preview}")
    return preview
