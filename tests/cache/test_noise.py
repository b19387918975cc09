"""The noise rule: golden values, and the laws that make a seed's noise a pure function of the seed."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from advkd.cache.format.hashing import is_held_out, mix64
from advkd.cache.format.noise import inverse_normal_cdf, standard_normal

seeds = st.integers(0, 2**63 - 1)


def test_golden_values() -> None:
    """Frozen: a change here breaks every cache that exists."""
    expected = [[-2.3270326, 1.9216721, 0.6320742, -2.2109537], [0.68876183, 1.980282, -1.105399, 2.5692706]]
    np.testing.assert_array_equal(standard_normal(7, [5, 3], (4,)), np.array(expected, dtype=np.float32))
    drawn = standard_normal(7, range(64), (1, 16, 16))
    golden = "6ef8a52a5716225ae3d9454c7bc3a575c89edcde390adf8dbbee929c15429206"
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == golden


@given(root=seeds, rows=st.lists(seeds, min_size=1, max_size=6), stream=st.integers(0, 1000))
def test_a_seed_does_not_depend_on_its_company(root: int, rows: list[int], stream: int) -> None:
    together = standard_normal(root, rows, (2, 3), stream)
    alone = np.concatenate([standard_normal(root, [row], (2, 3), stream) for row in rows])
    np.testing.assert_array_equal(together, alone)


def test_streams_roots_and_seeds_differ() -> None:
    rows = [
        standard_normal(root, [seed], (64,), stream) for root in (0, 1) for seed in (0, 1, 2**40) for stream in (0, 1)
    ]
    assert len({row.tobytes() for row in rows}) == 12
    correlations = np.corrcoef(np.concatenate(rows)) - np.eye(12)
    assert np.abs(correlations).max() < 0.5


def test_it_is_normal() -> None:
    values = standard_normal(0, range(200), (1000,)).ravel()
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert abs(float(stats.kurtosis(values))) < 0.05


def test_inverse_cdf_is_exact_to_the_last_digits() -> None:
    u = np.concatenate([np.linspace(1e-15, 1 - 1e-15, 100_001), 2.0 ** -np.arange(2, 53)])
    expected = stats.norm.ppf(u)
    np.testing.assert_allclose(inverse_normal_cdf(u), expected, rtol=3e-15, atol=3e-15)


@pytest.mark.parametrize("bad", [(-1, [0], 0), (0, [-1], 0), (0, [2**63], 0), (0, [0], -1)])
def test_out_of_range_is_refused(bad: tuple[int, list[int], int]) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        standard_normal(bad[0], bad[1], (4,), bad[2])


def test_one_seed_in_sixteen_is_held_out_whatever_the_range() -> None:
    chosen = is_held_out(np.arange(100_000))
    assert abs(float(chosen.mean()) - 1 / 16) < 0.003
    np.testing.assert_array_equal(is_held_out(np.arange(500, 700)), chosen[500:700])


def test_mix64_is_splitmix() -> None:
    """The first outputs of SplitMix64 from state 0, as published with the algorithm."""
    assert int(mix64(0)) == 0xE220A8397B1DCDAF
    assert len(set(mix64(np.arange(10_000)).tolist())) == 10_000
