"""Each score against its published formula, on features where the answer is known."""

import csv
import io
import json

import numpy as np
import numpy.typing as npt
import pytest
import torch

from advkd.cache.errors import UsageError
from advkd.stages.evaluate.measure import add_neighbours, make_reference
from advkd.stages.metrics.base import Reference
from advkd.stages.metrics.classes import class_shares, mean_confidence, overlap, rarest_class
from advkd.stages.metrics.features import FeatureNetwork, Look
from advkd.stages.metrics.intervals import Interval, mean_interval, paired_difference, standard_error
from advkd.stages.metrics.kid import BLOCK_ENTRIES, KID, kernel_sum, kid, own_term
from advkd.stages.metrics.lpips import Lpips
from advkd.stages.metrics.neighbours import nearest_images, to_rows
from advkd.stages.metrics.pairs import perceptual_distances
from advkd.stages.metrics.precision_recall import precision, recall
from advkd.stages.metrics.registry import MEASURES, Scorer
from advkd.stages.metrics.sharpness import gradient_magnitudes, upper_octave_power
from advkd.stages.metrics.table import Row, ScoreTable

Array = npt.NDArray[np.float64]


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def test_paired_intervals() -> None:
    apart = paired_difference([1.0, 2.0, 3.0], [11.0, 12.1, 12.9])
    assert apart.mean == pytest.approx(-10.0)
    assert apart.excludes_zero
    assert not paired_difference([1.0, 9.0, 4.0], [2.0, 5.0, 6.0]).excludes_zero
    # Student's t with 2 degrees of freedom: 4.302653 standard errors.
    assert apart.high - apart.mean == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    draws = normal(0, 2000, 5) + 3.0
    held = [interval.low < 3.0 < interval.high for interval in map(mean_interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def slow_kernel_distance(first: Array, second: Array) -> float:
    """Bińkowski et al. 2018, as written: a double loop."""

    def kernel(x: Array, y: Array) -> float:
        return float((np.dot(x, y) / len(x) + 1.0) ** 3)

    def own(values: Array) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(values) for j, y in enumerate(values) if i != j]
        return float(np.mean(pairs))

    return own(first) + own(second) - 2.0 * float(np.mean([kernel(x, y) for x in first for y in second]))


def test_kernel_distance_is_the_double_loop() -> None:
    first, second = normal(1, 30, 5), normal(2, 47, 5) * 1.5 + 0.5
    assert kid(first, second) == pytest.approx(slow_kernel_distance(first, second))


def test_kernel_distance_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    first, second = normal(3, 200, 16), normal(4, 200, 16) + 0.3
    theirs = poly_mmd(torch.from_numpy(first), torch.from_numpy(second))  # asks for sets of one size
    assert kid(first, second) == pytest.approx(float(theirs), rel=1e-9)


def test_kernel_sums_do_not_depend_on_the_blocks() -> None:
    """Rows that don't fit into one block, against the same matrix at once."""
    values = normal(5, 1700, 3)
    assert len(values) ** 2 > BLOCK_ENTRIES
    kernel = (values @ values.T / 3 + 1.0) ** 3
    assert kernel_sum(values, values) == pytest.approx(kernel.sum())
    expected = (kernel.sum() - np.trace(kernel)) / (1700 * 1699)
    assert own_term(values) == pytest.approx(expected)


def test_kernel_distance_of_equal_distributions_is_zero_on_average_even_of_few_samples() -> None:
    reference = normal(6, 4000, 4)
    own = own_term(reference)
    found = [kid(normal(100 + index, 20, 4), reference, own) for index in range(300)]
    assert abs(np.mean(found)) < 3.0 * standard_error(found)
    assert min(found) < 0.0  # unbiased: it can't be positive always


SEES_ITSELF = FeatureNetwork(
    name="itself",
    network=torch.nn.Identity(),
    look=lambda images: Look(features=images.flatten(1), maps=[], probabilities=None),
)
"""A network whose features are the image."""


def test_the_standard_error_of_a_kernel_distance_is_what_it_says() -> None:
    """Over many references too: one that all sets shared would err alike for all of them (1.9 times this, here)."""
    means, errors = [], []
    for trial in range(200):
        values = torch.from_numpy(normal(trial, 60 + 5 * 60, 2, 1, 2)).clamp(-1.0, 1.0)
        scorer = Scorer(make_reference(SEES_ITSELF, [values[:60]], None, 5))
        sets = values[60:].flatten(1).numpy().reshape(5, 60, 4)
        found = [scorer.score({"features": features}, index)["kid"] for index, features in enumerate(sets)]
        means.append(np.mean(found))
        errors.append(np.square(standard_error(found)))
    assert np.std(means) == pytest.approx(np.sqrt(np.mean(errors)), rel=0.15)


def test_kernel_distance_of_a_known_shift() -> None:
    """One dimension, N(0, 1) against N(a, 1): (1 + xy)³ has the moments' squared distances as its closed form."""
    shift = 0.5
    first = np.array([1.0, 0.0, 1.0, 0.0])  # E x⁰ … x³ of N(0, 1)
    second = np.array([1.0, shift, 1.0 + shift**2, 3.0 * shift + shift**3])
    expected = float(np.array([1.0, 3.0, 3.0, 1.0]) @ np.square(first - second))
    reference = normal(7, 10_000, 1) + shift
    own = own_term(reference)
    found = [kid(normal(200 + index, 2000, 1), reference, own) for index in range(20)]
    assert np.mean(found) == pytest.approx(expected, rel=0.1)


def precision_and_recall(samples: Array, reference: Array, neighbours: int) -> tuple[float, float]:
    return precision(samples, reference, neighbours), recall(samples, reference, neighbours)


def test_precision_and_recall_where_the_answer_is_known() -> None:
    line = np.arange(8.0)[:, None]  # neighbours one apart: with k = 1 each ball has radius 1
    assert precision_and_recall(line, line, 1) == (1.0, 1.0)
    assert precision_and_recall(line + 100.0, line, 1) == (0.0, 0.0)
    # Half of the samples lie within 1 of the reference; balls of radius 1 around 4 … 11 reach the reference's 3 … 7.
    assert precision_and_recall(line + 4.0, line, 1) == (5 / 8, 5 / 8)
    # A dropped mode: every sample is real, but the reference's second cluster is not reached.
    modes = np.concatenate([line, line + 1000.0])
    assert precision_and_recall(line, modes, 1) == (1.0, 0.5)
    # Invented samples: everything real is reached, half of the samples are not real.
    assert precision_and_recall(modes, line, 1) == (0.5, 1.0)


def test_precision_and_recall_are_the_paper_s_double_loop() -> None:
    made, wanted = normal(8, 60, 3) * 0.8, normal(9, 50, 3)

    def inside(points: Array, centres: Array) -> float:
        def radius(centre: Array) -> float:
            return float(np.sort(np.linalg.norm(centres - centre, axis=1))[3])  # [0] is the centre itself

        return float(np.mean([any(np.linalg.norm(p - c) <= radius(c) for c in centres) for p in points]))

    assert precision_and_recall(made, wanted, 3) == (inside(made, wanted), inside(wanted, made))


def test_classes() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.7, 0.1], [0.8, 0.1, 0.1]])
    shares = class_shares(probabilities)
    assert shares.tolist() == [0.75, 0.25, 0.0]
    assert mean_confidence(probabilities) == pytest.approx(0.75)
    even = np.full(3, 1 / 3)
    assert overlap(shares, shares) == 1.0 and overlap(shares, even) == pytest.approx(1 / 3 + 0.25)
    assert rarest_class(shares, even) == 0.0  # the third one was dropped
    assert rarest_class(even, shares) == pytest.approx((1 / 3) / 0.75)  # what the reference lacks doesn't count


