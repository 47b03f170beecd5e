"""PROPS: whole iterations against plain PyTorch, its buffer, its effect on the sampling error, and exact resumption."""

import math
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from corollary.core.errors import ConfigError
from corollary.online import PPO, PROPS, PROPSConfig, sampling_error
from corollary.online.on_policy import Samples

from .plain import Plain, Scene, probabilities, samples_of, tabular


class Drift(gymnasium.Env):
    """A point pushed by two actions: episodes end by leaving the ball of radius 2 or after 11 steps."""

    observation_space = spaces.Box(-10, 10, (3,))
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.x = 0, self.np_random.normal(size=3)
        return self.x.astype(np.float32), {}

    def step(self, action):
        self.time += 1
        self.x = self.x + 0.3 * np.array([*action, 0.0]) + 0.3 * self.np_random.normal(size=3)
        return self.x.astype(np.float32), -float(self.x @ self.x), bool(self.x @ self.x > 4), self.time == 11, {}


SMALL = {"hidden": (8, 6), "n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 3}
SMALL |= {"behaviour_steps": 4, "behaviour_batch_size": 8, "behaviour_epochs": 3}
CAPACITY, LEAVING = 2 * 2 * 16, 2 * 4  # rows of two environments: in two batches, and in the steps that leave next


# ----------------------------------------------------------------------------------------------- pieces, by hand


def one_state(**options) -> PROPS:
    """Two actions in one state, both with probability 1/2; the buffer holds 5 steps and one is about to leave."""
    shared = {"seeds": 1, "precision": "float64", "hidden": (), "n_steps": 3, "batch_size": 3}
    shared |= {"behaviour_steps": 1, "behaviour_batch_size": 5, "behaviour_target_kl": None, "kl_coef": 0.0}
    shared |= {"max_grad_norm": None}
    return PROPS(lambda: Scene(1, spaces.Discrete(2)), **shared | options)


def behaviour_probabilities(agent: PROPS) -> list[float]:
    obs = torch.ones(1, 1, 1, dtype=torch.float64)
    return torch.softmax(agent.behaviour(obs).logits.detach(), -1)[0, 0].tolist()


@pytest.mark.rung(1, "online.props")
@pytest.mark.parametrize("counts", [(3, 2), (2, 3), (5, 0)])
def test_the_rarer_action_becomes_likelier(counts) -> None:
    agent = one_state()
    samples = tabular(agent, list(counts), [0.0, 0.0])
    # `tabular` makes the policy that fits the counts; the target policy is the uniform one.
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.zero_()
    samples = samples_of(agent, samples.obs, samples.action, samples.advantage)
    agent.adapt(samples)
    common, rare = (0, 1) if counts[0] > counts[1] else (1, 0)
    found = behaviour_probabilities(agent)
    assert found[rare] > 0.5 > found[common]
    assert probabilities(agent)[0].tolist() == [0.5, 0.5]


@pytest.mark.rung(1, "online.props")
def test_balanced_actions_leave_the_behaviour_at_the_target() -> None:
    agent = one_state(behaviour_batch_size=4)
    agent.adapt(tabular(agent, [2, 2], [0.0, 0.0]))
    assert behaviour_probabilities(agent) == pytest.approx([0.5, 0.5], abs=1e-12)


@pytest.mark.rung(1, "online.props")
def test_first_step_by_hand() -> None:
    # Where phi = theta, dL / d logit_k is the mean of 1[a = k] - pi_k: 4/5 - 1/2 and 1/5 - 1/2, so Adam's first step
    # moves the logits by -+ the learning rate (but for its epsilon), and their difference by twice that per parameter:
    # bias and weight, as the state is 1.
    agent = one_state(behaviour_epochs=1, behaviour_learning_rate=0.01)
    obs = torch.ones(1, 5, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.zero_()
    action = torch.tensor([0, 0, 0, 0, 1]).view(1, 5, 1)
    agent.adapt(samples_of(agent, obs, action, torch.zeros(1, 5, dtype=torch.float64)))
    expected = 1 / (1 + math.exp(2 * 2 * 0.01 * 0.3 / (0.3 + 1e-5)))
    assert behaviour_probabilities(agent)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.rung(1, "online.props")
@pytest.mark.parametrize(("ratio", "moves"), [(0.69, False), (0.71, True)])
def test_no_gradient_below_one_minus_epsilon(ratio, moves) -> None:
    agent = one_state()
    samples = tabular(agent, [4, 1], [0.0, 0.0])
    # As if the target policy's probabilities had been higher, which makes every r equal to `ratio`.
    shifted = samples.log_prob - math.log(ratio)
    agent.adapt(Samples(**vars(samples) | {"log_prob": shifted}))
    same = torch.equal(agent.behaviour.net.biases[0], agent.actor.net.biases[0])
    assert same != moves


@pytest.mark.parametrize(
    ("kl_coef", "expected"),
    [
        # Four of five samples have the first action, of probability p under phi and 1/2 under theta, so that
        # L(p) = 4/5 2 p + 1/5 2 (1 - p) - lambda log(4 p (1 - p)) / 2 while both r exceed 0.7: p = 0.35 or more.
        # L' = 0 is 6/5 p (1 - p) = lambda (1/2 - p), a quadratic equation.
        (2.0, (1.6 - math.sqrt(1.36)) / 1.2),
        (30.0, (1.04 - math.sqrt(1.0016)) / 0.08),
        # Below that only the other action's term has a gradient, and it raises p.
        (0.0, 0.35),
    ],
)
def test_adaptation_comes_to_rest_where_computed(kl_coef, expected) -> None:
    agent = one_state(kl_coef=kl_coef, behaviour_epochs=400, behaviour_learning_rate=0.002)
    samples = tabular(agent, [4, 1], [0.0, 0.0])
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.zero_()
    agent.adapt(samples_of(agent, samples.obs, samples.action, samples.advantage))
    assert behaviour_probabilities(agent)[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("direction", "reduce", "expected"),
    [
        # p: means (0, 1), deviations (1, 1/2); q: (1/2, 1/2), (4/5, 1): the reference's vector for two Gaussians.
        ("target_behaviour", "sum", 0.6965661292),
        ("target_behaviour", "mean", 0.6965661292 / 2),
        ("behaviour_target", "sum", 1.4749963708),
        ("behaviour_target", "mean", 1.4749963708 / 2),
    ],
)
def test_divergence_by_hand(direction, reduce, expected) -> None:
    agent = PROPS(Drift, precision="float64", kl_direction=direction, kl_reduce=reduce)

    def parameters(mean: tuple[float, float], std: tuple[float, float]) -> Tensor:
        return torch.tensor([[[*mean, math.log(std[0]), math.log(std[1])]]], dtype=torch.float64)

    target, behaviour = parameters((0, 1), (1, 0.5)), parameters((0.5, 0.5), (0.8, 1))
    batch = SimpleNamespace(parameters=target, action=torch.zeros(1, 1, 2))
    distribution = agent.actor(torch.zeros(1, 1, 3, dtype=torch.float64)).rebuild(behaviour)
    assert agent.divergence(distribution, batch).item() == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------------------ the sampling error


def test_sampling_error_of_counts() -> None:
    """One state, target (1/2, 1/2), three of four actions the first: KL((3/4, 1/4) || (1/2, 1/2))."""
    agent = PROPS(lambda: Scene(1, spaces.Discrete(2)), seeds=2, precision="float64", hidden=())
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.zero_()
    obs = torch.ones(2, 4, 1, dtype=torch.float64)
    action = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 1]]).unsqueeze(-1)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = sampling_error(agent.actor, obs, action, learning_rate=0.05, n_steps=400)
    torch.testing.assert_close(found, torch.tensor([expected, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
    assert all((p == 0).all() for p in agent.actor.parameters())
    # Rows that are no transitions do not count: without the last row all actions are the first, and half are.
    weight = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]], dtype=torch.float64)
    found = sampling_error(agent.actor, obs, action, weight, learning_rate=0.05, n_steps=400)
    third = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    torch.testing.assert_close(found, torch.tensor([third, third], dtype=torch.float64), rtol=0, atol=1e-6)


