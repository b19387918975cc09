"""Writes the page: assets as they are, `index.html` with its policy, the exported student, pictures, `page.json`.

site/
  index.html, style.css, page.js, student.js, noise.js   the same for every student but for addresses and title
  student.onnx or student.int8.onnx                      and the decoder of a student of latents
  page.json                                              everything the page tells; set as text, never as markup
  teacher.png, states.png, submodules.png                images of the cache's first seeds, side by side
  icon.png, README.md                                    README.md is the card of a static Space on the Hub
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from advkd.cache.errors import UsageError
from advkd.cache.files.durable import write_atomically, write_json
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.decoder import as_images, cache_decoder
from advkd.stages.page.runtime import FOLDER, Runtime, integrity
from advkd.stages.page.sprites import Images, save_sprite
from advkd.stages.student.facts import (
    PAPER,
    SCORE_HEADINGS,
    attribution,
    class_names,
    license_id,
    line,
    provenance_facts,
    score_notes,
    score_rows,
    section,
    what_it_makes,
)
from advkd.stages.student.hub import Student
from advkd.stages.student.sharing.export import Deviation, export_int8, export_onnx
from advkd.stages.student.sharing.onnx_student import decoder_path

ASSETS = ("style.css", "page.js", "student.js", "noise.js")
MODEL, DATA, INDEX = "student.onnx", "page.json", "index.html"
NUM_TEACHER = 64
"""Seeds whose images by the teacher the page has; the student's grid shows as many."""
NUM_WALKED = 16
"""Seeds whose recorded states it has."""
COLUMNS = 8
MAX_INT8_RMS = 0.05
"""Of int8 convolutions on a page, in units of images in [−1, 1]: six of 255 grey levels."""
_OWN_FILE = re.compile(rf"({FOLDER}/)?\w[\w.-]*", re.ASCII)
CITATION = """\
@article{mekonnen2024advkd,
  title   = {Adv-KD: Adversarial Knowledge Distillation for Faster Diffusion Sampling},
  author  = {Mekonnen, Kidist Amde and Dall'Asen, Nicola and Rota, Paolo},
  journal = {arXiv preprint arXiv:2405.20675},
  year    = {2024}
}"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """What was written."""

    folder: Path
    model: str
    model_bytes: int
    """Of the student, with its decoder."""
    deviation: Deviation
    """Of the student on the page from PyTorch's."""
    int8: bool


