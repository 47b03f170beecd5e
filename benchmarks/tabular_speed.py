"""Seconds to solve many small MDPs, and one large sparse one: ours against QuantEcon and pymdptoolbox.

    python benchmarks/tabular_speed.py [--peer .venv-tabular/bin/python] [--rounds 5] [--problems 1000] [--threads 2]
    python benchmarks/tabular_speed.py --device cuda --problems 100000 --skip sparse

The peers live in an environment of their own:

    python3.11 -m venv .venv-tabular && .venv-tabular/bin/pip install quantecon==0.11.4 pymdptoolbox==4.0b3

*Dense*: MDPs with 50 states, 5 actions, transitions uniform on the simplex, rewards uniform on [0, 1], gamma = 0.95.
The peers take them one after the other, ours all at once (and, in one row, one after the other too). Policy iteration
is ours with `backend="numba"`, compiled as the peer's is, and in another row ours in PyTorch. *Sparse*: one Garnet with
5 actions and 4 successors of each. Every method is asked for values within 1e-8, and what it missed is
measured against exact values. The methods take turns, round by round; a turn is the mean of as many solves as fit in
half a second, after a first one. Models are made and checked before the clock starts, compilation is warmed up. The
peers' linear algebra gets one thread (`--peer-threads`), which is faster for matrices of this size; ours takes
`--threads`. pymdptoolbox's value iteration stops when its policy is good enough and returns values that are far off:
its row stands for the policy alone. With more problems than 1000, the peers solve the first 1000 and their seconds are
scaled up; on another device than the processor, models are there before the clock starts. `--peer none` measures ours
alone.

*Bare linear algebra* is, for dense problems, one `torch.linalg.solve` of the optimal policies' equations, and for the
sparse one, as many of SciPy's products with the two matrices as our solver made.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "tabular_speed"
TOLERANCE = 1e-8
TURN = 0.5
PEER_PROBLEMS = 1000
DISCOUNT = 0.95
STATES, ACTIONS, BRANCHING = 50, 5, 4
QUANTECON = ("policy_iteration", "modified_policy_iteration", "value_iteration")
MDPTOOLBOX = ("PolicyIteration", "PolicyIterationModified", "ValueIteration")
# Direct evaluation of a policy fills the factors of a random sparse matrix, and pymdptoolbox makes a policy's matrix
# dense, which takes 320 GB: what evaluates policies that way cannot serve here.
SPARSE = {"quantecon": QUANTECON[1:], "pymdptoolbox": MDPTOOLBOX[2:]}


# ------------------------------------------------------------------------------------------ the peers' process


def peer_seconds(folder: Path, case: str, peer: str, method: str) -> tuple[float, float]:
    """Solve every problem of a case; return the seconds and the largest error of a value."""
    p, r = load(folder, case)
    exact = np.load(folder / f"{case}_exact.npy")
    taken, error = 0.0, 0.0
    for i in range(len(r)):
        model, value_of = (quantecon_model if peer == "quantecon" else mdptoolbox_model)(p[i], r[i], method)
        began = time.perf_counter()
        found = model()
        taken += time.perf_counter() - began
        error = max(error, float(np.abs(value_of(found) - exact[i]).max()))
    return taken, error


def load(folder: Path, case: str) -> tuple[Any, Any]:
    """Read transitions and rewards of a case, a list of problems."""
    from scipy import sparse

    reward = np.load(folder / f"{case}_reward.npy")
    if case == "dense":
        return np.load(folder / "dense_transition.npy"), reward
    return [sparse.csr_matrix(sparse.load_npz(folder / "sparse_transition.npz"))], reward


def quantecon_model(p: Any, r: Any, method: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return what solves one problem, and what reads its values."""
    from quantecon.markov import DiscreteDP

    if isinstance(p, np.ndarray):
        model = DiscreteDP(r, p, DISCOUNT)
    else:
        states, actions = np.divmod(np.arange(r.size), r.shape[1])
        model = DiscreteDP(r.ravel(), p, DISCOUNT, states, actions)
    # Its values are within half of epsilon.
    return lambda: model.solve(method, epsilon=2 * TOLERANCE, max_iter=100_000), lambda found: found.v


def mdptoolbox_model(p: Any, r: Any, method: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return what solves one problem, and what reads its values."""
    from mdptoolbox import mdp

    if not isinstance(p, np.ndarray):
        # Its check of the model and its bound on the number of iterations make dense matrices: 320 GB here.
        mdp._util.check = lambda *_: None
        mdp.ValueIteration._boundIter = lambda *_: None
    n_actions = r.shape[1]
    by_action = p.swapaxes(0, 1).copy() if isinstance(p, np.ndarray) else [p[a::n_actions] for a in range(n_actions)]
    options = {
        "PolicyIteration": {"max_iter": 1000},
        "PolicyIterationModified": {"epsilon": TOLERANCE, "max_iter": 100_000},
        "ValueIteration": {"epsilon": TOLERANCE, "max_iter": 100_000},
    }
    model = getattr(mdp, method)(by_action, r, DISCOUNT, **options[method])
    return model.run, lambda _: np.asarray(model.V)


def serve(folder: Path) -> None:
    """Answer requests, one JSON list per line, until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(peer_seconds(folder, *request)), flush=True)


