"""Normalised scores against published dataset statistics, and the wall between simulator versions."""

import numpy as np
import pytest

from corollary.core.d4rl import D4RL_DATASETS
from corollary.core.errors import DataError
from corollary.core.scores import REFERENCE_RETURNS, normalized_score, reference_returns


@pytest.mark.parametrize(
    ("environment", "mean_return", "score"),
    [  # mean return and mean normalised score of D4RL's -v2 sets, published separately and to this precision
        ("halfcheetah", 4770, 40.7),
        ("halfcheetah", 3093, 27.2),
        ("halfcheetah", 7713, 64.4),
        ("hopper", 1422, 44.3),
        ("hopper", 467, 15.0),
        ("hopper", 2090, 64.8),
        ("walker2d", 2852, 62.1),
        ("walker2d", 683, 14.8),
        ("walker2d", 3797, 82.7),
    ],
)
def test_published_dataset_scores(environment: str, mean_return: float, score: float) -> None:
    reference = reference_returns(f"d4rl/{environment}")
    assert normalized_score(mean_return, reference.min, reference.max) == pytest.approx(score, abs=0.06)


@pytest.mark.parametrize(
    ("environment", "mean_return", "score"),
    [
        ("HalfCheetah-v5", 3233, 43.2),
        ("HalfCheetah-v5", 801, 13.3),
        ("Hopper-v5", 1466, 48.1),
        ("Hopper-v5", 274, 8.5),
    ],
)
def test_our_own_dataset_scores(environment: str, mean_return: float, score: float) -> None:
    reference = reference_returns(environment)
    assert normalized_score(mean_return, reference.min, reference.max) == pytest.approx(score, abs=0.06)


def test_our_random_references_are_the_measured_ones() -> None:
    # Means of 100 random episodes, measured separately and rounded to 0.1.
    assert reference_returns("HalfCheetah-v5").min == pytest.approx(-282.5, abs=0.05)
    assert reference_returns("Hopper-v5").min == pytest.approx(16.7, abs=0.05)


def test_references_map_to_0_and_100() -> None:
    for reference in REFERENCE_RETURNS.values():
        ends = normalized_score([reference.min, reference.max], reference.min, reference.max)
        np.testing.assert_allclose(ends, [0.0, 100.0])
        assert reference.min < reference.max


def test_every_d4rl_reference_is_used_and_every_name_has_one() -> None:
    used = {f"d4rl/{entry.environment}" for entry in D4RL_DATASETS.values()}
    assert used == {key for key in REFERENCE_RETURNS if key.startswith("d4rl/")}


@pytest.mark.parametrize("version", ["Hopper-v2", "Hopper-v4", "HalfCheetah-v3"])
def test_versions_are_not_mixed(version: str) -> None:
    base = version.split("-")[0]
    with pytest.raises(DataError, match=f"for {base}-v5 but not for {version}.*must not be mixed"):
        reference_returns(version)


def test_unknown_environment() -> None:
    with pytest.raises(DataError, match=r"no reference returns for 'd4rl/hoper'.*Did you mean 'd4rl/hopper'\?"):
        reference_returns("d4rl/hoper")
    with pytest.raises(DataError, match="ref_min_score, ref_max_score"):
        reference_returns("MyEnv-v0")


@pytest.mark.parametrize("pair", [(1.0, 1.0), (0.0, float("nan")), (float("-inf"), 1.0)])
def test_useless_references(pair: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="must be finite and differ"):
        normalized_score(1.0, *pair)
