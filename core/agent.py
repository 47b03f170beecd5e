"""What every offline agent is: seeds, a configuration, networks with a seed axis, and exact state.

A subclass (one file per algorithm in ``offline/``) adds its configuration, builds its networks and optimisers, and
defines `update`. Everything here is the same for all of them: acting, saving, loading, selecting a seed.
"""

import copy
import dataclasses
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..kernels.streams import RandomStream, torch_generator
from . import checkpoint
from .config import OfflineConfig, Preset, make_config
from .dataset import Batch, Dataset, Transitions
from .errors import CheckpointError, ConfigError, CorollaryError, DataError, EnvironmentMismatchError, suggest
from .networks import ActionBox, Initialisation, StackedMLP
from .transforms import RewardTransform, StateTransform, reward_transform, state_transform

if TYPE_CHECKING:
    from .evaluation import EnvSource
    from .fit import Callback

C = TypeVar("C", bound=OfflineConfig)

Metrics = dict[str, Tensor]
"""Named diagnostics of one update, one value per seed ``[S]``, detached, still on the device."""

_DTYPES = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class Problem:
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


class OfflineAgent(ABC, Generic[C]):
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

    algorithm: ClassVar[str]
    config_type: ClassVar[type[Any]]
    presets: ClassVar[Mapping[str, Preset]] = {}

    def __init__(
        self,
        seeds: int | Sequence[int] = 1,
        *,
        preset: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        **options: Any,
    ) -> None:
        self.config: C = make_config(self.config_type, options, self.presets, preset)
        self.seeds = _seed_tuple(seeds)
        self.preset = preset
        self.device = torch.device(device)
        if precision not in _DTYPES:
            raise ConfigError(f"precision must be one of {', '.join(_DTYPES)}; got {precision!r}.")
        self.precision = precision
        self.dtype = _DTYPES[precision]
        self.step = 0
        self.networks = nn.ModuleDict()
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._problem: Problem | None = None
        self._state_transform: StateTransform | None = None
        self._reward_transform: RewardTransform | None = None

    # ------------------------------------------------------------------------------- what an algorithm defines

    @abstractmethod
    def build(self) -> None:
        """Fill `networks` and `optimizers` for `problem`, drawing from :meth:`mlp`."""

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

    def predict(
        self,
        observation: NDArray[Any],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], None]:
        """Act as Stable-Baselines3's models do: ``[d_s]`` or ``[n, d_s]`` to ``(actions, None)``.

        The first seed's policy acts; :meth:`select` gives the others. With ``deterministic=False`` successive calls
        draw from a stream of their own that never touches training.
        """
        obs = np.asarray(observation)
        width = self.problem.observation_dim
        if obs.ndim not in (1, 2) or obs.shape[-1] != width:
            raise EnvironmentMismatchError(
                f"predict needs observations [{width}] or [n, {width}]; got shape {obs.shape}."
            )
        rows = torch.tensor(obs, dtype=self.dtype).reshape(1, -1, width).expand(len(self.seeds), -1, -1)
        noise = None
        if not deterministic:
            noise = self._predict_stream.normal(self._predictions, (rows.shape[1], self.problem.action_dim))
            self._predictions += 1
        action = self.act(rows, noise)[0].to("cpu", torch.float32).numpy()
        return (action[0] if obs.ndim == 1 else action), None

    def select(self, index: int) -> Self:
        """Return a copy with only the seed at position `index`: it predicts, saves and continues on its own."""
        config, tensors = self._state()
        if not -len(self.seeds) <= index < len(self.seeds):
            raise IndexError(f"This agent has {len(self.seeds)} seeds; there is no position {index}.")
        config["seeds"] = [self.seeds[index]]
        position = index % len(self.seeds)
        per_seed = self._per_seed_names()
        picked = {n: (t[position : position + 1].clone() if n in per_seed else t) for n, t in tensors.items()}
        return self._from_state(config, picked, self.device)

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

    def save(self, path: str | Path) -> Path:
        """Write the whole state (networks, optimisers, transforms, counters) as a checkpoint folder at `path`.

        Training continued from it gives the same bits as training never stopped. Raises a :class:`CheckpointError`
        if the disk refuses; an earlier checkpoint at `path` then survives.
        """
        config, tensors = self._state()
        return checkpoint.write(path, config, tensors)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Load a checkpoint written by :meth:`save`.

        Raises:
            CheckpointError: if it is missing or damaged, or belongs to another algorithm.
        """
        config, tensors = checkpoint.read(path)
        if config.get("algorithm") != cls.algorithm:
            raise CheckpointError(
                f"{path} is a checkpoint of {config.get('algorithm')}, not of {cls.algorithm}: "
                "load it with that class, or with corollary.load_agent."
            )
        try:
            return cls._from_state(config, tensors, torch.device(device))
        except (KeyError, TypeError, RuntimeError, ConfigError) as error:
            raise CheckpointError(
                f"The checkpoint {path} does not fit this version of {cls.algorithm}: {error}."
            ) from error

    def restore(self, path: str | Path) -> None:
        """Take over the state of a checkpoint of the same run (same algorithm, configuration, seeds and precision).

        Raises:
            CheckpointError: if the checkpoint is damaged, or of a run with other settings (the first difference is
                named).
        """
        loaded = type(self).load(path, device=self.device)
        ours, theirs = self._settings(), loaded._settings()
        for name, value in ours.items():
            if value != theirs[name]:
                raise CheckpointError(
                    f"{path} belongs to another run: its {name} is {theirs[name]!r}, here it is {value!r}."
                )
        self.__dict__.update(loaded.__dict__)

    def _settings(self) -> dict[str, Any]:
        return {"seeds": self.seeds, "precision": self.precision, **dataclasses.asdict(self.config)}

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

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"network/{name}": t.detach() for name, t in self.networks.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, parameter in enumerate(_parameters(optimizer)):
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer/{name}/{index}/{key}"] = value
        return self.description(), tensors

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Self:
        agent = cls(config["seeds"], device=device, precision=config["precision"], **config["config"])
        agent.preset = config["preset"]
        agent._reward_transform = RewardTransform(**config["reward_transform"])
        agent._state_transform = StateTransform(**config["state_transform"])
        problem = {k: tuple(v) if isinstance(v, list) else v for k, v in config["problem"].items()}
        agent._start(Problem(**cast(dict[str, Any], problem)))
        prefix = "network/"
        agent.networks.load_state_dict({n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})
        for name, optimizer in agent.optimizers.items():
            for index, parameter in enumerate(_parameters(optimizer)):
                start = f"optimizer/{name}/{index}/"
                state = {n[len(start) :]: t.clone() for n, t in tensors.items() if n.startswith(start)}
                if state:
                    optimizer.state[parameter] = {k: t.to(device) for k, t in state.items()}
        agent.step = config["step"]
        return agent

    def _per_seed_names(self) -> set[str]:
        names = {f"network/{name}" for name in self.networks.state_dict()}
        for name, optimizer in self.optimizers.items():
            for index, _ in enumerate(_parameters(optimizer)):
                names |= {f"optimizer/{name}/{index}/{key}" for key in ("exp_avg", "exp_avg_sq")}
        return names

    # --------------------------------------------------------------------------------------- building blocks

    @property
    def problem(self) -> Problem:
        """The problem this agent was built for; raises a :class:`CorollaryError` before the first `fit`."""
        if self._problem is None:
            raise CorollaryError(f"This {type(self).__name__} has not learnt yet: call fit(dataset, n_steps) first.")
        return self._problem

    @property
    def _states(self) -> StateTransform:
        """The fitted state transform; raises as `problem` does."""
        _ = self.problem
        return cast(StateTransform, self._state_transform)

    def _start(self, problem: Problem) -> None:
        self._problem = problem
        self.box = ActionBox(problem.action_low, problem.action_high, self.dtype).to(self.device)
        self._predict_stream = RandomStream(self.seeds, "predict", device=self.device, dtype=self.dtype)
        self._predictions = 0
        self.build()
        self.networks.to(self.device)

    def mlp(
        self,
        purpose: str,
        n_in: int,
        n_out: int,
        *,
        members: int | None = None,
        init: Initialisation = "torch",
    ) -> StackedMLP:
        """Make a network ``n_in - hidden... - n_out`` for every seed, initialised from the stream named `purpose`."""
        return StackedMLP(
            (n_in, *self.config.hidden, n_out),
            [torch_generator(seed, f"init/{purpose}") for seed in self.seeds],
            members=members,
            init=init,
            precision="bf16" if self.precision == "bf16" else "float32",
            dtype=self.dtype,
        ).to(self.device)

    def stream(self, purpose: str) -> RandomStream:
        """Return the random stream of these seeds for one purpose (noise, sampling, ...)."""
        return RandomStream(self.seeds, purpose, device=self.device, dtype=self.dtype)

    def plain_policy(self, seed_index: int = 0) -> nn.Module:
        """Return one seed's deterministic policy on raw observations ``[n, d_s]`` as an ordinary module."""
        from .export import PlainPolicy

        states = self._states
        # A copy: moving the result to another device or dtype must not take the agent's own action box with it.
        return copy.deepcopy(PlainPolicy(self.plain_actor(seed_index), states, self.box))

    @abstractmethod
    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's deterministic actor on transformed states as an ordinary module."""

    def export_onnx(self, path: str | Path, seed_index: int = 0) -> Path:
        """Write one seed's deterministic policy as ONNX; see :func:`corollary.core.export.export_onnx`."""
        from .export import export_onnx

        return export_onnx(self, path, seed_index)


