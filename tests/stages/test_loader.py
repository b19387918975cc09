"""Teachers: every usual layout is loaded, and what can't be sampled from is refused by name."""

import fnmatch
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from advkd.cache.errors import TeacherError, UsageError
from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.stages.teacher.build.block import sample_block
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.build.recompute import plan_of
from advkd.stages.teacher.build.resources import measure_evaluation
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.load.network import Teacher
from tests.conftest import Invoke


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"sample_size": [8, 16, 4]}, r"\[8, 16, 4\]; expected up to"),
        ({"sample_size": [8, 7]}, "can't evaluate an item of 1×8×7 .*expected a multiple of 2"),
        ({"sample_size": None}, "no sample_size"),
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel"),
        ({"out_channels": 3}, "1 channels in, 3 out .*something else than an image"),
        ({"in_channels": 2}, "2 channels in, 1 out .*conditioned on an image"),
        ({"num_class_embeds": 10}, r"don't fit its configuration .*1 missing keys"),
        ({"block_out_channels": [8, 12]}, r"don't fit its configuration .*\d+ mismatched keys"),
        ({"block_out_channels": []}, "can't be loaded"),
        ({"norm_num_groups": 0}, "can't be loaded"),
        ({"in_channels": "x", "out_channels": "x"}, "x×8×8; expected up to"),
        ({"sample_size": 7}, "can't evaluate an item of 1×7×7 .*expected a multiple of 2"),
    ],
)
def test_unusable_networks_are_refused(
    pipeline_folder: Path, tmp_path: Path, edit: dict[str, object], message: str
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(TeacherError, match=message):
        load_teacher(TeacherConfig(source=str(folder)), torch.device("cpu"))


def test_unusable_folders_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    device = torch.device("cpu")

    def refused(message: str) -> None:
        with pytest.raises(TeacherError, match=message):
            load_teacher(TeacherConfig(source=str(tmp_path / "teacher")), device)

    refused("no such folder")
    shutil.copytree(pipeline_folder, tmp_path / "teacher")
    scheduler = tmp_path / "teacher/scheduler/scheduler_config.json"
    text = scheduler.read_text()
    scheduler.write_text(text.replace("DDPMScheduler", "ScoreSdeVeScheduler"))
    refused(r"'ScoreSdeVeScheduler' is unknown; expected a discrete .*DDPMScheduler.*FlowMatchEuler")
    scheduler.write_text("{")
    refused("not readable JSON")
    scheduler.write_text(text)
    weights = tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused("only safetensors are loaded")
    shutil.rmtree(tmp_path / "teacher/unet")
    refused("no network in it")


def test_missing_weights_are_never_made_up(pipeline_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if "mid_block" not in name}, path)
    with pytest.raises(TeacherError, match=r"weights that don't fit its configuration \(\d+ missing keys\)"):
        load_teacher(TeacherConfig(source=str(folder)), torch.device("cpu"))
    save_file(weights | {"another.weight": torch.zeros(2)}, path)
    with pytest.raises(TeacherError, match="1 unexpected keys"):
        load_teacher(TeacherConfig(source=str(folder)), torch.device("cpu"))


@pytest.mark.parametrize(
    "edit",
    [
        {"beta_schedule": "foo"},
        {"prediction_type": "foo"},
        {"num_train_timesteps": "x"},
        {"beta_start": None},
        {"trained_betas": [0.1, 0.2]},
        {"beta_start": float("nan")},
    ],
)
def test_impossible_schedulers_are_refused(pipeline_folder: Path, tmp_path: Path, edit: dict[str, object]) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    cache = CacheConfig(seeds="0:8", device="cpu")
    with pytest.raises((TeacherError, UsageError)):
        build(make_plan(TeacherConfig(source=str(folder)), SamplerConfig(steps=4), cache, tmp_path / "a.zarr"))
    assert not (tmp_path / "a.zarr").exists()


