"""Off-policy MDPO: SAC's loss at c = lambda, its minimiser, what happens between copies of the policy, its learning."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import corollary
from corollary.core.errors import ConfigError
from corollary.online import SAC, OffPolicyMDPO
from corollary.online.objectives import tsallis_log

from .plain import Scene
from .squashed import balanced_noise, set_policy

BOX = spaces.Box(-2, 4, (2,))
SHARED = {"precision": "float64", "hidden": (8,), "learning_starts": 0, "batch_size": 4}


def scene(kind: type = OffPolicyMDPO, **options: object):
    """A float64 agent of two seeds for batches made by hand."""
    return kind(lambda: Scene(3, BOX), [0, 1], **SHARED | options)


def even_noise(n: int) -> Tensor:
    """n x n standard normal quantiles, a grid ``[2, n * n, 2]``."""
    quantiles = torch.special.ndtri((torch.arange(n).double() + 0.5) / n)
    return torch.cartesian_prod(quantiles, quantiles).expand(2, -1, -1)


def actor_gradient(agent: OffPolicyMDPO | SAC, obs: Tensor, noise: Tensor) -> Tensor:
    loss = agent.policy_loss(obs, noise)[0]
    return torch.cat([g.flatten(1) for g in torch.autograd.grad(loss.sum(), list(agent.actor.parameters()))], 1)


def prefer_first(agent: OffPolicyMDPO | SAC) -> None:
    """Let the first critic be the smaller one everywhere: MDPO's policy sees Q_1, SAC's the minimum."""
    with torch.no_grad():
        agent.critic.net.biases[-1][:, 1] += 100


# --------------------------------------------------------------------------------------------------- the policy loss


@pytest.mark.rung(3, "online.mdpo_off")
@pytest.mark.parametrize("kl_coef", [0.2, 1.0])
def test_with_equal_coefficients_the_policy_loss_is_sacs(kl_coef) -> None:
    """From the same networks, states and noise, with a different old policy; with unequal ones it is not."""
    ours, sac = scene(kl_coef=kl_coef, entropy_coef=0.2, regularization=0.0), scene(SAC, entropy_coef=0.2)
    for agent in (ours, sac):
        prefer_first(agent)
    assert torch.equal(ours.actor.net.weights[0], sac.actor.net.weights[0])
    set_policy(ours.old_actor, [1.0, -1.0], [0.3, -0.2])
    obs, noise = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(1)).double(), balanced_noise(16)
    same_loss = torch.allclose(ours.policy_loss(obs, noise)[0], sac.policy_loss(obs, noise)[0], rtol=0, atol=1e-12)
    same_step = torch.allclose(actor_gradient(ours, obs, noise), actor_gradient(sac, obs, noise), rtol=0, atol=1e-12)
    assert (same_loss, same_step) == ((True, True) if kl_coef == 0.2 else (False, False))


@pytest.mark.rung(6, "online.mdpo_off")
def test_the_first_step_from_the_old_policy_is_the_regularised_policy_gradient() -> None:
    """At pi = pi_old the divergence has no gradient, whatever c: what remains is SAC's. Later steps feel it."""
    ours, sac = scene(kl_coef=3.0, entropy_coef=0.2, regularization=0.0), scene(SAC, entropy_coef=0.2)
    for agent in (ours, sac):
        prefer_first(agent)
    obs, noise = torch.zeros(2, 64, 3).double(), balanced_noise(64)
    torch.testing.assert_close(actor_gradient(ours, obs, noise), actor_gradient(sac, obs, noise), rtol=0, atol=1e-12)
    with torch.no_grad():
        for agent in (ours, sac):
            agent.actor.net.biases[-1] += 0.1
    gap = (actor_gradient(ours, obs, noise) - actor_gradient(sac, obs, noise)).abs().max()
    assert gap > 0.1  # the control


