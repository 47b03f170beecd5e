"""Sampling by trajectories: probabilities by hand, luck and skill, drawing rows, training with them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from corollary.core import checkpoint
from corollary.core.agent import algorithms
from corollary.core.config import OfflineConfig
from corollary.core.dataset import Dataset, Episode
from corollary.core.errors import ConfigError, DataError
from corollary.core.runs import Run
from corollary.core.sampling import (
    RowSampler,
    effective_sample_sizes,
    first_state_values,
    row_probabilities,
    trajectory_scores,
)
from corollary.core.transforms import RewardTransform, reward_transform
from corollary.kernels.streams import RandomStream
from corollary.offline import BC, IQL

Array = NDArray[np.float64]
RAW = RewardTransform("none", 1.0, 0.0)
SMALL: dict[str, Any] = {"hidden": (8, 8), "batch_size": 16}


def episodes(*rewards: list[float], first: list[float] | None = None) -> Dataset:
    """One truncated episode per list of rewards; observation 1 is the episode's entry of `first`."""
    starts = np.zeros(len(rewards)) if first is None else first
    return Dataset.from_episodes(
        Episode(np.full((len(r) + 1, 1), s), np.zeros((len(r), 1)), r, terminated=False, truncated=True)
        for r, s in zip(rewards, starts, strict=True)
    )


def probabilities(dataset: Dataset, rewards: RewardTransform = RAW, **options: Any) -> Array:
    found = row_probabilities(dataset, OfflineConfig(**options), rewards)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------ probabilities


def test_return_weights_by_hand() -> None:
    # Returns 0, 3, 6 of lengths 1, 3, 2: N = 0, 1/2, 1. At temperature 1/2 the exponents are 0, 1, 2.
    data = episodes([0.0], [1.0, 1.0, 1.0], [2.0, 4.0])
    np.testing.assert_allclose(trajectory_scores(data, "return", RAW), [0, 0.5, 1])
    e = math.e
    z = 1 + 3 * e + 2 * e**2
    options = {"sampling": "return", "sampling_temperature": 0.5}
    np.testing.assert_allclose(probabilities(data, **options), np.array([1, e, e, e, e**2, e**2]) / z)
    # Per trajectory the lengths do not matter for a trajectory's share.
    by_trajectory = np.array([1, e / 3, e / 3, e / 3, e**2 / 2, e**2 / 2]) / (1 + e + e**2)
    np.testing.assert_allclose(probabilities(data, **options, sampling_per="trajectory"), by_trajectory)
    assert row_probabilities(data, OfflineConfig(), RAW) is None


def test_returns_are_those_of_the_transformed_rewards() -> None:
    # r - 1 takes an episode's length off its return: 1 - 1 = 0, 3 - 3 = 0, 6 - 4 = 2.
    data = episodes([1.0], [1.0, 1.0, 1.0], [3.0, 3.0, 0.0, 0.0])
    minus_one = reward_transform("antmaze_minus1", data)
    np.testing.assert_allclose(trajectory_scores(data, "return", minus_one), [0, 0, 1])
    np.testing.assert_allclose(trajectory_scores(data, "return", RAW), [0, 0.4, 1])


def test_the_view_decides_which_rows_share_a_trajectorys_weight() -> None:
    # The q-learning view drops truncated rows: one row less of each episode, and the only row of the first.
    data = episodes([0.0], [1.0, 1.0, 1.0], [2.0, 4.0])
    options = {"sampling": "return", "sampling_temperature": 0.5, "sampling_per": "trajectory"}
    e = math.e
    found = probabilities(data, view="d4rl_qlearning", **options)
    np.testing.assert_allclose(found, np.array([e / 2, e / 2, e**2]) / (e + e**2))


def test_effective_sizes_of_every_way_to_sample() -> None:
    # N = (0, 1) with alpha = 0.1: weights 1 and e^10 for one row each of two, (1 + e^10)^2 / (1 + e^20).
    found = effective_sample_sizes(episodes([0.0], [1.0]))
    assert found["uniform"] == 2
    assert found["return"] == pytest.approx((1 + math.exp(10)) ** 2 / (1 + math.exp(20)))
    assert effective_sample_sizes(episodes([0.0], [1.0], first=[0.0, 1.0]))["advantage"] is None  # a line through both


