"""O-DICE: pieces by hand, the projection (ODICE-2, -3, T1, T2), implicit values (ODICE-1, T0), probes, updates."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from corollary.core.dataset import Dataset, Episode
from corollary.core.errors import ConfigError
from corollary.offline import ODICE, SQL
from corollary.offline.odice import cloning_weight, conjugate, orthogonal_part
from corollary.offline.weighted_cloning import WIDEST_WEIGHT

from .plain import HIGH, LOW, SEEDS, SHARED, STEPS, average, largest_difference, plain_mlp, rows_seen
from .plain_in_sample import PlainValue
from .probes import choice_probe, time_limit_probe, value_probe
from .tabular import root_of_density

DIVERGENCES = ("chi2", "reverse_kl")


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ hand numbers


@pytest.mark.rung(1, "offline.odice")
def test_conjugates_by_hand() -> None:
    # chi-square: d^2 / 4 + d from d = -2 on, -1 below; reverse KL: e^{d - 1}.
    torch.testing.assert_close(conjugate(f64(2, 0, -1, -2, -5), "chi2"), f64(3, 0, -0.75, -1, -1))
    torch.testing.assert_close(conjugate(f64(1, 0), "reverse_kl"), f64(1, 1 / math.e))


def test_policy_weights_by_hand() -> None:
    d = f64(-3, -1, 0, 2, 500)
    assert cloning_weight(d, "chi2", "released").tolist() == [0, 0, 0, 2, WIDEST_WEIGHT]
    assert cloning_weight(d, "chi2", "theory").tolist() == [0, 0.5, 1, 2, WIDEST_WEIGHT]
    for kind in ("released", "theory"):
        assert cloning_weight(d, "reverse_kl", kind).tolist() == pytest.approx(
            [math.exp(-4), math.exp(-2), math.exp(-1), math.e, WIDEST_WEIGHT]
        )


@given(st.integers(0, 10**6), st.sampled_from(DIVERGENCES))
def test_theory_s_weight_is_the_slope_of_the_conjugate(seed, f) -> None:
    d = (2 * normal(20, seed=seed)).requires_grad_()
    (slope,) = torch.autograd.grad(conjugate(d, f).sum(), d)
    torch.testing.assert_close(cloning_weight(d.detach(), f, "theory"), slope.clamp(max=WIDEST_WEIGHT))


@given(st.integers(0, 10**6))
def test_conjugates_are_those_of_their_divergences(seed) -> None:
    # f*(d) = max_{w >= 0} w d - f(w), over a grid of w: f(w) = (w - 1)^2, and w log w. Between the grid's points 1e-4
    # apart at most f'' (1e-4)^2 / 8 is missed, f'' = 1 / w = e^{1 - d} < 21 for the latter.
    d = 2 * torch.tanh(normal(8, seed=seed))
    w = torch.linspace(0, 4, 40_001, dtype=torch.float64)
    for f, penalty in (("chi2", (w - 1).square()), ("reverse_kl", torch.special.xlogy(w, w))):
        best = (d[:, None] * w - penalty).amax(1)
        torch.testing.assert_close(conjugate(d, f), best, rtol=0, atol=3e-8)


def test_orthogonal_part_by_hand_and_per_seed() -> None:
    # Seed 0: <g, d> = 1*3 + 2*0 + 5*4 = 23, <d, d> = 25. Seed 1: a direction of length 0 takes nothing away.
    g = [torch.tensor([[1.0, 2.0], [1.0, 1.0]]), torch.tensor([[5.0], [1.0]])]
    d = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[4.0], [0.0]])]
    part, coefficient = orthogonal_part(g, d)
    assert coefficient.tolist() == pytest.approx([0.92, 0])
    torch.testing.assert_close(part[0], torch.tensor([[1 - 0.92 * 3, 2.0], [1.0, 1.0]]))
    torch.testing.assert_close(part[1], torch.tensor([[5 - 0.92 * 4], [1.0]]))


OUT_OF_RANGE = {"lambda_": 1.0, "eta": -0.1, "f": "kl", "gradient": "both", "policy_weight": "x", "discount": 1.0}
OUT_OF_RANGE |= {"tau": 0.0, "value_lr": 0.0, "actor_weight_decay": -1e-4, "trajectory": -1}


@pytest.mark.parametrize(("option", "value"), OUT_OF_RANGE.items())
def test_settings_out_of_range_are_named(option, value) -> None:
    with pytest.raises(ConfigError, match=rf"ODICEConfig\.{option} must be"):
        ODICE(**{option: value})


def test_an_option_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy_weight must be 'released' with reverse_kl"):
        ODICE(f="reverse_kl", policy_weight="theory")


# ------------------------------------------------------------------- ODICE-2: the projection, T1 and T2 exactly


def stacked(seed: int, n_seeds: int = 3) -> list[Tensor]:
    """A gradient of parameters of several shapes, for several seeds."""
    return [normal(n_seeds, *shape, seed=seed + i) for i, shape in enumerate([(2, 5, 3), (2, 5), (4,)])]


def flat(gradient: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradient], 1)


@pytest.mark.theory
@given(st.integers(0, 10**6))
def test_odice_2_the_rest_is_orthogonal_and_the_shortest(seed) -> None:
    g, d = stacked(seed), stacked(seed + 100)
    part, coefficient = orthogonal_part(g, d)
    product = (flat(part) * flat(d)).sum(1)
    scale = flat(g).norm(dim=1) * flat(d).norm(dim=1)
    assert (product.abs() <= 1e-14 * scale).all()
    # Pythagoras, and each seed as if it were alone.
    torch.testing.assert_close(
        flat(part).square().sum(1) + (coefficient * flat(d).norm(dim=1)).square(), flat(g).square().sum(1)
    )
    for s in range(3):
        alone, own = orthogonal_part([x[s : s + 1] for x in g], [x[s : s + 1] for x in d])
        torch.testing.assert_close(flat(alone), flat(part)[s : s + 1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own, coefficient[s : s + 1], rtol=1e-12, atol=1e-12)
    # Control: projected tensor by tensor it is orthogonal too, but another vector; with one coefficient for all
    # seeds it is not orthogonal.
    pieces = [orthogonal_part([x], [y])[0][0] for x, y in zip(g, d, strict=True)]
    assert (flat(pieces) - flat(part)).abs().max() > 1e-6
    shared = flat(g) - coefficient.mean() * flat(d)
    assert ((shared * flat(d)).sum(1).abs() > 1e-10 * scale).any()


def transitions(n: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of s and s' for n one-transition problems, ``[n, d]``, and the cosine between the two."""
    here, there = normal(n, d, seed=seed), 2 * normal(n, d, seed=seed + 1)
    return here, there, torch.cosine_similarity(here, there, dim=1)


