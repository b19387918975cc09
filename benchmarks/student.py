"""The student's one pass compared with its teacher and with few-step solvers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advkd.cache import TrajectoryCache
from advkd.pipeline.config import load_experiment
from advkd.stages.pretrain.teacher import save_untrained
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.hub import Student
from advkd.stages.student.sharing.export import PACKAGES, export_int8, export_onnx
from advkd.stages.student.sharing.onnx_student import OnnxStudent
from advkd.stages.student.student import build_student
from advkd.stages.teacher.config import SamplerConfig, TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.sample.sampling import record_states
from benchmarks.comparison import Comparison, Target, ratio_between, rows_of
from benchmarks.harness import Benchmark, Method, interleaved, missing, run, wait_for
from benchmarks.networks import CIFAR_SHAPE, CIFAR_UNET, DIGITS_SHAPE, save_random, smooth_store

EAGER, COMPILED, ONNX, INT8 = "student, PyTorch", "student, torch.compile", "student, ONNX fp32", "student, ONNX int8"
ONE, SOLVER, DDIM, FULL = "one teacher evaluation", "DPM-Solver++ 10", "DDIM 50", "DDIM 1000 (20 × DDIM 50)"


def export(student: Student, folder: Path) -> dict[str, OnnxStudent]:
    """The student as `advkd-export` writes it, in float32 and int8; empty if the packages are not installed."""
    if missing(*PACKAGES):
        return {}
    folder.mkdir(parents=True)
    whole, small = folder / "student.onnx", folder / "int8.onnx"
    export_onnx(student, whole)
    export_int8(student, whole, small)
    return {ONNX: OnnxStudent(whole), INT8: OnnxStudent(small)}


def measure_size(
    bench: Benchmark, folder: Path, name: str, teacher: Teacher, cache: TrajectoryCache, config: Any
) -> None:
    """One teacher and its student, for one image and batches of 64."""
    torch.manual_seed(0)
    device = bench.device
    geometry = Geometry.of(cache, None)
    student = build_student(config, geometry).eval().requires_grad_(False)
    for parameter in student.parameters():  # a new student's last layers are zeros, which int8 would represent exactly
        parameter.copy_(torch.where(parameter == 0, torch.randn_like(parameter) * 0.02, parameter))
    sessions = export(Student(student, config, geometry), folder / name) if device == "cpu" else {}
    student = student.to(device)
    compiled = torch.compile(student) if not bench.quick else None
    for batch in (1, 4 if bench.quick else 64):
        noise = torch.from_numpy(cache.rows(0, np.arange(batch) % 64).astype(np.float32))
        here, values = noise.to(device), noise.numpy()
        shaped = here.contiguous(memory_format=teacher.memory_format)
        methods = {ONE: _evaluation(teacher, shaped, device), EAGER: _pass(student, here, device)}
        if compiled is not None:
            methods[COMPILED] = _pass(compiled, here, device)
        methods |= {key: functools.partial(session, noise) for key, session in sessions.items()}
        solvers = {SOLVER: _solver(teacher, "dpmsolver++", 10, values), DDIM: _solver(teacher, "ddim", 50, values)}
        if name == "digits" or batch == 1:  # 64 images of CIFAR-10 would take minutes per call
            methods |= solvers
        agreement = _agreement(student, compiled, sessions, here)
        for method in methods.values():
            method()
        count = 30 if batch == 1 else 10 if name == "digits" else 3
        quick = dict.fromkeys((key for key in methods if key not in (SOLVER, DDIM)), count)
        times = interleaved(methods, bench.rounds(7 if name == "digits" else 3), calls=quick, settle=0.1)
        if DDIM in times:
            times[FULL] = [20 * seconds for seconds in times[DDIM]]
        bench.add(_comparison(times, name, batch, agreement))


def _pass(network: Any, noise: torch.Tensor, device: str) -> Method:
    def call() -> None:
        with torch.inference_mode():
            network(noise)
        wait_for(device)

    return call


def _evaluation(teacher: Teacher, images: torch.Tensor, device: str) -> Method:
    timestep = torch.tensor(500, device=device)
    return _pass(lambda x: teacher.predict(x, timestep), images, device)


def _solver(teacher: Teacher, name: str, steps: int, noise: Any) -> Method:
    path = SolverPath.of(teacher.scheduler_config, SamplerConfig(name=name, steps=steps))
    seeds = range(len(noise))
    return lambda: record_states(teacher, path, noise, seeds=seeds, root_seed=0, record=[steps])


def _agreement(student: Any, compiled: Any, sessions: dict[str, OnnxStudent], noise: torch.Tensor) -> str:
    with torch.inference_mode():
        expected = student(noise).cpu().numpy()
        found = {COMPILED: compiled(noise).cpu().numpy()} if compiled is not None else {}
    found |= {name: session(noise).numpy() for name, session in sessions.items()}
    apart = {name: float(np.sqrt(np.mean((values - expected) ** 2))) for name, values in found.items()}
    wrong = [name for name, value in apart.items() if value > 1e-3 and name != INT8]
    if wrong:
        raise SystemExit(f"{', '.join(wrong)}: different images from PyTorch's")
    size = float(np.sqrt(np.mean(expected**2)))
    return f"RMS difference from PyTorch's images (whose RMS is {size:.2f}): " + ", ".join(
        f"{name.removeprefix('student, ')} {value:.1e}" for name, value in apart.items()
    )


def _comparison(times: dict[str, list[float]], name: str, batch: int, agreement: str) -> Comparison:
    forms = [key for key in (COMPILED, ONNX, INT8) if key in times]
    best = min((key for key in forms), key=lambda key: ratio_between(times, key, EAGER), default=EAGER)
    first = name == "digits" and batch == 1
    where = f"{name}, {'one image' if batch == 1 else f'{batch} images'}"
    targets = [
        Target(
            what=f"student / one teacher evaluation, seconds, {where}",
            found=ratio_between(times, EAGER, ONE),
            limit=1.5,
        ),
        Target(
            what=f"best exported form ({best.removeprefix('student, ')}), times faster than PyTorch, {where}",
            found=ratio_between(times, EAGER, best),
            limit=2,
            at_most=False,
            headline="Generating an image from the best exported file: times faster than in PyTorch" if first else "",
        ),
    ]
    for other, words, limit in ((SOLVER, "DPM-Solver++ 10", 6), (FULL, "1000 steps", 600)):
        if other in times:
            what, found = f"student, times faster than {words}, {where}", ratio_between(times, other, EAGER)
            headline = f"Generating an image: times faster than the teacher with {words}" if first else ""
            targets.append(Target(what=what, found=found, limit=limit, at_most=False, headline=headline))
    return Comparison(
        title=where,
        unit="s",
        baseline=ONE,
        rows=rows_of(times, ONE),
        targets=targets,
        agreement=f"{agreement}. {missing(*PACKAGES)}".strip(),
        note="The networks are untrained and have the experiment's sizes: this measures time, the README's first table "
        "quality. One image is bound by the overhead of about two hundred small operations, which ONNX fuses; 64 "
        "images by the arithmetic of convolutions (four fifths of the digits student), where only fewer bits help, "
        "and by what int8 leaves in float: normalisation, SiLU and conversions, half of its time. onnxruntime "
        "parallelises little of those, so a large batch is split among threads instead. Also tried: torch.compile "
        "with frozen weights, 1.07 times faster than eager; bfloat16, 1.29; both, 1.37.",
    )


def measure(bench: Benchmark, folder: Path) -> None:
    """The default experiment, and CIFAR-10's."""
    device = torch.device(bench.device)
    digits = load_experiment("digits")
    assert digits.pretrain is not None
    save_untrained(folder / "teacher", digits.pretrain)
    teacher = load_teacher(TeacherConfig(source=str(folder / "teacher")), device)
    cache = smooth_store(folder / "digits.zarr", DIGITS_SHAPE, 6, 64)
    measure_size(bench, folder, "digits", teacher, cache, digits.train.student)
    if not bench.quick:
        save_random(folder / "cifar", CIFAR_UNET)
        teacher = load_teacher(TeacherConfig(source=str(folder / "cifar")), device)
        cache = smooth_store(folder / "cifar.zarr", CIFAR_SHAPE, 11, 64)
        measure_size(bench, folder, "CIFAR-10", teacher, cache, load_experiment("cifar10").train.student)


if __name__ == "__main__":
    run("student", "The student: how long does one pass take compared with its teacher?", measure)
