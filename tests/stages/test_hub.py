"""Students that leave home: saved, published and loaded again, what their cards say, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.hub import Student
from advkd.stages.student.student import build_student, save_student, weights_sha256
from advkd.stages.student.train import train
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig
from tests.pipeline.servers import model_hub
from tests.stages.test_student import geometry
from tests.stores import tree, write_store

SMALL = StudentConfig(width=8, depth=1)
CONFIG = TrainConfig(
    student=SMALL, steps=4, batch_size=16, log_every=2, preview_every=4, checkpoint_every=2, seed=7,
    objective=ObjectiveConfig(adversarial=AdversarialConfig(width=4)),
)  # fmt: skip
SCORES: dict[str, Any] = {
    "protocol": {"num_sets": 5, "set_size": 2048, "num_reference": 8192, "features": "small-cnn"},
    "held_out_mse": 0.0123,
    "samplers": {
        "ddim 5": {
            "evaluations": 5, "x0": "x̂_0 clipped to [−1, 1]", "frechet": [50.0, 61.0, 72.0],
            "scores": {"precision": {"sets": [0.94, 0.95, 0.96]}, "recall": {"sets": [0.77, 0.78, 0.82]}},
        },
        "student": {"evaluations": 1, "frechet": [19.0, 20.0, 21.0]},
        "teacher (ddim 50)": {"evaluations": 50, "frechet": [17.0, 18.0, 19.0]},
        "ddim 10": {"evaluations": 10, "frechet": None},
    },
}  # fmt: skip


def make_student(channels: int = 1, kind: str = "unrolled", **provenance: Any) -> Student:
    torch.manual_seed(3)
    config = StudentConfig(kind=kind, width=8, depth=1)
    network = build_student(config, geometry(channels=channels)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Student(network, config, geometry(channels=channels), provenance).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, and a finished run on it with scores that are made up."""
    folder = tmp_path_factory.mktemp("trained")
    write_store(folder / "toy.zarr", "0:256")
    train(folder / "toy.zarr", CONFIG, folder / "runs/toy")
    identity = json.loads((folder / "runs/toy/run.json").read_text())["identity"]
    (folder / "runs/toy/evaluation").mkdir()
    told = {"student": identity, "weights_sha256": weights_sha256(folder / "runs/toy/student"), **SCORES}
    (folder / "runs/toy/evaluation/scores.json").write_text(json.dumps(told))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run to change."""
    return Path(shutil.copytree(trained / "runs/toy", tmp_path / "runs/toy"))


def same(one: Student, other: Student) -> bool:
    noise = one.noise([0, 1, 2**40])
    assert one.geometry == other.geometry and one.config == other.config
    return torch.equal(one(noise), other(noise))


@pytest.mark.parametrize("kind", ["unrolled", "progressive"])
@pytest.mark.parametrize("channels", [1, 3])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, kind: str, channels: int) -> None:
    student = make_student(channels, kind, cache={"fingerprint": "f" * 64})
    student.save_pretrained(tmp_path / "out")
    loaded = Student.from_pretrained(tmp_path / "out")
    assert same(student, loaded) and not loaded.training
    assert loaded.provenance == {"format": 1, "cache": {"fingerprint": "f" * 64}}
    assert [head.shape for head in loaded.heads(student.noise([4]))][-1] == (1, channels, 16, 16)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "provenance.json"]


def test_what_training_writes_loads_and_knows_where_it_comes_from(trained: Path, run: Path, tmp_path: Path) -> None:
    """The run's folder and the student's in it are both what from_pretrained takes; a copy keeps all that is known."""
    cache = TrajectoryCache.open(trained / "toy.zarr")
    student = Student.from_pretrained(run)
    assert same(student, Student.from_pretrained(run / "student"))
    known = student.provenance
    assert known["cache"]["fingerprint"] == cache.recipe.fingerprint
    assert known["cache"]["digest"] == cache.digest_of(range(16)) and known["cache"]["blocks"] == [0, 16]
    assert known["seeds"]["num_training"] + known["seeds"]["num_held_out"] == 256
    assert (known["seeds"]["first"], known["seeds"]["last"], known["step"]) == (0, 255, 4)
    assert known["config"]["seed"] == 7 and "torch" in known["versions"]
    assert known["scores"] == SCORES
    best = Student.from_pretrained(run / "best")  # scores are of the last step's
    assert best.provenance["cache"] == known["cache"] and "scores" not in best.provenance
    student.save_pretrained(tmp_path / "copy")
    copied = Student.from_pretrained(tmp_path / "copy")
    assert copied.provenance == known and same(student, copied)


def test_scores_of_another_run_are_not_shown(run: Path) -> None:
    path = run / "evaluation/scores.json"
    value = json.loads(path.read_text())
    value["student"]["cache"]["digest"] = "0" * 64
    path.write_text(json.dumps(value))
    assert "scores" not in Student.from_pretrained(run).provenance
    path.write_text("[" * 10_000)
    assert "scores" not in Student.from_pretrained(run).provenance


def test_scores_of_an_earlier_step_are_not_shown(run: Path) -> None:
    """Training that went on after an evaluation leaves the scores, and they are of other weights."""
    weights = load_file(run / "student/model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, run / "student/model.safetensors")
    assert "scores" not in Student.from_pretrained(run).provenance


def test_runs_from_before_provenance_tell_what_they_know(run: Path) -> None:
    (run / "student/provenance.json").unlink()
    known = Student.from_pretrained(run).provenance
    assert len(known["cache"]["digest"]) == 64 and "teacher" not in known
    card = Student.from_pretrained(run).model_card("toy")
    assert known["cache"]["digest"] in card and "| teacher | not recorded |" in card and "| blocks 0:16 |" in card


def front_matter(card: str) -> dict[str, Any]:
    opening, front, _ = card.split("---\n", 2)
    assert opening == ""
    value: dict[str, Any] = yaml.safe_load(front)
    return value


def test_the_card_says_what_is_known(run: Path) -> None:
    student = Student.from_pretrained(run)
    student.provenance["teacher"] |= {"source": "google/ddpm-cifar10-32", "commit": "c" * 40, "license": "Apache-2.0"}
    student.provenance["teacher"]["attribution"] = "drawn by [somebody]"
    card = student.model_card("me/toy")
    metadata = front_matter(card)
    assert (metadata["license"], metadata["base_model"]) == ("apache-2.0", "google/ddpm-cifar10-32")
    assert metadata["library_name"] == "advkd"
    for quoted in (
        "# toy",
        'StudentPipeline.from_pretrained("me/toy")',
        student.provenance["cache"]["fingerprint"],
        student.provenance["cache"]["digest"],
        "google/ddpm-cifar10-32, commit " + "c" * 40,
        "| teacher's licence | Apache-2.0 |",
        "\n\ndrawn by \\[somebody\\]\n\n",
        "0 to 255: ",
        "| ddim 5 † | 5 | 61.0 ± 11.0 | 95 ± 1 | 79 ± 3 | -41.0 [-65.8, -16.2] |",
        "| teacher (ddim 50) | 50 | 18.0 ± 1.0 | – | – | +2.0 [+2.0, +2.0] |",
        "† x̂\\_0 clipped to \\[−1, 1\\].",
        "5 sets of 2048 fresh seeds",
        "held-out seeds: 0.0123",
    ):
        assert quoted in card
    assert "ddim 10" not in card  # nothing was measured of it
    assert card.index("| student |") < card.index("| teacher (ddim") < card.index("| ddim 5 †")
    blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    for block in blocks:
        compile(block, "card", "exec")


def test_the_cards_commands_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Student.from_pretrained(run).save_pretrained("toy")
    names: dict[str, Any] = {}
    for block in Path("toy/README.md").read_text().split("```python\n")[1:]:
        exec(block.split("```")[0], names)
    assert len(names["images"]) == len(names["same"]) == 4 and names["x_0"].shape == (2, 1, 8, 8)


def test_a_card_of_hostile_facts_is_still_one_card(tmp_path: Path) -> None:
    """Text from elsewhere neither ends the metadata, nor makes rows, links, code or control characters."""
    evil = "x\n---\n\n# Owned\n| a | [b](http://c) `d` <script> \x1b[31m" + "z" * 10_000
    student = make_student(
        teacher={"source": evil, "license": evil, "commit": evil, "tensors_sha256": evil, "attribution": evil},
        cache={"fingerprint": evil, "digest": evil, "blocks": [evil]},
        sampler={"name": evil, "steps": evil}, versions={evil: evil}, step=evil, config=[1], seeds=evil,
        scores={"samplers": {
            evil: {"evaluations": evil, "frechet_mean": evil, "student_minus_this": [1], "scores": evil}, "b": 3,
        }},
    )  # fmt: skip
    card = student.model_card('me/"evil\n')
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    assert "\n# Owned" not in card and "\x1b" not in card and "<script>" not in card.replace("\\<", "")
    assert "](http" not in card.replace("[Adv-KD](https", "").replace("\\](http", "") and len(card) < 10_000
    assert make_student(scores=[], teacher=3).model_card("x").startswith("---\n")


def test_an_absolute_path_of_the_builders_machine_is_not_told() -> None:
    from advkd.stages.student.provenance import _without_paths

    assert _without_paths({"source": "/home/me/teachers/celeba"}) == {"source": "celeba"}
    for kept in ({"source": "teachers/digits/pipeline"}, {"source": "a/b", "commit": "1"}, {}):
        assert _without_paths(kept) == kept


def test_foreign_folders_are_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years")
    with pytest.raises(UsageError, match="holds something other than a student"):
        make_student().save_pretrained(tmp_path / "thesis")
    with pytest.raises(UsageError, match="is a file"):
        make_student().save_pretrained(tmp_path / "thesis/chapter.tex")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    # Other networks have such files too.
    (tmp_path / "bert").mkdir()
    for name, text in (("config.json", '{"model_type": "bert"}'), ("model.safetensors", "theirs"), ("README.md", "a")):
        (tmp_path / "bert" / name).write_text(text)
    before = tree(tmp_path / "bert")
    for config in ('{"model_type": "bert"}', "[]", "{"):
        (tmp_path / "bert/config.json").write_text(config)
        with pytest.raises(UsageError, match="holds something other than a student"):
            make_student().save_pretrained(tmp_path / "bert")
        assert tree(tmp_path / "bert") == before | {"config.json": config.encode()}


def test_what_is_no_student_is_refused_in_a_line(tmp_path: Path) -> None:
    student = make_student(cache={})
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for section, key, wrong in (
        ("student", "depth", 10**9),  # would be built block by block, if it were believed
        ("geometry", "levels", [[float("nan"), 1.0], [1.0, 0.0]]),
        ("geometry", "levels", [[0.1, 1.0]] * 5000),
    ):
        changed = json.loads(json.dumps(config))
        changed[section][key] = wrong
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(TrainingError, match="holds no student"):
            Student.from_pretrained(tmp_path)
    for text in ("[" * 100_000, "3", '{"format": 2}', json.dumps({**config, "format": 2})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(TrainingError, match="holds no student"):
            Student.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for text in ("[" * 100_000, "{}", "3"):
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(TrainingError, match="student loads without this file"):
            Student.from_pretrained(tmp_path)
    (tmp_path / "provenance.json").unlink()
    assert same(student, Student.from_pretrained(tmp_path))


def test_weights_in_shorter_floats_load_and_others_do_not(tmp_path: Path) -> None:
    student = make_student()
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    loaded = Student.from_pretrained(tmp_path)
    assert next(loaded.parameters()).dtype == torch.float32
    noise = student.noise([1])
    torch.testing.assert_close(loaded(noise), student(noise), rtol=0.05, atol=0.05)
    name = next(iter(weights))
    for wrong in (weights[name].to(torch.int8), weights[name] * float("nan")):
        save_file({**weights, name: wrong}, tmp_path / "model.safetensors")
        with pytest.raises(TrainingError, match="or not finite"):
            Student.from_pretrained(tmp_path)


PUSH_AND_LOAD = """
import torch
from advkd.cache.errors import TrainingError
from advkd.stages.student.hub import Student
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig

