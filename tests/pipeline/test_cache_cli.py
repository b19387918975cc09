"""`advkd-cache` beyond `build`: what each command says, writes and returns."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.recipe import digest
from advkd.cache.read.compare import tolerance_of
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from advkd.pipeline.cli.cache import main as command
from advkd.stages.teacher.build.recompute import plan_of
from advkd.stages.teacher.sample.sampling import initial_noise, record_states
from tests.cache import golden
from tests.conftest import Invoke
from tests.stores import block_states, make_layout, make_recipe, tree, write_store

BUILD = ("build", "--seeds", "0:24", "--block-size", "8", "--batch-size", "8", "--record", "2", "--steps", "6")


@pytest.fixture
def built(invoke: Invoke, pipeline_folder: Path, tmp_path: Path) -> Path:
    """A store that a real teacher, with a model card, made."""
    teacher = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, teacher)
    (teacher / "README.md").write_text(
        "---\nlicense: cc-by-4.0\nattribution: By A\nid2label: {0: faces, 1: hands}\n---\n# A\n"
    )
    assert invoke(command, *BUILD, "--teacher", teacher, "--out", "a.zarr").exit_code == 0
    return tmp_path / "a.zarr"


def test_info_tells_what_it_is_and_who_made_it(invoke: Invoke, built: Path, tmp_path: Path) -> None:
    invoke(command, *BUILD, "--teacher", tmp_path / "teacher", "--out", "a.zarr", "--seeds", "40:48")
    text = invoke(command, "info", built).output
    assert "0:24, 40:48: 32 in 4 blocks of 8" in text and "24:40 declared, but not built" in text
    assert f"teacher       {tmp_path}/teacher, tensors" in text and "licence       cc-by-4.0" in text
    assert "attribution   By A\n" in text and "classes       faces, hands\n" in text
    summary = json.loads(invoke(command, "info", built, "--json").output)
    cache = TrajectoryCache.open(built)
    assert summary["digest"] == cache.digest and summary["fingerprint"] == cache.recipe.fingerprint
    assert summary["num_bytes"] == sum(path.stat().st_size for path in built.glob("states/*/c/*/0/0/0"))
    first, _, last = summary["states"]
    assert (first["rounding_rms"], first["tolerance_rms"]) == (0.0, 0.0)
    values = cache.rows(6, cache.seeds())
    assert (last["minimum"], last["maximum"]) == (float(values.min()), float(values.max()))
    assert 0 < last["rounding_rms"] < 1e-3 and last["rounding_rms"] < last["rounding_max"] < 4e-3
    assert last["tolerance_rms"] == tolerance_of(cache)[6] >= 2**-10


def test_rounding_is_what_storing_cost(built: Path) -> None:
    cache = TrajectoryCache.open(built)
    plan, seeds = plan_of(cache, None, 8, "cpu"), range(8, 16)
    noise = initial_noise(0, seeds, cache.item_shape, "float16")
    computed = record_states(plan.teacher, plan.path, noise, seeds=seeds, root_seed=0, record=cache.states)
    for step in cache.states:
        lost = cache.rows(step, range(8, 16)).astype(np.float64) - computed[step].numpy()
        entry = cache.record(1).arrays[f"states/{step:04d}"]
        assert entry.rounding_rms == pytest.approx(np.sqrt(np.mean(lost**2)), rel=6e-3)
        assert entry.rounding_max == pytest.approx(np.abs(lost).max(), rel=6e-3)


def test_float32_states_lose_nothing(invoke: Invoke, built: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    assert invoke(command, *BUILD, "--teacher", teacher, "--dtype", "float32", "--out", "full.zarr").exit_code == 0
    half, full = TrajectoryCache.open(built), TrajectoryCache.open("full.zarr")
    assert half.recipe.fingerprint == full.recipe.fingerprint
    assert {entry.rounding_max for entry in full.record(0).arrays.values()} == {0.0}
    np.testing.assert_array_equal(full.rows(0, range(24)).astype(np.float16), half.rows(0, range(24)))


def test_verify_finds_repairs_and_build_makes_it_again(invoke: Invoke, built: Path, tmp_path: Path) -> None:
    whole = tree(built)
    result = invoke(command, "verify", built)
    assert result.exit_code == 0 and "3 blocks" in result.output and "all as recorded" in result.output
    chunk = built / "states/0003/c/1/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[70] ^= 16
    chunk.write_bytes(data)
    result = invoke(command, "verify", built)
    assert result.exit_code == 1
    assert "damage  states/0003/c/1/0/0/0: its sha256 is" in result.output
    assert "(block 1, state 0003)" in result.output and "1 findings" in result.output
    (finding,) = json.loads(invoke(command, "verify", built, "--json").output)["findings"]
    assert (finding["block"], finding["state"], finding["kind"]) == (1, "0003", "damage")
    result = invoke(command, "verify", built, "--repair")
    assert result.exit_code == 1 and "block 1 is no longer recorded" in result.output
    result = invoke(command, *BUILD, "--teacher", tmp_path / "teacher", "--out", "a.zarr")
    assert "built 1 blocks, 2 were there" in result.output
    assert tree(built) == whole
    assert invoke(command, "verify", built).exit_code == 0


def test_what_is_missing_is_not_sampled_again_unasked(invoke: Invoke, built: Path, tmp_path: Path) -> None:
    (built / "states/0003/c/1/0/0/0").unlink()
    before = tree(built)
    result = invoke(command, *BUILD, "--teacher", tmp_path / "teacher", "--out", "a.zarr", "--seeds", "0:32")
    assert result.exit_code == 1 and result.stderr.count("error:") == 1
    assert "1 blocks are in the ledger but not wholly here (the first: block 1, seeds 8:16)" in result.stderr
    assert tree(built) == before


def test_recomputing_gives_the_same_bytes_here(invoke: Invoke, built: Path) -> None:
    result = invoke(command, "verify", built, "--recompute", "2", "--batch-size", "8")
    assert result.exit_code == 0, result.output
    assert result.output.count("sampled again to the same bytes") == 2


def test_recomputing_tells_a_small_difference_from_a_wrong_one(invoke: Invoke, built: Path, tmp_path: Path) -> None:
    cache = TrajectoryCache.open(built)
    writer = CacheWriter.open(built, cache.recipe, cache.layout)
    states = {step: cache.rows(step, range(8)).astype(np.float32) for step in cache.states}
    for off, verdict, code in ((tolerance_of(cache)[6] / 2, "within", 0), (0.05, "BEYOND", 1)):
        writer.commit(0, {**states, 6: states[6] + np.float32(off)})
        result = invoke(command, "verify", built, "--recompute", "3", "--batch-size", "8")
        assert f"block 0: sampled again, {verdict} the recorded tolerance (state 0006" in result.output
        assert result.exit_code == code


def test_recomputing_needs_the_very_teacher(invoke: Invoke, built: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"conv_out.bias": tensors["conv_out.bias"] + 1e-3}, weights)
    result = invoke(command, "verify", built, "--recompute", "1")
    assert result.exit_code == 1 and "teacher.tensors_sha256" in result.stderr
    (built / "provenance/store.json").unlink()
    result = invoke(command, "verify", built, "--recompute", "1")
    assert result.exit_code == 2 and "give --teacher" in result.stderr


def test_preview_draws_a_sheet_and_a_film(invoke: Invoke, store: Path) -> None:
    result = invoke(command, "preview", store, "--seeds", "0:5", "--out", "look.png")
    assert result.exit_code == 0 and "look.png  look.gif" in result.output
    with Image.open("look.png") as sheet:
        assert sheet.width > 3 * 64 and sheet.height > 5 * 64
    with Image.open("look.gif") as film:
        assert film.n_frames == 3
        sizes = set()
        for frame in range(3):
            film.seek(frame)
            sizes.add(film.size)
    assert len(sizes) == 1
    assert invoke(command, "preview", store).exit_code == 0 and Path("toy.gif").is_file()
    for wrong in (("--seeds", "0:9999"), ("--out", "look.jpg"), ("--seeds", "5")):
        result = invoke(command, "preview", store, *wrong)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert invoke(command, "preview", store, "--seeds", "250:260").exit_code == 1


def test_diff_is_silent_about_nothing(invoke: Invoke, store: Path, tmp_path: Path) -> None:
    result = invoke(command, "diff", store, store)
    assert result.exit_code == 0 and "the same: 16 blocks" in result.output
    write_store(tmp_path / "more.zarr", "0:288")
    result = invoke(command, "diff", store, "more.zarr")
    assert result.exit_code == 1 and "only in more.zarr: 256:288" in result.output
    write_store(tmp_path / "other.zarr", "0:16", noise={"rule": "philox4x64-as241-v1", "root_seed": 1})
    result = invoke(command, "diff", store, "other.zarr")
    assert result.exit_code == 1 and "recipe    noise.root_seed: 0 → 1" in result.output
    layout = make_layout()
    states = block_states(layout, 0)
    CacheWriter.open("more.zarr", make_recipe(), layout).commit(0, {**states, 4: states[4] + np.float32(0.5)})
    result = invoke(command, "diff", store, "more.zarr")
    assert "block     0: rms 0004 5.0e-01 (beyond the recorded tolerance)" in result.output


def test_merge_and_subset_say_what_they_did(invoke: Invoke, store: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "more.zarr", "192:320")
    result = invoke(command, "merge", store, "more.zarr", "--out", "all.zarr")
    assert result.exit_code == 0 and "20 blocks added, 0 were there (files: 60 as hard link)" in result.output
    result = invoke(command, "merge", store, "more.zarr", "--out", "all.zarr", "--prefer", "elsewhere")
    assert result.exit_code == 2 and "--prefer elsewhere is none of the stores" in result.stderr
    result = invoke(command, "subset", "all.zarr", "--seeds", "0:100", "--states", "0,4", "--out", "part.zarr")
    assert result.exit_code == 0 and "7 blocks added" in result.output
    assert sorted(TrajectoryCache.open("part.zarr").states) == [0, 4]
    for wrong in (("--states", "x"), ("--seeds", "9:1")):
        assert invoke(command, "subset", "all.zarr", *wrong, "--out", "no.zarr").exit_code == 2
    assert not Path("no.zarr").exists()


def test_someone_elses_names_cannot_rule_the_terminal(invoke: Invoke, store: Path) -> None:
    origin = {"teacher": {"source": "\x1b[2Jevil\r\nlines", "commit": None, "license": "\x07"}}
    write_atomically(store / "provenance/store.json", [seal(origin)])
    path = store / "zarr.json"
    value = json.loads(path.read_text())
    attributes = value["attributes"]["advkd"]
    attributes["recipe"]["sampler"]["name"] = "\x1b]0;title\x07ddim"
    attributes["fingerprint"] = digest(attributes["recipe"])
    path.write_text(json.dumps(value))
    for arguments in (("info", store), ("diff", store, golden.FORMAT_1), ("verify", store)):
        result = invoke(command, *arguments)
        assert not set(result.output + result.stderr) & set("\x1b\x07\r")


@pytest.mark.parametrize("name", ["info", "verify", "preview", "diff", "merge", "subset"])
def test_what_is_no_cache_is_said_in_one_line_and_left_alone(invoke: Invoke, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    rest = {"diff": ["folder"], "merge": ["--out", "out.zarr"], "subset": ["--out", "out.zarr"]}.get(name, [])
    for target in ("folder", "nothing", "folder/notes.txt"):
        result = invoke(command, name, target, *rest)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
        assert result.stderr.startswith("error: ")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["folder", "notes.txt"]


def test_info_shows_what_the_sampler_did_and_the_range_of_x_0(invoke: Invoke, tmp_path: Path) -> None:
    config = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": True, "clip_sample_range": 2.0}
    sampler = {
        **make_recipe().sampler, "scheduler": "DDIMScheduler", "eta": 0.5, "config": config, "landing": "next"
    }  # fmt: skip
    write_store(tmp_path / "a.zarr", "0:16", sampler=sampler)
    text = invoke(command, "info", tmp_path / "a.zarr").output
    assert "eta 0.5, spacing leading, steps_offset 1, landing next, x_0 clipped to ±2.0" in text
    x_0 = TrajectoryCache.open(tmp_path / "a.zarr").rows(4, range(16))
    assert f"x_0           values {x_0.min():+.2f} to {x_0.max():+.2f}\n" in text
    summary = json.loads(invoke(command, "info", tmp_path / "a.zarr", "--json").output)
    assert (summary["sampler"]["spacing"], summary["sampler"]["clips_x0"]) == ("leading", 2.0)
    write_store(tmp_path / "b.zarr", "0:16", sampler={**sampler, "config": {"thresholding": True}, "eta": 10**400})
    text = invoke(command, "info", tmp_path / "b.zarr").output
    assert "x_0 thresholded at 1.0" in text and "spacing" not in text
    # The teacher's option stands in the recipe, but this class has none of that name.
    write_store(tmp_path / "c.zarr", "0:16", sampler={**sampler, "scheduler": "DPMSolverMultistepScheduler"})
    assert "clipped" not in invoke(command, "info", tmp_path / "c.zarr").output
