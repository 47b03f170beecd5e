"""The command corollary: list, make and inspect data; train, evaluate, play and compare algorithms; check claims."""

import argparse
import dataclasses
import functools
import inspect
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .core import checkpoint
from .core.agent import Agent, algorithm_class, algorithms, load_agent
from .core.config import parse_option
from .core.dataset import Dataset
from .core.dataset_statistics import describe, effective_sample_size
from .core.environments import is_known
from .core.errors import ConfigError, CorollaryError
from .core.evaluation import evaluate
from .core.loading import load_dataset, shipped_datasets
from .core.loop import CHECKPOINT, SAVE_EVERY
from .core.offline_agent import OfflineAgent
from .core.online_agent import OnlineAgent
from .core.runs import Run, read_card, read_runs, strict_json
from .core.sampling import effective_sample_sizes, row_probabilities
from .core.transforms import reward_transform

# Names and titles are printed as they are: what stands in brackets is no markup.
console = Console(width=None if sys.stdout.isatty() else 200, markup=False)


class ChecksFailed(Exception):
    """Some checks did not pass; the exit status is 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 a user's error, 2 a check did not pass, 130 interrupted."""
    parser = _parser(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (CorollaryError, gymnasium.error.Error) as error:
        print(f"corollary: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads, such as `head`, has seen enough; Python must not find out once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"corollary: {named}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("corollary: interrupted", file=sys.stderr)
        return 130
    except ChecksFailed as failed:
        print(f"corollary: {failed}", file=sys.stderr)
        return 2
    return 0


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="corollary", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    sub = commands.add_parser("algorithms", help="list the algorithms, or one algorithm's options")
    sub.add_argument("name", nargs="?", help="for instance offline.prdc: show its options and presets")
    sub.set_defaults(run=_algorithms)

    _data_parser(commands.add_parser("data", help="list, inspect, make, download and convert datasets"))

    sub = commands.add_parser(
        "train",
        help="train an algorithm on a dataset or in an environment",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_options_help(arguments),
    )
    sub.add_argument("algorithm", nargs="?", help="for instance offline.prdc or online.ppo")
    sub.add_argument("--dataset", help="offline: what to learn from, a file or a name (see: corollary data list)")
    sub.add_argument(
        "--env",
        help="online: the environment to learn from; offline: where to evaluate, default the dataset's environment, "
        "'none' for nowhere",
    )
    sub.add_argument("--eval-env", help="online: where to evaluate; default --env; 'none' for nowhere")
    sub.add_argument(
        "--steps", type=int, help="in all: gradient steps offline, environment steps per seed online (default 100000)"
    )
    sub.add_argument("--seeds", help="how many (5), or which (0,3,7, and 7, for one); default 1")
    sub.add_argument("--preset", help="published settings for a family of tasks (see: corollary algorithms NAME)")
    sub.add_argument("--base", metavar="RUN", help="offline.cdsa: the run or checkpoint whose policy it corrects")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option, as hidden=256,256 or actor_lr_decay_steps=none or "
        "reward_transform=return_range+antmaze_minus1; repeatable",
    )
    sub.add_argument(
        "--eval-every",
        type=int,
        help=f"steps between evaluations (default {_EVAL_EVERY['offline']} offline, {_EVAL_EVERY['online']} online)",
    )
    sub.add_argument("--eval-episodes", type=int, help="episodes per seed and evaluation (default 10)")
    sub.add_argument(
        "--save-every",
        type=int,
        help=f"steps between checkpoints (default: one at every evaluation; {SAVE_EVERY} where nothing is evaluated)",
    )
    sub.add_argument("--device", help="cpu (default), cuda, ...")
    sub.add_argument("--precision", help="float32 (default), bf16 (offline) or float64")
    sub.add_argument("--run-dir", help="where to write (default runs/ALGORITHM-TASK-TIME)")
    sub.add_argument("--resume", metavar="RUN", help="continue this run from its checkpoint; --steps may be raised")
    sub.add_argument("--threads", type=int, help="processor threads for tensor work")
    sub.set_defaults(run=_train)

    sub = commands.add_parser("eval", help="evaluate a run or checkpoint in its environment")
    sub.add_argument("path", help="a run directory or a checkpoint folder")
    sub.add_argument("--env", help="environment id; default the one it learnt from, or its data came from")
    sub.add_argument("--episodes", type=int, default=100, help="episodes per seed (default %(default)s)")
    sub.add_argument("--json", metavar="FILE", help="also write every return as JSON")
    sub.set_defaults(run=_eval)

    sub = commands.add_parser("play", help="watch a run or checkpoint: write episodes as GIF or MP4")
    sub.add_argument("path", help="a run directory or a checkpoint folder")
    sub.add_argument("--env", help="environment id; default the one it learnt from, or its data came from")
    sub.add_argument("--out", default="rollout.gif", help="a .gif or .mp4 to write (default %(default)s)")
    sub.add_argument("--episodes", type=int, default=1, help="how many to write (default %(default)s)")
    sub.add_argument("--seed-index", type=int, default=0, help="which of the run's seeds plays, counted from 0")
    sub.add_argument("--stochastic", action="store_true", help="sample actions instead of playing the policy's mean")
    sub.add_argument("--max-steps", type=int, help="cut episodes after so many steps")
    sub.set_defaults(run=_play)

    sub = commands.add_parser("report", help="compare runs: a table here, and one self-contained HTML page")
    sub.add_argument("runs", nargs="+", help="run directories, or folders of them")
    sub.add_argument("--out", default="report.html", help="the page to write (default %(default)s)")
    sub.set_defaults(run=_report)

    sub = commands.add_parser("check", help="verify the claims that algorithms rest on, on problems that can be solved")
    sub.add_argument("what", nargs="*", help="ids, topics or algorithms (FND-02, policy, prdc); all of them by default")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--fast", dest="tier", action="store_const", const="fast", help="a few problems each (default)")
    size.add_argument(
        "--full", dest="tier", action="store_const", const="full", help="many, and a search for tight ones"
    )
    sub.add_argument("--list", action="store_true", help="list the checks and do not run them")
    sub.add_argument("--seed", type=int, default=0, help="of all problems and runs (default %(default)s)")
    sub.add_argument("--json", metavar="FILE", help="write everything that was found as JSON")
    sub.add_argument("--html", metavar="FILE", help="write one self-contained page with a picture for each check")
    sub.add_argument(
        "--keep",
        action="store_true",
        help="search, and store the tightest problems among the library's own",
    )
    sub.set_defaults(run=_check, tier="fast")

    sub = commands.add_parser("demo", help="train BC, TD3+BC, IQL and PRDC on the shipped dataset and compare them")
    sub.add_argument("--out", default="runs/demo", help="folder for runs, picture and page (default %(default)s)")
    sub.add_argument("--seeds", default="3", help="how many seeds of each algorithm (default %(default)s)")
    sub.add_argument("--scale", type=float, default=1.0, help="share of the full number of steps, for a quick look")
    sub.set_defaults(run=_demo)
    return parser


# ------------------------------------------------------------------------------------------------------ checks


def _check(chosen: argparse.Namespace) -> None:
    from .theory_checks.adversary import keep, search
    from .theory_checks.check import select
    from .theory_checks.report import summary_line, terminal_table, write_html, write_json
    from .theory_checks.run import Result, run_checks

    checks = select(*chosen.what)
    if chosen.list:
        if chosen.json or chosen.html or chosen.keep:
            raise ConfigError("--list runs nothing, so there is nothing to write: drop --json, --html and --keep.")
        table = Table("check", "title", "about", box=None)
        for check in checks:
            table.add_row(check.id, check.title, ", ".join(check.tags))
        console.print(table)
        return
    if chosen.keep:
        for check in checks:
            if check.adversary is not None and keep(check, search(check, chosen.tier, chosen.seed)):
                print(f"{check.id}: a tighter problem is kept")
    done: list[Result] = []
    torch.set_num_threads(1)  # small systems: threads would cost more than they bring
    with Live(terminal_table(done), console=console, transient=False) as live:

        def show(result: Result) -> None:
            done.append(result)
            live.update(terminal_table(done))

        adversary = False if chosen.keep else None  # what was just found is kept, and tried as such
        results = run_checks(checks, chosen.tier, chosen.seed, adversary=adversary, tell=show)
    if not console.is_terminal:
        print()  # a table in a file ends without a newline
    print(summary_line(results))
    about = {"tier": chosen.tier, "seed": chosen.seed}
    if chosen.json:
        print(write_json(results, chosen.json, **about))
    if chosen.html:
        print(write_html(results, chosen.html, **about))
    failed = [r for r in results if not r.passed]
    for result in failed:
        why = f" ({result.note})" if result.note else ""
        print(f"{result.check.id} {result.verdict}: {result.check.title}{why}", file=sys.stderr)
    if failed:
        raise ChecksFailed(f"{len(failed)} of {len(results)} checks did not pass.")


# ------------------------------------------------------------------------------------------------- algorithms


def _algorithms(chosen: argparse.Namespace) -> None:
    if chosen.name:
        kind = algorithm_class(chosen.name)
        print(sys.modules[kind.__module__].__doc__)
        print(describe_options(kind))
        return
    table = Table("name", "class", "what it is", box=None)
    for name, kind in algorithms().items():
        summary = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]
        table.add_row(name, f"corollary.{name.partition('.')[0]}.{kind.__name__}", summary)
    console.print(table)


