"""Stage 0's teacher of names: a Stable Diffusion pipeline with a text encoder of its own, which stage one records."""

from pathlib import Path

import numpy as np
import pytest
import torch

from advkd.cache.errors import ConfigError
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.images.emoji import name_emoji
from advkd.stages.pretrain.config import AutoencoderConfig, ClassifierConfig, PretrainConfig
from advkd.stages.pretrain.run import pretrain
from advkd.stages.pretrain.teacher import save_untrained, train_teacher
from advkd.stages.pretrain.texts import TOKENS, VOCABULARY, TextUNet, make_tokenizer, tokenize
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from tests.stages.text_to_image import load

CONFIG = PretrainConfig(
    data="emoji",
    size=16,
    channels=[8, 16],
    texts=True,
    steps=3,
    batch_size=4,
    report_samples=64,
    classifier=ClassifierConfig(epochs=1, held_out=50),
    autoencoder=AutoencoderConfig(channels=[8, 16], steps=2, batch_size=4),
)
NAMES = ["red heart", "blue heart", "cat", "dog face"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named") / "toy"
    pretrain(CONFIG, folder)
    return folder


def test_drawings_have_their_names() -> None:
    names = name_emoji()
    assert len(names) == 4495
    known = [name for name in names if name]
    assert len(known) == len(set(known)) > 3900
    assert {"red heart", "blue heart", "waving hand medium skin tone", "flag Japan"} & set(known) >= {
        "red heart", "blue heart"
    }  # fmt: skip


def test_words_are_tokens_and_anything_can_be_spelt() -> None:
    tokenizer = make_tokenizer(NAMES)
    assert tokenizer.get_vocab() == make_tokenizer(NAMES[::-1]).get_vocab()
    assert len(make_tokenizer(name_emoji())) <= VOCABULARY
    assert tokenizer.convert_ids_to_tokens(tokenizer("red heart").input_ids)[1:-1] == ["red", "heart"]
    assert tokenizer.decode(tokenizer("zebra crêpes").input_ids, skip_special_tokens=True) == "zebra crepes"
    assert tokenize(tokenizer, ["cat", "one two " * 40]).shape == (2, TOKENS)


def test_the_same_seed_gives_the_same_teacher() -> None:
    """And names are told: another order of them gives another one."""
    torch.manual_seed(0)
    latents, labels = torch.randn(4, *CONFIG.item_shape), torch.zeros(4, dtype=torch.int64)

    def trained(names: list[str]) -> TextUNet:
        network, _ = train_teacher(latents, labels, CONFIG, SilentReporter(), torch.device("cpu"), names)
        assert isinstance(network, TextUNet)
        return network

    first, again, other = trained(NAMES), trained(NAMES), trained(NAMES[::-1])
    for name, values in first.state_dict().items():
        assert torch.equal(values, again.state_dict()[name]), name
    moved = first.encoder.state_dict(), other.encoder.state_dict()
    assert any(not torch.equal(values, moved[1][name]) for name, values in moved[0].items())


def test_its_folder_is_a_stable_diffusion_pipeline(teacher: Path) -> None:
    pipe = load(teacher / "pipeline")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    images = pipe(["red heart", "blue heart"], num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert pipe.vae.config.shift_factor == 0.0
    assert "cc-by-sa-4.0" in (teacher / "pipeline/README.md").read_text()
    assert (teacher / "samples.png").is_file() and (teacher / "report.json").is_file()


def test_stage_one_records_it_for_the_drawings_names(teacher: Path, tmp_path: Path) -> None:
    plan = make_plan(
        TeacherConfig(source=str(teacher / "pipeline")),
        SamplerConfig(name="dpmsolver++", steps=4, guidance=2.0),
        CacheConfig(prompts="emoji", seeds="0:8", record=2, block_size=8, batch_size=8, device="cpu"),
        tmp_path / "a.zarr",
    )
    build(plan)
    cache = TrajectoryCache.open(tmp_path / "a.zarr")
    known = [name for name in name_emoji() if name]
    assert [prompt.text for prompt in cache.prompts.texts(range(8))] == known[:8]
    assert cache.recipe.teacher["pipeline"] == "StableDiffusionPipeline"
    assert np.isfinite(cache.rows(4, range(8))).all()


def test_its_cost_is_known_before_it_is_trained(tmp_path: Path) -> None:
    save_untrained(tmp_path / "pipeline", CONFIG)
    assert type(load(tmp_path / "pipeline")).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    "other",
    [{"data": "digits"}, {"classes": True}, {"path": "flow"}, {"autoencoder": None}],
    ids=lambda one: next(iter(one)),
)
def test_what_names_need(other: dict[str, object]) -> None:
    settings = {"data": "emoji", "size": 16, "texts": True, "autoencoder": AutoencoderConfig(channels=[8, 16])} | other
    with pytest.raises(ConfigError, match=r"pretrain\.texts: expected images with names"):
        PretrainConfig(**settings)  # type: ignore[arg-type]
