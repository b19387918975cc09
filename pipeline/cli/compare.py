"""`advkd-compare`: evaluated runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from advkd.pipeline.cli.common import all_or_nothing, example


@click.command(
    epilog=example("advkd-compare runs/digits runs/digits.old-1 --out comparison"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", metavar="NAME", type=click.Path(path_type=Path), help="Also write NAME.md and NAME.png.")
@all_or_nothing
def main(runs: tuple[Path, ...], out: Path | None) -> None:
    """Compare evaluated runs of one cache, each with the one before.

    Differences are paired: all students were scored on the same fresh seeds. `advkd-cache diff` compares caches.
    """
    from advkd.stages.evaluate.compare import read_runs, table_lines, write_comparison

    evaluated = read_runs(runs)
    click.echo("\n".join(table_lines(evaluated)))
    if out is not None:
        click.echo("look: " + "  ".join(map(str, write_comparison(evaluated, out))))
