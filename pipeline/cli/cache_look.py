"""`advkd-cache info`, `preview` and `diff`: looking, changing nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from advkd.pipeline.cli.common import example, guarded, printable, store_name


@click.command(epilog=example("advkd-cache info cache/digits.zarr"))
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
@guarded
def info(store: str, as_json: bool) -> None:
    """Say what a cache holds: STORE is a folder or a URL."""
    from advkd.cache.care.summary import summarize
    from advkd.cache.read.reader import TrajectoryCache

    summary = summarize(TrajectoryCache.open(store))
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    for name, text in _lines(summary):
        click.echo(f"{name:14}{printable(text)}")


def _lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    sampler, teacher = summary["sampler"], summary["teacher"]
    paired = "deterministic" if sampler["deterministic"] else "stochastic: x_T does not determine x_0"
    origin = ", ".join(
        [*([str(teacher["source"])] if "source" in teacher else []),
         *([f"commit {str(teacher['commit'])[:12]}"] if "commit" in teacher else []),
         f"tensors {teacher['tensors_sha256'][:16]}"]
    )  # fmt: skip
    gaps = _ranges(summary["gaps"])
    lines = [
        ("store", summary["store"]),
        ("seeds", f"{_ranges(summary['seeds']) or 'none'}: {summary['num_seeds']:,} in {summary['num_blocks']:,} "
                  f"blocks of {summary['block_size']:,}"),
        *([("gaps", f"{gaps} declared, but not built")] if gaps else []),
        ("items", f"{'×'.join(map(str, summary['item_shape']))}, {summary['dtype']}, {summary['encoding']}; "
                  f"{summary['num_bytes'] / 1e9:.3f} GB {'unpacked' if 'packed' in summary else 'here'}"),
        *([("packed", _packed(summary["packed"]))] if "packed" in summary else []),
        ("sampler", f"{sampler['name']}, {sampler['steps']} steps, {paired}{_options(sampler)}"),
        ("path", summary["path"]),
        *([("condition", _condition(summary["condition"]))] if "condition" in summary else []),
        *([("prompts", _prompts(summary))] if "prompts" in summary else []),
        *([("classes", _listed([*teacher["class_names"].values()]))] if "class_names" in teacher else []),
        ("space", _space(summary)),
        ("teacher", origin),
        *([("licence", str(teacher["license"]))] if "license" in teacher else []),
        *([("attribution", str(teacher["attribution"]))] if "attribution" in teacher else []),
        ("precision", _precision(summary)),
        ("noise", f"{summary['noise']['rule']}, root seed {summary['noise']['root_seed']}"),
        ("fingerprint", summary["fingerprint"]),
        ("digest", summary["digest"]),
    ]  # fmt: skip
    last = summary["states"][-1]
    if "minimum" in last and last["timestep"] == -1:
        lines.append(
            ("x_0", f"values {last['minimum'] * last['scale']:+.2f} to {last['maximum'] * last['scale']:+.2f}")
        )
    lines += [(f"state {state['step']:04d}", _state(state)) for state in summary["states"]]
    return lines + [("array", _array(array)) for array in summary["arrays"]]


def _condition(condition: dict[str, Any]) -> str:
    labels, rows = condition["labels"], condition["num_classes"]
    guidance = "no guidance" if condition["null_class"] is None else (
        f"guidance {condition['guidance']:g} (null class {condition['null_class']}), two evaluations per prediction"
    )  # fmt: skip
    shown = f"{labels[0]} to {labels[-1]}" if len(labels) == labels[-1] - labels[0] + 1 > 1 else _listed(labels)
    return f"class labels {shown} of {rows} rows, seed mod {len(labels)}; {guidance}"


def _prompts(summary: dict[str, Any]) -> str:
    prompts = summary["prompts"]
    count = summary["num_seeds"] // prompts["seeds_per_prompt"]
    return (
        f"{count:,} with {prompts['seeds_per_prompt']} seeds each; guidance {prompts['guidance']:g}, "
        f"{prompts['evaluations']} evaluations per prediction"
    )


def _precision(summary: dict[str, Any]) -> str:
    from advkd.cache.format.recipe import NOT_RECORDED

    compute = str(summary["precision"]["compute"])
    return compute if compute == NOT_RECORDED else f"teacher in {compute}"


def _listed(labels: Sequence[object]) -> str:
    return ", ".join(map(str, labels[:8])) + (f" … ({len(labels)})" if len(labels) > 8 else "")


def _space(summary: dict[str, Any]) -> str:
    if "space" not in summary:
        return "pixels in [−1, 1]"
    space = summary["space"]
    shape = "×".join(map(str, space["image_shape"]))
    return f"latents; decoder {space['decoder']} (tensors {space['tensors_sha256'][:16]}) makes images of {shape}"


def _options(sampler: dict[str, Any]) -> str:
    """Eta, spacing, offset and clipping, as far as they are known and not 0."""
    from advkd.cache.files.strict_json import shortened

    names = {"eta": "eta", "spacing": "spacing", "steps_offset": "steps_offset", "landing": "landing",
             "clips_x0": "x_0 clipped to ±", "thresholds_x0": "x_0 thresholded at"}  # fmt: skip
    said = [f"{name} {shortened(sampler[key])}" for key, name in names.items() if sampler.get(key)]
    return f"; {', '.join(said)}".replace("± ", "±") if said else ""


def _array(array: dict[str, Any]) -> str:
    if not array["here"]:
        return f"{array['path']}   (not here)"
    shape = "×".join(map(str, array["item_shape"])) or "one"
    each = "seed" if array["seeds_per_row"] == 1 else f"{array['seeds_per_row']} seeds"
    return f"{array['path']}: {shape} {array['dtype']} per {each}; values {array['minimum']:g} to {array['maximum']:g}"


def _packed(packed: dict[str, Any]) -> str:
    parameters = "".join(f" {key} {packed[key]:g}," for key in ("max_error", "keep_bits", "level") if key in packed)
    error = (
        f"error rms {packed['error_rms']:.1e}, at most {packed['error_max']:.1e}" if packed["error_max"] else "no error"
    )
    return f"{packed['codec']},{parameters} {packed['num_bytes'] / 1e9:.3f} GB here; {error}"


def _state(state: dict[str, Any]) -> str:
    timestep = f"t = {state['timestep']:g}" if state["timestep"] >= 0 or not state["sigma"] else "t not recorded"
    text = f"{timestep}, alpha = {state['alpha']:.4f}, sigma = {state['sigma']:.4f}"
    if "minimum" in state:
        text += f"; values {state['minimum']:+.2f} to {state['maximum']:+.2f}"
        if state["num_nonfinite"]:
            text += f", {state['num_nonfinite']} not finite"
        text += f"; rounding rms {state['rounding_rms']:.1e}, tolerance {state['tolerance_rms']:.1e}"
    return text if state["here"] else f"{text}   (not here)"


def _ranges(runs: list[list[int]], most: int = 8) -> str:
    shown = ", ".join(f"{start}:{stop}" for start, stop in runs[:most])
    return shown + (f" and {len(runs) - most} more" if len(runs) > most else "")


@click.command(epilog=example("advkd-cache preview cache/digits.zarr --seeds 0:6"))
@click.argument("store")
@click.option(
    "--seeds",
    metavar="A:B",
    help="Whose trajectories; the first eight that are there if not given, of different prompts.",
)
@click.option(
    "--out",
    metavar="FILE.png",
    type=click.Path(path_type=Path),
    help="NAME.png here if not given; the GIF goes beside.",
)
@guarded
def preview(store: str, seeds: str | None, out: Path | None) -> None:
    """Draw trajectories: a PNG contact sheet, timesteps as labels, and an animated GIF of the denoising."""
    from advkd.cache.errors import UsageError
    from advkd.cache.format.seeds import parse_seed_range
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.stages.trajectories import draw_trajectories

    cache = TrajectoryCache.open(store)
    cache.check_begun()
    chosen = parse_seed_range(seeds) if seeds else cache.varied(cache.seeds(), 8)
    if len(chosen) > 256:
        raise UsageError(f"--seeds {seeds}: at most 256 make a picture")
    picture = out or Path(f"{store_name(store)}.png")
    if picture.suffix.lower() != ".png":
        raise UsageError(f"--out {picture}: expected a name that ends in .png")
    film = picture.with_suffix(".gif")
    draw_trajectories(picture, cache, chosen, film)
    click.echo(f"seeds {seeds or ', '.join(map(str, chosen))}; look: {picture}  {film}")


@click.command(epilog=example("advkd-cache diff cache/mine.zarr cache/theirs.zarr"))
@click.argument("first")
@click.argument("second")
@guarded
def diff(first: str, second: str) -> None:
    """Say how two caches differ in recipe, layout and content; exit code 1 if they do."""
    from advkd.cache.care.summary import runs
    from advkd.cache.read.compare import compare, tolerance_of
    from advkd.cache.read.reader import TrajectoryCache

    one, other = TrajectoryCache.open(first), TrajectoryCache.open(second)
    found = compare(one, other)
    for part, lines in (("recipe", found.recipe), ("layout", found.layout)):
        for line in lines:
            click.echo(printable(f"{part:10}{line}"))
    size = one.layout.block_size
    for name, blocks in ((first, found.only_first), (second, found.only_second)):
        if blocks:
            seeds = _ranges([[start * size, stop * size] for start, stop in runs(blocks)])
            click.echo(printable(f"seeds     only in {name}: {seeds}"))
    if found.apart:
        tolerance, more = tolerance_of(one), tolerance_of(other)
        for block, apart in list(found.apart.items())[:20]:
            far = ", ".join(f"{step:04d} {value:.1e}" for step, value in apart.items())
            close = all(value <= max(tolerance[step], more[step]) for step, value in apart.items())
            click.echo(f"block     {block}: rms {far} ({'within' if close else 'beyond'} the recorded tolerance)")
        if len(found.apart) > 20:
            click.echo(f"          and {len(found.apart) - 20} more blocks")
    for block, names in list(found.other_arrays.items())[:20]:
        click.echo(f"block     {block}: other values in {', '.join(names)}")
    if found.same:
        click.echo(f"the same: {found.num_equal} blocks, digest {one.digest}")
    else:
        click.echo(f"they differ; {found.num_equal} blocks are equal")
        sys.exit(1)
