r"""Which rows a gradient step sees: all alike (uniform), or more of those from better trajectories.

Paper: Z.-W. Hong, P. Agrawal, R. Tachet des Combes, R. Laroche, "Harnessing Mixed Offline Reinforcement Learning
Datasets via Trajectory Weighting", ICLR 2023, arXiv 2306.13085.
Reference code: Improbable-AI/harness-offline-rl, ``implicit_q_learning/dataset_utils.py`` (min-max normalisation,
regression with intercept, soft-max over rows, both after the reward transform) [code].

    x_i = G_i                         return
    x_i = G_i - V(s_{i,0})            advantage; V the least-squares linear function of the first state, with intercept
    N_i = (x_i - min x) / (max x - min x)                          in [0, 1], over trajectories
    p   = exp(N_i / alpha) / Z        for every row of trajectory i: its share grows with its number of rows T_i
    p   = exp(N_i / alpha) / (Z T_i)  per trajectory: a trajectory by its weight, then one of its rows uniformly

G_i is the undiscounted return of the recorded episode. The advantage does not reward a lucky first state; luck in the
transitions stays in both. Only the rows drawn change: every loss of the algorithm sees the same reweighted data.

Deviations and choices:
1. All trajectories being equally good, N = 0 and rows are drawn uniformly; the authors' code divides 0 by 0.
2. Episodes are the recorded ones, and G sums all of their rows. The authors' code cuts D4RL's q-learning rows, where
   the row of a timeout is missing, wherever a successor is not the next row's state.
3. The authors' code draws its indices once and then batches from these; here every batch draws from p itself.
4. ``weighting="loss"`` is ours: rows are drawn uniformly and each row's share of every loss is multiplied by N p, which
   has the same expectation (but for the factor exp(-m) of a batch's largest exponent in XQL's and EQL's value losses:
   rows of small weight count in m, so V takes other steps towards the same minimum). What a loss divides by (TD3's
   mean |Q|, AWAC's soft-max) is an average with these weights over their sum, so that a batch with little weight moves
   little.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from ..kernels.streams import RandomStream
from .config import OfflineConfig, Sampling
from .dataset import Dataset
from .dataset_statistics import effective_sample_size
from .errors import DataError
from .transforms import RewardTransform

Weighting = Literal["sample", "loss"]

_ROUNDING = 1e-6
"""Trajectories whose scores differ by less than this share of the largest return are equally good: rewards are
float32."""


class RowSampler:
    """The rows of every gradient step, a function of (seed, step) alone.

    Args:
        seeds: of the runs; each has its own stream, named "batch".
        n_rows: rows of the dataset.
        probability: ``[N]``, what each row is drawn with; ``None`` for all alike.
        weighting: ``"sample"`` draws the rows with `probability`; ``"loss"`` draws them uniformly and weighs them with
            ``N p``. Without probabilities both are uniform and unweighted.
        device: where rows and weights are returned.
        dtype: of the weights.

    Attributes:
        effective_sample_size: how many rows drawn alike would tell as much; see
            :func:`corollary.core.dataset_statistics.effective_sample_size`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        n_rows: int,
        probability: NDArray[np.float64] | None = None,
        weighting: Weighting = "sample",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # Uniform numbers have 53 bits here whatever the precision of training: with 24, rows of a large set would miss.
        self._stream = RandomStream(seeds, "batch", device=device, dtype=torch.float64)
        self._n_rows = n_rows
        self._cumulative: Tensor | None = None
        self._weight: Tensor | None = None
        self.effective_sample_size = float(n_rows)
        if probability is None:
            return
        self.effective_sample_size = effective_sample_size(probability)
        if weighting == "loss":
            self._weight = torch.from_numpy(n_rows * probability).to(device, dtype)
        else:
            cumulative = probability.cumsum()
            # Divided by its end, so that no uniform number lies beyond the last row that can be drawn.
            self._cumulative = torch.from_numpy(cumulative / cumulative[-1]).to(device)

    def rows(self, step: int, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """Return the rows ``[S, B]`` (int64) of gradient step `step`, and their weights ``[S, B]`` if they have any."""
        if self._cumulative is not None:
            uniform = self._stream.uniform(step, (batch_size,))
            return torch.searchsorted(self._cumulative, uniform, right=True), None
        row = self._stream.integers(step, self._n_rows, (batch_size,))
        return row, None if self._weight is None else self._weight[row]


def row_probabilities(dataset: Dataset, config: OfflineConfig, rewards: RewardTransform) -> NDArray[np.float64] | None:
    """Return the probability of each row of the configuration's view, ``[N]``; ``None`` for all alike.

    Raises:
        DataError: as :func:`trajectory_scores` does.
    """
    if config.sampling == "uniform":
        return None
    score_E = trajectory_scores(dataset, config.sampling, rewards)
    episode_N = dataset.episode_of_row[dataset.view_rows(config.view)]
    exponent_N = score_E[episode_N] / config.sampling_temperature
    if config.sampling_per == "trajectory":
        exponent_N -= np.log(np.bincount(episode_N)[episode_N])
    probability: NDArray[np.float64] = softmax(exponent_N)
    return probability


def effective_sample_sizes(dataset: Dataset) -> dict[str, float | None]:
    """Return what each way of `sampling`, otherwise with its defaults, leaves of the rows: their effective number.

    Rewards are as recorded; ``"advantage"`` is None where there are too few episodes for it.
    """
    recorded, found = RewardTransform("none", 1.0, 0.0), dict[str, float | None]()
    for kind in get_args(Sampling):
        config = OfflineConfig(sampling=kind)
        try:
            probability = row_probabilities(dataset, config, recorded)
        except DataError:
            found[kind] = None
            continue
        rows = len(dataset.view_rows(config.view))
        found[kind] = float(rows) if probability is None else effective_sample_size(probability)
    return found


def trajectory_scores(
    dataset: Dataset, kind: Literal["return", "advantage"], rewards: RewardTransform
) -> NDArray[np.float64]:
    """Return ``N_i`` in [0, 1] of every episode, ``[E]``, from the transformed rewards.

    Raises:
        DataError: for advantages, if there are not more episodes than coefficients of the value, which would then fit
            every return.
    """
    returns = rewards.scale * dataset.episode_returns() + rewards.shift * dataset.episode_lengths
    score = returns if kind == "return" else returns - first_state_values(dataset, returns)
    spread = float(np.ptp(score))
    if spread <= _ROUNDING * np.abs(returns).max():
        return np.zeros_like(score)
    normalised: NDArray[np.float64] = (score - score.min()) / spread
    return normalised


def first_state_values(dataset: Dataset, returns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``V(s_{i,0})``, the least-squares linear prediction of the returns ``[E]``, with intercept.

    Raises:
        DataError: as :func:`trajectory_scores` does.
    """
    positions = dataset.episode_starts + np.arange(dataset.n_episodes)
    first = dataset.observations[positions].reshape(dataset.n_episodes, -1).astype(np.float64)
    first -= first.mean(0)
    scale = first.std(0)
    first /= np.where(scale > 0, scale, 1)
    mean = returns.mean()
    coefficients, _, rank, _ = np.linalg.lstsq(first, returns - mean, rcond=None)
    if rank + 1 >= dataset.n_episodes:
        raise DataError(
            f"{dataset.info.name}: sampling='advantage' fits a value with {rank + 1} coefficients to the returns of "
            f"{dataset.n_episodes} episodes, which leaves no advantage; use sampling='return', or more episodes"
        )
    values: NDArray[np.float64] = mean + first @ coefficients
    return values
