r"""A2PR: TD3 whose policy is pulled towards the logged action or a VAE's, whichever has the larger advantage.

Paper: T. Liu, Y. Li, Y. Lan, H. Gao, W. Pan, X. Xu, "Adaptive Advantage-Guided Policy Regularization for Offline
Reinforcement Learning", ICML 2024, arXiv 2405.19909.
Reference code: ltlhuuu/A2PR (losses, networks, constants, update order; per-dataset settings in its README).

After the critics' step, with their smoothed next action a' and target y,

    L_V   = mean (V(s) - min(y, r + gamma (1 - d) min_j Q_j(s', a')))^2
    L_VAE = mean_{b, i} w 1[Q_1(s, a) > V(s)] (a^ - a)_i^2 + mean_b KL(N(m, diag(sigma)^2) || N(0, I)) / (2 L)
            a^ = decode(s, m + sigma eps),   (m, log sigma) = encode(s, a),   L = 2 d_a latents

and on policy steps, with a proposal a~ of the VAE,

    a*    = a~ if Q_1(s, a~) >= Q_1(s, a) else a                                   (the larger advantage)
    L_pi  = -lambda mean Q_1(s, pi(s)) + mask mean_{b, i} 1[Q_1(s, a~) >= V(s) or Q_1(s, a) > V(s)] (pi(s) - a*)_i^2

Where neither action has an advantage the policy is free. Both steps compare with V(s) from before V's step. The rest
is corollary.offline.td3.

Deviations and choices:
1. V averages over the *data's* actions a one-step target of the *policy's* value; it is not the policy's value.
2. ``proposal="posterior_of_policy"`` (default) is what the code runs: a~ is the reconstruction of (s, pi(s)).
   ``"prior"`` draws the latent from N(0, I) clipped to +-0.5, which the code provides and does not use; the paper
   speaks of sampling from the VAE [memory].
3. ``attached_target=True`` (default), as the code: where a* is the reconstruction of pi(s), its gradient reaches the
   policy through decoder and encoder. With False a* is a constant.
4. The paper's threshold on the advantage [memory] is absent from the code, and here.
5. The authors' current README has the settings of the medium sets [code]; the others stood in its earlier form, last
   as READMEv0.md in commit c1fe2a8 [code-history] (which changed HalfCheetah medium-expert's mask from 10 to 15). Those
   of AntMaze are not public. The defaults are the class's, one for all datasets.
6. The authors train on D4RL's q-learning rows, ``view="d4rl_qlearning"``; the default keeps all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.actor_critic import td_target, weighted_mean
from ..core.agent import Metrics, adam, descend
from ..core.config import Preset
from ..core.dataset import Batch
from ..core.distributions import DiagonalGaussian, kl
from ..core.networks import DeterministicActor, ValueNetwork
from ..kernels.streams import RandomStream
from .td3 import TD3Agent, TD3Config, action_error

LATENT_LOG_STD = (-4.0, 15.0)
"""Bounds of the encoder's log standard deviation."""

LATENT_BOUND = 0.5
"""Bound of latents drawn from the prior."""


@dataclass(frozen=True, kw_only=True)
class A2PRConfig(TD3Config):
    """A2PR's settings beyond the core's; `hidden` are the widths of critics and V.

    Attributes:
        mask: weight of the pull on rows that have one, >= 0; 0 is TD3, large values copy the targets a*.
        vae_weight: weight of the VAE's reconstruction, >= 0; 0 leaves the KL alone, which teaches the decoder nothing;
            large values make the VAE an autoencoder.
        proposal: a~ is the reconstruction of the policy's action, ``"posterior_of_policy"`` (released code), or decoded
            from the clipped ``"prior"``.
        attached_target: whether the policy's gradient also passes through its reconstruction (released code).
        actor_hidden, vae_hidden: widths of the hidden layers of policy, encoder and decoder.
        value_lr, vae_lr: Adam's step sizes, > 0.
    """

    hidden: tuple[int, ...] = (256, 256, 256, 256)
    mask: float = 1.0
    vae_weight: float = 1.0
    proposal: Literal["posterior_of_policy", "prior"] = "posterior_of_policy"
    attached_target: bool = True
    actor_hidden: tuple[int, ...] = (256, 256, 256)
    vae_hidden: tuple[int, ...] = (750, 750)
    value_lr: float = 3e-4
    vae_lr: float = 1e-3

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("mask", self.mask >= 0, ">= 0")
        self.require("vae_weight", self.vae_weight >= 0, ">= 0")
        for name in ("actor_hidden", "vae_hidden"):
            self.require(name, min(getattr(self, name), default=0) >= 1, "one or more positive widths")
        for name in ("value_lr", "vae_lr"):
            self.require(name, getattr(self, name) > 0, "> 0")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def value_loss(value: Tensor, target: Tensor, online_target: Tensor, weight: Tensor | None = None) -> Tensor:
    """``mean (V - min(y, y_online))^2`` over ``[..., B]``; the targets are the target critics' and the critics' own."""
    return weighted_mean((value - torch.minimum(target, online_target)).square(), weight)


