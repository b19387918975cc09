"""Build or extend a cache in this process: block by block, beside others who build the same store.

A block is written in a thread of its own while the next one is sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from advkd.cache.errors import NotCachedError
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.seeds import seeds_of
from advkd.cache.write.writer import CacheWriter, OnMismatch
from advkd.stages.pictures import save_trajectories
from advkd.stages.reporter import Reporter, SilentReporter
from advkd.stages.teacher.build.background import Behind
from advkd.stages.teacher.build.block import States, check_images, commit_block, sample_block
from advkd.stages.teacher.build.plan import Plan, check_disk, missing_blocks, origin
from advkd.stages.teacher.build.tolerance import record_tolerance

POLL_SECONDS = 0.5
"""How often to look whether a block that somebody else makes is done."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build did."""

    store: Path
    num_blocks: int
    """Made by this build."""
    num_present: int
    """There already, or made meanwhile by somebody else."""
    set_aside: Path | None
    preview: Path | None


def build(
    plan: Plan,
    *,
    on_mismatch: OnMismatch = "stop",
    reporter: Reporter | None = None,
    command: str = "",
) -> Built:
    """Build the blocks of a plan that are not there yet.

    Any number of builds of the same store may run at once, in other processes and on other hosts with a shared folder:
    each takes blocks that nobody makes yet, and all end when every block is there.

    Raises:
        MismatchError: the store is of another recipe, and `on_mismatch` is "stop".
        NotCachedError: the store is a partial copy.
        TeacherError: its output is NaN or constant; nothing of that block was kept.
        LockedError: the store is being moved or repaired.
    """
    reporter = reporter or SilentReporter()
    work = plan.evaluations_per_block
    todo = missing_blocks(plan)
    check_disk(plan, len(todo))
    reporter.start("cache", len(plan.blocks) * work, "evaluations", done=(len(plan.blocks) - len(todo)) * work)
    ready: dict[int, tuple[datetime, States]] = {}
    if not CacheWriter(plan.store, plan.recipe, plan.layout).continues(on_mismatch):
        # Nothing is made or moved until the teacher has shown that it can fill a block.
        ready[todo[0]] = _sample_first(plan, todo[0], reporter)
    writer = CacheWriter.open(plan.store, plan.recipe, plan.layout, on_mismatch)
    if writer.set_aside:
        reporter.say(f"set aside the cache of another recipe: {writer.set_aside}")
    check_whole(writer, plan)
    made: list[int] = []
    preview: Path | None = None
    with writer.writing(), Behind() as behind:
        begin_store(writer, plan)

        def make(block: int, claim: ExitStack) -> None:
            nonlocal preview
            if block in ready:
                began, states = ready.pop(block)
            elif not made:
                began, states = _sample_first(plan, block, reporter)
            else:
                began, states = _sample(plan, block, reporter, behind.check)
            behind.wait()
            made.append(block)
            held = claim.pop_all()  # given up when the block is committed

            def commit() -> None:
                with held:
                    commit_block(writer, plan, block, states, began, command)

            behind.submit(commit)
            if len(made) == 1:  # somebody waits to see it
                behind.wait()
                preview = _show(plan, block, states, reporter)

        divide(writer, writer.missing(plan.seeds), make, lambda block: reporter.advance(work), behind.wait, reporter)
    reporter.finish()
    return Built(
        store=plan.store,
        num_blocks=len(made),
        num_present=len(plan.blocks) - len(made),
        set_aside=writer.set_aside,
        preview=preview,
    )


def begin_store(writer: CacheWriter, plan: Plan) -> None:
    """Let the arrays declare the plan's seeds, and record where the teacher came from."""
    writer.grow(plan.seeds)
    note = plan.store / "provenance" / "store.json"
    if not note.is_file():
        write_atomically(note, [seal(origin(plan))])
    record_tolerance(plan)


def check_whole(writer: CacheWriter, plan: Plan) -> None:
    """Refuse to extend a partial copy: what isn't here was made once, and would be missing from what is shared.

    Raises:
        NotCachedError: files of committed blocks are not here.
    """
    incomplete = writer.incomplete()
    if incomplete:
        seeds = seeds_of(incomplete[0], plan.layout.block_size)
        raise NotCachedError(
            f"{plan.store}: {len(incomplete)} blocks are in the ledger but not wholly here (the first: block "
            f"{incomplete[0]}, seeds {seeds.start}:{seeds.stop}); `dvc pull` fetches them, or `rebuild: true` in the "
            "experiment's configuration makes those that it asks for again"
        )


def divide(
    writer: CacheWriter,
    blocks: list[int],
    make: Callable[[int, ExitStack], None],
    present: Callable[[int], None],
    settle: Callable[[], None],
    reporter: Reporter,
) -> None:
    """Make blocks that nobody else makes, and wait for the others.

    Args:
        writer: the store.
        blocks: to be made, in this order.
        make: makes one block; it gets the block's claim too, and may keep it longer than the call.
        present: hears of a block that somebody else made.
        settle: waits until all that was made is committed.
        reporter: hears of waiting.
    """
    pending, waiting = list(blocks), False
    while pending:
        left = []
        for block in pending:
            with ExitStack() as claim:
                if not claim.enter_context(writer.claim(block)):
                    left.append(block)
                elif writer.is_committed(block):
                    present(block)
                else:
                    make(block, claim)
        settle()
        if len(left) == len(pending):
            if not waiting:
                reporter.say(f"waiting for {len(left)} blocks that another build is making")
                waiting = True
            time.sleep(POLL_SECONDS)
        pending = left


def _sample(
    plan: Plan, block: int, reporter: Reporter, check: Callable[[], None] = lambda: None
) -> tuple[datetime, States]:
    def advance(num_evaluations: int) -> None:
        check()
        reporter.advance(num_evaluations, f"block {block}")

    began = datetime.now(UTC)
    return began, sample_block(plan, block, advance)


def _sample_first(plan: Plan, block: int, reporter: Reporter) -> tuple[datetime, States]:
    """Sample a block and check its images before any other; when that began, and its states."""
    began, states = _sample(plan, block, reporter)
    check_images(states[plan.sampler.steps], plan)
    return began, states


def _show(plan: Plan, block: int, states: States, reporter: Reporter) -> Path:
    preview = save_trajectories(
        plan.store.with_suffix(".png"),
        [state.timestep for state in plan.layout.states],
        [states[state.step][:8] for state in plan.layout.states],
    )
    seeds, described = seeds_of(block, plan.layout.block_size), check_images(states[plan.sampler.steps], plan)
    reporter.say(f"first block, seeds {seeds.start}:{seeds.stop}: x_0 {described}; look: {preview}")
    return preview