def describe_options(kind: type[Agent[Any]]) -> str:
    """Return a text table of a class's options (name, default, meaning) and presets, from its config dataclass."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.config_type.__mro__):
        meanings |= _attribute_docs(base.__doc__ or "")
    fields = dataclasses.fields(kind.config_type)
    shown = [(f"{f.name}={f.default!r}", meanings.get(f.name, "")) for f in fields]
    width = max(len(left) for left, _ in shown)
    lines = [f"{kind.algorithm} options (--set NAME=VALUE):"]
    lines += [f"  {left:<{width}}  {meaning}" for left, meaning in shown]
    if kind.presets:
        lines.append(f"{kind.algorithm} presets (--preset NAME):")
        lines += [f"  {name}: {dict(p.settings) or 'the defaults'} from {p.source}" for name, p in kind.presets.items()]
    return "\n".join(lines)


def _attribute_docs(doc: str) -> dict[str, str]:
    """Read the ``Attributes:`` section of a docstring; a line ``a, b: text`` documents both names."""
    _, found, section = doc.partition("Attributes:\n")
    docs: dict[str, str] = {}
    names: list[str] = []
    indent = None
    for line in section.splitlines() if found else ():
        if not line.strip():
            break
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        if depth == indent:
            left, _, text = line.strip().partition(":")
            names = [name.strip() for name in left.split(",")]
            docs |= dict.fromkeys(names, text.strip())
        else:
            for name in names:
                docs[name] += " " + line.strip()
    return docs


def _options_help(arguments: Sequence[str]) -> str:
    """Return the options of the algorithm among `arguments`, or where to find them."""
    known = algorithms()
    named = [known[argument] for argument in arguments if argument in known]
    if named:
        return describe_options(named[0])
    return f"algorithms: {', '.join(known)}\noptions of one: corollary train NAME --help"


# ------------------------------------------------------------------------------------------------------ data


def _data_parser(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="data commands", required=True, metavar="COMMAND")
    sub = commands.add_parser("list", help="shipped datasets and the D4RL names, with what is on this machine")
    sub.set_defaults(run=_data_list)
    sub = commands.add_parser("info", help="rows, episodes, returns, flags, scores and coverage of a dataset")
    sub.add_argument("dataset", help="a file or a name")
    sub.add_argument(
        "--reference",
        metavar="FILE",
        help="a set of the same task: compare coverage (SACo), and what its policy would need (concentrability)",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.set_defaults(run=_data_info)
    sub = commands.add_parser("get", help="download a D4RL dataset (resumes a broken download)")
    sub.add_argument("name", help="for instance hopper-medium-v2")
    sub.set_defaults(run=_data_get)
    sub = commands.add_parser("convert", help="read any supported dataset and write it in corollary's own format")
    sub.add_argument("source", help="a file or a name")
    sub.add_argument("target", help="the .hdf5 file to write")
    sub.set_defaults(run=_data_convert)
    sub = commands.add_parser("make", help="make random, medium-replay, medium and expert sets with SAC (extra sb3)")
    sub.add_argument("env", help="for instance Hopper-v5")
    sub.add_argument("--out", default="datasets", help="folder to write (default %(default)s); rerun to resume")
    sub.add_argument(
        "--train-steps", type=int, default=1_000_000, help="environment steps of SAC training (default %(default)s)"
    )
    sub.add_argument("--rows", type=int, default=100_000, help="rows of the rolled-out sets (default %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of training and roll-outs (default %(default)s)")
    sub.set_defaults(run=_data_make)


def _data_list(chosen: argparse.Namespace) -> None:
    from .core.d4rl import D4RL_DATASETS, cache_folder

    table = Table("name", "where", box=None)
    for name in shipped_datasets():
        table.add_row(name, "shipped with corollary")
    for name, entry in D4RL_DATASETS.items():
        table.add_row(name, "on this machine" if (cache_folder() / entry.file_name).exists() else "corollary data get")
    console.print(table)


def _data_info(chosen: argparse.Namespace) -> None:
    dataset = load_dataset(chosen.dataset)
    reference = load_dataset(chosen.reference) if chosen.reference else None
    summary = dataset.summary() | describe(dataset, reference)
    summary["effective_sample_size"] = effective_sample_sizes(dataset)
    if chosen.json:
        print(json.dumps(summary, indent=2))
        return
    table = Table(show_header=False, box=None)
    for key, value in summary.items():
        table.add_row(key.replace("_", " "), _readable(value))
    console.print(table)


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_readable(v)}" for k, v in value.items())
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _data_get(chosen: argparse.Namespace) -> None:
    from .core.download import get_d4rl

    print(get_d4rl(chosen.name))


def _data_convert(chosen: argparse.Namespace) -> None:
    print(load_dataset(chosen.source).save(chosen.target))


def _data_make(chosen: argparse.Namespace) -> None:
    from .core.make_data import make_dataset

    made = make_dataset(chosen.env, chosen.out, train_steps=chosen.train_steps, rows=chosen.rows, seed=chosen.seed)
    for path in made.values():
        print(path)


# ----------------------------------------------------------------------------------------------------- train

_TRAIN_DEFAULTS: dict[str, Any] = {
    "algorithm": None,
    "dataset": None,
    "steps": 100_000,
    "seeds": "1",
    "preset": None,
    "base": None,
    "set": [],
    "env": None,
    "eval_env": None,
    "eval_every": None,
    "eval_episodes": 10,
    "save_every": None,
    "device": "cpu",
    "precision": "float32",
}
_EVAL_EVERY = {"offline": 5000, "online": 50_000}


def _train(chosen: argparse.Namespace) -> None:
    settings = _settings(chosen)
    kind = algorithm_class(settings["algorithm"])
    seeds = _seeds(settings["seeds"])
    options = dict(parse_option(kind.config_type, text) for text in settings["set"])
    options |= {name: settings[name] for name in ("preset", "device", "precision")}
    if settings["base"] is not None:
        if "base" not in inspect.signature(kind).parameters:
            raise ConfigError(f"{kind.algorithm} corrects no other agent: drop --base.")
        options["base"] = _load(Path(settings["base"]))
    if chosen.threads is not None:
        if chosen.threads < 1:
            raise ConfigError(f"--threads must be at least 1; got {chosen.threads}.")
        torch.set_num_threads(chosen.threads)
    agent: OnlineAgent[Any] | OfflineAgent[Any]
    start: Callable[..., Any]
    if issubclass(kind, OnlineAgent):
        _check_task(settings, needs="env", refuses="dataset")
        agent = kind(settings["env"], seeds, **options)
        start, task = agent.learn, agent.problem.env_id or settings["env"]
        plan = {"environment": f"{task}, {agent.config.n_envs} per seed ({agent.config.vectorization})"}
        unit, env = "environment steps per seed", _evaluation_env(settings["eval_env"], agent.problem.env_id)
    else:
        assert issubclass(kind, OfflineAgent)
        _check_task(settings, needs="dataset", refuses="eval_env")
        dataset = load_dataset(settings["dataset"])
        agent = kind(seeds, **options)
        start, task = functools.partial(agent.fit, dataset), dataset.info.name
        plan = _data_plan(agent, dataset)
        unit, env = "gradient steps", _evaluation_env(settings["env"], dataset.info.env_id)
    if settings["eval_every"] is None:
        settings["eval_every"] = _EVAL_EVERY["online" if isinstance(agent, OnlineAgent) else "offline"]
    run_dir = Path(chosen.resume or chosen.run_dir or _new_run_dir(agent.algorithm, task))
    _print_plan(agent, plan, unit, settings, env, run_dir)
    start(
        settings["steps"],
        eval_env=env,
        eval_every=settings["eval_every"],
        eval_episodes=settings["eval_episodes"],
        save_every=settings["save_every"],
        run_dir=run_dir,
        resume=bool(chosen.resume),
        command=settings,
    )
    _print_table([Run.read(run_dir)])


def _data_plan(agent: OfflineAgent[Any], dataset: Dataset) -> dict[str, str]:
    """Say what the dataset can teach, and what the agent's choice and weights of rows leave of it."""
    config, chosen = agent.config, agent.select_data(dataset)
    found, rows = describe(chosen), len(chosen.view_rows(config.view))
    quality, cells = found["trajectory_quality"], found["coverage"]
    probability = row_probabilities(chosen, config, reward_transform(config.reward_transform, chosen))
    size = rows if probability is None else effective_sample_size(probability)
    how = "rows drawn uniformly"
    if probability is not None:
        how = f"rows by {config.sampling} per {config.sampling_per}, temperature {config.sampling_temperature:g}"
    return {
        "data": f"{dataset.info.name}: {len(dataset)} rows, {dataset.n_episodes} episodes",
        "quality": "no reference returns" if quality is None else f"{quality:.3g} (random policy 0, expert 1)",
        "coverage": f"{cells['occupied cells']} cells, effectively {cells['effective support']:.0f}",
        "sampling": f"{how}: effective sample size {size:.0f} of {rows} rows",
    }


