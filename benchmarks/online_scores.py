"""Scores of the on-policy methods on small environments, with Stable-Baselines3's PPO and sb3-contrib's TRPO beside.

Each (environment, algorithm) is one run directory below ``--out`` with its card, training episodes and evaluations; our
runs continue from their checkpoints when the script is started again. The peers' returns are in ``peers.json``.
``table.md`` is made from these files alone (``--table`` only makes it). The peers are in the extra ``bench``.

    python benchmarks/online_scores.py [--seeds 3] [--workers 2] [--only hopper]
"""

import argparse
import json
import multiprocessing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corollary.core.agent import algorithm_class
from corollary.core.runs import Run, find_runs
from corollary.core.statistics import iqm, stratified_bootstrap

RESULTS = Path(__file__).parent / "results" / "online_scores"
PEERS = "peers.json"
STEPS = {
    "CartPole-v1": 100_000,
    "Acrobot-v1": 300_000,
    "Pendulum-v1": 150_000,
    "InvertedPendulum-v5": 100_000,
    "Hopper-v5": 300_000,
    "HalfCheetah-v5": 300_000,
}
ALGORITHMS = ("ppo", "trpo", "mdpo", "spo", "fixpo", "props")
# Pendulum needs a short horizon (reference card 3.7); every method gets it, the peers too.
OPTIONS: dict[str, dict[str, Any]] = {"Pendulum-v1": {"discount": 0.9}}
PEER_OPTIONS: dict[str, dict[str, Any]] = {"Pendulum-v1": {"gamma": 0.9}}
EPISODES = 10


@dataclass(frozen=True)
class Job:
    """One algorithm in one environment."""

    env_id: str
    algorithm: str
    seeds: int
    out: Path


def train(job: Job) -> str:
    """Bring one run to its full number of steps on one thread."""
    torch.set_num_threads(1)
    kind = algorithm_class(f"online.{job.algorithm}")
    steps = STEPS[job.env_id]
    kind(job.env_id, job.seeds, **OPTIONS.get(job.env_id, {})).learn(
        steps,
        eval_env=job.env_id,
        eval_every=steps // 5,
        eval_episodes=EPISODES,
        run_dir=job.out / job.env_id / job.algorithm,
        resume=True,
        progress=False,
    )
    return f"{job.env_id} {job.algorithm}"


def train_peer(job: Job) -> str:
    """Train and evaluate Stable-Baselines3's PPO or sb3-contrib's TRPO, observations and rewards normalised as ours."""
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    returns = []
    for seed in range(job.seeds):
        env = VecNormalize(
            make_vec_env(job.env_id, 1, seed=seed), gamma=OPTIONS.get(job.env_id, {}).get("discount", 0.99)
        )
        kind = {"sb3 ppo": PPO, "sb3-contrib trpo": TRPO}[job.algorithm]
        model = kind("MlpPolicy", env, seed=seed, device="cpu", **PEER_OPTIONS.get(job.env_id, {}))
        model.learn(STEPS[job.env_id])
        plain = VecNormalize(make_vec_env(job.env_id, 1, seed=1_000_000), training=False, norm_reward=False)
        plain.obs_rms = env.obs_rms
        found, _ = evaluate_policy(model, plain, EPISODES, return_episode_rewards=True)
        returns.append([float(each) for each in found])
    known = read_peers(job.out)
    known["versions"] |= {name: version(name) for name in ("stable-baselines3", "sb3-contrib")}
    known["returns"].setdefault(job.env_id, {})[job.algorithm] = returns
    (job.out / PEERS).write_text(json.dumps(known, indent=2) + "\n")
    return f"{job.env_id} {job.algorithm}"


def read_peers(out: Path) -> dict[str, dict[str, Any]]:
    """Return the peers' versions and, by environment and name, the returns of each of their runs."""
    path = out / PEERS
    return json.loads(path.read_text()) if path.exists() else {"versions": {}, "returns": {}}


def write_table(out: Path) -> None:
    """Write ``table.md`` from the run directories and the peers' returns."""
    runs = [run for path in find_runs(out) if (run := Run.read(path)).evaluations]
    scores: dict[str, dict[str, np.ndarray]] = {}
    for run in runs:
        scores.setdefault(str(run.env_id), {})[run.algorithm.partition(".")[2]] = run.last_scores()
    peers = read_peers(out)
    for env_id, by_name in peers["returns"].items():
        for name, returns in by_name.items():
            scores.setdefault(env_id, {})[name] = np.mean(returns, 1)
    columns = [*ALGORITHMS, "sb3 ppo", "sb3-contrib trpo"]
    lines = [
        "# Scores of the on-policy methods",
        "",
        f"Made by `benchmarks/online_scores.py`. Return of the deterministic policy at the end of training, {EPISODES} "
        "episodes per run: interquartile mean over training runs [95 % stratified bootstrap interval]; the default "
        "configuration of each class (Pendulum: discount 0.9). Peers have their defaults with VecNormalize. With three "
        "runs the interval is about the range of the runs.",
        "",
        f"| environment | steps | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]

    def cell(values: np.ndarray | None) -> str:
        if values is None:
            return ""
        interval = stratified_bootstrap(values, iqm)
        return f"{float(iqm(values)):.0f} [{interval.low:.0f}, {interval.high:.0f}]"

    for env_id, steps in STEPS.items():
        found = scores.get(env_id, {})
        lines.append(f"| {env_id} | {steps:,} | {' | '.join(cell(found.get(name)) for name in columns)} |")
    used = (runs[0].card["versions"] if runs else {}) | peers["versions"]
    about = ", ".join(f"{name} {value}" for name, value in used.items())
    (out / "table.md").write_text("\n".join([*lines, "", f"Versions: {about}."]) + "\n")


def main() -> None:
    """Train what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="only environments or algorithms whose names contain this")
    parser.add_argument("--table", action="store_true", help="only make the table")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if not chosen.table:
        jobs = [
            Job(e, a, chosen.seeds, chosen.out) for e in STEPS for a in ALGORITHMS if chosen.only in f"{e} {a}".lower()
        ]
        context = multiprocessing.get_context("spawn")
        with context.Pool(chosen.workers, maxtasksperchild=1) as pool:
            for done in pool.imap_unordered(train, jobs):
                print(done, flush=True)
                write_table(chosen.out)
        known = read_peers(chosen.out)["returns"]
        for env_id in STEPS:
            for name in ("sb3 ppo", "sb3-contrib trpo"):
                if chosen.only in f"{env_id} {name}".lower() and name not in known.get(env_id, {}):
                    print(train_peer(Job(env_id, name, chosen.seeds, chosen.out)), flush=True)
    write_table(chosen.out)


if __name__ == "__main__":
    main()
