"""The TD3 core and TD3+BC: losses by hand, limits, gradient stops, the tabular twin, the order of an update."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corollary.core.actor_critic import critic_loss, td_target
from corollary.offline import BC, TD3BC
from corollary.offline.td3 import action_error, policy_loss


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- hand numbers


def test_td_target_by_hand() -> None:
    # 1 + 0.9 * 10 = 10; a termination leaves the reward, 1; and 2 + 0.9 * (-5) = -2.5.
    target = td_target(f64(1, 1, 2), f64(0, 1, 0), f64(10, 10, -5), 0.9)
    torch.testing.assert_close(target, f64(10, 1, -2.5))


def test_critic_loss_by_hand() -> None:
    # Targets (0, 1). First critic (1, 2): errors 1 and 1, mean 1. Second (3, 5): 9 and 16, mean 12.5. The sum is 13.5.
    q = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert critic_loss(q, torch.tensor([0.0, 1.0])) == 13.5


@pytest.mark.rung(1, "offline.td3_bc")
def test_policy_loss_by_hand() -> None:
    # mean |Q| = (1 + 3) / 2 = 2, lambda = 2.5 / 2 = 1.25, mean Q = -1: 0.5 - 1.25 * (-1) = 1.75.
    loss, metrics = policy_loss(torch.tensor([1.0, -3.0]), torch.tensor(0.5), 2.5)
    assert loss == 1.75
    assert metrics["lambda"] == 1.25
    assert metrics["policy_q"] == -1


def test_weighing_rows_is_drawing_them_as_often() -> None:
    """Batches of one row, exactly: rows drawn with p, or all alike and weighed by N p, give the same mean gradient."""
    q, p = f64(2, -1, 5), f64(0.7, 0.2, 0.1)

    def gradient(row: int, weight: Tensor | None) -> Tensor:
        values = q.clone().requires_grad_()
        loss, _ = policy_loss(values[row : row + 1], f64(0)[0], 2.5, weight)
        return torch.autograd.grad(loss, values)[0]

    drawn = sum(p[i] * gradient(i, None) for i in range(3))
    weighed = sum(gradient(i, 3 * p[i : i + 1]) for i in range(3)) / 3
    torch.testing.assert_close(weighed, drawn)
    assert (gradient(0, f64(0)) == 0).all()  # a batch of no weight has no say, and is not NaN


# ------------------------------------------------------------------------------- limits, invariances, gradients


def test_lambda_is_a_constant_for_the_gradient() -> None:
    # d loss / d Q_b = -lambda / B = -(3 / 2) / 2. Were lambda differentiated, lambda * mean Q would be the constant
    # alpha wherever all Q > 0, as here, and the policy would learn nothing from its critic.
    q = f64(1, 3).requires_grad_()
    loss, _ = policy_loss(q, f64(0)[0], 3.0)
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], f64(-0.75, -0.75))


@given(st.floats(1e-3, 1e3), st.integers(1, 6), st.integers(1, 3))
def test_policy_gradient_is_invariant_under_scaling_of_q(scale, n_rows, d_a) -> None:
    action = normal(n_rows, d_a, seed=1)
    logged = normal(n_rows, d_a, seed=2)

    def gradient(c: float, normalised: bool = True) -> Tensor:
        pi = action.clone().requires_grad_()
        q = c * (pi.sin().sum(-1) + 0.3)
        penalty = action_error(pi, logged)
        loss = policy_loss(q, penalty, 2.5)[0] if normalised else penalty - 2.5 * q.mean()
        return torch.autograd.grad(loss, pi)[0]

    torch.testing.assert_close(gradient(scale), gradient(1.0), rtol=1e-10, atol=1e-12)
    if abs(scale - 1) > 0.1:  # control: a fixed lambda is not invariant
        assert not torch.allclose(gradient(scale, normalised=False), gradient(1.0, normalised=False), rtol=1e-3)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_leading_axes_are_separate_problems(n_seeds, n_critics, n_rows) -> None:
    q, target = normal(n_seeds, n_critics, n_rows), normal(n_seeds, n_rows, seed=1)
    penalty = normal(n_seeds, seed=2)
    separate = torch.stack([critic_loss(q[i], target[i]) for i in range(n_seeds)])
    torch.testing.assert_close(critic_loss(q, target), separate, rtol=1e-14, atol=0)
    separate = torch.stack([policy_loss(q[i, 0], penalty[i], 2.5)[0] for i in range(n_seeds)])
    torch.testing.assert_close(policy_loss(q[:, 0], penalty, 2.5)[0], separate, rtol=1e-13, atol=1e-14)


def test_alpha_zero_is_behaviour_cloning(random_dataset) -> None:
    # Same seed, hence the same initial actor and batches: with alpha = 0 and a policy step at every update the actor
    # goes through BC's numbers. Control: the default alpha does not.
    dataset = random_dataset()
    shared = {"hidden": (8, 8), "precision": "float64", "batch_size": 16}
    cloned = BC(seeds=2, **shared).fit(dataset, 20)
    actors = {
        alpha: TD3BC(seeds=2, alpha=alpha, policy_freq=1, **shared).fit(dataset, 20).networks["actor"]
        for alpha in (0.0, 1e-12, 2.5)
    }
    for tensor, *others in zip(
        cloned.networks["actor"].parameters(), *(actors[alpha].parameters() for alpha in actors), strict=True
    ):
        torch.testing.assert_close(others[0], tensor, rtol=0, atol=1e-13)
        torch.testing.assert_close(others[1], tensor, rtol=0, atol=1e-8)
        assert not torch.allclose(others[2], tensor, rtol=0, atol=1e-4)


def test_stationary_policy_of_a_linear_critic() -> None:
    # One state, Q(a) = a, logged action 1, alpha = 4. For pi > 0, lambda = 4 / pi and the gradient of
    # -lambda pi + (pi - 1)^2 vanishes where pi (pi - 1) = 2, at pi = 2. Control: at pi = 1, BC's answer, it does not.
    def gradient(at: float) -> Tensor:
        pi = f64(at).reshape(1, 1).requires_grad_()
        loss, _ = policy_loss(pi.squeeze(-1), action_error(pi, f64(1).reshape(1, 1)), 4.0)
        return torch.autograd.grad(loss, pi)[0].squeeze()

    torch.testing.assert_close(gradient(2.0), f64(0)[0], rtol=0, atol=1e-14)
    assert gradient(1.0) == -4


# ------------------------------------------------------------------------------------------------- tabular twin


def critic_gradient(mdp, q_MSA: Tensor, bootstrap_MSA: Tensor, policy_S: Tensor, terminated: Tensor) -> Tensor:
    """Gradient of the library's critic loss over tables, every (s, a, s') weighted by its exact probability."""
    q = q_MSA.clone().requires_grad_()
    next_value = bootstrap_MSA[:, mdp.next_state, policy_S[mdp.next_state]].amin(0)
    target = td_target(mdp.reward, terminated, next_value, mdp.discount)
    return torch.autograd.grad(critic_loss(q[:, mdp.state, mdp.action], target), q)[0]


@pytest.mark.rung(3, "offline.td3_bc", "offline.prdc")
@pytest.mark.parametrize("seed", range(3))
def test_critics_fixed_point_is_the_policys_exact_value(finite_mdp, seed) -> None:
    # Evaluated from the data of another policy: any policy that stays within the actions in the data.
    mdp = finite_mdp(seed)
    covered = mdp.behaviour_SA > 0
    policy = mdp.behaviour_SA.argmax(1)
    exact = mdp.q_of(mdp.policy_value(np.eye(4)[policy]))
    q = torch.from_numpy(np.where(covered, exact, 0.0)).expand(2, -1, -1)
    policy_S = torch.from_numpy(policy)

    gradient = critic_gradient(mdp, q, q, policy_S, mdp.terminated)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)
    # Controls: another table is no fixed point, nor is this one when terminations do not stop the bootstrap.
    assert critic_gradient(mdp, q + 0.1, q + 0.1, policy_S, mdp.terminated).abs().max() > 1e-4
    assert critic_gradient(mdp, q, q, policy_S, 0 * mdp.terminated).abs().max() > 1e-4


def test_exact_critic_steps_contract_to_the_policys_value(finite_mdp) -> None:
    # Minimising the loss against fixed targets is one application of the Bellman operator to min(Q1, Q2); it
    # contracts by gamma in the maximum norm over covered pairs.
    mdp = finite_mdp(7)
    covered = torch.from_numpy(mdp.behaviour_SA > 0)
    policy = mdp.behaviour_SA.argmax(1)
    exact = torch.from_numpy(mdp.q_of(mdp.policy_value(np.eye(4)[policy])))
    # The loss is quadratic: its minimiser is one gradient step divided by the curvature 2 n(s, a) / N.
    curvature = 2 * torch.from_numpy(mdp.behaviour_SA).clamp(min=1 / 8) / len(mdp.behaviour_SA)
    q = torch.where(covered, 5 * normal(2, 6, 4), 0.0)
    error = [((q - exact).abs() * covered).max()]
    for _ in range(40):
        bootstrap = q
        q = q - critic_gradient(mdp, q, bootstrap, torch.from_numpy(policy), mdp.terminated) / curvature
        value_S = bootstrap.amin(0)[torch.arange(6), torch.from_numpy(policy)]
        operator = torch.from_numpy(mdp.q_of(value_S.numpy()))
        torch.testing.assert_close(q[0][covered], operator[covered], rtol=1e-12, atol=1e-12)
        error.append(((q - exact).abs() * covered).max())
    bound = torch.stack(error[:-1]) * mdp.discount * (1 + 1e-9)
    assert (torch.stack(error[1:]) <= bound).all()
    assert error[-1] < 1e-3 * error[0]


# ------------------------------------------------------------------------------------------ an update's anatomy


@pytest.fixture
def prepared(random_dataset):
    agent = TD3BC(seeds=2, hidden=(8, 8), precision="float64", batch_size=16)
    data = agent.prepare(random_dataset())
    stream = agent.stream("batch")
    return agent, [data.gather(stream.integers(step, len(data), (16,))) for step in range(4)]


def snapshot(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_targets_and_policy_move_only_on_delayed_steps(prepared) -> None:
    agent, batches = prepared
    networks = agent.networks
    for batch in batches:
        before = {name: snapshot(module) for name, module in networks.items()}
        metrics = agent.update(batch)
        agent.step += 1
        moved = {
            name: any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
            for name, module in networks.items()
        }
        delayed = agent.step % 2 == 0
        assert moved == {"actor": delayed, "critic": True, "actor_target": delayed, "critic_target": delayed}
        assert ("policy_loss" in metrics) == delayed
        if delayed:
            for name in ("actor", "critic"):
                for old, online, target in zip(
                    before[f"{name}_target"],
                    networks[name].parameters(),
                    networks[f"{name}_target"].parameters(),
                    strict=True,
                ):
                    torch.testing.assert_close(target, 0.995 * old + 0.005 * online, rtol=1e-12, atol=1e-15)


def test_policy_sees_only_the_first_critic_held_constant(prepared) -> None:
    agent, (batch, *_) = prepared
    action = agent.actor(batch.obs)
    q = agent.critic.first(batch.obs, action)
    torch.testing.assert_close(q, agent.critic(batch.obs, action)[:, 0], rtol=1e-12, atol=1e-12)
    critic_parameters = list(agent.critic.parameters())
    assert torch.autograd.grad(q.sum(), critic_parameters, retain_graph=True, allow_unused=True) == (None,) * 6
    gradients = torch.autograd.grad(q.sum(), list(agent.actor.parameters()))
    assert all(g.abs().max() > 0 for g in gradients)


def test_seeds_do_not_touch_each_other(random_dataset) -> None:
    # In float64: seed 3 alone equals seed 3 beside seed 8.
    options = {"hidden": (8, 8), "precision": "float64", "batch_size": 16}
    alone = TD3BC(seeds=[3], **options).fit(random_dataset(), 10)
    beside = TD3BC(seeds=[8, 3], **options).fit(random_dataset(), 10)
    other = beside.select(0)
    for a, b, c in zip(
        alone.networks.parameters(), beside.select(1).networks.parameters(), other.networks.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert not torch.allclose(a, c, rtol=0, atol=1e-4)
