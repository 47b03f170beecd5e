"""Milliseconds per batch of 256 nearest-row queries: ours against SciPy's k-d tree asked at every step.

    python benchmarks/neighbours.py [--rollouts Hopper-v5:200000 ...] [--files FILE.hdf5 ...] [--seconds 2]

Sets: rollouts of smooth random actions in the environments named, with as many rows as given (a million take minutes
to simulate), and the rows of each D4RL-style file given. States are standardised, beta is 2. Keys have the state of a
random row and

- the row's own action (``data``), or that plus normal noise, clipped to the box (``+0.1``, ``+0.3``, ``+0.5``);
- the action of a policy fitted to the set (``cloned``): least squares on 512 random ReLU features of the state, which
  is about as far from the data as a deterministic policy that imitates them;
- an action drawn uniformly from the box, or from its corners.

After a warm-up, every repetition draws 256 keys and asks all back ends in turn. ``SciPy`` is one `cKDTree.query` per
batch on (beta s, a) with `workers` = threads, which is what the authors' code of PRDC does. ``candidates`` counts
queries only; the time that making the lists takes, once per dataset, is given above each table. Answers are compared
with SciPy's.
Writes ``results/neighbours.json`` and ``results/neighbours.md`` beside this file.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium
import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from corollary.kernels.neighbours import NeighbourIndex

RESULTS = Path(__file__).parent / "results"
BETA = 2.0
BATCH = 256
WARM_UP = 6.0  # seconds
KEY_TYPES = ("data", "+0.1", "+0.3", "+0.5", "cloned", "uniform", "corner")

Array = NDArray[np.float32]


def rollouts(env_id: str, n_rows: int) -> tuple[Array, Array]:
    """States and actions of a run with autocorrelated normal actions (coefficient 0.9, standard deviation 0.7)."""
    env = gymnasium.make(env_id)
    rng = np.random.default_rng(0)
    states = np.empty((n_rows, env.observation_space.shape[0]), np.float32)
    actions = np.empty((n_rows, env.action_space.shape[0]), np.float32)
    state, _ = env.reset(seed=0)
    drift = np.zeros(actions.shape[1])
    for t in range(n_rows):
        drift = 0.9 * drift + 0.7 * np.sqrt(1 - 0.9**2) * rng.normal(size=drift.shape)
        states[t], actions[t] = state, drift.clip(-1, 1)
        state, _, terminated, truncated, _ = env.step(actions[t])
        if terminated or truncated:
            state, _ = env.reset()
            drift[:] = 0
    return states, actions


def from_file(path: Path) -> tuple[Array, Array]:
    """States and actions of a D4RL-style file."""
    with h5py.File(path) as file:
        return file["observations"][:], file["actions"][:]


def cloned_actions(states: Array, actions: Array) -> Array:
    """Actions of a policy fitted to the data by ridge regression on random features."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(states.shape[1], 512)).astype(np.float32) / np.sqrt(states.shape[1])
    features = np.maximum(states @ weights + rng.normal(size=512).astype(np.float32), 0)
    some = rng.integers(0, len(states), 50_000)
    gram = features[some].T @ features[some] + np.eye(512, dtype=np.float32)
    return (features @ np.linalg.solve(gram, features[some].T @ actions[some])).clip(-1, 1).astype(np.float32)


