"""FamO2O on CQL: the two maps of the balance, probes, and whole updates against a plain implementation."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corollary.core.actor_critic import sac_policy_loss
from corollary.core.dataset import Dataset, Transitions
from corollary.core.errors import ConfigError
from corollary.offline import CQL, FamO2OCQL
from corollary.offline.famo2o import encode_balance

from .plain import HIGH, LOW, SEEDS, SHARED, STEPS, largest_difference, plain_mlp, value_of
from .probes import STATE_OF_ROW, choice_probe, mean_values, time_limit_probe, value_probe
from .test_cql import GRID, PlainCQL, best_squashed_mean, penalised_value
from .test_famo2o import plain_encoding
from .weights import influence


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ hand numbers


@pytest.mark.rung(1, "offline.famo2o_cql")
def test_the_two_maps_by_hand(random_dataset) -> None:
    # x = -1, 0, 1 on (0.5, 1.5): the range itself, and 0.5 + x as released.
    for beta_map, expected in (("range", [0.5, 1.0, 1.5]), ("released", [-0.5, 0.5, 1.5])):
        agent = FamO2OCQL(beta_map=beta_map, hidden=(8,), precision="float64")
        agent.prepare(random_dataset())
        torch.testing.assert_close(agent.balance.box(f64([-1.0, 0.0, 1.0])), f64(expected))
    with pytest.raises(ConfigError, match="beta_range must be an increasing pair"):
        FamO2OCQL(beta_range=(1.0, 0.5))


def test_what_the_family_sees_offline_and_online(random_dataset) -> None:
    for online in (False, True):
        agent = FamO2OCQL(2, hidden=(8,), precision="float64")
        data = agent.prepare(random_dataset())
        batch = data.gather(torch.arange(len(data)).repeat(2, 10))
        agent.online_phase = online
        with torch.no_grad():
            agent.balance.net.biases[-1][:, 0] = 3.0  # tanh(3) = 0.995: nearly the top of the range ...
            agent.balance.net.biases[-1][:, 1] = -9.0  # ... without spread
        inputs = agent.policy_inputs(batch)
        top = 1 + np.tanh(3) / 2
        if online:
            assert inputs.value_weight.sub(top).abs().max() < 0.01
        else:  # 960 uniform numbers in (0.5, 1.5), a mean within 4 standard errors
            assert inputs.value_weight.mean() == pytest.approx(1, abs=4 / 12**0.5 / 960**0.5)
            assert 0.5 <= inputs.value_weight.min() < 0.51
            assert 1.49 < inputs.value_weight.max() <= 1.5
        torch.testing.assert_close(inputs.obs[..., 3:], encode_balance(inputs.value_weight.unsqueeze(-1)))
        # Next states go with the balance chosen at the state, in both phases.
        torch.testing.assert_close(inputs.next_obs[..., :3], batch.next_obs)
        torch.testing.assert_close(
            inputs.next_obs[..., 3:], encode_balance(torch.full_like(inputs.obs[..., :1], top)), atol=0.01, rtol=0
        )
        assert not inputs.value_weight.requires_grad


def test_one_balance_is_cql(random_dataset) -> None:
    """At beta = 1 for all, and a policy blind to it, the losses are CQL's: the same critics and policy after a step."""
    dataset = random_dataset()
    same = {"hidden": (8,), "precision": "float64", "critic_layer_norm": False, "n_actions": 3, "action_margin": 0.0}
    same |= {"initial_log_std": 0.0, "log_std_range": (-5.0, 2.0), "actor_lr": 1e-4, "conservative_weight": 5.0}

    def first_step(low: float, high: float) -> tuple[FamO2OCQL, Tensor, CQL, Tensor]:
        cql, family = CQL(**same), FamO2OCQL(beta_range=(low, high), **same)
        data = cql.prepare(dataset)
        family.prepare(dataset)
        with torch.no_grad():
            ours, theirs = family.actor.net, cql.actor.net
            ours.weights[0].zero_()
            ours.weights[0][..., :3] = theirs.weights[0]
            for w, v in zip([*ours.weights[1:], *ours.biases], [*theirs.weights[1:], *theirs.biases], strict=True):
                w.copy_(v)
        batch = data.gather(torch.arange(16)[None])
        return family, family.update(batch)["policy_loss"], cql, cql.update(batch)["policy_loss"]

    family, family_loss, cql, cql_loss = first_step(1 - 1e-13, 1 + 1e-13)
    torch.testing.assert_close(family_loss, cql_loss, rtol=1e-10, atol=0)
    ours, theirs = family.networks.state_dict(), cql.networks.state_dict()
    for name in ("critic.net.weights.0", "critic_target.net.biases.1", "actor.net.weights.1", "log_entropy_coef"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)
    # Control: another balance weighs the values otherwise.
    _, family_loss, _, cql_loss = first_step(1.2, 1.3)
    assert (family_loss - cql_loss).abs() > 1e-6