def _settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return what to train: the defaults or what the run to resume recorded, then what was given."""
    given = {k: v for k, v in vars(chosen).items() if k in _TRAIN_DEFAULTS and v not in (None, [])}
    settings = dict(_TRAIN_DEFAULTS)
    if chosen.resume:
        settings |= _recorded_command(Path(chosen.resume))
        changed = sorted(k for k, v in given.items() if k != "steps" and v != settings[k])
        if chosen.run_dir and Path(chosen.run_dir) != Path(chosen.resume):
            raise ConfigError(f"--resume continues {chosen.resume} where it is: drop --run-dir.")
        if changed:
            name = changed[0].replace("_", "-")
            raise ConfigError(f"--resume continues {chosen.resume} as it was; only --steps may change, not {name}.")
    settings |= given
    if not settings["algorithm"]:
        raise ConfigError("train needs an algorithm.")
    return settings


_TASK_HELP = {
    "env": "learns from an environment: give --env, for instance --env CartPole-v1.",
    "dataset": "learns from data: give --dataset (see: corollary data list).",
}
_REFUSALS = {
    "dataset": "learns from an environment, not from data: drop --dataset, or take an offline algorithm.",
    "eval_env": "evaluates in --env: --eval-env is for online algorithms.",
}


def _check_task(settings: dict[str, Any], *, needs: str, refuses: str) -> None:
    if settings[refuses] is not None:
        raise ConfigError(f"{settings['algorithm']} {_REFUSALS[refuses]}")
    if settings[needs] is None:
        raise ConfigError(f"{settings['algorithm']} {_TASK_HELP[needs]}")


def _new_run_dir(algorithm: str, task: str) -> str:
    return f"runs/{algorithm}-{re.sub('[/:]', '-', task)}-{time.strftime('%Y%m%d-%H%M%S')}"


def _recorded_command(run_dir: Path) -> dict[str, Any]:
    card = read_card(run_dir)
    command = card.get("command")
    if not isinstance(command, dict):
        raise ConfigError(f"{run_dir} was not started by `corollary train`: resume it in Python, with resume=True.")
    return command | {"steps": card.get("n_steps", command["steps"])}  # the latest total, where it was raised


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(part) for part in text.removesuffix(",").split(",")] if "," in text else int(text)
    except ValueError:
        raise ConfigError(f"--seeds takes a number (5) or a list (0,3,7); got {text!r}.") from None


def _evaluation_env(asked: str | None, default: str | None) -> str | None:
    """Choose the asked environment, else the task's own if gymnasium has it; say so if not."""
    if asked is not None:
        return None if asked == "none" else asked
    if default is not None and not is_known(default):
        print(f"corollary: {default} cannot be made here, so nothing is evaluated: give another with --env.")
        return None
    return default


