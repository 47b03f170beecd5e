"""Normalised scores: 0 is a random policy's mean return, 100 an expert's.

A score means nothing without its references, and references belong to one simulator. The keys below keep them
apart: ``d4rl/...`` holds the returns published with D4RL (MuJoCo v2 physics and the other simulators of its
day), a Gymnasium id such as ``Hopper-v5`` holds ours. A v2, v4 or v5 score is never computed with the
references of another version.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DataError, suggest

_D4RL = "D4RL (d4rl/infos.py and the environment registrations)"
_OURS = "corollary: Stable-Baselines3 SAC experts, 100 random episodes, gymnasium 1.4, mujoco 4.0"


@dataclass(frozen=True)
class ReferenceReturns:
    """Mean undiscounted returns of a random policy (`min`) and an expert (`max`), and their source."""

    min: float
    max: float
    source: str


def normalized_score(returns: ArrayLike, ref_min_score: float, ref_max_score: float) -> NDArray[np.float64]:
    """Return 100 (R - min) / (max - min), elementwise in float64.

    R is the undiscounted sum of the environment's own rewards, before any reward transform (Fu et al. 2020,
    D4RL, arXiv 2004.07219; D4RL's own function leaves out the factor 100 that its tables carry).

    Raises:
        DataError: references that are equal or not finite.
    """
    span = ref_max_score - ref_min_score
    if not np.isfinite(span) or span == 0:
        raise DataError(f"reference returns must be finite and differ; got {ref_min_score} and {ref_max_score}")
    score: NDArray[np.float64] = 100.0 * (np.asarray(returns, dtype=np.float64) - ref_min_score) / span
    return score


def _references(table: dict[str, tuple[float, float]], prefix: str, source: str) -> dict[str, ReferenceReturns]:
    return {prefix + name: ReferenceReturns(low, high, source) for name, (low, high) in table.items()}


REFERENCE_RETURNS: dict[str, ReferenceReturns] = {
    **_references(
        {
            # Locomotion: one pair per robot, whatever the dataset and its version.
            "halfcheetah": (-280.178953, 12135.0),
            "hopper": (-20.272305, 3234.3),
            "walker2d": (1.629008, 4592.3),
            "ant": (-325.6, 3879.7),
            # Navigation with an ant, cooking, dexterous hands: likewise.
            "antmaze": (0.0, 1.0),
            "kitchen": (0.0, 4.0),
            "pen": (96.262799, 3076.8331017826877),
            "hammer": (-274.856578, 12794.134825156867),
            "relocate": (-6.425911, 4233.877797728884),
            "door": (-56.512833, 2880.5693087298737),
            # Point mass: one pair per maze, reward and version.
            "maze2d-open-v0": (0.01, 20.66),
            "maze2d-umaze-v0": (0.94, 62.6),
            "maze2d-medium-v0": (5.77, 85.14),
            "maze2d-large-v0": (4.83, 191.99),
            "maze2d-umaze-v1": (23.85, 161.86),
            "maze2d-medium-v1": (13.13, 277.39),
            "maze2d-large-v1": (6.7, 273.99),
            "maze2d-open-dense-v0": (11.17817, 27.166538620695782),
            "maze2d-umaze-dense-v0": (23.249793, 81.78995240126592),
            "maze2d-medium-dense-v0": (19.477620, 96.03474232952358),
            "maze2d-large-dense-v0": (27.388310, 215.09965671563742),
            "maze2d-umaze-dense-v1": (68.537689, 193.66285642381482),
            "maze2d-medium-dense-v1": (44.264742, 297.4552547777125),
            "maze2d-large-dense-v1": (30.569041, 303.4857382709002),
            "maze2d-eval-umaze-v1": (36.63, 141.4),
            "maze2d-eval-medium-v1": (13.07, 204.93),
            "maze2d-eval-large-v1": (16.4, 302.22),
            "maze2d-eval-umaze-dense-v1": (56.95455, 178.21373133248397),
            "maze2d-eval-medium-dense-v1": (42.28578, 235.5658957482388),
            # D4RL's registration repeats umaze's minimum here; kept, since published scores used it.
            "maze2d-eval-large-dense-v1": (56.95455, 326.09647655082637),
            # Everything else.
            "minigrid-fourrooms": (0.01442, 2.89685),
            "flow-ring": (-165.22, 24.42),
            "flow-merge": (118.67993, 330.03179),
            "carla-lane": (-0.8503839912088142, 1023.5784385429523),
            "carla-town": (-114.81579500772153, 2440.1772022247314),
            "bullet-halfcheetah": (-1275.766996, 2381.6725),
            "bullet-hopper": (20.058972, 1441.8059623430963),
            "bullet-ant": (373.705955, 2650.495),
            "bullet-walker2d": (16.523877, 1623.6476303317536),
            "bullet-maze2d-open": (8.75, 64.15),
            "bullet-maze2d-umaze": (32.46, 153.99),
            "bullet-maze2d-medium": (14.87, 238.05),
            "bullet-maze2d-large": (1.82, 285.92),
        },
        "d4rl/",
        _D4RL,
    ),
    **_references(
        {
            "HalfCheetah-v5": (-282.4868419273262, 7857.67593177986),
            "Hopper-v5": (16.66883949956298, 3026.7241985940623),
        },
        "",
        _OURS,
    ),
}
"""Reference returns: ``d4rl/<environment>`` as D4RL published them, Gymnasium ids as we measured them."""


def known_reference(env_id: str | None) -> ReferenceReturns | None:
    """Return the references of a Gymnasium id, which may name the module that registers it; None if there are none."""
    return REFERENCE_RETURNS.get((env_id or "").rpartition(":")[2])


def reference_returns(environment: str) -> ReferenceReturns:
    """Return the references of one environment: a Gymnasium id such as ``Hopper-v5``, or ``d4rl/hopper``.

    For a D4RL dataset name such as ``hopper-medium-v2`` see `corollary.core.d4rl.D4RL_DATASETS`.

    Raises:
        DataError: no references for this environment, or only for another version of it.
    """
    if environment in REFERENCE_RETURNS:
        return REFERENCE_RETURNS[environment]
    remedy = "measure a random policy and an expert, and give their mean returns as ref_min_score, ref_max_score"
    base = re.sub(r"-v\d+$", "", environment)
    versions = [
        key for key in REFERENCE_RETURNS if key != environment and re.fullmatch(re.escape(base) + r"-v\d+", key)
    ]
    if versions:
        raise DataError(
            f"there are reference returns for {', '.join(versions)} but not for {environment}, and scores of "
            f"different versions must not be mixed: {remedy}"
        )
    raise DataError(
        f"there are no reference returns for {environment!r}: {remedy}.{suggest(environment, REFERENCE_RETURNS)}"
    )