def change_of_backward_loss(here: Tensor, there: Tensor, eta: Tensor, step: float, gamma: float = 0.9) -> Tensor:
    """Change of f*(r + gamma V(s') - V'(s)) by a step along g_f + g_b^perp, per problem ``[n]``; V(s) = theta phi(s).

    Rewards are such that both residuals are 1 at first, so f*' is shared and not zero, as T2 assumes.
    """
    theta = normal(*here.shape, seed=5)
    at_here, at_there = (theta * here).sum(1), (theta * there).sum(1)
    reward = 1 + at_here - gamma * at_there

    def losses(w: Tensor) -> tuple[Tensor, Tensor]:
        forward = conjugate(reward + gamma * at_there - (w * here).sum(1), "chi2")
        return forward, conjugate(reward + gamma * (w * there).sum(1) - at_here, "chi2")

    theta.requires_grad_()
    forward, backward = losses(theta)
    (g_f,) = torch.autograd.grad(forward.sum(), theta)
    (g_b,) = torch.autograd.grad((eta * backward).sum(), theta)
    (part,), _ = orthogonal_part([g_b], [g_f])
    with torch.no_grad():
        return losses(theta - step * (g_f + part))[1] - backward


def threshold(here: Tensor, there: Tensor, cosine: Tensor, gamma: float = 0.9) -> Tensor:
    """T2: ``cos phi |grad V(s)| / (gamma sin^2 phi |grad V(s')|)``; every problem is one seed of the projection."""
    return cosine * here.norm(dim=1) / (gamma * (1 - cosine.square()) * there.norm(dim=1))


@pytest.mark.rung(6, "offline.odice")
@pytest.mark.theory
def test_odice_2_backward_loss_falls_if_and_only_if_eta_is_above_the_threshold() -> None:
    here, there, cosine = transitions(2000, 3, seed=1)
    bound = threshold(here, there, cosine)
    acute = (cosine > 0.05) & (cosine < 0.999)  # otherwise nearly every eta works, or none
    here, there, bound = here[acute], there[acute], bound[acute]
    assert len(bound) > 800
    assert (change_of_backward_loss(here, there, 1.1 * bound, 1e-6) < 0).all()
    assert (change_of_backward_loss(here, there, 0.9 * bound, 1e-6) > 0).all()  # the control


@pytest.mark.theory
def test_odice_2_any_eta_works_at_an_obtuse_angle_and_none_at_the_same_state() -> None:
    here, there, cosine = transitions(500, 3, seed=2)
    obtuse = cosine < -0.05
    assert obtuse.sum() > 150
    for eta in (0.0, 1.0):
        assert (
            change_of_backward_loss(here[obtuse], there[obtuse], torch.full((int(obtuse.sum()),), eta), 1e-6) < 0
        ).all()
    # s' = s: the backward gradient is along the forward one, and nothing is left of it.
    assert (change_of_backward_loss(here, here, torch.full((500,), 1e3), 1e-6) > 0).all()


def gradients_of(agent: ODICE, batch) -> dict[str, list[Tensor]]:
    """The gradients of the level, of L_f and of L_b in V's parameters, from the equations and the agent's networks."""
    cfg, parameters = agent.config, list(agent.value.parameters())
    with torch.no_grad():
        here = agent.value_target(batch.obs).amin(1, keepdim=True)
        there = agent.value_target(batch.next_obs).amin(1, keepdim=True)
    reward, going_on = batch.reward[:, None], cfg.discount * (1 - batch.terminated[:, None])
    value, next_value = agent.value(batch.obs), agent.value(batch.next_obs)
    losses = {
        "level": (1 - cfg.lambda_) * value,
        "forward": cfg.lambda_ * conjugate(reward + going_on * there - value, cfg.f),
        "backward": cfg.lambda_ * cfg.eta * conjugate(reward + going_on * next_value - here, cfg.f),
    }
    return {
        name: list(torch.autograd.grad(x.mean((1, 2)).sum(), parameters, retain_graph=True))
        for name, x in losses.items()
    }


def loss_at(agent: ODICE, batch, movement: list[Tensor], size: float) -> Tensor:
    """L_f, ``[S]``, after moving V's parameters by ``-size * movement``; they are put back."""
    parameters = list(agent.value.parameters())
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_add_(parameters, movement, alpha=-size)
        there = agent.value_target(batch.next_obs).amin(1, keepdim=True)
        target = batch.reward[:, None] + agent.config.discount * (1 - batch.terminated[:, None]) * there
        loss = agent.config.lambda_ * conjugate(target - agent.value(batch.obs), agent.config.f).mean((1, 2))
        torch._foreach_copy_(parameters, before)
    return loss