@pytest.mark.rung(3, "online.mdpo_off")
@pytest.mark.parametrize("index", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("mistake", [False, True])
def test_the_policy_loss_is_least_at_the_mirror_step(index, mistake, monkeypatch) -> None:
    """Where Q = q (c log_q p + (lambda - c) log_q pi_old) + constant, the mirror step from pi_old is to p.

    That is the first-order condition of E_pi[c log_q pi + q (lambda - c) log_q pi_old - Q] in the density pi; for q = 1
    it says p = pi_old^(1 - lambda / c) exp(Q / c) / Z. The control lacks lambda in the values.
    """
    agent = scene(kl_coef=0.8, entropy_coef=0.3, tsallis_index=index, regularization=0.0)
    mean, log_std = [0.4, -0.3], [-0.5, 0.1]
    best = set_policy(agent.actor, mean, log_std)
    old = set_policy(agent.old_actor, [0.1, 0.2], [0.0, 0.2])
    entropy_coef = 0.0 if mistake else 0.3

    def values(obs: Tensor, action: Tensor) -> Tensor:
        log_p, log_old = (tsallis_log(p.log_densities(torch.atanh(action)), index).sum(-1) for p in (best, old))
        return (index * (0.8 * log_p + (entropy_coef - 0.8) * log_old) + 5).unsqueeze(1).expand(-1, 2, -1)

    monkeypatch.setattr(agent.critic, "constant", values)
    noise = even_noise(60)
    gradient = actor_gradient(agent, torch.zeros(2, noise.shape[1], 3).double(), noise)
    assert bool(gradient.abs().max() < 0.02) is not mistake
    assert bool(gradient.abs().max() > 0.1) is mistake


@pytest.mark.rung(1, "online.mdpo_off")
def test_the_regulariser_by_hand() -> None:
    # Means (2, -1), log_std (0.5, -3): mean squares (4 + 1) / 2 and (0.25 + 9) / 2.
    obs, noise = torch.zeros(2, 8, 3).double(), balanced_noise(8)
    losses = []
    for regularization in (0.0, 0.1):
        agent = scene(regularization=regularization)
        set_policy(agent.actor, [2.0, -1.0], [0.5, -3.0])
        losses.append(agent.policy_loss(obs, noise)[0])
    assert (losses[1] - losses[0]).tolist() == pytest.approx([0.1 * (2.5 + 4.625)] * 2)


@pytest.mark.rung(1, "online.mdpo_off")
def test_the_value_target_is_the_smaller_critic_less_the_entropy_term() -> None:
    agent = scene(entropy_coef=0.4, tsallis_index=2.0)
    obs, noise = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1)).double(), balanced_noise(8)
    _, target, metrics = agent.policy_loss(obs, noise)
    latent, log_densities = agent.actor(obs).draw(noise)
    q = agent.critic(obs, torch.tanh(latent))
    density = log_densities.exp()
    expected = torch.minimum(q[:, 0], q[:, 1]) - 0.4 * (density - 1).sum(-1)  # log_2 x = x - 1
    torch.testing.assert_close(target, expected)
    assert not target.requires_grad
    assert metrics["kl_new_old"].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------- the old policy


@pytest.mark.rung(6, "online.mdpo_off")
def test_the_old_policy_is_copied_every_so_many_environment_steps() -> None:
    agent = scene(old_policy_every=10, n_envs=2, gradient_steps=2)
    snapshots: dict[int, dict[str, Tensor]] = {0: {n: t.clone() for n, t in agent.actor.state_dict().items()}}
    for _ in range(17):
        metrics = agent.iterate(0.0)
        snapshots[agent.step] = {name: tensor.clone() for name, tensor in agent.actor.state_dict().items()}
        copied = snapshots[agent.step // 10 * 10]
        assert all(torch.equal(tensor, copied[name]) for name, tensor in agent.old_actor.state_dict().items())
        assert (metrics["kl_new_old"] > 0).all() or agent.step == 2
    assert agent.step == 34
    assert not torch.equal(agent.old_actor.net.biases[-1], agent.actor.net.biases[-1])


@pytest.mark.parametrize("deterministic", [False, True])
def test_collection_is_stochastic_unless_asked(deterministic) -> None:
    agent = scene(deterministic_collection=deterministic, n_envs=3)
    rollout = agent.collect()
    mean = agent.policy(rollout.obs.flatten(1, 2), None)
    assert torch.allclose(rollout.action.flatten(1, 2), mean) is deterministic


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"kl_coef": 0.0}, "> 0"),
        ({"entropy_coef": -1.0}, ">= 0"),
        ({"tsallis_index": 2.5}, r"in \[1, 2\]"),
        ({"old_policy_every": 0}, ">= 1"),
        ({"regularization": -1e-3}, ">= 0"),
    ],
)
def test_values_out_of_range_are_named(option, said) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=rf"{name} must be {said}; got"):
        scene(**option)


# ----------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.repro
def test_mdpo_balances_the_pendulum() -> None:
    """20 000 steps with the default settings, lambda = 0.2 and m = 1000; the threshold is an engineering proposal."""
    agent = OffPolicyMDPO("Pendulum-v1", 3).learn(20_000)
    returns = corollary.evaluate(agent, "Pendulum-v1", 20).mean_return
    print("MDPO, Pendulum-v1, 20 000 steps:", np.round(returns, 1))
    assert (returns >= -250).all()
