"""Ctrl-C and SIGTERM: one asks for a stop, whoever passes it on; only an impatient person interrupts."""

import os
import signal
from pathlib import Path

import pytest

from advkd.cache.files import interrupts
from advkd.cache.files.interrupts import StopRequest
from advkd.pipeline.cli import cache_look, evaluate
from tests.conftest import Invoke


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_launcher_passes_on_is_the_same_one(number: int) -> None:
    with StopRequest() as stop:
        assert not stop()
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop()


def test_a_second_ctrl_c_interrupts_and_a_second_sigterm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "PASSED_ON", -1.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_who_is_stopped_is_told_whether_the_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("advkd.cache.read.reader.TrajectoryCache.open", stopped)
    scoring = invoke(evaluate.main, "--run", tmp_path, "--cache", tmp_path)
    looking = invoke(cache_look.info, tmp_path)
    assert scoring.exit_code == looking.exit_code == 130
    assert "stopped. To start again: " in scoring.output
    assert "what was committed is kept. To resume: " in looking.output
    (tmp_path / "mu.npz").touch()
    monkeypatch.setattr("advkd.cache.read.reader.TrajectoryCache.open", lambda _: None)
    monkeypatch.setattr("advkd.stages.evaluate.fid.fid", stopped)
    quoted = invoke(evaluate.main, "--run", tmp_path, "--cache", tmp_path, "--fid-statistics", tmp_path / "mu.npz")
    assert quoted.exit_code == 130 and "is kept. To resume: " in quoted.output
