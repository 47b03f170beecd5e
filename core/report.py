"""From run directories to statements: a table with intervals, and one self-contained HTML page.

The headline is the **last** score. The best score of a run is shown beside it, labelled as selected: it is
the greatest of several noisy means, chosen on the episodes that measure it, and it grows with the number of
evaluations.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np

from .environments import is_same_environment
from .errors import ConfigError, suggest
from .html import Html, count, element, figure_element, head, join, page, table
from .plots import algorithm_styles, learning_curves, score_profile
from .runs import FloatArray, Group, Run, flatten, group_runs, read_runs, scores_by_label
from .statistics import (
    N_RESAMPLES,
    Interval,
    iqm,
    mean,
    median,
    optimality_gap,
    probability_of_improvement,
    stratified_bootstrap,
)

ScoresByLabel: TypeAlias = Mapping[str, Mapping[str, FloatArray]]
TableStyle: TypeAlias = Literal["rich", "markdown", "text"]
_LEVEL = 0.95
_FEW_RUNS = 5


@dataclass(frozen=True)
class Row:
    """One line of the summary: one variant of one algorithm on one task.

    Attributes:
        algorithm: Label of the variant (see `corollary.core.runs.group_runs`).
        task: Name of the dataset; with what sets it apart, where one name stands for several.
        env_id: The environment of the evaluations.
        runs: Number of training runs R.
        steps: Steps at the last evaluation (gradient steps offline, environment steps per seed online): the fewest and
            the most of any run.
        score_name: Unit of the scores: ``"normalised score"`` or ``"return"``.
        last: IQM over runs of the last score, with its 95 % bootstrap interval.
        best: The same of each run's best score, which is selected and hence biased upwards.
        steps_per_second: Such steps per second of one run directory, all its seeds advancing together (median over
            log lines, then over directories); nan if no metrics were logged.
    """

    algorithm: str
    task: str
    env_id: str
    runs: int
    steps: tuple[int, int]
    score_name: str
    last: Interval
    best: Interval
    steps_per_second: float


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Pool repetitions and summarise each group; runs without evaluations are left out.

    Returns:
        One row per task and algorithm, in this order. Intervals are nan for one run or a score that is not
        finite.
    """
    return [_row(group) for group in group_runs(runs)]


def _row(group: Group) -> Row:
    steps = [run.last_step for run, _ in group.members]
    rates = [float(np.median(run.steps_per_second_L)) for run in group.runs if run.steps_per_second_L.size]
    return Row(
        algorithm=group.label,
        task=group.task,
        env_id=group.runs[0].env_id or "",
        runs=len(group.members),
        steps=(min(steps), max(steps)),
        score_name=group.score_name,
        last=_interval(group.last_scores()),
        best=_interval(group.best_scores()),
        steps_per_second=float(np.median(rates)) if rates else float("nan"),
    )


def _interval(scores_R: FloatArray) -> Interval:
    if not np.isfinite(scores_R).all():
        return Interval(np.nan, np.nan, np.nan, _LEVEL, len(scores_R), 1)
    return stratified_bootstrap(scores_R, level=_LEVEL)


