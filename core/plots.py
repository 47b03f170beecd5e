"""Figures of training runs: learning curves and performance profiles.

Colours are the Okabe-Ito set, which people with any common colour vision tell apart; markers and, beyond
seven algorithms, line styles say the same without colour. Matplotlib is used through its objects, never
`pyplot`, so no window, global figure or global setting is touched.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, DataError
from .runs import FloatArray, Group, Run, group_runs
from .statistics import Interval, Scores, Statistic, iqm, performance_profile, stratified_bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Style: TypeAlias = dict[str, Any]

# Okabe and Ito, "Color Universal Design", 2008; their yellow is left out, it vanishes on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":", "-.")
_GREY = "#5f6368"
_LINE: dict[str, Any] = {"markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.6}

_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # Verdana's letters are as wide, where a reader lacks the first
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelcolor": "#202124",
    "axes.edgecolor": _GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.7,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": "#202124",
    "ytick.labelcolor": "#202124",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: as outlines it would be most of a small figure
    "svg.hashsalt": "corollary",  # equal runs give equal bytes
}


def algorithm_styles(labels: Iterable[str]) -> dict[str, Style]:
    """One colour, marker and line style per label, by alphabetical order.

    Pass the result for the union of all labels as `styles`, and an algorithm looks the same in every figure.
    """
    return {
        label: {
            "color": _COLORS[i % len(_COLORS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _LINES[i // len(_COLORS) % len(_LINES)],
        }
        for i, label in enumerate(sorted(set(labels)))
    }


def learning_curves(
    runs: Sequence[Run],
    *,
    ax: "Axes | None" = None,
    out: str | Path | None = None,
    statistic: Statistic = iqm,
    level: float = 0.95,
    styles: Mapping[str, Style] | None = None,
) -> "Figure":
    """Score over gradient or environment steps, whichever the runs count: one panel per task, one colour per algorithm.

    The thick line is the statistic over training runs at each step where all of them were evaluated, the band
    its bootstrap interval at that step (none for a single run), and each thin line one training run.

    Args:
        runs: Run directories as read; repetitions are pooled by `corollary.core.runs.group_runs`.
        ax: Draw on these axes instead of a new figure; the runs must then be of one task.
        out: Write the figure to this file; its ending chooses the format (``.png``, ``.svg``, ``.pdf``).
        statistic: Over training runs; see `corollary.core.statistics.stratified_bootstrap`.
        level: Nominal coverage of the band.
        styles: From `algorithm_styles`; by default made from the labels of these runs.

    Raises:
        DataError: No run has an evaluation.
        ConfigError: `ax` is given and the runs are of several tasks.
    """
    groups = group_runs(runs)
    if not groups:
        raise DataError("None of the runs has an evaluation to plot: train with an evaluation environment.")
    styles = styles or algorithm_styles(group.label for group in groups)
    tasks = list(dict.fromkeys(group.task for group in groups))
    if ax is not None and len(tasks) > 1:
        raise ConfigError(f"The runs are of {len(tasks)} tasks ({', '.join(tasks)}): give one ax per task.")
    with _house_style(ax):
        columns = 2 if len(tasks) in (2, 4) else min(len(tasks), 3)
        figure, axes = _axes(ax, len(tasks), columns, size=(6.4, 4.1) if len(tasks) == 1 else (3.7, 3.1))
        lines: dict[str, Line2D] = {}
        for place, (task, panel) in enumerate(zip(tasks, axes, strict=False)):
            here = [group for group in groups if group.task == task]
            for group in here:
                lines[group.label] = _draw_curve(panel, group, statistic, level, styles[group.label])
            panel.set_title(task, wrap=True)
            panel.set_ylabel(here[0].score_name)
            if place + columns >= len(tasks):  # nothing below it
                panel.set_xlabel(_step_name(groups))
            panel.xaxis.set_major_formatter(_thousands)
            panel.set_xlim(left=0)
        _finish(figure, ax, lines, _counts(groups), out)
    return figure


def _step_name(groups: Sequence[Group]) -> str:
    """What the runs count, as axis label."""
    lived = {_counts_environment_steps(run) for group in groups for run in group.runs}
    return "steps" if len(lived) == 2 else "environment steps" if lived == {True} else "gradient steps"


def _counts_environment_steps(run: Run) -> bool:
    """Whether the run learnt from an environment; the last two are entries that `learn` of an offline agent writes."""
    return run.algorithm.startswith("online.") or "began_at" in run.card or "fine_tuning" in run.card


def _draw_curve(ax: "Axes", group: Group, statistic: Statistic, level: float, style: Style) -> "Line2D":
    color = style["color"]
    for run, column in group.members:
        steps_V, values_VS = run.curve()
        marker = "" if len(steps_V) > 1 else "."
        ax.plot(steps_V, values_VS[:, column], color=color, alpha=0.35, linewidth=0.8, marker=marker, zorder=2)
    steps_V, values_VR = group.curve()
    points = [_interval(values_R, statistic, level) for values_R in values_VR]
    middle, low, high = (np.array([getattr(p, end) for p in points]) for end in ("point", "low", "high"))
    if len(points) > 1:
        ax.fill_between(steps_V, low, high, color=color, alpha=0.16, linewidth=0, zorder=1)
    else:
        ax.vlines(steps_V, low, high, color=color, alpha=0.5, linewidth=4, zorder=1)
    (line,) = ax.plot(steps_V, middle, **_LINE, **style, markevery=-(-len(points) // 10), linewidth=2.0, zorder=3)
    return line


def score_profile(
    scores: Mapping[str, Scores],
    *,
    ax: "Axes | None" = None,
    out: str | Path | None = None,
    thresholds: npt.ArrayLike | None = None,
    level: float = 0.95,
    unit: str = "normalised score",
    styles: Mapping[str, Style] | None = None,
) -> "Figure":
    """Performance profiles: the fraction of each algorithm's runs above a threshold, with its band.

    Args:
        scores: Per label the scores of its runs; see `corollary.core.statistics`.
        ax: Draw on these axes instead of a new figure.
        out: Write the figure to this file; its ending chooses the format.
        thresholds: ``[K]``, in the unit of the scores; by default all scores, so that every
            step down stands where it belongs.
        level: Nominal coverage of the band at one threshold.
        unit: What the scores are, for the axis.
        styles: From `algorithm_styles`; by default made from the labels.

    Raises:
        DataError: No scores, or scores that `corollary.core.statistics.performance_profile` refuses.
    """
    if not scores:
        raise DataError("There are no scores to draw a profile of: give at least one label.")
    styles = styles or algorithm_styles(scores)
    thresholds_K = _breakpoints(scores) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    with _house_style(ax):
        figure, (panel,) = _axes(ax, 1, 1, size=(6.4, 3.6))
        lines: dict[str, Line2D] = {}
        counts: dict[str, str] = {}
        for label, values in scores.items():
            profile = performance_profile(values, thresholds_K, level=level)
            style = styles[label]
            band = {"color": style["color"], "alpha": 0.13, "linewidth": 0}
            panel.fill_between(thresholds_K, profile.low_K, profile.high_K, step="post", **band)
            (lines[label],) = panel.step(
                thresholds_K, profile.fraction_K, where="post", **_LINE, **style, markevery=0.09
            )
            counts[label] = _plural(profile.n_runs, "run")
        panel.axhline(0.5, color=_GREY, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
        panel.set(xlabel=f"threshold ({unit})", ylabel="fraction of runs above it", ylim=(-0.03, 1.03))
        panel.margins(x=0)
        _finish(figure, ax, lines, counts, out)
    return figure


def figure_svg(figure: "Figure") -> bytes:
    """The figure as an SVG document, without date or random names: equal figures give equal bytes."""
    buffer = io.BytesIO()
    with _house_style(None):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _interval(values_R: FloatArray, statistic: Statistic, level: float) -> Interval:
    """The interval of the statistic; nan where a run has no finite score."""
    if not np.isfinite(values_R).all():
        return Interval(np.nan, np.nan, np.nan, level, len(values_R), 1)
    return stratified_bootstrap(values_R, statistic, level=level)


def _breakpoints(scores: Mapping[str, Scores]) -> FloatArray:
    """Every score, where some profile steps down, and a margin at each end."""
    parts = [
        np.ravel(np.asarray(task, dtype=np.float64))
        for values in scores.values()
        for task in (values.values() if isinstance(values, Mapping) else [values])
    ]
    pooled = np.unique(np.concatenate(parts))
    margin = 0.06 * (pooled[-1] - pooled[0]) or 1.0
    return np.concatenate([[pooled[0] - margin], pooled, [pooled[-1] + margin]])


# --- The frame that all figures share.


def _house_style(ax: "Axes | None") -> AbstractContextManager[None]:
    """The house's settings for a figure of ours; a caller's axes keep the caller's."""
    import matplotlib

    settings: Any = {} if ax is not None else _RC  # matplotlib types its keys one by one
    return matplotlib.rc_context(settings)