@pytest.fixture
def trained(random_dataset):
    """A small agent away from its start, so that V and V' differ, and one batch."""
    agent = ODICE(seeds=3, hidden=(8, 6), actor_hidden=(4,), precision="float64", value_lr=0.01, batch_size=16)
    dataset = random_dataset()
    agent.fit(dataset, 5)
    return agent, agent.prepare(dataset).gather(torch.arange(48).reshape(3, 16))


@pytest.mark.rung(6, "offline.odice")
@pytest.mark.theory
def test_t1_the_forward_loss_falls_as_if_there_were_no_backward_term(trained) -> None:
    agent, batch = trained
    g = gradients_of(agent, batch)
    part, _ = orthogonal_part(g["backward"], g["forward"])
    orthogonal = [a + b for a, b in zip(g["forward"], part, strict=True)]
    true = [a + b for a, b in zip(g["forward"], g["backward"], strict=True)]

    def excess(movement: list[Tensor], size: float) -> Tensor:
        """The change of L_f beyond that of the forward-only step, over the size of the step."""
        return (loss_at(agent, batch, movement, size) - loss_at(agent, batch, g["forward"], size)).abs() / size

    small, smaller = excess(orthogonal, 1e-5), excess(orthogonal, 1e-6)
    assert (smaller < 0.2 * small + 1e-9).all()  # of second order: it vanishes with the size
    # Control: the unprojected sum changes L_f by <g_f, g_b> to first order.
    first_order = (flat(g["forward"]) * flat(g["backward"])).sum(1).abs()
    assert (first_order > 1e-4).all()
    torch.testing.assert_close(excess(true, 1e-6), first_order, rtol=1e-2, atol=0)
    assert (smaller < 1e-2 * first_order).all()


def step_of(agent: ODICE, batch) -> list[Tensor]:
    """The gradient that one value step hands to the optimiser."""
    agent.value_step(batch)
    return [p.grad.clone() for p in agent.value.parameters()]


