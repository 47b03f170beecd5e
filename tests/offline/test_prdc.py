"""PRDC: the penalty by hand, its two limits (PRDC-1), the bounds it rests on (PRDC-2, T2, T3), its diagnostics."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from torch import Tensor

from corollary.core.dataset import Dataset
from corollary.core.errors import ConfigError, CorollaryError
from corollary.kernels.neighbours import NeighbourIndex
from corollary.offline import PRDC, TD3BC
from corollary.offline.prdc import dataset_distance


def f64(values: ArrayLike) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def dataset_of(states: ArrayLike, actions: ArrayLike) -> Dataset:
    """One-step episodes with reward 0."""
    flags = np.ones(len(np.asarray(states)), dtype=bool)
    return Dataset.from_arrays(states, actions, np.zeros(len(flags)), flags, ~flags)


def prepared(dataset: Dataset, **options: object):
    """A float64 PRDC agent on raw states, and its transitions."""
    agent = PRDC(hidden=(8,), precision="float64", state_transform="none", **options)
    return agent, agent.prepare(dataset)


# ------------------------------------------------------------------------------------------------ hand numbers


def test_more_neighbours_than_rows_are_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"PRDCConfig\.k must be at most the number of rows, 3; got 4"):
        prepared(HAND_SET, k=4)


def test_a_policy_that_diverges_ends_the_run_with_its_step() -> None:
    agent = PRDC(hidden=(8,), batch_size=4).fit(HAND_SET, 3)
    with torch.no_grad():
        agent.actor.net.weights[0].fill_(float("nan"))
    with pytest.raises(CorollaryError, match=r"offline\.prdc has diverged: at step 5 \w+_loss is not finite"):
        agent.fit(HAND_SET, 2)


def test_dataset_distance_by_hand() -> None:
    # sqrt(3^2 + 4^2 + 12^2) = 13 and 0.
    action_part = f64([[3, 4], [0, 0]]).requires_grad_()
    distance = dataset_distance(action_part, f64([[12], [0]]))
    assert distance.tolist() == [13, 0]
    # The gradient of a norm is x / |x|; at distance zero the subgradient is 0, not NaN.
    (gradient,) = torch.autograd.grad(distance.sum(), action_part)
    torch.testing.assert_close(gradient, f64([[3 / 13, 4 / 13], [0, 0]]))


def test_dataset_distance_leading_axes_are_separate_problems() -> None:
    action_part, state_part = f64(np.arange(24).reshape(2, 4, 3)), f64(np.arange(16).reshape(2, 4, 2))
    separate = [dataset_distance(a, s) for a, s in zip(action_part, state_part, strict=True)]
    torch.testing.assert_close(dataset_distance(action_part, state_part), torch.stack(separate))


# Rows (state, action): A (0, 0), B (1, 0.5), C (10, -0.8); beta = 0.5. For the key (state of A, 0.6):
#     d^2 to A is 0.6^2 = 0.36,   to B is (0.5 * 1)^2 + 0.1^2 = 0.26,   to C is 25 + 1.96.
# So the nearest is B, the second A. For (state of C, -0.7) it is C itself, at 0.1; the second is B, at
# sqrt((0.5 * 9)^2 + 1.2^2) = sqrt(21.69). For (state of B, 0.5) it is B, at 0; the second is A, at sqrt(0.25 + 0.25).
HAND_SET = dataset_of([[0.0], [1.0], [10.0]], [[0.0], [0.5], [-0.8]])
HAND_ROWS = torch.tensor([[0, 2, 1]])
HAND_KEYS = f64([[[0.6], [-0.7], [0.5]]])
NEAREST = (0.26**0.5 + 0.1 + 0) / 3
SECOND = (0.6 + 21.69**0.5 + 0.5**0.5) / 3


@pytest.mark.rung(1, "offline.prdc")
@pytest.mark.parametrize(
    ("k", "distance", "penalty", "own_fraction", "mean_distance"),
    [
        # squared: the action part only. norm: the distance itself, so penalty and diagnostic agree.
        (1, "squared", (0.1**2 + 0.1**2 + 0) / 3, 2 / 3, NEAREST),
        (1, "norm", NEAREST, 2 / 3, NEAREST),
        (2, "squared", (0.6**2 + 1.2**2 + 0.5**2) / 3, 1 / 3, SECOND),
        (2, "norm", SECOND, 1 / 3, SECOND),
    ],
)
def test_penalty_and_diagnostics_by_hand(k, distance, penalty, own_fraction, mean_distance) -> None:
    agent, data = prepared(HAND_SET, beta=0.5, k=k, distance=distance)
    loss, metrics = agent.penalty(data.gather(HAND_ROWS), HAND_KEYS)
    torch.testing.assert_close(loss, f64([penalty]), rtol=1e-6, atol=1e-7)  # float32 data
    torch.testing.assert_close(metrics["nn_own_row_fraction"], f64([own_fraction]))
    torch.testing.assert_close(metrics["nn_distance"], f64([mean_distance]), rtol=1e-6, atol=1e-7)


def test_the_rows_found_are_constants_for_the_gradient() -> None:
    # d/d pi mean (pi - a_i*)^2 = 2 (pi - a_i*) / (B d_a), for the rows found above 2 * (0.1, 0.1, 0) / 3.
    agent, data = prepared(HAND_SET, beta=0.5)
    keys = HAND_KEYS.clone().requires_grad_()
    loss, metrics = agent.penalty(data.gather(HAND_ROWS), keys)
    assert not any(value.requires_grad for value in metrics.values())
    (gradient,) = torch.autograd.grad(loss.sum(), keys)
    torch.testing.assert_close(gradient, f64([[[0.2 / 3], [0.2 / 3], [0]]]), rtol=1e-6, atol=1e-7)


def test_a_policy_step_reports_what_was_searched(random_dataset) -> None:
    agent, data = prepared(random_dataset(), seeds=2, alpha=2.5, policy_freq=1)
    batch = data.gather(torch.arange(32).reshape(2, 16))
    with torch.no_grad():
        action = agent.actor(batch.obs)
    key = torch.cat([2 * batch.obs, action], -1)
    distance = torch.cdist(key, torch.cat([2 * data.obs, data.action], -1))
    metrics = agent.update(batch)
    torch.testing.assert_close(metrics["nn_distance"], distance.amin(-1).mean(1))
    own = (distance.argmin(-1) == batch.index).double().mean(1)
    torch.testing.assert_close(metrics["nn_own_row_fraction"], own)
    # The critic took its step before the policy did, the policy's values are those of its old actions.
    q = agent.critic.first(batch.obs, action)
    torch.testing.assert_close(metrics["lambda"], 2.5 / q.abs().mean(1))


# ------------------------------------------------------------------------------------------------------ limits


def twenty_rows() -> Dataset:
    rng = np.random.default_rng(11)
    return dataset_of(rng.normal(size=(20, 2)), rng.uniform(-1, 1, size=(20, 2)))


def first_policy_losses(beta: float) -> tuple[Tensor, Tensor]:
    """PRDC's and TD3+BC's actor loss at the same networks and batch (all 20 rows), for three seeds."""
    losses = []
    for agent in (PRDC(seeds=3, beta=beta, policy_freq=1), TD3BC(seeds=3, policy_freq=1)):
        data = agent.prepare(twenty_rows())
        losses.append(agent.update(data.gather(torch.arange(20).expand(3, -1)))["policy_loss"])
    return losses[0], losses[1]


@pytest.mark.theory
def test_prdc_1_large_beta_is_td3_bc() -> None:
    prdc, td3_bc = first_policy_losses(beta=1e6)
    torch.testing.assert_close(prdc, td3_bc, rtol=0, atol=1e-6)


@pytest.mark.theory
def test_prdc_1_control_small_beta_is_not() -> None:
    prdc, td3_bc = first_policy_losses(beta=0.1)
    assert ((prdc - td3_bc).abs() > 1e-2).all()


@pytest.mark.theory
@pytest.mark.parametrize(("beta", "state_blind"), [(0.0, True), (1e-9, True), (2.0, False)])
def test_beta_zero_takes_the_nearest_action_of_any_state(beta, state_blind) -> None:
    agent, data = prepared(twenty_rows(), beta=beta)
    action = f64(np.random.default_rng(12).uniform(-1, 1, size=(1, 20, 2)))
    loss, _ = agent.penalty(data.gather(torch.arange(20)[None]), action)
    nearest = (action[0, :, None] - data.action).square().sum(-1).amin(1)  # [20], over all rows
    expected = nearest.mean()[None] / 2  # mean over the two action dimensions
    assert torch.allclose(loss, expected, rtol=1e-6, atol=0) == state_blind


# --------------------------------------------------------------------- what the distance bounds (T1, T2, T3)
#
# Every data action is mu(s_i) for a K-Lipschitz mu, and eps(s) is the library's distance from (s, pi(s)) to the data.


def searched_distance(states: Tensor, data_actions: Tensor, beta: float, proposed: Tensor) -> Tensor:
    """``d_beta(s_i, pi(s_i))`` at every data state, ``[N]``, by the library's search."""
    index = NeighbourIndex(states, data_actions, beta=beta)
    return index.query(proposed[None], row=torch.arange(len(states))[None])[1][0]