def test_sampling_error_of_a_gaussian() -> None:
    """N(0, 1) against data with mean m and variance v: (v + m^2 - 1 - log v) / 2 per component."""
    agent = PROPS(Drift, precision="float64", hidden=())
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.zero_()
    action = torch.tensor([[[1.0, -2.0], [3.0, -2.0], [1.0, 1.0], [3.0, 1.0]]], dtype=torch.float64)
    found = sampling_error(agent.actor, torch.zeros(1, 4, 3).double(), action, learning_rate=0.02, n_steps=1500)
    mean, var = action[0].mean(0), action[0].var(0, correction=0)
    expected = 0.5 * (var + mean**2 - 1 - var.log()).sum()
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_sampling_error_keeps_the_hidden_layers_and_is_never_negative() -> None:
    """Random features of distinct states cannot explain everything; a table can."""
    agent = PROPS(lambda: Scene(6, spaces.Discrete(3)), seeds=3, precision="float64", hidden=(2,))
    obs = torch.eye(6, dtype=torch.float64).repeat(2, 1).expand(3, -1, -1)
    action = torch.tensor([0, 1, 2, 0, 1, 2] * 2).view(1, 12, 1).expand(3, -1, -1)
    zero = sampling_error(agent.actor, obs, action, n_steps=1)
    assert (zero == 0).all()
    with torch.no_grad():
        begin = agent.actor(obs).log_prob(action).mean(1)
    found = sampling_error(agent.actor, obs, action, learning_rate=0.05, n_steps=300)
    assert (found > 0).all()
    assert (begin + found < -0.05).all()  # a table would reach a likelihood of 1
    table = PROPS(lambda: Scene(6, spaces.Discrete(3)), seeds=3, precision="float64", hidden=())
    with torch.no_grad():
        begin = table.actor(obs).log_prob(action).mean(1)
    assert (begin + sampling_error(table.actor, obs, action, learning_rate=0.05, n_steps=300) > -0.05).all()


