"""ReBRAC: penalties by hand, order of an update, probes, the penalised policy value on a finite MDP, a second code."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corollary.core.actor_critic import critic_loss, td_target
from corollary.core.dataset import Dataset, Transitions
from corollary.core.networks import StackedMLP
from corollary.core.transitions import Batch
from corollary.offline import ReBRAC

from .plain import HIGH, LOW, SEEDS, SHARED, STEPS, average, largest_difference, plain_actor, plain_mlp, rows_seen
from .probes import (
    STATE_OF_ROW,
    chosen_actions,
    fitted,
    mean_values,
    time_limit_probe,
    value_probe,
)


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ hand numbers


def batch_of(action: object, next_action: object, valid: object, weight: object = None) -> Batch:
    """A batch ``[1, B]`` of which only the actions matter."""
    rows = f64(action)
    nothing = torch.zeros(rows.shape[:-1], dtype=torch.float64)
    state = torch.zeros(*rows.shape[:-1], 1, dtype=torch.float64)
    index = torch.zeros(rows.shape[:-1], dtype=torch.int64)
    weights = None if weight is None else f64(weight)
    return Batch(state, rows, nothing, state, nothing, f64(next_action), f64(valid), index, weights)


@pytest.mark.rung(1, "offline.rebrac")
def test_penalties_by_hand() -> None:
    # Policy: rows at distance^2 1 + 4 = 5 and 9 + 0 = 9, summed over dimensions: 0.5 * (5 + 9) / 2 = 3.5; with weights
    # 2 and 0, 0.5 * 2 * 5 / 2 = 2.5.
    agent = ReBRAC(actor_beta=0.5, critic_beta=0.25)
    logged, policy = [[[1.0, 2.0], [3.0, 0.0]]], torch.zeros(1, 2, 2, dtype=torch.float64)
    assert agent.penalty(batch_of(logged, logged, [[1, 1]]), policy)[0].tolist() == [3.5]
    assert agent.penalty(batch_of(logged, logged, [[1, 1]], [[2, 0]]), policy)[0].tolist() == [2.5]
    # Target: each row its own, 0.25 * 5 and 0.25 * 9, and nothing where the next action is unknown.
    assert agent.target_penalty(batch_of(logged, logged, [[1, 1]]), policy).tolist() == [[1.25, 2.25]]
    assert agent.target_penalty(batch_of(logged, logged, [[1, 0]]), policy).tolist() == [[1.25, 0]]


def test_the_initial_weights_are_the_authors(random_dataset) -> None:
    agent = ReBRAC()
    agent.prepare(random_dataset(d_s=11, d_a=3))
    for net, n_in, last in ((agent.actor.net, 11, 1e-3), (agent.critic.net, 14, 3e-3)):
        widths = [weight.shape[-2:] for weight in net.weights]
        assert [tuple(width) for width in widths[:-1]] == [(256, n_in), (256, 256), (256, 256)]
        for weight, bias in zip(net.weights[:-1], net.biases[:-1], strict=True):
            bound = weight.shape[-1] ** -0.5
            assert 0.99 * bound < weight.abs().max() <= bound
            assert (bias == 0.1).all()
        assert 0.98 * last < net.weights[-1].abs().max() <= last
        assert net.biases[-1].abs().max() <= last
    assert agent.critic.net.layer_norm == "after"
    assert agent.actor.net.layer_norm == "none"
    plain = ReBRAC(critic_layer_norm=False)
    plain.prepare(random_dataset())
    assert plain.critic.net.layer_norm == "none"


def test_the_policy_climbs_the_smaller_critic(random_dataset) -> None:
    agent = ReBRAC(precision="float64", hidden=(8, 8))
    data = agent.prepare(random_dataset())
    batch = data.gather(torch.arange(16)[None])
    with torch.no_grad():
        both = agent.critic(batch.obs, batch.action)
    action = batch.action.clone().requires_grad_()
    value = agent.policy_value(batch.obs, action)
    torch.testing.assert_close(value, torch.minimum(both[:, 0], both[:, 1]))
    assert 0 < (both[:, 0] < both[:, 1]).sum() < 16  # each critic is the smaller one somewhere
    parameters = list(agent.critic.parameters())
    gradients = torch.autograd.grad(value.sum(), [action, *parameters], allow_unused=True)
    assert gradients[0].abs().max() > 0
    assert set(gradients[1:]) == {None}


def test_targets_and_policy_move_at_the_first_update_and_every_second_after(random_dataset) -> None:
    agent = ReBRAC(seeds=2, hidden=(8, 8), precision="float64", batch_size=16, tau=0.25)
    data = agent.prepare(random_dataset())
    networks = agent.networks
    for step in range(4):
        before = {name: [p.detach().clone() for p in module.parameters()] for name, module in networks.items()}
        metrics = agent.update(data.gather(torch.arange(32).reshape(2, 16)))
        due = agent.step % 2 == 0
        agent.step += 1
        assert ("policy_loss" in metrics) == due
        # The critic targets follow the critics after their step; the policy's target follows the policy of before.
        for name, followed in (("critic", list(networks["critic"].parameters())), ("actor", before["actor"])):
            olds, targets = before[f"{name}_target"], networks[f"{name}_target"].parameters()
            for old, source, target in zip(olds, followed, targets, strict=True):
                expected = 0.75 * old + 0.25 * source if due else old
                torch.testing.assert_close(target, expected, rtol=1e-12, atol=1e-15)
        moved = any(not torch.equal(a, b) for a, b in zip(before["actor"], networks["actor"].parameters(), strict=True))
        assert moved == due, step


# ------------------------------------------------------------------------------------------------------ probes


@pytest.mark.rung(2, "offline.rebrac")
def test_values_of_the_probe() -> None:
    # The step across gamma is taken at the target critics' value of the next state. Averaging the weights of normalised
    # layers is not averaging values, so that value is read off the targets, which are on their way to 1 and -1. The
    # penalty, 0.01 |pi - a'|^2, is below 0.02.
    agent = fitted(ReBRAC, value_probe, 120)
    value, spread = mean_values(agent, value_probe(), STATE_OF_ROW)
    data = agent.prepare(value_probe())
    with torch.no_grad():
        bootstrap = agent.critic_target(data.obs[None], data.action[None])[0].mean(0).double().numpy()
    good, bad = (bootstrap[s == STATE_OF_ROW].mean() for s in (0, 1))
    assert value == pytest.approx([1, -1, 1 + 0.99 * good, 0.99 * bad], abs=0.05)
    assert 0.2 < good < 1
    assert -1 < bad < -0.2
    assert (spread < 0.15).all()  # the action does not matter


@pytest.mark.rung(2, "offline.rebrac")
def test_the_policy_of_the_choice_probe() -> None:
    # -lambda Q(pi) + 0.01 pi^2 + const with Q = 1 - (pi - 1/2)^2 and lambda = 1 / Q(pi) is stationary at
    # pi = lambda / (2 (lambda + 0.01)), 0.495.
    pi = 0.5
    for _ in range(50):
        weight = 1 / (1 - (pi - 0.5) ** 2)
        pi = weight / (2 * (weight + 0.01))
    assert pi == pytest.approx(0.495, abs=1e-3)
    assert chosen_actions(ReBRAC, 150) == pytest.approx([-pi, pi], abs=0.06)


# One state, reward 1, gamma 0.8; three of four rows know their next action. Without target noise and with a policy held
# at 0 by a large beta_1, the penalty is beta_2 E a'^2 = beta_2 / 3 where it is known: V = 1 + 0.8 (V - beta_2 / 4), so
# V = 5 - beta_2; were the row's own action, which stands in for an unknown one, taken for the next, 5 - 4 beta_2 / 3.
# A cut taken for a termination stops the bootstrap of the fourth row: V = 1 + 0.8 (3/4 V - beta_2 / 4).
@pytest.mark.rung(5, "offline.rebrac")
@pytest.mark.parametrize(
    ("cut_is_termination", "critic_beta", "expected"),
    [(False, 0.0, 5.0), (True, 0.0, 2.5), (False, 1.5, 3.5), (True, 1.5, 1.75)],
)
def test_a_time_limit_does_not_end_the_world(cut_is_termination, critic_beta, expected) -> None:
    options = {"discount": 0.8, "tau": 0.1, "policy_noise": 0.0, "actor_beta": 100.0, "critic_beta": critic_beta}
    dataset = time_limit_probe(cut_is_termination)
    agent = ReBRAC(hidden=(64, 64), batch_size=128, **options).fit(dataset, 500)
    value, _ = mean_values(agent, dataset, np.zeros(400))
    assert value[0] == pytest.approx(expected, abs=0.15)


# ------------------------------------------------------------------------------------------------ tabular twin


def critic_gradient(mdp, agent: ReBRAC, q_MSA: Tensor, policy: np.ndarray, valid: float = 1.0) -> Tensor:
    """Gradient of the library's critic loss over tables; actions are one-hot, a' is drawn by the behaviour policy.

    Every row (s, a, s') of the MDP is repeated for the eight equally likely next actions.
    """
    eighths = [np.repeat(np.arange(4), np.rint(8 * row).astype(int)) for row in mdp.behaviour_SA]
    following = torch.from_numpy(np.stack(eighths))[mdp.next_state].flatten()  # [8 N]
    state, action, reward, terminated, next_state = (
        x.repeat_interleave(8) for x in (mdp.state, mdp.action, mdp.reward, mdp.terminated, mdp.next_state)
    )
    one_hot = torch.eye(4, dtype=torch.float64)
    chosen = torch.from_numpy(policy)[next_state]
    batch = batch_of([[[0.0] * 4]], [[[0.0] * 4]], [[1.0]])._replace(
        next_action=one_hot[following][None], next_action_valid=torch.full((1, len(state)), valid).double()
    )
    q = q_MSA.clone().requires_grad_()
    next_value = q_MSA[:, next_state, chosen].amin(0) - agent.target_penalty(batch, one_hot[chosen][None])[0]
    target = td_target(reward, terminated, next_value, mdp.discount)
    return torch.autograd.grad(critic_loss(q[:, state, action], target), q)[0]


@pytest.mark.rung(3, "offline.rebrac")
@pytest.mark.parametrize("seed", range(3))
def test_the_critics_fixed_point_is_the_policys_value_less_what_it_pays(finite_mdp, seed) -> None:
    # Two different one-hot actions are at squared distance 2, so in s' the policy pays 2 beta_2 (1 - b(pi(s')|s')) on
    # average: the value V' of entering s' is that of an MDP whose rewards are less by it.
    mdp, beta = finite_mdp(seed), 0.3
    covered = mdp.behaviour_SA > 0
    policy = mdp.behaviour_SA.argmax(1)
    paid = 2 * beta * (1 - mdp.behaviour_SA[np.arange(6), policy])
    dynamics = mdp.transition_SAS[np.arange(6), policy]
    entering = np.linalg.solve(np.eye(6) - mdp.discount * dynamics, mdp.reward_SA[np.arange(6), policy] - paid)
    exact = torch.from_numpy(np.where(covered, mdp.q_of(entering), 0.0)).expand(2, -1, -1)

    gradient = critic_gradient(mdp, ReBRAC(critic_beta=beta), exact, policy)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)
    # Controls: another beta, penalties where the next action is unknown, and no penalty at all.
    assert critic_gradient(mdp, ReBRAC(critic_beta=0.4), exact, policy).abs().max() > 1e-4
    assert critic_gradient(mdp, ReBRAC(critic_beta=beta), exact, policy, valid=0.0).abs().max() > 1e-4
    unpenalised = torch.from_numpy(np.where(covered, mdp.q_of(mdp.policy_value(np.eye(4)[policy])), 0.0))
    unpenalised = unpenalised.expand(2, -1, -1)
    assert critic_gradient(mdp, ReBRAC(critic_beta=0.0), unpenalised, policy).abs().max() < 1e-14
    assert critic_gradient(mdp, ReBRAC(critic_beta=beta), unpenalised, policy).abs().max() > 1e-4


@pytest.mark.rung(6, "offline.rebrac")
@pytest.mark.theory
@pytest.mark.parametrize("seed", range(3))
def test_the_critics_penalty_lowers_every_value_in_proportion_to_beta(finite_mdp, seed) -> None:
    # Q of beta_2 is Q^pi - beta_2 gamma P M, M the discounted sum of what a unit beta_2 makes the policy pay: below
    # Q^pi by a multiple of beta_2. Found by exact minimisations of the library's loss, one after another.
    mdp = finite_mdp(seed)
    covered = torch.from_numpy(mdp.behaviour_SA > 0)
    policy = mdp.behaviour_SA.argmax(1)
    # The loss is quadratic: its minimiser is one gradient step divided by the curvature 2 n(s, a) / N.
    curvature = 2 * torch.from_numpy(mdp.behaviour_SA).clamp(min=1 / 8) / 6

    def fixed_point(beta: float, valid: float = 1.0) -> Tensor:
        q = torch.zeros(2, 6, 4, dtype=torch.float64)
        for _ in range(200):  # 0.8^200 < 1e-19
            q = q - critic_gradient(mdp, ReBRAC(critic_beta=beta), q, policy, valid) / curvature
        return q[0][covered]

    exact = torch.from_numpy(mdp.q_of(mdp.policy_value(np.eye(4)[policy])))[covered]
    torch.testing.assert_close(fixed_point(0.0), exact, rtol=0, atol=1e-10)
    less = exact - fixed_point(0.3)
    assert (less >= -1e-10).all()
    assert less.max() > 0.1
    torch.testing.assert_close(exact - fixed_point(0.9), 3 * less, rtol=0, atol=1e-10)
    # Control: without known next actions nothing is paid.
    torch.testing.assert_close(fixed_point(0.3, valid=0.0), exact, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------- a second code


def plain_critic(net: StackedMLP, *index: int) -> nn.Sequential:
    """Linear layers with copies of the weights, each hidden one followed by ReLU, then LayerNorm."""
    layers: list[nn.Module] = []
    for layer in plain_mlp(net, *index):
        layers.append(layer)
        if isinstance(layer, nn.ReLU):
            layers.append(nn.LayerNorm(layers[-2].out_features, dtype=torch.float64))
    return nn.Sequential(*layers)


def critic_difference(net: StackedMLP, plain: nn.Sequential, *index: int) -> float:
    norms = [layer for layer in plain if isinstance(layer, nn.LayerNorm)]
    pairs = [(scale[index], norm.weight) for scale, norm in zip(net.scales, norms, strict=True)]
    pairs += [(shift[index], norm.bias) for shift, norm in zip(net.shifts, norms, strict=True)]
    of_norms = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return max(of_norms, largest_difference(net, plain, *index))


class PlainReBRAC:
    """ReBRAC by the equations of the paper and the order of the authors' code; `wrong` names the deliberate mistake."""

    def __init__(self, agent: ReBRAC, data: Transitions, seed: int, wrong: str) -> None:
        self.agent, self.data, self.seed, self.wrong = agent, data, seed, wrong
        self.actor, self.actor_target = (plain_mlp(agent.actor.net, seed) for _ in range(2))
        self.critics, self.critic_targets = ([plain_critic(agent.critic.net, seed, m) for m in (0, 1)] for _ in "ab")
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=1e-3)
        both = [*self.critics[0].parameters(), *self.critics[1].parameters()]
        self.critic_optimizer = torch.optim.Adam(both, lr=1e-3)

    def step(self, t: int) -> None:
        beta_1, beta_2 = self.agent.config.actor_beta, self.agent.config.critic_beta
        rows = rows_seen(self.agent, self.data, t, self.seed)
        obs, action, next_obs = self.data.obs[rows], self.data.action[rows], self.data.next_obs[rows]
        half = (HIGH - LOW) / 2
        with torch.no_grad():
            noise = self.agent.stream("target noise").normal(t, action.shape)[self.seed]
            noise = torch.clamp(0.2 * half * noise, -0.5 * half, 0.5 * half)
            next_action = torch.clamp(plain_actor(self.actor_target, next_obs) + noise, LOW, HIGH)
            paid = ((next_action - self.data.next_action[rows]) ** 2).sum(1)
            if self.wrong != "unknown next actions":
                paid = paid * self.data.next_action_valid[rows]
            if self.wrong == "mean over dimensions":
                paid = paid / 2
            inputs = torch.cat([next_obs, next_action], dim=1)
            next_value = torch.minimum(*(net(inputs).squeeze(1) for net in self.critic_targets)) - beta_2 * paid
            y = self.data.reward[rows] + 0.99 * (1 - self.data.terminated[rows]) * next_value

        inputs = torch.cat([obs, action], dim=1)
        loss = sum(nn.functional.mse_loss(net(inputs).squeeze(1), y) for net in self.critics)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        if t % 2 != (1 if self.wrong == "second update first" else 0):
            return

        if self.wrong != "target follows the new policy":
            average(self.actor_target, self.actor, 0.005)
        pi = plain_actor(self.actor, obs)
        q = [net(torch.cat([obs, pi], dim=1)).squeeze(1) for net in self.critics]
        value = q[0] if self.wrong == "first critic" else torch.minimum(*q)
        squares = (pi - action) ** 2
        cloned = squares.mean(1) if self.wrong == "mean over dimensions" else squares.sum(1)
        loss = (beta_1 * cloned - value / value.abs().mean().item()).mean()
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()
        if self.wrong == "target follows the new policy":
            average(self.actor_target, self.actor, 0.005)
        for target, online in zip(self.critic_targets, self.critics, strict=True):
            average(target, online, 0.005)

    def difference(self) -> float:
        a = self.agent
        return max(
            largest_difference(a.actor.net, self.actor, self.seed),
            largest_difference(a.actor_target.net, self.actor_target, self.seed),
            *(critic_difference(a.critic.net, self.critics[m], self.seed, m) for m in (0, 1)),
            *(critic_difference(a.critic_target.net, self.critic_targets[m], self.seed, m) for m in (0, 1)),
        )


