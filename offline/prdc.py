r"""PRDC: TD3 whose policy is pulled towards the nearest state-action pair of the whole dataset.

Paper: Y. Ran, Y.-C. Li, F. Zhang, Z. Zhang, Y. Yu, "Policy Regularization with Dataset Constraint for Offline
Reinforcement Learning", ICML 2023, arXiv 2306.06569.
Reference code: LAMDA-RL/PRDC (constants, per-dataset settings, and the loss where it differs from the paper's).

    d_beta(s, a)^2 = min_i beta^2 |s - s_i|^2 + |a - a_i|^2,        i* the row attaining it at (s, sg[pi(s)])
    L_pi           = -lambda mean Q_1(s, pi(s)) + mean_{b, j} (pi(s) - a_{i*})_j^2      (rest: corollary.offline.td3)

Limits: beta -> infinity needs the same state, so PRDC becomes TD3+BC (if states are unique); beta -> 0 allows the
nearest action of the dataset whatever its state.

Deviations and choices:
1. ``distance="squared"`` (default) is the released code's penalty, the action part only, squared and averaged over
   dimensions. ``distance="norm"`` is the paper's d_beta itself, state part included. The nearest row is the same.
2. The search is exact, but not one tree query per step: see :mod:`corollary.kernels.neighbours`.
3. The authors' code searches every row of D4RL's ``qlearning_dataset``; here every row trained on (`view`).
4. Rows experienced online are not searched: the constraint stays that of the dataset.
5. Their first code (until 2023-07-05) scaled next states instead of rewards on AntMaze; the preset scales rewards.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.actor_critic import weighted_mean
from ..core.agent import Metrics
from ..core.cache import computed_folder
from ..core.config import Preset
from ..core.dataset import Batch, Transitions
from ..kernels.neighbours import NeighbourIndex
from .td3 import TD3Agent, TD3Config, action_error


@dataclass(frozen=True, kw_only=True)
class PRDCConfig(TD3Config):
    """PRDC's settings beyond the core's.

    Attributes:
        beta: weight of state against action distance, >= 0, per standardised state unit; 0 ignores states, large
            values force the own state.
        k: which nearest row is the target, >= 1; 1 is the nearest.
        distance: ``"squared"`` (released code) or ``"norm"`` (paper).
    """

    beta: float = 2.0
    k: int = 1
    distance: str = "squared"

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("beta", self.beta >= 0, ">= 0")
        self.require("k", self.k >= 1, ">= 1")
        self.require("distance", self.distance in ("squared", "norm"), "'squared' or 'norm'")


class PRDC(TD3Agent[PRDCConfig]):
    """PRDC (Ran et al., 2023); see the module's head."""

    algorithm: ClassVar[str] = "offline.prdc"
    claims: ClassVar[tuple[str, ...]] = (
        "OFF-09a",
        "OFF-09b",
        "OFF-09c",
        "OFF-09d",
        "OFF-09e",
        "OFF-09f",
        "OFF-09g",
        "OFF-20a",
    )
    needs_data: ClassVar[bool] = True
    config_type = PRDCConfig
    presets: ClassVar[dict[str, Preset]] = {
        "halfcheetah": Preset({"alpha": 40.0}, "LAMDA-RL/PRDC README, all halfcheetah sets [code]"),
        "hopper": Preset({}, "LAMDA-RL/PRDC README, all hopper sets [code]"),
        "walker2d": Preset({}, "LAMDA-RL/PRDC README, all walker2d sets [code]"),
        "antmaze": Preset(
            {"alpha": 7.5, "beta": 7.5, "reward_transform": "antmaze_prdc"},
            "LAMDA-RL/PRDC README, antmaze [code]",
        ),
    }

    def on_data(self, data: Transitions) -> None:
        """Index the rows trained on for the nearest-neighbour search; a :class:`ConfigError` for fewer than k rows."""
        self.config.require("k", self.config.k <= len(data), f"at most the number of rows, {len(data)}")
        self._neighbours = NeighbourIndex(
            data.obs, data.action, beta=self.config.beta, cache_dir=computed_folder("neighbours")
        )
        self._rows = data

    def penalty(self, batch: Batch, action: Tensor) -> tuple[Tensor, Metrics]:
        """Return the distance to the nearest row; the row and its action are constants."""
        # Logged states are cheaper to ask for by their row, but experienced ones have none.
        key = {"state": batch.obs} if self.online_phase else {"row": batch.index}
        # A seed whose policy has diverged asks for logged actions instead: its loss stays nan, and the others go on.
        asked = torch.where(action.isfinite(), action, batch.action).detach()
        row, distance = self._neighbours.query(asked, k=self.config.k, **key)
        target = self._rows.action[row]
        diagnostics = {
            "nn_distance": distance.mean(1).to(action.dtype),
            "nn_own_row_fraction": (row == batch.index).to(action.dtype).mean(1),
        }
        if self.config.distance == "squared":
            return action_error(action, target, batch.weight), diagnostics
        state_part = self.config.beta * (batch.obs - self._rows.obs[row])
        return weighted_mean(dataset_distance(action - target, state_part), batch.weight), diagnostics


def dataset_distance(action_part: Tensor, state_part: Tensor) -> Tensor:
    """``sqrt(|beta (s - s_i*)|^2 + |pi(s) - a_i*|^2)`` for ``[..., d]`` parts; shape ``[...]``.

    At distance zero, where the norm has no gradient, its subgradient 0 is taken.
    """
    squared = state_part.square().sum(-1) + action_part.square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)