def test_limits_of_the_temperature() -> None:
    data = episodes([0.0], [1.0, 1.0, 1.0], [2.0, 4.0])
    np.testing.assert_allclose(
        probabilities(data, sampling="return", sampling_temperature=1e-4), [0, 0, 0, 0, 0.5, 0.5], atol=1e-12
    )
    np.testing.assert_allclose(probabilities(data, sampling="return", sampling_temperature=1e9), np.full(6, 1 / 6))


@pytest.mark.parametrize("kind", ["return", "advantage"])
def test_equally_good_trajectories_are_drawn_alike(kind) -> None:
    # For advantages: returns linear in the first state, so the residuals are the rounding of float32 rewards.
    first = [0.1, 0.7, 0.3, 0.9]
    data = episodes(*([0.1 + (3 * s if kind == "advantage" else 0)] for s in first), first=first)
    assert not trajectory_scores(data, kind, RAW).any()
    np.testing.assert_array_equal(probabilities(data, sampling=kind), np.full(4, 0.25))
    assert trajectory_scores(episodes([1.0], [1.1], [1.0]), "return", RAW).any()  # control


def test_first_state_values_by_hand() -> None:
    # The line through (0, 1), (1, 2), (2, 6): slope 2.5, mean 3 at 1. Residuals 0.5, -1, 0.5: N = 1, 0, 1.
    data = episodes([1.0], [2.0], [6.0], first=[0.0, 1.0, 2.0])
    np.testing.assert_allclose(first_state_values(data, data.episode_returns()), [0.5, 3, 5.5])
    np.testing.assert_allclose(trajectory_scores(data, "advantage", RAW), [1, 0, 1])
    np.testing.assert_allclose(trajectory_scores(data, "return", RAW), [0, 0.2, 1])  # control: other numbers


def test_a_value_that_fits_every_return_is_refused() -> None:
    data = episodes([1.0], [2.0], first=[0.0, 1.0])
    with pytest.raises(DataError, match=r"2 coefficients to the returns of 2 episodes.*sampling='return', or more"):
        trajectory_scores(data, "advantage", RAW)
    # A fixed first state has no slope to fit: two episodes are enough.
    np.testing.assert_allclose(trajectory_scores(episodes([1.0], [2.0]), "advantage", RAW), [0, 1])


@pytest.mark.theory
@given(seed=st.integers(0, 2**31), n=st.integers(2, 30), alpha=st.floats(0.05, 10), kind=st.sampled_from("ra"))
def test_the_gain_in_return_is_the_covariance_with_the_weights(seed, n, alpha, kind) -> None:
    # E_w[G] - E[G] = Cov(w, G) / E[w] for any weights; not negative if they never fall as G rises.
    rng = np.random.default_rng(seed)
    data = episodes(*rng.normal(size=(n, 3)).tolist(), first=rng.normal(size=n).tolist())
    returns = data.episode_returns()
    sampling = {"r": "return", "a": "advantage"}[kind] if n > 2 else "return"
    options = {"sampling": sampling, "sampling_temperature": alpha, "sampling_per": "trajectory"}
    share = np.add.reduceat(probabilities(data, **options), data.episode_starts)
    score = trajectory_scores(data, sampling, RAW)
    weight = np.exp(score / alpha)
    gain = share @ returns - returns.mean()
    covariance = (weight * returns).mean() - weight.mean() * returns.mean()
    assert gain == pytest.approx(covariance / weight.mean(), rel=1e-9, abs=1e-12)
    if sampling == "return":
        assert gain >= -1e-12
        falling = np.exp(-score / alpha)  # control: weights that fall as G rises
        assert (falling @ returns) / falling.sum() - returns.mean() <= 1e-12


# --------------------------------------------------------------------------------------- deterministic dynamics