def difference_from_plain(dataset: Dataset, wrong: str = "") -> float:
    agent = ReBRAC(actor_beta=0.7, critic_beta=0.3, **SHARED)
    data = agent.prepare(dataset)
    plain = [PlainReBRAC(agent, data, seed, wrong) for seed in range(len(SEEDS))]
    agent.fit(dataset, STEPS)
    for p in plain:
        for t in range(STEPS):
            p.step(t)
    return max(p.difference() for p in plain)


def test_rebrac_equals_the_plain_implementation(random_dataset) -> None:
    assert difference_from_plain(random_dataset(low=LOW, high=HIGH)) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "unknown next actions",
        "mean over dimensions",
        "second update first",
        "target follows the new policy",
        "first critic",
    ],
)
def test_rebrac_controls(random_dataset, wrong) -> None:
    assert difference_from_plain(random_dataset(low=LOW, high=HIGH), wrong) > 1e-7


# -------------------------------------------------------------------------------------------- published settings

LOCOMOTION = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
HANDS = ("human", "cloned", "expert")
PUBLISHED = {
    "halfcheetah": (LOCOMOTION, ".001 .1, .001 .01, .01 .001, .01 .1, .01 .01, .001 .1"),
    "hopper": (LOCOMOTION, ".001 .01, .01 .01, .05 .5, .1 .01, .1 .1, .01 .01"),
    "walker2d": (LOCOMOTION, ".01 0, .05 .1, .05 .01, .01 .01, .01 .5, .01 .01"),
    "antmaze": (MAZES, ".003 .002, .003 .001, .001 .0005, .001 0, .002 .001, .002 .002"),
    "pen": (HANDS, ".1 .5, .05 .5, .01 .01"),
    "door": (HANDS, ".1 .1, .01 .1, .05 .01"),
    "hammer": (HANDS, ".01 .5, .1 .5, .01 .01"),
    "relocate": (HANDS, ".1 .01, .1 .01, .05 .01"),
}
"""beta_1 and beta_2, from corl-team/CORL configs/offline/rebrac."""


def test_the_presets_are_the_published_settings() -> None:
    betas = {"maze2d": (0.003, 0.001)}
    for task, (kinds, pairs) in PUBLISHED.items():
        for kind, pair in zip(kinds, pairs.split(", "), strict=True):
            betas[f"{task}-{kind}"] = tuple(float(beta) for beta in pair.split())
    assert ReBRAC.presets.keys() == betas.keys()
    for name, expected in betas.items():
        config = ReBRAC(preset=name).config
        assert (config.actor_beta, config.critic_beta) == expected, name
        others = (config.batch_size, config.actor_lr, config.critic_lr, config.discount, config.reward_transform)
        if name.startswith("antmaze"):
            assert others == (256, 3e-4, 5e-5, 0.999, "antmaze_x100")
        elif name.startswith(("halfcheetah", "hopper", "walker2d")):
            assert others == (1024, 1e-3, 1e-3, 0.99, "none")
        else:
            assert others == (256, 3e-4, 3e-4, 0.99, "none")
