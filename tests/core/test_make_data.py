"""The data recipe: its rules and files by hand; with Stable-Baselines3 (marker `peer`) the whole of it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from corollary.core import checkpoint, make_data
from corollary.core.collect import derived_seed, isolated_generators
from corollary.core.d4rl import load_d4rl
from corollary.core.dataset import Dataset, DatasetInfo
from corollary.core.errors import ConfigError, CorollaryError, DataError
from corollary.core.make_data import (
    SquashedGaussianPolicy,
    best_late,
    first_reaching,
    make_dataset,
    medium_fraction,
    medium_level,
    write_d4rl,
)

# ------------------------------------------------------------------------------------------------------------
# The rules that choose policies
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "f"),
    [("HalfCheetah-v5", 0.40), ("Hopper-v4", 0.44), ("Walker2d-v5", 0.62), ("Ant-v5", 1 / 3), ("x/Hopper-v1", 0.44)],
)
def test_default_fraction(env_id: str, f: float) -> None:
    assert medium_fraction(env_id) == f


def test_medium_level_by_hand() -> None:
    assert medium_level(-280.0, 12_120.0, 0.40) == pytest.approx(4680.0)
    assert medium_level(-10.0, -4.0, 1.0) == -4.0


def test_medium_level_refuses_a_bad_fraction_and_a_failed_training() -> None:
    for f in (0.0, -0.1, 1.1):
        with pytest.raises(ConfigError, match="f must be in"):
            medium_level(0.0, 1.0, f)
    with pytest.raises(DataError, match="nothing was learnt"):
        medium_level(5.0, 5.0, 0.5)


def test_first_policy_that_reaches_the_level_is_taken_and_later_ones_are_not_measured() -> None:
    measured = []

    def means() -> Iterator[tuple[int, float]]:
        for step, mean in [(10, 1.0), (20, 5.0), (30, 4.0), (40, 9.0)]:
            measured.append(step)
            yield step, mean

    assert first_reaching(means(), 5.0) == 20
    assert measured == [10, 20]
    with pytest.raises(DataError, match=r"level 9.5; the best one has mean return 9.0"):
        first_reaching(means(), 9.5)


def test_best_late_ignores_the_first_half() -> None:
    assert best_late([(10, 99.0), (19, 50.0), (20, 3.0), (30, 7.0), (40, 5.0)]) == 30
    assert best_late([(10, 1.0)]) == 10


# ------------------------------------------------------------------------------------------------------------
# The behaviour policy
# ------------------------------------------------------------------------------------------------------------

LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([2.0, 3.0], np.float32)


def small_policy(seed: int = 0, **changed: Any) -> SquashedGaussianPolicy:
    generator = np.random.default_rng(5)
    shapes = {"fc0": (4, 3), "fc1": (4, 4), "last_fc": (2, 4), "last_fc_log_std": (2, 4)}
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = generator.normal(size=shape).astype(np.float32)
        weights[f"{name}.bias"] = generator.normal(size=shape[0]).astype(np.float32)
    return SquashedGaussianPolicy({**weights, **changed}, LOW, HIGH, seed)


def test_distribution_is_that_of_the_same_network_in_torch() -> None:
    policy = small_policy()
    obs = np.random.default_rng(1).normal(size=(6, 3))
    tensors = {name: torch.from_numpy(array).double() for name, array in policy.weights.items()}
    hidden = torch.from_numpy(obs)
    for name in ("fc0", "fc1"):
        hidden = torch.relu(torch.nn.functional.linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"]))
    mean, log_std = (
        torch.nn.functional.linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        for name in ("last_fc", "last_fc_log_std")
    )
    got_mean, got_std = policy.distribution(obs)
    np.testing.assert_allclose(got_mean, mean.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got_std, log_std.clamp(-20, 2).exp().numpy(), rtol=1e-4)


def log_density(policy: SquashedGaussianPolicy, obs: Any, action: Any) -> Any:
    """Change of variables from the action back to the Gaussian, with SciPy's normal density."""
    mean, std = policy.distribution(obs)
    half = (HIGH - LOW) / 2
    z = (action - LOW) / half - 1
    return (norm.logpdf(np.arctanh(z), mean, std) - np.log(half * (1 - z**2))).sum(-1)