def error_bound(distance: Tensor, lipschitz: float, beta: float) -> Tensor:
    """PRDC-2: ``|pi(s) - mu(s)| <= eps sqrt(1 + (K / beta)^2)``."""
    return distance * (1 + (lipschitz / beta) ** 2) ** 0.5


@pytest.mark.theory
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 30),
    d_s=st.integers(1, 3),
    d_a=st.integers(1, 3),
    beta=st.floats(0.1, 10),
    spread=st.floats(0, 3),
)
def test_prdc_2_action_and_value_error(seed, n, d_s, d_a, beta, spread) -> None:
    rng = np.random.default_rng(seed)
    matrix, offset = rng.normal(size=(d_a, d_s)), rng.normal(size=d_a)
    lipschitz = np.linalg.norm(matrix, ord=2)
    states = f64(rng.normal(size=(n, d_s)))
    expert = states @ f64(matrix).T + f64(offset)
    proposed = expert + spread * f64(rng.normal(size=(n, d_a)))

    distance = searched_distance(states, expert, beta, proposed)
    error = (proposed - expert).norm(dim=-1)
    bound = error_bound(distance, lipschitz, beta)
    assert (error <= bound * (1 + 1e-9) + 1e-9).all()
    assert (bound <= (1 + lipschitz / beta) * distance + 1e-9).all()  # the form printed in the paper

    # T2, for a value that is 3-Lipschitz in the action: 3 sin(u a + phase) with |u| = 1.
    direction = f64(rng.normal(size=d_a))
    phase = f64(rng.uniform(0, 6, size=n))

    def value(action: Tensor) -> Tensor:
        return 3 * torch.sin(action @ direction / direction.norm() + phase)

    assert ((value(proposed) - value(expert)).abs() <= 3 * bound * (1 + 1e-9) + 1e-9).all()


