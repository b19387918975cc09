"""Pictures of images and trajectories, as PNG or GIF; each file is written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN = 2
FRAME_MILLISECONDS = 350
LABEL_HEIGHT = 14
LABEL_GAP = 6
MAX_LABEL = 40
"""Characters of a label, which may be a prompt; the rest is cut."""
MIN_SIDE = 64
"""Smaller images are enlarged by a whole factor to at least this many pixels."""

Images = npt.NDArray[Any]


def to_pixels(images: Images) -> npt.NDArray[np.uint8]:
    """Images in [−1, 1], shape (N, C, H, W) with C = 1 or 3, to uint8 RGB, shape (N, H, W, 3); clipped."""
    values = np.clip(np.asarray(images, dtype=np.float32) * 127.5 + 127.5, 0.0, 255.0).round().astype(np.uint8)
    channels = values if values.shape[1] == 3 else np.repeat(values[:, :1], 3, axis=1)
    return np.ascontiguousarray(channels.transpose(0, 2, 3, 1))


def grid(images: Images, columns: int) -> Image.Image:
    """A contact sheet of images in [−1, 1], shape (N, C, H, W)."""
    pixels = to_pixels(images)
    factor = max(1, -(-MIN_SIDE // pixels.shape[1]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = pixels.shape[1] + MARGIN, pixels.shape[2] + MARGIN
    rows = -(-len(pixels) // columns)
    sheet = np.full((rows * height + MARGIN, columns * width + MARGIN, 3), 255, dtype=np.uint8)
    for index, tile in enumerate(pixels):
        y, x = MARGIN + index // columns * height, MARGIN + index % columns * width
        sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return Image.fromarray(sheet)


def save_image(path: Path, image: Image.Image) -> Path:
    """Write a PNG."""
    return _save(path, lambda partial: image.save(partial, format="PNG"))


def save_figure(path: Path, figure: Figure) -> Path:
    """Write a plot as a PNG."""
    return _save(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def _save(path: Path, write: Callable[[Path], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    partial.replace(path)
    return path


def save_grid(path: Path, images: Images, columns: int | None = None) -> Path:
    """Write a contact sheet, about square if `columns` isn't given."""
    return save_image(path, grid(images, columns or max(1, round(len(images) ** 0.5))))


def save_trajectories(
    path: Path, names: Sequence[str], states: Sequence[Images], labels: Sequence[object] | None = None
) -> Path:
    """One row per seed and one column per recorded state, with its name above each column.

    Args:
        path: PNG to write.
        names: of each state, such as its timestep.
        states: values of each state, about [−1, 1], shape (N, C, H, W).
        labels: what to write before each row, such as its class.
    """
    tiles = np.stack([np.asarray(state, dtype=np.float32) for state in states], axis=1)
    sheet = grid(tiles.reshape(-1, *tiles.shape[2:]), len(states))
    headed = Image.new("RGB", (sheet.width, sheet.height + LABEL_HEIGHT), "white")
    headed.paste(sheet, (0, LABEL_HEIGHT))
    draw = ImageDraw.Draw(headed)
    width = (sheet.width - MARGIN) / len(states)
    for index, name in enumerate(names):
        draw.text((MARGIN + (index + 0.5) * width, 1), name, fill="black", anchor="ma")
    return save_image(path, headed if labels is None else _with_labels(headed, list(map(str, labels)), LABEL_HEIGHT))


def save_denoising(path: Path, names: Sequence[str], states: Sequence[Images]) -> Path:
    """An animated GIF of the denoising: one frame per state with its name, the last one shown longer.

    Args:
        path: GIF to write.
        names: of each state, such as its timestep.
        states: values of each state, about [−1, 1], shape (N, C, H, W).
    """
    frames = []
    for name, images in zip(names, states, strict=True):
        sheet = grid(images, max(1, round(len(images) ** 0.5)))
        frame = Image.new("RGB", (sheet.width, sheet.height + LABEL_HEIGHT), "white")
        frame.paste(sheet, (0, LABEL_HEIGHT))
        ImageDraw.Draw(frame).text((MARGIN, 1), name, fill="black")
        frames.append(frame.quantize(256))
    durations = [FRAME_MILLISECONDS] * (len(frames) - 1) + [4 * FRAME_MILLISECONDS]
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    return _save(path, lambda partial: frames[0].save(partial, format="GIF", **options))


def save_rows(path: Path, rows: Mapping[str, Images]) -> Path:
    """One labelled row per set of images, one column per seed.

    Args:
        path: PNG to write.
        rows: by label, images in [−1, 1], shape (N, C, H, W), the same shape for all.
    """
    sheet = grid(np.concatenate([np.asarray(images, dtype=np.float32) for images in rows.values()]), _count(rows))
    return save_image(path, _with_labels(sheet, list(rows), 0))


def _with_labels(sheet: Image.Image, labels: Sequence[str], top: int) -> Image.Image:
    """A sheet with a label before each of its rows, which begin below `top` pixels."""
    labels = [label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…" for label in labels]
    left = MARGIN + max(round(ImageDraw.Draw(sheet).textlength(label)) for label in labels) + LABEL_GAP
    labelled = Image.new("RGB", (sheet.width + left, sheet.height), "white")
    labelled.paste(sheet, (left, 0))
    draw = ImageDraw.Draw(labelled)
    height = (sheet.height - top - MARGIN) / len(labels)
    for index, label in enumerate(labels):
        place = (left - LABEL_GAP, top + MARGIN + (index + 0.5) * height)
        draw.text(place, label, fill="black", anchor="rm")
    return labelled


def _count(rows: Mapping[str, Images]) -> int:
    return len(next(iter(rows.values())))