TINY = {
    "sample_size": 32,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CPU = torch.device("cpu")


def saved(folder: Path, *, scheduler: dict[str, object] | None = None, half: bool = False, **options: Any) -> Path:
    """A colour pipeline with attention; `options` of the UNet, or of `save_pretrained`."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    how = {key: options.pop(key) for key in ("variant", "max_shard_size") if key in options}
    unet = UNet2DModel(**{**TINY, **options})
    pipeline = DDPMPipeline(unet=unet.half() if half else unet, scheduler=DDPMScheduler(**scheduler or {}))
    pipeline.save_pretrained(folder, **how)
    return folder


def load(folder: Path, **parts: str) -> Teacher:
    return load_teacher(TeacherConfig(source=str(folder), **parts), CPU)


def test_sharded_weights_are_the_same_teacher(tmp_path: Path) -> None:
    whole, sharded = saved(tmp_path / "a"), saved(tmp_path / "b", max_shard_size="100KB")
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 2
    assert load(sharded).identity() == load(whole).identity()
    next((sharded / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(TeacherError, match=r"index\.json names 'diffusion_pytorch_model-00002-of"):
        load(sharded)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", max_shard_size="100KB")
    other = saved(tmp_path / "b") / "unet/diffusion_pytorch_model.safetensors"
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    for name in (str(other), "../../b/unet/diffusion_pytorch_model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        with pytest.raises(TeacherError, match="not beside it"):
            load(folder)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}])
def test_a_variant_is_loaded_when_it_is_named(tmp_path: Path, shards: dict[str, str]) -> None:
    folder = saved(tmp_path / "a", half=True, variant="fp16", **shards)
    with pytest.raises(TeacherError, match=r"teacher\.variant.* fp16"):
        load(folder)
    with pytest.raises(TeacherError, match=r"no diffusion_pytorch_model\.ema\.safetensors.* fp16"):
        load(folder, variant="ema")
    assert load(folder, variant="fp16").parts == {"variant": "fp16"}


def test_half_precision_weights_are_hashed_as_they_were_saved(tmp_path: Path) -> None:
    """The page's rule, applied to the file: the same weights in another precision are other tensors."""
    from safetensors.torch import load_file

    identities = []
    for name, half in (("half", True), ("full", False)):
        folder = saved(tmp_path / name, half=half)
        stored = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
        total = hashlib.sha256()
        for key in sorted(stored):
            total.update(f"{key} {stored[key].dtype} {list(stored[key].shape)}\n".encode())
            total.update(stored[key].numpy().tobytes())
        teacher = load(folder)
        assert teacher.tensors_sha256 == total.hexdigest()
        assert {parameter.dtype for parameter in teacher.network.parameters()} == {torch.float32}
        identities.append(teacher.tensors_sha256)
    assert len(set(identities)) == 2


def test_weights_are_those_that_diffusers_loads(tmp_path: Path) -> None:
    """Also under the names that attention layers had before, as in google/ddpm-cifar10-32."""
    from diffusers import UNet2DModel
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path / "a")
    today, path = load(folder), folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in weights.items()}
    assert any(".query." in name for name in weights)
    save_file(weights, path)
    theirs = UNet2DModel.from_pretrained(folder / "unet").state_dict()
    ours = load(folder)
    assert ours.identity() == today.identity()
    assert list(theirs) == list(ours.network.state_dict())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.network.state_dict().items())


def test_parts_lie_where_the_configuration_says(pipeline_folder: Path, tmp_path: Path) -> None:
    whole = load(pipeline_folder)
    folder = shutil.copytree(pipeline_folder, tmp_path / "a")
    (folder / "unet").rename(folder / "unet_ema")
    with pytest.raises(TeacherError, match=r"teacher\.unet.* \(unet_ema\)"):
        load(folder)
    assert load(folder, unet="unet_ema").identity() == whole.identity()
    alone = shutil.copytree(pipeline_folder / "unet", tmp_path / "alone")
    with pytest.raises(TeacherError, match=r"no scheduler in it.*teacher\.scheduler"):
        load(alone)
    for scheduler in (
        pipeline_folder,
        pipeline_folder / "scheduler",
        pipeline_folder / "scheduler/scheduler_config.json",
    ):
        assert load(alone, scheduler=str(scheduler)).identity() == whole.identity()
    with pytest.raises(TeacherError, match="no scheduler at nowhere"):
        load(alone, scheduler="nowhere")
    (folder / "model_index.json").unlink()
    assert load(folder, unet="unet_ema").identity() == whole.identity()