def format_table(rows: Sequence[Row], style: TableStyle = "text", width: int | None = None) -> str:
    """The summary as text.

    Args:
        rows: From `summarise`.
        style: ``"rich"``: a table with terminal colours; ``"markdown"``: a pipe table; ``"text"``: aligned
            columns.
        width: Columns of the terminal, for ``"rich"``; None asks the terminal.

    Raises:
        ConfigError: Another style.
    """
    styles: Sequence[str] = get_args(TableStyle)
    if style not in styles:
        raise ConfigError(f"Table style {style!r} is not one of {', '.join(styles)}.{suggest(style, styles)}")
    tasks = dict.fromkeys(f"{row.task}: {row.score_name}" for row in rows)
    title = next(iter(tasks)) if len(tasks) == 1 else ""
    header = ["algorithm", "runs", "steps", "last: IQM [95 %]", "best*: IQM [95 %]", "steps/s"]
    cells = [[r.algorithm, str(r.runs), _steps(r), str(r.last), str(r.best), _rate(r)] for r in rows]
    n_names = 1 if title else 2
    if not title:
        header.insert(0, "dataset: unit")
        cells = [[f"{row.task}: {row.score_name}", *line] for row, line in zip(rows, cells, strict=True)]
    note = "* greatest of a run's evaluations: selected, hence biased upwards; the last score is the result."
    if style == "rich":
        return _rich_table(title, header, cells, n_names, note, width)
    if style == "markdown":
        return "\n".join([*([title, ""] if title else []), markdown_table(header, cells, n_names), "", f"\\{note}"])
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    aligned = [
        "  ".join(c.ljust(w) if i < n_names else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in [header, ["-" * w for w in widths], *cells]
    ]
    return "\n".join([*([title, ""] if title else []), *(line.rstrip() for line in aligned), "", note])


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]], n_names: int = 1) -> str:
    """A pipe table: the first `n_names` columns are names, the others numbers; what markdown would read is escaped."""
    rule = ["---"] * n_names + ["---:"] * (len(header) - n_names)
    escaped = [[re.sub(r"([|*_\\`<>])", r"\\\1", cell) for cell in line] for line in [header, *cells]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [escaped[0], rule, *escaped[1:]])


def _rich_table(
    title: str,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    n_names: int,
    note: str,
    width: int | None,
) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", caption=note, caption_justify="left")
    table.box, table.header_style, table.pad_edge, table.padding = (
        box.SIMPLE_HEAD,
        "bold",
        False,
        (0, 1, 0, 0),
    )
    for i, name in enumerate(header):
        if i < n_names:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True, style="dim" if name.startswith("best") else None)
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _steps(row: Row) -> str:
    fewest, most = row.steps
    return f"{most:,}" if fewest == most else f"{fewest:,}-{most:,}"


def _rate(row: Row) -> str:
    rate = row.steps_per_second
    return "-" if np.isnan(rate) else f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


# --- Warnings: what would make a reader draw the wrong conclusion.


def warnings_about(runs: Sequence[Run]) -> list[str]:
    """Sentences about what weakens the conclusions from these runs; empty if nothing does."""
    groups = group_runs(runs)
    found = [sentence for check in _GROUP_CHECKS for sentence in check(groups)]
    for run, name in _run_names(runs).items():
        found += _run_warnings(run, name)
    return found + _version_warnings(runs)


def _run_names(runs: Sequence[Run]) -> dict[Run, str]:
    """Short names of the run directories: their paths below the deepest folder that holds them all."""
    paths = [run.path.resolve() for run in runs]
    parent = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return {run: path.relative_to(parent).as_posix() for run, path in zip(runs, paths, strict=True)}


def _few_runs(groups: Sequence[Group]) -> Iterable[str]:
    counts = sorted({len(group.members) for group in groups if len(group.members) < _FEW_RUNS})
    if 1 in counts:
        alone = [f"{g.label} on {g.task}" for g in groups if len(g.members) == 1]
        yield f"One training run only, hence no interval: {'; '.join(alone)}."
    coverage = {2: "50 %", 3: "75 %", 4: "about 88 %"}
    few = [f"{n} runs: {coverage[n]}" for n in counts if n > 1]
    if few:
        yield (
            "Few training runs per row. On one task a nominal 95 % bootstrap interval then covers the "
            f"centre of a symmetric distribution far less often ({'; '.join(few)}). Read the intervals as "
            "the spread that was seen."
        )


def _repeated_seeds(groups: Sequence[Group]) -> Iterable[str]:
    for group in groups:
        if group.repeated:
            again = ", ".join(sorted({str(run.seeds[column]) for run, column in group.repeated}))
            yield (
                f"{group.label} on {group.task}: the same seed occurs more than once and is counted once "
                f"(seed {again})."
            )


