"""Off a terminal: a line per minute of work, with what is done, rate, time left and the last note."""

import re
from pathlib import Path

import pytest

from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.evaluate import main as evaluate_command
from advkd.pipeline.cli.teacher import main as teacher_command
from advkd.pipeline.cli.train import main as train_command
from advkd.pipeline.progress import SECONDS_PER_LINE, TerminalReporter
from advkd.stages.metrics.classifier import SmallClassifier, save_classifier
from tests.conftest import Invoke


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_line_per_minute_says_rate_time_left_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with TerminalReporter(clock) as reporter:
        reporter.start("train", 6000, "steps", done=1000)
        for step in range(1, 5001):
            clock.now += 0.1
            reporter.advance(1, f"loss {step}" if step % 500 == 0 else "")
        reporter.finish()
    lines = lines_of(capsys)
    assert len(lines) == 8  # 500 seconds
    for minute, line in enumerate(lines, 1):
        done, total, rate, left, loss = re.findall(r"\d[\d,.]*", line)
        assert int(done.replace(",", "")) == pytest.approx(1000 + 600 * minute, abs=minute)
        assert (total, rate) == ("6,000", "10")
        assert float(left) == pytest.approx((500 - 60 * minute) / (60 if "min" in line else 1), abs=1)
        assert int(loss) == 600 * minute // 500 * 500


def test_short_work_and_slow_work(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with TerminalReporter(clock) as reporter:
        reporter.start("cache", 10, "blocks")
        for _ in range(3):
            clock.now += SECONDS_PER_LINE * 0.3
            reporter.advance()
        assert lines_of(capsys) == []
        clock.now += 2 * 3600
        reporter.advance()
        (line,) = lines_of(capsys)
        assert "4 of 10 blocks" in line and re.search(r"about [\d.]+ h left", line)
        reporter.finish()
        clock.now += 3600
        reporter.start("verify", 10, "bytes")
        reporter.advance(10)
        assert lines_of(capsys) == []
        clock.now += SECONDS_PER_LINE
        reporter.advance(0)
        (line,) = lines_of(capsys)
        assert line.startswith("verify: 10 of 10 bytes") and "left" not in line


def test_every_long_command_reports(invoke: Invoke, toy_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advkd.pipeline.progress.SECONDS_PER_LINE", 0.0)
    save_classifier(Path("classifier"), SmallClassifier(1, 8, 10).eval(), {})
    store = "cache/toy.zarr"
    for command, arguments, unit in (
        (cache_command, ("build", "--config", toy_yaml), "evaluations"),
        (cache_command, ("verify", store), "bytes"),
        (cache_command, ("verify", store, "--recompute", 1), "evaluations"),
        (cache_command, ("subset", store, "--seeds", "0:64", "--out", "part.zarr"), "blocks"),
        (cache_command, ("merge", store, "part.zarr", "--out", "both.zarr"), "blocks"),
        (cache_command, ("pack", store, "--out", "packed.zarr"), "bytes"),
        (cache_command, ("unpack", "packed.zarr", "--out", "unpacked.zarr"), "bytes"),
        (train_command, ("--cache", store, "--config", toy_yaml), "steps"),
        (evaluate_command, ("--cache", store, "--config", toy_yaml, "--run", "runs/toy"), "evaluations"),
        (teacher_command, ("--config", "smoke"), "steps"),
    ):
        result = invoke(command, *arguments)
        assert result.exit_code == 0, result.output
        lines = re.findall(rf"^[\w ]+: [\d,]+ of [\d,]+ {unit}, [\d,.e+]+ {unit}/s.*$", result.stderr, re.MULTILINE)
        assert lines, f"{arguments}: {result.stderr}"
        assert unit != "steps" or "loss" in "".join(lines) or "mse" in "".join(lines), lines
