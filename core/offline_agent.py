"""Agents that learn from a dataset: transforms, batches with a seed axis, and the data they were made for."""

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .agent import Agent, Metrics
from .checkpoint import below
from .config import OfflineConfig, make_config
from .dataset import Batch, Dataset, Transitions
from .environments import environment_name, is_same_environment
from .errors import CheckpointError, ConfigError, CorollaryError, DataError, EnvironmentMismatchError
from .networks import ActionBox
from .sampling import RowSampler, row_probabilities
from .scores import normalized_score
from .transforms import RewardTransform, StateTransform, reward_transform, state_transform

if TYPE_CHECKING:
    from .environments import Environments
    from .environments import EnvSource as TrainingEnvironment
    from .evaluation import EnvSource
    from .fine_tune import Experience, FineTuning
    from .loop import Callback
    from .recent import RecentReturns

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

    needs_data: ClassVar[bool] = False
    """Whether updates look at the dataset itself and not only at their batches."""

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
        self.online_phase = False  # whether the latest updates were made while learning from an environment
        self.experience: Experience | None = None
        self.data: Transitions | None = None
        self.dataset_card: dict[str, Any] | None = None  # what a run's card says of the dataset behind `data`
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

    @property
    def is_deterministic(self) -> bool:
        """Whether the policy ignores the noise given to :meth:`act`; exploration then adds noise to its actions."""
        return False

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

    def learn(
        self,
        env: "TrainingEnvironment",
        n_steps: int,
        *,
        dataset: Dataset | None = None,
        offline_share: float | None = None,
        gradient_steps: int = 1,
        n_envs: int = 1,
        buffer_size: int = 1_000_000,
        learning_starts: int = 0,
        exploration_noise: float = 0.1,
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
        """Go on learning from an environment: `n_steps` steps of each seed, after a `fit`.

        Networks, optimisers, transforms and data stay as they are; see :mod:`corollary.core.fine_tune`. Call it
        again to go on in the same episodes and with the same experience.

        `env` is a Gymnasium id, a function that makes an environment, or an environment (for one seed). With
        ``resume=True``, `n_steps` is the total to reach. The logged rows of the batches are those of `dataset`, by
        default those of the latest `fit`; a loaded agent needs the dataset again, unless ``offline_share=0``. The
        arguments from `offline_share` to `exploration_noise` are those of
        :class:`~corollary.core.fine_tune.FineTuning`, those from `eval_env` on of
        :func:`corollary.core.learn.learn`.

        Raises:
            CorollaryError: before the first `fit`.
            ConfigError: for a setting out of range, another `buffer_size` than before, or a dataset that is missing.
            EnvironmentMismatchError: if the environment's spaces are others than the dataset's.
        """
        from .fine_tune import FineTuning
        from .learn import check_arguments, learn

        given = {
            "offline_share": offline_share,
            "gradient_steps": gradient_steps,
            "n_envs": n_envs,
            "buffer_size": buffer_size,
            "learning_starts": learning_starts,
            "exploration_noise": exploration_noise,
        }
        settings = make_config(FineTuning, given, {}, None)
        _ = self.problem
        check_arguments(self, n_steps, eval_env, eval_every, eval_episodes, log_every, save_every)
        learn(
            self,
            n_steps,
            self._entering(env, settings, dataset),
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

    @contextmanager
    def _entering(self, env: "TrainingEnvironment", settings: "FineTuning", dataset: Dataset | None) -> Iterator[None]:
        """Take up `dataset`, if one is given, and live in `env`; an error in the block closes that again."""
        from .fine_tune import Experience

        if dataset is not None:
            self.prepare(dataset)
        if self.data is None and (settings.offline_share != 0 or self.needs_data):
            raise ConfigError(
                "This loaded agent does not hold its dataset: pass learn(..., dataset=...)"
                + ("." if self.needs_data else ", or offline_share=0 to learn from the environment alone.")
            )
        former = self.experience
        entered = self.experience = (former or Experience(self, settings)).entering(env, settings)
        self.online_phase = True
        try:
            yield
        except BaseException:
            entered.leave()
            raise
        if former is not None:
            former.leave()

    @property
    def _lived(self) -> "Experience":
        if self.experience is None:
            raise CorollaryError(f"This {type(self).__name__} has seen no environment yet: call learn(env, n_steps).")
        return self.experience

    def played_in(self, env: object) -> None:
        """Begin new training episodes if others were played in the environment that this agent learns from."""
        if self.experience is not None:
            self.experience.played_in(env)

    @property
    def warm_up(self) -> int:
        """Environment steps per seed before the first gradient step of :meth:`learn`."""
        return self._lived.settings.learning_starts

    @property
    def environments(self) -> "Environments":
        """The environments that :meth:`learn` learns from; raises a :class:`CorollaryError` before it is called."""
        return self._lived.environments

    @property
    def recent_returns(self) -> "RecentReturns":
        """Raw returns of each seed's latest training episodes; raises as :attr:`environments` does."""
        return self._lived.recent_returns

    def iterate(self, progress: float) -> Metrics:
        """Take one step of every environment, and gradient steps; raises as :attr:`environments` does."""
        return self._lived.iterate()

    def finished_episodes(self) -> list[tuple[int, float, int]]:
        """Return seed index, return and length of the training episodes that ended since the last call."""
        return self._lived.finished_episodes()

    @property
    def clock(self) -> int:
        """Gradient steps, and environment steps per seed while learning from an environment."""
        return self.experience.env_steps if self.online_phase and self.experience is not None else self.step

    def prepare(self, dataset: Dataset) -> Transitions:
        """Choose, transform and move the data; build the networks at the first call.

        The transforms' constants are measured at the first call and kept (also in checkpoints), so that further
        training on other data stays in the coordinates that the networks know.

        Raises:
            DataError: if it is no dataset, not of continuous actions, or not of the shapes of the first one.
        """
        if not isinstance(dataset, Dataset):
            raise DataError(
                f"{self.algorithm} learns from a Dataset, not from {type(dataset).__name__}: corollary.load_dataset "
                "reads files and names, Dataset.from_arrays takes arrays."
            )
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
        elif not self._has_bounds(dataset.action_low, dataset.action_high):
            raise DataError(
                f"{dataset.info.name} has action bounds {list(dataset.action_low)}..{list(dataset.action_high)}, but "
                f"this agent was built for {list(self.problem.action_low)}..{list(self.problem.action_high)}: rescale "
                "the actions."
            )
        rewards, states = (
            cast(RewardTransform, self._reward_transform),
            cast(StateTransform, self._state_transform),
        )
        raw = raw.to(device=self.device, dtype=self.dtype)  # before the transforms, which round
        data = dataclasses.replace(raw, obs=states(raw.obs), next_obs=states(raw.next_obs), reward=rewards(raw.reward))
        self.data, self.dataset_card = data, _dataset_card(dataset)
        probability = row_probabilities(chosen, self.config, rewards)
        self.sampler = RowSampler(
            self.seeds, len(data), probability, self.config.weighting, device=self.device, dtype=self.dtype
        )
        self.on_data(data)
        return data

    def transform_states(self, obs: Tensor) -> Tensor:
        """Return raw observations ``[*batch, d_s]`` as updates see them."""
        return self._states(obs)

    def transform_rewards(self, reward: Tensor) -> Tensor:
        """Return raw rewards, of any shape, as updates see them."""
        _ = self.problem
        return cast(RewardTransform, self._reward_transform)(reward)

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
        """Whether this is one observation ``[d_s]``; ``[n, d_s]`` is a batch.

        Raises:
            EnvironmentMismatchError: for another shape.
        """
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
        if low is None or high is None or not is_same_environment(env_id, self.problem.env_id):
            return None
        return normalized_score(returns, low, high)

    def check_environment(self, env: gymnasium.Env[Any, Any]) -> None:
        """Raise an :class:`EnvironmentMismatchError` unless `env` has the spaces of the dataset."""
        name = environment_name(env)
        self.check_spaces(name, env.observation_space, env.action_space)

    def check_spaces(
        self, name: str, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]
    ) -> None:
        """Raise an :class:`EnvironmentMismatchError` unless the spaces of the environment `name` are the dataset's."""
        expected = {"observation": (self.problem.observation_dim,), "action": (self.problem.action_dim,)}
        for kind, space in (("observation", observation_space), ("action", action_space)):
            if not isinstance(space, gymnasium.spaces.Box) or space.shape != expected[kind]:
                remedy = "use the environment that the data came from"
                remedy += f" ({self.problem.env_id})" if self.problem.env_id else ""
                flat = space.is_np_flattenable and (gymnasium.spaces.flatdim(space),) == expected[kind]
                if kind == "observation" and flat:
                    remedy = "wrap the environment in gymnasium.wrappers.FlattenObservation"
                raise EnvironmentMismatchError(
                    f"{name} has {kind} space {space}, but the dataset {self.problem.dataset!r} has {kind}s of shape "
                    f"{expected[kind]}: {remedy}."
                )
        low, high = action_space.low, action_space.high  # type: ignore[attr-defined]
        if not self._has_bounds(low, high):
            raise EnvironmentMismatchError(
                f"{name} has action bounds {low.tolist()}..{high.tolist()}, but the dataset {self.problem.dataset!r} "
                f"has {list(self.problem.action_low)}..{list(self.problem.action_high)}: rescale one of them."
            )

    def _has_bounds(self, low: Any, high: Any) -> bool:
        return np.allclose(low, self.problem.action_low) and np.allclose(high, self.problem.action_high)

    # -------------------------------------------------------------------------------------------- exact state

    def card(self) -> dict[str, Any]:
        """Return what ``run.json`` says, the transforms' constants and the settings of `learn` included."""
        found = super().card()
        if self._problem is not None:
            description = self.description()
            found["transforms"] = {kind: description[f"{kind}_transform"] for kind in ("reward", "state")}
        if self.online_phase:
            found["fine_tuning"] = dataclasses.asdict(self._lived.settings)
        return found

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
            "online_phase": self.online_phase,
            "experience": None if self.experience is None else self.experience.description(),
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
        agent.online_phase = description["online_phase"]
        if description["experience"] is not None:
            from .fine_tune import Experience

            agent.experience = Experience.from_description(agent, description["experience"])
        return agent

    def lean_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state as before the first `learn`."""
        description, tensors = super().lean_state()
        return description | {"online_phase": False, "experience": None}, tensors

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the experience, if there is any."""
        if self.experience is None:
            return {}
        return {f"experience/{name}": tensor for name, tensor in self.experience.tensors().items()}

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`extra_tensors` returned."""
        if self.experience is not None:
            self.experience.load_tensors(below("experience/", tensors))

    def require_same_run(self, loaded: Self, path: str | Path) -> None:
        """Raise a :class:`CheckpointError` also if ``learn`` is to resume a ``fit`` or the reverse, or other data."""
        if self.online_phase != loaded.online_phase:
            phases = ("learn", "fit") if loaded.online_phase else ("fit", "learn")
            raise CheckpointError(
                f"{path} holds a run of {phases[0]}, which {phases[1]} cannot resume: choose another run_dir."
            )
        super().require_same_run(loaded, path)
        if not self.online_phase:  # `fit` prepares its data after the checkpoint is read
            return
        ours, theirs = ((a._reward_transform, a._state_transform) for a in (self, loaded))
        if self.data is not None and ours != theirs:
            raise CheckpointError(
                f"{path} has other reward or state transforms than the data of this agent was prepared with: call fit "
                "with the datasets of the run to resume, in the same order."
            )

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | (dataclasses.asdict(self._lived.settings) if self.online_phase else {})

    def restore(self, path: str | Path) -> None:
        """Take over the state of a checkpoint of the same run; data and environments stay the ones given here."""
        data, card, experience = self.data, self.dataset_card, self.experience
        super().restore(path)
        self.data, self.dataset_card = data, card  # the sampler is not a field before there is data, so it stays too
        if self.experience is not None:
            self.experience.move_in(self, experience)
        elif experience is not None:
            experience.leave()

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


def _dataset_card(dataset: Dataset) -> dict[str, Any]:
    info = dataset.info
    return {
        "name": info.name,
        "fingerprint": dataset.fingerprint,
        "rows": len(dataset),
        "env_id": info.env_id,
        "ref_min_score": info.ref_min_score,
        "ref_max_score": info.ref_max_score,
    }


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
