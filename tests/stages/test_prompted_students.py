"""Students that are told prompts: trained from the cache alone, sampled, shared, exported, scored."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from advkd.cache.errors import TeacherError, UsageError
from advkd.cache.format.prompts import Embedding, PromptCondition
from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.export import main as export_command
from advkd.pipeline.cli.page import main as page_command
from advkd.pipeline.cli.sample import main as sample_command
from advkd.pipeline.texts import encode_prompts
from advkd.stages.evaluate.config import FIRST_FRESH_SEED, EvaluateConfig
from advkd.stages.evaluate.evaluate import evaluate
from advkd.stages.evaluate.measure import make_reference
from advkd.stages.evaluate.prompted import PromptedTeacher, prompts_told
from advkd.stages.evaluate.results import details
from advkd.stages.evaluate.samplers import find_teacher
from advkd.stages.metrics.clip_score import ClipScorer
from advkd.stages.metrics.features import FeatureNetwork, Look
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.hub import Student
from advkd.stages.student.pipeline import StudentPipeline
from advkd.stages.student.prompts import PromptForm, read_prompts
from advkd.stages.student.run import Run
from advkd.stages.student.student import build_student
from advkd.stages.student.train import train
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig
from advkd.stages.student.unrolled.prompts import PromptTokens
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from tests.conftest import Invoke
from tests.stages.test_pretrained import save_clip
from tests.stages.text_to_image import TOKENS, load, stable_diffusion
from tests.stores import write_store

NAMES = [
    f"{colour} {thing}" for thing in ("cat", "sun", "egg", "key", "hat", "cup") for colour in ("red", "blue", "tan")
]
SHORT = TrainConfig(
    student=StudentConfig(width=32, depth=1, attention=False),
    objective=ObjectiveConfig(adversarial=AdversarialConfig(width=4, start=0.4, fresh=4, penalty_every=2)),
    steps=6,
    batch_size=8,
    log_every=2,
    preview_every=3,
    checkpoint_every=3,
)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its cache and a run."""
    path = tmp_path_factory.mktemp("prompted")
    stable_diffusion(path / "teacher")
    (path / "prompts.txt").write_text("\n".join(NAMES))
    plan = make_plan(
        TeacherConfig(source=str(path / "teacher")),
        SamplerConfig(steps=4, guidance=4.0),
        CacheConfig(
            prompts=str(path / "prompts.txt"), seeds_per_prompt=4, record=2, block_size=8, batch_size=8, device="cpu"
        ),
        path / "a.zarr",
    )
    build(plan)
    train(path / "a.zarr", SHORT, path / "run")
    return path


@pytest.fixture(scope="module")
def cache(folder: Path) -> TrajectoryCache:
    return TrajectoryCache.open(folder / "a.zarr")


@pytest.fixture(scope="module")
def student(folder: Path) -> Student:
    """After six steps prompts would hardly change a thing."""
    student = Student.from_pretrained(folder / "run")
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if "film" in name or "cross.out" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return student


def embeddings(folder: Path, texts: list[str]) -> Tensor:
    """What the pipeline itself makes of some prompts."""
    encoded: Tensor = load(folder / "teacher").encode_prompt(texts, "cpu", 1, False)[0]
    return encoded


FORM = PromptCondition(
    seeds_per_prompt=1,
    guidance=1.0,
    evaluations=1,
    embeddings=(
        Embedding(name="prompt_embeds", shape=(4, 3), dtype="float32"),
        Embedding(name="prompt_mask", shape=(4,), dtype="int64"),
        Embedding(name="pooled_prompt_embeds", shape=(5,), dtype="float16"),
    ),
)


