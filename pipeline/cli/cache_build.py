"""`advkd-cache build`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from advkd.pipeline.cli.common import command_line, config_option, example, guarded

if TYPE_CHECKING:
    from advkd.pipeline.config import Experiment
    from advkd.stages.teacher.build.plan import Plan


@click.command(epilog=example("advkd-cache build --config configs/cifar10.yaml --steps 1000"))
@config_option("digits")
@click.option("--teacher", metavar="PATH_OR_HUB_ID", help="A diffusers pipeline: a folder or a Hub id.")
@click.option("--steps", type=int, help="Solver steps from x_T to x_0.")
@click.option(
    "--sampler",
    metavar="NAME",
    help="ddim, dpmsolver++, unipc, euler, heun, flow-euler, flow-heun; ddpm or dpmsolver++sde.",
)
@click.option("--eta", type=float, help="Of ddim: 0 is deterministic, 1 as noisy as ddpm.")
@click.option("--spacing", metavar="NAME", help="How timesteps are chosen: trailing, leading, linspace or teacher.")
@click.option("--labels", metavar="all|LIST", help="Which classes of a class-conditional teacher, such as 0,3.")
@click.option("--guidance", type=float, metavar="W", help="Scale of classifier-free guidance; 1 is none.")
@click.option("--prompts", metavar="FILE", help="Of a text-to-image pipeline: a prompt per line, or .jsonl.")
@click.option("--seeds-per-prompt", type=int, metavar="K", help="How many seeds each prompt has.")
@click.option("--height", type=int, help="Of a text-to-image pipeline's images, in pixels.")
@click.option("--width", type=int, help="The same.")
@click.option(
    "--record",
    metavar="K|LIST",
    help="K evenly spaced states, or steps such as 10,20,50. x_T and x_0 always are.",
)
@click.option("--seeds", metavar="A:B", help="Which seeds, B excluded; widened to whole blocks.")
@click.option("--block-size", type=int, metavar="S", help="Seeds in a block (one file per state).")
@click.option("--batch-size", type=int, help="Seeds in one evaluation of the teacher.")
@click.option("--dtype", metavar="NAME", help="What states are stored as: float16 or float32.")
@click.option("--precision", metavar="NAME", help="What the teacher computes in: float32, bfloat16 or float16.")
@click.option("--device", help="cuda, cuda:1, mps or cpu; the best that is there if not given.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Build with N local processes, one per GPU.")
@click.option("--scheduler", metavar="ADDRESS", help="Build on a running dask cluster, such as tcp://host:8786.")
@click.option(
    "--out", metavar="STORE", type=click.Path(path_type=Path), help="The store; cache/NAME.zarr if not given."
)
@click.option(
    "--on-mismatch",
    type=click.Choice(["stop", "set-aside"]),
    default="stop",
    show_default=True,
    help="Where the store is of another recipe: stop, or rename it out of the way.",
)
@click.option(
    "--accept-range",
    is_flag=True,
    default=None,
    help="Go on where x_0 does not lie in the range of images, [−1, 1].",
)
@click.option(
    "--keep-weights",
    is_flag=True,
    default=None,
    help="Put the teacher's network into the store, for students that start from it.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, how long and how large; write nothing.")
@guarded
def build(
    out: Path | None,
    on_mismatch: Any,
    dry_run: bool,
    config: str | None,
    overrides: tuple[str, ...],
    workers: int | None,
    scheduler: str | None,
    **flags: Any,
) -> None:
    """Run the teacher over many seeds and keep its denoising states.

    Resumes and extends: blocks that are there are not made again. Several builds of one store, here or on other
    machines with the same folder, divide the blocks among them. Flags win over the configuration; one that changes
    the recipe gives the store a name of its own.
    """
    from advkd.cache.errors import UsageError
    from advkd.pipeline.config import default_settings, load_experiment
    from advkd.pipeline.dvc import check_cache_not_again, runs_under_dvc
    from advkd.pipeline.experiment import with_flags

    if workers is not None and scheduler is not None:
        raise UsageError("--workers starts processes here, --scheduler uses a cluster's: give one of them")
    # The default experiment's settings are of its own teacher, no pipeline's.
    told = config is None and flags["prompts"] is not None
    experiment = default_settings(overrides) if told else load_experiment(config, overrides)
    changed, suffix = with_flags(experiment, flags)
    store = out or changed.store.with_name(f"{changed.name}{suffix}.zarr")
    from advkd.stages.teacher.build.plan import check_request

    # The device is for whoever computes: on a cluster, its workers.
    here = changed.cache if scheduler is None else dataclasses.replace(changed.cache, device=None)
    check_request(changed.sampler, here, store)
    if dry_run:
        _dry_run(changed, store, workers, scheduler)
    else:
        recorded = runs_under_dvc() and check_cache_not_again(store, experiment)
        make_teacher(changed)
        _build(changed, store, "stop" if recorded else on_mismatch, recorded, workers, scheduler)


def make_teacher(experiment: Experiment) -> None:
    """Train the default teacher first if it isn't there."""
    from advkd.pipeline.dvc import check_teacher_not_again
    from advkd.pipeline.experiment import needs_pretraining
    from advkd.pipeline.progress import TerminalReporter

    if not needs_pretraining(experiment) or experiment.pretrain is None:
        return
    check_teacher_not_again(experiment.teacher_folder, experiment)
    from advkd.stages.pretrain.run import pretrain

    click.echo(f"the teacher {experiment.teacher.source} isn't there yet: training it first", err=True)
    with TerminalReporter() as reporter:
        pretrain(experiment.pretrain, experiment.teacher_folder, reporter)


