"""The table of scores: per row and measure one value per set. Terminal, CSV, scores.json and model card show it.

A row is a sampler, or another form of one, such as an exported file. The first row is the student; the others are
compared with it, set by set.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from advkd.stages.metrics.intervals import Interval, paired_difference, standard_error
from advkd.stages.metrics.registry import MEASURES

NOT_MEASURED = "–"
DIGITS = 3
"""Significant digits shown, so that an interval fits its column."""
MOST_DECIMALS = 4
MARKS = "†‡§¶"
"""Behind the names of rows whose solver changes x̂_0, one per way to do so."""


@dataclass(kw_only=True)
class Row:
    """One sampler's scores."""

    name: str
    evaluations: int
    """Network evaluations per image."""
    x0: str | None = None
    """What its solver does to each predicted x̂_0, such as clipping it; None if nothing."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """By measure, one value per set; absent where it was not measured."""
    class_shares: list[float] | None = None
    """Over all sets, one per class, where there is a classifier."""
    class_frechet: dict[str, float | None] | None = None
    """Fréchet distance within each class over all sets, by label, None for a class with too few images; None itself
    without classes, and but for student and teacher."""

    def add(self, measured: dict[str, float]) -> None:
        """Append the scores of one more set."""
        for measure, value in measured.items():
            self.values.setdefault(measure, []).append(value)

    def mean(self, measure: str) -> float | None:
        """Mean over the sets."""
        return float(np.mean(self.values[measure])) if measure in self.values else None

    def deviation(self, measure: str) -> float | None:
        """Standard deviation over the sets."""
        return float(np.std(self.values[measure], ddof=1)) if measure in self.values else None

    def standard_error(self, measure: str) -> float | None:
        """Of the mean."""
        return standard_error(self.values[measure]) if measure in self.values else None

    def spread(self, measure: str) -> float | None:
        """The spread that tables show: standard deviation or standard error."""
        return self.standard_error(measure) if MEASURES[measure].spread == "standard_error" else self.deviation(measure)

    def text(self, measure: str, most: int | None = None) -> str:
        """Mean ± spread, with at most so many decimals; shares in percent."""
        mean, spread = self.mean(measure), self.spread(measure)
        if mean is None or spread is None:
            return NOT_MEASURED
        mean, spread = MEASURES[measure].shown(mean), MEASURES[measure].shown(spread)
        decimals = num_decimals(mean, spread, most=most)
        return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"

    def to_json(self, student: Row) -> dict[str, Any]:
        """Everything that was measured; the most used scores once more on top."""
        return {
            "evaluations": self.evaluations,
            "x0": self.x0,
            "frechet": self.values.get("frechet"),
            "frechet_mean": self.mean("frechet"),
            "frechet_sd": self.deviation("frechet"),
            "frechet_to_real": self.mean("frechet_to_real"),
            "student_minus_this": _json(difference(student, self, "frechet")),
            "class_shares": self.class_shares,
            **({} if self.class_frechet is None else {"class_frechet": self.class_frechet}),
            "scores": {
                measure: {
                    "sets": values,
                    "mean": self.mean(measure),
                    "sd": self.deviation(measure),
                    "standard_error": self.standard_error(measure),
                    "student_minus_this": _json(difference(student, self, measure)),
                }
                for measure, values in self.values.items()
            },
        }

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote, and what advkd wrote before it had more measures than `frechet`.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        values = {measure: found["sets"] for measure, found in value.get("scores", {}).items() if measure in MEASURES}
        if value.get("frechet") is not None:
            values.setdefault("frechet", value["frechet"])
        for measure, sets in values.items():
            if len(sets) < 2 or not all(type(score) in (int, float) and math.isfinite(score) for score in sets):
                raise ValueError(f"{measure} of {name}: {sets!r} are no scores")
        return cls(
            name=name,
            evaluations=int(value.get("evaluations", 1)),
            x0=None if value.get("x0") is None else str(value["x0"]),
            values=values,
            class_shares=value.get("class_shares"),
            class_frechet=value.get("class_frechet"),
        )


def difference(first: Row, second: Row, measure: str) -> Interval | None:
    """First minus second over the same sets; None for one and the same, and where either was not measured."""
    if first is second or measure not in first.values or measure not in second.values:
        return None
    return paired_difference(first.values[measure], second.values[measure])


def num_decimals(*values: float, most: int | None = None) -> int:
    """Decimals that show the largest of some values to `DIGITS` digits, at most `most` (`MOST_DECIMALS` if None)."""
    largest, most = max(map(abs, values)), MOST_DECIMALS if most is None else most
    return next((decimals for decimals in range(most) if largest * 10**decimals >= 10 ** (DIGITS - 1)), most)


def difference_text(interval: Interval | None, measure: str, most: int | None = None) -> str:
    """An interval as tables show it; empty for None."""
    if interval is None:
        return ""
    shown = Interval(**{key: MEASURES[measure].shown(value) for key, value in asdict(interval).items()})
    return shown.text(num_decimals(shown.low, shown.high, most=most))


def _json(interval: Interval | None) -> dict[str, float] | None:
    return asdict(interval) if interval else None


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """The rows of an evaluation."""

    rows: list[Row]
    """The student first, the teacher itself second where there is one."""

    @property
    def student(self) -> Row:
        """Whose scores they are; the others are beside it."""
        return self.rows[0]

    def student_minus(self, row: Row, measure: str) -> Interval | None:
        """The student's scores minus a row's, over the same sets; None for the student itself."""
        return difference(self.student, row, measure)

    def marks(self) -> dict[str, str]:
        """A mark for each treatment of x̂_0 that a row has: the treatment by its mark."""
        treatments = dict.fromkeys(row.x0 for row in self.rows if row.x0)
        return dict(zip(MARKS, treatments, strict=False))

    def cells(self, measures: Sequence[str]) -> list[list[str]]:
        """Rows that were measured, as text.

        Args:
            measures: to show; the paired difference is that of the first.

        Returns:
            Per row: name with its mark, network evaluations, each measure, student minus this with its 95 % interval,
            and `ahead` or `behind` where that interval excludes zero.
        """
        first, marks = MEASURES[measures[0]], {x0: f" {mark}" for mark, x0 in self.marks().items()}
        lines = []
        for row in self.rows:
            if row.values:
                gap = self.student_minus(row, first.name)
                lines.append(
                    [
                        row.name + marks.get(row.x0 or "", ""),
                        str(row.evaluations),
                        *(row.text(measure, MEASURES[measure].column_decimals) for measure in measures),
                        difference_text(gap, first.name, first.column_decimals),
                        first.verdict(gap),
                    ]
                )
        return lines

    def to_csv(self, **constants: object) -> str:
        """One line per row: `x0` as in `Row`, mean and standard deviation of every measure, then constants.

        What was not measured is empty.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        columns = [f"{measure}{suffix}" for measure in MEASURES for suffix in ("", "_sd")]
        writer.writerow(["sampler", "evaluations", "x0", *columns, *constants])
        for row in self.rows:
            found = [value for measure in MEASURES for value in (row.mean(measure), row.deviation(measure))]
            cells = ["" if value is None else f"{value:.6g}" for value in found]
            writer.writerow([row.name, row.evaluations, row.x0 or "", *cells, *constants.values()])
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """The member `samplers` of scores.json."""
        return {row.name: row.to_json(self.student) for row in self.rows}

    @classmethod
    def from_json(cls, samplers: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote: the student first, then the teacher itself, the others by solver and evaluations.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else.
        """
        rows = [Row.from_json(name, value) for name, value in samplers.items()]

        def place(row: Row) -> tuple[bool, bool, str, int]:
            solver, _, _ = row.name.rpartition(" ")
            return row.name != "student", not row.name.startswith("teacher"), solver, row.evaluations

        return cls(rows=sorted(rows, key=place))
