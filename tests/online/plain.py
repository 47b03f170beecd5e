"""A second implementation of what on-policy methods share: one seed, ``nn.Linear``, ``torch.distributions``, loops.

Both start from the same weights and see the same samples in the same order, in float64; after a whole update every
parameter must agree. A method's test adds its loss, and controls with one thing wrong, each of which must be caught.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from corollary.core.networks import StackedMLP
from corollary.online.on_policy import OnPolicyAgent, Samples

Agent = OnPolicyAgent[Any]


class Scene(gymnasium.Env[Any, Any]):
    """Spaces, and episodes of one step without reward: for agents whose batches are made by hand."""

    def __init__(self, observation_dim: int, action_space: gymnasium.Space[Any]) -> None:
        self.observation_space = spaces.Box(-10, 10, (observation_dim,))
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(self.observation_space.shape, np.float32), 0.0, True, False, {}


def samples_of(agent: Agent, obs: Tensor, action: Tensor, advantage: Tensor, target: Tensor | None = None) -> Samples:
    """Samples ``[S, B]`` of the agent's policy and critic as they are."""
    with torch.no_grad():
        old, value = agent.actor(obs), agent.critic(obs)
        return Samples(
            obs=obs,
            action=action,
            log_prob=old.log_prob(action),
            parameters=old.parameters_tensor(),
            advantage=advantage,
            target=value + advantage if target is None else target,
            value=value,
            weight=None,
        )


def tabular(agent: Agent, counts: list[int], q: list[float]) -> Samples:
    """Give the policy of a one-state problem the probabilities counts / B; return action i `counts[i]` times.

    The mean over the B rows is then the exact expectation under the policy. Advantages are q - E q, targets q.
    """
    n, values = torch.tensor(counts), torch.tensor(q, dtype=agent.dtype)
    probability = n / n.sum()
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.zero_()
        agent.actor.net.biases[-1].copy_(probability.log())
    action = torch.repeat_interleave(torch.arange(len(n)), n)
    rows = (len(agent.seeds), len(action))
    advantage = values - (probability * values).sum()
    obs = torch.ones(*rows, agent.problem.observation_dim, dtype=agent.dtype)
    per_row = [each[action].expand(rows) for each in (advantage, values)]
    return samples_of(agent, obs, action.expand(rows).unsqueeze(-1), *per_row)


def probabilities(agent: Agent) -> Tensor:
    """The policy ``[S, n]`` of a one-state problem."""
    obs = torch.ones(len(agent.seeds), 1, agent.problem.observation_dim, dtype=agent.dtype)
    return torch.softmax(agent.actor(obs).logits.detach().squeeze(1), -1)


def after_a_fixed_batch(kind: type[Agent], action_space: gymnasium.Space[Any], **options: Any) -> dict[str, Tensor]:
    """Diagnostics after 160 full-batch steps on one batch of 512 with random advantages; five seeds, eps 0.2.

    The learning rate is large, 0.03: what a method does not hold back moves far.
    """
    agent = kind(
        lambda: Scene(8, action_space),
        **{"seeds": 5, "n_envs": 1, "n_steps": 512, "batch_size": 512, "n_epochs": 160}
        | {"hidden": (64,), "activation": "tanh", "value_coef": 0.0, "adam_eps": 1e-8, "learning_rate": 0.03}
        | options,
    )
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(5, 512, 8, generator=generator)
    draw = torch.randn if agent.actor.noise == "normal" else torch.rand
    with torch.no_grad():
        action = agent.actor(obs).sample(draw(5, 512, agent.problem.action_dim, generator=generator))
    samples = samples_of(agent, obs, action, torch.randn(5, 512, generator=generator))
    agent.improve(samples, agent.collect())
    return agent.diagnose(samples)


def plain_mlp(net: StackedMLP, seed: int) -> nn.Sequential:
    """One seed's network as ``nn.Linear`` modules with copies of the weights."""
    layers: list[nn.Module] = []
    for w, b in zip(net.weights, net.biases, strict=True):
        linear = nn.Linear(w.shape[-1], w.shape[-2], dtype=torch.float64)
        linear.weight.data.copy_(w.data[seed])
        linear.bias.data.copy_(b.data[seed])
        layers += [linear, nn.Tanh() if net.activation == "tanh" else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Plain:
    """One seed's policy and critics, and one Adam over all of them with one gradient norm.

    Args:
        agent: its stacked networks are copied; of its configuration, only what the base documents is read.
        seed: position of the seed.
        critics: names of the value networks.
    """

    def __init__(self, agent: Agent, seed: int, critics: tuple[str, ...] = ("critic",)) -> None:
        self.agent, self.seed, self.config = agent, seed, agent.config
        self.policy = plain_mlp(agent.actor.net, seed)
        log_std = getattr(agent.actor, "log_std", None)
        self.log_std = None if log_std is None else nn.Parameter(log_std.data[seed].clone())
        self.critics = {name: plain_mlp(agent.networks[name].net, seed) for name in critics}
        self.actor_parameters = [*self.policy.parameters(), *([] if self.log_std is None else [self.log_std])]
        self.parameters = [*self.actor_parameters, *(p for net in self.critics.values() for p in net.parameters())]
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.config.learning_rate, eps=self.config.adam_eps)

    def rows(self, samples: Samples, order: Tensor, size: int) -> Iterator[SimpleNamespace]:
        """Minibatches of `size` rows in the given order ``[S, B]``."""
        for start in range(0, len(samples), size):
            chosen = order[self.seed, start : start + size]
            found = {name: each[self.seed][chosen] for name, each in vars(samples).items() if each is not None}
            yield SimpleNamespace(**found)

    def distribution(self, obs: Tensor) -> Distribution:
        outputs = self.policy(obs)
        return Categorical(logits=outputs) if self.log_std is None else gaussian(outputs, self.log_std)

    def old_distribution(self, parameters: Tensor) -> Distribution:
        return Categorical(logits=parameters) if self.log_std is None else gaussian(*parameters.chunk(2, -1))

    def ratio(self, batch: SimpleNamespace) -> Tensor:
        action = batch.action.squeeze(-1) if self.log_std is None else batch.action
        return torch.exp(self.distribution(batch.obs).log_prob(action) - batch.log_prob)

    def value(self, obs: Tensor, critic: str = "critic") -> Tensor:
        return self.critics[critic](obs).squeeze(-1)

    def clipped_value_error(self, batch: SimpleNamespace, clip: float) -> Tensor:
        value = self.value(batch.obs)
        near = batch.value + (value - batch.value).clamp(-clip, clip)
        return torch.max((value - batch.target) ** 2, (near - batch.target) ** 2).mean()

    def step(self, loss: Tensor, max_norm: float) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, max_norm)
        self.optimizer.step()

    def difference(self) -> float:
        """The largest difference between a parameter of the agent and its copy here."""
        pairs = [(self.agent.actor.net, self.policy)]
        pairs += [(self.agent.networks[name].net, net) for name, net in self.critics.items()]
        found = [] if self.log_std is None else [self.agent.actor.log_std[self.seed] - self.log_std]
        for net, copy in pairs:
            for stacked, parameters in ((net.weights, "weight"), (net.biases, "bias")):
                linears = [layer for layer in copy if isinstance(layer, nn.Linear)]
                theirs = [getattr(layer, parameters) for layer in linears]
                found += [a[self.seed] - b for a, b in zip(stacked, theirs, strict=True)]
        return max(float(each.detach().abs().max()) for each in found)


def gaussian(mean: Tensor, log_std: Tensor) -> Distribution:
    return Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)
