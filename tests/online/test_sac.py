"""SAC: the coefficient's loss by hand, the policy that its loss is least at, the entropy it ends with, its learning."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import corollary
from corollary.core.actor_critic import entropy_coefficient_loss
from corollary.core.errors import ConfigError
from corollary.online import SAC

from .plain import Scene
from .squashed import balanced_noise, f64, set_policy

BOX = spaces.Box(-2, 4, (2,))


def scene(**options: object) -> SAC:
    """A float64 agent of two seeds for batches made by hand."""
    return SAC(lambda: Scene(3, BOX), [0, 1], precision="float64", hidden=(8,), learning_starts=0, **options)


# ------------------------------------------------------------------------------------------------------------ pieces


@pytest.mark.rung(1, "online.sac")
def test_the_coefficient_rises_where_the_entropy_is_below_its_target() -> None:
    # Entropies -mean log pi of -1 and 3, aimed at 2: mean (log pi + H) = 1 + 2 and -3 + 2, times -log alpha.
    log_coefficient = f64([math.log(2), math.log(0.5)]).requires_grad_()
    log_prob = f64([[-1, 3], [-3, -3]]).requires_grad_()
    loss = entropy_coefficient_loss(log_coefficient, log_prob, 2.0)
    assert loss.tolist() == pytest.approx([-3 * math.log(2), math.log(0.5)])
    loss.sum().backward()
    assert log_coefficient.grad is not None
    assert log_coefficient.grad.tolist() == [-3, 1]  # descent raises the first, lowers the second
    assert log_prob.grad is None


@pytest.mark.parametrize(("delay", "expected"), [(1, 12), (2, 12), (5, 10), (20, 0)])
def test_a_delayed_policy_takes_as_many_steps_at_once(delay, expected) -> None:
    agent = scene(policy_delay=delay, batch_size=4).learn(12)
    steps = [state["step"].item() for state in agent.optimizers["actor"].state.values()]
    assert set(steps) == ({expected} if expected else set())
    assert {state["step"].item() for state in agent.optimizers["critic"].state.values()} == {12}


def test_a_fixed_coefficient_stays() -> None:
    agent = scene(entropy_coef=0.25, batch_size=4).learn(12)
    assert agent.entropy_coefficient().tolist() == [[0.25], [0.25]]
    assert "entropy" not in agent.optimizers
    assert scene().entropy_coefficient().tolist() == [[1], [1]]
    assert scene().target_entropy == -2


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"entropy_coef": -0.1}, ">= 0, or None"),
        ({"initial_entropy_coef": 0.0}, "> 0"),
        ({"entropy_lr": 0.0}, "> 0"),
        ({"policy_delay": 0}, ">= 1"),
    ],
)
def test_values_out_of_range_are_named(option, said) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=rf"{name} must be {said}; got"):
        scene(**option)


# ------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.rung(3, "online.sac")
@pytest.mark.parametrize("entropy_coef", [0.3, 0.2])
def test_the_policy_loss_is_least_at_the_softmax_of_the_values(entropy_coef, monkeypatch) -> None:
    """If Q = 0.3 log p + constant for a squashed Gaussian p, then exp(Q / 0.3) / Z = p; with 0.2 it is not p."""
    agent = scene(entropy_coef=entropy_coef)
    best = set_policy(agent.actor, [0.4, -0.3], [-0.5, 0.1])

    def values(obs: Tensor, action: Tensor) -> Tensor:
        return (0.3 * best.log_densities(torch.atanh(action)).sum(-1) - 7).unsqueeze(1).expand(-1, 2, -1)

    monkeypatch.setattr(agent.critic, "constant", values)
    loss, log_prob = agent.policy_loss(torch.zeros(2, 50, 3).double(), balanced_noise(50))
    (gradient,) = torch.autograd.grad(loss.sum(), agent.actor.net.biases[-1])
    torch.testing.assert_close(log_prob, best.draw(balanced_noise(50))[1].sum(-1))
    if entropy_coef == 0.3:
        assert loss.tolist() == pytest.approx([7, 7])  # -alpha log Z
        assert gradient.abs().max() < 1e-12
    else:
        assert gradient.abs().max() > 0.05


@pytest.mark.rung(6, "online.sac")
@pytest.mark.parametrize("target_entropy", [-1.0, -2.0])
def test_the_tuned_coefficient_gives_the_policy_the_entropy_aimed_at(target_entropy, monkeypatch) -> None:
    """For Q = -k sum (a - m)^2 the best policy is nearly N(m, alpha / 2k) with entropy d log(2 pi e alpha / 2k) / 2."""
    options = {"actor_lr": 2e-2, "entropy_lr": 2e-2}
    tuned, fixed = scene(target_entropy=2 * target_entropy, **options), scene(entropy_coef=1.0, **options)
    for agent in (tuned, fixed):
        monkeypatch.setattr(
            agent.critic, "constant", lambda obs, a: -10 * (a - 0.3).square().sum(-1).unsqueeze(1).expand(-1, 2, -1)
        )
        for index in range(600):
            noise = agent.update_noise.normal(index, (64, 2))
            metrics = agent._policy_step(torch.zeros(2, 64, 3).double(), noise)
        agent.last = metrics
    assert tuned.last["entropy"].numpy() == pytest.approx(2 * target_entropy, abs=0.2)
    by_hand = 20 * math.exp(2 * target_entropy) / (2 * math.pi * math.e)
    assert tuned.entropy_coefficient().numpy() == pytest.approx(by_hand, rel=0.2)
    assert (np.abs(fixed.last["entropy"].numpy() - 2 * target_entropy) > 1).all()  # the control


# ----------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.repro
def test_sac_balances_the_pendulum() -> None:
    """20 000 steps with the default settings; the published implementations reach about -150."""
    agent = SAC("Pendulum-v1", 3).learn(20_000)
    returns = corollary.evaluate(agent, "Pendulum-v1", 20).mean_return
    print("SAC, Pendulum-v1, 20 000 steps:", returns)
    assert (returns >= -200).all()