def _plan(experiment: Experiment, store: Path) -> Plan:
    from advkd.stages.teacher.build.plan import make_plan

    return make_plan(experiment.teacher, experiment.sampler, experiment.cache, store)


def _dry_run(experiment: Experiment, store: Path, workers: int | None, scheduler: str | None) -> None:
    from advkd.pipeline.experiment import needs_pretraining

    if not needs_pretraining(experiment) or experiment.pretrain is None:
        _estimate(experiment, store, experiment.teacher.source, workers, scheduler)
        return
    from tempfile import TemporaryDirectory

    from advkd.stages.pretrain.teacher import save_untrained

    with TemporaryDirectory() as folder:  # a network of the same size costs the same
        save_untrained(Path(folder), experiment.pretrain)
        teacher = dataclasses.replace(experiment.teacher, source=folder)
        note = f"{experiment.teacher.source} (not there yet: a build would train it first)"
        _estimate(dataclasses.replace(experiment, teacher=teacher), store, note, workers, scheduler)


def _estimate(experiment: Experiment, store: Path, teacher: str, workers: int | None, scheduler: str | None) -> None:
    from advkd.pipeline.progress import duration
    from advkd.stages.teacher.build.resources import BLOCKS_AT_ONCE, check_memory, measure_evaluation, memory_bytes

    plan = _plan(experiment, store)
    todo = plan.writer.missing(plan.seeds)
    num_seeds = len(todo) * plan.layout.block_size
    batch = min(plan.config.batch_size, plan.layout.block_size)
    batches = len(todo) * -(-plan.layout.block_size // batch)
    if todo and scheduler is None:  # a cluster's workers have memory of their own
        check_memory(plan, workers)
    memory, at_once = memory_bytes(plan, workers), BLOCKS_AT_ONCE if workers is None else workers
    seconds = measure_evaluation(plan)
    total = seconds * plan.evaluations_per_seed * batches
    recorded = ", ".join(str(state.step) for state in plan.layout.states)
    shared = f"; {workers} workers share it, one GPU each" if workers is not None and workers > 1 else ""
    where = " in each worker" if scheduler is not None else ""
    click.echo(
        f"store         {store}{'' if store.exists() else ' (new)'}\n"
        f"teacher       {teacher}, {'×'.join(map(str, plan.recipe.item_shape))}\n"
        f"seeds         {plan.seeds.start}:{plan.seeds.stop}, {num_seeds:,} of them still to build\n"
        f"sampler       {plan.sampler.name}, {plan.sampler.steps} steps; states after {recorded} steps recorded\n"
        f"timesteps     {plan.sampler.spacing}: {_ends_of(plan.recipe.sampler['timesteps'])}\n"
        f"{_condition(plan)}"
        f"evaluations   {num_seeds * plan.evaluations_per_seed:,} of one image\n"
        f"disk          {len(todo) * plan.block_bytes / 1e9:.3f} GB in {len(todo)} blocks\n"
        f"memory        about {memory / 1e9:.3f} GB for {at_once} blocks at a time{where}; the network comes on top\n"
        f"time          about {duration(total)} ({seconds * 1e3:.1f} ms for a batch of {batch} here{shared})\n"
        "nothing was written (dry run); `advkd-cache advise` says how many steps this teacher needs"
    )


def _condition(plan: Plan) -> str:
    """A line on labels and guidance; none for an unconditional teacher."""
    from advkd.cache.files.strict_json import shortened

    condition, prompts = plan.recipe.condition, plan.recipe.prompts
    if prompts is not None:
        of_each = ", ".join(f"{one.name} {'×'.join(map(str, one.shape))}" for one in prompts.embeddings)
        return (
            f"condition     {len(plan.seeds) // prompts.seeds_per_prompt:,} prompts with {prompts.seeds_per_prompt} "
            f"seeds each; guidance {prompts.guidance:g}, {prompts.evaluations} evaluations per prediction\n"
            f"encoded       {of_each}\n"
        )
    if condition is None:
        return ""
    guidance = "no guidance"
    if condition.null_class is not None:
        guidance = f"guidance {condition.guidance:g}, which doubles the evaluations"
    return f"condition     labels {shortened(list(condition.labels))}; {guidance}\n"


def _ends_of(timesteps: list[float]) -> str:
    shown = [f"{timestep:g}" for timestep in timesteps]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "…", shown[-1]])


