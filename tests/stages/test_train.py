"""Training: from the cache alone, resumable to the digit, and never over another run."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from advkd.cache.errors import NotCachedError, TrainingError, UsageError
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.reporter import SilentReporter
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.progressive.config import StagesConfig
from advkd.stages.student.run import Run, split_seeds
from advkd.stages.student.student import generate, load_student
from advkd.stages.student.train import _images_in_words as images_in_words
from advkd.stages.student.train import train
from advkd.stages.student.training.data import read_float
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig
from tests.conftest import ROOT
from tests.stores import make_recipe, write_store

UNROLLED = TrainConfig(
    student=StudentConfig(width=8, depth=1),
    objective=ObjectiveConfig(adversarial=AdversarialConfig(width=4, start=0.4, penalty_every=2)),
    steps=12,
    batch_size=16,
    log_every=2,
    preview_every=6,
    checkpoint_every=4,
)
PROGRESSIVE = dataclasses.replace(
    UNROLLED,
    student=StudentConfig(kind="progressive", base_channels=4),
    stages=StagesConfig(epochs=[1], batch_sizes=[40, 48]),
)


def metrics(run: Path) -> dict[str, str]:
    return {str(path.relative_to(run)): path.read_text() for path in sorted((run / "log").rglob("*.tsv"))}


def outcome(run: Path) -> tuple[dict[str, str], bytes]:
    return metrics(run), (run / "student/model.safetensors").read_bytes()


@pytest.mark.parametrize("config", [UNROLLED, PROGRESSIVE], ids=["unrolled", "progressive"])
def test_a_run_leaves_all_that_it_promises(store: Path, tmp_path: Path, config: TrainConfig) -> None:
    trained = train(store, config, tmp_path / "run")
    assert trained.complete
    assert np.isfinite(trained.held_out_mse)
    assert trained.preview is not None and trained.preview.is_file()
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "complete"
    assert record["identity"]["cache"]["fingerprint"] == TrajectoryCache.open(store).recipe.fingerprint
    assert {"train/loss.tsv", "held_out/mse.tsv", "train/generator.tsv", "train/critic.tsv"} <= {
        name.removeprefix("log/plots/metrics/") for name in metrics(tmp_path / "run")
    }
    again = train(store, config, tmp_path / "run")
    assert (again.step, again.held_out_mse) == (trained.step, trained.held_out_mse)


@pytest.mark.parametrize("config", [UNROLLED, PROGRESSIVE], ids=["unrolled", "progressive"])
@pytest.mark.parametrize("stops", [[3], [4, 9], [6]])
def test_going_on_gives_the_uninterrupted_run_to_the_digit(
    store: Path, tmp_path: Path, config: TrainConfig, stops: list[int]
) -> None:
    train(store, config, tmp_path / "whole")
    for stop in stops:
        trained = train(store, config, tmp_path / "parts", max_steps=stop)
        assert (trained.step, trained.complete) == (stop, False)
    train(store, config, tmp_path / "parts", resume=True)
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert whole[1] == parts[1]
    for name, text in whole[0].items():
        rows = dict(line.split("\t") for line in text.splitlines())
        resumed = dict(line.split("\t") for line in parts[0][name].splitlines())
        # A stop between two logs adds a row and splits one average; all others are equal.
        split = {str(stop) for stop in stops} | {str(stop + stop % 2) for stop in stops}
        assert {k: v for k, v in rows.items() if k not in split} == {k: v for k, v in resumed.items() if k not in split}


def test_a_crash_repeats_from_the_last_checkpoint(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at step 7 of 12 with a checkpoint at 4: the metrics of steps 5 to 7 are logged once."""
    from advkd.stages.student.unrolled.program import UnrolledProgram

    train(store, UNROLLED, tmp_path / "whole")
    original = UnrolledProgram.step

    def crash(self: UnrolledProgram, batch: object, phase: int, step: int) -> object:
        if step == 7:
            raise SystemError("killed")
        return original(self, batch, phase, step)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(UnrolledProgram, "step", crash)
        with pytest.raises(SystemError):
            train(store, UNROLLED, tmp_path / "run")
    train(store, UNROLLED, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_stop_request_saves_first(store: Path, tmp_path: Path) -> None:
    calls = iter([False, False, True])
    trained = train(store, UNROLLED, tmp_path / "run", should_stop=lambda: next(calls))
    assert (trained.step, trained.complete) == (3, False)
    assert train(store, UNROLLED, tmp_path / "run").complete


def test_the_same_seed_gives_the_same_run(store: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(store, UNROLLED, tmp_path / name)
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    train(store, dataclasses.replace(UNROLLED, seed=1), tmp_path / "three")
    assert outcome(tmp_path / "one") != outcome(tmp_path / "three")


def test_an_unfinished_run_ends_on_the_seeds_it_began_with(store: Path, tmp_path: Path) -> None:
    train(store, UNROLLED, tmp_path / "whole")
    train(store, UNROLLED, tmp_path / "run", max_steps=5)
    write_store(store, "256:512")
    train(store, UNROLLED, tmp_path / "run")
    assert outcome(tmp_path / "run")[1] == outcome(tmp_path / "whole")[1]


def test_divergence_stops_with_the_last_good_checkpoint_named(store: Path, tmp_path: Path) -> None:
    wild = dataclasses.replace(UNROLLED, learning_rate=1e30, gradient_clip=0.0, warmup=0.0)
    with pytest.raises(TrainingError, match=r"diverged: .*nan by step \d+; the last good .*lower the learning rates"):
        train(store, wild, tmp_path / "run")
    # Checkpoints come more often than logs here: what is not finite is still never kept.
    rare = dataclasses.replace(wild, log_every=10, checkpoint_every=2)
    with pytest.raises(TrainingError, match=r"diverged: .*nan by step 2; .* none yet"):
        train(store, rare, tmp_path / "rare")
    assert not Run(tmp_path / "rare").checkpoint.exists()
    # Nor are weights that the step after the last reading spoiled.
    wilder = dataclasses.replace(wild, learning_rate=1e39, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"weights of the student are not finite by step 1; .* none yet"):
        train(store, wilder, tmp_path / "wilder")
    assert not Run(tmp_path / "wilder").checkpoint.exists()


def test_a_finished_run_needs_no_checkpoint(store: Path, tmp_path: Path) -> None:
    """As `dvc pull` brings it."""
    done = train(store, UNROLLED, tmp_path / "run")
    Run(tmp_path / "run").checkpoint.unlink()
    assert train(store, UNROLLED, tmp_path / "run").held_out_mse == pytest.approx(done.held_out_mse, rel=1e-5)


def test_torn_logs_do_not_stop_a_resume(store: Path, tmp_path: Path) -> None:
    train(store, UNROLLED, tmp_path / "whole")
    train(store, UNROLLED, tmp_path / "run", max_steps=4)
    (tmp_path / "run/log/metrics.json").write_text('{"train": {"lo')
    with (tmp_path / "run/log/plots/metrics/train/loss.tsv").open("a") as file:
        file.write("\n6\n8\t")
    train(store, UNROLLED, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_stochastic_cache_with_a_paired_loss_is_refused_with_the_reason(tmp_path: Path) -> None:
    sampler = {**make_recipe().sampler, "name": "ddpm", "deterministic": False}
    write_store(tmp_path / "ddpm.zarr", "0:256", sampler=sampler)
    with pytest.raises(UsageError, match=r"ddpm, which draws noise at every step: x_T does not determine x_0"):
        train(tmp_path / "ddpm.zarr", UNROLLED, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "ddpm.zarr", PROGRESSIVE, tmp_path / "run").complete


def test_a_stochastic_ddim_is_refused_with_its_eta(tmp_path: Path) -> None:
    sampler = {**make_recipe().sampler, "eta": 1.0, "deterministic": False}
    write_store(tmp_path / "ddim.zarr", "0:256", sampler=sampler)
    with pytest.raises(UsageError, match=r"ddim and eta 1, which draws noise"):
        train(tmp_path / "ddim.zarr", UNROLLED, tmp_path / "run")


def test_training_names_the_range_of_the_caches_images(store: Path, tmp_path: Path) -> None:
    """A range that is far from [−1, 1] explains a run that diverges."""
    said: list[str] = []

    class Listener(SilentReporter):
        def say(self, text: str) -> None:
            said.append(text)

    train(store, UNROLLED, tmp_path / "run", max_steps=1, reporter=Listener())
    cache = TrajectoryCache.open(store)
    x_0 = cache.rows(max(cache.states), cache.seeds())
    assert f"x_0 in {store}: values from {x_0.min():+.2f} to {x_0.max():+.2f}" in said
    half = range(0, len(cache.blocks), 2)
    some = images_in_words(cache, cache.blocks, max_records=len(half))
    assert some.endswith(f", in {len(half)} of {len(cache.blocks)} blocks")


def test_empty_and_partial_caches_are_refused(store: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "empty.zarr", "0:16")
    (tmp_path / "empty.zarr/blocks/000000.json").unlink()
    with pytest.raises(NotCachedError, match=r"is empty \(0 of 1 blocks\): finish it"):
        train(tmp_path / "empty.zarr", UNROLLED, tmp_path / "run")
    (store / "blocks/000005.json").unlink()
    with pytest.raises(NotCachedError, match=r"15 of the 16 blocks .* block 5 \(seeds 80:96\)"):
        train(store, UNROLLED, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(store, dataclasses.replace(UNROLLED, seeds="96:256"), tmp_path / "run").complete
    with pytest.raises(UsageError, match="batch_size 100 exceeds the"):
        train(store, dataclasses.replace(UNROLLED, seeds="96:128", batch_size=100), tmp_path / "small")


def test_only_the_states_in_use_are_read(store: Path, tmp_path: Path) -> None:
    """Regression on x_0 alone needs neither the states between nor their files."""
    import shutil

    shutil.rmtree(store / "states/0002")
    unheard = AdversarialConfig(width=4, weight=0.0, judged="each")
    for index, adversarial in enumerate((UNROLLED.objective.adversarial, unheard)):
        objective = ObjectiveConfig(state=0.0, head_target="x0", adversarial=adversarial)
        assert train(store, dataclasses.replace(UNROLLED, objective=objective), tmp_path / f"run-{index}").complete
    with pytest.raises(NotCachedError, match="state 0002 is not here"):
        train(store, UNROLLED, tmp_path / "other")


def test_training_needs_neither_diffusers_nor_the_teachers_stage(store: Path, tmp_path: Path) -> None:
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers") or name.startswith("advkd.stages.teacher"):
            raise ImportError("training must not import " + name)
sys.meta_path.insert(0, Refuse())
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from pathlib import Path
from tests.stages.test_train import UNROLLED, train
print(train(Path({str(store)!r}), UNROLLED, Path({str(tmp_path / "run")!r})).complete)
print(any(name.split(".")[0] == "diffusers" for name in sys.modules), any("teachers/" in path for path in opened))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["True", "False", "False"], result.stderr


def test_a_student_that_normalises_over_its_batch_is_trained_in_one_process(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advkd.stages.student.training.distributed.ProcessGroup.world_size", 2)
    monkeypatch.setattr("advkd.stages.student.training.distributed.ProcessGroup.broadcast", lambda self, value: value)
    with pytest.raises(UsageError, match="2 processes would train another student"):
        train(store, PROGRESSIVE, tmp_path / "run")


def test_half_precision_without_a_gpu_is_refused(store: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        assert train(store, dataclasses.replace(UNROLLED, mixed_precision="fp16"), tmp_path / "run").complete
        return
    with pytest.raises(UsageError, match="fp16 doesn't work here"):
        train(store, dataclasses.replace(UNROLLED, mixed_precision="fp16"), tmp_path / "run")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_compiled_training_takes_the_critics_penalties(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of gradients, which compiled passes don't have; the backend that is asked for here compiles quickly."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    train(store, dataclasses.replace(UNROLLED, compile=True), tmp_path / "compiled")
    train(store, UNROLLED, tmp_path / "plain")
    last = {name: text.splitlines()[-1].split() for name, text in metrics(tmp_path / "plain").items()}
    for name, text in metrics(tmp_path / "compiled").items():
        step, value = text.splitlines()[-1].split()[-2:]
        assert step == last[name][-2] and float(value) == pytest.approx(float(last[name][-1]), rel=0.02, abs=1e-3)


def test_every_checkpoint_has_been_looked_at(store: Path, tmp_path: Path) -> None:
    """Where they come between two rows of the log they have a row of their own, so that no reading is lost."""
    config = dataclasses.replace(UNROLLED, log_every=5, checkpoint_every=4)
    train(store, config, tmp_path / "run")
    rows = (tmp_path / "run/log/plots/metrics/train/loss.tsv").read_text().splitlines()[1:]
    assert [int(row.split()[0]) for row in rows] == [4, 5, 8, 10, 12]


def test_progressive_takes_any_seed_that_a_run_may_have(store: Path, tmp_path: Path) -> None:
    assert train(store, dataclasses.replace(PROGRESSIVE, seed=(1 << 31) - 1), tmp_path / "run", max_steps=2).step == 2


def test_an_exploded_error_stops_the_run(store: Path, tmp_path: Path) -> None:
    wild = dataclasses.replace(UNROLLED, learning_rate=30.0, gradient_clip=0.0, warmup=0.0, optimizer="adamw")
    with pytest.raises(TrainingError, match=r"diverged: .*by step \d+; the last good"):
        train(store, wild, tmp_path / "run")


def test_the_best_student_is_kept_beside_the_last(store: Path, tmp_path: Path) -> None:
    """The best on held-out seeds, also where a run was stopped after it."""
    config = dataclasses.replace(UNROLLED, preview_every=2)
    train(store, config, tmp_path / "run", max_steps=7)
    train(store, config, tmp_path / "run")
    rows = (tmp_path / "run/log/plots/metrics/held_out/mse.tsv").read_text().splitlines()[1:]
    scores = {int(step): float(value) for step, value in (row.split("\t") for row in rows)}
    assert sorted(scores) == [2, 4, 6, 8, 10, 12]
    cache, run = TrajectoryCache.open(store), Run(tmp_path / "run")
    held_out = split_seeds(cache, None).held_out[:256]
    real = read_float(cache, 4, held_out)
    best = generate(load_student(run.best)[0], read_float(cache, 0, held_out))
    assert float((best - real).square().mean()) == pytest.approx(min(scores.values()), rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(regression="mse", head_weighting="snr", perceptual=0.1, adversarial=AdversarialConfig(width=4)),
        ObjectiveConfig(adversarial=AdversarialConfig(width=4, judged="shared", scales=2, conditional=True, fresh=0)),
        ObjectiveConfig(state=0.0, heads=0.0, adversarial=AdversarialConfig(width=4, judged="each", loss="hinge")),
    ],
    ids=["mse-snr-perceptual", "shared", "each"],
)
def test_every_objective_trains_and_resumes(store: Path, tmp_path: Path, objective: ObjectiveConfig) -> None:
    config = dataclasses.replace(UNROLLED, objective=objective, ema_width=0.1)
    train(store, config, tmp_path / "whole")
    train(store, config, tmp_path / "parts", max_steps=8)
    train(store, config, tmp_path / "parts")
    assert outcome(tmp_path / "whole")[1] == outcome(tmp_path / "parts")[1]
    metrics_now = json.loads((tmp_path / "whole/log/metrics.json").read_text())["train"]
    assert {"generator", "critic", "x0"} <= metrics_now.keys()
    assert ("perceptual" in metrics_now) is (objective.perceptual > 0)


def test_lpips_is_for_colour_images(store: Path, tmp_path: Path) -> None:
    objective = ObjectiveConfig(perceptual=1.0, perceptual_features="lpips")
    with pytest.raises(UsageError, match="colour images of at least 32 pixels, these are 1×8×8"):
        train(store, dataclasses.replace(UNROLLED, objective=objective), tmp_path / "run")
