"""Agents that learn from a dataset: transforms, batches with a seed axis, and the data they were made for."""

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .agent import Agent, Metrics
from .config import OfflineConfig
from .dataset import Batch, Dataset, Transitions
from .errors import CorollaryError, DataError, EnvironmentMismatchError
from .networks import ActionBox
from .transforms import RewardTransform, StateTransform, reward_transform, state_transform

if TYPE_CHECKING:
    from .evaluation import EnvSource
    from .loop import Callback

C = TypeVar("C", bound=OfflineConfig)


@dataclasses.dataclass(frozen=True)
class OfflineProblem:
    """What an agent must know of the dataset it learns from.

    Attributes:
        observation_dim: d_s.
        action_low, action_high: bounds of the action box, d_a numbers each.
        env_id: the environment the data came from, if known.
        ref_min_score, ref_max_score: returns that score 0 and 100, if known.
        dataset: name of the dataset.
        fingerprint: SHA-256 of the dataset's content.
    """

    observation_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    env_id: str | None
    ref_min_score: float | None
    ref_max_score: float | None
    dataset: str
    fingerprint: str

    @property
    def action_dim(self) -> int:
        """d_a."""
        return len(self.action_low)


class OfflineAgent(Agent[C]):
    """Base of the algorithms that learn from a :class:`~corollary.core.dataset.Dataset`.

    Args:
        seeds: how many independent runs to train together (seeds 0, 1, ...), or their seeds as a list. Seed 7 gives
            the same run alone or among others, up to rounding of batched products.
        preset: a name from the class's `presets`; explicit options win over it.
        device: ``"cpu"``, ``"cuda"``, ...
        precision: ``"float32"``; ``"bf16"`` (wide products with bfloat16 inputs, faster where the processor has
            them, not bit-equal); ``"float64"`` for checks.
        **options: fields of the class's configuration.

    Raises:
        ConfigError: for an unknown option or preset, or a value out of range.
    """

    def __init__(
        self,
        seeds: int | Sequence[int] = 1,
        *,
        preset: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        **options: Any,
    ) -> None:
        super().__init__(seeds, preset=preset, device=device, precision=precision, **options)
        self._problem: OfflineProblem | None = None
        self._state_transform: StateTransform | None = None
        self._reward_transform: RewardTransform | None = None

    # ------------------------------------------------------------------------------- what an algorithm defines

    @abstractmethod
    def update(self, batch: Batch) -> Metrics:
        """Take one gradient step (number ``self.step + 1``) for all seeds on a batch with leading axes ``[S, B]``."""

    @abstractmethod
    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Map transformed states ``[S, n, d_s]`` to actions ``[S, n, d_a]``; `noise` ``[S, n, d_a]`` samples."""

    def select_data(self, dataset: Dataset) -> Dataset:
        """Return the part of the dataset that this algorithm learns from (all of it unless overridden)."""
        return dataset

    def on_data(self, data: Transitions) -> None:
        """Precompute what updates need from the transformed transitions (nothing unless overridden)."""

    # ----------------------------------------------------------------------------------------- learning, acting

    def fit(
        self,
        dataset: Dataset,
        n_steps: int,
        *,
        eval_env: "EnvSource | None" = None,
        eval_every: int | None = None,
        eval_episodes: int = 10,
        log_every: int = 1000,
        run_dir: str | Path | None = None,
        save_every: int | None = None,
        resume: bool = False,
        progress: bool | None = None,
        callbacks: Sequence["Callback"] = (),
        command: Mapping[str, Any] | None = None,
    ) -> Self:
        """Take `n_steps` gradient steps on `dataset` for every seed; see :func:`corollary.core.fit.fit`."""
        from .fit import fit

        fit(
            self,
            dataset,
            n_steps,
            eval_env=eval_env,
            eval_every=eval_every,
            eval_episodes=eval_episodes,
            log_every=log_every,
            run_dir=run_dir,
            save_every=save_every,
            resume=resume,
            progress=progress,
            callbacks=callbacks,
            command=command,
        )
        return self

    def prepare(self, dataset: Dataset) -> Transitions:
        """Choose, transform and move the data; build the networks at the first call.

        The transforms' constants are measured at the first call and kept (also in checkpoints), so that further
        training on other data stays in the coordinates that the networks know.

        Raises:
            DataError: if the dataset is not of continuous actions or does not have the shapes of the first one.
        """
        if dataset.action_low is None or dataset.action_high is None:
            raise DataError(f"{self.algorithm} needs continuous actions; {dataset.info.name} has discrete ones.")
        chosen = self.select_data(dataset)
        raw = chosen.transitions(view=self.config.view)
        if self._problem is None:
            self._reward_transform = reward_transform(self.config.reward_transform, chosen)
            self._state_transform = state_transform(self.config.state_transform, raw)
            self._start(_problem_of(dataset))
        elif (dataset.observation_dim, dataset.action_dim) != (
            self.problem.observation_dim,
            self.problem.action_dim,
        ):
            raise DataError(
                f"This agent was built for {self.problem.observation_dim} observation and {self.problem.action_dim} "
                f"action dimensions; {dataset.info.name} has {dataset.observation_dim} and {dataset.action_dim}."
            )
        rewards, states = (
            cast(RewardTransform, self._reward_transform),
            cast(StateTransform, self._state_transform),
        )
        data = dataclasses.replace(
            raw, obs=states(raw.obs), next_obs=states(raw.next_obs), reward=rewards(raw.reward)
        ).to(device=self.device, dtype=self.dtype)
        self.on_data(data)
        return data

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map raw observations ``[S, n, d_s]`` to actions ``[S, n, d_a]`` inside the action box.

        With standard normal `noise` ``[S, n, d_a]`` a stochastic policy samples; a deterministic one ignores it.
        """
        with torch.no_grad():
            transformed = self._states(obs.to(self.device, self.dtype))
            return self.box.clip(self.policy(transformed, noise))

    def encode(self, observations: Sequence[Any]) -> NDArray[Any]:
        """Stack the observations: a dataset's are vectors."""
        return np.asarray(observations)

    def encode_batch(self, observations: Any) -> NDArray[Any]:
        """Return the rows as they are."""
        return np.asarray(observations)

    def is_single(self, observation: Any) -> bool:
        """Whether this is one observation ``[d_s]``; ``[n, d_s]`` is a batch."""
        shape, width = np.shape(observation), self.problem.observation_dim
        if len(shape) not in (1, 2) or shape[-1] != width:
            raise EnvironmentMismatchError(f"predict needs observations [{width}] or [n, {width}]; got shape {shape}.")
        return len(shape) == 1

    def decode(self, actions: NDArray[Any]) -> Sequence[Any]:
        """Return the rows, one for each environment."""
        return list(actions)

    def decode_batch(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Return the rows as they are."""
        return actions

    def normalized_score(self, returns: NDArray[np.float64], env_id: str) -> NDArray[np.float64] | None:
        """``100 (R - R_min) / (R_max - R_min)`` with the dataset's references, if it has them for this environment."""
        low, high = self.problem.ref_min_score, self.problem.ref_max_score
        if low is None or high is None or env_id != self.problem.env_id:
            return None
        return 100 * (np.asarray(returns, np.float64) - low) / (high - low)

    def check_environment(self, env: gymnasium.Env[Any, Any]) -> None:
        """Raise an :class:`EnvironmentMismatchError` unless `env` has the spaces of the dataset."""
        name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
        expected = {"observation": (self.problem.observation_dim,), "action": (self.problem.action_dim,)}
        for kind, space in (("observation", env.observation_space), ("action", env.action_space)):
            if not isinstance(space, gymnasium.spaces.Box) or space.shape != expected[kind]:
                raise EnvironmentMismatchError(
                    f"{name} has {kind} space {space}, but the dataset {self.problem.dataset!r} has {kind}s of shape "
                    f"{expected[kind]}: use the environment that the data came from"
                    + (f" ({self.problem.env_id})." if self.problem.env_id else ".")
                )
        low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
        if not (np.allclose(low, self.problem.action_low) and np.allclose(high, self.problem.action_high)):
            raise EnvironmentMismatchError(
                f"{name} has action bounds {low.tolist()}..{high.tolist()}, but the dataset {self.problem.dataset!r} "
                f"has {list(self.problem.action_low)}..{list(self.problem.action_high)}: rescale one of them."
            )

    # -------------------------------------------------------------------------------------------- exact state

    def description(self) -> dict[str, Any]:
        """Return all that `config.json` of a checkpoint says: settings, seeds, step, problem, transforms."""
        rewards, states = self._reward_transform, self._state_transform
        return {
            "algorithm": self.algorithm,
            "config": dataclasses.asdict(self.config),
            "preset": self.preset,
            "seeds": list(self.seeds),
            "precision": self.precision,
            "step": self.step,
            "problem": dataclasses.asdict(self.problem),
            "reward_transform": dataclasses.asdict(cast(RewardTransform, rewards)),
            "state_transform": dataclasses.asdict(cast(StateTransform, states)),
        }

    @classmethod
    def _from_description(cls, description: Mapping[str, Any], device: torch.device) -> Self:
        agent = cls(description["seeds"], device=device, precision=description["precision"], **description["config"])
        agent._reward_transform = RewardTransform(**description["reward_transform"])
        agent._state_transform = StateTransform(**description["state_transform"])
        problem = {k: tuple(v) if isinstance(v, list) else v for k, v in description["problem"].items()}
        agent._start(OfflineProblem(**cast(dict[str, Any], problem)))
        return agent

    # --------------------------------------------------------------------------------------- building blocks

    @property
    def problem(self) -> OfflineProblem:
        """The problem this agent was built for; raises a :class:`CorollaryError` before the first `fit`."""
        if self._problem is None:
            raise CorollaryError(f"This {type(self).__name__} has not learnt yet: call fit(dataset, n_steps) first.")
        return self._problem

    @property
    def _states(self) -> StateTransform:
        """The fitted state transform; raises as `problem` does."""
        _ = self.problem
        return cast(StateTransform, self._state_transform)

    def _start(self, problem: OfflineProblem) -> None:
        self._problem = problem
        self.box = ActionBox(problem.action_low, problem.action_high, self.dtype).to(self.device)
        self._begin()

    def plain_policy(self, seed_index: int = 0) -> nn.Module:
        """Return one seed's deterministic policy on raw observations ``[n, d_s]`` as an ordinary module."""
        from .export import PlainPolicy

        states = self._states
        # A copy: moving the result to another device or dtype must not take the agent's own action box with it.
        return copy.deepcopy(PlainPolicy(self.plain_actor(seed_index), states, self.box))

    @abstractmethod
    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's deterministic actor on transformed states as an ordinary module."""


def _problem_of(dataset: Dataset) -> OfflineProblem:
    low, high = cast(NDArray[Any], dataset.action_low), cast(NDArray[Any], dataset.action_high)
    return OfflineProblem(
        observation_dim=dataset.observation_dim,
        action_low=tuple(float(x) for x in low),
        action_high=tuple(float(x) for x in high),
        env_id=dataset.info.env_id,
        ref_min_score=dataset.info.ref_min_score,
        ref_max_score=dataset.info.ref_max_score,
        dataset=dataset.info.name,
        fingerprint=dataset.fingerprint,
    )