@pytest.mark.rung(6, "offline.odice")
@pytest.mark.theory
def test_odice_3_the_step_is_the_dense_one_over_both_heads(trained) -> None:
    agent, batch = trained
    g = {name: flat(x) for name, x in gradients_of(agent, batch).items()}
    c = (g["forward"] * g["backward"]).sum(1) / g["forward"].square().sum(1)
    dense = g["level"] + g["forward"] + (g["backward"] - c[:, None] * g["forward"])
    # Controls: a projection per head, and the level's gradient projected too.
    heads = gradients_of(agent, batch)
    per_head = [torch.zeros_like(x) for x in heads["level"]]
    for h in range(2):
        part, _ = orthogonal_part([x[:, h] for x in heads["backward"]], [x[:, h] for x in heads["forward"]])
        for out, level, forward, rest in zip(per_head, heads["level"], heads["forward"], part, strict=True):
            out[:, h] = level[:, h] + forward[:, h] + rest
    both = g["level"] + g["forward"]
    with_level = both + g["backward"] - ((both * g["backward"]).sum(1) / both.square().sum(1))[:, None] * both
    step = flat(step_of(agent, batch))
    torch.testing.assert_close(step, dense, rtol=1e-12, atol=1e-13)
    for wrong in (flat(per_head), with_level):
        assert ((step - wrong).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("f", DIVERGENCES)
def test_limits_of_the_step(random_dataset, f) -> None:
    # eta = 0 is the semi-gradient; at the start V' = V, and the true gradient's step is the unprojected sum if V has
    # one head (of two, the target is the smaller).
    dataset = random_dataset()
    shared = {"seeds": 2, "hidden": (8, 6), "actor_hidden": (4,), "precision": "float64", "f": f, "twin_value": False}
    shared |= {"reward_transform": "none"}

    def first(**options: object) -> Tensor:
        agent = ODICE(**shared, **options)
        return flat(step_of(agent, agent.prepare(dataset).gather(torch.arange(32).reshape(2, 16))))

    torch.testing.assert_close(first(eta=0.0), first(gradient="semi"), rtol=1e-12, atol=1e-13)
    agent = ODICE(**shared)
    batch = agent.prepare(dataset).gather(torch.arange(32).reshape(2, 16))
    g = gradients_of(agent, batch)
    unprojected = flat(g["level"]) + flat(g["forward"]) + flat(g["backward"])
    torch.testing.assert_close(first(gradient="true"), unprojected, rtol=1e-12, atol=1e-13)
    assert (first() - unprojected).abs().max() > 1e-4  # control


# ------------------------------------------------------------------------- ODICE-1 and T0: the implicit value


def implicit_slope(values: Tensor, at: float, lambda_: float, f: str = "chi2") -> float:
    """Derivative of ``(1 - lambda) v + lambda mean f*(Q - v)`` in v."""
    v = f64(at)[0].requires_grad_()
    return float(torch.autograd.grad((1 - lambda_) * v + lambda_ * conjugate(values - v, f).mean(), v)[0])


def implicit_value(q: np.ndarray, p: np.ndarray, lambda_: float) -> np.ndarray:
    """The v with ``lambda sum p max(0, 1 + (Q - v) / 2) = 1 - lambda``, for each row ``[..., A]``."""
    return root_of_density(q, p, 2.0, (1 - lambda_) / lambda_)


@pytest.mark.rung(6, "offline.odice")
@pytest.mark.theory
@pytest.mark.parametrize(("lambda_", "shift"), [(0.5, 0), (0.6, 2 / 3), (0.7, 8 / 7), (0.8, 1.5), (0.3, -8 / 3)])
def test_odice_1_a_constant_shift_of_the_mean_and_only_for_small_rewards(lambda_, shift) -> None:
    # While every Q - V >= -2: V = E Q + 2 (2 lambda - 1) / lambda. With a spread of at most 0.5 that is so up to 0.8.
    values = 0.25 * torch.tanh(normal(50, seed=4))
    closed_form = float(values.mean()) + shift
    assert shift == pytest.approx(2 * (2 * lambda_ - 1) / lambda_)
    assert values.min() - closed_form >= -2
    assert abs(implicit_slope(values, closed_form, lambda_)) < 1e-15
    assert implicit_slope(values, closed_form - 0.01, lambda_) < 0 < implicit_slope(values, closed_form + 0.01, lambda_)
    # Control: with rewards a hundred times as large it is not so.
    assert abs(implicit_slope(100 * values, 100 * float(values.mean()) + shift, lambda_)) > 1e-2


@pytest.mark.theory
def test_t0_value_rises_with_lambda_beyond_the_best_action() -> None:
    values = 3 * normal(50, seed=5)
    p = np.full(50, 1 / 50)
    found = [float(implicit_value(values.numpy(), p, lambda_)) for lambda_ in np.linspace(0.05, 0.999, 40)]
    for lambda_, v in zip(np.linspace(0.05, 0.999, 40), found, strict=True):
        assert abs(implicit_slope(values, v, lambda_)) < 1e-13
    assert (np.diff(found) > 0).all()
    assert found[0] < float(values.mean()) < float(values.max()) < found[-1] < float(values.max()) + 2


@pytest.mark.theory
def test_t0_half_is_sql_with_alpha_one() -> None:
    # E max(0, 1 + (Q - V) / 2) = 1: SQL's value loss at alpha = 1 has the same root. Control: lambda = 0.6 has not.
    values = 3 * normal(50, seed=6)
    for lambda_, same in ((0.5, True), (0.6, False)):
        v = torch.tensor(float(implicit_value(values.numpy(), np.full(50, 1 / 50), lambda_)), dtype=torch.float64)
        v.requires_grad_()
        (slope,) = torch.autograd.grad(SQL(alpha=1.0).implicit_value_loss((values - v)[None], None).sum(), v)
        assert (slope.abs() < 1e-12) == same


@pytest.mark.theory
def test_t0_reverse_kl_is_a_soft_maximum() -> None:
    # lambda E e^{Q - V - 1} = 1 - lambda: V = log E e^Q - 1 + log(lambda / (1 - lambda)).
    values = normal(50, seed=7)
    for lambda_ in (0.3, 0.6):
        v = float(torch.logsumexp(values, 0)) - math.log(50) - 1 + math.log(lambda_ / (1 - lambda_))
        assert abs(implicit_slope(values, v, lambda_, "reverse_kl")) < 1e-14
        assert abs(implicit_slope(values, v + 1, lambda_, "reverse_kl")) > 1e-2


@pytest.mark.theory
@pytest.mark.parametrize(("scale", "all_zero"), [(0.3, True), (30.0, False)])
def test_t0_small_rewards_leave_every_weight_zero(scale, all_zero) -> None:
    # max Q - E Q < 2 (2 lambda - 1) / lambda = 2/3 at lambda = 0.6: V lies above every Q. Larger rewards do not.
    q = scale * np.tanh(normal(50, seed=8).numpy())
    residual = torch.from_numpy(q - implicit_value(q, np.full(50, 1 / 50), 0.6))
    assert (cloning_weight(residual, "chi2", "released") == 0).all() == all_zero
    assert (cloning_weight(residual, "chi2", "theory") > 0).any()  # the theory's weights average to (1 - l) / l
    assert float(cloning_weight(residual, "chi2", "theory").mean()) == pytest.approx(0.4 / 0.6)


# ----------------------------------------------------------------------------------------------- exact twin
#
# V as a table, the last layer's weights over units that are each active in one state, on all rows of a finite MDP:
# exact expectations.


def tabular_agent(mdp, **options: object):
    """An agent whose V can be a table (see `put_table`), and the MDP's rows as one batch."""
    one_hot = np.eye(len(mdp.reward_SA))
    dataset = Dataset.from_episodes(
        Episode(
            observations=np.stack([one_hot[s], one_hot[t]]),
            actions=[[a / 4]],
            rewards=[r],
            terminated=bool(d),
            truncated=not d,
        )
        for s, a, r, d, t in zip(mdp.state, mdp.action, mdp.reward, mdp.terminated, mdp.next_state, strict=True)
    )
    settings = {"precision": "float64", "hidden": (len(one_hot),), "actor_hidden": (2,), "reward_transform": "none"}
    settings |= {"twin_value": False, "value_layer_norm": False, "discount": mdp.discount}
    agent = ODICE(**settings, **options)
    data = agent.prepare(dataset)
    # Rewards as they are in the MDP: a dataset holds float32.
    return agent, data.gather(torch.arange(len(data))[None])._replace(reward=mdp.reward[None])


def put_table(agent: ODICE, value_S: np.ndarray, target_S: np.ndarray) -> None:
    """Make V and V' the tables: first layer the identity, last one the values, no biases."""
    for network, table in ((agent.value, value_S), (agent.value_target, target_S)):
        first, last = network.net.weights
        with torch.no_grad():
            first.copy_(torch.eye(len(table), dtype=torch.float64))
            last.copy_(torch.from_numpy(table))
            for bias in network.net.biases:
                bias.zero_()


def table_gradient(agent: ODICE, batch) -> np.ndarray:
    """The step's gradient in the last layer's weights, which are the table."""
    agent.value_step(batch)
    return agent.value.net.weights[1].grad[0, 0, 0].numpy().copy()


def semi_fixed_point(mdp, lambda_: float) -> np.ndarray:
    """V with ``lambda E max(0, 1 + (r + gamma V(s') - V(s)) / 2) = 1 - lambda`` in every state, over its rows."""
    rows_of = [np.flatnonzero(mdp.state.numpy() == s) for s in range(len(mdp.reward_SA))]
    reward, ended, successor = mdp.reward.numpy(), mdp.terminated.numpy(), mdp.next_state.numpy()
    value = np.zeros(len(rows_of))
    for _ in range(300):  # a contraction: the error shrinks by gamma = 0.8 each time
        target = reward + mdp.discount * (1 - ended) * value[successor]
        value = np.array([implicit_value(target[i], np.full(len(i), 1 / len(i)), lambda_) for i in rows_of])
    return value


@pytest.mark.rung(3, "offline.odice")
@pytest.mark.theory
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lambda_", [0.4, 0.6])
def test_semi_gradient_is_zero_at_its_exact_fixed_point(finite_mdp, seed, lambda_) -> None:
    mdp = finite_mdp(seed)
    exact = semi_fixed_point(mdp, lambda_)
    agent, batch = tabular_agent(mdp, gradient="semi", lambda_=lambda_)

    def gradient_at(table: np.ndarray) -> float:
        put_table(agent, table, table)
        return float(np.abs(table_gradient(agent, batch)).max())

    assert gradient_at(exact) < 1e-13
    # Controls: another lambda, and a value that does not bootstrap.
    assert gradient_at(semi_fixed_point(mdp, 0.5)) > 1e-3
    assert gradient_at(semi_fixed_point(dataclasses.replace(mdp, discount=0.0), lambda_)) > 1e-3


@pytest.mark.rung(3, "offline.odice")
@pytest.mark.theory
@pytest.mark.parametrize("f", DIVERGENCES)
@pytest.mark.parametrize("seed", range(3))
def test_true_gradient_is_zero_at_the_dual_s_minimiser(finite_mdp, seed, f) -> None:
    # min_V (1 - lambda) E V + lambda E f*(r + gamma V(s') - V(s)) is convex in the table; scipy finds it.
    mdp, lambda_ = finite_mdp(seed), 0.6
    here = np.eye(6)[mdp.state.numpy()]
    there = mdp.discount * (1 - mdp.terminated.numpy())[:, None] * np.eye(6)[mdp.next_state.numpy()]
    reward = mdp.reward.numpy()

    def dual(v: np.ndarray) -> tuple[float, np.ndarray]:
        d = reward + (there - here) @ v
        w = np.maximum(0, 1 + d / 2) if f == "chi2" else np.exp(d - 1)
        loss = w**2 - 1 if f == "chi2" else w
        gradient = (1 - lambda_) * here + lambda_ * w[:, None] * (there - here)
        return (1 - lambda_) * (here @ v).mean() + lambda_ * loss.mean(), gradient.mean(0)

    found = minimize(dual, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-10}).x
    agent, batch = tabular_agent(mdp, gradient="true", lambda_=lambda_, f=f)
    put_table(agent, found, np.zeros(6))  # no target network is used
    assert np.abs(table_gradient(agent, batch)).max() < 1e-8
    # Control: it is not zero where the forward-only gradient (of chi2) is.
    semi = semi_fixed_point(mdp, lambda_)
    put_table(agent, semi, semi)
    assert np.abs(table_gradient(agent, batch)).max() > 1e-3