class Tree:
    """Two steps of two actions from a start state: the state is the path. Paths have counts and rewards."""

    def __init__(self, seed: int, n_starts: int) -> None:
        rng = np.random.default_rng(seed)
        # Start, first action, second action -> two rewards, multiples of 1/8, which float32 holds exactly.
        self.rewards = rng.integers(-16, 17, size=(n_starts, 2, 2, 2)) / 8
        self.counts = rng.integers(1, 6, size=(n_starts, 2, 2))
        self.paths = [path for path in np.ndindex(n_starts, 2, 2) for _ in range(self.counts[path])]

    def dataset(self) -> Dataset:
        return episodes(*(self.rewards[path].tolist() for path in self.paths), first=[float(p[0]) for p in self.paths])

    def return_of_implied_behaviour(self, mass: Array) -> float:
        """J of ``mu_w(a|s) = w(s, a) / w(s)`` from the start states' own frequencies, by recursion over the tree."""
        total = 0.0
        for start in range(len(mass)):
            first = mass[start].sum(1) / mass[start].sum()
            for a in range(2):
                second = mass[start, a] / mass[start, a].sum()
                total += (
                    (self.counts[start].sum() / self.counts.sum())
                    * first[a]
                    * (second @ self.rewards[start, a].sum(-1))
                )
        return total


@pytest.mark.theory
@pytest.mark.parametrize("seed", range(5))
def test_with_deterministic_dynamics_and_one_start_the_gain_is_the_implied_behaviours(seed) -> None:
    def gap(n_starts: int) -> tuple[float, float]:
        """The gain of the data, and that of the behaviour implied by the weights."""
        tree = Tree(seed, n_starts)
        data = tree.dataset()
        share = probabilities(data, sampling="return", sampling_temperature=0.3, sampling_per="trajectory")
        share = np.add.reduceat(share, data.episode_starts)
        mass = np.zeros(tree.counts.shape)
        for path, p in zip(tree.paths, share, strict=True):
            mass[path] += p
        returns = data.episode_returns()
        before = tree.return_of_implied_behaviour(tree.counts.astype(float))
        assert before == pytest.approx(returns.mean())
        return share @ returns - returns.mean(), tree.return_of_implied_behaviour(mass) - before

    of_data, of_behaviour = gap(n_starts=1)
    assert of_data == pytest.approx(of_behaviour, rel=1e-9)
    assert of_data > 0.05
    of_data, of_behaviour = gap(n_starts=3)  # control: the weights also prefer lucky starts, which no policy chooses
    assert of_data > of_behaviour + 0.01


# ------------------------------------------------------------------------------------------------ luck and skill
#
# One step: s uniform on [0, 1], a tenth of the actions good, reward L s + 1[good]. With the range L + 1 of returns the
# weight is exp(k s + c 1[good]), k = L / ((L + 1) alpha), c = 1 / ((L + 1) alpha): state and action are independent
# under it. So the share of good actions is 0.1 e^c / (0.1 e^c + 0.9), the mean of s that of the density ~ e^(k s),
# 1 / (1 - e^-k) - 1 / k, and the effective sample size the product of both factors (E w)^2 / E w^2. The advantage is
# 1[good] up to a constant whatever L: c = 1 / alpha, k = 0.

LUCK = (0.0, 1.0, 5.0)
ALPHA = 0.1


def luck_demo(luck: float) -> tuple[Dataset, NDArray[np.bool_], Array]:
    """2000 episodes of one step; the states are the midpoints of a grid, for good and bad actions alike."""
    good = np.arange(2000) < 200
    state = np.concatenate([(np.arange(200) + 0.5) / 200, (np.arange(1800) + 0.5) / 1800])
    ends = np.ones(2000, dtype=bool)
    action = np.where(good, 0.5, -0.5)[:, None]
    return Dataset.from_arrays(state[:, None], action, luck * state + good, ends, ~ends), good, state


def expected(k: float, c: float) -> tuple[float, float, float]:
    """Share of good actions, mean state, effective sample size out of 2000."""
    share = 0.1 * math.exp(c) / (0.1 * math.exp(c) + 0.9)
    mean = 0.5 if k == 0 else 1 / (1 - math.exp(-k)) - 1 / k
    states = 1.0 if k == 0 else (math.expm1(k) / k) ** 2 / (math.expm1(2 * k) / (2 * k))
    actions = (0.1 * math.exp(c) + 0.9) ** 2 / (0.1 * math.exp(2 * c) + 0.9)
    return share, mean, 2000 * states * actions


