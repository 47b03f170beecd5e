"""The report: its numbers are those of the statistics, nothing is loaded or unescaped, and every doubt is told."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corollary.core.errors import ConfigError, DataError
from corollary.core.evaluation import Evaluation
from corollary.core.html import Html, element, join
from corollary.core.report import format_table, summarise, warnings_about, write_report
from corollary.core.runs import Run, RunWriter
from corollary.core.statistics import iqm, probability_of_improvement, stratified_bootstrap

VOID = {"meta", "img", "br"}


def make_run(
    path: Path,
    scores_VS: Any,
    *,
    dataset: str = "hopper-medium",
    normalised: bool = True,
    env_id: str = "Hopper-v5",
    episodes: int = 2,
    metrics: Any = None,
    **changes: Any,
) -> Run:
    """A run with an evaluation every 1000 steps, of which the scores are the means over episodes."""
    scores_VS = np.asarray(scores_VS, dtype=np.float64)
    card = {
        "algorithm": "offline.bc",
        "config": {"batch_size": 256},
        "seeds": list(range(scores_VS.shape[1])),
        "n_steps": 1000 * len(scores_VS),
        "dataset": {"name": dataset, "fingerprint": f"{dataset:0<64}", "env_id": "Hopper-v5", "rows": 1000,
                    "ref_min_score": 10.0, "ref_max_score": 20.0},
        "versions": {"torch": "2.13"},
        "created": "2025-01-02T03:04:05Z",
        "command": {"algorithm": "offline.bc", "set": [], "preset": None},
    }  # fmt: skip
    with RunWriter(path, card | changes) as writer:
        for v, scores_S in enumerate(scores_VS):
            step = 1000 * (v + 1)
            writer.log_metrics(step, v, 100.0 * (v + 1), metrics or {"loss": 1.0})
            scores_SE = np.repeat(scores_S[:, None], episodes, axis=1)
            lengths = np.ones(scores_SE.shape, dtype=np.int64)
            seeds = tuple(range(episodes))
            writer.log_evaluation(
                step, v, Evaluation(env_id, scores_SE / 10 + 10, lengths, seeds, scores_SE if normalised else None)
            )
    return Run.read(path)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two algorithms, five seeds each in two directories, on two datasets."""
    rng = np.random.default_rng(0)
    return [
        make_run(
            tmp_path / "runs" / f"{algorithm}-{dataset}-{part}",
            rng.normal(level, 10, size=(3, len(seeds))),
            algorithm=algorithm,
            dataset=dataset,
            seeds=seeds,
        )
        for algorithm, level in (("offline.bc", 40), ("offline.prdc", 55))
        for dataset in ("hopper-medium", "hopper-expert")
        for part, seeds in enumerate(([0, 1, 2], [3, 4]))
    ]


# --- Summary and tables.


def test_summary_pools_directories_and_counts_training_runs(runs: list[Run]) -> None:
    rows = summarise(runs)
    assert [(row.task, row.algorithm, row.runs) for row in rows] == [
        ("hopper-expert", "offline.bc", 5),
        ("hopper-expert", "offline.prdc", 5),
        ("hopper-medium", "offline.bc", 5),
        ("hopper-medium", "offline.prdc", 5),
    ]
    bc_medium = np.concatenate([run.last_scores() for run in runs[:2]])
    assert rows[2].last == stratified_bootstrap(bc_medium)
    assert rows[2].last.point == iqm(bc_medium)
    assert rows[2].best == stratified_bootstrap(np.concatenate([run.best_scores() for run in runs[:2]]))
    assert rows[2].best.point > rows[2].last.point
    assert rows[2].steps_per_second == 200.0  # the median of 100, 200, 300
    assert rows[2].steps == (3000, 3000)
    assert (rows[2].env_id, rows[2].score_name) == ("Hopper-v5", "normalised score")


def test_tables_of_one_task_hold_the_numbers(tmp_path: Path) -> None:
    rows = summarise([make_run(tmp_path / "a", [[30, 10, 0], [5, 20, 35]])])
    for style in ("text", "markdown", "rich"):
        table = format_table(rows, style, width=100)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", table)
        for text in ("offline.bc", "hopper-medium: normalised score", "20.0 [5.0, 35.0]", "28.3 [20.0, 35.0]", "2,000"):
            assert text in plain, (style, text)
        assert "selected, hence biased upwards" in plain


def test_text_columns_are_aligned_and_markdown_is_escaped(tmp_path: Path) -> None:
    rows = summarise([
        make_run(tmp_path / "a", [[1, 2]], dataset="a|b"),
        make_run(tmp_path / "b", [[1000, 2]], dataset="c", normalised=False),
    ])  # fmt: skip
    lines = format_table(rows, "text").splitlines()[:4]
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("a|b: normalised score  offline.bc")
    assert lines[3].startswith("c: return ")
    markdown = format_table(rows, "markdown").splitlines()
    assert markdown[2].startswith(r"| a\|b: normalised score | offline.bc |")


