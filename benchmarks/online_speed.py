"""Environment steps per second of PPO, collection and updates together, ours against Stable-Baselines3's.

Both learn with Stable-Baselines3's default settings (2048 steps of each environment per iteration, minibatches of 64,
10 epochs, 64-64 tanh networks, no normalisation) in the same process, taking turns; ours is its preset ``sb3``. A round
is one iteration of each after one to warm up. *Environment* is the time that stepping the same environments with random
actions takes, as a share of our iteration: the limit.

    python benchmarks/online_speed.py [--rounds 5] [--threads 2]
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO as PeerPPO
from stable_baselines3.common.env_util import make_vec_env

from corollary.core.environments import make_environments
from corollary.core.runs import versions
from corollary.online import PPO

RESULTS = Path(__file__).parent / "results"
CASES = (("CartPole-v1", 8, 1), ("HalfCheetah-v5", 1, 1), ("HalfCheetah-v5", 8, 1), ("CartPole-v1", 8, 4))


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def environment_seconds(env_id: str, n_envs: int, n_steps: int) -> float:
    """Seconds that `n_steps` vector steps with random actions take."""
    with make_environments(env_id, (0,), n_envs) as environments:
        environments.reset()
        draw = np.random.default_rng(0)
        actions = environments.actions
        if actions.kind == "continuous":
            rows = draw.uniform(-1, 1, (n_steps, n_envs, actions.dim)).astype(np.float32)
        else:
            rows = draw.integers(0, actions.sizes[0], (n_steps, n_envs, 1))
        return seconds(lambda: [environments.step(row) for row in rows])


def measure(env_id: str, n_envs: int, n_seeds: int, rounds: int) -> dict[str, object]:
    """Alternate iterations of the peer and of ours; the peer trains its seeds one after the other."""
    ours = PPO(env_id, n_seeds, preset="sb3", n_envs=n_envs)
    peers = [PeerPPO("MlpPolicy", make_vec_env(env_id, n_envs, seed=s), seed=s, device="cpu") for s in range(n_seeds)]
    steps = ours.config.n_steps * n_envs
    found: dict[str, list[float]] = {"corollary": [], "stable-baselines3": [], "environment": []}
    for round_ in range(rounds + 1):
        times = {
            "stable-baselines3": sum(seconds(lambda p=p: p.learn(steps, reset_num_timesteps=False)) for p in peers),
            "corollary": seconds(lambda: ours.learn(steps)),
            "environment": n_seeds * environment_seconds(env_id, n_envs, ours.config.n_steps),
        }
        if round_ > 0:  # the first one warms up
            for name, taken in times.items():
                found[name].append(steps * n_seeds / taken)
    ratios = np.array(found["corollary"]) / np.array(found["stable-baselines3"])
    share = np.array(found["corollary"]) / np.array(found["environment"])
    return {
        "env": env_id,
        "n_envs": n_envs,
        "seeds": n_seeds,
        "steps_per_second": found,
        "ratio": float(np.median(ratios)),
        "environment_share": float(np.median(share)),
    }


def write(rows: list[dict[str, object]], rounds: int) -> None:
    """Write the raw numbers and the table."""
    about = versions() | {"stable-baselines3": version("stable-baselines3")}
    (RESULTS / "online_speed.json").write_text(json.dumps({"versions": about, "cases": rows}, indent=2) + "\n")
    lines = [
        "# Steps per second of PPO",
        "",
        f"Made by `benchmarks/online_speed.py`, {rounds} rounds; median [least, most] environment steps per second of "
        "all seeds together. The ratio is the median over rounds.",
        "",
        "| environment | envs | seeds | Stable-Baselines3 | corollary | ratio | environment's share |",
        "|---|---|---|---|---|---|---|",
    ]

    def cell(values: list[float]) -> str:
        return f"{np.median(values):,.0f} [{min(values):,.0f}, {max(values):,.0f}]"

    for row in rows:
        speeds = row["steps_per_second"]
        lines.append(
            f"| {row['env']} | {row['n_envs']} | {row['seeds']} | {cell(speeds['stable-baselines3'])} | "
            f"{cell(speeds['corollary'])} | {row['ratio']:.2f} | {row['environment_share']:.0%} |"
        )
    lines += ["", "Versions: " + ", ".join(f"{name} {value}" for name, value in about.items()) + "."]
    (RESULTS / "online_speed.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for env_id, n_envs, n_seeds in CASES:
        rows.append(measure(env_id, n_envs, n_seeds, chosen.rounds))
        print(rows[-1], flush=True)
        write(rows, chosen.rounds)


if __name__ == "__main__":
    main()