def _different_tasks(groups: Sequence[Group]) -> Iterable[str]:
    names: dict[str, set[str]] = {}
    for group in groups:
        names.setdefault(group.runs[0].dataset or "", set()).add(group.task)
    for name, tasks in names.items():
        if name and len(tasks) > 1:
            yield (
                f"The dataset name {name} stands for {len(tasks)} different tasks (other data, environment "
                f"or reference returns): {'; '.join(sorted(tasks))}. They are kept apart."
            )


def _different_efforts(groups: Sequence[Group]) -> Iterable[str]:
    for task in dict.fromkeys(group.task for group in groups):
        here = [group for group in groups if group.task == task]
        steps = sorted({run.last_step for group in here for run, _ in group.members})
        if len(steps) > 1:
            yield f"On {task} runs end at different steps: {', '.join(f'{s:,}' for s in steps)}."
        episodes = sorted({len(run.evaluations[-1].evaluation.episode_seeds) for g in here for run in g.runs})
        if len(episodes) > 1:
            numbers = ", ".join(map(str, episodes))
            yield f"On {task} runs are evaluated on different numbers of episodes: {numbers}."


_GROUP_CHECKS: tuple[Callable[[Sequence[Group]], Iterable[str]], ...] = (
    _few_runs,
    _repeated_seeds,
    _different_tasks,
    _different_efforts,
)


def _run_warnings(run: Run, name: str) -> Iterable[str]:
    planned = run.card.get("n_steps")
    if isinstance(planned, int) and run.reached < planned:
        yield f"{name} is unfinished: {run.reached:,} of {planned:,} steps."
    if not run.evaluations:
        yield f"{name} has no evaluations: it is in no table and no figure."
    elif run.score_name == "return":
        yield f"{name} has no normalised scores: its raw returns are shown, and compared on this task alone."
    data_env = (run.card.get("dataset") or {}).get("env_id")
    if data_env and run.env_id and not is_same_environment(data_env, run.env_id):
        yield f"{name} learnt from {data_env} but is evaluated in {run.env_id}."
    for metric, values_LS in run.metrics.items():
        bad_LS = ~np.isfinite(values_LS) & run.logged[metric][:, None]
        if bad_LS.any():
            line, column = np.argwhere(bad_LS)[0]
            where = f"first at step {run.steps_L[line]:,} of seed {run.seeds[column]}"
            yield f"{name}: the metric {metric} is not finite, {where}."
    if run.evaluations and not np.isfinite(run.curve()[1]).all():
        yield f"{name}: an evaluation has a score that is not finite; no interval includes it."


def _version_warnings(runs: Sequence[Run]) -> list[str]:
    seen: dict[str, set[str]] = {}
    for run in runs:
        for package, version in (run.card.get("versions") or {}).items():
            seen.setdefault(package, set()).add(str(version))
    return [
        f"Runs differ in {package}: {', '.join(sorted(several))}."
        for package, several in seen.items()
        if len(several) > 1
    ]


# --- The page.


def write_report(run_dirs: str | Path | Iterable[str | Path], out_html: str | Path) -> Path:
    """Write one self-contained HTML page about these runs: equal runs give equal bytes.

    It holds the table with intervals, learning curves, performance profiles, probabilities of improvement,
    how scores were computed, datasets with fingerprints, every configuration, versions, and warnings. It
    loads nothing.

    Args:
        run_dirs: Run directories, or folders that contain some.
        out_html: Where to write; folders are made.

    Returns:
        `out_html` as a path.

    Raises:
        DataError: No run is found, or all are damaged; one that is damaged is left out, and the page says so.
    """
    runs, damaged = read_runs(run_dirs)
    groups = group_runs(runs)
    comparable = [group for group in groups if np.isfinite(group.last_scores()).all()]
    scores = scores_by_label(comparable)
    names = _run_names(runs)
    n_training_runs = sum(len(group.members) for group in groups)
    title = f"{', '.join(dict.fromkeys(run.algorithm for run in runs))}: training report"
    created = sorted(str(run.card["created"])[:10] for run in runs if "created" in run.card)
    counted = f"{count(n_training_runs, 'training run')} in {count(len(runs), 'run directory')}"
    dates = f", {' to '.join(dict.fromkeys((created[0], created[-1])))}" if created else ""
    sections = [
        element("h1", "Training report"),
        element("p", f"{counted}{dates}.", class_="soft"),
        _warnings_section(damaged + warnings_about(runs)),
        _headline_section(runs, scores, comparable),
        _every_run(groups, names),
        *_figure_sections(runs, groups, scores, comparable),
        _improvement_section(scores),
        _method_section(runs),
        _dataset_section(runs),
        _config_section(names),
        _version_section(names),
    ]
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(title, *sections), encoding="utf-8", newline="\n")
    return out