def load_agent(path: str | Path, *, device: str | torch.device = "cpu") -> "OfflineAgent[Any]":
    """Load a checkpoint of whatever algorithm it is; raises a :class:`CheckpointError` as `OfflineAgent.load` does."""
    config, _ = checkpoint.read(path)
    return algorithm_class(str(config.get("algorithm"))).load(path, device=device)


def algorithm_class(name: str) -> type["OfflineAgent[Any]"]:
    """Return the class registered as `name`, for instance ``"offline.prdc"`` (module ``corollary.offline.prdc``).

    Raises:
        ConfigError: if there is no such algorithm; the nearest name is suggested.
    """
    known = algorithms()
    if name not in known:
        raise ConfigError(f"Unknown algorithm {name!r}; there are {', '.join(known)}.{suggest(name, known)}")
    return known[name]


def algorithms() -> dict[str, type["OfflineAgent[Any]"]]:
    """Return every algorithm of the library by its name, in alphabetical order."""
    found: dict[str, type[OfflineAgent[Any]]] = {}
    for room in ("offline",):
        package = importlib.import_module(f"{__package__.rpartition('.')[0]}.{room}")
        for public in package.__all__:
            kind = getattr(package, public)
            if isinstance(kind, type) and issubclass(kind, OfflineAgent):
                found[kind.algorithm] = kind
    return dict(sorted(found.items()))