def advantageous(q: Tensor, value: Tensor) -> Tensor:
    """Rows the VAE learns from: ``1[Q_1(s, a) > V(s)]`` over ``[..., B]``, a constant."""
    return (q > value).to(q.dtype)


def vae_loss(
    reconstruction: Tensor,
    action: Tensor,
    latent: DiagonalGaussian,
    row_weight: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """``mean w (a^ - a)^2 + KL(q(z|s, a) || N(0, I)) / (2 L)`` for actions ``[..., B, d_a]``; shape ``[...]``.

    `row_weight` ``[..., B]`` multiplies the reconstruction alone, `weight` the row's whole loss.
    """
    zero = latent.mean.new_zeros(())
    divergence = kl(latent, DiagonalGaussian(zero, zero)) / latent.mean.shape[-1]
    error = (reconstruction - action).square().mean(-1)
    return weighted_mean(row_weight * error + divergence / 2, weight)


def regularisation_target(
    proposal: Tensor, action: Tensor, q_proposal: Tensor, q_action: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a* ``[..., B, d_a]``, whether it is the proposal, and whether either action is advantageous, ``[..., B]``.

    `value` shifts both advantages alike, so it does not matter to the choice between the two.
    """
    is_proposal = q_proposal >= q_action
    pulled = (q_proposal >= value) | (q_action > value)
    return torch.where(is_proposal.unsqueeze(-1), proposal, action), is_proposal, pulled


Network = Callable[[Tensor], Tensor]


class A2PR(TD3Agent[A2PRConfig]):
    """A2PR (Liu et al., 2024); see the module's head."""

    algorithm: ClassVar[str] = "offline.a2pr"
    config_type = A2PRConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-09a", "OFF-09e", "OFF-10a", "OFF-10b", "OFF-10c", "OFF-20a")
    presets: ClassVar[dict[str, Preset]] = {
        "uniform": Preset({}, "class defaults of ltlhuuu/A2PR [code], one setting for all datasets"),
        "halfcheetah-medium": Preset({"alpha": 40.0}, "ltlhuuu/A2PR README [code]"),
        "halfcheetah-medium-replay": Preset(
            {"alpha": 40.0, "vae_weight": 1.5, "mask": 0.8, "discount": 0.995}, "ltlhuuu/A2PR README [code-history]"
        ),
        "halfcheetah-medium-expert": Preset({"alpha": 40.0, "mask": 15.0}, "ltlhuuu/A2PR READMEv0 [code-history]"),
        "hopper-random": Preset(
            {"vae_weight": 1.5, "mask": 1.5, "discount": 0.995}, "ltlhuuu/A2PR README [code-history]"
        ),
        "hopper-medium": Preset({"mask": 0.4, "discount": 0.995}, "ltlhuuu/A2PR README [code]"),
        "hopper-medium-replay": Preset({"vae_weight": 1.5, "mask": 0.5}, "ltlhuuu/A2PR README [code-history]"),
        "hopper-medium-expert": Preset({"mask": 4.0}, "ltlhuuu/A2PR README [code-history]"),
        "walker2d-medium": Preset({"vae_weight": 1.5}, "ltlhuuu/A2PR README [code]"),
        "walker2d-medium-replay": Preset(
            {"vae_weight": 1.5, "mask": 1.2, "discount": 0.995}, "ltlhuuu/A2PR README [code-history]"
        ),
        "walker2d-medium-expert": Preset({"mask": 0.8}, "ltlhuuu/A2PR README [code-history]"),
    }

    def make_actor(self) -> DeterministicActor:
        """Make a policy with hidden layers of its own widths."""
        d_s, d_a = self.problem.observation_dim, self.problem.action_dim
        return DeterministicActor(self.mlp("actor", d_s, d_a, hidden=self.config.actor_hidden), self.box)

    def build(self) -> None:
        """Make the core's networks, V, encoder and decoder."""
        super().build()
        cfg = self.config
        d_s, d_a = self.problem.observation_dim, self.problem.action_dim
        self.value = ValueNetwork(self.mlp("value", d_s, 1))
        self.encoder = self.mlp("encoder", d_s + d_a, 2 * (2 * d_a), hidden=cfg.vae_hidden)
        self.decoder = self.mlp("decoder", d_s + 2 * d_a, d_a, hidden=cfg.vae_hidden)
        self.networks.update({"value": self.value, "encoder": self.encoder, "decoder": self.decoder})
        self.optimizers |= {
            "value": adam(self.value.parameters(), cfg.value_lr),
            "vae": adam([*self.encoder.parameters(), *self.decoder.parameters()], cfg.vae_lr),
        }
        self._vae_noise, self._proposal_noise = self.stream("vae"), self.stream("proposal")

    def after_critic(self, batch: Batch, next_action: Tensor, target: Tensor) -> Metrics:
        """Take one step of V, then one of the VAE."""
        value = self.value(batch.obs)
        with torch.no_grad():
            next_value = self.critic(batch.next_obs, next_action).amin(1)
            online_target = td_target(batch.reward, batch.terminated, next_value, self.config.discount)
        loss_of_value = value_loss(value, target, online_target, batch.weight)
        descend(self.optimizers["value"], loss_of_value)

        # What the policy step too compares actions with.
        self._value = value.detach()
        with torch.no_grad():
            self._q = self.critic.first(batch.obs, batch.action)
        kept = advantageous(self._q, self._value)
        noise = self._latent_noise(self._vae_noise, batch)
        latent = self._posterior(self.encoder, batch.obs, batch.action)
        reconstruction = self._decode(self.decoder, batch.obs, latent.sample(noise))
        loss = vae_loss(reconstruction, batch.action, latent, self.config.vae_weight * kept, batch.weight)
        descend(self.optimizers["vae"], loss)
        return {
            "value_loss": loss_of_value.detach(),
            "value": self._value.mean(1),
            "vae_loss": loss.detach(),
            "advantageous_fraction": kept.mean(1),
        }

    def penalty(self, batch: Batch, action: Tensor) -> tuple[Tensor, Metrics]:
        """Return the distance to the better of the VAE's and the logged action, where one of them is advantageous."""
        cfg = self.config
        proposal = self.propose(batch, action)
        if not cfg.attached_target:
            proposal = proposal.detach()
        with torch.no_grad():
            q_proposal = self.critic.first(batch.obs, proposal)
        target, is_proposal, pulled = regularisation_target(proposal, batch.action, q_proposal, self._q, self._value)
        row_weight = cfg.mask * pulled.to(action.dtype)
        if batch.weight is not None:
            row_weight = row_weight * batch.weight
        return action_error(action, target, row_weight), {
            "masked_fraction": 1 - pulled.to(action.dtype).mean(1),
            "vae_target_fraction": is_proposal.to(action.dtype).mean(1),
        }

    def propose(self, batch: Batch, action: Tensor) -> Tensor:
        """Return the VAE's proposals ``[S, B, d_a]`` at the policy's actions, the VAE's parameters held constant."""
        latent = self._latent_noise(self._proposal_noise, batch)
        if self.config.proposal == "prior":
            latent = latent.clamp(-LATENT_BOUND, LATENT_BOUND)
        else:
            latent = self._posterior(self.encoder.constant, batch.obs, action).sample(latent)
        return self._decode(self.decoder.constant, batch.obs, latent)

    def _latent_noise(self, stream: RandomStream, batch: Batch) -> Tensor:
        return stream.normal(self.step, (batch.obs.shape[1], 2 * self.problem.action_dim))

    def _posterior(self, encoder: Network, obs: Tensor, action: Tensor) -> DiagonalGaussian:
        mean, log_std = encoder(torch.cat([obs, action], -1)).chunk(2, -1)
        return DiagonalGaussian(mean, log_std.clamp(*LATENT_LOG_STD))

    def _decode(self, decoder: Network, obs: Tensor, latent: Tensor) -> Tensor:
        action: Tensor = self.box(torch.tanh(decoder(torch.cat([obs, latent], -1))))
        return action