def _warnings_section(sentences: Sequence[str]) -> Html:
    if not sentences:
        return Html()
    items = [element("li", sentence) for sentence in sentences]
    return element("section", element("h2", "Read with care"), element("ul", *items), class_="warnings")


def _headline_section(runs: Sequence[Run], scores: ScoresByLabel, groups: Sequence[Group]) -> Html:
    rows = summarise(runs)
    if not rows:
        return join(element("h2", "Scores"), element("p", "No run has an evaluation."))
    header = head(
        ("algorithm", "last score, IQM [95 %]", "best score, selected", "runs", "steps", "steps/s"),
        number=slice(1, None),
        selected=2,
    )
    body: list[Html] = []
    for task in dict.fromkeys(row.task for row in rows):
        here = [row for row in rows if row.task == task]
        name = join(task, element("span", f" · {here[0].env_id} · {here[0].score_name}", class_="soft"))
        body.append(element("tr", element("th", name, colspan="6", scope="rowgroup"), class_="group"))
        body += [_headline_row(row) for row in here]
    about = (
        "IQM over training runs with its 95 % bootstrap interval. The last score is the result. The best "
        "score is the greatest of all evaluations of a run, selected on the very episodes that measure it: "
        "biased upwards."
    )
    return join(element("h2", "Scores"), table(header, body, about), _aggregate(scores, groups))


def _headline_row(row: Row) -> Html:
    return element(
        "tr",
        element("th", row.algorithm, scope="row"),
        element("td", str(row.last), class_="number"),
        element("td", str(row.best), class_="number selected"),
        element("td", str(row.runs), class_="number"),
        element("td", _steps(row), class_="number"),
        element("td", _rate(row), class_="number"),
    )


def _every_run(groups: Sequence[Group], names: Mapping[Run, str]) -> Html:
    """One line per training run: what the intervals are made from."""
    if not groups:
        return Html()
    body = []
    for group in groups:
        members = zip(group.members, group.last_scores(), group.best_scores(), strict=True)
        for (run, column), last, best in members:
            texts = (str(run.seeds[column]), f"{run.last_step:,}", f"{last:.1f}", f"{best:.1f}")
            cells = (element("td", text, class_="number") for text in texts)
            where = (element("td", text) for text in (group.task, names[run]))
            body.append(element("tr", element("th", group.label, scope="row"), *where, *cells))
    header = ("algorithm", "dataset", "run directory", "seed", "last step", "last score", "best score")
    summary = element("summary", f"Each of the {len(body)} training runs")
    return element("details", summary, table(head(header, number=slice(3, None)), body))


def _aggregate(scores: ScoresByLabel, groups: Sequence[Group]) -> Html:
    """Statistics over all tasks that every algorithm has; nothing for a single task or raw returns."""
    tasks = _tasks(scores)
    if len(tasks) < 2 or _units(groups, tasks) != {"normalised score"}:
        return Html()
    statistics = {"IQM": iqm, "median": median, "mean": mean, "optimality gap": optimality_gap}
    body = [
        element(
            "tr",
            element("th", label, scope="row"),
            *(element("td", str(stratified_bootstrap(by_task, s)), class_="number") for s in statistics.values()),
        )
        for label, by_task in scores.items()
    ]
    about = (
        f"Last normalised scores over {len(tasks)} datasets ({', '.join(tasks)}), with 95 % stratified "
        "bootstrap intervals over runs within datasets. Median and mean are of the datasets' mean scores; "
        "the optimality gap is the mean shortfall from 100, lower is better."
    )
    header = head(("algorithm", *statistics), number=slice(1, None))
    return join(element("h3", "All datasets together"), table(header, body, about))