@pytest.mark.theory
@pytest.mark.parametrize("seed", range(3))
def test_orthogonal_gradient_of_a_table_against_numpy(finite_mdp, seed) -> None:
    # Written out in numpy from arbitrary tables V and V'; the last layer's biases and the first layer, which the
    # network has beside the table, count in the projection.
    mdp, lambda_, eta = finite_mdp(seed), 0.6, 0.7
    rng = np.random.default_rng(seed)
    value, target = rng.normal(size=6), rng.normal(size=6)
    agent, batch = tabular_agent(mdp, lambda_=lambda_, eta=eta)
    put_table(agent, value, target)
    here, there = np.eye(6)[mdp.state.numpy()], np.eye(6)[mdp.next_state.numpy()]
    going_on = mdp.discount * (1 - mdp.terminated.numpy())
    reward = mdp.reward.numpy()

    def parameters_gradient(slope: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Of mean slope * V: V = v . relu(I s + b) + c, in v, I (row k: v_k 1[k active] s), b and c."""
        by_state = (slope[:, None] * states).mean(0)  # [6], the gradient in v
        first = np.diag(value * by_state)  # unit k is active only in state k
        return np.concatenate([by_state, first.ravel(), value * by_state, [by_state.sum()]])

    forward = reward + going_on * target[mdp.next_state] - value[mdp.state]
    backward = reward + going_on * value[mdp.next_state] - target[mdp.state]
    g_f = parameters_gradient(-lambda_ * np.maximum(0, 1 + forward / 2), here)
    g_b = parameters_gradient(lambda_ * eta * going_on * np.maximum(0, 1 + backward / 2), there)
    level = parameters_gradient(np.full(len(reward), 1 - lambda_), here)
    c = (g_f @ g_b) / (g_f @ g_f)
    _, metrics = agent.value_step(batch)
    assert float(metrics["projection"][0]) == pytest.approx(c, rel=1e-11)
    expected = (level + g_f + g_b - c * g_f)[:6]
    np.testing.assert_allclose(agent.value.net.weights[1].grad[0, 0, 0], expected, rtol=0, atol=1e-14)
    assert np.abs((level + g_f + g_b)[:6] - expected).max() > 1e-4  # control: the projection matters here


# -------------------------------------------------------------------------------------- diagnostics, imitation


def test_diagnostics_by_hand(random_dataset) -> None:
    agent = ODICE(seeds=2, hidden=(8,), actor_hidden=(4,), precision="float64", reward_transform="none")
    data = agent.prepare(random_dataset())
    batch = data.gather(torch.arange(32).reshape(2, 16))
    with torch.no_grad():
        value, there = agent.value(batch.obs), agent.value_target(batch.next_obs).amin(1, keepdim=True)
        d = batch.reward[:, None] + 0.99 * (1 - batch.terminated[:, None]) * there - value
    metrics = agent.update(batch)
    assert metrics.keys() >= {"projection", "zero_weight_fraction", "residual_05", "residual_50", "residual_95"}
    torch.testing.assert_close(metrics["zero_weight_fraction"], (d <= 0).double().mean((1, 2)))
    for name, level in (("residual_05", 0.05), ("residual_50", 0.5), ("residual_95", 0.95)):
        expected = np.quantile(d.flatten(1).numpy(), level, axis=1)
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-12)
    torch.testing.assert_close(metrics["weight"], d.clamp(0, 100).mean((1, 2)))
    torch.testing.assert_close(metrics["value_loss"], (0.4 * value + 0.6 * conjugate(d, "chi2")).mean((1, 2)))


def test_imitation_learns_from_the_one_trajectory_alone(random_dataset) -> None:
    dataset = random_dataset()  # 6 episodes of 8 rows
    agent = ODICE(preset="imitation-hopper", hidden=(8,), actor_hidden=(8,), trajectory=2)
    data = agent.prepare(dataset)
    rows = dataset.transitions()
    assert len(data) == 8
    assert (data.reward == 0).all()
    assert torch.equal(data.action, rows.action[16:24])
    # States are standardised with the statistics of that trajectory.
    torch.testing.assert_close(data.obs.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    expected = (rows.obs[16:24] - rows.obs[16:24].mean(0)) / (rows.obs[16:24].std(0, correction=0) + 1e-3)
    torch.testing.assert_close(data.obs, expected, rtol=1e-5, atol=1e-5)
    assert agent.actor.squash_mean
    with pytest.raises(ConfigError, match="has 6 episodes, from 0 on; there is no 6"):
        ODICE(trajectory=6).prepare(dataset)


def test_imitation_clones_an_expert() -> None:
    # One expert trajectory with a = s / 2 among random ones. Rewards are 0 and lambda = 0.4, so that V is below its
    # target, 2 (2 lambda - 1) / lambda = -1, and every weight is positive: with the whole data the mean is 0 instead.
    rng = np.random.default_rng(3)

    def trajectory(expert: bool) -> Episode:
        states = rng.uniform(-1, 1, size=(201, 1))
        actions = states[:-1] / 2 if expert else rng.uniform(-1, 1, size=(200, 1))
        return Episode(states, actions, np.ones(200), False, True)

    dataset = Dataset.from_episodes([trajectory(False), trajectory(True), *(trajectory(False) for _ in range(8))])
    settings = {"actor_hidden": (64, 64), "hidden": (64, 64), "actor_lr": 1e-3, "value_lr": 1e-3}
    errors = []
    for chosen in (1, None):
        agent = ODICE(preset="imitation-hopper", **settings | {"trajectory": chosen}).fit(dataset, 300)
        action, _ = agent.predict(np.array([[-0.8], [0.8]]))
        errors.append(np.abs(action[:, 0] - [-0.4, 0.4]).max())
    assert errors[0] < 0.08
    assert errors[1] > 0.25  # control: the random trajectories too


def test_weight_decay_acts_on_the_policy_where_no_row_has_a_weight(random_dataset) -> None:
    # All rewards far below V: every weight is zero, and Adam's first step is on g = 1e-4 theta: -lr g / (|g| + 1e-8).
    agent = ODICE(hidden=(8,), actor_hidden=(8,), precision="float64", reward_transform="none")
    data = agent.prepare(random_dataset())
    before = [p.detach().clone() for p in agent.actor.parameters()]
    metrics = agent.update(data.gather(torch.arange(16)[None])._replace(reward=torch.full((1, 16), -1e3).double()))
    assert metrics["zero_weight_fraction"] == 1
    for old, new in zip(before, agent.actor.parameters(), strict=True):
        torch.testing.assert_close(new, old - 2e-4 * old / (old.abs() + 1e-8 / 1e-4), rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------------- probes


def five_times(dataset: Dataset) -> Dataset:
    return dataclasses.replace(dataset, rewards=5 * dataset.rewards)


@pytest.mark.rung(2, "offline.odice")
def test_chooses_the_weighted_mean_of_good_actions_with_the_defaults() -> None:
    # Defaults but for the rewards, taken as they are and five times as large: at their own scale every weight is zero
    # (T0). V solves 0.6 E max(0, 1 + (r - V) / 2) = 0.4 and weighs by max(r - V, 0): 0.5 for infinitely many rows.
    dataset = five_times(choice_probe())
    agent = ODICE(reward_transform="none").fit(dataset, 150)
    state, action, reward = dataset.transitions().obs[:, 0].numpy(), dataset.actions[:, 0], dataset.rewards
    expected, values = [], []
    for s in (-1, 1):
        r = reward[state == s].astype(float)
        values.append(float(implicit_value(r, np.full(len(r), 1 / len(r)), 0.6)))
        expected.append(np.average(action[state == s], weights=np.maximum(r - values[-1], 0)))
    assert values == pytest.approx([4.14, 4.14], abs=0.1)
    with torch.no_grad():
        learnt = agent.value(torch.tensor([[[-1.0], [1.0]]]))[0]  # both heads
    np.testing.assert_allclose(learnt, [values, values], atol=0.15)
    assert np.abs(expected) == pytest.approx([0.5, 0.5], abs=0.05)
    assert agent.predict(np.array([[-1.0], [1.0]]))[0][:, 0] == pytest.approx(expected, abs=0.1)


@pytest.mark.theory
def test_small_rewards_teach_the_policy_nothing() -> None:
    # T0 in training: at the probe's own scale V ends 2/3 above the mean reward, 0.42, and so above the best, 1.
    seen = []
    agent = ODICE(reward_transform="none", actor_hidden=(16,))
    agent.fit(choice_probe(), 200, log_every=50, callbacks=[lambda _, report: seen.append(report.metrics)])
    with torch.no_grad():
        value = agent.value(torch.tensor([[[-1.0], [1.0]]]))[0].numpy()
    np.testing.assert_allclose(value, 0.4167 + 2 / 3, atol=0.1)
    assert seen[-1]["zero_weight_fraction"] > 0.98


def test_values_with_the_forward_gradient() -> None:
    # Rewards are deterministic, so V is each target plus s = 2/3: 1 + s, -1 + s, and one discount step further. Not
    # the defaults: the gradient (the orthogonal one's fixed point depends on the network), and tau, for speed.
    agent = ODICE(reward_transform="none", gradient="semi", tau=0.05, actor_hidden=(16,)).fit(value_probe(), 500)
    with torch.no_grad():
        value = agent.value(torch.eye(4)[None])[0].mean(0).tolist()
    s = 2 / 3
    assert value == pytest.approx([1 + s, -1 + s, 1 + 0.99 * (1 + s) + s, 0.99 * (-1 + s) + s], abs=0.12)


@pytest.mark.rung(5, "offline.odice")
@pytest.mark.parametrize(("cut_is_termination", "expected"), [(False, 5.0), (True, 2.5)])
def test_a_time_limit_does_not_end_the_world(cut_is_termination, expected) -> None:
    # Not the defaults: gamma, and with it the rates; and lambda = 1/2, where V is the mean of its targets. With one
    # state the backward gradient is along the forward one, and nothing is left of it.
    options = {"discount": 0.8, "tau": 0.1, "value_lr": 1e-3, "reward_transform": "none", "lambda_": 0.5}
    dataset = time_limit_probe(cut_is_termination)
    agent = ODICE(hidden=(64, 64), actor_hidden=(16,), batch_size=128, **options).fit(dataset, 500)
    with torch.no_grad():
        value = agent.value(torch.ones(1, 1, 1))
    assert value.flatten().tolist() == pytest.approx([expected, expected], abs=0.25)


# --------------------------------------------------------------------------------------- plain implementation


class PlainODICE:
    """One seed; gradients as one long vector each, by `backward`; `wrong` names the deliberate mistake."""

    def __init__(self, agent: ODICE, data, seed: int, wrong: str) -> None:
        self.agent, self.data, self.seed, self.wrong, self.config = agent, data, seed, wrong, agent.config
        self.actor = plain_mlp(agent.actor.net, seed)
        self.log_std = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        heads = range(2 if agent.config.twin_value else 1)
        self.heads = nn.ModuleList([PlainValue(agent.value.net, seed, h) for h in heads])
        self.target_heads = nn.ModuleList([PlainValue(agent.value.net, seed, h) for h in heads])
        self.value_optimizer = torch.optim.Adam(self.heads.parameters(), lr=self.config.value_lr)
        decay = 0.0 if wrong == "no weight decay" else self.config.actor_weight_decay
        self.actor_optimizer = torch.optim.Adam(
            [*self.actor.parameters(), self.log_std], lr=self.config.actor_lr, weight_decay=decay
        )

    def conjugate(self, d: Tensor) -> Tensor:
        if self.config.f == "reverse_kl":
            return torch.exp(d - 1)
        w = torch.clamp(d / 2 + 1, min=0.0)
        return d * w - (w - 1) ** 2

    def both(self, heads: nn.ModuleList, obs: Tensor) -> Tensor:
        return torch.stack([head(obs) for head in heads])

    def smaller(self, obs: Tensor) -> Tensor:
        heads = self.heads if self.wrong == "online targets" else self.target_heads
        with torch.no_grad():
            values = self.both(heads, obs)
            return values.amax(0) if self.wrong == "larger head" else values.amin(0)

    def gradient(self, loss: Tensor) -> Tensor:
        self.heads.zero_grad()
        loss.backward(retain_graph=True)
        return torch.cat(
            [p.grad.reshape(-1) if p.grad is not None else 0 * p.reshape(-1) for p in self.heads.parameters()]
        ).detach()

    def value_gradient(self, level: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        g_level, g_f, g_b = self.gradient(level), self.gradient(forward), self.gradient(backward)
        if self.wrong == "no projection":
            return g_level + g_f + g_b
        if self.wrong == "level projected":
            g_f, g_level = g_f + g_level, 0 * g_level
        if self.wrong == "forward projected":
            return g_level + g_b + g_f - (g_f @ g_b) / (g_b @ g_b) * g_b
        if self.wrong == "per head":
            cut = len(g_f) // 2
            c = torch.cat(
                [(f @ b) / (f @ f) * torch.ones(cut) for f, b in zip(g_f.split(cut), g_b.split(cut), strict=True)]
            )
        else:
            c = (g_f @ g_b) / max(float(g_f @ g_f), 1e-10)
        return g_level + g_f + (g_b - c * g_f)

    def step(self, t: int) -> None:
        cfg = self.config
        rows = rows_seen(self.agent, self.data, t, self.seed)
        obs, action, reward = self.data.obs[rows], self.data.action[rows], self.data.reward[rows]
        next_obs, going_on = self.data.next_obs[rows], cfg.discount * (1 - self.data.terminated[rows])
        value = self.both(self.heads, obs)
        if cfg.gradient == "true":
            residual = reward + going_on * self.both(self.heads, next_obs) - value
        else:
            residual = reward + going_on * self.smaller(next_obs) - value
        level, forward = ((1 - cfg.lambda_) * value).mean(), (cfg.lambda_ * self.conjugate(residual)).mean()
        if cfg.gradient == "orthogonal":
            back = reward + going_on * self.both(self.heads, next_obs) - self.smaller(obs)
            eta = 1.0 if self.wrong == "no eta" else cfg.eta
            gradient = self.value_gradient(level, forward, (cfg.lambda_ * eta * self.conjugate(back)).mean())
        else:
            gradient = self.gradient(level + forward)
        start = 0
        for p in self.heads.parameters():
            p.grad = gradient[start : start + p.numel()].reshape(p.shape).clone()
            start += p.numel()
        self.value_optimizer.step()
        for old, new in zip(self.target_heads, self.heads, strict=True):
            average(old, new, cfg.tau)

        residual = residual.detach()
        if self.wrong == "weights after the step":
            with torch.no_grad():
                residual = reward + going_on * self.smaller(next_obs) - self.both(self.heads, obs)
        if cfg.f == "reverse_kl":
            weight = torch.exp(residual - 1)
        else:
            weight = torch.clamp(residual if cfg.policy_weight == "released" else residual / 2 + 1, min=0.0)
        weight = torch.clamp(weight, max=100.0)
        mean = self.actor(obs)
        mean = (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * (torch.tanh(mean) if cfg.squash_mean else mean)
        surprise = -torch.distributions.Normal(mean, torch.clamp(self.log_std, -5, 2).exp()).log_prob(action).sum(1)
        self.actor_optimizer.zero_grad()
        (weight * surprise).mean().backward()
        self.actor_optimizer.step()

    def difference(self) -> float:
        a = self.agent
        found = [
            largest_difference(a.actor.net, self.actor, self.seed),
            float((a.actor.log_std[self.seed] - self.log_std).detach().abs().max()),
        ]
        for network, heads in ((a.value, self.heads), (a.value_target, self.target_heads)):
            found += [head.difference(network.net, self.seed, h) for h, head in enumerate(heads)]
        return max(found)


def odice_difference(dataset: Dataset, wrong: str = "", **options: object) -> float:
    settings = {"actor_hidden": (7, 5), "reward_transform": "none", "eta": 0.7, "value_lr": 1e-2, **options}
    agent = ODICE(**SHARED, **settings)
    data = agent.prepare(dataset)
    plain = [PlainODICE(agent, data, seed, wrong) for seed in range(len(SEEDS))]
    agent.fit(dataset, STEPS)
    for p in plain:
        for t in range(STEPS):
            p.step(t)
    return max(p.difference() for p in plain)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient": "semi"},
        {"gradient": "true"},
        {"f": "reverse_kl"},
        {"f": "reverse_kl", "gradient": "true", "twin_value": False},
        {"twin_value": False, "value_layer_norm": False},
        {"policy_weight": "theory", "squash_mean": True, "actor_weight_decay": 0.1},
        {"reward_transform": "zero", "lambda_": 0.4, "init": "orthogonal"},
    ],
)
def test_odice_equals_the_plain_implementation(random_dataset, options) -> None:
    assert odice_difference(random_dataset(low=LOW, high=HIGH), **options) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "no projection",
        "forward projected",
        "level projected",
        "per head",
        "no eta",
        "larger head",
        "online targets",
        "weights after the step",
        "no weight decay",
    ],
)
def test_odice_controls(random_dataset, wrong) -> None:
    assert odice_difference(random_dataset(low=LOW, high=HIGH), wrong) > 1e-7


def test_presets_are_those_of_the_card() -> None:
    configs = {name: ODICE(preset=name).config for name in ODICE.presets}
    antmaze = {name: c for name, c in configs.items() if name.startswith("antmaze")}
    assert len(antmaze) == 6
    assert all(c.reward_transform == "antmaze_odice" and not c.value_layer_norm for c in antmaze.values())
    single = {name for name, c in configs.items() if not c.twin_value}
    assert single == {"antmaze-large-play", "antmaze-large-diverse", "antmaze-umaze-diverse"}
    # offline_IL.yaml and run_offline_il.sh [code].
    for name, decay in (("imitation-hopper", 1e-5), ("imitation-walker2d", 1e-3)):
        c = configs[name]
        assert (c.lambda_, c.eta, c.actor_lr, c.value_lr, c.actor_weight_decay) == (0.4, 1.0, 1e-4, 1e-4, decay)
        assert (c.squash_mean, c.value_layer_norm, c.state_transform, c.trajectory) == (True, False, "standardize", 1)
