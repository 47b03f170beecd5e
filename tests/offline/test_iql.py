"""IQL: losses by hand, limits, gradient stops, and IQL-1: the exact fixed point on a finite MDP."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corollary.core.actor_critic import critic_loss, td_target
from corollary.core.dataset import Dataset
from corollary.core.errors import ConfigError
from corollary.offline import IQL
from corollary.offline.iql import expectile_loss
from corollary.offline.weighted_cloning import exponential_weight, weighted_cloning_loss


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ hand numbers


def test_expectile_loss_by_hand() -> None:
    # (0.7 * 2^2 + 0.3 * (-1)^2) / 2 = 3.1 / 2.
    torch.testing.assert_close(expectile_loss(f64(2, -1), 0.7), f64(1.55)[0])


def test_exponential_weight_by_hand_and_its_cap() -> None:
    # e^0 = 1, e^{3 * (-1)}, and 100 from u = ln(100) / 3 = 1.535 on; far beyond, no overflow.
    weight = exponential_weight(3 * f64(0, -1, 1.5, 1.54, 1e30))
    torch.testing.assert_close(weight, f64(1, math.exp(-3), math.exp(4.5), 100, 100))
    assert exponential_weight(10 * torch.tensor([1e30])).isfinite().all()


@pytest.mark.rung(1, "offline.iql")
def test_weighted_cloning_loss_by_hand_and_its_gradient() -> None:
    # (2 * 1 + 4 * 3) / 2 = 7. The weights are constants: only the likelihood receives a gradient, w / B.
    weight, surprise = f64(2, 4).requires_grad_(), f64(1, 3).requires_grad_()
    loss = weighted_cloning_loss(weight, surprise)
    assert loss == 7
    of_weight, of_surprise = torch.autograd.grad(loss, (weight, surprise), allow_unused=True)
    assert of_weight is None
    torch.testing.assert_close(of_surprise, f64(1, 2))


# ----------------------------------------------------------------------------------------- limits and derivations


@given(st.integers(1, 3), st.integers(1, 8), st.floats(0.01, 0.99))
def test_expectile_loss_limits_and_axes(n_seeds, n_rows, expectile) -> None:
    residual = normal(n_seeds, n_rows, seed=n_rows)
    torch.testing.assert_close(expectile_loss(residual, 0.5), residual.square().mean(-1) / 2)
    stacked = expectile_loss(residual, expectile)
    torch.testing.assert_close(stacked, torch.stack([expectile_loss(u, expectile) for u in residual]))
    cloning = weighted_cloning_loss(residual.exp(), residual)
    torch.testing.assert_close(cloning, torch.stack([weighted_cloning_loss(u.exp(), u) for u in residual]))
    # Reflection: an overestimate at tau costs what an underestimate costs at 1 - tau.
    torch.testing.assert_close(stacked, expectile_loss(-residual, 1 - expectile))


@given(st.floats(0.01, 0.99))
def test_expectile_of_a_fair_coin_is_tau(expectile) -> None:
    # Values 0 and 1, equally likely: tau (1 - v) = (1 - tau) v at v = tau.
    def slope(at: float) -> Tensor:
        v = f64(at)[0].requires_grad_()
        return torch.autograd.grad(expectile_loss(f64(0, 1) - v, expectile), v)[0]

    assert slope(expectile).abs() < 1e-14
    assert slope(expectile - 0.005) < 0 < slope(expectile + 0.005)


def test_beta_zero_is_plain_cloning(random_dataset) -> None:
    # All weights are 1, so rewards cannot matter to the policy. Control: with the default beta they do.
    dataset = random_dataset()
    rows = dataset.transitions()
    other = Dataset.from_arrays(
        rows.obs, rows.action, 3 - 2 * rows.reward, dataset.terminated, dataset.truncated, rows.next_obs
    )
    assert (exponential_weight(0 * normal(9)) == 1).all()
    for beta, equal in ((0.0, True), (3.0, False)):
        a, b = (
            IQL(beta=beta, hidden=(8,), reward_transform="none").fit(data, 10).networks["actor"].state_dict()
            for data in (dataset, other)
        )
        assert all(torch.equal(a[name], b[name]) for name in a) == equal


def test_only_target_critics_follow_by_averaging(random_dataset) -> None:
    agent = IQL(seeds=2, hidden=(8, 8), precision="float64")
    data = agent.prepare(random_dataset())
    before = [p.detach().clone() for p in agent.critic_target.parameters()]
    agent.update(data.gather(torch.arange(32).reshape(2, 16)))
    for old, target, online in zip(before, agent.critic_target.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(target, 0.995 * old + 0.005 * online, rtol=1e-12, atol=1e-15)
        assert target.grad is None
        assert not torch.equal(old, online)


# --------------------------------------------------------------------------------------------- IQL-1, tabular

Loss = Callable[[Tensor], Tensor]


def fixed_point(
    mdp,
    value_loss: Loss,
    *,
    terminated: Tensor | None = None,
    rate: Callable[[int], float] = lambda _: 1.0,
    max_sweeps: int = 20_000,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Descend the library's losses over tables V and Q until both gradients vanish; also returns the last |gradient|.

    Rows weigh every (s, a, s') by its exact probability. Steps are gradients over the losses' largest curvature, for
    the value loss 2 / S (times the largest weight, at most 1), for the critic loss 2 n(s, a) / N, where one step is
    exact minimisation.
    """
    n_states, n_actions = mdp.reward_SA.shape
    value = torch.zeros(n_states, dtype=torch.float64)
    q = torch.zeros(1, n_states, n_actions, dtype=torch.float64)
    curvature = 2 * torch.from_numpy(mdp.behaviour_SA).clamp(min=1 / 8) / n_states
    ended = mdp.terminated if terminated is None else terminated
    size = math.inf
    for sweep in range(max_sweeps):
        v, table = value.clone().requires_grad_(), q.clone().requires_grad_()
        residual = q[0, mdp.state, mdp.action] - v[mdp.state]
        (value_gradient,) = torch.autograd.grad(value_loss(residual), v)
        target = td_target(mdp.reward, ended, value[mdp.next_state], mdp.discount)
        (q_gradient,) = torch.autograd.grad(critic_loss(table[:, mdp.state, mdp.action], target), table)
        size = float(torch.maximum(value_gradient.abs().max(), q_gradient.abs().max()))
        if size < 1e-13:
            break
        value = value - rate(sweep) * value_gradient * n_states / 2
        q = q - q_gradient / curvature
    return value.numpy(), q[0].numpy(), size


