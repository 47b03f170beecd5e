r"""FamO2O: a family of policies, one for each balance of value against imitation, and a policy that picks the balance.

Paper: S. Wang et al., "Train Once, Get a Family: State-Adaptive Balances for Offline-to-Online Reinforcement
Learning", NeurIPS 2023, arXiv 2310.17966.
Reference code: LeapLabTHU/FamO2O, folder jax_iql. This is the variant on IQL; :mod:`corollary.offline.famo2o_cql` is
the one on CQL.

    e(beta)     = (sin beta / c_i, cos beta / c_i), i = 0, 1, 2,                                  c_i = 10^(4 i / 3)
    pi_u(.|s, e(beta)) = N(m(s, e(beta)), diag(sigma)^2)                                the family: universal policy
    pi_b(.|s):    beta = lo + (hi - lo) (x + 1) / 2,   x = tanh(u),   u ~ N(mu(s), sigma_b^2)         balance policy
    A     = min_j Q'_j(s, a) - V(s)
    L_b   = mean (T log pi_b(x|s) - min_j Q'_j(s, a~)),                    x ~ pi_b(.|s),   a~ ~ pi_u(.|s, e(beta(x)))
    L_T   = -T mean (log pi_b(x|s) + H)
    L_u   = -mean min(exp(beta A), 100) log pi_u(a|s, e(beta)),      beta uniform offline, beta ~ pi_b(.|s) online

L_V and L_Q are IQL's. Order of a step: V, balance policy, T, universal policy (its beta from the balance policy before
its step), critics, Polyak averaging (:mod:`corollary.offline.in_sample`). Acting: beta at x = tanh(mu(s)).

Deviations and choices:
1. In the released code beta is a column [B, 1] and A a row [B], so exp(beta A) is a matrix [B, B]: each row's weight is
   averaged over the betas of the whole batch and does not depend on the beta that its policy is told. The exact minimum
   of that is one policy for the whole family. It is ``beta_broadcast="released"``; which of the two gave the published
   numbers is unknown. The variant on CQL squeezes.
2. log pi_b is the density of x in (-1, 1), and L_T linear in T, as in their code.
3. They reuse one random key for beta and for the action; here the numbers are independent.
4. Their AntMaze configuration is the only one released (`"antmaze"`); range and `balance_freq` for locomotion are those
   of a reimplementation. Their class, but no configuration, has the range (1, 5) and the expectile 0.8.
5. They train, and take the range of returns, from D4RL's q-learning rows, ``view="d4rl_qlearning"``; the default keeps
   all rows.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.actor_critic import average, entropy_coefficient_loss, sac_policy_loss, weighted_mean
from ..core.agent import Metrics, adam, descend
from ..core.config import Preset
from ..core.dataset import Batch
from ..core.distributions import DiagonalGaussian, SquashedGaussian
from ..core.networks import ActionBox, GaussianActor, StackedMLP
from .in_sample import InSampleAgent, InSampleConfig
from .iql import expectile_loss
from .weighted_cloning import exponential_weight

ENCODING_DIM = 6
_DIVISORS = tuple(10_000 ** (2 * i / ENCODING_DIM) for i in range(ENCODING_DIM // 2))


@dataclass(frozen=True, kw_only=True)
class FamO2OConfig(InSampleConfig):
    """FamO2O's settings beyond the core's; defaults are for MuJoCo locomotion.

    Attributes:
        expectile: tau in (0, 1); 0.5 evaluates the behaviour policy, -> 1 the best action in the data.
        beta_range: (lo, hi), 0 <= lo < hi, of the balance: inverse temperature of the advantage. 0 clones the data,
            large values take the best action.
        beta_broadcast: ``"squeezed"``, each row with its own beta, or ``"released"`` (choice 1).
        balance_freq: steps per step of the balance policy, >= 1.
        balance_lr, temperature_lr: Adam's step sizes of balance policy and log T, > 0.
        initial_temperature: T at first, > 0.
        target_entropy: H of x, in nats; at most log 2, where x is uniform.
    """

    actor_lr_decay_steps: int | None = None
    expectile: float = 0.7
    beta_range: tuple[float, float] = (1.0, 5.0)
    beta_broadcast: Literal["squeezed", "released"] = "squeezed"
    balance_freq: int = 1
    balance_lr: float = 3e-4
    temperature_lr: float = 3e-4
    initial_temperature: float = 1.0
    target_entropy: float = -0.5

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("expectile", 0 < self.expectile < 1, "in (0, 1)")
        self.require("beta_range", 0 <= self.beta_range[0] < self.beta_range[1], "an increasing pair >= 0")
        self.require("balance_freq", self.balance_freq >= 1, ">= 1")
        for name in ("balance_lr", "temperature_lr", "initial_temperature"):
            self.require(name, getattr(self, name) > 0, "> 0")
        self.require("policy", self.policy == "gaussian", "'gaussian': the balance policy needs samples of it")


def encode_balance(beta: Tensor) -> Tensor:
    """Encode ``[..., 1]`` as ``[..., 6]``: sine and cosine of beta over 1, 21.54 and 464.2, one after the other."""
    return torch.cat([f(beta / divisor) for divisor in _DIVISORS for f in (torch.sin, torch.cos)], -1)


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def family_weight(advantage: Tensor, beta: Tensor, row_weight: Tensor | None, broadcast: str) -> Tensor:
    """``min(exp(beta_b A_b), 100)`` over ``[..., B]``; ``"released"`` gives ``mean_i min(exp(beta_i A_b), 100)``."""
    if broadcast == "squeezed":
        return exponential_weight(beta * advantage)
    pairs = exponential_weight(advantage.unsqueeze(-1) * beta.unsqueeze(-2))
    return average(pairs, None if row_weight is None else row_weight.unsqueeze(-2).expand_as(pairs))


class BalancePolicy(nn.Module):
    """``beta = box(tanh(u))``, ``u ~ N(mu(s), sigma^2)`` with one sigma for all states, for every seed."""

    def __init__(self, net: StackedMLP, box: ActionBox) -> None:
        super().__init__()
        self.net = net
        self.box = box
        self.log_std = nn.Parameter(torch.zeros_like(net.biases[-1]))  # [S, 1]

    def forward(self, obs: Tensor) -> SquashedGaussian:
        """Map states ``[S, B, d_s]`` to distributions of x, ``[S, B, 1]``."""
        return SquashedGaussian(DiagonalGaussian(self.net(obs), self.log_std.clamp(-10, 2).unsqueeze(1)))

    def plain(self, seed_index: int) -> nn.Module:
        """Return one seed's beta at x = tanh(mu(s)), ``[n, d_s]`` to ``[n, 1]``, as an ordinary module."""
        return nn.Sequential(self.net.plain(seed_index), nn.Tanh(), self.box)