def test_log_density_is_that_of_the_squashed_gaussian_in_the_actions_units() -> None:
    policy = small_policy(**{"last_fc_log_std.bias": np.full(2, -2.0, np.float32)})
    obs = np.random.default_rng(2).normal(size=(50, 3))
    actions = np.stack([policy(row) for row in obs])
    assert ((actions > LOW) & (actions < HIGH)).all()
    expected = log_density(policy, obs, actions)
    np.testing.assert_allclose(policy.log_probs, expected, atol=1e-3)
    in_normalised_box = expected + np.log((HIGH - LOW) / 2).sum()
    assert np.abs(policy.log_probs - in_normalised_box).min() > 1.0


def test_density_integrates_to_one() -> None:
    """E_π[1/π(a)] is the volume of the box; a narrow σ would make the estimate heavy-tailed."""
    zeros = {name: np.zeros_like(array) for name, array in small_policy().weights.items()}
    policy = SquashedGaussianPolicy(zeros, LOW, HIGH, 0)  # μ = 0, σ = 1
    for _ in range(4000):
        policy(np.zeros(3))
    inverse = np.exp(-np.array(policy.log_probs))
    volume = float(np.prod(HIGH - LOW))
    assert abs(inverse.mean() - volume) < 5 * inverse.std() / np.sqrt(len(inverse))
    assert abs(2 * inverse.mean() - volume) > 5 * inverse.std() / np.sqrt(len(inverse))


def test_log_density_stays_finite_where_tanh_saturates() -> None:
    policy = small_policy(**{"last_fc.bias": np.array([40.0, -40.0], np.float32)})
    action = policy(np.zeros(3))
    np.testing.assert_allclose(action, [2.0, 0.0], atol=1e-6)
    assert np.isfinite(policy.log_probs).all()


def test_policy_has_its_own_generator_and_its_hash_follows_its_weights() -> None:
    obs = np.ones(3)
    assert np.array_equal(small_policy(3)(obs), small_policy(3)(obs))
    assert not np.array_equal(small_policy(3)(obs), small_policy(4)(obs))
    changed = small_policy(3, **{"last_fc.bias": np.zeros(2, np.float32)})
    assert small_policy(3).sha256 == small_policy(4).sha256 != changed.sha256


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def small_dataset(next_observations: bool = True) -> Dataset:
    """Three episodes: terminated, truncated, truncated; actions in [-2, 2]."""
    generator = np.random.default_rng(0)
    observations = generator.normal(size=(9, 3)).astype(np.float32)
    ends = np.isin(np.arange(9), [2, 5, 8])
    following = np.roll(observations, -1, axis=0)
    following[ends] = generator.normal(size=(3, 3))
    return Dataset.from_arrays(
        observations,
        generator.uniform(-2, 2, size=(9, 2)),
        generator.normal(size=9),
        np.arange(9) == 2,
        ends & (np.arange(9) != 2),
        following if next_observations else None,
        action_low=-2.0,
        action_high=2.0,
        info=DatasetInfo("small", "Toy-v0", -3.0, 4.0, description="words", horizon=3),
    )


@pytest.mark.parametrize("next_observations", [True, False])
def test_written_file_reads_back_equal(tmp_path: Path, next_observations: bool) -> None:
    data = small_dataset(next_observations)
    path = write_d4rl(data, tmp_path / "small.hdf5", {"seed": 7, "policy/fc0/bias": np.arange(2.0)}, range(9))
    back = load_d4rl(path, action_low=-2.0, action_high=2.0)
    for key in ("observations", "actions", "rewards", "terminated", "truncated", "final_obs_known"):
        np.testing.assert_array_equal(getattr(back, key), getattr(data, key), err_msg=key)
    for view in ("full", "d4rl_qlearning"):
        assert back.transitions(view).fingerprint == data.transitions(view).fingerprint
    info = back.info
    assert (info.env_id, info.ref_min_score, info.ref_max_score, info.horizon, info.description) == (
        "Toy-v0",
        -3.0,
        4.0,
        3,
        "words",
    )
    assert info.provenance["metadata/seed"] == 7
    with h5py.File(path) as file:
        assert ("next_observations" in file) == next_observations
        np.testing.assert_array_equal(file["infos/action_log_probs"], np.arange(9.0, dtype=np.float32))
        np.testing.assert_array_equal(file["metadata/policy/fc0/bias"], [0.0, 1.0])
        np.testing.assert_array_equal(file["metadata/action_high"], [2.0, 2.0])