def implicit_value(mdp, expectile: float) -> np.ndarray:
    value, _, gradient = fixed_point(mdp, lambda u: expectile_loss(u, expectile))
    assert gradient < 1e-13
    return value


@pytest.mark.rung(3, "offline.iql")
@pytest.mark.theory
@pytest.mark.parametrize("seed", range(3))
def test_iql_1_expectile_one_half_evaluates_the_behaviour_policy(finite_mdp, seed) -> None:
    mdp = finite_mdp(seed)
    exact = mdp.policy_value(mdp.behaviour_SA)
    value, q, gradient = fixed_point(mdp, lambda u: expectile_loss(u, 0.5))
    assert gradient < 1e-13
    np.testing.assert_allclose(value, exact, rtol=0, atol=1e-10)
    covered = mdp.behaviour_SA > 0
    np.testing.assert_allclose(q[covered], mdp.q_of(exact)[covered], rtol=0, atol=1e-10)


@pytest.mark.theory
def test_iql_1_controls(finite_mdp) -> None:
    mdp = finite_mdp(0)
    exact = mdp.policy_value(mdp.behaviour_SA)
    # Absolute instead of squared errors give medians, not means (steps shrink, as the subgradient does not).
    median, *_ = fixed_point(mdp, lambda u: u.abs().mean(), rate=lambda t: 5 / (t + 5), max_sweeps=3000)
    assert np.abs(median - exact).max() > 0.1
    # Another expectile does not evaluate the behaviour policy, nor does the right one through terminations.
    assert np.abs(implicit_value(mdp, 0.7) - exact).max() > 0.1
    through, *_ = fixed_point(mdp, lambda u: expectile_loss(u, 0.5), terminated=0 * mdp.terminated)
    assert np.abs(through - exact).max() > 0.1


