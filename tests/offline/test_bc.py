"""Behaviour cloning: its loss, the least-squares map, the choice of trajectories, and what it must ignore."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corollary.core.dataset import Dataset, Episode
from corollary.offline import BC
from corollary.offline.td3 import action_error


@pytest.mark.rung(1, "offline.bc")
def test_action_error_by_hand() -> None:
    # Squared errors 1, 0, 4, 16 over two rows and two dimensions: the mean is over both, 21 / 4.
    action = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    logged = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert action_error(action, logged) == 5.25
    assert action_error(logged, logged) == 0


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_leading_axes_are_separate_problems(n_seeds, n_rows, d_a) -> None:
    generator = torch.Generator().manual_seed(100 * n_seeds + 10 * n_rows + d_a)
    action = torch.randn(n_seeds, n_rows, d_a, generator=generator, dtype=torch.float64)
    logged = torch.randn(n_seeds, n_rows, d_a, generator=generator, dtype=torch.float64)
    stacked = action_error(action, logged)
    separate = torch.stack([action_error(a, b) for a, b in zip(action, logged, strict=True)])
    torch.testing.assert_close(stacked, separate, rtol=1e-14, atol=0)


def linear_gaussian_expert(n: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """States N(0, I) and actions W s + b + noise, small against the action box."""
    rng = np.random.default_rng(5)
    states = rng.normal(size=(n, 3))
    weight = np.array([[0.3, -0.2, 0.1], [0.0, 0.25, -0.3]])
    actions = states @ weight.T + np.array([0.1, -0.05]) + noise * rng.normal(size=(n, 2))
    return states, actions


@pytest.mark.rung(3, "offline.bc")
def test_over_linear_maps_the_loss_is_minimised_by_least_squares() -> None:
    # The tabular twin of cloning: a Gaussian linear expert's maximum-likelihood map is numpy's lstsq.
    states, actions = linear_gaussian_expert(60, noise=0.3)
    with_one = np.hstack([states, np.ones((60, 1))])
    expected, *_ = np.linalg.lstsq(with_one, actions, rcond=None)
    weight = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-13, tolerance_change=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = action_error(torch.from_numpy(with_one) @ weight, torch.from_numpy(actions))
        loss.backward()
        return loss

    optimizer.step(closure)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.rung(2, "offline.bc")
def test_default_agent_recovers_the_least_squares_map() -> None:
    # The box is +-5 and expert actions stay below 1.5 or so, where 5 tanh(x / 5) is close to linear and clips nothing.
    states, actions = linear_gaussian_expert(2000, noise=0.1)
    with_one = np.hstack([states, np.ones((2000, 1))])
    fitted, *_ = np.linalg.lstsq(with_one, actions, rcond=None)
    flags = np.ones(2000, dtype=bool)
    dataset = Dataset.from_arrays(states, actions, np.zeros(2000), flags, ~flags, action_low=-5.0, action_high=5.0)
    agent = BC().fit(dataset, 600)

    probes = np.random.default_rng(6).normal(size=(500, 3))
    expected = np.hstack([probes, np.ones((500, 1))]) @ fitted
    error = np.sqrt(((agent.predict(probes)[0] - expected) ** 2).mean())
    spread = np.sqrt(((expected - expected.mean(0)) ** 2).mean())
    # 600 steps of a 256-256 network on noise 0.1 leave an error of about half that noise.
    assert error < 0.1
    # Control: the best constant action, which a learner that ignores the state would find, is not within reach.
    assert spread > 0.3


def episodes_with_returns(rewards_per_episode: list[list[float]], actions: list[float]) -> Dataset:
    return Dataset.from_episodes(
        Episode(
            observations=np.full((len(rewards) + 1, 1), float(i)),
            actions=np.full((len(rewards), 1), action),
            rewards=rewards,
            terminated=True,
            truncated=False,
        )
        for i, (rewards, action) in enumerate(zip(rewards_per_episode, actions, strict=True))
    )


def test_ten_percent_keeps_the_best_whole_trajectories() -> None:
    # Ten episodes of two rows; number 7 has the highest return.
    dataset = episodes_with_returns([[i % 8 / 8, 0.5] for i in range(10)], [i / 10 for i in range(10)])
    kept = BC(preset="10%").prepare(dataset)
    np.testing.assert_allclose(kept.action.flatten(), [0.7, 0.7], rtol=1e-6)
    assert len(BC().prepare(dataset)) == 20
    # 0.25 of ten episodes is two: numbers 7 and 6.
    two = BC(top_fraction=0.25).prepare(dataset)
    assert set(two.action.flatten().tolist()) == set(np.float32([0.6, 0.7]).tolist())


@pytest.mark.parametrize(("discount", "best_action"), [(1.0, -0.5), (0.5, 0.5)])
def test_trajectories_are_ranked_by_discounted_return(discount, best_action) -> None:
    # Returns: 0 + 0 + 3 gamma^2 against 2. At gamma = 1 that is 3 > 2; at gamma = 0.5 it is 0.75 < 2.
    dataset = episodes_with_returns([[0, 0, 3], [2, 0, 0]], [-0.5, 0.5])
    kept = BC(top_fraction=0.5, top_discount=discount).prepare(dataset)
    assert set(kept.action.flatten().tolist()) == {best_action}


@pytest.mark.rung(5, "offline.bc")
def test_rewards_and_flags_do_not_enter(random_dataset) -> None:
    dataset = random_dataset()
    rows = dataset.transitions()
    flipped = Dataset.from_arrays(
        rows.obs, rows.action, -10 * rows.reward, dataset.truncated, dataset.terminated, rows.next_obs
    )
    a = BC(hidden=(8,)).fit(dataset, 5)
    b = BC(hidden=(8,)).fit(flipped, 5)
    for name, tensor in a.networks.state_dict().items():
        assert torch.equal(tensor, b.networks.state_dict()[name])
    # Control: other actions do change what is learnt.
    other = Dataset.from_arrays(
        rows.obs, -rows.action, rows.reward, dataset.terminated, dataset.truncated, rows.next_obs
    )
    c = BC(hidden=(8,)).fit(other, 5)
    assert not torch.equal(a.networks["actor"].net.weights[0], c.networks["actor"].net.weights[0])
