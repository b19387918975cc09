"""`advkd-cache build --prompts` with a whole Stable Diffusion: killed, resumed, divided, extended, the same bytes."""

import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from advkd.cache.care.verify import verify
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import merge
from advkd.pipeline.cli.cache import main as command
from advkd.pipeline.cli.evaluate import main as evaluate
from advkd.pipeline.cli.sample import main as sample
from advkd.pipeline.cli.train import main as train
from tests.conftest import Invoke, settings
from tests.pipeline.processes import BIN, committed, finish, start, wait_until
from tests.pipeline.readme import python_blocks, shell_blocks
from tests.stages.text_to_image import load, stable_diffusion
from tests.stores import tree

PAGE = (Path(__file__).parents[2] / "docs/text-to-image.md").read_text()
TEXTS = ["red heart", "blue heart", "cat", "dog", "sun", "moon", "star", "tree"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("text") / "teacher")


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def build_line(teacher: Path, prompts: Path, out: Path, *more: object, steps: int = 4) -> list[object]:
    line = ["build", "--teacher", teacher, "--prompts", prompts, "--seeds-per-prompt", 2, "--guidance", 5]
    line += ["--steps", steps, "--record", 2, "--block-size", 4, "--batch-size", 4, "--device", "cpu", "--out", out]
    return [*line, *more]


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that every way of building must give, and its list of prompts beside it."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = write_prompts(folder / "prompts.txt", TEXTS)
    finish(start(folder, BIN / "advkd-cache", *build_line(teacher, prompts, folder / "whole.zarr")))
    return folder / "whole.zarr"