def draw_keys(kind: str, actions: Array, cloned: Array, rng: np.random.Generator) -> tuple[NDArray[np.int64], Array]:
    """Row indices [256] and key actions [256, d_a]."""
    row = rng.integers(0, len(actions), BATCH)
    shape = (BATCH, actions.shape[1])
    if kind == "uniform":
        action = rng.uniform(-1, 1, shape)
    elif kind == "corner":
        action = rng.choice([-1.0, 1.0], shape)
    elif kind == "cloned":
        action = cloned[row]
    else:
        noise = 0.0 if kind == "data" else float(kind)
        action = (actions[row] + noise * rng.normal(size=shape)).clip(-1, 1)
    return row, action.astype(np.float32)


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `make` makes, and the seconds it took."""
    start = time.perf_counter()
    made = make()
    return made, time.perf_counter() - start


def measure_set(states: Array, actions: Array, seconds: float) -> dict[str, Any]:
    """Build every search structure, then time queries of every type of key."""
    states = (states - states.mean(axis=0)) / (states.std(axis=0) + 1e-3)
    cloned = cloned_actions(states, actions)
    threads = torch.get_num_threads()
    rows = torch.from_numpy(states), torch.from_numpy(actions)
    tree, tree_seconds = timed(lambda: cKDTree(np.concatenate([BETA * states, actions], axis=1)))
    blocks, blocks_seconds = timed(lambda: NeighbourIndex(*rows, beta=BETA, backend="blocks"))
    lists, lists_seconds = timed(lambda: NeighbourIndex(*rows, beta=BETA, backend="candidates"))

    def scipy(row: NDArray[np.int64], action: Array) -> Any:
        return tree.query(np.concatenate([BETA * states[row], action], axis=1), workers=threads)[0]

    forms: dict[str, Callable[[NDArray[np.int64], Array], Any]] = {
        "SciPy": scipy,
        "blocks": lambda row, action: blocks.query(torch.from_numpy(action), row=torch.from_numpy(row)),
        "candidates": lambda row, action: lists.query(torch.from_numpy(action), row=torch.from_numpy(row)),
    }
    for name in ("blocks", "candidates"):  # both compile a part of their scan once scans have taken three seconds
        rng = np.random.default_rng(2)
        stop = time.perf_counter() + WARM_UP
        while time.perf_counter() < stop:
            forms[name](*draw_keys("+0.5", actions, cloned, rng))
    measured = []
    for kind in KEY_TYPES:
        rng = np.random.default_rng(1)
        times: dict[str, list[float]] = {name: [] for name in forms}
        own, distances, asked, certified = [], [], lists.n_keys, lists.n_certified
        stop = time.perf_counter() + seconds
        repetition = 0
        while repetition < 4 or time.perf_counter() < stop:
            row, action = draw_keys(kind, actions, cloned, rng)
            answers = {}
            for name, ask in forms.items():
                answers[name], took = timed(lambda ask=ask, row=row, action=action: ask(row, action))
                if repetition:  # the first warms up
                    times[name].append(1e3 * took)
            for name in ("blocks", "candidates"):
                np.testing.assert_allclose(answers[name].distance.numpy(), answers["SciPy"], rtol=1e-4, atol=1e-5)
            own.append(float((answers["blocks"].row.numpy() == row).mean()))
            distances.append(float(np.median(answers["SciPy"])))
            repetition += 1
        measured.append(
            {
                "keys": kind,
                "median distance": median(distances),
                "own-row fraction": float(np.mean(own)),
                "certified fraction": (lists.n_certified - certified) / (lists.n_keys - asked),
                "repetitions": repetition - 1,
                "milliseconds": {
                    name: {"min": min(t), "median": median(t), "max": max(t)} for name, t in times.items()
                },
            }
        )
    return {
        "rows": len(states),
        "dimensions": [states.shape[1], actions.shape[1]],
        "seconds to make": {"SciPy": tree_seconds, "blocks": blocks_seconds, "candidates": lists_seconds},
        "queries": measured,
    }


def markdown(about: dict[str, Any], sets: dict[str, dict[str, Any]]) -> str:
    """The tables."""
    lines = [
        "# Nearest rows: ours against SciPy's k-d tree",
        "",
        f"Milliseconds per {BATCH} keys, median [min, max]. Made by `benchmarks/neighbours.py`, which explains "
        "the sets and keys. *Distance* is the median to the nearest row; *own* how often that is the key's own row; "
        "*certified* the share of keys that candidate lists answer without a full search; "
        "*speed-up* SciPy ÷ candidates (medians).",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
    ]
    for name, result in sets.items():
        made = ", ".join(f"{form} {seconds:.1f} s" for form, seconds in result["seconds to make"].items())
        lines += [
            "",
            f"## {name}: {result['rows']} rows, {result['dimensions'][0]} + {result['dimensions'][1]} dimensions",
            "",
            f"Made in: {made}.",
            "",
            "| keys | distance | own | certified | SciPy | blocks | candidates | speed-up |",
            f"|{'---|' * 8}",
        ]
        for query in result["queries"]:
            cells = [f"{t['median']:.2f} [{t['min']:.2f}, {t['max']:.2f}]" for t in query["milliseconds"].values()]
            ratio = query["milliseconds"]["SciPy"]["median"] / query["milliseconds"]["candidates"]["median"]
            shares = (query["median distance"], query["own-row fraction"], query["certified fraction"])
            lines.append(
                f"| {query['keys']} | {' | '.join(f'{x:.2f}' for x in shares)} | {' | '.join(cells)} | {ratio:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all sets; print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", nargs="*", default=["Hopper-v5:200000", "HalfCheetah-v5:20000"])
    parser.add_argument("--files", type=Path, nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=2.0, help="per set and type of key")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    makers: dict[str, Callable[[], tuple[Array, Array]]] = {
        f"{env_id} rollouts": lambda env_id=env_id, n=int(n_rows): rollouts(env_id, n)
        for env_id, n_rows in (chosen_set.split(":") for chosen_set in chosen.rollouts)
    }
    makers |= {path.stem: lambda path=path: from_file(path) for path in chosen.files}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    about = {
        "processor": next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine()),
        "threads": chosen.threads,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "scipy", "gymnasium", "mujoco")},
    }
    sets = {}
    for name, make in makers.items():
        sets[name] = measure_set(*make(), chosen.seconds)
        print(markdown(about, {name: sets[name]}), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "neighbours.md").write_text(markdown(about, sets))
    (RESULTS / "neighbours.json").write_text(json.dumps({"machine": about, "sets": sets}, indent=1) + "\n")


if __name__ == "__main__":
    main()
