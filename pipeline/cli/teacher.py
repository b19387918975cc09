"""`advkd-teacher`: stage 0."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from advkd.pipeline.cli.common import all_or_nothing, config_option, example


@click.command(
    epilog=example("advkd-teacher --config configs/digits.yaml"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@config_option("digits")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help="teachers/NAME if not given.")
@all_or_nothing
def main(config: str | None, overrides: tuple[str, ...], out: Path | None) -> None:
    """Train the small teacher that an experiment describes, and the classifier that scores samples.

    Where the teacher comes from elsewhere there is nothing to train; its address, not its weights, is written down,
    so that a change of it is seen by DVC.
    """
    from advkd.cache.files.durable import write_json
    from advkd.pipeline.config import load_experiment
    from advkd.pipeline.dvc import check_name, check_teacher_not_again, runs_under_dvc
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.pretrain.config import SOURCE_NOTE
    from advkd.stages.teacher.config import PARTS

    experiment = load_experiment(config, overrides)
    folder = out or experiment.teacher_folder
    if runs_under_dvc():
        check_name(experiment)
        check_teacher_not_again(folder, experiment)
    if experiment.pretrain is None:
        known = dataclasses.asdict(experiment.teacher)
        # Parts that are not configured stay out, so that notes written before there were any keep their bytes.
        write_json(folder / SOURCE_NOTE, {key: known[key] for key in known if key not in PARTS or known[key]})
        click.echo(f"{experiment.name}: nothing to train, the teacher is {experiment.teacher.source}")
        return
    from advkd.stages.pretrain.run import pretrain

    with TerminalReporter() as reporter:
        report = pretrain(experiment.pretrain, folder, reporter)
    click.echo(
        f"{folder}: Fréchet distance to real images {report.frechet_to_real:.1f} "
        f"(real against real {report.frechet_real_to_real:.1f}), "
        f"classifier {report.classifier_accuracy:.1%} correct on held-out images"
    )
