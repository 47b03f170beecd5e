"""Scores of the offline algorithms on offline datasets: last and best, every return kept.

Each (dataset, algorithm) is one run directory below ``--out``: its card and evaluations are committed, its checkpoint
is not. The script can be stopped and started again; runs continue from their checkpoints. ``table.md`` is made from the
run directories alone (``--table`` only makes it).

    python benchmarks/offline_scores.py --data FOLDER_OF_HDF5 [--seeds 3] [--workers 2]
"""

import argparse
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import torch

from corollary import load_dataset
from corollary.core.agent import algorithm_class
from corollary.core.report import format_table, markdown_table, summarise
from corollary.core.runs import CARD, FloatArray, Group, Run, find_runs, group_runs
from corollary.core.statistics import stratified_bootstrap

# Gradient steps of each algorithm: what two processors can do in a day. ReBRAC learns from batches of 1,024, A2PR has
# an autoencoder as well, and a step of CQL costs several times what one of the others does.
STEPS = (
    dict.fromkeys(("bc", "td3_bc", "prdc", "iql"), 100_000)
    | dict.fromkeys(("xql", "sql", "eql", "awac", "cdsa", "famo2o", "odice"), 10_000)
    | dict.fromkeys(("rebrac", "a2pr"), 2_000)
    | dict.fromkeys(("cql", "famo2o_cql"), 1_000)
)
EQUAL_STEPS = (1_000, 2_000, 10_000)
"""Gradient steps after which algorithms are compared, those that were evaluated there."""
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
    groups = group_runs(runs)
    equal = "\n\n".join(
        f"### {step:,} steps\n\n{table}" for step in reversed(EQUAL_STEPS) if (table := equal_steps_table(groups, step))
    )
    longest = max(run.card["n_steps"] for run in runs)
    text = (
        "# Offline scores\n\n"
        f"Made by `benchmarks/offline_scores.py`: {len(card['seeds'])} training runs of each algorithm on each "
        "dataset; ten episodes per run and evaluation. Scores are normalised with the reference returns inside these "
        "files.\n\n"
        "What this shows: how these algorithms compare on these sets after so many gradient steps. What it does not "
        "show: the published numbers. Those are of D4RL's data, physics and row counts, and after a million steps; "
        f"{max(EQUAL_STEPS):,} are a hundredth of that, which favours what learns quickly, above all cloning, over "
        "what ends up high. Settings are the defaults; PRDC and ReBRAC have those that their authors published for the "
        "environment or the D4RL set of that name (PRDC's alpha = 40 for HalfCheetah was not published for expert "
        "data). Nothing was tuned. The sets are of Stable-Baselines3's SAC: random 20,000 rows, medium and expert "
        "100,000, medium-replay 50,000 (HalfCheetah) and 170,000 (Hopper), made with MuJoCo 4.0.0; the evaluations are "
        "of the version below. Only HalfCheetah's medium-replay is in the repository; `corollary data make` makes "
        "others of their kind. "
        "CDSA corrects a cloned policy here; FamO2O is shown before it goes on in the environment.\n\n"
        f"## After equal numbers of gradient steps\n\n{equal}\n\n"
        "Mean of the runs with their range (the IQM of three runs and its 95 % bootstrap interval); *all* is the IQM "
        "over all sets with its 95 % stratified bootstrap interval. The runs over 100,000 steps were first evaluated "
        "after 10,000; runs whose steps cost more are shorter, so these tables have fewer lines than there are "
        "algorithms.\n\n"
        f"## After all steps: up to {longest:,}\n\n"
        "*Last* is the score at the end, *best* the best of ten evaluations of each run (an optimistic number, listed "
        "beside it and never instead). One step moves all the runs of a line; steps/s counts such "
        "steps, on one thread of a machine with other work.\n\n"
        f"{format_table(summarise(runs), style='markdown')}\n\nVersions: {versions}.\n"
    )
    (out / "table.md").write_text(text)


def equal_steps_table(groups: Sequence[Group], step: int) -> str:
    """Scores of all algorithms on all datasets after `step` gradient steps, the highest of *all* first; "" for none."""
    tasks = sorted({group.task for group in groups})
    scores: dict[str, dict[str, FloatArray]] = {}
    for group in groups:
        steps, values = group.curve()
        if step in steps:
            scores.setdefault(group.label, {})[group.task] = values[steps == step][0]
    whole = {label: stratified_bootstrap(found) for label, found in scores.items() if len(found) == len(tasks)}
    if not scores:
        return ""
    order = sorted(scores, key=lambda label: -whole[label].point if label in whole else float("inf"))
    cells = [
        [
            label,
            *(f"{stratified_bootstrap(scores[label][task]):.0f}" if task in scores[label] else "" for task in tasks),
            f"{whole[label]:.1f}" if label in whole else "",
        ]
        for label in order
    ]
    return markdown_table(["algorithm", *tasks, "all"], cells)


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
