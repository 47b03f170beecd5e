r"""CDSA (reconstruction): any policy's actions, moved towards the data along the learnt score of its density.

Paper: Z. Liu, K. Yang, X. Li, "CDSA: Conservative Denoising Score-based Algorithm for Offline Reinforcement Learning",
2024, arXiv 2406.07541. Only its abstract, the beginning of its introduction and a summary by others could be read, and
no code of the authors was found: what follows is a reconstruction, and nothing in it may be quoted as the paper's.
Reference for the score: P. Vincent, "A Connection Between Score Matching and Denoising Autoencoders", Neural
Computation 23, 2011 (denoising score matching). Form of the network: T. Karras et al., "Elucidating the Design Space
of Diffusion-Based Generative Models", NeurIPS 2022, arXiv 2206.00364 [memory].

With x = (s, u), the transformed state and the action in half-ranges of its box, eps ~ N(0, I), sigma log-uniform:

    score     L_s = mean |sigma f(x + sigma eps, sigma) + eps|^2
    inverse   L_I = mean (1 - d) (I(s, s' - s) - u)^2
    acting    u'  = u + w_1 delta_u + w_2 (I(s, delta_s) - I(s, 0)),    (delta_s, delta_u) = sigma_0^2 f(x, sigma_0)

u is what the base policy plays; u' is clipped to the box. L_s is minimised by the gradient of log p_sigma, the density
of the data with noise of size sigma. By Tweedie's formula x + sigma_0^2 f(x, sigma_0) is the mean of the data that
noise of size sigma_0 may have moved to x, so w_1 = 1 plays the denoised action, w_1 = 0 and w_2 = 0 the base's own. On
data x ~ N(m, Sigma) the step contracts towards the likeliest action in the state iff 0 < w_1 sigma_0^2 mu < 2 for every
eigenvalue mu of the actions' block of (Sigma + sigma_0^2 I)^-1; each w_1 in (0, 2) meets that. The second term is the
action whose effect is the change delta_s of the state, to first order: with s' = A s + B u it is B^+ delta_s, a least-
squares step towards denser states.

Known of the paper: a denoising score network of the dataset's density, added at test time to the actions of a policy
trained by any method; an inverse dynamics model that turns the state's part of the gradient into an action; dynamics
are deterministic. Choices made here, each unknown in the paper:
1. One network for pairs (s, u) gives both parts; both are used, each with its weight.
2. Step sizes are in units of sigma_0^2, one step is taken, and gradients are not normalised.
3. The inverse model enters by a difference, which vanishes where the score does. The action I(s, s + delta_s) itself
   would pull towards the action that keeps the state where it is.
4. f(x, sigma) = -x / (1 + sigma^2) + net(x / k, sigma) / (sigma k) with k^2 = 1 + sigma^2: the network learns what the
   data is beyond N(0, I). Its average over steps acts (`averaging`).
5. Without a base, behaviour cloning is trained along.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.actor_critic import weighted_mean
from ..core.agent import Agent, Metrics, adam, algorithm_class, descend
from ..core.checkpoint import below
from ..core.config import OfflineConfig
from ..core.dataset import Batch, Dataset, Transitions
from ..core.errors import ConfigError, EnvironmentMismatchError
from ..core.networks import ActionBox, StackedMLP, polyak_update
from ..core.offline_agent import OfflineAgent
from ..core.transforms import StateTransform
from .bc import BC
from .td3 import action_error

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class CDSAConfig(OfflineConfig):
    """Settings of the reconstruction; none of the defaults is the paper's.

    Attributes:
        action_weight: w_1 >= 0 of the score's action part; 0 leaves it out, 1 plays the denoised action, 2 or more may
            overshoot the data.
        state_weight: w_2 >= 0 of the state part through the inverse model; 0 leaves it out.
        sigma: noise level sigma_0 at which the score acts, within `sigma_range`; small ones see details but know
            little away from the data, large ones flatten the policy.
        sigma_range: lowest and highest level trained on, 0 < low < high; in standardised states and half-ranges.
        averaging: share in (0, 1] of each step in the average of the score network that acts; 1 takes the network
            itself.
        learning_rate: Adam's step size of score and inverse model, > 0.
    """

    action_weight: float = 1.0
    state_weight: float = 0.1
    sigma: float = 0.1
    sigma_range: tuple[float, float] = (0.05, 1.0)
    averaging: float = 0.005
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("action_weight", self.action_weight >= 0, ">= 0")
        self.require("state_weight", self.state_weight >= 0, ">= 0")
        low, high = self.sigma_range
        self.require("sigma_range", 0 < low < high, "an increasing pair of positive levels")
        self.require("sigma", low <= self.sigma <= high, f"within sigma_range, {low} to {high}")
        self.require("averaging", 0 < self.averaging <= 1, "in (0, 1]")
        self.require("learning_rate", self.learning_rate > 0, "> 0")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def denoising_loss(score: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor | None = None) -> Tensor:
    """``mean |sigma f(x + sigma eps, sigma) + eps|^2`` for ``f, eps [..., B, d]`` and ``sigma [..., B, 1]``."""
    return weighted_mean((sigma * score + noise).square().sum(-1), weight)


def inverse_loss(predicted: Tensor, action: Tensor, terminated: Tensor, weight: Tensor | None = None) -> Tensor:
    """``mean (1 - d) (I - u)^2`` over rows and dimensions, for ``[..., B, d_a]``: a terminal row has no successor."""
    known = 1 - terminated
    return action_error(predicted, action, known if weight is None else known * weight)


def correction(states: Tensor, action: Tensor, score: Network, inverse: Network, config: CDSAConfig) -> Tensor:
    """``w_1 delta_u + w_2 (I(s, delta_s) - I(s, 0))`` for states ``[..., n, d_s]`` and unit actions ``[..., n, d_a]``.

    Args:
        states: as updates see them.
        action: in half-ranges of the box.
        score: ``f(., sigma_0)``, on pairs ``[..., n, d_s + d_a]``.
        inverse: I, on pairs ``[..., n, 2 d_s]`` of a state and its change.
        config: weights and level.
    """
    shift = config.sigma**2 * score(torch.cat([states, action], -1))
    in_state, in_action = shift[..., : states.shape[-1]], shift[..., states.shape[-1] :]
    moved = config.action_weight * in_action
    if config.state_weight == 0:
        return moved
    changes = torch.cat([in_state, torch.zeros_like(in_state)], -2)
    wanted, idle = inverse(torch.cat([torch.cat([states, states], -2), changes], -1)).chunk(2, -2)
    return moved + config.state_weight * (wanted - idle)


def corrected(
    states: Tensor, action: Tensor, score: Network, inverse: Network, box: ActionBox, config: CDSAConfig
) -> Tensor:
    """Move actions ``[..., n, d_a]`` by :func:`correction`, not yet clipped; both weights 0 return them as they are."""
    if config.action_weight == config.state_weight == 0:
        return action
    return action + box.half_range * correction(states, box.unit(action), score, inverse, config)


class Score(nn.Module):
    """The score network ``f(x, sigma)`` of choice 4; `net` maps ``[..., d + 1]`` to ``[..., d]``.

    The level enters as ``log sigma`` on the scale where `sigma_range` is [-1, 1].
    """

    def __init__(self, net: nn.Module, sigma_range: tuple[float, float]) -> None:
        super().__init__()
        self.net, self.sigma_range = net, sigma_range
        low, high = sigma_range
        self._middle, self._half = math.log(low * high) / 2, math.log(high / low) / 2

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Map points ``[..., n, d]`` and levels ``[..., n, 1]`` to scores ``[..., n, d]``."""
        scale = (1 + sigma.square()).sqrt()
        level = (sigma.log() - self._middle) / self._half
        learnt: Tensor = self.net(torch.cat([x / scale, level], -1))
        return learnt / (sigma * scale) - x / scale.square()

    def at(self, sigma: float) -> Network:
        """Return ``f(., sigma)``."""
        return lambda x: self(x, torch.full_like(x[..., :1], sigma))

    def plain(self, seed_index: int) -> "Score":
        """Return one seed's score of points ``[n, d]`` with an ordinary network (for export)."""
        assert isinstance(self.net, StackedMLP)
        return Score(self.net.plain(seed_index), self.sigma_range)