def _figure_sections(
    runs: Sequence[Run], groups: Sequence[Group], scores: ScoresByLabel, comparable: Sequence[Group]
) -> list[Html]:
    if not groups:
        return []
    styles = algorithm_styles(group.label for group in groups)
    curves = figure_element(
        learning_curves(runs, styles=styles),
        "Learning curves: score over steps for each algorithm and task.",
        "Line: IQM over training runs. Band: 95 % bootstrap interval at each step. Thin lines: single training runs.",
    )
    sections = [element("h2", "Learning curves"), curves]
    tasks = _tasks(scores)
    units = _units(comparable, tasks)
    if len(units) == 1 and (len(tasks) == 1 or units == {"normalised score"}):
        (unit,) = units
        profile = figure_element(
            score_profile(scores, unit=unit, styles=styles),
            "Performance profiles: fraction of runs above a threshold, for each algorithm.",
            f"Fraction of training runs whose last score exceeds a threshold, over {', '.join(tasks)}. "
            "Further right is better; the dotted line meets a curve at its median. Band: 95 % at each "
            "threshold separately.",
        )
        sections += [element("h2", "Performance profile"), profile]
    return sections


def _improvement_section(scores: ScoresByLabel) -> Html:
    tasks = _tasks(scores)
    if len(scores) < 2:
        return Html()
    heading = element("h2", "Probability of improvement")
    if not tasks:
        return join(heading, element("p", "The algorithms have no dataset in common, so they are not compared."))
    body = []
    for x in scores:
        against = ("" if x == y else f"{probability_of_improvement(scores[x], scores[y]):.2f}" for y in scores)
        cells = (element("td", text, class_="number") for text in against)
        body.append(element("tr", element("th", x, scope="row"), *cells))
    about = (
        "Probability that a training run of the row's algorithm ends with a higher score than one of the "
        f"column's on the same dataset, with its 95 % interval; over {', '.join(tasks)}. 0.50 is no "
        "difference."
    )
    return join(heading, table(head(("beats", *scores), number=slice(1, None)), body, about))


def _method_section(runs: Sequence[Run]) -> Html:
    evaluations = [run.evaluations[-1].evaluation for run in runs if run.evaluations]
    played = sorted({(len(e.episode_seeds), min(e.episode_seeds), max(e.episode_seeds)) for e in evaluations})
    episodes = "; ".join(f"{n} episodes with reset seeds {low} to {high}" for n, low, high in played)
    texts = [
        "One seed is one training run, and training runs are what is counted. A run's score at an "
        f"evaluation is the mean over its episodes ({episodes or 'none'}; every policy of a run plays the "
        "same ones).",
        "A return is the undiscounted sum of the environment's own rewards, whatever rewards the algorithm "
        "was trained on. The normalised score is 100 (return - low) / (high - low) with the dataset's "
        "reference returns below.",
        "The last score is that of the last evaluation. The best score is the greatest of all evaluations "
        "of a run; it rises with the number of evaluations even if nothing is learnt.",
        "The IQM is the mean of the middle half of the training runs; of three or fewer it is the plain "
        f"mean. Intervals are percentile bootstrap intervals of nominally 95 % from {N_RESAMPLES:,} "
        "resamples of the runs within each dataset. All follow Agarwal et al., Deep Reinforcement Learning "
        "at the Edge of the Statistical Precipice, 2021.",
        "Steps/s are gradient steps offline and environment steps online, per second of one run directory, all of "
        "whose seeds advance together, without the time of evaluations.",
    ]
    return join(element("h2", "How the scores were computed"), *(element("p", text) for text in texts))