def _axes(ax: "Axes | None", panels: int, columns: int, size: tuple[float, float]) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    if ax is not None:
        figure = ax.get_figure(root=True)
        assert figure is not None, "axes that belong to no figure"
        return figure, [ax]
    rows = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.5), layout="constrained", dpi=160)
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes[:panels]


def _finish(
    figure: "Figure",
    ax: "Axes | None",
    lines: Mapping[str, "Line2D"],
    counts: Mapping[str, str],
    out: str | Path | None,
) -> None:
    """Add the one legend and write the file."""
    names = [f"{label}, {counts[label]}" if counts.get(label) else label for label in lines]
    if ax is not None:
        ax.legend(list(lines.values()), names)
    else:
        # About 13 characters fit on an inch; line and gap take six per entry. Rows are made equally long.
        fitting = max(1, int(13 * figure.get_figwidth() // (max(map(len, names)) + 6)))
        rows = -(-len(names) // fitting)
        columns = -(-len(names) // rows)
        figure.legend(list(lines.values()), names, loc="outside upper center", ncols=columns)
    if out is not None:
        figure.savefig(out)


def _counts(groups: Sequence[Group]) -> dict[str, str]:
    """How many training runs each label has, where that is the same for all its tasks."""
    sizes: dict[str, set[int]] = {}
    for group in groups:
        sizes.setdefault(group.label, set()).add(len(group.members))
    return {label: _plural(min(n), "run") for label, n in sizes.items() if len(n) == 1}


def _plural(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _thousands(value: float, _: float) -> str:
    """Tick label of a step count: 500, 20k, 1.5M."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
