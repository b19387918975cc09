"""Text-to-image families are recorded through their own calls: what is cached is what the pipeline makes."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkd.cache.care.summary import origin_of
from advkd.cache.care.verify import verify
from advkd.cache.errors import ConfigError, MismatchError, TeacherError, UsageError
from advkd.cache.format.prompts import Prompt
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import merge
from advkd.stages.decoder import as_images, cache_decoder
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from tests.stages.family import SIDE, STEPS, TEXTS, Family
from tests.stages.text_families import FAMILIES
from tests.stages.text_to_image import load, stable_diffusion, unet
from tests.stores import tree

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    return Family(request.param, tmp_path, monkeypatch)


def test_cached_x_0_is_the_pipeline_s_own_output(family: Family, tmp_path: Path) -> None:
    """Bit for bit in the same batch, to 1e-4 in another one; images differ between prompts and seeds."""
    plan = family.plan(tmp_path / "toy.zarr", dtype="float32")
    assert build(plan).num_blocks == 2
    cache = TrajectoryCache.open(tmp_path / "toy.zarr")
    noise, x0 = torch.from_numpy(cache.rows(0, range(4))), cache.rows(STEPS, range(4))
    own = family.images(plan, noise, [TEXTS[0]] * 2 + [TEXTS[1]] * 2)
    assert x0.tobytes() == own.contiguous().numpy().tobytes()
    alone = family.images(plan, noise[3:], [TEXTS[1]])
    np.testing.assert_allclose(x0[3:], alone.numpy(), atol=1e-4 * float(np.abs(x0).max()))
    assert min(np.abs(x0[0] - x0[1]).max(), np.abs(x0[0] - x0[2]).max()) > 1e-2
    images = as_images(x0, cache_decoder(cache))
    shown = family.images(plan, noise, [TEXTS[0]] * 2 + [TEXTS[1]] * 2, decoded=True).numpy()
    np.testing.assert_allclose((images / 2.0 + 0.5).clip(0.0, 1.0), shown, atol=1e-4)
    assert shown.shape == (4, 3, family.side, family.side) and shown.std() > 1e-3
    assert verify(cache).findings == ()


def test_prompts_of_different_lengths_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the call takes no lists, each length is a call of its own."""
    family = Family("qwen-image", tmp_path, monkeypatch)
    family.prompts.write_text("\n".join(text for pair in zip(TEXTS[:2], TEXTS[2:], strict=True) for text in pair))
    plan = family.plan(tmp_path / "toy.zarr", dtype="float32", block_size=8, batch_size=8)
    build(plan)
    cache = TrajectoryCache.open(tmp_path / "toy.zarr")
    prompts = cache.recipe.prompts
    assert prompts is not None and prompts.embeddings[0].padded
    assert cache.prompts.lengths(prompts.embeddings[0], range(4)).tolist() == [5, 4, 5, 4]
    noise, x0 = torch.from_numpy(cache.rows(0, range(8))), cache.rows(STEPS, range(8))
    for places, texts in (([0, 1, 4, 5], TEXTS[:2]), ([2, 3, 6, 7], TEXTS[2:])):
        own = family.images(plan, noise[places], [texts[0]] * 2 + [texts[1]] * 2)
        assert x0[places].tobytes() == own.contiguous().numpy().tobytes()


def test_the_states_lie_on_the_recorded_path(family: Family, tmp_path: Path) -> None:
    """x_T is the seeds' noise, and the last state has no noise left."""
    plan = family.plan(tmp_path / "toy.zarr")
    build(plan)
    cache = TrajectoryCache.open(tmp_path / "toy.zarr")
    first, *_, last = cache.states.values()
    assert first.step == 0 and first.sigma > 0.9 * first.scale
    assert last.step == STEPS and last.alpha > 0.99 and last.sigma < 0.05
    assert len(cache.states) == 3


def test_stores_of_a_family_merge_and_continue_to_the_same_bytes(family: Family, tmp_path: Path) -> None:
    build(family.plan(tmp_path / "whole.zarr"))
    for name, seeds in (("one.zarr", "0:4"), ("two.zarr", "4:8")):
        build(family.plan(tmp_path / name, seeds=seeds))
    merge([TrajectoryCache.open(tmp_path / name) for name in ("one.zarr", "two.zarr")], tmp_path / "merged.zarr")
    assert tree(tmp_path / "merged.zarr") == tree(tmp_path / "whole.zarr")
    build(family.plan(tmp_path / "one.zarr"))
    assert tree(tmp_path / "one.zarr") == tree(tmp_path / "whole.zarr")


