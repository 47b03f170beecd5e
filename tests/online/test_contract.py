"""What every online algorithm promises; the sweep takes each class in the registry, so a new one is in it by itself."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces

import corollary
from corollary.core import checkpoint
from corollary.core.agent import algorithm_class, algorithms
from corollary.core.errors import (
    CheckpointError,
    ConfigError,
    CorollaryError,
    EnvironmentMismatchError,
    GuaranteeError,
)
from corollary.core.online_agent import OnlineAgent

from .conftest import small

Kind = type[OnlineAgent[Any]]
State = dict[str, torch.Tensor]

SEEDS = [11, 3, 7]
STEPS = 64
CONTINUOUS, DISCRETE = "Pendulum-v1", "CartPole-v1"

KINDS = algorithms("online")


def takes_categories(kind: Any) -> bool:
    return hasattr(kind.config_type, "n_epochs")  # the on-policy family; actor-critics with replay are continuous


every_algorithm = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_case = pytest.mark.parametrize(
    ("kind", "env"),
    [(k, e) for k in KINDS.values() for e in (CONTINUOUS, DISCRETE) if e == CONTINUOUS or takes_categories(k)],
    ids=lambda each: getattr(each, "algorithm", each),
)


def make(kind: Any, env: Any, seeds: Any = SEEDS, **more: Any) -> Any:
    return kind(env, seeds, **small(kind, **more))


@pytest.fixture(scope="module")
def trained() -> dict[tuple[Kind, str], Any]:
    """One agent per class and environment, trained for a few steps; the tests below only look at it."""
    return {
        (kind, env): make(kind, env).learn(STEPS)
        for kind in KINDS.values()
        for env in (CONTINUOUS, DISCRETE)
        if env == CONTINUOUS or takes_categories(kind)
    }


def observations(env: str, n: int = 5) -> Any:
    made = gymnasium.make(env)
    return np.stack([made.reset(seed=i)[0] for i in range(n)])


def state_of(agent: Any, folder: Path) -> State:
    return checkpoint.read(agent.save(folder / f"state of {id(agent)}"))[1]


def same_bits(a: State, b: State) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(torch.nan_to_num(a[name], 7.5), torch.nan_to_num(b[name], 7.5)) for name in a)


# -- Registry and configuration


@every_algorithm
def test_the_name_is_the_module(kind) -> None:
    assert kind.__module__ == f"corollary.{kind.algorithm}"
    assert algorithm_class(kind.algorithm) is kind


@every_algorithm
def test_configurations_survive_json_and_presets_say_what_they_change(kind) -> None:
    env = "Pendulum-v1"
    default = kind(env).config
    assert kind(env, **json.loads(json.dumps(dataclasses.asdict(default)))).config == default
    for name, preset in kind.presets.items():
        config = kind(env, preset=name).config
        assert config == dataclasses.replace(default, **preset.settings)
        assert kind(env, **json.loads(json.dumps(dataclasses.asdict(config)))).config == config
        assert preset.source, name


@every_algorithm
def test_bad_options_are_named(kind) -> None:
    with pytest.raises(ConfigError, match=r"Unknown option 'n_evns'.*Did you mean 'n_envs'\?"):
        kind(CONTINUOUS, n_evns=8)
    with pytest.raises(ConfigError, match="Unknown preset 'nothing like it'"):
        kind(CONTINUOUS, preset="nothing like it")
    with pytest.raises(ConfigError, match="n_envs must be >= 1; got 0"):
        kind(CONTINUOUS, n_envs=0)
    with pytest.raises(ConfigError, match="seeds must be a positive number or a list of different seeds"):
        kind(CONTINUOUS, [1, 1])
    with pytest.raises(ConfigError, match="bf16"):
        kind(CONTINUOUS, precision="bf16")


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if takes_categories(k) and k.algorithm != "online.props"])
def test_a_batch_that_does_not_divide_the_rollout_is_named(kind) -> None:
    name = "critic_batch_size" if "critic_batch_size" in small(kind) else "batch_size"
    with pytest.raises(ConfigError, match=rf"{name}=7 does not divide the 32 steps of a rollout"):
        make(kind, CONTINUOUS, **{name: 7})


@every_algorithm
def test_an_environment_that_is_none_is_named(kind) -> None:
    with pytest.raises(EnvironmentMismatchError, match="is no gymnasium environment"):
        kind(lambda: object())
    with pytest.raises(EnvironmentMismatchError, match="NoSuchEnv"):
        kind("NoSuchEnv-v0")


class Strange(gymnasium.Env[Any, Any]):
    """Configurable trouble."""

    def __init__(self, observation_space: Any = None, action_space: Any = None, trouble: str = "") -> None:
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,))
        self.action_space = action_space or spaces.Box(-1, 1, (1,))
        self.trouble, self.t = trouble, 0

    def reset(self, **kwargs: Any) -> Any:
        super().reset(seed=kwargs.get("seed"))
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        if self.trouble == "raise" and self.t == 5:
            raise ZeroDivisionError("the pendulum fell off")
        reward = np.nan if self.trouble == "nan" and self.t == 5 else 1.0
        return np.zeros(2, np.float32), reward, False, self.t == 30, {}


@every_algorithm
def test_spaces_that_are_not_supported_are_named(kind) -> None:
    with pytest.raises(EnvironmentMismatchError, match="images"):
        kind(lambda: Strange(spaces.Box(0, 255, (8, 8, 3), np.uint8)))
    with pytest.raises(EnvironmentMismatchError, match="action space"):
        kind(lambda: Strange(action_space=spaces.MultiBinary(3)))


@every_algorithm
@pytest.mark.parametrize(("trouble", "words"), [("nan", "reward holds nan"), ("raise", "the pendulum fell off")])
def test_trouble_in_the_environment_is_named_and_leaves_the_checkpoint_intact(kind, trouble, words, tmp_path) -> None:
    well = make(kind, Strange, 1, normalize_obs=False)
    run = tmp_path / "run"
    well.learn(STEPS, run_dir=run)
    before = checkpoint.read(run / "checkpoint")
    ill = make(kind, lambda: Strange(trouble=trouble), 1, normalize_obs=False)
    with pytest.raises(CorollaryError, match=rf"{words}") as caught:
        ill.learn(2 * STEPS, run_dir=run, resume=True)
    assert "step 5 of its episode" in str(caught.value)
    after = checkpoint.read(run / "checkpoint")
    assert same_bits(before[1], after[1])


# -- Acting


@every_case
def test_predict_is_stable_baselines(kind, env, trained) -> None:
    agent, obs = trained[kind, env], observations(env)
    many, state = agent.predict(obs)
    one, _ = agent.predict(obs[0], state=None, episode_start=np.array([True]), deterministic=True)
    assert state is None
    space = gymnasium.make(env).action_space
    assert all(space.contains(action) for action in (*many, one))
    np.testing.assert_allclose(one, many[0], rtol=1e-5, atol=1e-6)
    sampled = [agent.predict(obs, deterministic=False)[0] for _ in range(5)]
    assert any((each != sampled[0]).any() for each in sampled)


@every_case
def test_acting_for_all_seeds_is_acting_for_each(kind, env, trained) -> None:
    agent, obs = trained[kind, env], torch.tensor(observations(env))
    together = agent.act(obs.expand(3, -1, -1))
    for index in range(3):
        torch.testing.assert_close(agent.select(index).act(obs[None])[0], together[index])


@every_case
def test_onnx_gives_the_actions_of_predict(kind, env, trained, tmp_path) -> None:
    agent, obs = trained[kind, env], observations(env)
    path = agent.export_onnx(tmp_path / "policy.onnx", 2)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (action,) = session.run(None, {"observation": obs})
    expected = agent.select(2).act(torch.tensor(obs)[None])[0].numpy()
    np.testing.assert_allclose(action, expected, rtol=0, atol=1e-5)


class Levers(gymnasium.Env[Any, Any]):
    """One step, whatever is pulled; the categories of the actions are not counted from 0."""

    observation_space = spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        return np.zeros(2, np.float32), float(np.sum(action)), True, False, {}


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3, start=5), spaces.MultiDiscrete([2, 3], start=[1, -4])], ids=["discrete", "multi"]
)
def test_exported_categories_are_counted_as_the_environment_counts_them(space, tmp_path) -> None:
    agent = corollary.online.PPO(lambda: Levers(space), **small(corollary.online.PPO)).learn(64)
    obs = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)
    session = onnxruntime.InferenceSession(
        str(agent.export_onnx(tmp_path / "policy.onnx")), providers=["CPUExecutionProvider"]
    )
    (action,) = session.run(None, {"observation": obs})
    np.testing.assert_array_equal(action.reshape(20, -1), agent.predict(obs)[0].reshape(20, -1))
    assert all(space.contains(each if each.size > 1 else each[0]) for each in action)


def poison(agent: Any, index: int) -> None:
    with torch.no_grad():
        for tensor in agent.networks.state_dict().values():
            tensor[index] = float("nan")


@every_case
@pytest.mark.filterwarnings("ignore:.*takes actions of zeros:RuntimeWarning")
def test_a_seed_that_diverges_leaves_the_others_as_they_are(kind, env, tmp_path) -> None:
    well, ill = (make(kind, env) for _ in range(2))
    poison(ill, 1)
    if kind.algorithm == "online.fixpo":  # it stops where its guarantee is broken
        with pytest.raises(GuaranteeError, match=r"nan \(seed 3\)"):
            ill.learn(STEPS)
        return
    well.learn(STEPS)
    with pytest.warns(RuntimeWarning, match=r"diverged.*\(seed 3\)|\(seed 3\).*diverged"):
        ill.learn(STEPS)
    for index in (0, 2):
        ours, theirs = (
            {n: t for n, t in state_of(agent.select(index), tmp_path).items() if n.startswith(("network", "optimizer"))}
            for agent in (well, ill)
        )
        assert same_bits(ours, theirs)
    with pytest.warns(RuntimeWarning, match=r"diverged \(seed 3\)"):
        result = corollary.evaluate(ill, env, 2)
    assert np.isnan(result.returns_SE).tolist() == [[False] * 2, [True] * 2, [False] * 2]


@every_case
def test_learning_ends_when_every_seed_has_diverged(kind, env) -> None:
    agent = make(kind, env)
    for index in range(3):
        poison(agent, index)
    with pytest.raises(CorollaryError, match=r"not finite \(seed 11, 3, 7\)|has the policy become infinite"):
        agent.learn(STEPS)


@every_case
def test_evaluation_and_its_refusal_of_other_spaces(kind, env, trained) -> None:
    result = corollary.evaluate(trained[kind, env], env, 1)
    assert result.returns_SE.shape == (3, 1)
    with pytest.raises(EnvironmentMismatchError, match="Acrobot-v1 has observation space"):
        corollary.evaluate(trained[kind, env], "Acrobot-v1", 1)


@pytest.mark.peer
@every_case
def test_evaluate_policy_of_stable_baselines_runs_on_vector_environments(kind, env, trained) -> None:
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    env_util = pytest.importorskip("stable_baselines3.common.env_util")
    returns, lengths = evaluation.evaluate_policy(
        trained[kind, env], env_util.make_vec_env(env, 2, seed=5), n_eval_episodes=3, return_episode_rewards=True
    )
    assert len(returns) == len(lengths) == 3


# -- Exact state


@every_case
def test_a_saved_agent_comes_back_whole(kind, env, trained, tmp_path) -> None:
    agent = trained[kind, env]
    path = agent.save(tmp_path / "agent")
    for loaded in (kind.load(path), corollary.load_agent(path)):
        assert type(loaded) is kind
        assert (loaded.config, loaded.seeds, loaded.step) == (agent.config, tuple(SEEDS), agent.step)
        assert loaded.problem == agent.problem
        obs = observations(env)
        assert np.array_equal(loaded.predict(obs)[0], agent.predict(obs)[0])
        assert same_bits(state_of(loaded, tmp_path), state_of(agent, tmp_path))


@every_algorithm
def test_a_checkpoint_of_another_algorithm_is_named(kind, trained, tmp_path) -> None:
    other = next(k for k in KINDS.values() if k is not kind)
    path = trained[other, CONTINUOUS].save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match=rf"is a checkpoint of {other.algorithm}, not of {kind.algorithm}"):
        kind.load(path)


@every_case
def test_the_same_seed_is_the_same_run_to_the_bit(kind, env, trained, tmp_path) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    again = make(kind, env).learn(STEPS)
    assert same_bits(state_of(again, tmp_path), state_of(trained[kind, env], tmp_path))
    assert torch.equal(torch_state, torch.get_rng_state())  # no global generator is drawn from
    assert np.array_equal(numpy_state[1], np.random.get_state()[1])  # noqa: NPY002


@every_case
def test_a_seed_learns_the_same_alone_and_among_others(kind, env, tmp_path) -> None:
    together = make(kind, env, precision="float64").learn(STEPS)
    alone = make(kind, env, [7], precision="float64").learn(STEPS)
    ours, theirs = state_of(together.select(2), tmp_path), state_of(alone, tmp_path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.startswith("network/"):
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-8, atol=1e-10)


RESUMED_ELSEWHERE = """
import sys
from corollary.core.agent import load_agent