# ------------------------------------------------------------------------------------------------- exact twin


@pytest.mark.rung(3, "offline.famo2o_cql")
@pytest.mark.theory
def test_every_member_is_the_soft_optimum_of_its_balance(finite_mdp) -> None:
    """``min_pi E_pi (alpha log pi - beta Q)`` is attained by ``pi(.|s, beta) ~ exp(beta Q / alpha)``, exactly."""
    mdp, alpha = finite_mdp(1), 0.3
    q = torch.from_numpy(mdp.q_of(mdp.policy_value(mdp.behaviour_SA)))
    beta = f64([0.5, 1.0, 1.5])[:, None, None]

    def expected_loss(logits_LSA: Tensor) -> Tensor:
        log_prob = torch.log_softmax(logits_LSA, -1)
        return (log_prob.exp() * sac_policy_loss(log_prob, (beta * q).expand_as(log_prob), alpha)).sum(-1)

    def gradient(logits_LSA: Tensor) -> float:
        logits = logits_LSA.clone().requires_grad_()
        return float(torch.autograd.grad(expected_loss(logits).sum(), logits)[0].abs().max())

    family = beta * q / alpha
    assert gradient(family) < 1e-13
    torch.testing.assert_close(expected_loss(family), -alpha * torch.logsumexp(family, -1))
    # Controls: one policy for all balances, and the balance dividing alpha instead of weighing Q.
    assert gradient(family[1:2].expand_as(family)) > 1e-3
    assert gradient(q / (beta * alpha)) > 1e-3


# ------------------------------------------------------------------------------------------------------ probes

SMALL = {"hidden": (64, 64), "n_actions": 3, "batch_size": 128}  # the default settings but for the size


@pytest.mark.rung(2, "offline.famo2o_cql")
def test_values() -> None:
    # Q is as without the penalty where it does not depend on uniform actions: see test_cql.
    value, spread = mean_values(FamO2OCQL(**SMALL).fit(value_probe(), 500), value_probe(), STATE_OF_ROW)
    share = 1 - 0.995**500
    assert value == pytest.approx([1, -1, 1 + 0.99 * share, -0.99 * share], abs=0.1)
    assert (spread < 0.5).all()


@pytest.mark.rung(2, "offline.famo2o_cql")
def test_choice_of_every_member_of_the_family() -> None:
    # Member beta minimises alpha log pi - beta Q: a squashed Gaussian for Q at the temperature alpha / beta.
    agent = FamO2OCQL(**SMALL).fit(choice_probe(), 600)
    alpha = agent.entropy_coefficient().item()
    for state in (-1.0, 1.0):
        q = penalised_value(1 - (GRID - state / 2) ** 2, 1.0)
        found = []
        for beta in (0.5, 1.5):
            told = encode_balance(torch.tensor([[[beta]]]))
            mean = torch.tanh(agent.actor(torch.cat([torch.tensor([[[state]]]), told], -1)).base.mean).item()
            assert mean == pytest.approx(best_squashed_mean(q, alpha / beta), abs=0.07)
            found.append(mean * state)
        assert found[0] + 0.03 < found[1]  # control: the members differ


@pytest.mark.rung(5, "offline.famo2o_cql")
@pytest.mark.parametrize(("cut_is_termination", "expected"), [(False, 5.0), (True, 2.5)])
def test_a_time_limit_does_not_end_the_world(cut_is_termination, expected) -> None:
    dataset = time_limit_probe(cut_is_termination)
    options = {"discount": 0.8, "tau": 0.1, "critic_lr": 1e-3}
    value, _ = mean_values(FamO2OCQL(**SMALL, **options).fit(dataset, 400), dataset, np.zeros(400))
    assert value[0] == pytest.approx(expected, abs=0.25)


def test_rows_of_weight_zero_teach_nothing_online(random_dataset) -> None:
    for weighted in (True, False):
        found = influence(FamO2OCQL, random_dataset(), weighted, online=True, n_actions=3, beta_map="released")
        assert (found < 1e-12) == weighted


# --------------------------------------------------------------------------------------------------- plain twin