@pytest.mark.theory
@pytest.mark.parametrize("luck", LUCK)
def test_luck_misleads_returns_and_not_advantages(luck) -> None:
    data, good, state = luck_demo(luck)
    for sampling, k, c in (
        ("return", luck / (luck + 1) / ALPHA, 1 / (luck + 1) / ALPHA),
        ("advantage", 0.0, 1 / ALPHA),
    ):
        p = probabilities(data, sampling=sampling, sampling_temperature=ALPHA)
        share, mean, size = expected(k, c)
        assert p[good].sum() == pytest.approx(share, abs=0.005)
        assert p @ state == pytest.approx(mean, abs=0.005)
        assert RowSampler([0], 2000, p).effective_sample_size == pytest.approx(size, rel=0.02)


def test_the_numbers_of_the_luck_demonstration() -> None:
    # Worked out from the formulas above; a random sample of 2000 gave 1.00, .95, .35 and .49, .81, .88.
    returns = [expected(luck / (luck + 1) / ALPHA, 1 / (luck + 1) / ALPHA) for luck in LUCK]
    np.testing.assert_allclose([r[0] for r in returns], [0.9996, 0.943, 0.370], atol=1e-3)
    np.testing.assert_allclose([r[1] for r in returns], [0.5, 0.807, 0.880], atol=1e-3)
    np.testing.assert_allclose([r[2] for r in returns], [200, 89, 265], atol=1)


@pytest.mark.theory
def test_cloning_the_reweighted_demonstration_learns_the_good_action_despite_luck() -> None:
    # The mean action of a share x of good actions is x - 1/2: the least-squares policy's average.
    data, _, state = luck_demo(5.0)
    means = {}
    for sampling in ("uniform", "return", "advantage"):
        agent = BC(hidden=(16,), batch_size=256, learning_rate=3e-3, sampling=sampling).fit(data, 400)
        means[sampling] = float(agent.predict(state[:200, None].astype(np.float32))[0].mean())
    assert means["uniform"] == pytest.approx(0.1 - 0.5, abs=0.05)
    assert means["advantage"] == pytest.approx(0.9996 - 0.5, abs=0.05)
    assert means["return"] < 0  # lucky starts fill the batches, most of them with bad actions


# ---------------------------------------------------------------------------------------------------- the rows


def test_without_weights_the_rows_are_the_uniform_integers_of_the_stream() -> None:
    sampler = RowSampler([4, 9], 1000)
    for step in (0, 1, 7):
        rows, weight = sampler.rows(step, 32)
        assert weight is None
        assert torch.equal(rows, RandomStream([4, 9], "batch").integers(step, 1000, (32,)))
    assert sampler.effective_sample_size == 1000


@pytest.mark.parametrize("weighting", ["sample", "loss"])
def test_rows_are_a_function_of_seed_and_step(weighting) -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(50))
    together = RowSampler([4, 9, 2], 50, p, weighting)
    alone = RowSampler([9], 50, p, weighting)
    later = [together.rows(step, 8) for step in (3, 4, 5)]
    rows, weight = alone.rows(4, 8)
    assert torch.equal(later[1][0][1:2], rows)
    assert not torch.equal(later[1][0], later[0][0])
    assert (weight is None) == (weighting == "sample")
    if weight is not None:
        torch.testing.assert_close(weight, torch.from_numpy(50 * p).float()[rows], rtol=0, atol=0)


@pytest.mark.parametrize("zeros", [[0, 1], [9], [4, 5, 6], []])
def test_rows_come_with_their_probabilities_and_impossible_rows_never(zeros) -> None:
    p = np.random.default_rng(1).dirichlet(np.full(10, 2.0))
    p[zeros] = 0
    p /= p.sum()
    n = 40_000
    rows, _ = RowSampler([0], 10, p).rows(0, n)
    counts = np.bincount(rows[0].numpy(), minlength=10)
    assert counts[zeros].sum() == 0
    assert (np.abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p))).all()
    uniform = np.bincount(RowSampler([0], 10).rows(0, n)[0][0].numpy(), minlength=10)
    assert (np.abs(uniform - n * p) > 4.5 * np.sqrt(n * p * (1 - p))).any()  # control


