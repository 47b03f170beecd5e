"""Models of Stable-Baselines3 taken over: the same actions, values, log-probabilities; what is refused; learning on."""

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import corollary
from corollary.core.errors import ConfigError, CorollaryError
from corollary.online import from_stable_baselines3

pytestmark = pytest.mark.peer
sb3 = pytest.importorskip("stable_baselines3")
vec_env = pytest.importorskip("stable_baselines3.common.vec_env")


class Switches(gymnasium.Env[Any, Any]):
    """Random observations of `space`, a MultiDiscrete action."""

    action_space = spaces.MultiDiscrete([2, 4, 3])

    def __init__(self, space: Any = None) -> None:
        self.observation_space = space or spaces.Box(-5, 5, (2, 3))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(0 if seed is None else seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        return self.observation_space.sample(), float(action.sum()), False, False, {}


ENVS = {
    "CartPole-v1": lambda: gymnasium.make("CartPole-v1"),
    "Pendulum-v1": lambda: gymnasium.make("Pendulum-v1"),
    "MultiDiscrete": Switches,
    "one-hot": lambda: Switches(spaces.MultiDiscrete([3, 2])),
}


def model_of(env: Any, *, normalised: bool = False, kind: Any = None, **more: Any) -> Any:
    """A model whose weights, spread and statistics are all different from those that it would start with."""
    vector = vec_env.DummyVecEnv([env] * 2)
    if normalised:
        vector = vec_env.VecNormalize(vector)
        rng, shape = np.random.default_rng(1), vector.observation_space.shape
        vector.obs_rms.mean, vector.obs_rms.var = rng.normal(size=shape), rng.uniform(0.01, 2, shape)
        vector.obs_rms.count, vector.ret_rms.var = 321.0, np.float64(9.0)
    model = (kind or sb3.PPO)("MlpPolicy", vector, **({"n_steps": 32} | more))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def shown(model: Any, n: int = 50) -> tuple[Any, Any]:
    """Observations, and as the model sees them."""
    space = model.observation_space
    if isinstance(space, spaces.Box):
        obs = np.random.default_rng(2).normal(size=(n, *space.shape)).astype(np.float32)
    else:
        space.seed(2)
        obs = np.stack([space.sample() for _ in range(n)])
    normaliser = model.get_vec_normalize_env()
    return obs, obs if normaliser is None else normaliser.normalize_obs(obs)


def largest_gaps(model: Any, agent: Any) -> dict[str, float]:
    """Largest differences in deterministic action, value and log-probability of actions."""
    obs, seen = shown(model)
    theirs, _ = model.predict(seen, deterministic=True)
    model.action_space.seed(3)
    drawn = np.stack([model.action_space.sample() for _ in obs])
    with torch.no_grad():
        tensor = torch.as_tensor(seen)
        values, log_probs, _ = model.policy.evaluate_actions(tensor, torch.as_tensor(drawn))
        states = agent.normalize(torch.as_tensor(agent.encode_batch(obs))[None])
        rows = torch.as_tensor(drawn.reshape(len(obs), -1))[None]
        ours = agent.critic(states)[0], agent.actor(states).log_prob(rows)[0]
    return {
        "action": np.abs(agent.predict(obs)[0] - theirs).max(),
        "value": (ours[0] - values.squeeze(1)).abs().max().item(),
        "log_prob": (ours[1] - log_probs).abs().max().item(),
    }


@pytest.mark.parametrize("kind", [sb3.PPO, sb3.A2C])
@pytest.mark.parametrize(
    ("env", "normalised"), [(e, n) for e in ENVS for n in (False, True) if e != "one-hot" or not n]
)
def test_actions_values_and_probabilities_are_the_models(kind, env, normalised) -> None:
    if normalised and env == "one-hot":
        pytest.skip("VecNormalize takes Box observations")
    model = model_of(ENVS[env], normalised=normalised, kind=kind)
    agent = from_stable_baselines3(model)
    gaps = largest_gaps(model, agent)
    assert gaps["action"] <= 1e-6
    assert gaps["value"] <= 1e-6
    assert gaps["log_prob"] <= 1e-5
    with torch.no_grad():  # the control: one weight of each network moved after the copy
        model.policy.mlp_extractor.policy_net[0].weight[3, 1] += 0.05
        model.policy.mlp_extractor.value_net[2].weight[1, 2] += 0.05
    gaps = largest_gaps(model, agent)
    assert gaps["log_prob"] > 1e-4
    assert gaps["value"] > 1e-5


def test_a_new_models_first_policy_is_taken_over() -> None:
    model = sb3.PPO("MlpPolicy", "CartPole-v1", seed=5)
    agent = from_stable_baselines3(model)
    assert agent.seeds == (5,)
    assert largest_gaps(model, agent)["value"] <= 1e-6


@pytest.mark.parametrize(("pi", "vf"), [([16], [8, 8, 4]), ([], []), ([], [8]), ([16, 8], [16, 8])])
def test_any_widths_and_relu(pi, vf) -> None:
    networks = {"net_arch": {"pi": pi, "vf": vf}, "activation_fn": nn.ReLU}
    model = model_of(ENVS["Pendulum-v1"], policy_kwargs=networks)
    agent = from_stable_baselines3(model)
    assert (agent.config.hidden, agent.config.activation) == (tuple(pi), "relu")
    gaps = largest_gaps(model, agent)
    assert gaps["action"] <= 1e-6
    assert gaps["value"] <= 1e-6


def test_statistics_given_apart_and_the_control_without_them(tmp_path) -> None:
    model = model_of(ENVS["Pendulum-v1"], normalised=True)
    statistics = model.get_vec_normalize_env()
    model.save(tmp_path / "model.zip")
    loaded = sb3.PPO.load(tmp_path / "model.zip")
    with_them, without = from_stable_baselines3(loaded, statistics), from_stable_baselines3(loaded)
    assert largest_gaps(model, with_them)["value"] <= 1e-6
    obs, seen = shown(model)
    assert np.abs(without.predict(obs)[0] - model.predict(seen, deterministic=True)[0]).max() > 0.01
    moments = with_them.reward_normaliser.moments
    assert (moments.var.item(), with_them.observation_normaliser.moments.count.item()) == (9.0, 321.0)


def test_settings_are_the_models_under_our_names() -> None:
    settings = {"batch_size": 16, "n_epochs": 3, "gamma": 0.9, "gae_lambda": 0.8, "vf_coef": 0.25, "ent_coef": 0.01}
    model = model_of(
        ENVS["CartPole-v1"], learning_rate=lambda left: 0.002 * left, clip_range=0.3, target_kl=0.05, **settings
    )
    found = from_stable_baselines3(model, n_epochs=7).config
    assert (found.n_envs, found.n_steps, found.batch_size, found.n_epochs) == (2, 32, 16, 7)
    assert (found.discount, found.trace_decay, found.value_coef, found.entropy_coef) == (0.9, 0.8, 0.5, 0.01)
    assert (found.learning_rate, found.clip, found.target_kl) == (0.002, 0.3, 0.05)
    advantages = from_stable_baselines3(model_of(ENVS["CartPole-v1"], kind=sb3.A2C)).config
    assert (advantages.batch_size, advantages.n_epochs, advantages.normalize_advantage) == (64, 1, "none")


def test_it_learns_on_and_is_saved_like_any_agent(tmp_path) -> None:
    model = model_of(ENVS["CartPole-v1"], normalised=True).learn(64)
    agent = from_stable_baselines3(model)
    assert (agent.step, agent.problem.env_id) == (64, "CartPole-v1")
    loaded = corollary.load_agent(agent.save(tmp_path / "agent"))
    assert largest_gaps(model, loaded) == pytest.approx(largest_gaps(model, agent), abs=1e-5)
    assert agent.learn(64).step == 128
    assert largest_gaps(model, agent)["value"] > 1e-4


def test_a_loaded_model_learns_on_where_it_is_told(tmp_path) -> None:
    model_of(ENVS["CartPole-v1"]).save(tmp_path / "model.zip")
    agent = from_stable_baselines3(sb3.PPO.load(tmp_path / "model.zip"))
    with pytest.raises(ConfigError, match=r"pass learn\(n_steps, env="):
        agent.learn(64)
    assert agent.learn(64, env="CartPole-v1").step == 64


def test_an_environment_that_wrappers_of_the_vector_change_is_not_named() -> None:
    stacked = vec_env.VecFrameStack(vec_env.DummyVecEnv([ENVS["CartPole-v1"]]), 2)
    assert from_stable_baselines3(sb3.PPO("MlpPolicy", stacked, n_steps=64)).problem.env_id is None


class Pictures(gymnasium.Env[Any, Any]):
    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(2)


class Twice(gymnasium.Env[Any, Any]):
    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,))})
    action_space = spaces.Discrete(2)