def test_embeddings_are_stored_once_per_prompt(family: Family, tmp_path: Path) -> None:
    build(family.plan(tmp_path / "toy.zarr"))
    cache = TrajectoryCache.open(tmp_path / "toy.zarr")
    prompts = cache.recipe.prompts
    assert prompts is not None
    assert [prompt.text for prompt in cache.prompts.texts([3, 0])] == [TEXTS[3], TEXTS[0]]
    assert cache.told([0, 7]) == [TEXTS[0], TEXTS[3]]
    names = {embedding.name for embedding in prompts.embeddings}
    assert "prompt_embeds" in names and not any(name.startswith("negative") for name in names)
    for embedding in prompts.embeddings:
        stored = cache.prompts.embedding(embedding, range(4))
        for number, text in enumerate(TEXTS):
            expected = family.encoded(Prompt(text=text))[embedding.name].numpy()
            length = len(expected)
            if embedding.padded:
                assert cache.prompts.lengths(embedding, [number]).tolist() == [length]
            assert stored[number, :length].tobytes() == expected.tobytes()
            assert not stored[number, length:].any()


def test_guidance_is_counted(family: Family, tmp_path: Path) -> None:
    """Flux's is distilled into the network; the others evaluate it twice."""
    plan = family.plan(tmp_path / "toy.zarr")
    expected = 1 if family.folder.name == "flux" else 2
    assert plan.recipe.evaluations_at_once == expected
    assert plan.evaluations_per_seed == STEPS * expected


@pytest.fixture
def sd3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    return Family("stable-diffusion-3", tmp_path, monkeypatch)


def test_a_wrong_table_of_levels_stops_the_build(sd3: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is kept."""
    from advkd.stages.teacher.path import solvers

    def wrong(scheduler: Any, landing: Any) -> list[tuple[float, float]]:
        return [(1.0 - float(sigma) ** 2, float(sigma)) for sigma in scheduler.sigmas]

    entry = solvers.SOLVERS["flow-euler"]
    changed = {field: getattr(entry, field) for field in entry.__slots__} | {"levels": wrong}
    monkeypatch.setitem(solvers.SOLVERS, "flow-euler", solvers.Solver(**changed))
    with pytest.raises(TeacherError, match=r"step 0 of its FlowMatchEulerDiscreteScheduler ends 0\.\d+ of the state"):
        build(sd3.plan(tmp_path / "toy.zarr"))
    assert not (tmp_path / "toy.zarr").exists()


def test_a_pipeline_that_changes_its_latents_between_steps_is_refused(sd3: Family, tmp_path: Path) -> None:
    plan = sd3.plan(tmp_path / "toy.zarr")
    pipe = plan.teacher.pipe  # type: ignore[union-attr]
    original = type(pipe).__call__

    class Meddling(type(pipe)):  # type: ignore[misc]
        @functools.wraps(original)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            def meddle(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                return {"latents": values["latents"] * 0.99}

            return original(self, *args, callback_on_step_end=meddle, **kwargs)

    pipe.__class__ = Meddling
    with pytest.raises(TeacherError, match="step 1 starts from something else than the state that the step before"):
        build(plan)
    assert not (tmp_path / "toy.zarr").exists()


def test_a_scheduler_is_replaced_where_another_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("stable-diffusion-xl", tmp_path, monkeypatch)

    def scheduler(**sampler: Any) -> Any:
        return make_plan(
            TeacherConfig(source=str(family.folder)),
            SamplerConfig(steps=STEPS, guidance=4.0, height=SIDE, width=SIDE, **sampler),
            CacheConfig(prompts=str(family.prompts), block_size=4, record=2, device="cpu"),
            tmp_path / "toy.zarr",
        ).recipe.sampler

    own, ddim = scheduler(), scheduler(name="ddim", spacing="trailing")
    assert (own["name"], own["scheduler"], own["config"]["timestep_spacing"]) == (
        "euler",
        "EulerDiscreteScheduler",
        "leading",
    )
    assert (ddim["name"], ddim["scheduler"], ddim["config"]["timestep_spacing"]) == (
        "ddim",
        "DDIMScheduler",
        "trailing",
    )
    assert own["call"] == {"height": SIDE, "width": SIDE}
    with pytest.raises(ConfigError, match="adds noise at each step"):
        scheduler(name="ddpm")
    with pytest.raises(ConfigError, match="can't follow the pipeline's EulerDiscreteScheduler"):
        scheduler(name="flow-euler")
    with pytest.raises(ConfigError, match=r"sampler\.call: colour is none of StableDiffusionXLPipeline's"):
        scheduler(call={"colour": 3})
    with pytest.raises(ConfigError, match=r"sampler\.call: height is set by another key"):
        scheduler(call={"height": 3})


def test_a_scheduler_without_a_table_is_refused_with_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Stable Diffusion 1's own is."""
    from diffusers import PNDMScheduler

    family = Family("stable-diffusion-xl", tmp_path, monkeypatch)
    PNDMScheduler(skip_prk_steps=True, steps_offset=1).save_pretrained(family.folder / "scheduler")
    index = family.folder / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "PNDMScheduler"))
    with pytest.raises(
        TeacherError, match=r"with a PNDMScheduler: advkd has no table .*; --sampler replaces it by .*dpm"
    ):
        family.plan(tmp_path / "toy.zarr")