def _print_plan(
    agent: Agent[Any], task: dict[str, str], unit: str, settings: dict[str, Any], env: str | None, run_dir: Path
) -> None:
    where = f"{settings['eval_episodes']} episodes in {env} every {settings['eval_every']} steps" if env else "none"
    rows = {
        "algorithm": agent.algorithm + (f", preset {agent.preset}" if agent.preset else ""),
        **({"base": settings["base"]} if settings["base"] else {}),
        **task,
        "training": f"{settings['steps']} {unit}, seeds {', '.join(map(str, agent.seeds))}, "
        f"{agent.precision} on {agent.device}",
        "config": ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(agent.config).items()),
        "evaluation": where,
        "writes": str(run_dir),
        "resume": f"corollary train --resume {run_dir}",
    }
    for key, value in rows.items():
        print(f"{key:<11} {value}")  # unwrapped: the paths and commands are there to be copied


# ---------------------------------------------------------------------------------------- eval, play, report


def _eval(chosen: argparse.Namespace) -> None:
    agent, env = _loaded(chosen)
    result = evaluate(agent, env, chosen.episodes)
    table = Table("seed", "mean return", "standard deviation", "score", box=None)
    for index, seed in enumerate(agent.seeds):
        returns = result.returns_SE[index]
        score = "-" if result.mean_score is None else f"{result.mean_score[index]:.1f}"
        table.add_row(str(seed), f"{returns.mean():.1f}", f"{returns.std():.1f}", score)
    console.print(table)
    if chosen.json:
        content = {
            "env_id": result.env_id,
            "seeds": list(agent.seeds),
            "episode_seeds": list(result.episode_seeds),
            "returns": result.returns_SE.tolist(),
            "lengths": result.lengths_SE.tolist(),
            "scores": None if result.scores_SE is None else result.scores_SE.tolist(),
        }
        target = Path(chosen.json)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(strict_json(content, indent=2) + "\n")


