"""What XQL, SQL and EQL must do alike: the exact twin on tables, and probes with the default settings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from corollary.offline import EQL, SQL, XQL

from .probes import STATE_OF_ROW, choice_probe, mean_values, time_limit_probe, value_probe
from .tabular import descended, largest_gradient, soft_value, sparse_value

Array = NDArray[np.float64]


class Method(NamedTuple):
    kind: type
    strength: str  # name of the setting that regularises
    value: Callable[[Any, float], Array]  # exact V of an MDP at a strength
    strengths: tuple[float, ...]
    descent: tuple[float, float, float, int]  # a strength, bounds of one row's curvature for V and Q, sweeps
    weight: Callable[[Array], Array]  # of the choice probe's rewards in one state, with the default settings
    chosen: float  # action of the choice probe for infinitely many rows; 0 is cloning


def soft_weight(rewards: Array, factor: float) -> Array:
    return np.minimum(np.exp(factor * (rewards - 2 * np.log(np.exp(rewards / 2).mean()))), 100)


# The clips of XQL (e^-7) and EQL (e^-5) never bind: no action of these MDPs is rarer than 1/8. In the choice probe the
# V of SQL is the mean reward, because none is more than 2 below it.
METHODS = [
    Method(XQL, "temperature", soft_value, (0.3, 1.0, 5.0), (1.0, 1.0, 1.0, 700), lambda r: soft_weight(r, 3.0), 0.414),
    Method(
        SQL, "alpha", sparse_value, (0.05, 0.2), (0.2, 12.5, 2.0, 500), lambda r: np.maximum(r - r.mean(), 0), 0.449
    ),
    Method(EQL, "alpha", soft_value, (0.3, 1.0, 5.0), (1.0, 1.0, 2.0, 700), lambda r: soft_weight(r, 5.0), 0.462),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind.__name__)


# ----------------------------------------------------------------------------------------------- exact twin


@pytest.mark.rung(3, "offline.xql", "offline.sql", "offline.eql")
@pytest.mark.theory
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("method", "strength"), [(m, s) for m in METHODS for s in m.strengths])
def test_the_exact_value_is_the_fixed_point_on_an_mdp(finite_mdp, seed, method, strength) -> None:
    mdp = finite_mdp(seed)
    exact = method.value(mdp, strength)
    agent = method.kind(**{method.strength: strength})
    assert largest_gradient(agent, mdp, exact) < 1e-12
    for wrong in (2 * strength, strength / 2):  # controls: another strength, and no terminations
        assert largest_gradient(agent, mdp, method.value(mdp, wrong)) > 1e-6
    assert largest_gradient(agent, mdp, exact, bootstrap_always=True) > 1e-6


@pytest.mark.theory
@each_method
def test_descent_from_zero_arrives(finite_mdp, method) -> None:
    mdp = finite_mdp(0)
    strength, value_curvature, q_curvature, sweeps = method.descent
    agent = method.kind(**{method.strength: strength})
    value, q = descended(agent, mdp, value_curvature, q_curvature, sweeps)
    exact = method.value(mdp, strength)
    np.testing.assert_allclose(value, exact, rtol=0, atol=1e-8)
    covered = mdp.behaviour_SA > 0
    np.testing.assert_allclose(q[covered], mdp.q_of(exact)[covered], rtol=0, atol=1e-8)
    assert (q[~covered] == 0).all()


# ---------------------------------------------------------------------------------------------------- probes
#
# Defaults but for the rewards, which are taken as they are: return_range makes the range of returns 1000, which is
# of order 1 per step for episodes of 1000 steps but 333 for these of one or two.


@pytest.mark.rung(2, "offline.xql", "offline.sql", "offline.eql")
@each_method
def test_values_with_the_defaults(method) -> None:
    # Rewards are deterministic, so V = Q for every strength, and Q = 1, -1, 1 + gamma V(0), gamma V(1). The target
    # critics have gone the share 1 - 0.995^300 = 0.778 of their way, and V follows them.
    agent = method.kind(reward_transform="none").fit(value_probe(), 300)
    q, spread = mean_values(agent, value_probe(), STATE_OF_ROW)
    with torch.no_grad():
        value = agent.value(torch.eye(4)[None])[0].tolist()
    assert (spread < 0.1).all()  # the action does not matter
    assert q[:2] == pytest.approx([1, -1], abs=0.02)
    assert value[:2] == pytest.approx([0.778, -0.778], abs=0.08)
    assert q[2:] == pytest.approx([1 + 0.99 * value[0], 0.99 * value[1]], abs=0.03)


@pytest.mark.rung(2, "offline.xql", "offline.sql", "offline.eql")
@each_method
def test_chooses_the_weighted_mean_of_good_actions_with_the_defaults(method) -> None:
    dataset = choice_probe()
    agent = method.kind(reward_transform="none").fit(dataset, 300)
    state, action, reward = dataset.transitions().obs[:, 0].numpy(), dataset.actions[:, 0], dataset.rewards
    here = [state == s for s in (-1, 1)]
    expected = [np.average(action[rows], weights=method.weight(reward[rows].astype(float))) for rows in here]
    assert np.abs(expected) == pytest.approx([method.chosen] * 2, abs=0.05)
    assert agent.predict(np.array([[-1.0], [1.0]]))[0][:, 0] == pytest.approx(expected, abs=0.1)


@pytest.mark.rung(5, "offline.xql", "offline.sql", "offline.eql")
@pytest.mark.parametrize(("cut_is_termination", "expected"), [(False, 5.0), (True, 2.5)])
@each_method
def test_a_time_limit_does_not_end_the_world(method, cut_is_termination, expected) -> None:
    # Not the defaults: gamma, and with it the rates. Q does not depend on the action, so V = Q for every strength.
    options = {"discount": 0.8, "tau": 0.1, "critic_lr": 1e-3, "value_lr": 1e-3, "reward_transform": "none"}
    agent = method.kind(hidden=(64, 64), batch_size=128, **options).fit(time_limit_probe(cut_is_termination), 500)
    value, _ = mean_values(agent, time_limit_probe(cut_is_termination), np.zeros(400))
    assert value[0] == pytest.approx(expected, abs=0.25)
