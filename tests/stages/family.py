"""A family's pipeline as its users call it, and as stage one records it."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from advkd.cache.format.prompts import Prompt
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.pipelines import teacher as module
from advkd.stages.teacher.pipelines.teacher import PipelineTeacher
from tests.stages.text_families import Embeddings, save
from tests.stages.text_to_image import load

STEPS, SIDE = 4, 16
TEXTS = ["a red heart", "a blue heart", "a cat", "a dog"]


class Family:
    """A saved pipeline whose prompts have known embeddings, since its encoders would be too large for a test."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / name
        self._embeddings = save(name, self.folder)
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("\n".join(TEXTS))
        monkeypatch.setattr(
            module,
            "encode",
            lambda pipe, prompt, options, device: {
                key: value.to(pipe.dtype) if value.is_floating_point() else value
                for key, value in self.encoded(prompt).items()
            },
        )

    def encoded(self, prompt: Prompt) -> Embeddings:
        """Different ones for each prompt; masks stay."""
        factor = 1.0 + (TEXTS.index(prompt.text) if prompt.text in TEXTS else len(TEXTS)) / 4
        length = 2 + len(prompt.text.split()) if self.varies else None
        return {
            key: value[: None if key.startswith("negative") else length] * (factor if value.is_floating_point() else 1)
            for key, value in self._embeddings.items()
        }

    @property
    def varies(self) -> bool:
        """Whether prompts have different numbers of tokens."""
        return self.folder.name in ("z-image", "qwen-image")

    @property
    def side(self) -> int:
        """Of images, in pixels."""
        return 32 if self.folder.name == "sana" else SIDE

    def plan(self, store: Path, **cache: Any) -> Plan:
        """Two seeds per prompt, blocks of two prompts."""
        settings = {"seeds_per_prompt": 2, "block_size": 4, "batch_size": 4, "record": 2} | cache
        return make_plan(
            TeacherConfig(source=str(self.folder)),
            SamplerConfig(steps=STEPS, guidance=4.0, height=self.side, width=self.side),
            CacheConfig(prompts=str(self.prompts), device="cpu", **settings),
            store,
        )

    def images(self, plan: Plan, noise: torch.Tensor, texts: list[str], decoded: bool = False) -> torch.Tensor:
        """What the pipeline itself makes of some noise, loaded anew and called as its users do: latents, or images in
        [0, 1]."""
        pipe = load(self.folder)
        known = inspect.signature(pipe.__call__).parameters
        encoded = [self.encoded(Prompt(text=text)) for text in texts]
        given = {key: [one[key] for one in encoded] for key in encoded[0]}
        if "z-image" not in self.folder.name:
            given = {key: torch.stack(values) for key, values in given.items()}  # type: ignore[misc]
        more = {"use_resolution_binning": False, "negative_prompt": None}
        assert isinstance(plan.teacher, PipelineTeacher)
        packs = hasattr(pipe, "_pack_latents")
        latents = pipe._pack_latents(noise, *noise.shape) if packs else noise * plan.teacher.factor
        made = pipe(
            **given,
            **{key: value for key, value in more.items() if key in known},
            latents=latents,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            height=self.side,
            width=self.side,
            output_type="pt" if decoded else "latent",
        ).images
        if decoded:
            return made
        if hasattr(pipe, "_unpack_latents"):
            made = pipe._unpack_latents(made, self.side, self.side, pipe.vae_scale_factor)
        return made.reshape(noise.shape)
