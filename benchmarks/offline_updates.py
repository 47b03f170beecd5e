"""Gradient steps per second: corollary against d3rlpy on the same data, and PRDC's search against a tree per step.

    python benchmarks/offline_updates.py [--peer .venv-peers/bin/python] [--rounds 5] [--steps 300]

d3rlpy lives in an environment of its own:

    python3.11 -m venv .venv-peers && .venv-peers/bin/pip install torch==2.13.0 d3rlpy==2.8.1

Every measurement is a process of its own, that trains for a while and then times `steps` gradient steps of its own
training loop (sampling included, no evaluation): batch 256, two hidden layers of 256, two threads. Peer and ours
alternate, round by round. The rows are a random walk of the shape of Hopper (11 observations, 3 actions). What is
called *bare products* times nothing but the matrix products of one TD3+BC step through PyTorch's own `torch.mm`;
*compiled* is the same update under `torch.compile`, after its compilation.

For PRDC "the whole run" matters, since the search gets cheaper as the policy approaches the data: `--prdc-rows` and
`--prdc-steps` train PRDC and TD3+BC from scratch on a set of that many Hopper-like rows, ours with its own search and
once more with SciPy's tree asked at every policy step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results" / "offline_updates"
THREADS = 2
D_S, D_A, BATCH = 11, 3, 256
VARIANTS = ["float32", "bf16", "compiled"]
# The same work on both sides: batch 256, two hidden layers of 256, layer norm in ReBRAC's critics, and for CQL ten
# actions of each kind and a tuned weight of the penalty.
OURS: dict[str, dict[str, Any]] = {
    "td3_bc": {},
    "iql": {},
    "prdc": {},
    "awac": {"hidden": (256, 256)},
    "rebrac": {"hidden": (256, 256), "batch_size": BATCH},
    "cql": {"hidden": (256, 256), "n_actions": 10, "target_gap": 10.0},
}


def hopper_like(rows: int) -> dict[str, np.ndarray[Any, Any]]:
    """Smooth random episodes of 1000 rows: states are filtered noise, actions a noisy function of the state."""
    rng = np.random.default_rng(0)
    episodes = rows // 1000
    noise = rng.normal(size=(episodes, 1000, D_S)).astype(np.float32)
    states = np.empty_like(noise)
    states[:, 0] = noise[:, 0]
    for t in range(1, 1000):
        states[:, t] = 0.98 * states[:, t - 1] + 0.2 * noise[:, t]
    mixing = rng.normal(size=(D_S, D_A)).astype(np.float32) / np.sqrt(D_S)
    actions = np.tanh(states @ mixing + 0.3 * rng.normal(size=(episodes, 1000, D_A))).astype(np.float32)
    rewards = (1 - np.square(actions).mean(-1) + states[..., 0]).astype(np.float32)
    timeouts = np.zeros((episodes, 1000), bool)
    timeouts[:, -1] = True
    flat = {"observations": states, "actions": actions, "rewards": rewards, "timeouts": timeouts}
    return {key: value.reshape(episodes * 1000, *value.shape[2:]) for key, value in flat.items()}


# ---------------------------------------------------------------------------------- what runs in a child process


def measure_ours(algorithm: str, seeds: int, precision: str, rows: int, steps: int) -> float:
    """Return gradient steps per second (each for all seeds) of our fit."""
    from corollary.core.agent import algorithm_class
    from corollary.core.dataset import Dataset

    raw = hopper_like(rows)
    never = np.zeros(len(raw["rewards"]), bool)
    data = Dataset.from_arrays(raw["observations"], raw["actions"], raw["rewards"], never, raw["timeouts"])
    compiled = precision == "compiled"
    precision = "float32" if compiled else precision
    agent = algorithm_class(f"offline.{algorithm}")(seeds, precision=precision, **OURS[algorithm])
    if compiled:
        agent.update = torch.compile(agent.update)  # type: ignore[method-assign]
    rates = []

    def note(agent: Any, report: Any) -> None:
        rates.append((agent.step, time.perf_counter()))

    agent.fit(data, 100 + steps, log_every=100, progress=False, callbacks=[note])
    (first, began), (last, ended) = rates[0], rates[-1]
    return (last - first) / (ended - began)


def measure_d3rlpy(algorithm: str, rows: int, steps: int) -> float:
    """Return gradient steps per second of d3rlpy's fit, for one seed."""
    import d3rlpy

    raw = hopper_like(rows)
    d3rlpy.seed(0)
    dataset = d3rlpy.dataset.MDPDataset(
        raw["observations"],
        raw["actions"],
        raw["rewards"],
        np.zeros(len(raw["rewards"]), np.float32),
        raw["timeouts"].astype(np.float32),
    )
    encoder = d3rlpy.models.VectorEncoderFactory([256, 256])
    normalised = d3rlpy.models.VectorEncoderFactory([256, 256], use_layer_norm=True)
    scaler = d3rlpy.preprocessing.StandardObservationScaler()
    common = {"batch_size": BATCH, "actor_encoder_factory": encoder, "critic_encoder_factory": encoder}
    configs = {
        "td3_bc": lambda: d3rlpy.algos.TD3PlusBCConfig(**common, observation_scaler=scaler),
        "iql": lambda: d3rlpy.algos.IQLConfig(**common, value_encoder_factory=encoder),
        "prdc": lambda: d3rlpy.algos.PRDCConfig(**common, observation_scaler=scaler),
        "awac": lambda: d3rlpy.algos.AWACConfig(**common, observation_scaler=scaler),
        "rebrac": lambda: d3rlpy.algos.ReBRACConfig(**(common | {"critic_encoder_factory": normalised})),
        "cql": lambda: d3rlpy.algos.CQLConfig(**common, n_action_samples=10),
    }
    learner = configs[algorithm]().create(device="cpu:0")
    times = []
    quiet = d3rlpy.logging.NoopAdapterFactory()
    learner.fit(
        dataset,
        n_steps=steps + 100,
        n_steps_per_epoch=100,
        show_progress=False,
        logger_adapter=quiet,
        epoch_callback=lambda *_: times.append(time.perf_counter()),
    )
    return (len(times) - 1) * 100 / (times[-1] - times[0])


