"""The off-policy base: what is collected and remembered, when it learns, exact state; SAC and MDPO beside plain twins.

The twins are a second implementation of a whole update: one seed, ``nn.Linear``, ``torch.distributions``, PyTorch's
Adam, loops. Both start from the same weights and see the same rows and noise, in float64; after several steps every
parameter must agree to 1e-10. The controls run the twin with one thing wrong: each must be caught.
"""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Normal

from corollary.core import checkpoint
from corollary.core.dataset import Batch
from corollary.core.errors import ConfigError, EnvironmentMismatchError
from corollary.core.networks import StackedMLP
from corollary.online import SAC, OffPolicyMDPO

from .plain import plain_mlp

LOW, HIGH = np.array([-0.5, -1.0], np.float32), np.array([2.5, 3.0], np.float32)  # neither centred nor of unit size
BOTH = pytest.mark.parametrize("kind", [SAC, OffPolicyMDPO], ids=lambda kind: kind.algorithm)
SMALL: dict[str, Any] = {"hidden": (8, 6), "batch_size": 16, "learning_starts": 8, "precision": "float64"}


class Counter(gymnasium.Env[Any, Any]):
    """Shows (steps taken, number of the episode); even episodes terminate after 3 steps, odd ones are cut after 4."""

    observation_space = spaces.Box(0, 1000, (2,))
    action_space = spaces.Box(LOW, HIGH)

    def __init__(self) -> None:
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.obs(), {}

    def step(self, action: Any) -> Any:
        assert (action >= LOW).all()
        assert (action <= HIGH).all()
        self.t += 1
        odd = self.episode % 2 == 1
        return self.obs(), float(action[0] + 2 * action[1]), not odd and self.t == 3, odd and self.t == 4, {}

    def obs(self) -> Any:
        return np.array([self.t, self.episode], np.float32)


class Noise(gymnasium.Env[Any, Any]):
    """Random observations, rewards and ends, the same for the same seed."""

    observation_space = spaces.Box(-10, 10, (3,))
    action_space = spaces.Box(LOW, HIGH)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        obs, (reward, end) = self.np_random.normal(size=3).astype(np.float32), self.np_random.normal(size=2)
        return obs, float(reward), bool(end < -1), bool(end > 1), {}


def of_seed(batch: Batch, seed: int) -> Batch:
    """The rows of one seed; what was experienced has no weights."""
    *fields, weight = batch
    assert weight is None
    return Batch(*(field[seed] for field in fields))


def rows(agent: Any, seed: int = 0) -> Batch:
    """Everything in one seed's replay, oldest place first."""
    index = torch.arange(int(agent.replay.sizes[seed])).expand(len(agent.seeds), -1)
    return of_seed(agent.replay.gather(index), seed)


def all_tensors(agent: Any, folder: Any) -> dict[str, Tensor]:
    return checkpoint.read(agent.save(folder / f"{id(agent)}"))[1]


# -------------------------------------------------------------------------------------------------------- refusals


@BOTH
def test_actions_without_a_bounded_box_are_refused(kind) -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"CartPole-v1 has the discrete action space.*use online\.ppo"):
        kind("CartPole-v1")

    for low, high in ((-1, np.inf), (-np.inf, 1), (1, 1)):

        class Strange(Noise):
            action_space = spaces.Box(low, high, (2,))

        with pytest.raises(EnvironmentMismatchError, match=r"needs finite bounds low < high.*TransformAction"):
            kind(Strange)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"buffer_size": 0}, ">= 1"),
        ({"train_every": 0}, ">= 1"),
        ({"gradient_steps": 0}, ">= 1"),
        ({"learning_starts": -1}, ">= 0"),
        ({"discount": 1.0}, r"in \[0, 1\)"),
        ({"tau": 0.0}, r"in \(0, 1\]"),
        ({"actor_lr": 0.0}, "> 0"),
        ({"hidden": ()}, "one or more positive widths"),
        ({"log_std_range": (2.0, -5.0)}, "an increasing pair"),
    ],
)
@BOTH
def test_values_out_of_range_are_named(kind, option, said) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=rf"{name} must be {said}; got"):
        kind(Noise, **option)


