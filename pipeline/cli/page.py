"""`advkd-page`: a student as a static page that samples it in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from advkd.pipeline.cli.common import all_or_nothing, example

if TYPE_CHECKING:
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.stages.student.hub import Student

DEFAULT_PORT = 8000


@click.command(
    epilog=example("advkd-page runs/digits --cache cache/digits.zarr --out site --serve"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("source", metavar="RUN")
@click.option(
    "--out", metavar="FOLDER", type=click.Path(path_type=Path), required=True, help="Where to write the page's files."
)
@click.option("--cache", "store", metavar="STORE", help="Show the teacher's images and states of the first seeds.")
@click.option("--title", metavar="TEXT", help="Of the page; the run's name if not given.")
@click.option("--float32", is_flag=True, help="Leave convolutions in float32; runs on the GPU where there is WebGPU.")
@click.option(
    "--runtime",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Copy this onnxruntime-web (an unpacked npm package) instead of loading a pinned one from a CDN.",
)
@click.option("--serve", is_flag=True, help="Serve the page on this machine until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), help=f"Of --serve; 0 for a free one (default: {DEFAULT_PORT}).")
@click.option("--push", metavar="REPO", help="Publish the page as a static Space of the Hub.")
@all_or_nothing
def main(
    source: str,
    out: Path,
    store: str | None,
    title: str | None,
    float32: bool,
    runtime: Path | None,
    serve: bool,
    port: int | None,
    push: str | None,
) -> None:
    """Write a static page that samples a student in the browser.

    RUN is a run's folder, a student's, or the id of a Hub repository. Any web server can hold the page. Seed i has the
    same noise in the browser as in Python and for the teacher.
    """
    from advkd.cache.errors import UsageError
    from advkd.stages.evaluate.results import PICTURES
    from advkd.stages.page.site import check_folder, write_site
    from advkd.stages.student.hub import Student
    from advkd.stages.student.sharing.export import check_packages

    if port is not None and not serve:
        raise UsageError("--port is of --serve: give both")
    check_folder(out)
    check_packages()
    student = Student.from_pretrained(source)
    cache = _cache_of(student, store) if store else None
    evaluation = Path(source) / "evaluation"
    pictures = [(evaluation / name, caption) for name, caption in PICTURES.items() if (evaluation / name).is_file()]
    site = write_site(
        student,
        title or Path(source).name,
        out,
        cache=cache,
        float32=float32,
        runtime=runtime,
        pictures=pictures if student.provenance.get("scores") else [],
    )
    click.echo(
        f"{out}: {site.model}, {site.model_bytes / 1e6:.2f} MB; deviation from PyTorch: largest "
        f"{site.deviation.largest:.2g}, root mean square {site.deviation.rms:.2g}"
    )
    if not (site.int8 or float32):
        click.echo("int8 convolutions would change its images visibly, so the page has float32 ones")
    if push:
        from advkd.stages.page.publish import publish

        click.echo(publish(out, push))
    if serve:
        _serve(out, DEFAULT_PORT if port is None else port)
    elif not push:
        click.echo(f"look: advkd-page {source} --out {out} --serve, or any web server")


def _cache_of(student: Student, store: str) -> TrajectoryCache:
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.stages.evaluate.deployed import check_cache_of

    cache = TrajectoryCache.open(store)
    check_cache_of(student, cache)
    return cache


def _serve(folder: Path, port: int) -> None:
    from advkd.stages.page.serve import address_of, make_server

    with make_server(folder, port) as server:
        click.echo(f"{address_of(server)} serves {folder}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo()