student = Student.from_pretrained("toy")
print(student.push_to_hub("me/toy", token="hf_secret", commit_message="first"))
loaded, noise = Student.from_pretrained("me/toy"), student.noise([0, 1])
assert torch.equal(loaded(noise), student(noise)) and loaded.provenance == student.provenance
try:
    student.push_to_hub("refused/toy", token="hf_secret")
except TrainingError as error:
    print(error)
try:
    Student.from_pretrained("me/none")
except TrainingError as error:
    print(error)
"""


def test_to_the_hub_and_back(run: Path, tmp_path: Path) -> None:
    """Against a server that speaks the part of the Hub's API that the client uses."""
    student = Student.from_pretrained(run)
    student.save_pretrained(tmp_path / "toy")
    with model_hub(tmp_path / "hub") as (address, commits):
        result = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LOAD],
            cwd=tmp_path,
            env=os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "downloads"), "HF_TOKEN": ""},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    url, pushing, loading = result.stdout.splitlines()
    assert url.startswith(f"{address}/me/toy/commit/")
    assert pushing.startswith("the Hub did not accept refused/toy (")
    assert loading.startswith("no student in me/none: no such folder, and the Hub refused it (")
    assert [commit["summary"] for commit in commits] == ["first"]
    kept = sorted(path.name for path in (tmp_path / "hub/me/toy").iterdir())
    assert kept == ["README.md", "config.json", "model.safetensors", "provenance.json"]
    assert 'from_pretrained("me/toy")' in (tmp_path / "hub/me/toy/README.md").read_text()
    (downloaded,) = (tmp_path / "downloads/hub/models--me--toy/snapshots").iterdir()
    assert sorted(path.name for path in downloaded.iterdir()) == kept[1:]
    with pytest.raises(TrainingError, match="/none/at/all: neither a folder"):
        Student.from_pretrained("/none/at/all")