# ------------------------------------------------------------------------------------------------------ collection


@BOTH
def test_the_replay_holds_true_successors_and_only_terminations_end_the_value(kind) -> None:
    agent = kind(Counter, **SMALL).learn(25)
    batch = rows(agent)
    # Episodes of 3, 4, 3, 4, ... steps: the time limit's row (t = 3 of an odd episode) leads to t = 4 and goes on.
    expected = [(t, e) for e in range(8) for t in range(4 if e % 2 else 3)][:25]
    assert batch.obs.tolist() == [list(each) for each in expected]
    assert batch.next_obs.tolist() == [[t + 1, e] for t, e in expected]
    assert batch.terminated.tolist() == [float(e % 2 == 0 and t == 2) for t, e in expected]
    torch.testing.assert_close(batch.reward, batch.action @ torch.tensor([1.0, 2.0]).double(), rtol=0, atol=1e-6)


@BOTH
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_resets_of_a_vector_environment_are_no_transitions(kind, mode) -> None:
    vector = gymnasium.vector.SyncVectorEnv([Counter, Counter], autoreset_mode=gymnasium.vector.AutoresetMode(mode))
    agent = kind(vector, **SMALL).learn(60)
    batch = rows(agent)
    assert (len(batch.obs) < 60) == (mode == "NextStep")
    t, episode = batch.obs.unbind(1)
    assert torch.equal(batch.next_obs, torch.stack([t + 1, episode], 1))
    assert torch.equal(batch.terminated == 1, (episode % 2 == 0) & (t == 2))


@BOTH
def test_the_warm_up_is_uniform_in_the_box_and_without_learning(kind) -> None:
    agent = kind(Noise, **SMALL | {"learning_starts": 4000, "n_envs": 4, "train_every": 50})
    first = {name: tensor.clone() for name, tensor in agent.networks.state_dict().items()}
    with pytest.warns(UserWarning, match="ends at step 3800, before the first gradient step: learning_starts is 4000"):
        agent.learn(3800)
    share = ((rows(agent).action - torch.tensor(LOW)) / torch.tensor(HIGH - LOW)).float()
    assert len(share) == 3800
    assert 0 <= share.min() < 0.01
    assert 0.99 < share.max() < 1
    assert share.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)  # four standard errors
    assert share.var(0).tolist() == pytest.approx([1 / 12, 1 / 12], abs=0.005)
    assert abs(float(torch.corrcoef(share.T)[0, 1])) < 0.06
    assert all(torch.equal(tensor, first[name]) for name, tensor in agent.networks.state_dict().items())
    assert agent.iterate(0.0)  # the step after which the warm-up is full is the first to learn
    assert any(not torch.equal(tensor, first[name]) for name, tensor in agent.networks.state_dict().items())


@BOTH
def test_gradient_steps_follow_the_environment_steps_and_have_numbers_of_their_own(kind, monkeypatch) -> None:
    agent = kind(Noise, **SMALL | {"n_envs": 2, "train_every": 3, "gradient_steps": 4})
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(agent, "update", lambda batch, index: taken.append((agent.step, index)) or {})
    agent.learn(24)  # iterations of 6 steps; 8 steps are full after the second
    assert taken == [(6 * (i + 1), 4 * i + g) for i in (1, 2, 3) for g in range(4)]


@BOTH
@pytest.mark.parametrize("bound", ["clip", "tanh"])
def test_collection_samples_the_policy_that_updates_see(kind, bound, monkeypatch) -> None:
    options = {"log_std_bound": bound, "log_std_range": (-1.0, 0.2), "normalize_obs": True, "learning_starts": 0}
    agent = kind(Noise, [3, 5], **SMALL | options | {"n_envs": 2, "train_every": 7})
    noise = agent.exploration_noise()
    rollout = agent.collect()
    policy = agent.actor(rollout.obs.flatten(1, 2))
    expected = agent.action_box(policy.sample(noise.flatten(1, 2)))
    torch.testing.assert_close(rollout.action.flatten(1, 2), expected, rtol=0, atol=1e-12)
    assert (policy.base.log_std >= -1).all()
    assert (policy.base.log_std <= 0.2).all()
    raw = agent.actor.net(rollout.obs.flatten(1, 2))[..., 2:]
    by_hand = raw.clamp(-1, 0.2) if bound == "clip" else -1 + 1.2 * (torch.tanh(raw) + 1) / 2
    torch.testing.assert_close(policy.base.log_std, by_hand)