class PlainFamO2OCQL(PlainCQL):
    """The family and the balance policy around the plain CQL; `wrong` names the deliberate mistake."""

    online = False

    def __init__(self, agent: FamO2OCQL, data: Transitions, seed: int, wrong: str) -> None:
        super().__init__(agent, data, seed, wrong)
        if self.config.critic_layer_norm:
            self.q, self.q_target = ([normalised(net) for net in nets] for nets in (self.q, self.q_target))
            parameters = [p for net in self.q for p in net.parameters()]
            self.critic_optimizer = torch.optim.Adam(parameters, lr=self.config.critic_lr)
        self.balance = plain_mlp(agent.balance.net, seed)
        self.balance_optimizer = torch.optim.Adam(self.balance.parameters(), lr=self.config.balance_lr)

    def inputs(self, t: int, obs: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        cfg, n = self.config, len(obs)
        low, high = cfg.beta_range
        noise = self.agent.stream("balance").normal(t, (n, 3))[self.seed]
        uniform = self.agent.stream("uniform balance").uniform(t, (n, 1))[self.seed, :, 0]
        mean, log_std = self.balance(obs).unbind(1)
        x = torch.tanh(mean + log_std.clamp(*cfg.log_std_range).exp() * noise[:, 0])
        if (cfg.beta_map == "released") != (self.wrong == "the other map"):
            chosen = x * (high - low) + low
        else:
            chosen = (x + 1) / 2 * (high - low) + low
        mean, std = self.gaussian(torch.cat([obs, plain_encoding(chosen)], 1))
        action = self.box(torch.tanh(mean + std * noise[:, 1:]))
        loss = -torch.minimum(*(value_of(net, obs, action) for net in self.q)).mean()
        self.balance_optimizer.zero_grad()
        loss.backward()
        self.balance_optimizer.step()
        chosen = chosen.detach()
        beta = chosen if self.online else low + (high - low) * uniform
        at_next = beta if self.wrong == "the told balance at the next state" else chosen
        factor = 1.0 if self.wrong == "values not weighed" else beta
        return torch.cat([obs, plain_encoding(beta)], 1), torch.cat([next_obs, plain_encoding(at_next)], 1), factor

    def difference(self) -> float:
        return max(super().difference(), largest_difference(self.agent.balance.net, self.balance, self.seed))


def normalised(net: nn.Sequential) -> nn.Sequential:
    """The same network with a LayerNorm before every ReLU."""
    layers: list[nn.Module] = []
    for layer in net:
        if isinstance(layer, nn.ReLU):
            layers.append(nn.LayerNorm(layers[-1].out_features, dtype=torch.float64))
        layers.append(layer)
    return nn.Sequential(*layers)


def difference(dataset: Dataset, wrong: str = "", online: bool = False, **options: object) -> float:
    agent = FamO2OCQL(**SHARED, **({"n_actions": 3} | options))
    data = agent.prepare(dataset)
    plain = [PlainFamO2OCQL(agent, data, seed, wrong) for seed in range(len(SEEDS))]
    agent.online_phase = online
    for t in range(STEPS):
        agent.update(data.gather(agent.stream("batch").integers(t, len(data), (16,))))
        agent.step += 1
        for p in plain:
            p.online = online
            p.step(t)
    return max(p.difference() for p in plain)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_map": "released", "critic_layer_norm": False, "target_gap": 1.0},
        {"beta_range": (1.0, 5.0), "max_backup": "max_min", "actor_hidden": (7,)},
    ],
)
def test_famo2o_cql_equals_the_plain_implementation(random_dataset, options, online) -> None:
    assert difference(random_dataset(low=LOW, high=HIGH), online=online, **options) < 1e-10


@pytest.mark.parametrize("wrong", ["the other map", "the told balance at the next state", "values not weighed"])
def test_famo2o_cql_controls(random_dataset, wrong) -> None:
    assert difference(random_dataset(low=LOW, high=HIGH), wrong) > 1e-7


# ----------------------------------------------------------------------------------------------- the released map


@pytest.mark.theory
def test_a_negative_balance_seeks_the_worst_action() -> None:
    """Why the released map is no choice of convention: below 0 the family's exact member is best where Q is worst."""
    q = penalised_value(1 - (GRID - 0.5) ** 2, 1.0)
    alpha = 0.1
    member = {beta: np.exp(beta * q / alpha) / np.exp(beta * q / alpha).sum() for beta in (-0.5, 0.0, 0.5, 1.5)}
    value = {beta: float((density * q).sum()) for beta, density in member.items()}
    assert value[-0.5] < value[0.0] < value[0.5] < value[1.5]
    # The released map reaches it, the range does not: x in (-1, 1) onto (-0.5, 1.5) and (0.5, 1.5).
    dataset = choice_probe()
    for beta_map, reaches in (("released", True), ("range", False)):
        agent = FamO2OCQL(hidden=(8,), beta_map=beta_map)
        agent.prepare(dataset)
        assert bool(agent.balance.box(torch.tensor([-0.9])) < 0) == reaches