BLOCKED = (
    "accelerate", "dask", "diffusers", "distributed", "dvc", "dvclive", "fsspec", "huggingface_hub", "matplotlib",
    "numcodecs", "onnx", "onnxruntime", "pytorch_fid", "rich", "scipy", "sklearn", "torchvision", "transformers",
    "zarr",
)  # fmt: skip


def test_it_runs_without_what_training_needs(tmp_path: Path) -> None:
    """In a process where none of it can be imported."""
    make_student(3, cache={"fingerprint": "f" * 64}).save_pretrained(tmp_path / "out")
    program = (
        "import sys\n"
        f"for name in {BLOCKED}: sys.modules[name] = None\n"
        "from advkd.stages.student.pipeline import StudentPipeline\n"
        f"pipe = StudentPipeline.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(pipe(seeds=[1, 2]).images[1].mode, pipe(3, output_type='pt').images.shape)\n"
        f"pipe.save_pretrained({str(tmp_path / 'again')!r})\n"
        "assert 'advkd.stages.teacher' not in sys.modules and 'advkd.stages.student.train' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("RGB torch.Size([3, 3, 16, 16])", "")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_a_folder_that_save_student_wrote_is_enough(tmp_path: Path) -> None:
    student = make_student()
    save_student(tmp_path, student.network, student.config, student.geometry)
    assert same(student, Student.from_pretrained(tmp_path))