@BOTH
def test_updates_see_unit_actions_and_normalised_states(kind) -> None:
    agent = kind(Noise, **SMALL | {"normalize_obs": True}).learn(40)
    batch, raw = agent.sample(3), agent.replay.sample(3, 16)
    assert batch.action.abs().max() <= 1
    torch.testing.assert_close(agent.action_box(batch.action), raw.action)
    assert torch.equal(batch.obs, agent.normalize(raw.obs))
    assert torch.equal(batch.next_obs, agent.normalize(raw.next_obs))
    assert not torch.allclose(batch.obs, raw.obs)
    assert torch.equal(batch.reward, raw.reward)


@pytest.mark.rung(5, "online.sac", "online.mdpo_off")
@BOTH
def test_targets_bootstrap_across_a_time_limit_and_not_across_a_termination(kind) -> None:
    agent = kind(Counter, **SMALL).learn(60)
    batch = agent.sample(0)
    t, episode = batch.obs.unbind(2)
    cut, over = (episode % 2 == 1) & (t == 3), (episode % 2 == 0) & (t == 2)
    assert cut.any()
    assert over.any()
    noise = torch.zeros_like(batch.action)
    arguments = (noise,) if kind is SAC else ()
    target = agent.target(batch, *arguments)
    if kind is SAC:
        policy = agent.actor(batch.next_obs)
        latent, densities = policy.draw(noise)
        next_q = agent.critic_target(batch.next_obs, torch.tanh(latent)).amin(1)
        value = next_q - agent.entropy_coefficient() * densities.sum(-1)
    else:
        value = agent.value_target(batch.next_obs)
    full = batch.reward + 0.99 * value
    torch.testing.assert_close(target[cut], full[cut])
    assert torch.equal(target[over], batch.reward[over])
    assert ((full - batch.reward)[cut].abs() > 1e-3).all()  # what a time limit treated as an end would lose


# ----------------------------------------------------------------------------------------------------- exact state


@BOTH
@pytest.mark.rung(4, "online.sac", "online.mdpo_off")
def test_a_run_stopped_in_the_middle_of_its_ring_goes_on_to_the_bit(kind, tmp_path) -> None:
    options = SMALL | {"buffer_size": 37, "normalize_obs": True, "n_envs": 2, "precision": "float32"}
    more = {"old_policy_every": 30} if kind is OffPolicyMDPO else {"policy_delay": 2}

    def make() -> Any:
        return kind("Pendulum-v1", [1, 6], **options, **more)

    whole = all_tensors(make().learn(110), tmp_path)
    half = make().learn(54)  # the ring has wrapped: 54 = 37 + 17
    loaded = kind.load(half.save(tmp_path / "half"))
    ours = all_tensors(loaded.learn(56), tmp_path)
    assert whole.keys() == ours.keys()
    differing = [name for name in whole if not torch.equal(whole[name].nan_to_num(7.5), ours[name].nan_to_num(7.5))]
    assert differing == []
    # The control: with the ring's rows but without its position, the run goes on, elsewhere.
    lost = kind.load(tmp_path / "half")
    state = lost.replay.state()
    lost.replay.load_state({"rows": state["rows"].clone(), "added": torch.full((2,), 37)})
    theirs = all_tensors(lost.learn(56), tmp_path)
    assert not torch.equal(whole["network/actor.net.weights.0"], theirs["network/actor.net.weights.0"])