def test_rich_tables_fit_a_terminal_of_80_columns(tmp_path: Path) -> None:
    rows = summarise([make_run(tmp_path / "a", [[30, 10, 0]], n_steps=10)])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", format_table(rows, "rich", width=80))
    assert max(map(len, plain.splitlines())) <= 80
    assert any("offline.bc" in line and "[0.0, 30.0]" in line for line in plain.splitlines())


def test_names_in_tables_are_no_markup(tmp_path: Path) -> None:
    rows = summarise([make_run(tmp_path / "a", [[1, 2]], algorithm="[bold]x[/bold]")])
    assert "[bold]x[/bold]" in format_table(rows, "rich", width=200)


def test_an_unknown_table_style_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'markdown'"):
        format_table([], "markdow")  # type: ignore[arg-type]


# --- Warnings.


def test_sound_runs_raise_no_warning(runs: list[Run]) -> None:
    assert warnings_about(runs) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": [0], "scores": [[1.0]]}, "One training run only, hence no interval: offline.bc on hopper-medium"),
        ({"scores": [[1, 2, 3]]}, "3 runs: 75 %"),
        ({"scores": np.zeros((0, 5))}, "odd has no evaluations"),
        ({"normalised": False}, "odd has no normalised scores"),
        ({"env_id": "Hopper-v4"}, "odd learnt from Hopper-v5 but is evaluated in Hopper-v4"),
        ({"n_steps": 9000}, "odd is unfinished: 1,000 of 9,000 steps"),
        (
            {"metrics": {"loss": [1, np.nan, 1, 1, 1]}},
            "odd: the metric loss is not finite, first at step 1,000 of seed 1",
        ),
        ({"scores": [[1, 2, np.inf, 4, 5]]}, "odd: an evaluation has a score that is not finite"),
    ],
)
def test_what_weakens_a_run_is_told(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    scores = changes.pop("scores", [[1, 2, 3, 4, 5]])
    odd = make_run(tmp_path / "odd", scores, **changes)
    found = warnings_about([odd])
    assert any(says in sentence for sentence in found), found
    write_report(tmp_path, tmp_path / "report.html")  # and nothing of it stops the report


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": [4, 5, 6, 7, 8]}, "the same seed occurs more than once and is counted once (seed 4)"),
        ({"algorithm": "offline.iql", "episodes": 7}, "evaluated on different numbers of episodes: 2, 7"),
        ({"algorithm": "offline.iql", "scores": [[1, 2, 3, 4, 5]] * 2}, "end at different steps: 1,000, 2,000"),
        ({"versions": {"torch": "2.6"}, "seeds": [5, 6, 7, 8, 9]}, "Runs differ in torch: 2.13, 2.6"),
        ({"dataset": "hopper-medium", "env_id": "Hopper-v4"}, "hopper-medium stands for 2 different tasks"),
    ],
)
def test_what_weakens_a_comparison_is_told(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    scores = changes.pop("scores", [[1, 2, 3, 4, 5]])
    pair = [make_run(tmp_path / "sound", [[1, 2, 3, 4, 5]]), make_run(tmp_path / "odd", scores, **changes)]
    found = warnings_about(pair)
    assert any(says in sentence for sentence in found), found


# --- The page.


class Reader(HTMLParser):
    """Collects text, tables and images, and checks that elements close in the order in which they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def test_the_page_holds_the_numbers_of_the_statistics(tmp_path: Path, runs: list[Run]) -> None:
    out = write_report(tmp_path / "runs", tmp_path / "new" / "report.html")
    assert out == tmp_path / "new" / "report.html"
    page = read(out)
    for row in summarise(runs):
        line = [row.algorithm, str(row.last), str(row.best), "5", "3,000", "200"]
        assert line in page.rows
    of = {
        algorithm: {
            task: np.concatenate([r.last_scores() for r in runs if (r.algorithm, r.dataset) == (algorithm, task)])
            for task in ("hopper-expert", "hopper-medium")
        }
        for algorithm in ("offline.bc", "offline.prdc")
    }
    better = probability_of_improvement(of["offline.prdc"], of["offline.bc"])
    assert ["offline.prdc", f"{better:.2f}", ""] in page.rows
    pooled = [
        row for row in page.rows if row[0] == "offline.prdc" and row[1] == str(stratified_bootstrap(of["offline.prdc"]))
    ]
    assert pooled  # the IQM over both datasets
    assert "20 training runs in 8 run directories, 2025-01-02." in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    assert "Read with care" not in page.text
    for text in (
        "2 episodes with reset seeds 0 to 1",
        f"{'hopper-expert':0<64}",
        "algorithm=offline.bc, set=[], preset=-",
        "2.13",
    ):
        assert text in page.text


def test_every_training_run_is_listed(tmp_path: Path, runs: list[Run]) -> None:
    page = read(write_report(tmp_path / "runs", tmp_path / "report.html"))
    for run in runs:
        for seed, last, best in zip(run.seeds, run.last_scores(), run.best_scores(), strict=True):
            line = [run.algorithm, run.dataset, run.path.name, str(seed), "3,000", f"{last:.1f}", f"{best:.1f}"]
            assert line in page.rows


def test_the_page_loads_nothing(tmp_path: Path, runs: list[Run]) -> None:
    out = write_report(tmp_path / "runs", tmp_path / "report.html")
    page = read(out)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"href", "srcset", "onload", "onerror"} & set(attributes)
        assert (attributes.get("src") or "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
    assert "url(" not in out.read_text()
    assert "@import" not in out.read_text()
    for _, attributes in page.tags:
        if "src" in attributes:
            svg = base64.b64decode(str(attributes["src"]).partition(",")[2])
            assert b"</svg>" in svg
            assert b"<script" not in svg
            assert attributes["alt"]


def test_equal_runs_give_equal_bytes(tmp_path: Path, runs: list[Run]) -> None:
    first = write_report(tmp_path / "runs", tmp_path / "first.html").read_bytes()
    assert write_report(tmp_path / "runs", tmp_path / "second.html").read_bytes() == first
    assert str(tmp_path).encode() not in first  # where the runs lie is nobody's business


def test_whatever_a_card_says_is_text(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>&amp;\"'<img src=x onerror=alert(1)>"
    config = {attack: attack}
    changes = {
        "algorithm": attack,
        "dataset": attack,
        "env_id": attack,
        "command": attack,
        "versions": {attack: attack},
    }
    make_run(tmp_path / "runs" / "one", [[1, 2]], config=config, **changes)
    make_run(tmp_path / "runs" / "two", [[1, 2]], config={attack: 1}, **changes)
    page = read(write_report(tmp_path / "runs", tmp_path / "report.html"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.text.count(attack) > 10


def test_differing_options_are_marked_and_others_are_not(tmp_path: Path) -> None:
    for name, alpha in (("one", 1.0), ("two", 2.5)):
        make_run(tmp_path / "runs" / name, [[1, 2]], config={"alpha": alpha, "batch_size": 256})
    out = write_report(tmp_path / "runs", tmp_path / "report.html")
    marked = re.findall(r"<mark><code>(.*?)</code></mark>", out.read_text())
    assert marked == ["1.0", "2.5"]
    page = read(out)
    assert ["run", "alpha"] in page.rows
    assert ["one", "1.0"] in page.rows
    assert any(row[0] == "offline.bc (alpha=1.0)" for row in page.rows)


def test_a_resumed_run_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "one", [[1, 2], [3, 4]])
    RunWriter(run.path, run.card, resume_step=1000).close()
    assert "Resumed at step 1,000." in read(write_report(run.path, tmp_path / "report.html")).text


def test_algorithms_without_a_common_dataset_are_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one", [[1, 2]], algorithm="x", dataset="d1")
    make_run(tmp_path / "runs" / "two", [[1, 2]], algorithm="y", dataset="d2")
    page = read(write_report(tmp_path / "runs", tmp_path / "report.html"))
    assert "no dataset in common" in page.text
    assert "Performance profile" not in page.text
    assert "All datasets together" not in page.text


def test_raw_returns_of_several_tasks_are_never_averaged(tmp_path: Path) -> None:
    for dataset in ("d1", "d2"):
        for algorithm in ("x", "y"):
            make_run(
                tmp_path / "runs" / f"{algorithm}{dataset}",
                [[1, 2]],
                algorithm=algorithm,
                dataset=dataset,
                normalised=False,
            )
    page = read(write_report(tmp_path / "runs", tmp_path / "report.html"))
    assert "All datasets together" not in page.text
    assert "Performance profile" not in page.text
    assert "Probability of improvement" in page.text  # compares within a task, so units do not matter


def test_runs_without_evaluations_still_give_a_page(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one", np.zeros((0, 2)))
    page = read(write_report(tmp_path / "runs", tmp_path / "report.html"))
    assert "No run has an evaluation." in page.text
    assert "batch_size" in page.text


def test_a_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run under"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_elements_escape_what_is_no_html_already() -> None:
    assert element("td", "<b>", Html("<i>"), class_='a"b') == '<td class="a&quot;b">&lt;b&gt;<i></td>'
    assert join("a<", element("br")) == "a&lt;<br></br>"
    assert isinstance(join("a"), Html)


def test_a_damaged_run_is_left_out_and_the_page_says_so(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / "runs" / name, np.zeros((1, 2)))
    (tmp_path / "runs" / "two" / "run.json").write_text("{")
    page = read(write_report(tmp_path / "runs", tmp_path / "report.html"))
    assert "two is left out: " in page.text
    assert "run.json is damaged" in page.text
    (tmp_path / "runs" / "one" / "metrics.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match=r"one: .*metrics\.jsonl line 1 is damaged"):
        write_report(tmp_path / "runs", tmp_path / "nothing.html")
