"""Experiment trackers beside DVCLive's tables: they get a run's metrics, previews and configuration.

Accelerate's own classes talk to them. What is ours: which run of the tracker a resumed run goes on in. Importing this
module doesn't import accelerate, so that a configuration can be checked against the names alone.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.files.durable import write_json
from advkd.stages.reporter import Reporter

PROJECT = "advkd"
RECORD = "trackers.json"

Pixels = npt.NDArray[np.uint8]
"""An RGB picture, shape (H, W, 3)."""
Scalars = dict[str, bool | int | float | str]


@dataclass(frozen=True, kw_only=True)
class TrackerKind:
    """What differs between trackers; the key in `TRACKERS` is Accelerate's name and that of the Python package."""

    options: Callable[[Path, str, int, Scalars], dict[str, Any]]
    """Arguments of Accelerate's class, from the run's log folder, the id of the tracker's run, the step that the run
    starts or resumes from, and the run's settings."""
    show: Callable[[Any, str, Pixels, int], None]
    """Log a picture to an object of Accelerate's class, by name and step."""


def _tensorboard(log: Path, run_id: str, step: int, settings: Scalars) -> dict[str, Any]:
    return {"run_name": "tensorboard", "logging_dir": str(log), "purge_step": step + 1}


def _wandb(log: Path, run_id: str, step: int, settings: Scalars) -> dict[str, Any]:
    return {"run_name": PROJECT, "name": log.parent.name, "id": run_id, "dir": str(log), "resume": "allow"}


def _trackio(log: Path, run_id: str, step: int, settings: Scalars) -> dict[str, Any]:
    # Settings that come after the start, which is how Accelerate passes them, are lost. Rows that were logged after the
    # last checkpoint stand twice, with the same values.
    name = f"{log.parent.name}-{run_id}"
    return {"run_name": PROJECT, "name": name, "resume": "allow", "embed": False, "config": settings}


def _show_in_trackio(tracker: Any, name: str, pixels: Pixels, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(pixels)}, step=step)


TRACKERS = {
    "tensorboard": TrackerKind(
        options=_tensorboard,
        show=lambda tracker, name, pixels, step: tracker.log_images(
            {name: pixels[None]}, step=step, dataformats="NHWC"
        ),
    ),
    "wandb": TrackerKind(
        options=_wandb, show=lambda tracker, name, pixels, step: tracker.log_images({name: [pixels]}, step=step)
    ),
    "trackio": TrackerKind(options=_trackio, show=_show_in_trackio),
}


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        UsageError: one isn't installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"train.trackers: {name} isn't installed: `pip install {name}`, or take it off the list")


class Trackers:
    """The trackers of one run, open for logging. One that fails later is dropped with a warning: training goes on.

    Args:
        names: keys of `TRACKERS`.
        log: the log folder of the run, which remembers the trackers' runs.
        step: that the run starts or resumes from.
        identity: of the run, as in `run.json`; trackers show it as configuration.
        reporter: shows warnings.
    """

    def __init__(
        self, names: Sequence[str], log: Path, *, step: int, identity: Mapping[str, Any], reporter: Reporter
    ) -> None:
        self._names, self._log, self._step, self._reporter = names, log, step, reporter
        self._settings = flat(identity)
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Start each tracker, or continue its run.

        Raises:
            TrainingError: one refuses, such as for lack of a login.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        record = self._log / RECORD
        known: dict[str, str] = json.loads(record.read_bytes()) if record.is_file() else {}
        for name in self._names:
            run_id = known.get(name) or secrets.token_hex(4)
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](
                    **TRACKERS[name].options(self._log, run_id, self._step, self._settings)
                )
                tracker.start()
                if name not in known:
                    tracker.store_init_configuration(self._settings)
            except Exception as error:  # whatever a tracker and its network raise
                self.__exit__()
                raise TrainingError(
                    f"train.trackers: {name} didn't start ({_first_line(error)}): set it up as its manual says, or "
                    "take it off the list"
                ) from error
            self._open[name] = tracker
            known[name] = run_id
            write_json(record, known)
        return self

    def __exit__(self, *error: Any) -> None:
        for name in [*self._open]:
            self._guarded(name, lambda tracker: tracker.finish())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step's metrics."""
        for name in [*self._open]:
            self._guarded(name, lambda tracker: tracker.log(dict(values), step=step))

    def show(self, step: int, name: str, picture: Path) -> None:
        """Log a picture, a PNG file."""
        if self._open:
            from PIL import Image

            pixels = np.asarray(Image.open(picture).convert("RGB"))
            for kind in [*self._open]:
                self._guarded(kind, TRACKERS[kind].show, name, pixels, step)

    def _guarded(self, name: str, use: Callable[..., None], *values: Any) -> None:
        try:
            use(self._open[name], *values)
        except Exception as error:  # hours of training must not end because a tracker's server does
            del self._open[name]
            self._reporter.say(f"{name} failed and gets nothing more ({_first_line(error)}); training goes on")


def flat(values: Mapping[str, Any], prefix: str = "") -> Scalars:
    """Nested settings by dotted names; null and lists become text, since trackers take scalars only."""
    result: Scalars = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            result |= flat(value, f"{name}.")
        else:
            result[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return result


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
