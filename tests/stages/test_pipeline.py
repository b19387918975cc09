"""A student where a DDPMPipeline was: the same arguments, the same results, the same pixels for the same noise."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.cache.errors import TrainingError, UsageError
from advkd.stages.pictures import to_pixels
from advkd.stages.student.pipeline import StudentPipeline, to_output
from tests.stages.test_hub import make_student


@pytest.fixture
def pipe() -> StudentPipeline:
    return StudentPipeline(make_student())


def test_it_takes_what_a_ddpm_pipeline_takes(pipeline_folder: Path, pipe: StudentPipeline) -> None:
    """Names and order of the arguments, and the kinds of what comes back, against diffusers' own."""
    from diffusers import DDPMPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    theirs = DDPMPipeline.from_pretrained(pipeline_folder)
    names = list(inspect.signature(theirs.__call__).parameters)
    assert list(inspect.signature(pipe.__call__).parameters)[: len(names)] == names
    for one in (theirs, pipe):
        one.set_progress_bar_config(disable=True)
        one.to("cpu")

    def call(one: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return one(batch_size=3, generator=torch.manual_seed(0), num_inference_steps=2, **options)

    for output_type in ("pil", "np", "pt"):
        found, expected = (call(one, output_type=output_type) for one in (pipe, theirs))
        assert type(found.images) is type(expected.images) and len(found.images) == len(expected.images) == 3
        assert found["images"] is found[0] is found.images
        assert found.images[0].__class__ is expected.images[0].__class__
        if output_type == "pil":
            assert found.images[0].mode == expected.images[0].mode == "L"
        else:
            assert found.images.dtype == expected.images.dtype and found.images.ndim == expected.images.ndim
    (images,) = call(pipe, return_dict=False)
    assert [image.size for image in images] == [(16, 16)] * 3


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_seed_is_the_same_image_in_every_form(channels: int) -> None:
    student = make_student(channels)
    pipe, seeds = StudentPipeline(student), [5, 0, 2**40]
    x_0 = student(student.noise(seeds))
    tensor, array = (pipe(seeds=seeds, output_type=kind).images for kind in ("pt", "np"))
    assert tensor.shape == (3, channels, 16, 16) and array.shape == (3, 16, 16, channels)
    torch.testing.assert_close(tensor, (x_0 / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = pipe(batch_size=3, seeds=seeds).images
    assert {picture.mode for picture in pictures} == {"L" if channels == 1 else "RGB"}
    for picture, expected in zip(pictures, to_pixels(x_0.numpy()), strict=True):
        found = np.asarray(picture.convert("RGB"), dtype=np.int64)
        assert abs(found - expected).max() <= 1  # of 255: halves may round either way


def test_noise_is_drawn_as_diffusers_draws_it(pipe: StudentPipeline) -> None:
    def images(batch_size: int, generator: Any) -> torch.Tensor:
        made: torch.Tensor = pipe(batch_size, generator, output_type="pt").images
        return made

    one, again = (images(2, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, again) and not torch.equal(one[0], one[1])
    drawn = torch.randn((2, 1, 16, 16), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(one, (pipe.student(drawn) / 2 + 0.5).clamp(0, 1))
    alone = images(1, torch.Generator().manual_seed(9))
    several = images(2, [torch.Generator().manual_seed(4), torch.Generator().manual_seed(9)])
    torch.testing.assert_close(several[1:], alone)
    torch.manual_seed(1)
    first = images(1, None)
    torch.manual_seed(1)
    assert torch.equal(first, images(1, None)) and not torch.equal(first, images(1, None))


def test_many_images_come_in_parts(pipe: StudentPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipe(seeds=range(7), output_type="np").images
    monkeypatch.setattr("advkd.stages.student.pipeline.MAX_BATCH", 3)
    np.testing.assert_allclose(pipe(seeds=range(7), output_type="np").images, whole, atol=1e-5)
    np.testing.assert_allclose(pipe(seeds=np.arange(7), output_type="np").images, whole, atol=1e-5)


def test_steps_are_ignored_with_a_word(pipe: StudentPipeline) -> None:
    with pytest.warns(UserWarning, match="num_inference_steps=50: the student takes one") as record:
        pipe(num_inference_steps=50)
    assert record[0].filename == __file__
    pipe(num_inference_steps=1)  # warnings are errors here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "jpeg"}, "expected 'pil', 'np', 'pt' or 'latent'"),
        ({"batch_size": 0}, "batch_size 0 is not positive"),
        ({"batch_size": 3, "seeds": [1, 2]}, "2 seeds with batch_size 3"),
        ({"seeds": [1], "generator": torch.Generator()}, "give seeds alone"),
        ({"seeds": []}, "one or more integers"),
        ({"seeds": [-1]}, "one or more integers"),
        ({"batch_size": 3, "generator": [torch.Generator()]}, "1 generators for batch_size 3"),
    ],
)
def test_contradictions_are_named(pipe: StudentPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(**arguments)


def test_channels_that_are_no_picture() -> None:
    images = torch.zeros(2, 5, 4, 4)
    assert to_output(images, "np").shape == (2, 4, 4, 5)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="no images of 5 channels"):
        to_output(images, "pil")


def test_from_a_folder_in_another_precision_and_back(pipe: StudentPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "out")
    loaded = StudentPipeline.from_pretrained(str(tmp_path / "out"), torch_dtype=torch.bfloat16)
    assert (loaded.dtype, loaded.device.type) == (torch.bfloat16, "cpu")
    made, expected = (one(seeds=[3], output_type="pt").images for one in (loaded, pipe))
    assert made.dtype == torch.float32 and float((made - expected).abs().max()) < 0.1
    assert loaded.to(torch.float32).dtype == torch.float32
    assert isinstance(loaded(seeds=[3]).images[0], Image.Image)
    with pytest.raises(TrainingError, match="no student in"):
        StudentPipeline.from_pretrained(tmp_path)
