"""Critics: their inputs, their training, and the losses that they give the student."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator

from advkd.cache.errors import UsageError
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.training.losses import ADVERSARIAL
from advkd.stages.student.unrolled.adversary import Adversary, CriticInput
from advkd.stages.student.unrolled.augment import augment
from advkd.stages.student.unrolled.config import AUGMENTATIONS, JUDGED, AdversarialConfig
from advkd.stages.student.unrolled.critics import Critic, CriticPerSubmodule

GEOMETRY = Geometry(
    item_shape=(1, 8, 8),
    levels=((0.0, 1.0), (0.5, 0.8), (0.9, 0.4), (1.0, 0.0)),
    timesteps=(999.0, 600.0, 200.0, -1.0),
    steps=(0, 2, 4, 6),
    root_seed=0,
    noise_dtype="float16",
)
SETTINGS = AdversarialConfig(width=4, start=0.5, ramp=0.2, lead=0.1, fresh=4)


def adversary(config: AdversarialConfig = SETTINGS) -> Adversary:
    torch.manual_seed(0)
    made = Adversary(config, GEOMETRY, num_steps=100, seed=3, accelerator=Accelerator())
    made.begin()
    return made


def test_critics_refuse_images_of_odd_size() -> None:
    odd = dataclasses.replace(GEOMETRY, item_shape=(1, 9, 9))
    with pytest.raises(UsageError, match=r"9×9 .*objective\.adversarial\.weight to 0"):
        Adversary(SETTINGS, odd, num_steps=100, seed=3, accelerator=Accelerator())
    Adversary(dataclasses.replace(SETTINGS, weight=0.0), odd, num_steps=100, seed=3, accelerator=Accelerator())


def judged(num_times: int, level: float, count: int = 6) -> CriticInput:
    generator = torch.Generator().manual_seed(int(level * 10) + 5)
    images = [level + 0.1 * torch.randn(count, 1, 8, 8, generator=generator) for _ in range(num_times)]
    return CriticInput.of(images, torch.randn(count, 1, 8, 8, generator=generator), count)


@pytest.mark.parametrize("scales", [1, 2])
@pytest.mark.parametrize("conditional", [False, True])
def test_only_a_conditional_critic_sees_the_noise(conditional: bool, scales: int) -> None:
    critic = Critic(1, 4, scales, conditional=conditional)
    images, noise = torch.randn(3, 1, 16, 16), torch.randn(3, 1, 16, 16)
    logits = critic(images, noise)
    assert logits.shape == (3, scales)
    assert torch.equal(logits, critic(images, -noise)) is not conditional
    assert not torch.equal(logits, critic(-images, noise))


def test_a_shared_critic_tells_times_apart_once_it_has_learnt_to() -> None:
    critic = Critic(1, 4, conditional=False, num_times=3)
    images = torch.randn(1, 1, 16, 16).expand(3, 1, 16, 16)
    time = torch.arange(3)
    torch.testing.assert_close(critic(images, images, time), critic(images, images, time.flip(0)))
    assert critic.time is not None
    torch.nn.init.normal_(critic.time.weight)
    assert not torch.allclose(critic(images, images, time), critic(images, images, time.flip(0)))


def test_a_critic_per_submodule_judges_its_own_images() -> None:
    members = [Critic(1, 4, conditional=False) for _ in range(3)]
    both = judged(3, 0.0)
    logits = CriticPerSubmodule(members)(both.images, both.noise, both.time)
    for index, member in enumerate(members):
        here = both.time == index
        torch.testing.assert_close(logits[here], member(both.images[here], both.noise[here]))


@pytest.mark.parametrize("loss", ADVERSARIAL)
@pytest.mark.parametrize("kind", JUDGED)
def test_a_critic_learns_and_its_gradient_points_to_the_real_images(loss: str, kind: str) -> None:
    """Real images are bright and the student's dark: soon the critic is ahead, and its gradient says "brighter"."""
    ours = adversary(dataclasses.replace(SETTINGS, loss=loss, judged=kind))
    times = ours.num_judged
    assert times == (1 if kind == "last" else 3)
    for step in range(40):
        readings = ours.accumulate(judged(times, 0.5), judged(times, -0.5), step)
        ours.descent.step()
    assert float(readings["ahead"]) == 1.0
    images = judged(times, -0.5).images.requires_grad_(True)
    fake = dataclasses.replace(judged(times, -0.5), images=images)
    ours.student_loss(judged(times, 0.5), fake, 0).backward()
    assert images.grad is not None
    assert float(images.grad.mean()) < 0.0
    assert all(weight.grad is None for weight in ours.critic.parameters())
    assert all(weight.requires_grad for weight in ours.critic.parameters())


