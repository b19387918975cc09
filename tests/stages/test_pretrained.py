"""Features of DINOv2 and the CLIP score, by tiny networks of transformers' classes with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from advkd.cache.errors import UsageError
from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.evaluate.networks import load_features
from advkd.stages.metrics.clip_score import ClipScorer
from advkd.stages.metrics.pretrained import prepared
from tests.stages.text_to_image import TOKENS, tokenizer

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=6, num_attention_heads=2, patch_size=14, image_size=224)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def save_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"vocab_size": 54, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "max_position_embeddings": TOKENS, "eos_token_id": 53}  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    return folder


def photograph(height: int, width: int) -> Tensor:
    """Smooth, in [−1, 1], of 8-bit values, shape (1, 3, height, width)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return (smooth.clamp(0, 1) * 255).round() / 127.5 - 1.0


@pytest.mark.parametrize(("height", "width"), [(32, 32), (300, 256), (48, 80)])
def test_images_are_prepared_as_by_pillow(height: int, width: int) -> None:
    """What transformers' and dgm-eval's own processing does: bicubic, the middle, ImageNet's mean and deviation."""
    image = photograph(height, width)
    pixels = ((image[0].permute(1, 2, 0) + 1.0) * 127.5).round().numpy().astype(np.uint8)
    scale = 224 / min(height, width)
    size = (int(width * scale), int(height * scale))
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    expected = (np.asarray(resized)[top : top + 224, left : left + 224] / 255.0 - MEAN) / STD
    found = prepared(image, 224, MEAN.tolist(), STD.tolist())[0].permute(1, 2, 0).numpy()
    assert found.shape == expected.shape == (224, 224, 3)
    assert np.abs(found - expected).max() < 2.1 / 255 / STD.min()  # Pillow rounds to 8 bits after either axis


def test_dinov2_sees_the_class_token_and_patches(dinov2: Path) -> None:
    from transformers import Dinov2Model

    network = load_features(EvaluateConfig(features=str(dinov2)), (3, 32, 32))
    images = torch.cat([photograph(32, 32), -photograph(32, 32)])
    look = network.look(images)
    assert network.name == "dinov2" and look.probabilities is None
    with torch.no_grad():
        seen = Dinov2Model.from_pretrained(dinov2)(prepared(images, 224, MEAN.tolist(), STD.tolist()))
    torch.testing.assert_close(look.features, seen.pooler_output)
    assert [tuple(layer.shape) for layer in look.maps] == [(2, 24, 16, 16)] * 4
    grey = load_features(EvaluateConfig(features=str(dinov2)), (1, 8, 8))
    one = grey.look(images[:, :1])
    torch.testing.assert_close(one.features, grey.look(images[:, :1].expand(-1, 3, -1, -1)).features)


def test_a_network_that_is_none_is_refused(dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs grey or colour images"):
        load_features(EvaluateConfig(features=str(dinov2)), (4, 32, 32))
    (tmp_path / "config.json").write_text((dinov2 / "config.json").read_text())
    with pytest.raises(UsageError, match="no Dinov2Model can be loaded"):
        load_features(EvaluateConfig(features=str(tmp_path)), (3, 32, 32))
    with pytest.raises(UsageError, match=r"evaluate\.clip .*: no CLIPModel can be loaded"):
        ClipScorer.load(tmp_path / "none", torch.device("cpu"))


def test_the_clip_score_is_the_cosine(clip: Path) -> None:
    from transformers import CLIPModel

    scorer, model = ClipScorer.load(clip, torch.device("cpu")), CLIPModel.from_pretrained(clip)
    images, texts = torch.cat([photograph(32, 32), -photograph(32, 32)]), ["red heart", "cat"]
    found = scorer.asked(texts)(images)
    words = scorer.tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt")
    pixels = prepared(images, 32, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    with torch.no_grad():
        seen = model(**words, pixel_values=pixels)
    cosine = torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)
    torch.testing.assert_close(found, 100.0 * cosine.clamp(min=0.0), rtol=1e-4, atol=1e-4)
    assert float((scorer.asked(texts[::-1])(images) - found).abs().max()) > 1e-3