class Peer:
    """The peers' process."""

    def __init__(self, python: str, folder: Path, threads: int) -> None:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        self.process = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--serve", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict.fromkeys(names, str(threads)),
        )

    def ask(self, *request: str) -> tuple[float, float]:
        """Return seconds and error of one measurement."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"The peers' process ended at {request}.")
        seconds, error = json.loads(answer)
        return seconds, error

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------------------------------- our process


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result of one call."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def dense_case(folder: Path, problems: int, device: str) -> dict[str, Callable[[], tuple[float, float]]]:
    """Draw the small problems, write some for the peers, and return our measurements."""
    import torch

    from corollary.theory_checks import solvers
    from corollary.theory_checks.families import dirichlet

    mdp = dirichlet(np.random.default_rng(0), problems, STATES, ACTIONS, 1.0, DISCOUNT)
    solve = functools.partial(solvers.policy_iteration, backend="numba" if device == "cpu" else "torch")
    exact = solvers.policy_iteration(mdp)
    few = slice(PEER_PROBLEMS)
    np.save(folder / "dense_transition.npy", mdp.transition[few].numpy())
    np.save(folder / "dense_reward.npy", mdp.reward[few].numpy())
    np.save(folder / "dense_exact.npy", exact.value[few].numpy())
    alone = list(mdp[few]) if problems <= PEER_PROBLEMS else []
    there, value = mdp.to(device), exact.value.to(device)
    p, r = solvers.dynamics(there, exact.policy.to(device))
    matrix = torch.eye(STATES, dtype=torch.float64, device=device) - DISCOUNT * p
    del mdp, p

    def on_device(work: Callable[[], Any]) -> tuple[float, Any]:
        def waited() -> Any:
            found = work()
            if device != "cpu":
                torch.cuda.synchronize()
            return found

        return timed(waited)

    def ours(solve: Callable[[Any], Any]) -> tuple[float, float]:
        seconds, found = on_device(lambda: solve(there))
        return seconds, float((found.value - value).abs().max())

    def one_by_one() -> tuple[float, float]:
        seconds, found = timed(lambda: [solve(each).value for each in alone])
        return seconds, float((torch.cat(found) - value).abs().max())

    def bare() -> tuple[float, float]:
        seconds, found = on_device(lambda: torch.linalg.solve(matrix, r))
        return seconds, float((found - value).abs().max())

    work = {
        "corollary policy_iteration": lambda: ours(solve),
        "corollary policy_iteration, PyTorch": lambda: ours(solvers.policy_iteration),
        "corollary modified_policy_iteration": lambda: ours(
            lambda each: solvers.modified_policy_iteration(each, tolerance=TOLERANCE)
        ),
        "corollary value_iteration": lambda: ours(lambda each: solvers.value_iteration(each, TOLERANCE)),
        "bare linear algebra": bare,
    }
    return work | ({"corollary policy_iteration, one by one": one_by_one} if alone and device == "cpu" else {})


def sparse_case(folder: Path, states: int) -> dict[str, Callable[[], tuple[float, float]]]:
    """Draw the large problem, write it for the peers, and return our measurements."""
    from scipy import sparse

    from corollary.theory_checks.sparse import solve, sparse_garnet

    mdp = sparse_garnet(np.random.default_rng(0), states, ACTIONS, BRANCHING, DISCOUNT)
    exact = solve(mdp, 1e-12)
    sparse.save_npz(folder / "sparse_transition.npz", mdp.transition, compressed=False)
    np.save(folder / "sparse_reward.npy", mdp.reward[None])
    np.save(folder / "sparse_exact.npy", exact.value[None])
    chosen = mdp.transition[np.arange(states) * ACTIONS + exact.action]
    counts = solve(mdp, TOLERANCE)

    def ours() -> tuple[float, float]:
        seconds, found = timed(lambda: solve(mdp, TOLERANCE))
        return seconds, float(np.abs(found.value - exact.value).max())

    def bare() -> tuple[float, float]:
        def products() -> None:
            for _ in range(counts.backups):
                mdp.transition @ exact.value
            for _ in range(counts.sweeps):
                chosen @ exact.value

        return timed(products)[0], 0.0

    return {"corollary sparse.solve": ours, "bare linear algebra": bare}


def measure(
    case: str, ours: dict[str, Callable[[], tuple[float, float]]], peer: Peer | None, rounds: int, scale: float
) -> dict[str, Any]:
    """Alternate all methods of a case; the first round warms up. The peers' seconds are multiplied by `scale`."""
    methods = {"quantecon": QUANTECON, "pymdptoolbox": MDPTOOLBOX} if case == "dense" else SPARSE
    work: dict[str, Callable[[], tuple[float, float]]] = dict(ours)
    for library, names in methods.items():
        for name in names if peer is not None else ():
            work[f"{library} {name}"] = lambda library=library, name=name: peer.ask(case, library, name)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    errors = dict.fromkeys(work, 0.0)
    for round_ in range(rounds + 1):
        for name, method in work.items():
            taken, error = method()
            again = [method()[0] for _ in range(int(TURN / taken))]
            taken = (float(np.mean(again)) if again else taken) * (1 if name in ours else scale)
            if round_ > 0:
                seconds[name].append(taken)
                errors[name] = max(errors[name], error)
                print(f"{case}, {name}: {taken:.3f} s, error {error:.1e}", flush=True)
    best = "corollary policy_iteration" if case == "dense" else "corollary sparse.solve"
    ratios = {name: float(np.median(np.array(taken) / np.array(seconds[best]))) for name, taken in seconds.items()}
    return {"seconds": seconds, "largest_error": errors, "compared_with": best, "ratio": ratios}