def _play(chosen: argparse.Namespace) -> None:
    from .core.rendering import record, writer_for

    write = writer_for(chosen.out)
    agent, env = _loaded(chosen)
    recording = record(
        agent,
        env,
        episodes=chosen.episodes,
        seed_index=chosen.seed_index,
        deterministic=not chosen.stochastic,
        max_steps=chosen.max_steps,
    )
    for episode, episode_return in enumerate(recording.returns, start=1):
        print(f"episode {episode}: return {episode_return:.1f}")
    print(write(recording, chosen.out))


def _loaded(chosen: argparse.Namespace) -> tuple[Agent[Any], str]:
    """Return the agent of the run or checkpoint at `chosen.path`, and the environment it shall act in."""
    path = Path(chosen.path)
    agent = _load(path)
    env = chosen.env or agent.problem.env_id
    if env is None:
        raise ConfigError(f"{path} does not say which environment it belongs to: give --env.")
    return agent, env


def _load(path: Path) -> Agent[Any]:
    """Return the agent of the run or checkpoint at `path`."""
    return load_agent(path / CHECKPOINT if checkpoint.exists(path / CHECKPOINT) else path)


def _report(chosen: argparse.Namespace) -> None:
    from .core.report import write_report

    runs, damaged = read_runs(chosen.runs)
    for sentence in damaged:
        print(f"corollary: {sentence}", file=sys.stderr)
    _print_table(runs)
    print(write_report(chosen.runs, chosen.out))