def measure_products(seeds: int, steps: int) -> float:
    """Return TD3+BC steps per second if a step were its matrix products only, each once through `torch.mm`."""
    actor, critic = [(D_S, 256), (256, 256), (256, D_A)], [(D_S + D_A, 256), (256, 256), (256, 1)]

    def forward(layers: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        return [(BATCH, n_in, n_out) for n_in, n_out in layers]

    def weight_gradients(layers: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        return [(n_in, BATCH, n_out) for n_in, n_out in layers]

    def input_gradients(layers: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        return [(BATCH, n_out, n_in) for n_in, n_out in layers]

    critic_step = forward(actor) + 2 * (2 * forward(critic) + weight_gradients(critic) + input_gradients(critic[1:]))
    policy_step = forward(actor) + forward(critic) + input_gradients(critic)
    policy_step += weight_gradients(actor) + input_gradients(actor[1:])
    pairs = {
        shape: (torch.randn(shape[0], shape[1]), torch.randn(shape[1], shape[2]))
        for shape in {*critic_step, *policy_step}
    }

    def once(step: int) -> None:
        for shape in critic_step + (policy_step if step % 2 else []):
            torch.mm(*pairs[shape])

    for step in range(50):
        once(step)
    began = time.perf_counter()
    for step in range(steps):
        once(step)
    return steps / (time.perf_counter() - began) / seeds


def measure_prdc(algorithm: str, rows: int, steps: int) -> float:
    """Return gradient steps per second of a whole run from scratch: td3_bc, prdc, or prdc with a tree per step."""
    from scipy.spatial import cKDTree

    from corollary.core.dataset import Dataset
    from corollary.offline import PRDC, TD3BC

    class Tree:
        """SciPy's tree over (beta s, a), asked for every key of every policy step, as the authors' code does."""

        def __init__(self, data: Any, beta: float) -> None:
            self.states = beta * data.obs.numpy()
            self.tree = cKDTree(np.hstack([self.states, data.action.numpy()]))

        def query(self, action: torch.Tensor, row: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            keys = np.concatenate([self.states[row.numpy()], action.numpy()], -1)
            distance, found = self.tree.query(keys, k=[k], workers=THREADS)
            return torch.from_numpy(found[..., 0]), torch.from_numpy(distance[..., 0])

    class TreePRDC(PRDC):
        def on_data(self, data: Any) -> None:
            self._rows, self._neighbours = data, Tree(data, self.config.beta)

    raw = hopper_like(rows)
    never = np.zeros(len(raw["rewards"]), bool)
    data = Dataset.from_arrays(raw["observations"], raw["actions"], raw["rewards"], never, raw["timeouts"])
    agent = {"td3_bc": TD3BC, "prdc": PRDC, "prdc_tree": TreePRDC}[algorithm]()
    began = time.perf_counter()
    agent.fit(data, steps, progress=False)
    return steps / (time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------------- driver


def child(python: str, *arguments: object) -> float:
    """Run one measurement in a process of its own."""
    done = subprocess.run(
        [python, __file__, "--child", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure, alternate, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=".venv-peers/bin/python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--prdc-rows", type=int, default=1_000_000)
    parser.add_argument("--prdc-steps", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 4], help="of ours; d3rlpy trains one at a time")
    parser.add_argument("--variants", nargs="+", default=VARIANTS[:2], choices=VARIANTS, help="of ours")
    parser.add_argument("--only", default="", help="only these algorithms, separated by commas")
    parser.add_argument("--skip", default="", help="'updates' or 'prdc' to leave that part out")
    parser.add_argument("--child", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    if chosen.child:
        torch.set_num_threads(THREADS)
        kind, *rest = chosen.child
        if kind == "ours":
            print(measure_ours(rest[0], int(rest[1]), rest[2], int(rest[3]), int(rest[4])))
        elif kind == "d3rlpy":
            print(measure_d3rlpy(rest[0], int(rest[1]), int(rest[2])))
        elif kind == "products":
            print(measure_products(int(rest[0]), int(rest[1])))
        else:
            print(measure_prdc(rest[0], int(rest[1]), int(rest[2])))
        return
    from corollary.core.runs import versions

    RESULTS.mkdir(parents=True, exist_ok=True)
    peer_version = subprocess.run(
        [chosen.peer, "-W", "ignore", "-c", "import importlib.metadata as m; print(m.version('d3rlpy'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    about = {"versions": versions() | {"d3rlpy": peer_version}, "threads": THREADS, "batch": BATCH}
    if chosen.skip != "updates":
        name = "_".join(["updates", *filter(None, chosen.only.split(","))])
        write(name, about | {"rows": chosen.rows, "steps": chosen.steps}, updates(chosen))
    if chosen.skip != "prdc":
        write("prdc", about | {"rows": chosen.prdc_rows, "steps": chosen.prdc_steps}, whole_runs(chosen))


def updates(chosen: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Measure each algorithm with each number of seeds: d3rlpy, then the variants of ours, round by round."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(chosen.rounds):
        for algorithm in OURS if not chosen.only else chosen.only.split(","):
            # d3rlpy trains one seed at a time: four of its runs take four times as long as one.
            peer = child(chosen.peer, "d3rlpy", algorithm, chosen.rows, chosen.steps)
            for seeds in chosen.seeds:
                row = found.setdefault(f"{algorithm}, {seeds} seed{'s' * (seeds > 1)}", {})
                row.setdefault("d3rlpy", []).append(peer / seeds)
                for variant in chosen.variants:
                    rate = child(sys.executable, "ours", algorithm, seeds, variant, chosen.rows, chosen.steps)
                    row.setdefault(f"ours {variant}", []).append(rate)
                if algorithm == "td3_bc":
                    rate = child(sys.executable, "products", seeds, chosen.steps)
                    row.setdefault("bare products (torch.mm)", []).append(rate)
                print(f"{algorithm}, {seeds}", {k: round(v[-1], 1) for k, v in row.items()}, flush=True)
    return found


def whole_runs(chosen: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Measure whole runs of TD3+BC, PRDC, and PRDC with a tree per step, alternating (the last one once)."""
    found: dict[str, list[float]] = {}
    for round_ in range(min(3, chosen.rounds)):
        for algorithm in ("td3_bc", "prdc", *(("prdc_tree",) if round_ == 0 else ())):
            rate = child(sys.executable, "prdc", algorithm, chosen.prdc_rows, chosen.prdc_steps)
            found.setdefault(algorithm, []).append(rate)
            print(algorithm, round(rate, 1), flush=True)
    return {"whole run, 1 seed": found}


def write(name: str, about: dict[str, Any], found: dict[str, dict[str, list[float]]]) -> None:
    """Write the raw rates as JSON; as a table them, and their ratios to the first variant of the same round."""
    (RESULTS / f"{name}.json").write_text(json.dumps(about | {"updates_per_second": found}, indent=2) + "\n")
    from corollary.core.report import markdown_table

    header = ["what", "variant", "rounds", "updates/s: median [range]", "ratio to the first, round by round"]
    cells = []
    for what, row in found.items():
        first = next(iter(row.values()))
        for variant, rates in row.items():
            ratios = [rate / base for rate, base in zip(rates, first, strict=False)]
            spreads = (
                f"{statistics.median(each):.{n}f} [{min(each):.{n}f}, {max(each):.{n}f}]"
                for each, n in ((rates, 1), (ratios, 2))
            )
            cells.append([what, variant, str(len(rates)), *spreads])
    versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    settings = ", ".join(f"{key} {about[key]}" for key in ("threads", "batch", "rows", "steps"))
    (RESULTS / f"{name}.md").write_text(
        f"Made by `benchmarks/offline_updates.py`.\n\n{markdown_table(header, cells, n_names=2)}\n\n"
        f"{_remarks(found)}{settings}. {versions}.\n"
    )


def _remarks(found: dict[str, dict[str, list[float]]]) -> str:
    """Say how rows were come by that are not measured as they stand, and what share of an update products take."""
    several = any(" seeds" in what for what in found)
    text = "d3rlpy trains one seed at a time: for several, its rate is that of one divided by them. " if several else ""
    for what, row in found.items():
        products = row.get("bare products (torch.mm)", [])
        shares = [ours / bare for ours, bare in zip(row.get("ours float32", []), products, strict=False)]
        if shares:
            text += f"Bare products would take {statistics.median(shares):.0%} of our time ({what}). "
    if "Bare" in text:
        text += "They are PyTorch's; ours are oneDNN's, which may be faster. "
    return text and f"{text.strip()}\n\n"


if __name__ == "__main__":
    main()
