"""Offline to online: an agent that was fitted to a dataset goes on learning from an environment.

Nothing is dropped on the switch: networks, optimisers, transforms and step count stay as they are, and the dataset
stays in the batches. One iteration is one step of every environment, after which the agent takes `gradient_steps` of
the updates it took offline, on batches of logged and of experienced rows.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .agent import Metrics
from .checkpoint import below
from .config import Settings
from .environments import Environments, EnvSource, make_environments
from .errors import ConfigError, CorollaryError, EnvironmentMismatchError
from .recent import RecentReturns
from .replay import Replay
from .rollout import Collector
from .transitions import Batch

if TYPE_CHECKING:
    from .offline_agent import OfflineAgent


@dataclass(frozen=True, kw_only=True)
class FineTuning(Settings):
    """How an offline agent learns from an environment.

    Attributes:
        offline_share: share in [0, 1] of each batch that comes from the dataset, exactly ``round(share * batch_size)``
            rows; 0 leaves the dataset aside. ``None`` draws uniformly from dataset and experience together, so the
            dataset's share falls as experience grows.
        gradient_steps: gradient steps after each step of the environments, >= 1.
        n_envs: environments of each seed, >= 1.
        buffer_size: transitions of each seed that are remembered, >= 1; the oldest are forgotten first.
        learning_starts: environment steps of a seed before the first gradient step, >= 0.
        exploration_noise: standard deviation, in half-ranges of the action box, of the noise that a deterministic
            policy explores with, >= 0; a stochastic policy samples instead.
    """

    offline_share: float | None = None
    gradient_steps: int = 1
    n_envs: int = 1
    buffer_size: int = 1_000_000
    learning_starts: int = 0
    exploration_noise: float = 0.1

    def __post_init__(self) -> None:
        """Check types and the ranges given above."""
        super().__post_init__()
        share = self.offline_share
        self.require("offline_share", share is None or 0 <= share <= 1, "in [0, 1], or None")
        for name in ("gradient_steps", "n_envs", "buffer_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_starts", "exploration_noise"):
            self.require(name, getattr(self, name) >= 0, ">= 0")


class Experience:
    """The environments of an offline agent, what it lived through in them, and batches that mix it with the data.

    Args:
        agent: the agent; its problem is known.
        settings: as given to ``learn``.

    Attributes:
        env_steps: environment steps taken so far, per seed.
        replay: the transitions, transformed as the dataset's are.
        recent_returns: of each seed, raw returns of its latest episodes.
    """

    def __init__(self, agent: "OfflineAgent[Any]", settings: FineTuning) -> None:
        self.agent, self.settings = agent, settings
        self.env_steps = self._iteration = 0
        self.recent_returns = RecentReturns(len(agent.seeds))
        problem = agent.problem
        self.replay = Replay(
            agent.seeds, settings.buffer_size, problem.observation_dim, problem.action_dim, agent.device, agent.dtype
        )
        self._exploration, self._mix = agent.stream("exploration"), agent.stream("offline or online")
        self._environments: Environments | None = None
        self._collector: Collector | None = None
        self._resumed: dict[str, NDArray[Any]] | None = None

    # ------------------------------------------------------------------------------------------- environments

    @property
    def environments(self) -> Environments:
        """The environments; raises a :class:`ConfigError` before they are entered."""
        if self._environments is None:
            raise ConfigError("This agent has no environment: call learn(env, n_steps).")
        return self._environments

    def entering(self, source: EnvSource, settings: FineTuning) -> "Experience":
        """Return this experience as it goes on in `source` with `settings`; this one stays where and as it is.

        Its episodes go on there too, unless the number of environments is another.

        Raises:
            ConfigError: as :meth:`change` does.
            EnvironmentMismatchError: if the spaces of `source` are others than the dataset's.
        """
        made = make_environments(source, self.agent.seeds, settings.n_envs)
        entered = copy.copy(self)
        entered._environments, entered._collector, entered._resumed = made, None, self._episodes
        try:
            self.agent.check_spaces(made.name, made.observation_space, made.action_space)
            if made.n_envs != settings.n_envs:
                raise EnvironmentMismatchError(
                    f"{made.name} is a vector of {made.n_envs} environments: pass n_envs={made.n_envs}."
                )
            entered.change(settings)
        except CorollaryError:
            made.close()
            raise
        return entered

    def change(self, settings: FineTuning) -> None:
        """Go on with other settings; raises a :class:`ConfigError` if the buffer would have another size."""
        if settings.buffer_size != self.settings.buffer_size:
            raise ConfigError(
                f"buffer_size was {self.settings.buffer_size} when this agent began to learn from an environment; it "
                f"cannot become {settings.buffer_size}."
            )
        if settings.n_envs != self.settings.n_envs:
            self._resumed = None  # the episodes of the former environments end here
        self.settings = settings

    def move_in(self, agent: "OfflineAgent[Any]", former: "Experience | None") -> None:
        """Become the experience of `agent`, in the environments and with the settings of its `former` one.

        Raises:
            ConfigError: as :meth:`change` does.
        """
        self.agent = agent
        if former is not None:
            self.change(former.settings)
            self._environments = former._environments

    def leave(self) -> None:
        """Close the environments; episodes go on in the same ones when they are entered again."""
        if self._environments is not None:
            self._resumed = self._episodes
            self._environments.close()
        self._environments, self._collector = None, None

    def played_in(self, env: object) -> None:
        """Begin new episodes if others were played in the environment of these."""
        if self._environments is not None and self._environments.holds(env):
            self._collector = self._resumed = None

    @property
    def _episodes(self) -> "dict[str, NDArray[Any]] | None":
        """The state of the running episodes; ``None`` before the first."""
        return self._resumed if self._collector is None else self.environments.state()

    def finished_episodes(self) -> list[tuple[int, float, int]]:
        """Return seed index, raw return and length of the episodes that ended since the last call."""
        episodes = self.environments.finished()
        self.recent_returns.add(episodes)
        return episodes

    # ---------------------------------------------------------------------------------------------- iteration

    def iterate(self) -> Metrics:
        """Take one step of every environment, then the gradient steps; return the diagnostics of the last."""
        agent, settings = self.agent, self.settings
        self._collect()
        metrics: Metrics = {}
        if self.env_steps >= settings.learning_starts:
            for _ in range(settings.gradient_steps):
                metrics |= agent.update(self.batch(agent.step))
                agent.step += 1
        return metrics

    def _collect(self) -> None:
        agent, n_envs = self.agent, self.settings.n_envs
        if self._collector is None:
            state, self._resumed = self._resumed, None
            first = self.environments.reset() if state is None else self.environments.restore(state)
            self._collector = Collector(self.environments, first, len(agent.seeds))
        noise = self._exploration.normal(self._iteration, (1, n_envs, agent.problem.action_dim))
        try:
            rollout = self._collector.collect(self._explore, noise, agent.device, agent.dtype)
        except BaseException:  # nobody knows where the episodes are now
            self._collector = None
            raise
        self.env_steps += n_envs
        self._iteration += 1
        self.replay.add(
            obs=agent.transform_states(rollout.raw_obs.flatten(1, 2)),
            action=rollout.action.flatten(1, 2),
            reward=agent.transform_rewards(rollout.raw_reward.flatten(1, 2)),
            next_obs=agent.transform_states(rollout.raw_next_obs.flatten(1, 2)),
            terminated=rollout.terminated.flatten(1, 2),
            valid=None if rollout.valid is None else rollout.valid.flatten(1, 2),
        )

    def _explore(self, obs: NDArray[Any], noise: NDArray[Any]) -> NDArray[Any]:
        agent = self.agent
        draw = torch.as_tensor(noise, dtype=agent.dtype, device=agent.device)
        action = agent.act(torch.as_tensor(obs), draw)
        if agent.is_deterministic:
            action = agent.box.clip(action + self.settings.exploration_noise * agent.box.half_range * draw)
        acted: NDArray[Any] = action.cpu().numpy()
        return acted

    def batch(self, step: int) -> Batch:
        """Draw the batch of gradient step `step`, a function of (seed, step) and of what was experienced.

        Rows that were experienced have the index -1 and the weight 1.
        """
        size, share, data = self.agent.config.batch_size, self.settings.offline_share, self.agent.data
        lived = self.replay.sample(step, size)
        lived = lived._replace(index=torch.full_like(lived.index, -1))
        if share == 0 or data is None:  # `learn` has refused any other share without data
            return lived
        rows, weight = self.agent.sampler.rows(step, size)
        logged = data.gather(rows, weight)
        if share is None:
            part = len(data) / (len(data) + self.replay.sizes.to(self.agent.dtype))
            from_data = self._mix.uniform(step, (size,)) < part.unsqueeze(1)
        else:
            from_data = torch.arange(size, device=rows.device).expand_as(rows) < round(share * size)
        return mixed(logged, lived, from_data)

    # -------------------------------------------------------------------------------------------------- state

    def description(self) -> dict[str, Any]:
        """Return what is not a tensor, JSON-able."""
        return {"settings": asdict(self.settings), "env_steps": self.env_steps, "iteration": self._iteration}

    @classmethod
    def from_description(cls, agent: "OfflineAgent[Any]", description: Mapping[str, Any]) -> "Experience":
        """Inverse of :meth:`description`; :meth:`load_tensors` does the rest."""
        made = cls(agent, FineTuning(**description["settings"]))
        made.env_steps, made._iteration = description["env_steps"], description["iteration"]
        return made

    def tensors(self) -> dict[str, Tensor]:
        """Return the replay, the environments and the recent returns, each with the seed axis first."""
        found = {"recent_returns": self.recent_returns.tensor()}
        found |= {f"replay/{name}": tensor for name, tensor in self.replay.state().items()}
        episodes = self._episodes or {}
        return found | {f"environments/{name}": torch.from_numpy(array) for name, array in episodes.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned."""
        self.recent_returns.load(tensors["recent_returns"])
        self.replay.load_state(below("replay/", tensors))
        states = {name: tensor.cpu().numpy() for name, tensor in below("environments/", tensors).items()}
        self._resumed = states or None


def mixed(logged: Batch, lived: Batch, from_data: Tensor) -> Batch:
    """Take each row ``[S, B]`` from `logged` where `from_data` is True and from `lived` elsewhere."""
    fields: dict[str, Any] = {}
    for name in ("obs", "action", "reward", "next_obs", "terminated", "next_action", "next_action_valid", "index"):
        ours, theirs = getattr(logged, name), getattr(lived, name)
        mask = from_data if ours.ndim == from_data.ndim else from_data.unsqueeze(-1)
        fields[name] = torch.where(mask, ours, theirs)
    weight = logged.weight
    return Batch(**fields, weight=None if weight is None else torch.where(from_data, weight, 1))