def _print_table(runs: Sequence[Run]) -> None:
    from .core.report import TableStyle, format_table, summarise

    rows = summarise(runs)
    if not rows:
        print("No evaluations, hence no scores: train with an evaluation environment (--env, or online --eval-env).")
        return
    style: TableStyle = "rich" if sys.stdout.isatty() else "text"
    print(format_table(rows, style=style))


# ------------------------------------------------------------------------------------------------------ demo

_DEMO_DATASET = "halfcheetah-medium-replay-v5"
_DEMO_STEPS = 8_000
# The slowest first, so that the runs end together.
_DEMO = {"offline.prdc": "halfcheetah", "offline.iql": None, "offline.td3_bc": None, "offline.bc": None}


def _demo(chosen: argparse.Namespace) -> None:
    from .core.plots import learning_curves
    from .core.report import write_report

    out = Path(chosen.out)
    if not 0 < chosen.scale < math.inf:
        raise ConfigError(f"--scale must be positive and finite; got {chosen.scale}.")
    steps = max(100, int(_DEMO_STEPS * chosen.scale))
    workers = min(len(_DEMO), os.cpu_count() or 1)
    print(f"{load_dataset(_DEMO_DATASET)!r}")
    print(f"{steps} steps of {', '.join(_DEMO)}; {chosen.seeds} seeds each; {workers} at a time")
    began = time.perf_counter()
    # A process per run and a thread per process: small products gain little from more threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_demo_run, name, preset, chosen.seeds, steps, out / name) for name, preset in _DEMO.items()]
        for job in as_completed(jobs):
            print(f"{time.perf_counter() - began:5.0f} s  {job.result()}", flush=True)
    runs = [Run.read(out / name) for name in reversed(_DEMO)]
    _print_table(runs)
    picture = out / "learning_curves.png"
    learning_curves(runs, out=picture)
    print(picture)
    print(write_report([run.path for run in runs], out / "report.html"))


def _demo_run(name: str, preset: str | None, seeds: str, steps: int, run_dir: Path) -> str:
    """Bring one run of the demo to its end (it continues where an interrupted demo left it)."""
    torch.set_num_threads(1)
    dataset = load_dataset(_DEMO_DATASET)
    kind = algorithm_class(name)
    assert issubclass(kind, OfflineAgent)
    kind(_seeds(seeds), preset=preset).fit(
        dataset,
        steps,
        eval_env=dataset.info.env_id,
        eval_every=max(1, steps // 4),
        eval_episodes=5,
        log_every=max(1, steps // 20),
        run_dir=run_dir,
        resume=True,
        progress=False,
    )
    return f"{name} done"


if __name__ == "__main__":
    sys.exit(main())