def _look_at_store(plan: Plan, *, recorded: bool, rebuild: bool) -> None:
    """Look at a store that is there with what dvc.lock and `rebuild` say of it.

    Raises:
        MismatchError: dvc.lock records this very request, but another store lies there.
    """
    from advkd.cache.errors import MismatchError
    from advkd.pipeline.dvc import YES

    problem = plan.writer.mismatch()
    if problem and recorded:
        raise MismatchError(
            f"{plan.store} was built otherwise ({problem}) than what dvc.lock records: move it away, and `dvc checkout "
            f"{plan.store}` brings back the recorded one, or {YES}"
        )
    if rebuild and plan.writer.continues("set-aside"):
        plan.writer.give_up_incomplete(plan.seeds)


def _build(
    experiment: Experiment,
    store: Path,
    on_mismatch: Any,
    recorded: bool,
    workers: int | None,
    scheduler: str | None,
) -> None:
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.teacher.build.build import build as run_build
    from advkd.stages.teacher.build.workers import build_with_workers

    if workers is None and scheduler is None:
        plan = _plan(experiment, store)
        _look_at_store(plan, recorded=recorded, rebuild=experiment.rebuild)
        with TerminalReporter() as reporter:
            built = run_build(plan, on_mismatch=on_mismatch, reporter=reporter, command=command_line())
    else:
        # This process only plans; GPUs are for the workers.
        here = dataclasses.replace(experiment, cache=dataclasses.replace(experiment.cache, device="cpu"))
        plan = dataclasses.replace(_plan(here, store), config=experiment.cache)
        _look_at_store(plan, recorded=recorded, rebuild=experiment.rebuild)
        with TerminalReporter() as reporter:
            built = build_with_workers(
                plan,
                experiment.teacher,
                workers=workers,
                scheduler=scheduler,
                on_mismatch=on_mismatch,
                reporter=reporter,
                command=command_line(),
            )
    done = f"built {built.num_blocks} blocks, {built.num_present} were there"
    click.echo(f"{store}: seeds {plan.seeds.start}:{plan.seeds.stop}; {done}")
