"""`advkd-export`: a student as ONNX, as a folder, on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from advkd.pipeline.cli.common import all_or_nothing, example

if TYPE_CHECKING:
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.stages.decoder import Decoder
    from advkd.stages.evaluate.config import EvaluateConfig
    from advkd.stages.evaluate.deployed import Form
    from advkd.stages.metrics.features import FeatureNetwork
    from advkd.stages.metrics.table import Row
    from advkd.stages.student.hub import Student
    from advkd.stages.student.sharing.export import Deviation

    Scoring = tuple[TrajectoryCache, FeatureNetwork, EvaluateConfig]

PYTORCH = "PyTorch"


@click.command(
    epilog=example("advkd-export runs/digits --onnx digits.onnx --int8"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("source", metavar="RUN")
@click.option("--onnx", metavar="FILE", type=click.Path(path_type=Path), help="Write it as ONNX.")
@click.option("--int8", is_flag=True, help="Write FILE.int8.onnx too, with int8 convolutions.")
@click.option(
    "--max-error", type=click.FloatRange(min=0.0), default=1e-3, show_default=True, help="Largest deviation of --onnx."
)
@click.option(
    "--decoder",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="A smaller decoder for a student of latents: an AutoencoderTiny that diffusers saved.",
)
@click.option("--cache", "store", metavar="STORE", help="Score the exported files against this cache.")
@click.option("--features", metavar="NAME|FOLDER", help="Network to score with, as for advkd-evaluate.")
@click.option("--time", "timed", is_flag=True, help="Time the exported files and PyTorch.")
@click.option(
    "--folder", metavar="FOLDER", type=click.Path(path_type=Path), help="Save the student here, with a model card."
)
@click.option("--push", metavar="REPO", help="Publish it in this Hub repository, with a model card.")
@all_or_nothing
def main(
    source: str,
    onnx: Path | None,
    int8: bool,
    max_error: float,
    decoder: Path | None,
    store: str | None,
    features: str | None,
    timed: bool,
    folder: Path | None,
    push: str | None,
) -> None:
    """Export a student: as ONNX, as a folder, to the Hub.

    RUN is a run's folder, a student's, or the id of a Hub repository. ONNX files are compared with PyTorch and not
    written if they deviate by more than --max-error. The deviation of int8 is printed; --cache and --features score it.
    """
    from advkd.cache.errors import UsageError

    if not (onnx or folder or push):
        raise UsageError("nothing to do: give --onnx FILE, --folder FOLDER or --push REPO")
    if not onnx and (int8 or decoder or store or features or timed):
        raise UsageError("--int8, --decoder, --cache, --features and --time need --onnx FILE")
    if onnx and onnx.suffix != ".onnx":
        raise UsageError(f"--onnx {onnx}: expected a name that ends in .onnx")
    if bool(store) != bool(features):
        raise UsageError("scoring needs both --cache STORE and --features NAME|FOLDER")
    if onnx:
        from advkd.stages.student.sharing.export import check_packages

        check_packages()
    from advkd.stages.student.hub import Student

    student = Student.from_pretrained(source)
    if student.geometry.prompts is not None and (int8 or store or timed):
        raise UsageError("--int8, --cache and --time know noise and labels, no prompts, which this student is told")
    tiny = None if decoder is None else _tiny(student, decoder)
    # Check what scoring needs before the export.
    scoring = _scoring(student, store, features) if store and features else None
    if folder:
        student.save_pretrained(folder)
        click.echo(f"{folder}: weights, configuration, model card")
    if onnx:
        forms = _export(student, onnx, int8, max_error, tiny)
        if scoring:
            _score(forms, student, scoring)
        if timed:
            _time(forms, student)
    if push:
        click.echo(student.push_to_hub(push))


def _tiny(student: Student, folder: Path) -> Decoder:
    from advkd.cache.errors import UsageError
    from advkd.stages.decoder import open_tiny_decoder

    if student.geometry.space is None:
        raise UsageError("--decoder is for students of latents; this one makes pixels: leave it out")
    return open_tiny_decoder(folder, student.geometry.space, student.geometry.item_shape)


def _export(student: Student, path: Path, int8: bool, max_error: float, decoder: Decoder | None) -> dict[str, Form]:
    from advkd.stages.student.sharing.export import export_int8, export_onnx
    from advkd.stages.student.sharing.onnx_student import OnnxStudent

    _say(path, "float32", export_onnx(student, path, max_error=max_error, decoder=decoder))
    forms: dict[str, Form] = {PYTORCH: student, "ONNX": OnnxStudent(path)}
    if int8:
        smaller = path.with_suffix(".int8.onnx")
        _say(smaller, "int8 convolutions", export_int8(student, path, smaller, decoder=decoder))
        forms["ONNX int8"] = OnnxStudent(smaller)
    return forms


def _say(path: Path, form: str, deviation: Deviation) -> None:
    from advkd.stages.student.sharing.export import NUM_CHECKED

    click.echo(
        f"{path}: {form}, {path.stat().st_size / 1e6:.2f} MB; deviation from PyTorch on {NUM_CHECKED} seeds: largest "
        f"{deviation.largest:.2g}, root mean square {deviation.rms:.2g}"
    )


def _scoring(student: Student, store: str, features: str) -> Scoring:
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.stages.evaluate.config import FULL_NUM_SETS, FULL_SET_SIZE, EvaluateConfig
    from advkd.stages.evaluate.deployed import check_cache_of
    from advkd.stages.evaluate.networks import load_features

    cache = TrajectoryCache.open(store)
    check_cache_of(student, cache)
    config = EvaluateConfig(features=features, num_sets=FULL_NUM_SETS, set_size=FULL_SET_SIZE)
    return cache, load_features(config, cache.recipe.image_shape), config


def _score(forms: dict[str, Form], student: Student, scoring: Scoring) -> None:
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.evaluate.deployed import score_forms

    cache, network, config = scoring
    with TerminalReporter() as reporter:
        rows = score_forms(forms, student, cache, network, config, reporter).rows
    click.echo(
        f"Fréchet distance to the teacher's cached x_0, mean ± sd over {config.num_sets} sets of {config.set_size} "
        f"fresh seeds (reference {len(cache.seeds())} seeds):"
    )
    for row in rows:
        click.echo(f"  {row.name:<10}{row.mean('frechet'):.2f} ± {row.deviation('frechet'):.2f}{_minus(row, rows[0])}")


def _minus(row: Row, first: Row) -> str:
    from advkd.stages.metrics.table import difference

    gap = difference(row, first, "frechet")
    if gap is None:
        return ""
    verdict = "not distinguishable" if not gap.excludes_zero else "ahead" if gap.mean < 0 else "behind"
    return f"   minus {first.name} {gap.text(3)}, 95 %: {verdict}"


def _time(forms: dict[str, Form], student: Student) -> None:
    from advkd.stages.evaluate.deployed import time_forms

    click.echo("median latency on this machine's CPU:")
    for batch, seconds in time_forms(forms, student).items():
        parts = [f"{name} {taken * 1e3:.2f} ms ({seconds[PYTORCH] / taken:.2f}×)" for name, taken in seconds.items()]
        click.echo(f"  batch {batch:<4}" + ", ".join(parts))
