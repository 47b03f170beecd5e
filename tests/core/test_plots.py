"""Figures: what is drawn is what was computed, labelled, told apart without colour, without global state."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from corollary.core.errors import ConfigError, DataError
from corollary.core.evaluation import Evaluation
from corollary.core.plots import algorithm_styles, figure_svg, learning_curves, score_profile
from corollary.core.runs import Run, RunWriter
from corollary.core.statistics import mean, performance_profile, stratified_bootstrap


def make_run(
    path: Path, scores_VS: Any, algorithm: str = "a", dataset: str = "hopper", normalised: bool = True, **more: Any
) -> Run:
    """A run with one evaluation every 1000 steps; its scores are means of two episodes."""
    scores_VS = np.asarray(scores_VS, dtype=np.float64)
    card = {
        "algorithm": algorithm,
        "config": {},
        "seeds": list(range(scores_VS.shape[1])),
        "dataset": {"name": dataset},
        **more,
    }
    with RunWriter(path, card) as writer:
        for v, scores_S in enumerate(scores_VS):
            scores_SE = scores_S[:, None] + [-1.0, 1.0]
            lengths = np.ones(scores_SE.shape, dtype=np.int64)
            evaluation = Evaluation("Hopper-v5", scores_SE, lengths, (0, 1), scores_SE if normalised else None)
            writer.log_evaluation(1000 * (v + 1), v, evaluation)
    return Run.read(path)


@pytest.fixture
def scores_VS() -> np.ndarray:
    return np.array([[1.0, 2.0, 6.0, 7.0], [5.0, 9.0, 10.0, 40.0], [8.0, 9.0, 11.0, 12.0]])


def test_curves_show_the_statistic_its_interval_and_every_run(tmp_path: Path, scores_VS: np.ndarray) -> None:
    figure = learning_curves([make_run(tmp_path / "run", scores_VS)])
    (ax,) = figure.axes
    drawn = [line.get_ydata() for line in ax.lines]
    for scores_V in scores_VS.T:
        assert any(np.array_equal(y, scores_V) for y in drawn)
    expected = [stratified_bootstrap(scores_S) for scores_S in scores_VS]
    assert any(np.array_equal(y, [interval.point for interval in expected]) for y in drawn)
    assert all(np.array_equal(line.get_xdata(), [1000, 2000, 3000]) for line in ax.lines)
    (band,) = (c for c in ax.collections if isinstance(c, PolyCollection))
    corners = band.get_paths()[0].vertices
    for step, interval in zip((1000, 2000, 3000), expected, strict=True):
        at_step = corners[corners[:, 0] == step, 1]
        assert (at_step.min(), at_step.max()) == (interval.low, interval.high)


def test_another_statistic_can_be_drawn(tmp_path: Path, scores_VS: np.ndarray) -> None:
    (ax,) = learning_curves([make_run(tmp_path / "run", scores_VS)], statistic=mean).axes
    means, iqms = scores_VS.mean(axis=1), np.sort(scores_VS, axis=1)[:, 1:3].mean(axis=1)
    drawn = [line.get_ydata() for line in ax.lines]
    assert any(np.allclose(y, means) for y in drawn)
    assert not any(np.allclose(y, iqms) for y in drawn)


def test_axes_and_legend_say_what_is_drawn(tmp_path: Path, scores_VS: np.ndarray) -> None:
    runs = [make_run(tmp_path / "x", scores_VS, "x"), make_run(tmp_path / "y", scores_VS[:, :1], "y")]
    figure = learning_curves(runs)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("gradient steps", "normalised score", "hopper")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["x, 4 runs", "y, 1 run"]
    returns = learning_curves([make_run(tmp_path / "z", scores_VS, normalised=False)])
    assert returns.axes[0].get_ylabel() == "return"


def test_the_axis_says_which_steps_the_runs_count(tmp_path: Path, scores_VS: np.ndarray) -> None:
    fitted = make_run(tmp_path / "fit", scores_VS, "offline.iql")
    lived = [
        make_run(tmp_path / "online", scores_VS, "online.ppo"),
        make_run(tmp_path / "began", scores_VS, "offline.iql", began_at={"gradient_steps": 5, "environment_steps": 0}),
        make_run(tmp_path / "tuned", scores_VS, "offline.iql", fine_tuning={"n_envs": 1}),
    ]
    cases = {
        "gradient steps": [[fitted]],
        "environment steps": [[run] for run in lived] + [lived],
        "steps": [[fitted, run] for run in lived],
    }
    for label, several in cases.items():
        for runs in several:
            assert learning_curves(runs).axes[0].get_xlabel() == label


def test_each_task_has_a_panel_and_the_figure_one_legend(tmp_path: Path, scores_VS: np.ndarray) -> None:
    runs = [
        make_run(tmp_path / f"{algorithm}-{task}", scores_VS, algorithm, task)
        for algorithm in "xy"
        for task in ("hopper", "ant", "walker", "cheetah", "pen")
    ]
    figure = learning_curves(runs, out=tmp_path / "curves.png")
    titles = [ax.get_title() for ax in figure.axes if ax.axison]
    assert titles == ["ant", "cheetah", "hopper", "pen", "walker"]
    assert len(figure.legends) == 1
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_has_no_band_and_one_evaluation_is_a_point(tmp_path: Path) -> None:
    (ax,) = learning_curves([make_run(tmp_path / "one", [[1.0], [2.0]])]).axes
    (band,) = (c for c in ax.collections if isinstance(c, PolyCollection))
    assert all(len(path.vertices) == 0 for path in band.get_paths())
    (ax,) = learning_curves([make_run(tmp_path / "short", [[1.0, 2.0, 6.0]])]).axes
    assert any(np.array_equal(line.get_ydata(), [3.0]) for line in ax.lines)
    figure_svg(ax.figure)


def test_scores_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    (ax,) = learning_curves([make_run(tmp_path / "run", [[1.0, 2.0], [np.nan, 2.0], [3.0, 4.0]])]).axes
    assert any(np.array_equal(line.get_ydata(), [1.5, np.nan, 3.5], equal_nan=True) for line in ax.lines)


def test_given_axes_are_drawn_on_and_hold_one_task_only(tmp_path: Path, scores_VS: np.ndarray) -> None:
    figure = Figure()
    ax = figure.subplots()
    one, other = make_run(tmp_path / "a", scores_VS), make_run(tmp_path / "b", scores_VS, dataset="ant")
    assert learning_curves([one], ax=ax) is figure
    assert ax.get_legend() is not None
    with pytest.raises(ConfigError, match=r"2 tasks \(ant, hopper\): give one ax per task"):
        learning_curves([one, other], ax=ax)
    assert score_profile({"a": [1.0, 2.0]}, ax=figure.add_subplot()) is figure


def test_profile_shows_the_exact_steps(tmp_path: Path) -> None:
    scores = {"x": {"t": [1.0, 2.0, 4.0], "u": [2.0, 3.0]}, "y": {"t": [5.0], "u": [0.0]}}
    figure = score_profile(scores, out=tmp_path / "profile.svg", unit="return")
    (ax,) = figure.axes
    assert ax.get_xlabel() == "threshold (return)"
    lines = {to_hex(line.get_color()): line for line in ax.lines}
    for label, style in algorithm_styles(scores).items():
        line = lines[style["color"].lower()]
        assert set(line.get_xdata()) >= {0, 1, 2, 3, 4, 5}
        assert line.get_drawstyle() == "steps-post"
        profile = performance_profile(scores[label], line.get_xdata())
        np.testing.assert_array_equal(line.get_ydata(), profile.fraction_K)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x, 2 runs", "y, 1 run"]


def test_styles_differ_with_and_without_colour_and_stay_with_their_label() -> None:
    labels = [f"algorithm {i:02}" for i in range(20)]
    styles = algorithm_styles(labels)
    assert len({tuple(style.items()) for style in styles.values()}) == 20
    assert len({style["marker"] for style in list(styles.values())[:7]}) == 7
    assert algorithm_styles(reversed(labels)) == styles
    figure = score_profile({"algorithm 03": [1.0, 2.0]}, styles=styles)
    assert figure.axes[0].lines[0].get_color() == styles["algorithm 03"]["color"]


def test_equal_figures_are_equal_bytes_and_no_setting_is_left_behind(tmp_path: Path, scores_VS: np.ndarray) -> None:
    before = dict(matplotlib.rcParams)
    run = make_run(tmp_path / "run", scores_VS)
    assert figure_svg(learning_curves([run])) == figure_svg(learning_curves([run]))
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="None of the runs has an evaluation"):
        learning_curves([make_run(tmp_path / "run", np.zeros((0, 2)))])
    with pytest.raises(DataError, match="no scores"):
        score_profile({})
