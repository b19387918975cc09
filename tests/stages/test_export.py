"""Exported students: they compute what PyTorch does, for any batch, or they are not written."""

import importlib.util
import json
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.evaluate.deployed import score_forms, time_forms
from advkd.stages.evaluate.networks import load_features
from advkd.stages.metrics.classifier import SmallClassifier, save_classifier
from advkd.stages.metrics.table import difference
from advkd.stages.student.config import StudentConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.hub import Student
from advkd.stages.student.pipeline import StudentPipeline
from advkd.stages.student.sharing import export
from advkd.stages.student.sharing.export import compare, export_int8, export_onnx
from advkd.stages.student.sharing.onnx_student import METADATA, SPLIT_FROM, OnnxStudent
from advkd.stages.student.student import build_student
from tests.conftest import ROOT
from tests.stages.test_hub import make_student
from tests.stages.test_student import geometry


def make_quick() -> Student:
    """One that torch exports in a second: two submodules, no attention."""
    torch.manual_seed(4)
    config, shape = StudentConfig(width=8, depth=1, attention=False), geometry(size=8, submodules=2)
    return Student(build_student(config, shape), config, shape).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def student() -> Student:
    return make_quick()


@pytest.fixture(scope="module")
def exported(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "student.onnx"
    export_onnx(student, path)
    return path


@pytest.mark.parametrize(("kind", "channels"), [("unrolled", 3), ("progressive", 1)])
def test_any_batch_of_every_kind(tmp_path: Path, kind: str, channels: int) -> None:
    student = make_student(channels, kind)
    deviation = export_onnx(student, tmp_path / "a.onnx")
    assert 0.0 <= deviation.rms <= deviation.largest < 1e-4
    exported = OnnxStudent(tmp_path / "a.onnx")
    assert exported.geometry == student.geometry
    for batch in (1, 3, 10):
        noise = student.noise(range(batch))
        torch.testing.assert_close(exported(noise), student(noise), rtol=1e-3, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_it_drops_into_the_pipeline(student: Student, exported: Path) -> None:
    pipe = StudentPipeline.from_pretrained(exported)
    expected = StudentPipeline(student)(seeds=[1, 2, 3], output_type="pt").images
    torch.testing.assert_close(pipe(seeds=[1, 2, 3], output_type="pt").images, expected, rtol=0, atol=1e-4)
    assert pipe.to("cpu").device.type == "cpu" and len(pipe(2).images) == 2
    with pytest.raises(UsageError, match="can't be saved again"):
        pipe.save_pretrained(exported.with_name("again"))


def test_files_hold_no_path_of_this_machine(student: Student, exported: Path, tmp_path: Path) -> None:
    """torch's exporter notes every line of Python that a node comes from."""
    export_int8(student, exported, tmp_path / "small.onnx")
    private = {Path.cwd(), ROOT, Path.home(), Path(torch.__file__).parent, Path(sysconfig.get_path("purelib"))}
    for path in (exported, tmp_path / "small.onnx"):
        data = path.read_bytes()
        for text in (*map(str, private), "site-packages", "stack_trace"):
            assert text.encode() not in data, (path.name, text)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_that_is_divided_among_threads_is_the_same(student: Student, exported: Path, threads: int) -> None:
    noise = student.noise(range(threads * SPLIT_FROM + 1))
    torch.testing.assert_close(OnnxStudent(exported, threads)(noise), student(noise), rtol=1e-3, atol=1e-4)


def test_what_deviates_is_not_written(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"what was there")
    exporting = export._to_onnx
    with torch.no_grad():
        other = make_quick()
        other.network.submodules[-1].read.bias += 0.01  # type: ignore[union-attr,operator]
    monkeypatch.setattr(export, "_to_onnx", lambda _, path: exporting(other, path))
    with pytest.raises(TrainingError, match=r"deviates from PyTorch by 0.01, more than 0.001; .* was not written"):
        export_onnx(student, path)
    assert path.read_bytes() == b"what was there" and list(tmp_path.iterdir()) == [path]
    assert export_onnx(student, path, max_error=0.1).rms == pytest.approx(0.01, abs=1e-4)
    with torch.no_grad():
        other.network.submodules[-1].read.bias *= float("nan")  # type: ignore[union-attr,operator]
    with pytest.raises(TrainingError, match=r"deviates from PyTorch by nan, more than inf"):
        export_onnx(student, path, max_error=float("inf"))


def test_int8_is_smaller_and_near(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = StudentConfig(width=64, depth=1, attention=False)
    student = Student(build_student(config, geometry(submodules=2)), config, geometry(submodules=2)).eval()
    export_onnx(student, tmp_path / "a.onnx")
    deviation = export_int8(student, tmp_path / "a.onnx", tmp_path / "a.int8.onnx")
    noise = student.noise(range(32))
    scale = float(student(noise).detach().std())
    assert 0.0 < deviation.rms < 0.05 * scale and deviation.largest >= deviation.rms
    whole, small = (OnnxStudent(tmp_path / name) for name in ("a.onnx", "a.int8.onnx"))
    assert small.geometry == student.geometry
    assert float((small(noise) - whole(noise)).square().mean().sqrt()) < 0.05 * scale
    assert (tmp_path / "a.int8.onnx").stat().st_size < 0.5 * (tmp_path / "a.onnx").stat().st_size

    import onnx

    graph = onnx.load(tmp_path / "a.int8.onnx").graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 8  # embed, two of a block, read; twice
    assert {made_by[name] for node in convolutions for name in node.input[:2]} == {"DequantizeLinear"}
    assert sum(initializer.data_type == onnx.TensorProto.INT8 for initializer in graph.initializer) >= 8


class Unusual(torch.nn.Module):
    """A network with an operation that ONNX has not."""

    def forward(self, noise: Tensor) -> Tensor:
        singular: Tensor = torch.linalg.svdvals(noise)
        return noise * singular.sum()


def test_what_torch_cannot_export_costs_a_line(student: Student, tmp_path: Path) -> None:
    unusual = Student(Unusual(), student.config, student.geometry)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"torch .* can't export this student \([^\n]+\)$"):
        export_onnx(unusual, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_seeds_that_check_and_calibrate_are_none_that_score() -> None:
    from advkd.stages.evaluate.config import FIRST_FRESH_SEED

    assert FIRST_FRESH_SEED + 10**9 < export.FIRST_CHECK_SEED < export.FIRST_CALIBRATION_SEED - 10**9
    batches = list(export._calibration(make_student()))
    (first,) = batches[0]
    assert torch.equal(first, make_student().noise(range(export.FIRST_CALIBRATION_SEED, 16 + (1 << 42))))
    assert sum(len(noise) for (noise,) in batches) == export.NUM_CALIBRATION


def test_absent_packages_are_named(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else finding(name))
    with pytest.raises(UsageError, match=r"exporting needs onnxruntime: pip install 'advkd\[export\]'"):
        export_onnx(student, tmp_path / "a.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"need onnxruntime: pip install 'advkd\[export\]'"):
        OnnxStudent(tmp_path / "a.onnx")


def test_files_that_are_no_exported_student(student: Student, exported: Path, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "x.onnx"
    with pytest.raises(TrainingError, match="no student in"):
        OnnxStudent(path)
    whole = exported.read_bytes()
    for content in (b"", b"no model", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match="was not written by advkd-export"):
            OnnxStudent(path)
    told = student.geometry.to_json()
    for wrong in (
        None,
        "[" * 10_000,
        "{}",
        json.dumps({**told, "item_shape": [1, 16, 16]}),
        json.dumps({**told, "levels": 3}),
    ):
        model = onnx.load(exported)
        onnx.helper.set_model_props(model, {} if wrong is None else {METADATA: wrong})
        onnx.save(model, path)
        with pytest.raises(TrainingError, match="was not written by advkd-export"):
            OnnxStudent(path)


def test_forms_are_scored_beside_the_first(store: Path, tmp_path: Path) -> None:
    """The same form scores the same; one that breaks the images is behind."""
    shape = Geometry.of(TrajectoryCache.open(store))
    config = StudentConfig(width=8, depth=1)
    student = Student(build_student(config, shape), config, shape).eval()
    torch.manual_seed(0)
    save_classifier(tmp_path / "classifier", SmallClassifier(1, 8, 10).eval(), {})
    settings = EvaluateConfig(features=str(tmp_path / "classifier"), num_sets=3, set_size=64, batch_size=50)
    features = load_features(settings, (1, 8, 8))

    def broken(noise: Tensor) -> Tensor:
        return torch.full_like(noise, 5.0)

    forms = {"PyTorch": student, "same": student.network, "broken": broken}
    table = score_forms(forms, student, TrajectoryCache.open(store), features, settings)
    base, same, worse = table.rows
    assert table.student_minus(base, "frechet") is None and len(base.values["frechet"]) == 3
    assert same.values == base.values
    behind = difference(worse, base, "frechet")
    assert behind is not None and behind.low > 0.0
    timed = time_forms({"PyTorch": student}, student)
    assert sorted(timed) == [1, 64] and all(seconds["PyTorch"] > 0 for seconds in timed.values())
    student.provenance = {"cache": {"fingerprint": "0" * 64}}
    with pytest.raises(UsageError, match="give the cache that it was trained from"):
        score_forms(forms, student, TrajectoryCache.open(store), features, settings)


def test_comparing_uses_every_batch_size(student: Student, exported: Path) -> None:
    sizes: list[int] = []

    class Watched(OnnxStudent):
        def __call__(self, noise: Tensor) -> Tensor:
            sizes.append(len(noise))
            return super().__call__(noise)

    assert compare(student, Watched(exported)).largest < 1e-4
    assert sizes == [1, 2, 5, *[8] * 7]