# -------------------------------------------------------- sampling a fixed policy, exactly measured (reference 7.6)


class Chain(gymnasium.Env):
    """Ten states, four actions, random transitions, no end."""

    observation_space, action_space = spaces.Discrete(10), spaces.Discrete(4)
    next_state = np.random.default_rng(0).dirichlet(np.full(10, 0.3), (10, 4)).cumsum(-1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(10))
        return self.state, {}

    def step(self, action):
        row = self.next_state[self.state, action]
        self.state = min(int(np.searchsorted(row, self.np_random.random())), 9)
        return self.state, 0.0, False, False, {}


def tabular_error(seeds: list[int], n_steps: int, epochs: int) -> float:
    """Mean over seeds of ``sum_s d(s) KL(empirical || target)``, from counts, after sampling a random fixed policy."""
    agent = PROPS(
        Chain,
        seeds,
        **{"hidden": (), "normalize_obs": False, "normalize_reward": "none", "n_steps": n_steps, "buffer_batches": 1},
        **{"batch_size": n_steps, "behaviour_steps": 10, "behaviour_epochs": epochs, "behaviour_batch_size": n_steps},
        **{"behaviour_learning_rate": 0.03, "kl_coef": 0.1, "behaviour_target_kl": 0.1},
    )
    with torch.no_grad():
        agent.actor.net.weights[0].copy_(agent.stream("test").normal(0, (4, 10)))
        agent.behaviour.load_state_dict(agent.actor.state_dict())
        target = agent.actor(torch.eye(10).expand(len(seeds), -1, -1)).table.double()
    rollout = agent.collect()
    states, actions = rollout.raw_obs[:, :, 0].double(), nn.functional.one_hot(rollout.action[:, :, 0, 0], 4).double()
    counts = torch.einsum("sbx,sba->sxa", states, actions)
    assert (counts.sum((1, 2)) == n_steps).all()
    empirical = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return float((torch.special.xlogy(counts, empirical / target)).sum((1, 2)).mean() / n_steps)


@pytest.mark.theory
@pytest.mark.rung(3, "online.props")
@pytest.mark.rung(6, "online.props")
def test_sampling_error_on_tables_falls_below_half() -> None:
    """An independent computation had 0.0297 for on-policy sampling after 500 steps, and 0.32 of that with PROPS."""
    on_policy = tabular_error(list(range(12)), 500, epochs=0)
    assert on_policy == pytest.approx(0.0297, rel=0.2)
    assert tabular_error(list(range(12)), 500, epochs=16) < 0.5 * on_policy
    # The control: on-policy sampling again, with other seeds.
    assert tabular_error(list(range(100, 112)), 500, epochs=0) == pytest.approx(on_policy, rel=0.25)