def write(cases: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the raw numbers and a table."""
    on = "" if about["device"] == "cpu" else f"_{about['device']}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"results{on}.json").write_text(json.dumps(about | {"cases": cases}, indent=2) + "\n")
    titles = {
        "dense": f"{about['problems']} MDPs, {STATES} states, {ACTIONS} actions, dense",
        "sparse": f"One MDP, {about['states']:,} states, {ACTIONS} actions, {BRANCHING} successors",
    }
    lines = [
        "# Solving MDPs",
        "",
        f"Made by `benchmarks/tabular_speed.py`: {about['rounds']} rounds, alternating, each the mean of the solves in "
        f"{TURN:g} s; median [least, most] seconds "
        f"to values within {TOLERANCE:g} at gamma = {DISCOUNT}. The ratio is the median over rounds of a method's "
        f"seconds to ours; {about['threads']} threads for ours, {about['peer_threads']} for the peers' linear algebra. "
        "pymdptoolbox's value iteration stops at a good policy, with values that are far off."
        + (f" Ours on {about['device']}, the peers on the processor." if on else "")
        + (f" The peers' seconds are those of {PEER_PROBLEMS} problems, scaled." if about["scale"] > 1 else ""),
    ]
    for case, found in cases.items():
        lines += ["", f"## {titles[case]}", "", "| method | seconds | ratio | largest error |", "|---|---|---|---|"]
        for name, taken in sorted(found["seconds"].items(), key=lambda item: float(np.median(item[1]))):
            cell = f"{np.median(taken):.3f} [{min(taken):.3f}, {max(taken):.3f}]"
            lines.append(f"| {name} | {cell} | {found['ratio'][name]:.2f} | {found['largest_error'][name]:.0e} |")
        share = found["ratio"]["bare linear algebra"]
        lines += ["", f"Bare linear algebra is {share:.0%} of our time."]
    lines += ["", "Versions: " + ", ".join(f"{name} {value}" for name, value in about["versions"].items()) + "."]
    (RESULTS / f"table{on}.md").write_text("\n".join(lines) + "\n")


def peer_versions(python: str) -> dict[str, str]:
    """Return the peers' versions as their environment has them."""
    ask = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({n: m.version(n) for n in ('quantecon', 'numba', 'pymdptoolbox')}))"
    )
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure both cases and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=".venv-tabular/bin/python", help="its Python, or none")
    parser.add_argument("--device", default="cpu", help="where ours runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--states", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-threads", type=int, default=1)
    parser.add_argument("--skip", choices=("dense", "sparse"), help="leave a case out")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve)
        return
    import torch

    from corollary.core.runs import versions

    torch.set_num_threads(chosen.threads)
    about = {
        "versions": versions() | ({} if chosen.peer == "none" else peer_versions(chosen.peer)),
        **{
            name: getattr(chosen, name)
            for name in ("rounds", "problems", "states", "threads", "peer_threads", "device")
        },
        "scale": max(1.0, chosen.problems / PEER_PROBLEMS),
        "discount": DISCOUNT,
        "tolerance": TOLERANCE,
    }
    cases: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer = None if chosen.peer == "none" else Peer(chosen.peer, folder, chosen.peer_threads)
        try:
            for case in ("dense", "sparse"):
                if case != chosen.skip:
                    ours = (
                        dense_case(folder, chosen.problems, chosen.device)
                        if case == "dense"
                        else sparse_case(folder, chosen.states)
                    )
                    cases[case] = measure(case, ours, peer, chosen.rounds, about["scale"] if case == "dense" else 1.0)
                    write(cases, about)
        finally:
            if peer is not None:
                peer.close()


if __name__ == "__main__":
    main()
