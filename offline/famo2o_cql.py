r"""FamO2O on CQL: the family of policies weighs values by the balance; critics and their penalty are CQL's.

Paper: S. Wang et al., "Train Once, Get a Family: State-Adaptive Balances for Offline-to-Online Reinforcement
Learning", NeurIPS 2023, arXiv 2310.17966.
Reference code: LeapLabTHU/FamO2O, folder jax_cql. :mod:`corollary.offline.famo2o` is the variant on IQL; it defines the
encoding e(beta).

    beta~   = lo + (hi - lo) (x + 1) / 2,   x ~ pi_b(.|s), a squashed Gaussian                          balance policy
    beta    uniform on (lo, hi) offline, beta~ online
    L_u     = mean (alpha log pi_u(a~|s, e(beta)) - beta min_j Q_j(s, a~)),       a~ ~ pi_u(.|s, e(beta))
    L_b     = -mean min_j Q_j(s, a~~),                                            a~~ ~ pi_u(.|s, e(beta~))
    L_Q     CQL's, with next actions from pi_u(.|s', e(beta~)) and the state's from pi_u(.|s, e(beta))

As in CQL all losses of a step are taken at the parameters from before it. Acting: beta at x = tanh(mu(s)).

Deviations and choices:
1. The released code maps x to lo + (hi - lo) x, as if x were in (0, 1): beta~ lies in (2 lo - hi, hi), (-0.5, 1.5) with
   its range (0.5, 1.5). Half of that is outside the range that pi_u is trained on, and a negative beta minimises Q.
   That is ``beta_map="released"``.
2. beta~ is that of s and not of s' in next actions too, as in the released code.
3. Initialisation and the scale of log sigma as in choice 3 of :mod:`corollary.offline.cql`; theirs are Flax's.
4. Their locomotion configuration is the only one released: 2e6 gradient steps offline, 1e6 online.
5. By default every row with a known successor is used; the authors' runs had D4RL's q-learning rows,
   ``view="d4rl_qlearning"``.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.actor_critic import weighted_mean
from ..core.agent import Metrics, adam, descend
from ..core.config import Preset
from ..core.dataset import Batch
from ..core.networks import ActionBox
from ..core.policies import SquashedGaussianPolicy
from .cql import ConservativeAgent, CQLConfig, PolicyInputs
from .famo2o import ENCODING_DIM, PlainFamily, balance_quantiles, encode_balance


@dataclass(frozen=True, kw_only=True)
class FamO2OCQLConfig(CQLConfig):
    """FamO2O-CQL's settings beyond CQL's; defaults are the authors' for MuJoCo locomotion.

    Attributes:
        beta_range: (lo, hi), 0 <= lo < hi, of the balance: factor of the value against the entropy bonus.
        beta_map: ``"range"`` maps the balance policy onto `beta_range`; ``"released"`` onto (2 lo - hi, hi) (choice 1).
        balance_lr: Adam's step size of the balance policy, > 0.
    """

    hidden: tuple[int, ...] = (256, 256)
    critic_layer_norm: bool = True
    log_std_range: tuple[float, float] = (-20.0, 2.0)
    initial_log_std: float = -1.0
    action_margin: float = 1e-3
    actor_lr: float = 3e-4
    conservative_weight: float = 1.0
    beta_range: tuple[float, float] = (0.5, 1.5)
    beta_map: Literal["range", "released"] = "range"
    balance_lr: float = 3e-4

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("beta_range", 0 <= self.beta_range[0] < self.beta_range[1], "an increasing pair >= 0")
        self.require("balance_lr", self.balance_lr > 0, "> 0")


class FamO2OCQL(ConservativeAgent[FamO2OCQLConfig]):
    """FamO2O on CQL (Wang et al., 2023); see the module's head."""

    algorithm: ClassVar[str] = "offline.famo2o_cql"
    config_type = FamO2OCQLConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-07a", "OFF-07b")
    presets: ClassVar[dict[str, Preset]] = {
        "locomotion": Preset({}, "LeapLabTHU/FamO2O jax_cql/cql_finetune/finetune_configs/family.py [code]"),
    }

    @property
    def actor_input_dim(self) -> int:
        """d_s and the encoded balance."""
        return self.problem.observation_dim + ENCODING_DIM

    def build(self) -> None:
        """Make the balance policy beside CQL's networks."""
        super().build()
        cfg = self.config
        low, high = cfg.beta_range
        lowest = low if cfg.beta_map == "range" else 2 * low - high
        self._range = ActionBox((low,), (high,), self.dtype).to(self.device)
        net = self.mlp("balance", self.problem.observation_dim, 2, output_init="xavier", output_gain=0.01)
        with torch.no_grad():
            net.biases[-1][:, 1:] = cfg.initial_log_std
        box = ActionBox((lowest,), (high,), self.dtype).to(self.device)
        self.balance = SquashedGaussianPolicy(net, box, cfg.log_std_range)
        self.networks["balance"] = self.balance
        self.optimizers["balance"] = adam(self.balance.parameters(), cfg.balance_lr)
        self._uniform_beta, self._beta_noise = self.stream("uniform balance"), self.stream("balance")

    def policy_inputs(self, batch: Batch) -> PolicyInputs:
        """Take the balance policy's step, and tell the family its balance."""
        rows, d_a = batch.action.shape[1:]
        for_beta, for_action = self._beta_noise.normal(self.step, (rows, 1 + d_a)).split([1, d_a], -1)
        x = self.balance(batch.obs)
        chosen = self.balance.box(x.sample(for_beta))
        metrics = balance_quantiles(self.balance.box(x.mode()))
        if self.step >= self.config.bc_steps:  # before, the critics say nothing of the family
            metrics |= self._balance_step(batch, chosen, for_action)
        beta = chosen = chosen.detach()
        if not self.online_phase:
            beta = self._range(2 * self._uniform_beta.uniform(self.step, (rows, 1)) - 1)
        return PolicyInputs(
            torch.cat([batch.obs, encode_balance(beta)], -1),
            torch.cat([batch.next_obs, encode_balance(chosen)], -1),
            beta.squeeze(-1),
            metrics,
        )

    def _balance_step(self, batch: Batch, beta: Tensor, noise: Tensor) -> Metrics:
        policy = self.actor.constant(torch.cat([batch.obs, encode_balance(beta)], -1))
        q = self.critic.constant(batch.obs, self.box(policy.sample(noise))).amin(1)
        loss = weighted_mean(-q, batch.weight)
        descend(self.optimizers["balance"], loss)
        return {"balance_loss": loss.detach()}

    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Play the family at the balance of x = tanh(mu(s)): sample with `noise`, or its squashed mean."""
        beta = self.balance.box(self.balance(obs).mode())
        return super().policy(torch.cat([obs, encode_balance(beta)], -1), noise)

    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's balance and squashed mean as an ordinary module."""
        return PlainFamily(self.balance.plain(seed_index), self.actor.plain(seed_index))
