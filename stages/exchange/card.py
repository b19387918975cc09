"""The card of a published cache: what it is, how to train from it, and a picture."""

from __future__ import annotations

from pathlib import Path

import yaml

from advkd.cache.care.summary import origin_of
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.trajectories import draw_trajectories

PREVIEW = "preview.png"
NUM_SHOWN = 8


def save_preview(cache: TrajectoryCache, path: Path) -> Path:
    """The recorded states of the cache's first seeds, of different prompts."""
    return draw_trajectories(path, cache, cache.varied(cache.seeds(), NUM_SHOWN))


def cache_card(cache: TrajectoryCache, address: str) -> str:
    """The README.md, with the Hub's metadata as front matter; texts that others wrote are quoted."""
    recipe, origin, seeds = cache.recipe, origin_of(cache), cache.seeds()
    front = {"license": origin["license"]} if "license" in origin else {}
    head = yaml.safe_dump({**front, "tags": ["advkd", "diffusion-distillation"]}, sort_keys=False, allow_unicode=True)
    facts = {
        "teacher": origin.get("source", "not recorded"),
        "teacher's licence": origin.get("license", "not recorded"),
        **({"attribution": origin["attribution"]} if "attribution" in origin else {}),
        "SHA-256 of its weights": str(recipe.teacher["tensors_sha256"]),
        "sampler": f"{recipe.sampler['name']}, {recipe.sampler['steps']} steps",
        "seeds": f"{len(seeds):,}, from {seeds[0]} to {seeds[-1]}",
        "recorded after": ", ".join(f"{step}" for step in cache.states) + " steps",
        "items": f"{'×'.join(map(str, cache.item_shape))}, {cache.layout.dtype}",
        "fingerprint": recipe.fingerprint,
        "digest": cache.digest,
    }
    rows = "\n".join(f"| {name} | `{_quoted(value)}` |" for name, value in facts.items())
    return (
        f"---\n{head}---\n\n# Trajectories of a diffusion model\n\n![From noise to image]({PREVIEW})\n\n"
        "Denoising states of a teacher, from which advkd trains a student that needs one evaluation per image:\n\n"
        f"```sh\nadvkd-train --cache {address}\nadvkd-cache subset {address} --out cache/mine.zarr   # a copy\n```\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


def _quoted(text: str) -> str:
    """One line that stays between backquotes in a table."""
    letters = "".join(letter if letter.isprintable() else " " for letter in text[:200])
    return " ".join(letters.split()).replace("`", "'").replace("|", "/")
