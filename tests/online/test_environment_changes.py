"""Which environments an agent goes on in: never in others than it learnt in, never from a stale observation."""

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

import corollary
from corollary.core.environments import environment_id
from corollary.core.errors import ConfigError, CorollaryError, EnvironmentMismatchError
from corollary.online import PPO, SAC, TRPO
from corollary.online.on_policy import Samples

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "hidden": (8,)}


class Counting(gymnasium.Env[np.ndarray, Any]):
    """Shows how many steps the episode has; episodes have 50; `fails_at` counts all steps and raises once."""

    observation_space = spaces.Box(0, 100, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.steps, self.now = fails_at, 0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.now = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("no contact")
        self.now += 1
        return np.full(1, self.now, np.float32), 1.0, False, self.now == 50, {}


class Negative(gymnasium.RewardWrapper):  # type: ignore[type-arg]
    """The opposite reward."""

    def reward(self, reward: Any) -> Any:
        return -reward


def rollouts(agent: Any) -> list[Any]:
    """Let every rollout that the agent collects from now on be kept."""
    kept: list[Any] = []
    collect = agent.collect
    agent.collect = lambda: kept.append(collect()) or kept[-1]
    return kept


def follow_on(rollout: Any) -> bool:
    """Whether every successor is one step further than what was shown before."""
    return bool((rollout.raw_next_obs == rollout.raw_obs + 1).all())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: gymnasium.make("CartPole-v1"), "CartPole-v1"),
        (lambda: gymnasium.make("CartPole-v1", render_mode="rgb_array"), "CartPole-v1"),
        (lambda: Negative(gymnasium.make("CartPole-v1")), None),
        (lambda: gymnasium.make("Pendulum-v1", g=1.0), None),
        (lambda: gymnasium.make("CartPole-v1", max_episode_steps=7), None),
        (lambda: gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync"), "CartPole-v1"),
        (Counting, None),
    ],
)
def test_an_id_is_of_what_it_makes_again(make, name) -> None:
    env = make()
    assert environment_id(make, env) == name
    env.close()


def test_a_loaded_or_selected_agent_goes_on_in_the_environment_it_had(tmp_path) -> None:
    def make() -> Any:
        return Negative(gymnasium.make("CartPole-v1"))

    agent = PPO(make, 2, **SMALL).learn(64)
    loaded = PPO.load(agent.save(tmp_path / "agent"))
    with pytest.raises(ConfigError, match="loaded agent has no environment: pass learn"):
        loaded.learn(64)
    for other in (loaded.learn(64, env=make), agent.select(1).learn(64)):
        assert all(episode < 0 for recent in other.recent_returns for episode in recent)


def test_a_loaded_agent_of_an_unregistered_environment_goes_on_exactly(tmp_path) -> None:
    whole = PPO(Counting, **SMALL).learn(40 + 16)
    loaded = PPO.load(PPO(Counting, **SMALL).learn(40).save(tmp_path / "agent"))
    kept = rollouts(loaded)
    loaded.learn(8, env=Counting)
    assert kept[0].raw_obs[0, 0].item() == 48  # in the middle of its episode
    assert len(whole.recent_returns[0]) == len(loaded.recent_returns[0])


def test_after_an_error_new_episodes_begin() -> None:
    agent = PPO(lambda: Counting(fails_at=24), **SMALL)
    with pytest.raises(CorollaryError, match="RuntimeError in step: no contact"):
        agent.learn(64)
    kept = rollouts(agent)
    agent.learn(32)
    assert kept[0].raw_obs[0, 0].item() == 0
    assert all(follow_on(rollout) for rollout in kept)


def test_an_environment_may_be_evaluated_in_between_but_not_while_it_is_learnt_from() -> None:
    env = Counting()
    agent = PPO(env, **SMALL).learn(16)
    with pytest.raises(ConfigError, match="eval_env is the environment to learn from"):
        agent.learn(16, eval_env=env, eval_every=16)
    corollary.evaluate(agent, env, 1)
    kept = rollouts(agent)
    agent.learn(32)
    assert all(follow_on(rollout) for rollout in kept)


def test_a_schedule_goes_on_where_a_later_run_was_stopped(tmp_path) -> None:
    def stop(agent: Any, report: Any) -> bool:
        return agent.clock == 64

    settings = SMALL | {"learning_rate_decay": "linear"}
    begun = PPO("CartPole-v1", **settings).learn(32).save(tmp_path / "agent")
    whole = PPO.load(begun).learn(64)
    PPO.load(begun).learn(64, run_dir=tmp_path / "run", log_every=16, callbacks=[stop])
    resumed = PPO("CartPole-v1", **settings).learn(96, run_dir=tmp_path / "run", resume=True)
    assert resumed.optimizer.learning_rate == whole.optimizer.learning_rate
    for name, tensor in whole.networks.state_dict().items():
        assert torch.equal(tensor, resumed.networks.state_dict()[name])