@pytest.mark.slow
@pytest.mark.theory
@pytest.mark.rung(6, "online.props")
def test_sampling_error_on_tables_after_2000_steps() -> None:
    on_policy = tabular_error(list(range(40)), 2000, epochs=0)
    ratio = tabular_error(list(range(40)), 2000, epochs=16) / on_policy
    assert ratio < 0.5, ratio


# ----------------------------------------------------------- whole iterations against a second implementation


class Recorded(PROPS):
    """Notes what each PPO update and each adaptation is given."""

    def build(self) -> None:
        super().build()
        self.events = []

    def improve(self, samples, rollout):
        orders = [self.permutation(epoch, len(samples)) for epoch in range(self.config.n_epochs)]
        self.events.append(("improve", samples, orders))
        return super().improve(samples, rollout)

    def adapt(self, samples):
        piece, size = self.step // LEAVING, min(len(samples), CAPACITY - LEAVING)
        draws = (self._behaviour_shuffle.uniform(piece * 3 + epoch, (size,)) for epoch in range(3))
        self.events.append(("adapt", samples, [torch.argsort(each, dim=1, stable=True) for each in draws]))
        return super().adapt(samples)


class PlainPROPS(Plain):
    """One seed's loop from the paper; `wrong` names the deliberate mistake."""

    def __init__(self, agent: PROPS, seed: int, wrong: str) -> None:
        super().__init__(agent, seed)
        self.wrong = wrong
        self.phi = Plain(agent, seed)
        self.phi.agent, self.phi.critics = SimpleNamespace(actor=agent.behaviour), {}
        self.begin_adam()
        self.stops = {"improve": 0, "adapt": 0}

    def begin_adam(self) -> None:
        self.phi_optimizer = torch.optim.Adam(
            self.phi.actor_parameters, lr=self.config.behaviour_learning_rate, eps=1e-5
        )

    def improve(self, samples: Samples, orders: list[Tensor]) -> None:
        (everything,) = self.rows(samples, torch.arange(len(samples)).expand(2, -1), len(samples))
        assert (self.ratio(everything) - 1).abs().max() < 1e-9  # on old data too
        for order in orders:
            for batch in self.rows(samples, order, 16):
                ratio = self.ratio(batch)
                if (ratio - 1 - ratio.log()).mean() > self.config.target_kl:
                    self.stops["improve"] += 1
                    return
                advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
                loss = -torch.min(advantage * ratio, advantage * ratio.clamp(0.8, 1.2)).mean()
                loss = loss + 0.5 * 0.5 * self.clipped_value_error(batch, 0.2)
                self.step(loss - 0.01 * self.distribution(batch.obs).entropy().mean(), 0.5)

    def adapt(self, samples: Samples, orders: list[Tensor]) -> None:
        if self.wrong != "phi does not return to theta":
            for mine, theirs in zip(self.phi.actor_parameters, self.actor_parameters, strict=True):
                mine.data.copy_(theirs.data)
        if self.wrong == "Adam begins anew":
            self.begin_adam()
        size = CAPACITY - LEAVING
        kept = slice(size) if self.wrong == "the newest steps left out" else slice(-size, None)
        kept_samples = Samples(**{name: None if x is None else x[:, kept] for name, x in vars(samples).items()})
        for order in orders:
            for batch in self.rows(kept_samples, order, 8):
                ratio = self.phi.ratio(batch)
                distance = (ratio - 1 - ratio.log()).mean()
                if distance > self.config.behaviour_target_kl and self.wrong != "never stops":
                    self.stops["adapt"] += 1
                    return
                pushed = torch.max(ratio, ratio.clamp(0.7, 1.3)).mean()
                if self.wrong == "pushes up":
                    pushed = -pushed
                pair = self.old_distribution(batch.parameters), self.phi.distribution(batch.obs)
                if (self.config.kl_direction == "behaviour_target") != (self.wrong == "the other direction"):
                    pair = pair[::-1]
                penalty = torch.distributions.kl_divergence(*pair).mean()
                if self.config.kl_reduce == "mean":
                    penalty = penalty / batch.action.shape[-1]
                self.phi_optimizer.zero_grad()
                (pushed + self.config.kl_coef * penalty).backward()
                nn.utils.clip_grad_norm_(self.phi.actor_parameters, 0.5)
                self.phi_optimizer.step()