class CDSA(OfflineAgent[CDSAConfig]):
    """CDSA (Liu et al., 2024), reconstructed; see the module's head.

    Args:
        seeds: as for every offline agent.
        base: a trained agent with continuous actions, whose policy is corrected; a copy of it as it is now, without its
            experience, becomes part of this agent and its checkpoints. It has one seed, shared by all, or as many as
            this agent. ``None`` trains behaviour cloning along.
        preset, device, precision, **options: as for every offline agent.

    Raises:
        ConfigError: if `base` is no trained agent, or has another number of seeds.
    """

    algorithm: ClassVar[str] = "offline.cdsa"
    config_type = CDSAConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-23a", "OFF-23b")

    base: Agent[Any]

    def __init__(
        self,
        seeds: int | Sequence[int] = 1,
        *,
        base: Agent[Any] | None = None,
        preset: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        **options: Any,
    ) -> None:
        super().__init__(seeds, preset=preset, device=device, precision=precision, **options)
        self.trains_base = base is None
        if base is None:
            self.base = self._new_cloning()
            return
        if not isinstance(base, Agent):
            raise ConfigError(f"base must be a trained agent, as corollary.load_agent(path) gives; got {base!r}.")
        if len(base.seeds) not in (1, len(self.seeds)):
            raise ConfigError(
                f"The base has {len(base.seeds)} seeds and CDSA {len(self.seeds)}: give both as many, or the base one."
            )
        description, tensors = base.lean_state()
        self.base = type(base).from_state(description, {n: t.clone() for n, t in tensors.items()}, self.device)

    def _new_cloning(self) -> BC:
        shared = {name: getattr(self.config, name) for name in ("hidden", "batch_size", "state_transform", "view")}
        return BC(self.seeds, device=self.device, precision=self.precision, **shared)

    def prepare(self, dataset: Dataset) -> Transitions:
        """Choose, transform and move the data, for the base that is trained along too.

        Raises:
            DataError: as for every offline agent.
            EnvironmentMismatchError: if the base acts in other spaces than the dataset's.
        """
        data = super().prepare(dataset)
        if self.trains_base:
            if self.step == 0:  # what was prepared for data that were then refused is not changed, but replaced
                self.base = self._new_cloning()
            assert isinstance(self.base, BC)
            self.base.prepare(dataset)
            self.base.data = None  # it learns from the batches drawn here
        else:
            self._check_base()
        return data

    def _check_base(self) -> None:
        ours, theirs = self.problem, self.base.problem
        spaces = [(ours.observation_dim, self.box.low.tolist(), self.box.high.tolist())]
        if (box := getattr(self.base, "box", None)) is not None:
            spaces.append((theirs.observation_dim, box.low.tolist(), box.high.tolist()))
        if len(spaces) == 1 or spaces[0] != spaces[1]:
            raise EnvironmentMismatchError(
                f"The base {self.base.algorithm} was trained for {theirs.observation_dim} observation dimensions and "
                f"{theirs.action_dim} actions in another box, or discrete ones; {ours.dataset} has "
                f"{ours.observation_dim}, and actions within {list(ours.action_low)}..{list(ours.action_high)}."
            )

    def build(self) -> None:
        """Make the score network, its average, the inverse model and their optimisers."""
        cfg, d_s, d_a = self.config, self.problem.observation_dim, self.problem.action_dim

        def score() -> Score:
            return Score(self.mlp("score", d_s + d_a + 1, d_s + d_a), cfg.sigma_range)

        self.score, self.score_average = score(), score()  # same stream, so equal at the start
        self.inverse = self.mlp("inverse", 2 * d_s, d_a)
        self.networks = nn.ModuleDict(
            {"score": self.score, "score_average": self.score_average, "inverse": self.inverse}
        )
        self.optimizers = {
            "score": adam(self.score.parameters(), cfg.learning_rate),
            "inverse": adam(self.inverse.parameters(), cfg.learning_rate),
        }
        self._level, self._noise = self.stream("noise level"), self.stream("denoising noise")

    def update(self, batch: Batch) -> Metrics:
        """Take one step of the score network, one of the inverse model, and one of a base that is trained along."""
        cfg = self.config
        metrics: Metrics = {}
        if self.trains_base:
            assert isinstance(self.base, BC)
            metrics = self.base.update(batch)
            self.base.step += 1
        action = self.box.unit(batch.action)
        pair = torch.cat([batch.obs, action], -1)
        low, high = (math.log(level) for level in cfg.sigma_range)
        sigma = torch.exp(low + (high - low) * self._level.uniform(self.step, (pair.shape[1], 1)))
        noise = self._noise.normal(self.step, pair.shape[1:])
        score_loss = denoising_loss(self.score(pair + sigma * noise, sigma), noise, sigma, batch.weight)
        descend(self.optimizers["score"], score_loss)
        polyak_update(self.score_average, self.score, cfg.averaging)

        predicted = self.inverse(torch.cat([batch.obs, batch.next_obs - batch.obs], -1))
        loss = inverse_loss(predicted, action, batch.terminated, batch.weight)
        descend(self.optimizers["inverse"], loss)
        return {"score_loss": score_loss.detach(), "inverse_loss": loss.detach(), **metrics}

    # ------------------------------------------------------------------------------------------------- acting

    @property
    def is_deterministic(self) -> bool:
        """Whether the base's policy is."""
        return isinstance(self.base, OfflineAgent) and self.base.is_deterministic

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map raw observations ``[S, n, d_s]`` to corrected actions ``[S, n, d_a]`` inside the action box.

        With standard normal `noise` ``[S, n, d_a]`` a stochastic base samples the action that is corrected.
        """
        with torch.no_grad():
            raw = obs.to(self.device, self.dtype)
            states = self.transform_states(raw)
            return self.box.clip(self._corrected(states, self._base_action(raw, noise)))

    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Map transformed states to corrected actions; the base sees raw ones, restored up to a rounding."""
        return self._corrected(obs, self._base_action(self._states.inverse(obs), noise))

    def _base_action(self, raw: Tensor, noise: Tensor | None) -> Tensor:
        if len(self.base.seeds) == len(raw):
            return self.base.act(raw, noise).to(self.device, self.dtype)
        noises = [None] * len(raw) if noise is None else noise.split(1)
        acted = [self.base.act(rows, draw) for rows, draw in zip(raw.split(1), noises, strict=True)]
        return torch.cat(acted).to(self.device, self.dtype)

    def _corrected(self, states: Tensor, action: Tensor) -> Tensor:
        score = self.score_average.at(self.config.sigma)
        return corrected(states, action, score, self.inverse, self.box, self.config)

    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's base and correction as an ordinary module."""
        base = self.base.plain_policy(seed_index if len(self.base.seeds) > 1 else 0)
        score, inverse = self.score_average.plain(seed_index), self.inverse.plain(seed_index)
        return _PlainCDSA(base, self._states, score, inverse, self.box, self.config)

    # -------------------------------------------------------------------------------------------- exact state

    def description(self) -> dict[str, Any]:
        """Return the description, the base's included."""
        return super().description() | {"base": self.base.description(), "trains_base": self.trains_base}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a checkpoint holds, the base's tensors under ``base/``."""
        description, tensors = super().state()
        return description, tensors | {f"base/{name}": tensor for name, tensor in self.base.state()[1].items()}

    def lean_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state without what this agent or its base experienced."""
        (description, tensors), (base, base_tensors) = super().lean_state(), self.base.lean_state()
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("base/")}
        return description | {"base": base}, tensors | {f"base/{name}": tensor for name, tensor in base_tensors.items()}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Self:
        """Make an agent from what :meth:`state` returned."""
        agent = super().from_state(config, tensors, device)
        kind = algorithm_class(config["base"]["algorithm"])
        agent.base = kind.from_state(config["base"], below("base/", tensors), device)
        agent.trains_base = config["trains_base"]
        return agent

    def select(self, index: int) -> Self:
        """Return a copy with only the seed at position `index`, and the base's of the same position if it has more."""
        chosen = super().select(index)
        if len(self.base.seeds) > 1:
            chosen.base = self.base.select(index)
        return chosen

    def card(self) -> dict[str, Any]:
        """Return what ``run.json`` says, of the base too unless it is trained along."""
        base = {} if self.trains_base else {"base": self.base.card() | {"fingerprint": self._base_name()}}
        return super().card() | base

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"base": "behaviour cloning" if self.trains_base else self._base_name()}

    def _base_name(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.base.networks.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"{self.base.algorithm} {digest.hexdigest()[:12]}"


class _PlainCDSA(nn.Module):
    """Transformed states ``[n, d_s]`` to corrected actions."""

    def __init__(
        self,
        base: nn.Module,
        transform: StateTransform,
        score: Score,
        inverse: nn.Module,
        box: ActionBox,
        config: CDSAConfig,
    ) -> None:
        super().__init__()
        self.base, self.transform, self.score, self.inverse = base, transform, score, inverse
        self.box, self.config = box, config

    def forward(self, states: Tensor) -> Tensor:
        action = self.base(self.transform.inverse(states))
        return corrected(states, action, self.score.at(self.config.sigma), self.inverse, self.box, self.config)
