"""`advkd-report`: evaluated runs as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from advkd.pipeline.cli.common import all_or_nothing, example


@click.command(
    epilog=example("advkd-report runs/digits runs/small --out report.html"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The file to write.",
)
@all_or_nothing
def main(runs: tuple[Path, ...], out: Path) -> None:
    """Write one HTML file about evaluated runs: scores, pictures, curves, costs, configuration, provenance.

    Several runs of one cache are compared, each with the one before; the differences are paired, for all students were
    scored on the same fresh seeds. The comparison is printed, too. `advkd-cache diff` compares caches.
    """
    from advkd.stages.report.report import write_report
    from advkd.stages.report.runs import read_runs, table_lines

    evaluated = read_runs(runs)
    if len(evaluated) > 1:
        click.echo("\n".join(table_lines(evaluated)))
    click.echo(f"look: {write_report(evaluated, out)}")