def check_folder(folder: Path) -> None:
    """Check that nothing but an earlier page would be replaced.

    Raises:
        UsageError: the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DATA).is_file():
        raise UsageError(f"--out {folder} holds something other than an earlier page: give an empty or a new folder")


def write_site(
    student: Student,
    name: str,
    folder: Path,
    *,
    cache: TrajectoryCache | None = None,
    float32: bool = False,
    runtime: Path | None = None,
    pictures: list[tuple[Path, str]] | None = None,
) -> Site:
    """Write the page of a student; an earlier page in the folder is replaced, file by file.

    Args:
        student: to sample.
        name: of the page.
        folder: to write to.
        cache: the student's own, for the teacher's images and states; None leaves them out.
        float32: whether to leave the convolutions in float32, which browsers with WebGPU run on the GPU. Otherwise
            they are int8, unless that changes images by more than `MAX_INT8_RMS`.
        runtime: folder of an onnxruntime-web to copy; None for the pinned one of a CDN.
        pictures: PNG files to show, with their captions.

    Raises:
        UsageError: the folder holds something else; packages or files are missing; the images are neither grey nor RGB.
        TrainingError: the student can't be exported.
    """
    check_folder(folder)
    if student.geometry.image_shape[0] not in (1, 3):
        raise UsageError(
            f"a page shows grey or RGB images; this student's have {student.geometry.image_shape[0]} channels"
        )
    with tempfile.TemporaryDirectory() as made:
        site = _make(student, name, Path(made), cache, float32, runtime, pictures or [])
        _replace(Path(made), folder)
    return dataclasses.replace(site, folder=folder)


def _make(
    student: Student,
    name: str,
    folder: Path,
    cache: TrajectoryCache | None,
    float32: bool,
    runtime: Path | None,
    pictures: list[tuple[Path, str]],
) -> Site:
    model, deviation = _export(student, folder, float32)
    int8 = model != MODEL
    found = Runtime.of(not int8) if runtime is None else Runtime.copied(runtime, not int8, folder)
    decoder = decoder_path(folder / model)
    size = (folder / model).stat().st_size + (decoder.stat().st_size if student.geometry.space else 0)
    for path, _ in pictures:
        shutil.copyfile(path, folder / path.name)
    for asset in ASSETS:
        write_atomically(folder / asset, [_asset(asset).encode()])
    data = {
        **_described(student, name),
        "pictures": [{"file": path.name, "caption": caption} for path, caption in pictures],
        "model": {
            "file": model,
            "decoder": decoder.name if student.geometry.space else None,
            "bytes": size,
            "form": "int8 convolutions" if int8 else "float32",
            "webgpu": not int8,
        },
        "runtime": {"wasm": found.wasm, "integrity": found.wasm_integrity},
        "teacher": None if cache is None else _from_cache(student, cache, folder),
    }
    first = data["teacher"]["seeds"][0] if data["teacher"] else 0
    write_atomically(folder / INDEX, [_index(name, str(data["summary"][0]), found, first).encode()])
    write_atomically(folder / "README.md", [_space_card(name, student).encode()])
    save_sprite(folder / "icon.png", _images(student, [first]), 1)
    write_json(folder / DATA, {**data, "files": _files(folder)})
    return Site(folder=folder, model=model, model_bytes=size, deviation=deviation, int8=int8)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _replace(made: Path, folder: Path) -> None:
    """Put a page's files where an earlier page may be, whose surplus files go; others, such as `.git` or `CNAME`, stay.

    `page.json` is written last: an interrupted replacement is done again.
    """
    names, surplus = _files(made), _earlier(folder)
    for name in sorted(names, key=lambda name: name == DATA):
        write_atomically(folder / name, [(made / name).read_bytes()])
    for name in surplus - set(names):
        (folder / name).unlink(missing_ok=True)


def _earlier(folder: Path) -> set[str]:
    """Files of an earlier page in the folder, as it says itself."""
    try:
        names = json.loads((folder / DATA).read_bytes())["files"]
        return {name for name in names if _OWN_FILE.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _export(student: Student, folder: Path, float32: bool) -> tuple[str, Deviation]:
    """The file that the page loads; no other stays."""
    whole, small = folder / MODEL, (folder / MODEL).with_suffix(".int8.onnx")
    deviation = export_onnx(student, whole)
    if not float32:
        found = export_int8(student, whole, small)
        if found.rms <= MAX_INT8_RMS:
            whole.unlink()
            return small.name, found
    small.unlink(missing_ok=True)
    return whole.name, deviation


def _described(student: Student, name: str) -> dict[str, Any]:
    geometry, known = student.geometry, student.provenance
    rows = score_rows(known)
    how, notes = score_notes(known) if rows else ("", [])
    return {
        "title": line(name),
        "summary": [
            f"A one-pass student of a diffusion model: one network evaluation makes a {what_it_makes(geometry)} where "
            f"its teacher takes {_evaluations(student)}.",
            f"{student.deployed_parameters():,} parameters in {len(geometry.levels) - 1} submodules, each of which "
            f"learned to produce the teacher's state at one point of the denoising; after Adv-KD, {PAPER}.",
        ],
        "geometry": {
            "item_shape": geometry.item_shape,
            "image_shape": geometry.image_shape,
            "root_seed": str(geometry.root_seed),  # may exceed what JavaScript's numbers hold
            "noise_dtype": geometry.noise_dtype,
            "labels": geometry.labels,
        },
        "classes": [
            {"label": label, "name": name}
            for label, name in zip(geometry.labels, class_names(known, geometry.labels), strict=True)
        ],
        "attribution": attribution(known),
        "scores": {"columns": SCORE_HEADINGS, "rows": rows, "notes": [how, *notes]} if rows else None,
        "facts": list(provenance_facts(geometry, known).items()),
        "citation": CITATION,
    }


def _evaluations(student: Student) -> str:
    steps, cost = student.geometry.steps[-1], section(section(student.provenance, "scores"), "samplers")
    counts = [
        row.get("evaluations") for key, row in cost.items() if key.startswith("teacher") and isinstance(row, dict)
    ]
    return f"{counts[0]} in {steps} steps" if counts and isinstance(counts[0], int) else f"{steps} solver steps"


def _from_cache(student: Student, cache: TrajectoryCache, folder: Path) -> dict[str, Any]:
    seeds = cache.seeds()[:NUM_TEACHER]
    walked = seeds[:NUM_WALKED]
    decoder = cache_decoder(cache)
    steps = student.geometry.steps
    save_sprite(folder / "teacher.png", as_images(cache.rows(steps[-1], seeds), decoder), COLUMNS)
    states = [as_images(cache.rows(step, walked), decoder) for step in steps]
    save_sprite(folder / "states.png", _side_by_side(states), len(steps))
    with torch.no_grad():
        noise, *labels = student.inputs(walked.tolist())
        submodules = [noise, *student.heads(noise, *labels)]
    made = [student.decode(state).numpy() for state in submodules]
    save_sprite(folder / "submodules.png", _side_by_side(made), len(steps))
    return {
        "seeds": seeds.tolist(),
        "columns": COLUMNS,
        "images": "teacher.png",
        "states": {
            "seeds": walked.tolist(),
            "timesteps": student.geometry.timesteps,
            "teacher": "states.png",
            "student": "submodules.png",
        },
    }


def _side_by_side(states: list[Images]) -> Images:
    """States, each (N, C, H, W), as one row of images per seed."""
    return np.stack(states, axis=1).reshape(-1, *states[0].shape[1:])


def _images(student: Student, seeds: list[int]) -> Images:
    with torch.no_grad():
        return student.decode(student(*student.inputs(seeds))).numpy()


def _asset(name: str) -> str:
    return files("advkd.stages.page").joinpath("assets", name).read_text(encoding="utf-8")


def _index(title: str, description: str, runtime: Runtime, first_seed: int) -> str:
    imports = json.dumps(
        {
            "imports": {"onnxruntime-web": runtime.module},
            "integrity": {runtime.module: runtime.module_integrity},
        }
    )
    return Template(_asset(INDEX)).substitute(
        policy=_policy(imports, runtime),
        title=html.escape(line(title)),
        description=html.escape(description),
        imports=imports,
        first_seed=first_seed,
    )


def _policy(imports: str, runtime: Runtime) -> str:
    """The Content-Security-Policy: nothing but the page's own folder and the pinned runtime; no inline script but the
    import map, by its hash; compiling WebAssembly is allowed, evaluating text is not."""
    module, wasm = runtime.sources
    rules = {
        "default-src": "'none'",
        "script-src": f"'self' '{integrity(imports.encode())}' 'wasm-unsafe-eval' {module}",
        "connect-src": f"'self' {wasm}",
        "style-src": "'self'",
        "img-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value.strip()}" for name, value in rules.items())


def _space_card(name: str, student: Student) -> str:
    license_name = license_id(student.provenance)
    said = {"title": line(name), "sdk": "static", "tags": ["advkd", "diffusion-distillation"]}
    if license_name:
        said["license"] = license_name
    return f"---\n{json.dumps(said, indent=1)}\n---\n\nA one-pass student that runs in the browser, made by advkd.\n"