def run_differences(env, wrong: str = "", **options) -> tuple[float, float]:
    """Largest differences after three iterations, in which the buffer fills and the stops bind."""
    shared = {"learning_rate_decay": "none", "learning_rate": 0.01, "behaviour_learning_rate": 0.01}
    agent = Recorded(env, seeds=[4, 9], precision="float64", **SMALL | shared | options)
    plain = [PlainPROPS(agent, seed, wrong) for seed in range(2)]
    for _ in range(3):
        agent.iterate(0.0)
    assert [name for name, *_ in agent.events] == ["adapt", "adapt", "adapt", "improve", "adapt"] * 3
    assert [len(samples) for _, samples, _ in agent.events] == [8, 16, 24, 32, 32, 40, 48, 56, *[64] * 7]
    for each in plain:
        for name, *event in agent.events:
            getattr(each, name)(*event)
    if not wrong:
        assert sum(each.stops["improve"] for each in plain) > 0
        assert 0 < sum(each.stops["adapt"] for each in plain) < 24
    return max(each.difference() for each in plain), max(each.phi.difference() for each in plain)


LIMITS = {"target_kl": 0.02, "behaviour_target_kl": 0.02}


@pytest.mark.rung(1, "online.props")
@pytest.mark.parametrize(
    ("env", "options"),
    [
        ("CartPole-v1", LIMITS | {"target_kl": 0.002}),
        (Drift, LIMITS),
        (Drift, LIMITS | {"kl_direction": "behaviour_target", "kl_reduce": "mean"}),
        (Drift, LIMITS | {"stale_target_logp": True}),
    ],
)
def test_iterations_equal_the_plain_implementation(env, options) -> None:
    assert max(run_differences(env, **options)) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        *("phi does not return to theta", "Adam begins anew", "the newest steps left out", "never stops"),
        *("pushes up", "the other direction"),
    ],
)
def test_iteration_controls(wrong) -> None:
    target, behaviour = run_differences(Drift, wrong, **LIMITS)
    assert target < 1e-10  # given the same data, PPO's part does not depend on it
    assert behaviour > 1e-7


def test_stale_log_probabilities_are_those_before_the_update() -> None:
    for stale in (False, True):
        agent = Recorded("CartPole-v1", **SMALL | {"stale_target_logp": stale, "learning_rate": 0.01})
        agent.iterate(0.0)
        *_, (_, before, _), (_, given, _) = agent.events
        assert torch.equal(before.log_prob, given.log_prob) == stale
        with torch.no_grad():
            now = agent.actor(given.obs).log_prob(given.action)
        assert torch.allclose(given.log_prob, now) != stale


def test_without_adaptation_and_old_batches_it_is_ppo() -> None:
    options = {"n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 3, "normalize_obs": False}
    options |= {"normalize_reward": "none", "value_clip": 0.2, "joint_grad_norm": True, "entropy_coef": 0.01}
    ppo = PPO("CartPole-v1", learning_rate=1e-3, **options).learn(128)
    more = {"behaviour_epochs": 0, "behaviour_steps": 4, "buffer_batches": 1, "target_kl": None}
    props = PROPS("CartPole-v1", **options, **more).learn(128)
    for name in ("actor", "critic"):
        ours, theirs = props.networks[name].state_dict(), ppo.networks[name].state_dict()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), (name, key)


# -------------------------------------------------------------------------------------------------- the buffer


class Pieces(PROPS):
    """Keeps every piece of experience."""

    def build(self) -> None:
        super().build()
        self.pieces = []

    def take_steps(self, behaviour, noise):
        self.pieces.append(super().take_steps(behaviour, noise))
        return self.pieces[-1]