def test_embeddings_of_every_form_fill_one_matrix() -> None:
    form = PromptForm.of(FORM)
    tokens, pooled = torch.randn(2, 4, 3), torch.randn(2, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    made = form.told({"prompt_embeds": tokens, "prompt_mask": mask, "pooled_prompt_embeds": pooled})
    assert made.shape == (2, *form.shape) == (2, 5, 6)
    torch.testing.assert_close(made[:, 0, :5], pooled)
    torch.testing.assert_close(made[:, 1:, :3], tokens)
    assert made[:, :, 5].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    padded = replace(FORM, embeddings=(Embedding(name="prompt_embeds", shape=(4, 3), dtype="float32", padded=True),))
    rows = PromptForm.of(padded).told({"prompt_embeds": [tokens[0, :1], tokens[1]]})
    assert rows[:, :, 3].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]] and not rows[0, 1:].any()


def test_what_does_not_count_changes_nothing() -> None:
    torch.manual_seed(0)
    reader, prompts = PromptTokens(PromptForm.of(FORM), 8), torch.randn(2, 5, 6)
    prompts[:, :, 5] = torch.tensor([1, 1, 1, 0, 0])
    other = prompts.clone()
    other[:, 3:, :5] = 7.0
    for mine, theirs in zip(reader(prompts)[1:], reader(other)[1:], strict=True):
        torch.testing.assert_close(mine, theirs)
    geometry = Geometry(
        item_shape=(1, 8, 8), levels=((0.1, 1.0), (1.0, 0.0)), timesteps=(9.0, -1.0), steps=(0, 1), root_seed=0,
        noise_dtype="float32", prompts=FORM,
    )  # fmt: skip
    network = build_student(StudentConfig(width=8, depth=1), geometry)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    noise = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(network(noise, prompts), network(noise, other))
    other[:, 1, 0] += 1.0  # a token that counts
    assert float((network(noise, prompts) - network(noise, other)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "the student is told pooled_prompt_embeds, prompt_embeds, prompt_mask; found nothing"),
        ({"prompt_embeds": (2, 4, 3)}, "found prompt_embeds"),
        (
            {"prompt_embeds": (2, 4, 3), "prompt_mask": (2, 3), "pooled_prompt_embeds": (2, 5)},
            r"prompt_mask: 2 of shape",
        ),
        (
            {"prompt_embeds": (2, 4, 3), "prompt_mask": (2, 4), "pooled_prompt_embeds": (1, 5)},
            "prompt_embeds: 2 of shape .* expected 1",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_named(given: dict[str, tuple[int, ...]], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        PromptForm.of(FORM).told({name: torch.ones(shape) for name, shape in given.items()})


def test_embeddings_that_no_student_understands_are_refused() -> None:
    grids = replace(FORM, embeddings=(Embedding(name="prompt_embeds", shape=(2, 4, 3), dtype="float32"),))
    with pytest.raises(UsageError, match="no student learns from prompts whose embeddings are prompt_embeds"):
        PromptForm.of(grids)


def test_whole_prompts_are_held_out(cache: TrajectoryCache) -> None:
    seeds = np.arange(len(NAMES) * 4)
    by_prompt = cache.recipe.held_out(seeds).reshape(len(NAMES), 4)
    assert (by_prompt.all(1) | ~by_prompt.any(1)).all()
    assert 0 < by_prompt.all(1).sum() < len(NAMES) / 4


def test_pictures_show_different_prompts_first(cache: TrajectoryCache) -> None:
    assert cache.varied(cache.seeds(), 3).tolist() == [0, 4, 8]
    assert cache.varied(range(4, 12), 4).tolist() == [4, 5, 8, 9]
    assert cache.varied([], 4).tolist() == []


def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    train(folder / "a.zarr", SHORT, tmp_path / "run", max_steps=3)
    train(folder / "a.zarr", SHORT, tmp_path / "run", resume=True)
    mine, whole = (Run(path).student / "model.safetensors" for path in (tmp_path / "run", folder / "run"))
    assert mine.read_bytes() == whole.read_bytes()


def test_a_cached_prompt_is_what_its_teacher_encodes(folder: Path, cache: TrajectoryCache, student: Student) -> None:
    asked = ["blue sun", "red cat"]
    cached = read_prompts(cache, [NAMES.index(text) for text in asked])
    assert cached.shape == (2, TOKENS, 33)
    torch.testing.assert_close(student.prompts(prompt_embeds=embeddings(folder, asked)), cached, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encode_prompts(student, asked, str(folder / "teacher")), cached, rtol=1e-4, atol=1e-4)
    with pytest.raises(TeacherError, match="--teacher says where else it is"):
        encode_prompts(student, asked)  # the store doesn't say where on which machine its teacher was


def test_images_follow_their_prompt(folder: Path, student: Student) -> None:
    pipe = StudentPipeline(student)
    encoded = embeddings(folder, ["red cat", "blue cat", "red cat"])
    red, blue, again = pipe(seeds=[3, 3, 3], output_type="latent", prompt_embeds=encoded).images
    torch.testing.assert_close(red, again)
    assert isinstance(red, Tensor) and float((red - blue).abs().max()) > 1e-3
    one = pipe(seeds=[3, 4], output_type="latent", prompt_embeds=encoded[:1]).images
    torch.testing.assert_close(one[0], red)
    assert len(pipe(prompt_embeds=encoded).images) == 3
    for options, expected in (
        ({"prompt": "red cat"}, "a student has no text encoder; give prompt_embeds"),
        ({}, "the student is told prompt_embeds; found nothing"),
        ({"prompt_embeds": encoded, "class_labels": 3}, "told prompts, not classes"),
        ({"prompt_embeds": encoded[:2], "seeds": [1, 2, 3]}, "2 prompts for 3 images"),
    ):
        with pytest.raises(UsageError, match=expected):
            pipe(**options)  # type: ignore[arg-type]


def test_sampling_encodes_new_prompts(folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    line = ["--run", folder / "run", "--prompt", "tan dog", "--prompt", "red cat", "--out", tmp_path / "a.npy"]
    line += ["--teacher", folder / "teacher"]
    result = invoke(sample_command, *line, "--num", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    trained = Student.from_pretrained(folder / "run")
    told = encode_prompts(trained, ["tan dog", "red cat", "tan dog"], str(folder / "teacher"))
    with torch.no_grad():
        expected = trained.decode(trained(trained.noise(range(3)), told))
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "a.npy")), expected, rtol=1e-4, atol=1e-4)


def test_sampling_says_what_it_wants(folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    run, out = folder / "run", tmp_path / "a.png"
    for more, expected in (
        ([], "the student is told prompts: give --prompt"),
        (["--labels", "3"], "give --prompt"),
        (["--prompt", "cat", "--teacher", tmp_path / "none"], "none"),
    ):
        refused = invoke(sample_command, "--run", run, "--out", out, *more)
        assert refused.exit_code in (1, 2) and expected in refused.stderr, refused.stderr
    assert not out.exists()


def test_another_encoder_is_refused(folder: Path, student: Student, tmp_path: Path) -> None:
    pipe = load(folder / "teacher")
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(1.5)
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(TeacherError, match="its text_encoder has other weights than the one that encoded"):
        encode_prompts(student, ["red cat"], teacher=str(tmp_path / "other"))


def test_exported_students_take_prompts(folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke(export_command, folder / "run", "--onnx", tmp_path / "a.onnx")
    assert result.exit_code == 0, result.output
    ours, theirs = (StudentPipeline.from_pretrained(source) for source in (folder / "run", tmp_path / "a.onnx"))
    encoded = embeddings(folder, ["red cat", "blue cat"])
    mine, exported = (pipe(seeds=[4, 5], output_type="latent", prompt_embeds=encoded).images for pipe in (ours, theirs))
    torch.testing.assert_close(exported, mine, rtol=1e-3, atol=1e-3)
    refused = invoke(export_command, folder / "run", "--onnx", tmp_path / "b.onnx", "--int8")
    assert refused.exit_code == 2 and "no prompts, which this student is told" in refused.stderr
    refused = invoke(page_command, folder / "run", "--cache", folder / "a.zarr", "--out", tmp_path / "site")
    assert refused.exit_code == 2 and "prompts" in refused.stderr, refused.stderr
    assert not (tmp_path / "b.onnx").exists() and not (tmp_path / "site").exists()


def test_other_kinds_refuse_prompts(folder: Path, tmp_path: Path) -> None:
    for kind, expected in (("progressive", "learns no prompts"), ("teacher", "text-to-image")):
        with pytest.raises(UsageError, match=expected):
            train(folder / "a.zarr", replace(SHORT, student=StudentConfig(kind=kind)), tmp_path / kind)


def test_the_teachers_own_row_is_what_the_cache_would_hold(folder: Path, cache: TrajectoryCache) -> None:
    found, reason = find_teacher([TeacherConfig(source=str(folder / "teacher"))], cache, torch.device("cpu"))
    assert isinstance(found, PromptedTeacher), reason
    np.testing.assert_array_equal(found.images(range(8)).numpy().astype(np.float16), cache.rows(4, range(8)))


def test_fresh_seeds_are_told_prompts_from_all_over_the_list(cache: TrajectoryCache) -> None:
    told = prompts_told(cache, range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + len(NAMES)))
    assert sorted(told) == list(range(len(NAMES)))
    assert np.ptp(told[: len(NAMES) // 4]) > len(NAMES) // 2
    assert prompts_told(cache, range(2, 6)).tolist() == [0, 0, 1, 1]


def test_a_reference_of_prompts_is_mixed() -> None:
    images = torch.linspace(-1, 1, 64).reshape(64, 1, 1, 1)

    def look(batch: Tensor) -> Look:
        return Look(features=batch.flatten(1), maps=[batch], probabilities=None)

    network = FeatureNetwork(name="pixel", network=torch.nn.Identity(), look=look)
    plain, mixed = (make_reference(network, images.split(16), None, 2, mixed=wanted) for wanted in (False, True))
    np.testing.assert_array_equal(plain.features[:, 0], images.flatten())
    np.testing.assert_array_equal(np.sort(mixed.features[:, 0]), images.flatten())
    assert np.ptp(mixed.features[:8]) > 1.0 > np.ptp(plain.features[:8])


def test_it_is_scored_beside_its_teacher(folder: Path, tmp_path: Path) -> None:
    clip = str(save_clip(tmp_path))
    config = EvaluateConfig(features="self", num_sets=2, set_size=16, solver_steps=[2], clip=clip)
    evaluation = evaluate(
        folder / "run", folder / "a.zarr", config, teachers=[TeacherConfig(source=str(folder / "teacher"))],
        require_teacher=True,
    )  # fmt: skip
    rows = {row.name: row for row in evaluation.table.rows}
    assert [row.evaluations for row in rows.values()] == [1, 8, 4, 4]
    assert all(len(row.values["clip_score"]) == 2 for row in rows.values())
    # Of the student, by hand: fresh seeds are told the cache's 18 prompts in leaps of 11, which is 0.618 of them.
    cache, student = TrajectoryCache.open(folder / "a.zarr"), Student.from_pretrained(folder / "run")
    seeds = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + 16)
    numbers = [seed % 18 * 11 % 18 for seed in seeds]
    with torch.no_grad():
        images = student.decode(student(student.noise(seeds), read_prompts(cache, numbers)))
    scorer = ClipScorer.load(Path(clip), torch.device("cpu"))
    by_hand = scorer.asked([NAMES[number] for number in numbers])(images)
    assert rows["student"].values["clip_score"][0] == pytest.approx(float(by_hand.mean()), rel=1e-4)
    protocol = details(evaluation)["protocol"]
    assert len(protocol["clip_sha256"]) == 64
    with pytest.raises(UsageError, match="the cache has no prompts"):
        evaluate(*unconditional_run(tmp_path), EvaluateConfig(features="self", num_sets=2, set_size=4, clip=clip))


def unconditional_run(folder: Path) -> tuple[Path, Path]:
    write_store(folder / "plain.zarr")
    train(folder / "plain.zarr", SHORT, folder / "plain")
    return folder / "plain", folder / "plain.zarr"
