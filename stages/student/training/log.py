"""A run's metrics in DVCLive's tables, which a resumed run continues without gaps or repeated rows, and in trackers."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from advkd.stages.student.training.trackers import Trackers


class MetricsLog:
    """DVCLive's folder, open for writing.

    Args:
        folder: `log` of the run; None (all ranks but 0) writes nothing.
        trackers: open ones, which get the same and pictures; none in all ranks but 0.
    """

    def __init__(self, folder: Path | None, trackers: Trackers) -> None:
        self._folder = folder
        self._trackers = trackers
        self._live: Any = None

    def __enter__(self) -> Self:
        if self._folder is not None:
            from dvclive import Live

            self._live = Live(dir=str(self._folder), resume=True, save_dvc_exp=False, dvcyaml=None).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one step's metrics."""
        if self._live is not None:
            self._live.step = step
            for name, value in values.items():
                self._live.log_metric(name, value)
            self._live.make_summary()
        self._trackers.log(step, values)

    def show(self, step: int, name: str, picture: Path) -> None:
        """Show a PNG file in the trackers; DVCLive's tables have none."""
        self._trackers.show(step, name, picture)


def forget_metrics_after(log: Path, step: int) -> None:
    """Drop the rows of DVCLive's tables past a step, which a resumed run logs again, and incomplete rows."""
    for path in sorted((log / "plots" / "metrics").rglob("*.tsv")):
        with path.open(newline="") as file:
            header, *rows = [*csv.reader(file, delimiter="\t")] or [[]]
        kept = [row for row in rows if len(row) == len(header) and row[0].isdigit() and int(row[0]) <= step]
        if len(kept) != len(rows):
            with path.open("w", newline="") as file:
                csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *kept])
    summary = log / "metrics.json"
    try:
        json.loads(summary.read_bytes())
    except FileNotFoundError:
        pass
    except ValueError:
        summary.unlink()
