"""A replacement for a diffusers `DDPMPipeline`: the same arguments and results, one network evaluation.

    pipe = StudentPipeline.from_pretrained("runs/digits")        # a folder, a run, a Hub id, or a .onnx of advkd-export
    images = pipe(batch_size=4, generator=torch.manual_seed(0)).images

It doesn't need diffusers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from advkd.cache.errors import UsageError
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.hub import Student
from advkd.stages.student.student import labels_of, noise_of

OutputType = Literal["pil", "np", "pt"]
Images = list[Image.Image] | npt.NDArray[np.float32] | Tensor
Generators = torch.Generator | list[torch.Generator] | None
MAX_BATCH = 256
"""Images per forward pass; larger requests are split, as `generate` and the evaluation split theirs."""


class OnePass(Protocol):
    """A `Student`, or an exported one."""

    geometry: Geometry

    def __call__(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """x_T (N, C, H, W), unit normal, and class labels, int64, shape (N,), or prompts, if it is told any → x_0."""

    def prompts(self, **embeddings: Tensor | Sequence[Tensor]) -> Tensor:
        """Prompts as `Student.prompts` makes them."""

    def decode(self, items: Tensor) -> Tensor:
        """Images of x_0, about [−1, 1], shape (N, *image_shape)."""


@dataclass(frozen=True)
class PipelineOutput:
    """The result of a call, used like diffusers' `ImagePipelineOutput`."""

    images: Images
    """PIL images; or float32 in [0, 1], an array (N, H, W, C) or a tensor (N, C, H, W)."""

    def __getitem__(self, key: str | int) -> Images:
        """`output["images"]` and `output[0]`, as in diffusers."""
        if key in ("images", 0):
            return self.images
        raise KeyError(key) if isinstance(key, str) else IndexError(key)