def refuse_pickles(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"a pickle was loaded: {arguments}")

root, n_steps = sys.argv[1], int(sys.argv[2])
sys.addaudithook(refuse_pickles)
for name in sys.argv[3:]:
    load_agent(f"{root}/{name} half").learn(n_steps).save(f"{root}/{name} resumed")
"""


@pytest.mark.rung(4)
def test_stopped_and_continued_in_another_process_is_never_stopped_to_the_bit(tmp_path) -> None:
    """Training stops in the middle of episodes: environments, normalisers and buffers are part of the state."""
    cases = [(k, e) for k in KINDS.values() for e in (CONTINUOUS, DISCRETE) if e == CONTINUOUS or takes_categories(k)]
    names = [f"{kind.algorithm} {env}" for kind, env in cases]
    for (kind, env), name in zip(cases, names, strict=True):
        make(kind, env).learn(STEPS).save(tmp_path / f"{name} half")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", RESUMED_ELSEWHERE, str(tmp_path), str(STEPS), *names],
        check=True,
        timeout=300,
    )
    for (kind, env), name in zip(cases, names, strict=True):
        whole = make(kind, env).learn(2 * STEPS)
        assert same_bits(checkpoint.read(tmp_path / f"{name} resumed")[1], state_of(whole, tmp_path)), name


@every_algorithm
def test_a_run_directory_is_continued_to_the_total(kind, tmp_path) -> None:
    whole = make(kind, CONTINUOUS).learn(2 * STEPS, run_dir=tmp_path / "whole", save_every=STEPS, log_every=STEPS)
    make(kind, CONTINUOUS).learn(STEPS, run_dir=tmp_path / "parts", log_every=STEPS)
    parts = make(kind, CONTINUOUS).learn(2 * STEPS, run_dir=tmp_path / "parts", resume=True, log_every=STEPS)
    assert parts.step == whole.step
    assert same_bits(state_of(parts, tmp_path), state_of(whole, tmp_path))
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "parts")]
    lines = [[json.loads(line) for line in log.splitlines()] for log in logs]
    for ours, theirs in zip(*lines, strict=True):
        assert (ours["step"], ours["metrics"]) == (theirs["step"], theirs["metrics"])
    with pytest.raises(CheckpointError, match="discount"):
        make(kind, CONTINUOUS, discount=0.5).learn(2 * STEPS, run_dir=tmp_path / "parts", resume=True)


@every_algorithm
def test_learning_goes_on_in_another_environment_with_the_same_spaces_only(kind) -> None:
    agent = make(kind, CONTINUOUS).learn(STEPS)
    step = agent.step
    agent.learn(STEPS, env=lambda: gymnasium.make(CONTINUOUS, g=5.0))
    assert agent.step > step
    with pytest.raises(EnvironmentMismatchError, match="but the agent was made for"):
        agent.learn(STEPS, env=DISCRETE)


@every_algorithm
def test_vector_environments_of_both_autoreset_modes_are_learnt_from(kind) -> None:
    for mode in (gymnasium.vector.AutoresetMode.NEXT_STEP, gymnasium.vector.AutoresetMode.SAME_STEP):
        vector = gymnasium.vector.SyncVectorEnv([lambda: Strange()] * 2, autoreset_mode=mode)
        agent = kind(vector, **{n: v for n, v in small(kind).items() if n != "n_envs"}).learn(2 * STEPS)
        assert agent.config.n_envs == 2
        assert set(agent.recent_returns[0]) <= {30.0}
        assert agent.recent_returns[0]
