"""Scores of the offline algorithms on offline datasets: last and best, every return kept.

Each (dataset, algorithm) is one run directory below ``--out``: its card and evaluations are committed, its checkpoint
is not. The script can be stopped and started again; runs continue from their checkpoints. ``table.md`` is made from the
run directories alone (``--table`` only makes it).

    python benchmarks/offline_scores.py --data FOLDER_OF_HDF5 [--seeds 3] [--workers 2]
"""

import argparse
import multiprocessing
from pathlib import Path

import torch

from corollary import load_dataset
from corollary.core.agent import algorithm_class
from corollary.core.report import format_table, summarise
from corollary.core.runs import CARD, Run, find_runs

# Gradient steps of each algorithm: what two processors can do. CDSA corrects a cloned policy here; FamO2O is meant to
# go on in the environment afterwards.
STEPS = dict.fromkeys(("bc", "td3_bc", "prdc", "iql"), 100_000) | dict.fromkeys(
    ("xql", "sql", "eql", "awac", "cdsa", "famo2o", "odice", "rebrac", "a2pr", "cql", "famo2o_cql"), 10_000
)
# Settings published for a family of datasets or one dataset. The names of the sets are those of D4RL, their data are
# not, so such a setting is a fair choice and no guarantee.
PRESETS = {
    "prdc": lambda env, kind: env,
    "rebrac": lambda env, kind: f"{env}-{kind}",
    "a2pr": lambda env, kind: "uniform",
}
RESULTS = Path(__file__).parent / "results" / "offline_scores"


def train(job: tuple[Path, str, argparse.Namespace]) -> str:
    """Bring one run to its full number of steps on one thread."""
    path, algorithm, chosen = job
    steps = chosen.steps or STEPS[algorithm]
    run_dir = chosen.out / path.stem / f"offline.{algorithm}"
    if is_done(run_dir, steps):
        return f"{path.stem} {algorithm} was done"
    torch.set_num_threads(1)
    dataset = load_dataset(path)
    env, _, kind = path.stem.partition("-v5-")
    preset = PRESETS[algorithm](env, kind) if algorithm in PRESETS else None
    agent = algorithm_class(f"offline.{algorithm}")(chosen.seeds, preset=preset, precision=chosen.precision)
    agent.fit(
        dataset,
        steps,
        eval_env=dataset.info.env_id,
        eval_every=max(1, steps // 10),
        eval_episodes=10,
        run_dir=run_dir,
        resume=True,
        progress=False,
    )
    return f"{path.stem} {algorithm}"


def is_done(run_dir: Path, steps: int) -> bool:
    """Whether a run was evaluated after all of its steps; its checkpoint may be of an earlier version."""
    run = Run.read(run_dir) if (run_dir / CARD).exists() else None
    return run is not None and bool(run.evaluations) and run.last_step >= steps


def write_table(out: Path) -> None:
    """Write ``table.md`` from the run directories below `out`."""
    runs = [run for path in find_runs(out) if (run := Run.read(path)).evaluations]
    if not runs:
        return
    card = runs[0].card
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    text = (
        "# Offline scores\n\n"
        f"Made by `benchmarks/offline_scores.py`. {len(card['seeds'])} training runs each, up to "
        f"{max(run.card['n_steps'] for run in runs)} gradient steps; ten episodes per run and evaluation, ten "
        "evaluations. *Last* is the score at the end, *best* the best evaluation of each run (an optimistic number, "
        "listed beside it and never instead). Scores are normalised with the reference returns inside these files: "
        "they compare these runs with each other and not with published D4RL tables, whose data, physics and row "
        "counts differ. Settings are the defaults, for PRDC and ReBRAC those that the authors published for the "
        "environment or the D4RL set of that name, and nothing was tuned: PRDC's for HalfCheetah (alpha = 40) were "
        "published for other sets than expert data.\n\n"
        f"{format_table(summarise(runs), style='markdown')}\n\nVersions: {versions}.\n"
    )
    (out / "table.md").write_text(text)


def main() -> None:
    """Train what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of .hdf5 files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, help="gradient steps instead of each algorithm's own number")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="only datasets or algorithms whose names contain this")
    parser.add_argument("--table", action="store_true", help="only make the table")
    chosen = parser.parse_args()
    if not chosen.table:
        jobs = [
            (path, algorithm, chosen)
            for algorithm in STEPS
            for path in sorted(chosen.data.glob("*.hdf5"))
            if chosen.only in f"{path.stem} {algorithm}"
        ]
        context = multiprocessing.get_context("spawn")
        with context.Pool(chosen.workers, maxtasksperchild=1) as pool:
            for done in pool.imap_unordered(train, jobs):
                print(done, flush=True)
                write_table(chosen.out)
    write_table(chosen.out)


if __name__ == "__main__":
    main()