def test_buffer_is_the_latest_steps_normalised_with_the_statistics_of_now() -> None:
    agent = Pieces(Drift, seeds=2, **SMALL | {"buffer_batches": 3})
    for _ in range(5):
        agent.iterate(0.0)
    buffer = agent.buffer()
    latest = agent.pieces[-3 * 4 :]
    for name in ("raw_obs", "raw_next_obs", "action", "raw_reward", "terminated", "truncated"):
        assert torch.equal(getattr(buffer, name), torch.cat([getattr(piece, name) for piece in latest], 1)), name
    assert buffer.valid is None
    normalised = agent.observation_normaliser.normalize(buffer.raw_obs.numpy())
    np.testing.assert_allclose(buffer.obs, normalised, rtol=1e-6, atol=1e-6)
    reward = buffer.raw_reward.double().numpy() / np.sqrt(agent.reward_normaliser.moments.var + 1e-8)[..., None]
    np.testing.assert_allclose(buffer.reward, np.clip(reward, -10, 10), rtol=1e-5)
    # The control: what the policy saw at the time is something else by now.
    seen = torch.cat([piece.obs for piece in latest], 1)
    assert (seen - buffer.obs)[:, :16].abs().max() > 0.01
    # The update sees old steps with the policy and the statistics of now, so its ratios begin at 1.
    samples = agent.evaluate_rollout(buffer)
    with torch.no_grad():
        again = agent.actor(samples.obs).log_prob(samples.action)
    assert torch.equal(samples.log_prob, again)


def test_advantages_cross_the_seams_of_the_buffer() -> None:
    """One recursion over two batches of pieces: as if the steps had been collected in one go."""
    agent = PROPS("CartPole-v1", precision="float64", **SMALL | {"learning_rate": 1e-3})
    agent.iterate(0.0)
    buffer = agent.collect()
    samples = agent.samples_of(buffer)
    found = agent.with_advantages(samples, buffer).advantage.view(32, 2)
    with torch.no_grad():
        value = samples.value.view(32, 2)
        next_value = agent.critic(buffer.next_obs.flatten(1, 2)).view(32, 2)
    ends = buffer.terminated[0], buffer.terminated[0] | buffer.truncated[0]
    running, expected = torch.zeros(2, dtype=torch.float64), torch.zeros(32, 2, dtype=torch.float64)
    for t in reversed(range(32)):
        terminated, ended = (each[t].double() for each in ends)
        delta = buffer.reward[0, t] + 0.99 * (1 - terminated) * next_value[t] - value[t]
        running = delta + 0.99 * 0.95 * (1 - ended) * running
        expected[t] = running
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not ends[1][15].any()  # an episode does go on across the batches' seam at this seed


def test_new_environments_cut_the_buffer() -> None:
    agent = PROPS("CartPole-v1", **SMALL)
    agent.iterate(0.0)
    before = agent.buffer()
    assert not (before.truncated | before.terminated)[:, -1].any()
    agent.set_env("CartPole-v1")
    agent.collect()
    cut = agent.buffer()
    assert cut.truncated[:, 15].all()
    assert not cut.terminated[:, 15].any()
    whole = PROPS("CartPole-v1", **SMALL)  # the control: the same environments go on
    whole.iterate(0.0)
    whole.collect()
    assert not whole.buffer().truncated[:, 15].any()


# ---------------------------------------------------------------------------------- seeds, state, who acts


def state(agent: PROPS) -> dict[str, Tensor]:
    return agent.state()[1]


def test_seed_learns_the_same_alone_and_among_others() -> None:
    """The stops fall differently on each seed."""
    options = SMALL | LIMITS | {"precision": "float64", "learning_rate": 0.01, "behaviour_learning_rate": 0.01}
    among = PROPS("CartPole-v1", seeds=[3, 7, 5], **options).learn(192)
    alone = PROPS("CartPole-v1", seeds=[7], **options).learn(192)
    steps = state(among)["optimizer/behaviour/behaviour/step"]
    assert len(set(steps.tolist())) == 3
    expected, found = state(alone), state(among.select(1))
    for name in expected:
        if name.startswith(("network/", "optimizer/", "extra/buffer/")):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("first", [1, 2, 4])
def test_run_saved_in_the_middle_of_the_buffer_goes_on_to_the_bit(first, tmp_path) -> None:
    """Three batches in the buffer: saved when it holds one, when it holds two, and when it has begun to lose some."""
    options = SMALL | {"seeds": 2, "learning_rate_decay": "none", "buffer_batches": 3}
    whole = PROPS("CartPole-v1", **options).learn(32 * 6)
    PROPS("CartPole-v1", **options).learn(32 * first).save(tmp_path / "checkpoint")
    resumed = PROPS.load(tmp_path / "checkpoint").learn(32 * (6 - first))
    expected, found = state(whole), state(resumed)
    assert expected.keys() == found.keys()
    assert expected["extra/buffer/raw_obs"].shape == (2, 48, 2, 4)
    for name, tensor in expected.items():
        assert torch.equal(tensor.nan_to_num(), found[name].nan_to_num()), name