def save_lora(folder: Path) -> Path:
    """A LoRA of a Stable Diffusion's network, as diffusers saves one."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    network = unet()
    network.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def test_a_lora_is_fused_and_part_of_the_identity(tmp_path: Path) -> None:
    teacher, lora = stable_diffusion(tmp_path / "teacher"), save_lora(tmp_path / "lora")
    (tmp_path / "prompts.txt").write_text("cat\ndog\n")

    def planned(store: str, lora: str | None) -> Plan:
        return make_plan(
            TeacherConfig(source=str(teacher), lora=lora),
            SamplerConfig(steps=STEPS, guidance=4.0),
            CacheConfig(
                prompts=str(tmp_path / "prompts.txt"), seeds_per_prompt=2, block_size=4, record=2, dtype="float32",
                batch_size=4, device="cpu",
            ),
            tmp_path / store,
        )  # fmt: skip

    plain, fused, by_folder = (
        planned(f"{name}.zarr", where) for name, where in (("a", None), ("b", str(lora)), ("c", str(lora.parent)))
    )
    assert plain.recipe.fingerprint != fused.recipe.fingerprint == by_folder.recipe.fingerprint
    build(fused)
    cache, pipe = TrajectoryCache.open(tmp_path / "b.zarr"), load(teacher)
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    made = pipe(
        prompt=["cat", "cat", "dog", "dog"], latents=torch.from_numpy(cache.rows(0, range(4))), guidance_scale=4.0,
        num_inference_steps=STEPS, output_type="latent",
    ).images.numpy()  # fmt: skip
    np.testing.assert_allclose(cache.rows(STEPS, range(4)), made, atol=1e-4 * float(np.abs(made).max()))
    assert origin_of(cache)["lora"] == str(lora)
    with pytest.raises(TeacherError, match=r"teacher\.lora .*teacher can't be fused"):
        planned("d.zarr", str(teacher))


def test_lists_of_prompts(sd3: Family, tmp_path: Path) -> None:
    store = tmp_path / "toy.zarr"
    build(sd3.plan(store, seeds="0:4"))
    sd3.prompts.write_text("a red heart\n\na green heart\n")
    with pytest.raises(MismatchError, match=r"prompts\.txt, line 3: 'a green heart', but .* with 'a blue heart'"):
        sd3.plan(store, seeds="0:4")
    with pytest.raises(UsageError, match=r"2 prompts with 2 seeds each fill the blocks of 4 up to seed 4"):
        sd3.plan(store, seeds="0:8")
    with pytest.raises(UsageError, match=r"fill no block of 64: --block-size 4 would do"):
        sd3.plan(store, block_size=64)
    with pytest.raises(ConfigError, match="3 is no divisor of block_size 4"):
        sd3.plan(store, seeds_per_prompt=3)
    sd3.prompts.write_text(" \n")
    with pytest.raises(UsageError, match="are none"):
        sd3.plan(store)
    sd3.prompts.write_text("x" * 3000)
    with pytest.raises(UsageError, match=r"line 1: .* at most 2048"):
        sd3.plan(store)


def test_bfloat16_is_stored_without_loss(sd3: Family, tmp_path: Path) -> None:
    plan = sd3.plan(tmp_path / "toy.zarr", precision="bfloat16", dtype="float32")
    build(plan)
    cache = TrajectoryCache.open(tmp_path / "toy.zarr")
    x0 = torch.from_numpy(cache.rows(STEPS, range(4)))
    assert torch.equal(x0, x0.bfloat16().float())