def test_cached_x_0_is_what_stable_diffusion_makes_of_the_prompt(teacher: Path, whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    pipe = load(teacher)
    made = pipe(
        prompt=[TEXTS[0]] * 2 + [TEXTS[1]] * 2,
        latents=torch.from_numpy(cache.rows(0, range(4)).astype(np.float32)),
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="latent",
    ).images.numpy()
    np.testing.assert_allclose(cache.rows(4, range(4)), made, atol=2e-3 * float(np.abs(made).max()))
    assert np.abs(made[0] - made[2]).max() > 0.1
    prompts = cache.recipe.prompts
    assert prompts is not None and prompts.evaluations == 2
    assert [prompt.text for prompt in cache.prompts.texts(cache.prompts.committed)] == TEXTS
    assert verify(cache).findings == ()


def test_a_killed_build_and_two_workers_give_the_same_bytes(teacher: Path, whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "killed.zarr"
    line = build_line(teacher, whole.with_name("prompts.txt"), store)
    process = start(tmp_path, BIN / "advkd-cache", *line)
    wait_until(lambda: len(committed(store)) >= 1, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finish(start(tmp_path, BIN / "advkd-cache", *line))
    assert tree(store) == tree(whole)
    divided = tmp_path / "divided.zarr"
    relative = Path(os.path.relpath(whole.with_name("prompts.txt"), tmp_path))
    finish(start(tmp_path, BIN / "advkd-cache", *build_line(teacher, relative, divided, "--workers", 2)))
    assert tree(divided) == tree(whole)


def test_a_list_that_grew_extends_the_cache(teacher: Path, whole: Path, tmp_path: Path, invoke: Invoke) -> None:
    store, prompts = tmp_path / "grown.zarr", write_prompts(tmp_path / "prompts.txt", TEXTS[:4])
    assert invoke(command, *build_line(teacher, prompts, store)).exit_code == 0
    assert committed(store) == [0, 1]
    write_prompts(prompts, TEXTS)
    said = invoke(command, *build_line(teacher, prompts, store))
    assert "seeds 0:16; built 2 blocks, 2 were there" in said.output
    assert tree(store) == tree(whole)
    write_prompts(prompts, [*TEXTS[:2], "bird", *TEXTS[3:]])
    refused = invoke(command, *build_line(teacher, prompts, store))
    assert refused.exit_code == 1
    assert "line 3: 'bird', but" in refused.output and "with 'cat'; a list may only grow at its end" in refused.output
    assert tree(store) == tree(whole)


def test_halves_merge_and_blocks_are_sampled_again(teacher: Path, whole: Path, tmp_path: Path, invoke: Invoke) -> None:
    prompts = whole.with_name("prompts.txt")
    for name, seeds in (("one.zarr", "0:8"), ("two.zarr", "8:16")):
        line = build_line(teacher, prompts, tmp_path / name, "--seeds", seeds)
        assert invoke(command, *line).exit_code == 0
    merge([TrajectoryCache.open(tmp_path / name) for name in ("one.zarr", "two.zarr")], tmp_path / "merged.zarr")
    assert tree(tmp_path / "merged.zarr") == tree(whole)
    again = invoke(command, "verify", tmp_path / "merged.zarr", "--recompute", 2, "--batch-size", 4, "--device", "cpu")
    assert again.exit_code == 0, again.output
    assert "same" in again.output


def test_what_is_left_out_and_what_it_will_cost_is_said(teacher: Path, tmp_path: Path, invoke: Invoke) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", TEXTS[:7])
    planned = invoke(command, *build_line(teacher, prompts, tmp_path / "toy.zarr", "--dry-run"))
    assert planned.exit_code == 0, planned.output
    assert "6 prompts with 2 seeds each; guidance 5, 2 evaluations per prediction" in planned.output
    assert "encoded       prompt_embeds 16×32" in planned.output
    assert "96 of one image" in planned.output
    assert not (tmp_path / "toy.zarr").exists()
    built = invoke(command, *build_line(teacher, prompts, tmp_path / "toy.zarr"))
    assert "the last 1 of 7 prompts fill no whole block of 4 seeds and are left out; --block-size 2" in built.output
    looked = invoke(command, "info", tmp_path / "toy.zarr")
    assert "prompts       6 with 2 seeds each; guidance 5, 2 evaluations per prediction" in looked.output
    assert "conditions/prompt_embeds: 16×32 float32 per 2 seeds" in looked.output
    drawn = invoke(command, "preview", tmp_path / "toy.zarr", "--out", tmp_path / "toy.png")
    assert drawn.exit_code == 0 and (tmp_path / "toy.png").is_file()


def test_a_negative_prompt_leads_away(teacher: Path, tmp_path: Path, invoke: Invoke) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "cat"}\n{"prompt": "cat", "negative": "dog"}\n')
    line = build_line(teacher, prompts, tmp_path / "toy.zarr", "--seeds-per-prompt", 2)
    assert invoke(command, *line).exit_code == 0
    cache = TrajectoryCache.open(tmp_path / "toy.zarr")
    assert [prompt.negative for prompt in cache.prompts.texts([0, 1])] == ["", "dog"]
    prompts.write_text('{"prompt": "cat"}\n{"prompts": "cat"}\n')
    refused = invoke(command, *line)
    assert refused.exit_code == 2 and 'line 2: \'{"prompts": "cat"}\' is no prompt' in refused.output


def play(invoke: Invoke, number: int, smaller: dict[str, list[object]]) -> None:
    """Run a block of the page's commands, each with some more options."""
    entries = {"advkd-cache": command, "advkd-train": train, "advkd-sample": sample, "advkd-evaluate": evaluate}
    for line, (name, more) in zip(shell_blocks(PAGE)[number], smaller.items(), strict=True):
        assert line.startswith(name)
        words = shlex.split(line)
        result = invoke(entries[words[0]], *words[1:], *more)
        assert result.exit_code == 0, result.output


def test_the_page_has_two_blocks_of_commands() -> None:
    assert len(shell_blocks(PAGE)) == 2


def test_the_hearts_commands_run(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fewer = ("pretrain.steps=2", "pretrain.autoencoder.steps=2", "pretrain.classifier.epochs=1")
    sizes = ("pretrain.report_samples=64", "cache.block_size=16", "cache.batch_size=16", "sampler.steps=5")
    training = ("train.steps=2", "train.batch_size=8", "train.student.width=8")
    smaller = {
        "advkd-cache build": [*settings(*fewer, *sizes), "--seeds", "0:32"],
        "advkd-train": settings(*training),
        "advkd-sample": [],
    }
    play(invoke, 1, smaller)
    cache = TrajectoryCache.open(tmp_path / "cache/emoji-names.zarr")
    assert cache.recipe.prompts is not None and cache.recipe.prompts.guidance == 3.0
    assert (tmp_path / "hearts.png").is_file()


def test_the_page_s_commands_run(
    teacher: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With smaller numbers where they only cost time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers/mine").symlink_to(teacher)
    write_prompts(tmp_path / "prompts.txt", TEXTS * 4)
    smaller = {
        "advkd-cache build": ["--block-size", 16, "--steps", 4, "--record", 2],
        "advkd-train": settings("train.steps=4", "train.batch_size=8", "train.student.attention=false"),
        "advkd-sample": [],
        "advkd-evaluate": ["--sets", 2, *settings("evaluate.set_size=16", "evaluate.solver_steps=[2]")],
    }
    play(invoke, 0, smaller)
    assert (tmp_path / "apples.png").is_file()
    (code,) = python_blocks(PAGE)
    made: dict[str, torch.Tensor] = {}
    exec(code, made)
    assert made["images"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index | {"_class_name": "StableDiffusionImg2ImgPipeline"}, "changes an image"),
        (lambda index: index | {"_class_name": "AnimateDiffPipeline"}, "makes video"),
        (lambda index: index | {"_class_name": "AudioLDMPipeline"}, "makes sound"),
        (lambda index: index | {"_class_name": "MyPipeline"}, "code from a repository is never run"),
        (lambda index: index | {"unet": ["os", "system"]}, "its part unet is of 'os'"),
    ],
)
def test_other_pipelines_are_refused(teacher: Path, tmp_path: Path, invoke: Invoke, change: object, said: str) -> None:
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(change(index)))  # type: ignore[operator]
    prompts = write_prompts(tmp_path / "prompts.txt", TEXTS)
    refused = invoke(command, *build_line(other, prompts, tmp_path / "toy.zarr"))
    assert refused.exit_code == 1 and said in refused.output, refused.output
    assert not (tmp_path / "toy.zarr").exists()


def test_a_pipeline_without_prompts_says_what_it_wants(teacher: Path, tmp_path: Path, invoke: Invoke) -> None:
    refused = invoke(command, "build", "--teacher", teacher, "--out", tmp_path / "toy.zarr")
    assert refused.exit_code == 1 and "--prompts" in refused.output