def test_log_probs_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="8 entries for 9 rows"):
        write_d4rl(small_dataset(), tmp_path / "small.hdf5", log_probs=range(8))


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_d4rl(small_dataset(), tmp_path / "small.hdf5")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_d4rl(small_dataset(), path, {"unwritable": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_complete_episodes_leave_out_a_cut_last_one() -> None:
    data = small_dataset()
    for cut in (0, 1):
        marked = replace(data, info=replace(data.info, provenance={"metadata/cut_episodes": cut}))
        episodes = make_data._complete_episodes(marked)
        kept = Dataset.from_episodes(episodes, action_low=-2.0, action_high=2.0)
        assert kept.n_episodes == 3 - cut
        np.testing.assert_array_equal(kept.observations, data.observations[: 12 - 4 * cut])
        np.testing.assert_array_equal(kept.terminated, data.terminated[: 9 - 3 * cut])


# ------------------------------------------------------------------------------------------------------------
# Going on after a kill: the parts without Stable-Baselines3
# ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 30), size=st.integers(1, 12), seed=st.integers(0, 99))
def test_refilled_buffer_equals_one_filled_row_by_row(n: int, size: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = {
        "observations": generator.normal(size=(n, 3)),
        "next_observations": generator.normal(size=(n, 3)),
        "actions": generator.normal(size=(n, 2)),
        "rewards": generator.normal(size=n),
        "terminated": generator.random(n) < 0.2,
        "truncated": generator.random(n) < 0.2,
    }

    def empty() -> SimpleNamespace:
        wide = {
            key: np.zeros((size, 1, rows[key].shape[1])) for key in ("observations", "next_observations", "actions")
        }
        flat = {key: np.zeros((size, 1)) for key in ("rewards", "dones", "timeouts")}
        return SimpleNamespace(**wide, **flat, buffer_size=size, pos=0, full=False)

    one_by_one = empty()
    for i in range(n):
        slot = one_by_one.pos
        for key in ("observations", "next_observations", "actions", "rewards"):
            getattr(one_by_one, key)[slot, 0] = rows[key][i]
        one_by_one.dones[slot, 0] = rows["terminated"][i] or rows["truncated"][i]
        one_by_one.timeouts[slot, 0] = rows["truncated"][i]
        one_by_one.pos = (slot + 1) % size
        one_by_one.full |= one_by_one.pos == 0
    refilled = empty()
    make_data._fill(refilled, rows)
    for key, value in vars(one_by_one).items():
        np.testing.assert_array_equal(getattr(refilled, key), value, err_msg=key)


RECIPE = make_data._Recipe("Toy-v0", 300, 0, 60, 100, 2, 4)


def test_folder_belongs_to_one_recipe_and_one_set_of_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_data, "version", lambda name: "1.0")
    versions = RECIPE.claim(tmp_path / "recipe")
    assert versions == RECIPE.claim(tmp_path / "recipe")
    assert set(versions) == {"gymnasium", "mujoco", "stable_baselines3", "torch", "numpy"}
    with pytest.raises(ConfigError, match=r"begun with train_steps=300, not 400: use that again, or another out_dir"):
        replace(RECIPE, train_steps=400).claim(tmp_path / "recipe")
    monkeypatch.setattr(make_data, "version", lambda name: "2.0" if name == "torch" else "1.0")
    with pytest.raises(ConfigError, match=r"begun with torch='1.0', not '2.0'"):
        RECIPE.claim(tmp_path / "recipe")


def test_missing_stable_baselines_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_data, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'corollary\[sb3\]'"):
        make_dataset("Pendulum-v1", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        ("Pendulum-v1", {"qualities": ["medium-repaly"]}, "Did you mean 'medium-replay'"),
        ("Pendulum-v1", {"f": 1.5}, "f must be in"),
        ("Pendulum-v1", {"train_steps": 0}, "train_steps must be at least 1; got 0"),
        ("Pendulum-v1", {"rows": -1}, "rows must be at least 1"),
        ("Pendulum-v1", {"rows": 199}, "medium-expert needs rows of at least one episode, 200"),
        ("CartPole-v1", {}, "CartPole-v1 has the action space Discrete"),
        ("NoSuchEnv-v0", {}, "cannot be made"),
    ],
)
def test_bad_requests_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env_id: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(make_data, "find_spec", lambda name: object())
    with pytest.raises(CorollaryError, match=message):
        make_dataset(env_id, tmp_path, **options)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# With Stable-Baselines3
# ------------------------------------------------------------------------------------------------------------


class Toy(gymnasium.Env[Any, Any]):
    """Match the action to the observation: reward -10 (a - s)²; a new s each step; actions in [-2, 2]."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float64)
    action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 1)
        return self.state, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = -10.0 * float((action[0] - self.state[0]) ** 2)
        self.state[:] = self.np_random.uniform(-1, 1, 1)  # the same array again, as some environments do
        return self.state, reward, False, False, {}


gymnasium.register("CorollaryToy-v0", Toy, max_episode_steps=20, disable_env_checker=True)

ALL = ("random", "medium-replay", "medium", "expert", "medium-expert", "full-replay")


def make_toy(out_dir: str | Path, **options: Any) -> dict[str, Path]:
    small = {
        "train_steps": 290,
        "learning_starts": 50,
        "checkpoint_every": 100,
        "checkpoint_episodes": 2,
        "reference_episodes": 20,
        "rows": 50,
    }
    return make_dataset("CorollaryToy-v0", out_dir, qualities=ALL, progress=False, **{**small, **options})


def content(paths: dict[str, Path]) -> dict[str, Any]:
    """Every array and text of the files."""
    found = {}
    for quality, path in paths.items():
        with h5py.File(path) as file:
            file.visititems(
                lambda name, item, q=quality: (
                    found.update({f"{q}/{name}": item[()]}) if isinstance(item, h5py.Dataset) else None
                )
            )
    return found


def assert_same_content(a: dict[str, Path], b: dict[str, Path]) -> None:
    first, second = content(a), content(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value, err_msg=key)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("stable_baselines3")
    before = torch.get_rng_state()
    paths = make_toy(tmp_path_factory.mktemp("whole"))
    assert torch.equal(torch.get_rng_state(), before)
    return paths


@pytest.mark.peer
def test_whole_recipe_on_a_toy(uninterrupted: dict[str, Path]) -> None:
    data = {q: load_d4rl(p, action_low=-2.0, action_high=2.0) for q, p in uninterrupted.items()}
    facts = {q: d.info.provenance for q, d in data.items()}
    assert uninterrupted["medium-replay"].name == "corollarytoy-medium-replay-v0.hdf5"
    step = facts["medium"]["metadata/policy_step"]
    assert {q: len(d) for q, d in data.items()} == {
        "random": 50,
        "medium-replay": step,
        "medium": 50,
        "expert": 50,
        "medium-expert": 80,  # two complete episodes of each
        "full-replay": 300,  # training goes on to the end of the episode
    }
    replay, full = data["medium-replay"], data["full-replay"]
    np.testing.assert_array_equal(replay.observations, full.observations[: len(replay.observations)])
    for quality, dataset in data.items():
        assert dataset.final_obs_known.all(), quality
        # The reward is a function of state and action, so the columns must belong together and to this scale.
        rows = dataset.transitions("full")
        expected = -10.0 * (rows.action[:, 0] - rows.obs[:, 0]) ** 2
        torch.testing.assert_close(rows.reward, expected, rtol=1e-4, atol=1e-4)
        wanted = {"algorithm", "behaviour", "recipe", "seed", "gymnasium", "mujoco", "stable_baselines3", "torch"}
        wanted |= {"ref_min_score", "ref_max_score", "ref_episodes", "episodes", "rows", "mean_return", "horizon"}
        assert {f"metadata/{key}" for key in wanted} <= set(facts[quality]), quality
        assert ("metadata/fraction" in facts[quality]) == ("medium" in quality)
    low, high = data["expert"].info.ref_min_score, data["expert"].info.ref_max_score
    assert low is not None
    assert high is not None
    # Uniform actions against uniform states: -10 (4/3 + 1/3) per step, 20 steps.
    assert low == pytest.approx(-333.3, rel=0.1)
    assert high > low
    assert data["expert"].episode_returns()[:2].mean() > data["random"].episode_returns()[:2].mean()


@pytest.mark.peer
@pytest.mark.parametrize("quality", ["medium", "expert"])
def test_recorded_policy_explains_the_recorded_actions(uninterrupted: dict[str, Path], quality: str) -> None:
    with h5py.File(uninterrupted[quality]) as file:
        layers = ("fc0", "fc1", "last_fc", "last_fc_log_std")
        weights = {
            f"{layer}.{part}": file[f"metadata/policy/{layer}/{part}"][()]
            for layer in layers
            for part in ("weight", "bias")
        }
        policy = SquashedGaussianPolicy(weights, np.full(1, -2.0), np.full(1, 2.0), 0)
        assert policy.sha256 == file["metadata/policy_sha256"].asstr()[()]
        mean, std = policy.distribution(file["observations"][()])
        z = file["actions"][()].astype(np.float64) / 2
        log_probs = file["infos/action_log_probs"][()]
    inside = np.abs(z[:, 0]) < 0.99  # where float32 still resolves the inverse of tanh
    expected = (norm.logpdf(np.arctanh(z), mean, std) - np.log(2 * (1 - z**2)))[:, 0]
    np.testing.assert_allclose(log_probs[inside], expected[inside], atol=2e-3)
    with h5py.File(uninterrupted["random"]) as file:
        np.testing.assert_allclose(file["infos/action_log_probs"], -np.log(4.0), rtol=1e-6)


@pytest.mark.peer
def test_numpy_policy_is_the_sb3_actor(uninterrupted: dict[str, Path]) -> None:
    import stable_baselines3

    with isolated_generators(0):
        sac = stable_baselines3.SAC("MlpPolicy", gymnasium.make("CorollaryToy-v0"), seed=1, device="cpu")
        obs = torch.linspace(-1, 1, 9)[:, None]
        mean, log_std, _ = sac.actor.get_action_dist_params(obs)
        holder = SimpleNamespace(sac=sac)
        weights = make_data._Training._policy_weights(holder)  # type: ignore[arg-type]
    policy = SquashedGaussianPolicy({k: v.numpy() for k, v in weights.items()}, np.full(1, -2.0), np.full(1, 2.0), 0)
    got_mean, got_std = policy.distribution(obs.numpy())
    np.testing.assert_allclose(got_mean, mean.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(got_std, log_std.detach().exp().numpy(), rtol=1e-5)


class Reseeded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Resets episode i as the recipe does, whatever the caller says."""

    episode = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.episode += 1
        return self.env.reset(seed=derived_seed(0, make_data._RESETS, self.episode - 1))


@pytest.mark.peer
def test_training_loop_is_sb3s_own(tmp_path: Path) -> None:
    """Bit for bit the networks of SAC.learn, over an episode's end, with warm-up and learning."""
    import stable_baselines3

    recipe = replace(RECIPE, env_id="Pendulum-v1", train_steps=400, learning_starts=150, checkpoint_every=200)
    with isolated_generators(0):
        theirs = stable_baselines3.SAC(
            "MlpPolicy",
            Reseeded(gymnasium.make("Pendulum-v1")),
            learning_starts=150,
            buffer_size=1000,
            seed=0,
            device="cpu",
        ).learn(400)
    with isolated_generators(5):
        ours = make_data._Training(recipe, gymnasium.make("Pendulum-v1"), tmp_path)
        while not ours.finished:
            ours.run_to_checkpoint(lambda step: None)
    expected = theirs.policy.state_dict()
    for key, value in ours.sac.policy.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert torch.equal(ours.sac.log_ent_coef, theirs.log_ent_coef)
    np.testing.assert_array_equal(ours.rows(400)["next_observations"], theirs.replay_buffer.next_observations[:400, 0])
    with isolated_generators(0):
        fresh = stable_baselines3.SAC("MlpPolicy", gymnasium.make("Pendulum-v1"), seed=0, device="cpu")
    untrained = fresh.policy.state_dict()
    assert not torch.equal(untrained["actor.mu.weight"], expected["actor.mu.weight"])


class Killed(BaseException):
    """Stands for a kill that leaves no time to clean up."""


@pytest.mark.peer
@pytest.mark.parametrize("write", [4, 8, 9, 16])
def test_killed_run_continues_to_the_same_bits(
    uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """Kill before the first state, before the second, before its returns, and while measuring references."""
    real, count = checkpoint.write, 0

    def counting(path: Any, config: Any, tensors: Any) -> Path:
        nonlocal count
        count += 1
        if count == write:
            raise Killed
        return real(path, config, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", counting)
        with pytest.raises(Killed):
            make_toy(tmp_path)
    assert_same_content(make_toy(tmp_path), uninterrupted)


def run_until_killed(out_dir: str, steps: int) -> None:
    """Make the toy data and die by SIGKILL at environment step `steps`; runs in a process of its own."""
    taken = 0
    step = Toy.step

    def deadly(self: Toy, action: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, action)

    Toy.step = deadly  # type: ignore[method-assign]
    make_toy(out_dir)


@pytest.mark.peer
def test_kill_9_in_the_middle_of_an_episode(uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    code = f"import runpy; runpy.run_path({__file__!r})['run_until_killed']({str(tmp_path)!r}, 275)"
    died = subprocess.run([sys.executable, "-c", code], check=False)
    assert died.returncode == -signal.SIGKILL
    assert (tmp_path / "corollarytoy-v0-training" / "state").exists()
    assert not list(tmp_path.glob("*.hdf5"))
    assert_same_content(make_toy(tmp_path), uninterrupted)


@pytest.mark.peer
def test_state_without_its_generators_would_not_continue_exactly(
    uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the tests above: they do see a generator that is not restored."""
    real = make_data._Training._restore

    def forgetful(self: Any) -> None:
        state = torch.get_rng_state()
        real(self)
        torch.set_rng_state(state)

    with monkeypatch.context() as patch:
        patch.setattr(make_data._Training, "finished", property(lambda self: self.step >= 100))
        patch.setattr(make_data._Maker, "write", lambda self, quality: None)
        make_toy(tmp_path)
    monkeypatch.setattr(make_data._Training, "_restore", forgetful)
    with pytest.raises(AssertionError):
        assert_same_content(make_toy(tmp_path), uninterrupted)


@pytest.mark.peer
def test_finished_training_is_reused_and_files_are_not_overwritten(
    uninterrupted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = uninterrupted["medium"].parent
    monkeypatch.setattr(make_data._Training, "run_to_checkpoint", None)
    stamp = uninterrupted["medium"].stat().st_mtime_ns
    assert make_toy(folder) == uninterrupted
    assert uninterrupted["medium"].stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match=r"exists, made with .*\"rows\": 50.* delete it or move it away"):
        make_toy(folder, rows=60)
    with pytest.raises(ConfigError, match=r"was begun with seed=0, not 1"):
        make_toy(folder, seed=1)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_seed_out_of_range_is_refused_before_a_folder_is_made(seed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed must be a whole number in \[0, 2\*\*32\); got"):
        make_dataset("Pendulum-v1", tmp_path / "new", seed=seed)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------------
# The data in the package
# ------------------------------------------------------------------------------------------------------------

SHIPPED = Path(make_data.__file__).parent / "shipped"


def test_shipped_files_are_small_and_have_a_card() -> None:
    files = sorted(SHIPPED.glob("*.hdf5"))
    assert files
    assert sum(path.stat().st_size for path in files) <= 6e6
    card = (SHIPPED / "README.md").read_text(encoding="utf-8").replace("−", "-")
    rows = {cells[0].strip("`"): cells[1:] for cells in (re.split(r" \| ", line[2:-2]) for line in card.splitlines())}
    for path in files:
        data = load_d4rl(path)
        returns = data.episode_returns()
        low, high = data.info.ref_min_score, data.info.ref_max_score
        assert rows[path.stem][:9] == [
            f"{len(data):,}".replace(",", " "),
            str(data.n_episodes),
            *(f"{x:.0f}" for x in (returns.mean(), returns.min(), returns.max())),
            f"{100 * (returns.mean() - low) / (high - low):.1f}",
            str(int(data.terminated.sum())),
            str(int(data.truncated.sum())),
            f"{data.observations.shape[1]}, {data.actions.shape[1]}",
        ]
        assert f"{len(data.transitions(view='full')):,} rows".replace(",", " ") in card
        for reference in (low, high):
            assert f"{reference:.2f}" in card


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("halfcheetah-*.hdf5")), ids=lambda path: path.stem)
def test_shipped_rows_are_what_the_simulator_does(path: Path) -> None:
    """Put HalfCheetah into 100 recorded states, apply the recorded action: the next recorded state must follow."""
    data = load_d4rl(path).transitions("full")
    env: Any = gymnasium.make("HalfCheetah-v5").unwrapped
    differences = {"state": [], "reward": [], "other action": []}
    for row in np.random.default_rng(0).choice(len(data), 100, replace=False):
        obs, action = data.obs[row].double().numpy(), data.action[row].numpy()
        for key, applied in (("state", action), ("other action", -action)):
            env.reset(seed=0)
            env.set_state(np.append(0.0, obs[:8]), obs[8:])  # the observation leaves out the position along the track
            next_obs, reward, *_ = env.step(applied)
            differences[key].append(np.abs(next_obs - data.next_obs[row].numpy()).max())
            if key == "state":
                differences["reward"].append(abs(reward - data.reward[row].item()))
    assert np.quantile(differences["state"], 0.9) < 1e-4
    assert np.quantile(differences["reward"], 0.9) < 1e-4
    assert np.quantile(differences["other action"], 0.1) > 1e-2