def line_instance() -> tuple[Tensor, Tensor, Tensor]:
    """401 states on [-2, 2], mu(s) = s, and a policy 0.2 above it: the instance on which PRDC-2 is tight."""
    states = torch.linspace(-2, 2, 401, dtype=torch.float64)[:, None]
    return states, states, states + 0.2


@pytest.mark.theory
def test_prdc_2_is_tight_and_needs_the_lipschitz_term() -> None:
    # The point (beta s, s + 0.2) lies 0.2 / sqrt(1 + 1 / beta^2) from the line through the data (beta = 1 here).
    states, expert, proposed = line_instance()
    distance = searched_distance(states, expert, 1.0, proposed)
    inner = slice(50, -50)  # away from the ends of the line
    slack = (proposed - expert).squeeze(-1)[inner] / error_bound(distance, 1.0, 1.0)[inner]
    assert slack.min() > 0.999
    assert slack.max() <= 1 + 1e-9
    # Control: with K / beta replaced by 0 the bound is violated everywhere there.
    assert ((proposed - expert).squeeze(-1)[inner] > 1.4 * error_bound(distance, 0.0, 1.0)[inner]).all()


@pytest.mark.theory
def test_prdc_2_needs_actions_of_one_lipschitz_policy() -> None:
    # Control: one row holds another action. A policy that takes it there has distance 0 and error 0.5.
    states, expert, _ = line_instance()
    states, logged = torch.cat([states, states[200:201]]), torch.cat([expert, expert[200:201] + 0.5])
    proposed = logged.clone()
    proposed[200] += 0.5
    distance = searched_distance(states, logged, 1.0, proposed)
    assert distance[200] == 0
    assert error_bound(distance, 1.0, 1.0)[200] < 0.5