class PlainFamily(nn.Module):
    """One seed's balance, and the family's action at it, on ``[n, d_s]``."""

    def __init__(self, balance: nn.Module, actor: nn.Module) -> None:
        super().__init__()
        self.balance = balance
        self.actor = actor

    def forward(self, obs: Tensor) -> Tensor:
        """Map states ``[n, d_s]`` to actions ``[n, d_a]``."""
        action: Tensor = self.actor(torch.cat([obs, encode_balance(self.balance(obs))], -1))
        return action


def balance_quantiles(beta: Tensor) -> Metrics:
    """Return the 10, 50 and 90 % quantiles over a batch of balances ``[S, B, 1]``."""
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=beta.dtype, device=beta.device)
    quantiles = torch.quantile(beta.detach().squeeze(-1), levels, dim=1)
    return dict(zip(("beta_q10", "beta_q50", "beta_q90"), quantiles, strict=True))


class FamO2O(InSampleAgent[FamO2OConfig]):
    """FamO2O on IQL (Wang et al., 2023); see the module's head."""

    actor: GaussianActor
    algorithm: ClassVar[str] = "offline.famo2o"
    config_type = FamO2OConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-07a", "OFF-07b", "OFF-11a", "OFF-11b", "OFF-11c")
    presets: ClassVar[dict[str, Preset]] = {
        "locomotion": Preset({"balance_freq": 5}, "range and frequency of a reimplementation [port]"),
        "antmaze": Preset(
            {"expectile": 0.9, "beta_range": (8.0, 14.0), "reward_transform": "antmaze_minus1"},
            "LeapLabTHU/FamO2O jax_iql/configs/family_antmaze_finetune_config.py [code]",
        ),
    }

    def implicit_value_loss(self, residual: Tensor, weight: Tensor | None) -> Tensor:
        """Return the expectile loss."""
        return expectile_loss(residual, self.config.expectile, weight)

    @property
    def actor_input_dim(self) -> int:
        """d_s and the encoded balance."""
        return self.problem.observation_dim + ENCODING_DIM

    def build(self) -> None:
        """Make balance policy and temperature beside IQL's networks."""
        super().build()
        cfg = self.config
        low, high = cfg.beta_range
        box = ActionBox((low,), (high,), self.dtype).to(self.device)
        self.balance = BalancePolicy(self.mlp("balance", self.problem.observation_dim, 1, init=cfg.init), box)
        self.networks["balance"] = self.balance
        self.log_temperature = nn.Parameter(
            torch.full((len(self.seeds),), cfg.initial_temperature, dtype=self.dtype, device=self.device).log()
        )
        self.networks.register_parameter("log_temperature", self.log_temperature)
        self.optimizers["balance"] = adam(self.balance.parameters(), cfg.balance_lr)
        self.optimizers["temperature"] = adam([self.log_temperature], cfg.temperature_lr)
        self._uniform_beta, self._beta_noise = self.stream("uniform balance"), self.stream("balance")
        self._action_noise = self.stream("balance action")

    def improve(self, batch: Batch, advantage: Tensor) -> Metrics:
        """Take the balance policy's step where it is due, then the universal policy's."""
        cfg = self.config
        metrics: Metrics = {}
        due = (self.step + 1) % cfg.balance_freq == 0
        noise = self._beta_noise.normal(self.step, (advantage.shape[1], 2))
        if due or self.online_phase:
            x = self.balance(batch.obs)
        if self.online_phase:
            beta = self.balance.box(x.sample(noise[..., :1])).detach()
        else:
            beta = self.balance.box(2 * self._uniform_beta.uniform(self.step, (advantage.shape[1], 1)) - 1)
        if due:
            metrics = self._balance_step(batch, x, noise[..., 1:])
        obs = torch.cat([batch.obs, encode_balance(beta)], -1)
        weight = family_weight(advantage, beta.squeeze(-1), batch.weight, cfg.beta_broadcast)
        return metrics | self.policy_step(obs, batch.action, weight, batch.weight)

    def _balance_step(self, batch: Batch, x: SquashedGaussian, noise: Tensor) -> Metrics:
        latent, log_prob = x.draw(noise)
        log_prob = log_prob.squeeze(-1)
        beta = self.balance.box(torch.tanh(latent))
        policy = self.actor.constant(torch.cat([batch.obs, encode_balance(beta)], -1))
        action = policy.sample(self._action_noise.normal(self.step, batch.action.shape[1:]))
        q = self.critic_target.constant(batch.obs, action).amin(1)
        temperature = self.log_temperature.exp()
        loss = weighted_mean(sac_policy_loss(log_prob, q, temperature.unsqueeze(1)), batch.weight)
        descend(self.optimizers["balance"], loss)
        dual = entropy_coefficient_loss(temperature, log_prob, self.config.target_entropy, batch.weight)
        descend(self.optimizers["temperature"], dual)
        return {
            "balance_loss": loss.detach(),
            "balance_entropy": -log_prob.detach().mean(1),
            "temperature": temperature.detach(),
            **balance_quantiles(self.balance.box(x.mode())),
        }

    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Return the family's mean action at the balance of x = tanh(mu(s)), or a sample where `noise` is given."""
        beta = self.balance.box(self.balance(obs).mode())
        return super().policy(torch.cat([obs, encode_balance(beta)], -1), noise)

    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's balance and mean action as an ordinary module."""
        return PlainFamily(self.balance.plain(seed_index), self.actor.plain(seed_index))