def test_the_target_policy_acts_and_the_behaviour_policy_explores() -> None:
    agent = Pieces("CartPole-v1", **SMALL)
    obs = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    noise = torch.arange(16).reshape(1, 16, 1) / 16
    before, sampled = agent.predict(obs)[0], agent.act(torch.from_numpy(obs)[None], noise)
    agent._predictions = 0
    with torch.no_grad():
        agent.behaviour.net.biases[-1].copy_(torch.tensor([[50.0, -50.0]]))  # always the first action
    assert np.array_equal(agent.predict(obs)[0], before)
    assert np.array_equal(agent.plain_policy()(torch.from_numpy(obs)).squeeze(-1), before)
    assert 0 < sampled.float().mean() < 1
    agent.collect()
    first, *rest = agent.pieces
    assert (first.action == 0).all()
    assert all((piece.action == 1).any() for piece in rest)  # later ones begin at the target policy again


def test_measures_the_sampling_error_when_asked() -> None:
    reports = []
    options = SMALL | {"sampling_error_every": 2}
    agent = PROPS("CartPole-v1", **options)
    agent.learn(128, log_every=32, callbacks=[lambda _, report: reports.append(report.metrics)])
    assert ["sampling_error" in metrics for metrics in reports] == [False, True, False, True]
    assert reports[1]["sampling_error"][0] > 0


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"behaviour_steps": 100}, "behaviour_steps must be a divisor of n_steps=2048"),
        ({"behaviour_steps": 2048, "buffer_batches": 1}, "behaviour_steps must be less than the buffer holds"),
        ({"behaviour_clip": 1.0}, r"behaviour_clip must be in \(0, 1\)"),
        ({"behaviour_epochs": -1}, "behaviour_epochs must be >= 0"),
        ({"buffer_batches": 0}, "buffer_batches must be >= 1"),
        ({"kl_coef": -0.1}, "kl_coef must be >= 0"),
        ({"target_kl": 0.0}, "target_kl must be > 0, or None"),
    ],
)
def test_settings_out_of_range(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        PROPSConfig(**options)


@pytest.mark.parametrize("name", [*PROPS.presets, None])
def test_presets_have_the_published_numbers_of_minibatches(name) -> None:
    cfg = PROPSConfig(**({} if name is None else PROPS.presets[name].settings))
    held = cfg.buffer_batches * cfg.n_steps
    assert held == 32 * cfg.batch_size
    assert held - cfg.behaviour_steps == (32 if name in ("walker2d", "humanoid") else 16) * cfg.behaviour_batch_size


# -------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.repro
def test_cartpole() -> None:
    """Sampling error below that of PPO with the same buffer, and returns no worse; eight seeds.

    The behaviour policy's step size and lambda are, of seven settings, those that did best on the seeds 10 to 12: 1e-4
    (the authors' for Humanoid) and 1. There the error was 0.0070 against 0.0096 without adaptation; here it is 0.0072
    against 0.0086. With 1e-3, the step size for most of the authors' environments, and lambda = 0.3 it is 0.0105: the
    policy overshoots.
    """
    options = {"n_steps": 1024, "batch_size": 64, "behaviour_batch_size": 112, "sampling_error_every": 4}
    adapted = {"behaviour_learning_rate": 1e-4, "kl_coef": 1.0}
    errors, returns = [], []
    for settings in (adapted, {"behaviour_epochs": 0}):
        measured: list[Tensor] = []
        agent = PROPS("CartPole-v1", 8, **options, **settings)
        agent.learn(49_152, log_every=4096, callbacks=[lambda _, r, m=measured: m.append(r.metrics["sampling_error"])])
        errors.append(np.mean(measured, 0))
        returns.append([np.mean(list(each)[-20:]) for each in agent.recent_returns])
    print(errors, returns)
    difference = errors[0] - errors[1]
    assert difference.mean() + difference.std(ddof=1) / 8**0.5 < 0
    assert np.mean(returns[0]) > np.mean(returns[1]) - 50