def test_a_store_remembers_its_teachers_parts(pipeline_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    alone = shutil.copytree(pipeline_folder / "unet", tmp_path / "alone")
    teacher = TeacherConfig(source=str(alone), scheduler=str(pipeline_folder))
    cache = CacheConfig(seeds="0:8", record=2, block_size=8, batch_size=8, device="cpu")
    build(make_plan(teacher, SamplerConfig(steps=2), cache, tmp_path / "a.zarr"))
    again = plan_of(TrajectoryCache.open(tmp_path / "a.zarr"), None, 8, "cpu")
    assert again.teacher.parts == {"scheduler": str(pipeline_folder)}
    moved = alone.rename(tmp_path / "moved")
    result = invoke(cache_command, "verify", tmp_path / "a.zarr", "--recompute", 1, "--teacher", moved)
    assert result.exit_code == 0, result.output


def test_a_named_teacher_keeps_the_recorded_parts_that_are_here(tmp_path: Path) -> None:
    here, origin = tmp_path / "here", {"source": "old", "commit": "0123abc", "unet": "unet_ema", "variant": "fp16"}
    here.mkdir()
    known = TeacherConfig(source="new", unet="unet_ema", variant="fp16")
    assert TeacherConfig.recorded(origin, "new") == known
    assert TeacherConfig.recorded({**origin, "scheduler": str(tmp_path / "elsewhere")}, "new") == known
    assert TeacherConfig.recorded({**origin, "scheduler": str(here)}, "new").scheduler == str(here)


def test_home_is_where_a_tilde_points(pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(pipeline_folder, tmp_path / "mine")
    assert load(Path("~/mine")).identity() == load(pipeline_folder).identity()


def test_a_pipeline_without_a_unet_is_named_as_what_it_is(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline_folder, tmp_path / "a")
    (folder / "unet").rename(folder / "prior")
    index = {"_class_name": "KandinskyPriorPipeline", "prior": ["diffusers", "PriorTransformer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError, match=r"no network in it .it is a KandinskyPriorPipeline: prior PriorTransformer"):
        load(folder)


@pytest.mark.parametrize(("num_timesteps", "spacing"), [(1000, "trailing"), (100, "leading")])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun"])
def test_learned_time_embeddings_take_whole_timesteps(
    tmp_path: Path, sampler: str, num_timesteps: int, spacing: str
) -> None:
    """Euler and Heun hand floats; few timesteps are as good as many."""
    embedding = {"time_embedding_type": "learned", "num_train_timesteps": num_timesteps}
    folder = saved(tmp_path / "a", scheduler={"num_train_timesteps": num_timesteps}, sample_size=8, **embedding)
    cache = CacheConfig(seeds="0:2", record=2, block_size=2, device="cpu")
    teacher = TeacherConfig(source=str(folder))
    plan = make_plan(teacher, SamplerConfig(name=sampler, steps=5, spacing=spacing), cache, tmp_path / "a.zarr")
    assert measure_evaluation(plan, repeats=1) > 0.0
    sample_block(plan, 0)
    if sampler != "ddim":
        with pytest.raises(TeacherError, match=r"one embedding per timestep.*fractional"):
            make_plan(teacher, SamplerConfig(name=sampler, steps=7, spacing="linspace"), cache, tmp_path / "a.zarr")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_noise_alone_tells_a_noise_predicting_teacher_nothing(
    pipeline_folder: Path, tmp_path: Path, sampler: str
) -> None:
    """With zero terminal SNR, x_0 = (x − σ ε) / 0 at the first timestep."""
    folder = shutil.copytree(pipeline_folder, tmp_path / "a")
    path = folder / "scheduler/scheduler_config.json"
    cache = CacheConfig(seeds="0:2", record=2, block_size=2, device="cpu")
    options = json.loads(path.read_text()) | {"rescale_betas_zero_snr": True, "clip_sample": False}

    def planned(spacing: str, prediction: str) -> Plan:
        path.write_text(json.dumps(options | {"prediction_type": prediction}))
        config = SamplerConfig(name=sampler, steps=5, spacing=spacing)
        return make_plan(TeacherConfig(source=str(folder)), config, cache, tmp_path / "a.zarr")

    with pytest.raises(TeacherError, match=r"predicts the noise.*timestep 999 without any signal.*--spacing leading"):
        planned("trailing", "epsilon")
    for plan in (planned("leading", "epsilon"), planned("trailing", "v_prediction")):
        sample_block(plan, 0)


def test_an_embedding_that_ends_before_the_scheduler_is_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", sample_size=8, time_embedding_type="learned", num_train_timesteps=100)
    with pytest.raises(TeacherError, match="can't evaluate an item of 3×8×8 at timestep 999"):
        load(folder)


def test_the_hub_is_asked_for_what_is_needed(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the JSON of a pipeline, then only its network's weights, of the same commit."""
    asked = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        for path in pipeline_folder.rglob("*"):
            name = path.relative_to(pipeline_folder).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / "0123abc" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "0123abc" / name)
        return str(tmp_path / "0123abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    teacher = load_teacher(TeacherConfig(source="some/teacher", revision="main"), CPU)
    assert (teacher.commit, teacher.identity()) == ("0123abc", load(pipeline_folder).identity())
    assert asked == [
        ("some/teacher", "main", ["*.json", "README.md"]),
        ("some/teacher", "0123abc", ["unet/diffusion_pytorch_model*.safetensors"]),
    ]


def test_a_flat_repository_loads_as_older_ones_are_laid_out(pipeline_folder: Path, tmp_path: Path) -> None:
    """google/ddpm-cifar10-32 keeps config.json, weights and scheduler_config.json at its root."""
    for path in (*(pipeline_folder / "unet").iterdir(), *(pipeline_folder / "scheduler").iterdir()):
        shutil.copy(path, tmp_path / path.name)
    flat = load_teacher(TeacherConfig(source=str(tmp_path)), torch.device("cpu"))
    nested = load_teacher(TeacherConfig(source=str(pipeline_folder)), torch.device("cpu"))
    assert flat.identity() == nested.identity()