def _dataset_section(runs: Sequence[Run]) -> Html:
    keys = ("name", "env_id", "rows", "ref_min_score", "ref_max_score", "fingerprint")
    cards = [run.card.get("dataset") or {} for run in runs]
    distinct = dict.fromkeys(tuple(_text(card.get(key)) for key in keys) for card in cards if card)
    if not distinct:
        return Html()
    header = head(("dataset", "environment", "rows", "low", "high", "fingerprint (SHA-256)"), number=slice(2, 5))
    body = [
        element(
            "tr",
            element("th", name, scope="row"),
            element("td", env_id),
            *(element("td", number, class_="number") for number in numbers),
            element("td", element("code", fingerprint), class_="fingerprint"),
        )
        for name, env_id, *numbers, fingerprint in distinct
    ]
    about = "Low and high are the reference returns that score 0 and 100."
    return join(element("h2", "Datasets"), table(header, body, about))


def _config_section(names: Mapping[Run, str]) -> Html:
    parts: list[Html] = [element("h2", "Configurations")]
    for algorithm in dict.fromkeys(run.algorithm for run in names):
        mine = [run for run in names if run.algorithm == algorithm]
        options = [_options(run) for run in mine]
        keys = dict.fromkeys(key for each in options for key in each)
        differing = [key for key in keys if len({each.get(key) for each in options}) > 1]
        parts.append(element("h3", algorithm))
        if differing:
            body = [
                element(
                    "tr",
                    element("th", names[run], scope="row"),
                    *(element("td", element("code", each.get(key, "-"))) for key in differing),
                )
                for run, each in zip(mine, options, strict=True)
            ]
            parts.append(table(head(("run", *differing)), body, "Settings that differ between these runs."))
        elif len(mine) > 1:
            parts.append(element("p", f"All {len(mine)} run directories have the same settings."))
        parts += [_config_details(names[run], run, each, differing) for run, each in zip(mine, options, strict=True)]
    return join(*parts)


def _config_details(name: str, run: Run, options: Mapping[str, str], differing: Sequence[str]) -> Html:
    summary = element("summary", element("strong", name), f": {len(options)} settings")
    rows = []
    for key, value in options.items():
        text = element("code", value)
        cell = element("td", element("mark", text) if key in differing else text)
        rows.append(element("tr", element("th", key, scope="row"), cell))
    command = run.card.get("command")
    if isinstance(command, Mapping):  # the settings of the command rather than the line that was typed
        command = ", ".join(f"{key}={_text(value)}" for key, value in command.items())
    told = [element("p", "Started with ", element("code", _text(command)))] if command else []
    told += [element("p", f"Resumed at step {each['step']:,}.") for each in run.card.get("resumed", ())]
    return element("details", summary, *told, element("div", element("table", *rows), class_="scroll"))


def _options(run: Run) -> dict[str, str]:
    """Every setting of a run by its dotted name."""
    elsewhere = ("algorithm", "dataset", "versions", "created", "command", "resumed")
    options: dict[str, str] = {}
    for key, value in run.card.items():
        options |= {} if key in elsewhere else flatten(key, value)
    return {"dataset": run.dataset or "none"} | {name.removeprefix("config."): text for name, text in options.items()}


def _version_section(names: Mapping[Run, str]) -> Html:
    distinct: dict[str, list[Run]] = {}
    for run in names:
        if run.card.get("versions"):
            distinct.setdefault(json.dumps(run.card["versions"], sort_keys=True), []).append(run)
    if not distinct:
        return Html()
    columns = [several[0].card["versions"] for several in distinct.values()]
    packages = dict.fromkeys(package for column in columns for package in column)
    body = []
    for package in packages:
        texts = [_text(column.get(package)) for column in columns]
        differ = len(set(texts)) > 1
        cells = [element("td", element("mark", text) if differ else text) for text in texts]
        body.append(element("tr", element("th", package, scope="row"), *cells))
    titles = [", ".join(names[run] for run in several) for several in distinct.values()]
    header = head(("", *titles)) if len(titles) > 1 else Html()
    return join(element("h2", "Versions and machine"), table(header, body))


def _tasks(scores: ScoresByLabel) -> list[str]:
    """The tasks compared: those that every label has."""
    return list(next(iter(scores.values()), {}))


def _units(groups: Sequence[Group], tasks: Sequence[str]) -> set[str]:
    return {group.score_name for group in groups if group.task in tasks}


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