@BOTH
def test_a_seed_learns_the_same_alone_and_among_others(kind) -> None:
    options = SMALL | {"normalize_obs": True}
    together = kind("Pendulum-v1", [2, 7, 9], **options).learn(70)
    alone = kind("Pendulum-v1", [7], **options).learn(70)
    other = kind("Pendulum-v1", [9], **options).learn(70).networks.state_dict()
    ours, theirs = together.select(1).networks.state_dict(), alone.networks.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-9)
    assert not torch.allclose(theirs["actor.net.weights.0"], other["actor.net.weights.0"])  # the control


@BOTH
def test_the_exported_policy_is_the_one_that_predicts(kind) -> None:
    agent = kind(Noise, [1, 2], **SMALL | {"normalize_obs": True}).learn(40)
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    plain = agent.plain_policy(1)(torch.tensor(obs, dtype=torch.float64)).detach().numpy()
    np.testing.assert_allclose(plain, agent.select(1).predict(obs)[0], rtol=1e-6)
    assert (plain > LOW).all()
    assert (plain < HIGH).all()


# ---------------------------------------------------------------------------------------------------- plain twins

STEPS = 6


def value_of(net: nn.Module, *inputs: Tensor) -> Tensor:
    return net(torch.cat(inputs, dim=1)).squeeze(1)


def average(target: nn.Module, online: nn.Module, tau: float) -> None:
    for p_target, p in zip(target.parameters(), online.parameters(), strict=True):
        p_target.data = tau * p.data + (1 - tau) * p_target.data


def largest_difference(net: StackedMLP, plain: nn.Sequential, index: Any) -> float:
    linears = [layer for layer in plain if isinstance(layer, nn.Linear)]
    pairs = [(w[index], layer.weight) for w, layer in zip(net.weights, linears, strict=True)]
    pairs += [(b[index], layer.bias) for b, layer in zip(net.biases, linears, strict=True)]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def gaussian(net: nn.Module, obs: Tensor) -> Normal:
    mean, log_std = net(obs).chunk(2, 1)
    return Normal(mean, log_std.clamp(-20, 2).exp())


def squashed_density(policy: Normal, latent: Tensor) -> Tensor:
    """Log-density of each component of tanh(latent), by the change of variables."""
    return policy.log_prob(latent) - torch.log(1 - torch.tanh(latent) ** 2)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Twin:
    """One seed's actor and critics; `wrong` names the deliberate mistake."""

    def __init__(self, agent: Any, seed: int, wrong: str) -> None:
        self.agent, self.seed, self.wrong, self.config = agent, seed, wrong, agent.config
        self.actor = plain_mlp(agent.actor.net, seed)
        self.q1, self.q2 = (plain_mlp(agent.critic.net, (seed, member)) for member in (0, 1))
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=self.config.actor_lr)

    def batch(self, index: int) -> Batch:
        batch = of_seed(self.agent.sample(index), self.seed)
        if self.wrong == "termination ignored":
            return batch._replace(terminated=torch.zeros_like(batch.terminated))
        return batch

    def smaller(self, obs: Tensor, action: Tensor) -> Tensor:
        pick = torch.maximum if self.wrong == "larger critic" else torch.minimum
        return pick(value_of(self.q1, obs, action), value_of(self.q2, obs, action))

    def critic_loss(self, batch: Batch, target: Tensor) -> Tensor:
        first = (value_of(self.q1, batch.obs, batch.action) - target) ** 2
        second = (value_of(self.q2, batch.obs, batch.action) - target) ** 2
        return (first.mean() + second.mean()) / 2

    def pairs(self) -> list[tuple[StackedMLP, nn.Sequential, Any]]:
        critic = self.agent.critic.net
        actor = (self.agent.actor.net, self.actor, self.seed)
        return [actor, (critic, self.q1, (self.seed, 0)), (critic, self.q2, (self.seed, 1))]

    def difference(self) -> float:
        return max(largest_difference(*pair) for pair in self.pairs())