def test_penalties_are_lazy_and_each_has_its_side() -> None:
    """R1 alone flattens the critic where the images are real; without either nothing is added."""

    def gradients(step: int, **changes: float) -> torch.Tensor:
        ours = adversary(dataclasses.replace(SETTINGS, penalty_every=2, **changes))
        ours.accumulate(judged(1, 0.5), judged(1, -0.5), step)
        return torch.cat([weight.grad.flatten() for weight in ours.critic.parameters() if weight.grad is not None])

    none = gradients(0, r1=0.0, r2=0.0)
    assert torch.equal(none, gradients(1))
    assert torch.equal(none, gradients(3, every=3)) and not torch.equal(none, gradients(6, every=3))
    first, second, both = gradients(0, r2=0.0), gradients(0, r1=0.0), gradients(0)
    assert not torch.equal(first, none) and not torch.equal(second, none)
    torch.testing.assert_close(first + second - none, both)
    torch.testing.assert_close(gradients(0, r1=0.1, r2=0.0) - none, 2 * (first - none))


def test_critics_train_before_the_adversarial_loss_begins() -> None:
    ours = adversary()
    assert [ours.trains_at(step) for step in (38, 40, 99)] == [False, True, True]
    assert [round(ours.weight(step), 6) for step in (48, 59, 69, 99)] == [0.0, 0.05, 0.1, 0.1]
    assert not adversary(dataclasses.replace(SETTINGS, weight=0.0)).trains_at(99)


def test_critics_of_every_third_step_have_three_times_the_weight() -> None:
    ours = adversary(dataclasses.replace(SETTINGS, every=3))
    assert [ours.trains_at(step) for step in (42, 60, 61, 62, 63)] == [True, True, False, False, True]
    assert [round(ours.weight(step), 6) for step in (39, 48, 60, 61, 99)] == [0.0, 0.0, 0.165, 0.0, 0.3]
    assert ours.has_begun(61) and not ours.has_begun(39)


def test_the_feature_distance_compares_pairs() -> None:
    ours, truth = adversary(), judged(1, 0.5)

    def distance(images: torch.Tensor) -> float:
        return float(ours.feature_distance(images, truth.images, truth.noise))

    assert distance(truth.images) == 0.0
    assert 0.0 < distance(truth.images + 0.01) < distance(truth.images.roll(1, 0))


def test_a_shared_critic_sees_the_last_images_as_the_last() -> None:
    """In its layers x_0 is compared with the embedding of the submodule that made it."""
    ours = adversary(dataclasses.replace(SETTINGS, judged="shared"))
    assert isinstance(ours.critic, Critic)
    near, truth = judged(1, 0.4), judged(1, 0.5)

    def distance() -> float:
        return float(ours.feature_distance(near.images, truth.images, truth.noise))

    before = distance()
    embedding = next(module for module in ours.critic.modules() if isinstance(module, torch.nn.Embedding))
    assert len(embedding.weight) == ours.num_judged == 3
    with torch.no_grad():
        embedding.weight[:-1] += 1.0
    assert distance() == before
    with torch.no_grad():
        embedding.weight[-1] += 1.0
    assert distance() != before


def test_fresh_noise_depends_on_the_step_alone() -> None:
    like = torch.zeros(1, 1, 8, 8)
    first = adversary().fresh_noise(5, 4, like)
    assert torch.equal(first, adversary().fresh_noise(5, 4, like))
    assert not torch.equal(first, adversary().fresh_noise(6, 4, like))


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentation_changes_each_image_by_itself_and_passes_gradients(kind: str) -> None:
    images = torch.randn(64, 1, 16, 16).requires_grad_(True)
    noise = torch.randn(64, 1, 16, 16)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    changed, moved = augment([kind], images, noise, lambda *shape: torch.rand(shape, generator=draws[0]))
    again, _ = augment([kind], images, noise, lambda *shape: torch.rand(shape, generator=draws[1]))
    assert torch.equal(changed, again)
    assert changed.shape == images.shape
    assert not torch.equal(changed, images)
    differences = (changed - images).detach().flatten(1).abs().sum(1)
    assert len(differences.unique()) > 3
    changed.sum().backward()
    assert images.grad is not None and bool(images.grad.abs().sum() > 0)
    assert torch.equal(moved, noise) is (kind in ("brightness", "contrast"))


def test_noise_moves_with_its_image() -> None:
    images = torch.randn(32, 2, 16, 16)
    changed, moved = augment(["flip", "translate", "cutout"], images, images.clone(), lambda *shape: torch.rand(shape))
    assert torch.equal(changed, moved)
    assert not torch.equal(changed, images)


def test_flips_and_shifts_are_what_they_say() -> None:
    images = torch.arange(256.0).reshape(1, 1, 16, 16)
    always, never = (lambda *shape, value=value: torch.full(shape, value) for value in (0.0, 0.99))
    assert torch.equal(augment(["flip"], images, images, always)[0], images.flip(-1))
    assert torch.equal(augment(["flip"], images, images, never)[0], images)
    up_left = augment(["translate"], images, images, always)[0]
    assert torch.equal(up_left[..., 2:, 2:], images[..., :-2, :-2])
    assert torch.equal(up_left[..., 0, 0], images[..., 0, 0])
    down_right = augment(["translate"], images, images, never)[0]
    assert torch.equal(down_right[..., :-2, :-2], images[..., 2:, 2:])