def test_nearest_training_image() -> None:
    training = normal(10, 100, 16)
    samples = np.concatenate([training[40:42], training[:1] + 0.5])
    images = torch.from_numpy(training)[:, None, None, :]
    found, nearest = nearest_images(samples, [images[:50], images[50:]], 2)
    assert torch.equal(torch.stack(nearest), images[40:42])
    np.testing.assert_allclose(found[:2], 0.0, atol=1e-6)  # learned by heart
    assert found[2] == pytest.approx(0.5)
    slow = [np.sqrt(np.square(training - sample).mean(1)).min() for sample in samples]
    np.testing.assert_allclose(found, slow, atol=1e-6)


def test_rows_for_neighbours_are_bounded() -> None:
    images = torch.rand(2, 3, 64, 64)
    rows = to_rows(images)
    assert rows.shape == (2, 3 * 32 * 32)
    assert rows[0, 0] == pytest.approx(float(images[0, 0, :2, :2].mean()))
    assert to_rows(images[..., :16, :16]).shape == (2, 3 * 16 * 16)


def test_perceptual_distance_by_its_formula() -> None:
    first = [torch.tensor([[3.0, 4.0], [1.0, 0.0]])[..., None, None].expand(2, 2, 2, 2)]
    second = [torch.tensor([[8.0, 6.0], [0.0, 5.0]])[..., None, None].expand(2, 2, 2, 2)]
    # Unit vectors (0.6, 0.8) and (0.8, 0.6): 0.08; (1, 0) and (0, 1): 2.
    torch.testing.assert_close(perceptual_distances(first, second), torch.tensor([0.08, 2.0]))
    torch.testing.assert_close(perceptual_distances(first * 2, second * 2), torch.tensor([0.16, 4.0]))
    assert float(perceptual_distances(first, [first[0] * 7.0]).max()) < 1e-6  # scale doesn't count


