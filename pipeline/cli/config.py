"""`advkd-config`: an experiment's file to start from."""

from __future__ import annotations

import click

from advkd.pipeline.cli.common import all_or_nothing, command_line, example, set_option

SMALL = (
    "sampler.steps=10",
    "cache.seeds=0:128",
    "cache.record=10",
    "cache.block_size=64",
    "cache.batch_size=64",
    "train.student.width=32",
    "train.student.depth=1",
    "train.steps=200",
    "train.batch_size=32",
    "train.log_every=10",
    "train.preview_every=100",
    "train.checkpoint_every=100",
    "train.stages.epochs=[1]",
    "train.stages.batch_sizes=[32]",
    "evaluate.num_sets=2",
    "evaluate.set_size=64",
    "evaluate.solver_steps=[5]",
)
"""What `--small` sets: minutes on a processor for 32×32 images, to see that everything works before it gets long."""
SMALL_PRETRAIN = ("pretrain.steps=100", "pretrain.report_samples=64", "pretrain.classifier.epochs=3")


@click.command(
    epilog=example("advkd-config cifar10 --name mine --small > configs/mine.yaml"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("source", metavar="NAME")
@click.option("--name", "new_name", metavar="NAME", help="The new experiment's name, which its files get.")
@click.option("--small", is_flag=True, help="Small numbers, for a first try of minutes; its scores mean nothing.")
@set_option
@all_or_nothing
def main(source: str, new_name: str | None, small: bool, overrides: tuple[str, ...]) -> None:
    """Print an experiment as YAML with every key, its value and its meaning, to start your own from.

    NAME is a shipped experiment, such as digits or cifar10, or a configuration file.
    """
    from advkd.pipeline.config import load_experiment
    from advkd.pipeline.reference import template

    experiment = load_experiment(source)
    changes: list[str] = []
    if new_name:
        # What stage 0 makes for this experiment moves with the name.
        old, new = f"teachers/{experiment.name}/", f"teachers/{new_name}/"
        paths = {"teacher.source": experiment.teacher.source, "evaluate.features": experiment.evaluate.features}
        changes = [f"name={new_name}"]
        changes += [f"{key}={new}{path.removeprefix(old)}" for key, path in paths.items() if path.startswith(old)]
    if small:
        changes += [*SMALL, *(SMALL_PRETRAIN if experiment.pretrain else ())]
    experiment = load_experiment(source, [*changes, *overrides])
    head = f"Written by `{command_line()}`. docs/configuration.md explains every key."
    click.echo(template(experiment, head), nl=False)
