r"""ReBRAC: TD3+BC with a second penalty in the critics' target, LayerNorm in the critics, deeper nets, larger batches.

Paper: D. Tarasov, V. Kurenkov, A. Nikulin, S. Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement
Learning", NeurIPS 2023, arXiv 2305.09836.
Reference code: tinkoff-ai/ReBRAC (networks, initialisation, update order, per-dataset settings) [code].

    y    = r + gamma (1 - d) (min_j Q'_j(s', a~) - beta_2 |a~ - a'|^2),        a' the action logged in s'
    L_pi = -mean min_j Q_j(s, pi(s)) / sg[mean |min_j Q_j(s, pi(s))|] + beta_1 mean |pi(s) - a|^2

|.|^2 sums over the action's dimensions, where TD3+BC averages. Critics: ReLU, then LayerNorm, in every hidden layer.
Initialisation: hidden weights U(+-1/sqrt(fan in)) with biases 0.1; last layer U(+-1e-3) in the policy, U(+-3e-3) in the
critics. States and rewards are as recorded; AntMaze's rewards are multiplied by 100. The rest is corollary.offline.td3.

Policy and targets move at the first update and every `policy_freq`-th after it. The policy's target then moves towards
the policy from before its step, the critics' targets towards the critics after theirs, as in the authors' code.

Deviations and choices:
1. The authors tuned beta_1 and beta_2 per dataset; no dataset got the 1 and 1 that their code starts from. The default
   here is the pair most often chosen for locomotion, 0.01 and 0.01 (hopper-medium's, for one).
2. Where the data end without a next action (a recording cut off, in ``view="full"``) the target has no penalty. The
   authors' rows, ``view="d4rl_qlearning"``, lack these. Nor has the target of a row experienced online: the action that
   follows is not known when it is stored. (CORL's fine-tuning drops beta_2 for all rows.)
3. LayerNorm adds 1e-5 to the variance (PyTorch), the authors' 1e-6 (Flax).
4. alpha, which the authors do not have, is 1; larger values are the same as smaller penalties beta_1.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..core.actor_critic import weighted_mean
from ..core.agent import Metrics, descend
from ..core.config import Preset
from ..core.dataset import Batch
from ..core.networks import Critics, DeterministicActor, polyak_update
from .td3 import TD3Agent, TD3Config


@dataclass(frozen=True, kw_only=True)
class ReBRACConfig(TD3Config):
    """ReBRAC's settings beyond the core's; the defaults are the authors' for locomotion, but see choice 1.

    Attributes:
        actor_beta: beta_1 >= 0, the policy's pull towards the logged action; 0 leaves it free, large values clone.
        critic_beta: beta_2 >= 0, in units of reward per squared action, what a next action pays for being off the
            logged one; 0 leaves the target as it is, large values make every deviation look bad.
        critic_layer_norm: whether the critics have LayerNorm.
    """

    hidden: tuple[int, ...] = (256, 256, 256)
    batch_size: int = 1024
    state_transform: str = "none"
    alpha: float = 1.0
    actor_lr: float = 1e-3
    critic_lr: float = 1e-3
    actor_beta: float = 0.01
    critic_beta: float = 0.01
    critic_layer_norm: bool = True

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("actor_beta", self.actor_beta >= 0, ">= 0")
        self.require("critic_beta", self.critic_beta >= 0, ">= 0")


_SMALL_BATCHES: dict[str, Any] = {"batch_size": 256, "actor_lr": 3e-4, "critic_lr": 3e-4}
_ANTMAZE = _SMALL_BATCHES | {"critic_lr": 5e-5, "discount": 0.999, "reward_transform": "antmaze_x100"}
_AUTHORS = "tinkoff-ai/ReBRAC configs/rebrac [code]"
# beta_1, beta_2 of each dataset, what else differs from the defaults, and the source.
_TUNED: tuple[tuple[dict[str, tuple[float, float]], dict[str, Any], str], ...] = (
    (
        {
            "halfcheetah-random": (0.001, 0.1),
            "halfcheetah-medium": (0.001, 0.01),
            "halfcheetah-medium-replay": (0.01, 0.001),
            "halfcheetah-medium-expert": (0.01, 0.1),
            "halfcheetah-expert": (0.01, 0.01),
            "halfcheetah-full-replay": (0.001, 0.1),
            "hopper-random": (0.001, 0.01),
            "hopper-medium": (0.01, 0.01),
            "hopper-medium-replay": (0.05, 0.5),
            "hopper-medium-expert": (0.1, 0.01),
            "hopper-expert": (0.1, 0.1),
            "hopper-full-replay": (0.01, 0.01),
            "walker2d-random": (0.01, 0.0),
            "walker2d-medium": (0.05, 0.1),
            "walker2d-medium-replay": (0.05, 0.01),
            "walker2d-medium-expert": (0.01, 0.01),
            "walker2d-expert": (0.01, 0.5),
            "walker2d-full-replay": (0.01, 0.01),
        },
        {},
        _AUTHORS,
    ),
    (
        {
            "antmaze-umaze": (0.003, 0.002),
            "antmaze-umaze-diverse": (0.003, 0.001),
            "antmaze-medium-play": (0.001, 0.0005),
            "antmaze-medium-diverse": (0.001, 0.0),
            "antmaze-large-play": (0.002, 0.001),
            "antmaze-large-diverse": (0.002, 0.002),
        },
        _ANTMAZE,
        _AUTHORS,
    ),
    (
        {
            "pen-human": (0.1, 0.5),
            "pen-cloned": (0.05, 0.5),
            "pen-expert": (0.01, 0.01),
            "door-human": (0.1, 0.1),
            "door-cloned": (0.01, 0.1),
            "door-expert": (0.05, 0.01),
            "hammer-human": (0.01, 0.5),
            "hammer-cloned": (0.1, 0.5),
            "hammer-expert": (0.01, 0.01),
            "relocate-human": (0.1, 0.01),
            "relocate-cloned": (0.1, 0.01),
            "relocate-expert": (0.05, 0.01),
        },
        _SMALL_BATCHES,
        _AUTHORS,
    ),
    ({"maze2d": (0.003, 0.001)}, _SMALL_BATCHES, "corl-team/CORL configs/offline/rebrac/maze2d [code]"),
)


class ReBRAC(TD3Agent[ReBRACConfig]):
    """ReBRAC (Tarasov et al., 2023); see the module's head."""

    algorithm: ClassVar[str] = "offline.rebrac"
    config_type = ReBRACConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-20a", "OFF-21")
    presets: ClassVar[dict[str, Preset]] = {
        name: Preset({"actor_beta": actor_beta, "critic_beta": critic_beta, **settings}, source)
        for betas, settings, source in _TUNED
        for name, (actor_beta, critic_beta) in betas.items()
    }

    def penalty(self, batch: Batch, action: Tensor) -> tuple[Tensor, Metrics]:
        """Return beta_1 times the squared distance to the action logged with each state."""
        squared = (action - batch.action).square().sum(-1)
        return self.config.actor_beta * weighted_mean(squared, batch.weight), {}

    def target_penalty(self, batch: Batch, next_action: Tensor) -> Tensor:
        """Return beta_2 times the squared distance to the action logged in the next state; 0 if that is unknown."""
        squared = (next_action - batch.next_action).square().sum(-1)
        return self.config.critic_beta * batch.next_action_valid * squared

    def policy_value(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the smaller critic's value."""
        return self.critic.constant(obs, action).amin(1)

    def policy_is_due(self) -> bool:
        """Whether this is update number 1, 1 + `policy_freq`, ..."""
        return self.step % self.config.policy_freq == 0

    def move_policy(self, loss: Tensor) -> None:
        """Move the policy's target towards the policy; only then does the policy take its step."""
        polyak_update(self.actor_target, self.actor, self.config.tau)
        descend(self.optimizers["actor"], loss)

    def make_actor(self) -> DeterministicActor:
        """Make a policy whose actions are close to the box's centre at first."""
        d_s, d_a = self.problem.observation_dim, self.problem.action_dim
        net = self.mlp("actor", d_s, d_a, init="torch_bias", output_init="uniform", output_gain=1e-3)
        return DeterministicActor(net, self.box)

    def make_critics(self) -> Critics:
        """Make twin critics with LayerNorm, whose values are close to 0 at first."""
        return Critics(
            self.mlp(
                "critic",
                self.problem.observation_dim + self.problem.action_dim,
                1,
                members=2,
                init="torch_bias",
                output_init="uniform",
                output_gain=3e-3,
                layer_norm="after" if self.config.critic_layer_norm else "none",
            )
        )
