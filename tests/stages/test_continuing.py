"""Runs that go on under other circumstances: more or fewer processes, more steps, a cache that has grown."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from advkd.cache.errors import TrainingError, UsageError
from advkd.stages.reporter import SilentReporter
from advkd.stages.student.config import KINDS, StudentConfig
from advkd.stages.student.hub import Student
from advkd.stages.student.run import Run
from advkd.stages.student.student import weights_sha256
from advkd.stages.student.train import train
from tests.conftest import ROOT
from tests.stages.test_descent import CONFIG, SAME, apart, launch
from tests.stages.test_train import PROGRESSIVE, UNROLLED, outcome
from tests.stores import write_store

ADVERSARIAL = CONFIG.objective.adversarial
DOUBLED = dataclasses.replace(
    CONFIG,
    batch_size=32,
    objective=dataclasses.replace(CONFIG.objective, adversarial=dataclasses.replace(ADVERSARIAL, fresh=16)),
)
LONGER = dataclasses.replace(UNROLLED, steps=18)


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    return record


def segments_of(run: Path) -> list[tuple[int, int, int]]:
    return [(part["step"], part["processes"], part["steps"]) for part in record_of(run)["segments"]]


def test_a_run_keeps_its_global_batch_with_another_number_of_processes(store: Path, tmp_path: Path) -> None:
    """Two real processes, then one; one, then two: both are the run of one process."""
    train(store, DOUBLED, tmp_path / "one")
    launch(store, CONFIG, tmp_path / "fewer", 4)
    train(store, CONFIG, tmp_path / "fewer")
    train(store, DOUBLED, tmp_path / "more", max_steps=4)
    launch(store, DOUBLED, tmp_path / "more", 8)
    for name, processes in (("fewer", (2, 1)), ("more", (1, 2))):
        assert apart(tmp_path / "one", tmp_path / name) < SAME
        assert segments_of(tmp_path / name) == [(0, processes[0], 8), (4, processes[1], 8)]
        assert record_of(tmp_path / name)["global_batch"] == 32
        assert record_of(tmp_path / name)["identity"]["processes"] == processes[0]
        known = Student.from_pretrained(tmp_path / name).provenance["segments"]
        assert known == record_of(tmp_path / name)["segments"]


def test_a_progressive_run_keeps_its_own_schedule(store: Path, tmp_path: Path) -> None:
    """`train.steps` has no effect on it, so more of them are no way to prolong it."""
    train(store, PROGRESSIVE, tmp_path / "run")
    before = record_of(tmp_path / "run")
    assert before["status"] == "complete" and before["global_batch"] is None
    with pytest.raises(UsageError, match=r"another run \(config.steps: 12 → 18\)"):
        train(store, dataclasses.replace(PROGRESSIVE, steps=18), tmp_path / "run")
    assert record_of(tmp_path / "run") == before


def test_a_global_batch_is_divided_evenly_or_not_at_all() -> None:
    kind = KINDS["unrolled"]
    divided = kind.divided(CONFIG, 6, 4)
    assert (divided.batch_size, divided.objective.adversarial.fresh) == (24, 12)
    assert kind.divided(CONFIG, 2, 2) is CONFIG
    with pytest.raises(UsageError, match=r"2 processes with 16 seeds .*divides 16$"):
        kind.divided(CONFIG, 2, 3)
    with pytest.raises(UsageError, match=r"divides 1$"):
        kind.divided(dataclasses.replace(CONFIG, accumulate=16), 1, 2)


@pytest.mark.parametrize("stop", [None, 14])
def test_more_steps_prolong_a_finished_run(store: Path, tmp_path: Path, stop: int | None) -> None:
    """From its last checkpoint, under the schedule of the longer run, however often it is interrupted."""
    for name in ("whole", "parts"):
        train(store, UNROLLED, tmp_path / name)
    if stop:
        assert train(store, LONGER, tmp_path / "parts", max_steps=stop).step == stop
    for name in ("whole", "parts"):
        trained = train(store, LONGER, tmp_path / name)
        assert (trained.step, trained.complete) == (18, True)
        assert segments_of(tmp_path / name) == [(0, 1, 12), (12, 1, 18)]
        assert record_of(tmp_path / name)["status"] == "complete"
        assert train(store, LONGER, tmp_path / name).held_out_mse == trained.held_out_mse
    assert outcome(tmp_path / "whole")[1] == outcome(tmp_path / "parts")[1]
    train(store, LONGER, tmp_path / "anew")
    assert outcome(tmp_path / "anew")[1] != outcome(tmp_path / "whole")[1]
    assert segments_of(tmp_path / "anew") == [(0, 1, 18)]


def test_only_a_finished_run_is_prolonged_and_only_by_more_steps(store: Path, tmp_path: Path) -> None:
    train(store, UNROLLED, tmp_path / "run", max_steps=5)
    with pytest.raises(UsageError, match=r"finish it first .*train\.steps=12"):
        train(store, LONGER, tmp_path / "run")
    train(store, UNROLLED, tmp_path / "run")
    for other in (dataclasses.replace(UNROLLED, steps=11), dataclasses.replace(LONGER, learning_rate=0.1)):
        with pytest.raises(UsageError, match="holds another run"):
            train(store, other, tmp_path / "run")
    before = outcome(tmp_path / "run")
    Run(tmp_path / "run").checkpoint.rename(tmp_path / "away")
    with pytest.raises(TrainingError, match=r"last\.safetensors is missing"):
        train(store, LONGER, tmp_path / "run")
    assert outcome(tmp_path / "run") == before
    (tmp_path / "away").rename(Run(tmp_path / "run").checkpoint)
    # `dvc repro` must not depend on what an earlier run left.
    train(store, LONGER, tmp_path / "run", on_mismatch="set-aside")
    assert segments_of(tmp_path / "run") == [(0, 1, 18)] and segments_of(tmp_path / "run.old-1") == [(0, 1, 12)]


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_run_stays_on_its_seeds_when_the_cache_grows(store: Path, tmp_path: Path) -> None:
    for name in ("before", "after"):
        train(store, UNROLLED, tmp_path / name)
    train(store, LONGER, tmp_path / "before")
    write_store(store, "256:512")
    listener = Listener()
    assert train(store, UNROLLED, tmp_path / "after", reporter=listener).complete
    assert "seeds 0:256; the cache has grown to 0:512" in listener.lines[-1]
    listener.lines.clear()
    train(store, LONGER, tmp_path / "after", reporter=listener)
    assert any("keeps its seeds 0:256; the cache has grown to 0:512" in line for line in listener.lines)
    assert outcome(tmp_path / "after") == outcome(tmp_path / "before")
    known = Student.from_pretrained(tmp_path / "after").provenance
    assert (known["seeds"]["last"], known["cache"]["blocks"]) == (255, [0, 16])
    # Blocks that changed are no growth.
    record = record_of(tmp_path / "after")
    record["identity"]["cache"]["digest"] = "0" * 64
    (tmp_path / "after/run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"another run \(cache.digest"):
        train(store, LONGER, tmp_path / "after")
    assert train(store, UNROLLED, tmp_path / "after", on_mismatch="set-aside").complete
    assert Student.from_pretrained(tmp_path / "after").provenance["seeds"]["last"] == 511


def test_runs_from_before_segments_go_on(store: Path, tmp_path: Path) -> None:
    for config, name in ((UNROLLED, "unrolled"), (PROGRESSIVE, "progressive")):
        train(store, config, tmp_path / f"{name}-whole")
        train(store, config, tmp_path / name, max_steps=5)
        record = record_of(tmp_path / name)
        (tmp_path / name / "run.json").write_text(
            json.dumps({key: value for key, value in record.items() if key not in ("segments", "global_batch")})
        )
        train(store, config, tmp_path / name)
        assert outcome(tmp_path / name)[1] == outcome(tmp_path / f"{name}-whole")[1]


def command(*launcher: str, store: Path, run: Path) -> subprocess.CompletedProcess[str]:
    (run.parent / "small.yaml").write_text(
        "name: small\nteacher: {source: none}\ntrain: {steps: 4, batch_size: 16, student: {width: 8, depth: 1},"
        " objective: {adversarial: {width: 4}}}\n"
    )
    program = [str(Path(sys.executable).with_name("advkd-train")), "--cache", str(store), "--run", str(run)]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *program, "--config", "small.yaml"],
        cwd=run.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_torchrun_leaves_our_flags_to_us(store: Path, tmp_path: Path) -> None:
    """Without `--` it takes `--run` as short for one of its own."""
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--")
    done = command(*launcher, store=store, run=tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step 4 of 4") == 1
    record = record_of(tmp_path / "two")
    assert (record["identity"]["processes"], record["global_batch"], record["status"]) == (2, 32, "complete")


def test_a_launcher_that_starts_too_few_processes_is_refused(store: Path, tmp_path: Path) -> None:
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    done = command(*launcher, store=store, run=tmp_path / "one")
    assert done.returncode != 0 and not (tmp_path / "one").exists()
    assert "torchrun --nproc-per-node" in done.stderr, done.stderr[-2000:]


def test_a_run_starts_from_an_earlier_students_weights(store: Path, tmp_path: Path) -> None:
    """It begins where the other ended, knows its weights, and starts over where they have changed."""
    train(store, UNROLLED, tmp_path / "first")
    later = dataclasses.replace(UNROLLED, start=str(tmp_path / "first"), learning_rate=1e-9, kernel_learning_rate=1e-9)
    later = dataclasses.replace(later, steps=2, weight_decay=0.0, ema=0.0)
    train(store, later, tmp_path / "second")
    ended = Student.from_pretrained(tmp_path / "first").state_dict()
    for name, tensor in Student.from_pretrained(tmp_path / "second").state_dict().items():
        torch.testing.assert_close(tensor, ended[name], rtol=0.0, atol=1e-6)
    known = Student.from_pretrained(tmp_path / "second").provenance
    assert known["start"] == weights_sha256(tmp_path / "first/student")
    assert "start" not in record_of(tmp_path / "first")["identity"]["config"]
    assert train(store, later, tmp_path / "second").complete
    train(store, LONGER, tmp_path / "first")
    with pytest.raises(UsageError, match=r"second holds another run .*start"):
        train(store, later, tmp_path / "second")


def test_a_start_that_does_not_fit_is_refused(store: Path, tmp_path: Path) -> None:
    train(store, UNROLLED, tmp_path / "first")
    wider = dataclasses.replace(UNROLLED, start=str(tmp_path / "first"), student=StudentConfig(width=16, depth=1))
    with pytest.raises(UsageError, match=r"train.start: .*first is a student of another architecture"):
        train(store, wider, tmp_path / "second")
    with pytest.raises(TrainingError, match="no student in"):
        train(store, dataclasses.replace(UNROLLED, start="nowhere"), tmp_path / "second")
    assert not (tmp_path / "second").exists()