class OneActionMDP:
    """A finite MDP whose states lie on a line and whose kernel and reward are Lipschitz in one action in [-1, 1].

    ``P(.|s, a) = (1 - w) P0(.|s) + w P1(.|s)`` with ``w = (a + 1) / 2``; ``r(s, a) = c(s) + K_r sin(a + phase(s))``.
    """

    def __init__(self, seed: int, reward_slope: float) -> None:
        rng = np.random.default_rng(seed)
        n = 8
        self.gamma = rng.uniform(0.5, 0.95)
        self.kernels = rng.dirichlet(np.full(n, 0.3), size=(2, n))
        self.base, self.phase, self.reward_slope = rng.normal(size=n), rng.uniform(0, 6, size=n), reward_slope
        self.kernel_slope = np.abs(self.kernels[1] - self.kernels[0]).sum(1).max() / 2
        self.largest_reward = np.abs(self.base).max() + reward_slope
        self.states = np.sort(rng.uniform(-1, 1, size=n))
        self.expert_slope = rng.uniform(-0.9, 0.9)
        self.expert = self.expert_slope * self.states
        self.start = rng.dirichlet(np.ones(n))
        self.direction = rng.uniform(-1, 1, size=n)
        self.beta = rng.uniform(0.2, 5)

    def performance(self, action: np.ndarray) -> float:
        """J of a deterministic policy, by a linear solve."""
        w = (action[:, None] + 1) / 2
        dynamics = (1 - w) * self.kernels[0] + w * self.kernels[1]
        reward = self.base + self.reward_slope * np.sin(action + self.phase)
        return float(self.start @ np.linalg.solve(np.eye(8) - self.gamma * dynamics, reward))

    def measured_and_bound(self, step: float, kernel_slope: float | None = None) -> tuple[float, float]:
        """``|J(pi) - J(mu)|`` for ``pi = mu + step * direction``, and T3's bound from the searched distances."""
        action = np.clip(self.expert + step * self.direction, -1, 1)
        distance = searched_distance(
            f64(self.states)[:, None], f64(self.expert)[:, None], self.beta, f64(action)[:, None]
        )
        gap = float(error_bound(distance, abs(self.expert_slope), self.beta).max())
        slope = self.kernel_slope if kernel_slope is None else kernel_slope
        rate = self.reward_slope + self.gamma * slope * self.largest_reward / (1 - self.gamma)
        return abs(self.performance(action) - self.performance(self.expert)), rate * gap / (1 - self.gamma)


@pytest.mark.theory
@pytest.mark.parametrize("seed", range(20))
def test_t3_performance_gap(seed) -> None:
    # |J(pi) - J(mu)| <= (K_r + gamma K_P R_max / (1 - gamma)) / (1 - gamma) * max_s |pi(s) - mu(s)|.
    mdp = OneActionMDP(seed, reward_slope=0.5)
    slack = []
    for step in (1.0, 0.1, 0.01, 1e-3):
        measured, bound = mdp.measured_and_bound(step)
        assert measured <= bound
        slack.append(measured / bound)
    # The bound is loose, so its rate is checked too: once small, a tenth of the distance gives a tenth of both sides.
    assert slack[3] == pytest.approx(slack[2], rel=0.1, abs=1e-4)

    # Controls, with rewards that ignore the action: no bound without the kernel's slope, and none quadratic in the
    # distance, however large its constant for steps of size 1.
    blind = OneActionMDP(seed, reward_slope=0.0)
    measured, bound = blind.measured_and_bound(0.1, kernel_slope=0.0)
    assert measured > bound == 0
    large, small = blind.measured_and_bound(0.1)[0], blind.measured_and_bound(1e-4)[0]
    assert small > 10 * large * (1e-4 / 0.1) ** 2