class PlainSAC(Twin):
    def __init__(self, agent: SAC, seed: int, wrong: str) -> None:
        super().__init__(agent, seed, wrong)
        self.q1_target, self.q2_target = (plain_mlp(agent.critic.net, (seed, member)) for member in (0, 1))
        self.critic_optimizer = torch.optim.Adam(
            [*self.q1.parameters(), *self.q2.parameters()], lr=self.config.critic_lr
        )
        self.log_alpha = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=self.config.entropy_lr)

    def step(self, index: int) -> None:
        batch, delay = self.batch(index), self.config.policy_delay
        noise = self.agent.update_noise.normal(index, (1 + delay, *batch.action.shape))[self.seed]
        alpha = self.alpha()
        with torch.no_grad():
            policy = gaussian(self.actor, batch.next_obs)
            latent = policy.mean + policy.stddev * noise[0]
            action, log_prob = torch.tanh(latent), self.log_prob(policy, latent)
            q1, q2 = (self.q1, self.q2) if self.wrong == "no target critics" else (self.q1_target, self.q2_target)
            q = torch.minimum(value_of(q1, batch.next_obs, action), value_of(q2, batch.next_obs, action))
            if self.wrong == "no entropy in the target":
                log_prob = torch.zeros_like(log_prob)
            target = batch.reward + 0.99 * (1 - batch.terminated) * (q - alpha * log_prob)
        if self.wrong == "policy before critics":
            self.policy_step(batch.obs, noise[1])
        descend(self.critic_optimizer, self.critic_loss(batch, target))
        if (index + 1) % delay == 0 and self.wrong != "policy before critics":
            for eps in noise[1:]:
                self.policy_step(batch.obs, eps)
        average(self.q1_target, self.q1, 0.005)
        average(self.q2_target, self.q2, 0.005)

    def alpha(self) -> float:
        return self.log_alpha.exp().item() if self.config.entropy_coef is None else self.config.entropy_coef

    def log_prob(self, policy: Normal, latent: Tensor) -> Tensor:
        without = self.wrong == "no Jacobian"
        return (policy.log_prob(latent) if without else squashed_density(policy, latent)).sum(1)

    def policy_step(self, obs: Tensor, eps: Tensor) -> None:
        policy, alpha = gaussian(self.actor, obs), self.alpha()
        latent = policy.mean + policy.stddev * eps
        log_prob = self.log_prob(policy, latent)
        alpha_loss = -(self.log_alpha * (log_prob.detach() - 2)).mean()  # the target entropy is -d_a = -2
        if self.wrong == "new coefficient in the policy step":
            descend(self.alpha_optimizer, alpha_loss)
            alpha = self.alpha()
        descend(self.actor_optimizer, (alpha * log_prob - self.smaller(obs, torch.tanh(latent))).mean())
        if self.config.entropy_coef is None and self.wrong != "new coefficient in the policy step":
            descend(self.alpha_optimizer, alpha_loss)

    def pairs(self) -> list[tuple[StackedMLP, nn.Sequential, Any]]:
        target = self.agent.critic_target.net
        return [*super().pairs(), (target, self.q1_target, (self.seed, 0)), (target, self.q2_target, (self.seed, 1))]

    def difference(self) -> float:
        gap = abs(float(self.agent.entropy_coefficient()[self.seed]) - self.alpha())
        return max(super().difference(), gap)


