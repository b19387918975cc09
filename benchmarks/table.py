"""Results as Markdown: the whole table, and the rows that the README quotes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison, Row, Target

PROGRAMS = ("sampling", "recording", "reading", "cold", "training", "student", "startup", "growth", "workers")
"""In the order in which `make bench` runs them and the table lists them."""

_SCALES = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), "MB": ((1.0, "MB"),), "%": ((0.01, "%"),)}


def figure(value: float, unit: str) -> str:
    """A number with its unit, to three digits."""
    for scale, name in _SCALES.get(unit, ((1.0, unit),)):
        if abs(value) >= scale or name == _SCALES.get(unit, ((1.0, unit),))[-1][1]:
            return f"{_digits(value / scale)} {name}".rstrip()
    raise AssertionError(unit)


def _digits(value: float) -> str:
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _row(row: Row, unit: str) -> str:
    spread = f"{figure(row.low, unit)} – {figure(row.high, unit)}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}" if row.ratio < 100 else f"{row.ratio:,.0f}"
    if row.ratio is not None and row.ratio_low is not None and row.ratio_high is not None and row.ratio != 1.0:
        ratio += f" ({_digits(row.ratio_low)} – {_digits(row.ratio_high)})"
    return f"| {row.name} | {figure(row.median, unit)} | {spread} | {ratio} |"


def _target(target: Target) -> str:
    sign = "≤" if target.at_most else "≥"
    return (
        f"- {'met' if target.met else '**missed**'}: {target.what}: {_digits(target.found)} ({sign} {target.limit:g})"
    )


def comparison_lines(comparison: Comparison) -> list[str]:
    """A comparison as Markdown."""
    relative = f"÷ {comparison.baseline}" if comparison.baseline else ""
    lines = [
        f"### {comparison.title}",
        "",
        f"| method | median | quartiles | {relative} |",
        "|---|---|---|---|",
        *(_row(row, comparison.unit) for row in comparison.rows),
        "",
        *(_target(target) for target in comparison.targets),
    ]
    if comparison.targets:
        lines.append("")
    for text in (comparison.agreement, comparison.note):
        if text:
            lines += [text, ""]
    return lines


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder, in the order of `PROGRAMS`."""
    order = {name: place for place, name in enumerate(PROGRAMS)}
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: (order.get(result["name"], len(order)), result["device"]))


def comparisons_of(result: dict[str, Any]) -> list[Comparison]:
    """A program's comparisons from its JSON."""
    return [
        Comparison(
            title=item["title"],
            unit=item["unit"],
            baseline=item["baseline"],
            rows=[Row(**row) for row in item["rows"]],
            targets=[
                Target(**{key: value for key, value in target.items() if key != "met"}) for target in item["targets"]
            ],
            agreement=item["agreement"],
            note=item["note"],
        )
        for item in result["comparisons"]
    ]


def machine_words(result: dict[str, Any]) -> str:
    """The kind of machine and the date."""
    machine = result["machine"]
    where = f"{machine['gpu']}, " if "gpu" in machine else ""
    return f"{result['date']}, {where}{machine['threads']} of {machine['cores']} cores of {machine['processor']}"


def table(results: Iterable[dict[str, Any]]) -> str:
    """All results as Markdown."""
    lines = ["# Benchmark results", "", "Written by `make bench`; the programs are in `benchmarks/`.", ""]
    for result in results:
        quick = " (a quick run: its figures mean nothing)" if result["quick"] else ""
        lines += [f"## {result['question']}", ""]
        lines += [f"`python -m benchmarks.{result['name']}`, {machine_words(result)}{quick}", ""]
        for comparison in comparisons_of(result):
            lines += comparison_lines(comparison)
    return "\n".join(lines).rstrip() + "\n"


def summary(results: Iterable[dict[str, Any]]) -> str:
    """What the README quotes: the targets with a headline, and all that were missed."""
    results = list(results)
    lines = ["| measured | found | target |", "|---|---|---|"]
    for result in results:
        where = "" if result["device"] == "cpu" else f" ({result['device']})"
        for comparison in comparisons_of(result):
            for target in comparison.targets:
                if target.headline or not target.met:
                    found = _digits(target.found) if target.met else f"{_digits(target.found)} (missed)"
                    limit = f"{'≤' if target.at_most else '≥'} {target.limit:g}"
                    lines.append(f"| {target.headline or target.what}{where} | {found} | {limit} |")
    words = sorted({machine_words(result) for result in results})
    return "\n".join([*lines, "", f"({'; '.join(words)}.)"]) + "\n"
