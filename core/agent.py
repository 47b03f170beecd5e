"""What every agent is: seeds, a configuration, networks with a seed axis, and exact state.

:class:`Agent` holds what does not depend on where experience comes from: acting, saving, loading, selecting a seed,
the registry. :class:`~corollary.core.offline_agent.OfflineAgent` adds learning from a dataset,
:class:`~corollary.core.online_agent.OnlineAgent` learning from an environment; a subclass (one file per algorithm)
adds its configuration, its networks and its update.
"""

import dataclasses
import importlib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..kernels.streams import RandomStream, torch_generator
from . import checkpoint
from .checkpoint import below
from .columns import is_whole
from .config import Config, Preset, make_config
from .errors import CheckpointError, ConfigError, suggest
from .networks import Activation, Initialisation, Place, StackedMLP
from .optimisers import SeedwiseAdam

C = TypeVar("C", bound=Config)

Metrics = dict[str, Tensor]
"""Named diagnostics of one update, one value per seed ``[S]``, detached, still on the device."""

_DTYPES = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


class Problem(Protocol):
    """What an agent must know of the task it learns: a frozen dataclass of plain data, kept in checkpoints."""

    @property
    def observation_dim(self) -> int:
        """d_s, the width of an encoded observation."""
        ...

    @property
    def action_dim(self) -> int:
        """d_a, the numbers in one action."""
        ...

    @property
    def env_id(self) -> str | None:
        """Id of the environment, if known."""
        ...