@pytest.mark.theory
@pytest.mark.parametrize("seed", range(3))
def test_iql_1_value_rises_with_the_expectile_to_the_best_in_the_data(finite_mdp, seed) -> None:
    mdp = finite_mdp(seed)
    covered = mdp.behaviour_SA > 0
    best = mdp.best_value(covered)
    expectiles = (0.5, 0.7, 0.9, 0.99, 0.999, 0.9999)
    values = [implicit_value(mdp, expectile) for expectile in expectiles]
    assert all((after >= before - 1e-10).all() for before, after in itertools.pairwise(values))

    # The optimality condition tau E[(Q - v)+] = (1 - tau) E[(v - Q)+] leaves v below max Q by at most
    # (1 - tau) / (tau p) (max Q - min Q), p the smallest probability in the data; the Bellman operator's contraction
    # divides by 1 - gamma once more, and Q ranges over at most (r_max - r_min) / (1 - gamma) (zero, for termination,
    # counted among the rewards).
    gaps = np.array([np.abs(best - value).max() for value in values])
    rewards = np.append(mdp.reward_SA[covered], 0)
    spread = (rewards.max() - rewards.min()) / (1 - mdp.discount)
    tau, p = np.array(expectiles), mdp.behaviour_SA[covered].min()
    slack = gaps / ((1 - tau) / (tau * p) * spread / (1 - mdp.discount))
    assert (slack <= 1).all()
    assert (np.diff(gaps) < 0).all()
    assert gaps[-1] < 0.01
    # It is the best *in the data*: the unconstrained optimum is another one.
    assert np.abs(best - mdp.best_value(np.ones_like(covered))).max() > 0.1


@pytest.mark.theory
def test_policy_step_solves_kl_regularised_improvement(finite_mdp) -> None:
    # Over all distributions, the weighted cloning loss is minimised by pi(a|s) = pi_b(a|s) exp(beta A(s, a)) / Z(s).
    mdp = finite_mdp(1)
    beta = 1.5
    value = mdp.policy_value(mdp.behaviour_SA)
    advantage = torch.from_numpy(mdp.q_of(value) - value[:, None])
    assert beta * advantage.max() < math.log(100)  # no weight is capped on this instance

    def gradient(logits_SA: Tensor) -> Tensor:
        logits = logits_SA.clone().requires_grad_()
        surprise = -torch.log_softmax(logits, -1)[mdp.state, mdp.action]
        weight = exponential_weight(beta * advantage[mdp.state, mdp.action])
        return torch.autograd.grad(weighted_cloning_loss(weight, surprise), logits)[0].abs().max()

    behaviour = torch.from_numpy(mdp.behaviour_SA).clamp(min=1e-30).log()
    assert gradient(behaviour + beta * advantage) < 1e-14
    assert gradient(behaviour) > 1e-2  # controls: cloning, and another temperature
    assert gradient(behaviour + advantage) > 1e-3


def test_a_deterministic_policy_is_squashed_and_says_so() -> None:
    with pytest.raises(ConfigError, match="squash_mean must be True with policy='deterministic'"):
        IQL(policy="deterministic", squash_mean=False)


def test_fine_tuning_has_no_decay() -> None:
    """antmaze_finetune_config of the authors' code differs from antmaze_config in nothing else."""
    tuned, offline = IQL(preset="antmaze-finetune").config, IQL(preset="antmaze").config
    assert offline.actor_lr_decay_steps == 1_000_000
    assert tuned == dataclasses.replace(offline, actor_lr_decay_steps=None)


def test_the_presets_are_those_of_the_card() -> None:
    configs = {name: dataclasses.asdict(IQL(preset=name).config) for name in IQL.presets}
    assert {config["view"] for config in configs.values()} == {"d4rl_qlearning"}  # on which all of them were run
    assert IQL().config.view == "full"
    card = {  # expectile, beta, dropout, reward
        "locomotion": (0.7, 3, 0, "return_range"),
        "antmaze": (0.9, 10, 0, "antmaze_minus1"),
        "antmaze-finetune": (0.9, 10, 0, "antmaze_minus1"),
        "kitchen": (0.7, 0.5, 0.1, "none"),
        "adroit": (0.7, 0.5, 0.1, "none"),
        "corl": (0.7, 3, 0, "none"),
        "corl-hopper-medium": (0.7, 3, 0, "return_range_corl"),
        "corl-hopper-medium-expert": (0.5, 6, 0, "none"),
        "corl-adroit": (0.8, 3, 0.1, "none"),
        "corl-maze2d": (0.7, 3, 0, "none"),
    }
    names = ("expectile", "beta", "dropout", "reward_transform")
    assert {name: tuple(config[key] for key in names) for name, config in configs.items()} == card
    ours = {"state_transform": "none", "init": "orthogonal", "value_order": "new", "critic_reduction": "sum"}
    corl = {"state_transform": "standardize", "init": "torch", "value_order": "old", "critic_reduction": "mean"}
    for name, config in configs.items():
        assert {key: config[key] for key in ours} == (corl if name.startswith("corl") else ours)
        assert (config["policy"], config["tau"]) == (
            ("deterministic", 0.001) if name == "corl-hopper-medium" else ("gaussian", 0.005)
        )