def _normalised(**settings: Any) -> Any:
    return vec_env.VecNormalize(vec_env.DummyVecEnv([ENVS["Pendulum-v1"]]), **settings)


def _extractor() -> Any:
    from stable_baselines3.common.torch_layers import FlattenExtractor

    return type("Other", (FlattenExtractor,), {})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sb3.SAC("MlpPolicy", "Pendulum-v1"), "Only PPO and A2C models can be taken over; got SAC"),
        (lambda: sb3.PPO("CnnPolicy", Pictures()), "ActorCriticCnnPolicy"),
        (lambda: sb3.PPO("MultiInputPolicy", Twice()), "MultiInputActorCriticPolicy"),
        (lambda: sb3.PPO("MlpPolicy", "Pendulum-v1", use_sde=True), "use_sde"),
        (
            lambda: sb3.PPO("MlpPolicy", "Pendulum-v1", use_sde=True, policy_kwargs={"squash_output": True}),
            "use_sde",
        ),
        (lambda: sb3.PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"activation_fn": nn.ELU}), "got ELU"),
        (
            lambda: sb3.PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"features_extractor_class": _extractor()}),
            "FlattenExtractor can be taken over; here is Other",
        ),
        (
            lambda: sb3.PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": {"pi": [8], "vf": []}}),
            "no such critic",
        ),
        (lambda: sb3.PPO("MlpPolicy", _normalised(clip_obs=5.0)), "clip_obs=10 can be taken over; here it is 5"),
        (lambda: sb3.PPO("MlpPolicy", _normalised(clip_reward=5.0)), "clip_reward=10"),
        (lambda: sb3.PPO("MlpPolicy", _normalised(epsilon=1e-5)), "epsilon=1e-08 can be taken over; here it is 1e-05"),
    ],
)
def test_what_cannot_be_taken_over_is_said_in_one_sentence(make, words) -> None:
    model = make()
    with pytest.raises(CorollaryError, match=words) as caught:
        from_stable_baselines3(model)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(CorollaryError, match=r"pip install 'corollary\[sb3\]'"):
        from_stable_baselines3(object())


def test_options_that_follow_from_the_model_and_unknown_ones_are_refused() -> None:
    model = model_of(ENVS["CartPole-v1"])
    with pytest.raises(ConfigError, match="hidden follows from"):
        from_stable_baselines3(model, hidden=(8,))
    with pytest.raises(ConfigError, match="Unknown option 'n_epoch'"):
        from_stable_baselines3(model, n_epoch=8)
    model = model_of(ENVS["CartPole-v1"], n_steps=33, batch_size=66)
    with pytest.raises(ConfigError, match="batch_size=64 does not divide"):
        from_stable_baselines3(model, batch_size=64)