def test_lpips_through_its_package() -> None:
    """With a random AlexNet below its learned weights: what is checked is the wiring."""
    torch.manual_seed(0)
    distance = Lpips((3, 32, 32), setting="evaluate.perceptual", otherwise="features", pnet_rand=True)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    found = distance(images, images.flip(0))
    assert found.shape == (4,) and float(found.min()) > 0.0
    torch.testing.assert_close(found, found.flip(0))
    torch.testing.assert_close(distance(images, images), torch.zeros(4))
    made = images.clone().requires_grad_()
    distance(made, images.flip(0)).sum().backward()
    assert made.grad is not None and float(made.grad.abs().max()) > 0.0
    assert not any(weight.requires_grad for weight in distance.parameters())
    with pytest.raises(UsageError, match="at least 32 pixels, these are 1×16×16"):
        Lpips((1, 16, 16), setting="evaluate.perceptual", otherwise="features")


def test_absent_lpips_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(UsageError, match=r"pip install 'advkd\[lpips\]'"):
        Lpips((3, 32, 32), setting="evaluate.perceptual", otherwise="features")


@pytest.mark.parametrize("there", [True, False])
def test_a_copy_of_the_cache_without_the_runs_seeds_has_no_neighbours(there: bool) -> None:
    """Scores are still written, without these two."""
    row = Row(name="student", evaluations=1)
    training = [torch.ones(5, 3, 1, 1)] if there else []
    scorer = Scorer(Reference(features=normal(0, 9, 2), class_shares=None, real_features=None, num_sets=2))
    kept = add_neighbours({"student": row}, {"student": [np.zeros((4, 3), dtype=np.float32)]}, 2, scorer, training)
    assert len(kept) == (4 if there else 0)
    assert set(row.values) == ({"nearest_training", "nearest_training_closest"} if there else set())
    assert all(values == pytest.approx([1.0, 1.0]) for values in row.values.values())


def test_a_measure_is_scored_only_where_it_can_be() -> None:
    """By what was observed of the set, by what the reference has, and by how many samples there are."""
    features, probabilities = normal(11, 20, 4), np.full((20, 2), 0.5)
    bare = Reference(features=normal(12, 40, 4), class_shares=None, real_features=None, num_sets=2)
    assert set(Scorer(bare).score({"features": features}, 0)) == {"frechet", "kid", "precision", "recall"}
    whole = Reference(
        features=normal(12, 40, 4), class_shares=np.array([0.5, 0.5]), real_features=normal(13, 9, 4), num_sets=2
    )
    found = Scorer(whole).score({"features": features, "probabilities": probabilities}, 0)
    assert set(found) == {
        "frechet", "kid", "precision", "recall", "frechet_to_real", "class_overlap", "rarest_class", "confidence",
    }  # fmt: skip
    few = Scorer(whole).score({"features": features[:3]}, 0)
    assert set(few) == {"frechet", "kid", "frechet_to_real"}
    pairs = Scorer(bare).score({"squared_errors": np.array([1.0, 3.0])}, 0)
    assert pairs == {"mse_to_teacher": 2.0}


def make_table() -> ScoreTable:
    student = Row(name="student", evaluations=1, values={"frechet": [10.0, 20.0, 30.0], "recall": [0.5, 0.6, 0.7]})
    teacher = Row(
        name="teacher (ddim 50)", evaluations=50, values={"frechet": [11.1, 21.0, 30.9]}, class_shares=[0.2, 0.8]
    )
    return ScoreTable(rows=[student, teacher, Row(name="ddim 5", evaluations=5)])


