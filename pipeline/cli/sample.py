"""`advkd-sample`: pictures from a student."""

from __future__ import annotations

import io
from pathlib import Path

import click

from advkd.pipeline.cli.common import all_or_nothing, example


@click.command(
    epilog=example("advkd-sample --run runs/digits --num 64 --out samples.png"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--run", metavar="RUN", required=True, help="A run's folder, a student's, or the id of a Hub repository.")
@click.option("--num", type=click.IntRange(min=1), default=64, show_default=True, help="How many images.")
@click.option("--first-seed", type=click.IntRange(min=0, max=1 << 60), default=0, show_default=True)
@click.option(
    "--out",
    metavar="PATH",
    type=click.Path(path_type=Path),
    default=Path("samples.png"),
    show_default=True,
    help="A .png grid, a .npy array (float32 in [-1, 1], N×C×H×W), or a folder of one PNG a seed.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True)
@all_or_nothing
def main(run: str, num: int, first_seed: int, out: Path, batch_size: int) -> None:
    """Sample a student in one pass.

    Seed i is the same noise as the teacher's seed i in the cache, so samples can be compared with its own.
    """
    from advkd.cache.errors import UsageError

    suffix = out.suffix.lower()
    if suffix not in ("", ".png", ".npy"):
        raise UsageError(f"--out {out}: expected a .png, a .npy or a folder")
    if suffix == "" and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out}: the folder is not empty; nothing was written")
    import numpy as np
    from PIL import Image

    from advkd.cache.files.durable import write_atomically
    from advkd.stages.device import best_device, forbid_tf32
    from advkd.stages.pictures import save_grid, save_image, to_pixels
    from advkd.stages.student.hub import Student
    from advkd.stages.student.student import generate

    student = Student.from_pretrained(run)
    seeds = np.arange(first_seed, first_seed + num)
    forbid_tf32()  # as the evaluation's images are
    images = generate(student.to(best_device()), student.noise(seeds), batch_size).numpy()
    if suffix == ".npy":
        array = io.BytesIO()
        np.save(array, images)
        write_atomically(out, [array.getbuffer()])
    elif suffix == ".png":
        save_grid(out, images)
    else:
        for seed, image in zip(seeds, images, strict=True):
            save_image(out / f"{seed:06d}.png", Image.fromarray(to_pixels(image[None])[0]))
    click.echo(f"{out}: {num} images, seeds {first_seed}:{first_seed + num}")