def adam(parameters: Sequence[Tensor] | Any, learning_rate: float) -> torch.optim.Adam:
    """Adam with beta (0.9, 0.999) and eps 1e-8, fused: one pass over all parameters of all seeds."""
    return torch.optim.Adam(list(parameters), lr=learning_rate, fused=True)


def descend(optimizer: torch.optim.Optimizer, loss_S: Tensor) -> None:
    """Take one optimiser step on per-seed losses ``[S]``.

    The seeds' parameters are disjoint, so the gradient of the sum is each seed's own gradient. Gradients are taken
    with respect to this optimiser's parameters only; nothing accumulates elsewhere.
    """
    parameters = _parameters(optimizer)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss_S.sum(), parameters), strict=True):
        # Unlike `backward`, `grad` may return a transposed layout, and fused Adam walks through memory in order.
        parameter.grad = gradient.contiguous()
    optimizer.step()


def cosine_decay(step: int, total: int | None) -> float:
    """Return ``(1 + cos(pi t / T)) / 2`` for t steps taken of T, 0 after T, and 1 for ``total=None`` (no schedule)."""
    return 1.0 if total is None else 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _seed_tuple(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen: tuple[int, ...] = ()
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        chosen = tuple(range(seeds))
    elif isinstance(seeds, Sequence) and all(type(seed) is int for seed in seeds):
        chosen = tuple(seeds)
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0:
        raise ConfigError(f"seeds must be a positive number or a list of different seeds >= 0; got {seeds!r}.")
    return chosen


def _problem_of(dataset: Dataset) -> Problem:
    low, high = cast(NDArray[Any], dataset.action_low), cast(NDArray[Any], dataset.action_high)
    return Problem(
        observation_dim=dataset.observation_dim,
        action_low=tuple(float(x) for x in low),
        action_high=tuple(float(x) for x in high),
        env_id=dataset.info.env_id,
        ref_min_score=dataset.info.ref_min_score,
        ref_max_score=dataset.info.ref_max_score,
        dataset=dataset.info.name,
        fingerprint=dataset.fingerprint,
    )