def test_a_table_comes_back_from_scores_json() -> None:
    table = make_table()
    assert ScoreTable.from_json(json.loads(json.dumps(table.to_json(), sort_keys=True))) == table
    old = {"student": {"frechet": [1.0, 2.0]}, "ddim 5": {"evaluations": 5, "frechet": None}}
    student, other = ScoreTable.from_json(old).rows
    assert student.values == {"frechet": [1.0, 2.0]} and not other.values
    for wrong in ({"student": 3}, {"student": {"frechet": [1.0, "2"]}}, {"student": {"frechet": [1.0, float("nan")]}}):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            ScoreTable.from_json(wrong)


def test_every_view_of_a_table_has_the_same_numbers() -> None:
    table = make_table()
    assert table.cells(["frechet", "recall"]) == [
        ["student", "1", "20.0 ± 10.0", "60 ± 10", "", ""],
        ["teacher (ddim 50)", "50", "21.0 ± 9.9", "–", "-1.0 [-1.2, -0.8]", "ahead"],
    ]
    first, second, third = csv.DictReader(io.StringIO(table.to_csv(num_sets=3)))
    assert (first["frechet"], first["frechet_sd"], first["recall"], first["num_sets"]) == ("20", "10", "0.6", "3")
    assert second["frechet"] == "21" and second["recall"] == third["frechet"] == ""
    saved = table.to_json()["teacher (ddim 50)"]
    assert saved["scores"]["frechet"]["mean"] == saved["frechet_mean"] == pytest.approx(21.0)
    assert saved["student_minus_this"]["mean"] == pytest.approx(-1.0)


def test_rows_tell_what_their_solver_does_to_x0() -> None:
    table = make_table()
    assert table.marks() == {}
    table.rows[1].x0 = table.rows[2].x0 = "x̂_0 clipped to ±1"
    (mark,) = table.marks()
    names = [line[0] for line in table.cells(["frechet"])]
    assert names == ["student", f"teacher (ddim 50) {mark}"]
    assert ScoreTable.from_json(table.to_json()) == table
    lines = csv.DictReader(io.StringIO(table.to_csv()))
    assert [line["x0"] for line in lines] == ["", "x̂_0 clipped to ±1", "x̂_0 clipped to ±1"]


@pytest.mark.parametrize("name", MEASURES)
def test_the_verdict_knows_which_value_is_better(name: str) -> None:
    below, chance = Interval(mean=-1.0, low=-2.0, high=-0.5), Interval(mean=-1.0, low=-2.0, high=0.5)
    expected = {"lower": "ahead", "higher": "behind", "as teacher": ""}
    assert MEASURES[name].verdict(below) == expected[MEASURES[name].better]
    assert MEASURES[name].verdict(chance) == MEASURES[name].verdict(None) == ""


def test_parts_of_the_reference_hold_every_class_where_labels_follow_the_seeds() -> None:
    """Labels come in turn, so every n-th seed may be of one class, far from a set of all."""
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 10
    features, others = (generator.normal(size=(400, 4)) + 5.0 * labels[:, None] for _ in range(2))
    score = KID.prepare(Reference(features=features, class_shares=None, real_features=None, num_sets=10))
    assert score is not None
    values = [score(others[40 * index : 40 * index + 40], index) or 0.0 for index in range(10)]
    single = KID.prepare(Reference(features=features[::10], class_shares=None, real_features=None, num_sets=1))
    assert single is not None
    assert abs(np.mean(values)) < 0.1 * abs(single(others[:40], 0) or 0.0)


def test_sharpness_falls_with_blur_and_knows_its_frequencies() -> None:
    """A wave of three pixels is in the upper octave, one of eight pixels isn't; an edge's gradient is its height."""
    across = torch.arange(24.0).expand(1, 1, 24, 24)
    fine, coarse = (torch.sin(across * (2 * torch.pi / length)) for length in (3.0, 8.0))
    upper = 1 - 11**2 / 24**2  # of all frequencies
    assert float(upper_octave_power(fine)) == pytest.approx(0.5 / upper, rel=1e-4)
    assert float(upper_octave_power(coarse)) < 1e-6
    edge = (across >= 12.0).float() * 2.0 - 1.0
    assert float(gradient_magnitudes(edge)) == pytest.approx(2.0 / 23)
    blurred = torch.nn.functional.avg_pool2d(edge, 3, 1, 1, count_include_pad=False)
    images = torch.cat([edge, blurred])
    assert gradient_magnitudes(images).shape == upper_octave_power(images).shape == (2,)
    assert upper_octave_power(images)[1] < 0.6 * upper_octave_power(images)[0]
    assert float(gradient_magnitudes(torch.cat([edge, edge.mT]))[1]) == pytest.approx(2.0 / 23)
