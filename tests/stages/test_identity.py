"""Fingerprints of the shipped experiments and of each sampler, pinned: existing stores must stay extendable."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from advkd.pipeline.config import load_experiment
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig

UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "block_out_channels": [8, 16],
    "center_input_sample": False,
    "class_embed_type": None,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "downsample_type": "conv",
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 1,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": 1e-05,
    "norm_num_groups": 4,
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "out_channels": 1,
    "resnet_time_scale_shift": "default",
    "sample_size": 8,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "upsample_type": "conv",
}
"""As diffusers 0.42 saves it."""
DDPM = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
"""The default of diffusers' unconditional training; stage 0 of advkd saves `NO_CLIP`."""
NO_CLIP = DDPM | {"clip_sample": False, "timestep_spacing": "trailing"}

EXPERIMENTS = {
    "celebahq256": "bceacd72de4d2c5e4e519c5e 7687eca4a40f90170a6c328d",
    "cifar10": "9f439ac65acfd8a45bc3993c cdcb74ff8aa6aa574fa4977a",
    "digits": "52070fed2f7fd07cd68f52f4 dd6bcccc8f979b81141cec4c",
    "digits-long": "52070fed2f7fd07cd68f52f4 dd6bcccc8f979b81141cec4c",
    "digits-small": "52070fed2f7fd07cd68f52f4 dd6bcccc8f979b81141cec4c",
    "mnist": "e603f907e1529731e132e408 99e8852072f251c19c3e3f18",
    "mnist-progressive": "e603f907e1529731e132e408 99e8852072f251c19c3e3f18",
    "mnist-small": "e603f907e1529731e132e408 99e8852072f251c19c3e3f18",
    "smoke": "257c900c210b561ba2394d04 cec1e46d78a69aae3e8475e4",
}
SAMPLERS: dict[tuple[str, str, int, float, str], str] = {
    ("no clip", "ddim", 10, 0.0, "leading"): "55cadfd5b88c45405cf2cb83 9d1626607adb4c459e058ace",
    ("no clip", "ddim", 8, 0.5, "trailing"): "bdad8662c3f19caa2aca9d16 f5216bd91decf3a934d5a5e1",
    ("no clip", "ddpm", 7, 0.0, "trailing"): "c302430e3dc21504f5c755f3 5e54f07b418ce802298ace42",
    ("no clip", "ddpm", 7, 0.0, "linspace"): "5f558886bd97a15937b55996 2405232d14c82226bd230ef4",
    ("no clip", "dpmsolver++", 7, 0.0, "trailing"): "a0bf3a2c4d3cfa9c567d69d1 5e54f07b418ce802298ace42",
    ("no clip", "dpmsolver++", 7, 0.0, "leading"): "37e579ec3db7c93dbe1ffbcd 43c705445ca816a67ad34651",
    ("no clip", "euler", 7, 0.0, "trailing"): "855916e887e46a72ebcb146f 0dcd0360fde7496e4a78342c",
    ("no clip", "euler", 7, 0.0, "linspace"): "156aeb49123c88f3f0c084b4 bc8cfb25fa34c8df3056893b",
    ("no clip", "heun", 7, 0.0, "trailing"): "1e1ccf1331979a2de5db7eb8 0dcd0360fde7496e4a78342c",
    ("clip", "ddim", 50, 0.0, "trailing"): "2fc7bac3ea22cc2ca23d8d4f e7528bc8f143c5e06b26607d",
    ("clip", "ddpm", 1000, 0.0, "trailing"): "d8d18ddad6c24decb8a25ddc f204c7bbf551cdf8ad0a6ee4",
    ("clip", "heun", 10, 0.0, "trailing"): "39fc5d44d37c512bc8eb0f03 6e6bac829632b0cc18c13ad0",
    ("threshold", "ddim", 10, 0.0, "trailing"): "63ec0762ee85a74b5c740045 df0a923e94cf2d9d867038e2",
    ("threshold", "dpmsolver++", 10, 0.0, "trailing"): "fffa3de9b5414e0ecfd306ab df0a923e94cf2d9d867038e2",
    ("zero SNR", "ddim", 10, 0.0, "trailing"): "2363d5cb11c6d7938da006a5 80f1c6f5ae40ac5fbc7dc0be",
    ("cosine v", "dpmsolver++", 10, 0.0, "trailing"): "f2787495b9846a661ac60b55 6765e8363b7cbeefe14aa7ac",
}
TEACHERS = {
    "clip": DDPM,
    "no clip": NO_CLIP,
    "threshold": NO_CLIP | {"thresholding": True, "sample_max_value": 2.0},
    "zero SNR": NO_CLIP | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "cosine v": NO_CLIP | {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pipeline folders with one set of weights that no random generator made, by the kind of their scheduler."""
    from diffusers import UNet2DModel

    options = {key: value for key, value in UNET.items() if not key.startswith("_")}
    shapes = {name: tensor.shape for name, tensor in UNet2DModel(**options).state_dict().items()}
    weights = {name: (torch.arange(shape.numel()) % 17 / 64).reshape(shape) for name, shape in shapes.items()}
    folders = {}
    for kind, scheduler in TEACHERS.items():
        folder = tmp_path_factory.mktemp("teacher") / "pipeline"
        for part, name, config in (("unet", "config", UNET), ("scheduler", "scheduler_config", scheduler)):
            (folder / part).mkdir(parents=True)
            (folder / part / f"{name}.json").write_text(json.dumps(config))
        save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors")
        folders[kind] = str(folder)
    return folders


def plan(teacher: str, sampler: SamplerConfig, config: CacheConfig) -> Plan:
    return make_plan(TeacherConfig(source=teacher), sampler, config, Path("unused.zarr"))


def identity(plan: Plan) -> str:
    return f"{plan.recipe.fingerprint[:24]} {plan.layout.layout_hash[:24]}"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_shipped_experiments_keep_their_identity(teachers: dict[str, str], name: str) -> None:
    experiment = load_experiment(name)
    assert identity(plan(teachers["no clip"], experiment.sampler, experiment.cache)) == EXPERIMENTS[name]


@pytest.mark.parametrize("case", SAMPLERS, ids=lambda case: "-".join(map(str, case)))
def test_samplers_keep_their_identity(teachers: dict[str, str], case: tuple[str, str, int, float, str]) -> None:
    teacher, name, steps, eta, spacing = case
    sampler = SamplerConfig(name=name, steps=steps, eta=eta, spacing=spacing)
    assert identity(plan(teachers[teacher], sampler, CacheConfig(record=steps, device="cpu"))) == SAMPLERS[case]