class StudentPipeline:
    """Samples images from noise.

    Args:
        student: a `Student`, or an exported one.
    """

    def __init__(self, student: OnePass) -> None:
        self.student = student

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Load a student.

        Args:
            pretrained_model_name_or_path: a student's folder, a run's folder, the id of a Hub repository, or a file
                written by `advkd-export`.
            torch_dtype: of the weights; float32 if not given.
            options: for the Hub, as for `Student.from_pretrained`.

        Raises:
            TrainingError: there is no student.
        """
        if str(pretrained_model_name_or_path).endswith(".onnx"):
            from advkd.stages.student.sharing.onnx_student import OnnxStudent

            return cls(OnnxStudent(Path(pretrained_model_name_or_path)))
        student = Student.from_pretrained(pretrained_model_name_or_path, **options)
        return cls(student.to(torch_dtype) if torch_dtype else student)

    def to(self, *arguments: Any, **options: Any) -> Self:
        """Move to a device or another dtype, as `nn.Module.to` does; an exported student stays on the CPU."""
        if isinstance(self.student, nn.Module):
            self.student.to(*arguments, **options)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._parameter.dtype

    @property
    def _parameter(self) -> Tensor:
        parameters = self.student.parameters() if isinstance(self.student, nn.Module) else iter(())
        return next(parameters, torch.empty(0))

    def set_progress_bar_config(self, **_: Any) -> None:
        """Has no effect: there is no progress to show."""

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As `Student.save_pretrained`."""
        self._whole().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """As `Student.push_to_hub`."""
        return self._whole().push_to_hub(repo_id, **options)

    def _whole(self) -> Student:
        if not isinstance(self.student, Student):
            raise UsageError("an exported student can't be saved again: use the folder that it was exported from")
        return self.student

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: Sequence[int] | None = None,
        class_labels: int | Sequence[int] | None = None,
        **embeddings: Tensor | Sequence[Tensor],
    ) -> PipelineOutput | tuple[Images]:
        """Make images.

        Args:
            batch_size: number of images; with `seeds`, `class_labels` or embeddings, 1 or their number.
            generator: draws the noise, as in diffusers: one generator, or one per image.
            num_inference_steps: how many evaluations, of a student that has several; all if None. A student of one
                takes one, and warns if more are asked for.
            output_type: "pil", "np" or "pt"; "latent" for x_0 as it is, a tensor.
            return_dict: False returns a tuple that holds the images.
            seeds: use the teacher's noise for these seeds of the cache instead of `generator`.
            class_labels: of a class-conditional student, one per image or one for all; with `seeds` the teacher's own
                if not given.
            embeddings: of a student that is told prompts, what the teacher's `encode_prompt` gives, by the names of its
                call: `prompt_embeds` and whatever else `geometry.prompts` lists, for one prompt or one per image.

        Raises:
            UsageError: an argument is invalid, or arguments contradict each other.
        """
        evaluations = self._evaluations(num_inference_steps)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UsageError(f"output_type {output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        prompts = self._prompts(embeddings, class_labels)
        asked = class_labels if isinstance(class_labels, Sequence) else prompts
        if asked is not None and seeds is None and batch_size == 1:
            batch_size = max(1, len(asked))
        noise = self._noise(batch_size, generator, seeds)
        if prompts is None:
            told = self._labels(class_labels, seeds, len(noise))
        elif len(prompts) in (1, len(noise)):
            told = prompts.expand(len(noise), -1, -1)
        else:
            raise UsageError(f"{len(prompts)} prompts for {len(noise)} images: expected one, or one per image")
        parts = torch.split(noise, MAX_BATCH)
        conditions = [None] * len(parts) if told is None else torch.split(told, MAX_BATCH)
        made = torch.cat([self._pass(part, some, evaluations) for part, some in zip(parts, conditions, strict=True)])
        if output_type == "latent":
            return PipelineOutput(made) if return_dict else (made,)
        images = to_output(self.student.decode(made), cast("OutputType", output_type))
        return PipelineOutput(images) if return_dict else (images,)

    def _evaluations(self, asked: int | None) -> int | None:
        """How many evaluations to take; None for all."""
        most = self.student.num_evaluations if isinstance(self.student, Student) else 1
        if asked is not None and not 1 <= asked <= most:
            takes = "one" if most == 1 else f"1 to {most}"
            warnings.warn(f"num_inference_steps={asked}: the student takes {takes}", stacklevel=4)
        return asked if asked is not None and 1 <= asked < most else None

    def _pass(self, noise: Tensor, condition: Tensor | None, evaluations: int | None) -> Tensor:
        noise = noise.to(device=self.device, dtype=self.dtype)
        if condition is not None:
            condition = condition.to(self.device, self.dtype if condition.is_floating_point() else condition.dtype)
        if evaluations is not None:
            return self._whole().in_fewer(noise, condition, evaluations).float()
        return (self.student(noise) if condition is None else self.student(noise, condition)).float()

    def _prompts(
        self, embeddings: dict[str, Tensor | Sequence[Tensor]], class_labels: int | Sequence[int] | None
    ) -> Tensor | None:
        """Matrices of prompts; None for a student that is told none."""
        prompts = self.student.geometry.prompts
        if prompts is None and embeddings:
            raise UsageError(f"the student is told no prompts: leave out {', '.join(embeddings)}")
        if prompts is None:
            return None
        if "prompt" in embeddings:
            raise UsageError(
                "prompt: a student has no text encoder; give "
                f"{', '.join(one.name for one in prompts.embeddings)} of its teacher's encode_prompt, or use "
                "`advkd-sample --prompt`"
            )
        if class_labels is not None:
            self.student.geometry.checked_labels([])
        return self.student.prompts(**embeddings)

    def _labels(self, asked: int | Sequence[int] | None, seeds: Sequence[int] | None, count: int) -> Tensor | None:
        geometry = self.student.geometry
        if asked is None:
            if geometry.num_classes and seeds is None:
                raise UsageError(f"class_labels: the student draws classes; expected some of {geometry.known_labels}")
            return None if seeds is None else labels_of(geometry, seeds)
        labels = geometry.checked_labels([asked] * count if isinstance(asked, int) else list(map(int, asked)))
        if len(labels) != count:
            raise UsageError(f"{len(labels)} class_labels for {count} images: expected one, or one per image")
        return torch.tensor(labels, dtype=torch.int64)

    def _noise(self, batch_size: int, generator: Generators, seeds: Sequence[int] | None) -> Tensor:
        shape = self.student.geometry.item_shape
        if seeds is not None:
            seeds = [int(seed) for seed in seeds]
            if generator is not None or batch_size not in (1, len(seeds)):
                raise UsageError(f"{len(seeds)} seeds with batch_size {batch_size} or a generator: give seeds alone")
            if not seeds or not all(0 <= seed < 1 << 63 for seed in seeds):
                raise UsageError("seeds: expected one or more integers from 0 to 2^63 − 1")
            return noise_of(self.student.geometry, seeds)
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} is not positive")
        if not isinstance(generator, list):
            return _draw((batch_size, *shape), generator)
        if len(generator) != batch_size:
            raise UsageError(f"{len(generator)} generators for batch_size {batch_size}: expected one, or one per image")
        return torch.cat([_draw((1, *shape), one) for one in generator])


def _draw(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Unit normal noise on the generator's device, independent of the student's device."""
    return torch.randn(shape, generator=generator, device=generator.device if generator else "cpu")


def to_output(images: Tensor, output_type: OutputType) -> Images:
    """x_0 (N, C, H, W), about [−1, 1], in diffusers' formats: clipped to [0, 1], channels last except in tensors.

    Raises:
        UsageError: PIL has no images with this number of channels.
    """
    unit = (images / 2.0 + 0.5).clamp(0.0, 1.0)
    if output_type == "pt":
        return unit
    array: npt.NDArray[np.float32] = unit.cpu().permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return array
    if array.shape[-1] not in (1, 3, 4):
        raise UsageError(f"PIL has no images of {array.shape[-1]} channels: use output_type 'np' or 'pt'")
    pixels = (array * 255.0).round().astype(np.uint8)
    return [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in pixels]