class PlainMDPO(Twin):
    def __init__(self, agent: OffPolicyMDPO, seed: int, wrong: str) -> None:
        super().__init__(agent, seed, wrong)
        self.old_actor = plain_mlp(agent.actor.net, seed)
        self.value, self.value_target = (plain_mlp(agent.value.net, seed) for _ in range(2))
        parameters = [*self.q1.parameters(), *self.q2.parameters(), *self.value.parameters()]
        self.critic_optimizer = torch.optim.Adam(parameters, lr=self.config.critic_lr)

    def step(self, index: int) -> None:
        batch, c = self.batch(index), self.config.kl_coef
        obs, entropy_coef, q_index = batch.obs, self.config.entropy_coef, self.config.tsallis_index
        eps = self.agent.update_noise.normal(index, batch.action.shape)[self.seed]

        policy, old = gaussian(self.actor, obs), gaussian(self.old_actor, obs)
        if self.wrong == "old policy is the policy":
            old = Normal(policy.mean.detach(), policy.stddev.detach())
        latent = policy.mean + policy.stddev * eps
        action = torch.tanh(latent)
        log_q = self.tsallis(squashed_density(policy, latent))
        old_log_q = self.tsallis(squashed_density(old, latent))
        if self.wrong == "no gradient through the action in the old density":
            old_log_q = old_log_q.detach()
        q = self.smaller(obs, action) if self.wrong == "minimum in the policy loss" else value_of(self.q1, obs, action)
        factor = 1.0 if self.wrong == "no index before the old density" else q_index
        policy_loss = (c * log_q + factor * (entropy_coef - c) * old_log_q - q).mean()
        size = (policy.mean**2).mean() + (policy.stddev.log() ** 2).mean()
        policy_loss = policy_loss + 1e-3 * size
        v_target = (self.smaller(obs, action) - entropy_coef * log_q).detach()
        if self.wrong == "column minus row in the target of V":
            v_target = v_target + entropy_coef * (log_q - log_q.mean()).detach()
        descend(self.actor_optimizer, policy_loss)

        with torch.no_grad():
            next_value = value_of(self.value_target, batch.next_obs)
            target = batch.reward + 0.99 * (1 - batch.terminated) * next_value
        value_loss = ((value_of(self.value, obs) - v_target) ** 2).mean() / 2
        descend(self.critic_optimizer, self.critic_loss(batch, target) + value_loss)
        average(self.value_target, self.value, 0.005)

    def tsallis(self, log_density: Tensor) -> Tensor:
        index = self.config.tsallis_index
        if self.wrong == "Tsallis logarithm of the product":
            log_density = log_density.sum(1, keepdim=True)
        if index == 1:
            return log_density.sum(1)
        return ((log_density.exp() ** (index - 1) - 1) / (index - 1)).sum(1)

    def pairs(self) -> list[tuple[StackedMLP, nn.Sequential, Any]]:
        names = ("old_actor", "value", "value_target")
        return [*super().pairs(), *((getattr(self.agent, n).net, getattr(self, n), self.seed) for n in names)]


def twin_difference(kind: Any, plain: type[Twin], wrong: str = "", **options: Any) -> float:
    """The largest difference of a parameter after some updates of an agent whose replay holds some of its steps."""
    agent = kind(Noise, [4, 9], **SMALL | {"learning_starts": 60, "actor_lr": 1e-2, "critic_lr": 3e-2} | options)
    for _ in range(60):
        agent.remember(agent.collect())
    twins = [plain(agent, seed, wrong) for seed in range(2)]
    for index in range(STEPS):
        for twin in twins:
            twin.step(index)
        agent.update(agent.sample(index), index)
    return max(twin.difference() for twin in twins)


@pytest.mark.rung(1, "online.sac")
@pytest.mark.parametrize(
    "options", [{"entropy_lr": 1e-2}, {"entropy_coef": 0.3}, {"policy_delay": 2, "entropy_lr": 1e-2}]
)
def test_sac_equals_the_plain_implementation(options) -> None:
    assert twin_difference(SAC, PlainSAC, **options) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "termination ignored",
        "larger critic",
        "no target critics",
        "no entropy in the target",
        "no Jacobian",
        "policy before critics",
        "new coefficient in the policy step",
    ],
)
def test_sac_controls(wrong) -> None:
    assert twin_difference(SAC, PlainSAC, wrong, entropy_lr=1e-2) > 1e-7


@pytest.mark.rung(1, "online.mdpo_off")
@pytest.mark.parametrize("index", [1.0, 1.5, 2.0])
def test_mdpo_equals_the_plain_implementation(index) -> None:
    assert twin_difference(OffPolicyMDPO, PlainMDPO, tsallis_index=index) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "termination ignored",
        "larger critic",
        "minimum in the policy loss",
        "old policy is the policy",
        "no gradient through the action in the old density",
        "no index before the old density",
        "Tsallis logarithm of the product",
        "column minus row in the target of V",
    ],
)
def test_mdpo_controls(wrong) -> None:
    assert twin_difference(OffPolicyMDPO, PlainMDPO, wrong, tsallis_index=1.5) > 1e-7
