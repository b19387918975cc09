"""`advkd-sample`: images of a student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from advkd.pipeline.cli.common import all_or_nothing, example

if TYPE_CHECKING:
    from advkd.stages.student.samples import Images

SUFFIXES = ("", ".png", ".npy", ".npz")
DEFAULT_NUM = 64
ROW = 20
"""So many labels or prompts that were asked for stand in one row of a grid, in their order."""


@click.command(
    epilog=example("advkd-sample --run runs/digits --num 64 --out samples.png"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--run", metavar="RUN", required=True, help="A run's folder, a student's, or the id of a Hub repository.")
@click.option("--num", type=click.IntRange(min=1), help=f"Number of images (default: {DEFAULT_NUM}).")
@click.option("--first-seed", type=click.IntRange(min=0, max=1 << 60), help="Seed of the first image (default: 0).")
@click.option("--seeds", metavar="A:B", help="Seeds A to B − 1; replaces --num and --first-seed.")
@click.option(
    "--labels",
    metavar="LIST",
    help="Which classes a class-conditional student draws, such as 3,3,7: one image each, or in turn with --num or "
    "--seeds; the teacher's own for each seed if not given.",
)
@click.option(
    "--prompt",
    "prompts",
    metavar="TEXT",
    multiple=True,
    help="What a text-to-image student draws; several make one image each, or are taken in turn with --num or --seeds.",
)
@click.option(
    "--teacher",
    metavar="TEACHER",
    help="Folder or Hub id of the teacher whose text encoder reads prompts; the one that the student names if not "
    "given. Needs the extra `text`.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=(1 << 63) - 1),
    help="Root seed of the noise; that of the cache if not given, so that seed i has the teacher's noise.",
)
@click.option(
    "--out",
    metavar="PATH",
    type=click.Path(path_type=Path),
    default=Path("samples.png"),
    show_default=True,
    help="A .png grid; a .npy array (float32 in [-1, 1], N×C×H×W); a .npz file as evaluation suites read it (arr_0, "
    "uint8, N×H×W×3); or a folder with one PNG per seed, which several commands may fill.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Images per pass.")
@click.option("--device", help="cuda, cuda:1, mps or cpu; the best of this machine if not given.")
@all_or_nothing
def main(
    run: str,
    num: int | None,
    first_seed: int | None,
    seeds: str | None,
    labels: str | None,
    prompts: tuple[str, ...],
    teacher: str | None,
    seed: int | None,
    out: Path,
    batch_size: int,
    device: str | None,
) -> None:
    """Sample a student in one pass.

    Seed i has the same noise as the teacher's seed i in the cache, so images can be compared with the teacher's.
    """
    from advkd.cache.errors import UsageError
    from advkd.cache.format.seeds import parse_seed_range

    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: expected a .png, a .npy, a .npz or a folder")
    if seeds and (num is not None or first_seed is not None):
        raise UsageError("--seeds replaces --num and --first-seed: give one or the other")
    asked = _labels(labels)
    chosen = range(first_seed or 0, (first_seed or 0) + (num or len(asked) or len(prompts) or DEFAULT_NUM))
    if seeds:
        chosen = parse_seed_range(seeds)
    if suffix == "" and out.is_dir() and any(out.iterdir()):
        from advkd.stages.student.samples import check_folder

        check_folder(out, chosen)
    import dataclasses

    import numpy as np
    import torch

    from advkd.pipeline.progress import TerminalReporter
    from advkd.pipeline.texts import encode_prompts
    from advkd.stages.device import best_device, forbid_tf32
    from advkd.stages.pictures import save_grid
    from advkd.stages.student.hub import Student
    from advkd.stages.student.samples import sample, write_folder, write_npy, write_npz

    student = Student.from_pretrained(run).to(best_device(device))
    shape = (len(chosen), *student.geometry.image_shape)
    told = None
    if prompts:
        told = encode_prompts(student, prompts, teacher, best_device(device))
    elif student.geometry.prompts is not None:
        raise UsageError("the student is told prompts: give --prompt")
    if labels is not None:
        told = torch.tensor(student.geometry.checked_labels(asked))
    if suffix != ".npy" and shape[1] not in (1, 3):
        raise UsageError(f"--out {out}: images of {shape[1]} channels are neither grey nor RGB; write a .npy")
    if seed is not None:
        student.geometry = dataclasses.replace(student.geometry, root_seed=seed)
    forbid_tf32()  # as in the evaluation
    with TerminalReporter() as reporter:

        def counted() -> Iterator[Images]:
            for images in sample(student, chosen, batch_size, told):
                yield images
                reporter.advance(len(images))

        batches = counted()
        reporter.start("sample", len(chosen), "images")
        if suffix == ".npy":
            write_npy(out, batches, shape)
        elif suffix == ".npz":
            write_npz(out, batches, shape)
        elif suffix == ".png":
            one_row = len(chosen) if len(asked) + len(prompts) == len(chosen) <= ROW else None
            save_grid(out, np.concatenate(list(batches)), one_row)
        else:
            write_folder(out, batches, chosen)
        reporter.finish()
    click.echo(f"{out}: {len(chosen)} images, seeds {chosen.start}:{chosen.stop}")


def _labels(text: str | None) -> list[int]:
    from advkd.cache.errors import UsageError

    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--labels {text}: expected class labels such as 3,3,7") from None