class Agent(ABC, Generic[C]):
    """Base of all agents; its constructor's arguments are documented in the two subclasses."""

    algorithm: ClassVar[str]
    config_type: ClassVar[type[Any]]
    presets: ClassVar[Mapping[str, Preset]] = {}
    claims: ClassVar[tuple[str, ...]] = ()
    """Ids of the theory checks that the algorithm rests on or is about: ``corollary check NAME`` runs them."""
    action_noise: Literal["normal", "uniform"] = "normal"
    """Distribution of the numbers that :meth:`act` turns into a sampled action."""

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
        self.device = _usable_device(device)
        if precision not in _DTYPES:
            raise ConfigError(f"precision must be one of {', '.join(_DTYPES)}; got {precision!r}.")
        self.precision = precision
        self.dtype = _DTYPES[precision]
        self.step = 0
        self.networks = nn.ModuleDict()
        self.optimizers: dict[str, Any] = {}  # of torch, or SeedwiseAdam

    # ------------------------------------------------------------------------------- what an algorithm defines

    @abstractmethod
    def build(self) -> None:
        """Fill `networks` and `optimizers` for `problem`, drawing from :meth:`mlp`."""

    # ------------------------------------------------------------------------------ what the two kinds define

    @property
    @abstractmethod
    def problem(self) -> Problem:
        """The task; raises a :class:`CorollaryError` as long as it is unknown."""

    @abstractmethod
    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map observations ``[S, n, d_s]`` as the environment gives them to actions ``[S, n, d_a]``.

        With `noise` ``[S, n, d_a]`` (see :attr:`action_noise`) a stochastic policy samples; without, it acts
        deterministically.
        """

    @abstractmethod
    def is_single(self, observation: Any) -> bool:
        """Whether this is one observation and not a batch of them; raises if it is neither."""

    @abstractmethod
    def encode(self, observations: Sequence[Any]) -> NDArray[Any]:
        """Return n observations of single environments as rows ``[n, d_s]``."""

    @abstractmethod
    def encode_batch(self, observations: Any) -> NDArray[Any]:
        """Return a batch of observations, in a vector environment's layout, as rows ``[n, d_s]``."""

    @abstractmethod
    def decode(self, actions: NDArray[Any]) -> Sequence[Any]:
        """Return rows ``[n, d_a]`` as n actions of single environments."""

    @abstractmethod
    def decode_batch(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Return rows ``[n, d_a]`` as one array of n actions, a vector environment's layout."""

    @abstractmethod
    def check_environment(self, env: gymnasium.Env[Any, Any]) -> None:
        """Raise an :class:`EnvironmentMismatchError` unless `env` has the spaces that this agent acts in."""

    @abstractmethod
    def played_in(self, env: object) -> None:
        """Be told that episodes were played in `env`, which may be the one that this agent learns from."""

    @property
    def warm_up(self) -> int:
        """Environment steps per seed before the first gradient step."""
        return 0

    def normalized_score(self, returns: NDArray[np.float64], env_id: str) -> NDArray[np.float64] | None:
        """Return normalised scores where the agent knows reference returns of this environment."""
        return None

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return all that `config.json` of a checkpoint says, plain data."""

    @classmethod
    @abstractmethod
    def _from_description(cls, description: Mapping[str, Any], device: torch.device) -> Self:
        """Make an agent with freshly built networks from its description; the caller fills in the tensors."""

    @abstractmethod
    def plain_policy(self, seed_index: int = 0) -> nn.Module:
        """Return one seed's deterministic policy on raw observations ``[n, d_s]`` as an ordinary module."""

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return what the state holds beside networks and optimisers, each with the seed axis first."""
        return {}

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`extra_tensors` returned."""

    def card(self) -> dict[str, Any]:
        """Return what ``run.json`` says of this agent, JSON-able."""
        return {
            "algorithm": self.algorithm,
            "preset": self.preset,
            "config": dataclasses.asdict(self.config),
            "seeds": list(self.seeds),
            "precision": self.precision,
            "device": str(self.device),
        }

    @property
    def clock(self) -> int:
        """What run logs count: gradient steps on a dataset, steps per seed in an environment."""
        return self.step

    def diverged(self) -> NDArray[np.bool_]:
        """Whether the training of each seed has diverged: some number in its networks is not finite; ``[S]``."""
        numbers = [tensor.reshape(len(self.seeds), -1) for tensor in self.networks.state_dict().values()]
        return ~torch.stack([each.isfinite().all(1) for each in numbers]).all(0).cpu().numpy()

    # ------------------------------------------------------------------------------------------------- acting

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], None]:
        """Act as Stable-Baselines3's models do: one observation or a batch of them to ``(actions, None)``.

        The first seed's policy acts; :meth:`select` gives the others. With ``deterministic=False`` successive calls
        draw from a stream of their own that never touches training.
        """
        single = self.is_single(observation)
        rows = torch.tensor(self.encode([observation]) if single else self.encode_batch(observation), dtype=self.dtype)
        noise = None
        if not deterministic:
            noise = self.draw_action_noise(self._predict_stream, self._predictions, len(rows))
            self._predictions += 1
        acted = self.act(rows.expand(len(self.seeds), -1, -1), noise)[0].cpu()
        actions = self.decode_batch(acted.to(torch.float32 if acted.is_floating_point() else acted.dtype).numpy())
        return (actions[0] if single else actions), None

    def draw_action_noise(self, stream: RandomStream, step: int, *batch: int) -> Tensor:
        """Draw the noise ``[S, *batch, d_a]`` that :meth:`act` samples with."""
        draw = stream.normal if self.action_noise == "normal" else stream.uniform
        return draw(step, (*batch, self.problem.action_dim))

    # -------------------------------------------------------------------------------------------- exact state

    def save(self, path: str | Path) -> Path:
        """Write the whole state (networks, optimisers, transforms, counters) as a checkpoint folder at `path`.

        Training continued from it gives the same bits as training never stopped. Raises a :class:`CheckpointError`
        if the disk refuses; an earlier checkpoint at `path` then survives.
        """
        config, tensors = self.state()
        return checkpoint.write(path, config, tensors)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Load a checkpoint written by :meth:`save`.

        Raises:
            CheckpointError: if it is missing or damaged, or belongs to another algorithm.
            ConfigError: for a device that is not there.
        """
        config, tensors = checkpoint.read(path)
        if config.get("algorithm") != cls.algorithm:
            raise CheckpointError(
                f"{path} is a checkpoint of {config.get('algorithm')}, not of {cls.algorithm}: "
                "load it with that class, or with corollary.load_agent."
            )
        where = _usable_device(device)
        try:
            return cls.from_state(config, tensors, where)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint {path} was altered, or does not fit this version of {cls.algorithm} "
                f"({type(error).__name__}: {str(error).rstrip('.')})."
            ) from error

    def restore(self, path: str | Path) -> None:
        """Take over the state of a checkpoint of the same run (same algorithm, configuration, seeds and precision).

        Raises:
            CheckpointError: if the checkpoint is damaged, or of a run with other settings (the first difference is
                named).
        """
        loaded = type(self).load(path, device=self.device)
        self.require_same_run(loaded, path)
        self.__dict__.update(loaded.__dict__)

    def require_same_run(self, loaded: Self, path: str | Path) -> None:
        """Raise a :class:`CheckpointError` if the agent `loaded` from `path` is of a run with other settings."""
        ours, theirs = self._settings(), loaded._settings()
        for name, value in ours.items():
            if value != theirs[name]:
                raise CheckpointError(
                    f"{path} belongs to another run: its {name} is {theirs[name]!r}, here it is {value!r}."
                )

    def _settings(self) -> dict[str, Any]:
        return {"seeds": self.seeds, "precision": self.precision, **dataclasses.asdict(self.config)}

    def seed_position(self, index: int) -> int:
        """Return `index`, counted from the end where it is negative, as a position in `seeds`.

        Raises:
            ConfigError: if there is none.
        """
        if not -len(self.seeds) <= index < len(self.seeds):
            raise ConfigError(f"This agent has {len(self.seeds)} seeds; there is no seed index {index}.")
        return index % len(self.seeds)

    def select(self, index: int) -> Self:
        """Return a copy with only the seed at position `index`: it predicts, saves and continues on its own."""
        config, tensors = self.state()
        position = self.seed_position(index)
        config["seeds"] = [self.seeds[position]]
        per_seed = self._per_seed_names()
        picked = {n: (t[position : position + 1].clone() if n in per_seed else t) for n, t in tensors.items()}
        return self.from_state(config, picked, self.device)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a checkpoint holds: the description and every tensor by name."""
        tensors = {f"network/{name}": t.detach() for name, t in self.networks.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= {f"optimizer/{name}/{key}": t for key, t in _optimizer_tensors(optimizer).items()}
        tensors |= {f"extra/{name}": t for name, t in self.extra_tensors().items()}
        return self.description(), tensors

    def lean_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return :meth:`state` without what was experienced: enough to act, and :meth:`from_state` takes it too."""
        description, tensors = self.state()
        experience = tuple(f"extra/{kind}/" for kind in ("buffer", "environments", "experience", "replay"))
        return description, {name: tensor for name, tensor in tensors.items() if not name.startswith(experience)}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Self:
        """Make an agent from what :meth:`state` returned."""
        agent = cls._from_description(config, device)
        agent.preset = config["preset"]
        agent.networks.load_state_dict(below("network/", tensors))
        for name, optimizer in agent.optimizers.items():
            _load_optimizer_tensors(optimizer, below(f"optimizer/{name}/", tensors))
        agent.load_extra_tensors(below("extra/", tensors))
        agent.step = config["step"]
        if not is_whole(agent.step) or agent.step < 0:
            raise ValueError(f"its step is {agent.step!r}")
        return agent

    def _per_seed_names(self) -> set[str]:
        names = {f"network/{name}" for name in self.networks.state_dict()}
        names |= {f"extra/{name}" for name in self.extra_tensors()}
        for name, optimizer in self.optimizers.items():
            keys = _optimizer_tensors(optimizer)
            shared = () if isinstance(optimizer, SeedwiseAdam) else {key for key in keys if key.endswith("/step")}
            names |= {f"optimizer/{name}/{key}" for key in keys if key not in shared}
        return names

    # --------------------------------------------------------------------------------------- building blocks

    def _begin(self) -> None:
        """Build for the problem, now known."""
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
        hidden: Sequence[int] | None = None,
        members: int | None = None,
        activation: Activation = "relu",
        init: Initialisation = "torch",
        output_init: Initialisation | None = None,
        output_gain: float = math.sqrt(2),
        layer_norm: Place = "none",
    ) -> StackedMLP:
        """Make a network ``n_in - hidden... - n_out`` for every seed, initialised from the stream named `purpose`."""
        return StackedMLP(
            (n_in, *(self.config.hidden if hidden is None else hidden), n_out),
            [torch_generator(seed, f"init/{purpose}") for seed in self.seeds],
            members=members,
            activation=activation,
            init=init,
            output_init=output_init,
            output_gain=output_gain,
            layer_norm=layer_norm,
            precision="bf16" if self.precision == "bf16" else "float32",
            dtype=self.dtype,
        ).to(self.device)

    def stream(self, purpose: str) -> RandomStream:
        """Return the random stream of these seeds for one purpose (noise, sampling, ...)."""
        return RandomStream(self.seeds, purpose, device=self.device, dtype=self.dtype)

    def export_onnx(self, path: str | Path, seed_index: int = 0) -> Path:
        """Write one seed's deterministic policy as ONNX; see :func:`corollary.core.export.export_onnx`."""
        from .export import export_onnx

        return export_onnx(self, path, seed_index)


def load_agent(path: str | Path, *, device: str | torch.device = "cpu") -> Agent[Any]:
    """Load a checkpoint of whatever algorithm it is; raises a :class:`CheckpointError` as `Agent.load` does."""
    config, _ = checkpoint.read(path)
    try:
        kind = algorithm_class(str(config.get("algorithm")))
    except ConfigError as error:
        raise CheckpointError(f"The checkpoint {path} is of no algorithm of this version: {error}") from error
    return kind.load(path, device=device)


def algorithm_class(name: str) -> type[Agent[Any]]:
    """Return the class registered as `name`, for instance ``"offline.prdc"`` (module ``corollary.offline.prdc``).

    Raises:
        ConfigError: if there is no such algorithm; the nearest name is suggested.
    """
    known = algorithms()
    if name not in known:
        raise ConfigError(f"Unknown algorithm {name!r}; there are {', '.join(known)}.{suggest(name, known)}")
    return known[name]


def algorithms(*rooms: str) -> dict[str, type[Agent[Any]]]:
    """Return the algorithms of `rooms` (all of them by default) by their names, in alphabetical order."""
    found: dict[str, type[Agent[Any]]] = {}
    for room in rooms or ("offline", "online"):
        package = importlib.import_module(f"{__package__.rpartition('.')[0]}.{room}")
        for public in package.__all__:
            kind = getattr(package, public)
            if isinstance(kind, type) and issubclass(kind, Agent):
                found[kind.algorithm] = kind
    return dict(sorted(found.items()))


def adam(parameters: Sequence[Tensor] | Any, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam with beta (0.9, 0.999) and eps 1e-8, fused: one pass over all parameters of all seeds.

    `weight_decay` is the coefficient of a penalty ``|theta|^2 / 2`` in the loss (not AdamW's decoupled decay).
    """
    return torch.optim.Adam(list(parameters), lr=learning_rate, weight_decay=weight_decay, fused=True)


def descend(optimizer: torch.optim.Optimizer, loss_S: Tensor) -> None:
    """Take one optimiser step on per-seed losses ``[S]``.

    The seeds' parameters are disjoint, so the gradient of the sum is each seed's own gradient. Gradients are taken
    with respect to this optimiser's parameters only; nothing accumulates elsewhere.
    """
    step_along(optimizer, torch.autograd.grad(loss_S.sum(), _parameters(optimizer)))


def step_along(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor]) -> None:
    """Take one optimiser step with these gradients, in the order of the optimiser's parameters."""
    for parameter, gradient in zip(_parameters(optimizer), gradients, strict=True):
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
    if is_whole(seeds):
        chosen = tuple(range(operator.index(seeds)))  # type: ignore[arg-type]
    elif isinstance(seeds, Sequence | np.ndarray) and np.ndim(seeds) == 1 and all(map(is_whole, seeds)):
        chosen = tuple(map(operator.index, seeds))
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= 2**64:
        raise ConfigError(
            f"seeds must be a positive number or a list of different seeds >= 0 and < 2**64; got {seeds!r}."
        )
    return chosen


def _usable_device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"The device {str(name)!r} cannot be used here ({why}): take 'cpu'.") from error
    return device


def _optimizer_tensors(optimizer: torch.optim.Optimizer | SeedwiseAdam) -> dict[str, Tensor]:
    if isinstance(optimizer, SeedwiseAdam):
        return optimizer.state_tensors()
    return {
        f"{index}/{key}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer_tensors(optimizer: torch.optim.Optimizer | SeedwiseAdam, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(optimizer, SeedwiseAdam):
        optimizer.load_state_tensors(tensors)
        return
    for index, parameter in enumerate(_parameters(optimizer)):
        state = below(f"{index}/", tensors)
        if state:
            optimizer.state[parameter] = {key: t.to(parameter.device, copy=True) for key, t in state.items()}