def test_the_ends_of_the_unit_interval_fall_on_possible_rows(monkeypatch) -> None:
    ends = torch.tensor([[0.0, 0.25, 1 - 2.0**-53]], dtype=torch.float64)
    monkeypatch.setattr(RandomStream, "uniform", lambda self, step, shape: ends)
    rows, _ = RowSampler([0], 5, np.array([0, 0.25, 0, 0.75, 0])).rows(0, 3)
    assert rows.tolist() == [[1, 3, 3]]
    # Sums that are rounded: eleven elevenths do not add up to 1.
    rows, _ = RowSampler([0], 11, np.full(11, 1 / 11)).rows(0, 3)
    assert rows.tolist() == [[0, 2, 10]]


def test_weights_of_losses_have_mean_one_over_the_data() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(50))
    sampler = RowSampler([0], 50, p, "loss", dtype=torch.float64)
    rows, weight = sampler.rows(0, 4000)
    assert weight is not None
    of_row = dict(zip(rows[0].tolist(), weight[0].tolist(), strict=True))
    assert len(of_row) == 50
    assert sum(of_row.values()) / 50 == pytest.approx(1)
    assert sampler.effective_sample_size == pytest.approx(1 / (p**2).sum())


# ---------------------------------------------------------------------------------------------------- training


@pytest.fixture
def random_episodes() -> Dataset:
    """20 episodes of 5 steps, all of it random."""
    rng = np.random.default_rng(0)
    return Dataset.from_episodes(
        Episode(
            rng.normal(size=(6, 3)), rng.uniform(-1, 1, (5, 2)), rng.normal(size=5), terminated=False, truncated=True
        )
        for _ in range(20)
    )


def state_of(agent: Any, folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(agent.save(folder / "agent"))[1]


@pytest.mark.parametrize("options", [{"sampling": "advantage"}, {"sampling": "return", "weighting": "loss"}], ids=str)
def test_stopped_and_resumed_is_never_stopped(random_episodes, options, tmp_path) -> None:
    data, run = random_episodes, tmp_path / "run"
    whole = IQL([4, 9], **SMALL, **options).fit(data, 20)
    IQL([4, 9], **SMALL, **options).fit(data, 10, run_dir=run)
    resumed = IQL([4, 9], **SMALL, **options).fit(data, 20, run_dir=run, resume=True)
    a, b = state_of(whole, tmp_path), state_of(resumed, tmp_path)
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = state_of(IQL([4, 9], **SMALL).fit(data, 20), tmp_path)  # control: uniform
    assert any(not torch.equal(a[name], other[name]) for name in a)
    size = Run.read(run).card["effective_sample_size"]
    assert size == whole.sampler.effective_sample_size
    assert 1 < size < len(data)


def test_the_updates_see_these_rows_and_weights(random_episodes) -> None:
    seen: list[Any] = []

    class Watched(BC):
        def update(self, batch):
            seen.append(batch)
            return super().update(batch)

    for weighting in ("sample", "loss"):
        agent = Watched(2, sampling="return", weighting=weighting, **SMALL).fit(random_episodes, 3)
        for step, batch in enumerate(seen):
            rows, weight = agent.sampler.rows(step, 16)
            assert torch.equal(batch.index, rows)
            assert (batch.weight is None) == (weight is None) == (weighting == "sample")
            assert weight is None or torch.equal(batch.weight, weight)
        seen.clear()


@pytest.mark.parametrize("name", algorithms("offline"))
@pytest.mark.parametrize("weighting", ["sample", "loss"])
def test_every_algorithm_takes_it(random_episodes, name, weighting) -> None:
    agent = algorithms("offline")[name](sampling="return", weighting=weighting, **SMALL).fit(random_episodes, 2)
    assert agent.sampler.effective_sample_size < len(random_episodes)
    assert all(parameter.isfinite().all() for parameter in agent.networks.parameters())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampling": "best"}, "sampling must be of type Literal"),
        ({"sampling_temperature": 0.0}, "sampling_temperature must be > 0; got 0.0"),
        ({"sampling_per": "row"}, "sampling_per must be"),
        ({"weighting": "both"}, "weighting must be"),
    ],
)
def test_bad_options_are_named(options, says) -> None:
    with pytest.raises(ConfigError, match=says):
        BC(**options)