def test_a_vector_environment_of_another_size_is_refused() -> None:
    agent = PPO("CartPole-v1", **SMALL)
    with pytest.raises(EnvironmentMismatchError, match="a vector of 4 environments, but the agent was made for n"):
        agent.set_env(lambda: SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4))
    agent.learn(16)


def test_frozen_moments_stay_frozen_in_a_checkpoint(tmp_path) -> None:
    agent = PPO("CartPole-v1", 2, normalize_obs=True, **SMALL).learn(16)
    agent.observation_normaliser.frozen = True
    assert PPO.load(agent.save(tmp_path / "agent")).observation_normaliser.frozen
    assert agent.select(1).observation_normaliser.frozen


def test_new_episodes_owe_nothing_to_the_rewards_of_former_ones() -> None:
    agent = PPO(Counting, normalize_reward="done", **SMALL).learn(16)
    assert agent.reward_normaliser.running.item() > 5
    agent.set_env(Counting)
    agent.begin_episodes()
    assert agent.reward_normaliser.running.item() == 0


@pytest.mark.parametrize("resets_itself", [False, True])
def test_rewards_are_added_up_across_a_checkpoint_where_episodes_go_on(tmp_path, resets_itself) -> None:
    def make() -> Any:
        return SyncVectorEnv([Counting]) if resets_itself else Counting()

    path = PPO(make, normalize_reward="done", **SMALL).learn(16).save(tmp_path / "agent")
    loaded = PPO.load(path)
    before = loaded.reward_normaliser.running.item()
    with pytest.warns(UserWarning, match="new ones begin") if resets_itself else contextlib.nullcontext():
        loaded.learn(16, env=make)
    after = (1 - 0.99**16) / (1 - 0.99) + (0 if resets_itself else 0.99**16 * before)
    assert loaded.reward_normaliser.running.item() == pytest.approx(after)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_equal_advantages_give_trpo_nothing_to_do(mode) -> None:
    class Same(Counting):
        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            obs, _, _, _, info = super().step(action)
            return np.zeros_like(obs), 0.3, self.now == 1, False, info

    def vector() -> SyncVectorEnv:
        return SyncVectorEnv([Same] * 3, autoreset_mode=gymnasium.vector.AutoresetMode(mode))

    agent = TRPO(vector, n_envs=3, n_steps=16, batch_size=16, hidden=(8,))
    accepted = []
    agent.learn(48 * 3, log_every=48, callbacks=[lambda _, report: accepted.append(report.metrics["accepted"].item())])
    assert accepted == [0, 0, 0]


def test_advantages_are_standardised_over_the_transitions_alone() -> None:
    def samples(weight: torch.Tensor | None, n: int) -> Samples:
        empty = torch.zeros(1, n)
        return Samples(**dict.fromkeys(Samples.__dataclass_fields__, empty) | {"weight": weight})

    advantage = torch.tensor([[0.1, 0.7, -0.4, 99.0]], dtype=torch.float64)
    alone = samples(None, 3).standardized(advantage[:, :3])
    torch.testing.assert_close(
        samples(torch.tensor([[1.0, 1, 1, 0]]).double(), 4).standardized(advantage)[:, :3], alone, rtol=1e-12, atol=0
    )
    one = samples(torch.tensor([[0.0, 0, 1, 0]]).double(), 4).standardized(advantage)
    assert one[0, 2] == samples(None, 1).standardized(advantage[:, 2:3]).item() == -0.4


def test_a_seed_s_gradient_norm_is_its_own() -> None:
    def norm(seeds: Any) -> float:
        changes = {"n_epochs": 8, "n_steps": 64, "learning_rate": 1e-2, "target_kl": 1e-3}
        metrics = PPO("CartPole-v1", seeds, precision="float64", **SMALL | changes).iterate(0.0)
        assert metrics["gradient_steps"][0] == 2  # and the last of four seeds takes 7
        return float(metrics["grad_norm"][0])

    assert norm([0, 1, 2, 3]) == pytest.approx(norm([0]), rel=1e-9)


def test_training_that_ends_before_it_began_says_so() -> None:
    with pytest.warns(UserWarning, match="online.sac ends at step 20, before the first gradient step"):
        SAC("Pendulum-v1", hidden=(8,)).learn(20)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_ctrl_c_reaches_all_processes_and_ends_the_iteration_alone(tmp_path) -> None:
    script = f"""
import sys
from corollary.online import PPO
if __name__ == "__main__":
    agent = PPO("CartPole-v1", n_envs=2, vectorization="async", n_steps=64, batch_size=128, hidden=(8,))
    print("begins", flush=True)
    agent.learn(10**7, run_dir={str(tmp_path / "run")!r}, progress=False, log_every=128,
                callbacks=[lambda *_: print("logged", flush=True)])
"""
    (tmp_path / "train.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "train.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    if not any("logged" in line for line in process.stdout):  # it ended before
        pytest.fail(process.communicate()[1])
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in error
    step = corollary.load_agent(tmp_path / "run" / "checkpoint").clock
    assert step > 0
    assert step % 128 == 0
