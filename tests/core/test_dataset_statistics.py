"""Numbers about datasets: quality, exact coverage, concentrability, sample sizes; by hand, identities, controls."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corollary.core.dataset import Dataset, DatasetInfo
from corollary.core.dataset_statistics import (
    Cells,
    concentrability,
    coverage,
    describe,
    distance_to_data,
    effective_sample_size,
    empirical_concentrability,
    saco,
    state_actions,
    trajectory_quality,
)
from corollary.core.errors import ConfigError, DataError


def steps(states, actions, rewards=None, **options) -> Dataset:
    """Episodes of one step each."""
    ends = np.ones(len(states), dtype=bool)
    return Dataset.from_arrays(
        np.asarray(states, float).reshape(len(states), -1),
        np.asarray(actions),
        np.zeros(len(states)) if rewards is None else rewards,
        ends,
        ~ends,
        **options,
    )


def uniform(n: int, seed: int, d_s: int = 1, width: float = 1.0) -> Dataset:
    rng = np.random.default_rng(seed)
    return steps(width * rng.random((n, d_s)), rng.uniform(-1, 1, (n, 1)))


# ------------------------------------------------------------------------------------------------------ quality


def test_trajectory_quality_by_hand() -> None:
    data = steps([0.0, 1.0], [[0.0], [0.0]], [2.0, 6.0], info=DatasetInfo("x", ref_min_score=2.0, ref_max_score=10.0))
    assert trajectory_quality(data) == 0.25  # (4 - 2) / (10 - 2)
    assert trajectory_quality(data) == pytest.approx(data.normalized_score(4.0) / 100)
    assert trajectory_quality(data, random_return=4.0) == 0  # the random policy's own data
    assert trajectory_quality(data, best_return=4.0) == 1  # the best policy's own data
    assert trajectory_quality(data, best_return=3.0) == 2  # nothing is clipped


@pytest.mark.parametrize("given", [{}, {"random_return": 1.0}, {"random_return": 1.0, "best_return": 1.0}])
def test_trajectory_quality_needs_two_references(given) -> None:
    with pytest.raises(DataError, match=r"x has the reference returns .* needs two different"):
        trajectory_quality(steps([0.0], [[0.0]], info=DatasetInfo("x")), **given)


# ----------------------------------------------------------------------------------------------------- coverage


def test_coverage_by_hand() -> None:
    # Two bins per dimension between 0 and 1: the middle belongs to the upper bin, the upper limit to the last.
    data = steps([0.0, 0.2, 0.5, 1.0, 1.0], [[0.0], [0.1], [0.1], [0.9], [1.0]])
    cells = Cells.of(data, 2)
    assert cells.index(data).tolist() == [[0, 0], [0, 0], [1, 0], [1, 1], [1, 1]]
    found = coverage(data, cells)
    assert (found.rows, found.occupied, found.share) == (5, 3, 3 / 4)
    # Shares 2/5, 1/5, 2/5.
    entropy = -(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2))
    assert found.effective_support == pytest.approx(math.exp(entropy))


def test_outside_the_limits_of_the_reference_is_the_outermost_bin() -> None:
    cells = Cells.of(steps([0.0, 1.0], [[0.0], [1.0]]), 10)
    outside = steps([-5.0, 0.05, 7.0, 0.95], [[-1.0], [0.0], [1.0], [1.0]])
    assert cells.index(outside).tolist() == [[0, 0], [0, 0], [9, 9], [9, 9]]
    assert coverage(outside, cells).occupied == 2


def test_discrete_actions_have_a_bin_each_and_flat_dimensions_one() -> None:
    data = steps(np.array([[1.0, 7.0], [2.0, 7.0], [2.0, 7.0]]), np.array([0, 2, 3]), n_actions=4)
    cells = Cells.of(data, 100)
    assert cells.bins.tolist() == [100, 1, 4]
    assert cells.index(data)[:, 2].tolist() == [0, 2, 3]
    assert coverage(data, cells).occupied == 3
    assert coverage(data, cells).share == 3 / 400


@given(seed=st.integers(0, 2**31), n=st.integers(1, 200), bins=st.integers(1, 300))
def test_counts_are_those_of_a_set_of_tuples(seed, n, bins) -> None:
    data = uniform(n, seed, d_s=2)
    cells = Cells.of(data, bins)
    counted: dict[tuple[int, ...], int] = {}
    for row in cells.index(data).tolist():
        counted[tuple(row)] = counted.get(tuple(row), 0) + 1
    found = coverage(data, cells)
    assert found.occupied == len(counted)
    frequency = np.array(list(counted.values())) / n
    assert found.effective_support == pytest.approx(np.exp(-(frequency * np.log(frequency)).sum()))
    assert 1 - 1e-9 <= found.effective_support <= found.occupied + 1e-9  # the support is at least exp(entropy)


@pytest.mark.theory
def test_saco_of_the_reference_is_one_and_larger_sets_exceed_it() -> None:
    reference = uniform(400, 0)
    assert saco(reference, reference) == 1
    assert saco(uniform(100, 1), reference) < 0.5  # a smaller set
    assert saco(uniform(1600, 1), reference) > 2  # a larger one: nothing is clipped
    assert saco(uniform(400, 1), reference) == pytest.approx(1, abs=0.02)  # another of the same kind and size
    assert saco(uniform(400, 1, width=0.01), reference) < 0.4  # control: one that stays in a corner


@pytest.mark.theory
def test_distinct_cells_of_uniform_rows_are_the_coupon_collectors() -> None:
    # n rows thrown on m cells leave each empty with probability (1 - 1/m)^n; n = 2000, m = 100 * 10.
    rng = np.random.default_rng(0)
    n, m = 2000, 1000
    data = steps(rng.random(n), rng.integers(0, 10, n), n_actions=10)
    expected = m * (1 - (1 - 1 / m) ** n)
    assert coverage(data).occupied == pytest.approx(expected, rel=0.02)


def test_coverage_refuses_other_tasks_and_bins() -> None:
    with pytest.raises(DataError, match="has 2 dimensions of states, arrays has 1"):
        saco(uniform(5, 0, d_s=2), uniform(5, 0))
    with pytest.raises(ConfigError, match="bins must be at least 1; got 0"):
        Cells.of(uniform(5, 0), 0)


def test_distance_to_data_by_hand() -> None:
    # Standard deviations: states 0, 2, 0, 2 have 1; actions 0, 0, 1, 1 have 1/2.
    data = steps([0.0, 2.0, 0.0, 2.0], [[0.0], [0.0], [1.0], [1.0]])
    found = distance_to_data(data, [[0.0], [3.0], [1.0]], [[0.0], [0.0], [0.5]])
    np.testing.assert_allclose(found, [0, 1, math.sqrt(1 + 1)])
    rows = state_actions(data)
    assert not distance_to_data(data, rows[:, :1], rows[:, 1:]).any()
    with pytest.raises(DataError, match="pairs of 2 numbers; got 3"):
        distance_to_data(data, np.zeros((1, 2)), np.zeros((1, 1)))
    with pytest.raises(DataError, match="discrete actions, between which there is no distance"):
        distance_to_data(steps([0.0], np.array([0])), [[0.0]], [[0.0]])


@given(seed=st.integers(0, 2**31), n=st.integers(1, 40), d=st.integers(1, 4))
def test_distance_to_data_is_that_of_all_pairs(seed, n, d) -> None:
    rng = np.random.default_rng(seed)
    data = uniform(n, seed, d_s=d)
    obs, action = rng.random((7, d)), rng.uniform(-1, 1, (7, 1))
    rows = state_actions(data).astype(float)
    scale = np.where(rows.std(0) > 0, rows.std(0), 1)
    every = np.linalg.norm((np.hstack([obs, action])[:, None] - rows) / scale, axis=-1)
    np.testing.assert_allclose(distance_to_data(data, obs, action), every.min(1), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- concentrability


def test_concentrability_by_hand() -> None:
    # Ratios 2, 1/2 on what the policy visits, weighed 1/2 and 1/2 by it: mean 5/4; chi^2 = 1/4.
    found = concentrability([[0.5, 0.5], [0.0, 0.0]], [[0.25, 1.0], [0.0, 0.0]])
    assert found.largest == pytest.approx(0.5 / 0.2)
    assert found.mean == pytest.approx(0.5 * 0.5 / 0.2 + 0.5 * 0.5 / 0.8)
    assert found.uncovered == 0
    assert concentrability([2, 2], [1, 1]) == (1, 1, 0)  # normalised, and the policy's own data


def test_what_the_data_misses_has_no_bound() -> None:
    found = concentrability([0.5, 0.25, 0.25], [1.0, 1.0, 0.0])
    assert found == (math.inf, math.inf, 0.25)


@pytest.mark.theory
@given(seed=st.integers(0, 2**31), n=st.integers(2, 30))
def test_the_mean_ratio_is_what_reweighting_costs(seed, n) -> None:
    # Weights w = d_pi / d_D on rows distributed as d_D: E w = 1 and E w^2 = 1 + chi^2, so of N rows as many as
    # (sum w)^2 / sum w^2 = N / (1 + chi^2) remain. Exact if cell c holds N d_D(c) rows.
    rng = np.random.default_rng(seed)
    policy, counts = rng.dirichlet(np.ones(n)), rng.integers(1, 20, n)
    found = concentrability(policy, counts)
    share = counts / counts.sum()
    chi_squared = (np.square(policy - share) / share).sum()
    assert found.mean == pytest.approx(1 + chi_squared)
    assert 1 <= found.mean * (1 + 1e-12) <= found.largest * (1 + 1e-9)
    weight_of_row = np.repeat(policy / share, counts)
    assert effective_sample_size(weight_of_row) == pytest.approx(counts.sum() / found.mean)


@pytest.mark.theory
@pytest.mark.parametrize("seed", range(5))
def test_concentrability_bounds_the_change_of_measure_in_a_chain(seed) -> None:
    # With d_pi the discounted occupancy of a random MDP, solved exactly: E_pi[f] <= C_max E_D[f] for every f >= 0, with
    # equality for the indicator of the worst pair; and |E_pi[f]|^2 <= C_mean E_D[f^2] (Cauchy-Schwarz).
    rng = np.random.default_rng(seed)
    n_s, n_a, gamma = 5, 3, 0.9
    dynamics = rng.dirichlet(np.full(n_s, 0.5), size=(n_s, n_a))
    start = rng.dirichlet(np.ones(n_s))

    def occupancy(policy):
        states = np.linalg.solve(np.eye(n_s) - gamma * np.einsum("sa,sat->ts", policy, dynamics), (1 - gamma) * start)
        return states[:, None] * policy

    target, behaviour = (occupancy(rng.dirichlet(np.ones(n_a), size=n_s)) for _ in range(2))
    assert target.sum() == pytest.approx(1)
    found = concentrability(target, behaviour)
    for f in rng.exponential(size=(50, n_s, n_a)):
        assert (target * f).sum() <= found.largest * (behaviour * f).sum() * (1 + 1e-12)
        assert (target * f).sum() ** 2 <= found.mean * (behaviour * f**2).sum() * (1 + 1e-12)
    worst = target / behaviour == (target / behaviour).max()
    assert target[worst].sum() == pytest.approx(found.largest * behaviour[worst].sum())
    assert target[worst].sum() > found.mean * behaviour[worst].sum()  # control: the mean ratio bounds no function


def test_empirical_concentrability_estimates_the_known_ratio() -> None:
    # States uniform on [0, 1] in the data, on [0, 1/2] under the policy: d_pi / d_D = 2 there. C_max = C_mean = 2.
    # A cell's ratio has a relative standard deviation of sqrt(1/4000 + 1/8000) = 2 %, and five are compared.
    rng = np.random.default_rng(0)
    data = steps(rng.random(40_000), np.zeros(40_000, int), n_actions=1)
    rollouts = steps(rng.random(40_000) / 2, np.zeros(40_000, int), n_actions=1)
    found = empirical_concentrability(rollouts, data, bins=10)
    assert found.largest == pytest.approx(2, rel=0.08)
    assert found.mean == pytest.approx(2, rel=0.05)
    assert empirical_concentrability(data, data, bins=10) == pytest.approx((1, 1, 0))
    # Controls: the data of the other half misses everything, and one bin sees no difference at all.
    other = steps(0.5 + rng.random(1000) / 2, np.zeros(1000, int), n_actions=1)
    assert empirical_concentrability(rollouts, other, bins=10).uncovered > 0.99
    assert empirical_concentrability(rollouts, data, bins=1) == pytest.approx((1, 1, 0))
    # What is constant in each, but not the same, is never in one cell.
    low, high = (steps(np.zeros(50), np.full((50, 1), value)) for value in (-1.0, 1.0))
    assert empirical_concentrability(high, low, bins=10) == (math.inf, math.inf, 1)
    with pytest.raises(DataError, match="dimensions of states"):
        empirical_concentrability(rollouts, uniform(5, 0, d_s=2))


@pytest.mark.parametrize(
    ("policy", "data", "says"),
    [
        ([0.5, 0.5], [1.0], "policy has shape .2. and data .1."),
        ([-0.5, 1.5], [1.0, 1.0], "policy must hold probabilities"),
        ([0.5, 0.5], [0.0, 0.0], "data must hold probabilities"),
        ([0.5, math.nan], [1.0, 1.0], "policy must hold probabilities"),
    ],
)
def test_what_is_no_occupancy_is_named(policy, data, says) -> None:
    with pytest.raises(DataError, match=says):
        concentrability(policy, data)


# ------------------------------------------------------------------------------------------------------- weights


def test_effective_sample_size_by_hand() -> None:
    assert effective_sample_size([1, 1, 1, 1]) == 4
    assert effective_sample_size([0, 7, 0]) == 1
    assert effective_sample_size([1, 2, 3]) == pytest.approx(36 / 14)
    assert effective_sample_size([10, 20, 30]) == pytest.approx(36 / 14)
    with pytest.raises(DataError, match="weights must hold"):
        effective_sample_size([1, -1])


@pytest.mark.theory
def test_effective_sample_size_is_the_ratio_of_variances() -> None:
    # Var(sum w x / sum w) = sigma^2 sum w^2 / (sum w)^2: 4000 weighted means of 20 numbers; the estimated variance has
    # a relative standard deviation of sqrt(2 / 4000) = 2.2 %.
    rng = np.random.default_rng(0)
    weight = rng.exponential(size=20)
    means = rng.normal(size=(4000, 20)) @ weight / weight.sum()
    assert 1 / means.var() == pytest.approx(effective_sample_size(weight), rel=0.08)
    assert abs(1 / means.var() - 20) > 5  # control: as if all counted alike


# ------------------------------------------------------------------------------------------------------- summary


def test_the_summary_by_hand() -> None:
    info = DatasetInfo("x", ref_min_score=0.0, ref_max_score=4.0)
    data = steps([0.0, 1.0, 1.0], [[0.0], [1.0], [1.0]], [1.0, 2.0, 3.0], info=info)
    found = describe(data)
    assert json.loads(json.dumps(found)) == found
    support = math.exp(-(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3))
    covered = {"occupied cells": 2, "share of cells": 2e-4, "effective support": pytest.approx(support)}
    assert found == {"trajectory_quality": 0.5, "coverage": covered, "saco": None, "concentrability": None}
    reference = steps([0.0, 1.0, 0.5, 0.2], [[0.0], [1.0], [0.0], [0.0]])
    compared = describe(data, reference)
    assert json.loads(json.dumps(compared, allow_nan=False)) == compared
    assert compared["saco"] == {"value": 0.5, "rows": 3, "reference rows": 4}
    # With two bins the reference is in the cells (0, 0), (1, 1), (1, 0) with the shares 1/2, 1/4, 1/4; the data, in the
    # first two with 1/3 and 2/3, misses the third. The other way round nothing is missed: 2/3 and 8/3 are the ratios.
    assert compared["concentrability"]["2 bins"] == {
        "largest": "Infinity",
        "mean": "Infinity",
        "uncovered": 0.25,
    }
    other = describe(reference, data)["concentrability"]["2 bins"]
    assert other == {"largest": pytest.approx(8 / 3), "mean": pytest.approx(2), "uncovered": 0}
    assert describe(reference)["trajectory_quality"] is None
